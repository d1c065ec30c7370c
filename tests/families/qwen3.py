"""Qwen3, Qwen3-MoE, Qwen3-VL-MoE and Qwen3.5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from networks import (
    DECODER_NORMS,
    DEFAULT_ROPE,
    Family,
    Linear,
    Network,
    Prefix,
    Sizes,
    Variant,
    attention,
    decoder_config,
    decoder_facts,
    head,
    text_or_wrapper,
    trunk,
    vision_tower,
)


def _linear_attention(net: Network, name: str, s: Sizes) -> None:
    key, value = s.key_heads * s.key_dim, s.value_heads * s.value_dim
    parts = (("q", key), ("k", key), ("v", value))
    net.linears.append(Linear(f"{name}.in_proj_qkv", parts, s.hidden))
    net.linear(f"{name}.in_proj_z", value, s.hidden, "z")
    net.linear(f"{name}.in_proj_b", s.value_heads, s.hidden, "b")
    net.linear(f"{name}.in_proj_a", s.value_heads, s.hidden, "a")
    net.linear(f"{name}.out_proj", s.hidden, value)
    net.others |= {
        f"{name}.conv1d.weight": (2 * key + value, 1, 4),
        f"{name}.A_log": (s.value_heads,),
        f"{name}.dt_bias": (s.value_heads,),
        f"{name}.norm.weight": (s.value_dim,),
    }


QWEN3_5_LAYERS = ("linear_attention", "full_attention")


def _qwen3(v: Variant) -> Network:
    net, s = trunk(v.sizes), v.sizes
    for layer in ("model.layers.0", "model.layers.1"):
        attention(net, f"{layer}.self_attn", s, bias=v.bias)
        net.gated_mlp(f"{layer}.mlp", s.intermediate, s.hidden)
        net.vectors(layer, s.hidden, *DECODER_NORMS)
    return head(net, v)


def _qwen3_moe(sparse: tuple[bool, bool], tower: bool) -> Callable[[Variant], Network]:
    def build(v: Variant) -> Network:
        net, s = trunk(v.sizes), v.sizes
        for i, moe in enumerate(sparse):
            layer = f"model.layers.{i}"
            attention(net, f"{layer}.self_attn", s, bias=v.bias)
            if moe:
                net.linear(f"{layer}.mlp.gate", s.experts, s.hidden)
                net.experts(f"{layer}.mlp.experts", v, s.hidden)
            else:
                net.gated_mlp(f"{layer}.mlp", s.intermediate, s.hidden)
            net.vectors(layer, s.hidden, *DECODER_NORMS)
        if tower and v.wrapper:
            vision_tower(net, s, deepstack=True)
        return head(net, v)

    return build


def _qwen3_5(moe: bool) -> Callable[[Variant], Network]:
    def feed_forward(net: Network, layer: str, v: Variant) -> None:
        s = v.sizes
        if moe:
            net.linear(f"{layer}.mlp.gate", s.experts, s.hidden)
            net.experts(f"{layer}.mlp.experts", v, s.hidden)
            net.gated_mlp(f"{layer}.mlp.shared_expert", s.shared_inter, s.hidden)
            net.linear(f"{layer}.mlp.shared_expert_gate", 1, s.hidden)
        else:
            net.gated_mlp(f"{layer}.mlp", s.intermediate, s.hidden)
        net.vectors(layer, s.hidden, *DECODER_NORMS)

    def build(v: Variant) -> Network:
        net, s = trunk(v.sizes), v.sizes
        for i, kind in enumerate(QWEN3_5_LAYERS):
            layer = f"model.layers.{i}"
            if kind == "full_attention":
                attention(net, f"{layer}.self_attn", s, gated=True, bias=v.bias)
            else:
                _linear_attention(net, f"{layer}.linear_attn", s)
            feed_forward(net, layer, v)
        if v.mtp:
            net.linear("mtp.fc", s.hidden, 2 * s.hidden)
            net.vectors("mtp", s.hidden, "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
            attention(net, "mtp.layers.0.self_attn", s, gated=True)
            feed_forward(net, "mtp.layers.0", v)
        if v.wrapper:
            vision_tower(net, s)
        return head(net, v)

    return build


def _qwen3_text(v: Variant) -> dict[str, Any]:
    return decoder_config(v, 2) | {
        "layer_types": ["full_attention"] * 2, "model_type": "qwen3", "max_window_layers": 28, "sliding_window": None,
        "use_sliding_window": False, "rope_parameters": DEFAULT_ROPE,
    }  # fmt: skip


def _qwen3_moe_text(v: Variant) -> dict[str, Any]:
    """Layer 0 sparse, layer 1 dense."""
    return decoder_config(v, 2) | {
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "model_type": "qwen3_moe", "moe_intermediate_size": v.sizes.moe_inter,
        "norm_topk_prob": True, "num_experts": v.sizes.experts, "num_experts_per_tok": 2, "rope_parameters": DEFAULT_ROPE,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False,
    }  # fmt: skip


def _qwen3_vl_moe_text(v: Variant) -> dict[str, Any]:
    """Layer 0 dense, layer 1 sparse; the nested flag of tying contradicts the outer one, which decides."""
    rope = DEFAULT_ROPE | {"mrope_interleaved": True, "mrope_section": [4, 2, 2]}
    return decoder_config(v, 2) | {
        "decoder_sparse_step": 2, "mlp_only_layers": [], "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": v.sizes.moe_inter, "num_experts_per_tok": 2, "num_local_experts": v.sizes.experts,
        "rope_parameters": rope, "router_aux_loss_coef": 0.001, "tie_word_embeddings": True,
    }  # fmt: skip


def _qwen3_5_text(moe: bool) -> Callable[[Variant], dict[str, Any]]:
    def text(v: Variant) -> dict[str, Any]:
        s = v.sizes
        config = decoder_config(v, 2) | {
            "layer_types": list(QWEN3_5_LAYERS), "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
            "linear_conv_kernel_dim": 4, "linear_key_head_dim": s.key_dim, "linear_num_key_heads": s.key_heads,
            "linear_num_value_heads": s.value_heads, "linear_value_head_dim": s.value_dim,
            "rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.25},
        }  # fmt: skip
        if moe:
            del config["intermediate_size"]
            config |= {
                "moe_intermediate_size": s.moe_inter, "num_experts": s.experts, "num_experts_per_tok": 2,
                "shared_expert_intermediate_size": s.shared_inter,
            }  # fmt: skip
        return config | ({"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False} if v.mtp else {})

    return text


def _qwen3_facts(v: Variant) -> dict[str, Any]:
    return decoder_facts(_qwen3_text(v), "intermediate_size", "layer_types") | {"sliding_window": None}


def _moe_facts(text: Callable[[Variant], dict[str, Any]], layers: tuple[str, str]) -> Callable[[Variant], dict[str, Any]]:
    def facts(v: Variant) -> dict[str, Any]:
        return decoder_facts(text(v), "intermediate_size", "moe_intermediate_size", "num_experts_per_tok") | {
            "layer_types": ["full_attention"] * 2, "mlp_layer_types": list(layers), "norm_topk_prob": True,
            "num_experts": v.sizes.experts, "sliding_window": None,
        }  # fmt: skip

    return facts


def _qwen3_5_facts(moe: bool) -> Callable[[Variant], dict[str, Any]]:
    linear = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    sparse = ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "shared_expert_intermediate_size")

    def facts(v: Variant) -> dict[str, Any]:
        more = sparse if moe else ("intermediate_size",)
        return decoder_facts(_qwen3_5_text(moe)(v), "layer_types", *more, *(f"linear_{key}" for key in linear)) | {
            "rotary_dim": v.sizes.head_dim // 4, "attn_output_gate": True, "output_gate": "silu",
            "mtp_num_hidden_layers": int(v.mtp),
        }  # fmt: skip

    return facts


PREFIXES: dict[str, Prefix] = {
    "Q1": Prefix("model.language_model.", "lm_head.", "model.visual.", "mtp."),
    "Q1-inner-head": Prefix("model.language_model.", "model.language_model.lm_head.", "model.visual.", "mtp."),
    "Q2": Prefix("language_model.model.", "language_model.lm_head.", "visual.", "mtp."),
    "Q2-model-visual": Prefix("language_model.model.", "language_model.lm_head.", "model.visual.", "mtp."),
    "Q3": Prefix("model.", "lm_head.", None, "mtp."),
    "Q3-inner-head": Prefix("model.", "model.lm_head.", None, "mtp."),
    "Q4": Prefix("model.language_model.", "lm_head.", None, None),
    "Q5": Prefix("language_model.", None, "visual.", None),
    "Q6": Prefix("", None, None, None),
    "Q8": Prefix("language_model.model.", "lm_head.", None, "language_model.mtp."),
    "Q8-model-mtp": Prefix("language_model.model.", "language_model.lm_head.", None, "model.mtp."),
}
PREFIXES |= {f"Q7-{inner}": PREFIXES[inner].under("base_model.model.") for inner in ("Q1", "Q2", "Q3", "Q4")}

_TEXT = {"mtp": True}
_VLM = {"mtp": True, "wrapper": True}
_SPELLINGS_OF_TEXT = ("Q1", "Q1-inner-head", "Q2", "Q3-inner-head", "Q4", "Q5", "Q6", "Q7-Q1", "Q7-Q2", "Q7-Q3", "Q7-Q4", "Q8",
                      "Q8-model-mtp")  # fmt: skip

FAMILIES: Mapping[str, Family] = {
    "qwen3": Family(
        _qwen3, text_or_wrapper(_qwen3_text, "Qwen3"), _qwen3_facts,
        {"qwen3": {}, "qwen3_tied_bias": {"tied": True, "bias": True}}, {"qwen3": ({}, "Q3", ("Q6", "Q7-Q3"))},
    ),
    "qwen3_moe": Family(
        _qwen3_moe((True, False), tower=False), text_or_wrapper(_qwen3_moe_text, "Qwen3Moe"),
        _moe_facts(_qwen3_moe_text, ("sparse", "dense")),
        {"qwen3_moe": {}}, {"qwen3-moe": ({}, "Q3", ("Q6", "Q7-Q3"))},
    ),
    "qwen3_vl_moe": Family(
        _qwen3_moe((False, True), tower=True),
        text_or_wrapper(_qwen3_vl_moe_text, "Qwen3VLMoe", "qwen3_vl_moe", deepstack=True),
        _moe_facts(_qwen3_vl_moe_text, ("dense", "sparse")),
        {"qwen3_vl_moe": {"wrapper": True}}, {"vl-moe": ({"wrapper": True}, "Q1", ("Q2", "Q5", "Q7-Q1"))}, experts="X2",
    ),
    "qwen3_5": Family(
        _qwen3_5(False), text_or_wrapper(_qwen3_5_text(False), "Qwen3_5", "qwen3_5"), _qwen3_5_facts(False),
        {"qwen3_5": {}, "qwen3_5_mtp": {"mtp": True, "f32_gates": True}, "qwen3_5_vlm": {"wrapper": True, "mtp": True}},
        {
            "text": (_TEXT, "Q3", _SPELLINGS_OF_TEXT),
            "vlm": (_VLM, "Q1", ("Q1-inner-head", "Q2", "Q2-model-visual", "Q5", "Q7-Q1", "Q7-Q2", "Q8", "Q8-model-mtp")),
        },
    ),
    "qwen3_5_moe": Family(
        _qwen3_5(True), text_or_wrapper(_qwen3_5_text(True), "Qwen3_5Moe", "qwen3_5_moe"), _qwen3_5_facts(True),
        {
            "qwen3_5_moe": {"mtp": True, "layout": "X2", "expert_scales": "expert"},
            "qwen3_5_moe_vlm": {"wrapper": True, "mtp": True},
        },
        {
            "moe": (_TEXT | {"layout": "X2"}, "Q3", ("Q1", "Q2", "Q3-inner-head", "Q6", "Q7-Q2", "Q8")),
            "moe-vlm": (_VLM, "Q1", ("Q2", "Q5", "Q7-Q1", "Q8-model-mtp")),
        },
        experts="X2",
    ),
}  # fmt: skip

"""Step-3.5, Step-3.7 and Step3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from networks import (
    DECODER_NORMS,
    Config,
    Family,
    Network,
    Options,
    Prefix,
    Sizes,
    Variant,
    attention,
    head,
    trunk,
)

_STEP_TOWERS = ("vision_model", "vit_large_projector")
_STEP3_TOWERS = (*_STEP_TOWERS, "vit_downsampler")


def _step_feed_forward(net: Network, layer: str, v: Variant, sparse: bool) -> None:
    s = v.sizes
    if sparse:
        net.linear(f"{layer}.moe.gate", s.experts, s.hidden)
        net.experts(f"{layer}.moe.experts", v, s.hidden)
        net.gated_mlp(f"{layer}.share_expert", s.shared_inter, s.hidden)
    else:
        net.gated_mlp(f"{layer}.mlp", s.intermediate, s.hidden)
    net.vectors(layer, s.hidden, *DECODER_NORMS)


def _step_towers(net: Network, s: Sizes, roots: tuple[str, ...]) -> None:
    net.others["vision_model.conv1.weight"] = (32, 3, 4, 4)
    net.others["vision_model.transformer.resblocks.0.attn.in_proj_weight"] = (96, 32)
    for root in roots[1:]:
        net.others |= {f"{root}.weight": (s.hidden, 128)}


def _step3p5(v: Variant) -> Network:
    """Layer 0 full attention and dense, layer 1 sliding and sparse; after them, in the same list, a draft layer."""
    net, s = trunk(v.sizes), v.sizes
    sliding = replace(s, heads=s.heads + 2)
    for i in range(3 if v.mtp else 2):
        layer, sizes = f"model.layers.{i}", sliding if i else s
        attention(net, f"{layer}.self_attn", sizes)
        net.linear(f"{layer}.self_attn.g_proj", sizes.heads, s.hidden)
        _step_feed_forward(net, layer, v, sparse=i == 1)
        if i == 1:
            net.others[f"{layer}.moe.router_bias"] = (s.experts,)
    if v.mtp:
        net.drafts.append(layer)
        net.vectors(layer, s.hidden, "enorm", "hnorm", "shared_head.norm")
        net.linear(f"{layer}.eh_proj", s.hidden, 2 * s.hidden)
        net.linear(f"{layer}.shared_head.head", s.vocab, s.hidden)
    if v.wrapper:
        _step_towers(net, s, _STEP_TOWERS)
    return head(net, v)


def _step3p5_text(v: Variant) -> dict[str, Any]:
    s, layers = v.sizes, ["full_attention", "sliding_attention"] + ["sliding_attention"] * v.mtp
    return {
        "att_impl_type": "GQA", "bos_token_id": 0, "dtype": v.dtype, "eos_token_id": 1, "pad_token_id": 0,
        "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": s.heads + 2,
                                    "num_attention_groups": s.kv_heads, "head_dim": s.head_dim},
        "head_dim": s.head_dim, "hidden_size": s.hidden, "intermediate_size": s.intermediate, "layer_types": layers,
        "max_position_embeddings": 512, "model_type": "step3p5", "moe_intermediate_size": s.moe_inter,
        "moe_layers_enum": "1", "moe_num_experts": s.experts, "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0, "moe_top_k": 2, "need_fp32_gate": True, "norm_expert_weight": True,
        "num_attention_groups": s.kv_heads, "num_attention_heads": s.heads, "num_hidden_layers": 2,
        "num_nextn_predict_layers": int(v.mtp), "partial_rotary_factors": [0.5] + [1.0] * (len(layers) - 1),
        "rms_norm_eps": 1e-05, "rope_theta": [5e6] + [1e4] * (len(layers) - 1), "share_expert_dim": s.shared_inter,
        "rope_scaling": {"factor": 2.0, "high_freq_factor": 32.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 256, "rope_type": "llama3"},
        "sliding_window": 8, "swiglu_limits": [0.0, 7.0] + [0.0] * v.mtp, "swiglu_limits_shared": [0.0, 16.0] + [0.0] * v.mtp,
        "tie_word_embeddings": v.tied, "use_head_wise_attn_gate": True, "use_moe_router_bias": True, "use_qk_norm": True,
        "vocab_size": s.vocab, "yarn_only_types": ["full_attention"], "zero_centered": True,
    }  # fmt: skip


def _step_config(
    text: Callable[[Variant], dict[str, Any]], name: str, wrapper: tuple[str, str], bare_name: str
) -> Config:
    """`wrapper`: class and model type of the vision-language wrapper."""

    def config(v: Variant, bare: bool) -> dict[str, Any]:
        if not v.wrapper:
            return {"architectures": [bare_name if bare else name], **text(v)}
        return {
            "architectures": [wrapper[0]], "dtype": v.dtype, "image_token_id": 76, "model_type": wrapper[1],
            "text_config": text(v), "tie_word_embeddings": v.tied, "vision_config": {"layers": 1, "patch_size": 4, "width": 32},
        }  # fmt: skip

    return config


def _step_facts(text: Mapping[str, Any]) -> dict[str, Any]:
    """What both generations say."""
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "moe_intermediate_size", "share_expert_dim", "norm_expert_weight", "rms_norm_eps", "bos_token_id", "pad_token_id",
    )  # fmt: skip
    return {key: text[key] for key in same} | {
        "eos_token_id": [1], "max_position_embeddings": 512, "mlp_layer_types": ["dense", "sparse"],
        "num_experts": text["moe_num_experts"], "num_experts_per_tok": 2, "num_key_value_heads": text["num_attention_groups"],
        "rope_scaling": text["rope_scaling"], "rope_theta": text["rope_theta"],
    }  # fmt: skip


def _step3p5_facts(v: Variant) -> dict[str, Any]:
    text = _step3p5_text(v)
    same = ("partial_rotary_factors", "yarn_only_types", "swiglu_limits", "swiglu_limits_shared", "sliding_window",
            "use_moe_router_bias", "num_nextn_predict_layers")  # fmt: skip
    return _step_facts(text) | {key: text[key] for key in same} | {
        "layer_kinds": ["full_attention.dense", "sliding_attention.sparse"], "layer_scale": False,
        "layer_types": ["full_attention", "sliding_attention"], "mtp_layer_kinds": ["sliding_attention.dense"] * v.mtp,
        "num_sliding_attention_heads": v.sizes.heads + 2, "num_sliding_key_value_heads": v.sizes.kv_heads,
        "rope_parameters": None, "router_scaling_factor": 3.0,
    }  # fmt: skip


def _step3(v: Variant) -> Network:
    """Layer 0 dense, layer 1 sparse; queries through a bottleneck, one shared key and value head."""
    net, s = trunk(v.sizes), v.sizes
    for i in range(2):
        layer = f"model.layers.{i}"
        net.linear(f"{layer}.self_attn.q_proj", s.latent, s.hidden, "q")
        net.linear(f"{layer}.self_attn.k_proj", s.head_dim, s.hidden, "k")
        net.linear(f"{layer}.self_attn.v_proj", s.head_dim, s.hidden, "v")
        net.vectors(f"{layer}.self_attn", s.latent, "inter_norm")
        net.linear(f"{layer}.self_attn.wq", s.heads * s.head_dim, s.latent)
        net.linear(f"{layer}.self_attn.o_proj", s.hidden, s.heads * s.head_dim)
        _step_feed_forward(net, layer, v, sparse=i == 1)
    if v.wrapper:
        _step_towers(net, s, _STEP3_TOWERS)
    return head(net, v)


def _step3_text(v: Variant) -> dict[str, Any]:
    s = v.sizes
    return {
        "bos_token_id": 0, "dtype": v.dtype, "eos_token_id": 1, "head_dim": s.head_dim, "hidden_size": s.hidden,
        "intermediate_size": s.intermediate, "max_position_embedding": 512, "model_type": "step3_text",
        "moe_intermediate_size": s.moe_inter, "moe_layers_enum": "1", "moe_num_experts": s.experts, "moe_top_k": 2,
        "norm_expert_weight": False, "num_attention_groups": 1, "num_attention_heads": s.heads, "num_hidden_layers": 2,
        "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5e5, "share_expert_dim": s.shared_inter,
        "share_q_dim": s.latent, "tie_word_embeddings": v.tied, "vocab_size": s.vocab,
    }  # fmt: skip


def _step3_facts(v: Variant) -> dict[str, Any]:
    return _step_facts(_step3_text(v)) | {"share_q_dim": v.sizes.latent}


_SHARED_HEAD = (("shared_head.head", "transformer.shared_head.output"), ("shared_head.norm", "transformer.shared_head.norm"))
_VIT = {root: f"{root}." for root in _STEP_TOWERS}
PREFIXES: dict[str, Prefix] = {
    "S1": Prefix("model.", "lm_head.", None, None, _VIT, _SHARED_HEAD),
    "S1-plain-head": Prefix("model.", "lm_head.", None, None, _VIT, (("shared_head.head", "shared_head.output"),)),
    "S2": Prefix(
        "model.language_model.", "lm_head.", None, None, {root: f"model.{place}" for root, place in _VIT.items()}, _SHARED_HEAD
    ),
    "S3": Prefix("language_model.model.", "language_model.lm_head.", None, None, _VIT),
    "T1": Prefix("model.", "lm_head.", None, None, {root: f"{root}." for root in _STEP3_TOWERS}),
    "T1-inner": Prefix("language_model.model.", "language_model.lm_head.", None, None, {r: f"{r}." for r in _STEP3_TOWERS}),
}
PREFIXES |= {f"Q7-{inner}": PREFIXES[inner].under("base_model.model.") for inner in ("S1", "S2", "T1")}

_STACKED: Options = {"layout": "X4"}
_MTP: Options = {"mtp": True}

FAMILIES: Mapping[str, Family] = {
    "step3p5": Family(
        _step3p5,
        _step_config(_step3p5_text, "Step3p5ForCausalLM", ("Step3p7ForConditionalGeneration", "step3p7"), "Step3p7TextModel"),
        _step3p5_facts,
        {"step3p5": {**_MTP, **_STACKED}, "step3p7": {**_MTP, "wrapper": True}},
        {
            "step": ({**_MTP, **_STACKED}, "S1", ("S1-plain-head", "S2", "S3", "Q7-S1")),
            "step-vl": ({**_MTP, **_STACKED, "wrapper": True}, "S1", ("S2", "S3", "Q7-S2")),
        },
        ("S1", "S1"), "X4",
    ),
    "step3_text": Family(
        _step3,
        _step_config(_step3_text, "Step3TextForCausalLM", ("Step3VLForConditionalGeneration", "step3_vl"), "Step3TextModel"),
        _step3_facts,
        {"step3": {**_STACKED, "expert_scales": "one"}, "step3_vl": {"wrapper": True}},
        {"step3": ({**_STACKED, "wrapper": True}, "T1", ("T1-inner", "Q7-T1"))},
        ("T1", "T1"), "X4",
    ),
}  # fmt: skip

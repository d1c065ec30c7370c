"""Nemotron-H, its mixtures of experts, and the Nano VL wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from networks import (
    Family,
    Linear,
    Network,
    Prefix,
    Variant,
    attention,
    head,
)

_NEMOTRON_PATTERN = {"": "ME*-", "latent": "ME*-", "dense": "M-*-"}
_BLOCKS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
_SQUEEZED = ("latent",)  # varieties whose experts work in a smaller space


def _nemotron_block(net: Network, block: str, kind: str, v: Variant) -> None:
    """One mixer with the norm before it."""
    s, mixer = v.sizes, f"{block}.mixer"
    net.vectors(block, s.hidden, "norm")
    if kind == "M":
        inner, groups = s.value_heads * s.value_dim, s.key_heads * s.key_dim
        parts = (("z", inner), ("x", inner), ("B", groups), ("C", groups), ("dt", s.value_heads))
        net.linears.append(Linear(f"{mixer}.in_proj", parts, s.hidden))
        net.linear(f"{mixer}.out_proj", s.hidden, inner)
        net.others |= {f"{mixer}.{name}": (s.value_heads,) for name in ("A_log", "D", "dt_bias")}
        conv = inner + 2 * groups
        net.others |= {f"{mixer}.conv1d.weight": (conv, 1, 4), f"{mixer}.conv1d.bias": (conv,)}
        net.vectors(mixer, inner, "norm")
    elif kind == "*":
        attention(net, mixer, s, bias=v.bias, norms=False)
    elif kind == "-":
        net.linear(f"{mixer}.up_proj", s.intermediate, s.hidden)
        net.linear(f"{mixer}.down_proj", s.hidden, s.intermediate)
    else:
        hidden = s.latent if v.variety in _SQUEEZED else s.hidden
        net.linear(f"{mixer}.gate", s.experts, s.hidden)
        net.others[f"{mixer}.gate.e_score_correction_bias"] = (s.experts,)
        if v.variety in _SQUEEZED:
            net.linear(f"{mixer}.fc1_latent_proj", hidden, s.hidden)
            net.linear(f"{mixer}.fc2_latent_proj", s.hidden, hidden)
        net.experts(f"{mixer}.experts", v, hidden, gated=False)
        net.linear(f"{mixer}.shared_experts.up_proj", s.shared_inter, s.hidden)
        net.linear(f"{mixer}.shared_experts.down_proj", s.hidden, s.shared_inter)


def _nemotron_h(v: Variant) -> Network:
    s = v.sizes
    net = Network(others={"model.embed_tokens.weight": (s.vocab, s.hidden), "model.norm_f.weight": (s.hidden,)})
    for i, kind in enumerate(_NEMOTRON_PATTERN[v.variety]):
        _nemotron_block(net, f"model.layers.{i}", kind, v)
    if v.mtp:
        net.vectors("mtp.layers.0", s.hidden, "enorm", "hnorm")
        net.linear("mtp.layers.0.eh_proj", s.hidden, 2 * s.hidden)
        _nemotron_block(net, "mtp.layers.0", "*", v)
        _nemotron_block(net, "mtp.layers.1", "E", v)
        net.vectors("mtp.layers.1", s.hidden, "final_layernorm")
    if v.wrapper:
        block = "vision_model.radio_model.model.blocks.0"
        net.others |= {
            "vision_model.radio_model.input_conditioner.norm_mean": (3, 1, 1),
            "vision_model.radio_model.model.patch_generator.pos_embed": (1, 16, 32),
            f"{block}.attn.qkv.weight": (96, 32), f"{block}.attn.qkv.bias": (96,), f"{block}.norm1.weight": (32,),
            "mlp1.0.weight": (128,), "mlp1.1.weight": (48, 128), "mlp1.3.weight": (s.hidden, 48),
            "sound_projection.linear1.weight": (48, 24), "sound_encoder.encoder.layers.0.norm.bias": (24,),
        }  # fmt: skip
    return head(net, v)


def _nemotron_text(v: Variant) -> dict[str, Any]:
    s, pattern = v.sizes, _NEMOTRON_PATTERN[v.variety]
    config = {
        "attention_bias": v.bias, "attention_dropout": 0.0, "bos_token_id": 0, "chunk_size": 4, "conv_kernel": 4,
        "dtype": v.dtype, "eos_token_id": 1, "expand": 2, "head_dim": s.head_dim, "hidden_size": s.hidden,
        "hybrid_override_pattern": pattern, "intermediate_size": s.intermediate, "layer_norm_epsilon": 1e-05,
        "mamba_head_dim": s.value_dim, "mamba_hidden_act": "silu", "mamba_num_heads": s.value_heads, "mamba_proj_bias": False,
        "max_position_embeddings": 512, "mlp_bias": False, "mlp_hidden_act": "relu2", "model_type": "nemotron_h",
        "n_groups": s.key_heads, "num_attention_heads": s.heads, "num_hidden_layers": len(pattern),
        "num_key_value_heads": s.kv_heads, "pad_token_id": 0, "residual_in_fp32": False, "ssm_state_size": s.key_dim,
        "tie_word_embeddings": v.tied, "time_step_limit": [0.0, float("inf")], "time_step_min": 0.001, "use_bias": False,
        "use_conv_bias": True, "vocab_size": s.vocab,
    }  # fmt: skip
    if "E" in pattern:
        config |= {
            "moe_intermediate_size": s.moe_inter, "moe_shared_expert_intermediate_size": s.shared_inter, "n_group": 1,
            "n_routed_experts": s.experts, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 2,
            "routed_scaling_factor": 2.5, "topk_group": 1, "moe_latent_size": s.latent if v.variety in _SQUEEZED else None,
        }  # fmt: skip
    return config | ({"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"} if v.mtp else {})


def _nemotron_config(v: Variant, bare: bool) -> dict[str, Any]:
    if not v.wrapper:
        name = "NemotronHModel" if bare else "NemotronHForCausalLM"
        return {"architectures": [name], **_nemotron_text(v), "transformers_version": "5.23.0"}
    return {
        "architectures": ["NemotronH_Nano_VL_V2"], "downsample_ratio": 0.5, "dtype": v.dtype, "force_image_size": 512,
        "llm_config": _nemotron_text(v), "model_type": "NemotronH_Nano_VL_V2", "patch_size": 16,
        "projector_hidden_size": 48, "vision_config": {"hidden_size": 32}, "vit_hidden_size": 32,
    }  # fmt: skip


def _nemotron_facts(v: Variant) -> dict[str, Any]:
    text = _nemotron_text(v)
    same = (
        "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias",
        "intermediate_size", "mlp_bias", "mlp_hidden_act", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups",
        "conv_kernel", "use_conv_bias", "max_position_embeddings", "bos_token_id", "pad_token_id", "num_hidden_layers",
    )  # fmt: skip
    without = {"n_routed_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "n_shared_experts": 1,
               "moe_latent_size": None, "routed_scaling_factor": 1.0, "norm_topk_prob": True, "n_group": 1,
               "topk_group": 1}  # fmt: skip
    moe = f"{'latent_' if v.variety in _SQUEEZED else ''}moe"
    kinds = {**_BLOCKS, "E": moe}
    return {
        **{key: text[key] for key in same}, **{key: text.get(key, value) for key, value in without.items()},
        "eos_token_id": [1], "layer_types": [kinds[k] for k in text["hybrid_override_pattern"]], "mamba_bias": False,
        "mtp_layer_types": ["start_attention", f"{moe}_end"], "num_nextn_predict_layers": int(v.mtp), "rms_norm_eps": 1e-05,
        "shared_intermediate_size": text.get("moe_shared_expert_intermediate_size", 0), "time_step_limit": [0.0, None],
    }  # fmt: skip


_NANO_TOWERS = {root: f"{root}." for root in ("vision_model", "mlp1", "sound_encoder", "sound_projection", "vision_projector")}
_EMBEDDINGS = (("embed_tokens", "embeddings"),)
PREFIXES: dict[str, Prefix] = {
    "N1": Prefix("backbone.", "lm_head.", None, "mtp.", inner=_EMBEDDINGS),
    "N2": Prefix("model.", "lm_head.", None, None, inner=_EMBEDDINGS),
    "N3": Prefix("model.", "lm_head.", None, None),
    "N4": Prefix("language_model.backbone.", "language_model.lm_head.", None, "mtp.", _NANO_TOWERS, _EMBEDDINGS),
    "N4-inner-mtp": Prefix(
        "language_model.backbone.", "language_model.lm_head.", None, "language_model.mtp.", _NANO_TOWERS, _EMBEDDINGS
    ),
    "N5": Prefix("language_model.model.", "language_model.lm_head.", None, None),
    "N6": Prefix("", None, None, None, inner=_EMBEDDINGS),
}
PREFIXES |= {f"Q7-{inner}": PREFIXES[inner].under("base_model.model.") for inner in ("N1", "N4")}

_MTP = {"mtp": True}

FAMILIES: Mapping[str, Family] = {
    "nemotron_h": Family(
        _nemotron_h, _nemotron_config, _nemotron_facts,
        {
            "nemotron_h": _MTP | {"layout": "X2"},
            "nemotron_h_dense": {"variety": "dense"},
            "nemotron_h_latent": _MTP | {"variety": "latent"},
            "nemotron_nano_vl": {"wrapper": True},
        },
        {
            "nemotron": (_MTP, "N1", ("N2", "N3", "N5", "N6", "Q7-N1")),
            "nemotron-vl": (_MTP | {"wrapper": True}, "N4", ("N1", "N4-inner-mtp", "N5", "Q7-N4")),
        },
        hub=("N4", "N1"),
    ),
}  # fmt: skip

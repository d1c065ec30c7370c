"""Nemotron-H: Mamba2, attention, MLP and (latent) MoE blocks in one list; MTP head; the Nano VL and Omni wrappers.

Source: transformers 5.23.0, run; wrappers and MTP from vLLM 0.33 and published configs, read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConvertError, Problem
from ..names import NameSpace, aliases
from .base import Family, Field, Item, Linear, Parameter, Part, Shard, embedding, fused, linear, look_up, tower
from .qwen3 import HEAD

# Spellings of a block's kind in `hybrid_override_pattern` and in `layers_block_type`.
KINDS: Mapping[str, str] = {
    "M": "mamba", "mamba": "mamba", "linear_attention": "mamba",
    "*": "attention", "attention": "attention", "full_attention": "attention",
    "-": "mlp", "mlp": "mlp",
    "E": "moe", "moe": "moe",
}  # fmt: skip

FIELDS = (
    Field("vocab_size", ("vocab_size",), kind=int),
    Field("hidden_size", ("hidden_size",), kind=int),
    Field("layer_types", ("hybrid_override_pattern", "layers_block_type", "layer_types"), kind=(str, list)),
    Field("rms_norm_eps", ("layer_norm_epsilon", "norm_eps", "rms_norm_eps"), default=1e-5, kind=(int, float)),
    Field("num_attention_heads", ("num_attention_heads",), kind=int),
    Field("num_key_value_heads", ("num_key_value_heads",), kind=int),
    Field("head_dim", ("head_dim", "attention_head_dim"), kind=int),
    Field("attention_bias", ("attention_bias",), default=False, kind=bool),
    Field("intermediate_size", ("intermediate_size",), default=None, kind=(int, list)),
    Field("mlp_bias", ("mlp_bias",), default=False, kind=bool),
    Field("mlp_hidden_act", ("mlp_hidden_act",), default="relu2", kind=str),
    Field("mamba_num_heads", ("mamba_num_heads",), kind=int),
    Field("mamba_head_dim", ("mamba_head_dim",), kind=int),
    Field("ssm_state_size", ("ssm_state_size", "mamba_d_state", "mamba_state_dim"), kind=int),
    Field("n_groups", ("n_groups", "mamba_n_groups", "mamba_num_groups"), kind=int),
    Field("conv_kernel", ("conv_kernel", "mamba_d_conv"), default=4, kind=int),
    Field("use_conv_bias", ("use_conv_bias", "mamba_conv_bias"), default=True, kind=bool),
    Field("mamba_bias", ("use_bias", "mamba_proj_bias"), default=False, kind=bool),
    Field("time_step_limit", ("time_step_limit", "mamba_dt_limit"), default=(0.0, None), kind=(list, tuple)),
    Field("n_routed_experts", ("n_routed_experts", "num_experts", "num_local_experts"), default=0, kind=int),
    Field("num_experts_per_tok", ("num_experts_per_tok",), default=0, kind=int),
    Field("moe_intermediate_size", ("moe_intermediate_size",), default=0, kind=int),
    Field("n_shared_experts", ("n_shared_experts",), default=1, kind=int),
    Field("shared_intermediate_size", ("moe_shared_expert_intermediate_size",), default=0, kind=int),
    Field("moe_latent_size", ("moe_latent_size",), default=None, kind=int),
    Field("routed_scaling_factor", ("routed_scaling_factor",), default=1.0, kind=(int, float)),
    Field("norm_topk_prob", ("norm_topk_prob",), default=True, kind=bool),
    Field("n_group", ("n_group",), default=1, kind=int),
    Field("topk_group", ("topk_group",), default=1, kind=int),
    Field("mtp_layer_types", ("mtp_hybrid_override_pattern", "mtp_layers_block_type"), default="*E", kind=(str, list)),
    Field("num_nextn_predict_layers", ("num_nextn_predict_layers",), default=0, kind=int),
    Field("max_position_embeddings", ("max_position_embeddings",), default=None, kind=int),
    Field("bos_token_id", ("bos_token_id",), default=None, kind=int),
    Field("eos_token_id", ("eos_token_id",), default=None, kind=(int, list)),
    Field("pad_token_id", ("pad_token_id",), default=None, kind=int),
)

NORM = Parameter("norm.weight", ("hidden",))
MAMBA: tuple[Item, ...] = (
    NORM,
    Linear(  # one projection on disk, so one scale, for five partitions
        "mixer.in_proj", "hidden",
        (Shard("in_proj", (("z", "inner"), ("x", "inner"), ("B", "groups"), ("C", "groups"), ("dt", "mamba_heads"))),),
        bias="mamba_bias",
    ),
    Parameter("mixer.conv1d.weight", ("conv", 1, "kernel")),
    Parameter("mixer.conv1d.bias", ("conv",), flag="use_conv_bias"),
    Parameter("mixer.A_log", ("mamba_heads",)),
    Parameter("mixer.D", ("mamba_heads",)),
    Parameter("mixer.dt_bias", ("mamba_heads",)),
    Parameter("mixer.norm.weight", ("inner",)),
    linear("mixer.out_proj", "hidden", "inner", bias="mamba_bias"),
)  # fmt: skip
ATTENTION: tuple[Item, ...] = (
    NORM,
    fused(
        "mixer.qkv_proj", "hidden",
        ("q_proj", (("q", "query"),)), ("k_proj", (("k", "key_value"),)), ("v_proj", (("v", "key_value"),)),
        bias="attention_bias",
    ),
    linear("mixer.o_proj", "hidden", "query", bias="attention_bias"),
)  # fmt: skip
MLP: tuple[Item, ...] = (
    NORM,
    linear("mixer.up_proj", "inter", "hidden", bias="mlp_bias"),
    linear("mixer.down_proj", "hidden", "inter", bias="mlp_bias"),
)
ROUTER: tuple[Item, ...] = (
    NORM,
    Parameter("mixer.gate.e_score_correction_bias", ("experts",)),  # before the linear that it is stored inside
    linear("mixer.gate", "experts", "hidden"),
)
EXPERTS: tuple[Item, ...] = (  # not gated: no gate matrix, so w13 is the up projection alone
    Linear("mixer.experts.up_proj", "expert_hidden", (Shard("up_proj", (("", "moe_inter"),)),),
           experts="experts", stacks=("w13",)),
    Linear("mixer.experts.down_proj", "moe_inter", (Shard("down_proj", (("", "expert_hidden"),)),),
           experts="experts", stacks=("w2",)),
    linear("mixer.shared_experts.up_proj", "shared_inter", "hidden"),
    linear("mixer.shared_experts.down_proj", "hidden", "shared_inter"),
)  # fmt: skip
LATENT: tuple[Item, ...] = (
    linear("mixer.fc1_latent_proj", "expert_hidden", "hidden"),
    linear("mixer.fc2_latent_proj", "hidden", "expert_hidden"),
)
BLOCKS: Mapping[str, tuple[Item, ...]] = {
    "mamba": MAMBA,
    "attention": ATTENTION,
    "mlp": MLP,
    "moe": (*ROUTER, *EXPERTS),
    "latent_moe": (*ROUTER, *LATENT, *EXPERTS),
}
# A draft step starts by joining embedding and hidden state, and ends with a norm of its own.
STEP_START: tuple[Item, ...] = (
    Parameter("enorm.weight", ("hidden",)),
    Parameter("hnorm.weight", ("hidden",)),
    linear("eh_proj", "hidden", "two_hidden"),
)
STEP_END: tuple[Item, ...] = (Parameter("final_layernorm.weight", ("hidden",)),)


def _kinds(pattern: str | list[Any], latent: bool, key: str) -> list[str]:
    """Kinds of blocks from either spelling of a pattern."""
    kinds = []
    for spelling in pattern:
        kind = KINDS.get(str(spelling))
        if kind is None:
            raise ConvertError(
                Problem("config.json", key, f"blocks of {', '.join(KINDS)}", repr(spelling), "use a newer qconvert")
            )
        kinds.append("latent_moe" if latent and kind == "moe" else kind)
    return kinds


def _seconds(limit: Any) -> float | None:
    """A bound of a time step; None for infinity, which JSON has no number for."""
    if isinstance(limit, Mapping):  # transformers 5 writes {"__float__": "Infinity"}
        limit = float(str(limit.get("__float__", "nan")))
    return None if limit is None or limit == float("inf") else float(limit)


def _finish(architecture: dict[str, Any], config: Mapping[str, Any]) -> None:
    latent = architecture["moe_latent_size"] is not None
    architecture["layer_types"] = _kinds(architecture["layer_types"], latent, "hybrid_override_pattern")
    architecture["num_hidden_layers"] = len(architecture["layer_types"])
    step = _kinds(architecture["mtp_layer_types"], latent, "mtp_hybrid_override_pattern")
    step = [("start_" if i == 0 else "") + k + ("_end" if i == len(step) - 1 else "") for i, k in enumerate(step)]
    architecture["mtp_layer_types"] = step * max(1, architecture["num_nextn_predict_layers"])
    architecture["time_step_limit"] = [_seconds(limit) for limit in architecture["time_step_limit"]]
    eos = architecture["eos_token_id"]
    architecture["eos_token_id"] = eos if isinstance(eos, list) else [] if eos is None else [eos]
    tied = config.get("tie_word_embeddings") or any(
        look_up(config, f"{key}.tie_word_embeddings") for key in FAMILY.text_keys
    )
    architecture["head"] = "tied" if tied else "separate"


def _dimensions(a: Mapping[str, Any]) -> dict[str, int | None]:
    inner, groups = a["mamba_num_heads"] * a["mamba_head_dim"], a["n_groups"] * a["ssm_state_size"]
    return {
        "vocab": a["vocab_size"],
        "hidden": a["hidden_size"],
        "two_hidden": 2 * a["hidden_size"],
        "inner": inner,
        "groups": groups,
        "conv": inner + 2 * groups,
        "kernel": a["conv_kernel"],
        "mamba_heads": a["mamba_num_heads"],
        "query": a["num_attention_heads"] * a["head_dim"],
        "key_value": a["num_key_value_heads"] * a["head_dim"],
        # A list has one size for each MLP block: any size is taken.
        "inter": a["intermediate_size"] if isinstance(a["intermediate_size"], int) else None,
        "experts": a["n_routed_experts"],
        "moe_inter": a["moe_intermediate_size"],
        "shared_inter": a["shared_intermediate_size"] * max(1, a["n_shared_experts"]),
        "expert_hidden": a["moe_latent_size"] or a["hidden_size"],
    }


def _mtp_blocks() -> dict[str, tuple[Item, ...]]:
    blocks: dict[str, tuple[Item, ...]] = {}
    for kind, items in BLOCKS.items():
        for start, before in (("", ()), ("start_", STEP_START)):
            for end, after in (("", ()), ("_end", STEP_END)):
                blocks[f"{start}{kind}{end}"] = (*before, *items, *after)
    return blocks


TOWERS = ("vision_model", "mlp1", "sound_encoder", "sound_projection", "vision_projector")

FAMILY = Family(
    name="nemotron_h",
    model_types=("nemotron_h", "NemotronH_Nano_VL_V2", "nemotron_h_omni"),
    text_keys=("llm_config", "text_config"),
    names=NameSpace(
        frozenset({"model", "language_model", "backbone"}),
        {
            "embeddings": "model.embed_tokens",
            "embed_tokens": "model.embed_tokens",
            "layers": "model.layers",
            "norm_f": "model.norm_f",
            "lm_head": "lm_head",
            "mtp": "mtp",
            **{root: root for root in TOWERS},
        },
        aliases(
            ("experts.routed_experts", "experts"), ("experts.w13", "experts.up_proj"), ("experts.w2", "experts.down_proj")
        ),
    ),
    fields=FIELDS,
    finish=_finish,
    dimensions=_dimensions,
    parts=(
        Part(
            "model",
            prefix="model",
            first=(embedding("embed_tokens", "vocab", "hidden"),),
            layers=BLOCKS,
            layer_types="layer_types",
            last=(Parameter("norm_f.weight", ("hidden",)),),
        ),
        HEAD,
        Part(
            "mtp",
            prefix="mtp",
            layers=_mtp_blocks(),
            layer_types="mtp_layer_types",
            layer_count=("num_nextn_predict_layers",),
            drafts=True,
            optional=True,
            carried=True,
        ),
        *(tower(root) for root in TOWERS),
    ),
    attention="mixer.qkv_proj",
    kv_heads="num_key_value_heads",
    bare=frozenset({"NemotronHModel"}),
    hub_roots=(
        {
            "model.embed_tokens": "language_model.backbone.embeddings",
            "model": "language_model.backbone",
            "lm_head": "language_model.lm_head",
            "mtp": "mtp",
            **{root: root for root in TOWERS},
        },
        {"model.embed_tokens": "backbone.embeddings", "model": "backbone", "lm_head": "lm_head", "mtp": "mtp"},
    ),
)

"""Qwen3.5 and Qwen3.6, dense and MoE: text model, vision-language wrapper, MTP head.  Source: transformers 5.23.0, run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConvertError, Problem
from ..names import NameSpace
from .base import Family, Field, Item, Linear, Parameter, Part, experts, fused, linear, zero_centred
from .qwen3 import (
    DECODER_FIELDS,
    HEAD,
    INPUT_NORM,
    MLP,
    NORM,
    POST_NORM,
    ROOTS,
    ROUTED_EXPERTS,
    WRAPPERS,
    normalise_decoder,
    trunk,
)

FULL_ATTENTION_INTERVAL = 4  # without layer_types, every fourth layer is full attention

FIELDS = (
    *DECODER_FIELDS,
    Field("attn_output_gate", ("attn_output_gate",), default=True, kind=bool),
    Field("output_gate", ("output_gate_type",), default="silu", kind=str),
    Field("partial_rotary_factor", ("rope_parameters.partial_rotary_factor", "partial_rotary_factor"),
          default=0.25, kind=(int, float)),
    Field("linear_num_key_heads", ("linear_num_key_heads",), kind=int),
    Field("linear_num_value_heads", ("linear_num_value_heads",), kind=int),
    Field("linear_key_head_dim", ("linear_key_head_dim",), kind=int),
    Field("linear_value_head_dim", ("linear_value_head_dim",), kind=int),
    Field("linear_conv_kernel_dim", ("linear_conv_kernel_dim",), default=4, kind=int),
    Field("full_attention_interval", ("full_attention_interval",), default=FULL_ATTENTION_INTERVAL, kind=int),
    Field("mtp_num_hidden_layers", ("mtp_num_hidden_layers",), default=0, kind=int),
)  # fmt: skip

INTERLEAVED = (
    "Qwen3-Next gives this name to rows interleaved by key group, which cannot be told from plain ones and split safely: "
    "take the checkpoint of the original publisher, or one with {shards} apart"
)
FINAL_NORM = zero_centred(NORM)
FULL_MIXER: tuple[Item, ...] = (
    zero_centred(INPUT_NORM),
    fused(  # q holds, per head, D rows of query and then D rows of output gate
        "self_attn.qkv_proj", "hidden",
        ("q_proj", (("q", "gated_query"),)), ("k_proj", (("k", "key_value"),)), ("v_proj", (("v", "key_value"),)),
        bias="attention_bias",
    ),
    Parameter("self_attn.q_norm.weight", ("head",), zero_centred=True),
    Parameter("self_attn.k_norm.weight", ("head",), zero_centred=True),
    linear("self_attn.o_proj", "hidden", "attention", bias="attention_bias"),
    zero_centred(POST_NORM),
)  # fmt: skip
LINEAR_MIXER: tuple[Item, ...] = (
    zero_centred(INPUT_NORM),
    fused(  # one stored projection, and so one scale, for three partitions
        "linear_attn.in_proj_qkvz", "hidden",
        ("in_proj_qkv", (("q", "lin_key"), ("k", "lin_key"), ("v", "lin_value"))), ("in_proj_z", (("z", "lin_value"),)),
        interleaved=INTERLEAVED.format(shards="in_proj_qkv and in_proj_z"),
    ),
    fused(
        "linear_attn.in_proj_ba", "hidden",
        ("in_proj_b", (("b", "lin_heads"),)), ("in_proj_a", (("a", "lin_heads"),)),
        interleaved=INTERLEAVED.format(shards="in_proj_b and in_proj_a"),
    ),
    Parameter("linear_attn.conv1d.weight", ("lin_conv", 1, "kernel")),
    Parameter("linear_attn.A_log", ("lin_heads",)),
    Parameter("linear_attn.dt_bias", ("lin_heads",)),
    Parameter("linear_attn.norm.weight", ("lin_value_head",)),
    linear("linear_attn.out_proj", "hidden", "lin_value"),
    zero_centred(POST_NORM),
)  # fmt: skip
MOE: tuple[Item, ...] = (
    linear("mlp.gate", "experts", "hidden"),
    *experts("mlp.experts", "experts", "moe_inter", "hidden", export="stacked"),
    fused(
        "mlp.shared_expert.gate_up_proj", "hidden",
        ("gate_proj", (("gate", "shared_inter"),)), ("up_proj", (("up", "shared_inter"),)),
    ),
    linear("mlp.shared_expert.down_proj", "hidden", "shared_inter"),
    linear("mlp.shared_expert_gate", "one", "hidden"),
)  # fmt: skip


def layers(feed_forward: tuple[Item, ...]) -> dict[str, tuple[Item, ...]]:
    """Layer type -> items, for a feed-forward that is dense or a mixture of experts."""
    return {"full_attention": (*FULL_MIXER, *feed_forward), "linear_attention": (*LINEAR_MIXER, *feed_forward)}


def tower_linear(name: str) -> tuple[Linear, Parameter]:
    """A linear of a tower, of any size, with its bias."""
    return linear(name, None, None), Parameter(f"{name}.bias", None)


def tower_norm(name: str) -> tuple[Parameter, Parameter]:
    """A LayerNorm of a tower."""
    return Parameter(f"{name}.weight", None), Parameter(f"{name}.bias", None)


VISION = Part(
    "visual",
    prefix="visual",
    first=(
        Parameter("patch_embed.proj.weight", None),
        Parameter("patch_embed.proj.bias", None),
        Parameter("pos_embed.weight", None),
    ),
    layers={
        "block": (
            *tower_norm("norm1"),
            *tower_linear("attn.qkv"),
            *tower_linear("attn.proj"),
            *tower_norm("norm2"),
            *tower_linear("mlp.linear_fc1"),
            *tower_linear("mlp.linear_fc2"),
        )
    },
    layer_list="blocks",
    layer_count=("vision_config.depth",),
    last=(*tower_norm("merger.norm"), *tower_linear("merger.linear_fc1"), *tower_linear("merger.linear_fc2")),
    optional=True,
    carried=True,
)


def mtp(feed_forward: tuple[Item, ...]) -> Part:
    """The head that drafts the next token: full-attention layers of the model's own kind."""
    return Part(
        "mtp",
        prefix="mtp",
        first=(
            linear("fc", "hidden", "two_hidden"),
            Parameter("pre_fc_norm_embedding.weight", ("hidden",)),
            Parameter("pre_fc_norm_hidden.weight", ("hidden",)),
        ),
        layers={"full_attention": layers(feed_forward)["full_attention"]},
        layer_count=("mtp_num_hidden_layers",),
        drafts=True,
        last=(
            Parameter("norm.weight", ("hidden",)),
            Parameter("embed_tokens.weight", ("vocab", "hidden"), optional=True),
        ),
        optional=True,
        carried=True,
    )


PART_ROOTS = {**ROOTS, "visual": "visual", "mtp": "mtp"}


def _finish(architecture: dict[str, Any], config: Mapping[str, Any]) -> None:
    interval = architecture.pop("full_attention_interval")
    if architecture["layer_types"] is None:
        architecture["layer_types"] = [
            "full_attention" if (i + 1) % max(interval, 1) == 0 else "linear_attention"
            for i in range(architecture["num_hidden_layers"])
        ]
    normalise_decoder(architecture, config, ("linear_attention", "full_attention"))
    architecture["rotary_dim"] = int(architecture["head_dim"] * architecture.pop("partial_rotary_factor"))
    gates = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}
    gate = architecture["output_gate"]
    if gate not in gates:
        raise ConvertError(Problem("config.json", "output_gate_type", " or ".join(gates), gate, "use a newer qconvert"))
    architecture["output_gate"] = gates[gate]


def _dimensions(a: Mapping[str, Any]) -> dict[str, int]:
    key = a["linear_num_key_heads"] * a["linear_key_head_dim"]
    value = a["linear_num_value_heads"] * a["linear_value_head_dim"]
    attention = a["num_attention_heads"] * a["head_dim"]
    return {
        "vocab": a["vocab_size"],
        "hidden": a["hidden_size"],
        "two_hidden": 2 * a["hidden_size"],
        "inter": a["intermediate_size"],
        "head": a["head_dim"],
        "attention": attention,
        "gated_query": attention * (2 if a["attn_output_gate"] else 1),
        "key_value": a["num_key_value_heads"] * a["head_dim"],
        "lin_key": key,
        "lin_value": value,
        "lin_conv": 2 * key + value,
        "lin_heads": a["linear_num_value_heads"],
        "lin_value_head": a["linear_value_head_dim"],
        "kernel": a["linear_conv_kernel_dim"],
    }


def _moe_dimensions(a: Mapping[str, Any]) -> dict[str, int]:
    return {
        **_dimensions({**a, "intermediate_size": 0}),
        "experts": a["num_experts"],
        "moe_inter": a["moe_intermediate_size"],
        "shared_inter": a["shared_expert_intermediate_size"],
        "one": 1,
    }


FAMILY = Family(
    name="qwen3_5",
    model_types=("qwen3_5", "qwen3_5_text"),
    text_keys=("text_config",),
    names=NameSpace(WRAPPERS, PART_ROOTS, ROUTED_EXPERTS),
    fields=FIELDS,
    finish=_finish,
    dimensions=_dimensions,
    parts=(trunk(layers(MLP), "layer_types", FINAL_NORM), HEAD, mtp(MLP), VISION),
    attention="self_attn.qkv_proj",
    kv_heads="num_key_value_heads",
    bare=frozenset({"Qwen3_5Model", "Qwen3_5TextModel"}),
    hub_roots=(
        {"model": "model.language_model", "lm_head": "lm_head", "mtp": "mtp", "visual": "model.visual"},
        {"model": "model", "lm_head": "lm_head", "mtp": "mtp", "visual": "model.visual"},
    ),
)

MOE_FAMILY = replace(
    FAMILY,
    name="qwen3_5_moe",
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    fields=(
        *(f for f in FIELDS if f.name != "intermediate_size"),
        Field("num_experts", ("num_experts", "num_local_experts"), kind=int),
        Field("num_experts_per_tok", ("num_experts_per_tok",), kind=int),
        Field("moe_intermediate_size", ("moe_intermediate_size",), kind=int),
        Field("shared_expert_intermediate_size", ("shared_expert_intermediate_size",), kind=int),
    ),
    dimensions=_moe_dimensions,
    parts=(trunk(layers(MOE), "layer_types", FINAL_NORM), HEAD, mtp(MOE), VISION),
    bare=frozenset({"Qwen3_5MoeModel", "Qwen3_5MoeTextModel"}),
)

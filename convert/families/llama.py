"""Llama and models with its exact layout.  Source: transformers 5.23.0, run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import qwen3
from .base import Field, Item, Parameter, fused, linear
from .qwen3 import HEAD, INPUT_NORM, POST_NORM, trunk

FIELDS = (
    *(replace(f, default=None) if f.name in ("head_dim", "num_key_value_heads") else f for f in qwen3.DECODER_FIELDS),
    Field("mlp_bias", ("mlp_bias",), default=False, kind=bool),
)

LAYER: tuple[Item, ...] = (
    INPUT_NORM,
    fused(
        "self_attn.qkv_proj", "hidden",
        ("q_proj", (("q", "query"),)), ("k_proj", (("k", "key_value"),)), ("v_proj", (("v", "key_value"),)),
        bias="attention_bias",
    ),
    Parameter("self_attn.rotary_emb.inv_freq", None, dropped="computed from rope_theta by every runtime"),  # before 2023
    linear("self_attn.o_proj", "hidden", "attention", bias="attention_bias"),
    POST_NORM,
    fused(
        "mlp.gate_up_proj", "hidden", ("gate_proj", (("gate", "inter"),)), ("up_proj", (("up", "inter"),)),
        bias="mlp_bias",
    ),
    linear("mlp.down_proj", "hidden", "inter", bias="mlp_bias"),
)  # fmt: skip


def finish(architecture: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Fill in what old configs leave out, then what all decoders share."""
    if architecture["num_key_value_heads"] is None:  # before grouped queries
        architecture["num_key_value_heads"] = architecture["num_attention_heads"]
    if architecture["head_dim"] is None:
        architecture["head_dim"] = architecture["hidden_size"] // max(1, architecture["num_attention_heads"])
    qwen3.finish_attention(architecture, config, config)


FAMILY = replace(
    qwen3.FAMILY,
    name="llama",
    model_types=("llama",),
    fields=FIELDS,
    finish=finish,
    parts=(
        trunk({"full_attention": LAYER, "sliding_attention": LAYER}, "layer_types"),
        HEAD,
    ),
    bare=frozenset({"LlamaModel"}),
)


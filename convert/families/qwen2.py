"""Qwen2 and Qwen2.5 dense: Llama's layout with biases of queries, keys and values alone.  Source: transformers 5.23.0, run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import llama
from .base import Item, Linear
from .qwen3 import HEAD, trunk


def _without_out_bias(item: Item) -> Item:
    return replace(item, bias=None) if isinstance(item, Linear) and item.name == "self_attn.o_proj" else item


LAYER = tuple(_without_out_bias(item) for item in llama.LAYER)


def _finish(architecture: dict[str, Any], config: Mapping[str, Any]) -> None:
    llama.finish(architecture, config)
    # Fixed in the class: no config says it.
    architecture |= {"attention_bias": True, "attention_out_bias": False}


FAMILY = replace(
    llama.FAMILY,
    name="qwen2",
    model_types=("qwen2",),
    finish=_finish,
    parts=(trunk({"full_attention": LAYER, "sliding_attention": LAYER}, "layer_types"), HEAD),
    bare=frozenset({"Qwen2Model"}),
)

"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from networks import DEFAULT_ROPE, Family, Network, Variant, decoder_config, decoder_facts, text_or_wrapper

from .llama import network


def _qwen2(v: Variant) -> Network:
    return network(v, bias=True, out_bias=False, mlp_bias=False)


def _text(v: Variant) -> dict[str, Any]:
    """Variety "window": attention of the second layer has a window."""
    config = decoder_config(v, 2) | {
        "model_type": "qwen2", "max_window_layers": 1, "rope_parameters": DEFAULT_ROPE, "sliding_window": 48,
        "use_sliding_window": v.variety == "window",
    }  # fmt: skip
    del config["attention_bias"]
    if v.sizes.head_dim * v.sizes.heads == v.sizes.hidden:
        del config["head_dim"]
    return config


def _facts(v: Variant) -> dict[str, Any]:
    window = v.variety == "window"
    facts = {
        "attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "head_dim": v.sizes.head_dim,
        "layer_types": ["full_attention", "sliding_attention" if window else "full_attention"],
        "sliding_window": 48 if window else None,
    }  # fmt: skip
    return decoder_facts(_text(v) | facts, "intermediate_size") | facts


FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(
        _qwen2, text_or_wrapper(_text, "Qwen2"), _facts,
        {"qwen2": {"tied": True}, "qwen2_window": {"variety": "window"}}, {"qwen2": ({}, "Q3", ("Q6", "Q7-Q3"))},
    ),
}  # fmt: skip

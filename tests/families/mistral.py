"""Mistral: Llama without biases, and with a window of attention in every layer or in none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from networks import DEFAULT_ROPE, Family, Network, Variant, decoder_config, decoder_facts, text_or_wrapper

from .llama import network

_WINDOWS = {"": 48, "full": None}  # by variety


def _mistral(v: Variant) -> Network:
    return network(v, bias=False, out_bias=False, mlp_bias=False)


def _text(v: Variant) -> dict[str, Any]:
    config = decoder_config(v, 2) | {
        "model_type": "mistral", "rope_parameters": DEFAULT_ROPE, "sliding_window": _WINDOWS[v.variety],
    }  # fmt: skip
    del config["attention_bias"]
    return config


def _facts(v: Variant) -> dict[str, Any]:
    kind = "full_attention" if _WINDOWS[v.variety] is None else "sliding_attention"
    facts = {"attention_bias": False, "mlp_bias": False, "layer_types": [kind] * 2, "sliding_window": _WINDOWS[v.variety]}
    return decoder_facts(_text(v) | facts, "intermediate_size") | facts


FAMILIES: Mapping[str, Family] = {
    "mistral": Family(
        _mistral, text_or_wrapper(_text, "Mistral"), _facts,
        {"mistral": {}, "mistral_full": {"variety": "full", "tied": True}}, {"mistral": ({}, "Q3", ("Q6", "Q7-Q3"))},
    ),
}  # fmt: skip

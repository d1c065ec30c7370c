"""Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from networks import (
    DECODER_NORMS,
    DEFAULT_ROPE,
    Family,
    Network,
    Variant,
    attention,
    decoder_config,
    decoder_facts,
    head,
    text_or_wrapper,
    trunk,
)


def _llama(v: Variant) -> Network:
    net, s = trunk(v.sizes), v.sizes
    for layer in ("model.layers.0", "model.layers.1"):
        attention(net, f"{layer}.self_attn", s, bias=v.bias, norms=False)
        net.gated_mlp(f"{layer}.mlp", s.intermediate, s.hidden, v.bias)
        net.vectors(layer, s.hidden, *DECODER_NORMS)
    return head(net, v)


def _llama_text(v: Variant) -> dict[str, Any]:
    return decoder_config(v, 2) | {"mlp_bias": v.bias, "model_type": "llama", "rope_parameters": DEFAULT_ROPE}


def _llama_facts(v: Variant) -> dict[str, Any]:
    facts = decoder_facts(_llama_text(v), "intermediate_size", "mlp_bias")
    return facts | {"layer_types": ["full_attention"] * 2, "sliding_window": None}


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        _llama, text_or_wrapper(_llama_text, "Llama"), _llama_facts,
        {"llama": {"bias": True}}, {"llama": ({}, "Q3", ("Q6", "Q7-Q3"))},
    ),
}  # fmt: skip

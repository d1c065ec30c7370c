"""Llama, and what models with its layout share."""

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


def network(v: Variant, *, bias: bool, out_bias: bool, mlp_bias: bool) -> Network:
    """Two layers; `bias` is that of queries, keys and values."""
    net, s = trunk(v.sizes), v.sizes
    for layer in ("model.layers.0", "model.layers.1"):
        attention(net, f"{layer}.self_attn", s, bias=bias, out_bias=out_bias, norms=False)
        net.gated_mlp(f"{layer}.mlp", s.intermediate, s.hidden, mlp_bias)
        net.vectors(layer, s.hidden, *DECODER_NORMS)
    return head(net, v)


def _llama(v: Variant) -> Network:
    return network(v, bias=v.bias, out_bias=v.bias, mlp_bias=v.bias)


def _text(v: Variant) -> dict[str, Any]:
    return decoder_config(v, 2) | {"mlp_bias": v.bias, "model_type": "llama", "rope_parameters": DEFAULT_ROPE}


def _facts(v: Variant) -> dict[str, Any]:
    facts = decoder_facts(_text(v), "intermediate_size", "mlp_bias")
    return facts | {"layer_types": ["full_attention"] * 2, "sliding_window": None}


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        _llama, text_or_wrapper(_text, "Llama"), _facts,
        {"llama": {"bias": True}}, {"llama": ({}, "Q3", ("Q6", "Q7-Q3"))},
    ),
}  # fmt: skip

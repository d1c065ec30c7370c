"""Model families: one file of tables each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConvertError, Problem
from . import llama, nemotron_h, qwen3, qwen3_5, qwen3_moe, step
from .base import Family, text_config

FAMILIES: tuple[Family, ...] = (
    qwen3.FAMILY,
    qwen3_5.FAMILY,
    qwen3_5.MOE_FAMILY,
    qwen3_moe.FAMILY,
    qwen3_moe.VL_FAMILY,
    llama.FAMILY,
    nemotron_h.FAMILY,
    step.STEP3P5,
    step.STEP3,
)

# model_type -> why it is not taken for a family that it looks like
REFUSED_MODEL_TYPES: Mapping[str, str] = {
    "qwen3_next": "Qwen3-Next stores in_proj_qkvz and in_proj_ba interleaved per key head, and is not supported",
    "nemotron_h_puzzle": "Nemotron-H Puzzle changes its sizes from layer to layer, and is not supported",
}


def detect_family(config: Mapping[str, Any]) -> Family:
    """The family of a config, by `model_type`.  Raises `ConvertError` that lists what is supported."""
    model_type = config.get("model_type")
    if model_type is None:  # a text config without its own type inside a wrapper's file
        nested = (text_config(family, config).get("model_type") for family in FAMILIES)
        model_type = next((n for n in nested if n is not None), None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(t for family in FAMILIES for t in family.model_types)
    found = str(model_type)
    remedy = REFUSED_MODEL_TYPES.get(found, "this model family is not supported by this version")
    raise ConvertError(Problem("config.json", "model_type", f"one of {supported}", found, remedy))

"""Model families: one file of tables each.  A module of this package that defines a `Family` needs no other registration."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from ..errors import ConvertError, Problem
from .base import Family, text_config


def _discover() -> tuple[Family, ...]:
    """Every family that a module of this package defines, in the order of the modules and of their lines."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, Family):
                twin = found.setdefault(value.name, value)
                assert twin is value, f"two families are called {value.name}"
    return tuple(found.values())


FAMILIES: tuple[Family, ...] = _discover()

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

"""Mistral: Llama's layout without biases, and with a window of attention in every layer or in none.

Source: transformers 5.23.0, run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConvertError, Problem
from . import llama

DEFAULT_WINDOW = 4096  # of a config without the key; null means no window


def _finish(architecture: dict[str, Any], config: Mapping[str, Any]) -> None:
    window = config.get("sliding_window", DEFAULT_WINDOW)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        found = f"{window!r:.60}"
        raise ConvertError(Problem("config.json", "sliding_window", "a whole number or null", found, "correct the config"))
    kinds = ["full_attention" if window is None else "sliding_attention"] * architecture["num_hidden_layers"]
    if architecture["layer_types"] not in (None, kinds):  # Mistral's classes take no notice of it, those of others do
        found = ", ".join(sorted({str(kind) for kind in architecture["layer_types"]}))
        raise ConvertError(Problem("config.json", "layer_types", f"{kinds[0]} in every layer", found, "another family?"))
    architecture["layer_types"] = kinds
    llama.finish(architecture, config)
    architecture["sliding_window"] = window


FAMILY = replace(
    llama.FAMILY,
    name="mistral",
    model_types=("mistral",),
    finish=_finish,
    bare=frozenset({"MistralModel"}),
)

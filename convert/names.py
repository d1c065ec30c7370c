"""THE rewrite of names: one function for tensor names and for the names that quantisation configs use.

A checkpoint's names differ by the wrappers around its parts: `model.language_model.layers.0...`,
`language_model.model.layers.0...`, `layers.0...`, or any of these inside a PEFT wrapper.  Every spelling is a run of
wrapper segments followed by the root of a part (`layers`, `lm_head`, `visual`, ...).  So the rule is: drop `base_layer`
segments anywhere, skip leading wrapper segments, and let the first other segment choose the canonical root.  Whole dotted
segments only, never substrings.

Example, Qwen3.5: `model.language_model.layers.0.linear_attn.in_proj_qkv.weight_scale` skips `model`, `language_model`,
finds the root `layers`, and becomes `model.layers.0.linear_attn.in_proj_qkv.weight_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PEFT_WRAPPER = "base_model"  # peft: `PeftModel.state_dict()` starts with base_model.model.
PEFT_LAYER = "base_layer"  # peft: the wrapped weight of a LoRA layer; nested when one module is wrapped twice

# nvidia-modelopt 0.47 with transformers 5.23 writes `lm_head.\0backbone.pt_name_sentinel` for `lm_head` in its lists: an
# unanchored rename hit its own sentinel.  A wildcard at the very end belongs to the name and stays.
_SENTINEL = re.compile(r"\.\x00.*?(\.?\*)?$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class NameSpace:
    """The roots of a family's parts.  `wrappers`: segments that may stand before one; `roots`: root -> canonical root."""

    wrappers: frozenset[str]
    roots: Mapping[str, str]


def repair_sentinel(name: str) -> str:
    """Cut modelopt's sentinel (see `_SENTINEL`) from a name of a quantisation config; other names stay as they are."""
    return _SENTINEL.sub(lambda m: m.group(1) or "", name)


def canonical_name(name: str, space: NameSpace) -> str | None:
    """The canonical spelling of a tensor or module name, or None when no root of the family is found where it must be."""
    segments = name.split(".")
    if PEFT_LAYER in segments:
        segments = [s for s in segments if s != PEFT_LAYER]
    for position, segment in enumerate(segments):
        root = space.roots.get(segment)
        if root is not None:
            rest = segments[position + 1 :]
            return ".".join((root, *rest)) if rest else root
        if segment not in space.wrappers and segment != PEFT_WRAPPER:
            return None
    return None

"""THE rewrite of names: one function for tensor names and for the names that quantisation configs use.

A checkpoint's names differ by the wrappers around its parts: `model.language_model.layers.0...`,
`language_model.model.layers.0...`, `layers.0...`, or any of these inside a PEFT wrapper.  Every spelling is a run of
wrapper segments followed by the root of a part (`layers`, `lm_head`, `visual`, ...).  So the rule is: drop `base_layer`
and `original_module` segments anywhere, skip leading wrapper segments, and let the first other segment choose the
canonical root.  Whole dotted segments only, never substrings.

Example, Qwen3.5: `model.language_model.layers.0.linear_attn.in_proj_qkv.weight_scale` skips `model`, `language_model`,
finds the root `layers`, and becomes `model.layers.0.linear_attn.in_proj_qkv.weight_scale`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

PEFT_WRAPPER = "base_model"  # peft: `PeftModel.state_dict()` starts with base_model.model.
PEFT_LAYER = "base_layer"  # peft: the wrapped weight of a LoRA layer; nested when one module is wrapped twice
PEFT_ORIGINAL = "original_module"  # peft: a module as it was before `modules_to_save` trained a copy of it
PEFT_SEGMENTS = frozenset({PEFT_LAYER, PEFT_ORIGINAL})

# nvidia-modelopt 0.47 with transformers 5.23 writes `lm_head.\0backbone.pt_name_sentinel` for `lm_head` in its lists: an
# unanchored rename hit its own sentinel.  A wildcard at the very end belongs to the name and stays.
_SENTINEL = re.compile(r"\.\x00.*?(\.?\*)?$", re.DOTALL)


Run = tuple[str, ...]
Aliases = Mapping[str, tuple[tuple[Run, Run], ...]]  # first segment -> (run of segments, what it becomes) pairs


@dataclass(frozen=True, slots=True)
class NameSpace:
    """The roots of a family's parts, and inner spellings that differ.

    wrappers  segments that may stand before a root
    roots     root -> canonical root
    aliases   first segment of an inner run -> (run, canonical run): producers that call a path otherwise
    """

    wrappers: frozenset[str]
    roots: Mapping[str, str]
    aliases: Aliases = field(default_factory=dict)


def repair_sentinel(name: str) -> str:
    """Cut modelopt's sentinel (see `_SENTINEL`) from a name of a quantisation config; other names stay as they are."""
    return _SENTINEL.sub(lambda m: m.group(1) or "", name)


def canonical_name(name: str, space: NameSpace) -> str | None:
    """The canonical spelling of a tensor or module name, or None when no root of the family is found where it must be."""
    segments = name.split(".")
    if not PEFT_SEGMENTS.isdisjoint(segments):
        segments = [s for s in segments if s not in PEFT_SEGMENTS]
    for position, segment in enumerate(segments):
        root = space.roots.get(segment)
        if root is not None:
            rest = segments[position + 1 :]
            if not space.aliases.keys().isdisjoint(rest):
                rest = replace_runs(rest, space.aliases)
            return ".".join((root, *rest)) if rest else root
        if segment not in space.wrappers and segment != PEFT_WRAPPER:
            return None
    return None


class CanonicalNames:
    """`canonical_name` for many names: what stands before the last segment is shared by many, and brought to form once."""

    def __init__(self, space: NameSpace) -> None:
        self._space = space
        self._stems: dict[str, str | None] = {}
        runs = [run for alternatives in space.aliases.values() for run, _ in alternatives]
        # Segments whose meaning depends on what stands before them; all others are appended as they are.
        self._special = {*space.roots, *space.wrappers, *PEFT_SEGMENTS, PEFT_WRAPPER, *(s for run in runs for s in run)}

    def is_plain(self, segment: str) -> bool:
        """Whether a segment is the same in the canonical name, whatever stands before it."""
        return segment not in self._special

    def __call__(self, name: str) -> str | None:
        """The canonical spelling of a name, or None when no root of the family is found where it must be."""
        stem, _, last = name.rpartition(".")
        if not stem or last in self._special:
            return canonical_name(name, self._space)
        if stem not in self._stems:
            self._stems[stem] = self(stem)
        canonical = self._stems[stem]
        return None if canonical is None else f"{canonical}.{last}"


def replace_runs(segments: list[str], table: Aliases) -> list[str]:
    """Replace each run of segments that is spelt otherwise; the first alias that fits wins."""
    result: list[str] = []
    position = 0
    while position < len(segments):
        for run, canonical in table.get(segments[position], ()):
            if tuple(segments[position : position + len(run)]) == run:
                result += canonical
                position += len(run)
                break
        else:
            result.append(segments[position])
            position += 1
    return result


def aliases(*pairs: tuple[str, str]) -> Aliases:
    """The `aliases` of a `NameSpace` from dotted (spelling, canonical) pairs; longer spellings are tried first."""
    table: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {}
    for spelling, canonical in pairs:
        run = tuple(spelling.split("."))
        table.setdefault(run[0], []).append((run, tuple(canonical.split(".")) if canonical else ()))
    return {first: tuple(sorted(runs, key=lambda r: -len(r[0]))) for first, runs in table.items()}


def patterns(names: Iterable[str]) -> dict[str, int]:
    """Names with their numbers left out -> how many have each; the most frequent first."""
    found = Counter(".".join("*" if s.isdecimal() else s for s in name.split(".")) for name in names)
    return dict(found.most_common())

"""Says in words what a plan mends: one line per kind of repair, with counts.  Reads a plan's pieces and changes nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from .adapters import SAVED, without_marks
from .names import PEFT_SEGMENTS
from .ops import Step
from .source import TensorInfo


def _head_change(stored: Sequence[str], canonical: Sequence[str]) -> str:
    """Where two names differ, as `old.* -> new.*`: equal segments at the end are cut, layer numbers become `#`."""
    same = 0
    while same < min(len(stored), len(canonical)) and stored[-1 - same] == canonical[-1 - same]:
        same += 1
    old, new = stored[: len(stored) - same], canonical[: len(canonical) - same]
    heads = [".".join("#" if s.isdecimal() else s for s in head) for head in (old, new)]
    if all(heads):
        return f"{heads[0]}.* -> {heads[1]}.*"
    # One name only has a wrapper more: show the part that follows it on both sides.
    part = canonical[len(canonical) - same] if same else ""
    return " -> ".join(f"{head}.{part}" if head else part for head in heads)


def _stem_change(stored: str, canonical: str, known: dict[tuple[str, str], str]) -> str:
    """`_head_change` for many names: names that go on alike have the change of their stems, which `known` remembers."""
    old, _, last = stored.rpartition(".")
    new, _, same = canonical.rpartition(".")
    if last != same or not old or not new:
        return _head_change(stored.split("."), canonical.split("."))
    if (old, new) not in known:
        known[old, new] = _stem_change(old, new, known)
    return known[old, new]


def name_repairs(by_name: Mapping[str, TensorInfo], joined: Mapping[str, tuple[str, str]]) -> list[str]:
    """Changes of names.  `by_name`: canonical name -> stored tensor; `joined`: see `families.base.joined_names`."""
    prefixes: Counter[str] = Counter()
    known: dict[tuple[str, str], str] = {}
    peft = glued = 0
    for canonical, info in by_name.items():
        if info.name == canonical:
            continue
        old, _, last = info.name.rpartition(".")
        new, _, same = canonical.rpartition(".")
        if last == same and (old, new) in known:  # most tensors: another one of a module that has been seen
            prefixes[known[old, new]] += 1
            continue
        segments = info.name.split(".")
        if SAVED in segments:
            segments = without_marks(info.name).split(".")
        if not PEFT_SEGMENTS.isdisjoint(segments):
            peft += 1
            segments = [s for s in segments if s not in PEFT_SEGMENTS]
        if segments[-1] in joined and segments[-2:-1] == ["experts"]:
            glued += 1
            segments[-1:] = joined[segments[-1]]
        stored = ".".join(segments)
        if stored != canonical:
            prefixes[_stem_change(stored, canonical, known)] += 1
    lines = [f"prefix {change} ({count} tensors)" for change, count in sorted(prefixes.items())]
    if peft:
        lines.append(f"{' and '.join(sorted(PEFT_SEGMENTS))} removed from names ({peft} tensors)")
    if glued:
        lines.append(f"names of stacked experts split into module and role ({glued} tensors)")
    return lines


def value_repairs(
    steps: Iterable[Step], tensors: Mapping[str, TensorInfo], by_name: Mapping[str, TensorInfo]
) -> list[str]:
    """Changes of shapes, dtypes and conventions.  `tensors`: stored name -> tensor."""
    canonical_of: dict[str, str] = {}
    kinds: dict[str, set[str]] = defaultdict(set)
    for step in steps:
        several = len(step.terms) > 1
        for term in step.terms:
            info = tensors[term.source]
            same = term.transform == "copy" or (term.transform == "f32" and info.dtype == "F32")
            if same and several and term.repeat == 1:  # nearly all terms
                if info.shape == ():
                    kinds["0-d scalar stored as a vector"].add(info.name)
                continue
            canonical_of = canonical_of or {i.name: name for name, i in by_name.items()}
            module, _, suffix = canonical_of.get(info.name, info.name).rpartition(".")
            if term.repeat > 1:
                owner = module.rpartition(".")[2]
                kinds[f"{suffix} of {owner} given to each of its {term.repeat} partitions"].add(info.name)
            if term.transform == "reciprocal":
                kinds[f"divisor {suffix} replaced by its float32 reciprocal"].add(info.name)
            elif term.transform.endswith("f32") and info.dtype != "F32":
                kinds[f"{info.dtype} {suffix} widened to F32"].add(info.name)
            elif term.transform.endswith("e8m0"):
                kinds[f"power-of-two {suffix} widened to F32"].add(info.name)
            if term.transform.startswith("transpose"):
                kinds[f"input-major {suffix} of experts turned to output-major"].add(info.name)
            elif info.shape == ():
                kinds["0-d scalar stored as a vector"].add(info.name)
            elif len(step.terms) == 1 and len(info.shape) > len(step.shape):
                kinds[f"{suffix} reshaped from {len(info.shape)}-d to {len(step.shape)}-d"].add(info.name)
    return [f"{what} ({len(names)} tensors)" for what, names in sorted(kinds.items())]

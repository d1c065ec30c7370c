"""Says in words what a plan mends: one line per kind of repair, with counts.  Reads a plan's pieces and changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from .adapters import SAVED, without_marks
from .index import Index
from .names import PEFT_SEGMENTS
from .ops import Step, Term
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


def name_repairs(index: Index) -> list[str]:
    """Changes of names, with the number of tensors that have each."""
    prefixes: Counter[str] = Counter()
    known: dict[tuple[str, str], str] = {}
    peft = glued = 0
    singly = ((stored, canonical, 1) for stored, canonical in index.tensor_names.items())
    together = ((stored, canonical, count) for stored, (canonical, count) in index.module_names.items())
    for name, canonical, count in chain(singly, together):
        if name == canonical:
            continue
        old, _, last = name.rpartition(".")
        new, _, same = canonical.rpartition(".")
        if last == same and (old, new) in known:  # most names: another one beside one that has been seen
            prefixes[known[old, new]] += count
            continue
        segments = name.split(".")
        if SAVED in segments:
            segments = without_marks(name).split(".")
        if not PEFT_SEGMENTS.isdisjoint(segments):
            peft += count
            segments = [s for s in segments if s not in PEFT_SEGMENTS]
        if segments[-1] in index.joined and segments[-2:-1] == ["experts"]:
            glued += count
            segments[-1:] = index.joined[segments[-1]]
        stored = ".".join(segments)
        if stored != canonical:
            prefixes[_stem_change(stored, canonical, known)] += count
    lines = [f"prefix {change} ({count} tensors)" for change, count in sorted(prefixes.items())]
    if peft:
        lines.append(f"{' and '.join(sorted(PEFT_SEGMENTS))} removed from names ({peft} tensors)")
    if glued:
        lines.append(f"names of stacked experts split into module and role ({glued} tensors)")
    return lines


def value_repairs(term: Term, info: TensorInfo, stored: str, step: Step) -> Iterator[str]:
    """Changes of shape, dtype and convention that a term makes to its source.

    `stored`: the canonical name of the source before fusing; `step`: what the term is a part of.
    """
    module, _, suffix = stored.rpartition(".")
    if term.repeat > 1:
        yield f"{suffix} of {module.rpartition('.')[2]} given to each of its {term.repeat} partitions"
    if term.transform == "reciprocal":
        yield f"divisor {suffix} replaced by its float32 reciprocal"
    elif term.transform.endswith("f32") and info.dtype != "F32":
        yield f"{info.dtype} {suffix} widened to F32"
    elif term.transform.endswith("e8m0"):
        yield f"power-of-two {suffix} widened to F32"
    if term.transform.startswith("transpose"):
        yield f"input-major {suffix} of experts turned to output-major"
    elif info.shape == ():
        yield "0-d scalar stored as a vector"
    elif len(step.terms) == 1 and len(info.shape) > len(step.shape):
        yield f"{suffix} reshaped from {len(info.shape)}-d to {len(step.shape)}-d"

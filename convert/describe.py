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


def _heads(stored: Sequence[str], canonical: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Where two names differ: both without their equal ends, but for the first segment of these where one has no other."""
    same = 0
    while same < min(len(stored), len(canonical)) and stored[-1 - same] == canonical[-1 - same]:
        same += 1
    if same and same == min(len(stored), len(canonical)):
        same -= 1  # one name only has a wrapper more: show the part that follows it on both sides
    return stored[: len(stored) - same], canonical[: len(canonical) - same]


def _change(old: Sequence[str], new: Sequence[str]) -> str:
    """Two heads as `old.* -> new.*`, or without stars where they end alike; layer numbers become `#`."""
    heads = [".".join("#" if s.isdecimal() else s for s in head) for head in (old, new)]
    return " -> ".join(heads if old[-1:] == new[-1:] or not all(heads) else [f"{head}.*" for head in heads])


def name_repairs(index: Index) -> list[str]:
    """Changes of names, with the number of tensors that have each."""
    prefixes: Counter[str] = Counter()
    peft = glued = 0
    old = new = change = ""  # of the last name, which most names share with the one before
    singly = ((stored, canonical, 1) for stored, canonical in index.tensor_names.items())
    together = ((stored, canonical, count) for stored, (canonical, count) in index.module_names.items())
    for name, canonical, count in chain(singly, together):
        if name == canonical:
            continue
        if old and name.startswith(old) and canonical == new + name[len(old) :]:
            prefixes[change] += count
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
            heads = _heads(segments, canonical.split("."))
            old, new = (f"{'.'.join(head)}." for head in heads)
            change = _change(*heads)
            prefixes[change] += count
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

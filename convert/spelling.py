"""Says under which name a tensor that is missing would be stored: as its like in another layer, beside it, or on the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from .families.base import Linear, Placed
from .source import TensorInfo

WEIGHTS = ("weight", "weight_packed")


class Spelling:
    """The names of one checkpoint.

    by_name  canonical name -> stored tensor.   fallback  canonical name -> the same in the prefix spelling of this checkpoint
    """

    def __init__(self, by_name: Mapping[str, TensorInfo], fallback: Callable[[str], str]) -> None:
        self._by_name, self._fallback = by_name, fallback
        self._alike: dict[str, str] = {}  # canonical name without its numbers -> a stored one

    def _like(self, name: str) -> str | None:
        """The stored name of the same tensor in another layer, with the numbers of this one."""
        if not self._alike:
            for canonical, info in self._by_name.items():
                self._alike.setdefault(".".join("#" if s.isdecimal() else s for s in canonical.split(".")), info.name)
        segments = name.split(".")
        stored = self._alike.get(".".join("#" if s.isdecimal() else s for s in segments))
        numbers = [s for s in segments if s.isdecimal()]
        if stored is None or sum(s.isdecimal() for s in stored.split(".")) != len(numbers):
            return None
        left = iter(numbers)
        return ".".join(next(left) if s.isdecimal() else s for s in stored.split("."))

    def of(self, name: str, beside: Iterable[str] = ()) -> str:
        """The name under which a missing tensor would be stored.  `beside`: canonical names of modules in the same place."""
        like = self._like(name)
        module, _, suffix = name.rpartition(".")
        own = module.rpartition(".")[2]
        for other in beside if like is None else ():
            segments = info.name.split(".") if (info := self._by_name.get(f"{other}.{suffix}")) is not None else []
            if segments.count(other.rpartition(".")[2]) == 1:
                return ".".join(own if s == other.rpartition(".")[2] else s for s in segments)
        return like or self._fallback(name)

    def of_stack(self, placed: Placed, siblings: Sequence[Placed]) -> Iterator[tuple[str, str]]:
        """(name, what is expected) of the tensors that a missing stack of experts would have.  `siblings`: of its layer."""
        forms = list(_forms(placed))
        for form in forms:
            likes = [(self._like(f"{module}.{w}"), expected) for module, expected in form for w in WEIGHTS]
            if any(name for name, _ in likes):
                yield from ((name, expected) for name, expected in likes if name)
                return
        for sibling in siblings:
            for form, theirs in zip(forms, _forms(sibling)):
                stored = next((i for m, _ in theirs for w in WEIGHTS if (i := self._by_name.get(f"{m}.{w}"))), None)
                if sibling is not placed and stored is not None:
                    there = next(m for m, _ in theirs for w in WEIGHTS if self._by_name.get(f"{m}.{w}") is stored)
                    yield from ((_beside(stored.name, there, module, sibling, placed), what) for module, what in form)
                    return
        assert isinstance(placed.item, Linear)
        form = forms[{"stacked": 0, "projection": 1, "each": 2}[placed.item.export]]
        if placed.item.export == "projection":  # beside the container of experts
            above = placed.parent.rpartition(".")[0]
            form = [(f"{above}.{module.rpartition('.')[2]}", expected) for module, expected in form]
        tail = "" if placed.item.export == "stacked" else ".weight"
        yield from ((self._fallback(module) + tail, expected) for module, expected in form)


def _forms(placed: Placed) -> Iterator[list[tuple[str, str]]]:
    """Modules of a stack, with what each holds: stacked and fused, stacked by projection, one by one."""
    rows = {name: sum(r or 0 for _, r in partitions) for name, partitions in placed.shards}
    e, k = placed.experts, placed.columns
    yield [(placed.name, f"experts of [{e}, {sum(rows.values())}, {k}]")]
    yield [(name, f"experts of [{e}, {n}, {k}]") for name, n in rows.items()]
    each = ((name.rpartition(".")[2], n) for name, n in rows.items())
    yield [(f"{placed.parent}.0.{last}", f"a weight of [{n}, {k}], as each of {e} experts has") for last, n in each]


def _beside(stored: str, there: str, module: str, sibling: Placed, placed: Placed) -> str:
    """The name of `module`'s weight beside that of `there`, which is stored as `stored`."""
    assert isinstance(sibling.item, Linear)
    assert isinstance(placed.item, Linear)
    old, new = there.rpartition(".")[2], module.rpartition(".")[2]
    names = {old: new, **dict(zip(sibling.item.stacks, placed.item.stacks))}
    spelt = {k + tail: v + tail for k, v in names.items() for tail in ("", *(f"_{w}" for w in WEIGHTS))}
    return ".".join(spelt.get(segment, segment) for segment in stored.split("."))

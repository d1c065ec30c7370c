"""Finds the entries of quantisation configs that mean no module of the checkpoint.  They change nothing, and are reported."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from .dialects.base import ModuleNames, Pattern, Rules
from .families.base import Linear, Placed

SHOWN = 20  # names in one line of a report


class Inventory:
    """Every name that an entry may mean: modules as stored and as they are fused, their containers, experts one by one.

    placed  every module and parameter of the model.  spell  canonical name -> the full names that configs may use for it
    """

    def __init__(self, placed: Sequence[Placed], spell: Callable[[str], tuple[str, ...]]) -> None:
        self._spell = spell
        self._modules: dict[str, None] = {}
        self._stacks: dict[str, tuple[int, set[str]]] = {}  # container of experts -> their number, last segments below each
        self._names: set[str] = set()
        for place in placed:
            own = [place.name, *(name for name, _ in place.shards)]
            if place.experts:
                self._stacks.setdefault(place.parent, (place.experts, {""}))[1].update(n.rpartition(".")[2] for n in own)
            self._modules.update(dict.fromkeys(own if isinstance(place.item, Linear) else [place.parent]))
            for name in own:
                while name and name not in self._names:
                    self._names.add(name)
                    name = name.rpartition(".")[0]
        self._sorted = sorted(self._names)
        self._spelt: dict[bool, list[str]] = {}
        self._each: set[str] | None = None

    def has(self, name: str) -> bool:
        """Whether a canonical name means something."""
        return name in self._names or name in self._experts()

    def _experts(self) -> set[str]:
        """The names of all experts, and below them; made when first asked for, because few lists need them."""
        if self._each is None:
            self._each = {
                f"{container}.{expert}{rest}"
                for container, (count, below) in self._stacks.items()
                for rest in [f".{last}" if last else "" for last in below]
                for expert in range(count)
            }
        return self._each

    def begins(self, head: str) -> bool:
        """Whether a name begins with `head`, or would below one of the experts."""
        at = bisect_left(self._sorted, head)
        return (at < len(self._sorted) and self._sorted[at].startswith(head)) or self.has(head.rpartition(".")[0])

    def names(self, alike: bool) -> list[str]:
        """Every name that a pattern may match; when experts are alike to it, the first and the last one stand for all."""
        if alike not in self._spelt:
            names = list(self._modules)
            for container, (count, below) in self._stacks.items():
                for e in {0, count - 1} if alike else range(count):
                    names += (f"{container}.{e}.{last}" for last in below if last)
            self._spelt[alike] = [spelt for name in names for spelt in (name, *self._spell(name))]
        return self._spelt[alike]

    def means_something(self, pattern: Pattern) -> bool:
        """Whether a pattern matches any name.  One without a digit cannot tell one expert from another."""
        return pattern.matches(self.names(not any(c.isdigit() for c in pattern.written)))

    def idle(self, listed: ModuleNames) -> list[str]:
        """The entries of a list that mean nothing, as the config writes them."""
        found = [name for name, canonical in listed.written.items() if not self.has(canonical)]
        found += [pattern for pattern, head in listed.starred.items() if not self.begins(head)]
        return found + [text for text, pattern in listed.drawn.items() if not self.means_something(pattern)]


def _line(what: str, names: Sequence[str]) -> list[str]:
    shown = ", ".join(names[:SHOWN]) + (f", ... and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return [f"{what.format(len(names))}: {shown}"] if names else []


def idle_entries(rules: Iterable[Rules], inventory: Inventory) -> tuple[list[str], list[str]]:
    """What to say of entries that mean no module: of those that should be quantised, and of exclusions; a line a config."""
    quantised, excluded = [], []
    for r in rules:
        claimed = [name for name, canonical in r.listed.items() if not inventory.has(canonical)]
        claimed += [name for names, _ in r.ordered for name in inventory.idle(names)]
        quantised += _line(f"{r.where} quantises {{}} names that mean no module", claimed)
        excluded += _line(f"{r.where} excludes {{}} names that mean no module", inventory.idle(r.ignored))
    return quantised, excluded

"""Module names as patterns for `targets` and `ignore` of a compressed-tensors config, which every reader of it takes alike.

transformers, vLLM and SGLang look the same module up under different names: other wrappers before the layers, other words
within.  So an entry is a regular expression over all of a family's spellings, anchored at both ends.  Plain names would not
do: vLLM and transformers compare them with names of their own, and SGLang 0.5 takes them as parts of names, so that
`mlp.gate` would also mean `mlp.gate_up_proj`.
Source: compressed-tensors 0.20 `utils/match.py`, run; vLLM and SGLang `compressed_tensors/utils.py`, read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

from .families.base import Family, hub_name

NUMBER = "\0"  # stands for the index of a layer in a template


class Member(NamedTuple):
    """A module to be named: its canonical name; for a projection of an expert that of the stack, the index, and its own."""

    name: str
    expert: int | None = None
    short: str = ""


class Targets:
    """The patterns of one family."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.wrappers = "|".join(sorted(family.names.wrappers))

    def cores(self, name: str) -> tuple[str, ...]:
        """The spellings of a canonical name, without the wrappers before it."""
        family = self.family
        spelt = {name, *(hub_name(name, roots, family.hub_runs) for roots in family.hub_roots)}
        if family.modules is not None:
            spelt.add(hub_name(name, *family.modules))
        found = set()
        for spelling in spelt:
            segments = spelling.split(".")
            while len(segments) > 1 and segments[0] in family.names.wrappers:
                segments = segments[1:]
            found.add(".".join(segments))
        return tuple(sorted(found))

    def _templates(self, name: str) -> tuple[tuple[str, ...], int | None]:
        """The spellings of a name with the index of its layer taken out, and that index."""
        segments = name.split(".")
        at = next((i for i, s in enumerate(segments) if s.isdecimal()), None)
        if at is None:
            return self.cores(name), None
        return self.cores(".".join((*segments[:at], NUMBER, *segments[at + 1 :]))), int(segments[at])

    def whole(self, root: str) -> str:
        """The pattern of everything below a root."""
        return self._entry(self.cores(root), "", r"\..*")

    def _entry(self, cores: Iterable[str], number: str, tail: str = "") -> str:
        spelt = [re.escape(core).replace(re.escape(NUMBER), number) for core in cores]
        body = spelt[0] if len(spelt) == 1 else f"(?:{'|'.join(spelt)})"
        return rf"re:^(?:(?:{self.wrappers})\.)*{body}{tail}$"

    def entries(self, groups: Mapping[Hashable, Iterable[Member]]) -> dict[Hashable, list[str]]:
        """The patterns of each group of modules: together the groups are all modules that there are.

        The experts of a layer are one pattern whatever their projections are called, because engines look for projections
        that a family need not have; unless they are of several groups.
        """
        stacks: dict[str, set[Hashable]] = defaultdict(set)
        for key, members in groups.items():
            for member in members:
                if member.expert is not None:
                    stacks[member.name].add(key)
        layers: dict[tuple[tuple[str, ...], str], dict[int | None, Hashable]] = defaultdict(dict)
        single: dict[tuple[Hashable, str, str], list[int]] = defaultdict(list)
        for key, members in groups.items():
            for member in members:
                if member.expert is not None and len(stacks[member.name]) > 1:
                    single[key, member.name, member.short].append(member.expert)
                    continue
                tail = "" if member.expert is None else r"(?:\.routed_experts)?\.\d+\.\w+"
                templates, number = self._templates(member.name)
                layers[templates, tail][number] = key
        found: dict[Hashable, list[str]] = {key: [] for key in groups}
        for (templates, tail), keys in layers.items():
            for key in dict.fromkeys(keys.values()):
                numbers = sorted(n for n, k in keys.items() if k == key and n is not None)
                listed = str(numbers[0]) if len(numbers) == 1 else f"(?:{'|'.join(map(str, numbers))})" if numbers else ""
                found[key].append(self._entry(templates, r"\d+" if len(numbers) == len(keys) else listed, tail))
        for (key, stack, short), experts in single.items():
            templates, number = self._templates(stack)
            which = rf"\.(?:{'|'.join(map(str, experts))})\.{re.escape(short)}"
            found[key].append(self._entry(templates, str(number), which))
        return found

"""The stored tensors of a checkpoint under their canonical names, and which of them are still to be used.

Tensors are kept by module, because what a name says is said once for all tensors of its module: the name of a module is
taken apart, brought to canonical form and compared once, though a checkpoint has four tensors in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from .errors import Problem
from .families.base import Family
from .names import CanonicalNames
from .source import TensorInfo

Modules = dict[str, dict[str, TensorInfo]]  # module -> last segment of a tensor's name -> tensor


def by_module(tensors: Iterable[tuple[str, TensorInfo]]) -> Modules:
    """Tensors by the module of their (name, tensor) pairs; modules and tensors in the order in which they come."""
    modules: Modules = {}
    shared: dict[str, str] = {}
    for name, info in tensors:
        module, _, suffix = name.rpartition(".")
        suffix = shared.setdefault(suffix, suffix)
        group = modules.get(module)
        if group is None:
            modules[module] = {suffix: info}
        else:
            group[suffix] = info
    return modules


def all_segments(modules: Modules) -> set[str]:
    """Every segment of every name."""
    parents, segments = set(), set()
    for module, tensors in modules.items():
        parent, _, last = module.rpartition(".")
        parents.add(parent)
        segments.add(last)
        segments.update(tensors)
    return segments.union(*(parent.split(".") for parent in parents))


@dataclass(slots=True)
class Index:
    """Canonical names of stored tensors.

    joined        last segments that hold a module's name and a suffix in one (`families.base.joined_names`)
    modules       every tensor, by its canonical module
    left          the same without what has been used
    module_names  stored module -> (canonical module, number of its tensors), where it is the same for all of them
    tensor_names  stored tensor -> canonical tensor, for all other tensors
    """

    family: Family
    joined: Mapping[str, tuple[str, str]]
    modules: Modules = field(default_factory=dict)
    left: Modules = field(default_factory=dict)
    module_names: dict[str, tuple[str, int]] = field(default_factory=dict)
    tensor_names: dict[str, str] = field(default_factory=dict)
    _files: dict[str, str] = field(default_factory=dict)
    _spelling_of_root: dict[str, str] = field(default_factory=dict)

    def add(self, stored: Modules) -> list[Problem]:
        """Index tensors by their names as `stored` has them.  Returns a problem for each that has no place of its own."""
        canonical_name = CanonicalNames(self.family.names)
        plain: set[str] = set()  # suffixes that stand behind a canonical module as they are
        problems: list[Problem] = []
        for module, tensors in stored.items():
            if not tensors.keys() <= plain:
                plain |= {s for s in tensors if canonical_name.is_plain(s) and s not in self.joined and not s.isdecimal()}
            canonical = canonical_name(module) if module else None
            if canonical is not None and tensors.keys() <= plain:
                self.module_names[module] = (canonical, len(tensors))
                if canonical not in self.modules:
                    self.modules[canonical] = tensors
                    continue
                placed = {info: f"{canonical}.{suffix}" for suffix, info in tensors.items()}
            else:
                names = {info: canonical_name(f"{module}.{s}" if module else s) for s, info in tensors.items()}
                problems += (self._unknown(info) for info, name in names.items() if name is None)
                placed = {info: self._apart(name) for info, name in names.items() if name is not None}
                self.tensor_names.update((info.name, name) for info, name in placed.items())
            for info, name in placed.items():
                parent, _, suffix = name.rpartition(".")
                twin = self.modules.setdefault(parent, {}).setdefault(suffix, info)
                if twin is not info:
                    first, second = sorted((twin, info), key=lambda i: (i.file, i.start, i.end))
                    found, remedy = f"two: also {first.name} in {first.file}", "remove the one that is stale"
                    problems.append(Problem(second.file, second.name, f"one source for {name}", found, remedy))
        self.left = dict(self.modules)
        return problems

    def _unknown(self, info: TensorInfo) -> Problem:
        roots = ", ".join(self.family.names.roots)
        expected = f"a tensor of {self.family.name} (below {roots})"
        return Problem(info.file, info.name, expected, "an unknown name", "remove it, or convert with a version that knows it")

    def _apart(self, name: str) -> str:
        """A canonical name whose last segment holds module and suffix in one, as two segments; other names as they are."""
        module, _, last = name.rpartition(".")
        if last in self.joined and module.endswith(".experts"):
            return ".".join((module, *self.joined[last]))
        return name

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def get(self, name: str) -> TensorInfo | None:
        """The tensor of a canonical name, used or not."""
        module, _, suffix = name.rpartition(".")
        return self.modules.get(module, {}).get(suffix)

    def items(self) -> Iterator[tuple[str, TensorInfo]]:
        """All canonical names with their tensors."""
        for module, tensors in self.modules.items():
            yield from ((f"{module}.{suffix}" if module else suffix, info) for suffix, info in tensors.items())

    def paths(self) -> list[str]:
        """Canonical modules, and tensors right below layers or in the place of layers: what shows which layers there are."""
        layers = ((m, tensors) for m, tensors in self.modules.items() if m[-1:].isdecimal())
        return [*self.modules, *self.tensor_names.values(), *(f"{m}.{suffix}" for m, tensors in layers for suffix in tensors)]

    def below(self, root: str) -> list[str]:
        """The canonical names that begin with a root, in the order of the files."""
        inside = ((m, t) for m, t in self.modules.items() if m.partition(".")[0] == root)
        found = [(info, f"{module}.{suffix}") for module, tensors in inside for suffix, info in tensors.items()]
        if root in self:
            found += ((self.modules[""][root], root),)
        return [name for info, name in sorted(found, key=lambda pair: (pair[0].file, pair[0].start, pair[0].end))]

    def take(self, name: str) -> TensorInfo | None:
        """Use the stored tensor of a canonical name; None when there is none that is left."""
        module, _, suffix = name.rpartition(".")
        left = self.left.get(module)
        if left is None or suffix not in left:
            return None
        if left is self.modules[module]:
            left = self.left[module] = dict(left)
        return left.pop(suffix)

    def take_module(self, name: str) -> Mapping[str, TensorInfo]:
        """Use what is left of a canonical module."""
        return self.left.pop(name, {})

    def near_file(self, name: str) -> str | None:
        """The file where a missing tensor would be: that of its nearest relative in the tree of names."""
        if not self._files:
            for module, tensors in self.modules.items():
                while module not in self._files:
                    self._files[module] = next(iter(tensors.values())).file
                    module = module.rpartition(".")[0]
        while name and name not in self._files:
            name = name.rpartition(".")[0]
        return self._files.get(name)

    def stored_spelling(self, name: str) -> str:
        """A canonical name in the prefix spelling of this checkpoint."""
        root = name.partition(".")[0]
        if root not in self._spelling_of_root:
            self._spelling_of_root[root] = root
            for canonical, info in self.items():
                rest = canonical.removeprefix(root)
                if canonical.partition(".")[0] == root and info.name.endswith(rest):
                    self._spelling_of_root[root] = info.name.removesuffix(rest)
                    break
        return self._spelling_of_root[root] + name.removeprefix(root)

"""The plan while it is being written: its steps and modules, and everything that must be said about the checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from runtime.format import ModuleSpec

from .describe import value_repairs
from .errors import Problem
from .families.base import Placed
from .index import Index
from .ops import Step, Term, term_nbytes
from .plan import Dropped
from .recognise import INCOMPLETE
from .source import TensorInfo
from .spelling import Spelling


@dataclass(slots=True)
class Draft:
    """What the planner has found so far.

    first_file      where a missing tensor is reported that has no relative
    modules, kv_cache, unfused   as in `CanonicalConfig`
    value_repairs   what is mended -> the stored tensors that it concerns
    disagreements   what the configs say and the files contradict -> the modules that it concerns, if any
    """

    index: Index
    first_file: str
    problems: list[Problem] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    modules: dict[str, ModuleSpec] = field(default_factory=dict)
    unfused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kv_cache: dict[str, str] = field(default_factory=dict)
    repairs: list[str] = field(default_factory=list)
    value_repairs: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    disagreements: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    spelling: Spelling | None = None

    def problem(self, info: TensorInfo, expected: str, found: str, remedy: str) -> None:
        """Note one problem with a stored tensor."""
        self.problems.append(Problem(info.file, info.name, expected, found, remedy))

    def missing(self, name: str, expected: str, beside: Iterable[str] = ()) -> Problem:
        """The problem of a tensor that no file has, under the name that the checkpoint would use for it."""
        return self._lacking(name, self.spell().of(name, beside), expected)

    def missing_stack(self, placed: Placed, siblings: Sequence[Placed]) -> list[Problem]:
        """The problems of a layer that has nothing of a stack of experts, under the name that this checkpoint gives to one."""
        return [self._lacking(placed.name, name, expected) for name, expected in self.spell().of_stack(placed, siblings)]

    def _lacking(self, name: str, spelt: str, expected: str) -> Problem:
        return Problem(self.index.near_file(name) or self.first_file, spelt, expected, "no such tensor", INCOMPLETE)

    def spell(self) -> Spelling:
        """How this checkpoint spells names; only errors need it."""
        if self.spelling is None:
            self.spelling = Spelling(dict(self.index.items()), self.index.stored_spelling)
        return self.spelling

    def note(self, line: str) -> None:
        """A contradiction between the config and the files that concerns no single module."""
        self.disagreements.setdefault(line, [])

    def step(self, step: Step, sources: Iterable[tuple[str, TensorInfo, Sequence[Term]]]) -> None:
        """Write down a step, and what it mends.

        `sources`: terms that are alike but for their source, with the canonical name and the tensor of the first.  They must
        fill the step exactly; anything else is a mistake of the planner, not of the checkpoint.
        """
        given = 0
        for name, info, terms in sources:
            given += len(terms) * term_nbytes(terms[0], info.dtype, info.shape)
            for repair in value_repairs(terms[0], info, name, step):
                self.value_repairs[repair].update([term.source for term in terms])
        assert given == step.nbytes, step
        self.steps.append(step)

    def describe_contradictions(self) -> list[str]:
        """One line per kind of contradiction, with the modules it concerns."""
        lines = []
        for line, modules in self.disagreements.items():
            if not modules:
                lines.append(line)
                continue
            shown = ", ".join(modules[:3]) + (", ..." if len(modules) > 3 else "")
            lines.append(f"{line}: {shown} ({len(modules)} modules)")
        return lines

"""The values that a conversion looks at: small tensors, which are read at once and computed with, and codes as they pass by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .apply import count_zeros, find_fault, mean, transform
from .copying import Sources
from .errors import ORIGINAL, ConvertError, Problem
from .layout import Range, Tensors
from .ops import CHECKS, Step, Term
from .plan import Plan
from .source import TensorInfo

SMALL = 4096  # bytes; tensors up to this size are read in batches
BATCH = 1 << 20  # bytes that are read at once
GAP = 32 << 10  # bytes between two small tensors that are worth reading to save a call
SHIFTED_NORM = (0.5, 1.5)  # a zero-centred norm averages around 0, one that holds 1 + weight around 1
STREAMED_CHECKS = frozenset({"fp8_codes", "e4m3_scale", "e8m0_scale"})


Faults = dict[int, tuple[TensorInfo, str, str]]  # expert of a stack -> the stack, its check, what was found


class Group(NamedTuple):
    """Neighbouring terms of a step that are treated alike, and the bytes of their sources one after another."""

    terms: list[Term]
    infos: list[TensorInfo]
    data: bytes


class Values:
    """Reads what is computed with.  Small tensors are kept: a few bytes for each scale of the model."""

    def __init__(self, plan: Plan, sources: Sources) -> None:
        self.tensors: Tensors = plan.source.tensors
        self._sources = sources
        self._small: dict[str, bytes] = {}
        wanted = (term.source for step in plan.steps if _computed(step) for term in step.terms)
        self._read_small({name: self.tensors[name] for name in wanted}.values())

    def _read_small(self, infos: Iterable[TensorInfo]) -> None:
        """Read small tensors in the order in which they lie in the files, neighbours together."""
        batches: list[list[TensorInfo]] = []
        batch: list[TensorInfo] = []
        for info in sorted((i for i in infos if i.end - i.start <= SMALL), key=lambda i: (i.file, i.start)):
            far = batch and (
                info.file != batch[0].file or info.start - batch[-1].end > GAP or info.end - batch[0].start > BATCH
            )
            if far or not batch:
                batch = []
                batches.append(batch)
            batch.append(info)
        found = self._sources.read_all((batch[0].file, batch[0].start, batch[-1].end) for batch in batches)
        for batch, data in zip(batches, found, strict=True):
            first = batch[0].start
            self._small.update((i.name, data[i.start - first : i.end - first]) for i in batch)

    def ranges(self, steps: Iterable[Step]) -> Iterator[Range]:
        """What reading the tensors of steps takes, in this order, without those that are kept."""
        for step in steps:
            for term in step.terms:
                info = self.tensors[term.source].rows(term.rows)
                if info.name not in self._small:
                    yield info.file, info.start, info.end

    def read(self, info: TensorInfo, sources: Sources | None = None) -> bytes:
        """All bytes of a tensor, or of rows of it."""
        data = self._small.get(info.name)
        if data is None:
            return (sources or self._sources).read(info.file, info.start, info.end)
        whole = self.tensors[info.name]
        return data if info is whole else data[info.start - whole.start : info.end - whole.start]

    def groups(self, step: Step, sources: Sources | None = None) -> Iterator[Group]:
        """The terms of a step in order, with small ones of one kind together, so that they are one array."""
        group = Group([], [], b"")
        pieces: list[bytes] = []
        for term in step.terms:
            info = self.tensors[term.source].rows(term.rows)
            alike = group.terms and (group.terms[0].transform, group.terms[0].repeat, group.infos[0].dtype) == (
                term.transform, term.repeat, info.dtype
            )  # fmt: skip
            one = info.shape in ((), (1,))  # what is repeated, or has a shape of its own, stays alone
            if group.terms and not (alike and one and group.infos[0].shape in ((), (1,)) and term.repeat == 1):
                yield group._replace(data=b"".join(pieces))
                group, pieces = Group([], [], b""), []
            group.terms.append(term)
            group.infos.append(info)
            pieces.append(self.read(info, sources))
        if group.terms:
            yield group._replace(data=b"".join(pieces))

    def check(self, plan: Plan) -> int:
        """Check every small scale of a plan before anything is written.  Returns the zero block scales among them.

        Raises `ConvertError` with all faults found.
        """
        problems: list[Problem] = []
        experts: dict[str, Faults] = {}
        zeros = 0
        norms: list[tuple[TensorInfo, float]] = []
        checked = [step for step in plan.steps if step.check and step.check not in STREAMED_CHECKS]
        with self._sources.ahead(self.ranges(checked)) as sources:
            for step in checked:
                if step.check == "zero_centred":
                    (info,) = plan.source_of(step)
                    norms.append((info, mean(self.read(info, sources), info.dtype)))
                    continue
                for terms, infos, data in self.groups(step, sources):
                    if find_fault(step.check, data, infos[0].dtype, terms[0].transform):
                        for term, info in zip(terms, infos, strict=True):
                            self._faults(step.check, term, info, problems, experts)
                    zeros += count_zeros(step.check, data, infos[0].dtype)
        for faults in experts.values():
            first = min(faults)
            one, check, found = faults[first]
            found += f" in expert {first}" + (f", the first of {len(faults)} such experts" if len(faults) > 1 else "")
            problems += fault(one, check, found).problems
        if norms and all(SHIFTED_NORM[0] < value < SHIFTED_NORM[1] for _, value in norms):
            info, value = norms[0]
            problems.append(
                Problem(
                    info.file, info.name, "norm weights around 0, to which the model adds 1",
                    f"{value:.2f} on average, and around 1 in all {len(norms)} norms: 1 is added already",
                    f"an MLX repack stores them so: subtract 1 from them, or {ORIGINAL}",
                )
            )  # fmt: skip
        if problems:
            raise ConvertError(problems)
        return zeros

    def _faults(
        self, check: str, term: Term, info: TensorInfo, problems: list[Problem], experts: dict[str, Faults]
    ) -> None:
        """Add what is wrong with one source: to `problems`, or for a stack to `experts`, as several steps take its experts."""
        found = find_fault(check, self.read(info), info.dtype, term.transform)
        if found and term.rows is None:
            problems += fault(info, check, found).problems
        elif found and term.rows is not None:
            stack = self.tensors[term.source]
            for e in range(*term.rows):
                one = find_fault(check, self.read(stack.rows((e, e + 1))), info.dtype, term.transform)
                if one:
                    experts.setdefault(info.name, {}).setdefault(e, (stack, check, one))

    def computed(self, step: Step, codes: Codes | None, sources: Sources | None = None) -> Iterator[bytes]:
        """The bytes of a tensor that is computed, in bounded pieces: one expert at a time where axes are exchanged."""
        if any(term.transform.startswith("transpose") for term in step.terms):
            for term in step.terms:
                info = self.tensors[term.source].rows(term.rows)
                for part in info.split():
                    data = self.read(part, sources)
                    if codes is not None:
                        codes.look(memoryview(data), part)
                    yield transform(term.transform, data, info.dtype, info.shape[-1] if info.shape else 1) * term.repeat
            return
        for terms, infos, data in self.groups(step, sources):
            if codes is not None:
                codes.look(memoryview(data), infos[0])
            yield transform(terms[0].transform, data, infos[0].dtype) * terms[0].repeat


class Codes:
    """Looks at the codes of one step as they are copied, and counts zero block scales."""

    def __init__(self, step: Step, tensors: Tensors, sources: Sources) -> None:
        self._step, self._tensors, self._sources = step, tensors, sources
        self._dtype = tensors[step.terms[0].source].dtype
        self.zeros = 0

    def look(self, piece: memoryview, info: TensorInfo | None = None) -> None:
        """Raise `ConvertError` when a piece holds a code that must not be; it names the tensor, found by reading again."""
        dtype = info.dtype if info else self._dtype
        found = find_fault(self._step.check, piece, dtype)
        if found:
            raise self._blame(found)
        self.zeros += count_zeros(self._step.check, piece, dtype)

    def _blame(self, found: str) -> ConvertError:
        scratch = memoryview(bytearray(BATCH))
        for term in self._step.terms:
            info = self._tensors[term.source].rows(term.rows)
            for piece in self._sources.pieces(scratch, info.file, info.start, info.end):
                here = find_fault(self._step.check, piece, info.dtype)
                if here:
                    return fault(info, self._step.check, here)
        return fault(self._tensors[self._step.terms[0].source], self._step.check, found)


def fault(info: TensorInfo, check: str, found: str) -> ConvertError:
    """The error of a tensor whose values are not what `check` demands."""
    return ConvertError(
        Problem(
            info.file, info.name, f"values {CHECKS[check]}", found,
            "the tensor was never calibrated, or is damaged: fetch or export the checkpoint again",
        )
    )  # fmt: skip


def _computed(step: Step) -> bool:
    """Whether a step's values are looked at in full before they are written, or changed."""
    if step.check and step.check not in STREAMED_CHECKS:
        return True
    return any(term.transform != "copy" or term.repeat != 1 for term in step.terms)

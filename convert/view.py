"""A checkpoint, source or canonical, seen under canonical names: its tensors can be read in pieces, whatever they are made of.

`inspect` reads scales through it, and `diff` everything.  A tensor is a row of segments: byte ranges of a file, or bytes that
are computed (scales; experts whose axes are exchanged, one at a time).  Peak memory: the piece that is asked for, and the
largest computed segment.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, chain
from types import TracebackType
from typing import NamedTuple

from runtime.format import CanonicalConfig, TensorSpec

from .apply import transform
from .canonical import Canonical
from .copying import Sources
from .layout import copied_ranges
from .ops import Step, Term, term_nbytes
from .plan import Plan
from .source import AnyPath, SourceFile, TensorInfo, regular_file
from .values import Values


class Range(NamedTuple):
    """Bytes of a file: where they start, and how many."""

    file: str
    start: int
    nbytes: int


class Computed(NamedTuple):
    """Bytes that are computed when they are needed."""

    make: Callable[[], bytes]
    nbytes: int


Segment = Range | Computed


@dataclass(slots=True)
class View:
    """A checkpoint under canonical names; a context manager, which keeps the files open that it has read.

    tensors  canonical name -> dtype and shape
    check    raises `ConvertError` for small scales that no conversion takes (NaN, zero, negative)
    """

    config: CanonicalConfig
    tensors: dict[str, TensorSpec]
    files: Mapping[str, SourceFile]
    _segments: Callable[[str], list[Segment]]
    check: Callable[[], object] = lambda: None
    _sources: Sources = field(init=False)
    _laid_out: dict[str, tuple[list[Segment], list[int]]] = field(default_factory=dict)
    _made: tuple[Computed, bytes] | None = None

    def __post_init__(self) -> None:
        self._sources = Sources(self.files)

    def __enter__(self) -> View:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sources.__exit__(kind, error, trace)

    @property
    def sources(self) -> Sources:
        """The open files."""
        return self._sources

    def segments(self, name: str) -> list[Segment]:
        """What a tensor is made of, in order."""
        return self._layout(name)[0]

    def read_into(self, target: memoryview, name: str, start: int = 0) -> None:
        """Fill `target` with the bytes of a tensor from `start` on."""
        segments, ends = self._layout(name)
        at = bisect_right(ends, start)
        while target:
            segment = segments[at]
            skip = start - (ends[at] - segment.nbytes)
            count = min(len(target), segment.nbytes - skip)
            if isinstance(segment, Range):
                self._sources.read_into(target[:count], segment.file, segment.start + skip)
            else:
                target[:count] = self._computed(segment)[skip : skip + count]
            target, start, at = target[count:], start + count, at + 1

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of a tensor; all of it by default."""
        buffer = bytearray((self.tensors[name].nbytes if end is None else end) - start)
        self.read_into(memoryview(buffer), name, start)
        return bytes(buffer)

    def _layout(self, name: str) -> tuple[list[Segment], list[int]]:
        known = self._laid_out.get(name)
        if known is None:
            segments = [segment for segment in self._segments(name) if segment.nbytes]
            self._laid_out = {name: (segments, list(accumulate(segment.nbytes for segment in segments)))}
            known = self._laid_out[name]
        return known

    def _computed(self, segment: Computed) -> bytes:
        if self._made is None or self._made[0] is not segment:
            self._made = (segment, segment.make())
        return self._made[1]


def view_plan(plan: Plan) -> View:
    """A source through its plan.  Scales are read at once when the first of them is needed."""
    steps = {step.name: step for step in plan.steps}
    read: list[Values] = []

    def values() -> Values:
        if not read:
            read.append(Values(plan, view.sources))
        return read[0]

    def made(step: Step) -> bytes:
        return b"".join(values().computed(step, None))

    def segments(name: str) -> list[Segment]:
        step = steps[name]
        copied = copied_ranges(step, plan.source.tensors)
        if copied is not None:
            return [Range(file, start, end - start) for file, start, end in copied]
        if any(term.transform.startswith("transpose") for term in step.terms):
            return list(chain.from_iterable(_experts(view, term, plan.source.tensors[term.source]) for term in step.terms))
        return [Computed(lambda: made(step), step.nbytes)]

    tensors = {step.name: TensorSpec(step.dtype, step.shape) for step in plan.steps}
    view = View(plan.config, tensors, plan.source.files, segments, lambda: values().check(plan))
    return view


def _experts(view: View, term: Term, info: TensorInfo) -> Iterator[Segment]:
    """The experts of a term whose axes are exchanged, one by one."""
    for part in info.rows(term.rows).split():

        def make(part: TensorInfo = part) -> bytes:
            data = view.sources.read(part.file, part.start, part.end)
            return transform(term.transform, data, part.dtype, part.shape[-1])

        yield from [Computed(make, term_nbytes(Term("", term.transform), part.dtype, part.shape))] * term.repeat


def view_canonical(canonical: Canonical) -> View:
    """A canonical checkpoint as it is."""
    files = {name: source_file(canonical.directory, name) for name in canonical.files}

    def segments(name: str) -> list[Segment]:
        info = canonical.tensors[name]
        return [Range(info.file, info.start, info.end - info.start)]

    tensors = {name: TensorSpec(info.dtype, info.shape) for name, info in canonical.tensors.items()}
    return View(canonical.config, tensors, files, segments)


def view_stored(files: Mapping[str, SourceFile], tensors: Mapping[str, TensorInfo]) -> View:
    """A source as it is stored, under its own names: for checkpoints that no plan accounts for."""

    def segments(name: str) -> list[Segment]:
        info = tensors[name]
        return [Range(info.file, info.start, info.end - info.start)]

    specs = {name: TensorSpec(info.dtype, info.shape) for name, info in tensors.items()}
    empty = CanonicalConfig("", {}, {}, {}, {}, (), {})
    return View(empty, specs, files, segments)


def source_file(directory: AnyPath, name: str) -> SourceFile:
    """A file of a checkpoint, and how to tell whether it changes.  Raises `ConvertError` when it is no file of its own."""
    path = regular_file(directory, name)
    found = path.stat()
    return SourceFile(name, path, (found.st_size, found.st_mtime_ns, found.st_ino))

"""Where tensors lie in OUT: in which file, in which order, and where in it the data starts.

Files are laid out for two readers.  A loader reads each file from front to back, in the order of the model's layers, every
tensor aligned to its elements.  The converter copies ranges whose place in source and target agrees modulo `BLOCK`: those can
be cloned where the file system has reflinks, and are copied page by page in the kernel elsewhere, which measured 1.6 times as
fast as copies that straddle pages.  Nothing here depends on the machine, so the same input gives the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from runtime.format import DTYPE_BYTES

from .ops import Step
from .source import TensorInfo

BLOCK = 4096  # pages, and the blocks of file systems that clone
DEFAULT_SHARD_SIZE = 5_000_000_000
SMALLEST_SHARD = 256 << 20  # files of IN that are smaller on average are joined
LARGE = 128 << 10  # ranges from this size on are copied by the kernel, and worth cloning

Tensors = Mapping[str, TensorInfo]
Range = tuple[str, int, int]  # file of IN, first byte, end


def copied_ranges(step: Step, tensors: Tensors) -> list[Range] | None:
    """The byte ranges of IN whose concatenation is the tensor; None for a tensor that is computed.

    Neighbours that are neighbours in IN as well are one range: experts that lie one after another become one copy.
    """
    ranges: list[Range] = []
    for source, transform, repeat, rows in step.terms:
        if transform != "copy" or repeat != 1:
            return None
        info = tensors[source]
        if rows is not None:
            info = info.rows(rows)
        if ranges and ranges[-1][2] == info.start and ranges[-1][0] == info.file:
            ranges[-1] = (info.file, ranges[-1][1], info.end)
        else:
            ranges.append((info.file, info.start, info.end))
    return ranges


def pack(steps: Sequence[Step], tensors: Tensors, shard_size: int | None) -> dict[str, list[int]]:
    """Shard file name -> indices of `steps`, in the order of their bytes.

    Without `shard_size` the files are those of IN (a tensor made of several goes with its first part), unless IN has a single
    one, tiny ones, or some above `DEFAULT_SHARD_SIZE`.  Otherwise a file holds up to `shard_size` bytes, or one larger tensor.

    Within a file, in the order of the model: first the tensors that fill whole blocks, so that each of them starts at the same
    place within a block; then the others, those of wider elements first, so that each is aligned to its elements.
    """
    groups = _as_in_source(steps, tensors) if shard_size is None else []
    groups = groups or _by_size(steps, shard_size or DEFAULT_SHARD_SIZE)
    for group in groups:
        group.sort(key=lambda i: (1, -DTYPE_BYTES[steps[i].dtype]) if steps[i].nbytes % BLOCK else (0, 0))
    total = len(groups)
    return {f"model-{n:05d}-of-{total:05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _by_size(steps: Sequence[Step], shard_size: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    filled = 0
    for index, step in enumerate(steps):
        nbytes = step.nbytes
        if groups[-1] and filled + nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += nbytes
    return groups


def _as_in_source(steps: Sequence[Step], tensors: Tensors) -> list[list[int]]:
    """One group for each file of IN, or none when those boundaries do not serve."""
    groups: dict[str, list[int]] = {}
    sizes: Counter[str] = Counter()
    for index, step in enumerate(steps):
        file = tensors[step.terms[0].source].file
        groups.setdefault(file, []).append(index)
        sizes[file] += step.nbytes
    serve = len(sizes) > 1 and sizes.total() >= SMALLEST_SHARD * len(sizes) and max(sizes.values()) <= DEFAULT_SHARD_SIZE
    return list(groups.values()) if serve else []


def _large(steps: Sequence[Step], tensors: Tensors) -> Iterator[tuple[int, int, int]]:
    """(place in the data of OUT's file, place in IN's file, bytes) of each large range that is copied."""
    position = 0
    for step in steps:
        nbytes = step.nbytes
        if nbytes >= LARGE:
            at = position
            for _, start, end in copied_ranges(step, tensors) or ():
                if end - start >= LARGE:
                    yield at, start, end - start
                at += end - start
        position += nbytes


def data_residue(steps: Sequence[Step], tensors: Tensors) -> tuple[int, int]:
    """Where the data of a file should start modulo `BLOCK`, and how many of its bytes then agree with IN modulo `BLOCK`.

    The choice is the one under which most bytes agree; a multiple of 8, so that every dtype stays aligned.
    """
    agreeing: Counter[int] = Counter()
    for at, start, nbytes in _large(steps, tensors):
        agreeing[(start - at) % BLOCK] += nbytes
    best = max((r for r in agreeing if r % 8 == 0), key=lambda r: (agreeing[r], -r), default=0)
    return best, agreeing[best]

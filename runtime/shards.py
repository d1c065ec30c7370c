"""Reads safetensors files: the header first and alone, then tensors, mapped for the CPU or streamed to a device.

Headers are read here instead of by the safetensors library because a tensor's place in the file is needed: to map it without
a call per tensor and step, and to read straight into pinned memory.  The library's own way to a GPU copies from the mapped
file, where page faults and transfers wait for each other (safetensors issue 729: 1.2 to 11 times slower than pinned copies).
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.errors import LoadError
from runtime.format import DTYPE_BYTES, INDEX_FILE, MAX_HEADER_BYTES
from runtime.layers import TORCH_DTYPES

PIECE = 2**23  # bytes read and copied at once
READERS = 8  # threads, each with two buffers: one thread alone reads several times slower than a GPU takes
BUFFERS = 2 * READERS


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: safetensors dtype name, shape, and the bytes from `start` of the file on."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Shard:
    """An open safetensors file whose header is sound; none of its data has been read.

    `tensors`: by name.  Raises `LoadError` when the file is absent or is not a complete safetensors file: a header of
    another form, or offsets that leave gaps, overlap, or do not end with the file.
    """

    def __init__(self, directory: Path, file: str) -> None:
        self.file = file
        try:
            self._stream = (directory / file).open("rb", buffering=0)
        except FileNotFoundError:
            raise LoadError(
                f"{file}: expected the file that {INDEX_FILE} names, found none; the checkpoint is incomplete: "
                "copy it again or convert again"
            ) from None
        except OSError as error:
            raise self._damaged(str(error.strerror)) from None
        except ValueError as error:  # a name with a NUL
            raise self._damaged(str(error)) from None
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise
        self._map: mmap.mmap | None = None

    def close(self) -> None:
        """Close the file.  Tensors that were mapped stay valid."""
        self._stream.close()

    def mapped(self, name: str) -> Tensor:
        """A tensor on the CPU whose bytes are read from the file when first used; writing to it does not reach the file.

        The file stays mapped, with one descriptor, for as long as any such tensor lives.
        """
        entry = self.tensors[name]
        dtype = TORCH_DTYPES[entry.dtype]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        if self._map is None:
            self._map = mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_COPY)
        count = entry.nbytes // DTYPE_BYTES[entry.dtype]
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def read_into(self, buffer: Tensor, start: int, nbytes: int) -> None:
        """Fill the first `nbytes` of a uint8 CPU tensor with the file's bytes from `start` on.  Other threads run on."""
        into = memoryview((ctypes.c_ubyte * nbytes).from_address(buffer.data_ptr())).cast("B")
        done = 0
        while done < nbytes:
            count = os.preadv(self._stream.fileno(), [into[done:]], start + done)
            if count == 0:
                raise self._damaged(f"its end at byte {start + done}, while it was being read")
            done += count

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._stream.fileno()).st_size
        length = struct.unpack("<Q", self._stream.read(8))[0] if size >= 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise self._damaged(f"{size} bytes with a header of {length}")
        try:
            header = json.loads(self._stream.read(length))
            header.pop("__metadata__", None)
            tensors = {name: self._entry(entry, 8 + length) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise self._damaged(f"a malformed header ({error!r})") from None
        end = 8 + length
        for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if entry.start != end:
                raise self._damaged(f"{name} at byte {entry.start} instead of {end}")
            end += entry.nbytes
        if end != size:
            raise self._damaged(f"{size} bytes instead of {end}")
        return tensors

    @staticmethod
    def _entry(entry: Any, data: int) -> StoredTensor:
        """One entry of a header; `data`: where the file's data begins.  Raises an error of any kind when it is malformed."""
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (start, stop - start, *shape)):
            raise ValueError(f"shape {shape}, data_offsets {start}, {stop}")
        if dtype in DTYPE_BYTES and stop - start != DTYPE_BYTES[dtype] * math.prod(shape):
            raise ValueError(f"{dtype} {list(shape)} in {stop - start} bytes")
        return StoredTensor(dtype, shape, data + start, stop - start)

    def _damaged(self, found: str) -> LoadError:
        return LoadError(
            f"{self.file}: expected a complete safetensors file, found {found}; the file is damaged or cut short: "
            "copy it again or convert again"
        )


Part = tuple[Tensor, Tensor]  # uint8 [n] twice: where bytes belong, and a slice of a buffer that holds them
Wait = Callable[[], object]
Copy = Callable[[list[Part]], Wait]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes of a file.  `parts`: uint8 views of the tensors that it belongs to, in order, `nbytes` in all."""

    shard: Shard
    start: int
    nbytes: int
    parts: tuple[Tensor, ...]


def pieces(shard: Shard, targets: Iterable[tuple[str, Tensor]], size: int = PIECE) -> Iterator[Piece]:
    """Cut a file into runs of at most `size` bytes that hold the tensors `targets` (name, contiguous tensor to fill).

    What no target needs is not read.  Neighbours share a piece, so many small tensors cost one read.
    """
    start = end = 0
    parts: list[Tensor] = []
    for name, target in sorted(targets, key=lambda item: shard.tensors[item[0]].start):
        entry, flat = shard.tensors[name], target.view(-1).view(torch.uint8)
        assert flat.numel() == entry.nbytes
        done = 0
        while done < entry.nbytes:
            if entry.start + done != end or end - start == size:
                if parts:
                    yield Piece(shard, start, end - start, tuple(parts))
                start = end = entry.start + done
                parts = []
            count = min(entry.nbytes - done, start + size - end)
            parts.append(flat[done : done + count])
            done, end = done + count, end + count
    if parts:
        yield Piece(shard, start, end - start, tuple(parts))


def stream(work: Iterable[Piece], buffers: Sequence[Tensor], copy: Copy) -> None:
    """Read pieces into buffers, and start to copy each to where it belongs as soon as it is read.

    `buffers`: uint8 CPU tensors, each as long as the longest piece.  Every two have a thread, which reads into one while
    what it read before is copied out of the other.  `copy` starts the copies of one piece and returns what waits for their
    end; it is called in these threads, several at a time.  All copies are over on return, also after an error.
    Raises `LoadError` when a file is shorter than it was, and what `copy` raises.
    """
    waiting, lock, failed = iter(work), threading.Lock(), threading.Event()

    def run(own: Sequence[Tensor]) -> None:
        waits: list[Wait] = [_nothing] * len(own)
        try:
            for turn in itertools.count():
                with lock:
                    piece = None if failed.is_set() else next(waiting, None)
                if piece is None:
                    return
                slot = turn % len(own)
                waits[slot]()
                piece.shard.read_into(own[slot], piece.start, piece.nbytes)
                slices = own[slot][: piece.nbytes].split([part.numel() for part in piece.parts])
                waits[slot] = copy(list(zip(piece.parts, slices, strict=True)))
        except BaseException:
            failed.set()
            raise
        finally:
            for wait in waits:
                wait()

    count = -(-len(buffers) // 2)
    with ThreadPoolExecutor(count) as readers:
        for reader in [readers.submit(run, buffers[first::count]) for first in range(count)]:
            reader.result()


def _nothing() -> None:
    """What there is to wait for before a buffer's first use."""


def stream_to_cuda(work: Iterable[Piece], device: torch.device) -> None:
    """`stream` over pinned buffers, with copies on a CUDA stream of their own.  All targets must be allocated before.

    Host memory: `BUFFERS * PIECE` bytes, pinned, which torch keeps for the next load.
    """
    buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # which may still use memory that a target now has

    def copy(parts: list[Part]) -> Wait:
        with torch.cuda.stream(side):  # which is the current one of this thread only
            for target, source in parts:
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(side)
        return event.synchronize

    try:
        stream(work, buffers, copy)
    finally:
        side.synchronize()  # also after an error: nothing may be freed while a copy runs

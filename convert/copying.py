"""Moves byte ranges from the files of IN into a file of OUT, in the cheapest way that both file systems offer.

In this order: cloning (FICLONERANGE: no bytes move, the files share their blocks) where source and target agree modulo the
block size; `copy_file_range` (the kernel copies); reads and writes in pieces of `PIECE` bytes.  A way that does not work
between two file systems is not tried again.  Peak memory: two pieces for each target that is open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .errors import MachineError, Problem
from .layout import BLOCK, LARGE
from .source import SourceFile

PIECE = 256 << 10  # fits the cache of a core: a piece that is looked at and written is fetched from memory once
AT_ONCE = 32 << 20  # bytes that the kernel copies between two looks at progress
# The kernel moves 16 pages at a time.  Where they start at a multiple of their size in the target, they become one large folio
# of the page cache: 0.30 s of CPU for a gigabyte instead of 0.41 s (Linux 6.18, ext4).
FOLIO = 64 << 10
FLUSH_EVERY = 64 << 20  # bytes after which writing back to disk starts, in the background
FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range), linux/fs.h
# What the kernel answers where cloning or copy_file_range is not possible between two files.
NOT_POSSIBLE = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ENOTTY, errno.EPERM, errno.ETXTBSY}
)

Look = Callable[[memoryview], None]  # called with the bytes of a range in pieces; raises when they must not be copied


def changed(file: str) -> MachineError:
    """The error of a source that is no longer what was planned."""
    return MachineError(
        Problem(file, "", "the file as it was when planning", "one that changed meanwhile", "convert again when it is stable")
    )


@dataclass(slots=True)
class _Open:
    """One open file of IN, and which ways of copying from it to OUT are still worth a try."""

    descriptor: int
    name: str
    clone: bool = hasattr(os, "copy_file_range")  # Linux
    kernel: bool = hasattr(os, "copy_file_range")


class Sources:
    """The files of IN that are open during a run; shared by all threads, as every read says where it starts."""

    def __init__(self, files: Mapping[str, SourceFile]) -> None:
        self._files = files
        self._open: dict[str, _Open] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for opened in self._open.values():
            os.close(opened.descriptor)

    def opened(self, name: str) -> _Open:
        """A file of IN, opened when it is first needed."""
        with self._lock:
            if name not in self._open:
                self._open[name] = _Open(os.open(self._files[name].path, os.O_RDONLY), name)
            return self._open[name]

    def read_into(self, view: memoryview, name: str, start: int) -> None:
        """Fill `view` with the bytes of a file from `start` on."""
        descriptor = self.opened(name).descriptor
        while view:
            try:
                count = os.preadv(descriptor, [view], start)
            except OSError as error:
                error.filename = str(self._files[name].path)
                raise
            if count == 0:
                raise changed(name)
            view, start = view[count:], start + count

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file; for small ranges."""
        buffer = bytearray(end - start)
        self.read_into(memoryview(buffer), name, start)
        return bytes(buffer)

    def pieces(self, scratch: memoryview, name: str, start: int, end: int) -> Iterator[memoryview]:
        """Bytes [start, end) of a file, a part of `scratch` at a time."""
        while start < end:
            view = scratch[: min(len(scratch), end - start)]
            self.read_into(view, name, start)
            yield view
            start += len(view)


def try_clone(source: int, target: int, start: int, at: int, count: int) -> bool:
    """Let `target` share `count` bytes of `source`; all numbers must be multiples of the block size.  False: not possible."""
    try:
        fcntl.ioctl(target, FICLONERANGE, struct.pack("qQQQ", source, start, count, at))
    except OSError as error:
        if error.errno not in NOT_POSSIBLE:
            raise
        return False
    return True


def can_clone(sources: Sources, name: str, directory: Path) -> bool:
    """Whether blocks of a file of IN can be shared with files in `directory`; tried out with one block."""
    opened = sources.opened(name)
    probe = directory / ".clone"
    if not opened.clone or os.fstat(opened.descriptor).st_size < BLOCK:
        return False
    target = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        return try_clone(opened.descriptor, target, 0, 0, BLOCK)
    finally:
        os.close(target)
        probe.unlink()


class Flusher:
    """Starts writing back to disk while copying goes on, in a thread of its own; it never answers for durability."""

    def __init__(self) -> None:
        self._wanted = threading.Condition()
        self._targets: list[int] = []
        self._busy: int | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._wanted:
            self._ended = True
            self._wanted.notify_all()
        self._thread.join()

    def want(self, descriptor: int) -> None:
        """Ask for a file to be flushed soon."""
        with self._wanted:
            if descriptor not in self._targets:
                self._targets.append(descriptor)
                self._wanted.notify_all()

    def forget(self, descriptor: int) -> None:
        """Return once a file is not flushed any more, so that it can be closed."""
        with self._wanted:
            if descriptor in self._targets:
                self._targets.remove(descriptor)
            self._wanted.wait_for(lambda: self._busy != descriptor)

    def _run(self) -> None:
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._targets or self._ended)
                if self._ended:
                    return
                self._busy = self._targets.pop(0)
            try:
                _flush_data(self._busy)
            except OSError:
                pass  # the writer's own fsync reports it: errors stay with the descriptor until then
            finally:
                with self._wanted:
                    self._busy = None
                    self._wanted.notify_all()


def _flush_data(descriptor: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)


class Target:
    """A file of OUT that is written from front to back: small ranges are gathered, large ones go through the kernel.

    `progress` is called with the number of bytes written since the last call; `stop` ends the work between two pieces.
    """

    def __init__(
        self,
        path: Path,
        sources: Sources,
        progress: Callable[[int], None],
        stop: threading.Event,
        flusher: Flusher | None = None,
    ) -> None:
        self._sources, self._progress, self._stop, self._flusher = sources, progress, stop, flusher
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._buffer = memoryview(bytearray(PIECE))
        self._scratch = memoryview(bytearray(PIECE))
        self._filled = 0  # bytes in the buffer, which belong at `_position`
        self._position = 0
        self._unflushed = 0

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._flusher is not None:
            self._flusher.forget(self._descriptor)
        os.close(self._descriptor)

    def finish(self) -> None:
        """Write what is gathered, and return when the whole file is on disk."""
        self._empty()
        if self._flusher is not None:
            self._flusher.forget(self._descriptor)
        os.fsync(self._descriptor)

    def write(self, data: bytes | memoryview) -> None:
        """Append computed bytes."""
        view = memoryview(data)
        while view:
            part = view[: PIECE - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == PIECE:
                self._empty()

    def copy(self, name: str, start: int, end: int, look: Look | None = None) -> None:
        """Append bytes [start, end) of a file of IN, after `look` has seen them."""
        if end - start < LARGE:
            self._gather(name, start, end, look)
            return
        self._empty()
        while start < end:
            stop = min(end, start + AT_ONCE - self._position % AT_ONCE)
            if look is not None:
                for piece in self._sources.pieces(self._scratch, name, start, stop):
                    look(piece)
            self._move(self._sources.opened(name), start, stop)
            start = stop

    def _gather(self, name: str, start: int, end: int, look: Look | None) -> None:
        while start < end:
            count = min(end - start, PIECE - self._filled)
            view = self._buffer[self._filled : self._filled + count]
            self._sources.read_into(view, name, start)
            if look is not None:
                look(view)
            self._filled += count
            start += count
            if self._filled == PIECE:
                self._empty()

    def _empty(self) -> None:
        view = self._buffer[: self._filled]
        self._filled = 0
        while view:
            written = os.pwrite(self._descriptor, view, self._position)
            view = view[written:]
            self._advance(written)

    def _advance(self, nbytes: int) -> None:
        self._position += nbytes
        self._unflushed += nbytes
        if self._flusher is not None and self._unflushed >= FLUSH_EVERY:
            self._unflushed = 0
            self._flusher.want(self._descriptor)
        self._progress(nbytes)
        if self._stop.is_set():
            raise InterruptedError("the conversion was given up")

    def _move(self, source: _Open, start: int, end: int) -> None:
        """Append a large range in the cheapest way that works."""
        if source.clone and (start - self._position) % BLOCK == 0:
            first = min(end, start + -start % BLOCK)
            whole = (end - first) // BLOCK * BLOCK
            if whole:
                self._by_hand(source, start, first)
                if try_clone(source.descriptor, self._descriptor, first, self._position, whole):
                    self._unflushed -= whole  # nothing was written
                    self._advance(whole)
                    start = first + whole
                else:
                    source.clone = False
                    start = first
        if source.kernel and end - start >= LARGE:
            start = self._in_kernel(source, start, end)
        self._by_hand(source, start, end)

    def _in_kernel(self, source: _Open, start: int, end: int) -> int:
        """`copy_file_range` as far as it gets; returns where it stopped."""
        while start < end:
            count = min(end - start, -self._position % FOLIO or end - start)
            try:
                copied = os.copy_file_range(source.descriptor, self._descriptor, count, start, self._position)
            except OSError as error:
                if error.errno not in NOT_POSSIBLE:
                    raise
                copied = 0
            if copied == 0:
                source.kernel = False  # some file systems answer 0 for what they cannot do; a short file is found by reading
                break
            start += copied
            self._advance(copied)
        return start

    def _by_hand(self, source: _Open, start: int, end: int) -> None:
        for piece in self._sources.pieces(self._scratch, source.name, start, end):
            view = piece
            while view:
                written = os.pwrite(self._descriptor, view, self._position)
                view = view[written:]
                self._advance(written)

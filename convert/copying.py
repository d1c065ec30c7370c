"""Moves byte ranges from the files of IN into a file of OUT, in the cheapest way that both file systems offer.

In this order: cloning (FICLONERANGE: no bytes move, the files share their blocks) where source and target agree modulo the
block size; `copy_file_range` on network file systems, whose server then copies; reading and writing otherwise, which is the
only way of what comes from a URL (`remote`).

What is read and written passes through buffers that are looked at on the way (values checked, digests taken) while they are in
the core's cache, and written by other threads past the page cache (O_DIRECT) where the file system can: the disk takes them
from the buffers, so the bytes are moved once, they are on disk when they are written, and the page cache keeps what it holds.
3.2 GB took 1.2 s and 0.5 s of CPU that way; `cp` took 1.2 s and 1.0 s of CPU, and 2 s more until everything was on disk (Linux
6.18, ext4).  A way that does not work between two file systems is not tried again.  Peak memory: `DEPTH` buffers of `BUFFER`
bytes for each target that is open.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from .errors import changed as changed
from .layout import BLOCK, LARGE, Range
from .remote import ReadAhead, RemotePath, remotes
from .source import SourceFile

PIECE = 1 << 20  # bytes that are read at once: they stay in the caches while they are looked at
BUFFER = 4 << 20  # bytes that are written at once
DEPTH = 3  # buffers of a target: one is filled while the others are written
WRITERS = 4  # threads that write; they wait for the disk, not for a core
AT_ONCE = 32 << 20  # bytes that a server copies between two looks at progress
FLUSH_EVERY = 64 << 20  # bytes after which writing back to disk starts, where they go through the page cache
NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph"})  # file systems whose server can copy ranges (copy_file_range)
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux
FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range), linux/fs.h
# What the kernel answers where cloning or copy_file_range is not possible between two files.
NOT_POSSIBLE = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ENOTTY, errno.EPERM, errno.ETXTBSY}
)

Look = Callable[[memoryview], object]  # called with the bytes of a range in pieces; raises when they must not be copied


@dataclass(slots=True)
class _Open:
    """One open file of IN, and which ways of copying from it to OUT are still worth a try."""

    descriptor: int
    name: str
    clone: bool = sys.platform == "linux"
    server: bool = sys.platform == "linux"
    remote: RemotePath | None = None


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
            if opened.remote is None:
                os.close(opened.descriptor)
        for remote in remotes(file.path for file in self._files.values()):
            if error is None:
                remote.close()
            else:
                remote.give_up()

    def give_up(self) -> None:
        """End what waits for a network."""
        for remote in remotes(file.path for file in self._files.values()):
            remote.give_up()

    def opened(self, name: str) -> _Open:
        """A file of IN, opened when it is first needed."""
        with self._lock:
            if name not in self._open:
                path = self._files[name].path
                if isinstance(path, RemotePath):
                    self._open[name] = _Open(-1, name, clone=False, server=False, remote=path)
                else:
                    self._open[name] = _Open(os.open(path, os.O_RDONLY), name)
            return self._open[name]

    def read_into(self, view: memoryview, name: str, start: int) -> None:
        """Fill `view` with the bytes of a file from `start` on."""
        opened = self.opened(name)
        if opened.remote is not None:
            opened.remote.read_into(view, start)
            return
        descriptor = opened.descriptor
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

    def read_all(self, ranges: Iterable[Range]) -> Iterator[bytes]:
        """The bytes of many small ranges, in order; several at a time where they come over a network."""
        for remote in remotes(file.path for file in self._files.values()):
            yield from remote.map(lambda part: self.read(*part), ranges)
            return
        yield from (self.read(*part) for part in ranges)

    @contextmanager
    def ahead(self, ranges: Iterable[Range], stop: threading.Event | None = None) -> Iterator[Sources]:
        """These files for one thread that will read `ranges` in this order: over a network, the next ones come beforehand."""
        for remote in remotes(file.path for file in self._files.values()):
            reader = ReadAhead(remote, ranges, stop)
            try:
                yield _Ahead(self, reader)
            finally:
                reader.close()
            return
        yield self

    def pieces(self, scratch: memoryview, name: str, start: int, end: int) -> Iterator[memoryview]:
        """Bytes [start, end) of a file, a part of `scratch` at a time."""
        while start < end:
            view = scratch[: min(len(scratch), end - start)]
            self.read_into(view, name, start)
            yield view
            start += len(view)


class _Ahead(Sources):
    """Remote files that are read ahead."""

    def __init__(self, sources: Sources, reader: ReadAhead) -> None:
        self._sources, self._reader = sources, reader

    def opened(self, name: str) -> _Open:
        """See `Sources`."""
        return self._sources.opened(name)

    def read_into(self, view: memoryview, name: str, start: int) -> None:
        """See `Sources`."""
        self._reader.read_into(view, name, start)


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


def on_network(path: Path) -> bool:
    """Whether a file lies on a network file system whose server can copy; from the mounts that Linux lists."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    # ID parent major:minor root place options [fields] - type device options
    return any(line.split(" - ")[1].split()[0] in NETWORK for line in lines if line.split()[2] == number)


class Writers:
    """The threads that write the buffers of all targets of a run."""

    def __init__(self, count: int = WRITERS) -> None:
        self.pool = ThreadPoolExecutor(count, "writer")

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


@dataclass(slots=True)
class _Buffer:
    """Memory at page boundaries, as O_DIRECT demands, and the write that still reads from it."""

    view: memoryview = field(default_factory=lambda: memoryview(mmap.mmap(-1, BUFFER)))
    written: Future[None] | None = None

    def wait(self) -> None:
        """Return once the buffer can be filled again.  Raises what its write raised."""
        pending, self.written = self.written, None
        if pending is not None:
            pending.result()


class Target:
    """A file of OUT that is written from front to back.

    `progress` is called with the number of bytes handed over since the last call; `stop` ends the work between two pieces.
    """

    def __init__(
        self, path: Path, sources: Sources, progress: Callable[[int], None], stop: threading.Event, writers: Writers
    ) -> None:
        self._path, self._sources, self._progress, self._stop, self._pool = path, sources, progress, stop, writers.pool
        self._direct, self._descriptor = _create(path)
        self._server = on_network(path)
        self._buffers = [_Buffer() for _ in range(DEPTH)]
        self._start = 0  # where the first buffer's bytes belong; with O_DIRECT, a multiple of BLOCK
        self._filled = 0  # bytes in the first buffer
        self._unflushed = 0
        self._flushed: Future[None] | None = None

    @property
    def _position(self) -> int:
        return self._start + self._filled

    def close(self) -> None:
        """Close the file, finished or not."""
        with suppress(OSError):  # `finish` has seen the errors of a file that is finished
            self._wait()
        os.close(self._descriptor)

    def finish(self) -> None:
        """Write what is gathered, and return when the whole file is on disk."""
        self._hand_over(self._filled - self._filled % BLOCK if self._direct else self._filled)
        self._wait()
        if self._filled:  # less than a block: through the page cache
            self._through_cache()
            self._hand_over(self._filled)
            self._wait()
        os.fsync(self._descriptor)

    def write(self, data: bytes | memoryview) -> None:
        """Append computed bytes."""
        view = memoryview(data)
        while view:
            part = self._room(len(view))
            part[:] = view[: len(part)]
            view = view[len(part) :]
            self._appended(len(part))

    def copy(self, name: str, start: int, end: int, look: Look | None = None) -> None:
        """Append bytes [start, end) of a file of IN, after `look` has seen them in order, a piece at a time."""
        source = self._sources.opened(name)
        if end - start >= LARGE:
            start = self._clone(source, start, end, look)
            if start < end and self._server and source.server:
                start = self._by_server(source, start, end, look)
        self._by_hand(name, start, end, look)

    def _by_hand(self, name: str, start: int, end: int, look: Look | None) -> None:
        while start < end:
            part = self._room(min(PIECE, end - start))
            self._sources.read_into(part, name, start)
            if look is not None:
                look(part)
            start += len(part)
            self._appended(len(part))

    def _room(self, count: int) -> memoryview:
        """Up to `count` bytes of the first buffer that are free."""
        return self._buffers[0].view[self._filled : self._filled + count]

    def _appended(self, count: int) -> None:
        self._filled += count
        if self._filled == BUFFER:
            self._hand_over(BUFFER)
        self._advance(count)

    def _advance(self, nbytes: int) -> None:
        self._progress(nbytes)
        if self._stop.is_set():
            raise InterruptedError("the conversion was given up")

    def _hand_over(self, count: int) -> None:
        """Let the first `count` bytes of the first buffer be written, and go on with the next one."""
        if not count:
            return
        full = self._buffers.pop(0)
        self._buffers.append(full)
        full.written = self._pool.submit(self._write_out, full.view[:count], self._start)
        following = self._buffers[0]
        following.wait()
        rest = self._filled - count
        following.view[:rest] = full.view[count : self._filled]
        self._start, self._filled = self._start + count, rest
        self._unflushed += count
        if not self._direct and self._unflushed >= FLUSH_EVERY and (self._flushed is None or self._flushed.done()):
            self._flush_soon()

    def _write_out(self, view: memoryview, position: int) -> None:
        """Write a buffer; in another thread."""
        while view:
            try:
                written = os.pwrite(self._descriptor, view, position)
            except OSError as error:
                if error.errno == errno.EINVAL and self._direct:  # opened with O_DIRECT, which the file system then refuses
                    self._through_cache()
                    continue
                error.filename = str(self._path)
                raise
            if written % BLOCK and written < len(view):
                self._through_cache()
            view, position = view[written:], position + written

    def _through_cache(self) -> None:
        """Write through the page cache from now on."""
        if self._direct:
            self._direct = False
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~DIRECT)

    def _flush_soon(self) -> None:
        """Start writing back to disk while copying goes on."""
        if self._flushed is not None:
            self._flushed.result()
        self._unflushed = 0
        self._flushed = self._pool.submit(_flush_data, self._descriptor)

    def _wait(self) -> None:
        """Return once nothing is being written.  Raises what failed first, after everything has ended."""
        pending = [f for f in (*(b.written for b in self._buffers), self._flushed) if f is not None]
        wait(pending)
        for buffer in self._buffers:
            buffer.wait()
        flushed, self._flushed = self._flushed, None
        if flushed is not None:
            flushed.result()

    def _clone(self, source: _Open, start: int, end: int, look: Look | None) -> int:
        """Let the target share what it can of a range; returns where the rest starts."""
        first = start + -self._position % BLOCK
        whole = (end - first) // BLOCK * BLOCK
        if not source.clone or (start - self._position) % BLOCK or whole <= 0:
            return start
        self._by_hand(source.name, start, first, look)
        self._hand_over(self._filled)
        if not try_clone(source.descriptor, self._descriptor, first, self._start, whole):
            source.clone = False
            return first
        self._passed(source, first, first + whole, look)
        return first + whole

    def _by_server(self, source: _Open, start: int, end: int, look: Look | None) -> int:
        """`copy_file_range` as far as it gets; returns where it stopped."""
        self._hand_over(self._filled)
        self._wait()
        if self._direct:
            self._through_cache()
        while start < end:
            try:
                copied = os.copy_file_range(
                    source.descriptor, self._descriptor, min(end - start, AT_ONCE), start, self._start
                )
            except OSError as error:
                if error.errno not in NOT_POSSIBLE:
                    raise
                copied = 0
            if copied == 0:
                source.server = False  # some file systems answer 0 for what they cannot do; a short file is found by reading
                break
            self._passed(source, start, start + copied, look)
            start += copied
        return start

    def _passed(self, source: _Open, start: int, end: int, look: Look | None) -> None:
        """A range is in the target without having been read: show it to `look`, and go on behind it."""
        if look is not None:
            for piece in self._sources.pieces(self._buffers[0].view[:PIECE], source.name, start, end):
                look(piece)
        self._start += end - start
        self._advance(end - start)


def _create(path: Path) -> tuple[bool, int]:
    """Create a file for writing: (whether past the page cache, descriptor)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if DIRECT:
        try:
            return True, os.open(path, flags | DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return False, os.open(path, flags, 0o666)


def _flush_data(descriptor: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)

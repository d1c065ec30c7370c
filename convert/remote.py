"""Checkpoints that are somewhere else: `hf://org/name`, `s3://bucket/folder` and every other URL that fsspec knows.

A `RemotePath` has the few methods of a `Path` that reading a checkpoint takes, so the rest of the converter does not know the
difference: the listing is fetched once, files are read by ranges, and nothing is kept on disk.  `ReadAhead` is what keeps a
network busy: it is told which ranges will be asked for, and has several of them under way.  Every read is tried again when the
network or the server fails, going on where it stopped.

Peak memory: `IN_FLIGHT` pieces of `PIECE` bytes for all readers together, at least two for each.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from datetime import datetime
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from .errors import ConvertError, NetworkError, Problem, UsageError, changed
from .limits import MAX_FILE_NAME, MAX_NUMBER, MAX_REMOTE_FILES, MAX_SIDE_DEPTH

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE = 8 << 20  # bytes of one request: long beside the time until an answer begins
IN_FLIGHT = 24  # pieces that are under way or not yet used
CONNECTIONS = 16  # requests at a time
GAP = 64 << 10  # bytes between two ranges that are worth reading to save a request
TRIES = 8  # of one read; of a listing, on which a person waits, half of them
FIRST_WAIT_S = 0.5  # before the second try; then twice as long each time
LONGEST_WAIT_S = 30.0
LONGEST_ASKED_S = 300.0  # that a server can ask for: the Hub counts requests over five minutes
SMALL = 256 << 10  # bytes of a file that is kept when it has been read
WAKE_S = 0.5
SKIPPED = 1000  # announced requests that may turn out not to be wanted, one after another

Range = tuple[str, int, int]  # file, first byte, end
T = TypeVar("T")
R = TypeVar("R")


class FaultError(Exception):
    """An attempt that failed in a way that may pass.  `after_s`: how long the server asks to wait."""

    def __init__(self, found: str, after_s: float = 0.0) -> None:
        super().__init__(found)
        self.after_s = min(after_s, LONGEST_ASKED_S)


class Entry(NamedTuple):
    """A file of a listing.  `tag`: its ETag or content digest, as the server has it; `sha256`: as the server publishes it."""

    size: int
    mtime_ns: int = 0
    tag: str = ""
    sha256: str | None = None


class Stat(NamedTuple):
    """What `RemotePath.stat` says, under the names of `os.stat`.  `st_ino` stands for the tag."""

    st_size: int
    st_mtime_ns: int
    st_ino: int


class Store(Protocol):
    """Who serves the files.  Both methods make one attempt, and raise `FaultError` when another one may succeed."""

    url: str  # for people, without credentials; naming one revision where the store has them

    def listing(self) -> Mapping[str, Entry]:
        """Every file below the checkpoint: relative path -> entry.  Raises `UsageError` when there is no such place."""
        ...

    def read_into(self, view: memoryview, name: str, start: int) -> int:
        """Fill the beginning of `view` with bytes of a file from `start` on.  Returns how many, less than asked on a fault."""
        ...

    def close(self) -> None:
        """Give up what is under way, for good."""
        ...


class Remote:
    """A listing and a store, with retries and threads."""

    def __init__(self, store: Store) -> None:
        """Fetch the listing.  Raises `UsageError` and `NetworkError`."""
        self.store = store
        self._given_up = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._held = 0
        self.small: dict[str, bytes] = {}
        self.entries = self._listed()

    def _listed(self) -> dict[str, Entry]:
        entries = dict(self._patiently(self.store.listing, "", TRIES // 2))
        _check_listing(self.store.url, entries)
        return entries

    def refresh(self) -> None:
        """Fetch the listing again, to see what has changed."""
        self.small.clear()
        self.entries = self._listed()

    def _patiently(self, attempt: Callable[[], T], name: str, tries: int) -> T:
        """The result of an attempt that may fail for a while.  Raises `NetworkError` when it keeps failing."""
        for number in range(1, tries + 1):
            if self._given_up.is_set():
                raise InterruptedError("the work was given up")
            try:
                return attempt()
            except FaultError as fault:
                if number == tries:
                    where = f"{self.store.url}/{name}" if name else self.store.url
                    raise NetworkError(
                        Problem(where, "", "a server that answers", f"{fault}, {tries} times",
                                "check the network and the server, then run again; a conversion continues with --resume")
                    ) from None  # fmt: skip
                pause = min(FIRST_WAIT_S * 2 ** (number - 1), LONGEST_WAIT_S) * random.uniform(0.7, 1.3)
                self._given_up.wait(max(pause, fault.after_s))
        raise AssertionError("unreachable")

    def fetch_into(self, view: memoryview, name: str, start: int) -> None:
        """Fill `view` with bytes of a file from `start` on, one request at a time."""
        done = 0

        def attempt() -> None:
            nonlocal done
            done += self.store.read_into(view[done:], name, start + done)
            if done < len(view):
                raise FaultError(f"an answer that ended {len(view) - done} bytes early")

        self._patiently(attempt, name, TRIES)

    def fetch(self, name: str, start: int, end: int) -> memoryview:
        """Bytes [start, end) of a file, in one request."""
        # Memory of its own, which goes back to the system at once; the allocator would keep some for each thread.
        view = memoryview(mmap.mmap(-1, end - start))
        self.fetch_into(view, name, start)
        return view

    def read_into(self, view: memoryview, name: str, start: int) -> None:
        """Fill `view` with bytes of a file from `start` on, in several requests at a time when it is large."""
        if len(view) <= PIECE:
            self.fetch_into(view, name, start)
            return
        parts = range(0, len(view), PIECE)
        for future in [self.submit(self.fetch_into, view[at : at + PIECE], name, start + at) for at in parts]:
            future.result()

    def take(self, must: bool) -> bool:
        """Take the room of one piece, which all readers share; one that must have it, gets it."""
        with self._lock:
            taken = must or self._held < IN_FLIGHT
            self._held += taken
            return taken

    def give(self, pieces: int) -> None:
        """Give the room of pieces back."""
        with self._lock:
            self._held -= pieces

    def submit(self, function: Callable[..., R], *arguments: Any) -> Future[R]:
        """Let a request be made in another thread."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(CONNECTIONS, "remote")
            return self._pool.submit(function, *arguments)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`map`, with several calls at a time, and not many results waiting.  For small ranges, which mostly wait."""
        coming = iter(items)
        pool = ThreadPoolExecutor(2 * CONNECTIONS, "remote-map")
        done = False
        try:
            flying = deque(pool.submit(function, item) for item in islice(coming, 4 * CONNECTIONS))
            while flying:
                wait_for(flying[0])
                yield flying.popleft().result()
                flying.extend(pool.submit(function, item) for item in islice(coming, 1))
            done = True
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if not done:  # an error, or an interrupt
                self.give_up()

    def close(self) -> None:
        """Let the threads go; the next read starts others."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def give_up(self) -> None:
        """End everything that waits, now and from now on: an interrupt or an error has ended the work."""
        self._given_up.set()
        self.close()
        self.store.close()


def wait_for(*futures: Future[Any], stop: threading.Event | None = None) -> None:
    """Return when all are done, or one has failed.  Raises `InterruptedError` when `stop` is set.

    Wakes up now and then: a signal may reach another thread, and then waits until this one goes on.
    """
    while True:
        done, others = wait(futures, WAKE_S, FIRST_EXCEPTION)
        if not others or any(future.exception() for future in done):
            return
        if stop is not None and stop.is_set():
            raise InterruptedError("the work was given up")


def _check_listing(url: str, entries: Mapping[str, Entry]) -> None:
    """Refuse what could not be a directory of ours, or would lead out of it."""
    if not entries:
        raise UsageError(Problem(url, "", "a checkpoint", "no files", "check the URL"))
    if len(entries) > MAX_REMOTE_FILES:
        found = f"{len(entries)}"
        raise ConvertError(Problem(url, "", f"at most {MAX_REMOTE_FILES} files", found, "name the checkpoint's own folder"))
    for name, entry in entries.items():
        parts = name.split("/")
        plain = not any(part in ("", ".", "..") or len(part.encode(errors="replace")) > MAX_FILE_NAME for part in parts)
        if not plain or "\0" in name or "\\" in name or not 0 <= entry.size <= MAX_NUMBER:
            raise ConvertError(
                Problem(name, "", "the name and size of a file inside the checkpoint", "a listing that is not one",
                        "the server is broken or hostile: take the checkpoint from somewhere else")
            )  # fmt: skip


class RemotePath:
    """A file or directory of a remote checkpoint, with the methods of `pathlib.Path` that reading one takes."""

    __slots__ = ("relative", "remote")

    def __init__(self, remote: Remote, relative: str = "") -> None:
        self.remote, self.relative = remote, relative

    def __str__(self) -> str:
        return f"{self.remote.store.url}/{self.relative}" if self.relative else self.remote.store.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.remote, f"{self.relative}/{name}" if self.relative else name)

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rstrip("/").rpartition("/")[2]

    @property
    def sha256(self) -> str | None:
        """The digest that the server publishes for the file, or None."""
        return self._entry().sha256

    def is_copy(self, copy: Path) -> bool:
        """Whether a file of this machine is the one that the server's digest names; True when the server has none that says."""
        entry = self._entry()
        if not copy.is_file() or copy.stat().st_size != entry.size:
            return False
        if entry.sha256 is not None:
            return hashlib.sha256(copy.read_bytes()).hexdigest() == entry.sha256
        if len(entry.tag) != 40:  # not a blob of git
            return True
        blob = b"blob %d\0" % entry.size + copy.read_bytes()
        return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == entry.tag

    def _entry(self) -> Entry:
        try:
            return self.remote.entries[self.relative]
        except KeyError:
            raise FileNotFoundError(str(self)) from None

    def is_dir(self) -> bool:
        """Whether this is the checkpoint itself: no other directory is asked for."""
        return not self.relative

    def is_file(self) -> bool:
        """Whether the listing has it."""
        return self.relative in self.remote.entries

    exists = is_file

    def stat(self) -> Stat:
        """Size and identity, from the listing."""
        entry = self._entry()
        tag = int.from_bytes(hashlib.sha256(entry.tag.encode()).digest()[:6], "big") if entry.tag else 0
        return Stat(entry.size, entry.mtime_ns, tag)

    def refresh(self) -> None:
        """Fetch the listing again: `stat` then tells what has changed."""
        self.remote.refresh()

    def iterdir(self) -> Iterator[RemotePath]:
        """The entries of the checkpoint itself, files and folders."""
        return (RemotePath(self.remote, name) for name in dict.fromkeys(n.partition("/")[0] for n in self.remote.entries))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Files that match, each part of the pattern one part of the path."""
        wanted = pattern.split("/")
        for name in self.remote.entries:
            parts = name.split("/")
            if len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)):
                yield RemotePath(self.remote, name)

    def relative_to(self, directory: RemotePath) -> RemotePath:
        """The path below the checkpoint."""
        return self

    def as_posix(self) -> str:
        """The path below the checkpoint, with slashes."""
        return self.relative

    def side_names(self) -> list[str]:
        """Every file that is neither hidden nor in a hidden or deep folder."""
        names = (name for name in self.remote.entries if not any(part.startswith(".") for part in name.split("/")))
        return sorted(name for name in names if name.count("/") <= MAX_SIDE_DEPTH)

    def open(self, mode: str = "rb") -> Stream:
        """The bytes of the file, for reading from front to back; every read is a request."""
        return Stream(self)

    def read_bytes(self) -> bytes:
        """The whole file.  What is small, as configs are, is kept for the next time."""
        kept = self.remote.small.get(self.relative)
        if kept is None:
            kept = self.open().read()
            if len(kept) <= SMALL:
                self.remote.small[self.relative] = kept
        return kept

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` with the bytes from `start` on.  Raises `NetworkError` when the server keeps failing."""
        if start + len(view) > self._entry().size:
            raise changed(self.relative)
        self.remote.read_into(view, self.relative, start)


class Stream(io.RawIOBase):
    """A remote file, read from front to back."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._size, self._position = path, path.stat().st_size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer as far as the file goes."""
        view = memoryview(buffer)[: self._size - self._position]
        if view:
            self._path.read_into(view, self._position)
        self._position += len(view)
        return len(view)

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, or all that remain."""
        rest = self._size - self._position
        data = bytearray(rest if size is None or size < 0 else min(size, rest))
        self.readinto(data)
        return bytes(data)


def _requests(ranges: Iterable[Range]) -> Iterator[Range]:
    """Requests for ranges in this order: neighbours in one, and none longer than `PIECE`."""
    name, start, end = "", 0, 0
    for file, begin, stop in ranges:
        if file == name and end <= begin <= end + GAP and begin - start < PIECE:
            end = stop
        else:
            if end > start:
                yield name, start, end
            name, start, end = file, begin, stop
        while end - start > PIECE:
            yield name, start, start + PIECE
            start += PIECE
    if end > start:
        yield name, start, end


class ReadAhead:
    """Has the next of the announced ranges on their way.  Ranges that were not announced can be read as well, more slowly.

    For one thread.  `stop` ends waiting.
    """

    def __init__(self, remote: Remote, ranges: Iterable[Range], stop: threading.Event | None = None) -> None:
        self._remote, self._stop = remote, stop
        self._flying: deque[tuple[Range, Future[memoryview]]] = deque()
        self._coming: deque[Range] = deque()
        self.expect(ranges)

    def expect(self, ranges: Iterable[Range]) -> None:
        """Announce other ranges than before."""
        self._drop()
        self._coming = deque(_requests(ranges))
        self._refill()

    def close(self) -> None:
        """Want nothing any more."""
        self._drop()
        self._coming.clear()

    def _drop(self) -> None:
        for _, future in self._flying:
            future.cancel()
        self._remote.give(len(self._flying))
        self._flying.clear()

    def _refill(self) -> None:
        while self._coming and self._remote.take(must=len(self._flying) < 2):
            request = self._coming.popleft()
            self._flying.append((request, self._remote.submit(self._remote.fetch, *request)))

    def _reach(self, name: str, start: int) -> bool:
        """Make the request that has a byte of a file the first one; False when none of the next ones has it."""

        def has_it(request: Range) -> bool:
            return request[0] == name and request[1] <= start < request[2]

        passed = next((n for n, (request, _) in enumerate(self._flying) if has_it(request)), None)
        if passed is None:
            skipped = next((n for n, request in enumerate(islice(self._coming, SKIPPED)) if has_it(request)), None)
            if skipped is None:
                return False
            self._drop()
            for _ in range(skipped):
                self._coming.popleft()
        for _ in range(passed or 0):
            self._flying.popleft()[1].cancel()
            self._remote.give(1)
        self._refill()
        return True

    def read_into(self, view: memoryview, name: str, start: int) -> None:
        """Fill `view` with the bytes of a file from `start` on."""
        while view:
            if not self._reach(name, start):
                self._remote.read_into(view, name, start)
                return
            (_, begin, end), future = self._flying[0]
            wait_for(future, stop=self._stop)
            count = min(len(view), end - start)
            view[:count] = future.result()[start - begin : start - begin + count]
            view, start = view[count:], start + count


class RemoteBytes:
    """A part of a remote file that is fetched when it is looked at; slices like a `memoryview`."""

    __slots__ = ("end", "name", "reader", "start")

    def __init__(self, reader: ReadAhead, name: str, start: int, end: int) -> None:
        self.reader, self.name, self.start, self.end = reader, name, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, part: slice) -> RemoteBytes:
        first, last, _ = part.indices(len(self))
        return RemoteBytes(self.reader, self.name, self.start + first, self.start + max(first, last))

    def fetched(self) -> memoryview:
        """The bytes."""
        view = memoryview(bytearray(len(self)))
        self.reader.read_into(view, self.name, self.start)
        return view


# -- fsspec -------------------------------------------------------------------------------------------------------------

TAGS = ("ETag", "etag", "e_tag", "content_hash", "checksum", "md5Hash", "generation", "version_id")  # by file system
TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")


def _mtime_ns(info: Mapping[str, Any]) -> int:
    value = next((info[key] for key in TIMES if info.get(key) is not None), 0)
    seconds = value.timestamp() if isinstance(value, datetime) else value
    return int(seconds * 1e9) if isinstance(seconds, (int, float)) else 0


class FileSystem:
    """A `Store` on any file system of fsspec.  Credentials are that file system's business."""

    def __init__(self, url: str) -> None:
        """Find the file system.  Raises `UsageError` when its package is not installed, or nobody knows it."""
        protocol = url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs

            self._fs, self._root = url_to_fs(url)
        except ImportError as error:
            raise UsageError(
                Problem(f"{protocol}://", "", "a package that reads it", str(error),
                        "pip install 'qconvert[remote]', or the package of this file system (s3fs, gcsfs, adlfs, ...)")
            ) from None  # fmt: skip
        except ValueError as error:
            known = "a directory, hf://, s3://, gs:// or another URL of fsspec"
            raise UsageError(Problem(f"{protocol}://", "", known, str(error), "check the URL")) from None
        self.url = f"{protocol}://{self._root.lstrip('/')}".rstrip("/")

    def _attempt(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        # Each file system has exceptions of its own, many outside `OSError`; what is not known to be final may pass.
        try:
            return function(*arguments, **options)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except ImportError as error:
            raise UsageError(Problem(self.url, "", "a package that reads it", str(error), "install it")) from None
        except PermissionError as error:
            raise UsageError(
                Problem(self.url, "", "a place that may be read", str(error), "check the credentials in the environment")
            ) from None
        except Exception as error:
            raise FaultError(f"{type(error).__name__}: {error}") from None

    def listing(self) -> Mapping[str, Entry]:
        """See `Store`."""
        self._fs.invalidate_cache()
        try:
            found: Mapping[str, Mapping[str, Any]] = self._attempt(
                self._fs.find, self._root, maxdepth=MAX_SIDE_DEPTH + 1, detail=True
            )
        except (FileNotFoundError, NotADirectoryError):
            found = {}
        root = self._root.rstrip("/") + "/"
        entries = {}
        for path, info in found.items():
            size = info.get("size")
            tag = next((str(info[key]) for key in TAGS if info.get(key)), "")
            if path.startswith(root) and info.get("type", "file") == "file":
                entries[path[len(root) :]] = Entry(size if isinstance(size, int) else -1, _mtime_ns(info), tag.strip('"'))
        return entries

    def read_into(self, view: memoryview, name: str, start: int) -> int:
        """See `Store`."""
        try:
            data = self._attempt(
                self._fs.cat_file, f"{self._root.rstrip('/')}/{name}", start=start, end=start + len(view)
            )
        except (FileNotFoundError, NotADirectoryError):
            raise changed(name) from None
        if len(data) > len(view):
            raise FaultError(f"{len(data)} bytes instead of {len(view)}")
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """See `Store`: fsspec keeps its connections."""


def open_url(url: str) -> RemotePath:
    """The checkpoint at a URL, listed.  Raises `UsageError` when there is none, `NetworkError` when the server fails."""
    if url.startswith("hf://"):
        from .huggingface import Repository

        return RemotePath(Remote(Repository(url)))
    return RemotePath(Remote(FileSystem(url.rstrip("/"))))


def remotes(paths: Iterable[object]) -> Sequence[Remote]:
    """The servers that paths lie on, each once."""
    return list({id(p.remote): p.remote for p in paths if isinstance(p, RemotePath)}.values())

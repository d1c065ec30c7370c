"""OUT is complete or absent: work in a directory beside it, flush everything, and rename the whole at the end.

Order of events: a file is written and flushed, then its directory, then its line in the journal; at the end all directories
are flushed, the staging directory is renamed to OUT, OUT's parent is flushed, and the journal goes.  What a crash leaves is
therefore never trusted unless it was on disk: OUT itself is whole, and so is every file that the journal names.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import MachineError, NetworkError, Problem, UsageError
from .journal import Journal

RESUMABLE = (OSError, NetworkError, MemoryError, KeyboardInterrupt)  # after these, what is complete is kept


def check_target(out: Path, in_dir: Path | None, force: bool) -> None:
    """Refuse an OUT that would harm something.  Raises `UsageError`; nothing is written.

    OUT must not exist unless it is an empty directory or `force` is given, and must be apart from IN.
    """
    if not str(out) or out == Path() or Path.cwd().is_relative_to(out.resolve()):
        raise UsageError(
            Problem(str(out), "", "a directory of its own for OUT", "the working directory or one above it", "name another")
        )
    resolved = out.resolve()
    if out.exists() and os.path.ismount(out):
        raise UsageError(Problem(str(out), "", "a directory that can be renamed", "a mount point", "name one below it"))
    if in_dir is not None:
        source = in_dir.resolve()
        if resolved == source or resolved.is_relative_to(source) or source.is_relative_to(resolved):
            raise UsageError(Problem(str(out), "", "OUT apart from IN", "one inside the other", "choose another OUT"))
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(Problem(str(out), "", "a directory or nothing", "a file or link", "choose another OUT"))
    if not force and out.is_dir() and any(out.iterdir()):
        raise UsageError(
            Problem(str(out), "", "an empty or absent OUT", "files in it", "choose another OUT, or replace it with --force")
        )
    ancestor = next(p for p in resolved.parents if p.exists())
    if not ancestor.is_dir():
        raise UsageError(Problem(str(ancestor), "", "a directory to put OUT in", "a file", "choose another OUT"))


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file to disk."""
    sync_directory(path)  # the same three calls


@dataclass(slots=True)
class Staging:
    """A directory that becomes OUT.

    done  file -> its line in the journal, for files that an earlier run completed and that are still as it left them
    kept  whether the directory stays for a run that resumes
    """

    path: Path
    journal: Journal
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: bool = False

    def completed(self, name: str, **facts: object) -> None:
        """Note that a file is complete.  It must have been flushed; its directory entry is flushed here, before the note."""
        sync_directory(self.path)
        status = (self.path / name).stat()
        entry = {"file": name, "size": status.st_size, "mtime_ns": status.st_mtime_ns, **facts}
        self.journal.append(entry)
        self.done[name] = entry

    def check_space(self, needed_bytes: int) -> None:
        """Raise `MachineError` when the disk has less than `needed_bytes` free."""
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise MachineError(
                Problem(
                    str(self.path.parent), "", f"{needed_bytes / 1e9:.2f} GB free", f"{free / 1e9:.2f} GB", "free some space"
                )
            )


def beside(target: Path, what: str) -> Path:
    """A hidden neighbour of `target`, named after it."""
    return target.with_name(f".{target.name[:200]}.{what}")


@contextmanager
def staged(out: Path, identity: dict[str, Any] | None = None, resume: bool = False) -> Iterator[Staging]:
    """A directory beside `out` that becomes `out` when the block ends.

    When the block raises, it vanishes; but when the machine failed or a person interrupted, and files are complete, it is
    kept for a run with `resume` and an equal `identity` (JSON values).  Missing parents of `out` are created, and removed
    again on failure.  An existing `out` is replaced only at the end.  Raises `UsageError` when another process writes `out`.
    """
    target = out.resolve()
    parent = target.parent
    created = [p for p in (parent, *parent.parents) if not p.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staging = Staging(beside(target, "partial"), Journal(beside(target, "journal")))
    except BaseException:
        _remove_empty(created)
        raise
    try:
        recover(target)
        staging.done = _resumable(staging, identity) if resume else {}
        if not staging.done:
            _remove(staging.path)
            staging.path.mkdir()
            staging.journal.start({"identity": identity})
        yield staging
        publish(target, staging.path)
    except BaseException as error:
        staging.kept = identity is not None and bool(staging.done) and isinstance(error, RESUMABLE)
        if staging.kept:
            staging.journal.close()
            raise
        shutil.rmtree(staging.path, ignore_errors=True)
        staging.journal.remove()
        _remove_empty(created)
        raise
    with suppress(OSError, KeyboardInterrupt):  # OUT is in place, whatever becomes of what lies beside it
        staging.journal.remove()


def publish(out: Path, path: Path) -> None:
    """Flush the directory `path`, which lies beside `out`, and make it `out`."""
    _sync_tree(path)
    _replace(out.resolve(), path)


def tidy(out: Path) -> None:
    """Remove what a run that was killed after its last rename left beside a complete `out`."""
    target = out.resolve()
    path = beside(target, "journal")
    if path.exists():
        journal = Journal(path)
        recover(target)
        journal.remove()


def _resumable(staging: Staging, identity: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Files that are as the journal left them, and everything else removed; none when the journal is of other work."""
    entries = staging.journal.entries()
    if not entries or entries[0] != {"identity": identity} or not staging.path.is_dir():
        return {}
    done = {}
    for entry in entries[1:]:
        with suppress(OSError, KeyError, TypeError):
            status = (staging.path / entry["file"]).stat()
            if (status.st_size, status.st_mtime_ns) == (entry["size"], entry["mtime_ns"]):
                done[entry["file"]] = entry
    for path in staging.path.iterdir():
        if path.name not in done:
            _remove(path)
    staging.journal.drop_cut_line()
    return done


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(directories: Iterable[Path]) -> None:
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def _sync_tree(root: Path) -> None:
    for folder, _, _ in os.walk(root, topdown=False):
        sync_directory(Path(folder))


def recover(target: Path) -> None:
    """Finish what a run that was killed while it replaced OUT had begun."""
    before = beside(target, "replaced")
    if before.exists():
        if target.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            os.rename(before, target)


def _replace(target: Path, staging: Path) -> None:
    """Rename `staging` to `target`, and back if that cannot be flushed; what was there before goes only after that."""
    before = beside(target, "replaced")
    existed = target.exists()
    if existed:
        os.rename(target, before)
    try:
        os.rename(staging, target)
        try:
            sync_directory(target.parent)
        except BaseException:
            os.rename(target, staging)
            raise
    except BaseException:
        if existed:
            os.rename(before, target)
        raise
    if existed:
        with suppress(KeyboardInterrupt):  # OUT is the new one, and that is what is said
            shutil.rmtree(before, ignore_errors=True)

"""OUT is complete or absent: work in a directory beside it, flush everything, and rename the whole at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import MachineError, Problem, UsageError


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


@contextmanager
def staged(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends, and vanishes when it raises.

    Missing parents of `out` are created, and removed again on failure.  An existing `out` is replaced only at the end.
    Raises `MachineError` when the disk has less than `needed_bytes` free.
    """
    target = out.resolve()
    parent = target.parent
    created = [p for p in (parent, *parent.parents) if not p.exists()]
    free = shutil.disk_usage(next(p for p in target.parents if p.exists())).free
    if free < needed_bytes:
        raise MachineError(
            Problem(str(parent), "", f"{needed_bytes / 1e9:.2f} GB free", f"{free / 1e9:.2f} GB", "free some space")
        )
    staging = parent / f".{target.name[:200]}.partial-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        sync_directory(staging)
        _replace(target, staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for directory in created:
            with suppress(OSError):
                directory.rmdir()
        raise


def _replace(target: Path, staging: Path) -> None:
    """Rename `staging` to `target`; what was there before goes only once the new one is in place."""
    before = target.with_name(f".{target.name[:200]}.replaced-{os.getpid()}")
    existed = target.exists()
    if existed:
        os.rename(target, before)
    try:
        os.rename(staging, target)
    except BaseException:
        if existed:
            os.rename(before, target)
        raise
    sync_directory(target.parent)
    if existed:
        shutil.rmtree(before, ignore_errors=True)

"""OUT is complete or absent: work in a directory beside it, flush everything, and rename the whole at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MachineError, Problem, UsageError


def check_target(out: Path, in_dir: Path | None, force: bool) -> None:
    """Refuse an OUT that would harm something.  Raises `UsageError`; nothing is written.

    OUT must not exist unless it is an empty directory or `force` is given, and must be apart from IN.
    """
    resolved = out.resolve()
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
    if not resolved.parent.is_dir():
        raise UsageError(Problem(str(out.parent), "", "a directory to put OUT in", "none", "create it first"))


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

    An existing `out` is replaced only then.  Raises `MachineError` when the disk has less than `needed_bytes` free.
    """
    parent = out.resolve().parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise MachineError(
            Problem(str(parent), "", f"{needed_bytes / 1e9:.2f} GB free", f"{free / 1e9:.2f} GB", "free some space")
        )
    staging = parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        sync_directory(staging)
        replaced = None
        if out.exists():
            replaced = parent / f".{out.name}.replaced-{os.getpid()}"
            os.rename(out, replaced)
        try:
            os.rename(staging, parent / out.name)
        except BaseException:
            if replaced is not None:
                os.rename(replaced, out)
            raise
        sync_directory(parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise

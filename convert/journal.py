"""The journal of a run: a file beside OUT that keeps a second writer away and remembers what is safely on disk.

One JSON object a line.  The first says what is converted into what (`Identity`); each further one names a file of the staging
directory that was complete and flushed *before* its line was written.  A line that a crash cut off is ignored.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from .errors import Problem, UsageError

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})  # file systems mounted without locks


class Journal:
    """An open journal, which is locked as long as this process lives.  The kernel drops the lock when the process dies."""

    def __init__(self, path: Path) -> None:
        """Open and lock the journal.  Raises `UsageError` when another process holds it."""
        self.path = path
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(self._descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UsageError(
                        Problem(str(path), "", "OUT for this run alone", "another qconvert that writes it",
                                "wait until that has ended, or choose another OUT")
                    ) from None  # fmt: skip
                if error.errno not in NO_LOCKS:
                    raise
            if self._is_current():
                return
            os.close(self._descriptor)  # its holder ended, and removed it, between the two calls: once more

    def _is_current(self) -> bool:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        here = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def entries(self) -> list[dict[str, Any]]:
        """Every complete line, in order; none when the journal is damaged."""
        size = os.fstat(self._descriptor).st_size
        lines = os.pread(self._descriptor, size, 0).split(b"\n")[:-1]
        try:
            values = [json.loads(line) for line in lines]
        except ValueError:
            return []
        return values if all(isinstance(value, dict) for value in values) else []

    def start(self, identity: dict[str, Any]) -> None:
        """Forget everything, and begin with what this run converts."""
        os.ftruncate(self._descriptor, 0)
        self.append(identity)

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line, and return when it is on disk."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)

    def drop_cut_line(self) -> None:
        """Remove what a crash left of an unfinished last line, so that lines can be added."""
        content = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)

    def remove(self) -> None:
        """The work is done or given up: remove the file, then unlock."""
        try:
            self.path.unlink(missing_ok=True)
        finally:
            self.close()

    def close(self) -> None:
        """Unlock, and leave the file for a run that resumes."""
        os.close(self._descriptor)

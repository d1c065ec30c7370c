"""Whatever call of the system fails, at whatever moment and in whatever thread: OUT is absent, and `--resume` completes it.

Each fault lets one call of a kind fail, the first, one in the middle or the last, as an undisturbed run counts them.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import Built
from conftest import Ran
from test_durability import SIZE, beside, clean, contents, source  # noqa: F401 (fixtures)

import convert
from convert import copying

Cli = Callable[..., Ran]
ERRORS: dict[str, tuple[str, Callable[[], BaseException]]] = {
    # what fails: the call, and how
    "read": ("preadv", lambda: OSError(errno.EIO, "Input/output error")),
    "write": ("pwrite", lambda: OSError(errno.EIO, "Input/output error")),
    "disk-full": ("pwrite", lambda: OSError(errno.ENOSPC, "No space left on device")),
    "turned-read-only": ("open", lambda: OSError(errno.EROFS, "Read-only file system")),
    "access": ("open", lambda: OSError(errno.EACCES, "Permission denied")),
    "quota": ("pwrite", lambda: OSError(errno.EDQUOT, "Disk quota exceeded")),
    "flush": ("fsync", lambda: OSError(errno.EIO, "Input/output error")),
    "journal": ("write", lambda: OSError(errno.ENOSPC, "No space left on device")),
    "memory": ("pwrite", lambda: MemoryError()),
}


class Faulty:
    """Calls of one kind, counted; the one of number `at` fails."""

    def __init__(self, name: str, error: Callable[[], BaseException], at: int) -> None:
        self.real, self.error, self.at = getattr(os, name), error, at
        self.calls = 0
        self.lock = threading.Lock()

    def __call__(self, *args: Any, **more: Any) -> Any:
        with self.lock:
            self.calls += 1
            if self.calls == self.at:
                raise self.error()
        return self.real(*args, **more)


def in_run(monkeypatch: pytest.MonkeyPatch, faulty: Faulty, name: str) -> None:
    """Count the calls from the moment when the run has read IN and opened its journal."""
    check = copying.Writers.__enter__

    def enter(self: copying.Writers) -> copying.Writers:
        monkeypatch.setattr(os, name, faulty)
        return check(self)

    monkeypatch.setattr(copying.Writers, "__enter__", enter)


@pytest.fixture(scope="module")
def counts(source: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:  # noqa: F811
    """How often an undisturbed run makes each call."""
    folder = tmp_path_factory.mktemp("counts")
    found = {}
    for name in {call for call, _ in ERRORS.values()}:
        with pytest.MonkeyPatch.context() as patch:
            faulty = Faulty(name, OSError, -1)
            in_run(patch, faulty, name)
            convert.convert_checkpoint(source.directory, folder / name, shard_size=40_000)
        found[name] = faulty.calls
    return found


@pytest.mark.parametrize("moment", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", ERRORS)
def test_a_call_fails(
    kind: str, moment: float, source: Built, clean: dict[str, bytes], counts: dict[str, int], cli: Cli,  # noqa: F811
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One line, exit code 3, OUT absent, no thread left behind; then `--resume` gives what an undisturbed run gives."""
    call, error = ERRORS[kind]
    out = tmp_path / "out"
    faulty = Faulty(call, error, 1 + int(moment * (counts[call] - 1)))
    before = threading.active_count()
    with monkeypatch.context() as patch:
        in_run(patch, faulty, call)
        ran = cli(source.directory, out, "--shard-size", SIZE)
    assert faulty.calls >= faulty.at
    assert threading.active_count() == before
    assert (ran.code, ran.out) == (3, "")
    assert len(ran.err.splitlines()) == 1
    assert re.search("expected .+, found .+; .+", ran.err)
    assert not out.exists()
    assert cli(source.directory, out, "--shard-size", SIZE, "--resume").code == 0
    assert contents(out) == clean
    assert beside(out) == []


def test_no_more_threads(
    source: Built, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """A limit on threads (`ulimit -u`) is one line and exit code 3, and nothing remains."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    ran = cli(source.directory, tmp_path / "out")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.count("\n") == 1
    assert "threads enough" in ran.err
    assert list(tmp_path.iterdir()) == []

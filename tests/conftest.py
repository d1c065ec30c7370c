"""What several test files share: running the command line, and building a source checkpoint in a temporary folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Models in tests are tiny.  Threads that wait for each other by spinning make them ten times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton kernels run in its interpreter, which has to be chosen before triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
# Fixtures that a script of its own computes, while other tests run: it needs Triton without its interpreter.
SCRIPTS = {"builds": ("compiled.py",), "emulated_runs": ("emulated.py",), "emulated_few": ("emulated.py", "100", "few")}
_started: dict[str, subprocess.Popen[str]] = {}
for entry in (str(ROOT), str(ROOT / "tests")):
    if entry not in sys.path:
        sys.path.insert(0, entry)

from build import Built, build  # noqa: E402  (after the path is set)


def start_script(fixture: str) -> subprocess.Popen[str]:
    """The process of a script of `SCRIPTS`, started once."""
    if fixture not in _started:
        script, *arguments = SCRIPTS[fixture]
        command = [sys.executable, str(ROOT / "tests" / script), *arguments]
        env = {**os.environ, "TRITON_INTERPRET": "0"}
        _started[fixture] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    return _started[fixture]


def output_of_script(fixture: str) -> Any:
    """The JSON that a script of `SCRIPTS` prints."""
    process = start_script(fixture)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the scripts whose results will be asked for."""
    if find_spec("triton") is not None and not session.config.option.collectonly:
        for fixture in SCRIPTS:
            if any(fixture in getattr(item, "fixturenames", ()) for item in session.items):
                start_script(fixture)


def pytest_sessionfinish() -> None:
    """Nothing outlives the tests."""
    for process in _started.values():
        process.kill()


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command did: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


def run_here(*args: object) -> Ran:
    """Run `python -m convert ARGS` inside this process: the same entry, without the start of an interpreter.

    An exception other than `SystemExit` passes through, because for a user it would be a traceback.
    """
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["qconvert", *map(str, args)]
    code: int | str | None = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("error")
            runpy.run_module("convert", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    return Ran(code if isinstance(code, int) else 0 if code is None else 1, out.getvalue(), err.getvalue())


def run_apart(*args: object, code: str = "") -> Ran:
    """Run `python -m convert ARGS`, or `python -c CODE ARGS`, as a process of its own whose output is a pipe."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "convert"]), *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def cli() -> Callable[..., Ran]:
    """`cli("IN", "OUT", "--json")`: the command line, in this process."""
    return run_here


@pytest.fixture
def cli_apart() -> Callable[..., Ran]:
    """The command line in a process of its own, or a line of Python with `code=`."""
    return run_apart


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Built]:
    """`make(family=..., dialect=..., scheme=..., ...)`: a source checkpoint; `name=` is its folder, "in" by default."""

    def made(*, name: str = "in", **options: Any) -> Built:
        return build(tmp_path / name, **options)

    return made

"""Many conversions: a list of jobs, each of them the command `qconvert IN OUT` in a process of its own, and one report.

A job that is refused, fails or is killed leaves the others alone.  What is done is seen from each OUT, so that `resume` needs
nothing but the same list.
"""

from __future__ import annotations

import glob
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import MachineError, Problem, UsageError
from .json_files import replace_json

NOT_OF_A_JOB = frozenset({"in_dir", "out_dir", "as_json", "log_json", "dry_run", "help"})  # parameters of `convert`
JOB = 'a job: {"in": ..., "out": ..., and options as `qconvert IN OUT` has them, such as "shard_size": "5GB"}'
STATES: Mapping[int, str] = {0: "done", 1: "refused", 2: "refused", 3: "failed", 130: "interrupted"}
WORST = (130, 3, 1, 2)  # the exit code of a batch is the first of these that a job has
STOP_S = 30.0  # what an interrupted job has to clean up; killed after that, it is safe as well
PASSED_ON = 2000  # characters of what a job that broke down wrote

# Runs the command line in a process that finds the same modules as this one.
COMMAND = """
import sys
sys.path[:] = sys.argv.pop(1).split({separator!r})
from convert.cli import main
sys.exit(main())
"""

Progress = Callable[["JobRun"], None]  # called when a job starts, goes on or ends


@dataclass(frozen=True, slots=True)
class Job:
    """One conversion.  `options` are long options of `qconvert IN OUT` with underscores; True sets a flag."""

    source: str
    out: str
    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    place: str = ""  # where it was asked for, for messages

    def arguments(self, defaults: Mapping[str, str | int | bool]) -> list[str]:
        """The command line: this job's options, and those of `defaults` that it does not set."""
        args = []
        for name, value in {**defaults, **self.options}.items():
            if value is not False:
                args += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
        return ["convert", *args, "--", self.source, self.out]


@dataclass(slots=True)
class JobRun:
    """What became of a job.  `exit_code` is None until it has ended."""

    job: Job
    exit_code: int | None = None
    started_s: float | None = None
    elapsed_s: float = 0.0
    written_bytes: int = 0  # of tensor data, by this run: 0 where OUT was complete already
    total_bytes: int = 0
    result: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None

    @property
    def state(self) -> str:
        """One word: waiting, running, or one of `STATES`."""
        if self.exit_code is None:
            return "waiting" if self.started_s is None else "running"
        return STATES[self.exit_code]

    def to_json(self) -> dict[str, Any]:
        """The entry of the report."""
        return {
            "in": self.job.source, "out": self.job.out, "options": dict(self.job.options), "state": self.state,
            "exit_code": self.exit_code, "elapsed_s": round(self.elapsed_s, 3), "written_bytes": self.written_bytes,
            **self.result, "notes": self.notes, "error": self.error,
        }  # fmt: skip


def read_jobs(sources: Iterable[str], out_dir: str | None = None) -> list[Job]:
    """The jobs that a command line names.

    sources  each a file of jobs (`.yaml`, `.yml`, `.json`, otherwise JSON lines; `-` for JSON lines on standard input), a
             checkpoint directory, a URL of one, or a glob of directories
    out_dir  where the outputs of jobs without an `out` go, each under the name of its source

    Raises `UsageError` with every entry that is no job, and for two jobs with one OUT.
    """
    problems: list[Problem] = []
    jobs: list[Job] = []
    for source in sources:
        try:
            for place, entry in _entries(source):
                try:
                    jobs.append(_job(entry, place, out_dir))
                except ValueError as error:
                    problems.append(Problem(place, "", JOB, str(error), "correct the entry"))
        except ValueError as error:
            problems.append(Problem(source, "", "a file of jobs, checkpoints, or a glob of them", str(error), "correct it"))
    problems += _clashes(jobs)
    if not (jobs or problems):
        problems.append(Problem(", ".join(sources), "", "at least one job", "none", "name a file of jobs or checkpoints"))
    if problems:
        raise UsageError(problems)
    return jobs


def _entries(source: str) -> Iterator[tuple[str, Any]]:
    """(place, entry) of every job in a file, or of every checkpoint that a path or glob names."""
    path = Path(source)
    if "://" in source or path.is_dir():
        yield source, {"in": source}
    elif source == "-":
        yield from _lines("standard input", sys.stdin.read())
    elif path.is_file():
        yield from _documents(source, path)
    elif glob.has_magic(source):
        found = sorted(name for name in glob.glob(source, recursive=True) if os.path.isdir(name))
        if not found:
            raise ValueError("no directory that matches")
        yield from ((name, {"in": name}) for name in found)
    else:
        raise ValueError("no such file or directory")


def _documents(source: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"no text in UTF-8: {error.reason} at byte {error.start}") from None
    if path.suffix not in (".yaml", ".yml", ".json"):
        yield from _lines(source, text)
        return
    try:
        value = _yaml(text) if path.suffix != ".json" else json.loads(text)
    except RecursionError:
        raise ValueError("values nested too deeply") from None
    jobs = value.get("jobs") if isinstance(value, dict) else value
    defaults = value.get("defaults", {}) if isinstance(value, dict) else {}
    if not (isinstance(jobs, list) and isinstance(defaults, dict)):
        raise ValueError('neither a list of jobs nor {"defaults": {...}, "jobs": [...]}')
    for number, entry in enumerate(jobs, 1):
        yield f"{source}: job {number}", {**defaults, **entry} if isinstance(entry, dict) else entry


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _lines(source: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                entry = f"no JSON: {error}"
            yield f"{source}:{number}", entry


def _job(entry: Any, place: str, out_dir: str | None) -> Job:
    """A job from its JSON value.  Raises `ValueError` saying what is wrong."""
    if not isinstance(entry, dict):
        raise ValueError(entry if isinstance(entry, str) else f"a {type(entry).__name__}")
    options = dict(entry)
    source, out = options.pop("in", None), options.pop("out", None)
    if not (isinstance(source, str) and source):
        raise ValueError('no "in"')
    if out is None and out_dir is not None:
        out = os.path.join(out_dir, os.path.basename(source.rstrip("/")) or "checkpoint")
    if not (isinstance(out, str) and out):
        raise ValueError('no "out", and no --out-dir')
    for name, value in options.items():
        if name not in _options():
            raise ValueError(f"an option {name!r}; there are {', '.join(_options())}")
        if not isinstance(value, str | int):
            raise ValueError(f"{name} of {value!r}")
    job = Job(source, out, options, place)
    _check_options(job)
    return job


def _options() -> list[str]:
    from .commands.conversion import convert_command

    return [str(p.name) for p in convert_command.params if p.name not in NOT_OF_A_JOB]


def _check_options(job: Job) -> None:
    """Let the command line say what is wrong with the options of a job."""
    import click

    from .commands.conversion import convert_command

    try:
        convert_command.make_context("convert", job.arguments({})[1:], auto_envvar_prefix="QCONVERT_UNSET")
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None


def _clashes(jobs: Sequence[Job]) -> Iterator[Problem]:
    """Jobs that write the same OUT, or one inside another's."""
    taken: dict[Path, Job] = {}
    for job in jobs:
        out = Path(os.path.abspath(job.out))
        other = taken.setdefault(out, job)
        if other is not job:
            yield Problem(job.place, "", f"an OUT of its own, {job.out}", f"the OUT of {other.place}", "name another")
    for out, job in taken.items():
        for parent in out.parents:
            if parent in taken:
                found = f"one inside the OUT of {taken[parent].place}"
                yield Problem(job.place, "", f"an OUT apart from others, {job.out}", found, "name another")


@dataclass(slots=True)
class Batch:
    """Jobs, run `processes` at a time."""

    runs: list[JobRun]
    defaults: Mapping[str, str | int | bool]
    progress: Progress
    stopped: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _processes: dict[int, subprocess.Popen[str]] = field(default_factory=dict)

    def carry_out(self, run: JobRun) -> None:
        """Run one job to its end."""
        with self._lock:
            if self.stopped:
                return
            run.started_s = time.monotonic()
            process = _start(run.job.arguments(self.defaults))
            self._processes[process.pid] = process
        self._note(run)
        tail = ""
        assert process.stderr is not None
        with process:
            for line in process.stderr:
                if not self._take(run, line):
                    tail = (tail + line)[-PASSED_ON:]
        code = process.returncode
        with self._lock:
            del self._processes[process.pid]
            run.elapsed_s = time.monotonic() - run.started_s
            if self.stopped and code < 0:  # interrupted before it could say so
                code = 130
            if code not in (0, 130) and run.error is None:
                run.error = _broken(code, tail)
            run.exit_code = run.error["exit_code"] if run.error else code
        self._note(run)

    def _note(self, run: JobRun) -> None:
        with self._lock:
            self.progress(run)

    def _take(self, run: JobRun, line: str) -> bool:
        """Take an event of a job; False when the line is none."""
        try:
            event = json.loads(line)
            kind = event.pop("event")
            del event["time"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        if kind == "progress":
            run.written_bytes, run.total_bytes = event["bytes"], event["total_bytes"]
            self._note(run)
        elif kind == "note":
            run.notes.append(event["message"])
        elif kind == "done":
            run.result = event
        elif kind == "error":
            run.error = event
        return True

    def stop(self, number: int) -> None:
        """Start no more jobs, and send a signal to those that run."""
        with self._lock:
            self.stopped = True
            for process in self._processes.values():
                process.send_signal(number)

    def to_json(self) -> dict[str, Any]:
        """The report."""
        with self._lock:
            counts = Counter(run.state for run in self.runs)
            return {"counts": dict(counts), "exit_code": exit_code(self.runs), "jobs": [run.to_json() for run in self.runs]}


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QCONVERT_")}  # a job says all that it means
    code = COMMAND.format(separator=os.pathsep)
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    command = [sys.executable, "-I", "-c", code, path, arguments[0], "--log-json", *arguments[1:]]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        errors="replace", env=environment,
    )  # fmt: skip


def _broken(code: int, tail: str) -> dict[str, Any]:
    """The error of a process that ended without saying why."""
    from .events import failure

    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = tail.strip().splitlines()[-1:] or ["nothing on standard error"]
    remedy = "look for the reason (memory, limits of the machine), then run again with --resume"
    return failure((Problem("", "", "a conversion that ends by itself", f"{how}: {last[0]}", remedy),), 3)


def exit_code(runs: Iterable[JobRun]) -> int:
    """Of a batch: 0 when every job is done, else the worst of its jobs: 130, 3 (a retry may help), 1, 2."""
    codes = {run.exit_code for run in runs}
    return next((code for code in WORST if code in codes), 130 if None in codes else 0)


def convert_batch(
    jobs: Sequence[Job],
    *,
    processes: int = 1,
    defaults: Mapping[str, str | int | bool] | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: Progress = lambda run: None,
) -> dict[str, Any]:
    """Convert many checkpoints, each in a process of its own; goes on when some fail.

    processes  jobs at a time
    defaults   options of jobs that do not set them, as in `Job.options`: `{"resume": True}` skips what is complete
    report     a file that holds the report after every job
    progress   called with the `JobRun` whenever a job starts, goes on or ends, one call at a time, from any thread

    Returns the report: `counts` per state, `exit_code`, `jobs` in the order given.  An interrupt stops what runs, writes the
    report, and is raised again; what was begun continues with `resume`.  Raises `MachineError` when the report cannot be
    written.
    """
    runs = [JobRun(job) for job in jobs]

    def note(run: JobRun) -> None:
        progress(run)
        if report is not None and run.exit_code is not None:
            replace_json(Path(report), batch.to_json())

    batch = Batch(runs, defaults or {}, note)
    pool = ThreadPoolExecutor(processes)
    futures: list[Future[None]] = []
    try:
        if report is not None:
            replace_json(Path(report), batch.to_json())
        try:
            for run in runs:
                futures.append(pool.submit(batch.carry_out, run))
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                future.result()
        except BaseException:
            batch.stop(signal.SIGTERM)
            wait(futures, STOP_S)
            batch.stop(signal.SIGKILL)
            raise
        finally:
            pool.shutdown()
    except KeyboardInterrupt:
        done = sum(run.exit_code == 0 for run in runs)
        raise KeyboardInterrupt(f"{done} of {len(runs)} jobs are done: run again with --resume for the others") from None
    except OSError as error:
        where = str(error.filename or report)
        raise MachineError(
            Problem(where, "", "a report that can be written", error.strerror or repr(error), "choose another --report")
        ) from error
    return batch.to_json()


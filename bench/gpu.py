"""Kernels and models on the GPU of this machine: first whether they are right, then how fast they are.

    python -m bench.gpu [--part check,decode,...] [--budget 500] [--tokens 1,8,64] [--results DIR] [--tune]

bandwidth  what this GPU reaches: copying within its memory (B), reading it, copying from pinned host memory
check      every kernel, case and way of cutting the work against float64: fresh random inputs, outputs that start as NaN
logits     tiny models of every family against float32 on the CPU, prefill and steps; steps by graph against steps as they are
warm       compiles, by several processes, what the parts that follow need
decode     models of published dimensions, random weights: steps at batch 1, 8 and 32, prefill, the kernels of a step by time
kernels    each kernel at published shapes, as bytes per second and as a share of B, over more copies than the L2 cache holds
layers     layers with 4096 tokens, against `torch._scaled_mm` alone
load       a checkpoint on disk: rates of reading, copying and both; a new process to its first token; memory

Each part runs in processes of its own.  A row that fails, ends its process or takes too long is reported as failed, and the
next row goes on in a new process.  No row begins that would end after the share of `--budget` seconds that its part has: what
was left out is said.  `--device cpu --quick` runs the smallest sizes without a GPU, to see that everything runs.  `--tune`
times other ways to cut the linear kernels instead, with a `--budget` of its own, and brings `runtime/kernels/tuned.json` up to
date.

A table of targets comes last; the same as JSON, with date, hardware, versions and command, goes to `bench/results/`, line by
line, so that a run that is ended leaves what it has.  Needs torch and triton; what else is missing is said.  Exit code 1:
something is wrong or failed; 3: no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

if "--device=cpu" in sys.argv or ("--device" in sys.argv and "cpu" in sys.argv):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import torch

from bench import tune
from bench.gpu_rows import PARTS, Bench, Line, Part, Row
from bench.targets import target_lines
from runtime.kernels import tuned

ALL = {**PARTS, **tune.PARTS}
NEEDED, OPTIONAL = ("torch", "triton"), ("torchao", "fla-core", "numpy", "safetensors", "click", "tokenizers")
GRACE = 60.0  # seconds that any row may take, also one that expects less
ROOT = Path(__file__).resolve().parents[1]


class Worker(Protocol):
    """Runs rows, one at a time."""

    def run(self, index: int, limit_s: float, take: Callable[[Line], object]) -> str | None:
        """Hand over each line of a row as it comes; what is wrong with the row, or None."""

    def close(self) -> None:
        """No more rows."""


class Here:
    """In this process."""

    def __init__(self, part: str, bench: Bench, rows: Sequence[Row]) -> None:
        self._bench, self._rows = bench, rows

    def run(self, index: int, limit_s: float, take: Callable[[Line], object]) -> str | None:
        """Without a limit of time."""
        try:
            for line in self._rows[index].run(self._bench):
                take(line)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def close(self) -> None:
        """Nothing to do."""


class Apart:
    """In a process, which is started when needed, and again when it has ended."""

    def __init__(self, part: str, bench: Bench, rows: Sequence[Row]) -> None:
        facts = {"part": part, "device": str(bench.device), "tokens": bench.tokens, "quick": bench.quick}
        self._command = [sys.executable, "-m", "bench.gpu", "--child", json.dumps(facts | {"B": bench.copy_bandwidth})]
        together = ALL[part].workers if part in ALL else 1
        self._environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // together))}
        self._process: subprocess.Popen[str] | None = None
        self._said: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []

    def run(self, index: int, limit_s: float, take: Callable[[Line], object]) -> str | None:
        """A row that takes longer than `limit_s`, or a process that takes as long to begin, is ended, the process too."""
        process = self._process or self._start()
        assert process.stdin is not None
        until = time.monotonic() + limit_s
        with contextlib.suppress(OSError):
            process.stdin.write(f"{index}\n")
            process.stdin.flush()
        while True:
            try:
                said = self._said.get(timeout=max(until - time.monotonic(), 0.01))
            except queue.Empty:
                self.close()
                return f"took more than {limit_s:.0f} s"
            if said is None:
                code = process.wait()
                self._keeper.join(10)  # its last words
                self.close()
                return f"ended its process with code {code}: {' | '.join(self._errors[-2:])}"
            if not said.startswith("{"):
                continue
            data = json.loads(said)
            if "ready" in data:
                until = time.monotonic() + limit_s
            if "line" in data:
                take(Line(**data["line"]))
            if "end" in data:
                if data["fatal"]:
                    self.close()
                problem: str | None = data["end"]
                return problem

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        self._said, self._errors = queue.Queue(), []
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            errors="replace", env=self._environment,
        )  # fmt: skip
        said, errors = self._said, self._errors

        def listen() -> None:
            assert process.stdout is not None
            for text in process.stdout:
                said.put(text)
            said.put(None)

        def keep() -> None:
            assert process.stderr is not None
            for text in process.stderr:
                if text.strip():
                    errors.append(text.strip()[:300])

        self._keeper = threading.Thread(target=keep, daemon=True)
        self._keeper.start()
        threading.Thread(target=listen, daemon=True).start()
        self._process = process
        return process


def child(facts: Mapping[str, Any]) -> None:
    """The other end of `Apart`: takes numbers of rows, gives lines."""
    bench = Bench(torch.device(facts["device"]), tuple(facts["tokens"]), facts["quick"], facts["B"])
    rows = ALL[facts["part"]].rows(bench)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not for the parent
    out.write(json.dumps({"ready": True}) + "\n")
    for text in sys.stdin:
        problem, fatal = None, False
        try:
            for line in rows[int(text)].run(bench):
                out.write(json.dumps({"line": asdict(line)}) + "\n")
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if bench.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:  # a device error stays until the process ends
                problem, fatal = problem or f"{type(error).__name__}: {error}", True
        out.write(json.dumps({"end": problem, "fatal": fatal}) + "\n")


def run_part(
    name: str, part: Part, bench: Bench, workers: Callable[[str, Bench, Sequence[Row]], Worker], clock: Clock,
    show: Callable[[Line], object],
) -> list[str]:  # fmt: skip
    """Run the rows of a part; adds to `bench.lines`, and returns the names of rows for which there was no time."""
    try:
        rows = part.rows(bench)
    except Exception as error:
        bench.lines.append(Line(name, "rows", {"failed": f"{type(error).__name__}: {error}"[:300]}, True))
        return []
    waiting = list(enumerate(rows))
    dropped: list[str] = []
    lock = threading.Lock()

    def take(line: Line) -> None:
        with lock:
            bench.lines.append(line)
            show(line)

    def work() -> None:
        worker = workers(name, bench, rows)
        try:
            while True:
                with lock:
                    if not waiting:
                        return
                    index, row = waiting.pop(0)
                    if not clock.has(row.seconds, part.until):
                        dropped.append(f"{name}: {row.name}")
                        continue
                try:
                    problem = worker.run(index, min(max(GRACE, 4 * row.seconds), max(clock.left(), 1)), take)
                except Exception as error:  # the rows that follow get another process
                    worker.close()
                    problem = f"{type(error).__name__}: {error}"
                if problem is not None:
                    take(Line(name, row.name, {"failed": problem.splitlines()[0][:300]}, True))
        finally:
            worker.close()

    count = part.workers if workers is Apart else 1
    threads = [threading.Thread(target=work) for _ in range(max(1, min(count, len(rows), os.cpu_count() or 1)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dropped


class Clock:
    """How much of the time is left."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s = budget_s
        self._began = time.monotonic()

    def left(self) -> float:
        """Seconds."""
        return self.budget_s - (time.monotonic() - self._began)

    def has(self, seconds: float, until: float) -> bool:
        """Whether something that takes `seconds` would be over within the share `until` of the time."""
        return self.budget_s - self.left() + seconds <= until * self.budget_s


# Report


def table(lines: Sequence[Line]) -> str:
    """All lines, by part, columns aligned."""
    out = []
    for part in dict.fromkeys(line.part for line in lines):
        rows = [line for line in lines if line.part == part]
        columns = list(dict.fromkeys(column for line in rows for column in line.values if column != "failed"))
        width = max(len(part), *(len(line.name) for line in rows))
        out.append(f"{part:{width}s} " + " ".join(f"{column:>10s}" for column in columns).rstrip())
        for line in rows:
            cells = " ".join(
                f"{_cell(line.values.get(column, '')):>{max(10, len(column))}s}" for column in columns
            ).rstrip()
            why = f"  {line.values['failed']}" if "failed" in line.values else ""
            out.append(f"{line.name:{width}s} {cells}" + ("  WRONG" if line.failed else "") + why)
    return "\n".join(out)


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.3g}"


def versions() -> dict[str, str | None]:
    """Of everything that matters; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in (*NEEDED, *OPTIONAL):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def record(lines: Sequence[Line], hardware: str, now: datetime.datetime, **more: Any) -> dict[str, Any]:
    """What goes to the JSON file."""
    return {
        "date": now.isoformat(timespec="seconds"), "hardware": hardware, **more,
        "lines": [finite(asdict(line)) for line in lines],
    }  # fmt: skip


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--part", default=",".join(PARTS), help="comma-separated, of: " + ", ".join(PARTS))
    parser.add_argument("--tokens", default="1,8,64", help="values of M to time")
    parser.add_argument("--budget", type=float, default=500, help="seconds for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="smallest sizes only")
    parser.add_argument("--tune", action="store_true", help="instead of all that: time other cuts, and update tuned.json")
    parser.add_argument("--in-process", action="store_true", help="run rows in this process")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(json.loads(options.child))
        return 0
    clock, now = Clock(options.budget), datetime.datetime.now().astimezone()
    parts = list(tune.PARTS) if options.tune else options.part.split(",")
    if unknown := sorted(set(parts) - set(ALL)):
        parser.error(f"--part: expected of {', '.join(PARTS)}, found {', '.join(unknown)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: no CUDA device; run it on a machine with an NVIDIA GPU", file=sys.stderr)
        return 3
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    bench = Bench(device, tuple(int(M) for M in options.tokens.split(",")), options.quick)
    found, took, dropped = versions(), dict[str, float](), list[str]()
    missing = [package for package in OPTIONAL if found[package] is None]
    print(f"{hardware}; not installed: {', '.join(missing) or 'nothing that could be used'}", file=sys.stderr)
    command = " ".join(["python -m bench.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    facts = {"versions": found, "command": command, "missing": missing, "seconds": took, "dropped": dropped}
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{now:%Y-%m-%d-%H%M%S}-gpu-{hardware.lower().replace(' ', '-')}.json"

    def save() -> None:
        """What there is so far, whatever ends this process."""
        part = path.with_suffix(".part")
        lines = [*bench.lines, *target_lines(bench.lines, dropped)]
        part.write_text(json.dumps(record(lines, hardware, now, **facts), indent=1) + "\n")
        part.replace(path)
        if options.tune and device.type == "cuda":
            tune.save(bench.lines, tuned.gpu(device))

    def show(line: Line) -> None:
        print(table([line]), file=sys.stderr, flush=True)
        save()

    for name in [part for part in ALL if part in parts]:
        began = clock.left()
        dropped += run_part(name, ALL[name], bench, Here if options.in_process else Apart, clock, show)
        took[name] = round(began - clock.left(), 1)
        for line in bench.lines:
            if line.part == "bandwidth" and line.name.endswith("(B)") and "GB/s" in line.values:
                bench.copy_bandwidth = float(line.values["GB/s"]) * 1e9
    save()
    wrong = [line for line in bench.lines if line.failed]
    print(table(bench.lines))
    if dropped:
        print(f"\nno time for {len(dropped)} rows: {'; '.join(dropped)}")
    if wrong:
        print(f"\n{len(wrong)} lines are wrong or failed:\n{table(wrong)}")
    print(f"\n{table(target_lines(bench.lines, dropped))}")
    print(f"\n{options.budget - clock.left():.0f} s, of which {', '.join(f'{n} {s:.0f}' for n, s in took.items())}; {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

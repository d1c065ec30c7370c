"""Kernels on the GPU of this machine: first whether they are right, then how fast they are.

    python -m bench.gpu [--part check,bandwidth,linear] [--tokens 1,8,64] [--results DIR]

check      every kernel, case and way of cutting the work against float64: fresh random inputs, outputs that start as NaN
bandwidth  what this GPU reaches: copying within its memory (B), reading it, copying from pinned host memory
linear     time of each layer of a published model, as bytes per second and as a share of B: weights and scales once, inputs
           and outputs; replayed as a graph over enough copies of the weights that none is left in the L2 cache

Speed is measured only if the check passed.  A table comes last; the same as JSON, with date, hardware and versions, goes to
`bench/results/`.  Exit code 1: something is wrong; 3: no CUDA device.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch

from runtime.format import module_tensors
from runtime.kernels.cases import Case, make_inputs, make_tensors
from runtime.kernels.table import FEW, ROWS, choose, machine

PACKAGES = ("torch", "triton", "torchao", "fla-core")
TOLERANCE = 5e-4  # of the largest result: tensor cores truncate where they add
ROTATED = 256 * 10**6  # bytes of weights that a timing goes through; the L2 cache of an H200 has 60 MB
REPLAYS = 30


@dataclass(frozen=True)
class Line:
    """One result.  `values`: by column, in the order to print."""

    part: str
    name: str
    values: Mapping[str, float | str]
    failed: bool = False


@dataclass
class Bench:
    """What the parts share: the device, the choices of the command line, and what earlier parts found."""

    device: torch.device
    tokens: tuple[int, ...]
    copy_bandwidth: float = float("nan")  # B, bytes per second, read and written bytes both counted
    lines: list[Line] = field(default_factory=list)


def kernels(device: torch.device) -> Iterator[ModuleType]:
    """Modules of the table that `device` can run and that have cases."""
    for row in ROWS:
        if (
            row.generations is not None
            and FEW in row.operations
            and choose(row.schemes[0], row.activations[0] if row.activations else None, FEW, machine(device))[0] is row
        ):
            yield importlib.import_module(row.module)


# Right


def error_of(kernel: ModuleType, case: Case, M: int, device: torch.device, split: int | None = None) -> float:
    """Largest error of a launch with fresh inputs, over the largest result; NaN where an output was not written.

    `split`: ranges of K, None for the default.
    """
    from runtime.kernels.tiles import INPUTS, choose_tiles, counters

    seed = int.from_bytes(os.urandom(4), "little")
    spec, tensors, x = case.spec(), make_tensors(case, device, seed), make_inputs(case, M, device, seed + 1)
    expected = kernel.reference(x, spec, tensors)
    found = torch.full(expected.shape, torch.nan, device=device)
    cut = None
    if split is not None:
        whole = choose_tiles(kernel.SHAPES, M, *spec.shape)
        cut = type(whole)(**{**asdict(whole), "split": split, "steps": -(-case.K // (INPUTS * split))})
    kernel.prepare(spec, tensors)(x, out=found, tiles=cut)
    assert not counters(device).any(), "a counter was left behind"
    return float((found - expected).abs().max() / expected.abs().max())


def check(bench: Bench) -> Iterator[Line]:
    """All cases at several M, small ones with several splits too."""
    for kernel in kernels(bench.device):
        most = kernel.SHAPES[-1].tokens
        for case in kernel.CASES:
            runs: list[tuple[int, int | None]] = [(M, None) for M in ((1, 2, 8, 9, 17, 33, 64) if case.tiny else (1, 64))]
            runs += [(M, split) for M in (1, most) for split in (1, 2, 3)] if case.tiny else []
            errors = {
                f"M={M}" + (f" split {split}" if split else ""): error_of(kernel, case, M, bench.device, split)
                for M, split in runs
            }
            worst = max(errors, key=lambda run: errors[run] if errors[run] == errors[run] else float("inf"))
            yield Line(
                "check", str(case), {"runs": len(runs), "error": errors[worst], "at": worst}, not errors[worst] < TOLERANCE
            )


# Fast


def seconds(launch: Callable[[], object], device: torch.device) -> float:
    """Median time of one replay of what `launch` does, captured as a graph after a warm-up."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            launch()
        times = []
        for _ in range(REPLAYS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record(stream)
            graph.replay()
            stop.record(stream)
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
    return float(statistics.median(times))


def bandwidth(bench: Bench) -> Iterator[Line]:
    """B and two other ceilings; sets `bench.copy_bandwidth`."""
    size = 2**31
    source, target = (torch.empty(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    source.fill_(1)
    bench.copy_bandwidth = 2 * size / seconds(lambda: target.copy_(source), bench.device)
    yield Line("bandwidth", "copy on the device (B)", {"GB/s": bench.copy_bandwidth / 1e9})
    words = source.view(torch.float32)
    yield Line("bandwidth", "read on the device", {"GB/s": size / seconds(lambda: words.sum(), bench.device) / 1e9})
    pinned = torch.empty(size // 4, dtype=torch.uint8, pin_memory=True)
    part = target[: size // 4]
    copied = seconds(lambda: part.copy_(pinned, non_blocking=True), bench.device)
    yield Line("bandwidth", "copy from pinned memory", {"GB/s": size / 4 / copied / 1e9})


def weight_bytes(case: Case) -> int:
    """Stored bytes of a layer, which a matmul reads once."""
    return sum(tensor.nbytes for tensor in module_tensors(case.spec()).values())


def moved_bytes(case: Case, M: int) -> int:
    """Bytes that a matmul has to move: weights and scales, bfloat16 inputs and outputs."""
    return weight_bytes(case) + 2 * M * (case.K + sum(case.rows))


def linear(bench: Bench) -> Iterator[Line]:
    """Every case with a published shape at each M."""
    for kernel in kernels(bench.device):
        for case in kernel.CASES:
            if case.tiny:
                continue
            copies = -(-ROTATED // weight_bytes(case))
            layers = [kernel.prepare(case.spec(), make_tensors(case, bench.device, seed)) for seed in range(copies)]
            first = None
            for M in bench.tokens:
                x = make_inputs(case, M, bench.device, 0)
                time = seconds(lambda layers=layers, x=x: [layer(x) for layer in layers], bench.device) / copies  # type: ignore[misc]
                first = first or time
                rate = moved_bytes(case, M) / time
                values = {
                    "M": M,
                    "us": time * 1e6,
                    "GB/s": rate / 1e9,
                    "of B": rate / bench.copy_bandwidth,
                    "vs first M": time / first,
                }
                yield Line("linear", str(case), values)
            del layers


PARTS: dict[str, Callable[[Bench], Iterator[Line]]] = {"check": check, "bandwidth": bandwidth, "linear": linear}


# Report


def table(lines: Sequence[Line]) -> str:
    """All lines, by part, columns aligned."""
    out = []
    for part in dict.fromkeys(line.part for line in lines):
        rows = [line for line in lines if line.part == part]
        columns = list(dict.fromkeys(column for line in rows for column in line.values))
        width = max(len(part), *(len(line.name) for line in rows))
        out.append(f"{part:{width}s} " + " ".join(f"{column:>10s}" for column in columns))
        for line in rows:
            cells = " ".join(f"{_cell(line.values.get(column, '')):>10s}" for column in columns)
            out.append(f"{line.name:{width}s} {cells}" + ("  WRONG" if line.failed else ""))
    return "\n".join(out)


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.3g}"


def record(lines: Sequence[Line], hardware: str, now: datetime.datetime) -> dict[str, object]:
    """What goes to the JSON file."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    date = now.isoformat(timespec="seconds")
    return {"date": date, "hardware": hardware, "versions": versions, "lines": [asdict(line) for line in lines]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--part", default=",".join(PARTS), help="comma-separated, of: " + ", ".join(PARTS))
    parser.add_argument("--tokens", default="1,8,64", help="values of M to time")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args(arguments)
    parts = options.part.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--part: expected of {', '.join(PARTS)}, found {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device; run it on a machine with an NVIDIA GPU", file=sys.stderr)
        return 3
    bench = Bench(torch.device("cuda", torch.cuda.current_device()), tuple(int(M) for M in options.tokens.split(",")))
    hardware = torch.cuda.get_device_name(bench.device)
    for name in [part for part in PARTS if part in parts]:
        for line in PARTS[name](bench):
            bench.lines.append(line)
            print(table([line]), file=sys.stderr, flush=True)
        if any(line.failed for line in bench.lines):
            break
    now = datetime.datetime.now().astimezone()
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{now.date()}-gpu-{hardware.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(record(bench.lines, hardware, now), indent=1) + "\n")
    print(table(bench.lines))
    print(f"written to {path}")
    return 1 if any(line.failed for line in bench.lines) else 0


if __name__ == "__main__":
    sys.exit(main())

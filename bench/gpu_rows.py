"""What `bench.gpu` measures, as rows: each is run alone, gives lines for the report, and may fail without the others.

A kernel module of `runtime/kernels` is found by its `CASES`.  Each case says whether it is `tiny`, made for tests, or has the
size of a published model, and has `nbytes`, what a launch has to move.  The module has

    errors(case, device, seed)    run -> largest error over the largest result, with fresh inputs and poisoned outputs
    launch(case, device, seed)    a launch to time
    TOLERANCE                     what is allowed, if not 5e-4

Linear layers and experts have their own columns: several numbers of tokens, and ways to cut the work.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import pkgutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.models import PUBLISHED, SCHEMES, TINY_ARCHITECTURES, Model, active_weights, make, step_bytes, tiny
from runtime.format import ModuleSpec, module_tensors
from runtime.kernels import table
from runtime.kernels.cases import Case, ExpertCase, make_inputs, make_tensors

TOLERANCE = 5e-4  # of the largest result: tensor cores truncate where they add
MANY_TOLERANCE = 0.02  # inputs, weights and results in bfloat16
ROTATED = 256 * 10**6  # bytes that a timing goes through before it repeats; the L2 cache of an H200 has 60 MB
REPLAYS = 30
CLOCKS_S = 0.05  # a GPU that had nothing to do takes this long to be as fast as it can be
ROWS_AT_ONCE = 2**15
SPLITS = (1, 2, 3)
PREFILL_M = 4096
TIMED = 40  # steps
LEAD = 8  # tokens that two ways to decode have in common, at least once in a few tries
BATCHES = (1, 8, 32)  # powers of two
PLACES = 1024  # tokens that a sequence has while decoding is timed


@dataclass(frozen=True)
class Line:
    """One result.  `values`: by column, in the order to print."""

    part: str
    name: str
    values: Mapping[str, float | str]
    failed: bool = False


@dataclass
class Bench:
    """What rows are given.  `quick`: the smallest sizes, to see that everything runs; `copy_bandwidth`: B, bytes per second,
    read and written bytes both counted; `warming`: nothing is timed, so that kernels are compiled and no more."""

    device: torch.device
    tokens: tuple[int, ...] = (1, 8, 64)
    quick: bool = False
    copy_bandwidth: float = math.nan
    warming: bool = False
    lines: list[Line] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """Something to run.  `seconds`: about how long it takes, on an H200 whose kernels are not compiled yet."""

    name: str
    seconds: float
    run: Callable[[Bench], Iterator[Line]]


@dataclass(frozen=True)
class Part:
    """Rows of one kind, the most important ones first.

    `until`: no row begins that would end after this share of the time.  `workers`: processes among which rows are shared.
    """

    rows: Callable[[Bench], list[Row]]
    until: float
    workers: int = 1


# Kernels


def kernels() -> Iterator[tuple[str, ModuleType]]:
    """Every module of `runtime/kernels` that has cases, by its short name; those that cannot be imported are left out."""
    for name in modules():
        with contextlib.suppress(ImportError):
            module = importlib.import_module(f"runtime.kernels.{name}")
            if getattr(module, "CASES", ()):
                yield name, module


def kernels_on(device: torch.device) -> list[tuple[str, ModuleType]]:
    """Those of `kernels` without the ones that call a library for other GPUs than `device`."""
    at = table.machine(device)
    left_out = {row.module for row in table.ROWS if row.cuda is not None and table.obstacle(row, at) is not None}
    return [(name, kernel) for name, kernel in kernels() if kernel.__name__ not in left_out]


def modules() -> list[str]:
    """Every module of `runtime/kernels`, by its short name."""
    import runtime.kernels

    return [info.name for info in pkgutil.iter_modules(runtime.kernels.__path__) if info.name != "__main__"]


def is_linear(case: object) -> bool:
    """Whether a case is a linear layer, with M to choose."""
    return isinstance(case, Case)


def fresh_seed() -> int:
    """Another one each time: what is right for one input only is found sooner or later."""
    return int.from_bytes(os.urandom(4), "little")


def poison(device: torch.device) -> None:
    """Leave NaN in memory that the next allocations get, so that what a kernel does not write is seen."""
    for size in (2**26, *(2**n for n in range(9, 22, 2))):
        blocks = [torch.empty(size, dtype=torch.uint8, device=device).fill_(255) for _ in range(2 if size > 2**20 else 8)]
        del blocks


def reference_of(kernel: ModuleType, x: Tensor, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """The reference of a linear layer, of a tall one some rows at a time: in float64 a head takes tens of gigabytes."""
    N, K = spec.shape
    if len(spec.partitions) > 1 or spec.scheme not in ("fp8_channel", "nvfp4"):
        return kernel.reference(x, spec, tensors)
    parts = []
    for first in range(0, N, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, N - first)
        own = {role: t[first : first + rows] if t.ndim and len(t) == N > 1 else t for role, t in tensors.items()}
        parts.append(kernel.reference(x, replace(spec, shape=(rows, K), partitions=(("", rows),)), own))
    return torch.cat(parts, 1)


def error_of(kernel: ModuleType, case: Case, M: int, device: torch.device, split: int | None = None) -> float:
    """Largest error of a linear layer with fresh inputs, over the largest result; NaN where an output was not written.

    `split`: ranges of K, None for the default.
    """
    from runtime.kernels.tiles import INPUTS, choose_tiles, counters

    seed = fresh_seed()
    spec, tensors, x = case.spec(), make_tensors(case, device, seed), make_inputs(case, M, device, seed + 1)
    expected = reference_of(kernel, x, spec, tensors)
    found = torch.full(expected.shape, torch.nan, device=device)
    cut = None
    if split is not None:
        whole = choose_tiles(kernel.SHAPES, M, *spec.shape)
        cut = replace(whole, split=split, steps=-(-case.K // (INPUTS * split)))
    kernel.prepare(spec, tensors)(x, out=found, tiles=cut)
    assert not counters(device).any(), "a counter was left behind"
    return float((found - expected).abs().max() / expected.abs().max())


def errors_of(kernel: ModuleType, case: Any, bench: Bench) -> dict[str, float]:
    """Run -> error for a case of any kernel."""
    if is_linear(case):
        most = kernel.SHAPES[-1].tokens
        runs: list[tuple[int, int | None]] = [(M, None) for M in ((1, 2, 8, 9, 17, 33, 64) if case.tiny else (1, 8, 64))]
        runs += [(M, split) for M in (1, most) for split in SPLITS] if case.tiny else []
        runs = runs[:1] if bench.quick else runs
        return {
            f"M={M}" + (f" split {split}" if split else ""): error_of(kernel, case, M, bench.device, split)
            for M, split in runs
        }
    if isinstance(case, ExpertCase):
        from runtime.kernels import slots

        plans = expert_plans(kernel, 150 if case.tiny else 40)[: 1 if bench.quick else None]
        return slots.errors(kernel, kernel.reference, case, bench.device, fresh_seed(), plans)
    found: dict[str, float] = kernel.errors(case, bench.device, fresh_seed())
    return found


def expert_plans(kernel: ModuleType, most: int) -> list[tuple[int, int | None, None]]:
    """Numbers of tokens, each with slots of their own or with a width of blocks that the kernel has; cut by default.

    `most`: of tokens, of which there is an expert that has them all; the reference takes them one by one.
    """
    blocks = [(T, shape.tokens, None) for shape in kernel.BLOCK_SHAPES for T in (5, most)]
    return [*((T, None, None) for T in (1, 3, 8)), *blocks]


def check_rows(bench: Bench) -> list[Row]:
    """Every case of every kernel: tiny ones in all their ways, the others as they would run."""

    def run(kernel: ModuleType, case: Any) -> Callable[[Bench], Iterator[Line]]:
        def rows(bench: Bench) -> Iterator[Line]:
            poison(bench.device)
            errors = errors_of(kernel, case, bench)
            worst = max(errors, key=lambda at: errors[at] if errors[at] == errors[at] else math.inf)
            wrong = not errors[worst] < getattr(kernel, "TOLERANCE", TOLERANCE)
            yield Line("check", label(kernel, case), {"runs": len(errors), "error": errors[worst], "at": worst}, wrong)

        return rows

    def imported(name: str) -> Callable[[Bench], Iterator[Line]]:
        def rows(bench: Bench) -> Iterator[Line]:
            importlib.import_module(f"runtime.kernels.{name}")
            yield from ()

        return rows

    found = [(kernel, case) for _, kernel in kernels_on(bench.device) for case in kernel.CASES]
    if bench.quick:
        found = [pair for pair in found if pair[1] is pair[0].CASES[0]]
    rows = [Row(label(kernel, case), 12 if case.tiny else 5, run(kernel, case)) for kernel, case in found]
    many = [Row(f"{name}: many tokens", 10, many_tokens(kernel)) for name, kernel in kernels() if is_linear(kernel.CASES[0])]
    return [*(Row(f"import of {name}", 1, imported(name)) for name in modules()), *rows, *many]


def many_tokens(kernel: ModuleType) -> Callable[[Bench], Iterator[Line]]:
    """Layers of the tiny cases as prefill runs them, whatever does; what they take is rounded to bfloat16."""

    def run(bench: Bench) -> Iterator[Line]:
        cases = [case for case in kernel.CASES if case.tiny]
        for case in cases[:2] if bench.quick else cases:
            poison(bench.device)
            layer = quantized_layer(case, bench.device)
            tensors = {role: parameter.data for role, parameter in layer.named_parameters()}
            errors = {}
            for M in (65, 200):
                x = make_inputs(case, M, bench.device, fresh_seed())
                expected = kernel.reference(x, case.spec(), tensors)
                errors[f"M={M}"] = float((layer(x) - expected).abs().max() / expected.abs().max())
            worst = max(errors, key=lambda at: errors[at] if errors[at] == errors[at] else math.inf)
            values = {"runs": len(errors), "error": errors[worst], "at": worst}
            yield Line("check", f"{label(kernel, case)}, many tokens", values, not errors[worst] < MANY_TOLERANCE)

    return run


def label(kernel: ModuleType, case: object) -> str:
    """For people: which kernel, which case."""
    return f"{kernel.__name__.rpartition('.')[2]}: {case}"


# Time


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(launch: Callable[[], object], bench: Bench, replays: int = REPLAYS) -> float:
    """Median time of what `launch` does: on CUDA replayed as a graph, after a warm-up; elsewhere once."""
    if bench.device.type != "cuda" or bench.warming:
        return _clock(launch)
    from runtime.steps import capture

    replay, began = capture(launch, bench.device), time.perf_counter()
    while time.perf_counter() - began < CLOCKS_S:
        replay()
        torch.cuda.synchronize()
    return replayed(replay, replays)


def copies_of(nbytes: int, bench: Bench) -> int:
    """How many times to have what a launch reads, so that none of it is left in a cache when its turn comes again."""
    return 1 if bench.quick or bench.warming else max(-(-ROTATED // max(nbytes, 1)), 1)


def replayed(replay: Callable[[], object], replays: int) -> float:
    """Median time of `replay` on the current CUDA stream, each between two events."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]  # type: ignore[no-untyped-call]
    for start, stop in marks:
        start.record()
        replay()
        stop.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(stop) / 1e3 for start, stop in marks))


def _clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bandwidth_rows(bench: Bench) -> list[Row]:
    """B and two other ceilings."""

    def run(bench: Bench) -> Iterator[Line]:
        device, size = bench.device, 2**22 if bench.quick else 2**31
        source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
        source.fill_(1)
        bench.copy_bandwidth = 2 * size / seconds(lambda: target.copy_(source), bench)
        yield Line("bandwidth", "copy on the device (B)", {"GB/s": bench.copy_bandwidth / 1e9})
        words = source.view(torch.float32)
        yield Line("bandwidth", "read on the device", {"GB/s": size / seconds(lambda: words.sum(), bench) / 1e9})
        pinned = torch.empty(size // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
        part = target[: size // 4]
        copied = seconds(lambda: part.copy_(pinned, non_blocking=True), bench, 10)
        yield Line("bandwidth", "copy from pinned memory", {"GB/s": size / 4 / copied / 1e9})

    return [Row("ceilings", 3, run)]


def weight_bytes(case: Case) -> int:
    """Stored bytes of a layer, which a matmul reads once."""
    return sum(tensor.nbytes for tensor in module_tensors(case.spec()).values())


def moved_bytes(case: Case, M: int) -> int:
    """Bytes that a matmul has to move: weights and scales, bfloat16 inputs and outputs."""
    return weight_bytes(case) + 2 * M * (case.K + sum(case.rows))


def linear_line(kernel: ModuleType, case: Case) -> Callable[[Bench], Iterator[Line]]:
    """A linear layer at each M."""

    def run(bench: Bench) -> Iterator[Line]:
        copies = copies_of(weight_bytes(case), bench)
        layers = [kernel.prepare(case.spec(), make_tensors(case, bench.device, seed)) for seed in range(copies)]
        first = None
        for M in bench.tokens:
            x = make_inputs(case, M, bench.device, 0)
            time_ = seconds(lambda x=x: [layer(x) for layer in layers], bench) / copies  # type: ignore[misc]
            first = first or time_
            rate = moved_bytes(case, M) / time_
            values = {
                "M": M, "us": time_ * 1e6, "GB/s": rate / 1e9, "of B": rate / bench.copy_bandwidth, "vs first M": time_ / first,
            }  # fmt: skip
            yield Line("kernels", label(kernel, case), values)

    return run


def expert_line(kernel: ModuleType, case: ExpertCase) -> Callable[[Bench], Iterator[Line]]:
    """All experts of a layer, for few tokens as bytes, for many as operations.  Each launch has chosen anew."""

    def run(bench: Bench) -> Iterator[Line]:
        (first, down), (a, b) = case.specs(), case.tensors(bench.device, 0)
        experts = kernel.prepare(first, down, a, b, case.activation())
        each = sum(t.nbytes for tensors in (a, b) for t in tensors.values()) / case.E
        weights = sum(spec.shape[0] * spec.shape[1] for spec in (first, down))
        for T in (*(M for M in bench.tokens if M <= 64), *(() if bench.quick else (PREFILL_M,))):
            copies = 1 if bench.quick or bench.warming or T > 64 else 16
            chosen = [case.chosen(T, bench.device, seed) for seed in range(copies)]
            x = torch.randn(T, case.H, device=bench.device).bfloat16()
            time_ = seconds(lambda x=x, chosen=chosen: [experts(x, *one) for one in chosen], bench) / copies  # type: ignore[misc]
            nbytes = each * sum(len(ids.unique()) for ids, _ in chosen) / copies + 4 * T * case.H
            values: dict[str, float | str] = {"M": T, "us": time_ * 1e6}
            if T <= 64:
                values |= {"GB/s": nbytes / time_ / 1e9, "of B": nbytes / time_ / bench.copy_bandwidth}
            else:
                values |= {"TFLOP/s": 2 * T * case.per_token * weights / time_ / 1e12}
            yield Line("kernels", label(kernel, case), values)

    return run


def launch_line(kernel: ModuleType, case: Any) -> Callable[[Bench], Iterator[Line]]:
    """Any other kernel: over enough copies of what it reads that none is left in a cache."""

    def run(bench: Bench) -> Iterator[Line]:
        copies = min(copies_of(case.nbytes, bench), 64)
        launches = [kernel.launch(case, bench.device, seed) for seed in range(copies)]
        time_ = seconds(lambda: [launch() for launch in launches], bench) / copies
        rate = case.nbytes / time_
        values = {"us": time_ * 1e6, "GB/s": rate / 1e9, "of B": rate / bench.copy_bandwidth}
        yield Line("kernels", label(kernel, case), values)

    return run


def big_layers(scheme: str, megabytes: float, full: bool = False) -> frozenset[str]:
    """Labels of linear layers of at least so many bytes; `full`: of those whose input is not quantised."""
    names = set()
    for _, kernel in kernels():
        for case in kernel.CASES:
            if not is_linear(case) or (full and case.activations):
                continue
            if case.scheme.startswith(scheme) and weight_bytes(case) >= megabytes * 1e6:
                names.add(label(kernel, case))
    return frozenset(names)


def kernel_rows(bench: Bench) -> list[Row]:
    """Every case with a published shape: first those with targets, then other linear layers."""
    found = []
    for _, kernel in sorted(kernels_on(bench.device), key=lambda pair: (not is_linear(pair[1].CASES[0]), pair[0])):
        for case in kernel.CASES:
            if case.tiny != bench.quick:
                continue
            if is_linear(case):
                found.append(Row(label(kernel, case), 4, linear_line(kernel, case)))
            elif isinstance(case, ExpertCase):
                found.append(Row(label(kernel, case), 8, expert_line(kernel, case)))
            elif hasattr(kernel, "launch") and hasattr(case, "nbytes"):
                found.append(Row(label(kernel, case), 3, launch_line(kernel, case)))
    first = {row.name.partition(":")[0]: row for row in reversed(found)}
    wanted = big_layers("fp8", 50) | big_layers("nvfp4", 28)
    return list(first.values()) if bench.quick else sorted(found, key=lambda row: row.name not in wanted)


# Prefill of one layer

GEMMS = (
    Case("Qwen3.5-27B gate_up", "fp8_tensor", (17408, 17408), 5120, "fp8_static"),
    Case("Qwen3.5-27B gate_up", "fp8_channel", (17408, 17408), 5120, "fp8_token"),
    Case("Qwen3.5-27B gate_up", "fp8_block", (17408, 17408), 5120, "fp8_group"),
    Case("Qwen3.5-27B gate_up", "nvfp4", (17408, 17408), 5120, "nvfp4"),
    Case("Qwen3.5-9B down", "fp8_tensor", (4096,), 12288, "fp8_static"),
)


def gemm_rows(bench: Bench) -> list[Row]:
    """Layers as prefill runs them, against `torch._scaled_mm` alone: one scale each, inputs already in FP8, and bfloat16."""
    cases = [replace(case, rows=(64,), K=128) for case in GEMMS] if bench.quick else GEMMS

    def run(case: Case) -> Callable[[Bench], Iterator[Line]]:
        def rows(bench: Bench) -> Iterator[Line]:
            M, device = 80 if bench.quick else PREFILL_M, bench.device
            N, K = case.spec().shape
            layer, x = quantized_layer(case, device), make_inputs(case, M, device, 1)
            time_ = seconds(lambda: layer(x), bench, 10)
            values: dict[str, float | str] = {"M": M, "ms": time_ * 1e3, "TFLOP/s": 2 * M * N * K / time_ / 1e12}
            if device.type == "cuda":
                for name, fast in (("_scaled_mm", False), ("fast", True)):
                    alone = scaled_mm_seconds(x, layer.weight, K, fast, bench)
                    values |= {f"{name} ms": alone * 1e3, f"of {name}": alone / time_}
            yield Line("layers", str(case), values)

        return rows

    return [Row(str(case), 6, run(case)) for case in cases]


def quantized_layer(case: Case, device: torch.device) -> torch.nn.Module:
    """A layer of the runtime with the tensors of a case."""
    from runtime.layers import SCHEME_LAYERS

    layer = SCHEME_LAYERS[case.scheme](case.spec(), case.bias)
    for role, tensor in make_tensors(case, device, fresh_seed()).items():
        setattr(layer, role, torch.nn.Parameter(tensor, requires_grad=False))
    return layer


def scaled_mm_seconds(x: Tensor, weight: Tensor, K: int, fast: bool, bench: Bench) -> float:
    """The matmul alone: FP8 codes of `x` `[M, K]` with a weight, its own where it is FP8, and one scale for each.

    `fast`: with sums of fewer bits, which is not torch's default.
    """
    from runtime.kernels.fp8_quantize import quantize

    a, _ = quantize(x, "fp8_token")
    b = weight if weight.dtype == a.dtype else torch.randn(len(weight), K, device=x.device).to(a.dtype)
    one = torch.ones((), device=x.device)
    return seconds(lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast), bench, 10)


# Whole models


def logits_rows(bench: Bench) -> list[Row]:
    """Tiny models of every family: inputs as they are, which shows small errors, then quantised as stored, which does not."""
    every = list(TINY_ARCHITECTURES)
    ways = [(family, scheme, full) for scheme, full in (("FP8 blocks", True), ("NVFP4", True)) for family in every]
    ways += [(family, scheme, False) for scheme in SCHEMES for family in every]
    if bench.quick:
        ways = [("qwen3_5_moe", "FP8 blocks", True), ("nemotron_h", "FP8 static", False)]

    def run(*way: Any) -> Callable[[Bench], Iterator[Line]]:
        return lambda bench: compare_logits(*way, bench)

    return [Row(f"{family} {scheme}{' full' if full else ''}", 6, run(family, scheme, full)) for family, scheme, full in ways]


def compare_logits(family: str, scheme: str, full: bool, bench: Bench) -> Iterator[Line]:
    """Root mean square error over that of the logits, on the device and in bfloat16 on the CPU, which rounds as often.

    `full`: inputs of linears are not quantised.  Wrong: not a number, or a median three times that of the CPU for three inputs
    in a row, as an expert that is chosen by a hair changes all that follows.  Then: whether recorded steps draw the tokens
    of one call at a time.  Sums differ, so in 2 of 100 steps the tokens part: wrong is what parts before `LEAD` four times.
    """
    from runtime.decode import Decoding
    from runtime.sampling import Sampling
    from runtime.state import State

    model, cpu, length = tiny(family, scheme), torch.device("cpu"), 70
    name = f"{model.name}{', inputs in full' if full else ''}"
    exact, rounded = (make(model, cpu, dtype, 7, not full) for dtype in (torch.float32, torch.bfloat16))
    there = on_device(rounded, make(model, bench.device, torch.bfloat16, 7, not full))

    def logits(of: Any, ids: Tensor) -> list[Tensor]:
        state: State = of.new_state(2, length + 10)
        of(ids[:, :36], state)  # a prompt in two pieces, of which the second attends to the first
        found = [*of(ids[:, 36:length], state).float().cpu().unbind(1)[-20:]]
        state.settle()
        real = torch.ones(2, dtype=torch.bool, device=of.device)
        return found + [of.step(ids[:, t].to(of.device), state, real).cpu() for t in range(length, length + 10)]

    for attempt in range(1, 4):
        ids = torch.randint(0, 512, (2, length + 10), generator=torch.Generator().manual_seed(fresh_seed()))
        expected = logits(exact, ids)
        usual, found = (
            [float((a - b).norm() / b.norm()) for a, b in zip(logits(of, ids), expected, strict=True)]
            for of in (rounded, there)
        )
        values = {
            "prefill": statistics.median(found[:20]), "steps": statistics.median(found[20:]), "worst": max(found),
            "on the CPU": statistics.median(usual), "inputs": attempt,
        }  # fmt: skip
        nan = any(error != error for error in found)
        wrong = nan or not max(values["prefill"], values["steps"]) < 3 * max(values["on the CPU"], 0.005)
        if not wrong:
            break
    yield Line("logits", name, values, wrong)
    if full:
        leads = []
        while len(leads) < 4 and max(leads, default=0) < LEAD:
            sampling = Sampling(1.0, 40, 0.95, 0.02, 1.1, seed=fresh_seed())
            prompts = [row[:n] for row, n in zip(ids, (9, length))]
            drawn = [list(Decoding(there, prompts, sampling, 24, fixed=fixed)) for fixed in (True, False)]
            leads.append(next((i for i, (a, b) in enumerate(zip(*drawn, strict=True)) if a != b), len(drawn[1])))
        yield Line("logits", f"{name}: tokens by graph", {"same": max(leads), "inputs": len(leads)}, max(leads) < LEAD)


def on_device(source: Any, target: Any) -> Any:
    """Give `target` the weights of `source`."""
    for (_, a), (_, b) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        b.data.copy_(a.data) if b.dtype == a.dtype else b.data.copy_(a.data.to(b.dtype))
    return target


def shortened(model: Model) -> Model:
    """The first layers, among them all kinds and formats, and a small vocabulary: the same kernels."""
    kinds = list(model.architecture["layer_types"])
    count = next(n for n in range(1, len(kinds) + 1) if {*kinds[:n]} == {*kinds} and n >= 4)
    count = min(count + 1, len(kinds))
    changed = {"layer_types": kinds[:count], "num_hidden_layers": count, "vocab_size": 1024}
    return replace(model, architecture={**model.architecture, **changed})


def warm_rows(bench: Bench) -> list[Row]:
    """Kernels of the published models at their shapes, and those to be timed, compiled by several processes; gives no lines."""
    models = [tiny("nemotron_h", "FP8 blocks")] if bench.quick else PUBLISHED

    def run(model: Model, rows: int | None) -> Callable[[Bench], Iterator[Line]]:
        def work(bench: Bench) -> Iterator[Line]:
            found = make(shortened(model), bench.device)
            if rows is None:
                prefill_line(model, found, bench)
            else:
                steps_in_place(found, rows, bench).step()
            yield from ()

        return work

    def once(row: Row) -> Callable[[Bench], Iterator[Line]]:
        def work(bench: Bench) -> Iterator[Line]:
            for _ in row.run(replace(bench, warming=True)):
                pass
            yield from ()

        return work

    ways: tuple[int | None, ...] = (1, None) if bench.quick else (1, None, *BATCHES[1:])
    rows = [Row(f"{model.name}, {rows or 'prefill'}", 15, run(model, rows)) for rows in ways for model in models]
    return rows + [Row(row.name, 5, once(row)) for row in [*kernel_rows(bench), *gemm_rows(bench)]]


def model_rows(bench: Bench) -> list[Row]:
    """Each published model: prefill, then decoding at batch 1, 8 and 32; memory."""
    models = [tiny("qwen3_5_moe", "FP8 blocks")] if bench.quick else list(PUBLISHED)

    def run(model: Model) -> Callable[[Bench], Iterator[Line]]:
        return lambda bench: time_model(model, bench)

    return [Row(model.name, 20, run(model)) for model in models]


def time_model(model: Model, bench: Bench) -> Iterator[Line]:
    """Decoding comes first; what fails at one batch does not end the others."""
    device = bench.device
    began = time.perf_counter()
    with torch.no_grad():
        found = make(model, device)
    synchronize(device)
    made = time.perf_counter() - began
    for rows in (1, 2) if bench.quick else BATCHES:
        with reported("decode", f"{model.name}, batch {rows}") as failures:
            yield decode_line(model, found, rows, bench)
        yield from failures
    with reported("prefill", model.name) as failures:
        yield prefill_line(model, found, bench)
    yield from failures
    if device.type == "cuda":
        with reported("profile", model.name) as failures:
            yield from profile_lines(model, found, bench)
        yield from (replace(line, failed=False) for line in failures)  # some machines have no profiler
    yield Line("prefill", f"{model.name}: made", {"s": made})
    del found
    gc.collect()


@contextlib.contextmanager
def reported(part: str, name: str) -> Iterator[list[Line]]:
    """Turn an exception into a failed line, unless the device is of no use after it."""
    failures: list[Line] = []
    try:
        yield failures
    except Exception as error:
        failures.append(Line(part, name, {"failed": _one_line(error)}, True))
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def steps_in_place(found: Any, rows: int, bench: Bench) -> Any:
    """Steps of `rows` sequences that have `PLACES` tokens, which hold nothing."""
    from runtime.sampling import Sampling
    from runtime.steps import Steps, kind_of

    places = 16 if bench.quick else PLACES
    steps = Steps(found, kind_of(rows, Sampling()), places + 3 * TIMED + 8)
    steps.begin([10**6] * rows, [], None)
    steps.choose(torch.randn(rows, found.architecture.vocab_size, device=bench.device), [places] * rows)
    steps.receive()
    return steps


def decode_line(model: Model, found: Any, rows: int, bench: Bench) -> Line:
    """One step of `rows` sequences that have `PLACES` tokens; and by the host's clock, results received."""
    device, count = bench.device, 4 if bench.quick else TIMED
    steps = steps_in_place(found, rows, bench)
    began = time.perf_counter()
    steps.start()
    steps.receive()
    recorded = time.perf_counter() - began
    replay = steps._replay
    assert replay is not None
    step = replayed(replay, count) if device.type == "cuda" else statistics.median(_clock(replay) for _ in range(count))
    steps.start()
    began = time.perf_counter()
    for _ in range(count):
        steps.start()
        steps.receive()
    clock = (time.perf_counter() - began) / count
    nbytes = step_bytes(found, rows, int(steps.state.places.max()))
    rate = nbytes / step
    graph = device.type == "cuda" and getattr(replay, "__name__", "") != "step"
    return Line(
        "decode", f"{model.name}, batch {rows}",
        {
            "ms": step * 1e3, "tok/s": rows / step, "GB": nbytes / 1e9, "of B": rate / bench.copy_bandwidth,
            "clock ms": clock * 1e3, "recorded s": recorded, "graph": "yes" if graph else "no",
        },
        device.type == "cuda" and not graph,
    )  # fmt: skip


def prefill_line(model: Model, found: Any, bench: Bench) -> Line:
    """One prompt as the runtime takes it: pieces of `PREFILL_TOKENS`."""
    from runtime.decode import PREFILL_TOKENS, prefill

    count = 80 if bench.quick else 2 * PREFILL_TOKENS
    prompt = torch.randint(0, found.architecture.vocab_size, (count,))
    times = []
    for _ in range(2):  # the first compiles
        state = found.new_state(1, count)
        synchronize(bench.device)
        began = time.perf_counter()
        found.logits(prefill(found, [prompt], state))
        synchronize(bench.device)
        times.append(time.perf_counter() - began)
    flops = 2 * active_weights(found) * count
    return Line(
        "prefill", model.name, {"tokens": count, "first s": times[0], "s": times[1], "tok/s": count / times[1],
                                "TFLOP/s": flops / times[1] / 1e12},
    )  # fmt: skip


def profile_lines(model: Model, found: Any, bench: Bench, most: int = 12) -> Iterator[Line]:
    """The kernels of one step that take most time, by the profiler, run one by one."""
    from torch.profiler import ProfilerActivity, profile

    steps = steps_in_place(found, 1, bench)
    steps.step()
    synchronize(bench.device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        steps.step()
        synchronize(bench.device)
    events = [event for event in profiled.key_averages() if "CUDA" in str(event.device_type).upper()]
    total = sum(event.self_device_time_total for event in events)
    count = sum(event.count for event in events)
    yield Line("profile", f"{model.name}: all kernels", {"launches": count, "us": total})
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:most]:
        yield Line("profile", f"{model.name}: {event.key[:70]}", {"launches": event.count, "us": event.self_device_time_total})


# Loading


def load_rows(bench: Bench) -> list[Row]:
    """A checkpoint of a true size on disk, in the page cache: rates, then a process from its start to the first token."""
    model = tiny("qwen3_5", "FP8 blocks") if bench.quick else PUBLISHED[0]
    return [Row(f"load {model.name}", 50, lambda bench: time_loading(model, bench))]


def time_loading(model: Model, bench: Bench) -> Iterator[Line]:
    """Writes the checkpoint, about 11 GB, to a temporary folder, of which nothing is left."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        size = write_checkpoint(model, Path(folder), bench.device)
        yield Line("load", f"{model.name}: written", {"GB": size / 1e9, "s": time.perf_counter() - began})
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        used = device_memory() if bench.device.type == "cuda" else 0  # by this process, not by those that follow
        for run in ("warm",) if bench.quick else ("cold", "warm"):
            found = start_process(folder, bench.device)
            values = {"to first token s": found["first_s"], "imports s": found["imports_s"], "load s": found["load_s"]}
            values |= {"prefill s": found["prefill_s"], "GB/s": size / found["load_s"] / 1e9}
            yield Line("load", f"{model.name}: a new process, kernels {run}", values)
        memory = {name: found[name] for name in ("needed GB", "reserved GB", "device GB") if name in found}
        if memory:
            memory["device GB"] -= used / 1e9
            memory |= {"above": memory["device GB"] / memory["needed GB"] - 1}
            memory |= {"torch above": memory["reserved GB"] / memory["needed GB"] - 1}
        yield Line("memory", f"{model.name}, 1 x {PLACES} tokens", memory)
        from bench.load import rates

        found = rates(Path(folder), str(bench.device))
        least = min(found["copy"], found["read"])
        yield Line("load", f"{model.name}: rates", {f"{kind} GB/s": rate for kind, rate in found.items()})
        yield Line("load", f"{model.name}: loading", {"GB/s": found["overlapped"], "of least": found["overlapped"] / least})


def device_memory() -> int:
    """Bytes in use on the current CUDA device, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def write_checkpoint(model: Model, folder: Path, device: torch.device, shard: int = 2 * 10**9) -> int:
    """A canonical checkpoint with random weights.  Returns the bytes of its tensors."""
    from bench.load import write

    found = make(model, device)
    return write(folder, found.config, {name: p.data for name, p in found.named_parameters()}, shard)


CHILD = """
import json, sys, time
began = float(sys.argv[1])
import torch
from runtime.ahead import Use
from runtime.decode import Decoding
from runtime.loader import load_model
from runtime.sampling import Sampling
device = sys.argv[3]
imported = time.time()
model = load_model(sys.argv[2], device=device, uses=[Use((8,), 8 + int(sys.argv[4]), Sampling())])
if device != "cpu":
    torch.cuda.synchronize()
loaded = time.time()
decoding = iter(Decoding(model, [torch.arange(1, 9)], Sampling(), int(sys.argv[4])))
next(decoding)
first = time.time()
found = {"first_s": first - began, "imports_s": imported - began, "load_s": loaded - imported, "prefill_s": first - loaded}
for _ in decoding:
    pass
if device != "cpu":
    torch.cuda.synchronize()
    needed = sum(p.nbytes for p in model.parameters()) + model.state_nbytes(1, 8 + int(sys.argv[4]))
    free, total = torch.cuda.mem_get_info()
    found |= {"needed GB": needed / 1e9, "reserved GB": torch.cuda.max_memory_reserved() / 1e9}
    found["device GB"] = (total - free) / 1e9
print(json.dumps(found))
"""


def start_process(folder: str, device: torch.device) -> dict[str, float]:
    """What a process that loads and decodes says of itself; times from when it was started."""
    tokens = str(PLACES - 8 if device.type == "cuda" else 4)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(time.time()), folder, str(device), tokens],
        capture_output=True, text=True, timeout=180, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


PARTS: Mapping[str, Part] = {
    "bandwidth": Part(bandwidth_rows, 0.1),
    "check": Part(check_rows, 0.32, workers=12),
    "logits": Part(logits_rows, 0.40, workers=12),
    "warm": Part(warm_rows, 0.50, workers=12),
    "decode": Part(model_rows, 0.74),
    "kernels": Part(kernel_rows, 0.86),
    "layers": Part(gemm_rows, 0.90),
    "load": Part(load_rows, 1.0),
}

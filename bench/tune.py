"""Other cuts of the linear kernels, timed: what `bench.gpu --tune` runs, and what it writes into `runtime/kernels/tuned.json`.

For each published shape and width of the tokens: first every number of ranges of K, then other depths of the pipeline.  Cuts
are compiled by several processes beforehand, and timed by one.  A cut is kept when it is right and at least 3 % faster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.gpu_rows import (
    ROTATED,
    Bench,
    Line,
    Part,
    Row,
    is_linear,
    kernels,
    label,
    reference_of,
    seconds,
    synchronize,
    weight_bytes,
)
from runtime.kernels import tuned
from runtime.kernels.cases import Case, make_inputs, make_tensors

SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
STAGES = (3, 4, 5, 6)
WORTH = 1.03  # times faster than the default
ROUNDED = 2**-7  # of the largest result: one step of bfloat16, in which it is stored


def problems(quick: bool) -> list[tuple[str, ModuleType, Case, int]]:
    """Name of a kernel in the file, its module, a case, and M: the largest of a width."""
    found, seen = [], set()
    for short, kernel in kernels():
        for case in kernel.CASES:
            if is_linear(case) and case.tiny == quick and not case.runs:
                for shape in kernel.SHAPES:
                    name = tuned.name(short, case.scheme, case.activations)
                    if (key := (name, *case.spec().shape, shape.tokens)) not in seen:
                        seen.add(key)
                        found.append((name, kernel, case, shape.tokens))
    return found[:2] if quick else sorted(found, key=lambda one: one[3])


def default_of(kernel: ModuleType, case: Case, M: int, device: torch.device) -> Any:
    """How a launch is cut without the file."""
    from runtime.kernels.tiles import choose_tiles, multiprocessors

    return choose_tiles(kernel.SHAPES, M, *case.spec().shape, multiprocessors(device))


def cuts(kernel: ModuleType, case: Case, M: int, device: torch.device) -> list[dict[str, int]]:
    """Numbers of ranges that make a difference, without the default's."""
    from runtime.kernels.tiles import COUNTERS, recut

    N, K = case.spec().shape
    default = default_of(kernel, case, M, device)
    found = {}
    for split in SPLITS:
        cut = recut(default, K, split=split)
        if cut.split != default.split and (cut.split == 1 or -(-N // cut.rows) <= COUNTERS):
            found[cut.split] = {"split": cut.split}
    return list(found.values())


def compile_rows(bench: Bench) -> list[Row]:
    """Each cut launched once, so that its binary lies in Triton's cache; other depths only of the default."""

    def run(kernel: ModuleType, case: Case, M: int) -> Callable[[Bench], Iterator[Line]]:
        def rows(bench: Bench) -> Iterator[Line]:
            from runtime.kernels.tiles import recut

            x, tensors = make_inputs(case, M, bench.device, 0), make_tensors(case, bench.device, 0)
            launch, default = kernel.prepare(case.spec(), tensors), default_of(kernel, case, M, bench.device)
            stages = ({"stages": n} for n in STAGES if n != default.stages)
            for change in ({}, *cuts(kernel, case, M, bench.device), *stages):
                launch(x, tiles=recut(default, case.K, **change))
            yield from ()

        return rows

    return [Row(f"{label(kernel, case)}, M={M}", 20, run(kernel, case, M)) for _, kernel, case, M in problems(bench.quick)]


def tune_rows(bench: Bench) -> list[Row]:
    """The best cut of each problem."""

    def run(*problem: Any) -> Callable[[Bench], Iterator[Line]]:
        return lambda bench: tune(*problem, bench)

    found = problems(bench.quick)
    return [Row(f"{label(kernel, case)}, M={M}", 6, run(name, kernel, case, M)) for name, kernel, case, M in found]


def tune(name: str, kernel: ModuleType, case: Case, M: int, bench: Bench) -> Iterator[Line]:
    """One line, with what the file needs."""
    from runtime.kernels.tiles import recut

    N, K = case.spec().shape
    default = default_of(kernel, case, M, bench.device)
    copies = 1 if bench.quick else -(-ROTATED // weight_bytes(case))
    contents = [make_tensors(case, bench.device, seed) for seed in range(copies)]
    launches = [kernel.prepare(case.spec(), tensors) for tensors in contents]
    x = make_inputs(case, M, bench.device, 0)
    expected = reference_of(kernel, x, case.spec(), contents[0])

    def time_of(change: Mapping[str, int]) -> float:
        """Infinite for a cut that is wrong or does not compile."""
        cut = recut(default, K, **change)
        out = torch.full(expected.shape, torch.nan, dtype=x.dtype, device=bench.device)  # as it is timed: no other build
        try:
            launches[0](x, out=out, tiles=cut)
            if not (out - expected).abs().max() < ROUNDED * expected.abs().max():
                return math.inf
            return seconds(lambda: [launch(x, tiles=cut) for launch in launches], bench) / copies
        except Exception:
            synchronize(bench.device)  # raises where the device is of no use any more
            return math.inf

    times: list[tuple[float, dict[str, int]]] = [(time_of({}), {})]
    times += [(time_of(change), change) for change in cuts(kernel, case, M, bench.device)]
    best = min(times, key=lambda one: one[0])[1]
    times += [(time_of(best | {"stages": n}), best | {"stages": n}) for n in STAGES if n != default.stages]
    least, change = min(times, key=lambda one: one[0])
    values: dict[str, float | str] = {
        "us": times[0][0] * 1e6, "best us": least * 1e6, "gain": times[0][0] / least, "kernel": name, "shape": f"{N}x{K}",
        "tokens": default.tokens, "change": json.dumps(change),
    }  # fmt: skip
    yield Line("tune", f"{label(kernel, case)}, M={M}", values)


def merge(content: Mapping[str, Any], gpu: str, lines: Sequence[Line]) -> dict[str, Any]:
    """The content of the file with what `lines` of the part "tune" found for a GPU; a default that won removes its entry."""
    merged: dict[str, Any] = json.loads(json.dumps(content))
    for line in lines:
        if line.part != "tune" or line.failed:
            continue
        values = line.values
        shapes = merged.setdefault(gpu, {}).setdefault(str(values["kernel"]), {})
        widths = shapes.setdefault(str(values["shape"]), {})
        widths.pop(str(values["tokens"]), None)
        change = json.loads(str(values["change"]))
        if change and float(values["gain"]) >= WORTH and math.isfinite(float(values["best us"])):
            widths[str(values["tokens"])] = change
    return _without_empty(merged)


def _without_empty(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _without_empty(value[key]) for key in sorted(value)}
    return {key: entry for key, entry in inner.items() if entry != {}}


def save(lines: Sequence[Line], gpu: str, file: Path = tuned.FILE) -> None:
    """Bring the file up to date."""
    file.write_text(json.dumps(merge(json.loads(file.read_text()), gpu, lines), indent=1) + "\n")


PARTS: Mapping[str, Part] = {"compile": Part(compile_rows, 0.5, workers=12), "tune": Part(tune_rows, 1.0)}

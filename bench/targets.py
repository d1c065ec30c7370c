"""The table of targets of `bench.gpu`: what is to be reached, and which of the measured lines say whether it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.gpu_rows import GEMMS, Line, big_layers
from bench.models import PUBLISHED


@dataclass(frozen=True)
class Target:
    """A line of the table of targets: a column of the rows of a part that `rows` takes by name, and what counts of several.

    `lines`: part of their lines, if not the same.  `M`: what the column of that name must hold.  `more`: more is better.
    `worst`: of several figures the worst counts, else the best.
    """

    what: str
    accept: float
    target: float
    part: str
    rows: Callable[[str], bool]
    column: str
    more: bool = True
    worst: bool = True
    lines: str | None = None
    M: int | None = None

    def found(self, lines: Sequence[Line]) -> float | None:
        """The figure that counts."""
        of = [line for line in lines if line.part == (self.lines or self.part) and self.rows(line.name)]
        values = [line.values.get(self.column) for line in of if self.M in (None, line.values.get("M"))]
        numbers = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
        return (min if self.more == self.worst else max)(numbers, default=None)

    def why_not(self, lines: Sequence[Line], dropped: Sequence[str]) -> str:
        """Why there is none."""
        parts = {self.part, self.lines}
        for line in lines:
            if line.part in parts and "failed" in line.values and (self.rows(line.name) or line.name == "rows"):
                return f"{line.name}: {line.values['failed']}"
        if any(part == self.part and self.rows(row) for part, _, row in (name.partition(": ") for name in dropped)):
            return "no time was left"
        return "gave no figure" if any(line.part in parts and self.rows(line.name) for line in lines) else "was not run"


def _gemms(*schemes: str) -> Callable[[str], bool]:
    names = {str(case) for case in GEMMS if case.scheme in schemes}
    return lambda name: name in names


def _decode(model: str) -> Callable[[str], bool]:
    return lambda name: name in (model, f"{model}, batch 1")


def _loaded(name: str) -> bool:
    """The model of true size, not that of `quick`."""
    return PUBLISHED[0].name in name


def targets() -> tuple[Target, ...]:
    """The table.  Of several figures the worst counts; of processes that start, the one that finds kernels compiled."""
    fp8, nvfp4 = big_layers("fp8", 50), big_layers("nvfp4", 28)
    few = big_layers("nvfp4", 28, full=True)
    rows = ("fp8_tensor", "fp8_channel")
    decode = (
        ("Qwen3.5-27B FP8", 0.60, 0.75), ("Qwen3.5-27B NVFP4", 0.48, 0.65), ("Qwen3.5-9B FP8", 0.55, 0.72),
        ("Qwen3.5-9B NVFP4", 0.42, 0.60), ("Qwen3.5-35B-A3B FP8", 0.25, 0.45), ("Nemotron-3-Nano-30B-A3B FP8", 0.25, 0.45),
    )  # fmt: skip
    gemm, lines = "FP8 prefill GEMM, M = 4096", "layers"
    return (
        Target("FP8 GEMV, weight >= 50 MB: share of B", 0.80, 0.90, "kernels", fp8.__contains__, "of B", M=1),
        Target("NVFP4 W4A16 GEMV, packed >= 28 MB: share of B", 0.60, 0.80, "kernels", few.__contains__, "of B", M=1),
        Target("M = 8 against M = 1, FP8: time", 1.4, 1.15, "kernels", fp8.__contains__, "vs first M", False, M=8),
        Target("M = 8 against M = 1, NVFP4: time", 1.4, 1.15, "kernels", nvfp4.__contains__, "vs first M", False, M=8),
        Target(f"{gemm}, scales by row, of torch._scaled_mm alone", 0.95, 1.05, lines, _gemms(*rows), "of _scaled_mm"),
        Target(f"{gemm}, scales by row, of it with fast sums", 0.95, 1.05, lines, _gemms(*rows), "of fast"),
        Target(f"{gemm}, blocks, of torch._scaled_mm alone", 0.95, 1.05, lines, _gemms("fp8_block"), "of _scaled_mm"),
        *(Target(f"decode, {name}: share of B", *marks, "decode", _decode(name), "of B") for name, *marks in decode),
        Target("load, page cache warm: of the least of copy and read", 0.60, 0.85, "load", _loaded, "of least"),
        Target("process start to first token, 9B FP8, s", 12, 5, "load", _loaded, "to first token s", False, worst=False),
        Target("device memory above weights, KV and state", 0.08, 0.03, "load", _loaded, "above", False, lines="memory"),
    )


def target_lines(lines: Sequence[Line], dropped: Sequence[str] = ()) -> list[Line]:
    """The table of targets.  `dropped`: parts and rows for which there was no time."""
    found = []
    for target in targets():
        values: dict[str, float | str] = {"measured": "", "accept": target.accept, "target": target.target}
        value = target.found(lines)
        if value is None:
            values |= {"verdict": "not measured", "failed": target.why_not(lines, dropped)}
        else:
            reached = [value >= mark if target.more else value <= mark for mark in (target.accept, target.target)]
            values |= {"measured": value, "verdict": "target" if reached[1] else "accept" if reached[0] else "missed"}
        found.append(Line("targets", target.what, values))
    return found

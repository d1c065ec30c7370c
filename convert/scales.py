"""What the values of scales say about a checkpoint: partitions that differ, suspicious conventions, histograms per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.format import DENSE_DTYPES, ModuleSpec

from .apply import e8m0_to_float32, to_float32
from .defects import Finding
from .dequantize import E4M3
from .view import View

Floats = NDArray[np.float32]

# A per-tensor multiplier is the largest absolute value divided by 448 (FP8) or 2688 (NVFP4), and no weight is in the thousands.
SUSPECT_ABOVE = 10.0
LOWEST, BINS, PER_OCTAVE = -40, 112, 2  # histograms: half octaves from 2**-40 to 2**16
SAMPLE = 64 << 10  # bytes of one tensor of block scales that a histogram looks at, in pieces spread over it
BUDGET = 256 << 20  # bytes of block scales that all histograms look at
PIECE = 4096


def _rows(view: View, module: str, role: str, spec: ModuleSpec) -> Floats:
    """A scale with one value for each partition, F32 `[experts, P]`; one row when the module is no stack."""
    values = to_float32(view.read(f"{module}.{role}"), "F32")
    return values.reshape(spec.experts or 1, -1)


def _ratio(values: Floats) -> NDArray[np.float64]:
    """Largest by smallest of each row; 1 for rows that no scale can have."""
    wide = values.astype(np.float64)
    with np.errstate(all="ignore"):
        ratio = wide.max(axis=-1) / wide.min(axis=-1)
    return np.where(np.isfinite(ratio) & (ratio > 0), ratio, 1.0)


@dataclass(slots=True)
class _Spread:
    """Groups whose members have different values: how many of how many, the largest ratio, the modules."""

    groups: int = 0
    differ: int = 0
    worst: float = 1.0
    modules: list[str] = field(default_factory=list)

    def add(self, module: str, ratio: NDArray[np.float64], differ: NDArray[np.bool_]) -> None:
        self.groups += ratio.size
        if differ.any():
            self.differ += int(differ.sum())
            self.worst = max(self.worst, float(ratio[differ].max()))
            self.modules.append(module)

    def finding(self, kind: str, role: str, what: str = "groups") -> Finding:
        names = [f"{module}.{role}" for module in self.modules]
        return Finding(kind, names, f"{self.differ} of {self.groups} {what}, ratio up to {self.worst:.3g}", self.differ)


# Scheme, role -> what it is when the partitions of a fused module differ in it.
PARTITIONS: Mapping[tuple[str, str], str] = {
    ("nvfp4", "weight_scale_2"): "global-scales-differ",
    ("fp8_tensor", "weight_scale"): "fp8-scales-differ",
    ("nvfp4", "input_scale"): "input-scales-differ",
    ("fp8_tensor", "input_scale"): "input-scales-differ",
    ("fp8_channel", "input_scale"): "input-scales-differ",
}


def from_values(view: View) -> Iterator[Finding]:
    """What the per-tensor scales of quantised modules show.  Reads these only: a few bytes for each module."""
    spreads: dict[tuple[str, str], _Spread] = defaultdict(_Spread)
    experts = _Spread()
    suspects: list[str] = []
    strange = 0.0
    for module, spec in view.config.modules.items():
        for (scheme, role), kind in PARTITIONS.items():
            if scheme != spec.scheme or f"{module}.{role}" not in view.tensors:
                continue
            values = _rows(view, module, role, spec)
            if role != "input_scale" and (values > SUSPECT_ABOVE).any():
                suspects.append(f"{module}.{role}")
                strange = max(strange, float(values.max()))
            if values.shape[1] > 1:
                ratio = _ratio(values)
                differ = ratio != 1
                if kind == "fp8-scales-differ":
                    differ = np.log2(ratio) % 1 != 0  # powers of two requantise exactly
                spreads[kind, role].add(module, ratio, differ)
            if role == "input_scale" and values.shape[0] > 1:
                across = _ratio(values.reshape(1, -1))
                experts.add(module, across, np.array([bool((values != values[0]).any())]))
    for (kind, role), spread in spreads.items():
        if spread.differ:
            yield spread.finding(kind, role)
    if experts.differ:
        yield experts.finding("expert-input-scales-differ", "input_scale", "stacks")
    if suspects:
        yield Finding("scale-direction-suspect", suspects, f"multipliers up to {strange:.3g}")


def kv_range(view: View) -> dict[str, float] | None:
    """Smallest and largest KV-cache scale, or None when there is none."""
    names = (f"{module}.{c}_scale" for module in view.config.kv_cache for c in "kv")
    stored = [(name, view.tensors[name].dtype) for name in names if name in view.tensors]
    values = [to_float32(view.read(name), dtype) for name, dtype in stored if dtype in DENSE_DTYPES]
    joined = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.zeros(0)
    return {"min": float(joined.min()), "max": float(joined.max())} if joined.size else None


# -- histograms ---------------------------------------------------------------------------------------------------------


def layer_of(module: str) -> str:
    """The layer that a module belongs to: its name up to the first number, or its root."""
    segments = module.split(".")
    at = next((i for i, s in enumerate(segments) if s.isdecimal()), None)
    return ".".join(segments[: at + 1]) if at is not None else segments[0]


def _sample(view: View, name: str, limit: int) -> bytes:
    """Up to `limit` bytes of a tensor, in pieces that are spread evenly over it."""
    size = view.tensors[name].nbytes
    if size <= limit:
        return view.read(name)
    count = max(1, limit // PIECE)
    starts = np.linspace(0, size - PIECE, count).astype(np.int64) // 4 * 4
    return b"".join(view.read(name, int(start), int(start) + PIECE) for start in starts)


def _values(view: View, module: str, spec: ModuleSpec, limit: int) -> Iterable[tuple[str, Floats]]:
    """(what, values) of a module's scales: the multipliers of its weight codes, and its input scales."""
    name = f"{module}.weight_scale"
    dtype = view.tensors[name].dtype
    data = _sample(view, name, limit)
    if dtype == "F32":
        yield "weight", to_float32(data, "F32")
    elif dtype == "F8_E4M3":
        # Below the global scale: of the module's partitions, the geometric mean, which differs by little if at all.
        globals_ = to_float32(view.read(f"{module}.weight_scale_2"), "F32")
        with np.errstate(all="ignore"):
            mean = np.float32(np.exp(np.log(globals_.astype(np.float64)).mean()))
        yield "weight", np.abs(E4M3[np.frombuffer(data, np.uint8)]) * mean
    else:
        yield "weight", e8m0_to_float32(data)
    if f"{module}.input_scale" in view.tensors:
        yield "input", to_float32(_sample(view, f"{module}.input_scale", limit), "F32")


def histograms(view: View) -> list[dict[str, Any]]:
    """Per layer: how the multipliers of its weights and its input scales are spread, in half octaves.

    Each entry: `layer`, `weight` (scheme -> counts by bin from 2**LOWEST on), `input` (counts), `min` and `max` of weights.
    Looks at a sample of at most `BUDGET` bytes in all.
    """
    limit = min(SAMPLE, max(PIECE, BUDGET // max(1, len(view.config.modules))))
    layers: dict[str, dict[str, Any]] = {}
    for module, spec in view.config.modules.items():
        key = layer_of(module)
        entry = layers.setdefault(key, {"layer": key, "weight": {}, "input": [0] * BINS})
        for what, values in _values(view, module, spec, limit):
            good = values[np.isfinite(values) & (values > 0)]
            if not good.size:
                continue
            bins = np.clip((np.log2(good.astype(np.float64)) - LOWEST) * PER_OCTAVE, 0, BINS - 1).astype(np.int64)
            counts = np.bincount(bins, minlength=BINS)
            into, name = (entry["weight"], spec.scheme) if what == "weight" else (entry, "input")
            into[name] = [a + int(b) for a, b in zip(into.get(name, [0] * BINS), counts, strict=True)]
            if what == "weight":
                low, high = float(good.min()), float(good.max())
                entry["min"], entry["max"] = min(entry.get("min", low), low), max(entry.get("max", high), high)
    return list(layers.values())

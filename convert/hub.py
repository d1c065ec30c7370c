"""A canonical checkpoint under the names of Hugging Face: which rows of which module each stored projection has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.format import CONFIG_FILE, DTYPE_BYTES, ModuleSpec

from .apply import to_float32
from .canonical import Canonical
from .dequantize import dequantize_rows
from .errors import ConvertError, Problem
from .families.base import Linear, Placed, hub_name, text_config
from .source import TensorInfo

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]
PIECE_BYTES = 64 << 20  # float32 bytes of a weight that are in memory at a time
DECODED_ROLES = ("weight", "weight_scale", "weight_scale_2")


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to be written under its hub name: its bytes come in pieces, whenever they are asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Projection:
    """A projection as the hub stores it.

    name         canonical name: "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.3.up_proj"
    module       the canonical module that holds it
    start, stop  its rows there; those of a stack of experts are counted from the first expert's to the last one's
    placed       the item that it is a part of
    expert       its index in the stack, or None
    """

    name: str
    module: str
    start: int
    stop: int
    placed: Placed
    expert: int | None

    @property
    def fused(self) -> tuple[str, int | None]:
        """What is equal for the projections that engines multiply with at once."""
        return self.placed.name, self.expert


class Reader:
    """The tensors of a canonical checkpoint, by memory map."""

    def __init__(self, canonical: Canonical) -> None:
        self.config, self.family, self.tensors = canonical.config, canonical.family, canonical.tensors
        self.maps: dict[str, Bytes] = {f: np.memmap(canonical.folder / f, np.uint8, "r") for f in canonical.files}

    def info(self, name: str) -> TensorInfo:
        """Where a tensor is stored.  Raises `ConvertError` when there is none of that name."""
        if name not in self.tensors:
            remedy = "the checkpoint is incomplete: convert again"
            raise ConvertError(Problem(CONFIG_FILE, name, "a tensor", "none", remedy))
        return self.tensors[name]

    def raw(self, name: str) -> Bytes:
        """The bytes of a tensor."""
        info = self.info(name)
        return self.maps[info.file][info.start : info.end]

    def floats(self, name: str) -> Float32:
        """A whole tensor of floats, flat, as float32.  For scales of modules and of partitions, which are few."""
        return to_float32(self.raw(name).tobytes(), self.info(name).dtype)

    def stored(self, name: str, width: int, first: int, last: int) -> memoryview:
        """Rows [first, last) of `width` elements of a tensor, as they are stored."""
        row = width * DTYPE_BYTES[self.info(name).dtype]
        return self.raw(name)[first * row : last * row].data

    def rows(self, name: str, width: int, first: int, last: int) -> Float32:
        """Rows [first, last) of `width` elements of an unquantised tensor, flat, as float32."""
        return to_float32(self.stored(name, width, first, last), self.info(name).dtype)

    def decoded(self, module: str, spec: ModuleSpec, first: int, last: int) -> Float32:
        """Rows [first, last) of a quantised module as float32, what its inputs are multiplied by folded in.

        `spec`: that of the module, `tall()`.
        """
        roles = {}
        for role in DECODED_ROLES:
            info = self.tensors.get(f"{module}.{role}")
            if info is not None:
                raw = self.raw(info.name)
                roles[role] = raw if info.dtype == "F32" else raw.reshape(-1, info.shape[-1])
        values = dequantize_rows(spec, roles, first, last)
        if spec.pre_quant_scale:
            factors = self.floats(f"{module}.pre_quant_scale").reshape(-1, spec.shape[1])
            values = values * factors[np.arange(first, last) // (spec.shape[0] // len(factors))]
        return values


class HubNames:
    """Canonical names -> those on the hub, for one checkpoint."""

    def __init__(self, canonical: Canonical) -> None:
        family, config = canonical.family, canonical.config.hf_config
        self.wrapped = text_config(family, config) is not config
        self._roots: Mapping[str, str] = family.hub_roots[0 if self.wrapped else 1]
        self._runs = family.hub_runs

    def __call__(self, name: str) -> str:
        """The name of a tensor or module on the hub."""
        return hub_name(name, self._roots, self._runs)


def spans(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) in pieces of about `PIECE_BYTES` as float32."""
    step = max(1, PIECE_BYTES // (4 * max(1, width)))
    return ((at, min(at + step, stop)) for at in range(start, stop, step))


def projections(canonical: Canonical, placed: Placed) -> Iterator[Projection]:
    """The projections of a linear or of a stack of experts, one by one and unfused."""
    if not isinstance(placed.item, Linear):
        return
    apart = canonical.config.unfused.get(placed.name, ())
    below = f"{placed.parent}." if placed.parent else ""
    last = placed.name.rpartition(".")[2]
    row = 0
    columns: dict[str, int] = dict.fromkeys((name for name, _ in placed.shards), 0)
    for expert in range(placed.experts) if placed.experts is not None else (None,):
        within = below if expert is None else f"{below}{expert}."
        inside = 0
        for shard, partitions in placed.shards:
            rows = sum(n or 0 for _, n in partitions)
            short = shard.rpartition(".")[2]
            if not apart:
                module, start = placed.name, row
            elif short in apart:  # kept apart by projection
                module, start = f"{below}{short}", columns[shard]
            elif f"{expert}.{last}" in apart:  # kept apart by expert
                module, start = f"{within}{last}", inside
            else:
                module, start = f"{within}{short}", 0
            row, inside, columns[shard] = row + rows, inside + rows, columns[shard] + rows
            if not rows:  # of any size: a tower's
                info = canonical.tensors.get(f"{module}.weight")
                rows = info.shape[0] if info is not None else 0
            yield Projection(f"{within}{short}", module, start, start + rows, placed, expert)

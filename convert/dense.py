"""The tensors of a dense export: dequantised weights under hub names, unfused, as transformers loads them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from runtime.format import DENSE_DTYPES

from .canonical import Canonical
from .dequantize import to_bfloat16
from .families.base import Linear, Placed
from .hub import Float32, HubNames, Output, Projection, Reader, projections, spans

Rows = Sequence[tuple[int, int]]  # ranges of rows


def encoded(values: Float32, dtype: str) -> bytes:
    """Float32 values as bytes of F32, BF16 (to nearest even) or F16."""
    values = np.ascontiguousarray(values).reshape(-1)
    if dtype == "BF16":
        return to_bfloat16(values).tobytes()
    return values.tobytes() if dtype == "F32" else values.astype("<f2").tobytes()


class DenseTensors:
    """Tensors of a dense export.

    dtype  of dequantised weights: F32, or BF16, under which an unquantised tensor keeps its stored dtype: rounding it would
           lose what the source had
    """

    def __init__(self, canonical: Canonical, reader: Reader, dtype: str) -> None:
        self.canonical, self.reader, self.dtype, self.hub = canonical, reader, dtype, HubNames(canonical)

    def plain(self, name: str, tensor: str, rows: Rows | None = None, shape: tuple[int, ...] | None = None) -> Output:
        """An unquantised tensor, or rows of it (its last axis is that of the columns, all others are rows)."""
        info = self.reader.info(tensor)
        whole = info.shape if shape is None else shape
        parts = rows or ((0, info.shape[0] if info.shape else 1),)
        width = math.prod(whole) // max(1, sum(stop - start for start, stop in parts))
        kept = self.dtype if self.dtype == "F32" and info.dtype in DENSE_DTYPES else info.dtype

        def pieces() -> Iterator[bytes | memoryview]:
            for start, stop in parts:
                for first, last in spans(start, stop, width):
                    if kept == info.dtype:
                        yield self.reader.stored(tensor, width, first, last)
                    else:
                        yield encoded(self.reader.rows(tensor, width, first, last), kept)

        return Output(self.hub(name), kept, whole, pieces)

    def weight(self, name: str, module: str, rows: Rows, shape: tuple[int, ...]) -> Output:
        """Rows of a module's weight, quantised or not, under the name of a tensor."""
        spec = self.canonical.config.modules.get(module)
        if spec is None:
            return self.plain(name, f"{module}.weight", rows, shape)
        tall = spec.tall()

        def pieces() -> Iterator[bytes]:
            for start, stop in rows:
                for first, last in spans(start, stop, tall.shape[1]):
                    yield encoded(self.reader.decoded(module, tall, first, last), self.dtype)

        return Output(self.hub(name), self.dtype, shape, pieces)

    def projection(self, p: Projection) -> Iterator[Output]:
        """The weight of a projection, and its bias if it has one."""
        spec = self.canonical.config.modules.get(p.module)
        columns = spec.shape[1] if spec is not None else self.reader.info(f"{p.module}.weight").shape[-1]
        yield self.weight(f"{p.name}.weight", p.module, ((p.start, p.stop),), (p.stop - p.start, columns))
        yield from self.bias(p)

    def bias(self, p: Projection) -> Iterator[Output]:
        """The bias of a projection, if it has one."""
        item = p.placed.item
        if isinstance(item, Linear) and item.bias and f"{p.module}.bias" in self.canonical.tensors:
            yield self.plain(f"{p.name}.bias", f"{p.module}.bias", ((p.start, p.stop),), (p.stop - p.start,))

    def placed(self, placed: Placed) -> Iterator[Output]:
        """The tensors of a module or parameter, as the family's hub checkpoints have them."""
        tensors, item = self.canonical.tensors, placed.item
        if not isinstance(item, Linear):
            if placed.name in tensors:
                yield self.plain(placed.name, placed.name)
            return
        apart = self.canonical.config.unfused.get(placed.name, ())
        sizes = [sum(n or 0 for _, n in partitions) for _, partitions in placed.shards]
        if placed.experts is not None and item.export == "stacked" and not apart:
            shape = (placed.experts, sum(sizes), placed.columns or 0)
            yield self.weight(placed.name, placed.name, ((0, placed.experts * sum(sizes)),), shape)
        elif placed.experts is not None and item.export == "projection" and not apart:
            for position, (shard, _) in enumerate(placed.shards):
                first, size = sum(sizes[:position]), sizes[position]
                rows = [(e * sum(sizes) + first, e * sum(sizes) + first + size) for e in range(placed.experts)]
                name = f"{placed.parent.rpartition('.')[0]}.{shard.rpartition('.')[2]}.weight"
                yield self.weight(name, placed.name, rows, (placed.experts, size, placed.columns or 0))
        else:
            for p in projections(self.canonical, placed):
                yield from self.projection(p)


def dense_outputs(canonical: Canonical, reader: Reader, dtype: str) -> Iterable[Output]:
    """Every exported tensor, in the order of the model.  KV and input scales have no meaning in a dense checkpoint.

    `dtype`: F32 or BF16, of dequantised weights.
    """
    tensors = DenseTensors(canonical, reader, dtype)
    return (output for placed in canonical.placed for output in tensors.placed(placed))

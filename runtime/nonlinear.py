"""What stands between two projections: records, so that kernels know which one they are to compute, and whom it feeds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.table import ACTIVATE, FEW_TOKENS, module_for
from runtime.layers import Linear, QuantizedLinear


@dataclass(frozen=True)
class SwiGLU:
    """`silu(gate) * up`; with a limit, `min(silu(gate), limit) * clamp(up, -limit, limit)`."""

    inputs: ClassVar[int] = 2
    limit: float | None = None

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Both of one shape, which the result has too."""
        if self.limit is None:
            return F.silu(gate) * up
        return F.silu(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class ReLU2:
    """`max(up, 0)` squared."""

    inputs: ClassVar[int] = 1

    def __call__(self, up: Tensor) -> Tensor:
        """Keeps the shape."""
        return F.relu(up).square()


@dataclass(frozen=True)
class OutputGate:
    """`y * sigmoid(gate)` of attention, heads side by side."""

    inputs: ClassVar[int] = 2

    def __call__(self, y: Tensor, gate: Tensor) -> Tensor:
        """`[B, heads, T, D]` twice, or one gate per head, to `[B, T, heads * D]`."""
        return (y * torch.sigmoid(gate)).transpose(1, 2).flatten(2)


swiglu, relu2, output_gate = SwiGLU(), ReLU2(), OutputGate()


class Feeding:
    """One of the functions above, whose result `reader` takes as it is.

    Few tokens in bfloat16 go to a kernel where `kernels.table` has one for the device: one launch, in which they are also
    quantised if the reader is a quantised layer.
    """

    def __init__(self, function: Callable[..., Tensor], reader: Linear) -> None:
        self.function, self.reader = function, reader

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function returns."""
        rows = inputs[0].numel() // self.reader.shape[1]
        if not 0 < rows <= FEW_TOKENS or any(x.dtype != torch.bfloat16 for x in inputs) or self._kernel is None:
            return self.function(*inputs)
        if not isinstance(self.reader, QuantizedLinear) or (how := self.reader.input_kind) is None:
            y: Tensor = self._kernel(inputs).y
            return y
        done = self._kernel(inputs, *how)
        self.reader.leave(done.y, done.codes, done.scales)
        return done.y

    @functools.cached_property
    def _kernel(self) -> Callable[..., Any] | None:
        module = module_for(ACTIVATE, "activation", self.reader.weight.device)
        return None if module is None else module.prepare(self.function)

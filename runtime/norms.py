"""RMS normalisation, in the forms that differ in where they round.  All compute in float32.

Rounding order from transformers 5.23: `Qwen3RMSNorm`, `Qwen3_5RMSNorm`, `Qwen3_5RMSNormGated`, `NemotronHRMSNorm`,
`NemotronHRMSNormGated`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.experts import Experts
from runtime.kernels.table import FEW_TOKENS, NORM, module_for
from runtime.layers import QuantizedLinear, stored


def _normalized(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@dataclass(frozen=True, slots=True)
class Parts:
    """`routed + shared`, or `routed + sigmoid(gate) * shared`, before it is added up: a norm does that in the same launch.

    All of one dtype; `[..., H]`, the gate `[..., 1]`.
    """

    routed: Tensor
    shared: Tensor
    gate: Tensor | None = None

    def total(self) -> Tensor:
        """The sum."""
        return self.routed + (self.shared if self.gate is None else torch.sigmoid(self.gate) * self.shared)


Delta = Tensor | Parts  # what a layer adds to the residual


def total(x: Tensor, delta: Delta) -> Tensor:
    """`x + delta`."""
    return x + (delta.total() if isinstance(delta, Parts) else delta)


class RMSNorm(nn.Module):
    """`x / rms(x)`, rounded to the dtype of `x`, times `weight`.  Over the last axis, `[..., size]`.

    Bfloat16 goes to a kernel where `kernels.table` has one for the device.
    """

    form: ClassVar[int] = 0  # of `kernels.rms_norm`

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = stored(size)
        self.eps = eps
        self._readers: tuple[QuantizedLinear | Experts, ...] = ()

    def feeds(self, *readers: object) -> None:
        """Say what is called with the output itself: few tokens are quantised here, for the first that is quantised and for
        those that quantise alike."""
        self._readers = tuple(reader for reader in readers if isinstance(reader, (QuantizedLinear, Experts)))

    def forward(self, x: Tensor) -> Tensor:
        """Keeps shape and dtype."""
        return self._in_one_launch(x, None)[1] if self._takes(x) else self._normalize(x)

    def after_sum(self, x: Tensor, delta: Delta | None) -> tuple[Tensor, Tensor]:
        """`x + delta` and its norm; all of one shape and dtype.  None: nothing has to be added."""
        if delta is None:
            return x, self(x)
        first = delta.routed if isinstance(delta, Parts) else delta
        if self._takes(x) and x.dtype == first.dtype and x.shape == first.shape:
            return self._in_one_launch(x, delta)
        x = total(x, delta)
        return x, self(x)

    def _normalize(self, x: Tensor) -> Tensor:
        return (self.weight * _normalized(x, self.eps).to(x.dtype)).to(x.dtype)

    def _takes(self, x: Tensor) -> bool:
        return x.dtype == torch.bfloat16 and x.numel() > 0 and self._kernel is not None

    @functools.cached_property
    def _kernel(self) -> Callable[..., Any] | None:
        module = module_for(NORM, "rms norm", self.weight.device)
        return None if module is None else module.prepare(self.weight, self.eps, self.form)

    def _in_one_launch(self, x: Tensor, delta: Delta | None) -> tuple[Tensor, Tensor]:
        assert self._kernel is not None
        ways = [reader.input_kind for reader in self._readers] if x.numel() <= FEW_TOKENS * x.shape[-1] else []
        kind, scale = next(filter(None, ways), (None, None))
        more = (delta.routed, delta.shared, delta.gate) if isinstance(delta, Parts) else (delta, None, None)
        done = self._kernel(x, *more, kind=kind, input_scale=scale)
        for reader, way in zip(self._readers, ways):
            if way is not None and way[0] == kind and way[1] is scale:
                reader.leave(done.y, done.codes, done.scales)
        return x if delta is None else done.summed, done.y


class LateRoundingRMSNorm(RMSNorm):
    """`x / rms(x) * weight`, rounded once."""

    form = 1

    def _normalize(self, x: Tensor) -> Tensor:
        return (_normalized(x, self.eps) * self.weight.float()).to(x.dtype)


class ZeroCenteredRMSNorm(RMSNorm):
    """`x / rms(x) * (1 + weight)`, rounded once."""

    form = 2

    def _normalize(self, x: Tensor) -> Tensor:
        return (_normalized(x, self.eps) * (1.0 + self.weight.float())).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """`RMSNorm` times an activation of a gate, which is taken in float32.  `gate`: "silu" or "sigmoid"."""

    def __init__(self, size: int, eps: float, gate: str) -> None:
        super().__init__(size, eps)
        self.activation: Callable[[Tensor], Tensor] = F.silu if gate == "silu" else torch.sigmoid

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """`x`, `gate`: `[..., size]`; keeps shape and dtype of `x`."""
        normalized = self.weight * _normalized(x, self.eps).to(x.dtype)
        return (normalized * self.activation(gate.float())).to(x.dtype)


class GroupedRMSNorm(RMSNorm):
    """`x * silu(gate)`, each of `groups` equal parts of it divided by its own rms, times `weight`; rounded once."""

    def __init__(self, size: int, eps: float, groups: int) -> None:
        super().__init__(size, eps)
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """`x` of any float dtype, `gate`: `[..., size]`; keeps the shape, in the dtype of `gate`."""
        gated = x.float() * F.silu(gate.float())
        normalized = _normalized(gated.unflatten(-1, (self.groups, -1)), self.eps).flatten(-2)
        return (normalized * self.weight.float()).to(gate.dtype)

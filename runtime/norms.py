"""RMS normalisation, in the forms that differ in where they round.  All compute in float32.

Rounding order from transformers 5.23: `Qwen3RMSNorm`, `Qwen3_5RMSNorm`, `Qwen3_5RMSNormGated`, `NemotronHRMSNorm`,
`NemotronHRMSNormGated`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.layers import stored


def _normalized(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """`x / rms(x)`, rounded to the dtype of `x`, times `weight`.  Over the last axis, `[..., size]`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = stored(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Keeps shape and dtype."""
        return (self.weight * _normalized(x, self.eps).to(x.dtype)).to(x.dtype)


class LateRoundingRMSNorm(RMSNorm):
    """`x / rms(x) * weight`, rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        """Keeps shape and dtype."""
        return (_normalized(x, self.eps) * self.weight.float()).to(x.dtype)


class ZeroCenteredRMSNorm(RMSNorm):
    """`x / rms(x) * (1 + weight)`, rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        """Keeps shape and dtype."""
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

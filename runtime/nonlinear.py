"""What stands between the projections of an MLP.  Records, so that kernels know which one they are to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor


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


swiglu, relu2 = SwiGLU(), ReLU2()

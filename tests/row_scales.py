"""`torch._scaled_mm` with a scale per row, for CPUs whose torch (2.11) knows only one scale per matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The same in float64."""
    assert scale_a.shape == (len(a), 1)
    assert scale_b.shape == (1, b.shape[1])
    return ((a.double() @ b.double()) * scale_a * scale_b).to(out_dtype)


def provide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put `scaled_mm` in the place of torch's where that refuses."""
    codes = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(codes, codes.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)

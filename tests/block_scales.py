"""`torch.nn.functional.scaled_mm` with scales per block, which CPUs have not, in float64.

Shapes and strides go through torch's own checks first, on the meta device; what those leave to the GPU is asserted here.
Sources: torch's `_scaled_mm_v2` for CUDA and its tests, cuBLAS "1D block scaling factors layout".
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from canonical import E2M1
from torch import Tensor
from torch.nn.functional import ScalingType

FLOAT4 = torch.float4_e2m1fn_x2
checks = F.scaled_mm


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Any, recipe_a: Any, scale_b: Any, recipe_b: Any, *,
    output_dtype: torch.dtype, swizzle_a: Any = None, swizzle_b: Any = None,
) -> Tensor:  # fmt: skip
    """`[M, N]` of `a` `[M, K]` and `b` `[K, N]`, packed or not."""
    swizzles = {} if swizzle_a is None else {"swizzle_a": swizzle_a, "swizzle_b": swizzle_b}
    checks(meta(a), meta(b), meta(scale_a), recipe_a, meta(scale_b), recipe_b, output_dtype=output_dtype, **swizzles)
    assert b.shape[1] % 16 == 0
    if a.dtype == FLOAT4:
        assert a.shape[1] * 2 % 32 == 0
        left, right = (decoded(codes, *scale) for codes, scale in ((a, scale_a), (b.t(), scale_b)))
    else:
        assert (recipe_a, recipe_b) == (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
        assert len(a) % 4 == 0
        left = a.double() * scale_a.double().repeat_interleave(128, 1)
        right = b.t().double() * scale_b.t().double()[:, : len(b) // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (left @ right.T).to(output_dtype)


def decoded(codes: Tensor, scales: Tensor, outer: Tensor) -> Tensor:
    """Float64 `[rows, K]` of packed codes `[rows, K / 2]`, swizzled block scales, and a global scale."""
    assert outer.dtype == torch.float32
    assert outer.numel() == 1
    packed = codes.view(torch.uint8).long()
    values = torch.from_numpy(E2M1).double()[torch.stack([packed & 15, packed >> 4], -1).flatten(1)]
    row, group = torch.arange(len(values))[:, None], torch.arange(values.shape[1] // 16)[None, :]
    tiles = -(-values.shape[1] // 64)
    at = (row // 128 * tiles + group // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    assert scales.dtype == torch.float8_e4m3fn
    return values * scales.float()[at].double().repeat_interleave(16, 1) * outer.double()


def meta(tensors: Any) -> Any:
    """The same shapes, strides and dtypes without contents."""
    if isinstance(tensors, list):
        return [meta(tensor) for tensor in tensors]
    return torch.empty_strided(tensors.shape, tensors.stride(), dtype=tensors.dtype, device="meta")


def provide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put `scaled_mm` in the place of torch's."""
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)

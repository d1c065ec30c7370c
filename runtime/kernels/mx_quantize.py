"""Inputs in the MX formats: the values that E4M3 or E2M1 codes with a power of two per 32 inputs stand for.

    mxfp8   s = amax / 448 rounded up to a power of two,      result = e4m3(x / s) s
    mxfp4   s = 2**(floor(log2(amax 8 / 7)) - 2),             result = e2m1(x / s) s

A code times a power of two is exact in bfloat16, so the result takes the place of the input.  Equals
`runtime.activations.fake_quantize`, but for results below the least normal bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.format import MX_GROUP
from runtime.kernels.fp8_quantize import power_of_two_above, round_to_e4m3
from runtime.kernels.nvfp4_quantize import round_to_e2m1

GROUPS_AT_ONCE = 32  # groups of 32 inputs per program


@triton.jit
def mx_values(values: tl.tensor, GROUPS: tl.constexpr, E2M1: tl.constexpr) -> tl.tensor:
    """What float32 `[GROUPS, 32]` become, still in float32."""
    amax = tl.max(tl.abs(values), 1)
    if E2M1:
        bits = amax.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) >= 0x600000, 1, 0) - 2  # 1.75 and above would round to 8
        scale = tl.where(exponent > 0, exponent << 23, 0x400000).to(tl.float32, bitcast=True)  # 2**-127 is the least
        values = round_to_e2m1(tl.div_rn(values, scale[:, None] + tl.zeros_like(values)))
    else:
        scale = power_of_two_above(tl.div_rn(amax, tl.full((GROUPS,), 448.0, tl.float32)))
        values = tl.div_rn(values, scale[:, None] + tl.zeros_like(values))
        values = round_to_e4m3(tl.minimum(tl.maximum(values, -448.0), 448.0))
    return values * scale[:, None]


@triton.jit
def mx_quantize_kernel(x: tl.tensor, out: tl.tensor, K: tl.constexpr, GROUPS: tl.constexpr, E2M1: tl.constexpr) -> None:
    """Program (m, g): `GROUPS` groups of token m."""
    token = tl.program_id(0).to(tl.int64)
    at = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[:, None] * 32 + tl.arange(0, 32)[None, :]
    values = tl.load(x + token * K + at, mask=at < K, other=0.0).to(tl.float32)
    values = mx_values(values, GROUPS, E2M1)
    tl.store(out + token * K + at, values.to(out.dtype.element_ty), mask=at < K)


def quantize(x: Tensor, kind: str) -> Tensor:
    """Bfloat16 `[M, K]`: the values above for `x` `[M, K]`, contiguous, bfloat16 or float32; `kind`: "mxfp8" or "mxfp4"."""
    M, K = x.shape
    assert x.is_contiguous()
    out = torch.empty(M, K, dtype=torch.bfloat16, device=x.device)
    mx_quantize_kernel[(M, -(-K // (MX_GROUP * GROUPS_AT_ONCE)))](x, out, K, GROUPS_AT_ONCE, kind == "mxfp4")
    return out

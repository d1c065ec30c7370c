"""Inputs as NVFP4 values without their global scale: exactly what a GEMM with quantised inputs multiplies.

    b = e4m3(amax of 16 inputs / 6 / s),  code = e2m1(x / (b s)),  result = code * b

`s` is the stored `input_scale`.  A code times a block scale has at most 6 significant bits and is exact in bfloat16, so the
result takes the place of the input, and `s` is applied to the sum.  Equals `runtime.activations.fake_quantize` up to that
factor; quotients are correctly rounded float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.format import NVFP4_GROUP
from runtime.kernels.fp8_quantize import round_to_e4m3

GROUPS_AT_ONCE = 64  # groups of 16 inputs per program


@triton.jit
def round_to_e2m1(x: tl.tensor) -> tl.tensor:
    """The nearest E2M1 value, ties to the even code, saturating at 6.  Float32 to float32."""
    size = tl.minimum(tl.abs(x), 6.0)
    step = tl.where(size < 2, 0.5, tl.where(size < 4, 1.0, 2.0))  # between neighbours; dividing by it is exact
    size = ((size / step + 12582912.0) - 12582912.0) * step  # 1.5 * 2**23: what is left are integers
    return tl.where(x < 0, -size, size)


@triton.jit
def quantize_kernel(
    x: tl.tensor, out: tl.tensor, input_scale: tl.tensor, chosen: tl.tensor,
    K: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (m, g): `GROUPS` groups of 16 inputs of row m of the result, which is row m // `SHARED` of `x`.

    `input_scale`: `[1]`, or with `chosen` `[M]` one per expert.
    """
    token = tl.program_id(0).to(tl.int64)
    at = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[:, None] * 16 + tl.arange(0, 16)[None, :]
    values = tl.load(x + token // SHARED * K + at, mask=at < K, other=0.0).to(tl.float32)
    outer = tl.load(input_scale if chosen is None else input_scale + tl.load(chosen + token))
    amax = tl.max(tl.abs(values), 1)
    inner = round_to_e4m3(tl.minimum(tl.div_rn(tl.div_rn(amax, tl.full((GROUPS,), 6.0, tl.float32)), outer), 448.0))
    scale = inner * outer
    codes = round_to_e2m1(tl.div_rn(values, tl.where(scale == 0, 1.0, scale)[:, None]))
    tl.store(out + token * K + at, (codes * inner[:, None]).to(out.dtype.element_ty), mask=at < K)


def quantize(x: Tensor, input_scale: Tensor) -> Tensor:
    """Bfloat16 `[M, K]`: the values above for `x` `[M, K]`, contiguous, bfloat16 or float32; `input_scale` float32 `[1]`."""
    M, K = x.shape
    assert x.is_contiguous()
    out = torch.empty(M, K, dtype=torch.bfloat16, device=x.device)
    grid = (M, -(-K // (NVFP4_GROUP * GROUPS_AT_ONCE)))
    quantize_kernel[grid](x, out, input_scale, None, K, GROUPS_AT_ONCE, 1)
    return out


def quantize_for_experts(x: Tensor, input_scale: Tensor, chosen: Tensor) -> Tensor:
    """Bfloat16 `[S, K]`: rows of `x` `[S / n, K]`, each n times, by the scales `[E]` of the experts `chosen`, int64 `[S]`."""
    slots, K = chosen.numel(), x.shape[1]
    out = torch.empty(slots, K, dtype=torch.bfloat16, device=x.device)
    grid = (slots, -(-K // (NVFP4_GROUP * GROUPS_AT_ONCE)))
    quantize_kernel[grid](x, out, input_scale, chosen, K, GROUPS_AT_ONCE, slots // len(x))
    return out

"""Inputs as NVFP4 values without their global scale: exactly what a GEMM with quantised inputs multiplies.

    b = e4m3(amax of 16 inputs / 6 / s),  code = e2m1(x / (b s)),  result = code * b

`s` is the stored `input_scale`.  A code times a block scale has at most 6 significant bits and is exact in bfloat16, so the
result takes the place of the input, and `s` is applied to the sum.  Equals `runtime.activations.fake_quantize` up to that
factor; quotients are correctly rounded float32.  For tensor cores that multiply FP4, codes and block scales as they are:
`quantize_packed`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.format import NVFP4_GROUP
from runtime.kernels.fp8_quantize import round_to_e4m3

GROUPS_AT_ONCE = 64  # groups of 16 inputs per program
SQUARE = 8  # rows, and groups of each, per program: their scales lie close together


@triton.jit
def round_to_e2m1(x: tl.tensor) -> tl.tensor:
    """The nearest E2M1 value, ties to the even code, saturating at 6.  Float32 to float32."""
    size = tl.minimum(tl.abs(x), 6.0)
    step = tl.where(size < 2, 0.5, tl.where(size < 4, 1.0, 2.0))  # between neighbours; dividing by it is exact
    size = ((size / step + 12582912.0) - 12582912.0) * step  # 1.5 * 2**23: what is left are integers
    return tl.where(x < 0, -size, size)


@triton.jit
def two_levels(values: tl.tensor, outer: tl.tensor, GROUPS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Float32 `[GROUPS, 16]`: E2M1 values of the inputs; and `[GROUPS]`: E4M3 scales below the global scale `outer`."""
    amax = tl.max(tl.abs(values), 1)
    inner = round_to_e4m3(tl.minimum(tl.div_rn(tl.div_rn(amax, tl.full((GROUPS,), 6.0, tl.float32)), outer), 448.0))
    scale = inner * outer
    return round_to_e2m1(tl.div_rn(values, tl.where(scale == 0, 1.0, scale)[:, None])), inner


@triton.jit
def by_nibble(values: tl.tensor, GROUPS: tl.constexpr) -> tl.tensor:
    """`[GROUPS, 16]` in the order of `nvfp4_wide`: of each 128 inputs all that meet the lowest nibble of a word come first."""
    return tl.reshape(tl.permute(tl.reshape(values, (GROUPS // 8, 16, 8)), (0, 2, 1)), (GROUPS, 16))


@triton.jit
def quantize_kernel(
    x: tl.tensor, out: tl.tensor, input_scale: tl.tensor, chosen: tl.tensor,
    K: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr, BY_NIBBLE: tl.constexpr,
) -> None:  # fmt: skip
    """Program (m, g): `GROUPS` groups of 16 inputs of row m of the result, which is row m // `SHARED` of `x`.

    `input_scale`: `[1]`, or with `chosen` `[M]` one per expert.  `BY_NIBBLE`: rows of the result as `nvfp4_wide` takes them.
    """
    token = tl.program_id(0).to(tl.int64)
    at = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[:, None] * 16 + tl.arange(0, 16)[None, :]
    values = tl.load(x + token // SHARED * K + at, mask=at < K, other=0.0).to(tl.float32)
    outer = tl.load(input_scale if chosen is None else input_scale + tl.load(chosen + token))
    codes, inner = two_levels(values, outer, GROUPS)
    result = (codes * inner[:, None]).to(out.dtype.element_ty)
    if BY_NIBBLE:
        width: tl.constexpr = (K + 127) // 128 * 128
        tl.store(out + token * width + at, by_nibble(result, GROUPS), mask=at < width)
    else:
        tl.store(out + token * K + at, result, mask=at < K)


@triton.jit
def quantize_packed_kernel(
    x: tl.tensor, codes: tl.tensor, scales: tl.tensor, input_scale: tl.tensor, M: tl.tensor,
    K: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
) -> None:  # fmt: skip
    """Program (m, g): `GROUPS` groups of 16 inputs of each of `ROWS` rows, which are zeros from row `M` on.

    `codes`: uint8 `[., K / 2]`, low nibble first.  `scales`: E4M3, where `scaled_mm_nvfp4` says.
    """
    each = tl.arange(0, ROWS * GROUPS)
    token = tl.program_id(0) * ROWS + each // GROUPS
    group = tl.program_id(1) * GROUPS + each % GROUPS
    row = token.to(tl.int64)[:, None]
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    values = tl.load(x + row * K + at, mask=(at < K) & (row < M), other=0.0).to(tl.float32)
    value, inner = two_levels(values, tl.load(input_scale), ROWS * GROUPS)
    size = tl.abs(value)  # 0, 0.5, 1, 1.5, 2, 3, 4, 6 are codes 0 to 7
    code = tl.where(size < 2, size * 2, tl.where(size < 4, size + 2, size * 0.5 + 4)).to(tl.int32)
    code |= tl.where(value < 0, 8, 0)
    low, high = tl.split(tl.reshape(code, (ROWS * GROUPS, 8, 2)))
    byte = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(codes + row * (K // 2) + byte, (low | (high << 4)).to(tl.uint8), mask=byte < K // 2)
    tiles: tl.constexpr = (K // 16 + 3) // 4
    place = (token // 128 * tiles + group // 4) * 512 + token % 32 * 16 + token % 128 // 32 * 4 + group % 4
    tl.store(scales + place, inner.to(tl.float8e4nv), mask=group < tiles * 4)


def quantize(x: Tensor, input_scale: Tensor) -> Tensor:
    """Bfloat16 `[M, K]`: the values above for `x` `[M, K]`, contiguous, bfloat16 or float32; `input_scale` float32 `[1]`."""
    M, K = x.shape
    assert x.is_contiguous()
    out = torch.empty(M, K, dtype=torch.bfloat16, device=x.device)
    grid = (M, -(-K // (NVFP4_GROUP * GROUPS_AT_ONCE)))
    quantize_kernel[grid](x, out, input_scale, None, K, GROUPS_AT_ONCE, 1, False)
    return out


def quantize_for_experts(x: Tensor, input_scale: Tensor, chosen: Tensor, wide: bool = False) -> Tensor:
    """Bfloat16 `[S, K]`: rows of `x` `[S / n, K]`, each n times, by the scales `[E]` of the experts `chosen`, int64 `[S]`.

    `wide`: in the order of `nvfp4_wide`, with K rounded up to 128.
    """
    slots, K = chosen.numel(), x.shape[1]
    out = torch.empty(slots, -(-K // 128) * 128 if wide else K, dtype=torch.bfloat16, device=x.device)
    grid = (slots, -(-K // (NVFP4_GROUP * GROUPS_AT_ONCE)))
    quantize_kernel[grid](x, out, input_scale, chosen, K, GROUPS_AT_ONCE, slots // len(x), wide)
    return out


def quantize_packed(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[M', K / 2]`, low nibble first, and block scales E4M3 `[M' * ceil(K / 64) * 4]` for `scaled_mm_nvfp4`.

    `x`: `[M, K]`, contiguous, bfloat16 or float32; `input_scale`: float32 `[1]`.  M' is M rounded up to a multiple of 128:
    rows of zeros follow.
    """
    M, K = x.shape
    assert x.is_contiguous()
    rows = -(-M // 128) * 128
    codes = torch.empty(rows, K // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows * -(-K // 64) * 4, dtype=torch.float8_e4m3fn, device=x.device)
    grid = (rows // SQUARE, -(-K // (NVFP4_GROUP * SQUARE)))
    quantize_packed_kernel[grid](x, codes, scales, input_scale, M, K, SQUARE, SQUARE)
    return codes, scales

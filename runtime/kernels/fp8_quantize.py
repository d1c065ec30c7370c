"""Inputs as E4M3 codes and float32 scales, in the ways that `format.ACTIVATIONS` names.

    fp8_static      code = e4m3(x / s)            s stored, `[1]`
    fp8_tensor      the same,                     s = amax over the whole input / 448, `[1]`
    fp8_token       the same per token,           s = amax / 448, `[M]`
    fp8_group       the same per 128 inputs,      s = amax / 448, `[M, ceil(K / 128)]`
    fp8_group_e8m0  the same,                     s rounded up to a power of two

Quotients are correctly rounded float32 and codes are rounded to nearest, ties to even, after clamping to 448: bit for bit
`runtime.activations.fake_quantize`, which is the reference.  The rounding to three mantissa bits is done in float32 first,
so that the cast itself is exact: casts differ between GPUs, torch versions and the interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.format import FP8_BLOCK, FP8_MAX

KINDS = ("fp8_static", "fp8_tensor", "fp8_token", "fp8_group", "fp8_group_e8m0")
GROUPS_AT_ONCE = 8  # groups of 128 inputs per program
TOKEN_STEP = 4096  # inputs that a program takes at a time for a scale per token


@triton.jit
def round_to_e4m3(x: tl.tensor) -> tl.tensor:
    """Float32 within +-448 to the nearest E4M3 value, ties to even, still in float32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # 3 of 23 mantissa bits stay
    tiny = (tl.abs(x) + 16384.0) - 16384.0  # below 2**-6 steps are 2**-9, the last bit of numbers from 2**14
    tiny = tl.where(x < 0, -tiny, tiny)
    return tl.where(tl.abs(x) < 0.015625, tiny, normal.to(tl.float32, bitcast=True))


@triton.jit
def to_codes(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """`e4m3(x / scale)`, a scale of 0 dividing as 1."""
    quotient = tl.div_rn(x, tl.where(scale == 0, 1.0, scale))
    return round_to_e4m3(tl.minimum(tl.maximum(quotient, -448.0), 448.0)).to(tl.float8e4nv)


@triton.jit
def power_of_two_above(scale: tl.tensor) -> tl.tensor:
    """The smallest power of two that is not below `scale`, at least 2**-127, the least E8M0 value; 1 for 0."""
    bits = scale.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
    bits = tl.where(exponent > 0, exponent << 23, 0x400000)
    return tl.where(scale == 0, 1.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def quantize_groups_kernel(
    x: tl.tensor, codes: tl.tensor, scales: tl.tensor, chosen: tl.tensor,
    K: tl.constexpr, GROUPS: tl.constexpr, STATIC: tl.constexpr, E8M0: tl.constexpr, SHARED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (m, g): `GROUPS` groups of 128 inputs of row m of the result, which is row m // `SHARED` of `x`.

    `STATIC`: `scales` is read, else written: `[1]`, or with `chosen` `[M]` one per expert.
    """
    token = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    values = tl.load(x + (token // SHARED).to(tl.int64) * K + at, mask=at < K, other=0.0).to(tl.float32)
    if STATIC:
        expert = 0 if chosen is None else tl.load(chosen + token)
        scale = tl.load(scales + expert + 0 * group)
    else:
        scale = tl.div_rn(tl.max(tl.abs(values), 1), tl.full((GROUPS,), 448.0, tl.float32))
        if E8M0:
            scale = power_of_two_above(scale)
        columns: tl.constexpr = (K + 127) // 128
        tl.store(scales + token * columns + group, scale, mask=group < columns)
    tl.store(codes + token.to(tl.int64) * K + at, to_codes(values, scale[:, None]), mask=at < K)


@triton.jit
def quantize_tokens_kernel(x: tl.tensor, codes: tl.tensor, scales: tl.tensor, K: tl.constexpr, STEP: tl.constexpr) -> None:
    """Program m: token m, read twice; the second time it comes from cache."""
    token = tl.program_id(0)
    at = tl.arange(0, STEP)
    x += token.to(tl.int64) * K
    codes += token.to(tl.int64) * K
    amax = tl.zeros((STEP,), tl.float32)
    for start in range(0, K, STEP):
        amax = tl.maximum(amax, tl.abs(tl.load(x + start + at, mask=start + at < K, other=0.0).to(tl.float32)))
    scale = tl.div_rn(tl.max(amax, 0), 448.0)
    tl.store(scales + token, scale)
    for start in range(0, K, STEP):
        values = tl.load(x + start + at, mask=start + at < K, other=0.0).to(tl.float32)
        tl.store(codes + start + at, to_codes(values, scale), mask=start + at < K)


def quantize(
    x: Tensor, kind: str, input_scale: Tensor | None = None, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x` `[M, K]`, bfloat16 or float32, contiguous.

    `kind`: one of `KINDS`; `input_scale`: float32 `[1]`, for `fp8_static`.  Returns codes `[M, K]`, E4M3 or a wider
    `dtype`, and float32 scales of the shape that the table above gives.  Reads nothing back to the host.
    """
    M, K = x.shape
    assert x.is_contiguous()
    codes = torch.empty(M, K, dtype=dtype, device=x.device)
    if kind == "fp8_token":
        scales = torch.empty(M, dtype=torch.float32, device=x.device)
        step = min(TOKEN_STEP, triton.next_power_of_2(K))
        quantize_tokens_kernel[(M,)](x, codes, scales, K, step, num_warps=8)
        return codes, scales
    static = kind in ("fp8_static", "fp8_tensor")
    groups = -(-K // FP8_BLOCK)
    if kind == "fp8_static":
        assert input_scale is not None
        scales = input_scale
    elif kind == "fp8_tensor":
        scales = (x.abs().amax().float() / FP8_MAX).reshape(1)
    else:
        scales = torch.empty(M, groups, dtype=torch.float32, device=x.device)
    grid = (M, -(-groups // GROUPS_AT_ONCE))
    quantize_groups_kernel[grid](x, codes, scales, None, K, GROUPS_AT_ONCE, static, kind == "fp8_group_e8m0", 1)
    return codes, scales


def quantize_for_experts(x: Tensor, input_scale: Tensor, chosen: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Codes `[S, K]`: rows of `x` `[S / n, K]`, each n times, by the scales `[E]` of the experts `chosen`, int64 `[S]`."""
    slots, K = chosen.numel(), x.shape[1]
    codes = torch.empty(slots, K, dtype=dtype, device=x.device)
    grid = (slots, -(-K // (FP8_BLOCK * GROUPS_AT_ONCE)))
    quantize_groups_kernel[grid](x, codes, input_scale, chosen, K, GROUPS_AT_ONCE, True, False, slots // len(x))
    return codes

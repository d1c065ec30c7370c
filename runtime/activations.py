"""Quantise a layer's input and dequantise it again, as the names of `format.ACTIVATIONS` say.

All functions take and return float32 and keep the shape `[..., K]`.  A result is `code * scale` with both factors exact,
so a float32 matmul on it is the arithmetic of a quantised GEMM up to the order of summation.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.format import E2M1_VALUES, FP8_BLOCK, FP8_MAX, MX_GROUP, NVFP4_GROUP

E2M1_MAX = E2M1_VALUES[-1]


def fake_quantize(x: Tensor, kind: str, input_scale: Tensor | None = None) -> Tensor:
    """Quantise and dequantise `x`, float32 `[..., K]`, in the way that `kind`, a key of `format.ACTIVATIONS`, names.

    `input_scale`: float32 with one element, the stored multiplier; only for the kinds that store one.
    """
    match kind:
        case "fp8_static":
            assert input_scale is not None
            return fp8(x, input_scale)
        case "fp8_tensor":
            return fp8(x, x.abs().amax() / FP8_MAX)
        case "fp8_token":
            return fp8(x, x.abs().amax(-1, keepdim=True) / FP8_MAX)
        case "fp8_group":
            groups = _split(x, FP8_BLOCK)
            return _join(fp8(groups, _amax(groups) / FP8_MAX), x)
        case "fp8_group_e8m0":
            groups = _split(x, FP8_BLOCK)
            return _join(fp8(groups, _power_of_two_above(_amax(groups) / FP8_MAX)), x)
        case "nvfp4":
            assert input_scale is not None
            return _nvfp4(x, input_scale)
        case "mxfp8":
            groups = _split(x, MX_GROUP)
            return _join(fp8(groups, _power_of_two_above(_amax(groups) / FP8_MAX)), x)
        case "mxfp4":
            groups = _split(x, MX_GROUP)
            scale = _e2m1_power_of_two(_amax(groups))
            return _join(round_to_e2m1(groups / scale) * scale, x)
    raise AssertionError(f"unknown activation kind {kind}")


def fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Round `x / scale` to E4M3 and multiply by `scale` again.  Float32; `scale` broadcasts; 0 gives 0.

    Clamped before the cast: torch before 2.12 turns values beyond 448 into NaN instead of saturating.
    """
    divisor = torch.where(scale == 0, 1.0, scale)
    codes = (x / divisor).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.float() * scale


def round_to_e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 value, ties to the even code, saturating at 6.  Float32 to float32."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))  # distance between neighbours
    return ((x / step).round() * step).clamp(-E2M1_MAX, E2M1_MAX)


def _nvfp4(x: Tensor, input_scale: Tensor) -> Tensor:
    """Two levels: an E4M3 scale per 16 inputs below the stored global one.  Blocks that round to scale 0 become 0."""
    blocks = _split(x, NVFP4_GROUP)
    block_scale = (_amax(blocks) / E2M1_MAX / input_scale).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float()
    scale = block_scale * input_scale
    return _join(round_to_e2m1(blocks / torch.where(scale == 0, 1.0, scale)) * scale, x)


def _split(x: Tensor, size: int) -> Tensor:
    """`[..., K]` to `[..., ceil(K / size), size]`, zeros in the place of missing inputs."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _join(groups: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_split`: `[..., groups, size]` back to the shape of `like`."""
    return groups.flatten(-2)[..., : like.shape[-1]]


def _amax(groups: Tensor) -> Tensor:
    return groups.abs().amax(-1, keepdim=True)


@functools.cache
def e8m0_table(device: torch.device) -> Tensor:
    """Float32 `[256]`: the value of each E8M0 byte, exact; 255 is NaN."""
    return torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [math.nan], device=device)


def _e2m1_power_of_two(amax: Tensor) -> Tensor:
    """`2**(floor(log2(amax * 8 / 7)) - 2)`, exact, within the range of E8M0: `amax / scale` is below 7, which rounds to 6.

    Source: compressed-tensors 0.20 `generate_mx_scales`.
    """
    mantissa, exponent = torch.frexp(amax)  # mantissa in [0.5, 1)
    return e8m0_table(amax.device)[(exponent - 1 + (mantissa >= 0.875).int() - 2 + 127).clamp(0, 254)]


def _power_of_two_above(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below `scale`, exact, within the range of E8M0."""
    mantissa, exponent = torch.frexp(scale)
    return e8m0_table(scale.device)[(exponent - (mantissa == 0.5).int() + 127).clamp(0, 254)]

"""What a kernel leaves for the quantised layer that takes its output: the input of that layer, quantised in the same launch.

    codes, scales     of an output that is rounded to bfloat16, bit for bit as the files `*_quantize` make them

A program has a piece of a row, and must need nothing of the others: `room_for` knows for which kinds that is so.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.activations import fake_quantize
from runtime.format import FP8_BLOCK, MX_GROUP, NVFP4_GROUP
from runtime.kernels.fp8_quantize import power_of_two_above, to_codes
from runtime.kernels.mx_quantize import mx_values
from runtime.kernels.nvfp4_quantize import two_levels
from runtime.kernels.tiles import INTERPRETED

# By their numbers in kernels.
KINDS = (None, "fp8_static", "fp8_token", "fp8_group", "fp8_group_e8m0", "nvfp4", "mxfp8", "mxfp4")
# Kind -> inputs that share what is computed of them; a piece of a row must have whole groups.
_GROUPS = {"fp8_static": 1, "fp8_group": FP8_BLOCK, "fp8_group_e8m0": FP8_BLOCK, "nvfp4": NVFP4_GROUP}
_GROUPS |= {"mxfp8": MX_GROUP, "mxfp4": MX_GROUP}
STATIC = ("fp8_static", "nvfp4")  # kinds with a stored scale
_INTERPRETED = tl.constexpr(INTERPRETED)


class Reader(Protocol):
    """The layer that takes an output as it is: a `layers.QuantizedLinear`."""

    @property
    def input_kind(self) -> tuple[str, Tensor | None] | None:
        """How its input is quantised, and the stored scale `[1]`; None if not in one way."""

    def leave(self, x: Tensor, codes: Tensor, scales: Tensor | None) -> None:
        """Hand over codes and scales of the output `x`."""


def room(M: int, K: int, kind: str, input_scale: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Codes and scales for `store_quantized` to fill.  Of a kind with a stored scale, it is `input_scale`, float32 `[1]`; None
    where codes hold it."""
    codes = torch.empty(M, K, dtype=torch.float8_e4m3fn if kind.startswith("fp8") else torch.bfloat16, device=device)
    if kind in STATIC:
        return codes, input_scale
    if not kind.startswith("fp8"):
        return codes, None
    shape = (M,) if kind == "fp8_token" else (M, -(-K // FP8_BLOCK))
    return codes, torch.empty(shape, dtype=torch.float32, device=device)


def room_for(
    reader: Reader | None, M: int, K: int, piece: int, device: torch.device
) -> tuple[str | None, Tensor | None, Tensor | None]:
    """How `reader` wants `[M, K]`, and `room` for it; three times None where `piece` elements of a row do not suffice."""
    kind, scale = (reader.input_kind if reader is not None else None) or (None, None)
    if kind not in _GROUPS or piece % _GROUPS[kind]:
        return None, None, None
    return kind, *room(M, K, kind, scale, device)


def leave(reader: Reader | None, x: Tensor, codes: Tensor | None, scales: Tensor | None) -> None:
    """Hand over what was left in the room for `reader`, if there was any."""
    if reader is not None and codes is not None:
        reader.leave(x, codes, scales)


def codes_error(y: Tensor, codes: Tensor, scales: Tensor | None, kind: str, input_scale: Tensor | None) -> float:
    """Largest difference of what `codes` and `scales` stand for from `y` `[M, K]` quantised, over the largest value."""
    scale = torch.ones(1, device=y.device).double() if scales is None else scales.double()
    if kind in ("fp8_group", "fp8_group_e8m0"):
        scale = scale.repeat_interleave(FP8_BLOCK, 1)[:, : y.shape[1]]
    decoded = codes.double() * (scale.unsqueeze(-1) if kind == "fp8_token" else scale)
    expected = fake_quantize(y.float(), kind, input_scale).double()
    return float((decoded - expected).abs().max() / expected.abs().max())


class Kept:
    """A reader that keeps what is left, for a kernel's cases."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.input_kind = kind, torch.tensor([0.01], device=device) if kind in STATIC else None
        self.left: tuple[Tensor, Tensor, Tensor | None] | None = None

    def leave(self, x: Tensor, codes: Tensor, scales: Tensor | None) -> None:
        """Keep them."""
        self.left = x, codes, scales


def poisoned(shape: torch.Size, kind: str | None, device: torch.device) -> tuple[Tensor, Kept | None]:
    """NaN for a kernel to fill, in float32, or for a reader in bfloat16; and a reader who wants `kind`."""
    if kind is None:
        return torch.full(shape, torch.nan, device=device), None
    return torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device), Kept(kind, device)


def output_errors(out: Tensor, y: Tensor, reader: Kept | None) -> dict[str, float]:
    """Largest errors over the largest value: of the output, which is `y` in float64, for a reader what exceeds one step of
    bfloat16; and of the codes, that must be those of the output: infinite where none were left."""
    difference = (out.double() - y).abs()
    if reader is None:
        return {"output": float(difference.max() / y.abs().max())}
    worst = {"output": float((difference - y.abs() * 2.0**-7).clamp(min=0).max() / y.abs().max()), "codes": torch.inf}
    if reader.left is not None and reader.left[0] is out:
        _, codes, scales = reader.left
        kind, input_scale = reader.input_kind
        worst["codes"] = codes_error(out.flatten(0, -2), codes, scales, kind, input_scale)
    return worst


@triton.jit
def round_to_bf16(x: tl.tensor) -> tl.tensor:
    """Float32 to the nearest bfloat16, ties to even, still in float32.

    One instruction, into the upper half: of a cast there and back LLVM makes arithmetic in bfloat16, and leaves out roundings.
    By integers in the interpreter; on a GPU they would make a zero of its NaN, 0x7FFFFFFF.
    """
    if _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    else:
        asm: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $1, 0f00000000;"
        bits = tl.inline_asm_elementwise(asm, "=r,f", [x], tl.int32, is_pure=True, pack=1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def store_quantized(
    value: tl.tensor, codes: tl.tensor, scales: tl.tensor, row: tl.tensor, first: tl.tensor,
    K: tl.constexpr, piece: tl.tensor, SIZE: tl.constexpr, KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Quantise `piece` elements of row `row` of K, from element `first`: float32 `[SIZE]`, 0 from `piece` on.

    `KIND`: index in `KINDS`; 0 does nothing, and for "fp8_token" the piece is the row.  `scales` is read where it is stored.
    """
    at = tl.arange(0, SIZE)
    codes += row * K + first
    if KIND == 1:
        tl.store(codes + at, to_codes(value, tl.load(scales)), mask=at < piece)
    elif KIND == 2:
        scale = tl.div_rn(tl.max(tl.abs(value), 0), 448.0)
        tl.store(scales + row, scale)
        tl.store(codes + at, to_codes(value, scale), mask=at < piece)
    elif KIND == 3 or KIND == 4:
        groups: tl.constexpr = SIZE // 128
        value = tl.reshape(value, (groups, 128))
        scale = tl.div_rn(tl.max(tl.abs(value), 1), tl.full((groups,), 448.0, tl.float32))
        if KIND == 4:
            scale = power_of_two_above(scale)
        group = tl.arange(0, groups)
        columns: tl.constexpr = (K + 127) // 128
        tl.store(scales + row * columns + first // 128 + group, scale, mask=group * 128 < piece)
        at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        tl.store(codes + at, to_codes(value, scale[:, None]), mask=at < piece)
    elif KIND == 5:
        blocks: tl.constexpr = SIZE // 16
        value, inner = two_levels(tl.reshape(value, (blocks, 16)), tl.load(scales), blocks)
        at = tl.arange(0, blocks)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(codes + at, (value * inner[:, None]).to(codes.dtype.element_ty), mask=at < piece)
    elif KIND > 5:
        parts: tl.constexpr = SIZE // 32
        value = mx_values(tl.reshape(value, (parts, 32)), parts, KIND == 7)
        at = tl.arange(0, parts)[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(codes + at, value.to(codes.dtype.element_ty), mask=at < piece)


@triton.jit
def store_output(
    y: tl.tensor, out: tl.tensor, codes: tl.tensor, scales: tl.tensor, row: tl.tensor, first: tl.tensor,
    K: tl.constexpr, PIECE: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Store a piece of row `row` of `out` `[., K]`, rounded once, and leave it quantised: `store_quantized`."""
    if KIND > 0:
        y = round_to_bf16(y)
    at = tl.arange(0, SIZE)
    tl.store(out + row * K + first + at, y.to(out.dtype.element_ty), mask=at < PIECE)
    if KIND > 0:
        store_quantized(y, codes, scales, row, first, K, PIECE, SIZE, KIND)

"""Linear layers by way of bfloat16: weights are decoded in one pass, a bounded number at a time, then multiplied.

    W' = bf16(value of W)       bit for bit `dequantize(...).to(bfloat16)` of `runtime.layers`
    y  = x' W'^T                x' = x, or the values that its codes stand for, rounded to bfloat16

Decoding reads a weight once and writes two bytes, where torch's own operations go through float32 several times.  From some
hundred tokens on its cost is small beside the matmul's.  NVFP4 inputs keep their global scale out of x', which is then exact,
and bring it in with that of the weights.  Any scheme; also for few tokens where it has no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from runtime.activations import fake_quantize
from runtime.format import ACTIVATIONS as KINDS
from runtime.format import FP8_BLOCK, MX_GROUP, NVFP4_GROUP, ModuleSpec
from runtime.format import SCHEMES as ALL
from runtime.kernels.fp8_linear import input_runs, row_blocks, row_partitions
from runtime.kernels.nvfp4_quantize import quantize as quantize_nvfp4
from runtime.kernels.quantized import round_to_bf16

SCHEMES = tuple(ALL)
ACTIVATIONS: tuple[str | None, ...] = (None, *KINDS)
AT_ONCE = 2**26  # weights: 128 MiB of bfloat16
ROWS, COLUMNS = 16, 256  # per program
GROUPS = {"fp8_block": FP8_BLOCK, "nvfp4": NVFP4_GROUP, "mxfp8": MX_GROUP, "mxfp4": MX_GROUP}  # inputs per scale
PACKED = ("nvfp4", "mxfp4")  # two codes per byte
SCALE_BYTES = {"nvfp4": 1, "mxfp8": 2, "mxfp4": 2}  # 1: E4M3, 2: E8M0; else float32


@triton.jit
def expand_kernel(
    weight: tl.tensor, scale: tl.tensor, scale_row: tl.tensor, outer: tl.tensor, out: tl.tensor, N: tl.tensor,
    K: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr, PACKED: tl.constexpr, BYTES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Program (tile of rows, tile of columns): `out` `[N, K]` of `weight` `[N, K]`, or bytes `[N, K / 2]` if `PACKED`.

    `scale` `[., ceil(K / GROUP)]`: float32, or as `BYTES` says E4M3 (1) or E8M0 (2).  `scale_row` int32 `[N]`: which row of
    it, None for the same.  `EACH`: columns of a tile that share a scale.
    `outer`: float32 `[N]` that multiplies the scale first, or None.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    scales: tl.constexpr = (K + GROUP - 1) // GROUP
    at_scale = row if scale_row is None else tl.load(scale_row + row, mask=inside, other=0)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS // EACH) * EACH) // GROUP
    where = at_scale.to(tl.int64)[:, None] * scales + group[None, :]
    there = inside[:, None] & (group < scales)[None, :]
    if BYTES == 2:
        bits = tl.load(scale + where, mask=there, other=0).to(tl.int32)
        bits = tl.where(bits == 255, 0x7FC00000, tl.where(bits == 0, 0x400000, bits << 23))  # NaN, 2**-127
        factor = bits.to(tl.float32, bitcast=True)
    else:
        factor = tl.load(scale + where, mask=there, other=0.0).to(tl.float32)
    if outer is not None:
        factor *= tl.load(outer + row, mask=inside, other=0.0)[:, None]
    if PACKED:
        byte = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        real = inside[:, None] & (byte < K // 2)[None, :]
        bits = tl.load(weight + row.to(tl.int64)[:, None] * (K // 2) + byte[None, :], mask=real, other=0).to(tl.int32)
        bits = tl.interleave(bits, bits >> 4)
        value = (((bits & 8) << 28) | ((bits & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126
    else:
        real = inside[:, None] & (k < K)[None, :]
        value = tl.load(weight + row.to(tl.int64)[:, None] * K + k[None, :], mask=real, other=0.0).to(tl.float32)
    value = tl.reshape(value, (ROWS, COLUMNS // EACH, EACH)) * factor[:, :, None]
    value = round_to_bf16(tl.reshape(value, (ROWS, COLUMNS)))
    real = inside[:, None] & (k < K)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * K + k[None, :], value.to(out.dtype.element_ty), mask=real)


def decoder(spec: ModuleSpec, tensors: Mapping[str, Tensor], factor: Tensor | None = None) -> Callable[[slice, Tensor], Tensor]:
    """A function that fills a bfloat16 `[n, K]` with the values of a slice of n rows.

    `factor`: float32 `[P]` that multiplies an NVFP4 weight beside its scales.
    """
    scheme, (_, K) = spec.scheme, spec.shape
    rows, weight, scale = [count for _, count in spec.partitions], tensors["weight"], tensors["weight_scale"]
    device = weight.device
    if scheme == "fp8_block":
        scale_row: Tensor | None = row_blocks(rows, device)
    else:
        scale_row = row_partitions(rows, device).int() if scheme == "fp8_tensor" else None
    outer = None
    if scheme == "nvfp4":
        outer = tensors["weight_scale_2"] if factor is None else tensors["weight_scale_2"] * factor
        outer = outer[row_partitions(rows, device)]
    group = GROUPS.get(scheme, triton.next_power_of_2(K))

    def decode(part: slice, out: Tensor) -> Tensor:
        n = len(out)
        expand_kernel[(-(-n // ROWS), -(-K // COLUMNS))](
            weight[part], scale if scale_row is not None else scale[part], None if scale_row is None else scale_row[part],
            None if outer is None else outer[part], out, n, K, group, min(group, COLUMNS),
            scheme in PACKED, SCALE_BYTES.get(scheme, 0), ROWS, COLUMNS,
        )  # fmt: skip
        return out

    return decode


def prepare(spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """A function for the layer that `spec` describes, of the stored `tensors` by role, with `bias` where there is one.

    It takes `x` bfloat16 `[M, K]` and returns `[M, N]`; while it runs, at most `AT_ONCE` weights are bfloat16.  Reads the
    values of `input_scale` once, which waits for the device.
    """
    (N, K), kind = spec.shape, spec.activations
    static = tensors.get("input_scale") if kind is not None and KINDS[kind] else None
    runs = input_runs([count for _, count in spec.partitions], static)
    decode = decoder(spec, tensors, static if kind == "nvfp4" and spec.scheme == "nvfp4" else None)
    bias, step = tensors.get("bias"), max(1, AT_ONCE // K)

    def linear(x: Tensor, left: object = None) -> Tensor:
        x = x.contiguous()
        y = torch.empty(len(x), N, dtype=x.dtype, device=x.device)
        scratch = torch.empty(min(step, N), K, dtype=torch.bfloat16, device=x.device)
        for input_scale, start, stop in runs:
            if kind == "nvfp4" and spec.scheme == "nvfp4":
                assert input_scale is not None
                inputs = quantize_nvfp4(x, input_scale)
            else:
                inputs = x if kind is None else fake_quantize(x.float(), kind, input_scale).to(x.dtype)
            for first in range(start, stop, step):
                part = slice(first, min(first + step, stop))
                weights = decode(part, scratch[: part.stop - part.start])
                y[:, part] = F.linear(inputs, weights, None if bias is None else bias[part].to(x.dtype))
        return y

    return linear

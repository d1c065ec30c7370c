"""NVFP4 linear layers for many tokens on FP4 tensor cores (sm_100 and up), by torch's `scaled_mm`.

    y[m, n] = input_scale[p] weight_scale_2[p] * sum over k of xcode[m, k] xscale[m, k // 16] wcode[n, k] wscale[n, k // 16]

Operands are packed codes, low nibble first, as stored; sums are float32, and both global scales multiply a sum before it is
rounded to bfloat16.  One call has one scale of each kind: rows whose partitions differ in either are calls of their own, so
that every partition keeps its scales exactly.  `nvfp4_quantize.quantize_packed` makes codes and scales of the input.

Block scales lie in tiles of 128 rows by 4 groups, 512 bytes each, row after row of tiles (cuBLAS: 1D block scaling factors
layout).  Row r and group g of a tile are byte `r % 32 * 16 + r // 32 * 4 + g`; what no row or group fills is 0.

Source: torch 2.11 to 2.13, `_scaled_mm_v2`, recipes `BlockWise1x16` and `TensorWise`: K must be a multiple of 32 and N of 16,
any M.  Tokens are filled up to a multiple of 128 nevertheless, which the tiles of their scales hold anyway: fewer than 128
were reported to be refused by torch 2.11 (vllm 48491).  Not yet run on such a GPU: layout and arithmetic are tested against
torch's own checks and float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from runtime.format import ModuleSpec
from runtime.kernels.cases import Case, ManyCase, many_errors, many_launch
from runtime.kernels.nvfp4_linear import reference
from runtime.kernels.nvfp4_quantize import quantize_packed
from runtime.kernels.twin import values

SCHEMES = ("nvfp4",)
ACTIVATIONS: tuple[str | None, ...] = ("nvfp4",)
TOLERANCE = 5e-3  # the result is bfloat16
RECIPE = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
SWIZZLE = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]

CASES = (
    ManyCase(Case("one call", "nvfp4", (160,), 128, "nvfp4", tiny=True), (65, 130)),
    ManyCase(Case("calls of their own", "nvfp4", (48, 16, 144), 96, "nvfp4", runs=True, bias=True, tiny=True), (65,)),
    ManyCase(Case("Qwen3.5-27B gate_up", "nvfp4", (17408, 17408), 5120, "nvfp4"), (4096,)),
    ManyCase(Case("Qwen3.5-27B down", "nvfp4", (5120,), 17408, "nvfp4"), (4096,)),
)


def blocked(scale: Tensor) -> Tensor:
    """Block scales E4M3 `[N, G]` in the layout above: `[ceil(N / 128) * ceil(G / 4) * 512]`, a copy."""
    N, G = scale.shape
    tiles = -(-G // 4)
    padded = torch.zeros(-(-N // 128) * 128, tiles * 4, dtype=torch.uint8, device=scale.device)
    padded[:N, :G] = scale.view(torch.uint8)
    return padded.view(-1, 4, 32, tiles, 4).permute(0, 3, 2, 1, 4).flatten().view(torch.float8_e4m3fn)


def prepare(spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor] | None:
    """As `expand.prepare`; None for shapes that the tensor cores do not take.

    Keeps a second copy of the block scales, a ninth of the layer.  Reads the values of the global scales once, which waits
    for the device.
    """
    rows, K = [count for _, count in spec.partitions], spec.shape[1]
    weight, scale, bias = tensors["weight"], tensors["weight_scale"], tensors.get("bias")
    inputs, outer = tensors["input_scale"], tensors["weight_scale_2"]
    pairs, edges = list(zip(values(inputs), values(outer), strict=True)), [0, *accumulate(rows)]
    same = [list(run) for _, run in groupby(range(len(rows)), key=pairs.__getitem__)]
    runs = [(run[0], edges[run[0]], edges[run[-1] + 1]) for run in same]  # a partition of the run, first row, last row + 1
    if K % 32 or any((stop - start) % 16 for _, start, stop in runs):
        return None
    scales = [blocked(scale[start:stop]) for _, start, stop in runs]

    def linear(x: Tensor, left: object = None) -> Tensor:
        x = x.contiguous()
        parts: list[Tensor] = []
        given = None  # the input scale of the codes
        for (p, start, stop), w_scale in zip(runs, scales, strict=True):
            if pairs[p][0] != given:
                (codes, x_scale), given = quantize_packed(x, inputs[p : p + 1]), pairs[p][0]
            y = F.scaled_mm(
                codes.view(torch.float4_e2m1fn_x2), weight[start:stop].view(torch.float4_e2m1fn_x2).t(),
                [x_scale, inputs[p : p + 1]], RECIPE, [w_scale, outer[p : p + 1]], RECIPE,
                swizzle_a=SWIZZLE, swizzle_b=SWIZZLE, output_dtype=x.dtype,
            )[: len(x)]  # fmt: skip
            parts.append(y if bias is None else y + bias[start:stop].to(x.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    return linear


def errors(case: ManyCase, device: torch.device, seed: int) -> dict[str, float]:
    """Largest error over the largest result, by number of tokens."""
    return many_errors(prepare, reference, case, device, seed)


def launch(case: ManyCase, device: torch.device, seed: int) -> Callable[[], object]:
    """The layer with its largest number of tokens, quantisation of the input included."""
    return many_launch(prepare, case, device, seed)

"""FP8 linear layers with 128 x 128 blocks, for many tokens on the FP8 tensor cores of sm_90, by torch's `scaled_mm`.

    y[m, n] = sum over blocks b of xscale[m, b] wscale[n // 128, b] * sum over k in b of xcode[m, k] wcode[n, k]

Inner sums are those of the accurate mode.  `fp8_quantize` makes codes and scales of the input, or they are there already.
Blocks of rows restart at each partition, so partitions must end where a block does; then the stored scales are those of the
whole layer.

Source: torch 2.11 to 2.13, `_scaled_mm_v2`, recipes `BlockWise1x128` and `BlockWise128x128` (cuBLAS 12.9, sm_90 only).
Scales are float32 and lie column by column: of the input `[M, K / 128]`; of the weight `[L, N / 128]`, L being K / 128 rounded
up to a multiple of 4, with zeros at the end.  M must be a multiple of 4, for which rows of zeros are added.  Not yet run on
such a GPU: layout and arithmetic are tested against torch's own checks and float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from runtime.format import FP8_BLOCK, ModuleSpec
from runtime.kernels.cases import Case, ManyCase, many_errors, many_launch
from runtime.kernels.fp8_linear import reference
from runtime.kernels.fp8_quantize import quantize

SCHEMES = ("fp8_block",)
ACTIVATIONS: tuple[str | None, ...] = ("fp8_group", "fp8_group_e8m0")
TOLERANCE = 5e-3  # the result is bfloat16

CASES = (
    ManyCase(Case("partitions", "fp8_block", (128, 256), 384, "fp8_group", bias=True, tiny=True), (65, 68)),
    ManyCase(Case("powers of two", "fp8_block", (128,), 256, "fp8_group_e8m0", tiny=True), (66,)),
    ManyCase(Case("Qwen3.5-27B gate_up", "fp8_block", (17408, 17408), 5120, "fp8_group"), (4096,)),
    ManyCase(Case("Qwen3.5-27B down", "fp8_block", (5120,), 17408, "fp8_group"), (4096,)),
)


def prepare(spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor] | None:
    """As `expand.prepare`; None for shapes with partial blocks.  Keeps a second copy of the scales; waits for nothing."""
    K, kind = spec.shape[1], spec.activations
    if any(size % FP8_BLOCK for size in (K, *(count for _, count in spec.partitions))):
        return None
    assert kind is not None
    weight, scale, bias = tensors["weight"], tensors["weight_scale"], tensors.get("bias")
    w_scale = F.pad(scale, (0, -scale.shape[1] % 4)).contiguous().t()

    def linear(x: Tensor, left: tuple[Tensor, Tensor] | None = None) -> Tensor:
        codes, x_scale = left or quantize(x.contiguous(), kind)
        if more := -len(x) % 4:
            codes = F.pad(codes.view(torch.uint8), (0, 0, 0, more)).view(codes.dtype)
            x_scale = F.pad(x_scale, (0, 0, 0, more))
        y = F.scaled_mm(
            codes, weight.t(), x_scale.t().contiguous().t(), ScalingType.BlockWise1x128, w_scale, ScalingType.BlockWise128x128,
            output_dtype=x.dtype,
        )[: len(x)]  # fmt: skip
        return y if bias is None else y + bias.to(x.dtype)

    return linear


def errors(case: ManyCase, device: torch.device, seed: int) -> dict[str, float]:
    """Largest error over the largest result, by number of tokens."""
    return many_errors(prepare, reference, case, device, seed)


def launch(case: ManyCase, device: torch.device, seed: int) -> Callable[[], object]:
    """The layer with its largest number of tokens, quantisation of the input included."""
    return many_launch(prepare, case, device, seed)

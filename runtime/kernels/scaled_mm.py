"""FP8 linear layers for many tokens on the FP8 tensor cores, by `torch._scaled_mm` with a scale per row of each operand.

    y[m, n] = a[m] b[n] * sum over k of xcode[m, k] wcode[n, k]     float32, then rounded to bfloat16

`b` is the scale of row n, so partitions keep theirs exactly; `a` that of token m, or the one scale of a static input.
`fp8_quantize` makes the codes of the input.  Partitions with different static scales are matmuls of their own.
Sums are those of the accurate mode; the fast one keeps fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from runtime.format import ModuleSpec
from runtime.kernels.fp8_linear import input_runs, row_partitions
from runtime.kernels.fp8_quantize import quantize

SCHEMES = ("fp8_tensor", "fp8_channel")
ACTIVATIONS: tuple[str | None, ...] = ("fp8_static", "fp8_tensor", "fp8_token")


def prepare(spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor] | None:
    """As `expand.prepare`; None for shapes that are not multiples of 16, which the tensor cores do not take."""
    K, kind, rows = spec.shape[1], spec.activations, [count for _, count in spec.partitions]
    runs = input_runs(rows, tensors["input_scale"] if kind == "fp8_static" else None)
    if K % 16 or any((stop - start) % 16 for _, start, stop in runs):
        return None
    weight, scale, bias = tensors["weight"], tensors["weight_scale"], tensors.get("bias")
    if spec.scheme == "fp8_tensor":
        scale = scale[row_partitions(rows, weight.device)]
    assert kind is not None

    def linear(x: Tensor, left: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x.contiguous()
        parts = []
        for input_scale, start, stop in runs:
            codes, x_scale = left or quantize(x, kind, input_scale)
            y = torch._scaled_mm(
                codes, weight[start:stop].t(), x_scale.expand(len(x)).reshape(-1, 1).contiguous(),
                scale[start:stop].reshape(1, -1), out_dtype=x.dtype,
            )  # fmt: skip
            parts.append(y if bias is None else y + bias[start:stop].to(x.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    return linear

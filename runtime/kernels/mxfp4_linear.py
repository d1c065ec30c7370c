"""MXFP4 linear layers for few tokens: E2M1 codes with a power of two per 32 inputs, read once and decoded in registers.

    y[m, n] = sum over k of x[m, k] e2m1(w[n, k]) 2**(weight_scale[n, k // 32] - 127)

The kernel is that of `nvfp4_linear` with exponents in the place of block scales.  So that no product leaves the range of
bfloat16, whatever the exponents are, they are taken relative to the largest of the layer, b, and 2**(b - 120) multiplies the
sum.  What is more than 2**119 below the largest weight is then not exact.  Quantised inputs: `mx_quantize` replaces them by
values that bfloat16 holds exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from runtime.activations import e8m0_table, fake_quantize
from runtime.format import MX_GROUP, ModuleSpec
from runtime.kernels import tuned
from runtime.kernels.cases import Case
from runtime.kernels.mx_quantize import quantize
from runtime.kernels.nvfp4_linear import SHAPES, e2m1, nvfp4_linear_kernel
from runtime.kernels.tiles import INTERPRETED, Tiles, counters, tiles_for, workspace

SCHEMES = ("mxfp4",)
ACTIVATIONS: tuple[str | None, ...] = (None, "mxfp4")
CASES = (
    Case("one tile", "mxfp4", (128,), 256, tiny=True),
    Case("K ends inside a step", "mxfp4", (24, 8, 5), 224, "mxfp4", bias=True, tiny=True),
    Case("a split", "mxfp4", (70,), 1024, tiny=True),
    Case("Qwen3.5-27B gate_up", "mxfp4", (17408, 17408), 5120),
    Case("Qwen3.5-27B down", "mxfp4", (5120,), 17408, "mxfp4"),
)


def reference(x: Tensor, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """The same layer in float64, `[M, K]` to `[M, N]`; `tensors` by role, with `bias` where there is one."""
    scale = e8m0_table(x.device)[tensors["weight_scale"].int()].double().repeat_interleave(MX_GROUP, 1)
    inputs = x.float() if spec.activations is None else fake_quantize(x.float(), spec.activations)
    y = inputs.double() @ (e2m1(tensors["weight"]) * scale).T
    return y + (tensors["bias"].double() if "bias" in tensors else 0)


@functools.cache
def word_selectors(device: torch.device) -> Tensor:
    """Int32 `[16]`: for each word of 128 weights the exponent that it uses, once per nibble of a byte selector."""
    return (torch.arange(16, dtype=torch.int32, device=device) // 4) * 0x1111


def prepare(spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """As `nvfp4_linear.prepare`.  Keeps 4 bytes per row beside the weight, and waits for nothing."""
    N, K = spec.shape
    scale, bias, device = tensors["weight_scale"].contiguous(), tensors.get("bias"), tensors["weight"].device
    largest = scale.max().int().clamp(max=246)  # beyond are numbers from 2**120 on
    offset = (246 - largest).expand(16).contiguous()
    factor = ((largest + 7) << 23).view(torch.float32).expand(N).contiguous()  # 2**(largest - 120)
    words, name = tensors["weight"].view(torch.int32), tuned.name("mxfp4_linear", spec.scheme, spec.activations)
    exponents = scale.view(torch.int32) if K % 128 == 0 else scale

    def linear(
        x: Tensor, out: Tensor | None = None, tiles: Tiles | None = None, left: tuple[Tensor, Tensor | None] | None = None
    ) -> Tensor:
        x = x.contiguous()
        result = torch.empty(len(x), N, dtype=x.dtype, device=device) if out is None else out
        inputs = x if spec.activations is None else left[0] if left else quantize(x, spec.activations)
        for first in range(0, len(x), SHAPES[-1].tokens):
            part = inputs[first : first + SHAPES[-1].tokens]
            cut = tiles or tiles_for(name, SHAPES, len(part), N, K, device)
            nvfp4_linear_kernel[(-(-N // cut.rows), cut.split)](
                part.view(torch.int64), words, exponents, word_selectors(device), offset, factor, bias,
                result[first : first + len(part)], workspace(cut, N, device), counters(device), len(part), N, N,
                K, cut.rows, cut.tokens, cut.split, cut.steps, bias is not None, INTERPRETED,
                num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
            )  # fmt: skip
        return result

    return linear

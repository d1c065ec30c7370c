"""MXFP8 linear layers for few tokens: E4M3 codes with a power of two per 32 inputs, read once.

    y[m, n] = sum over groups g of 2**(weight_scale[n, g] - 127) * sum over k in g of x[m, k] e4m3(w[n, k])

Codes become bfloat16, which holds all of them; the power of two of a row and group is applied to the float32 sum over these 32
inputs.  Quantised inputs: `mx_quantize` replaces them by values that bfloat16 holds exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.activations import e8m0_table, fake_quantize
from runtime.format import MX_GROUP, ModuleSpec
from runtime.kernels import tuned
from runtime.kernels.cases import Case
from runtime.kernels.fp8_linear import finish
from runtime.kernels.mx_quantize import quantize
from runtime.kernels.tiles import (
    INTERPRETED,
    Shape,
    Tiles,
    add_partials,
    counters,
    leave_partial,
    operand,
    show_copies,
    tiles_for,
    workspace,
)

SCHEMES = ("mxfp8",)
ACTIVATIONS: tuple[str | None, ...] = (None, "mxfp8")
SHAPES = (Shape(8, 64, 2, 4, registers=128), Shape(16, 64, 2, 4), Shape(32, 64, 2, 4), Shape(64, 64, 4, 2, registers=224))
CASES = (
    Case("one tile", "mxfp8", (64,), 256, tiny=True),
    Case("K ends inside a step", "mxfp8", (24, 8, 5), 224, "mxfp8", bias=True, tiny=True),
    Case("a split", "mxfp8", (70,), 1024, tiny=True),
    Case("Qwen3.5-27B gate_up", "mxfp8", (17408, 17408), 5120),
    Case("Qwen3.5-27B down", "mxfp8", (5120,), 17408, "mxfp8"),
)


def reference(x: Tensor, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """The same layer in float64, `[M, K]` to `[M, N]`; `tensors` by role, with `bias` where there is one."""
    scale = e8m0_table(x.device)[tensors["weight_scale"].int()].double().repeat_interleave(MX_GROUP, 1)
    inputs = x.float() if spec.activations is None else fake_quantize(x.float(), spec.activations)
    y = inputs.double() @ (tensors["weight"].double() * scale).T
    return y + (tensors["bias"].double() if "bias" in tensors else 0)


@triton.jit(do_not_specialize=["M"])  # else each model is compiled for 1 token, for multiples of 16, and for others
def mxfp8_linear_kernel(
    x: tl.tensor, weight: tl.tensor, scale: tl.tensor, bias: tl.tensor, out: tl.tensor, work: tl.tensor, count: tl.tensor,
    M: tl.tensor, N: tl.tensor, out_N: tl.tensor,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (tile of rows, range of K).  `scale`: uint8 `[N, K / 32]`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(row, N - 1).to(tl.int64)  # the last tile repeats a row instead of masking every load
    token = tl.arange(0, TOKENS)
    first = tl.program_id(1) * (STEPS * 4)
    k = tl.arange(0, 32)
    weights = weight + row[:, None] * K + (first * 32 + k)[None, :]
    inputs = x + token[:, None] * K + (first * 32 + k)[None, :]
    scales = scale + row * (K // 32) + first
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(STEPS):
        for j in tl.static_range(4):
            if SPLIT * STEPS * 128 == K:
                w = tl.load(weights + 32 * j)
                a = tl.load(inputs + 32 * j, mask=(token < M)[:, None], other=0.0)
                power = tl.load(scales + j)
            else:
                inside = tl.zeros((ROWS,), tl.int32) + (first + step * 4 + j) < K // 32
                live = (tl.where(token < M, 0, K) + (first + step * 4 + j)) < K // 32
                w = tl.load(weights + 32 * j, mask=inside[:, None], other=0.0)
                a = tl.load(inputs + 32 * j, mask=live[:, None], other=0.0)
                power = tl.load(scales + j, mask=inside, other=0)
            if TOKENS >= 64 and not INTERPRETED:
                show_copies(step)
            if INTERPRETED:
                product = tl.dot(w.to(tl.float32), tl.trans(a.to(tl.float32)), input_precision="ieee")
            else:
                product = tl.dot(w.to(tl.float32).to(tl.bfloat16), tl.trans(operand(a, ROWS)))
            bits = power.to(tl.int32)
            bits = tl.where(bits == 0, 0x400000, bits << 23)  # 0 is 2**-127
            sums += product * bits.to(tl.float32, bitcast=True)[:, None]
        weights += 128
        inputs += 128
        scales += 4
    if SPLIT == 1:
        finish(sums, out, None, None, bias, M, N, out_N, ROWS, TOKENS, True, 0, BIAS)
    else:
        if leave_partial(sums, work, count, SPLIT, ROWS, TOKENS):
            total = add_partials(work, count, SPLIT, ROWS, TOKENS)
            finish(total, out, None, None, bias, M, N, out_N, ROWS, TOKENS, True, 0, BIAS)


def prepare(spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """As `fp8_linear.prepare`: a function of `x` `[M, K]`, 1 <= M <= 64, bfloat16."""
    N, K = spec.shape
    weight, scale, bias = tensors["weight"], tensors["weight_scale"], tensors.get("bias")
    device = weight.device
    name = tuned.name("mxfp8_linear", spec.scheme, spec.activations)

    def linear(
        x: Tensor, out: Tensor | None = None, tiles: Tiles | None = None, left: tuple[Tensor, Tensor | None] | None = None
    ) -> Tensor:
        x = x.contiguous()
        M = len(x)
        result = torch.empty(M, N, dtype=x.dtype, device=device) if out is None else out
        inputs = x if spec.activations is None else left[0] if left else quantize(x, spec.activations)
        cut = tiles or tiles_for(name, SHAPES, M, N, K, device)
        mxfp8_linear_kernel[(-(-N // cut.rows), cut.split)](
            inputs, weight, scale, bias, result, workspace(cut, N, device), counters(device), M, N, N, K, cut.rows, cut.tokens,
            cut.split, cut.steps, bias is not None, INTERPRETED,
            num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
        )  # fmt: skip
        return result

    return linear

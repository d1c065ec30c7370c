"""FP8 linear layers for few tokens: weights are E4M3 codes, read once, whatever their scales and the input are.

    y[m, n] = sum over k of x[m, k] w[n, k]                         in float32, then rounded to bfloat16

    fp8_tensor   w = code * s[p]       one scale per partition of rows      both as a scale per row, applied to the sum
    fp8_channel  w = code * s[n]       one scale per row
    fp8_block    w = code * s[b, k // 128]      b counts blocks of 128 rows and restarts at each partition, so that a tile
                                                of rows may see several: a scale per row and 128 inputs, applied to the
                                                sum over these inputs

Input in full precision (W8A16): codes become bfloat16, which holds all of them.  Quantised input (W8A8): `fp8_quantize` makes
codes and scales; both codes become float16, which holds all of them, and products are summed in float32; the scale of the
input (one, per token, or per token and 128 inputs) is applied to the sum.  So W8A8 equals the arithmetic of
`runtime.layers` up to the order of summation, and W8A16 does not round the scaled weights to bfloat16 as that does.

Partitions with different static input scales have different input codes: each run of rows is a launch of its own.
Why not E4M3 operands: the tensor cores of sm_90 sum FP8 products with fewer bits than float32.
Why E4M3 goes to bfloat16 by way of float32: sm_90 converts float16 to bfloat16 at an eighth of the rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.activations import fake_quantize
from runtime.format import FP8_BLOCK, ModuleSpec
from runtime.kernels import tuned
from runtime.kernels.cases import Case
from runtime.kernels.fp8_quantize import KINDS, quantize
from runtime.kernels.tiles import (
    INPUTS,
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
from runtime.kernels.twin import values

SCHEMES = ("fp8_tensor", "fp8_channel", "fp8_block")
ACTIVATIONS: tuple[str | None, ...] = (None, *KINDS)


# Two warps keep the matmul on `mma.sync`, whose left operand is decoded in registers; for 64 tokens the wider instruction of
# four warps is better, as two would decode each weight twice.
SHAPES = (Shape(8, 64, 2, 4), Shape(16, 64, 2, 4), Shape(32, 64, 2, 4), Shape(64, 64, 4, 2, registers=224))

CASES = (
    Case("one row of blocks", "fp8_tensor", (64,), 256, tiny=True),
    Case("partitions inside a tile", "fp8_tensor", (24, 8, 37), 272, bias=True, tiny=True),
    Case("rows", "fp8_channel", (70,), 512, tiny=True),
    Case("odd sizes", "fp8_channel", (3,), 75, bias=True, tiny=True),
    Case("blocks that restart", "fp8_block", (200, 128, 5), 320, tiny=True),
    Case("static", "fp8_tensor", (40, 30), 400, "fp8_static", tiny=True),
    Case("static, scales differ", "fp8_tensor", (40, 30, 9), 256, "fp8_static", runs=True, bias=True, tiny=True),
    Case("whole input", "fp8_tensor", (65,), 144, "fp8_tensor", tiny=True),
    Case("tokens", "fp8_channel", (100,), 640, "fp8_token", tiny=True),
    Case("groups", "fp8_block", (130, 70), 336, "fp8_group", tiny=True),
    Case("groups, powers of two", "fp8_block", (128,), 1024, "fp8_group_e8m0", tiny=True),
    Case("Qwen3.5-27B qkvz", "fp8_tensor", (2048, 2048, 6144, 6144), 5120),
    Case("Qwen3.5-27B gate_up", "fp8_tensor", (17408, 17408), 5120),
    Case("Qwen3.5-27B down", "fp8_tensor", (5120,), 17408),
    Case("Qwen3.5-27B head", "fp8_channel", (248320,), 5120),
    Case("Qwen3.5-27B gate_up", "fp8_block", (17408, 17408), 5120, "fp8_group"),
    Case("Qwen3.5-27B down", "fp8_block", (5120,), 17408, "fp8_group"),
    Case("Qwen3.5-27B down", "fp8_tensor", (5120,), 17408, "fp8_static"),
    Case("Qwen3.5-27B gate_up", "fp8_channel", (17408, 17408), 5120, "fp8_token"),
    Case("Qwen3.5-35B-A3B qkvz", "fp8_block", (2048, 2048, 4096, 4096), 2048, "fp8_group"),
    Case("Nemotron 3 Nano in_proj", "fp8_tensor", (10304,), 2688, "fp8_static"),
    Case("Nemotron 3 Nano out_proj", "fp8_tensor", (2688,), 4096, "fp8_static"),
    Case("Step-3.5-Flash qkv", "fp8_block", (8192, 1024, 1024), 4096),
)  # fmt: skip


def row_partitions(rows: Sequence[int], device: torch.device) -> Tensor:
    """Int64 `[N]`: the partition of each row.  Made on the host: a GPU would be waited for."""
    return torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows)).to(device)


def row_blocks(rows: Sequence[int], device: torch.device) -> Tensor:
    """Int32 `[N]`: the row of the block scales that each row uses; blocks restart at each partition."""
    parts, first = [], 0
    for count in rows:
        parts.append(first + torch.arange(count, dtype=torch.int32, device=device) // FP8_BLOCK)
        first += -(-count // FP8_BLOCK)
    return torch.cat(parts)


def reference(x: Tensor, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """The same layer in float64, `[M, K]` to `[M, N]`; `tensors` by role, with `bias` where there is one."""
    rows = [count for _, count in spec.partitions]
    weight, scale = tensors["weight"].double(), tensors["weight_scale"].double()
    if spec.scheme == "fp8_block":
        scale = scale[row_blocks(rows, x.device).long()].repeat_interleave(FP8_BLOCK, 1)[:, : spec.shape[1]]
    else:
        scale = (scale[row_partitions(rows, x.device)] if spec.scheme == "fp8_tensor" else scale).unsqueeze(1)
    parts, first = [], 0
    for p, part in enumerate((weight * scale).split(rows)):
        inputs = x.float()
        if spec.activations is not None:
            inputs = fake_quantize(inputs, spec.activations, tensors["input_scale"][p] if "input_scale" in tensors else None)
        parts.append(inputs.double() @ part.T)
        first += len(part)
    return torch.cat(parts, 1) + (tensors["bias"].double() if "bias" in tensors else 0)


@triton.jit
def sum_products(
    inputs: tl.tensor, live: tl.tensor, x_scales: tl.tensor, weights: tl.tensor, scales: tl.tensor, first: tl.tensor,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    CODES: tl.constexpr, INTERPRETED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Float32 `[ROWS, TOKENS]`: products of rows and inputs, summed over the `STEPS` steps of 128 from step `first`.

    Pointers to where each row or token begins: `weights` `[ROWS]`, `inputs` `[TOKENS]`, of which those that are not `live`
    count as 0 (`CODES`: E4M3 codes, else bfloat16).  `scales` `[ROWS]`, `x_scales` `[TOKENS]`, or None: a scale per step.
    """
    STEP: tl.constexpr = 128
    COLUMNS: tl.constexpr = (K + 127) // 128
    WHOLE: tl.constexpr = SPLIT * STEPS * STEP == K  # no step reaches beyond K
    k = first * STEP + tl.arange(0, STEP)
    weights = weights[:, None] + k[None, :]
    inputs = inputs[:, None] + k[None, :]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(STEPS):
        if WHOLE:
            w = tl.load(weights)
            a = tl.load(inputs, mask=live[:, None], other=0.0)
        else:
            inside = k + step * STEP < K
            w = tl.load(weights, mask=inside[None, :], other=0.0)
            a = tl.load(inputs, mask=live[:, None] & inside[None, :], other=0.0)
        if TOKENS >= 64 and not INTERPRETED:
            show_copies(step)
        if INTERPRETED:
            product = tl.dot(w.to(tl.float32), tl.trans(a.to(tl.float32)), input_precision="ieee")
        elif CODES:
            product = tl.dot(w.to(tl.float16), tl.trans(operand(a.to(tl.float16), ROWS)))
        else:
            product = tl.dot(w.to(tl.float32).to(tl.bfloat16), tl.trans(operand(a, ROWS)))
        column = tl.minimum(first + step, COLUMNS - 1)  # beyond K products are 0
        if scales is not None:
            product *= tl.load(scales + column)[:, None]
        if x_scales is not None:
            product *= tl.load(x_scales + column)[None, :]
        sums += product
        weights += STEP
        inputs += STEP
    return sums


@triton.jit
def finish(
    sums: tl.tensor, out: tl.tensor, scale: tl.tensor, x_scale: tl.tensor, bias: tl.tensor,
    M: tl.tensor, N: tl.tensor, out_N: tl.tensor,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, X_SCALE: tl.constexpr, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """Apply what is constant along K to `sums` `[ROWS, TOKENS]`, and store it as rows of `out` `[M, out_N]`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    if not BLOCK:
        sums *= tl.load(scale + tl.minimum(row, N - 1))[:, None]
    if X_SCALE == 1:
        sums *= tl.load(x_scale)
    if X_SCALE == 2:
        sums *= tl.load(x_scale + tl.minimum(token, M - 1))[None, :]
    if BIAS:
        sums += tl.load(bias + tl.minimum(row, N - 1)).to(tl.float32)[:, None]
    at = token.to(tl.int64)[None, :] * out_N + row[:, None]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(row < N)[:, None] & (token < M)[None, :])


@triton.jit(do_not_specialize=["M"])  # else each model is compiled for 1 token, for multiples of 16, and for others
def fp8_linear_kernel(
    x: tl.tensor, weight: tl.tensor, scale: tl.tensor, block_row: tl.tensor, x_scale: tl.tensor, bias: tl.tensor,
    out: tl.tensor, work: tl.tensor, count: tl.tensor, M: tl.tensor, N: tl.tensor, out_N: tl.tensor,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr, X_SCALE: tl.constexpr, BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (tile of rows, range of K).

    `BLOCK`: `scale` is `[blocks, ceil(K / 128)]` and `block_row` int32 `[N]`, else `scale` is `[N]`.  `X_SCALE`: 0 for
    bfloat16 input; else `x` holds codes with 1: one scale, 2: a scale per token, 3: per token and 128 inputs.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(row, N - 1)  # the last tile repeats a row instead of masking every load
    token = tl.arange(0, TOKENS)
    columns: tl.constexpr = (K + 127) // 128
    sums = sum_products(
        x + token * K, token < M, None if X_SCALE != 3 else x_scale + tl.minimum(token, M - 1) * columns,
        weight + row.to(tl.int64) * K, scale + tl.load(block_row + row) * columns if BLOCK else None,
        tl.program_id(1) * STEPS, K, ROWS, TOKENS, SPLIT, STEPS, X_SCALE != 0, INTERPRETED,
    )
    if SPLIT == 1:
        finish(sums, out, scale, x_scale, bias, M, N, out_N, ROWS, TOKENS, BLOCK, X_SCALE, BIAS)
    else:
        if leave_partial(sums, work, count, SPLIT, ROWS, TOKENS):
            total = add_partials(work, count, SPLIT, ROWS, TOKENS)
            finish(total, out, scale, x_scale, bias, M, N, out_N, ROWS, TOKENS, BLOCK, X_SCALE, BIAS)


def prepare(spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """A function for the layer that `spec` describes, of the stored `tensors` by role, with `bias` where there is one.

    It takes `x` `[M, K]`, 1 <= M <= 64, bfloat16, and returns `[M, N]` in the dtype of `x`; or fills `out=` `[M, N]`,
    float32 or bfloat16, and cuts its work as `tiles=` says.  `left=`: codes and scales of `x`
    that are there already.  Keeps 4 bytes per row beside the weight.  Reads the values of
    `input_scale` once, which waits for the device: call it before a graph is captured.
    """
    N, K = spec.shape
    rows = [count for _, count in spec.partitions]
    weight, scale, bias = tensors["weight"], tensors["weight_scale"], tensors.get("bias")
    device, block = weight.device, spec.scheme == "fp8_block"
    block_row = row_blocks(rows, device) if block else None
    if spec.scheme == "fp8_tensor":
        scale = scale[row_partitions(rows, device)]
    runs = input_runs(rows, tensors.get("input_scale") if spec.activations == "fp8_static" else None)
    x_scale_kind = {None: 0, "fp8_static": 1, "fp8_tensor": 1, "fp8_token": 2}.get(spec.activations, 3)

    name = tuned.name("fp8_linear", spec.scheme, spec.activations)

    def linear(
        x: Tensor, out: Tensor | None = None, tiles: Tiles | None = None, left: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        x = x.contiguous()
        M = len(x)
        result = torch.empty(M, N, dtype=x.dtype, device=device) if out is None else out
        for input_scale, start, stop in runs:
            inputs, x_scale = x, None
            if spec.activations is not None:
                inputs, x_scale = left or quantize(x, spec.activations, input_scale)
            cut = tiles or tiles_for(name, SHAPES, M, stop - start, K, device)
            fp8_linear_kernel[(-(-(stop - start) // cut.rows), cut.split)](
                inputs, weight[start:stop], scale if block else scale[start:stop],
                None if block_row is None else block_row[start:stop], x_scale, None if bias is None else bias[start:stop],
                result[:, start:stop], workspace(cut, stop - start, device), counters(device), M, stop - start, N,
                K, cut.rows, cut.tokens, cut.split, cut.steps, block, x_scale_kind, bias is not None, INTERPRETED,
                num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
            )  # fmt: skip
        return result

    return linear


def input_runs(rows: Sequence[int], input_scale: Tensor | None) -> list[tuple[Tensor | None, int, int]]:
    """Runs of partitions with one static input scale: the scale `[1]`, first row, last row + 1."""
    stops = list(accumulate(rows))
    if input_scale is None:
        return [(None, 0, stops[-1])]
    found = values(input_scale)
    runs: list[tuple[Tensor | None, int, int]] = []
    for p, stop in enumerate(stops):
        start = stop - rows[p]
        if runs and found[p] == found[p - 1]:
            start = runs.pop()[1]
        runs.append((input_scale[p : p + 1], start, stop))
    return runs


assert INPUTS == FP8_BLOCK  # a step of the kernel is a block of scales

"""NVFP4 linear layers for few tokens: E2M1 codes and E4M3 block scales are read once and decoded in registers.

    y[m, n] = weight_scale_2[p] * sum over k of x[m, k] e2m1(w[n, k]) e4m3(weight_scale[n, k // 16])

A code times a block scale is exact in bfloat16, so is the left operand of the tensor cores; sums are float32 and the global
scale of the row's partition is applied to them.  With quantised inputs (W4A4 arithmetic) `nvfp4_quantize` replaces the input
by code times block scale, exact in bfloat16 as well, and `input_scale[p]` joins the factor of the sum.

Decoding.  A 32-bit word holds k = 8 i to 8 i + 7, lowest nibble first.  The matmul over k is done as eight, one for each
nibble j of all words, with x[m, 8 i + j]: no value moves between threads.  The same half of two words makes one register p,
and each of its four nibble positions two bfloat16, bits s000000eem000000 where the nibble is seem: the code times 2**-126.  A
block scale b, as bits b << 4, is its value times 2**-120, and is multiplied by 2**127 and 2**112.  The product of both is the
weight times 2**-7, which the factor of the row takes back.  All of these products are exact, subnormals included.

The interpreter has no inline assembly: it decodes the same words in float32, and a test executes the assembly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.activations import fake_quantize
from runtime.format import E2M1_VALUES, NVFP4_GROUP, ModuleSpec
from runtime.kernels import tuned
from runtime.kernels.cases import Case
from runtime.kernels.fp8_linear import input_runs, row_partitions
from runtime.kernels.nvfp4_quantize import quantize
from runtime.kernels.tiles import (
    INTERPRETED,
    Shape,
    Tiles,
    add_partials,
    counters,
    leave_partial,
    tiles_for,
    workspace,
)

SCHEMES = ("nvfp4",)
ACTIVATIONS: tuple[str | None, ...] = (None, "nvfp4")
# Two warps and no more: with four, Triton takes `wgmma` and `tcgen05`, which want the inputs in shared memory first, and
# Triton 3.6 compiles the latter to an empty kernel here.  Beyond 16 tokens 128 rows would not fit the registers, and beyond 32
# neither would 64: more tokens are launches of their own, each of which reads the weights.
SHAPES = (Shape(8, 128, 2, 4), Shape(16, 128, 2, 4), Shape(32, 64, 2, 4))
ROW_FACTOR = 128.0  # the kernel's weights are 2**-7 of the real ones

CASES = (
    Case("one tile", "nvfp4", (128,), 256, tiny=True),
    Case("partitions inside a tile", "nvfp4", (24, 8, 37), 384, bias=True, tiny=True),
    Case("K ends inside a step", "nvfp4", (70,), 336, tiny=True),
    Case("one row, one block", "nvfp4", (1,), 16, bias=True, tiny=True),
    Case("a split", "nvfp4", (130,), 1024, tiny=True),
    Case("inputs", "nvfp4", (40, 30), 256, "nvfp4", tiny=True),
    Case("inputs, scales differ", "nvfp4", (40, 30, 9), 400, "nvfp4", runs=True, bias=True, tiny=True),
    Case("Qwen3.5-27B qkvz", "nvfp4", (2048, 2048, 6144, 6144), 5120),
    Case("Qwen3.5-27B gate_up", "nvfp4", (17408, 17408), 5120),
    Case("Qwen3.5-27B down", "nvfp4", (5120,), 17408),
    Case("Qwen3.5-27B down", "nvfp4", (5120,), 17408, "nvfp4"),
    Case("Qwen3.5-27B head", "nvfp4", (248320,), 5120),
    Case("Nemotron 3 Super in_proj", "nvfp4", (18560,), 4096),
    Case("Nemotron 3 Super expert", "nvfp4", (2688,), 1024),
    Case("Nemotron 3 Nano expert", "nvfp4", (2688,), 1856),
    Case("Step-3.5-Flash qkv", "nvfp4", (12288, 1024, 1024), 4096),
    Case("Step-3.5-Flash expert", "nvfp4", (1280, 1280), 4096),
)

# PTX.  Operands of two elements; `$0` is the result.
LOW_HALVES = tl.constexpr("prmt.b32 $0, $1, $2, 0x5410;")
HIGH_HALVES = tl.constexpr("prmt.b32 $0, $1, $2, 0x7632;")
# Four nibble positions of p = $1: sign to bit 15, the rest to bits 8..6 of each half; times the scales $2.
NIBBLE_0 = tl.constexpr(
    "{ .reg .b32 t; and.b32 t, $1, 0x000f000f; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81c081c0; mul.rn.bf16x2 $0, t, $2; }"
)
NIBBLE_1 = tl.constexpr(
    "{ .reg .b32 t; and.b32 t, $1, 0x00f000f0; mul.lo.u32 t, t, 0x0104; and.b32 t, t, 0x81c081c0; mul.rn.bf16x2 $0, t, $2; }"
)
NIBBLE_2 = tl.constexpr(
    "{ .reg .b32 t, u; shl.b32 u, $1, 4; and.b32 u, u, 0x80008000; shr.u32 t, $1, 2; "
    "lop3.b32 t, t, 0x01c001c0, u, 0xea; mul.rn.bf16x2 $0, t, $2; }"  # 0xea: (t and mask) or u
)
NIBBLE_3 = tl.constexpr(
    "{ .reg .b32 t, u; and.b32 u, $1, 0x80008000; shr.u32 t, $1, 6; "
    "lop3.b32 t, t, 0x01c001c0, u, 0xea; mul.rn.bf16x2 $0, t, $2; }"
)
# Of 8 scales in two words, the one that the selector names, for each of two elements; b << 4, times 2**127 and 2**112.
SCALES = tl.constexpr(
    "{ .reg .b32 t, u, c; prmt.b32 t, $1, $3, $5; prmt.b32 u, $2, $4, $6; prmt.b32 t, t, u, 0x5410; "
    "shr.u32 t, t, 4; and.b32 t, t, 0x0ff00ff0; mov.b32 c, 0x7f007f00; mul.rn.bf16x2 t, t, c; "
    "mov.b32 c, 0x77807780; mul.rn.bf16x2 $0, t, c; }"
)
# The same of 4 exponents in one word, for MXFP4: the power of two 2**(b - 127), times 2**$5.
POWERS = tl.constexpr(
    "{ .reg .b32 t, u; prmt.b32 t, $1, $1, $3; prmt.b32 u, $2, $2, $4; prmt.b32 t, t, u, 0x5410; "
    "shr.u32 t, t, 1; and.b32 t, t, 0x7f807f80; mul.lo.u32 u, $5, 0x800080; add.u32 $0, t, u; }"
)


def e2m1(packed: Tensor) -> Tensor:
    """Float64 `[..., K]` of uint8 `[..., K / 2]`, low nibble first."""
    values = torch.tensor(
        [sign * value for sign in (1, -1) for value in E2M1_VALUES], dtype=torch.float64, device=packed.device
    )
    return values[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]


def reference(x: Tensor, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """The same layer in float64, `[M, K]` to `[M, N]`; `tensors` by role, with `bias` where there is one."""
    rows = [count for _, count in spec.partitions]
    outer = tensors["weight_scale_2"].double()[row_partitions(rows, x.device)].unsqueeze(1)
    scale = tensors["weight_scale"].double().repeat_interleave(NVFP4_GROUP, 1) * outer
    parts = []
    for p, part in enumerate((e2m1(tensors["weight"]) * scale).split(rows)):
        inputs = fake_quantize(x.float(), "nvfp4", tensors["input_scale"][p]) if spec.activations == "nvfp4" else x
        parts.append(inputs.double() @ part.T)
    return torch.cat(parts, 1) + (tensors["bias"].double() if "bias" in tensors else 0)


@triton.jit
def select_scales(low: tl.tensor, high: tl.tensor, selector: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Int32 `[ROWS, 16]` each: 8 scales per row, and the selector of each word, to the scale of each word."""
    if INTERPRETED:
        index = selector & 7
        byte = (tl.where(index < 4, low, high) >> (8 * (index & 3))) & 255
        return (byte << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    else:
        return tl.inline_asm_elementwise(SCALES, "=r,r,r,r,r,r,r", [low, high, selector], tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def select_powers(word: tl.tensor, selector: tl.tensor, offset: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Int32 `[ROWS, 16]` each: 4 exponents per row, the selector of each word, and what is added, to the power of two."""
    if INTERPRETED:
        exponent = ((word >> (8 * (selector & 3))) & 255) + offset - 119  # `decode` multiplies by 2**119 less here
        return (tl.maximum(exponent, 0) << 23).to(tl.float32, bitcast=True)
    else:
        operands = [word, selector, offset]
        return tl.inline_asm_elementwise(POWERS, "=r,r,r,r,r,r,r", operands, tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def half(words: tl.tensor, HIGH: tl.constexpr) -> tl.tensor:
    """The low or high 16 bits of int32 words, as int16."""
    if HIGH:
        return tl.inline_asm_elementwise(HIGH_HALVES, "=r,r,r", [words], tl.int16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(LOW_HALVES, "=r,r,r", [words], tl.int16, is_pure=True, pack=2)


@triton.jit
def decode(words: tl.tensor, scales: tl.tensor, J: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Nibble `J` of each word times its scale: the weight times 2**-7."""
    if INTERPRETED:
        bits = words >> (4 * J)
        code = (((bits & 8) << 28) | ((bits & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126
        return code * scales * 0.0078125
    else:
        p = half(words, J >= 4)
        if J % 4 == 0:
            return tl.inline_asm_elementwise(NIBBLE_0, "=r,r,r", [p, scales], tl.bfloat16, is_pure=True, pack=2)
        elif J % 4 == 1:
            return tl.inline_asm_elementwise(NIBBLE_1, "=r,r,r", [p, scales], tl.bfloat16, is_pure=True, pack=2)
        elif J % 4 == 2:
            return tl.inline_asm_elementwise(NIBBLE_2, "=r,r,r", [p, scales], tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(NIBBLE_3, "=r,r,r", [p, scales], tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def multiply(
    words: tl.tensor, scales: tl.tensor, pair: tl.tensor, J: tl.constexpr, sums: tl.tensor, INTERPRETED: tl.constexpr
) -> tl.tensor:
    """Add to `sums` the products of nibble `J` with one half of the input pairs `[16, TOKENS]`: the high one for odd `J`."""
    if INTERPRETED:
        bits = (pair & -65536) if J % 2 == 1 else (pair << 16)
        inputs = bits.to(tl.float32, bitcast=True)
        return sums + tl.dot(decode(words, scales, J, INTERPRETED), inputs, input_precision="ieee")
    else:
        return tl.dot(decode(words, scales, J, INTERPRETED), half(pair, J % 2 == 1).to(tl.bfloat16, bitcast=True), sums)


@triton.jit
def load_scales(pointer: tl.tensor, left: tl.tensor, FIRST: tl.constexpr) -> tl.tensor:
    """Four scales from `FIRST` as one word, by bytes; what is not `left` in the row is 0."""
    word = tl.load(pointer + FIRST, mask=left > FIRST, other=0).to(tl.int32)
    for i in tl.static_range(1, 4):
        word |= tl.load(pointer + FIRST + i, mask=left > FIRST + i, other=0).to(tl.int32) << (8 * i)
    return word


@triton.jit
def sum_products(
    inputs: tl.tensor, live: tl.tensor, weights: tl.tensor, blocks: tl.tensor, selectors: tl.tensor, first: tl.tensor,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    INTERPRETED: tl.constexpr, offset: tl.tensor = None,
) -> tl.tensor:  # fmt: skip
    """Float32 `[ROWS, TOKENS]`: 2**-7 times the products of rows and inputs, over the `STEPS` steps of 128 from step `first`.

    Pointers to where each row or token begins: `weights` and `blocks` `[ROWS]`, `inputs` `[TOKENS]`, of which those that are
    not `live` count as 0. Everything that the decoded weights depend on is a load, part of one, or its broadcast: only so does
    Triton load it from shared memory in the layout of the tensor cores instead of moving decoded weights. `offset`: for MXFP4,
    int32 `[ROWS, 16]` that is added to the exponents, which take the place of the block scales.
    """
    WORDS: tl.constexpr = 16
    WHOLE: tl.constexpr = SPLIT * STEPS * 128 == K
    MX: tl.constexpr = offset is not None
    PER_STEP: tl.constexpr = 1 if K % 128 == 0 else (4 if MX else (2 if K % 64 == 0 else 8))
    word = tl.arange(0, WORDS)
    weights = weights[:, None] + (first * WORDS + word)[None, :]
    blocks = blocks[:, None] + first * PER_STEP
    inputs = inputs[None, :] + (first * (WORDS * 2) + word * 2)[:, None]
    live = live[None, :]
    selector = tl.broadcast_to(tl.load(selectors + word[None, :]), (ROWS, WORDS))
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(STEPS):
        left = K // 8 - (first + step) * WORDS  # words of K that remain
        if WHOLE:
            w = tl.load(weights)
            both = tl.load(blocks)
            low, high = both.to(tl.int32), both.to(tl.int32) if MX else (both >> 32).to(tl.int32)
        else:
            w = tl.load(weights, mask=(word < left)[None, :], other=0)
            rest = tl.full((ROWS, 1), 0, tl.int32) + left // (4 if MX else 2)  # scales of the row that remain
            if MX:
                if K % 128 == 0:
                    low = tl.load(blocks, mask=rest > 0, other=0)
                else:
                    low = load_scales(blocks, rest, 0)
                high = low
            elif K % 128 == 0:
                both = tl.load(blocks, mask=rest > 0, other=0)
                low, high = both.to(tl.int32), (both >> 32).to(tl.int32)
            elif K % 64 == 0:
                low, high = tl.load(blocks, mask=rest > 0, other=0), tl.load(blocks + 1, mask=rest > 4, other=0)
            else:
                low, high = load_scales(blocks, rest, 0), load_scales(blocks, rest, 4)
        low, high = tl.broadcast_to(low, (ROWS, WORDS)), tl.broadcast_to(high, (ROWS, WORDS))
        if MX:
            scales = select_powers(low, selector, offset, INTERPRETED)
        else:
            scales = select_scales(low, high, selector, INTERPRETED)
        for i in tl.static_range(2):
            if WHOLE:
                quad = tl.load(inputs + i, mask=live, other=0)
            else:
                quad = tl.load(inputs + i, mask=live & (word < left)[:, None], other=0)
            for j in tl.static_range(2):
                pair = (quad >> (32 * j)).to(tl.int32)
                sums = multiply(w, scales, pair, 4 * i + 2 * j, sums, INTERPRETED)
                sums = multiply(w, scales, pair, 4 * i + 2 * j + 1, sums, INTERPRETED)
        weights += WORDS
        blocks += PER_STEP
        inputs += WORDS * 2
    return sums


@triton.jit
def finish(
    sums: tl.tensor, out: tl.tensor, scale: tl.tensor, bias: tl.tensor, M: tl.tensor, N: tl.tensor, out_N: tl.tensor,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """Apply the factor of each row to `sums` `[ROWS, TOKENS]`, and store it as rows of `out` `[M, out_N]`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    sums *= tl.load(scale + tl.minimum(row, N - 1))[:, None]
    if BIAS:
        sums += tl.load(bias + tl.minimum(row, N - 1)).to(tl.float32)[:, None]
    at = token.to(tl.int64)[None, :] * out_N + row[:, None]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(row < N)[:, None] & (token < M)[None, :])


@triton.jit(do_not_specialize=["M"])  # else each model is compiled for 1 token, for multiples of 16, and for others
def nvfp4_linear_kernel(
    x: tl.tensor, weight: tl.tensor, block_scale: tl.tensor, selectors: tl.tensor, offset: tl.tensor, scale: tl.tensor,
    bias: tl.tensor, out: tl.tensor, work: tl.tensor, count: tl.tensor, M: tl.tensor, N: tl.tensor, out_N: tl.tensor,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (tile of rows, range of K).

    `x`: int64 `[M, K / 4]`, four of bfloat16; int32 `weight` `[N, K / 8]`; `block_scale` `[N, .]` as `scale_words` makes it:
    one load for all scales of a step, where K allows, asks the cache once per row and not twice. `selectors` int32 `[16]`: for
    each word of a step, its block four times, one per nibble. `scale`: float32 `[N]`. With `offset`, int32 `[16]`, the codes
    are those of MXFP4 (`mxfp4_linear`).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(row, N - 1).to(tl.int64)  # the last tile repeats a row instead of masking every load
    token = tl.arange(0, TOKENS)
    group: tl.constexpr = 16 if offset is None else 32
    per_row: tl.constexpr = K // 128 if K % 128 == 0 else (K // 64 if K % 64 == 0 and group == 16 else K // group)
    shift = None
    if offset is not None:
        shift = tl.broadcast_to(tl.load(offset + tl.arange(0, 16)[None, :]), (ROWS, 16))
    sums = sum_products(
        x + token * (K // 4), token < M, weight + row * (K // 8), block_scale + row * per_row, selectors,
        tl.program_id(1) * STEPS, K, ROWS, TOKENS, SPLIT, STEPS, INTERPRETED, shift,
    )
    if SPLIT == 1:
        finish(sums, out, scale, bias, M, N, out_N, ROWS, TOKENS, BIAS)
    else:
        if leave_partial(sums, work, count, SPLIT, ROWS, TOKENS):
            total = add_partials(work, count, SPLIT, ROWS, TOKENS)
            finish(total, out, scale, bias, M, N, out_N, ROWS, TOKENS, BIAS)


@functools.cache
def word_selectors(device: torch.device) -> Tensor:
    """Int32 `[16]`: for each word of 128 weights the block scale that it uses, once per nibble of a byte selector."""
    return (torch.arange(16, dtype=torch.int32, device=device) // 2) * 0x1111


def scale_words(scale: Tensor) -> Tensor:
    """Block scales `[..., K / 16]` as the kernel takes them: 8 in an int64, or 4 in an int32, or each as uint8, as K allows."""
    words = next(dtype for size, dtype in ((8, torch.int64), (4, torch.int32), (1, torch.uint8)) if scale.shape[-1] % size == 0)
    return scale.contiguous().view(words)


def prepare(spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """A function for the layer that `spec` describes, of the stored `tensors` by role, with `bias` where there is one.

    It takes `x` `[M, K]`, 1 <= M <= 64, bfloat16, and returns `[M, N]` in the dtype of `x`; or fills `out=` `[M, N]`,
    float32 or bfloat16, and cuts its work as `tiles=` says.  `left=`: what `quantize` makes of `x`,
    with its scale.  Keeps 4 bytes per row beside the weight.  Reads the values of
    `input_scale` once, which waits for the device: call it before a graph is captured.
    """
    N, K = spec.shape
    rows = [count for _, count in spec.partitions]
    bias, device = tensors.get("bias"), tensors["weight"].device
    quantized = spec.activations is not None
    scale = tensors["weight_scale_2"] * ROW_FACTOR * (tensors["input_scale"] if quantized else 1.0)
    scale = scale[row_partitions(rows, device)]
    runs = input_runs(rows, tensors["input_scale"] if quantized else None)
    words = tensors["weight"].view(torch.int32)  # K is a multiple of 16
    block_scale = scale_words(tensors["weight_scale"])

    name = tuned.name("nvfp4_linear", spec.scheme, spec.activations)

    def linear(
        x: Tensor, out: Tensor | None = None, tiles: Tiles | None = None, left: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        x = x.contiguous()
        M = len(x)
        result = torch.empty(M, N, dtype=x.dtype, device=device) if out is None else out
        most = SHAPES[-1].tokens
        if most < M:
            for first in range(0, M, most):
                part = slice(first, first + most)
                linear(x[part], result[part], tiles, None if left is None else (left[0][part], left[1]))
            return result
        for input_scale, start, stop in runs:
            inputs = x if input_scale is None else left[0] if left else quantize(x, input_scale)
            cut = tiles or tiles_for(name, SHAPES, M, stop - start, K, device)
            nvfp4_linear_kernel[(-(-(stop - start) // cut.rows), cut.split)](
                inputs.view(torch.int64), words[start:stop], block_scale[start:stop],
                word_selectors(device), None, scale[start:stop], None if bias is None else bias[start:stop],
                result[:, start:stop], workspace(cut, stop - start, device), counters(device), M, stop - start, N,
                K, cut.rows, cut.tokens, cut.split, cut.steps, bias is not None, INTERPRETED,
                num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
            )  # fmt: skip
        return result

    return linear

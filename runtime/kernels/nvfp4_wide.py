"""NVFP4 weights for many tokens at once: decoded in registers, and inputs in the order in which that yields them.

    y[m, n] = sum over k of x[m, k] e2m1(w[n, k]) e4m3(weight_scale[n, k // 16])

As in `nvfp4_linear`, the matmul over 128 k is done as eight, one for each nibble j of 16 words, so that no weight moves between
threads.  Its right operand is x[m, 8 i + j] for words i, which the tensor cores of four warps read from shared memory; there
it must lie in one piece.  So the inputs are rearranged once, in global memory, before all tiles of rows read them:

    x'[m, 128 s + 16 j + i] = x[m, 128 s + 8 i + j]           0 where K ends inside a step

A weight takes 5 instructions; for 128 tokens it occupies the tensor cores of sm_90 for as long as 8 take to issue.  Programs
have 256 rows because each reads the inputs from the L2 cache, which would be too slow for fewer, and sixteen warps because
these have just the registers; of eight, Triton 3.6 makes an empty kernel for sm_100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.nvfp4_linear import decode, load_scales, select_scales
from runtime.kernels.nvfp4_quantize import GROUPS_AT_ONCE, by_nibble
from runtime.kernels.tiles import operand, show_copies


@triton.jit
def arrange_kernel(x: tl.tensor, out: tl.tensor, K: tl.constexpr, GROUPS: tl.constexpr) -> None:
    """Program (m, g): `GROUPS` groups of 16 inputs of row m."""
    width: tl.constexpr = (K + 127) // 128 * 128
    token = tl.program_id(0).to(tl.int64)
    at = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[:, None] * 16 + tl.arange(0, 16)[None, :]
    values = by_nibble(tl.load(x + token * K + at, mask=at < K, other=0.0), GROUPS)
    tl.store(out + token * width + at, values, mask=at < width)


def arrange(x: Tensor) -> Tensor:
    """x' of `x` `[M, K]`, contiguous: `[M, K rounded up to 128]`."""
    M, K = x.shape
    out = torch.empty(M, -(-K // 128) * 128, dtype=x.dtype, device=x.device)
    arrange_kernel[(M, -(-K // (16 * GROUPS_AT_ONCE)))](x, out, K, GROUPS_AT_ONCE)
    return out


@triton.jit
def sum_wide(
    inputs: tl.tensor, live: tl.tensor, weights: tl.tensor, blocks: tl.tensor, selectors: tl.tensor,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr, INTERPRETED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Float32 `[ROWS, TOKENS]`: 2**-7 times the products of rows and inputs, over all of K.

    Pointers to where each row or token begins: `weights` and `blocks` `[ROWS]` as in `nvfp4_linear.sum_products`, `inputs`
    `[TOKENS]` as `arrange` leaves them, of which those that are not `live` count as 0.
    """
    WORDS: tl.constexpr = 16
    WHOLE: tl.constexpr = STEPS * 128 == K
    PER_STEP: tl.constexpr = 1 if WHOLE else (2 if K % 64 == 0 else 8)
    word = tl.arange(0, WORDS)
    weights = weights[:, None] + word[None, :]
    blocks = blocks[:, None]
    inputs = inputs[:, None] + word[None, :]
    live = live[:, None]
    selector = tl.broadcast_to(tl.load(selectors + word[None, :]), (ROWS, WORDS))
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(STEPS):
        if WHOLE:
            w = tl.load(weights)
            both = tl.load(blocks)
            low, high = both.to(tl.int32), (both >> 32).to(tl.int32)
        else:
            left = K // 8 - step * WORDS  # words of K that remain
            w = tl.load(weights, mask=(word < left)[None, :], other=0)
            rest = tl.full((ROWS, 1), 0, tl.int32) + left // 2  # scales of the row that remain
            if K % 64 == 0:
                low, high = tl.load(blocks, mask=rest > 0, other=0), tl.load(blocks + 1, mask=rest > 4, other=0)
            else:
                low, high = load_scales(blocks, rest, 0), load_scales(blocks, rest, 4)
        low, high = tl.broadcast_to(low, (ROWS, WORDS)), tl.broadcast_to(high, (ROWS, WORDS))
        scales = select_scales(low, high, selector, INTERPRETED)
        if not INTERPRETED:
            show_copies(step)
        for j in tl.static_range(8):
            a = tl.load(inputs + j * WORDS, mask=live, other=0.0)
            if INTERPRETED:
                sums += tl.dot(decode(w, scales, j, INTERPRETED), tl.trans(a.to(tl.float32)), input_precision="ieee")
            else:
                sums = tl.dot(decode(w, scales, j, INTERPRETED), tl.trans(operand(a, ROWS)), sums)
        weights += WORDS
        blocks += PER_STEP
        inputs += WORDS * 8
    return sums

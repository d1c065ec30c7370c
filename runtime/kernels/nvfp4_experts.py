"""NVFP4 experts: stacks of linears in E2M1 codes, for few and for many tokens.

`slots` has the maths of experts, `nvfp4_linear` that of the weights and their decoding; here scales have E as their first axis.
Quantised inputs: the global scale belongs to an expert, so each slot has values of its own.  Blocks of 64 and 128 slots go
through `nvfp4_wide`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.format import ModuleSpec
from runtime.kernels import slots
from runtime.kernels.cases import ExpertCase
from runtime.kernels.fp8_linear import row_partitions
from runtime.kernels.nvfp4_linear import ROW_FACTOR, reference, scale_words, sum_products, word_selectors
from runtime.kernels.nvfp4_quantize import quantize_for_experts
from runtime.kernels.nvfp4_wide import arrange, sum_wide
from runtime.kernels.slots import (
    NOTHING,
    WIDE,
    Launch,
    TwoStages,
    can_run,
    cut_blocks,
    cut_slots,
    kind_of,
    one_input_scale,
    store_block,
    store_slot,
    tile_rows,
    workspace,
)
from runtime.kernels.tiles import INTERPRETED, Shape, Tiles, counters

SCHEMES = ("nvfp4",)
ACTIVATIONS: tuple[str | None, ...] = (None, "nvfp4")
SLOT_SHAPES = (Shape(8, 64, 2, 4, registers=96),)  # by itself the assembler stops at 80 and spills
# Four groups of four warps read the inputs of a wide block once and have just the registers of a multiprocessor.
BLOCK_SHAPES = (
    Shape(16, 128, 2, 4),
    Shape(32, 64, 2, 4),
    Shape(64, 256, 16, 1, registers=128),
    Shape(WIDE, 256, 16, 1, registers=128),
)
WIDE_FROM = 64

CASES = (
    ExpertCase("gated", "nvfp4", 4, 2, 48, 144, tiny=True),
    ExpertCase("one partition, clipped", "nvfp4", 3, 3, 32, 128, parts=1, limit=0.5, tiny=True),
    ExpertCase("not gated", "nvfp4", 4, 3, 80, 256, gated=False, tiny=True),
    ExpertCase("inputs", "nvfp4", 4, 2, 64, 400, "nvfp4", tiny=True),
    ExpertCase("Qwen3.5-35B-A3B", "nvfp4", 256, 8, 512, 2048),
    ExpertCase("Qwen3.5-35B-A3B", "nvfp4", 256, 8, 512, 2048, "nvfp4"),
    ExpertCase("Nemotron 3 Nano", "nvfp4", 128, 6, 1856, 2688, gated=False),
    ExpertCase("Nemotron 3 Super", "nvfp4", 512, 22, 2688, 1024, gated=False),
    ExpertCase("Step-3.5-Flash", "nvfp4", 288, 8, 1280, 4096),
)  # fmt: skip


@triton.jit
def nvfp4_experts_kernel(
    x: tl.tensor, weight: tl.tensor, block_scale: tl.tensor, selectors: tl.tensor, scale: tl.tensor, scale_row: tl.tensor,
    chosen: tl.tensor, share: tl.tensor, order: tl.tensor, table: tl.tensor, out: tl.tensor, work: tl.tensor, count: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, SCALES: tl.constexpr, SHARED: tl.constexpr, PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    ACT: tl.constexpr, LIMIT: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (tile of rows, range of K, slot), or with `order` and `table` (tile, 0, block).

    As for `nvfp4_linear_kernel`: `x` int64 `[., K / 4]`, `weight` int32 `[E, N, K / 8]`, `block_scale` `[E, N, .]`.  `scale`
    `[E, SCALES]`; `scale_row` int32 `[N]`.
    Slot s has row s // `SHARED` of `x`, which with `WIDE` is bfloat16 as `nvfp4_wide` takes it.
    """
    token = tl.arange(0, TOKENS)
    if table is None:
        slot = tl.program_id(2)
        live = token < 1
        slots = token * 0 + slot
        expert = tl.load(chosen + slot).to(tl.int32)
        work_left = True
    else:
        table += tl.program_id(2) * 3
        expert, start, stop = tl.load(table), tl.load(table + 1), tl.load(table + 2)
        live = start + token < stop
        slots = tl.load(order + start + token, mask=live, other=0)
        work_left = start < stop
    if work_left:
        row = tile_rows(N, ROWS, ACT)
        words_per_row: tl.constexpr = K // 128 if K % 128 == 0 else (K // 64 if K % 64 == 0 else K // 16)
        words = weight + expert.to(tl.int64) * (N * (K // 8)) + row * (K // 8)
        blocks = block_scale + expert.to(tl.int64) * (N * words_per_row) + row * words_per_row
        inputs = (slots // SHARED).to(tl.int64)
        if WIDE:
            sums = sum_wide(x + inputs * (STEPS * 128), live, words, blocks, selectors, K, ROWS, TOKENS, STEPS, INTERPRETED)
        else:
            first = tl.program_id(1) * STEPS
            sums = sum_products(
                x + inputs * (K // 4), live, words, blocks, selectors, first, K, ROWS, TOKENS, SPLIT, STEPS, INTERPRETED
            )
        sums *= tl.load(scale + expert * SCALES + tl.load(scale_row + row))[:, None]
        if table is None:
            store_slot(tl.sum(sums, 1), slot, expert, out, None, share, work, count, N, ROWS, SPLIT, ACT, LIMIT, PER_TOKEN)
        else:
            store_block(sums, slots, live, expert, out, None, N, ROWS, TOKENS, ACT, LIMIT)


@dataclass(frozen=True)
class Nvfp4Stage:
    """A stack of linears; `slots.Stage`.  `words`: the weights.  `act`, `limit`: what follows."""

    spec: ModuleSpec
    words: Tensor
    block_scale: Tensor
    scale: Tensor
    scale_row: Tensor
    input_scale: Tensor | None
    act: int
    limit: float | None

    @property
    def N(self) -> int:  # noqa: N802 (a dimension)
        """Rows of an expert."""
        return self.spec.shape[0]

    @property
    def width(self) -> int:
        """Of the output."""
        return self.N // 2 if self.act == 1 else self.N

    def __call__(self, x: Tensor, launch: Launch, out: Tensor, tiles: Tiles | None = None) -> Tensor:
        """See `slots.Stage`."""
        chosen, blocks = launch.chosen, launch.blocks
        count, device, (N, K) = chosen.numel(), x.device, self.spec.shape
        wide = blocks is not None and blocks.tokens >= WIDE_FROM
        if self.input_scale is not None:
            x = quantize_for_experts(x, self.input_scale, chosen, wide)
        elif wide:
            x = arrange(x)
        if blocks is None:
            cut = tiles or cut_slots(SLOT_SHAPES, count, N, K, device)
            grid = (-(-N // cut.rows), cut.split, count)
        else:
            cut = tiles or cut_blocks(BLOCK_SHAPES, blocks.tokens, K)
            grid = (-(-N // cut.rows), 1, len(blocks.table))
        nvfp4_experts_kernel[grid](
            x if wide else x.view(torch.int64), self.words, self.block_scale, word_selectors(device),
            self.scale, self.scale_row, chosen, launch.share, None if blocks is None else blocks.order,
            None if blocks is None else blocks.table, out, workspace(cut, grid, launch, device), counters(device),
            N, K, self.scale.shape[1], count // len(x), chosen.shape[1], cut.rows, cut.tokens, cut.split, cut.steps,
            self.act, self.limit, wide, INTERPRETED, num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
        )  # fmt: skip
        return out


def prepare(
    first: ModuleSpec, down: ModuleSpec, firsts: Mapping[str, Tensor], downs: Mapping[str, Tensor], activation: object
) -> TwoStages | None:
    """A function for the experts that the specs describe, of their stored tensors by role; None where it cannot serve them.

    Reads the values of `input_scale` once, which waits for the device: call it before a graph is captured.
    """
    kind = kind_of(activation)
    if kind is None or not can_run((first, down), (firsts, downs)):
        return None
    a, b = stage(first, firsts, *kind), stage(down, downs, NOTHING, None)
    return TwoStages(len(firsts["weight"]), a, b, tuple(shape.tokens for shape in BLOCK_SHAPES))


def stage(spec: ModuleSpec, tensors: Mapping[str, Tensor], act: int, limit: float | None) -> Nvfp4Stage:
    """One of the stages; `spec`: of one expert or of all.  Keeps 4 bytes per row of one expert beside the weights."""
    input_scale = one_input_scale(spec, tensors)
    scale = tensors["weight_scale_2"] * ROW_FACTOR * (1.0 if input_scale is None else input_scale.unsqueeze(1))
    scale_row = row_partitions([count for _, count in spec.partitions], scale.device).int()
    words, block_scale = tensors["weight"].view(torch.int32), scale_words(tensors["weight_scale"])
    return Nvfp4Stage(spec, words, block_scale, scale.contiguous(), scale_row, input_scale, act, limit)


def errors(case: ExpertCase, device: torch.device, seed: int) -> dict[str, float]:
    """See `slots.errors`: each width of the blocks, and slots."""
    plans = [(1, None, None), (3, None, None), *((40, shape.tokens, None) for shape in BLOCK_SHAPES)]
    return slots.errors(sys.modules[__name__], reference, case, device, seed, plans if case.tiny else plans[:1])


def launch(case: ExpertCase, device: torch.device, seed: int) -> Callable[[], Tensor]:
    """See `slots.launch`."""
    return slots.launch(sys.modules[__name__], case, device, seed)

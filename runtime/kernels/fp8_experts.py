"""FP8 experts: stacks of linears in E4M3 codes, for few and for many tokens.

`slots` has the maths of experts, `fp8_linear` that of the weights and their scales, which here have E as their first axis.
Quantised inputs: a static scale belongs to an expert, so each slot has codes of its own, and where the second stage has one,
the first writes codes.  Scales that are made of the input (per token, or per token and 128 inputs) belong to a token.

Blocks of 128 slots: two groups of four warps have 64 rows each and decode them, as the left operand, in registers; with one
scale per row the products of a step are still under way while the next one is decoded.
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
from runtime.kernels.fp8_linear import reference, row_blocks, row_partitions, sum_products
from runtime.kernels.fp8_quantize import quantize, quantize_for_experts
from runtime.kernels.slots import (
    NOTHING,
    WIDE,
    Blocks,
    Launch,
    TwoStages,
    can_run,
    code_dtype,
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

SCHEMES = ("fp8_tensor", "fp8_channel", "fp8_block")
ACTIVATIONS: tuple[str | None, ...] = (None, "fp8_static", "fp8_token", "fp8_group", "fp8_group_e8m0")
SLOT_SHAPES = (Shape(8, 64, 2, 4, registers=128),)
BLOCK_SHAPES = (Shape(16, 64, 2, 4), Shape(64, 64, 4, 2, registers=224), Shape(WIDE, 128, 8, 1))

CASES = (
    ExpertCase("gated", "fp8_tensor", 4, 2, 40, 144, tiny=True),
    ExpertCase("one partition, clipped", "fp8_tensor", 3, 3, 33, 128, parts=1, limit=0.5, tiny=True),
    ExpertCase("rows", "fp8_channel", 5, 2, 48, 272, tiny=True),
    ExpertCase("blocks", "fp8_block", 4, 2, 136, 160, tiny=True),
    ExpertCase("not gated", "fp8_tensor", 4, 3, 72, 96, gated=False, tiny=True),
    ExpertCase("static", "fp8_tensor", 4, 2, 64, 144, "fp8_static", tiny=True),
    ExpertCase("static, not gated", "fp8_tensor", 4, 2, 40, 256, "fp8_static", gated=False, tiny=True),
    ExpertCase("tokens", "fp8_channel", 4, 2, 64, 144, "fp8_token", tiny=True),
    ExpertCase("groups", "fp8_block", 4, 2, 144, 272, "fp8_group", tiny=True),
    ExpertCase("Qwen3.5-35B-A3B", "fp8_block", 256, 8, 512, 2048, "fp8_group"),
    ExpertCase("Qwen3.5-35B-A3B", "fp8_tensor", 256, 8, 512, 2048),
    ExpertCase("Qwen3.5-35B-A3B", "fp8_tensor", 256, 8, 512, 2048, "fp8_static"),
    ExpertCase("Nemotron 3 Nano", "fp8_tensor", 128, 6, 1856, 2688, "fp8_static", gated=False),
    ExpertCase("Step-3.5-Flash", "fp8_block", 288, 8, 1280, 4096, "fp8_group"),
)  # fmt: skip


@triton.jit
def fp8_experts_kernel(
    x: tl.tensor, weight: tl.tensor, scale: tl.tensor, scale_row: tl.tensor, x_scale: tl.tensor, chosen: tl.tensor,
    share: tl.tensor, order: tl.tensor, table: tl.tensor, out: tl.tensor, out_scale: tl.tensor,
    work: tl.tensor, count: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, SCALES: tl.constexpr, SHARED: tl.constexpr, PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    X_SCALE: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (tile of rows, range of K, slot), or with `order` and `table` (tile, 0, block).

    `weight` `[E, N, K]`.  `scale` `[E, SCALES]`; `scale_row` int32 `[N]`: the scale of each row, or its row of blocks.
    Slot s has row s // `SHARED` of `x`.  `X_SCALE`: 0 for bfloat16 input; else `x` holds codes with 1: a scale per expert,
    2: per row of `x`, 3: per row and 128 inputs, 4: that in the order of `order`, so that threads need one address.
    """
    COLUMNS: tl.constexpr = (K + 127) // 128
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
        x_scales = None
        if X_SCALE == 3:
            x_scales = x_scale + slots // SHARED * COLUMNS
        if X_SCALE == 4:
            x_scales = x_scale + start.to(tl.int64) * COLUMNS + token * COLUMNS
        scales = scale + expert * SCALES + tl.load(scale_row + row) * (COLUMNS if BLOCK else 1)
        sums = sum_products(
            x + (slots // SHARED).to(tl.int64) * K, live, x_scales,
            weight + expert.to(tl.int64) * (N * K) + row * K, scales if BLOCK else None,
            tl.program_id(1) * STEPS, K, ROWS, TOKENS, SPLIT, STEPS, X_SCALE != 0, INTERPRETED,
        )
        if not BLOCK:
            sums *= tl.load(scales)[:, None]
        if X_SCALE == 1:
            sums *= tl.load(x_scale + expert)
        if X_SCALE == 2:
            sums *= tl.load(x_scale + slots // SHARED)[None, :]
        if table is None:
            store_slot(
                tl.sum(sums, 1), slot, expert, out, out_scale, share, work, count, N, ROWS, SPLIT, ACT, LIMIT, PER_TOKEN
            )
        else:
            store_block(sums, slots, live, expert, out, out_scale, N, ROWS, TOKENS, ACT, LIMIT)


@dataclass(frozen=True)
class Fp8Stage:
    """A stack of linears; `slots.Stage`.  `act`, `limit`: what follows."""

    spec: ModuleSpec
    weight: Tensor
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
        kind, chosen, blocks = self.spec.activations, launch.chosen, launch.blocks
        count, device, (N, K) = chosen.numel(), x.device, self.spec.shape
        x_scale, x_scale_kind = None, 0
        if kind == "fp8_static":
            assert self.input_scale is not None
            x_scale, x_scale_kind = self.input_scale, 1
            if x.dtype != code_dtype(blocks):
                x = quantize_for_experts(x, self.input_scale, chosen, code_dtype(blocks))
        elif kind is not None:
            left = launch.left
            if left is None or left[0].dtype != code_dtype(blocks):
                left = quantize(x, kind, dtype=code_dtype(blocks))
            x, x_scale = left
            x_scale_kind = 2 if kind == "fp8_token" else 3
            if x_scale_kind == 3 and blocks is not None and blocks.tokens >= WIDE:
                x_scale, x_scale_kind = scales_in_order(x_scale, blocks, count // len(x)), 4
        if blocks is None:
            cut = tiles or cut_slots(SLOT_SHAPES, count, N, K, device)
            grid = (-(-N // cut.rows), cut.split, count)
        else:
            cut = tiles or cut_blocks(BLOCK_SHAPES, blocks.tokens, K)
            grid = (-(-N // cut.rows), 1, len(blocks.table))
        fp8_experts_kernel[grid](
            x, self.weight, self.scale, self.scale_row, x_scale, chosen, launch.share,
            None if blocks is None else blocks.order, None if blocks is None else blocks.table, out, launch.out_scale,
            workspace(cut, grid, launch, device), counters(device), N, K, self.scale[0].numel(), count // len(x),
            chosen.shape[1], cut.rows, cut.tokens, cut.split, cut.steps, self.spec.scheme == "fp8_block", x_scale_kind,
            self.act, self.limit, INTERPRETED, num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
        )  # fmt: skip
        return out


def scales_in_order(scale: Tensor, blocks: Blocks, shared: int) -> Tensor:
    """Rows `[S, C]` of `scale` `[S / shared, C]` as blocks take them, and room for what the last one reads beyond its slots."""
    slots, columns = len(blocks.order), scale.shape[1]
    sorted_ = torch.empty(slots + blocks.tokens, columns, dtype=scale.dtype, device=scale.device)
    torch.index_select(scale, 0, blocks.order // shared, out=sorted_[:slots])
    return sorted_


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
    return TwoStages(len(firsts["weight"]), a, b, tuple(s.tokens for s in BLOCK_SHAPES), down.activations == "fp8_static")


def stage(spec: ModuleSpec, tensors: Mapping[str, Tensor], act: int, limit: float | None) -> Fp8Stage:
    """One of the stages; `spec`: of one expert or of all.  Keeps 4 bytes per row of one expert beside the weights."""
    rows, device = [count for _, count in spec.partitions], tensors["weight"].device
    scale_row = {
        "fp8_tensor": lambda: row_partitions(rows, device),
        "fp8_channel": lambda: torch.arange(spec.shape[0], device=device),
        "fp8_block": lambda: row_blocks(rows, device),
    }[spec.scheme]().int()
    scale = tensors["weight_scale"].contiguous()
    return Fp8Stage(spec, tensors["weight"], scale, scale_row, one_input_scale(spec, tensors), act, limit)


def errors(case: ExpertCase, device: torch.device, seed: int) -> dict[str, float]:
    """See `slots.errors`: each width of the blocks, and slots."""
    plans = [(1, None, None), (3, None, None), *((40, shape.tokens, None) for shape in BLOCK_SHAPES)]
    return slots.errors(sys.modules[__name__], reference, case, device, seed, plans if case.tiny else plans[:1])


def launch(case: ExpertCase, device: torch.device, seed: int) -> Callable[[], Tensor]:
    """See `slots.launch`."""
    return slots.launch(sys.modules[__name__], case, device, seed)

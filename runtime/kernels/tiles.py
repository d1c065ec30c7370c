"""How the kernels for few tokens cut their work: tiles of rows, and splits of K that the last program adds up.

    y [M, N] = x [M, K] @ W [N, K]^T,  M <= 64

Weights are the left operand of the tensor cores and tokens the narrow right one, so 1 token costs what 8 do.  A program owns
`rows` rows of W and one of `split` ranges of K.  With a split, programs leave float32 partial sums in a workspace; the
last one to arrive at a tile adds them in the order of K, so results do not depend on who was last, and sets the counter of
that tile back to 0: launches that follow on the same stream, or a replayed graph, find it ready.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import target_info
from triton.language.extra.cuda import num_warps

from runtime.kernels.tuned import lookup
from runtime.kernels.twin import actual

MAX_TOKENS = 64
INPUTS = 128  # elements of K per step: the block of FP8 block scales and of grouped input scales
STAGES = 4
COUNTERS = 4096  # tiles that a split launch may have
H200_SMS = 132
FENCE = tl.constexpr("fence.proxy.async.shared::cta; mov.b32 $0, $1;")
# The interpreter computes wrongly in bfloat16 and cannot run inline assembly: kernels then work in float32.
INTERPRETED: bool = triton.knobs.runtime.interpret
# Before 3.8, Triton lets `wgmma` and `tcgen05` read what `cp.async` brought to shared memory with no fence between
# (triton-lang/triton, pull request 9610).  That gave wrong numbers on B200 (pytorch/pytorch, issue 181248).
FENCED = tl.constexpr(INTERPRETED or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8))


@dataclass(frozen=True, slots=True)
class Tiles:
    """One way to cut a launch.

    `rows`: rows of W per program; `tokens`: width of the right operand, M rounded up; `split`: ranges of K; `steps`: steps
    of `INPUTS` elements per range.  `warps` and `stages`: threads / 32, and steps that are loaded ahead.  `registers`: a limit
    per thread where the assembler by itself would take too few and spill.
    """

    rows: int
    tokens: int
    split: int
    steps: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """The part of `Tiles` that does not depend on N and K, and how many programs a multiprocessor should get."""

    tokens: int
    rows: int
    warps: int
    programs: int
    registers: int | None = None


def choose_tiles(shapes: Sequence[Shape], M: int, N: int, K: int, sms: int = H200_SMS) -> Tiles:
    """The default for a matmul on a device with `sms` multiprocessors: enough programs to fill it, by splitting K.

    `shapes`: what a kernel allows, by ascending `tokens`.
    """
    shape = next(s for s in shapes if s.tokens >= M)
    steps = -(-K // INPUTS)
    tiles = -(-N // shape.rows)
    split = min(-(-shape.programs * sms // tiles), max(1, steps // 4)) if tiles <= COUNTERS else 1
    per_split = -(-steps // split)
    return Tiles(shape.rows, shape.tokens, -(-steps // per_split), per_split, shape.warps, STAGES, shape.registers)


def tiles_for(kernel: str, shapes: tuple[Shape, ...], M: int, N: int, K: int, device: torch.device) -> Tiles:
    """What was measured to be best for a kernel, `tuned.name`, on this GPU; without that the default."""
    return _tiles_for(kernel, shapes, M, N, K, actual(device))


@functools.cache
def _tiles_for(kernel: str, shapes: tuple[Shape, ...], M: int, N: int, K: int, device: torch.device) -> Tiles:
    default = choose_tiles(shapes, M, N, K, multiprocessors(device))
    return recut(default, K, **lookup(device, kernel, N, K, default.tokens))


def recut(tiles: Tiles, K: int, split: int | None = None, stages: int | None = None, warps: int | None = None) -> Tiles:
    """The same with at most `split` ranges of K, none of which is empty, or with other `stages` or `warps`."""
    steps = -(-K // INPUTS)
    per_split = -(-steps // (split or tiles.split))
    return replace(
        tiles, split=-(-steps // per_split), steps=per_split, stages=stages or tiles.stages, warps=warps or tiles.warps
    )


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; for any other, those of an H200."""
    return _multiprocessors(actual(device))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else H200_SMS


@functools.cache
def counters(device: torch.device) -> Tensor:
    """Int32 `[COUNTERS]` zeros, one allocation per device.  Launches on two streams at once must not share them."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def workspace(tiles: Tiles, N: int, device: torch.device) -> Tensor:
    """Float32 room for the partial sums of a launch; one element where nothing is split."""
    size = -(-N // tiles.rows) * tiles.split * tiles.rows * tiles.tokens if tiles.split > 1 else 1
    return torch.empty(size, dtype=torch.float32, device=device)


@triton.jit
def operand(x: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """16-bit numbers that were loaded and are multiplied as they are, into a product of `ROWS` rows.

    Where Triton forgets a fence, the product is of a size for `tcgen05`, and `show_copies` cannot help, they pass through
    registers: what is stored to shared memory from there is fenced.
    """
    if FENCED or ROWS < 64 or num_warps() % 4 != 0 or not target_info.cuda_capability_geq(10):
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=True, pack=2)


@triton.jit
def show_copies(step: tl.tensor) -> None:
    """Before a matmul of four warps or more on sm_90: what asynchronous copies brought to shared memory is there for `wgmma`
    too, which reads it another way.  Triton 3.6 forgets this, and for sm_100 compiles no such fence: there, see `operand`.
    `step`: any number."""
    if target_info.cuda_capability_geq(9) and not target_info.cuda_capability_geq(10):
        tl.inline_asm_elementwise(FENCE, "=r,r", [step], tl.int32, is_pure=False, pack=1)


@triton.jit
def leave_partial(
    sums: tl.tensor, work: tl.tensor, count: tl.tensor, SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr
) -> tl.tensor:
    """Store the partial sums `[ROWS, TOKENS]` of this program; true for the last program of the tile."""
    tile, part = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    tl.store(work + (tile * SPLIT + part) * (ROWS * TOKENS) + at, sums)
    tl.debug_barrier()  # all threads have stored before one of them releases
    return tl.atomic_add(count + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1


@triton.jit
def add_partials(work: tl.tensor, count: tl.tensor, SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr) -> tl.tensor:
    """The sums `[ROWS, TOKENS]` of a tile over all ranges of K, in their order; its counter becomes 0."""
    tile = tl.program_id(0)
    at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for part in range(SPLIT):
        sums += tl.load(work + (tile * SPLIT + part) * (ROWS * TOKENS) + at, cache_modifier=".cg")  # past a stale L1
    tl.store(count + tile, 0)
    return sums

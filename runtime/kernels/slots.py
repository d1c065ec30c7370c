"""What the kernels of experts share: who works on what, the activation, and the sum over the experts of a token.

E experts, k of them for each of T tokens.  Slot s = t k + j is choice j of token t; S = T k slots, e = chosen[t, j].

    h[s] = activation(gate_e(x[t]), up_e(x[t]))               the first stage: one launch, gate and up row by row
    y[t] = sum over j of weights[t, j] * down_e(h[s])         the second stage: one launch and, for many tokens, the sum

Few tokens: a program takes one slot and reads its expert from what the router left on the device; nothing is sorted.  An
expert that several slots chose is read again, mostly from the L2 cache.  Ranges of K, and the slots of a token in the second
stage, leave partial sums as in `tiles`, and the last program adds them in order.
Many tokens: slots are sorted by expert, on the device too, and cut into blocks of one expert each; a program takes a block.
How wide blocks are depends on how many slots an expert has on average, since the host knows no more, and a quarter is added:
of experts that are chosen equally often, half have more than the average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.format import ACTIVATIONS, ModuleSpec
from runtime.kernels.cases import ExpertCase
from runtime.kernels.fp8_quantize import to_codes
from runtime.kernels.tiles import COUNTERS, INPUTS, STAGES, Shape, Tiles, choose_tiles, counters, multiprocessors
from runtime.nonlinear import ReLU2, SwiGLU

FEW_SLOTS = 128  # slots up to which every slot has programs of its own
LEAST_ROWS = 64  # of the tiles of that case
WIDE = 128  # slots of the widest blocks
MOST_SLOTS = 2**16  # at once: bounds the memory between the stages; a second run reads all experts again
COMBINED = 1024  # outputs per program of the sum over experts
NOTHING, SWIGLU, RELU2 = 0, 1, 2  # what follows a stage
BY_ROW = ("fp8_token", "fp8_group", "fp8_group_e8m0")  # inputs whose rows are quantised each by itself


@dataclass(frozen=True, slots=True)
class Blocks:
    """Slots sorted by expert, in blocks of at most `tokens`.

    `order`: int32 `[S]`.  `table`: int32 `[B, 3]`: expert, first and last + 1 in `order`; blocks at the end may be empty.
    """

    order: Tensor
    table: Tensor
    tokens: int


def code_dtype(blocks: Blocks | None) -> torch.dtype:
    """Of E4M3 codes between the stages.  Float16 holds all of them and is what the tensor cores take: wide blocks have no time
    to convert them once per tile of rows, and not at all before the products of the last step are there."""
    return torch.float16 if blocks is not None and blocks.tokens >= WIDE else torch.float8_e4m3fn


def sort_slots(chosen: Tensor, experts: int, tokens: int) -> Blocks:
    """Blocks of at most `tokens` slots for `chosen`, int64 `[T, k]`.  Reads nothing back to the host: B is an upper bound."""
    flat = chosen.flatten()
    order = flat.sort(stable=True).indices
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    blocks = (counts + (tokens - 1)) // tokens
    stops = blocks.cumsum(0)
    index = torch.arange(len(flat) // tokens + min(experts, len(flat)), device=flat.device)
    expert = torch.searchsorted(stops, index, right=True).clamp(max=experts - 1)
    last = counts.cumsum(0)[expert]
    start = last - counts[expert] + (index - stops[expert] + blocks[expert]) * tokens
    return Blocks(order.int(), torch.stack([expert, start, torch.minimum(start + tokens, last)], 1).int(), tokens)


@triton.jit
def tile_rows(N: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr) -> tl.tensor:
    """Int32 `[ROWS]`: the rows of an expert that this program takes; gate and up alternate."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if ACT == 1:
        return tl.minimum(i // 2, N // 2 - 1) + (i % 2) * (N // 2)
    else:
        return tl.minimum(i, N - 1)  # the last tile repeats a row instead of masking every load


@triton.jit
def activate(a: tl.tensor, b: tl.tensor, ACT: tl.constexpr, LIMIT: tl.constexpr) -> tl.tensor:
    """`min(silu(a), LIMIT) * clamp(b, -LIMIT, LIMIT)`, or `max(a, 0) ** 2`."""
    if ACT == 1:
        a = a / (1.0 + tl.exp(-a))
        if LIMIT is not None:
            a = tl.minimum(a, LIMIT)
            b = tl.minimum(tl.maximum(b, -LIMIT), LIMIT)
        return a * b
    else:
        a = tl.maximum(a, 0.0)
        return a * a


@triton.jit
def store_slot(
    sums: tl.tensor, slot: tl.tensor, expert: tl.tensor, out: tl.tensor, out_scale: tl.tensor, share: tl.tensor,
    work: tl.tensor, count: tl.tensor,
    N: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, PER_TOKEN: tl.constexpr,
) -> None:  # fmt: skip
    """What follows the sums `[ROWS]` of one slot: a row of h, in codes by `out_scale` `[E]` if any; or its share of y.

    `share`: routing weights `[S]` for the second stage, else None.
    """
    tile, tiles, part = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    i = tl.arange(0, ROWS)
    parts: tl.constexpr = SPLIT if share is None else SPLIT * PER_TOKEN
    at = slot
    if share is not None:
        sums *= tl.load(share + slot)
        at = slot // PER_TOKEN
        part += (slot % PER_TOKEN) * SPLIT
    last = True
    if parts > 1:
        pile = at * tiles + tile
        tl.store(work + (pile * parts + part) * ROWS + i, sums)
        tl.debug_barrier()  # all threads have stored before one of them releases
        last = tl.atomic_add(count + pile, 1, sem="acq_rel", scope="gpu") == parts - 1
    if last:
        if parts > 1:
            sums = tl.zeros((ROWS,), tl.float32)
            for p in range(parts):
                sums += tl.load(work + (pile * parts + p) * ROWS + i, cache_modifier=".cg")  # past a stale L1
            tl.store(count + pile, 0)
        if ACT == 1:
            first, second = tl.split(tl.reshape(sums, (ROWS // 2, 2)))
            row = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
            store_rows(activate(first, second, ACT, LIMIT), row, at, expert, out, out_scale, N // 2)
        elif ACT == 2:
            store_rows(activate(sums, sums, ACT, LIMIT), tile * ROWS + i, at, expert, out, out_scale, N)
        else:
            store_rows(sums, tile * ROWS + i, at, expert, out, out_scale, N)


@triton.jit
def store_rows(
    values: tl.tensor, row: tl.tensor, at: tl.tensor, expert: tl.tensor, out: tl.tensor, out_scale: tl.tensor, N: tl.constexpr
) -> None:
    """Values `[R]` to elements `row` of row `at` of `out` `[., N]`."""
    if out_scale is not None:
        values = to_codes(values, tl.load(out_scale + expert))
    tl.store(out + at.to(tl.int64) * N + row, values.to(out.dtype.element_ty), mask=row < N)


@triton.jit
def store_block(
    sums: tl.tensor, slot: tl.tensor, live: tl.tensor, expert: tl.tensor, out: tl.tensor, out_scale: tl.tensor,
    N: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr,
) -> None:  # fmt: skip
    """What follows the sums `[ROWS, TOKENS]` of a block: rows `slot` of `out`, in codes by `out_scale` `[E]` if any."""
    width: tl.constexpr = N // 2 if ACT == 1 else N
    rows: tl.constexpr = ROWS // 2 if ACT == 1 else ROWS
    if ACT == 1:
        first, second = tl.split(tl.permute(tl.reshape(sums, (rows, 2, TOKENS)), (0, 2, 1)))
        sums = activate(first, second, ACT, LIMIT)
    elif ACT == 2:
        sums = activate(sums, sums, ACT, LIMIT)
    if out_scale is not None:
        sums = to_codes(sums, tl.load(out_scale + expert))
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    at = slot.to(tl.int64)[None, :] * width + row[:, None]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(row < width)[:, None] & live[None, :])


@triton.jit
def combine_kernel(
    parts: tl.tensor, share: tl.tensor, out: tl.tensor, H: tl.constexpr, PER_TOKEN: tl.constexpr, STEP: tl.constexpr
) -> None:
    """Program (t, range of H): the sum over j of `share[t, j] * parts[t, j]`, in the order of j."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * STEP + tl.arange(0, STEP)
    sums = tl.zeros((STEP,), tl.float32)
    for j in range(PER_TOKEN):
        slot = token * PER_TOKEN + j
        sums += tl.load(share + slot) * tl.load(parts + slot * H + at, mask=at < H, other=0.0).to(tl.float32)
    tl.store(out + token * H + at, sums.to(out.dtype.element_ty), mask=at < H)


def combine(parts: Tensor, share: Tensor, out: Tensor) -> Tensor:
    """Fill `out` `[T, H]` with the sums of `parts` `[T * k, H]` weighted by `share`, float32 `[T, k]`."""
    T, H = out.shape
    combine_kernel[(T, -(-H // COMBINED))](parts, share, out, H, share.shape[1], COMBINED)
    return out


@dataclass(frozen=True, slots=True)
class Launch:
    """What a stage is launched with beside its own weights.

    `share`: routing weights for the second stage over few tokens.  `blocks`: for many tokens.  `out_scale`: float32 `[E]` where
    the output is E4M3 codes in `code_dtype`.  `left`: codes and scales of the input that are there already, where it is
    quantised by row.
    """

    chosen: Tensor
    share: Tensor | None = None
    blocks: Blocks | None = None
    out_scale: Tensor | None = None
    left: tuple[Tensor, Tensor] | None = None


class Stage(Protocol):
    """The linears of all experts, and what follows them."""

    @property
    def spec(self) -> ModuleSpec:
        """Of one expert or of all."""

    @property
    def N(self) -> int:  # noqa: N802 (a dimension)
        """Rows of an expert."""

    @property
    def width(self) -> int:
        """Of the output."""

    @property
    def input_scale(self) -> Tensor | None:
        """Float32 `[E]` where inputs are quantised by it."""

    def __call__(self, x: Tensor, launch: Launch, out: Tensor, tiles: Tiles | None = None) -> Tensor:
        """`x` `[T, K]` or `[S, K]`; fills `out`, one row per slot, or one per token where `launch` has shares."""


@dataclass(frozen=True)
class TwoStages:
    """All experts of a layer.  `block_tokens`: widths of the blocks that the kernels allow, ascending.

    `codes`: whether the first stage writes the codes that the second one takes.
    """

    experts: int
    first: Stage
    down: Stage
    block_tokens: tuple[int, ...]
    codes: bool = False

    @property
    def input_kind(self) -> str | None:
        """How tokens are quantised row by row, the same for all experts; None if not so."""
        kind = self.first.spec.activations
        return kind if kind in BY_ROW else None

    def __call__(
        self, x: Tensor, chosen: Tensor, weights: Tensor, left: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """`x` bfloat16 `[T, H]`, `chosen` int64 `[T, k]`, `weights` `[T, k]` to `[T, H]`.  Waits for nothing.

        `left`: codes and scales of `x` by `input_kind`, if they are there already.
        """
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        per_token = chosen.shape[1]
        x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.float().contiguous()
        step = max(1, MOST_SLOTS // per_token)
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            some = None if left is None else (left[0][part], left[1][part])
            self._run(x[part], chosen[part], weights[part], y[part], some)
        return y

    def _run(self, x: Tensor, chosen: Tensor, weights: Tensor, y: Tensor, left: tuple[Tensor, Tensor] | None) -> None:
        slots = chosen.numel()
        blocks = None
        if slots > FEW_SLOTS or -(-self.down.N // LEAST_ROWS) * len(x) > COUNTERS:
            usual = slots * 5 // (self.experts * 4)
            tokens = next((t for t in self.block_tokens if t >= usual), self.block_tokens[-1])
            blocks = sort_slots(chosen, self.experts, tokens)
        codes = self.down.input_scale if self.codes else None
        h = torch.empty(slots, self.first.width, dtype=code_dtype(blocks) if self.codes else x.dtype, device=x.device)
        self.first(x, Launch(chosen, None, blocks, codes, left), h)
        if blocks is None:
            self.down(h, Launch(chosen, weights), y)
        else:
            parts = torch.empty(slots, self.down.width, dtype=x.dtype, device=x.device)
            combine(self.down(h, Launch(chosen, None, blocks), parts), weights, y)


def kind_of(activation: object) -> tuple[int, float | None] | None:
    """The number of an activation for the kernels and its limit; None for one that they do not know."""
    match activation:
        case SwiGLU(limit):
            return SWIGLU, limit
        case ReLU2():
            return RELU2, None
    return None


def one_input_scale(spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The static input scale of each expert, `[E]` of the stored `[E, P]`; NaN where partitions differ.  None without one."""
    if spec.activations is None or not ACTIVATIONS[spec.activations]:
        return None
    scale = tensors["input_scale"]
    return torch.where((scale == scale[:, :1]).all(1), scale[:, 0], torch.nan)


def can_run(specs: Sequence[ModuleSpec], stages: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether the kernels know such inputs: gate and up of an expert must share their codes.  Waits for the device."""
    scales = [one_input_scale(spec, tensors) for spec, tensors in zip(specs, stages, strict=True)]
    if any(spec.pre_quant_scale for spec in specs):
        return False
    return not any(bool(scale.isnan().any()) for scale in scales if scale is not None and not scale.is_meta)


def cut_slots(shapes: Sequence[Shape], slots: int, N: int, K: int, device: torch.device) -> Tiles:
    """The default for few tokens: `slots` slots, each with programs of its own."""
    rows = -(-N // shapes[0].rows) * shapes[0].rows
    return choose_tiles(shapes, 1, rows * slots, K, multiprocessors(device))


def cut_blocks(shapes: Sequence[Shape], tokens: int, K: int) -> Tiles:
    """For many tokens: blocks of `tokens` slots, K not split."""
    shape = next(s for s in shapes if s.tokens >= tokens)
    return Tiles(shape.rows, shape.tokens, 1, -(-K // INPUTS), shape.warps, STAGES, shape.registers)


def workspace(tiles: Tiles, grid: tuple[int, int, int], launch: Launch, device: torch.device) -> Tensor:
    """Float32 room for the partial sums of a launch over few tokens; one element where there are none."""
    needed = launch.blocks is None and (tiles.split > 1 or launch.share is not None)
    return torch.empty(grid[0] * grid[1] * grid[2] * tiles.rows if needed else 1, dtype=torch.float32, device=device)


Linear = Callable[[Tensor, ModuleSpec, Mapping[str, Tensor]], Tensor]


def reference(
    linear: Linear, x: Tensor, chosen: Tensor, spec: ModuleSpec, tensors: Mapping[str, Tensor],
    activation: SwiGLU | ReLU2 | None,
) -> Tensor:  # fmt: skip
    """A stage in float64, `[S, width]`; `linear`: the reference of the scheme.  `x`: `[T, K]` or `[S, K]`."""
    rows = []
    for slot, expert in enumerate(chosen.flatten().tolist()):
        one = x[slot * len(x) // chosen.numel()].unsqueeze(0)
        y = linear(one, replace(spec, experts=None), {role: tensor[expert] for role, tensor in tensors.items()})
        rows.append(y if activation is None else activation(*y.split(y.shape[1] // activation.inputs, 1)))
    return torch.cat(rows)


Plan = tuple[int, int | None, Tiles | None]  # tokens; width of the blocks, None for single slots; how to cut


def errors(
    kernel: Any, linear: Linear, case: ExpertCase, device: torch.device, seed: int, plans: Sequence[Plan]
) -> dict[str, float]:
    """Largest error of each stage over its largest result, for several plans: NaN where an output was not written.  Of codes
    the share that are not those of what was written without: another build may round a sum otherwise, which moves few
    of them.  Fresh inputs, poisoned outputs.

    `kernel`: has `prepare`.  `linear`: reference of the scheme.
    """
    worst = {}
    for n, (T, width, cut) in enumerate(plans):
        (first, down), (a, b) = case.specs(), case.tensors(device, seed + n)
        run, (chosen, share) = kernel.prepare(first, down, a, b, case.activation()), case.chosen(T, device, seed + n)
        blocks = None if width is None else sort_slots(chosen, case.E, width)
        name = f"{T} tokens, {'slots' if blocks is None else f'blocks of {width}'}"
        x, h = inputs(T, case.H, device, seed + n), inputs(chosen.numel(), case.inner, device, seed + n)

        expected = reference(linear, x, chosen, first, a, case.activation())
        found = torch.full(expected.shape, torch.nan, device=device)
        run.first(x, Launch(chosen, None, blocks), found, cut)
        worst[f"{name}, first"] = float((found - expected).abs().max() / expected.abs().max())
        if run.codes:
            scale = b["input_scale"][chosen.flatten()]
            codes = torch.full(expected.shape, -1.0, device=device).to(code_dtype(blocks))
            run.first(x, Launch(chosen, None, blocks, run.down.input_scale), codes, cut)
            wanted = (found / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            worst[f"{name}, codes"] = float((codes.float() != wanted.float()).double().mean())

        each = reference(linear, h, chosen, down, b, None)
        expected = (each.unflatten(0, share.shape) * share.double().unsqueeze(-1)).sum(1)
        found = torch.full(expected.shape, torch.nan, device=device)
        if blocks is None:
            run.down(h, Launch(chosen, share), found, cut)
        else:
            parts = torch.full(each.shape, torch.nan, device=device)
            combine(run.down(h, Launch(chosen, None, blocks), parts, cut), share, found)
        worst[f"{name}, down"] = float((found - expected).abs().max() / expected.abs().max())
        assert not counters(device).any(), "a counter was left behind"
    return worst


def inputs(rows: int, columns: int, device: torch.device, seed: int) -> Tensor:
    """Bfloat16 rows of different size."""
    x = torch.randn(rows, columns, generator=torch.Generator(device).manual_seed(seed), device=device)
    return (x * torch.logspace(0, 1, rows, device=device)[:, None]).bfloat16()


def launch(kernel: Any, case: ExpertCase, device: torch.device, seed: int) -> Callable[[], Tensor]:
    """One token through both stages, to time; `case.nbytes` says what that reads."""
    run = kernel.prepare(*case.specs(), *case.tensors(device, seed), case.activation())
    x, (chosen, share) = inputs(1, case.H, device, seed).bfloat16(), case.chosen(1, device, seed)
    return lambda: run(x, chosen, share)

"""Attention of one new token per sequence over what a cache holds, which takes the token in on the way.

    y[h] = sum over visible p of softmax(D**-0.5 q[h] . k[p])_p v[p]            in float32, rounded to the dtype of q

B sequences, Nq query heads in groups of G that share one of Nkv KV heads, D head size, S columns of the cache.  Position n of
a sequence is in column n of a cache that holds everything, or in column n modulo S of a ring, whose `held` says which
position each column has (-1: none); with a window W only the positions above n - W are visible.  FP8: E4M3 codes, times a
scale of the cache or of the head.  k scales go into the exponent, v scales onto the sum.

Split KV: a program owns one KV head of one sequence, all its queries, and one range of columns.  It reads the number of
columns on the device and keeps the running maximum m, sum l and weighted values of its range; the last program to arrive at
a head adds the parts up, in their order, so results do not depend on who was last.  Ranges beyond the end of a sequence
cost a program that returns at once.  The first range begins with the new token itself, taken from the projections, and
writes it into the cache: nobody else reads that column in this launch.

Nothing is read back to the host and the grid depends on no value, so a launch can be captured and replayed.  The start of
each tile of columns is one address: a table of blocks would replace that address and nothing else.
Source: "Flash-Decoding" (Dao and others, 2023) for the split; "Online normalizer calculation for softmax" (arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.format import FP8_MAX
from runtime.kernels.fp8_quantize import to_codes
from runtime.kernels.tiles import COUNTERS, INTERPRETED, counters, multiprocessors, operand, show_copies

SCHEMES = ("kv bf16", "kv fp8")
ACTIVATIONS: tuple[str | None, ...] = (None,)
TILE_BYTES = 2**14  # keys of one step; two steps of keys and values are in flight
LEAST_TILES = 4  # steps that a range has at least: shorter ones cost more to add up than they save
TOLERANCE = 5e-3  # of the largest result: weights are rounded to bfloat16 before they meet values
MOST_RANGES = 32  # the last program reads the parts of all of them


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences to attend to: `lengths` before the new token; `columns` of the cache, fewer than tokens in a ring.

    `window`: None for a cache that holds everything.  `scales`: 0 for bfloat16, 1 for one scale, 2 for one per head.
    """

    name: str
    heads: int
    kv_heads: int
    D: int
    columns: int
    lengths: tuple[int, ...]
    window: int | None = None
    scales: int = 0
    idle: tuple[int, ...] = ()  # sequences whose token is none
    tiny: bool = False

    def __str__(self) -> str:
        kept = ("bf16", "fp8", "fp8 by head")[self.scales]
        return f"{self.name}, {kept} KV, {len(self.lengths)} x {max(self.lengths)} tokens"

    @property
    def nbytes(self) -> int:
        """Keys and values that are visible, each once."""
        seen = sum(min(n, (self.window or n + 1) - 1) for n in self.lengths)
        return seen * self.kv_heads * self.D * 2 * (1 if self.scales else 2)


CASES = (
    Case("first token", 4, 2, 16, 40, (0,), tiny=True),
    Case("ragged", 6, 2, 32, 80, (0, 79, 40), tiny=True),
    Case("many ranges, odd head", 2, 2, 24, 200, (199, 33), tiny=True),
    Case("codes", 4, 2, 32, 80, (63, 64, 7), scales=1, tiny=True),
    Case("codes by head", 8, 2, 16, 100, (99, 4), scales=2, tiny=True),
    Case("ring", 4, 1, 16, 33, (5, 33, 500), window=30, tiny=True),
    Case("ring of codes", 4, 2, 16, 12, (11, 12, 100), window=12, scales=1, idle=(1,), tiny=True),
    Case("idle sequences", 4, 2, 16, 40, (40, 7, 3), idle=(0, 2), tiny=True),
    Case("many queries", 40, 1, 16, 40, (39,), tiny=True),
    Case("Qwen3.5-27B", 24, 4, 256, 33024, (1024,)),
    Case("Qwen3.5-27B", 24, 4, 256, 33024, (32768,)),
    Case("Qwen3.5-27B", 24, 4, 256, 33024, (32768,), scales=1),
    Case("Qwen3.5-35B-A3B", 16, 2, 256, 33024, (32768,)),
    Case("Qwen3.5-35B-A3B", 16, 2, 256, 8448, (8192, 100, 4000, 8000, 1, 2000, 8191, 5000)),
    Case("Nemotron 3 Nano", 32, 2, 128, 33024, (32768,), scales=1),
    Case("Step-3.5-Flash, window", 96, 8, 128, 513, (32768,), window=512),
    Case("Step3", 64, 1, 256, 8448, (8192,)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a launch takes, on its device: see `prepare`."""

    q: Tensor
    k: Tensor
    v: Tensor
    kept_k: Tensor
    kept_v: Tensor
    positions: Tensor
    real: Tensor | None
    held: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random contents; columns that hold nothing yet are zero, as in a new cache."""
    random = torch.Generator(device).manual_seed(seed)
    B, S = len(case.lengths), case.columns

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    lengths = torch.tensor(case.lengths, device=device)
    held = torch.arange(S + 1, device=device).expand(B, -1)
    if case.window is not None:  # the last position before the new one that is in each column
        held = lengths[:, None] - 1 - (lengths[:, None] - 1 - held) % S
    filled = (held < lengths[:, None]) & (held >= 0)
    filled[:, S] = False
    dtype = torch.float8_e4m3fn if case.scales else torch.bfloat16
    kept_k, kept_v = (
        (normal(B, S + 1, case.kv_heads, case.D) * (30 if case.scales else 1)).clamp(-FP8_MAX, FP8_MAX)
        .mul(filled[..., None, None]).to(dtype)
        for _ in range(2)
    )  # fmt: skip
    scales = [0.01 + 0.03 * torch.rand((1, case.kv_heads)[case.scales - 1], generator=random, device=device) for _ in range(2)]
    real = torch.ones(B, 1, dtype=torch.bool, device=device)
    real[list(case.idle)] = False
    return Inputs(
        # as projections leave them: heads side by side
        normal(B, 1, case.heads, case.D).bfloat16().transpose(1, 2),
        normal(B, 1, 3 * case.kv_heads, case.D).bfloat16().transpose(1, 2)[:, : case.kv_heads],
        normal(B, 1, 3 * case.kv_heads, case.D).bfloat16().transpose(1, 2)[:, case.kv_heads : 2 * case.kv_heads],
        kept_k, kept_v, lengths[:, None], real if case.idle else None,
        None if case.window is None else held.where(filled, -1).contiguous(),
        scales[0] if case.scales else None, scales[1] if case.scales else None,
    )  # fmt: skip


def reference(i: Inputs, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: the output `[B, Nq, 1, D]`; and kept keys and values as they are afterwards, in their dtype."""
    B, S, kv_heads, D = i.kept_k.shape
    after, values = [], []
    position = i.positions[:, 0]
    column = position if i.held is None else position % (S - 1)
    column = column.where(i.real[:, 0], S - 1) if i.real is not None else column
    for kept, new, scale in ((i.kept_k, i.k, i.k_scale), (i.kept_v, i.v, i.v_scale)):
        rows = new[:, :, 0]
        if scale is not None:
            rows = (rows.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        both = kept.clone()
        both[torch.arange(B), column] = rows
        after.append(both)
        factor = 1.0 if scale is None else scale.double()[:, None]
        values.append(torch.cat([kept.double(), rows.double().unsqueeze(1)], 1) * factor)  # the new one last
    held = torch.arange(S, device=position.device).expand(B, -1) if i.held is None else i.held
    seen = (held >= 0) & (held < position[:, None]) & (held > position[:, None] - (window or 2**40))
    seen[:, S - 1] = False
    seen = torch.cat([seen, torch.ones(B, 1, dtype=torch.bool, device=seen.device)], 1)
    q = i.q.double()[:, :, 0].unflatten(1, (kv_heads, -1)) * D**-0.5
    weights = torch.einsum("bhgd,bshd->bhgs", q, values[0]).masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    y = torch.einsum("bhgs,bshd->bhgd", weights, values[1]).flatten(1, 2).unsqueeze(2)
    return y, after[0], after[1]


def errors(case: Case, device: torch.device, seed: int) -> dict[str, float]:
    """Largest error of a launch over the largest result, for several cuts: NaN where an output was not written, infinite where
    the cache is not bit for bit what it must be.  Fresh inputs, poisoned outputs."""
    cuts = [None, *(Cut(16, ranges, 1, 4, 3) for ranges in (1, 3, 8) if case.tiny)]
    found = {}
    for n, cut in enumerate(cuts):
        i = make_inputs(case, device, seed + n)
        y, *after = reference(i, case.window)
        out = torch.full(y.shape, torch.nan, device=device)
        run = prepare(case.window, i.k_scale, i.v_scale)
        run(i.q, i.k, i.v, i.kept_k, i.kept_v, i.positions, i.real, i.held, out=out, cut=cut)
        kept = zip((i.kept_k, i.kept_v), after, strict=True)
        same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in kept)
        assert not counters(device).any(), "a counter was left behind"
        error = float((out - y).abs().max() / y.abs().max()) if same else torch.inf
        found[f"{cut.ranges} ranges" if cut else "default"] = error
    return found


def launch(case: Case, device: torch.device, seed: int) -> Callable[[], object]:
    """A launch to time."""
    i = make_inputs(case, device, seed)
    run = prepare(case.window, i.k_scale, i.v_scale)
    return lambda: run(i.q, i.k, i.v, i.kept_k, i.kept_v, i.positions, i.real, i.held)


@triton.jit
def as_operand(x: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """BFloat16 or E4M3 as an operand of the tensor cores: both are exact.  `fp8_linear` says why by way of float32."""
    return x.to(tl.float32) if INTERPRETED else x.to(tl.float32).to(tl.bfloat16)


@triton.jit
def attend_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, kept_k: tl.tensor, kept_v: tl.tensor, k_scale: tl.tensor, v_scale: tl.tensor,
    held: tl.tensor, positions: tl.tensor, real: tl.tensor, out: tl.tensor, work: tl.tensor, count: tl.tensor,
    columns: tl.tensor, q_row: tl.tensor, q_head: tl.tensor, k_row: tl.tensor, v_row: tl.tensor, scale: tl.tensor,
    KV_HEADS: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    RANGES: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr, BY_HEAD: tl.constexpr, MOST: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (sequence and KV head, range of columns).

    `QUERIES` and `SIZE`: G and D rounded up to what the tensor cores take.  `scale`: of the exponent to base 2.  `*_row`,
    `q_head`: strides.  `k_scale`, `held`, `real`: None where there is none.  `MOST`: for the interpreter, which on some
    versions has no loops whose length is a value: as many steps as a range can have.
    """
    sequence, head, part = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    position = tl.load(positions + sequence)
    end = tl.minimum(position, columns).to(tl.int32)  # columns that may hold something visible
    tiles = tl.cdiv(end, TILE)
    steps = tl.maximum(tl.cdiv(tiles, RANGES), LEAST)
    used = tl.maximum(tl.cdiv(tiles, steps), 1)  # ranges that are not empty, or the first
    if part >= used:
        return
    query, at = tl.arange(0, QUERIES), tl.arange(0, SIZE)
    inside = at < D
    queries = tl.load(
        q + sequence.to(tl.int64) * q_row + (head * G + query)[:, None] * q_head + at[None, :],
        mask=(query < G)[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    new_k = tl.load(k + sequence.to(tl.int64) * k_row + head * D + at, mask=inside, other=0.0)
    new_v = tl.load(v + sequence.to(tl.int64) * v_row + head * D + at, mask=inside, other=0.0)
    factor = scale
    if k_scale is not None:
        k_multiplier, v_multiplier = tl.load(k_scale + head * BY_HEAD), tl.load(v_scale + head * BY_HEAD)
        new_k = to_codes(new_k.to(tl.float32), k_multiplier)
        new_v = to_codes(new_v.to(tl.float32), v_multiplier)
        factor *= k_multiplier

    row = sequence.to(tl.int64) * (columns + 1)  # the last column of a sequence takes what is no token
    column = position % columns if held is not None else position
    if real is not None:
        column = tl.where(tl.load(real + sequence) != 0, column, columns)
    if part == 0:
        to = ((row + column) * KV_HEADS + head) * D + at
        tl.store(kept_k + to, new_k, mask=inside)
        tl.store(kept_v + to, new_v, mask=inside)
        if held is not None:
            tl.store(held + row + column, position)  # by each head; visible in no other range as long as it is not the past
    own = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * factor
    m = tl.where(part == 0, own, -float("inf"))
    length = tl.where(part == 0, tl.full((QUERIES,), 1.0, tl.float32), 0.0)
    sums = tl.where(part == 0, new_v.to(tl.float32)[None, :] + tl.zeros((QUERIES, SIZE), tl.float32), 0.0)

    queries = as_operand(queries, INTERPRETED)
    first = part * steps
    if INTERPRETED:
        loops: tl.constexpr = MOST
    else:
        loops = tl.minimum(steps, tiles - first)
    for step in range(loops):
        start = (first + step) * TILE
        place = start + tl.arange(0, TILE)
        there = place < end
        base = ((row + start) * KV_HEADS + head) * D
        tile = tl.arange(0, TILE)[:, None] * (KV_HEADS * D) + at[None, :]
        live = there[:, None] & inside[None, :]
        keys = tl.load(kept_k + base + tile, mask=live, other=0.0)
        values = tl.load(kept_v + base + tile, mask=live, other=0.0)
        if held is not None:
            holds = tl.load(held + row + place, mask=there, other=-1)
            there = (holds >= 0) & (holds < position) & (holds > position - WINDOW)
        if INTERPRETED:
            there = there & (step < steps)
        if QUERIES >= 64 and not INTERPRETED:
            show_copies(step)
        scores = tl.dot(queries, tl.trans(operand(as_operand(keys, INTERPRETED), QUERIES)), input_precision="ieee") * factor
        scores = tl.where(there[None, :], scores, -float("inf"))
        highest = tl.maximum(m, tl.max(scores, 1))
        safe = tl.where(highest == -float("inf"), 0.0, highest)  # nothing visible so far: all exponents are -inf
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(m - safe)
        length = length * shrink + tl.sum(weights, 1)
        sums *= shrink[:, None]
        if INTERPRETED:
            sums += tl.dot(weights, as_operand(values, INTERPRETED), input_precision="ieee")
        else:
            sums = tl.dot(weights.to(tl.bfloat16), operand(as_operand(values, INTERPRETED), QUERIES), sums)
        m = highest

    if RANGES > 1:  # noqa: SIM102 (known when the kernel is compiled)
        if used > 1:
            parts = tl.program_id(0).to(tl.int64) * RANGES
            grid = query[:, None] * SIZE + at[None, :]
            sizes = work + tl.num_programs(0).to(tl.int64) * (RANGES * QUERIES * SIZE)  # of all parts, behind their sums
            asked = (query < G)[:, None]  # what was added to fill the operand is not worth the traffic
            tl.store(work + (parts + part) * (QUERIES * SIZE) + grid, sums, mask=asked)
            tl.store(sizes + (parts + part) * (2 * QUERIES) + query, m)
            tl.store(sizes + (parts + part) * (2 * QUERIES) + QUERIES + query, length)
            tl.debug_barrier()  # all threads have stored before one of them releases
            if tl.atomic_add(count + tl.program_id(0), 1, sem="acq_rel", scope="gpu") != used - 1:
                return
            tl.store(count + tl.program_id(0), 0)
            m = tl.full((QUERIES,), -float("inf"), tl.float32)
            length = tl.zeros((QUERIES,), tl.float32)
            sums = tl.zeros((QUERIES, SIZE), tl.float32)
            if INTERPRETED:
                all_parts: tl.constexpr = RANGES
            else:
                all_parts = used
            for n in range(all_parts):
                if INTERPRETED:
                    valid = n < used
                    n = tl.minimum(n, used - 1)
                part_m = tl.load(sizes + (parts + n) * (2 * QUERIES) + query, cache_modifier=".cg")  # past a stale L1
                part_length = tl.load(sizes + (parts + n) * (2 * QUERIES) + QUERIES + query, cache_modifier=".cg")
                part_sums = tl.load(
                    work + (parts + n) * (QUERIES * SIZE) + grid, mask=asked, other=0.0, cache_modifier=".cg"
                )
                if INTERPRETED:
                    part_m = tl.where(valid, part_m, -float("inf"))
                highest = tl.maximum(m, part_m)  # finite: the first range has the new token
                shrink, share = tl.exp2(m - highest), tl.exp2(part_m - highest)
                length = length * shrink + part_length * share
                sums = sums * shrink[:, None] + part_sums * share[:, None]
                m = highest
    y = sums / length[:, None]
    if k_scale is not None:
        y *= v_multiplier
    to = (sequence.to(tl.int64) * KV_HEADS + head) * (G * D) + query[:, None] * D + at[None, :]
    tl.store(out + to, y.to(out.dtype.element_ty), mask=(query < G)[:, None] & inside[None, :])


@dataclass(frozen=True, slots=True)
class Cut:
    """How a launch is cut: `tile` columns per step, at most `ranges` of at least `least` steps."""

    tile: int
    ranges: int
    least: int
    warps: int
    stages: int


def choose_cut(heads: int, columns: int, size: int, queries: int, sms: int) -> Cut:
    """The default: about one program per multiprocessor.  `heads`: KV heads of all sequences; `size`, `queries`: rounded up."""
    tile = max(16, min(128, TILE_BYTES // (2 * size)))
    tiles = -(-columns // tile)
    ranges = min(-(-sms // heads), -(-tiles // LEAST_TILES), MOST_RANGES) if heads <= COUNTERS else 1
    return Cut(tile, max(1, ranges), LEAST_TILES, 8 if queries > 16 else 4, 3)


def prepare(
    window: int | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None
) -> Callable[..., Tensor]:
    """A function that attends, for a cache whose keys are seen for `window` positions (None: always) and, where it holds
    E4M3 codes, has the scales `k_scale` and `v_scale`, float32 `[1]` or `[Nkv]`.

    It takes `q` `[B, Nq, 1, D]` and `k`, `v` `[B, Nkv, 1, D]` in bfloat16, whose last two axes that are not 1 may have any
    strides in `q` and are dense in `k` and `v`; the cache `[B, S + 1, Nkv, D]`, dense, of which the last column takes what is
    no token; `positions`, int64 `[B, 1]`; for a ring `held`, int64 `[B, S + 1]`, else S must not be below any position of a
    token; `real`, bool `[B, 1]` or None.  Updates the cache and returns `[B, Nq, 1, D]` in the dtype of `q`, or fills `out`,
    dense.  `cut`: how, instead of the default.
    """

    def attend(
        q: Tensor, k: Tensor, v: Tensor, kept_k: Tensor, kept_v: Tensor, positions: Tensor,
        real: Tensor | None = None, held: Tensor | None = None, out: Tensor | None = None, cut: Cut | None = None,
    ) -> Tensor:  # fmt: skip
        B, heads, _, D = q.shape
        kv_heads, columns = k.shape[1], kept_k.shape[1] - 1
        assert (held is None) == (window is None)
        assert all(x.is_contiguous() for x in (kept_k, kept_v))
        q = q if q.stride(-1) == 1 else q.contiguous()
        k, v = (x if x.stride(-1) == 1 and x.stride(1) == D else x.contiguous() for x in (k, v))
        G = heads // kv_heads
        queries, size = max(16, triton.next_power_of_2(G)), max(16, triton.next_power_of_2(D))
        cut = cut or choose_cut(B * kv_heads, columns, size, queries, multiprocessors(q.device))
        result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        parts = B * kv_heads * cut.ranges if cut.ranges > 1 else 0
        work = torch.empty(parts * queries * (size + 2) + 1, dtype=torch.float32, device=q.device)
        most = max(cut.least, triton.cdiv(triton.cdiv(columns, cut.tile), cut.ranges)) if INTERPRETED else 0
        attend_kernel[(B * kv_heads, cut.ranges)](
            q, k, v, kept_k, kept_v, k_scale, v_scale, held, positions.contiguous(),
            None if real is None else real.contiguous(), result, work, counters(q.device),
            columns, q.stride(0), q.stride(1), k.stride(0), v.stride(0), D**-0.5 * 1.4426950408889634,
            kv_heads, G, queries, D, size, cut.tile, cut.ranges, cut.least, window or 0,
            k_scale is not None and k_scale.numel() > 1, most, INTERPRETED, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        return result

    return attend

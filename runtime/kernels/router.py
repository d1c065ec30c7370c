"""Choosing the experts of few tokens: the router's matrix and all that follows, in one launch.

    l[t, e] = sum over h of x[t, h] w[e, h]                                                     float32
    p = softmax(l[t]) or sigmoid(l[t]);  chosen[t] = the k largest of p + bias, among the groups that are kept
    weights[t] = p[chosen], divided by (their sum + floor) if they are normalised, times scale
    logit[t] = bf16(sum over h of x[t, h] v[h])                                where there is a row v beside the matrix

A group is kept if the sum of its two largest p + bias is among the `kept_groups` largest.  Of equals the first counts.
A program computes some logits of a token; the last one of that token to finish chooses, so no launch is spent on the choice,
the softmax or the sum, and nothing is converted to float32 in memory.  Sums do not depend on who was last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.quantized import round_to_bf16
from runtime.kernels.tiles import counters
from runtime.routing import Rule

SCHEMES = ("router",)
ACTIVATIONS: tuple[str | None, ...] = (None,)
ROWS = 4  # experts per program
STEP = 1024  # inputs at a time


@dataclass(frozen=True, slots=True)
class Case:
    """Routers: E experts, H inputs, T tokens.  `beside`: with a row that is no expert's."""

    name: str
    E: int
    H: int
    T: int
    rule: Rule
    bias: bool = False
    beside: bool = False
    tiny: bool = False

    @property
    def nbytes(self) -> int:
        """The matrix, once."""
        return 2 * self.E * self.H

    def __str__(self) -> str:
        beside = ", a row beside" if self.beside else ""
        return f"{self.name}, {self.rule.scores}, {self.rule.per_token} of {self.E}, {self.T} tokens{beside}"


CASES = (
    Case("softmax", 6, 24, 2, Rule(2, "softmax", True), tiny=True),
    Case("softmax, not normalised", 16, 40, 1, Rule(3, "softmax", False), tiny=True),
    Case("sigmoid, bias", 10, 1030, 3, Rule(4, "sigmoid", True, 0.0, 3.0), bias=True, tiny=True),
    Case("groups", 12, 24, 3, Rule(3, "sigmoid", True, 1e-20, 2.5, 3, 2), bias=True, tiny=True),
    Case("groups of one", 5, 24, 2, Rule(2, "sigmoid", False, 0.0, 1.0, 5, 3), bias=True, tiny=True),
    Case("whole tiles", 8, 1040, 3, Rule(2, "softmax", True), beside=True, tiny=True),
    Case("a tile for both", 6, 24, 2, Rule(2, "sigmoid", True), bias=True, beside=True, tiny=True),
    Case("Qwen3.5-35B-A3B", 256, 2048, 1, Rule(8, "softmax", True), beside=True),
    Case("Qwen3.5-35B-A3B", 256, 2048, 8, Rule(8, "softmax", True), beside=True),
    Case("Nemotron 3 Nano", 128, 2688, 1, Rule(6, "sigmoid", True, 1e-20, 2.5), bias=True),
    Case("Nemotron 3 Super", 512, 4096, 1, Rule(22, "sigmoid", True, 1e-20, 5.0), bias=True),
    Case("Step-3.5-Flash", 288, 4096, 1, Rule(8, "sigmoid", True, 0.0, 3.0), bias=True),
)


def make_inputs(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`x` and the matrix in bfloat16, a float32 bias if any, and a row `[1, H]` in bfloat16 if any."""
    random = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case.T, case.H, generator=random, device=device).bfloat16()
    rows = (torch.randn(case.E + 1, case.H, generator=random, device=device) * case.H**-0.5).bfloat16()
    bias = torch.randn(case.E, generator=random, device=device) if case.bias else None
    return x, rows[:-1], bias, rows[-1:].clone() if case.beside else None


def errors(case: Case, device: torch.device, seed: int) -> dict[str, float]:
    """Largest error of a weight over the largest, infinite where other experts were chosen; of the logit beside, over the
    largest, what exceeds one step of bfloat16."""
    x, weight, bias, beside = make_inputs(case, device, seed)
    logits = x.double() @ weight.double().T
    expected, weights = case.rule.choose(logits, bias)
    chosen, found, logit = prepare(case.rule, weight, bias, beside)(x)
    order = [experts.argsort(-1) for experts in (expected, chosen)]
    if not torch.equal(expected.gather(1, order[0]), chosen.gather(1, order[1])):
        return {"choice": torch.inf}
    difference = weights.gather(1, order[0]) - found.gather(1, order[1])
    assert not counters(device).any(), "a counter was left behind"
    worst = {"weights": float(difference.abs().max() / weights.max())}
    if beside is not None and logit is not None:
        exact = x.double() @ beside.double().T
        worst["beside"] = float(((logit.double() - exact).abs() - exact.abs() * 2.0**-7).clamp(min=0).max() / exact.abs().max())
    return worst


def launch(case: Case, device: torch.device, seed: int) -> Callable[[], object]:
    """A launch to time."""
    x, weight, bias, beside = make_inputs(case, device, seed)
    run = prepare(case.rule, weight, bias, beside)
    return lambda: run(x)


@triton.jit
def choose_experts(
    logits: tl.tensor, bias: tl.tensor, chosen: tl.tensor, weights: tl.tensor, floor: tl.tensor, scale: tl.tensor,
    E: tl.constexpr, PER_TOKEN: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr, PLACES: tl.constexpr,
) -> None:  # fmt: skip
    """From the pointer to one token's logits `[E]` to its `chosen` and `weights` `[PER_TOKEN]`.

    `TALL`, `WIDE`, `PLACES`: `GROUPS`, E / `GROUPS` and `PER_TOKEN` rounded up to powers of two.
    """
    group, place = tl.arange(0, TALL)[:, None], tl.arange(0, WIDE)[None, :]
    index = group * (E // GROUPS) + place
    real = (group < GROUPS) & (place < E // GROUPS)
    none = float("-inf")
    score = tl.load(logits + index, mask=real, other=none, cache_modifier=".cg")  # past a stale L1
    if SOFTMAX:
        score = tl.exp(score - tl.max(tl.max(score, 1), 0))
        score = score / tl.sum(tl.sum(score, 1), 0)
    else:
        score = 1.0 / (1.0 + tl.exp(-score))
    rank = score
    if bias is not None:
        rank += tl.load(bias + index, mask=real, other=0.0).to(tl.float32)
    rank = tl.where(real, rank, none)
    if KEPT < GROUPS:
        highest = tl.max(rank, 1)
        total = highest
        if E > GROUPS:
            first = tl.min(tl.where(rank == highest[:, None], index, E), 1)
            total += tl.max(tl.where(index == first[:, None], none, rank), 1)
        groups = tl.arange(0, TALL)
        kept = tl.zeros((TALL,), tl.int32)
        for _ in range(KEPT):
            which = tl.min(tl.where(total == tl.max(total, 0), groups, TALL), 0)
            kept = tl.where(groups == which, 1, kept)
            total = tl.where(groups == which, none, total)
        rank = tl.where(kept[:, None] != 0, rank, none)
    place = tl.arange(0, PLACES)
    found, share = tl.zeros((PLACES,), tl.int64), tl.zeros((PLACES,), tl.float32)
    for j in range(PER_TOKEN):
        best = tl.max(tl.max(rank, 1), 0)
        expert = tl.min(tl.min(tl.where(rank == best, index, E - 1), 1), 0)  # E - 1 where all are NaN
        found = tl.where(place == j, expert.to(tl.int64), found)
        share = tl.where(place == j, tl.sum(tl.sum(tl.where(index == expert, score, 0.0), 1), 0), share)
        rank = tl.where(index == expert, none, rank)
    if NORMALIZE:
        share = share / (tl.sum(share, 0) + floor)
    tl.store(chosen + place, found, mask=place < PER_TOKEN)
    tl.store(weights + place, share * scale, mask=place < PER_TOKEN)


@triton.jit
def router_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, beside: tl.tensor, logits: tl.tensor, logit: tl.tensor, count: tl.tensor,
    chosen: tl.tensor, weights: tl.tensor, floor: tl.tensor, scale: tl.tensor,
    H: tl.constexpr, E: tl.constexpr, PER_TOKEN: tl.constexpr, SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
    PLACES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """Program (tile of experts, token).  `beside`: row E, of the type of `weight`, to `logit` `[T]`; both None without it."""
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, STEP)
    weight += tl.minimum(row, E - 1)[:, None] * H
    sums = tl.zeros((ROWS, STEP), tl.float32)
    for start in range(0, H, STEP):
        k = start + at
        a = tl.load(x + token * H + k, mask=k < H, other=0.0).to(tl.float32)
        w = tl.load(weight + k[None, :], mask=(k < H)[None, :], other=0.0)
        if beside is not None:  # not by another pointer, of which Triton would not know that wide loads may use it
            last = (row == E)[:, None]
            w = tl.where(last, tl.load(beside + 0 * row[:, None] + k[None, :], mask=last & (k < H)[None, :], other=0.0), w)
        sums += w.to(tl.float32) * a[None, :]
    total = tl.sum(sums, 1)
    tl.store(logits + token * E + row, total, mask=row < E)
    if beside is not None:
        tl.store(logit + token + 0 * row, round_to_bf16(total).to(logit.dtype.element_ty), mask=row == E)
    tl.debug_barrier()  # all threads have stored before one of them releases
    if tl.atomic_add(count + token, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(count + token, 0)
        choose_experts(
            logits + token * E, bias, chosen + token * PER_TOKEN, weights + token * PER_TOKEN, floor, scale,
            E, PER_TOKEN, SOFTMAX, NORMALIZE, GROUPS, KEPT, WIDE, TALL, PLACES,
        )  # fmt: skip


def prepare(
    rule: Rule, weight: Tensor, bias: Tensor | None, beside: Tensor | None = None
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]:
    """A function from `x` `[T, H]`, 1 <= T <= 64, to what `rule` says: int64 `[T, k]` and float32 `[T, k]`; and the logit of
    `beside`, bfloat16 `[T, 1]`, or None.

    `weight`: `[E, H]`, and `bias` `[E]` if any, of any float dtype; `beside`: `[1, H]` in the dtype of `weight`.
    """
    E, H = weight.shape
    groups, rows = rule.groups, E + (beside is not None)
    sizes = (triton.next_power_of_2(E // groups), triton.next_power_of_2(groups), triton.next_power_of_2(rule.per_token))

    def route(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x = x.contiguous()
        T, device = len(x), x.device
        chosen = torch.empty(T, rule.per_token, dtype=torch.int64, device=device)
        weights = torch.empty(T, rule.per_token, dtype=torch.float32, device=device)
        logits = torch.empty(T, E, dtype=torch.float32, device=device)
        logit = None if beside is None else torch.empty(T, 1, dtype=torch.bfloat16, device=device)
        router_kernel[(-(-rows // ROWS), T)](
            x, weight, bias, beside, logits, logit, counters(device), chosen, weights, rule.floor, rule.scale,
            H, E, rule.per_token, rule.scores == "softmax", rule.normalize, groups, rule.kept_groups, *sizes, ROWS, STEP,
        )  # fmt: skip
        return chosen, weights, logit

    return route

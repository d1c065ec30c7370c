"""Rotary positions of queries and keys, with the norms of their heads, in one launch; cosines and sines in another.

    c[t, i], s[t, i] = A cos(p[t] f[i]), A sin(p[t] f[i])                       angles in float32, results in bfloat16
    y = x, or the norm of each head of x as in `rms_norm`                       bfloat16
    out[t, h, i]     = bf16(bf16(y[i] c[t, i]) - bf16(y[i + r] s[t, i]))        for i < r, half of the elements that turn
    out[t, h, i + r] = bf16(bf16(y[i + r] c[t, i]) + bf16(y[i] s[t, i]))
    out[t, h, i]     = y[i]                                                     for i >= 2 r

so torch's order of roundings.  Roundings are those of `quantized.round_to_bf16`.

An angle is brought between -pi/4 and pi/4 in float64, whose series are exact enough for any position; the functions of the
library keep tables in memory for large angles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.quantized import round_to_bf16
from runtime.kernels.rms_norm import EARLY, LATE, ZERO_CENTERED, weighted

SCHEMES = ("rotary",)
ACTIVATIONS: tuple[str | None, ...] = (None,)
DIFFERENT = 0.02  # share of the elements that may not be bit for bit what float64 rounds to: norms differ in their last bit


@dataclass(frozen=True, slots=True)
class Case:
    """B sequences of T tokens from position `start` on.

    `turned`: elements of a head of D that turn.  `form`: of the norms, as in `rms_norm`; None: no norms.  `gated`: queries lie
    beside a gate, head by head.
    """

    name: str
    B: int
    T: int
    heads: int
    kv_heads: int
    D: int
    turned: int
    form: int | None
    gated: bool = False
    start: int = 0
    amplitude: float = 1.0
    tiny: bool = False

    @property
    def nbytes(self) -> int:
        """Queries and keys, read and written."""
        return 4 * self.B * self.T * (self.heads + self.kv_heads) * self.D

    def __str__(self) -> str:
        norms = "no norms" if self.form is None else f"form {self.form}"
        return f"{self.name}, {self.B}x{self.T}, {self.heads} and {self.kv_heads} heads, {self.turned} of {self.D}, {norms}"


CASES = (
    Case("no norms", 1, 3, 2, 1, 16, 16, None, tiny=True),
    Case("early", 2, 1, 4, 2, 64, 64, EARLY, start=70, amplitude=1.2, tiny=True),
    Case("late, odd sizes", 2, 2, 3, 1, 24, 12, LATE, start=1000, tiny=True),
    Case("zero-centred, gated", 1, 2, 2, 2, 80, 16, ZERO_CENTERED, gated=True, start=262000, tiny=True),
    Case("gate, no norms", 3, 1, 1, 1, 40, 8, None, gated=True, start=1000000, tiny=True),
    Case("Qwen3.5-9B", 1, 1, 16, 4, 256, 64, ZERO_CENTERED, gated=True, start=1024),
    Case("Qwen3.5-35B-A3B", 8, 1, 16, 2, 256, 64, ZERO_CENTERED, gated=True, start=32768),
    Case("Qwen3-VL-235B-A22B", 1, 1, 64, 4, 128, 128, EARLY, start=4096),
    Case("Step-3.5-Flash", 1, 1, 96, 8, 128, 64, ZERO_CENTERED, start=262000),
    Case("Llama-3.1-8B prefill", 1, 4096, 32, 8, 128, 128, None),
    Case("Qwen3.5-27B prefill", 1, 4096, 24, 4, 256, 64, ZERO_CENTERED, gated=True, start=4096),
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What launches take.  `q` `[B, Nq, T, D]`, `k` `[B, Nkv, T, D]` in bfloat16; weights `[D]`; `positions` int64 `[B, T]`."""

    q: Tensor
    k: Tensor
    weights: tuple[Tensor, Tensor] | None
    positions: Tensor
    inv_freq: Tensor


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random heads, as a projection leaves them: side by side, with the values behind."""
    random = torch.Generator(device).manual_seed(seed)
    q_size = case.D * (2 if case.gated else 1)
    sizes = [case.heads * q_size, case.kv_heads * case.D, case.kv_heads * case.D]
    x = 3 * torch.randn(case.B, case.T, sum(sizes), generator=random, device=device)
    q, k, _ = x.bfloat16().split(sizes, -1)
    q = q.unflatten(-1, (case.heads, q_size))[..., : case.D]
    weight, other = ((1 + 0.3 * torch.randn(case.D, generator=random, device=device)).bfloat16() for _ in range(2))
    positions = case.start + torch.arange(case.T, device=device) + 7 * torch.arange(case.B, device=device)[:, None]
    inv_freq = 1e6 ** -(torch.arange(0, case.turned, 2, dtype=torch.float32, device=device) / case.turned)
    return Inputs(
        q.transpose(1, 2), k.unflatten(-1, (case.kv_heads, case.D)).transpose(1, 2),
        None if case.form is None else (weight, other), positions, inv_freq,
    )  # fmt: skip


def reference_turns(positions: Tensor, inv_freq: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    """In float64: cosines and sines, `[B, 1, T, r]`."""
    angles = (positions[:, None, :, None].float() * inv_freq).double()
    return angles.cos() * amplitude, angles.sin() * amplitude


def reference(x: Tensor, weight: Tensor | None, eps: float, form: int | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Float64 that is rounded where the kernel rounds, `[B, heads, T, D]`."""
    y = x.double()
    if weight is not None:
        n, w = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt(), weight.double()
        y = _round(w * _round(n) if form == EARLY else (w if form == LATE else 1 + w) * n)
    half = cos.shape[-1]
    c, s = cos.double(), sin.double()
    a, b = y[..., :half], y[..., half : 2 * half]
    turned = [_round(_round(a * c) - _round(b * s)), _round(_round(b * c) + _round(a * s))]
    return torch.cat([*turned, y[..., 2 * half :]], -1)


def _round(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def errors(case: Case, device: torch.device, seed: int) -> dict[str, float]:
    """Over the largest result, what exceeds one step of bfloat16, of the norm's result too; infinite where more elements than
    `DIFFERENT` are not exactly right, and without norms where any is not.  Of cosines and sines with no step for the norm."""
    given, eps = make_inputs(case, device, seed), 1e-6
    cos, sin = turns(given.positions, given.inv_freq, case.amplitude)
    exact = reference_turns(given.positions, given.inv_freq, case.amplitude)
    found = prepare(given.weights, eps, case.form or 0)(given.q, given.k, cos, sin)
    worst = {
        name: _beyond(x, y, y.abs() * 2.0**-8 + 1e-9, DIFFERENT)  # half a step
        for name, x, y in zip(("cos", "sin"), (cos, sin), exact)
    }
    for n, (name, x, y) in enumerate(zip("qk", (given.q, given.k), found)):
        weight = None if given.weights is None else given.weights[n]
        expected = reference(x, weight, eps, case.form, cos, sin)
        half = cos.shape[-1]
        a, b = (part.abs() for part in expected[..., : 2 * half].split(half, -1))
        room = expected.abs()
        room[..., : 2 * half] += torch.cat([a + b, a + b], -1)  # no element before turning is larger
        worst[name] = _beyond(y, expected, room * 2.0**-6, 0.0 if weight is None else DIFFERENT)
    return worst


def _beyond(found: Tensor, expected: Tensor, room: Tensor, different: float) -> float:
    share = (found != expected.bfloat16()).double().mean()
    beyond = ((found.double() - expected).abs() - room).clamp(min=0)
    return float(beyond.max() / expected.abs().max()) if share <= different else torch.inf


def launch(case: Case, device: torch.device, seed: int) -> Callable[[], object]:
    """A launch to time: norms and positions."""
    given = make_inputs(case, device, seed)
    cos, sin = turns(given.positions, given.inv_freq, case.amplitude)
    run = prepare(given.weights, 1e-6, case.form or 0)
    return lambda: run(given.q, given.k, cos, sin)


@triton.jit
def turns_kernel(
    positions: tl.tensor, inv_freq: tl.tensor, cos: tl.tensor, sin: tl.tensor, amplitude: tl.tensor,
    HALF: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Program: token.  `SIZE`: `HALF` rounded up."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    real = at < HALF
    angle = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + at, mask=real, other=0.0)
    angle = angle.to(tl.float64)
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)  # 2 / pi
    r = angle - quarter * 1.5707963267948966
    r2 = r * r
    s = 1.0 / 362880 + r2 * (-1.0 / 39916800 + r2 * (1.0 / 6227020800))
    s = r * (1.0 + r2 * (-1.0 / 6 + r2 * (1.0 / 120 + r2 * (-1.0 / 5040 + r2 * s))))
    c = 1.0 / 40320 + r2 * (-1.0 / 3628800 + r2 * (1.0 / 479001600))
    c = 1.0 + r2 * (-1.0 / 2 + r2 * (1.0 / 24 + r2 * (-1.0 / 720 + r2 * c)))
    which = quarter.to(tl.int32) & 3
    odd = (which & 1) != 0
    cosine = tl.where(odd, s, c) * tl.where((which == 1) | (which == 2), -1.0, 1.0)
    sine = tl.where(odd, c, s) * tl.where(which >= 2, -1.0, 1.0)
    cosine = round_to_bf16(cosine.to(tl.float32) * amplitude)
    sine = round_to_bf16(sine.to(tl.float32) * amplitude)
    tl.store(cos + token * HALF + at, cosine.to(cos.dtype.element_ty), mask=real)
    tl.store(sin + token * HALF + at, sine.to(sin.dtype.element_ty), mask=real)


@triton.jit
def rotate_head(
    x: tl.tensor, weight: tl.tensor, cos: tl.tensor, sin: tl.tensor, out: tl.tensor, eps: tl.tensor,
    D: tl.constexpr, HALF: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr, FORM: tl.constexpr,
) -> None:  # fmt: skip
    """One head, from its pointer, with the pointers to the cosines and sines of its token."""
    at = tl.arange(0, SIZE)
    real = at < HALF
    a = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(x + HALF + at, mask=real, other=0.0).to(tl.float32)
    c = tl.load(cos + at, mask=real, other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=real, other=0.0).to(tl.float32)
    if REST > 0:
        behind = 2 * HALF + tl.arange(0, REST)
        there = behind < D
        rest = tl.load(x + behind, mask=there, other=0.0).to(tl.float32)
    if weight is not None:
        squares = tl.sum(a * a + b * b, 0)
        if REST > 0:
            squares += tl.sum(rest * rest, 0)
        inverse = tl.rsqrt(squares / D + eps)
        a = weighted(a * inverse, tl.load(weight + at, mask=real, other=0.0).to(tl.float32), FORM)
        b = weighted(b * inverse, tl.load(weight + HALF + at, mask=real, other=0.0).to(tl.float32), FORM)
        if REST > 0:
            rest = weighted(rest * inverse, tl.load(weight + behind, mask=there, other=0.0).to(tl.float32), FORM)
    first = round_to_bf16(round_to_bf16(a * c) - round_to_bf16(b * s))
    second = round_to_bf16(round_to_bf16(b * c) + round_to_bf16(a * s))
    tl.store(out + at, first.to(out.dtype.element_ty), mask=real)
    tl.store(out + HALF + at, second.to(out.dtype.element_ty), mask=real)
    if REST > 0:
        tl.store(out + behind, rest.to(out.dtype.element_ty), mask=there)


@triton.jit
def rotate_kernel(
    q: tl.tensor, k: tl.tensor, q_weight: tl.tensor, k_weight: tl.tensor, cos: tl.tensor, sin: tl.tensor, out: tl.tensor,
    q_row: tl.tensor, q_head: tl.tensor, k_row: tl.tensor, k_head: tl.tensor, eps: tl.tensor, HEADS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr, FORM: tl.constexpr,
) -> None:  # fmt: skip
    """Program (token, head), query heads first.  `*_row`, `*_head`: strides of tokens and heads.  `q_weight`, `k_weight`: None
    without norms.  `HEADS`: of queries.  `SIZE`, `REST`: `HALF` and what does not turn rounded up, 0 where all turns."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += token * HALF
    sin += token * HALF
    out += (token * tl.num_programs(1) + head) * D
    if head < HEADS:
        rotate_head(q + token * q_row + head * q_head, q_weight, cos, sin, out, eps, D, HALF, SIZE, REST, FORM)
    else:
        x = k + token * k_row + (head - HEADS) * k_head
        rotate_head(x, k_weight, cos, sin, out, eps, D, HALF, SIZE, REST, FORM)


def turns(positions: Tensor, inv_freq: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, times `amplitude`, of int64 `[B, T]` with float32 frequencies `[r]`: bfloat16 `[B, 1, T, r]` each."""
    (B, T), half = positions.shape, len(inv_freq)
    cos, sin = (torch.empty(B, 1, T, half, dtype=torch.bfloat16, device=positions.device) for _ in range(2))
    size = triton.next_power_of_2(half)
    turns_kernel[(B * T,)](positions.contiguous(), inv_freq, cos, sin, amplitude, half, size, num_warps=1)
    return cos, sin


def prepare(
    weights: tuple[Tensor, Tensor] | None, eps: float, form: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function that normalises heads and turns them.

    `weights`: of the norms of queries and of keys, `[D]` of any float dtype; None: there are no norms.  `form`: of `rms_norm`.
    It takes `q` `[B, Nq, T, D]` and `k` `[B, Nkv, T, D]` in bfloat16, and cosines and sines `[B, 1, T, r]`, or broadcast over
    B; returns the same of `q` and `k`, in memory one token after another, in each its queries, then its keys.
    """
    q_weight, k_weight = weights or (None, None)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        (B, heads, T, D), kv_heads, half = q.shape, k.shape[1], cos.shape[-1]
        by_token = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in by_token)
        cos, sin = (x.expand(B, 1, T, half).contiguous() for x in (cos, sin))
        out = torch.empty(B, T, heads + kv_heads, D, dtype=q.dtype, device=q.device)
        size = triton.next_power_of_2(half)
        rest = triton.next_power_of_2(D - 2 * half) if 2 * half < D else 0
        rotate_kernel[(B * T, heads + kv_heads)](
            q, k, q_weight, k_weight, cos, sin, out, q.stride(0), q.stride(1), k.stride(0), k.stride(1), eps,
            heads, D, half, size, rest, form, num_warps=1,
        )  # fmt: skip
        q, k = out.transpose(1, 2).split([heads, kv_heads], 1)
        return q, k

    return rotate

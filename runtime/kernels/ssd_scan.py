"""The recurrence of Mamba2 over many tokens in three launches: `ssd.chunked`, with chunks side by side.

Within a chunk of 64 tokens, s being the cumulated decay and S the state before it:

    own    = (e^(s_last - s) X)^T B                       what the chunk adds to the state          one program per chunk
    S     <- e^(s_last) S + own                           from chunk to chunk                       one program per part of S
    Y      = (C B^T o L) X + e^s C S^T,   L_ij = exp(s_i - s_j) for i >= j                           one program per chunk

Operands of the tensor cores are bfloat16, which B and C already are in a network in bfloat16; decays, sums and the carried
state are float32.  Source: "Transformers are SSMs" (arXiv 2405.21060), section 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.tiles import INTERPRETED

SCHEMES = ("state fp32",)
ACTIVATIONS: tuple[str | None, ...] = (None,)
TOLERANCE = 1e-2  # of the largest result: x, weights and carried states are rounded to bfloat16 before they are multiplied
CHUNK = 64
SEGMENT = 4096  # tokens whose states are alive at once: bounds the memory of a long prompt
CARRIED = 512  # elements of a state that a program carries


@dataclass(frozen=True, slots=True)
class Case:
    """B sequences of T tokens; H heads of P elements in G groups, N state size."""

    name: str
    B: int
    T: int
    H: int
    P: int
    G: int
    N: int
    tiny: bool = False

    def __str__(self) -> str:
        return f"{self.name}, Mamba2 scan, {self.B} x {self.T} tokens"

    @property
    def nbytes(self) -> int:
        """Inputs and outputs in the dtypes of this interface, and the state read and written."""
        return 4 * self.B * (self.T * (2 * self.H * self.P + 2 * self.G * self.N + self.H) + 2 * self.H * self.P * self.N)


CASES = (
    Case("inside a chunk", 1, 5, 2, 16, 1, 16, tiny=True),
    Case("chunks and a rest", 2, 150, 2, 16, 1, 32, tiny=True),
    Case("whole chunks, odd sizes", 1, 128, 4, 12, 2, 20, tiny=True),
    Case("Nemotron 3 Nano", 1, 4096, 64, 64, 8, 128),
    Case("Nemotron 3 Super", 1, 2048, 128, 64, 8, 128),
)


def make_inputs(case: Case, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """`x`, `b`, `c`, `g` and `state`, as a layer passes them: views with time before heads."""
    random = torch.Generator(device).manual_seed(seed)
    B, T = case.B, case.T

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    inner, shared = case.H * case.P, case.G * case.N
    x, b, c = normal(B, T, inner + 2 * shared).bfloat16().float().split([inner, shared, shared], -1)
    g = -torch.rand(B, T, case.H, generator=random, device=device).pow(4) * 3  # mostly slow, sometimes fast
    x = x.unflatten(-1, (case.H, -1)).transpose(1, 2) * (0.3 + 0.1 * g.transpose(1, 2).unsqueeze(-1))
    b, c = (y.unflatten(-1, (case.G, -1)).transpose(1, 2) for y in (b, c))
    return x, b, c, g.transpose(1, 2), normal(B, case.H, case.P, case.N)


def reference(x: Tensor, b: Tensor, c: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token in float64: outputs `[B, H, T, P]`, and the state afterwards."""
    x, b, c, g, state = (y.double() for y in (x, b, c, g, state))
    b, c = (y.repeat_interleave(x.shape[1] // y.shape[1], 1) for y in (b, c))
    outputs = []
    for t in range(x.shape[2]):
        state = state * g[:, :, t, None, None].exp() + x[:, :, t, :, None] * b[:, :, t, None, :]
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c[:, :, t]))
    return torch.stack(outputs, 2), state


def errors(case: Case, device: torch.device, seed: int) -> dict[str, float]:
    """Largest error of output and of state over the largest value, with fresh inputs."""
    x, b, c, g, state = make_inputs(case, device, seed)
    y, after = reference(x, b, c, g, state)
    out = torch.full(y.shape, torch.nan, device=device)
    prepare()(x, b, c, g, state, out=out)
    pairs = {"output": (out, y), "state": (state, after)}
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def launch(case: Case, device: torch.device, seed: int) -> Callable[[], object]:
    """A launch to time."""
    inputs = make_inputs(case, device, seed)
    run = prepare()
    return lambda: run(*inputs)


@triton.jit
def multiply(a: tl.tensor, b: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """`a @ b` of float32 tiles, by way of bfloat16."""
    if INTERPRETED:
        product = tl.dot(a, b, input_precision="ieee")
    else:
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    return product


@triton.jit(do_not_specialize=["T", "chunks"])
def own_states_kernel(
    x: tl.tensor, b: tl.tensor, g: tl.tensor, own: tl.tensor, decay: tl.tensor, T: tl.tensor, chunks: tl.tensor,
    x_row: tl.tensor, x_head: tl.tensor, x_token: tl.tensor, b_row: tl.tensor, b_group: tl.tensor, b_token: tl.tensor,
    g_row: tl.tensor, g_head: tl.tensor, g_token: tl.tensor,
    H: tl.constexpr, SHARED: tl.constexpr, P: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (chunk, sequence and head): `own` `[B, H, chunks, P, N]` and `decay` `[B, H, chunks]`, which is e^(s_last).

    `SHARED`: heads of a group.  `ROWS`, `COLUMNS`: P and N rounded up.  `*_row`, `*_head`, `*_group`, `*_token`: strides.
    """
    chunk, both = tl.program_id(0), tl.program_id(1)
    row, head = (both // H).to(tl.int64), both % H
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    p, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    there = token < T
    gs = tl.load(g + row * g_row + head * g_head + token.to(tl.int64) * g_token, mask=there, other=0.0)
    left = tl.sum(gs, 0) - tl.cumsum(gs, 0)  # s_last - s
    at = x + row * x_row + head * x_head + token.to(tl.int64)[None, :] * x_token + p[:, None]
    xs = tl.load(at, mask=(p < P)[:, None] & there[None, :], other=0.0)  # (P, chunk)
    at = b + row * b_row + (head // SHARED) * b_group + token.to(tl.int64)[:, None] * b_token + n[None, :]
    bs = tl.load(at, mask=there[:, None] & (n < N)[None, :], other=0.0)
    sums = multiply(xs * tl.exp(left)[None, :], bs, INTERPRETED)
    first = both.to(tl.int64) * chunks + chunk
    tl.store(own + first * (P * N) + p[:, None] * N + n[None, :], sums, mask=(p < P)[:, None] & (n < N)[None, :])
    tl.store(decay + first, tl.exp(tl.sum(gs, 0)))


@triton.jit(do_not_specialize=["chunks"])
def carry_kernel(
    own: tl.tensor, decay: tl.tensor, state: tl.tensor, chunks: tl.tensor,
    SIZE: tl.constexpr, PART: tl.constexpr, MOST: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (part of a state, sequence and head): `own` becomes the state before each chunk, `state` the one after all.

    `MOST`: number of chunks, for the interpreter, which on some versions has no loops whose length is a value.
    """
    both = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * PART + tl.arange(0, PART)
    inside = at < SIZE
    S = tl.load(state + both * SIZE + at, mask=inside, other=0.0)
    if INTERPRETED:
        loops: tl.constexpr = MOST
    else:
        loops = chunks
    for chunk in tl.range(loops, num_stages=4):
        to = own + (both * chunks + chunk) * SIZE + at
        new = tl.load(to, mask=inside, other=0.0)
        shrink = tl.load(decay + both * chunks + chunk)
        tl.store(to, S, mask=inside)
        S = S * shrink + new
    tl.store(state + both * SIZE + at, S, mask=inside)


@triton.jit(do_not_specialize=["T", "chunks"])
def outputs_kernel(
    x: tl.tensor, b: tl.tensor, c: tl.tensor, g: tl.tensor, before: tl.tensor, out: tl.tensor, T: tl.tensor,
    chunks: tl.tensor, x_row: tl.tensor, x_head: tl.tensor, x_token: tl.tensor, b_row: tl.tensor, b_group: tl.tensor,
    b_token: tl.tensor, c_row: tl.tensor, c_group: tl.tensor, c_token: tl.tensor, g_row: tl.tensor, g_head: tl.tensor,
    g_token: tl.tensor, out_row: tl.tensor, out_head: tl.tensor, out_token: tl.tensor,
    H: tl.constexpr, SHARED: tl.constexpr, P: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Program (chunk, sequence and head): `out` of one chunk.  `before` `[B, H, chunks, P, N]`: the state before each."""
    chunk, both = tl.program_id(0), tl.program_id(1)
    row, head = (both // H).to(tl.int64), both % H
    i, p, n = tl.arange(0, CHUNK), tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    token = chunk * CHUNK + i
    there, place = token < T, token.to(tl.int64)
    s = tl.cumsum(tl.load(g + row * g_row + head * g_head + place * g_token, mask=there, other=0.0), 0)
    narrow = there[:, None] & (n < N)[None, :]
    cs = tl.load(c + row * c_row + (head // SHARED) * c_group + place[:, None] * c_token + n[None, :], mask=narrow, other=0.0)
    at = b + row * b_row + (head // SHARED) * b_group + place[None, :] * b_token + n[:, None]
    bs = tl.load(at, mask=(n < N)[:, None] & there[None, :], other=0.0)  # (N, chunk)
    wide = there[:, None] & (p < P)[None, :]
    xs = tl.load(x + row * x_row + head * x_head + place[:, None] * x_token + p[None, :], mask=wide, other=0.0)
    at = before + (both.to(tl.int64) * chunks + chunk) * (P * N) + p[None, :] * N + n[:, None]
    S = tl.load(at, mask=(n < N)[:, None] & (p < P)[None, :], other=0.0)  # (N, P)
    y = multiply(cs, S, INTERPRETED) * tl.exp(s)[:, None]
    within = tl.exp(tl.where(i[:, None] >= i[None, :], s[:, None] - s[None, :], -float("inf")))
    y += multiply(multiply(cs, bs, INTERPRETED) * within, xs, INTERPRETED)
    tl.store(out + row * out_row + head * out_head + place[:, None] * out_token + p[None, :], y, mask=wide)


def prepare() -> Callable[..., Tensor]:
    """A function in the place of `ssd.ssd`, for float32 inputs of the same shapes that are dense along their last axes.

    Returns float32 `[B, H, T, P]`, time before heads in memory, or fills `out`.  Memory: a state per chunk of `SEGMENT` tokens.
    """

    def ssd(x: Tensor, b: Tensor, c: Tensor, g: Tensor, state: Tensor, out: Tensor | None = None) -> Tensor:
        B, H, T, P = x.shape
        x, b, c = (y if y.stride(-1) == 1 else y.contiguous() for y in (x, b, c))
        result = torch.empty(B, T, H, P, dtype=torch.float32, device=x.device).transpose(1, 2) if out is None else out
        for start in range(0, T, SEGMENT):
            at = slice(start, start + SEGMENT)
            _segment(x[:, :, at], b[:, :, at], c[:, :, at], g[:, :, at], state, result[:, :, at])
        return result

    return ssd


def _segment(x: Tensor, b: Tensor, c: Tensor, g: Tensor, state: Tensor, out: Tensor) -> None:
    B, H, T, P = x.shape
    N = state.shape[-1]
    assert state.is_contiguous()
    chunks = -(-T // CHUNK)
    own = torch.empty(B, H, chunks, P, N, dtype=torch.float32, device=x.device)
    decay = torch.empty(B, H, chunks, dtype=torch.float32, device=x.device)
    rows, columns = (max(16, triton.next_power_of_2(size)) for size in (P, N))
    sizes = (H, H // b.shape[1], P, N, rows, columns, CHUNK, INTERPRETED)
    own_states_kernel[(chunks, B * H)](
        x, b, g, own, decay, T, chunks, *x.stride()[:3], *b.stride()[:3], *g.stride(), *sizes, num_warps=4,
    )  # fmt: skip
    part = min(CARRIED, triton.next_power_of_2(P * N))
    carry_kernel[(-(-P * N // part), B * H)](
        own, decay, state, chunks, P * N, part, chunks if INTERPRETED else 0, INTERPRETED, num_warps=4
    )
    outputs_kernel[(chunks, B * H)](
        x, b, c, g, own, out, T, chunks, *x.stride()[:3], *b.stride()[:3], *c.stride()[:3], *g.stride(), *out.stride()[:3],
        *sizes, num_warps=4,
    )  # fmt: skip

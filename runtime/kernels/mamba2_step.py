"""One token of a Mamba2 layer, from its input projection to what its output projection takes, in one launch.

Per sequence and head, G groups of heads that share b and c; x~ are the inputs of the convolution, newest last, of which the
ring `conv` has those before:

    x, b, c = silu(sum over i < W of w_i x~_i + bias)               channel by channel, channels in the order x, b, c
    dt = clamp(softplus(dt + dt_bias), low, high)
    S <- exp(-exp(A_log) dt) S + dt x b^T;    y = S c + D x         S float32 [P, N]
    u = y * silu(z);    out = u / sqrt(mean(u**2) + eps) * w_norm   over all heads of the group: the gate comes before the norm

All in float32 from the bfloat16 inputs; out is rounded once, and quantised for the output projection where that needs no more
than a group.  A program has one head of one sequence, its whole state in registers: read once, written once.  It leaves u in
a workspace; the last program of a group normalises all of it.  Programs of a group compute its b and c again, and all store
the same new input into the ring, in a column that none of them reads.
Source: transformers 5.23 `NemotronHMamba2Mixer`, with the time step clamped as its config says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.gated_delta_step import convolve, silu, softplus
from runtime.kernels.quantized import KINDS, Reader, leave, output_errors, poisoned, room_for, store_output
from runtime.kernels.ssd import Sizes
from runtime.kernels.tiles import COUNTERS, counters

SCHEMES = ("state fp32",)
ACTIVATIONS: tuple[str | None, ...] = (None,)
TOLERANCE = 1e-4  # of the largest result: float32 throughout
WARPS = 4


@dataclass(frozen=True, slots=True)
class Case:
    """A layer and sequences at `positions`.  `ring`: columns of the convolution's ring; `idle`: whose token is none.
    `kind`: how the output is quantised."""

    name: str
    sizes: Sizes
    positions: tuple[int, ...]
    ring: int = 4
    bias: bool = True
    idle: tuple[int, ...] = ()
    kind: str | None = None
    tiny: bool = False

    def __str__(self) -> str:
        quantised = f", {self.kind} quantised" if self.kind else ""
        return f"{self.name}, Mamba2, one token of {len(self.positions)}{quantised}"

    @property
    def nbytes(self) -> int:
        """The state, read and written."""
        return 8 * len(self.positions) * self.sizes.heads * self.sizes.head_dim * self.sizes.state_size


CASES = (
    Case("first token", Sizes(2, 8, 1, 16, 4, 1e-5, 0.0, math.inf), (0,), tiny=True),
    Case("groups", Sizes(6, 16, 2, 16, 4, 1e-5, 0.0, math.inf), (5, 2, 1000), tiny=True),
    Case("odd sizes, time clamped", Sizes(3, 12, 3, 20, 3, 1e-5, 0.6, 0.9), (3, 9), ring=5, bias=False, tiny=True),
    Case("idle sequences", Sizes(4, 8, 2, 8, 4, 1e-5, 0.0, math.inf), (7, 8, 9), idle=(0, 2), tiny=True),
    Case("one scale", Sizes(4, 12, 2, 8, 4, 1e-5, 0.0, math.inf), (7, 8), idle=(0,), kind="fp8_static", tiny=True),
    Case("quantised groups", Sizes(6, 128, 2, 8, 4, 1e-5, 0.0, math.inf), (7, 8), idle=(1,), kind="fp8_group", tiny=True),
    Case("powers of two", Sizes(4, 64, 2, 8, 4, 1e-5, 0.0, math.inf), (7,), kind="fp8_group_e8m0", tiny=True),
    Case("NVFP4", Sizes(6, 16, 2, 8, 4, 1e-5, 0.0, math.inf), (7, 8), idle=(0,), kind="nvfp4", tiny=True),
    Case("Nemotron 3 Nano", Sizes(64, 64, 8, 128, 4, 1e-5, 0.0, math.inf), (1000,), kind="fp8_static"),
    Case("Nemotron 3 Nano", Sizes(64, 64, 8, 128, 4, 1e-5, 0.0, math.inf), tuple(range(8))),
    Case("Nemotron 3 Super", Sizes(128, 64, 8, 128, 4, 1e-5, 0.0, math.inf), (1000,)),
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a launch takes: see `prepare`."""

    tensors: dict[str, Tensor]
    z: Tensor
    xbc: Tensor
    dt: Tensor
    conv: Tensor
    state: Tensor
    positions: Tensor
    real: Tensor | None


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random contents, projections as slices of wider rows."""
    random = torch.Generator(device).manual_seed(seed)
    s, B = case.sizes, len(case.positions)
    inner, channels = s.heads * s.head_dim, s.heads * s.head_dim + 2 * s.groups * s.state_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    tensors = {
        "conv1d.weight": (normal(channels, 1, s.width) * 0.5).bfloat16(), "A_log": normal(s.heads), "D": normal(s.heads),
        "dt_bias": normal(s.heads).bfloat16(), "norm.weight": normal(inner).bfloat16(),
    }  # fmt: skip
    tensors |= {"conv1d.bias": normal(channels).bfloat16()} if case.bias else {}
    real = torch.ones(B, 1, dtype=torch.bool, device=device)
    real[list(case.idle)] = False
    z, xbc, dt = normal(B, 1, inner + channels + s.heads).bfloat16().split([inner, channels, s.heads], -1)
    return Inputs(
        tensors, z, xbc, dt, normal(B, channels, case.ring).bfloat16(), normal(B, s.heads, s.head_dim, s.state_size),
        torch.tensor(case.positions, device=device)[:, None], real if case.idle else None,
    )  # fmt: skip


def reference(i: Inputs, s: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: output `[B, 1, heads * P]`, zero for a token that is none; ring and state afterwards."""
    _, channels, ring = i.conv.shape
    tensors = {name: tensor.double() for name, tensor in i.tensors.items()}
    real = torch.ones_like(i.positions, dtype=torch.bool) if i.real is None else i.real
    columns = (i.positions + torch.arange(1 - s.width, 0, device=i.conv.device)) % ring
    seen = torch.cat([i.conv.gather(-1, columns[:, None].expand(-1, channels, -1)), i.xbc.transpose(1, 2)], -1).double()
    conv = i.conv.clone()
    conv.scatter_(-1, (i.positions % ring)[:, None].expand(-1, channels, -1), i.xbc.transpose(1, 2))
    xbc = F.silu((seen * tensors["conv1d.weight"][:, 0]).sum(-1) + tensors.get("conv1d.bias", torch.zeros(()).double()))
    x, b, c = xbc.split([s.heads * s.head_dim, s.groups * s.state_size, s.groups * s.state_size], -1)
    x = x.unflatten(-1, (s.heads, -1))
    b, c = (y.unflatten(-1, (s.groups, -1)).repeat_interleave(s.heads // s.groups, 1) for y in (b, c))
    dt = F.softplus(i.dt.double()[:, 0] + tensors["dt_bias"]).clamp(s.shortest, s.longest)
    state = i.state.double() * (-tensors["A_log"].exp() * dt).exp()[..., None, None]
    state = state + (dt.unsqueeze(-1) * x).unsqueeze(-1) * b.unsqueeze(-2)
    y = torch.einsum("bhpn,bhn->bhp", state, c) + tensors["D"][:, None] * x
    u = (y.flatten(1) * F.silu(i.z.double()[:, 0])).unflatten(-1, (s.groups, -1))
    out = (u * (u.square().mean(-1, keepdim=True) + s.eps).rsqrt()).flatten(1) * tensors["norm.weight"]
    there = real[:, :, None]
    return out.unsqueeze(1) * there, conv.where(there, i.conv), state.where(there[..., None], i.state.double())


def errors(case: Case, device: torch.device, seed: int) -> dict[str, float]:
    """Largest error of output, its codes and the state over the largest value: NaN where an output was not written, infinite
    where the ring is not bit for bit what it must be.  Fresh inputs, poisoned output."""
    i = make_inputs(case, device, seed)
    y, conv, state = reference(i, case.sizes)
    out, reader = poisoned(y.shape, case.kind, device)
    prepare(case.sizes, i.tensors)(i.z, i.xbc, i.dt, i.conv, i.state, i.positions, i.real, out=out, reader=reader)
    assert not counters(device).any(), "a counter was left behind"
    found = output_errors(out, y, reader) | {"state": float((i.state - state).abs().max() / state.abs().max())}
    return found if torch.equal(i.conv, conv) else dict.fromkeys(found, torch.inf)


def launch(case: Case, device: torch.device, seed: int) -> Callable[[], object]:
    """A launch to time."""
    i = make_inputs(case, device, seed)
    run, reader = prepare(case.sizes, i.tensors), poisoned(i.z.shape, case.kind, device)[1]
    return lambda: run(i.z, i.xbc, i.dt, i.conv, i.state, i.positions, i.real, reader=reader)


@triton.jit
def convolved(
    x: tl.tensor, conv: tl.tensor, weight: tl.tensor, bias: tl.tensor, channel: tl.tensor, inside: tl.tensor,
    position: tl.tensor, W: tl.constexpr, RING: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`convolve` with a bias, where there is one, and silu; 0 outside."""
    y = convolve(x, conv, weight, channel, inside, position, W, RING)
    if bias is not None:
        y += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return silu(y)


@triton.jit
def mamba2_step_kernel(
    z: tl.tensor, xbc: tl.tensor, dt: tl.tensor, conv: tl.tensor, weight: tl.tensor, bias: tl.tensor, A_log: tl.tensor,
    D: tl.tensor, dt_bias: tl.tensor, norm: tl.tensor, state: tl.tensor, positions: tl.tensor, real: tl.tensor,
    out: tl.tensor, codes: tl.tensor, scales: tl.tensor, work: tl.tensor, count: tl.tensor,
    z_row: tl.tensor, xbc_row: tl.tensor, dt_row: tl.tensor, eps: tl.tensor, low: tl.tensor, high: tl.tensor,
    HEADS: tl.constexpr, P: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, W: tl.constexpr, RING: tl.constexpr, KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Program (head, sequence).  `ROWS`, `COLUMNS`, `GROUP`: P, N and the elements of a group, rounded up.  `codes`, `scales`,
    `KIND`: see `quantized.store_quantized`."""
    CHANNELS: tl.constexpr = HEADS * P + 2 * GROUPS * N
    SHARED: tl.constexpr = HEADS // GROUPS  # heads of a group
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = head // SHARED
    first = group * (SHARED * P)
    p, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    rows, columns = p < P, n < N
    if real is not None:  # noqa: SIM102 (known when the kernel is compiled)
        if tl.load(real + sequence) == 0:
            if head % SHARED == 0:
                none = tl.zeros((GROUP,), tl.float32)
                store_output(none, out, codes, scales, sequence, first, HEADS * P, SHARED * P, GROUP, KIND)
            return
    cells = state + (sequence * HEADS + head) * (P * N) + p[:, None] * N + n[None, :]
    whole = rows[:, None] & columns[None, :]
    S = tl.load(cells, mask=whole, other=0.0)  # first, as it takes longest

    position = tl.load(positions + sequence)
    inputs, ring = xbc + sequence * xbc_row, conv + sequence * (CHANNELS * RING)
    # By way of memory: what is computed and then spread over the rows of S would be loaded anew, all eight inputs of it, by
    # every thread that needs it.
    own = work + ((tl.num_programs(1) + sequence) * HEADS + head) * P + p
    tl.store(own, convolved(inputs, ring, weight, bias, head * P + p, rows, position, W, RING), mask=rows)
    b = convolved(inputs, ring, weight, bias, HEADS * P + group * N + n, columns, position, W, RING)
    c = convolved(inputs, ring, weight, bias, HEADS * P + (GROUPS + group) * N + n, columns, position, W, RING)
    step = softplus(tl.load(dt + sequence * dt_row + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32))
    step = tl.minimum(tl.maximum(step, low), high)
    tl.debug_barrier()  # all of x is stored
    x = tl.load(own, mask=rows, other=0.0)
    S = S * tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * step) + (step * x)[:, None] * b[None, :]
    tl.store(cells, S, mask=whole)
    y = tl.sum(S * c[None, :], 1) + tl.load(D + head).to(tl.float32) * x
    u = y * silu(tl.load(z + sequence * z_row + head * P + p, mask=rows, other=0.0).to(tl.float32))
    tl.store(work + (sequence * HEADS + head) * P + p, u, mask=rows)

    tl.debug_barrier()  # all threads have stored before one of them releases
    arrived = count + sequence * GROUPS + group
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == SHARED - 1:
        tl.store(arrived, 0)
        e = tl.arange(0, GROUP)
        inside = e < SHARED * P
        all_u = tl.load(work + sequence * (HEADS * P) + first + e, mask=inside, other=0.0, cache_modifier=".cg")
        all_u *= tl.rsqrt(tl.sum(all_u * all_u, 0) / (SHARED * P) + eps)
        all_u *= tl.load(norm + first + e, mask=inside, other=0.0).to(tl.float32)
        store_output(all_u, out, codes, scales, sequence, first, HEADS * P, SHARED * P, GROUP, KIND)


def prepare(sizes: Sizes, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """A function for the layer whose stored `tensors` are these: `conv1d.weight`, perhaps `conv1d.bias`, `A_log`, `D`,
    `dt_bias`, `norm.weight`.

    It takes bfloat16 `z` `[B, 1, heads P]`, `xbc` `[B, 1, channels]`, `dt` `[B, 1, heads]`, dense along the last axis; the ring
    `[B, channels, R]`, R >= W, and the float32 state `[B, heads, P, N]`, both dense and updated in place; `positions`, int64
    `[B, 1]`, and `real`, bool `[B, 1]` or None.  Returns `[B, 1, heads P]` in the dtype of `z`, zero for what is no token, or
    fills `out`.  `reader`: the layer that takes the result; codes and scales are left with it where a group suffices for them.
    Reads nothing back to the host.
    """
    s = sizes
    weight, A_log, D, dt_bias, norm = (tensors[name] for name in ("conv1d.weight", "A_log", "D", "dt_bias", "norm.weight"))
    bias, inner = tensors.get("conv1d.bias"), s.heads * s.head_dim
    rows, columns, group = (triton.next_power_of_2(size) for size in (s.head_dim, s.state_size, inner // s.groups))

    def step(
        z: Tensor, xbc: Tensor, dt: Tensor, conv: Tensor, state: Tensor, positions: Tensor, real: Tensor | None = None,
        out: Tensor | None = None, reader: Reader | None = None,
    ) -> Tensor:  # fmt: skip
        B, device = len(z), z.device
        assert conv.is_contiguous()
        assert state.is_contiguous()
        result = torch.empty(B, 1, inner, dtype=z.dtype, device=device) if out is None else out
        kind, codes, scales = room_for(reader, B, inner, inner // s.groups, device)
        work = torch.empty(2, B, inner, dtype=torch.float32, device=device)
        few = B * s.groups <= COUNTERS
        mamba2_step_kernel[(s.heads, B)](
            z, xbc, dt, conv, weight, bias, A_log, D, dt_bias, norm, state, positions.contiguous(),
            None if real is None else real.contiguous(), result, codes, scales, work,
            counters(device) if few else torch.zeros(B * s.groups, dtype=torch.int32, device=device),
            z.stride(0), xbc.stride(0), dt.stride(0), s.eps, s.shortest, s.longest,
            s.heads, s.head_dim, s.groups, s.state_size, rows, columns, group, s.width, conv.shape[-1],
            KINDS.index(kind), num_warps=WARPS,
        )  # fmt: skip
        leave(reader, result, codes, scales)
        return result

    return step

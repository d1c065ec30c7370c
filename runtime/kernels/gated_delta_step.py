"""One token of a gated delta net, from its projections to what its output projection takes, in one launch.

Per sequence and value head, of which `value_heads / key_heads` share a key head; x~ are the inputs of the convolution, newest
last, of which the ring `conv` has those before:

    b, a = x w_b, x w_a                                             of the layer's input, unless they are given
    q, k, v = silu(sum over i < W of w_i x~_i)                      channel by channel, channels in the order q, k, v
    q <- q / |q| Dk**-0.5;    k <- k / |k|                          |x| = sqrt(sum x**2 + 1e-6)
    g = -exp(A_log) softplus(a + dt_bias);    beta = sigmoid(b)
    S <- exp(g) S;    d = beta (v - S^T k);    S <- S + k d^T;    o = S^T q        S float32 [Dk, Dv]
    y = o / sqrt(mean(o**2) + eps) * w_norm * gate(z)               over the Dv of the head; gate is silu or sigmoid

All in float32 from the bfloat16 inputs; y is rounded once, and quantised for the output projection where that needs no more
than a head.  A program has one value head of one sequence, its whole state in registers: read once, written once.  Both
products with the state are taken of the decayed one, o = S^T q + d (k . q), so that neither waits for the other.  Programs
that share a key head compute its q and k again, and all store the same new input into the ring, in a column that none of them
reads.  Source: transformers 5.23 `Qwen3_5GatedDeltaNet`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.gated_delta import Sizes, projects
from runtime.kernels.quantized import KINDS, Reader, leave, output_errors, poisoned, room_for, store_output

SCHEMES = ("state fp32",)
ACTIVATIONS: tuple[str | None, ...] = (None,)
TOLERANCE = 1e-4  # of the largest result: float32 throughout
AT_ONCE = 1024  # inputs of b and a
WARPS = 4  # two programs fit into the registers of a multiprocessor; with 8 warps one does


@dataclass(frozen=True, slots=True)
class Case:
    """A layer and sequences at `positions`.  `ring`: columns of the convolution's ring; `idle`: whose token is none.
    `kind`: how the output is quantised.  `hidden`: inputs that b and a are projected from, 0 where they are given."""

    name: str
    sizes: Sizes
    positions: tuple[int, ...]
    ring: int = 4
    idle: tuple[int, ...] = ()
    kind: str | None = None
    hidden: int = 0
    tiny: bool = False

    def __str__(self) -> str:
        quantised = f", {self.kind} quantised" if self.kind else ""
        projected = f", b and a of {self.hidden}" if self.hidden else ""
        return f"{self.name}, gated delta net, one token of {len(self.positions)}{projected}{quantised}"

    @property
    def nbytes(self) -> int:
        """The state, read and written."""
        s = self.sizes
        return 8 * len(self.positions) * s.value_heads * s.key_dim * s.value_dim


CASES = (
    Case("first token", Sizes(1, 1, 16, 16, 4, 1e-6, "silu"), (0,), tiny=True),
    Case("shared key heads", Sizes(2, 6, 16, 32, 4, 1e-6, "silu"), (5, 2, 1000), tiny=True),
    Case("odd sizes", Sizes(1, 2, 24, 20, 3, 1e-5, "sigmoid"), (3, 9), ring=5, tiny=True),
    Case("idle sequences", Sizes(1, 2, 16, 16, 4, 1e-6, "silu"), (7, 8, 9), idle=(0, 2), tiny=True),
    Case("one scale", Sizes(1, 2, 16, 24, 4, 1e-6, "silu"), (5, 6), idle=(0,), kind="fp8_static", tiny=True),
    Case("groups", Sizes(1, 2, 16, 128, 4, 1e-6, "silu"), (5, 6), idle=(0,), kind="fp8_group", tiny=True),
    Case("powers of two", Sizes(1, 1, 16, 384, 4, 1e-6, "silu"), (5,), kind="fp8_group_e8m0", tiny=True),
    Case("whole steps", Sizes(1, 2, 16, 16, 4, 1e-6, "silu"), (5, 6), hidden=2048, tiny=True),
    Case("projected", Sizes(1, 3, 16, 16, 4, 1e-6, "silu"), (5, 6), idle=(0,), kind="fp8_static", hidden=1100, tiny=True),
    Case("NVFP4", Sizes(1, 2, 16, 48, 4, 1e-6, "sigmoid"), (5, 6), idle=(1,), kind="nvfp4", tiny=True),
    Case("MXFP8", Sizes(1, 2, 16, 96, 4, 1e-6, "silu"), (5, 6), idle=(1,), kind="mxfp8", tiny=True),
    Case("Qwen3.5-27B", Sizes(16, 48, 128, 128, 4, 1e-6, "silu"), (1000,), hidden=5120),
    Case("Qwen3.5-27B", Sizes(16, 48, 128, 128, 4, 1e-6, "silu"), tuple(range(8)), hidden=5120),
    Case("Qwen3.5-35B-A3B", Sizes(16, 32, 128, 128, 4, 1e-6, "silu"), (1000,), kind="fp8_group", hidden=2048),
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a launch takes: see `prepare`."""

    tensors: dict[str, Tensor]
    qkv: Tensor
    z: Tensor
    ba: Tensor
    conv: Tensor
    state: Tensor
    positions: Tensor
    real: Tensor | None


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random contents, projections as slices of wider rows."""
    random = torch.Generator(device).manual_seed(seed)
    s, B = case.sizes, len(case.positions)
    k_rows, v_rows = s.key_heads * s.key_dim, s.value_heads * s.value_dim
    channels = 2 * k_rows + v_rows

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    tensors = {
        "conv1d.weight": (normal(channels, 1, s.width) * 0.5).bfloat16(),
        "A_log": normal(s.value_heads), "dt_bias": normal(s.value_heads).bfloat16(), "norm.weight": normal(s.value_dim),
    }  # fmt: skip
    qkvz, ba = normal(B, 1, channels + v_rows).bfloat16(), normal(B, 1, case.hidden or 2 * s.value_heads).bfloat16()
    if case.hidden:
        tensors["in_proj_ba.weight"] = (normal(2 * s.value_heads, case.hidden) * case.hidden**-0.5).bfloat16()
    real = torch.ones(B, 1, dtype=torch.bool, device=device)
    real[list(case.idle)] = False
    qkv, z = qkvz.split([channels, v_rows], -1)
    return Inputs(
        tensors, qkv, z, ba, normal(B, channels, case.ring).bfloat16(),
        normal(B, s.value_heads, s.key_dim, s.value_dim), torch.tensor(case.positions, device=device)[:, None],
        real if case.idle else None,
    )  # fmt: skip


def reference(i: Inputs, s: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: output `[B, 1, value_heads * value_dim]`, zero for a token that is none; ring and state afterwards."""
    _, channels, ring = i.conv.shape
    tensors = {name: tensor.double() for name, tensor in i.tensors.items()}
    real = torch.ones_like(i.positions, dtype=torch.bool) if i.real is None else i.real
    columns = (i.positions + torch.arange(1 - s.width, 0, device=i.conv.device)) % ring
    seen = torch.cat([i.conv.gather(-1, columns[:, None].expand(-1, channels, -1)), i.qkv.transpose(1, 2)], -1).double()
    conv = i.conv.clone()
    conv.scatter_(-1, (i.positions % ring)[:, None].expand(-1, channels, -1), i.qkv.transpose(1, 2))
    rows = s.key_heads * s.key_dim
    q, k, v = F.silu((seen * tensors["conv1d.weight"][:, 0]).sum(-1)).split([rows, rows, channels - 2 * rows], -1)
    q, k = (y.unflatten(-1, (-1, s.key_dim)).repeat_interleave(s.value_heads // s.key_heads, 1) for y in (q, k))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    ba = i.ba.double()[:, 0]
    ba = ba @ tensors["in_proj_ba.weight"].T if "in_proj_ba.weight" in tensors else ba
    b, a = ba.split(s.value_heads, -1)
    g = -tensors["A_log"].exp() * F.softplus(a + tensors["dt_bias"])
    state = i.state.double() * g.exp()[..., None, None]
    v = v.unflatten(-1, (-1, s.value_dim))
    d = b.sigmoid().unsqueeze(-1) * (v - torch.einsum("bhkv,bhk->bhv", state, k))
    state = state + k.unsqueeze(-1) * d.unsqueeze(-2)
    o = torch.einsum("bhkv,bhk->bhv", state, q * s.key_dim**-0.5)
    gate = i.z.double()[:, 0].unflatten(-1, (-1, s.value_dim))
    gate = F.silu(gate) if s.gate == "silu" else gate.sigmoid()
    y = o * (o.square().mean(-1, keepdim=True) + s.eps).rsqrt() * tensors["norm.weight"] * gate
    there = real[:, :, None]
    return y.flatten(1).unsqueeze(1) * there, conv.where(there, i.conv), state.where(there[..., None], i.state.double())


def errors(case: Case, device: torch.device, seed: int) -> dict[str, float]:
    """Largest error of output, its codes and the state over the largest value: NaN where an output was not written, infinite
    where the ring is not bit for bit what it must be.  Fresh inputs, poisoned output."""
    i = make_inputs(case, device, seed)
    y, conv, state = reference(i, case.sizes)
    out, reader = poisoned(y.shape, case.kind, device)
    prepare(case.sizes, i.tensors)(i.qkv, i.z, i.ba, i.conv, i.state, i.positions, i.real, out=out, reader=reader)
    found = output_errors(out, y, reader) | {"state": float((i.state - state).abs().max() / state.abs().max())}
    return found if torch.equal(i.conv, conv) else dict.fromkeys(found, torch.inf)


def launch(case: Case, device: torch.device, seed: int) -> Callable[[], object]:
    """A launch to time."""
    i = make_inputs(case, device, seed)
    run, reader = prepare(case.sizes, i.tensors), poisoned(i.z.shape, case.kind, device)[1]
    return lambda: run(i.qkv, i.z, i.ba, i.conv, i.state, i.positions, i.real, reader=reader)


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """`log(1 + exp(x))`, of float32."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def convolve(
    x: tl.tensor, conv: tl.tensor, weight: tl.tensor, channel: tl.tensor, inside: tl.tensor, position: tl.tensor,
    W: tl.constexpr, RING: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The convolution at `position` of the channels, float32; stores their new inputs `x` into the ring `conv` of a sequence.

    Pointers: `x`, `conv`, `weight` to channel 0.
    """
    new = tl.load(x + channel, mask=inside, other=0.0)
    sums = new.to(tl.float32) * tl.load(weight + channel * W + (W - 1), mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(W - 1):
        column = (position + (RING - W + 1 + i)) % RING
        old = tl.load(conv + channel * RING + column, mask=inside, other=0.0).to(tl.float32)
        sums += old * tl.load(weight + channel * W + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(conv + channel * RING + position % RING, new, mask=inside)
    return sums


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """`x sigmoid(x)`."""
    return x * tl.sigmoid(x)


@triton.jit
def project(
    x: tl.tensor, first: tl.tensor, second: tl.tensor, HIDDEN: tl.constexpr, AT_ONCE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The products of `x` `[HIDDEN]` with two rows, float32; all are pointers."""
    at = tl.arange(0, AT_ONCE)
    sums, others = tl.zeros((AT_ONCE,), tl.float32), tl.zeros((AT_ONCE,), tl.float32)
    for start in tl.static_range(0, HIDDEN, AT_ONCE):
        inside = start + at < HIDDEN
        inputs = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
        sums += inputs * tl.load(first + start + at, mask=inside, other=0.0).to(tl.float32)
        others += inputs * tl.load(second + start + at, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(sums, 0), tl.sum(others, 0)


@triton.jit
def gated_delta_step_kernel(
    qkv: tl.tensor, z: tl.tensor, ba: tl.tensor, projection: tl.tensor, conv: tl.tensor, weight: tl.tensor, A_log: tl.tensor,
    dt_bias: tl.tensor, norm: tl.tensor, state: tl.tensor, positions: tl.tensor, real: tl.tensor, out: tl.tensor,
    codes: tl.tensor, scales: tl.tensor, qkv_row: tl.tensor, z_row: tl.tensor, ba_row: tl.tensor, eps: tl.tensor,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr, W: tl.constexpr, RING: tl.constexpr, SILU: tl.constexpr, KIND: tl.constexpr,
    HIDDEN: tl.constexpr, AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """Program (value head, sequence).  `KEYS`, `VALUES`: DK and DV rounded up.  `*_row`: strides of a sequence.  `codes`,
    `scales`, `KIND`: see `quantized.store_quantized`.  `ba`: b and a of all heads, or with `projection` `[., HIDDEN]` its
    input, of which `AT_ONCE` are taken at a time."""
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * DK + VALUE_HEADS * DV
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, m = tl.arange(0, KEYS), tl.arange(0, VALUES)
    keys, values = n < DK, m < DV
    if real is not None:  # noqa: SIM102 (known when the kernel is compiled)
        if tl.load(real + sequence) == 0:
            none = tl.zeros((VALUES,), tl.float32)
            store_output(none, out, codes, scales, sequence, head * DV, VALUE_HEADS * DV, DV, VALUES, KIND)
            return
    cells = state + (sequence * VALUE_HEADS + head) * (DK * DV) + n[:, None] * DV + m[None, :]
    whole = keys[:, None] & values[None, :]
    S = tl.load(cells, mask=whole, other=0.0)  # first, as it takes longest

    key_head = head // (VALUE_HEADS // KEY_HEADS)
    position = tl.load(positions + sequence)
    x, ring = qkv + sequence * qkv_row, conv + sequence * (CHANNELS * RING)
    q = silu(convolve(x, ring, weight, key_head * DK + n, keys, position, W, RING))
    k = silu(convolve(x, ring, weight, (KEY_HEADS + key_head) * DK + n, keys, position, W, RING))
    v = silu(convolve(x, ring, weight, 2 * KEY_HEADS * DK + head * DV + m, values, position, W, RING))
    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * (DK**-0.5)
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    # Here, not before: else the assembler puts off loading S until these have arrived.
    ba += sequence * ba_row
    if projection is not None:
        b, a = project(ba, projection + head * HIDDEN, projection + (VALUE_HEADS + head) * HIDDEN, HIDDEN, AT_ONCE)
    else:
        b, a = tl.load(ba + head).to(tl.float32), tl.load(ba + VALUE_HEADS + head).to(tl.float32)
    step = softplus(a + tl.load(dt_bias + head).to(tl.float32))
    decay = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * step)
    beta = tl.sigmoid(b)

    S *= decay
    d = beta * (v - tl.sum(S * k[:, None], 0))
    o = tl.sum(S * q[:, None], 0) + d * tl.sum(k * q, 0)
    tl.store(cells, S + k[:, None] * d[None, :], mask=whole)
    gate = tl.load(z + sequence * z_row + head * DV + m, mask=values, other=0.0).to(tl.float32)
    gate = silu(gate) if SILU else tl.sigmoid(gate)
    o *= tl.rsqrt(tl.sum(o * o, 0) / DV + eps)
    y = o * tl.load(norm + m, mask=values, other=0.0).to(tl.float32) * gate
    store_output(y, out, codes, scales, sequence, head * DV, VALUE_HEADS * DV, DV, VALUES, KIND)


def prepare(sizes: Sizes, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """A function for the layer whose stored `tensors` are these: `conv1d.weight`, `A_log`, `dt_bias`, `norm.weight`, and
    perhaps `in_proj_ba.weight`: see `gated_delta.projects`.

    It takes bfloat16 `qkv` `[B, 1, channels]`, `z` `[B, 1, Hv Dv]`, and `ba` `[B, 1, 2 Hv]`, b before a, or what it projects to
    them, `[B, 1, H]`, all dense along the last axis; the ring `[B, channels, R]`, R >= W, and the float32 state
    `[B, Hv, Dk, Dv]`, both dense and updated in place; `positions`, int64 `[B, 1]`, and `real`, bool `[B, 1]` or
    None.  Returns `[B, 1, Hv Dv]` in the dtype of `qkv`, zero for what is no token, or fills `out`.  `reader`: the layer that
    takes the result; codes and scales are left with it where a head suffices for them.  Reads nothing back to the host.
    """
    s = sizes
    weight, A_log, dt_bias, norm = (tensors[name] for name in ("conv1d.weight", "A_log", "dt_bias", "norm.weight"))
    keys, values = triton.next_power_of_2(s.key_dim), triton.next_power_of_2(s.value_dim)
    projection = tensors["in_proj_ba.weight"] if projects(tensors) else None
    hidden = 0 if projection is None else projection.shape[1]

    def step(
        qkv: Tensor, z: Tensor, ba: Tensor, conv: Tensor, state: Tensor, positions: Tensor,
        real: Tensor | None = None, out: Tensor | None = None, reader: Reader | None = None,
    ) -> Tensor:  # fmt: skip
        B, ring, width = len(qkv), conv.shape[-1], s.value_heads * s.value_dim
        assert conv.is_contiguous()
        assert state.is_contiguous()
        result = torch.empty(B, 1, width, dtype=qkv.dtype, device=qkv.device) if out is None else out
        kind, codes, scales = room_for(reader, B, width, s.value_dim, qkv.device)
        gated_delta_step_kernel[(s.value_heads, B)](
            qkv, z, ba, projection, conv, weight, A_log, dt_bias, norm, state, positions.contiguous(),
            None if real is None else real.contiguous(), result, codes, scales,
            qkv.stride(0), z.stride(0), ba.stride(0), s.eps,
            s.key_heads, s.value_heads, s.key_dim, s.value_dim, keys, values, s.width, ring, s.gate == "silu",
            KINDS.index(kind), hidden, AT_ONCE, num_warps=WARPS,
        )  # fmt: skip
        leave(reader, result, codes, scales)
        return result

    return step

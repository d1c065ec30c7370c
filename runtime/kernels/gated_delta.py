"""The gated delta rule, the recurrence of linear attention in Qwen3.5.

Per head, with state S `[Dk, Dv]`, decay g <= 0 and write strength beta in (0, 1):

    S <- exp(g_t) S;    d = beta_t (v_t - S^T k_t);    S <- S + k_t d^T;    o_t = S^T q_t

Shapes: B batch, T tokens, H heads; `q`, `k` `[B, H, T, Dk]`, `v` `[B, H, T, Dv]`, `g`, `beta` `[B, H, T]`, `state`
`[B, H, Dk, Dv]`; all float32.  `state` is updated in place.  Keys are normalised and queries scaled by the caller.
Source: "Gated Delta Networks" (arXiv 2412.06464), in the form that transformers 5.23 computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sizes:
    """A gated delta net around the rule: heads and their sizes, width of the convolution, and its norm.

    `gate`: "silu" or "sigmoid", of the norm.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    width: int
    eps: float
    gate: str


def projects(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the kernel for one token projects b and a itself, for a layer of these stored tensors: a dense bfloat16 matrix of
    so few rows is not worth a launch."""
    return "in_proj_ba.weight" in tensors and tensors["in_proj_ba.weight"].dtype == torch.bfloat16


CHUNK = 64  # tokens that one triangular system covers
SEGMENT = 1024  # tokens whose systems are alive at once: bounds the memory of a long prompt


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """Run the rule over T tokens and return the outputs `[B, H, T, Dv]`; one token by recurrence, more by chunks."""
    if q.shape[2] == 1:
        return step(q, k, v, g, beta, state)
    segments = [x.split(SEGMENT, 2) for x in (q, k, v, g, beta)]
    return torch.cat([chunked(*inputs, state) for inputs in zip(*segments, strict=True)], 2)  # type: ignore[call-arg]


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """One token (T = 1), as the formula above is written."""
    state.mul_(g.exp().unsqueeze(-1))
    d = beta.unsqueeze(-1) * (v - k @ state)  # (B, H, 1, Dv)
    state.add_(k.transpose(-1, -2) @ d)
    return q @ state


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """Many tokens: within a chunk a unit triangular system replaces the recurrence, between chunks S is carried.

    With c the cumulated decay of a chunk, L_ij = exp(c_i - c_j) for i >= j and A = strictly lower part of
    beta_i (k_i . k_j) L_ij, the writes are V' = (I + A)^-1 (beta V - beta e^c K S), and

        O = e^c Q S + (Q K^T o L) V';    S <- e^(c_last) S + (e^(c_last - c) K)^T V'

    Memory: a few times the systems of all chunks, B * H * T * CHUNK float32.
    """
    T = q.shape[2]
    pad = -T % CHUNK  # padded tokens have g = 0 and beta = 0: they change nothing
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    g, beta = (F.pad(x, (0, pad)).unflatten(2, (-1, CHUNK)) for x in (g, beta))

    c = g.double().cumsum(-1)  # (B, H, chunks, CHUNK); in float32, differences of large sums would cost four digits
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (c.unsqueeze(-1) - c.unsqueeze(-2)).float().masked_fill(~lower, -torch.inf).exp()
    since_start, until_end = c.float().exp().unsqueeze(-1), (c[..., -1:] - c).float().exp().unsqueeze(-1)
    k_beta = k * beta.unsqueeze(-1)
    system = (k_beta @ k.transpose(-1, -2)) * decay  # solve_triangular reads what is below the diagonal only
    sides = torch.cat([v * beta.unsqueeze(-1), k_beta * since_start], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    writes, reads = solved.split([v.shape[-1], k.shape[-1]], -1)  # (I + A)^-1 times beta V and beta e^c K

    within = (q @ k.transpose(-1, -2)) * decay
    q, k = q * since_start, k * until_end
    carried = since_start[..., -1, :].unsqueeze(-1)  # (B, H, chunks, 1, 1)
    outputs = []
    for n in range(q.shape[2]):
        new = writes[:, :, n] - reads[:, :, n] @ state
        outputs.append(q[:, :, n] @ state + within[:, :, n] @ new)
        state.mul_(carried[:, :, n]).add_(k[:, :, n].transpose(-1, -2) @ new)
    return torch.cat(outputs, 2)[:, :, :T]

"""The state-space recurrence of Mamba2 (state space duality), with a state for each head and one scalar decay per token.

Per head, with state S `[P, N]` and decay g <= 0:

    S <- exp(g_t) S + x_t b_t^T;    y_t = S c_t

Shapes: B batch, T tokens, H heads of P elements, G groups of heads that share `b` and `c`, N state size; `x` `[B, H, T, P]`,
`b`, `c` `[B, G, T, N]`, `g` `[B, H, T]`, `state` `[B, H, P, N]`; all float32.  Head h is of group `h // (H / G)`.  `state` is
updated in place.  The caller multiplies by the time step: it passes x dt for x, and A dt for g.
Source: "Transformers are SSMs" (arXiv 2405.21060), in the form that transformers 5.23 computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sizes:
    """A Mamba2 layer around the recurrence: heads and their size P, groups, state size N, width of the convolution.

    `shortest`, `longest`: bounds of a time step.  `eps`: of the norm.
    """

    heads: int
    head_dim: int
    groups: int
    state_size: int
    width: int
    eps: float
    shortest: float
    longest: float


CHUNK = 64  # tokens that one product of matrices covers
SEGMENT = 1024  # tokens whose products are alive at once: bounds the memory of a long prompt


def ssd(x: Tensor, b: Tensor, c: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """Run the recurrence over T tokens and return the outputs `[B, H, T, P]`; one token as written, more by chunks."""
    x, g, state = (y.unflatten(1, (b.shape[1], -1)) for y in (x, g, state))  # (B, G, H / G, ...), views
    b, c = b.unsqueeze(2), c.unsqueeze(2)
    if x.shape[3] == 1:
        return step(x, b, c, g, state).flatten(1, 2)
    segments = [y.split(SEGMENT, 3) for y in (x, b, c, g)]
    return torch.cat([chunked(*inputs, state) for inputs in zip(*segments, strict=True)], 3).flatten(1, 2)  # type: ignore[call-arg]


def step(x: Tensor, b: Tensor, c: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """One token (T = 1), as the formula above is written; heads by group, as `ssd` splits them."""
    state.mul_(g.exp().unsqueeze(-1)).addcmul_(x.transpose(-1, -2), b)
    return c @ state.transpose(-1, -2)


def chunked(x: Tensor, b: Tensor, c: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """Many tokens: within a chunk the recurrence is one masked product, between chunks S is carried.

    With s the cumulated decay of a chunk and L_ij = exp(s_i - s_j) for i >= j:

        Y = (C B^T o L) X + e^s C S^T;    S <- e^(s_last) S + (e^(s_last - s) X)^T B

    Memory: a few times the masks of all chunks, B * H * T * CHUNK float32.
    """
    T = x.shape[3]
    pad = -T % CHUNK  # padded tokens have g = 0 and x = 0: they change nothing
    x, b, c = (F.pad(y, (0, 0, 0, pad)).unflatten(3, (-1, CHUNK)) for y in (x, b, c))
    s = F.pad(g, (0, pad)).unflatten(3, (-1, CHUNK)).double().cumsum(-1)  # in float32, differences of large sums lose digits
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    decay = (s.unsqueeze(-1) - s.unsqueeze(-2)).float().masked_fill(~lower, -torch.inf).exp()
    since_start, until_end = s.float().exp().unsqueeze(-1), (s[..., -1:] - s).float().exp().unsqueeze(-1)

    within = ((c @ b.transpose(-1, -2)) * decay) @ x  # (B, G, H / G, chunks, CHUNK, P)
    x = x * until_end
    outputs = []
    for n in range(x.shape[3]):
        outputs.append(within[:, :, :, n] + since_start[:, :, :, n] * (c[:, :, :, n] @ state.transpose(-1, -2)))
        state.mul_(since_start[:, :, :, n, -1:]).add_(x[:, :, :, n].transpose(-1, -2) @ b[:, :, :, n])
    return torch.cat(outputs, 3)[:, :, :, :T]

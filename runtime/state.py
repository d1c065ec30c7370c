"""What a sequence leaves behind between calls: keys and values, convolution inputs, recurrent states.

B sequences of different lengths advance together.  Each row of a call holds T tokens of which the first `counts[b]` are
real; the rest only fill the rectangle: they leave no trace.  Every cache is allocated once and updated in place.

S tokens that a cache can hold, D head size, Nq / Nkv query and KV heads, W width of a convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.format import FP8_MAX
from runtime.kernels.table import ATTEND, module_for


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How much room a cache needs.

    `draft`: how many of the last call's tokens may be taken back, when that call had at most `draft + 1`.
    `dtype`: of the arithmetic.
    """

    batch: int
    max_length: int
    draft: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Tokens:
    """Where the tokens of one call stand.

    starts      tokens that each sequence had before
    counts      how many of the T columns are real, row by row
    positions   int64 `[B, T]`: place of each token in its sequence
    real        bool `[B, T]`, or None when all are
    reversible  whether some of these tokens may be taken back
    turns       kind of layer -> cosine and sine, `[B, 1, T, rotary_dim / 2]` or broadcast over B
    fixed       one token per sequence, and the host knows nothing of them: `starts` and `counts` are empty, `real` is there,
                and what is computed may depend on the places in its values only, never in its shapes
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    positions: Tensor
    real: Tensor | None
    reversible: bool = False
    turns: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fixed: bool = False

    @property
    def length(self) -> int:
        """T."""
        return self.positions.shape[1]

    @property
    def together(self) -> bool:
        """Whether all sequences stand at the same place."""
        return len(set(self.starts)) == 1

    def silence(self, x: Tensor) -> Tensor:
        """Zeros in the place of what belongs to no real token: `[B, T, ...]`."""
        return x if self.real is None else x * self.real.view(*self.real.shape, *[1] * (x.ndim - 2))


class Cache(Protocol):
    """What one layer remembers."""

    def keep(self, counts: Sequence[int]) -> None:
        """Of the last call's tokens keep the first `counts[b]`; the others never happened."""

    def clear(self) -> None:
        """Become as good as new."""


@dataclass
class State:
    """Caches of all layers, and how many tokens each sequence has.  A call updates it in place.

    `places`: int64 `[B]` on the device, what fixed steps count in instead of `lengths`; None until `settle`.
    """

    caches: list[Cache | None]  # None: a layer that remembers nothing
    size: CacheSize
    lengths: list[int]
    places: Tensor | None = None

    @property
    def max_length(self) -> int:
        """Tokens that a sequence may have."""
        return self.size.max_length

    def place(self, length: int, counts: Sequence[int] | None) -> Tokens:
        """The places of `length` new columns, of which the first `counts[b]` are real (all, when None)."""
        starts = tuple(self.lengths)
        columns = torch.arange(length, device=self.size.device)
        if len(set(starts)) == 1:
            positions = (columns + starts[0]).expand(len(starts), -1)
        else:
            positions = columns + torch.tensor(starts, device=self.size.device).unsqueeze(-1)
        real = None
        if counts is not None and any(count != length for count in counts):
            real = columns < torch.tensor(tuple(counts), device=self.size.device).unsqueeze(-1)
        else:
            counts = (length,) * len(starts)
        return Tokens(starts, tuple(counts), positions, real, 0 < length <= self.size.draft + 1 and self.size.draft > 0)

    def settle(self) -> None:
        """From here on the tokens are counted on the device; `places` stays the same tensor, for graphs that hold it."""
        lengths = torch.tensor(self.lengths)
        if self.places is None:
            self.places = torch.zeros(len(self.lengths), dtype=torch.int64, device=self.size.device)
        self.places.copy_(lengths)

    def place_fixed(self, real: Tensor) -> Tokens:
        """The places of one new token per sequence, of which those of `real`, bool `[B]`, are; after `settle`."""
        assert self.places is not None
        return Tokens((), (), self.places.unsqueeze(-1).clone(), real.unsqueeze(-1), fixed=True)

    def first(self, rows: int) -> State:
        """The first sequences alone: what happens to them there happens here, but `lengths` are counted apart."""
        caches = [None if cache is None else _first_rows(cache, rows) for cache in self.caches]
        return State(caches, replace(self.size, batch=rows), self.lengths[:rows])

    def clear(self) -> None:
        """Forget all sequences.  No memory is given back or taken."""
        self.lengths = [0] * len(self.lengths)
        for cache in self.caches:
            if cache is not None:
                cache.clear()

    def advance(self, counts: Sequence[int]) -> None:
        """Count the tokens of a call that is over."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, counted: Sequence[int], counts: Sequence[int]) -> None:
        """Take tokens back: of the last call's `counted[b]` tokens keep the first `counts[b]`.

        The call must have had at most `size.draft + 1` columns.
        """
        self.lengths = [n - was + now for n, was, now in zip(self.lengths, counted, counts, strict=True)]
        for cache in self.caches:
            if cache is not None:
                cache.keep(counts)


C = TypeVar("C", bound=Cache)


def _first_rows(cache: C, rows: int) -> C:
    """A cache of the first sequences, in the same memory: the first axis of all tensors of a cache is the batch."""
    view = copy.copy(cache)
    vars(view).update({name: value[:rows] for name, value in vars(cache).items() if isinstance(value, Tensor)})
    return view


@dataclass(frozen=True)
class KVFormat:
    """How an attention layer stores its keys and values.

    `owner`: the module with `k_scale` and `v_scale`, F32 `[1]` or `[Nkv]`, when they are kept as E4M3 codes; None keeps
    them in the dtype of the arithmetic.  `window`: a key is visible to the queries less than this many positions after it.
    Source: nvidia-modelopt 0.47 quantises K after the rotary embedding and V as they enter attention.
    """

    heads: int
    head_dim: int
    window: int | None = None
    owner: nn.Module | None = None

    def new_cache(self, size: CacheSize) -> KVCache:
        """An empty cache; one with a window that is shorter than the sequence holds the window only."""
        if self.window is None or self.window >= size.max_length:
            return KVCache(self, size, size.max_length)
        return WindowCache(self, size, min(self.window + size.draft, size.max_length), self.window)

    def kernel(self, size: CacheSize, window: int | None) -> Callable[..., Tensor] | None:
        """What attends one token per sequence where `kernels.table` has it for the device; `window`: of a ring."""
        module = module_for(ATTEND, "kv bf16" if self.owner is None else "kv fp8", size.device)
        if module is None or size.dtype != torch.bfloat16:
            return None
        scales = () if self.owner is None else (self.owner.get_parameter("k_scale"), self.owner.get_parameter("v_scale"))
        attend: Callable[..., Tensor] = module.prepare(window, *scales)
        return attend

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of what is kept; None: that of the arithmetic."""
        return None if self.owner is None else torch.float8_e4m3fn

    def encode(self, x: Tensor, role: str) -> Tensor:
        """`[B, T, Nkv, D]` to what is kept.  `role`: "k_scale" or "v_scale"."""
        if self.owner is None:
            return x
        scale = self.owner.get_parameter(role).unsqueeze(-1)
        return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)

    def decode(self, kept: Tensor, role: str, dtype: torch.dtype) -> Tensor:
        """The inverse of `encode`, in `dtype`."""
        if self.owner is None:
            return kept
        return (kept.float() * self.owner.get_parameter(role).unsqueeze(-1)).to(dtype)


class KVCache:
    """Keys and values of one attention layer, `[B, S + 1, Nkv, D]` each; the last column takes what fills rectangles."""

    def __init__(self, kind: KVFormat, size: CacheSize, columns: int) -> None:
        shape = (size.batch, columns + 1, kind.heads, kind.head_dim)
        dtype = kind.dtype or size.dtype
        self.format = kind
        self.k = torch.zeros(shape, device=size.device, dtype=dtype)
        self.v = torch.zeros(shape, device=size.device, dtype=dtype)
        self.spare = columns
        self._rows = torch.arange(size.batch, device=size.device).unsqueeze(-1)
        self._one_token = kind.kernel(size, None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, at: Tokens) -> Tensor:
        """Remember the new keys and values, and attend to all up to each query.

        `q` `[B, Nq, T, D]`, `k`, `v` `[B, Nkv, T, D]`; returns `[B, Nq, T, D]` in the dtype of `q`.
        """
        if self._one_token is not None and at.length == 1:
            return self._one_token(q, k, v, self.k, self.v, at.positions, at.real)
        self._store(k, v, at, at.positions)
        if at.fixed:
            k, v = self._load(self.k[:, : self.spare], self.v[:, : self.spare], q.dtype)
            return _attention(q, k, v, torch.arange(self.spare, device=q.device) <= at.positions.unsqueeze(-1))
        end = min(max(at.starts) + at.length, self.spare)
        k, v = self._load(self.k[:, :end], self.v[:, :end], q.dtype)
        if at.together and (at.length == 1 or at.starts[0] == 0):
            return _attention(q, k, v, None, causal=at.length > 1)
        if at.together and at.starts[0] + at.length == end and _takes_flash(q):
            return _last_queries(q, k, v)
        return _attention(q, k, v, torch.arange(end, device=q.device) <= at.positions.unsqueeze(-1))

    def keep(self, counts: Sequence[int]) -> None:
        """Nothing to do: what lies after a sequence's end is never seen, and overwritten by what comes there."""

    def clear(self) -> None:
        """Nothing to do, for the same reason."""

    def _store(self, k: Tensor, v: Tensor, at: Tokens, columns: Tensor) -> None:
        """Write `[B, Nkv, T, D]` to `columns`, int64 `[B, T]`."""
        if at.real is not None:
            columns = columns.where(at.real, self.spare)
        self.k[self._rows, columns] = self.format.encode(k.transpose(1, 2), "k_scale")
        self.v[self._rows, columns] = self.format.encode(v.transpose(1, 2), "v_scale")

    def _load(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Kept `[B, S, Nkv, D]` as `[B, Nkv, S, D]` in `dtype`."""
        return (
            self.format.decode(k, "k_scale", dtype).transpose(1, 2),
            self.format.decode(v, "v_scale", dtype).transpose(1, 2),
        )


class WindowCache(KVCache):
    """The last keys and values only: a ring of S columns, in which position p has column p modulo S."""

    def __init__(self, kind: KVFormat, size: CacheSize, columns: int, window: int) -> None:
        super().__init__(kind, size, columns)
        self.window = window
        self._one_token = kind.kernel(size, window)
        self.held = torch.full((size.batch, columns + 1), -1, device=size.device)  # position in each column; -1: none

    def attend(self, q: Tensor, k: Tensor, v: Tensor, at: Tokens) -> Tensor:
        """As `KVCache.attend`, over the window: first what the ring holds, then the new tokens."""
        if self._one_token is not None and at.length == 1:
            return self._one_token(q, k, v, self.k, self.v, at.positions, at.real, self.held)
        held = self.held[:, : self.spare]
        start = at.positions[:, :1]
        old_k, old_v = self._load(self.k[:, : self.spare], self.v[:, : self.spare], q.dtype)
        kept_k, kept_v = self.format.encode(k.transpose(1, 2), "k_scale"), self.format.encode(v.transpose(1, 2), "v_scale")
        new_k, new_v = self._load(kept_k, kept_v, q.dtype)
        query = at.positions.unsqueeze(-1)  # (B, T, 1)
        seen = ((held >= 0) & (held < start)).unsqueeze(1) & (held.unsqueeze(1) > query - self.window)
        distance = query - at.positions.unsqueeze(1)
        mask = torch.cat([seen, (distance >= 0) & (distance < self.window)], -1)
        y = _attention(q, torch.cat([old_k, new_k], 2), torch.cat([old_v, new_v], 2), mask)

        columns = at.positions % self.spare
        if not at.fixed:  # one token always has room in the ring
            ends = torch.tensor(at.starts, device=q.device) + torch.tensor(at.counts, device=q.device)
            columns = columns.where(at.positions >= ends.unsqueeze(-1) - self.spare, self.spare)
        self._store(k, v, at, columns)
        if at.real is not None:
            columns = columns.where(at.real, self.spare)
        self.held[self._rows, columns] = at.positions
        return y

    def clear(self) -> None:
        """No column holds a position."""
        self.held.fill_(-1)


# On a GPU torch 2.11 would rather take cuDNN, which plans each new combination of lengths, for up to half a second.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """`mask`: bool `[B, T, S]`, true where a key is visible."""
    mask, grouped = None if mask is None else mask.unsqueeze(1), q.shape[1] != k.shape[1]
    if q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    with sdpa_kernel(BACKENDS):
        if grouped and mask is not None:
            return _head_by_head(q, k, v, mask)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


def _takes_flash(q: Tensor) -> bool:
    """Whether torch has flash attention for such queries."""
    return q.device.type != "cpu" and q.dtype != torch.float32 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _last_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T of S places, without a mask.  What torch offers for it, `causal_lower_right`, calls the
    same operation, and takes a second to import."""
    y: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return y


def _head_by_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`_attention` for one KV head after another: no kernel of torch 2.11 takes groups and a mask, and without one all scores
    are in memory at once, in float32."""
    size = q.shape[1] // k.shape[1]
    heads = zip(q.split(size, 1), k.split(1, 1), v.split(1, 1), strict=True)
    outputs = [
        F.scaled_dot_product_attention(group, key.expand(-1, size, -1, -1), value.expand(-1, size, -1, -1), mask)
        for group, key, value in heads
    ]
    return torch.cat(outputs, 1)


class RecurrentCache:
    """A convolution's last inputs, in the dtype of the arithmetic, and a float32 state `[B, ...]`.

    `conv` `[B, channels, R]` is a ring: the input at position p is in column p modulo R.  A new input replaces none of the
    `W - 1` before it, so that it can be stored while others read them; R leaves room for those that may be taken back.
    """

    def __init__(self, size: CacheSize, channels: int, width: int, state: tuple[int, ...]) -> None:
        self.width = width
        self.conv = torch.zeros(size.batch, channels, width + size.draft, device=size.device, dtype=size.dtype)
        self.state = torch.zeros(size.batch, *state, device=size.device, dtype=torch.float32)
        self._states: list[Tensor] = []  # before the last reversible call, and after each of its tokens

    def before(self, x: Tensor, at: Tokens) -> Tensor:
        """Inputs of a convolution over time, `[B, T, channels]`, behind those it remembers: `[B, channels, W - 1 + T]`."""
        ring, device = self.conv.shape[-1], x.device
        start = at.positions[:, :1]
        old = (start + torch.arange(1 - self.width, 0, device=device)) % ring
        kept = self.conv.gather(-1, old.unsqueeze(1).expand(-1, x.shape[-1], -1))
        seen = torch.cat([kept, x.transpose(1, 2)], -1)
        end = start + (at.length if at.real is None else at.real.sum(-1, keepdim=True))
        latest = end - 1 - (end - 1 - torch.arange(ring, device=device)) % ring  # position that belongs in each column
        new = seen.gather(-1, (latest - start + self.width - 1).clamp(min=0).unsqueeze(1).expand_as(self.conv))
        self.conv.copy_(new.where((latest >= start).unsqueeze(1), self.conv))
        return seen

    def scan(self, run: Callable[..., Tensor], inputs: Sequence[Tensor], at: Tokens) -> Tensor:
        """`run(*inputs, state)` over `[B, heads, T, ...]`, which updates the state in place; returns its output.

        Tokens that may be taken back are run one at a time, and the state after each is kept until the next call.
        """
        if not at.reversible:
            self._states = []
            return run(*inputs, self.state)
        outputs = (run(*(x[:, :, t : t + 1] for x in inputs), self.state) for t in range(at.length))
        return torch.cat(list(self._keeping_states(outputs)), 2)

    def step(self, run: Callable[..., Tensor], inputs: Sequence[Tensor], at: Tokens) -> Tensor:
        """`run(*inputs, conv, state, positions, real)` for each token alone, `[B, T, ...]`; else as `scan`.

        `run` updates the ring and the state in place, and returns `[B, 1, ...]`.
        """
        outputs = (
            run(
                *(x[:, t : t + 1] for x in inputs), self.conv, self.state, at.positions[:, t : t + 1],
                None if at.real is None else at.real[:, t : t + 1],
            )
            for t in range(at.length)
        )  # fmt: skip
        if at.reversible:
            return torch.cat(list(self._keeping_states(outputs)), 1)
        self._states = []
        return next(outputs) if at.length == 1 else torch.cat(list(outputs), 1)

    def _keeping_states(self, outputs: Iterator[Tensor]) -> Iterator[Tensor]:
        """The same, of one token each, and the states between them kept."""
        self._states = [self.state.clone()]
        for output in outputs:
            self._states.append(self.state.clone())
            yield output

    def keep(self, counts: Sequence[int]) -> None:
        """Go back to where each sequence was after `counts[b]` tokens of the last call, which must have been reversible."""
        assert self._states
        for row, count in enumerate(counts):
            self.state[row] = self._states[count][row]

    def clear(self) -> None:
        """Nothing came before."""
        self.conv.zero_()
        self.state.zero_()

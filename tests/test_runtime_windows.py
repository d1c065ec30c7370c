"""Caches of attention, against attention over everything that was ever said: random calls, many at a time.

Each case plays a conversation: calls of any length, rows of different lengths, tokens that are taken back.  Tolerance 1e-5:
float32 sums in another order.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from runtime.state import CacheSize, KVCache, KVFormat, State, Tokens, WindowCache

torch.set_num_threads(1)  # tensors this small: more threads would only wait for each other
HEADS, KV_HEADS, DIM, MAX = 4, 2, 8, 40


def reference(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """The last queries of a sequence: `q` `[Nq, t, D]`, `k`, `v` `[Nkv, n, D]`, in float64."""
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
    distance = torch.arange(k.shape[1])[-q.shape[1] :, None] - torch.arange(k.shape[1])
    seen = (distance >= 0) & (distance < (window or MAX))
    return (q.double() @ k.mT / DIM**0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """Through E4M3 and back: `[Nkv, n, D]`, a scale for each head."""
    scale = scale.view(-1, 1, 1)
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


class Conversation:
    """Caches beside all that they were given; `said[b]` is what counts of sequence b: keys and values `[Nkv, n, D]`."""

    def __init__(self, window: int | None, batch: int, draft: int, scales: nn.Module | None, seed: int) -> None:
        self.window, self.draft, self.scales = window, draft, scales
        self.generator, self.random = torch.Generator().manual_seed(seed), random.Random(seed)
        size = CacheSize(batch, MAX, draft, torch.device("cpu"), torch.float32)
        self.cache: KVCache = KVFormat(KV_HEADS, DIM, window, scales).new_cache(size)
        self.state = State([self.cache], size, [0] * batch)
        self.said = [(torch.empty(KV_HEADS, 0, DIM), torch.empty(KV_HEADS, 0, DIM)) for _ in range(batch)]

    def call(self, length: int, counts: list[int]) -> None:
        """One call, each of its real tokens compared."""
        shape = (len(counts), HEADS, length, DIM), (len(counts), KV_HEADS, length, DIM)
        q, k, v = (2 * torch.randn(one, generator=self.generator) for one in (shape[0], shape[1], shape[1]))
        at: Tokens = self.state.place(length, counts)
        found = self.cache.attend(q, k, v, at)
        for row, count in enumerate(counts):
            before, new = self.said[row], (k[row, :, :count], v[row, :, :count])
            if self.scales is not None:
                new = rounded(new[0], self.scales.k_scale), rounded(new[1], self.scales.v_scale)
            keys, values = (torch.cat(both, 1) for both in zip(before, new, strict=True))
            if count:
                expected = reference(q[row, :, :count], keys, values, self.window)
                assert (found[row, :, :count] - expected).abs().max() < 1e-5
            self.said[row] = (keys, values)
        self.state.advance(at.counts)

    def take_back(self, counts: list[int], kept: list[int]) -> None:
        self.state.keep(counts, kept)
        for row, count in enumerate(counts):
            end = self.said[row][0].shape[1] - count + kept[row]
            self.said[row] = (self.said[row][0][:, :end], self.said[row][1][:, :end])

    def play(self) -> None:
        """Until no sequence has room: long calls and short ones, together and ragged, and some tokens taken back."""
        batch = len(self.said)
        for _ in range(25):
            room = [MAX - length for length in self.state.lengths]
            if min(room) == 0:
                break
            few = self.draft > 0 and self.random.random() < 0.7
            length = self.random.randint(1, self.draft + 1 if few else self.random.choice([1, 4, 20]))
            least = self.random.choice([0, length])
            counts = [self.random.randint(min(least, left), min(length, left)) for left in room]
            self.call(length, counts)
            if few:
                self.take_back(counts, [self.random.randint(0, count) for count in counts])
        assert self.state.lengths == [keys.shape[1] for keys, _ in self.said]
        assert batch == 1 or max(self.state.lengths) > 0


@pytest.fixture(params=[False, True], ids=["float32", "e4m3"])
def scales(request: pytest.FixtureRequest) -> nn.Module | None:
    if not request.param:
        return None
    owner = nn.Module()
    owner.k_scale, owner.v_scale = (nn.Parameter(torch.tensor(s), requires_grad=False) for s in ([0.01, 0.02], [0.03, 0.015]))
    return owner


@pytest.mark.parametrize("draft", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 2, 5, 16, MAX - 1, MAX, None], ids=lambda w: f"window {w}")
def test_conversations(window: int | None, draft: int, scales: nn.Module | None) -> None:
    for seed in range(3):
        Conversation(window, 1 + seed % 3, draft, scales, seed).play()


@pytest.mark.parametrize(("window", "draft", "columns"), [(5, 0, 5), (5, 3, 8), (38, 3, MAX), (MAX, 3, MAX), (None, 0, MAX)])
def test_a_window_is_all_that_is_kept(window: int | None, draft: int, columns: int) -> None:
    """And no more than the longest sequence."""
    size = CacheSize(2, MAX, draft, torch.device("cpu"), torch.bfloat16)
    cache = KVFormat(KV_HEADS, DIM, window).new_cache(size)
    assert isinstance(cache, WindowCache) == (window is not None and window < MAX)
    assert cache.k.shape == cache.v.shape == (2, columns + 1, KV_HEADS, DIM)


def test_no_column_is_written_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of two values stays would be left to the device, so a call longer than the ring writes its end alone."""
    seen = []

    def store(self: WindowCache, k: Tensor, v: Tensor, at: Tokens, columns: Tensor) -> None:
        real = columns if at.real is None else columns.where(at.real, self.spare)
        seen.extend([column for column in row if column != self.spare] for row in real.tolist())

    monkeypatch.setattr(WindowCache, "_store", store)
    conversation = Conversation(5, 3, 2, None, 0)
    at = conversation.state.place(30, [30, 20, 4])
    q, kv = torch.randn(3, HEADS, 30, DIM), torch.randn(3, KV_HEADS, 30, DIM)
    conversation.cache.attend(q, kv, kv, at)
    assert [len(row) == len(set(row)) for row in seen] == [True] * 3

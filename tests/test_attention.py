"""Which of torch's attentions runs: on a GPU none that plans for each length, and none that holds all scores at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import state
from runtime.state import CacheSize, KVFormat, State

TOGETHER = ((9, [9, 9]), (5, [5, 5]))
RAGGED = ((9, [9, 4]), (5, [5, 5]))


def test_one_head_after_another_is_all_at_once() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16, generator=random) for heads, n in ((6, 5), (2, 9), (2, 9)))
    mask = torch.rand(2, 1, 5, 9, generator=random) < 0.7
    mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert (state._head_by_head(q, k, v, mask) - expected).abs().max() < 1e-6


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """What is called for calls of two sequences, four heads to two, into a cache for 40 tokens: whether with a mask, heads of
    queries and keys, whether cuDNN may run it; "flash" where flash attention is called itself."""

    def run(calls: Any, device: str, dtype: torch.dtype, window: int | None = None) -> list[tuple[Any, ...]]:
        size, seen = CacheSize(2, 40, 0, torch.device(device), dtype), []

        def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Tensor:
            seen.append((mask is not None, q.shape[1], k.shape[1], torch.backends.cuda.cudnn_sdp_enabled()))
            return sdpa(q, k, v, mask, **options)

        def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.append(("flash", q.shape[2], k.shape[2]))
            return last(q, k, v)

        sdpa, last = F.scaled_dot_product_attention, state._last_queries
        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        monkeypatch.setattr(state, "_last_queries", flash)
        cache = KVFormat(2, 16, window).new_cache(size)
        held = State([cache], size, [0] * 2)
        for length, counts in calls:
            q, k, v = (torch.zeros(2, heads, length, 16, device=device, dtype=dtype) for heads in (4, 2, 2))
            at = held.place(length, counts)
            assert cache.attend(q, k, v, at).shape == q.shape
            held.advance(at.counts)
        monkeypatch.undo()
        return seen

    return run


def test_off_the_cpu_neither_cudnn_nor_masks_with_groups(asked: Any) -> None:
    first, one_head = (False, 4, 2, False), (True, 2, 2, False)
    assert asked(TOGETHER, "meta", torch.bfloat16) == [first, ("flash", 5, 14)]
    assert asked(RAGGED, "meta", torch.bfloat16) == [first, one_head, one_head]
    assert asked(RAGGED[:1], "meta", torch.bfloat16, window=8) == [one_head, one_head]
    assert asked(TOGETHER, "meta", torch.float32) == [first, one_head, one_head]  # flash attention takes no float32
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_queries_that_reach_beyond_the_cache_have_a_mask(asked: Any) -> None:
    """Only what fills the rectangle does: the last query is then not at the last place."""
    calls = ((30, [30, 30]), (12, [10, 10]))
    assert asked(calls, "meta", torch.bfloat16)[1:] == [(True, 2, 2, False)] * 2


def test_on_the_cpu_at_once(asked: Any) -> None:
    for calls in (TOGETHER, RAGGED):
        assert asked(calls, "cpu", torch.bfloat16) == [(False, 4, 2, True), (True, 4, 2, True)]

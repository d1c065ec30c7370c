"""Which of torch's attentions runs: on a GPU none that plans for each length, and none that holds all scores at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode

from runtime import state
from runtime.state import CacheSize, KVFormat, State


def attended(lengths: list[tuple[int, list[int]]], device: str, dtype: torch.dtype, window: int | None = None) -> list[Tensor]:
    """Calls of two sequences, four heads to two, into a cache for 40 tokens; real tokens only."""
    size = CacheSize(2, 40, 0, torch.device(device), dtype)
    cache = KVFormat(2, 16, window).new_cache(size)
    held, random, found = State([cache], size, [0] * 2), torch.Generator().manual_seed(0), []
    for length, counts in lengths:
        q, k, v = (torch.randn(2, heads, length, 16, generator=random).to(device, dtype) for heads in (4, 2, 2))
        at = held.place(length, counts)
        y = cache.attend(q, k, v, at)
        found += [row[:, :count] for row, count in zip(y, counts, strict=True)]
        held.advance(at.counts)
    return found


TOGETHER = [(9, [9, 9]), (5, [5, 5]), (3, [3, 2]), (4, [4, 4])]
RAGGED = [(9, [9, 4]), (5, [5, 5]), (1, [1, 1])]


@pytest.mark.parametrize("calls", [TOGETHER, RAGGED, [(30, [30, 30]), (12, [10, 10])]], ids=["together", "ragged", "end"])
def test_bfloat16_attends_to_what_float32_does(calls: list[tuple[int, list[int]]]) -> None:
    """Causal by alignment instead of by a mask, also where what fills the rectangle reaches beyond the cache."""
    for a, b in zip(attended(calls, "cpu", torch.bfloat16), attended(calls, "cpu", torch.float32), strict=True):
        assert (a.float() - b).abs().max() < 0.05


def test_one_head_after_another_is_all_at_once() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16, generator=random) for heads, n in ((6, 5), (2, 9), (2, 9)))
    mask = torch.rand(2, 1, 5, 9, generator=random) < 0.7
    mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert (state._head_by_head(q, k, v, mask) - expected).abs().max() < 1e-6


class Calls(TorchFunctionMode):
    """What scaled_dot_product_attention is asked for: kind of mask, groups, whether cuDNN may run it."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, _, mask = (*args, (kwargs or {}).get("attn_mask"))[:4]
            self.seen.append((type(mask), q.shape[1] != k.shape[1], torch.backends.cuda.cudnn_sdp_enabled()))
        return func(*args, **(kwargs or {}))


def asked(calls: list[tuple[int, list[int]]], *where: Any, **options: Any) -> list[tuple[Any, ...]]:
    with Calls() as found:
        attended(calls, *where, **options)
    return found.seen


def test_off_the_cpu_neither_cudnn_nor_masks_with_groups() -> None:
    nothing, one_head = (type(None), True, False), (Tensor, False, False)
    assert asked(TOGETHER[:2], "meta", torch.bfloat16)[:2] == [nothing, (CausalBias, True, False)]
    assert asked(RAGGED[:2], "meta", torch.bfloat16) == [nothing, one_head, one_head]
    assert asked(RAGGED[:1], "meta", torch.bfloat16, window=8) == [one_head, one_head]
    assert asked(TOGETHER[:2], "meta", torch.float32) == [nothing, one_head, one_head]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_on_the_cpu_at_once() -> None:
    assert [grouped for _, grouped, _ in asked(RAGGED, "cpu", torch.float32)] == [True] * len(RAGGED)

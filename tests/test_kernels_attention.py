"""Attention of one token over a cache, in Triton's interpreter: against float64, and in the place of torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed")

from runtime.kernels import attention_decode, table
from runtime.kernels.attention_decode import Case, choose_cut, errors, make_inputs, reference
from runtime.kernels.table import ATTEND, TORCH, Machine, choose
from runtime.kernels.tiles import COUNTERS
from runtime.state import CacheSize, KVCache, KVFormat, State

CPU = torch.device("cpu")
TINY = [case for case in attention_decode.CASES if case.tiny]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_attention(case: Case) -> None:
    """However the columns are cut; the cache afterwards is exact."""
    found = errors(case, CPU, 0)
    assert len(found) == 4
    assert max(found.values()) < 1e-6, found


def test_reference_is_that_of_torch() -> None:
    """For one sequence with everything visible: what `scaled_dot_product_attention` says."""
    i = make_inputs(Case("", 6, 2, 32, 20, (17,)), CPU, 0)
    y, k, v = reference(i, None)
    keys, values = (x[:, :18].double().transpose(1, 2) for x in (k, v))
    assert torch.equal(k[:, 17], i.k[:, :, 0])
    expected = nn.functional.scaled_dot_product_attention(i.q.double(), keys, values, enable_gqa=True)
    assert (y - expected).abs().max() < 1e-12


def owner(by_head: bool) -> nn.Module:
    module = nn.Module()
    for role, values in (("k_scale", [0.01, 0.02]), ("v_scale", [0.03, 0.015])):
        module.register_parameter(role, nn.Parameter(torch.tensor(values if by_head else values[:1]), requires_grad=False))
    return module


def play(window: int | None, scales: nn.Module | None, calls: int) -> tuple[list[Tensor], KVCache]:
    """A prompt of different lengths, then tokens one by one, some of them none, then several at once."""
    size = CacheSize(3, 40, 0, CPU, torch.bfloat16)
    cache = KVFormat(2, 16, window, scales).new_cache(size)
    state, random, found = State([cache], size, [0] * 3), torch.Generator().manual_seed(0), []
    lengths = [(7, [7, 1, 5])] + [(1, [1, int(n % 3 > 0), 1]) for n in range(calls)] + [(3, [3, 3, 2])]
    for length, counts in lengths:
        q, k, v = (torch.randn(3, heads, length, 16, generator=random).bfloat16() for heads in (4, 2, 2))
        at = state.place(length, counts)
        y = cache.attend(q, k, v, at)
        assert y.dtype == torch.bfloat16
        found.append(torch.cat([row[:, :count].flatten() for row, count in zip(y.float(), counts, strict=True)]))
        state.advance(at.counts)
    state.settle()  # and one more that only the device knows of
    q, k, v = (torch.randn(3, heads, 1, 16, generator=random).bfloat16() for heads in (4, 2, 2))
    y = cache.attend(q, k, v, state.place_fixed(torch.tensor([True, False, True])))
    return [*found, y[0].float(), y[2].float()], cache


@pytest.mark.parametrize("scales", [None, owner(False), owner(True)], ids=["bf16", "fp8", "fp8 by head"])
@pytest.mark.parametrize("window", [None, 5], ids=["all", "window 5"])
def test_caches_use_the_table(window: int | None, scales: nn.Module | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that believes its CPU to be a GPU answers, and remembers, as one that does not."""
    expected, there = play(window, scales, 4)
    launches = []
    monkeypatch.setattr(table, "machine", lambda device: Machine(90, True))
    kernel = attention_decode.attend_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, int]) -> object:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(attention_decode, "attend_kernel", Counted())
    found, here = play(window, scales, 4)
    assert len(launches) == 5
    for y, z in zip(found, expected, strict=True):
        assert (y - z).abs().max() < 0.03 * z.abs().max()  # bfloat16, which the interpreter truncates to
    for name in ("k", "v", "held"):
        if hasattr(there, name):
            a, b = getattr(here, name)[:, : here.spare], getattr(there, name)[:, : here.spare]
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_float32_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "machine", lambda device: Machine(90, True))
    assert KVFormat(2, 16).kernel(CacheSize(1, 8, 0, CPU, torch.float32), None) is None


@pytest.mark.parametrize("scheme", attention_decode.SCHEMES)
def test_torch_attends_everywhere(scheme: str) -> None:
    assert choose(scheme, None, ATTEND, Machine(90, True))[0].module == "runtime.kernels.attention_decode"
    for at in (Machine(None, True), Machine(90, False), Machine(75, True)):
        assert choose(scheme, None, ATTEND, at)[0].module == TORCH


@pytest.mark.parametrize("heads", [1, 4, 32, 5000])
@pytest.mark.parametrize("columns", [1, 100, 33000, 262144])
@pytest.mark.parametrize(("size", "queries"), [(16, 16), (128, 16), (256, 64)])
def test_cuts_are_sane(heads: int, columns: int, size: int, queries: int) -> None:
    cut = choose_cut(heads, columns, size, queries, 132)
    assert cut.tile >= 16  # what the tensor cores take
    assert 1 <= cut.ranges <= 32
    assert cut.ranges == 1 or heads <= COUNTERS
    assert cut.ranges == 1 or (cut.ranges - 1) * cut.least * cut.tile < columns  # none that can never have work

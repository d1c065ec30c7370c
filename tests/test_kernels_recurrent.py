"""Recurrent layers in Triton's interpreter: kernels against float64, and in the place of torch's."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed")

from runtime.builder import LayerBuilder
from runtime.kernels import gated_delta_step, mamba2_step, table
from runtime.kernels.table import DELTA_STEP, MAMBA_STEP, TORCH, Machine, choose
from runtime.models.nemotron_h import Mamba2
from runtime.models.qwen3_5 import GatedDeltaNet
from runtime.state import CacheSize, State

CPU = torch.device("cpu")
STEPS = [(kernel, case) for kernel in (gated_delta_step, mamba2_step) for case in kernel.CASES if case.tiny]


@pytest.mark.parametrize(("kernel", "case"), STEPS, ids=str)
def test_one_token(kernel: ModuleType, case: Any) -> None:
    found = kernel.errors(case, CPU, 0)
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize("operation", [DELTA_STEP, MAMBA_STEP])
def test_torch_runs_everywhere(operation: str) -> None:
    assert choose("state fp32", None, operation, Machine(100, True))[0].module != TORCH
    for at in (Machine(None, True), Machine(90, False), Machine(75, True)):
        assert choose("state fp32", None, operation, at)[0].module == TORCH


# In a layer

DELTA = SimpleNamespace(
    hidden_size=24, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
    linear_conv_kernel_dim=4, rms_norm_eps=1e-6, output_gate="silu",
)  # fmt: skip
MAMBA = SimpleNamespace(
    hidden_size=24, mamba_num_heads=4, mamba_head_dim=12, ssm_state_size=8, n_groups=2, conv_kernel=4, use_conv_bias=True,
    mamba_bias=False, time_step_limit=(0.0, None), rms_norm_eps=1e-5,
)  # fmt: skip
LAYERS = {
    "gated delta net": lambda build: GatedDeltaNet(DELTA, build, "layer"),
    "Mamba2": lambda build: Mamba2(MAMBA, build, "layer"),
}


def layer_of(make: Callable[[LayerBuilder], nn.Module]) -> nn.Module:
    """With random bfloat16 weights."""
    config: Any = SimpleNamespace(modules={}, unfused={}, kv_cache={})
    layer, random = make(LayerBuilder(config, CPU, torch.bfloat16)), torch.Generator().manual_seed(0)
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.randn(parameter.shape, generator=random) * 0.5
            setattr(module, name, nn.Parameter(value.bfloat16(), requires_grad=False))
    return layer


def play(layer: nn.Module, draft: int) -> tuple[list[Tensor], Any]:
    """A prompt of different lengths, then tokens one by one, some of them none, some taken back, then several at once."""
    size = CacheSize(3, 64, draft, CPU, torch.bfloat16)
    cache = layer.new_cache(size)
    state, random, found = State([cache], size, [0] * 3), torch.Generator().manual_seed(1), []
    calls: list[tuple[int, list[int], list[int] | None]] = [(7, [7, 1, 5], None), (1, [1, 1, 1], None), (1, [0, 1, 1], None)]
    calls += [(1 + draft, [1 + draft] * 3, [1, 0, 1 + draft]), (1 + draft, [1, 1 + draft, 0], [1, 1, 0])] if draft else []
    calls += [(1, [1, 1, 1], None), (6, [6, 6, 2], None), (1, [1, 1, 1], None)]
    for length, counts, kept in calls:
        at = state.place(length, counts)
        y = layer(torch.randn(3, length, 24, generator=random).bfloat16(), at, cache).float()
        found += [row[:count] for row, count in zip(y, counts, strict=True)]
        state.advance(at.counts)
        if kept is not None:
            state.keep(counts, kept)
    return found, cache


@pytest.mark.parametrize("draft", [0, 2])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_use_the_table(make: Callable[[LayerBuilder], nn.Module], draft: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that believes its CPU to be a GPU answers, and remembers, as one that does not."""
    expected, there = play(layer_of(make), draft)
    monkeypatch.setattr(table, "machine", lambda device: Machine(90, True))
    layer, steps = layer_of(make), []
    assert layer._one_token is not None
    run = layer._one_token
    layer._one_token = lambda *args: (steps.append(args), run(*args))[1]
    found, here = play(layer, draft)
    assert len(steps) == (4 if draft == 0 else 10)  # also what may be taken back, token by token
    most = max(float(y.abs().max()) for y in expected if y.numel())
    for y, z in zip(found, expected, strict=True):
        assert y.shape == z.shape
        assert (y - z).abs().sum() == 0 or (y - z).abs().max() < 0.03 * most  # the kernel rounds once, torch at each part
    assert torch.equal(here.conv, there.conv)
    assert (here.state - there.state).abs().max() < 0.02 * there.state.abs().max()

"""Recurrent layers in Triton's interpreter: kernels against float64, and in the place of torch's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_runtime_layers import random_layer, spec_of
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed")

from runtime.builder import LayerBuilder
from runtime.kernels import gated_delta, gated_delta_fla, gated_delta_step, mamba2_step, ssd, ssd_scan, table
from runtime.kernels.table import DELTA_SCAN, DELTA_STEP, MAMBA_SCAN, MAMBA_STEP, TORCH, Machine, choose
from runtime.models.nemotron_h import Mamba2
from runtime.models.qwen3_5 import GatedDeltaNet
from runtime.state import CacheSize, State

CPU = torch.device("cpu")
STEPS = [(kernel, case) for kernel in (gated_delta_step, mamba2_step) for case in kernel.CASES if case.tiny]


@pytest.mark.parametrize(("kernel", "case"), STEPS, ids=str)
def test_one_token(kernel: ModuleType, case: Any) -> None:
    found = kernel.errors(case, CPU, 0)
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize("case", [case for case in ssd_scan.CASES if case.tiny], ids=str)
def test_scan(case: ssd_scan.Case) -> None:
    """Decays are cumulated in float32, over 64 tokens."""
    found = ssd_scan.errors(case, CPU, 0)
    assert max(found.values()) < 1e-5, found


def test_scan_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt longer than a segment, and the reference of the kernel against the chunks of torch."""
    case = ssd_scan.CASES[1]
    x, b, c, g, state = ssd_scan.make_inputs(case, CPU, 1)
    y, after = ssd_scan.reference(x, b, c, g, state)
    monkeypatch.setattr(ssd_scan, "SEGMENT", 64)
    for run in (ssd.ssd, ssd_scan.prepare()):
        found = state.clone()
        assert (run(x, b, c, g, found) - y).abs().max() < 1e-5 * y.abs().max()
        assert (found - after).abs().max() < 1e-5 * after.abs().max()


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """What fla-core documents: `[B, T, heads, D]`, a scale on the queries; here in float64 and token by token."""
    assert (q.dtype, k.dtype, v.dtype, beta.dtype, g.dtype) == (*[torch.bfloat16] * 4, torch.float32)
    assert more.keys() == {"scale", "initial_state", "output_final_state"}
    S, outputs = more["initial_state"].double(), []
    assert more["output_final_state"]
    for t in range(q.shape[1]):
        q_t, k_t, v_t = (x[:, t].double() for x in (q, k, v))
        S = S * g[:, t].double().exp()[..., None, None]
        d = beta[:, t].double()[..., None] * (v_t - torch.einsum("bhkv,bhk->bhv", S, k_t))
        S = S + k_t[..., None] * d[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q_t * more["scale"]))
    return torch.stack(outputs, 1).bfloat16(), S.float()


def test_adapter_of_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    package: Any = ModuleType("fla.ops.gated_delta_rule")
    package.chunk_gated_delta_rule = chunk_gated_delta_rule
    monkeypatch.setitem(sys.modules, package.__name__, package)
    *inputs, state = gated_delta_fla.make_inputs(gated_delta_fla.Case("", 2, 70, 2, 16, 8), CPU, 0)
    y, after = gated_delta_fla.reference(*inputs, state)
    expected_state = state.clone()
    expected = gated_delta.gated_delta(*inputs, expected_state)
    found = gated_delta_fla.prepare()(*inputs, state)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()  # operands in bfloat16
    assert (state - expected_state).abs().max() < 0.01 * expected_state.abs().max()
    assert (expected - y).abs().max() < 1e-5
    assert (expected_state - after).abs().max() < 1e-5


@pytest.mark.parametrize("operation", [DELTA_STEP, MAMBA_STEP, DELTA_SCAN, MAMBA_SCAN])
def test_torch_runs_everywhere(operation: str) -> None:
    assert choose("state fp32", None, operation, Machine(100, True, frozenset({"fla"})))[0].module != TORCH
    for at in (Machine(None, True), Machine(90, False), Machine(75, True)):
        assert choose("state fp32", None, operation, at)[0].module == TORCH


def test_fla_is_not_needed() -> None:
    row, passed = choose("state fp32", None, DELTA_SCAN, Machine(90, True))
    assert row.module == TORCH
    assert passed == ("runtime.kernels.gated_delta_fla: needs fla-core, which is not installed (pip install qconvert[fla])",)


# In a layer

DELTA = SimpleNamespace(
    hidden_size=24, linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=12,
    linear_conv_kernel_dim=4, rms_norm_eps=1e-6, output_gate="silu",
)  # fmt: skip
MAMBA = SimpleNamespace(
    hidden_size=24, mamba_num_heads=2, mamba_head_dim=12, ssm_state_size=8, n_groups=2, conv_kernel=4, use_conv_bias=True,
    mamba_bias=False, time_step_limit=(0.0, None), rms_norm_eps=1e-5,
)  # fmt: skip
LAYERS = {
    "gated delta net": lambda build: GatedDeltaNet(DELTA, build, "layer"),
    "Mamba2": lambda build: Mamba2(MAMBA, build, "layer"),
    "heads of 16": lambda build: GatedDeltaNet(SimpleNamespace(**vars(DELTA) | {"linear_value_head_dim": 16}), build, "layer"),
    "Mamba2 of groups": lambda build: Mamba2(SimpleNamespace(**vars(MAMBA) | {"mamba_head_dim": 128}), build, "layer"),
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
    state.settle()  # and one more that only the device knows of
    y = layer(torch.randn(3, 1, 24, generator=random).bfloat16(), state.place_fixed(torch.tensor([True, False, True])), cache)
    return [*found, y[0].float(), y[2].float()], cache


@pytest.mark.parametrize("draft", [0, 2])
@pytest.mark.parametrize("make", [LAYERS[name] for name in ("gated delta net", "Mamba2")], ids=["gated delta net", "Mamba2"])
def test_layers_use_the_table(make: Callable[[LayerBuilder], nn.Module], draft: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that believes its CPU to be a GPU answers, and remembers, as one that does not."""
    expected, there = play(layer_of(make), draft)
    monkeypatch.setattr(table, "machine", lambda device: Machine(90, True))
    layer, steps = layer_of(make), []
    assert layer._one_token is not None
    run = layer._one_token
    layer._one_token = lambda *args, reader: (steps.append(args), run(*args, reader=reader))[1]
    found, here = play(layer, draft)
    assert len(steps) == (5 if draft == 0 else 11)  # also what may be taken back, token by token
    most = max(float(y.abs().max()) for y in expected if y.numel())
    for y, z in zip(found, expected, strict=True):
        assert y.shape == z.shape
        assert (y - z).abs().sum() == 0 or (y - z).abs().max() < 0.03 * most  # the kernel rounds once, torch at each part
    assert torch.equal(here.conv, there.conv)
    assert (here.state - there.state).abs().max() < 0.02 * there.state.abs().max()


READERS = {
    "one scale": ("Mamba2", ("fp8_tensor", (24,), 24, "fp8_static"), 0, 2),
    "groups": ("Mamba2 of groups", ("fp8_block", (24,), 256, "fp8_group"), 0, 2),
    "NVFP4": ("heads of 16", ("nvfp4", (24,), 32, "nvfp4"), 0, 2),
    "more than a head": ("heads of 16", ("fp8_channel", (24,), 32, "fp8_token"), 0, 0),
    "may be taken back": ("heads of 16", ("nvfp4", (24,), 32, "nvfp4"), 2, 0),
}


@pytest.mark.parametrize(("layer", "spec", "draft", "tokens"), READERS.values(), ids=READERS)
def test_layers_quantise_for_their_projection(
    layer: str, spec: Any, draft: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left for the output projection is what it would make itself."""
    monkeypatch.setattr(table, "machine", lambda device: Machine(90, True))
    module, left = layer_of(LAYERS[layer]), []
    projection = module.out_proj = random_layer(spec_of(*spec))
    if "input_scale" in dict(projection.named_parameters()):
        projection.input_scale[:] = 0.02
    leave, x = projection.leave, torch.randn(2, 24, generator=torch.Generator().manual_seed(3)).bfloat16()

    def answers(leaves: Callable[..., object]) -> list[Tensor]:
        monkeypatch.setattr(projection, "leave", leaves)
        size = CacheSize(2, 64, draft, CPU, torch.bfloat16)
        cache = module.new_cache(size)
        state, found = State([cache], size, [0, 0]), []
        for counts in ([1, 1], [0, 1]):
            found.append(module(x[:, None], state.place(1, counts), cache))
            state.advance(counts)
            if draft:
                state.keep(counts, counts)
        return found

    expected = answers(lambda *what: None)
    found = answers(lambda *what: (left.append(what), leave(*what)))
    assert len(left) == tokens
    assert all(float(y.abs().sum()) > 0 and torch.equal(y, z) for y, z in zip(found, expected, strict=True))


@pytest.mark.parametrize(("dtype", "asked"), [(torch.bfloat16, 0), (torch.float32, 2)], ids=str)
def test_who_projects_the_gates(dtype: torch.dtype, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix in bfloat16 is left to the kernel; either way the layer answers as torch does."""
    x, calls = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(4)).bfloat16(), []

    def answers() -> list[Tensor]:
        layer = layer_of(LAYERS["gated delta net"])
        layer.in_proj_ba.weight = nn.Parameter(layer.in_proj_ba.weight.to(dtype), requires_grad=False)
        layer.in_proj_ba.register_forward_hook(lambda *_: calls.append(1))
        size = CacheSize(2, 64, 2, CPU, torch.bfloat16)
        cache = layer.new_cache(size)
        state, found = State([cache], size, [0, 0]), []
        for counts in ([3, 3], [3, 2]):
            found.append(layer(x, state.place(3, counts), cache).float())
            state.advance(counts)
            state.keep(counts, [2, 1])
        return found

    expected = answers()
    calls.clear()
    monkeypatch.setattr(table, "machine", lambda device: Machine(90, True))
    found = answers()
    assert len(calls) == asked
    for y, z in zip(found, expected, strict=True):
        assert (y[:, :2] - z[:, :2]).abs().max() < 0.03 * z.abs().max()

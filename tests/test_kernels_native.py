"""Linear layers for many tokens that one generation of tensor cores has: FP8 in blocks on sm_90, NVFP4 from sm_100 on.

No CPU has these matmuls.  What reaches them goes through torch's own checks of shapes and strides, and through float64.
"""

from __future__ import annotations

import contextlib
from typing import Any

import block_scales
import pytest
import torch
from test_kernels import awkward_input
from test_runtime_layers import random_layer, spec_of
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from bench import gpu_rows
from runtime.activations import fake_quantize
from runtime.format import ModuleSpec
from runtime.kernels import expand, nvfp4_quantize, scaled_mm_block, scaled_mm_nvfp4, table
from runtime.kernels.cases import ManyCase, make_inputs, make_tensors, random_tensors
from runtime.kernels.fp8_quantize import quantize
from runtime.kernels.table import LINEAR, Machine, choose

CPU = torch.device("cpu")
CASES = [(module, case) for module in (scaled_mm_block, scaled_mm_nvfp4) for case in module.CASES if case.tiny]
native = pytest.mark.parametrize(("module", "case"), CASES, ids=lambda value: str(value) if isinstance(value, ManyCase) else "")


@native
def test_against_float64(module: Any, case: ManyCase, monkeypatch: pytest.MonkeyPatch) -> None:
    block_scales.provide(monkeypatch)
    errors = module.errors(case, CPU, 3)
    assert list(errors) == [f"M={M}" for M in case.tokens]
    assert max(errors.values()) < module.TOLERANCE
    found = module.launch(case, CPU, 4)()
    assert found.shape == (max(case.tokens), sum(case.layer.rows))
    assert found.dtype == torch.bfloat16


@native
def test_a_wrong_scale_is_seen(module: Any, case: ManyCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some bytes of the layout, or one block: what `errors` says is then too much."""
    block_scales.provide(monkeypatch)
    right = module.F.scaled_mm

    def wrong(a: Any, b: Any, scale_a: Any, recipe_a: Any, scale_b: Any, *more: Any, **options: Any) -> Any:
        if isinstance(scale_b, list):
            scale_b[0].view(torch.uint8)[::97] ^= 64
        else:
            scale_b[0, 0] *= 2
        return right(a, b, scale_a, recipe_a, scale_b, *more, **options)

    monkeypatch.setattr(module.F, "scaled_mm", wrong)
    assert not max(module.errors(case, CPU, 3).values()) < module.TOLERANCE


def test_codes_that_are_there_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a norm leaves them."""
    block_scales.provide(monkeypatch)
    case = scaled_mm_block.CASES[0].layer
    linear, x = scaled_mm_block.prepare(case.spec(), make_tensors(case, CPU, 1)), make_inputs(case, 66, CPU, 2)
    assert linear is not None
    assert torch.equal(linear(torch.full_like(x, torch.nan), left=quantize(x, "fp8_group")), linear(x))


@pytest.mark.parametrize("K", [384, 208])
@pytest.mark.parametrize("scale", [0.01, 1e-5])  # with the second one, block scales saturate
def test_packed_inputs_are_exact(K: int, scale: float) -> None:
    x = awkward_input()[:, :K].bfloat16().contiguous()
    codes, scales = nvfp4_quantize.quantize_packed(x, torch.tensor([scale]))
    assert len(codes) == 128
    assert len(scales) == 128 * -(-K // 64) * 4
    found = block_scales.decoded(codes, scales, torch.ones(1))
    assert torch.equal(found[: len(x)].bfloat16(), nvfp4_quantize.quantize(x, torch.tensor([scale])))
    expected = fake_quantize(x.float(), "nvfp4", torch.tensor(scale))
    assert (found[: len(x)] * scale - expected).abs().max() <= 1.2e-7 * expected.abs().max()
    assert not found[len(x) :].any()


@pytest.mark.parametrize("shape", [(128, 4), (300, 9), (16, 1)], ids=str)
def test_block_scales_lie_as_torchao_says(shape: tuple[int, int]) -> None:
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils", reason="torchao is not installed")
    scale = torch.randint(1, 127, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = scaled_mm_nvfp4.blocked(scale.view(torch.float8_e4m3fn)).view(torch.uint8)
    assert torch.equal(found, utils.to_blocked(scale))


CHOICES = [
    ("fp8_block", "fp8_group", 90, (12, 9), "scaled_mm_block"),
    ("fp8_block", "fp8_group_e8m0", 90, (13, 0), "scaled_mm_block"),
    ("fp8_block", None, 90, (13, 0), "expand"),
    ("fp8_block", "fp8_group", 90, (12, 8), "expand"),
    ("fp8_block", "fp8_group", 89, (13, 0), "expand"),
    ("fp8_block", "fp8_group", 100, (13, 0), "expand"),
    ("nvfp4", "nvfp4", 100, (12, 8), "scaled_mm_nvfp4"),
    ("nvfp4", "nvfp4", 103, (13, 0), "scaled_mm_nvfp4"),
    ("nvfp4", "nvfp4", 120, (13, 0), "scaled_mm_nvfp4"),
    ("nvfp4", "nvfp4", 100, (12, 6), "expand"),
    ("nvfp4", None, 100, (13, 0), "expand"),
    ("nvfp4", "nvfp4", 90, (13, 0), "expand"),
    ("nvfp4", "nvfp4", None, (0, 0), "torch"),
]


@pytest.mark.parametrize(("scheme", "kind", "generation", "cuda", "module"), CHOICES, ids=str)
def test_only_where_the_hardware_is(
    scheme: str, kind: str | None, generation: int | None, cuda: tuple[int, int], module: str
) -> None:
    row, passed = choose(scheme, kind, LINEAR, Machine(generation, True, cuda=cuda))
    assert row.module.rpartition(".")[2] == module
    if (scheme, cuda) == ("fp8_block", (12, 8)):
        assert passed == ("runtime.kernels.scaled_mm_block: needs torch for CUDA 12.9 or newer, this is for 12.8",)


LAYERS = [
    ("fp8_block", (128, 256), 384, "fp8_group", 90, scaled_mm_block),
    ("fp8_block", (128, 200), 384, "fp8_group", 90, expand),
    ("fp8_block", (128,), 320, "fp8_group", 90, expand),
    ("nvfp4", (48, 32), 96, "nvfp4", 100, scaled_mm_nvfp4),
    ("nvfp4", (48, 24), 96, "nvfp4", 100, expand),
    ("nvfp4", (48,), 80, "nvfp4", 100, expand),
]


@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_layers_use_them(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that believes its CPU to be a GPU, against torch's own arithmetic in float32; other shapes take the next row."""
    *facts, generation, module = spec
    block_scales.provide(monkeypatch)
    monkeypatch.setattr(table, "machine", lambda device: Machine(generation, True))
    layer = random_layer(spec_of(*facts), bias=True)
    layer.bias = torch.nn.Parameter(torch.linspace(-9, 9, layer.shape[0]).bfloat16(), requires_grad=False)
    assert layer._many_tokens is not None
    assert layer._many_tokens.__module__ == module.__name__
    if module is expand:
        return  # what it computes is tested elsewhere
    x = torch.randn(1, 65, layer.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = layer(x.float())
    assert (layer(x).float() - expected).abs().max() < 0.01 * expected.abs().max()


def test_partitions_with_the_same_scales_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def zeros(a: Tensor, b: Tensor, *more: Any, **options: Any) -> Tensor:
        calls.append((a, b))
        return torch.zeros(len(a), b.shape[1])

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", zeros)
    spec = spec_of("nvfp4", (32, 16, 64, 16), 64, "nvfp4")
    tensors = random_tensors(spec, CPU, 0)
    tensors["input_scale"][:] = torch.tensor([0.5, 0.5, 0.5, 0.25])
    tensors["weight_scale_2"][:] = torch.tensor([2.0, 2.0, 3.0, 3.0])
    linear = scaled_mm_nvfp4.prepare(spec, tensors)
    assert linear is not None
    assert linear(torch.ones(3, 64).bfloat16()).shape == (3, 128)
    assert [b.shape[1] for _, b in calls] == [48, 64, 16]
    inputs = [a.data_ptr() for a, _ in calls]
    assert inputs[0] == inputs[1] != inputs[2]  # the same codes while the input scale is the same


def test_bench_leaves_out_what_this_machine_cannot() -> None:
    names = {name for name, _ in gpu_rows.kernels()} - {name for name, _ in gpu_rows.kernels_on(CPU)}
    assert names == {"scaled_mm_block", "scaled_mm_nvfp4"}


def raised(*_: Any) -> dict[str, float]:
    raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")


@pytest.mark.parametrize(
    ("errors", "good"),
    [(lambda *_: {"y": 1e-4}, True), (lambda *_: {"y": 0.5}, False), (lambda *_: {"y": float("nan")}, False), (raised, False)],
    ids=["right", "wrong", "nan", "refused"],
)
def test_a_library_is_tried_first(errors: Any, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, a row whose work a library does is used only where the library is right; else the next one serves the layer."""
    monkeypatch.setattr(scaled_mm_block, "errors", errors)
    monkeypatch.setattr(table, "machine", lambda device: Machine(90, True, cuda=(13, 0)))
    table.works.cache_clear()
    spec = ModuleSpec("fp8_block", (256, 256), (("", 256),), "fp8_group")
    tensors = {
        "weight": torch.empty(256, 256, dtype=torch.float8_e4m3fn, device="meta"),
        "weight_scale": torch.empty(2, 2, device="meta"),
    }
    with contextlib.nullcontext() if good else pytest.warns(RuntimeWarning, match="scaled_mm_block is passed over on meta"):
        linear = table.prepare(LINEAR, spec, "fp8_group", tensors)
    assert linear is not None
    assert (linear.__module__ == scaled_mm_block.__name__) is good
    table.works.cache_clear()

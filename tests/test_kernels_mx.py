"""MX kernels in Triton's interpreter: few tokens against float64, inputs exactly."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from test_kernels import run_ptx
from test_runtime_layers import awkward_input

pytest.importorskip("triton", reason="triton is not installed")

from runtime.activations import fake_quantize
from runtime.kernels import mx_quantize, mxfp4_linear, mxfp8_linear, nvfp4_linear, tiles
from runtime.kernels.cases import Case, make_inputs, make_tensors

CPU = torch.device("cpu")
MODULES = [mxfp8_linear, mxfp4_linear]
TINY = [(module, case) for module in MODULES for case in module.CASES if case.tiny]


def label(value: object) -> str | None:
    return str(value) if isinstance(value, Case) else None


def check(module: ModuleType, case: Case, M: int, cut: tiles.Tiles | None = None) -> None:
    """Fresh inputs and a poisoned output, against float64."""
    spec, tensors, x = case.spec(), make_tensors(case, CPU, M), make_inputs(case, M, CPU, M)
    expected = module.reference(x, spec, tensors)
    found = torch.full(expected.shape, torch.nan)
    module.prepare(spec, tensors)(x, out=found, tiles=cut)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    assert not tiles.counters(CPU).any()  # ready for the next launch


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize(("module", "case"), TINY, ids=label)
def test_mx_linear(module: ModuleType, case: Case, M: int) -> None:
    check(module, case, M)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.SCHEMES[0])
def test_mx_split_of_k(module: ModuleType) -> None:
    """With a range that reaches beyond K; 9 tokens."""
    case = next(case for case in module.CASES if case.name == "K ends inside a step")
    check(module, case, 9, tiles.Tiles(32, 16, 2, 1, 2, 2))


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4"])
@pytest.mark.parametrize("K", [384, 208])
def test_mx_quantize_is_exact(kind: str, K: int) -> None:
    x = awkward_input()[:, :K].bfloat16().contiguous()
    found, expected = mx_quantize.quantize(x, kind).float(), fake_quantize(x.float(), kind)
    assert torch.equal(found, torch.where(expected.abs() < torch.finfo(torch.bfloat16).tiny, 0.0, expected))


@pytest.mark.parametrize("offset", [0, 119, 230])
def test_powers_are_those_of_the_assembly(offset: int) -> None:
    """The instructions that select exponents, executed: two elements, each with an exponent of its own word."""
    for low, high in ((0, 16), (7, 3), (16, 0)):
        words = (low | 9 << 8 | 5 << 16 | high << 24, high | 1 << 8 | low << 16 | 2 << 24)
        for byte in range(4):
            found = run_ptx(nvfp4_linear.POWERS.value, *words, byte * 0x1111, byte * 0x1111, offset, offset)
            expected = [((word >> 8 * byte) & 255) + offset << 7 for word in words]
            assert found == expected[0] | expected[1] << 16

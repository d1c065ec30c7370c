"""Linear layers for many tokens: weights decoded to bfloat16 bit for bit, and FP8 matmuls with a scale per row."""

from __future__ import annotations

from typing import Any

import pytest
import row_scales
import torch
from test_runtime_layers import random_layer, spec_of
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from runtime.kernels import expand, scaled_mm, table
from runtime.kernels.cases import random_tensors
from runtime.kernels.table import LINEAR, Machine, choose

CPU = torch.device("cpu")
SPECS = [
    ("fp8_tensor", (24, 8, 5), 80, None),
    ("fp8_channel", (19,), 300, None),
    ("fp8_block", (130, 20), 272, None),
    ("nvfp4", (24, 9), 272, None),
    ("mxfp8", (17,), 288, None),
    ("mxfp4", (17,), 288, None),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec[0])
def test_weights_are_decoded_bit_for_bit(spec: Any) -> None:
    layer = random_layer(spec_of(*spec))
    expected = layer.dequantize().bfloat16()
    decode = expand.decoder(layer.spec, dict(layer.named_parameters()))
    for part in (slice(0, len(expected)), slice(3, len(expected) - 1)):
        found = torch.full(expected[part].shape, torch.nan).bfloat16()
        assert torch.equal(normal(decode(part, found)), normal(expected[part]))


def normal(x: Tensor) -> Tensor:
    """Without subnormals, which the interpreter's cast to bfloat16 makes 0."""
    return torch.where(x.abs() < torch.finfo(torch.bfloat16).tiny, 0.0, x)


MANY = [
    ("fp8_tensor", (32, 16, 48), 96, "fp8_static", scaled_mm),
    ("fp8_channel", (32,), 160, "fp8_token", scaled_mm),
    ("fp8_tensor", (48,), 64, "fp8_tensor", scaled_mm),
    ("fp8_tensor", (32, 8, 5), 96, "fp8_static", expand),  # not multiples of 16
    ("fp8_block", (200,), 160, "fp8_group", expand),
    ("fp8_channel", (33,), 160, None, expand),
    ("nvfp4", (24, 8), 96, "nvfp4", expand),
    ("mxfp4", (24,), 96, "mxfp4", expand),
]


@pytest.mark.parametrize("spec", MANY, ids=lambda spec: f"{spec[0]}-{spec[3]}")
def test_many_tokens_use_the_table(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that believes its CPU to be a GPU, against torch's own arithmetic in float32."""
    *facts, module = spec
    row_scales.provide(monkeypatch)
    monkeypatch.setattr(table, "machine", lambda device: Machine(90, True))
    monkeypatch.setattr(expand, "AT_ONCE", 10 * facts[2])  # several pieces
    layer = random_layer(spec_of(*facts), bias=True)
    layer.bias = torch.nn.Parameter(torch.linspace(-9, 9, layer.shape[0]).bfloat16(), requires_grad=False)
    x = torch.randn(67, layer.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    assert layer._many_tokens is not None
    assert layer._many_tokens.__module__ == module.__name__
    found = layer(x)
    assert found.dtype == torch.bfloat16
    expected = layer(x.float())
    assert (found.float() - expected).abs().max() < 0.01 * expected.abs().max()


def test_every_scheme_has_a_row_for_many_tokens() -> None:
    for scheme in expand.SCHEMES:
        assert choose(scheme, None, LINEAR, Machine(90, True))[0].module == "runtime.kernels.expand"
    assert random_tensors(spec_of("mxfp4", (4,), 32, None), CPU, 0)["weight"].shape == (4, 16)

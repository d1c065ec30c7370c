"""RMS norms, with sums and quantisation, in Triton's interpreter: against float64, and in the place of torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_runtime_layers import random_layer, spec_of

pytest.importorskip("triton", reason="triton is not installed")

from runtime.kernels import rms_norm, table
from runtime.norms import LateRoundingRMSNorm, Parts, RMSNorm, ZeroCenteredRMSNorm

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [case for case in rms_norm.CASES if case.tiny], ids=str)
def test_norm(case: rms_norm.Case) -> None:
    """The sum exactly, y to the last place of bfloat16, codes those of y."""
    assert max(rms_norm.errors(case, CPU, 0).values()) < 1e-6


READERS = [
    (RMSNorm, ("fp8_tensor", (24, 16), 96, "fp8_static")),
    (LateRoundingRMSNorm, ("fp8_block", (130,), 160, "fp8_group")),
    (ZeroCenteredRMSNorm, ("nvfp4", (40,), 96, "nvfp4")),
    (RMSNorm, ("mxfp8", (40,), 96, "mxfp8")),
    (RMSNorm, ("mxfp4", (40,), 96, "mxfp4")),
]


@pytest.mark.parametrize(("norm", "spec"), READERS, ids=str)
def test_norms_quantise_for_their_reader(norm: type[RMSNorm], spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that believes its CPU to be a GPU: sums, norms and what the layer makes of them are torch's, in one launch."""
    monkeypatch.setattr(table, "machine", lambda device: table.Machine(90, True))
    layer, launches, quantised = random_layer(spec_of(*spec)), [], []
    if "input_scale" in dict(layer.named_parameters()):
        layer.input_scale[:] = 0.02
    K = layer.shape[1]
    module = norm(K, 1e-6)
    module.weight = torch.nn.Parameter(torch.linspace(-1, 1, K).bfloat16(), requires_grad=False)
    module.feeds(layer)
    normalize = rms_norm.normalize
    monkeypatch.setattr(rms_norm, "normalize", lambda *given, **how: (launches.append(given), normalize(*given, **how))[1])
    leave = layer.leave
    monkeypatch.setattr(layer, "leave", lambda *given: (quantised.append(given), leave(*given))[1])
    random = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(2, 3, K, generator=random).bfloat16() for _ in range(2))

    summed, y = module.after_sum(x, delta)
    assert len(launches) == len(quantised) == 1
    assert torch.equal(summed, x + delta)
    expected = module._normalize(x + delta)
    assert ((y.float() - expected.float()).abs() <= expected.float().abs() * 2**-7).all()
    assert (y == expected).float().mean() > 0.95  # rounded where torch rounds; sums differ in the last bit
    assert torch.equal(layer(y), layer(y.clone()))  # the clone is quantised by the layer itself
    module.after_sum(x, delta)
    assert torch.equal(layer(delta), layer(delta.clone()))  # and so is a tensor that is not the one that codes were left for

    parts = Parts(delta, x * 3, torch.randn(2, 3, 1, generator=random).bfloat16())
    summed, _ = module.after_sum(x, parts)
    assert ((summed.float() - (x + parts.total()).float()).abs() <= summed.float().abs() * 2**-6).all()
    del launches[2:], quantised[2:]

    module(x.expand(40, 2, 3, K))  # more tokens than the kernels of the layer are for
    assert len(launches) == 3
    assert len(quantised) == 2
    assert module(x.float()).dtype == torch.float32
    assert module(x[:0]).shape == (0, 3, K)
    assert len(launches) == 3

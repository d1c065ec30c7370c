"""What stands between two projections, in Triton's interpreter: against float64, and in the place of torch's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_runtime_layers import random_layer, spec_of
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from runtime.kernels import activate, table
from runtime.layers import Linear
from runtime.nonlinear import Feeding, SwiGLU, output_gate, relu2, swiglu

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [case for case in activate.CASES if case.tiny], ids=str)
def test_activate(case: activate.Case) -> None:
    """As torch rounds, and codes of it."""
    found = activate.errors(case, CPU, 0)
    assert max(found.values()) < 1e-6, found


def parts(M: int, K: int) -> tuple[Tensor, ...]:
    """Gate and up in one."""
    return random_numbers(M, 1, 2 * K).split(K, -1)


def random_numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


FEEDS: list[tuple[Any, Callable[[int, int], tuple[Tensor, ...]], Any]] = [
    (swiglu, parts, ("fp8_tensor", (40,), 96, "fp8_static")),
    (SwiGLU(0.5), parts, ("fp8_channel", (40,), 160, "fp8_token")),
    (relu2, lambda M, K: (random_numbers(M, 1, K),), ("nvfp4", (40,), 96, "nvfp4")),
    (swiglu, parts, ("mxfp4", (40,), 96, "mxfp4")),
    (output_gate, lambda M, K: random_numbers(M, 2, 3, K).chunk(2, -1), ("fp8_block", (130,), 160, "fp8_group")),
    (
        output_gate, lambda M, K: (random_numbers(M, 2, 3, K // 2), random_numbers(M, 3, 2, 1).transpose(1, 2)),
        ("mxfp8", (40,), 96, "mxfp8"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "make", "spec"), FEEDS, ids=str)
def test_results_are_quantised_for_their_reader(
    function: Any, make: Callable[[int, int], tuple[Tensor, ...]], spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU that is believed to be a GPU: torch's results, in one launch, and what the layer makes of them."""
    monkeypatch.setattr(table, "machine", lambda device: table.Machine(90, True))
    layer, launches, quantised = random_layer(spec_of(*spec)), [], []
    if "input_scale" in dict(layer.named_parameters()):
        layer.input_scale[:] = 0.02
    K = layer.shape[1]
    feeding, run, leave = Feeding(function, layer), activate.activate, layer.leave
    monkeypatch.setattr(activate, "activate", lambda *given: (launches.append(given), run(*given))[1])
    monkeypatch.setattr(layer, "leave", lambda *given: (quantised.append(given), leave(*given))[1])

    inputs = make(2, K)
    y, expected = feeding(*inputs), function(*inputs)
    assert y.shape == expected.shape
    assert ((y.float() - expected.float()).abs() <= expected.float().abs() * 2**-6).all()
    assert (y == expected).float().mean() > 0.98
    assert torch.equal(layer(y), layer(y.clone()))  # the clone is quantised by the layer itself
    assert len(launches) == len(quantised) == 1

    plain = Feeding(function, Linear(8, K))
    plain.reader.weight = torch.nn.Parameter(torch.zeros(8, K), requires_grad=False)
    assert torch.equal(plain(*inputs), y)
    assert len(launches) == 2
    assert len(quantised) == 1
    many, none = ([x.repeat(65, *[1] * (x.ndim - 1))[:rows] for x in inputs] for rows in (65, 0))
    for other in (many, none, [x.float() for x in inputs]):  # torch's
        assert torch.equal(feeding(*other), function(*other))
    assert len(launches) == 2

"""Steps on a device that the table believes to be a GPU: what the host does around the kernels, which do nothing here.

A graph can be recorded of it only if nothing is read back, every tensor is made on the device, and neither an operation nor
the grid of a launch depends on a value.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_runtime_steps import FORBIDDEN, MAKES, READS, SAMPLED, Recorder
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
from triton.runtime import interpreter

from bench.models import SCHEMES, TINY_ARCHITECTURES, empty, make, tiny
from runtime.experts import Experts
from runtime.kernels import table
from runtime.steps import Steps, kind_of

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every launch: kernel, grid, and the shapes of its tensors."""
    seen: list[Any] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        shapes = [(tuple(x.shape), x.device.type) if isinstance(x, Tensor) else x for x in args]
        seen.append((self.fn.__name__, grid, shapes, sorted(kwargs.items())))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    monkeypatch.setattr(table, "machine", lambda device: table.Machine(90, True))
    return seen


def steps_at(family: str, scheme: str, device: torch.device, length: int) -> Steps:
    """Steps of two sequences that have `length` tokens; the first step has been made."""
    model = empty(tiny(family, scheme), device, torch.bfloat16) if device == META else make(tiny(family, scheme), device)
    found = Steps(model, kind_of(2, SAMPLED, 2), 64)
    if device != META:
        found.begin([9, 9], [random.Random(1)] * 2, torch.zeros(2, model.architecture.vocab_size, dtype=torch.bool))
        found.choose(torch.zeros(2, model.architecture.vocab_size), [length] * 2)
    found.step()
    found.keep = model  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", TINY_ARCHITECTURES)
def test_nothing_is_read_and_nothing_depends_on_the_length(
    family: str, scheme: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = []
    for length in (1, 40):
        steps = steps_at(family, scheme, CPU, length)
        launches.clear()
        with monkeypatch.context() as patch, Recorder() as recorder:
            for owner, names in ((Tensor, READS), (torch, MAKES)):
                for name in names:
                    patch.setattr(owner, name, refused(name))
            steps.step()
        asked = [name for name, *_ in recorder.seen for word in FORBIDDEN if name.removeprefix("aten.").startswith(word)]
        assert not asked
        assert launches
        work.append((list(recorder.seen), list(launches)))
    assert work[0] == work[1]


def refused(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{name} in a step: it waits for the device, or brings something from the host")

    return refuse


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", TINY_ARCHITECTURES)
def test_everything_is_on_the_device(family: str, scheme: str, launches: list[Any]) -> None:
    steps = steps_at(family, scheme, META, 5)
    launches.clear()
    with Recorder() as recorder:
        steps.step()
    places = {x[1] for _, *what in recorder.seen for x in what if isinstance(x, tuple)}
    places |= {x[1] for _, _, shapes, _ in launches for x in shapes if isinstance(x, tuple)}
    assert places == {"meta"}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", TINY_ARCHITECTURES)
def test_prompts_stay_on_the_device(family: str, scheme: str) -> None:
    """Ragged, in two pieces, in rows of a larger state: an operation between two devices would fail."""
    model = empty(tiny(family, scheme), META, torch.bfloat16)
    state = model.new_state(4, 300).first(2)
    ids = torch.zeros(2, 200, dtype=torch.int64)
    for counts in ([200, 90], [3, 0]):
        hidden = model.hidden(ids[:, : max(counts)], state, counts)
        assert hidden.device == META
    assert model.logits(hidden[:, -1]).shape == (2, model.architecture.vocab_size)
    assert state.lengths == [203, 90]


# Family -> norms whose output some quantised layer takes as it is: of each attention, recurrence, MLP and mixture.
NORMS = {"qwen3_moe": 8, "qwen3_5": 8, "qwen3_5_moe": 8, "nemotron_h": 5, "step3_text": 8, "step3p5": 8}


@pytest.mark.parametrize("family", NORMS)
def test_norms_quantise_for_whoever_takes_their_output(family: str, launches: list[Any]) -> None:
    """One launch less for each, and for each sum before a norm: all but the last layer's."""
    steps = steps_at(family, "FP8 tokens", CPU, 5)
    launches.clear()
    steps.step()
    norms = [args for kernel, _, args, _ in launches if kernel == "rms_norm_kernel"]
    assert sum(kind > 0 for *_, kind in norms) == NORMS[family]
    per_layer = 1 if family == "nemotron_h" else 2
    assert sum(delta is not None for _, delta, *_ in norms) == per_layer * len(steps.model.model.blocks) - 1


# Family -> how often something stands between two projections in one launch: in each dense MLP and shared expert, and the gate
# of each attention that has one.
BETWEEN = {"llama": 4, "qwen3_moe": 2, "qwen3_5": 5, "qwen3_5_moe": 5, "nemotron_h": 2, "step3_text": 4, "step3p5": 8}


@pytest.mark.parametrize("scheme", ["FP8 blocks", "NVFP4"])
@pytest.mark.parametrize("family", BETWEEN)
def test_what_stands_between_projections_quantises(family: str, scheme: str, launches: list[Any]) -> None:
    """In one launch, instead of two or three."""
    steps = steps_at(family, scheme, CPU, 5)
    launches.clear()
    with Recorder() as recorder:
        steps.step()
    kinds = [args[-1] for kernel, _, args, _ in launches if kernel == "activate_kernel"]
    assert kinds == [3 if scheme == "FP8 blocks" else 5] * BETWEEN[family]
    assert not {name for name, *_ in recorder.seen} & {"aten.silu.default", "aten.relu.default"}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe", "nemotron_h", "step3p5"])
def test_experts_take_the_codes_that_a_norm_left(family: str, launches: list[Any]) -> None:
    """What their first stage reads are the very codes and scales of the norm before them."""
    steps = steps_at(family, "FP8 tokens", CPU, 5)
    seen: list[Any] = []
    layers = [m for m in steps.model.modules() if isinstance(m, Experts)]
    for experts in layers:
        leave = experts.leave

        def noted(x: Tensor, codes: Tensor, scales: Tensor, leave: Any = leave) -> None:
            seen.append((codes, scales))
            leave(x, codes, scales)

        experts.leave = noted  # type: ignore[method-assign]
        first = experts._kernel.first

        def stage(x: Tensor, launch: Any, out: Tensor, first: Any = first) -> Tensor:
            codes, scales = launch.left
            assert any(codes.data_ptr() == a.data_ptr() and scales.data_ptr() == b.data_ptr() for a, b in seen[-1:])
            seen.append("taken")
            return first(x, launch, out)

        object.__setattr__(experts._kernel, "first", stage)
        stage.spec, stage.width = first.spec, first.width  # type: ignore[attr-defined]
    steps.step()
    assert seen[1::2] == ["taken"] * len(layers)
    assert len(layers) > 0

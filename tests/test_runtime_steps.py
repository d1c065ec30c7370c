"""Steps that ask nothing of the device: the same tokens as one call at a time, and the same work whatever the tokens are."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from build import build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import convert
import runtime
from runtime import steps
from runtime.architecture import read_architecture
from runtime.builder import LayerBuilder
from runtime.decode import Decoding, Drawn
from runtime.models import FAMILIES
from runtime.models.base import CausalLM
from runtime.sampling import Sampling
from runtime.steps import Steps, kind_of

VOCABULARY = 80  # the smallest of the builder's
PROMPTS = (3, 21, 9)  # tokens
GREEDY = Sampling()
SAMPLED = Sampling(1.3, 30, 0.9, 0.01, 1.2, seed=5)
# Inputs and keys in FP8 found on the way, and NVFP4 with stored scales that differ between partitions.
RECIPES = {"fp8": ("compressed-tensors", "fp8_dynamic", "tensor"), "nvfp4": ("modelopt", "nvfp4", None)}


ROWS = [(family, "fp8") for family in FAMILIES] + [(family, "nvfp4") for family in ("qwen3_5_moe", "nemotron_h")]


@pytest.fixture(scope="module", params=ROWS, ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """A quantised model of each family."""
    family, recipe = request.param
    directory = tmp_path_factory.mktemp(f"{family}-{recipe}")
    dialect, scheme, kv = RECIPES[recipe]
    build(directory / "in", family=family, dialect=dialect, scheme=scheme, kv=kv, seed=1)
    convert.convert_checkpoint(directory / "in", directory / "out")
    return runtime.load_model(directory / "out")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """One that has caches of all kinds but a window."""
    directory = tmp_path_factory.mktemp("one")
    build(directory / "in", family="qwen3_5_moe", dialect="compressed-tensors", scheme="fp8_dynamic", seed=1)
    convert.convert_checkpoint(directory / "in", directory / "out")
    return runtime.load_model(directory / "out")


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in PROMPTS]


def draw(model: CausalLM, sampling: Sampling, fixed: bool, **options: Any) -> list[tuple[Drawn | None, ...]]:
    return list(Decoding(model, prompts(), sampling, [6, 8, 5], fixed=fixed, **options))


def tokens(steps: list[tuple[Drawn | None, ...]]) -> list[list[int | None]]:
    return [[drawn and drawn.token for drawn in step] for step in steps]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_those_of_one_call_at_a_time(model: CausalLM, sampling: Sampling) -> None:
    expected, found = draw(model, sampling, False, logprobs=2), draw(model, sampling, True, logprobs=2)
    assert tokens(found) == tokens(expected)
    assert len({drawn.token for step in found for drawn in step if drawn}) > 3
    for here, there in zip(found, expected, strict=True):
        for a, b in zip(here, there, strict=True):
            if a and b:
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
                assert [id_ for id_, _ in a.top] == [id_ for id_, _ in b.top]


class Recorder(TorchDispatchMode):
    """Writes down each operation with the shapes and devices of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs, result))
        numbers = [x for x in flat if isinstance(x, int | float | bool)]
        self.seen.append((str(func), *[(tuple(x.shape), x.device.type) for x in flat if isinstance(x, Tensor)], *numbers))
        return result


READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "__array__")
MAKES = ("tensor", "as_tensor", "from_numpy", "frombuffer")
# Operations whose result has a shape that depends on values, and the one by which values reach the host.
FORBIDDEN = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "bincount", "repeat_interleave.Tensor", "equal")


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[tuple[Any, ...]]]:
    """Runs something that must not read values or bring any, and returns what it did."""

    def run(work: Callable[[], object]) -> list[tuple[Any, ...]]:
        def refuse(name: str) -> Any:
            def refused(*args: Any, **kwargs: Any) -> Any:
                raise AssertionError(f"{name} in a step: it waits for the device, and cannot be in a graph")

            return refused

        with monkeypatch.context() as patch, Recorder() as recorder:
            for name in READS:
                patch.setattr(Tensor, name, refuse(f"Tensor.{name}"))
            for name in MAKES:
                patch.setattr(torch, name, refuse(f"torch.{name}"))
            work()
        asked = [name for name, *_ in recorder.seen for word in FORBIDDEN if name.removeprefix("aten.").startswith(word)]
        assert not asked
        return recorder.seen

    return run


def taken(model: CausalLM, sampling: Sampling, length: int) -> Steps:
    """Steps that have drawn two tokens after a prompt of `length`, so that what is made once has been made."""
    found = Steps(model, kind_of(2, sampling, 2), 64)
    found.begin([9, 9], [random.Random(1)] * 2, torch.zeros(2, model.architecture.vocab_size, dtype=torch.bool))
    view = found.state.first(2)
    hidden = model.hidden(torch.arange(2 * length).view(2, length) % VOCABULARY, view)[:, -1]
    found.choose(model.logits(hidden), view.lengths)
    found.start()
    return found


def test_a_step_asks_nothing_and_is_the_same_for_all_lengths(model: CausalLM, unasked: Any) -> None:
    work = [unasked(taken(model, SAMPLED, length).step) for length in (1, 30)]
    assert len(work[0]) > 50
    assert work[0] == work[1]


def test_the_check_sees_what_asks(one: CausalLM, unasked: Any) -> None:
    state = one.new_state(1, 8)
    one(torch.tensor([[1]]), state)
    with pytest.raises(AssertionError, match="in a step"):
        unasked(lambda: one(torch.ones(1, 1, dtype=torch.int64), state))
    with pytest.raises(AssertionError):
        unasked(lambda: torch.ones(3).nonzero())


def test_a_step_brings_nothing_from_the_host(model: CausalLM) -> None:
    """On a device other than the CPU every tensor of a step is there; numbers from the host would break its recording."""
    meta = torch.device("meta")
    config = model.config
    network = FAMILIES[config.family]
    build_ = LayerBuilder(config, meta, torch.bfloat16, quantize_activations=False)  # stored scales have no values there
    there = network(read_architecture(network.architecture_type, config.architecture), build_)
    found = Steps(there, kind_of(2, SAMPLED, 2), 64)
    found.step()  # makes tables
    with Recorder() as recorder:
        found.step()
    assert {place for _, *what in recorder.seen for x in what if isinstance(x, tuple) for place in [x[1]]} == {"meta"}


def test_a_step_of_nobody_leaves_no_trace(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is how a graph is recorded: the work runs once before."""
    expected = tokens(draw(model, SAMPLED, True))
    gc.collect()
    steps._KEPT.clear()

    def capture(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
        work()
        work()
        return work

    monkeypatch.setattr(steps, "capture", capture)
    assert tokens(draw(model, SAMPLED, True)) == expected


def test_ends(one: CausalLM) -> None:
    """A token that ends a sequence, and one that is ended by the caller while the next step runs."""
    whole = tokens(draw(one, GREEDY, False))
    for end in {whole[2][1], whole[3][0]}:
        assert tokens(draw(one, GREEDY, True, eos_ids=[end])) == tokens(draw(one, GREEDY, False, eos_ids=[end]))

    def ended(fixed: bool) -> Iterator[list[int | None]]:
        decoding = Decoding(one, prompts(), GREEDY, 9, fixed=fixed)
        for count, step in enumerate(decoding):
            if count == 2:
                decoding.end(1)
            yield [drawn and drawn.token for drawn in step]

    assert list(ended(True)) == list(ended(False))


def test_more_draws_than_numbers_are_sent_at_once(one: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "NUMBERS", 3)
    assert tokens(draw(one, SAMPLED, True)) == tokens(draw(one, SAMPLED, False))


def test_steps_are_kept_for_the_next_answer(one: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = Steps.__init__

    def watched(self: Steps, *args: Any) -> None:
        made.append(args[2])
        original(self, *args)

    monkeypatch.setattr(Steps, "__init__", watched)
    gc.collect()
    steps._KEPT.clear()
    first = tokens(draw(one, SAMPLED, True))
    assert tokens(draw(one, SAMPLED, True)) == first
    assert made == [256]
    again = Decoding(one, prompts(), SAMPLED, [6, 8, 5], fixed=True)
    other = Decoding(one, prompts(), SAMPLED, [6, 8, 5], fixed=True)  # at the same time: not in the same state
    together = list(zip(again, other, strict=True))
    assert [tokens([a])[0] for a, _ in together] == [tokens([b])[0] for _, b in together] == first
    assert made == [256, 256]
    next(Decoding(one, prompts(), SAMPLED, 3, fixed=True))  # dropped before its end
    next(Decoding(one, prompts(), SAMPLED, 300, fixed=True))
    assert made == [256, 256, 512]
    next(Decoding(one, prompts(), GREEDY, 3, fixed=True))
    assert made == [256, 256, 512, 256]
    assert tokens(draw(one, SAMPLED, True)) == first  # in the longer state
    assert len(made) == 4
    for logprobs in range(steps.KEPT):
        next(Decoding(one, prompts(), GREEDY, 3, logprobs=logprobs, fixed=True))
    next(Decoding(one, prompts(), GREEDY, 3, logprobs=logprobs, fixed=True))
    assert len(made) == 4 + steps.KEPT == 4 + len(steps._KEPT[one])
    several = [Decoding(one, prompts(), GREEDY, 3, fixed=True) for _ in range(2 * steps.KEPT)]
    assert len({str(list(zip(*(tokens([step])[0] for step in decoding)))) for decoding in several}) == 1
    for decoding in several:
        next(decoding, None)


def test_steps_that_nobody_has_make_room(one: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    steps._KEPT.clear()
    next(Decoding(one, prompts(), GREEDY, 3, fixed=True))
    original = one.new_state

    def new_state(*arguments: Any) -> Any:
        if steps._KEPT[one]:
            raise MemoryError("expected 1 GB of free memory")
        return original(*arguments)

    monkeypatch.setattr(one, "new_state", new_state)
    next(held := Decoding(one, prompts(), SAMPLED, 3, fixed=True))
    with pytest.raises(MemoryError, match="free memory"):
        next(Decoding(one, prompts(), GREEDY, 3, fixed=True))
    assert len(list(held)) == 2


def test_a_graph_that_cannot_be_recorded_is_said(one: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing")

    gc.collect()
    steps._KEPT.clear()
    monkeypatch.setattr(steps, "capture", capture)
    with pytest.warns(UserWarning, match="without a CUDA graph.*not permitted"):
        found = tokens(draw(one, GREEDY, True))
    assert found == tokens(draw(one, GREEDY, False))

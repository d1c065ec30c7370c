"""Choosing tokens: each filter against the logits processor of transformers, draws against probabilities."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import runtime
from runtime.generation_config import read_generation_config
from runtime.sampling import Sampling, draw

CASES: dict[str, dict[str, Any]] = {
    "all tokens": {"temperature": 1.0},
    "cold": {"temperature": 0.3},
    "top-k": {"temperature": 1.0, "top_k": 3},
    "top-k beyond the vocabulary": {"temperature": 1.0, "top_k": 99},
    "top-p": {"temperature": 1.0, "top_p": 0.7},
    "top-p of almost nothing": {"temperature": 1.0, "top_p": 1e-6},
    "min-p": {"temperature": 1.0, "min_p": 0.2},
    "min-p of one": {"temperature": 1.0, "min_p": 1.0},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.7},
    "reward": {"temperature": 1.0, "repetition_penalty": 0.6},
    "all at once": {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
}


def theirs(options: dict[str, Any], ids: Tensor, logits: Tensor) -> Tensor:
    """Probabilities by the processors of transformers, in the order of its `generate`."""
    from transformers import generation

    processors: list[Any] = [generation.RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0))]
    processors.append(generation.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        processors.append(generation.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(generation.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(generation.MinPLogitsWarper(options["min_p"]))
    for processor in processors:
        logits = processor(ids, logits)
    return logits.double().softmax(-1)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_probabilities_equal_transformers(options: dict[str, Any]) -> None:
    random_ = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(40, 24, generator=random_)
    ids = torch.randint(24, (40, 6), generator=random_)
    seen = torch.zeros(40, 24, dtype=torch.bool).scatter(1, ids, True)
    found = Sampling(**options).probabilities(logits, seen)
    expected = theirs(options, ids, logits.clone())
    assert torch.equal(found > 0, expected > 0)
    assert (found - expected).abs().max() < 1e-6  # float32 against float64


def test_penalty_holds_without_sampling_too() -> None:
    logits = torch.tensor([[4.0, 3.0, -1.0]])
    seen = torch.tensor([[True, False, True]])
    assert Sampling(repetition_penalty=1.5).choose(logits, [], seen) == [1]
    assert Sampling(repetition_penalty=1.2).choose(logits, [], seen) == [0]
    assert Sampling().choose(logits, []) == [0]


def draws(probabilities: Tensor, numbers: list[float]) -> Tensor:
    return draw(probabilities, torch.tensor(numbers, dtype=torch.float64))


def test_draws_follow_probabilities() -> None:
    """20000 draws; 0.02 is more than five standard deviations.  What has probability 0 is never drawn."""
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    chance = random.Random(0)
    drawn = draws(probabilities.expand(20000, -1), [chance.random() for _ in range(20000)])
    assert (torch.bincount(drawn, minlength=6) / 20000 - probabilities).abs().max() < 0.02
    assert draws(probabilities.expand(4, -1), [0.0, 0.4999, 0.5001, 1 - 2**-53]).tolist() == [1, 1, 3, 4]
    assert draws(torch.tensor([[0.7, 0.1], [0.7, 0.1]]), [0.87, 0.88]).tolist() == [0, 1]  # a sum of 0.8 is as good as 1


def test_tiny_temperature_is_finite() -> None:
    assert Sampling(temperature=1e-30).choose(torch.tensor([[2.0, 1.0, 2.5]]), [random.Random(1)]) == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature: expected 0 or more, found -0.5"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more"),
        ({"temperature": float("inf")}, "temperature: expected 0 or more"),
        ({"top_k": -1}, "top_k: expected 0 or more, found -1"),
        ({"top_p": 0.0}, "top_p: expected a number above 0"),
        ({"top_p": 1.5}, "top_p: expected a number above 0"),
        ({"min_p": -0.1}, "min_p: expected a number from 0 to 1"),
        ({"min_p": 1.1}, "min_p: expected a number from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: expected a number above 0"),
        ({"seed": -1}, "seed: expected 0 or more"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


DECLARED: dict[str, tuple[dict[str, Any], dict[str, Any], Sampling]] = {
    "no file": ({}, {}, Sampling()),
    "not sampled": ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {}, Sampling(top_k=20)),
    "not said": ({"temperature": 0.6}, {}, Sampling()),
    "sampled": (
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.05},
        {},
        Sampling(0.6, 20, 0.95, 0.01, 1.05),
    ),
    "sampled at no stated temperature": ({"do_sample": True, "top_p": 0.9}, {}, Sampling(1.0, top_p=0.9)),
    "options win": (
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"temperature": 0.9, "top_k": 0, "seed": 5},
        Sampling(0.9, 0, 0.95, seed=5),
    ),
    "greedy by option": ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.0}, Sampling(0.0)),
    "sampled by option": ({"top_k": 20, "temperature": 0.6}, {"temperature": 0.9}, Sampling(0.9, 20)),
    "null": ({"do_sample": True, "temperature": None, "top_k": None}, {}, Sampling(1.0)),
    "an option saves a bad file": ({"do_sample": True, "top_p": 0, "temperature": 1}, {"top_p": 1.0}, Sampling(1.0)),
}


@pytest.mark.parametrize(("content", "given", "expected"), DECLARED.values(), ids=DECLARED)
def test_checkpoint_gives_the_defaults(
    content: dict[str, Any], given: dict[str, Any], expected: Sampling, tmp_path: Path
) -> None:
    if content:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert read_generation_config(tmp_path).sampling(**given) == expected


def test_what_else_the_checkpoint_says(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 77, "eos_token_id": [3, 4]}')
    found = read_generation_config(tmp_path)
    assert (found.max_new_tokens, found.eos_token_ids) == (77, (3, 4))
    with pytest.raises(ValueError, match="top_k: expected 0 or more"):
        found.sampling(top_k=-1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": "hot"}, "temperature: expected a number, found 'hot'"),
        ({"top_k": 1.5}, "top_k: expected an integer, found 1.5"),
        ({"top_k": True}, "top_k: expected an integer, found True"),
        ({"do_sample": 1}, "do_sample: expected true or false, found 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, found 0"),
        ({"eos_token_id": "2"}, "eos_token_id: expected an id or a list of ids, found '2'"),
        ({"do_sample": True, "top_p": 3}, "top_p: expected a number above 0 and up to 1, found 3"),
        ([], "expected a JSON object, found list"),
    ],
    ids=str,
)
def test_a_bad_file_is_named(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(runtime.LoadError) as caught:
        read_generation_config(tmp_path).sampling()
    assert message in str(caught.value)
    assert "generation_config.json: " in str(caught.value)

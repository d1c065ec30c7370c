"""Many prompts at once, long prompts, log-probabilities.  Expected tokens come from transformers, one full pass each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from canonical import tiny_qwen3, tiny_qwen3_5, write

import runtime
from runtime import decode
from runtime.decode import Decoding, generate_tokens
from runtime.models.base import CausalLM
from runtime.sampling import Sampling

PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [90, 80, 70, 60]]
MODELS = {"qwen3": tiny_qwen3, "qwen3_5": tiny_qwen3_5}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CausalLM]:
    """A model of transformers and the same one here."""
    reference = MODELS[request.param]()
    out = tmp_path_factory.mktemp(request.param)
    reference.load_state_dict(write(out, reference), strict=True)
    return reference, runtime.load_model(out)


def logits(reference: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0, -1]


def greedy(reference: Any, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits(reference, ids).argmax()))
    return ids[-count:]


def prompts(rows: list[list[int]] = PROMPTS) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def test_ragged_batch_equals_transformers_one_by_one(pair: tuple[Any, CausalLM]) -> None:
    reference, model = pair
    found = list(zip(*generate_tokens(model, prompts(), 10), strict=True))
    assert [list(row) for row in found] == [greedy(reference, ids, 10) for ids in PROMPTS]


def test_a_sequence_that_ends_leaves_the_others_alone(pair: tuple[Any, CausalLM]) -> None:
    reference, model = pair
    expected = [greedy(reference, ids, 12) for ids in PROMPTS]
    end = expected[2][3]
    found = list(zip(*generate_tokens(model, prompts(), 12, eos_ids=[end]), strict=True))
    for row, tokens in zip(found, expected, strict=True):
        stop = tokens.index(end) + 1 if end in tokens else 12
        assert list(row[:stop]) == tokens[:stop]
        assert set(row[stop:]) <= {end}
    assert len({tuple(row).index(end) if end in row else 12 for row in found}) > 1


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.8, "min_p": 0.01}, {"repetition_penalty": 1.3}], ids=str)
def test_a_draw_does_not_depend_on_the_batch(pair: tuple[Any, CausalLM], options: dict[str, Any]) -> None:
    _, model = pair
    together = list(zip(*generate_tokens(model, prompts(), 12, 1.5, seed=3, **options), strict=True))
    alone = [list(generate_tokens(model, ids, 12, 1.5, seed=3 + row, **options)) for row, ids in enumerate(prompts())]
    assert [list(row) for row in together] == alone
    assert alone != [list(generate_tokens(model, ids, 12, 1.5, seed=4 + row, **options)) for row, ids in enumerate(prompts())]


def test_repetition_penalty_counts_prompt_and_answer(pair: tuple[Any, CausalLM]) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    reference, model = pair
    penalty = RepetitionPenaltyLogitsProcessor(3.0)
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(penalty(torch.tensor([ids]), logits(reference, ids)[None].clone()).argmax()))
        expected.append(ids[len(prompt) :])
    found = list(zip(*generate_tokens(model, prompts(), 12, repetition_penalty=3.0), strict=True))
    assert [list(row) for row in found] == expected


@pytest.mark.parametrize("piece", [1, 4, 8, 16, 400])
def test_long_prompts_go_in_pieces(pair: tuple[Any, CausalLM], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = pair
    rows = [[(7 * i) % 96 for i in range(n)] for n in (33, 5, 16, 17)]
    widths = []
    original = model.hidden

    def watched(ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
        widths.append(ids.numel())
        return original(ids, *arguments)

    monkeypatch.setattr(decode, "PREFILL_TOKENS", piece)
    monkeypatch.setattr(model, "hidden", watched)
    found = list(zip(*generate_tokens(model, prompts(rows), 6), strict=True))
    assert [list(row) for row in found] == [greedy(reference, ids, 6) for ids in rows]
    assert max(widths) <= max(piece, len(rows))
    assert list(generate_tokens(model, torch.tensor(rows[0]), 6)) == list(found[0])


def test_logprobs_are_those_of_the_model(pair: tuple[Any, CausalLM]) -> None:
    """They are of the distribution before temperature, penalty and filters."""
    reference, model = pair
    sampling = Sampling(temperature=2.0, top_k=40, repetition_penalty=1.2, seed=5)
    steps = list(Decoding(model, prompts(), sampling, 5, logprobs=3))
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for step in steps:
            drawn = step[row]
            assert drawn is not None
            expected = logits(reference, ids).double().log_softmax(-1)
            assert drawn.logprob == pytest.approx(float(expected[drawn.token]), abs=1e-4)
            best = expected.topk(3)
            assert [token for token, _ in drawn.top] == best.indices.tolist()
            assert [value for _, value in drawn.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            ids.append(drawn.token)


def test_each_sequence_has_its_own_limit_and_may_be_ended(pair: tuple[Any, CausalLM]) -> None:
    _, model = pair
    decoding = Decoding(model, prompts(), Sampling(), [3, 1, 5, 0])
    steps = []
    for step in decoding:
        steps.append([drawn is not None for drawn in step])
        if len(steps) == 4:
            decoding.end(2)
    assert steps == [
        [True, True, True, False],
        [True, False, True, False],
        [True, False, True, False],
        [False, False, True, False],
    ]


def test_positions_end_for_each_sequence_by_itself(tmp_path: Path) -> None:
    write(tmp_path, tiny_qwen3(max_position_embeddings=12))
    model = runtime.load_model(tmp_path)
    found = list(Decoding(model, prompts(PROMPTS[:3]), Sampling(), 50))
    assert [sum(step[row] is not None for step in found) for row in range(3)] == [9, 11, 1]


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        ([], "at least one sequence"),
        ([torch.tensor([1]), torch.tensor([], dtype=torch.int64)], "at least one token per sequence"),
        ([torch.tensor([1]), torch.tensor([[1]])], r"expected int64 \[T\]"),
        ([torch.tensor([1]), torch.tensor([96])], "expected ids from 0 to 95, found 96"),
        (torch.tensor(1), r"expected int64 \[T\]"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), r"expected int64 \[T\]"),
        (torch.zeros(0, 3, dtype=torch.int64), "at least one sequence"),
    ],
    ids=str,
)
def test_wrong_prompts_are_refused(pair: tuple[Any, CausalLM], input_ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_tokens(pair[1], input_ids)

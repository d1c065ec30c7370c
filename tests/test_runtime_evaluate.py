"""Perplexity and comparisons against transformers: its loss under the usual sliding window, its logits in float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from canonical import Quant, tiny_qwen3_5, write
from test_runtime_answers import refused
from test_runtime_answers import run as run_module
from tokenizers_tiny import write_tokenizer

import runtime
from runtime import decode, scoring
from runtime.scoring import divergences, rolling_pairs, score_continuations, windows
from runtime.tokenizer import ChatTokenizer

WORDS = "the cat sat on the mat. grüße an alle, 日本語 🦊🐈! user: system; the assistant sat on a cat.\n"


def run(*args: object, **options: Any) -> Any:
    return run_module(*args, module="runtime.evaluate", **options)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Path]]:
    """Two models with one tokenizer: transformers' and its canonical checkpoint."""
    made = []
    for name in ("one", "other"):
        out = tmp_path_factory.mktemp(name) / "out"
        reference = tiny_qwen3_5(vocab_size=300)
        if name == "other":
            with torch.no_grad():
                for parameter in reference.parameters():
                    parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        reference.load_state_dict(write(out, reference), strict=True)
        write_tokenizer(out)
        made.append((reference, out))
    return made


def usual_loss(reference: Any, ids: list[int], context: int, stride: int) -> tuple[int, float]:
    """Tokens and nats as the documentation of transformers computes the perplexity of a long text."""
    total, tokens, seen = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        labels = torch.tensor([ids[begin:end]])
        labels[:, : -(end - seen)] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count:
            with torch.no_grad():
                total += float(reference(torch.tensor([ids[begin:end]]), labels=labels).loss) * count
        tokens += count
        seen = end
        if end == len(ids):
            break
    return tokens, total


@pytest.mark.parametrize(("context", "stride"), [(200, 100), (32, 16), (32, 31), (32, 32), (17, 5), (2, 1), (None, None)])
def test_perplexity_equals_the_loss_of_transformers(
    context: int | None, stride: int | None, two: list[tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, out = two[0]
    text = WORDS * 2
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    ids = ChatTokenizer(out).encode(text)
    tokens, nats = usual_loss(reference, ids, context or 256, stride or 128)
    monkeypatch.setattr(scoring, "LOGITS", 300 * 7)  # so that one window takes several blocks
    monkeypatch.setattr(scoring, "PREFILL_TOKENS", 13)
    options = [] if context is None else ["--context", context, "--stride", stride]
    found = json.loads(run(out, "--text", file, "--json", *options).out)
    assert found["tokens"] == tokens
    assert found["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert (found["context"], found["stride"]) == (context or 256, stride or 128)


def test_bits_per_byte_count_the_bytes_of_what_was_scored(two: list[tuple[Any, Path]], tmp_path: Path) -> None:
    reference, out = two[0]
    file = tmp_path / "text.txt"
    file.write_text(WORDS, encoding="utf-8")
    ids = ChatTokenizer(out).encode(WORDS)
    assert ChatTokenizer(out).decode(ids[:1]) == "the"
    found = json.loads(run(out, "--text", file, "--json").out)
    _, nats = usual_loss(reference, ids, 256, 128)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(WORDS.encode()) - 3), abs=1e-5)
    streamed = run(out, "--text", "-", stdin=WORDS.encode())
    assert streamed.out.splitlines()[0].split() == ["tokens", str(len(ids) - 1)]


@pytest.mark.parametrize("context", [256, 40])
def test_comparison_equals_float64(context: int, two: list[tuple[Any, Path]], tmp_path: Path, monkeypatch: Any) -> None:
    (reference, out), (other, other_out) = two
    file = tmp_path / "text.txt"
    file.write_text(WORDS, encoding="utf-8")
    tokenizer = ChatTokenizer(out)
    ids = tokenizer.encode(WORDS)
    kl, same = {}, 0
    for begin, end, first in windows(len(ids), context, context // 2):
        with torch.no_grad():
            p, q = (m(torch.tensor([ids[begin:end]])).logits[0].double().log_softmax(-1) for m in (reference, other))
        for place in range(first, end):
            at = place - begin - 1
            kl[place] = float((p[at].exp() * (p[at] - q[at])).sum())
            same += int(p[at].argmax() == q[at].argmax())
    worst = max(kl, key=lambda place: kl[place])
    monkeypatch.setattr(scoring, "LOGITS", 300 * 7)
    monkeypatch.setattr(scoring, "FLOAT64S", 300 * 2)
    found = json.loads(run(out, "--text", file, "--against", other_out, "--context", context, "--json").out)
    assert sorted(kl) == list(range(1, len(ids)))
    assert found["mean_kl"] == pytest.approx(sum(kl.values()) / len(kl), rel=1e-3)
    assert found["mean_kl"] > 0.01
    assert found["max_kl"] == pytest.approx(kl[worst], rel=1e-3)
    assert found["top1_agreement"] == same / len(kl)
    assert 0 < same < len(kl)
    assert found["worst"]["position"] == worst
    assert found["worst"]["token"] == tokenizer.token_text(ids[worst])
    assert found["worst"]["before"] == tokenizer.decode(ids[max(0, worst - 24) : worst])
    tokens, nats = usual_loss(other, ids, context, context // 2)
    assert found["against"]["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)
    alone = json.loads(run(out, "--text", file, "--context", context, "--json").out)
    assert alone == {key: found[key] for key in alone}


def test_a_checkpoint_against_itself(two: list[tuple[Any, Path]], tmp_path: Path) -> None:
    """No difference with the same activations, and some between quantised and full ones."""
    out = tmp_path / "out"
    inputs = Quant("fp8_tensor", "fp8_static")
    write(out, tiny_qwen3_5(vocab_size=300), quant=lambda name: inputs if name.endswith("mlp.down_proj") else None)
    write_tokenizer(out)
    same = json.loads(run(out, "--text", "-", "--against", out, "--json", stdin=WORDS.encode()).out)
    assert (same["mean_kl"], same["max_kl"], same["top1_agreement"]) == (0, 0, 1)
    found = json.loads(run(out, "--text", "-", "--against-activations", "full", "--json", stdin=WORDS.encode()).out)
    assert found["mean_kl"] > 0
    full = json.loads(run(out, "--text", "-", "--activations", "full", "--json", stdin=WORDS.encode()).out)
    assert full == {**found["against"], "context": 256, "stride": 128}
    text = run(out, "--text", "-", "--against-activations", "full", stdin=WORDS.encode()).out
    names = [line.split()[0] for line in text.splitlines()]
    assert {"perplexity", "against.perplexity", "mean_kl", "worst.before"} <= set(names)


def test_divergence_is_finite_and_never_negative() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [100.0, 0.0, -100.0]])
    assert divergences(logits, logits).tolist() == [0, 0]
    assert divergences(logits, logits + 1e-3).min() >= 0
    assert divergences(logits[1:], -logits[1:]).tolist() == pytest.approx([200.0])


def test_what_cannot_be_evaluated_is_one_line(two: list[tuple[Any, Path]], tmp_path: Path) -> None:
    out, other = two[0][1], tmp_path / "other"
    text = WORDS.encode()
    refused(run(out, "--text", "-", stdin=b""), 1, "standard input: expected a text of at least two tokens, found 0")
    refused(run(out, "--text", "-", stdin=b"a\n\xff"), 1, "standard input:2: expected text in UTF-8")
    refused(run(out), 2, "--text")
    refused(run(out, "--text", "-", "--context", 257, stdin=text), 2, "--context: expected at most 256")
    refused(
        run(out, "--text", "-", "--context", 8, "--stride", 9, stdin=text), 2, "--stride: expected at most the context of 8"
    )
    refused(run(tmp_path, "--text", "-", stdin=text), 1, "tokenizer.json: expected a tokenizer")
    write(other, tiny_qwen3_5(vocab_size=301))
    write_tokenizer(other)
    refused(run(out, "--text", "-", "--against", other, stdin=text), 1, "expected a vocabulary of 300")
    shutil.rmtree(other)
    write(other, tiny_qwen3_5(vocab_size=300))
    refused(run(out, "--text", "-", "--against", other, stdin=text), 1, "tokenizer.json: expected a tokenizer")
    write_tokenizer(other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    refused(run(out, "--text", "-", "--against", other, stdin=text), 1, "expected the tokenizer of")
    small = tmp_path / "small"
    write(small, tiny_qwen3_5(vocab_size=20))
    write_tokenizer(small)
    refused(run(small, "--text", "-", stdin=text), 1, "the tokenizer belongs to another model")


PAIRS: list[tuple[list[int], list[int]]] = [
    ([5, 6, 7], [8, 9]),
    ([1], [2]),
    ([4, 3, 2, 1], []),
    (list(range(20, 60)), [7, 8, 9]),
    ([9], list(range(50, 60))),
]


@pytest.mark.parametrize("max_length", [255, 12])
def test_continuations_are_scored_as_by_transformers(
    max_length: int, two: list[tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, out = two[0]
    model = runtime.load_model(out)
    pairs = [*PAIRS]
    with torch.no_grad():
        for context, _ in PAIRS[:2]:  # one that is the most likely continuation
            ids = list(context)
            for _ in range(3):
                ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
            pairs.append((context, ids[len(context) :]))
        ids = [5, 6, 7, 8]  # one whose last token alone is the most likely one
        pairs.append(([5, 6, 7], [8, int(reference(torch.tensor([ids])).logits[0, -1].argmax())]))
    expected = []
    for context, rest in pairs:
        row = [*context, *rest][-max_length - 1 :]
        with torch.no_grad():
            logprobs = reference(torch.tensor([row[:-1]])).logits[0].double().log_softmax(-1)[len(row) - 1 - len(rest) :]
        own = sum(float(values[token]) for values, token in zip(logprobs, rest, strict=True))
        expected.append((own, all(int(values.argmax()) == token for values, token in zip(logprobs, rest, strict=True))))
    monkeypatch.setattr(scoring, "LOGITS", 300 * 5)
    monkeypatch.setattr(scoring, "PREFILL_TOKENS", 40)
    found = score_continuations(model, pairs, max_length)
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]
    assert [one.logprob for one in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [one.greedy for one in found] == [False, False, True, False, False, True, True, False]
    assert decode.PREFILL_TOKENS == 2048


@pytest.mark.parametrize(
    ("count", "max_length", "expected"),
    [
        (10, 4, [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]),
        (8, 4, [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7])]),
        (3, 4, [([99], [0, 1, 2])]),
        (0, 4, []),
    ],
)
def test_rolling_parts(count: int, max_length: int, expected: list[Any]) -> None:
    """As the harness's documentation draws it: BOS 0 1 2 -> 0 1 2 3; 3 4 5 6 -> 4 5 6 7; 5 6 7 8 -> 8 9."""
    assert rolling_pairs(list(range(count)), 99, max_length) == expected

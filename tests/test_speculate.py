"""Speculative decoding: the same greedy text as without, the same distribution when sampled, the formulas of draft heads."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from build import Built, build, read_json
from torch import Tensor

import convert
import runtime
from runtime.decode import Drawn
from runtime.format import FormatError
from runtime.models.base import CausalLM
from runtime.sampling import Sampling
from runtime.speculate import Counts, Guess, speculate, verify

VOCABULARY = 80
PROMPT = [5, 17, 3, 44, 8, 8, 61]
GREEDY = Sampling()


def ids(drawn: Iterable[Drawn]) -> list[int]:
    return [one.token for one in drawn]


def greedy(model: CausalLM, prompt: Sequence[int], count: int) -> list[int]:
    """Without a cache: the whole text again for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def converted(directory: Path, family: str, **options: Any) -> Path:
    options = {"dialect": "dense", "scheme": "bf16"} | options
    build(directory / "in", family=family, **options)
    convert.convert_checkpoint(directory / "in", directory / "out")
    return directory / "out"


def qwen_head(config: dict[str, Any], weights: Mapping[str, Any], experts: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The draft head of Qwen3.5 out of transformers' parts: hidden states and embeddings `[B, T, H]` to `[B, T, H]`."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

    kind = moe.Qwen3_5MoeTextConfig if experts else dense.Qwen3_5TextConfig
    text = kind(**config.get("text_config", config))
    text._attn_implementation = "eager"
    full = text.layer_types.index("full_attention")
    layer = (moe.Qwen3_5MoeDecoderLayer if experts else dense.Qwen3_5DecoderLayer)(text, full).eval()
    rotary = (moe.Qwen3_5MoeTextRotaryEmbedding if experts else dense.Qwen3_5TextRotaryEmbedding)(text)
    mine = {name.removeprefix("mtp."): torch.from_numpy(w) for name, w in weights.items() if name.startswith("mtp.")}
    below = "layers.0."
    own = {name.removeprefix(below): w for name, w in mine.items() if name.startswith(below)}
    layer.load_state_dict(own, strict=True)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + text.rms_norm_eps) * (1 + weight)

    def run(hidden: Tensor, embedded: Tensor) -> Tensor:
        both = [norm(embedded, mine["pre_fc_norm_embedding.weight"]), norm(hidden, mine["pre_fc_norm_hidden.weight"])]
        x, length = torch.cat(both, -1) @ mine["fc.weight"].T, hidden.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1).expand(1, 1, -1, -1)
        cos_sin = rotary(x, torch.arange(length).expand(3, 1, -1))
        with torch.no_grad():
            y = layer(x, position_embeddings=cos_sin, attention_mask=mask)
        return norm(y[0] if isinstance(y, tuple) else y, mine["norm.weight"])

    return run


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_qwen_head_equals_transformers(family: str, scheme: str, tmp_path: Path) -> None:
    rules = (("mtp.fc", None), ("mtp.*gate", None), ("mtp.*", scheme))  # a quantised draft head
    built: Built = build(tmp_path / "in", family=family, dialect="modelopt", scheme=scheme, mtp=True, rules=rules, seed=1)
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = runtime.load_model(tmp_path / "out", activations="full", drafts=True)
    tokens = torch.randint(0, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(0))
    embedded = torch.from_numpy(built.dense["model.embed_tokens.weight"])[tokens]
    hidden = torch.randn(1, 30, embedded.shape[-1], generator=torch.Generator().manual_seed(1))
    run = qwen_head(read_json(tmp_path / "in" / "config.json"), built.dense, family.endswith("moe"))
    expected, twice = run(hidden, embedded), run(run(hidden, embedded), embedded)

    state = model.new_state(1, 30)
    at = model.model.turned(state.place(30, None))
    draft = model.drafts[0]
    found = draft(hidden, embedded, at, draft.new_cache(state.size))
    again = draft(found, embedded, at, draft.new_cache(state.size))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert float((again - twice).abs().max() / twice.abs().max()) < 1e-4
    logits = expected @ torch.from_numpy(built.dense["lm_head.weight"]).T
    assert float((draft.logits(found, model.head) - logits).abs().max() / logits.abs().max()) < 1e-4


class Oracle:
    """A draft head that knows the text, and is wrong at some places.  It has no weights and no cache."""

    def __init__(self, text: Sequence[int], wrong: set[int], head: int = 0) -> None:
        self.text, self.wrong, self.head = text, wrong, head

    def __call__(self, hidden: Tensor, embedded: Tensor, at: Any, cache: None) -> Tensor:
        self.place = int(at.positions[0, -1]) + 2 + self.head
        return hidden

    def logits(self, hidden: Tensor, head: Any) -> Tensor:
        token = self.text[self.place] if self.place < len(self.text) else 0
        logits = torch.zeros(1, hidden.shape[1], VOCABULARY)
        logits[..., (token + (self.place in self.wrong)) % VOCABULARY] = 5
        return logits

    def new_cache(self, size: Any) -> None:
        return None


@pytest.fixture(scope="module", params=["qwen3", "qwen3_5", "qwen3_5_moe", "nemotron_h", "step3p5"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return runtime.load_model(converted(tmp_path_factory.mktemp("model"), request.param))


@pytest.mark.parametrize(("heads", "ahead"), [(1, 1), (1, 3), (1, 5), (3, 2), (3, 3)])
def test_greedy_text_is_the_same(model: CausalLM, heads: int, ahead: int) -> None:
    expected = greedy(model, PROMPT, 30)
    wrong = {12, 15, 16, 23, 30, 31, 36}
    model.drafts = tuple(Oracle(PROMPT + expected, wrong, head) for head in range(heads))
    counts = Counts()
    found = ids(speculate(model, torch.tensor(PROMPT), GREEDY, 30, ahead, counts=counts))
    assert found == expected
    assert 0 < counts.kept < counts.guessed  # both ways were taken
    end = expected[20]
    stopped = ids(speculate(model, torch.tensor(PROMPT), GREEDY, 30, ahead, {end}))
    assert stopped == expected[: expected.index(end) + 1]


@pytest.mark.parametrize(
    ("family", "ahead"),
    [("qwen3_5", 1), ("qwen3_5", 3), ("qwen3_5_moe", 2), ("nemotron_h", 1), ("nemotron_h", 4), ("step3p5", 1), ("step3p5", 2)],
)
def test_greedy_text_is_the_same_with_the_heads_of_the_checkpoint(family: str, ahead: int, tmp_path: Path) -> None:
    model = runtime.load_model(converted(tmp_path, family, mtp=True), drafts=True)
    for prompt in (PROMPT, PROMPT[:1]):
        assert ids(speculate(model, torch.tensor(prompt), GREEDY, 20, ahead)) == greedy(model, prompt, 20)


def test_a_kept_or_replaced_guess_is_a_draw_from_the_trunk() -> None:
    """Chi-squared over 8 tokens: 24.3 is exceeded by chance once in a thousand times."""
    generator, chance = torch.Generator().manual_seed(0), random.Random(0)
    p, q = (torch.randn(8, generator=generator).mul(1.5).softmax(-1) for _ in range(2))
    draws, found = 20000, torch.zeros(8)
    for token in torch.multinomial(q, draws, replacement=True, generator=generator).tolist():
        new = verify(torch.stack([p.log(), p.log()]), [], [Guess(token, q)], lambda row, _: row.softmax(-1), chance)
        found[new[0]] += 1
    assert float(((found - draws * p).square() / (draws * p)).sum()) < 24.3


def test_sampled_text_has_the_same_distribution(tmp_path: Path) -> None:
    """Pairs of tokens after a prompt, the second guessed by the head of a random checkpoint, against exact probabilities.

    Chi-squared over the 16 cells of (first in four groups, second in four groups): 37.7 is exceeded once in a thousand times.
    """
    model = runtime.load_model(converted(tmp_path, "qwen3_5", mtp=True), drafts=True)

    sampling = Sampling(temperature=0.3, top_k=40, repetition_penalty=1.3)

    def probabilities(logits: Tensor, tokens: Sequence[int]) -> Tensor:
        """As transformers' processors do it: penalty, temperature, top-k."""
        row, before = logits.clone(), sorted(set(tokens))
        row[before] = torch.where(row[before] < 0, row[before] * 1.3, row[before] / 1.3)
        row = row / 0.3
        row[row < row.topk(40).values[-1]] = -torch.inf
        return row.double().softmax(-1)

    first = probabilities(model(torch.tensor([PROMPT]))[0, -1], PROMPT)
    joint = torch.zeros(4, 4, dtype=torch.float64)
    after = model(torch.tensor([[*PROMPT, token] for token in range(VOCABULARY)]))[:, -1]
    for token in range(VOCABULARY):
        second = probabilities(after[token], [*PROMPT, token])
        joint[token % 4] += first[token] * torch.zeros_like(first[:4]).index_add_(0, torch.arange(VOCABULARY) % 4, second)
    draws, found = 250, torch.zeros(4, 4, dtype=torch.float64)
    counts = Counts()
    for seed in range(draws):
        a, b, _ = ids(speculate(model, torch.tensor(PROMPT), replace(sampling, seed=seed), 3, 1, counts=counts))
        found[a % 4, b % 4] += 1
    assert 0 < counts.kept < counts.guessed == draws
    assert float(((found - draws * joint).square() / (draws * joint)).sum()) < 37.7


def test_a_model_without_heads_is_refused(tmp_path: Path) -> None:
    out = converted(tmp_path, "qwen3")
    with pytest.raises(FormatError, match="draft heads"):
        runtime.load_model(out, drafts=True)
    model = runtime.load_model(out)
    with pytest.raises(ValueError, match="draft heads"):
        speculate(model, torch.tensor(PROMPT), GREEDY, 5, 1)
    model.drafts = tuple(Oracle(PROMPT, set(), head) for head in range(2))
    with pytest.raises(ValueError, match="guesses: expected 1 to 2"):
        speculate(model, torch.tensor(PROMPT), GREEDY, 5, 3)


def test_logprobs_are_those_of_the_trunk(tmp_path: Path) -> None:
    model = runtime.load_model(converted(tmp_path, "qwen3_5", mtp=True), drafts=True)
    drawn = list(speculate(model, torch.tensor(PROMPT), GREEDY, 12, 3, logprobs=2))
    logits = model(torch.tensor([PROMPT + ids(drawn)]))[0, len(PROMPT) - 1 : -1]
    for one, row in zip(drawn, logits.double().log_softmax(-1), strict=True):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
        assert [token for token, _ in one.top] == row.topk(2).indices.tolist()


def generate(out: Path, *options: str) -> Any:
    """`python -m runtime.generate OUT --prompt-ids ... --json` in a process of its own."""
    ids_option = ["--prompt-ids", ",".join(map(str, PROMPT))] if "--prompt-file" not in options else []
    command = [sys.executable, "-m", "runtime.generate", str(out), *ids_option, *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def test_command_speculates(tmp_path: Path) -> None:
    out = converted(tmp_path, "qwen3_5", mtp=True)
    options = ("--json", "--device", "cpu", "--max-new-tokens", "15", "--ignore-eos")
    plain, fast = generate(out, *options), generate(out, *options, "--speculate", "mtp:3")
    assert fast.returncode == 0, fast.stderr
    assert json.loads(fast.stdout)["token_ids"] == json.loads(plain.stdout)["token_ids"]

    lines = [{"prompt_ids": PROMPT[:n], "id": n, "max_new_tokens": 4 + n} for n in (7, 2, 5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ("--prompt-file", str(tmp_path / "prompts.jsonl"), "--device", "cpu", "--ignore-eos")
    both = [generate(out, *files, "--seed", "5", *more) for more in ((), ("--speculate", "mtp"))]
    assert both[0].returncode == both[1].returncode == 0, both[1].stderr
    assert both[0].stdout == both[1].stdout
    assert [len(json.loads(line)["token_ids"]) for line in both[1].stdout.splitlines()] == [11, 6, 9]


@pytest.mark.parametrize(
    ("family", "value", "code", "message"),
    [
        ("qwen3_5", "eagle", 2, "expected mtp"),
        ("qwen3_5", "mtp:", 2, "expected mtp"),
        ("qwen3_5", "mtp:0", 2, "expected mtp"),
        ("qwen3", "mtp", 1, "draft heads"),
    ],
)
def test_command_refuses_what_it_cannot_guess(family: str, value: str, code: int, message: str, tmp_path: Path) -> None:
    out = converted(tmp_path, family, **({} if family == "qwen3" else {"mtp": True}))
    found = generate(out, "--device", "cpu", "--speculate", value)
    assert found.returncode == code
    assert message in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1

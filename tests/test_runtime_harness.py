"""Requests of an evaluation harness, against transformers.

The adapter is tested with lm-evaluation-harness where that is installed, else with a stand-in of its base class.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT
from tokenizers_tiny import write_checkpoint

import runtime
from runtime.harness import Harness, read_options
from runtime.sampling import Sampling
from runtime.tokenizer import ChatTokenizer

LENGTH = 48  # positions of the model: short, so that texts are longer


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint") / "out"


@pytest.fixture(scope="module", autouse=True)
def reference(out: Path) -> Any:
    return write_checkpoint(out, max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def harness(out: Path) -> Harness:
    return Harness(out, batch_size=3)


def logprob(reference: Any, seen: list[int], rest: list[int]) -> tuple[float, bool]:
    """Of `rest` after `seen`, of which the model sees the last `LENGTH` tokens before the last one."""
    row = [*seen, *rest][-LENGTH - 1 :]
    with torch.no_grad():
        values = reference(torch.tensor([row[:-1]])).logits[0].double().log_softmax(-1)[-len(rest) :]
    found = [float(value[token]) for value, token in zip(values, rest, strict=True)]
    return sum(found), all(int(value.argmax()) == token for value, token in zip(values, rest, strict=True))


def greedy(reference: Any, ids: list[int], count: int) -> list[int]:
    found: list[int] = []
    with torch.no_grad():
        while len(found) < count and 2 not in found:
            found.append(int(reference(torch.tensor([ids + found])).logits[0, -1].argmax()))
    return [token for token in found if token != 2]


def rolling(reference: Any, ids: list[int]) -> float:
    """The log-probability of a text after the end token, in parts of `LENGTH` tokens."""
    total, sequence = 0.0, [2, *ids]
    for begin in range(0, len(ids), LENGTH):
        end = min(begin + LENGTH, len(ids))
        total += logprob(reference, sequence[: begin + 1][-(LENGTH - (end - begin) + 1) :], ids[begin:end])[0]
    return total


PAIRS = [("the cat", " sat"), ("the", " mat on the"), ("ü" * 40, "the cat"), ("a", "b"), ("日本", "語"), ("sat ", "on")]
TEXTS = ["the cat sat on the mat", "ü", "", "the cat sat. " * 30]


def test_scores_and_texts(harness: Harness, reference: Any) -> None:
    encode = harness.tokenizer.encode
    pairs = [(encode(context), encode(rest)) for context, rest in PAIRS]
    done: list[int] = []
    found = harness.score(pairs, done.append)
    assert [score.greedy for score in found] == [logprob(reference, *pair)[1] for pair in pairs]
    assert [score.logprob for score in found] == pytest.approx([logprob(reference, *pair)[0] for pair in pairs], abs=1e-4)
    assert done == [3, 3]
    expected = [rolling(reference, encode(text)) for text in TEXTS]
    assert harness.score_texts(TEXTS) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="expected at most 48 tokens, found 60"):
        harness.score([([1], [5] * 60)])


def test_writing(harness: Harness, reference: Any) -> None:
    tokenizer = harness.tokenizer
    ids = tokenizer.encode("the cat")
    text = tokenizer.decode(greedy(reference, ids, 12))
    long = tokenizer.encode("on the mat " * 20)[-(LENGTH - 12) :]
    requests: list[tuple[str, dict[str, Any]]] = [
        ("the cat", {"until": [text[4:7]], "max_gen_toks": 12}),
        ("the cat", {"until": "not there", "max_new_tokens": 12, "do_sample": False, "temperature": 0.7}),
        ("on the mat " * 20, {"max_gen_toks": 12}),
        ("", {"max_gen_toks": 3}),
        ("the cat", {"do_sample": True, "temperature": 1.3, "top_k": 1, "max_gen_toks": 5}),
        ("the cat", {"temperature": 0.0, "max_gen_toks": 2}),
    ]
    assert harness.write(requests) == [
        text[: text.index(text[4:7])],
        text,
        tokenizer.decode(greedy(reference, long, 12)),
        tokenizer.decode(greedy(reference, [2], 3)),
        tokenizer.decode(greedy(reference, ids, 5)),
        tokenizer.decode(greedy(reference, ids, 2)),
    ]


OPTIONS: dict[str, tuple[dict[str, Any], tuple[tuple[str, ...], int, Sampling]]] = {
    "none": ({}, ((), 9, Sampling())),
    "one stop": ({"until": "x", "max_tokens": 4}, (("x",), 4, Sampling())),
    "stops": ({"until": ["x", "", "y"], "max_gen_toks": 3, "max_tokens": 4}, (("x", "y"), 3, Sampling())),
    "sampled": ({"do_sample": True, "top_p": 0.9}, ((), 9, Sampling(1.0, top_p=0.9))),
    "sampled at": ({"do_sample": True, "temperature": 0.6, "seed": 3}, ((), 9, Sampling(0.6, seed=3))),
    "temperature alone": ({"temperature": 0.6}, ((), 9, Sampling(0.6))),
    "not sampled": ({"do_sample": False, "temperature": 0.6}, ((), 9, Sampling())),
}


@pytest.mark.parametrize(("given", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_options_of_a_request(given: dict[str, Any], expected: Any) -> None:
    assert read_options(given, 9) == expected


def test_what_is_refused(out: Path) -> None:
    with pytest.raises(ValueError, match="expected none called 'beams', found 4"):
        read_options({"beams": 4}, 9)
    with pytest.raises(ValueError, match="max_length: expected 2 to 48"):
        Harness(out, max_length=49)
    with pytest.raises(ValueError, match="batch_size: expected 1 or more"):
        Harness(out, batch_size=0)
    with pytest.raises(runtime.LoadError, match="expected a tokenizer"):
        Harness(out / "nothing")


def test_chat_for_the_model_to_continue(harness: Harness, out: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "hi"}, {"role": "system", "content": "so \n"}]
    assert harness.chat(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert harness.chat(messages, False) == expected.rstrip()
    assert expected.rstrip().endswith("system\nso")


def stand_in() -> dict[str, ModuleType]:
    """The little of lm-evaluation-harness 0.4.13 that the adapter builds on."""

    class TemplateLM:
        def __init__(self) -> None:
            self.cache_hook = type("Hook", (), {"add_partial": lambda self, method, request, answer: None})()

        def loglikelihood(self: Any, requests: list[Any]) -> Any:
            triples = []
            for context, rest in (request.args for request in requests):
                before = context.rstrip()
                whole = self.tok_encode(context + rest)
                ids = self.tok_encode(before) if context else [self.prefix_token_id]
                rest_ids = whole[len(ids) :] if context else self.tok_encode(rest, add_special_tokens=False)
                triples.append(((context, rest), ids, rest_ids))
            return self._loglikelihood_tokens(triples)

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")}
    modules["lm_eval.api.model"].TemplateLM = TemplateLM  # type: ignore[attr-defined]
    modules["lm_eval.api.registry"].register_model = lambda *names: lambda cls: cls  # type: ignore[attr-defined]
    return modules


@dataclass
class Request:
    args: tuple[Any, ...]


@pytest.fixture
def adapter(out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "runtime.lm_eval", raising=False)
    module = importlib.import_module("runtime.lm_eval")
    monkeypatch.setitem(sys.modules, "runtime.lm_eval", module)
    return module.QConvertLM(pretrained=str(out), batch_size="auto", device="cpu")


def test_adapter_answers_the_harness(adapter: Any, reference: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer: ChatTokenizer = adapter.harness.tokenizer
    found = adapter.loglikelihood([Request(pair) for pair in [*PAIRS, ("", "the cat")]])
    expected = []
    for context, rest in PAIRS:
        before = context.rstrip()
        ids = tokenizer.encode(before)
        expected.append(logprob(reference, ids, tokenizer.encode(context + rest)[len(ids) :]))
    expected.append(logprob(reference, [2], tokenizer.encode("the cat")))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    texts = [text for text in TEXTS if text]
    rolled = adapter.loglikelihood_rolling([Request((text,)) for text in texts])
    assert rolled == pytest.approx([rolling(reference, tokenizer.encode(text)) for text in texts], abs=1e-3)
    written = adapter.generate_until([Request(("the cat", {"until": [], "max_gen_toks": 7}))])
    assert written == [tokenizer.decode(greedy(reference, tokenizer.encode("the cat"), 7))]
    assert (adapter.eot_token_id, adapter.prefix_token_id) == (2, 2)
    assert adapter.apply_chat_template([{"role": "user", "content": "hi"}]).endswith("assistant")
    assert adapter.chat_template(True) == tokenizer.chat_template()
    assert adapter.chat_template(False) is None
    assert adapter.harness.batch_size == 8


def test_absent_package_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ImportError")  # hides it where it is installed
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_module('runtime.lm_eval', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: expected the package lm_eval, found none: pip install 'qconvert[lm-eval]'\n"


def test_end_token_comes_from_the_tokenizer(out: Path, tmp_path: Path) -> None:
    config = json.loads((out / "tokenizer_config.json").read_text()) | {"bos_token": {"content": "<|im_start|>"}}
    for file in out.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = Harness(tmp_path)
    assert (found.eos_id, found.prefix_id) == (2, 1)

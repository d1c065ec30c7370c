"""Generation: sampling, stopping, text, and the command line on a tiny checkpoint with a tokenizer built here.

Expected texts come from transformers: its greedy `generate`, its chat template, its tokenizer.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from canonical import tiny_qwen3, write
from tokenizers_tiny import TEMPLATE, TEXT, write_checkpoint, write_tokenizer

import runtime
from runtime.tokenizer import ChatTokenizer, TextStream

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint") / "out"


@pytest.fixture(scope="module", autouse=True)
def reference(out: Path) -> Any:
    return write_checkpoint(out)


def greedy(reference: Any, ids: list[int], count: int) -> list[int]:
    """The most likely continuation by transformers, one full pass per token."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime.generate", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


def test_greedy_tokens_equal_transformers(reference: Any, out: Path) -> None:
    model = runtime.load_model(out)
    expected = greedy(reference, [5, 6, 7], 12)
    assert list(runtime.generate_tokens(model, torch.tensor([5, 6, 7]), max_new_tokens=12)) == expected
    both = list(runtime.generate_tokens(model, torch.tensor([[5, 6, 7], [9, 9, 9]]), max_new_tokens=12))
    assert [tokens[0] for tokens in both] == expected
    assert [tokens[1] for tokens in both] == greedy(reference, [9, 9, 9], 12)


def test_generation_stops_after_an_end_token(reference: Any, out: Path) -> None:
    model = runtime.load_model(out)
    expected = greedy(reference, [5, 6, 7], 12)
    end = expected[4]
    assert (
        list(runtime.generate_tokens(model, torch.tensor([5, 6, 7]), 12, eos_ids=[end])) == expected[: expected.index(end) + 1]
    )
    both = list(runtime.generate_tokens(model, torch.tensor([[5, 6, 7], [9, 9, 9]]), 12, eos_ids=[end]))
    stopped = [tokens[0] for tokens in both]
    assert stopped[: expected.index(end) + 1] == expected[: expected.index(end) + 1]
    assert set(stopped[expected.index(end) :]) == {end}


def test_generation_stops_where_positions_end(tmp_path: Path) -> None:
    write(tmp_path, tiny_qwen3(max_position_embeddings=10))
    model = runtime.load_model(tmp_path)
    assert len(list(runtime.generate_tokens(model, torch.tensor([1, 2, 3]), max_new_tokens=50))) == 7
    with pytest.raises(ValueError, match="expected fewer than 10 tokens, found 10"):
        runtime.generate_tokens(model, torch.arange(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: expected 0 or more, found -1"),
        ({"temperature": -0.5}, "temperature: expected 0 or more"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more"),
        ({"top_p": 0.0}, "top_p: expected a number above 0"),
        ({"top_p": 1.5}, "top_p: expected a number above 0"),
        ({"top_k": -1}, "top_k: expected 0 or more"),
        ({"input_ids": torch.tensor([1, 300])}, "expected ids from 0 to 299, found 300"),
        ({"input_ids": torch.tensor([-1])}, "expected ids from 0 to 299, found -1"),
        ({"input_ids": torch.tensor([], dtype=torch.int64)}, "at least one token"),
        ({"input_ids": torch.tensor([1.0])}, "expected int64"),
    ],
    ids=str,
)
def test_arguments_are_checked_before_the_first_token(arguments: dict[str, Any], message: str, out: Path) -> None:
    with pytest.raises(ValueError, match=message):
        runtime.generate_tokens(runtime.load_model(out), **({"input_ids": torch.tensor([1])} | arguments))


def test_a_seed_repeats_a_draw(out: Path) -> None:
    model = runtime.load_model(out)

    def draw(seed: int | None) -> list[Any]:
        return list(runtime.generate_tokens(model, torch.tensor([1, 2]), 16, temperature=1.0, seed=seed))

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("text", TEXT)
def test_streamed_text_never_splits_a_character(text: str, out: Path) -> None:
    tokenizer = ChatTokenizer(out)
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text
    assert stream.finish() == ""
    assert all(piece == "" or "\ufffd" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 3
    cut = TextStream(tokenizer)
    assert "".join(cut.push(token) for token in tokenizer.encode("a🦊")[:3]) == "a"
    assert cut.finish() == "\ufffd"


def test_chat_template_equals_transformers(out: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "system", "content": "be {brief}"}, {"role": "user", "content": "grüße <|im_end|> 🦊"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ChatTokenizer(out).encode_chat(messages) == expected

    for variant in ("file", "list"):
        other = tmp_path / variant
        write_tokenizer(other)
        config = json.loads((other / "tokenizer_config.json").read_text())
        if variant == "file":
            (other / "chat_template.jinja").write_text(config.pop("chat_template"))
        else:
            named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
            config["chat_template"] = named
        (other / "tokenizer_config.json").write_text(json.dumps(config))
        assert ChatTokenizer(other).encode_chat(messages) == expected


def test_templates_get_what_transformers_gives_them(out: Path) -> None:
    template = (
        "{{ eos_token }}|{{ strftime_now('%Y') }}|{{ {'a': '<é>'} | tojson }}|"
        "{%- for i in range(3) %}{%- if i == 1 %}{% break %}{% endif %}{{ i }}{%- endfor %}"
    )
    (out / "chat_template.jinja").write_text(template)
    try:
        tokenizer = ChatTokenizer(out)
        ids = tokenizer.encode_chat([])
    finally:
        (out / "chat_template.jinja").unlink()
    assert ids == [2, *tokenizer.encode(f"|{time.strftime('%Y')}|" + '{"a": "<é>"}|0')]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "expected chat_template.jinja"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{% for %}", "expected the chat template to accept"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_bad_templates_are_refused(template: str | None, message: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(runtime.LoadError, match=message):
        ChatTokenizer(tmp_path).encode_chat([{"role": "user", "content": "hi"}])


def test_end_tokens_are_collected_from_every_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert ChatTokenizer(tmp_path).eos_ids(None) == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    assert ChatTokenizer(tmp_path).eos_ids((5, 6)) == {0, 2, 5, 6, 7}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(runtime.LoadError, match=r"generation_config\.json: expected JSON"):
        ChatTokenizer(tmp_path).eos_ids(None)


def test_command_streams_text(reference: Any, out: Path) -> None:
    tokenizer = ChatTokenizer(out)
    ids = greedy(reference, tokenizer.encode("the cat"), 10)
    assert not set(ids) & {2}
    found = run(out, "--prompt", "the cat", "--max-new-tokens", 10, "--stats")
    assert (found.returncode, found.stdout) == (0, tokenizer.decode(ids) + "\n")
    names = [part.partition("=")[0] for part in found.stderr.split()]
    assert names == ["load_s", "first_token_s", "tokens_per_s", "peak_memory_mb"]


def test_command_prints_json(reference: Any, out: Path) -> None:
    tokenizer = ChatTokenizer(out)
    prompt = tokenizer.encode_chat([{"role": "system", "content": "s"}, {"role": "user", "content": "the"}])
    found = run(out, "--chat", "--system", "s", "--prompt", "the", "--max-new-tokens", 5, "--json", "--activations", "full")
    result = json.loads(found.stdout)
    assert found.stderr == ""
    ids = greedy(reference, prompt, 5)
    assert result["token_ids"] == ids
    assert result["text"] == tokenizer.decode(ids)
    assert result["prompt_token_ids"] == prompt
    assert result["finish_reason"] == "length"
    assert result["stats"]["peak_memory_mb"] > 50


def test_command_takes_ids_without_a_tokenizer(tmp_path: Path) -> None:
    reference = tiny_qwen3()
    reference.load_state_dict(write(tmp_path, reference), strict=True)
    expected = greedy(reference, [1, 2, 3], 6)
    found = run(tmp_path, "--prompt-ids", "1,2,3", "--max-new-tokens", 6)
    assert (found.returncode, found.stdout) == (0, " ".join(map(str, expected)) + " \n")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": expected[2]}))
    result = json.loads(run(tmp_path, "--prompt-ids", "1,2,3", "--max-new-tokens", 6, "--json").stdout)
    assert result["text"] is None
    assert result["finish_reason"] == "stop"
    assert result["token_ids"] == expected[: expected.index(expected[2]) + 1]


USAGE = {
    "no prompt": ([], "expected one of --prompt and --prompt-ids"),
    "two prompts": (["--prompt", "a", "--prompt-ids", "1"], "expected one of"),
    "empty prompt": (["--prompt", ""], "not empty"),
    "no ids": (["--prompt-ids", ""], "comma-separated token ids"),
    "words for ids": (["--prompt-ids", "1,x"], "comma-separated token ids"),
    "chat with ids": (["--chat", "--prompt-ids", "1"], "--chat needs --prompt"),
    "system without chat": (["--prompt", "a", "--system", "b"], "--system needs --chat"),
    "negative length": (["--prompt", "a", "--max-new-tokens", "-1"], "--max-new-tokens"),
    "negative temperature": (["--prompt", "a", "--temperature", "-1"], "--temperature"),
    "top-p of zero": (["--prompt", "a", "--top-p", "0"], "--top-p"),
    "negative top-k": (["--prompt", "a", "--top-k", "-2"], "--top-k"),
    "negative seed": (["--prompt", "a", "--seed", "-2"], "--seed"),
    "unknown device": (["--prompt", "a", "--device", "tpu"], "--device"),
    "unknown activations": (["--prompt", "a", "--activations", "half"], "--activations"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str, out: Path) -> None:
    check_refused(run(out, *arguments), 2, message)


def test_ids_outside_the_vocabulary_are_wrong_usage(out: Path) -> None:
    check_refused(run(out, "--prompt-ids", "1,300"), 2, "expected ids from 0 to 299, found 300")
    check_refused(run(out / "nothing", "--prompt-ids", "1"), 2, "does not exist")


def test_a_refused_checkpoint_is_one_line_and_exit_code_1(out: Path, tmp_path: Path) -> None:
    check_refused(run(tmp_path, "--prompt-ids", "1"), 1, "config.json: expected a file of a canonical checkpoint")
    check_refused(run(tmp_path, "--prompt", "a"), 1, "tokenizer.json: expected a tokenizer, found none")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    check_refused(run(tmp_path, "--prompt-ids", "1"), 1, "this is not a canonical checkpoint: run `qconvert IN OUT` first")


def check_refused(found: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    assert found.returncode == code, found.stderr
    assert found.stdout == ""
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("error: ")


def heed_interrupts() -> None:
    """Undo what a shell does to background jobs: they, and so the children of a test run, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_ends_with_130(tmp_path: Path) -> None:
    write(tmp_path, tiny_qwen3(max_position_embeddings=100000))
    command = [sys.executable, "-m", "runtime.generate", str(tmp_path), "--prompt-ids", "1", "--max-new-tokens", "90000"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(8)  # it is generating
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert b"Traceback" not in process.stderr.read()


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    write(tmp_path, tiny_qwen3(max_position_embeddings=100000))
    command = [sys.executable, "-m", "runtime.generate", str(tmp_path), "--prompt-ids", "1", "--max-new-tokens", "90000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(8)
        process.stdout.close()
        assert process.wait(timeout=30) in (0, 1)
        assert process.stderr.read() == b""


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']; import runpy\ntry: runpy.run_module('runtime.generate', run_name='__main__')\n"
    )
    code += "except SystemExit: pass\nprint('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Continue a prompt" in found.stdout
    assert found.stdout.endswith("False\n")
    assert list(itertools.islice(found.stderr, 1)) == []

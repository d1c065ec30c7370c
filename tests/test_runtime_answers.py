"""What people see of generation: text up to stop strings, conversations, files of prompts, log-probabilities.

Expected texts come from transformers: its greedy continuation, its chat template, its logits.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from canonical import tiny_qwen3, write
from conftest import ROOT, Ran
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_tiny import TEXT, write_checkpoint

import runtime
from runtime.answer import Answer, StopStream
from runtime.decode import Drawn
from runtime.tokenizer import ChatTokenizer, TextStream


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint") / "out"


@pytest.fixture(scope="module", autouse=True)
def reference(out: Path) -> Any:
    return write_checkpoint(out)


@pytest.fixture(scope="module")
def tokenizer(out: Path) -> ChatTokenizer:
    return ChatTokenizer(out)


def run(*args: object, stdin: bytes = b"", module: str = "runtime.generate") -> Ran:
    """Run the command in this process; an exception would be a traceback for a user, and passes through."""
    stdout, stderr = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin
    sys.modules.pop(module, None)  # which the test of the README's commands imports
    sys.argv, sys.stdin = [module, *map(str, args)], io.TextIOWrapper(io.BytesIO(stdin))
    code: int | str | None = 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv, sys.stdin = before
    assert isinstance(code, int)
    return Ran(code, stdout.getvalue(), stderr.getvalue())


def refused(found: Ran, code: int, message: str) -> None:
    assert (found.code, found.out) == (code, ""), found.err
    assert message in found.err
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1


def greedy(reference: Any, ids: list[int], count: int, ends: tuple[int, ...] = (2,)) -> list[int]:
    """The most likely continuation by transformers, one full pass per token, up to an end token."""
    found: list[int] = []
    while len(found) < count and not (found and found[-1] in ends):
        with torch.no_grad():
            found.append(int(reference(torch.tensor([ids + found])).logits[0, -1].argmax()))
    return found


# Stop strings


def cut(text: str, stops: list[str]) -> str:
    """`text` up to the first stop string to be complete."""
    for end in range(len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            return text[: end - max(map(len, here))]
    return text


@settings(max_examples=400, deadline=None)
@given(st.text("ab<", max_size=14), st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 4)))
def test_stop_strings_end_the_text_however_it_comes(text: str, stops: list[str], sizes: list[int]) -> None:
    stream, shown, at = StopStream(stops), "", 0
    for size in [*sizes, *[1] * len(text)]:
        shown += stream.push(text[at : at + size])
        at += size
        assert cut(text, stops).startswith(shown)
        if stream.found:
            break
        held = text[len(shown) : at]
        assert not held or any(stop.startswith(held) for stop in stops)  # nothing is held back for no reason
    assert shown + stream.finish() == cut(text, stops)
    assert (stream.found is not None) == (any(stop in text for stop in stops))


@pytest.mark.parametrize(
    ("stop", "shown", "reason"),
    [
        ((), "the cat sat on the mat", "length"),
        (("sat",), "the cat ", "stop"),
        (("at s",), "the c", "stop"),
        (("mats", "on them"), "the cat sat on the mat", "length"),
        (("mat",), "the cat sat on the ", "stop"),
        (("t",), "", "stop"),
        (("zzz", "cat"), "the ", "stop"),
    ],
    ids=str,
)
def test_answers_stop_within_and_across_tokens(
    stop: tuple[str, ...], shown: str, reason: str, tokenizer: ChatTokenizer
) -> None:
    answer = Answer(tokenizer, [2], stop)
    pieces = list(answer.follow(Drawn(token) for token in tokenizer.encode(TEXT[0])))
    assert ("".join(pieces), answer.text, answer.finish_reason) == (shown, shown, reason)
    assert answer.finish() == ""
    used = tokenizer.decode(answer.token_ids)
    assert TEXT[0].startswith(used)
    assert used.startswith(shown)


def test_special_tokens_stop_an_answer_by_their_name(tokenizer: ChatTokenizer) -> None:
    answer = Answer(tokenizer, [], ["<|im_start|>"])
    tokens = [*tokenizer.encode("the"), 1, *tokenizer.encode("cat")]
    assert "".join(answer.follow(map(Drawn, tokens))) == "the"
    assert (answer.token_ids[-1], answer.finish_reason) == (1, "stop")


def test_text_goes_on_when_bytes_never_become_a_character(tokenizer: ChatTokenizer) -> None:
    """A model may write bytes that are no UTF-8 for ever; what is held back stays short."""
    bad = tokenizer.encode("ü")[1]
    stream = TextStream(tokenizer)
    pieces = [stream.push(bad) for _ in range(100)]
    assert len("".join(pieces)) > 90
    assert "".join(pieces) + stream.finish() == "\ufffd" * 100


def test_command_holds_back_a_stop_string(reference: Any, out: Path, tokenizer: ChatTokenizer) -> None:
    ids = greedy(reference, tokenizer.encode("the cat"), 24)
    text = tokenizer.decode(ids)
    stop = text[6:9]
    found = run(out, "--prompt", "the cat", "--max-new-tokens", 24, "--stop", "not there", "--stop", stop)
    assert (found.code, found.out) == (0, text[: text.index(stop)] + "\n")
    result = json.loads(run(out, "--prompt", "the cat", "--max-new-tokens", 24, "--stop", stop, "--json").out)
    assert (result["text"], result["finish_reason"]) == (text[: text.index(stop)], "stop")
    assert result["token_ids"] == ids[: len(result["token_ids"])]
    assert len(result["token_ids"]) < len(ids)


def test_end_tokens_can_be_ignored(reference: Any, out: Path, tokenizer: ChatTokenizer) -> None:
    ids = greedy(reference, tokenizer.encode("the cat"), 12, ends=())
    file = out / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [ids[5]], "max_new_tokens": 12}))
    try:
        short = json.loads(run(out, "--prompt", "the cat", "--json").out)
        long = json.loads(run(out, "--prompt", "the cat", "--json", "--ignore-eos").out)
    finally:
        file.unlink()
    assert short["token_ids"] == ids[: ids.index(ids[5]) + 1]
    assert (long["token_ids"], long["finish_reason"]) == (ids, "length")


# Conversations

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if tools is not none %}tools{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{{ style | default('') }}{{ (deep | default({})).a | default('') }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "grüße"},
    {"role": "assistant", "content": "a <cat> sat"},
    {"role": "user", "content": "why?"},
]
VARIABLES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "none": ([], {}),
    "thinking": (["--thinking"], {"enable_thinking": True}),
    "no thinking": (["--no-thinking"], {"enable_thinking": False}),
    "no thinking, spelled out": (["--template-var", "enable_thinking=false"], {"enable_thinking": False}),
    "text": (["--template-var", "style=loud and clear"], {"style": "loud and clear"}),
    "text with signs": (["--template-var", "style=a=b"], {"style": "a=b"}),
    "several": (["--template-var", 'deep={"a": "x"}', "--template-var", "style=7"], {"deep": {"a": "x"}, "style": 7}),
}


@pytest.fixture
def talker(out: Path) -> Any:
    file = out / "chat_template.jinja"
    file.write_text(THINKING)
    yield out
    file.unlink()


@pytest.mark.parametrize(("options", "variables"), VARIABLES.values(), ids=VARIABLES)
def test_conversations_equal_transformers(options: list[str], variables: dict[str, Any], talker: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(talker)
    expected = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False, **variables)
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(TALK))
    shared = ["--max-new-tokens", 1, "--json", *options]
    assert json.loads(run(talker, "--messages", file, *shared).out)["prompt_token_ids"] == expected
    assert json.loads(run(talker, "--messages", "-", *shared, stdin=file.read_bytes()).out)["prompt_token_ids"] == expected
    expected = theirs.apply_chat_template(TALK[:2], add_generation_prompt=True, return_dict=False, **variables)
    one = run(talker, "--chat", "--system", "be brief", "--prompt", "grüße", *shared)
    assert json.loads(one.out)["prompt_token_ids"] == expected


# Files of prompts

LINES: list[dict[str, Any]] = [
    {"prompt": "the cat sat on the mat and the cat", "id": "first"},
    {"prompt_ids": [5], "id": 7, "max_new_tokens": 3},
    {"messages": [{"role": "user", "content": "the"}]},
    {"prompt": "x", "id": {"deep": [1]}, "max_new_tokens": 17},
    {"prompt": "grüße 🦊", "id": None, "stop": ["\x01", "never"]},
    {"prompt_ids": [9, 8, 7, 6, 5, 4, 3], "stop": "also never"},
]


def expected_answers(reference: Any, tokenizer: ChatTokenizer, count: int) -> list[dict[str, Any]]:
    results = []
    for line in LINES:
        ids = line.get("prompt_ids") or (
            tokenizer.encode(line["prompt"]) if "prompt" in line else tokenizer.encode_chat(line["messages"])
        )
        tokens = greedy(reference, ids, line.get("max_new_tokens", count))
        reason = "stop" if tokens[-1] == 2 else "length"
        shown = tokens[:-1] if reason == "stop" else tokens
        text = tokenizer.decode(shown)
        results.append({"id": line.get("id"), "text": text, "token_ids": tokens, "finish_reason": reason})
    return results


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_prompt_files_are_answered_in_order(
    batch_size: int, reference: Any, out: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in LINES) + "\n\n", encoding="utf-8")
    found = run(out, "--prompt-file", file, "--batch-size", batch_size, "--max-new-tokens", 9)
    assert (found.code, found.err) == (0, "")
    answers = [json.loads(line) for line in found.out.splitlines()]
    assert answers == expected_answers(reference, tokenizer, 9)
    to_file = tmp_path / "answers.jsonl"
    again = run(
        out, "--prompt-file", "-", "--output", to_file, "--batch-size", batch_size, "--max-new-tokens", 9, "--stats",
        stdin=file.read_bytes(),
    )  # fmt: skip
    assert (again.code, again.out) == (0, "")
    assert to_file.read_text(encoding="utf-8") == found.out
    assert [part.partition("=")[0] for part in again.err.split()] == [
        "load_s", "prompts", "total_s", "tokens_per_s", "peak_memory_mb",
    ]  # fmt: skip


def test_stop_strings_of_one_line_end_only_its_answer(reference: Any, out: Path, tokenizer: ChatTokenizer) -> None:
    text = tokenizer.decode(greedy(reference, tokenizer.encode("the cat"), 20))
    stop = text[5:7]
    lines = [{"prompt": "the cat"}, {"prompt": "the cat", "stop": stop}, {"prompt": "the cat", "stop": []}]
    data = "\n".join(map(json.dumps, lines)).encode()
    found = run(out, "--prompt-file", "-", "--max-new-tokens", 20, "--stop", text[9:12], stdin=data)
    answers = [json.loads(line) for line in found.out.splitlines()]
    assert [answer["text"] for answer in answers] == [text[: text.index(text[9:12])], text[: text.index(stop)], text]
    assert [answer["finish_reason"] for answer in answers] == ["stop", "stop", "length"]


def test_a_line_is_drawn_with_its_own_seed(out: Path) -> None:
    lines = "\n".join(json.dumps({"prompt_ids": [3] * n}) for n in (5, 2, 9, 1)).encode()
    options = ["--temperature", 1.5, "--max-new-tokens", 8, "--logprobs"]
    found = [run(out, "--prompt-file", "-", "--seed", 10, "--batch-size", n, *options, stdin=lines).out for n in (1, 3, 4)]
    answers = [[json.loads(line)["token_ids"] for line in text.splitlines()] for text in found]
    assert answers[0] == answers[1] == answers[2]
    third = run(out, "--prompt-ids", ",".join("3" * 9), "--seed", 12, "--json", *options)
    assert json.loads(third.out)["token_ids"] == answers[0][2]


def test_logprobs_of_answers(reference: Any, out: Path, tokenizer: ChatTokenizer) -> None:
    prompt = tokenizer.encode("the cat")
    result = json.loads(run(out, "--prompt", "the cat", "--json", "--logprobs", 2, "--max-new-tokens", 4).out)
    line = b'{"prompt": "the cat"}'
    lines = run(out, "--prompt-file", "-", "--logprobs", 2, "--max-new-tokens", 4, stdin=line)
    assert json.loads(lines.out)["logprobs"] == result["logprobs"]
    for place, entry in enumerate(result["logprobs"]):
        ids = prompt + result["token_ids"][:place]
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        best = expected.topk(2)
        assert entry["token_id"] == result["token_ids"][place] == best.indices[0]
        assert entry["text"] == tokenizer.token_text(entry["token_id"])
        assert entry["logprob"] == pytest.approx(float(best.values[0]), abs=1e-4)
        assert [other["token_id"] for other in entry["top"]] == best.indices.tolist()
        assert [other["logprob"] for other in entry["top"]] == pytest.approx(best.values.tolist(), abs=1e-4)
    alone = json.loads(run(out, "--prompt", "the cat", "--json", "--logprobs", "--max-new-tokens", 4).out)
    assert [entry["top"] for entry in alone["logprobs"]] == [[]] * 4
    assert "logprobs" not in json.loads(run(out, "--prompt", "the cat", "--json", "--max-new-tokens", 4).out)


def test_the_checkpoint_gives_defaults_and_options_win(reference: Any, out: Path, tokenizer: ChatTokenizer) -> None:
    file = out / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 5.0, "top_k": 50, "max_new_tokens": 6}))
    try:
        draws = [json.loads(run(out, "--prompt", "the", "--json", "--seed", seed).out)["token_ids"] for seed in (1, 1, 2)]
        cold = json.loads(run(out, "--prompt", "the", "--json", "--temperature", 0, "--max-new-tokens", 9).out)["token_ids"]
        one = json.loads(run(out, "--prompt", "the", "--json", "--top-k", 1).out)["token_ids"]
        file.write_text('{"do_sample": true, "top_p": 7}')
        refused(run(out, "--prompt", "the"), 1, "generation_config.json: top_p: expected a number above 0")
        assert run(out, "--prompt", "the", "--top-p", 1).code == 0
    finally:
        file.unlink()
    assert draws[0] == draws[1] != draws[2]
    assert {len(draw) for draw in draws} == {6}
    expected = greedy(reference, tokenizer.encode("the"), 9)
    assert (cold, one) == (expected, expected[:6])


BAD_LINES: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "expected JSON, found "),
    "no object": ("[1]", "expected a JSON object, found [1]"),
    "nothing to answer": ('{"id": 1}', "expected one of prompt, messages, prompt_ids, found none"),
    "two things": ('{"prompt": "a", "prompt_ids": [1]}', "found prompt and prompt_ids"),
    "unknown field": ('{"prompt": "a", "max_tokens": 5}', "found 'max_tokens' too"),
    "prompt of numbers": ('{"prompt": 5}', "prompt: expected text that is not empty, found 5"),
    "empty prompt": ('{"prompt": ""}', "prompt: expected text that is not empty"),
    "ids of words": ('{"prompt_ids": ["a"]}', "prompt_ids: expected a list of token ids"),
    "no ids": ('{"prompt_ids": []}', "prompt_ids: expected a list of token ids"),
    "true is no id": ('{"prompt_ids": [true]}', "prompt_ids: expected a list of token ids"),
    "messages of text": ('{"messages": "hi"}', "expected a list of messages, found 'hi'"),
    "no messages": ('{"messages": []}', "expected a list of messages, found []"),
    "message without role": ('{"messages": [{"content": "a"}]}', "expected messages such as"),
    "length of zero": ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens: expected an integer above 0, found 0"),
    "length in words": ('{"prompt": "a", "max_new_tokens": "9"}', "max_new_tokens: expected an integer above 0, found '9'"),
    "empty stop": ('{"prompt": "a", "stop": [""]}', "stop: expected text or a list of texts"),
    "stop of numbers": ('{"prompt": "a", "stop": 3}', "stop: expected text or a list of texts"),
    "deep": ("[" * 100000, "expected JSON"),
}  # fmt: skip
BAD_FOR_THE_CHECKPOINT: dict[str, tuple[str, str]] = {
    "role": ('{"messages": [{"role": "robot", "content": "a"}]}', "the chat template to accept the messages, found role!"),
    "id outside": ('{"prompt_ids": [1, 300]}', "expected ids from 0 to 299, found 300"),
    "too long": (json.dumps({"prompt_ids": [1] * 256}), "expected fewer than 256 tokens, found 256"),
    "half a surrogate pair": ('{"prompt": "\\ud800"}', "expected text in UTF-8"),
    "half a surrogate pair in a message": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "expected text in UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_before_anything_is_opened(line: str, message: str, tmp_path: Path) -> None:
    file, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    found = run(tmp_path, "--prompt-file", file, "--output", target)
    refused(found, 1, message)
    assert found.err.startswith(f"error: {file}:3: ")
    assert not target.exists()


@pytest.mark.parametrize(("line", "message"), BAD_FOR_THE_CHECKPOINT.values(), ids=BAD_FOR_THE_CHECKPOINT)
def test_a_line_that_does_not_suit_the_checkpoint_is_named(line: str, message: str, out: Path) -> None:
    """Found from the tokenizer and the config: this copy of the checkpoint has no weights."""
    shards = [file.rename(file.with_suffix(".away")) for file in out.glob("*.safetensors")]
    try:
        found = run(out, "--prompt-file", "-", stdin=f'{{"prompt": "fine"}}\n{line}\n'.encode())
    finally:
        for file in shards:
            file.rename(file.with_suffix(".safetensors"))
    refused(found, 1, message)
    assert "error: standard input:2: " in found.err


def test_other_bad_files(out: Path, tmp_path: Path) -> None:
    refused(run(out, "--prompt-file", "-", stdin=b"\n \n"), 1, "standard input: expected at least one line with a prompt")
    refused(
        run(out, "--prompt-file", "-", stdin=b'{"prompt": "a"}\n{"prompt": "\xff"}'), 1, "standard input:2: expected text in"
    )
    refused(run(out, "--messages", "-", stdin=b'{"role": "user"}'), 1, "standard input: expected a list of messages")
    refused(run(out, "--messages", "-", stdin=b"[{]"), 1, "standard input: expected JSON")
    refused(run(out, "--messages", tmp_path / "none"), 2, "does not exist")
    refused(run(out, "--prompt-file", tmp_path), 2, "is a directory")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}')
    refused(run(out, "--prompt-file", file, "--output", file), 2, "--output: expected another file")
    assert file.read_text() == '{"prompt": "a"}'
    refused(run(out, "--prompt-file", file, "--output", tmp_path / "none" / "x"), 2, "No such file or directory")


USAGE: dict[str, tuple[list[object], str]] = {
    "two sources": (["--prompt", "a", "--prompt-file", "-"], "expected one of"),
    "messages and ids": (["--messages", "-", "--prompt-ids", "1"], "expected one of"),
    "chat with messages": (["--messages", "-", "--chat"], "--chat needs --prompt or --prompt-file"),
    "variables without chat": (["--prompt", "a", "--no-thinking"], "need --chat"),
    "variable without value": (["--prompt", "a", "--chat", "--template-var", "x"], "expected NAME=VALUE"),
    "variable without name": (["--prompt", "a", "--chat", "--template-var", "=x"], "expected NAME=VALUE"),
    "variable of ours": (["--prompt", "a", "--chat", "--template-var", "messages=[]"], "messages is set by this command"),
    "output of one": (["--prompt", "a", "--output", "x"], "--output needs --prompt-file"),
    "logprobs of text": (["--prompt", "a", "--logprobs", "3"], "--logprobs needs --json"),
    "negative logprobs": (["--prompt", "a", "--json", "--logprobs=-3"], "-3"),
    "empty stop": (["--prompt", "a", "--stop", ""], "not empty"),
    "min-p above one": (["--prompt", "a", "--min-p", "1.5"], "--min-p"),
    "penalty of zero": (["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty"),
    "temperature of infinity": (["--prompt", "a", "--temperature", "inf"], "temperature: expected 0 or more, found inf"),
    "temperature of NaN": (["--prompt", "a", "--temperature", "nan"], "temperature"),
    "batches of nothing": (["--prompt-file", "-", "--batch-size", "0"], "--batch-size"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_one_line(arguments: list[object], message: str, out: Path) -> None:
    refused(run(out, *arguments, stdin=b'{"prompt": "a"}'), 2, message)


def test_stop_strings_need_a_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, tiny_qwen3())
    refused(run(tmp_path, "--prompt-ids", "1", "--stop", "x"), 1, "tokenizer.json: expected a tokenizer")
    line = b'{"prompt_ids": [1], "stop": "x"}'
    refused(run(tmp_path, "--prompt-file", "-", stdin=line), 1, "tokenizer.json: expected a tokenizer")
    assert run(tmp_path, "--prompt-file", "-", "--max-new-tokens", 1, stdin=b'{"prompt_ids": [1]}').code == 0


def test_bytes_that_are_no_text_are_wrong_usage(out: Path) -> None:
    command = [sys.executable, "-m", "runtime.generate", str(out), "--prompt", b"\xff\xfe"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: --prompt: expected text in UTF-8")
    assert done.stderr.count(b"\n") == 1


def test_ids_that_are_no_unicode_come_back_as_they_were(out: Path, tmp_path: Path) -> None:
    line = '{"id": "\\ud800", "prompt_ids": [5]}'
    target = tmp_path / "answers.jsonl"
    assert run(out, "--prompt-file", "-", "--max-new-tokens", 2, "--output", target, stdin=line.encode()).code == 0
    assert json.loads(target.read_bytes())["id"] == "\ud800"
    command = [sys.executable, "-m", "runtime.generate", str(out), "--prompt-file", "-", "--max-new-tokens", "2"]
    done = subprocess.run(command, cwd=ROOT, input=line.encode(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["id"] == "\ud800"


def test_too_little_memory_is_one_line_and_exit_code_3(tmp_path: Path) -> None:
    write(tmp_path, tiny_qwen3(max_position_embeddings=2**31 - 1))
    refused(run(tmp_path, "--prompt-ids", "1", "--max-new-tokens", 2**30), 3, "memory")


def test_no_progress_bar_outside_a_terminal(out: Path) -> None:
    found = run(out, "--prompt-file", "-", "--max-new-tokens", 1, stdin=b'{"prompt": "a"}\n' * 20)
    assert found.err == ""
    assert len(found.out.splitlines()) == 20


def test_windows_of_batches_keep_the_order(out: Path) -> None:
    """More prompts than are put together at once."""
    lengths = [random.Random(0).choice([1, 3, 9]) for _ in range(40)]
    data = "\n".join(json.dumps({"id": i, "prompt_ids": [4] * n}) for i, n in enumerate(lengths)).encode()
    few = run(out, "--prompt-file", "-", "--max-new-tokens", 2, "--batch-size", 2, stdin=data)
    many = run(out, "--prompt-file", "-", "--max-new-tokens", 2, "--batch-size", 64, stdin=data)
    assert few.out == many.out
    assert [json.loads(line)["id"] for line in few.out.splitlines()] == list(range(40))


def test_generation_needs_no_answer(out: Path, tokenizer: ChatTokenizer) -> None:
    """Tokens may come from anywhere: here from the public function."""
    model = runtime.load_model(out)
    tokens = runtime.generate_tokens(model, torch.tensor(tokenizer.encode("the cat")), 6)
    answer = Answer(tokenizer)
    text = "".join(answer.follow(Drawn(token) for token in tokens if isinstance(token, int)))
    assert text + "\n" == run(out, "--prompt", "the cat", "--max-new-tokens", 6).out

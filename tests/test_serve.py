"""`python -m runtime.serve`: OpenAI's own client against a real server; many clients at once; what is refused; the end."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import ROOT

import convert
from runtime.batching import Batcher, BusyError, GaveUpError, Piece, Request
from runtime.decode import generate_tokens
from runtime.loader import load_model
from runtime.models.base import CausalLM
from runtime.openai_api import ApiError, read_request
from runtime.sampling import Sampling
from runtime.tokenizer import ChatTokenizer

START = "Four score and seven years ago"
CHAT = [{"role": "user", "content": "hello"}]
KEY = "a key"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped sample, converted."""
    out = tmp_path_factory.mktemp("serve") / "sample"
    convert.convert_checkpoint(ROOT / "samples" / "qwen3_5-modelopt-mixed", out)
    return out


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> CausalLM:
    """The same, loaded here."""
    return load_model(checkpoint, device="cpu")


def start(checkpoint: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """A server at a free port, which can be connected to, and its address."""
    command = [sys.executable, "-m", "runtime.serve", str(checkpoint), "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "QCONVERT_SERVE_API_KEY": KEY}
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("sample: http://127.0.0.1:"), line + process.stderr.read()
    return process, line.split()[1]


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    """A running server."""
    process, url = start(checkpoint, "--max-batch", "4", "--max-context", "200")
    yield url
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    """The official client."""
    return openai.OpenAI(base_url=address, api_key=KEY, max_retries=0, timeout=60)


def expected(checkpoint: Path, model: CausalLM, ids: list[int], count: int) -> str:
    """The most likely continuation, made without server and batches."""
    tokens = [t for t in generate_tokens(model, torch.tensor(ids), count) if isinstance(t, int)]
    return ChatTokenizer(checkpoint).decode(tokens)


def test_models(client: openai.OpenAI) -> None:
    """The model goes by the directory's name."""
    assert [entry.id for entry in client.models.list()] == ["sample"]
    assert client.models.retrieve("sample").id == "sample"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_completion(client: openai.OpenAI, checkpoint: Path, model: CausalLM) -> None:
    """The text is what the model continues with; tokens are counted; ids are taken as well as text."""
    ids = ChatTokenizer(checkpoint).encode(START)
    text = expected(checkpoint, model, ids, 12)
    found = client.completions.create(model="sample", prompt=START, max_tokens=12, temperature=0)
    assert found.choices[0].text == text
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (len(ids), 12, len(ids) + 12)
    several = client.completions.create(model="sample", prompt=[START, START + text[:20]], max_tokens=8, temperature=0, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == expected(checkpoint, model, ids, 8)
    of_ids = client.completions.create(model="sample", prompt=ids, max_tokens=8, temperature=0)
    assert of_ids.choices[0].text == several.choices[0].text


def test_stream_is_the_text(client: openai.OpenAI) -> None:
    """Events put together are the whole answer; the last has the reason, and the usage where it is asked for."""
    asked: dict[str, Any] = {"model": "sample", "messages": CHAT, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    reasons = [event.choices[0].finish_reason for event in events if event.choices]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]
    assert events[-1].usage == whole.usage
    assert len(events) > 10


def test_chat_uses_the_template(client: openai.OpenAI, checkpoint: Path, model: CausalLM) -> None:
    """A chat is continued behind the checkpoint's own template; parts of text are one text."""
    ids = ChatTokenizer(checkpoint).encode_chat(CHAT)
    found = client.chat.completions.create(model="sample", messages=CHAT, max_completion_tokens=15, temperature=0)
    assert found.choices[0].message.content == expected(checkpoint, model, ids, 15)
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    again = client.chat.completions.create(model="sample", messages=parts, max_completion_tokens=15, temperature=0)
    assert again.choices[0].message == found.choices[0].message


def test_stop_seed_and_logprobs(client: openai.OpenAI) -> None:
    """A stop string is not shown; the same seed gives the same text; log-probabilities are those of the tokens shown."""
    asked: dict[str, Any] = {"model": "sample", "prompt": START, "max_tokens": 14}
    stopped = client.completions.create(**asked, temperature=0, stop=["this"]).choices[0]
    assert stopped.text == " our fathers brought forth on "
    assert stopped.finish_reason == "stop"
    drawn = [client.completions.create(**asked, temperature=3, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    choice = client.completions.create(**asked, temperature=0, logprobs=2).choices[0]
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or ()) == choice.text
    assert all(len(top) == 2 and max(top.values()) <= 0 for top in choice.logprobs.top_logprobs or ())
    chat = client.chat.completions.create(model="sample", messages=CHAT, max_tokens=5, logprobs=True, top_logprobs=1)
    assert chat.choices[0].logprobs is not None
    assert [len(one.top_logprobs) for one in chat.choices[0].logprobs.content or ()] == [1] * 5


def test_clients_at_once(client: openai.OpenAI) -> None:
    """More clients than the batch has room for, with different lengths: each gets its own text."""

    def ask(number: int) -> str:
        asked = {"model": "sample", "prompt": START[: 10 + number], "max_tokens": 3 + number, "temperature": 0}
        if number % 2:
            return "".join(e.choices[0].text for e in client.completions.create(**asked, stream=True))  # type: ignore[call-overload]
        return str(client.completions.create(**asked).choices[0].text)  # type: ignore[call-overload]

    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(ask, range(10)))
    assert together == [ask(number) for number in range(10)]


# fields -> status, the field that the error names, part of the message
REFUSED: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "another model": ({"model": "gpt"}, 404, "model", "'sample'"),
    "no prompt": ({"prompt": None}, 400, "prompt", "found none"),
    "an empty prompt": ({"prompt": ""}, 400, "prompt", "at least one token"),
    "ids that do not exist": ({"prompt": [10**9]}, 400, "prompt", "ids below"),
    "a mixed list": ({"prompt": [1, "a"]}, 400, "prompt", "a list of strings"),
    "too long": ({"max_tokens": 500}, 400, "prompt", "200"),
    "too many": ({"n": 5}, 400, "n", "several requests"),
    "too hot": ({"temperature": -1}, 400, "temperature", "0 or more"),
    "a word for a number": ({"top_p": "x"}, 400, "top_p", "a number"),
    "true for a number": ({"max_tokens": True}, 400, "max_tokens", "an integer"),
    "a penalty": ({"presence_penalty": 1.0}, 400, "presence_penalty", "leave it out"),
    "best of several": ({"best_of": 3}, 400, "best_of", "leave it out"),
    "a misspelt field": ({"temprature": 1.0}, 400, "temprature", "unknown field"),
    "an empty stop": ({"stop": ""}, 400, "stop", "none empty"),
}


def post(address: str, body: bytes, key: str = KEY) -> tuple[int, dict[str, Any]]:
    """The status and body of a completion."""
    request = urllib.request.Request(f"{address}/completions", body, {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, address: str) -> None:
    """What would not be answered as asked is refused, in the form that clients understand."""
    fields, status, param, words = REFUSED[case]
    code, body = post(address, json.dumps({"model": "sample", "prompt": "a", "max_tokens": 2} | fields).encode())
    assert (code, body["error"]["param"]) == (status, param)
    assert words in body["error"]["message"]


def test_refused_before_it_is_read(address: str) -> None:
    """No JSON, too much of it, a wrong key."""
    assert post(address, b"{")[0] == 400
    assert post(address, b"[" * 100_000)[0] == 400
    assert post(address, b" " * (9 << 20))[0] == 413
    assert post(address, b"{}", key="another")[0] == 401


def test_neutral_fields() -> None:
    """What clients send without meaning anything by it is accepted; pictures are not."""
    wanted = read_request(
        {"messages": CHAT, "user": "me", "presence_penalty": 0, "tools": [], "top_k": -1, "stop": None}, chat=True
    )
    assert (wanted.top_k, wanted.stop) == (0, ())
    with pytest.raises(ApiError, match="images"):
        read_request({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, chat=True)


def test_shutdown_answers_first(checkpoint: Path) -> None:
    """SIGTERM: what is being answered is answered, and the server ends with 0."""
    process, address = start(checkpoint)
    client = openai.OpenAI(base_url=address, api_key=KEY, max_retries=0, timeout=60)
    stream = client.completions.create(model="sample", prompt=START, max_tokens=30, temperature=0, stream=True)
    events = iter(stream)
    next(events)
    process.send_signal(signal.SIGTERM)
    assert [event.choices[0].finish_reason for event in events][-1] == "length"
    client.close()
    assert process.wait(30) == 0


class Client:
    """What a batcher delivers."""

    def __init__(self, batcher: Batcher, **fields: Any) -> None:
        self.pieces: queue.Queue[Piece | Exception] = queue.Queue()
        request = Request(**{"token_ids": [1, 2, 3], "sampling": Sampling(), "max_new_tokens": 5} | fields)
        self.ticket = batcher.submit(request, self.pieces.put)

    def next(self) -> Piece | Exception:
        return self.pieces.get(timeout=30)

    def tokens(self) -> list[int]:
        """All tokens, at the end."""
        found: list[int] = []
        while True:
            piece = self.next()
            if isinstance(piece, Exception):
                raise piece
            found += [drawn.token for drawn in piece.drawn]
            if piece.finish_reason:
                return found


@pytest.fixture
def batcher(checkpoint: Path, model: CausalLM) -> Iterator[Batcher]:
    """For up to three sequences, of which one may wait."""
    made = Batcher(model, ChatTokenizer(checkpoint), frozenset(), max_batch=3, max_waiting=1)
    yield made
    made.close()


def test_late_request_joins(batcher: Batcher, model: CausalLM) -> None:
    """A request that comes while another is answered does not wait for its end, and neither changes the other."""
    long = Client(batcher, max_new_tokens=100)
    long.next()
    short = Client(batcher, token_ids=[4, 5], max_new_tokens=3)
    assert short.tokens() == list(generate_tokens(model, torch.tensor([4, 5]), 3))
    assert long.pieces.qsize() < 90
    assert len(long.tokens()) == 99


def test_those_that_wait_start_together(checkpoint: Path, model: CausalLM) -> None:
    """Requests that come to an idle model at the same time are one batch, if they are drawn alike."""
    batcher = Batcher(model, ChatTokenizer(checkpoint), frozenset(), max_batch=3, gather_s=60)
    hot = Sampling(temperature=2.0)
    clients = [Client(batcher, max_new_tokens=4 + n, sampling=hot if n == 1 else Sampling(seed=n)) for n in range(3)]
    assert [len(client.tokens()) for client in clients] == [4, 5, 6]
    assert sorted(batcher.batch_sizes) == [1, 2]
    batcher.close()


def test_room_time_and_cancelling(batcher: Batcher) -> None:
    """Too many are refused; what takes too long is given up; what nobody wants makes room."""
    running = []
    for number in range(3):
        running.append(Client(batcher, max_new_tokens=900))
        running[number].next()
    waiting = Client(batcher, time_limit_s=0.5)
    with pytest.raises(BusyError, match="wait already"):
        Client(batcher)
    with pytest.raises(GaveUpError, match=r"within 0\.5 s"):
        waiting.tokens()
    patient = Client(batcher)
    running[1].ticket.cancel()
    assert len(patient.tokens()) == 5
    with pytest.raises(ValueError, match="found 1000000000"):
        Client(batcher, token_ids=[10**9])
    batcher.close()
    with pytest.raises(GaveUpError, match="stops"):
        running[0].tokens()
    with pytest.raises(BusyError, match="about to stop"):
        Client(batcher)


def test_failure_is_told_and_passes(batcher: Batcher, model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the model fails, those concerned hear of it, and the next request is answered."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "logits", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            Client(batcher).tokens()
    assert len(Client(batcher).tokens()) == 5

"""The two requests of OpenAI's HTTP API that continue text, as values: checked on the way in, objects on the way out.

`/v1/chat/completions` and `/v1/completions`, as the reference of the API and the `openai` package have them.  A field that
would change the answer and is not understood is refused, never ignored; `IGNORED` lists those that change nothing here.
Beyond the reference, as other servers have them: `top_k`, `min_p`, `repetition_penalty`, `chat_template_kwargs`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.batching import Piece
    from runtime.tokenizer import ChatTokenizer

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
# What may be given as long as it asks for nothing: its values that do.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}


class ApiError(Exception):
    """A request that is refused: HTTP status, what to do about it, and which field."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> dict[str, Any]:
        """The body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What both kinds of request ask for.  None: the checkpoint's own default.

    `logprobs`: None for none, else of how many most likely tokens besides the one drawn.
    """

    model: str | None
    chat: bool
    prompts: tuple[Any, ...]  # text, token ids, or for chat one list of messages
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


def _integer(low: int, high: int | None = None) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low and (high is None or v <= high)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


# field -> (what it must be, in words, and the test); None is always the same as leaving it out
FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a name", _text),
    "max_tokens": ("an integer above 0", _integer(1)),
    "max_completion_tokens": ("an integer above 0", _integer(1)),
    "n": (f"an integer from 1 to {MAX_CHOICES}", _integer(1, MAX_CHOICES)),
    "stream": ("true or false", lambda v: isinstance(v, bool)),
    "stream_options": ("an object", lambda v: isinstance(v, dict)),
    "stop": ("a string or a list of them", lambda v: _text(v) or (isinstance(v, list) and all(map(_text, v)))),
    "temperature": ("a number", _number),
    "top_p": ("a number", _number),
    "top_k": ("an integer", _integer(-1)),
    "min_p": ("a number", _number),
    "repetition_penalty": ("a number", _number),
    "seed": ("an integer", _integer(-(2**63), 2**63 - 1)),
}
CHAT_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **FIELDS,
    "messages": ("a list of messages", lambda v: isinstance(v, list) and bool(v)),
    "logprobs": ("true or false", lambda v: isinstance(v, bool)),
    "top_logprobs": (f"an integer from 0 to {MAX_TOP_LOGPROBS}", _integer(0, MAX_TOP_LOGPROBS)),
    "chat_template_kwargs": ("an object", lambda v: isinstance(v, dict)),
}
TEXT_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **FIELDS,
    "prompt": ("a string, a list of strings, or token ids", lambda v: _text(v) or isinstance(v, list)),
    "logprobs": (f"an integer from 0 to {MAX_TOP_LOGPROBS}", _integer(0, MAX_TOP_LOGPROBS)),
}


def read_request(data: Any, chat: bool) -> Wanted:
    """A request's body as JSON.  Raises `ApiError`, which names the field."""
    if not isinstance(data, dict):
        raise ApiError("the body: expected a JSON object")
    fields = CHAT_FIELDS if chat else TEXT_FIELDS
    given = {name: value for name, value in data.items() if value is not None}
    for name, value in given.items():
        if name in fields:
            what, good = fields[name]
            if not good(value):
                raise ApiError(f"{name}: expected {what}, found {_shown(value)}", name)
        elif name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise ApiError(f"{name}: this server does not have it; leave it out", name, code="unsupported_parameter")
        elif name not in IGNORED:
            raise ApiError(f"{name}: unknown field; leave it out", name, code="unknown_parameter")
    stop = given.get("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS or "" in stops:
        raise ApiError(f"stop: expected up to {MAX_STOPS} strings, none empty", "stop")
    top_k = given.get("top_k")
    return Wanted(
        model=given.get("model"),
        chat=chat,
        prompts=(_messages(given.get("messages")),) if chat else _prompts(given.get("prompt")),
        max_tokens=given.get("max_completion_tokens", given.get("max_tokens")),
        n=given.get("n", 1),
        stop=stops,
        stream=given.get("stream", False),
        include_usage=bool(given.get("stream_options", {}).get("include_usage")),
        logprobs=_logprobs(given, chat),
        top_k=0 if top_k == -1 else top_k,  # both mean all tokens
        seed=given["seed"] % 2**63 if "seed" in given else None,
        variables=given.get("chat_template_kwargs", {}),
        **{name: given.get(name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")},
    )


def _logprobs(given: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        return given.get("logprobs")
    if given.get("logprobs"):
        return int(given.get("top_logprobs", 0))
    if given.get("top_logprobs"):
        raise ApiError("top_logprobs: needs logprobs: true", "top_logprobs")
    return None


def _prompts(value: Any) -> tuple[Any, ...]:
    if value is None:
        raise ApiError("prompt: expected one, found none", "prompt")
    if isinstance(value, str):
        return (value,)
    is_id = _integer(0)
    if value and all(map(is_id, value)):
        return (value,)
    if value and all(isinstance(one, str) or (isinstance(one, list) and one and all(map(is_id, one))) for one in value):
        return tuple(value)
    raise ApiError("prompt: expected a string, a list of strings, or token ids", "prompt")


def _messages(value: Any) -> list[dict[str, Any]]:
    """Messages with their parts of text joined, as templates expect them."""
    if value is None:
        raise ApiError("messages: expected a list of messages, found none", "messages")
    found = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(f'{where}: expected an object such as {{"role": "user", "content": "..."}}', "messages")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
                raise ApiError(f"{where}: expected parts of text; images and sound are not answered here", "messages")
            message = {**message, "content": "".join(part["text"] for part in content)}
        elif content is not None and not isinstance(content, str):
            raise ApiError(f"{where}: content: expected text, found {_shown(content)}", "messages")
        found.append(message)
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


class Reply:
    """The response to one request, whole or in events.  A choice per prompt and `n`, in this order."""

    def __init__(self, wanted: Wanted, model: str, tokenizer: ChatTokenizer, prompt_tokens: int) -> None:
        self._wanted, self._tokenizer = wanted, tokenizer
        kind = "chatcmpl" if wanted.chat else "cmpl"
        self._base = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        count = len(wanted.prompts) * wanted.n
        self._texts = [""] * count
        self._likelihoods: list[list[Any]] = [[] for _ in range(count)]
        self._reasons: list[str | None] = [None] * count

    def add(self, choice: int, piece: Piece) -> None:
        """A piece of a choice."""
        self._texts[choice] += piece.text
        self._completion_tokens += len(piece.drawn)
        self._reasons[choice] = piece.finish_reason
        if self._wanted.logprobs is not None:
            self._likelihoods[choice] += piece.drawn

    def whole(self) -> dict[str, Any]:
        """The response when every choice is complete."""
        choices = []
        for number, (text, drawn, reason) in enumerate(zip(self._texts, self._likelihoods, self._reasons, strict=True)):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._wanted.chat else {"text": text}
            choices.append({"index": number, **said, "logprobs": self._logprobs(drawn, 0), "finish_reason": reason})
        kind = "chat.completion" if self._wanted.chat else "text_completion"
        return {**self._base, "object": kind, "choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The events before the first text: in a chat, who speaks."""
        if not self._wanted.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._event(number, {"delta": delta}, None, None) for number in range(len(self._texts))]

    def event(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """The event of a piece, after `add`; None where there is nothing to say yet."""
        drawn = piece.drawn if self._wanted.logprobs is not None else ()
        if not piece.text and not drawn and piece.finish_reason is None:
            return None
        delta = {"content": piece.text} if piece.text or drawn else {}
        said = {"delta": delta} if self._wanted.chat else {"text": piece.text}
        before = len(self._texts[choice]) - len(piece.text)
        return self._event(choice, said, self._logprobs(drawn, before), piece.finish_reason)

    def closing(self) -> list[dict[str, Any]]:
        """The events after the last text: what was used, where the request asks for it."""
        if not self._wanted.include_usage:
            return []
        return [{**self._base, "object": self._event_kind, "choices": [], "usage": self._usage()}]

    @property
    def _event_kind(self) -> str:
        return "chat.completion.chunk" if self._wanted.chat else "text_completion"

    def _event(self, choice: int, said: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        one = {"index": choice, **said, "logprobs": logprobs, "finish_reason": reason}
        return {**self._base, "object": self._event_kind, "choices": [one]}

    def _usage(self) -> dict[str, int]:
        used = {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._completion_tokens}
        return {**used, "total_tokens": sum(used.values())}

    def _logprobs(self, drawn: Sequence[Any], offset: int) -> dict[str, Any] | None:
        if self._wanted.logprobs is None or not drawn:
            return None
        if self._wanted.chat:
            content = [
                {**self._likelihood(one.token, one.logprob), "top_logprobs": [self._likelihood(*other) for other in one.top]}
                for one in drawn
            ]
            return {"content": content, "refusal": None}
        texts = [self._tokenizer.token_text(one.token) for one in drawn]
        offsets = [offset + sum(map(len, texts[:number])) for number in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in drawn],
            "top_logprobs": [{self._tokenizer.token_text(token): value for token, value in one.top} for one in drawn],
            "text_offset": offsets,
        }

    def _likelihood(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._tokenizer.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace"))}

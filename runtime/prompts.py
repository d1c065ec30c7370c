"""Reads prompts, from the command line's options or from files: text, conversations or token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError, LoadError

if TYPE_CHECKING:
    from runtime.tokenizer import ChatTokenizer

KINDS = ("prompt", "messages", "prompt_ids")
FIELDS = (*KINDS, "id", "max_new_tokens", "stop")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One thing to answer.

    `where`: what error messages name.  `content`: text, a conversation (objects with `role`), or token ids.
    `id`: any JSON value, given back with the answer.  `max_new_tokens`, `stop`: None leaves them to the command.
    """

    where: str
    content: str | list[dict[str, Any]] | list[int]
    id: Any = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] | None = None

    @property
    def needs_tokenizer(self) -> bool:
        """Whether this is not in token ids already."""
        return isinstance(self.content, str) or isinstance(self.content[0], dict)


@dataclass(frozen=True, slots=True)
class Chat:
    """How prompts become conversations.  `plain`: prompts of text are a user's messages, after `system`, if there is one."""

    plain: bool = False
    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


def encode(prompt: Prompt, tokenizer: ChatTokenizer | None, chat: Chat) -> list[int]:
    """The ids of a prompt.  Raises `InputError` where there are none, `LoadError` where the chat template refuses it."""
    content = prompt.content
    if tokenizer is None or not prompt.needs_tokenizer:
        return list(content)  # type: ignore[arg-type]
    try:
        if isinstance(content, str) and not chat.plain:
            ids = tokenizer.encode(content)
        elif isinstance(content, str):
            system = [{"role": "system", "content": chat.system}] if chat.system is not None else []
            ids = tokenizer.encode_chat([*system, {"role": "user", "content": content}], chat.variables)
        else:
            ids = tokenizer.encode_chat(content, chat.variables)  # type: ignore[arg-type]
    except LoadError as error:
        raise LoadError(f"{prompt.where}: {error}") from None
    except ValueError as error:
        raise InputError(f"{prompt.where}: {error}") from None
    if not ids:
        raise InputError(f"{prompt.where}: expected a prompt of at least one token; the tokenizer gives none for this text")
    return ids


def read_prompts(lines: Iterable[str], name: str) -> list[Prompt]:
    """One prompt per JSON line, which has one of `prompt`, `messages`, `prompt_ids`, and perhaps more of `FIELDS`.

    Empty lines are passed over.  Raises `InputError`, which names the file and the line, for anything else.
    """
    prompts = [_read_line(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InputError(f"{name}: expected at least one line with a prompt, found none")
    return prompts


def read_messages(text: str, name: str) -> Prompt:
    """A conversation: a JSON list of objects with `role` and `content`.  Raises `InputError` for anything else."""
    return Prompt(name, _messages(_json(text, name), name))


def _read_line(line: str, where: str) -> Prompt:
    data = _json(line, where)
    if not isinstance(data, dict):
        raise _wrong(where, "a JSON object", data)
    unknown = sorted(data.keys() - set(FIELDS))
    if unknown:
        raise InputError(f"{where}: expected the fields {', '.join(FIELDS)}, found {unknown[0]!r} too")
    kinds = [kind for kind in KINDS if kind in data]
    if len(kinds) != 1:
        raise InputError(f"{where}: expected one of {', '.join(KINDS)}, found {' and '.join(kinds) or 'none'}")
    content = data[kinds[0]]
    if kinds[0] == "messages":
        _messages(content, where)
    elif kinds[0] == "prompt" and (not isinstance(content, str) or not content):
        raise _wrong(f"{where}: prompt", "text that is not empty", content)
    elif kinds[0] == "prompt_ids" and not (isinstance(content, list) and content and all(map(_is_integer, content))):
        raise _wrong(f"{where}: prompt_ids", "a list of token ids", content)
    limit, stop = data.get("max_new_tokens"), data.get("stop")
    if limit is not None and (not _is_integer(limit) or limit < 1):
        raise _wrong(f"{where}: max_new_tokens", "an integer above 0", limit)
    stops = [stop] if isinstance(stop, str) else stop
    if stops is not None and not (isinstance(stops, list) and all(isinstance(text, str) and text for text in stops)):
        raise _wrong(f"{where}: stop", "text or a list of texts, none empty", stop)
    return Prompt(where, content, data.get("id"), limit, None if stops is None else tuple(stops))


def _messages(data: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(data, list) or not data:
        raise _wrong(where, "a list of messages", data)
    for message in data:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _wrong(where, 'messages such as {"role": "user", "content": "..."}', message)
    return data


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected JSON, found {error}") from None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(where: str, expected: str, found: Any) -> InputError:
    text = repr(found)
    return InputError(f"{where}: expected {expected}, found {text if len(text) < 60 else text[:57] + '...'}")

"""Text to token ids and back, with the tokenizer files of a checkpoint directory: `tokenizers` and Jinja alone."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import LoadError


class ChatTokenizer:
    """The tokenizer of a checkpoint directory.

    Raises `LoadError` when `tokenizer.json` is absent or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        from tokenizers import Tokenizer

        self._directory = Path(directory)
        file = self._directory / "tokenizer.json"
        if not file.is_file():
            raise LoadError(f"{file}: expected a tokenizer, found none; copy it there, or pass token ids")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise LoadError(f"{file}: expected a tokenizer, found {error}; copy the file again") from None
        self._config = _read_object(self._directory / "tokenizer_config.json")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the special tokens that the tokenizer's post-processor adds."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation, up to where the assistant's answer starts.

        `messages`: objects with `role` and `content`.  Raises `LoadError` when there is no chat template, or when it
        refuses the messages.
        """
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        # The environment that templates are written for: transformers 5.23 `chat_template_utils.py`.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        special = {name: _text_of(self._config.get(name)) for name in self._config if name.endswith("_token")}
        try:
            template = environment.from_string(self._chat_template())
            text = template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                **{name: text for name, text in special.items() if text is not None},
            )
        except (TemplateError, TypeError, ValueError) as error:
            if isinstance(error, LoadError):
                raise
            raise LoadError(
                f"{self._directory}: expected the chat template to accept the messages, found {error}; use a plain prompt"
            ) from None
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def eos_ids(self, declared: int | Sequence[int] | None) -> frozenset[int]:
        """Every id that ends a text.

        `declared`: `eos_token_id` of the architecture.  To it come those of `generation_config.json` and the
        `eos_token` of `tokenizer_config.json`: a base model's config often lacks the token that ends a chat turn.
        """
        return declared_eos_ids(self._directory, declared) | {
            token
            for text in [_text_of(self._config.get("eos_token"))]
            if text is not None and (token := self._tokenizer.token_to_id(text)) is not None
        }

    def _chat_template(self) -> str:
        file = self._directory / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if not isinstance(template, str):
            raise LoadError(
                f"{self._directory}: expected chat_template.jinja, or a chat_template in tokenizer_config.json, found "
                "none; use a plain prompt"
            )
        return template


def declared_eos_ids(directory: str | Path, declared: int | Sequence[int] | None) -> frozenset[int]:
    """The end-of-text ids that configs name: `declared` (the architecture's) and those of `generation_config.json`."""
    found: set[int] = set()
    for value in (declared, _read_object(Path(directory) / "generation_config.json").get("eos_token_id")):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(value)
    return frozenset(found)


class TextStream:
    """Turns ids into text piece by piece, never within a character.

    Each step decodes only the ids since the last piece, and those of the last piece before them, because what a
    tokenizer writes for an id can depend on the one before (a leading space).
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # where decoding starts
        self._shown = 0  # ids before this are out

    def push(self, token: int) -> str:
        """Add one id; return the text that is now certain, perhaps empty."""
        self._ids.append(token)
        text = self._pending()
        if text.endswith("\ufffd"):  # the middle of a character
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """The text that never became certain."""
        return self._pending()

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]


def _text_of(token: Any) -> str | None:
    """A special token of `tokenizer_config.json`: a string, or an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{file}: expected JSON in UTF-8, found {error}; copy the file again") from None
    if not isinstance(data, dict):
        raise LoadError(f"{file}: expected a JSON object, found {type(data).__name__}; copy the file again")
    return data


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which templates of language models do not expect."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)

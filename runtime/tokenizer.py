"""Text to token ids and back, with the tokenizer files of a checkpoint directory: `tokenizers` and Jinja alone."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from runtime.errors import LoadError
from runtime.generation_config import declared_eos_ids, read_object

LONGEST_CHARACTER = 8  # ids; a character is at most four bytes, and a tokenizer may add an id or two of its own


class ChatTokenizer:
    """The tokenizer of a checkpoint directory.

    Raises `LoadError` when `tokenizer.json` is absent or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        from tokenizers import Tokenizer

        self.directory = Path(directory)
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise LoadError(f"{file}: expected a tokenizer, found none; copy it there, or pass token ids")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise LoadError(f"{file}: expected a tokenizer, found {error}; copy the file again") from None
        self._config = read_object(self.directory / "tokenizer_config.json")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of `text`.  `special`: with the special tokens that the tokenizer's post-processor adds.

        Raises `ValueError` for text that is no Unicode: lone surrogates, from bytes that are no UTF-8.
        """
        return list(self._encoding(text, special).ids)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of `text`, and the index in `text` behind each of them; ids within one character share the same.

        Raises `ValueError` as `encode`.
        """
        encoding = self._encoding(text, True)
        ends = [end for _, end in encoding.offsets]
        return list(encoding.ids), list(accumulate(ends, max))  # special tokens that were added are at 0

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """What one id stands for, special tokens by their names; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written `text`, or None."""
        added = self._tokenizer.get_added_tokens_decoder()
        return next((token for token, entry in added.items() if entry.special and entry.content == text), None)

    def named_id(self, name: str) -> int | None:
        """The id of a special token by its name in `tokenizer_config.json`, such as `eos_token`, or None."""
        text = _text_of(self._config.get(name))
        return None if text is None else self._tokenizer.token_to_id(text)

    def vocabulary(self) -> dict[str, int]:
        """Every token with its id."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """A conversation as the checkpoint's chat template writes it, up to where the assistant's answer starts.

        `messages`: objects with `role` and `content`.  `variables`: what else the template may ask for, such as
        `enable_thinking`.  Raises `LoadError` when there is no chat template, or when it refuses the messages.
        """
        special = {name: _text_of(self._config.get(name)) for name in self._config if name.endswith("_token")}
        given = {name: text for name, text in special.items() if text is not None} | dict(variables or {})
        given |= {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        try:
            template = _template_environment().from_string(self.chat_template())
            return str(template.render(**({"tools": None, "documents": None} | given)))
        except LoadError:
            raise
        except Exception as error:  # the template is a program of the checkpoint: it may fail in any way
            raise LoadError(
                f"{self.directory}: expected the chat template to accept the messages, found {error}; use a plain prompt"
            ) from None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> list[int]:
        """Ids of what `render_chat` writes.  Raises `LoadError` as it does, `ValueError` as `encode`."""
        return self.encode(self.render_chat(messages, variables), special=False)

    def eos_ids(self, declared: int | Sequence[int] | None) -> frozenset[int]:
        """Every id that ends a text.

        `declared`: `eos_token_id` of the architecture.  To it come those of `generation_config.json` and the
        `eos_token` of `tokenizer_config.json`: a base model's config often lacks the token that ends a chat turn.
        """
        own = self.named_id("eos_token")
        return declared_eos_ids(self.directory, declared) | ({own} if own is not None else frozenset())

    def chat_template(self) -> str:
        """The Jinja template of the checkpoint.  Raises `LoadError` when there is none."""
        file = self.directory / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if not isinstance(template, str):
            raise LoadError(
                f"{self.directory}: expected chat_template.jinja, or a chat_template in tokenizer_config.json, found "
                "none; use a plain prompt"
            )
        return template

    def _encoding(self, text: str, special: bool) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("expected text in UTF-8, found bytes or escapes that are none") from None
        return self._tokenizer.encode(text, add_special_tokens=special)


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
        # The middle of a character, unless it has gone on for longer than any character.
        if text.endswith("\ufffd") and len(self._ids) - self._shown < LONGEST_CHARACTER:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """The text that never became certain."""
        return self._pending()

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]


def _template_environment() -> Any:
    """What templates are written for: transformers 5.23 `chat_template_utils.py`."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant wrote, for training; here its content is all that matters."""

        tags = {"generation"}  # noqa: RUF012 (as the base class has it)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _text_of(token: Any) -> str | None:
    """A special token of `tokenizer_config.json`: a string, or an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which templates of language models do not expect."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)

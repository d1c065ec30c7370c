"""Turns the tokens of one sequence into text, and knows when it is over.

Whoever makes the tokens: a batch, one sequence, a draft that is checked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.decode import Decoding, Drawn
    from runtime.tokenizer import ChatTokenizer


class Answer:
    """What a sequence has become so far.

    `tokenizer`: None shows ids instead of text.  `eos_ids`: ids that end the answer, which is without their text.
    `stop`: strings that end it; neither they nor what follows is part of the text.  A string that is the name of a
    special token stands for that token.

    `token_ids` and `drawn` hold every token, those of the ending too.
    """

    def __init__(self, tokenizer: ChatTokenizer | None, eos_ids: Collection[int] = (), stop: Sequence[str] = ()) -> None:
        from runtime.tokenizer import TextStream

        special = {text: tokenizer.special_id(text) if tokenizer else None for text in stop}
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids) | {token for token in special.values() if token is not None}
        self._characters = TextStream(tokenizer) if tokenizer else None
        self._stops = StopStream([text for text, token in special.items() if token is None])
        self._closed = False
        self.drawn: list[Drawn] = []
        self.text = ""
        self.finish_reason = "length"

    @property
    def ended(self) -> bool:
        """Whether an end token or a stop string came; there is nothing more to push."""
        return self.finish_reason == "stop"

    @property
    def token_ids(self) -> list[int]:
        """The ids so far."""
        return [drawn.token for drawn in self.drawn]

    def push(self, drawn: Drawn) -> str:
        """Add a token; return the text that is now certain, perhaps empty."""
        self.drawn.append(drawn)
        if drawn.token in self._eos_ids:
            self.finish_reason = "stop"
            return "" if self._characters else self._show(f"{drawn.token} ")
        return self._show(self._characters.push(drawn.token) if self._characters else f"{drawn.token} ")

    def finish(self) -> str:
        """No more tokens come; return the rest of the text."""
        if self._closed:
            return ""
        self._closed = True
        rest = self._show(self._characters.finish()) if self._characters and not self._stops.found else ""
        held = self._stops.finish()
        self.text += held
        return rest + held

    def follow(self, tokens: Iterable[Drawn]) -> Iterator[str]:
        """Push tokens until they or the answer end; yields every piece of text, and last what `finish` gives."""
        for drawn in tokens:
            yield self.push(drawn)
            if self.ended:
                break
        yield self.finish()

    def as_json(self, logprobs: bool = False) -> dict[str, Any]:
        """`text` (None without a tokenizer), `token_ids`, `finish_reason`, and perhaps `logprobs`, one object per token."""
        data: dict[str, Any] = {
            "text": self.text if self._tokenizer else None,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
        }
        if logprobs:
            data["logprobs"] = [
                self._likelihood(drawn.token, drawn.logprob) | {"top": [self._likelihood(*other) for other in drawn.top]}
                for drawn in self.drawn
            ]
        return data

    def _show(self, text: str) -> str:
        certain = self._stops.push(text)
        if self._stops.found:
            self.finish_reason = "stop"
        self.text += certain
        return certain

    def _likelihood(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._tokenizer.token_text(token) if self._tokenizer else None
        return {"token_id": token, "text": text, "logprob": logprob}


def answer_together(decoding: Decoding, answers: Sequence[Answer]) -> None:
    """Push what a batch draws to the answers of its sequences; a sequence goes on until its answer has ended."""
    for step in decoding:
        for row, drawn in enumerate(step):
            if drawn:
                answers[row].push(drawn)
                if answers[row].ended:
                    decoding.end(row)
    for answer in answers:
        answer.finish()


class StopStream:
    """Lets text through up to the first stop string to be complete, of several the longest.

    What may be the beginning of one is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; return what is now certain, perhaps empty."""
        held = self._held + text
        ends = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            end, length, self.found = min(ends)
            self._held = ""
            return held[: end + length]
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        tails = (held[-n:] for n in range(min(longest, len(held)), 0, -1))
        self._held = next((tail for tail in tails if any(stop.startswith(tail) for stop in self._stops)), "")
        return held.removesuffix(self._held)

    def finish(self) -> str:
        """What was held back: it began no stop string."""
        held, self._held = self._held, ""
        return held

"""Answers the requests of an evaluation harness: how likely texts are, and what a model writes.

The meaning of the requests is that of lm-evaluation-harness 0.4; `runtime.lm_eval` hands them over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from runtime.answer import Answer, answer_together
from runtime.decode import Decoding
from runtime.loader import load_model
from runtime.sampling import Sampling
from runtime.scoring import Continuation, rolling_pairs, score_continuations
from runtime.tokenizer import ChatTokenizer

DEFAULT_LENGTH = 2048  # of what is seen, for a model without a limit
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given holds
IGNORED = ("do_sample", "temperature", "until", *LENGTHS)

Done = Callable[[int], object]


def _nothing(count: int) -> None:
    """Nobody watches."""


class Harness:
    """A canonical checkpoint that answers requests in batches of like length.

    `max_length`: tokens that the model sees at once; by default all its positions.  Raises `LoadError` and `FormatError`
    for the checkpoint, `ValueError` for other arguments.
    """

    def __init__(
        self,
        out_dir: str | Path,
        device: str = "cpu",
        activations: str = "quantized",
        batch_size: int = 1,
        max_length: int | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, found {batch_size}")
        self.tokenizer = ChatTokenizer(out_dir)
        self.model = load_model(out_dir, device=device, activations=activations)
        positions = self.model.architecture.max_position_embeddings
        self.max_length = max_length or positions or DEFAULT_LENGTH
        if self.max_length < 2 or (positions is not None and self.max_length > positions):
            raise ValueError(f"max_length: expected 2 to {positions}, the positions of the model, found {self.max_length}")
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.eos_ids = self.tokenizer.eos_ids(self.model.architecture.eos_token_id)
        end = self.tokenizer.named_id("eos_token")
        self.eos_id = end if end is not None else min(self.eos_ids, default=0)
        begin = self.tokenizer.named_id("bos_token")
        self.prefix_id = begin if begin is not None else self.eos_id

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], done: Done = _nothing) -> list[Continuation]:
        """How likely the second part of each pair is after the first, in tokens.  `done` is told how many are finished.

        Raises `ValueError` where a second part is longer than `max_length`.
        """
        for _, rest in pairs:
            if len(rest) > self.max_length:
                raise ValueError(f"continuation: expected at most {self.max_length} tokens, found {len(rest)}")
        found: dict[int, Continuation] = {}
        for rows in _batches([len(context) + len(rest) for context, rest in pairs], self.batch_size):
            scores = score_continuations(self.model, [pairs[row] for row in rows], self.max_length)
            found.update(zip(rows, scores, strict=True))
            done(len(rows))
        return [found[row] for row in range(len(pairs))]

    def score_texts(self, texts: Sequence[str], done: Done = _nothing) -> list[float]:
        """The log-probability of each whole text, after the token that begins one; long texts in parts."""
        parts = [rolling_pairs(self.tokenizer.encode(text, special=False), self.prefix_id, self.max_length) for text in texts]
        scores = iter(self.score([pair for pairs in parts for pair in pairs], done))
        return [sum(next(scores).logprob for _ in pairs) for pairs in parts]

    def write(self, requests: Sequence[tuple[str, Mapping[str, Any]]], done: Done = _nothing) -> list[str]:
        """What the model writes after each text.

        Each request has its own options: `until`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
        `repetition_penalty`, `seed`, and one of `LENGTHS`; without `do_sample` and `temperature` it takes the most likely
        tokens.  A text that is too long loses its beginning.  Raises `ValueError` for other options.
        """
        options = [read_options(given, self.max_new_tokens) for _, given in requests]
        limits = [min(limit, self.max_length - 1) for _, limit, _ in options]
        ids = [
            (self.tokenizer.encode(text) or [self.prefix_id])[-(self.max_length - limit) :]
            for (text, _), limit in zip(requests, limits, strict=True)
        ]
        found: dict[int, str] = {}
        for sampling in dict.fromkeys(sampling for _, _, sampling in options):
            same = [row for row, (_, _, own) in enumerate(options) if own == sampling]
            for batch in _batches([len(ids[row]) for row in same], self.batch_size):
                rows = [same[at] for at in batch]
                answers = [Answer(self.tokenizer, self.eos_ids, options[row][0]) for row in rows]
                prompts = [torch.tensor(ids[row]) for row in rows]
                answer_together(Decoding(self.model, prompts, sampling, [limits[row] for row in rows], self.eos_ids), answers)
                found.update((row, answer.text) for row, answer in zip(rows, answers, strict=True))
                done(len(rows))
        return [found[row] for row in range(len(requests))]

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as the checkpoint's template writes it.

        Without the generation prompt it ends with the text of the last message, for the model to continue.
        """
        text = self.tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt or not messages:
            return text
        last = str(messages[-1]["content"]).rstrip()
        return text[: text.rindex(last) + len(last)] if last in text else text


def read_options(given: Mapping[str, Any], max_new_tokens: int) -> tuple[tuple[str, ...], int, Sampling]:
    """Stop strings, most tokens, and how to draw, from the options of a request.  Raises `ValueError` for others."""
    until = given.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    limit = next((given[name] for name in LENGTHS if given.get(name) is not None), max_new_tokens)
    values = {name: value for name, value in given.items() if name not in IGNORED and value is not None}
    unknown = sorted(values.keys() - {"top_k", "top_p", "min_p", "repetition_penalty", "seed"})
    if unknown:
        raise ValueError(f"generation options: expected none called {unknown[0]!r}, found {given[unknown[0]]!r}")
    temperature = given.get("temperature")
    if given.get("do_sample") is False or (temperature is None and not given.get("do_sample")):
        temperature = 0.0
    return tuple(text for text in stops if text), int(limit), Sampling(1.0 if temperature is None else temperature, **values)


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first: where memory does not suffice, that shows at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    yield from (order[at : at + size] for at in range(0, len(order), size))

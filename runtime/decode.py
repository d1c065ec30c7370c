"""The generation loop: prefill, then one token at a time."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.models.base import CausalLM
from runtime.sampling import Picked, Sampling, with_likelihoods
from runtime.state import State
from runtime.steps import give_back, kind_of, take

PREFILL_TOKENS = 2048  # tokens of all sequences that go through the model in one call


class Drawn(NamedTuple):
    """A token and, when asked for, its log-probability and the most likely ones at its place, best first.

    Natural logarithms, of the model's own distribution: before penalty, temperature and filters.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def generate_tokens(
    model: CausalLM,
    input_ids: Tensor | Sequence[Tensor],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    eos_ids: Collection[int] = (),
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Iterator[int | tuple[int, ...]]:
    """Continue `input_ids` and yield token ids as they come.

    `input_ids`: int64 `[T]` or `[B, T]`, or a list of int64 `[T]` of any lengths.  For one sequence yields `int`s and
    stops after one of `eos_ids`, which is yielded too.  For B > 1 yields tuples of B ids and stops when every sequence
    has ended; one that has ended repeats its last id.  A sequence ends in any case after `max_new_tokens`, or when the
    model's `max_position_embeddings` are used up.

    The other arguments are those of `Sampling`.  Sequence b is drawn with `seed + b`, whatever else is in the batch.

    Raises `ValueError`, before anything is computed, for arguments out of range and for ids outside the vocabulary.
    Memory: the activations of `PREFILL_TOKENS` tokens, and a state of B * (longest T + max_new_tokens) tokens.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    prompts = [input_ids] if isinstance(input_ids, Tensor) and input_ids.ndim < 2 else list(input_ids)
    return _repeating(Decoding(model, prompts, sampling, max_new_tokens, eos_ids))


def _repeating(decoding: Decoding) -> Iterator[int | tuple[int, ...]]:
    last: list[int] = []
    for step in decoding:
        last = [drawn.token if drawn else last[row] for row, drawn in enumerate(step)]
        yield last[0] if len(last) == 1 else tuple(last)


class Decoding:
    """Sequences that are continued together.  Iterating yields one `Drawn` per sequence, None for one that has ended.

    `prompts`: int64 `[T]` each, of any lengths.  `max_new_tokens`: for all, or one per sequence.  `eos_ids`: a sequence
    ends after one of these.  `seeds`: one per sequence; by default `sampling.seeds`.  `logprobs`: None for none, 0 for
    those of the tokens drawn, n for the n most likely ones too.  `fixed`: draw by `runtime.steps`, which costs nothing but
    the model on a GPU and more than the other way on a CPU; None: on CUDA.  Both ways draw the same tokens.

    Raises `ValueError` for arguments out of range.  The state is allocated once, when iteration starts.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        max_new_tokens: int | Sequence[int] = 128,
        eos_ids: Collection[int] = (),
        seeds: Sequence[int | None] | None = None,
        logprobs: int | None = None,
        fixed: bool | None = None,
    ) -> None:
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        architecture = model.architecture
        if not prompts:
            raise ValueError("input_ids: expected at least one sequence, found none")
        for prompt, limit in zip(prompts, limits, strict=True):
            if prompt.ndim != 1 or prompt.dtype != torch.int64:
                raise ValueError(f"input_ids: expected int64 [T] per sequence, found {prompt.dtype} {list(prompt.shape)}")
            check_prompt(prompt.tolist(), architecture.vocab_size, architecture.max_position_embeddings)
            if limit < 0:
                raise ValueError(f"max_new_tokens: expected 0 or more, found {limit}")
        positions = architecture.max_position_embeddings or sys.maxsize
        self.model = model
        self.sampling = sampling
        self.prompts = prompts
        self.logprobs = logprobs
        self._eos_ids = frozenset(eos_ids)
        self.chances = [random.Random(seed) for seed in seeds or sampling.seeds(len(prompts))]
        self._left = [min(limit, positions - len(prompt)) for prompt, limit in zip(prompts, limits, strict=True)]
        self.longest = max(len(prompt) + left for prompt, left in zip(prompts, self._left, strict=True))
        self._fixed = model.device.type == "cuda" if fixed is None else fixed
        self._source: _Eager | _Fixed | None = None

    def end(self, row: int) -> None:
        """Sequence `row` is not continued any further."""
        self._left[row] = 0

    def __iter__(self) -> Iterator[tuple[Drawn | None, ...]]:
        return self

    def __next__(self) -> tuple[Drawn | None, ...]:
        running = [left > 0 for left in self._left]
        if not any(running):
            if isinstance(self._source, _Fixed):
                give_back(self._source.steps)
            raise StopIteration
        if self._source is None:
            seen = self._tokens_of_prompts() if self.sampling.penalizes else None
            self._source = (_Fixed if self._fixed else _Eager)(self, seen)
        drawn = self._source.draw(self, self._left)
        for row, one in enumerate(drawn):
            self._left[row] = max(self._left[row] - 1, 0) if one.token not in self._eos_ids else 0
        return tuple(one if alive else None for one, alive in zip(drawn, running, strict=True))

    def _tokens_of_prompts(self) -> Tensor:
        seen = torch.zeros(len(self.prompts), self.model.architecture.vocab_size, dtype=torch.bool, device=self.model.device)
        for row, prompt in enumerate(self.prompts):
            seen[row, prompt.to(seen.device)] = True
        return seen


class _Eager:
    """Each step by itself: what it depends on is known before it starts."""

    def __init__(self, decoding: Decoding, seen: Tensor | None) -> None:
        self._seen = seen  # (B, V)
        self._state: State | None = None
        self._last = [0] * len(decoding.prompts)

    def draw(self, of: Decoding, left: Sequence[int]) -> list[Drawn]:
        """The next token of each sequence.  `left`: how many each may still get."""
        if self._state is None:
            self._state = of.model.new_state(len(left), of.longest)
            logits = of.model.logits(prefill(of.model, of.prompts, self._state))
        else:
            counts = [min(more, 1) for more in left]
            logits = of.model(torch.tensor(self._last).unsqueeze(1), self._state, counts=counts)[:, 0]
        tokens = of.sampling.choose(logits, of.chances, self._seen)
        self._last = [token if more else 0 for token, more in zip(tokens, left, strict=True)]
        if self._seen is not None:
            self._seen[torch.arange(len(tokens)), self._last] = True
        return with_logprobs(self._last, logits, of.logprobs)


class _Fixed:
    """By `Steps`: while results of a step are read, the next one runs."""

    def __init__(self, decoding: Decoding, seen: Tensor | None) -> None:
        self._seen = seen
        self._begun = False
        kind = kind_of(len(decoding.prompts), decoding.sampling, decoding.logprobs)
        self.steps = take(decoding.model, kind, decoding.longest, self)

    def draw(self, of: Decoding, left: Sequence[int]) -> list[Drawn]:
        """The next token of each sequence.  `left`: how many each may still get."""
        steps = self.steps
        if not self._begun:
            self._begun = True
            steps.begin(left, of.chances, self._seen)
            prompts = steps.state.first(len(left))
            steps.choose(of.model.logits(prefill(of.model, of.prompts, prompts)), prompts.lengths)
        elif steps.ahead == 0:
            steps.start()
        if steps.ready and any(more > 1 for more in left):  # the first tokens do not wait for a graph to be recorded
            steps.start()
        return drawn_of(steps.receive())[: len(left)]


def check_prompt(ids: Sequence[int], vocabulary: int, positions: int | None) -> None:
    """Raise `ValueError` unless there are ids, all below `vocabulary`, and room for one more among `positions`."""
    if not ids:
        raise ValueError("input_ids: expected at least one token per sequence, found none")
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ValueError(f"input_ids: expected ids from 0 to {vocabulary - 1}, found {wrong}")
    if positions is not None and len(ids) >= positions:
        raise ValueError(f"input_ids: expected fewer than {positions} tokens, found {len(ids)}")


def prefill(model: CausalLM, prompts: Sequence[Tensor], state: State) -> Tensor:
    """Take prompts, int64 `[T]` each, into an empty state, piece by piece.

    Returns what the last layer makes of each prompt's last token, `[B, H]` in the compute dtype.
    """
    last: dict[int, Tensor] = {}
    ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    columns = max(1, PREFILL_TOKENS // len(prompts))
    for start in range(0, ids.shape[1], columns):
        piece = ids[:, start : start + columns]
        counts = [min(max(len(prompt) - start, 0), piece.shape[1]) for prompt in prompts]
        hidden = model.hidden(piece, state, counts)
        for row, prompt in enumerate(prompts):
            if start < len(prompt) <= start + columns:
                last[row] = hidden[row, len(prompt) - start - 1]
    return torch.stack([last[row] for row in range(len(prompts))])


def with_logprobs(tokens: Sequence[int], logits: Tensor, count: int | None) -> list[Drawn]:
    """`tokens` with their log-probabilities and those of the `count` most likely ones, or with nothing for None.

    `logits`: float32, one row `[V]` for each token.
    """
    return drawn_of(with_likelihoods(torch.tensor(tokens, device=logits.device), logits, count))


def drawn_of(picked: Picked) -> list[Drawn]:
    """One `Drawn` per row."""
    tokens = picked.tokens.tolist()
    if picked.logprobs is None or picked.top_ids is None or picked.top_logprobs is None:
        return [Drawn(token) for token in tokens]
    tops = [
        tuple(zip(*row, strict=True)) for row in zip(picked.top_ids.tolist(), picked.top_logprobs.tolist(), strict=True)
    ]
    return [Drawn(*row) for row in zip(tokens, picked.logprobs.tolist(), tops, strict=True)]

"""Speculative decoding with the checkpoint's own draft heads (MTP): several tokens per call of the trunk, losslessly.

The heads guess the next tokens; the trunk then sees all guesses in one call and keeps those that it would have drawn
itself.  Greedy text is the same as without, sampled text has the same distribution (rejection sampling).
Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192).

H hidden size, V vocabulary.  One sequence; `ahead` guesses per call.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.decode import PREFILL_TOKENS, Drawn, check_prompt, with_logprobs
from runtime.models.base import CausalLM
from runtime.sampling import Sampling, draw
from runtime.state import CacheSize, State

# Float32 logits [V] and the tokens before -> the probabilities [V] that the next token is drawn with.
Distribution = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass
class Counts:
    """How speculation went: guesses made, and guesses kept."""

    guessed: int = 0
    kept: int = 0


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that a draft head guessed, and the probabilities `[V]` that it was drawn from."""

    token: int
    probabilities: Tensor


def speculate(
    model: CausalLM,
    prompt: Tensor,
    sampling: Sampling,
    max_new_tokens: int,
    ahead: int,
    eos_ids: Collection[int] = (),
    logprobs: int | None = None,
    counts: Counts | None = None,
) -> Iterator[Drawn]:
    """Continue one prompt, int64 `[T]`, and yield tokens as they come, the last perhaps one of `eos_ids`.

    `model`: loaded with `drafts=True`.  `ahead`: guesses per call, at most one per draft head; a single head is run again on
    its own output.  `logprobs`: as for `Decoding`.  `counts`: filled in as it goes.
    Raises `ValueError`, before anything is computed, when `model` has no draft heads, or not so many, and for a prompt that is
    empty, too long, or has ids outside the vocabulary.
    """
    check_ahead(model, ahead)
    positions = model.architecture.max_position_embeddings
    check_prompt(prompt.tolist(), model.architecture.vocab_size, positions)
    count = min(max_new_tokens, (positions or sys.maxsize) - len(prompt))
    return _speculate(model, prompt, sampling, count, ahead, eos_ids, logprobs, counts or Counts())


def check_ahead(model: CausalLM, ahead: int) -> None:
    """Raise `ValueError` unless the draft heads of `model` can make `ahead` guesses."""
    if not model.drafts:
        raise ValueError("model: expected draft heads, found none; load it with drafts=True")
    if ahead < 1 or 1 < len(model.drafts) < ahead:
        most = "or more" if len(model.drafts) == 1 else f"to {len(model.drafts)}, the number of draft heads"
        raise ValueError(f"guesses: expected 1 {most}, found {ahead}")


def _speculate(
    model: CausalLM,
    prompt: Tensor,
    sampling: Sampling,
    max_new_tokens: int,
    ahead: int,
    eos_ids: Collection[int],
    logprobs: int | None,
    counts: Counts,
) -> Iterator[Drawn]:
    if max_new_tokens < 1:
        return
    tokens: list[int] = prompt.tolist()
    last = len(tokens) + max_new_tokens
    chance, distribution = random.Random(sampling.seed), distribution_of(sampling)
    state, guesser = model.new_state(1, last, ahead), Guesser(model, last, ahead)
    for start in range(0, len(tokens), PREFILL_TOKENS):
        hidden = model.hidden(prompt[None, start : start + PREFILL_TOKENS], state)
        guesser.follow(hidden)
    logits = model.logits(hidden[0, -1:])
    new = verify(logits, tokens, (), distribution, chance)
    while True:
        for drawn in with_logprobs(new, logits[: len(new)], logprobs):
            tokens.append(drawn.token)
            yield drawn
            if drawn.token in eos_ids or len(tokens) == last:
                return
        guesses = guesser.guess(tokens, min(ahead, last - len(tokens) - 1), distribution, chance)
        hidden = model.hidden(torch.tensor([[tokens[-1], *(guess.token for guess in guesses)]]), state)
        logits = model.logits(hidden[0])
        new = verify(logits, tokens, guesses, distribution, chance)
        state.keep([1 + len(guesses)], [len(new)])
        guesser.follow(hidden[:, : len(new)])
        counts.guessed += len(guesses)
        counts.kept += len(new) - 1


def distribution_of(sampling: Sampling) -> Distribution:
    """What a token is drawn from: at temperature 0 certainly the most likely one."""

    def distribution(logits: Tensor, tokens: Sequence[int]) -> Tensor:
        seen = None
        if sampling.penalizes:
            seen = torch.zeros(1, logits.shape[-1], dtype=torch.bool, device=logits.device)
            seen[0, list(tokens)] = True
        if sampling.temperature == 0:
            best = sampling.choose(logits.unsqueeze(0), (), seen)[0]
            return torch.zeros_like(logits).index_fill_(0, torch.tensor([best], device=logits.device), 1.0)
        return sampling.probabilities(logits.unsqueeze(0), seen)[0]

    return distribution


def verify(
    logits: Tensor, tokens: Sequence[int], guesses: Sequence[Guess], distribution: Distribution, chance: random.Random
) -> list[int]:
    """The tokens that come next: the guesses up to the first that is refused, and one drawn by the trunk.

    `logits`: the trunk's, float32 `[len(guesses) + 1, V]`, before the first guess and after each.  A guess drawn with
    probability q that the trunk gives p is kept with probability min(1, p / q), else replaced by a draw from
    max(p - q, 0): together that is a draw from p.
    """
    new: list[int] = []
    for guess, row in zip(guesses, logits, strict=False):
        p, q = distribution(row, [*tokens, *new]), guess.probabilities
        if chance.random() * float(q[guess.token]) >= float(p[guess.token]):
            rest = (p - q).clamp(min=0)
            return [*new, _draw(rest if rest.any() else p, chance)]  # nothing left: p and q differ by rounding only
        new.append(guess.token)
    return [*new, _draw(distribution(logits[len(new)], [*tokens, *new]), chance)]


def _draw(weights: Tensor, chance: random.Random) -> int:
    """One index, drawn in proportion to `[V]`."""
    number = torch.tensor([chance.random()], dtype=torch.float64, device=weights.device)
    return int(draw(weights.unsqueeze(0), number))


class Guesser:
    """Runs the draft heads of a model behind its trunk.

    Head j reads, at the place of token t, what the head before made of t (head 0: the trunk) and token t + 1 + j.  Where that
    token is itself a guess, what the head computed is forgotten afterwards: the state of each head ends at the last place
    whose token is known.
    """

    def __init__(self, model: CausalLM, max_length: int, ahead: int) -> None:
        self.model = model
        size = CacheSize(1, max_length + ahead, ahead, model.device, model.model.dtype)
        self._states = [State([draft.new_cache(size)], size, [0]) for draft in model.drafts]
        nothing = torch.empty(1, 0, model.architecture.hidden_size, device=model.device, dtype=model.model.dtype)
        self._inputs = [nothing] * len(model.drafts)  # what each head has yet to read, from where its state ends

    def follow(self, hidden: Tensor) -> None:
        """Take note of the trunk's output, `[1, T, H]` before the final norm, for tokens that are there to stay."""
        self._inputs[0] = torch.cat([self._inputs[0], self.model.draft_input(hidden)], 1)

    def guess(
        self, tokens: Sequence[int], count: int, distribution: Distribution, chance: random.Random
    ) -> list[Guess]:
        """The next `count` tokens after `tokens`, of which the trunk has seen all but the last."""
        guesses: list[Guess] = []

        def choose(head: int, hidden: Tensor) -> None:
            before = [*tokens, *(guess.token for guess in guesses)]
            logits = self.model.drafts[head].logits(hidden[:, -1:], self.model.head)[0, -1]
            probabilities = distribution(logits, before)
            guesses.append(Guess(_draw(probabilities, chance), probabilities))

        seen = len(tokens) - 1
        unsure = self._inputs[0][:, :0]  # outputs of the head before that rest on guesses
        for head in range(min(count, len(self._states))):
            state, start = self._states[head], self._states[head].lengths[0]
            known = [*tokens, *(guess.token for guess in guesses)]
            hidden = self._run(head, torch.cat([self._inputs[head], unsure], 1), known[start + 1 + head :])
            choose(head, hidden)
            sure = max(seen - head - start, 0)
            state.lengths = [start + sure]
            self._inputs[head] = self._inputs[head][:, sure:]
            if head + 1 < len(self._states):
                self._inputs[head + 1] = torch.cat([self._inputs[head + 1], hidden[:, :sure]], 1)
            unsure = hidden[:, sure:]
        while len(guesses) < count:  # a single head goes on with its own output
            hidden = self._run(0, hidden[:, -1:], [guesses[-1].token])
            choose(0, hidden)
        if guesses:
            self._states[0].lengths = [seen]
        return guesses

    @torch.no_grad()
    def _run(self, head: int, hidden: Tensor, next_tokens: Sequence[int]) -> Tensor:
        """Head `head` over `[1, T, H]` and the T tokens that stand `head + 1` places on."""
        trunk, state = self.model.model, self._states[head]
        embedded = trunk.embed_tokens.lookup(torch.tensor([list(next_tokens)], device=self.model.device), trunk.dtype)
        at = trunk.turned(state.place(hidden.shape[1], None))
        output = self.model.drafts[head](hidden, embedded, at, state.caches[0])
        state.advance(at.counts)
        return output

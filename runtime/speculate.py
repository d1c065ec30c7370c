"""Speculative decoding with the checkpoint's own draft heads (MTP): several tokens per call of the trunk, losslessly.

The heads guess the next tokens; the trunk then sees all guesses in one call and keeps those that it would have drawn
itself.  Greedy text is the same as without, sampled text has the same distribution (rejection sampling).
Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192).

H hidden size, V vocabulary.  One sequence; `ahead` guesses per call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.models.base import CausalLM
from runtime.state import CacheSize, State

# Float32 logits [V] and the tokens before -> the probabilities [V] that the next token is drawn with.
Distribution = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass
class Counts:
    """How speculation went: guesses made, and guesses kept."""

    guessed: int = 0
    kept: int = 0


def speculate(
    model: CausalLM,
    prompt: Sequence[int],
    max_new_tokens: int,
    ahead: int,
    distribution: Distribution,
    generator: torch.Generator,
    eos_ids: Collection[int] = (),
    counts: Counts | None = None,
) -> Iterator[int]:
    """Continue one prompt and yield token ids as they come, the last perhaps one of `eos_ids`.

    `model`: loaded with `drafts=True`.  `ahead`: guesses per call, at most one per draft head; a single head is run again on
    its own output.  `distribution`: how tokens are drawn, one-hot for the most likely.  `counts`: filled in as it goes.
    Raises `ValueError`, before anything is computed, when `model` has no draft heads, or not so many.
    """
    if not model.drafts:
        raise ValueError("model: expected draft heads, found none; load it with drafts=True")
    if ahead < 1 or 1 < len(model.drafts) < ahead:
        most = "or more" if len(model.drafts) == 1 else f"to {len(model.drafts)}, the number of draft heads"
        raise ValueError(f"ahead: expected 1 {most}, found {ahead}")
    return _speculate(model, list(prompt), max_new_tokens, ahead, distribution, generator, eos_ids, counts or Counts())


PREFILL = 2048  # prompt tokens per call: bounds the memory of attention masks


def _speculate(
    model: CausalLM,
    tokens: list[int],
    max_new_tokens: int,
    ahead: int,
    distribution: Distribution,
    generator: torch.Generator,
    eos_ids: Collection[int],
    counts: Counts,
) -> Iterator[int]:
    if max_new_tokens < 1:
        return
    last = len(tokens) + max_new_tokens
    state, guesser = model.new_state(1, last, ahead), Guesser(model, last, ahead)
    for start in range(0, len(tokens), PREFILL):
        hidden = model.hidden(torch.tensor([tokens[start : start + PREFILL]]), state)
        guesser.follow(hidden)
    tokens.append(_draw(distribution(model.logits(hidden[0, -1]), tokens), generator))
    yield tokens[-1]
    while tokens[-1] not in eos_ids and len(tokens) < last:
        guesses = guesser.guess(tokens, min(ahead, last - len(tokens) - 1), distribution, generator)
        ids = [guess.token for guess in guesses]
        hidden = model.hidden(torch.tensor([[tokens[-1], *ids]]), state)
        new = verify(model.logits(hidden[0]), tokens, guesses, distribution, generator)
        state.keep([1 + len(ids)], [len(new)])
        guesser.follow(hidden[:, : len(new)])
        counts.guessed += len(ids)
        counts.kept += len(new) - 1
        for token in new:
            tokens.append(token)
            yield token
            if token in eos_ids:
                return


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that a draft head guessed, and the probabilities `[V]` that it was drawn from."""

    token: int
    probabilities: Tensor


def verify(
    logits: Tensor, tokens: Sequence[int], guesses: Sequence[Guess], distribution: Distribution, generator: torch.Generator
) -> list[int]:
    """The tokens that come next: the guesses up to the first that is refused, and one drawn by the trunk.

    `logits`: the trunk's, float32 `[len(guesses) + 1, V]`, before the first guess and after each.  A guess drawn with
    probability q that the trunk gives p is kept with probability min(1, p / q), else replaced by a draw from
    max(p - q, 0): together that is a draw from p.
    """
    new: list[int] = []
    for guess, row in zip(guesses, logits, strict=False):
        p, q = distribution(row, [*tokens, *new]), guess.probabilities
        if float(torch.rand((), generator=generator, device=p.device)) * float(q[guess.token]) >= float(p[guess.token]):
            rest = (p - q).clamp(min=0)
            return [*new, _draw(rest if rest.any() else p, generator)]  # nothing left: p and q differ by rounding only
        new.append(guess.token)
    return [*new, _draw(distribution(logits[len(new)], [*tokens, *new]), generator)]


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    """One index, drawn in proportion to `[V]`."""
    return int(torch.multinomial(weights, 1, generator=generator))


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
        self, tokens: Sequence[int], count: int, distribution: Distribution, generator: torch.Generator
    ) -> list[Guess]:
        """The next `count` tokens after `tokens`, of which the trunk has seen all but the last."""
        guesses: list[Guess] = []

        def choose(head: int, hidden: Tensor) -> None:
            before = [*tokens, *(guess.token for guess in guesses)]
            logits = self.model.drafts[head].logits(hidden[:, -1:], self.model.head)[0, -1]
            probabilities = distribution(logits, before)
            guesses.append(Guess(_draw(probabilities, generator), probabilities))

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

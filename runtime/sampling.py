"""How the next token is chosen from logits.

B sequences, V vocabulary.  The order of what is done is that of transformers 5.23 `generate`: repetition penalty,
temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    temperature         0 takes the most likely token and needs none of the filters; else logits are divided by it
    top_k               only the k most likely tokens (0: all)
    top_p               of these, the fewest whose probabilities reach p
    min_p               of these, the ones at least this fraction as likely as the most likely one
    repetition_penalty  a logit of a token that the sequence has, prompt included, is divided by it when positive and
                        multiplied when negative; also at temperature 0
    seed                the same seed and prompt give the same tokens; None draws anew

    Raises `ValueError`, one line, for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check every value; a comparison with NaN is false, so NaN is refused too."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected 0 or more, found {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and up to 1, found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected a number from 0 to 1, found {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty: expected a number above 0, found {self.repetition_penalty}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, found {self.seed}")

    @property
    def penalizes(self) -> bool:
        """Whether `choose` needs to know the tokens that a sequence has."""
        return self.repetition_penalty != 1

    def seeds(self, count: int) -> list[int | None]:
        """One seed per sequence of a batch: `seed`, `seed + 1`, ..."""
        return [None if self.seed is None else self.seed + row for row in range(count)]

    def choose(self, logits: Tensor, chances: Sequence[random.Random], seen: Tensor | None = None) -> list[int]:
        """The next token of each sequence.

        `logits`: float32 `[B, V]`.  `chances`: one source of random numbers per sequence, which gives one number per
        call, so that a draw depends neither on the device nor on what else is in the batch; at temperature 0 none.
        `seen`: bool `[B, V]`, the tokens that each sequence has; needed where `penalizes`.
        """
        numbers = None
        if self.temperature > 0:
            numbers = torch.tensor([chance.random() for chance in chances], dtype=torch.float64, device=logits.device)
        return self.pick(logits, numbers, seen).tolist()

    def pick(self, logits: Tensor, numbers: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """As `choose`, but the tokens stay on the device, int64 `[B]`, and nothing is read from it.

        `numbers`: float64 `[B]` on the device, what the `chances` would give; None at temperature 0.
        """
        if self.temperature == 0:
            return self._penalized(logits, seen).argmax(-1)
        assert numbers is not None
        return draw(self.probabilities(logits, seen), numbers)

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """What is drawn from, float32 `[B, V]`, with zeros for what a filter drops; temperature above 0."""
        logits = self._penalized(logits, seen)
        # Subtracting the largest first keeps tiny temperatures finite.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            smallest_kept = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # what the more likely tokens hold; the first is always kept
            kept = ordered.masked_fill(before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
        if self.min_p > 0:
            enough = self.min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < enough, 0.0)
        return probabilities / probabilities.sum(-1, keepdim=True)

    def _penalized(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        if not self.penalizes:
            return logits
        assert seen is not None
        penalty = self.repetition_penalty
        return logits.where(~seen, torch.where(logits < 0, logits * penalty, logits / penalty))


@dataclass(frozen=True, slots=True)
class Picked:
    """Tokens, int64 `[B]`, and where asked for their log-probabilities, float32 `[B]`, and the most likely tokens: ids and
    log-probabilities, `[B, n]`, best first."""

    tokens: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that there are."""
        return tuple(t for t in (self.tokens, self.logprobs, self.top_ids, self.top_logprobs) if t is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> Picked:
        """The same of other tensors."""
        return Picked(*map(function, self.tensors))


def with_likelihoods(tokens: Tensor, logits: Tensor, count: int | None) -> Picked:
    """`tokens` with their log-probabilities and those of the `count` most likely ones; with nothing for None.

    `logits`: float32 `[B, V]`.  Natural logarithms.  Nothing is read from the device.
    """
    if count is None:
        return Picked(tokens)
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    best, ids = logprobs.topk(min(count, logprobs.shape[-1]), -1)
    return Picked(tokens, own, ids, best)


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """One id per row by inversion, int64 `[B]`.  `probabilities`: `[B, V]`, of any sum; `numbers`: float64 `[B]` in [0, 1).

    An id of probability 0 is never drawn.  Nothing is read from the device.
    """
    total = probabilities.double().cumsum(-1)
    # The first id whose running sum is above the number; the number stays below the last sum despite rounding.
    end = total[:, -1:].contiguous()
    at = (numbers.unsqueeze(-1) * end).minimum(end.nextafter(torch.zeros_like(end)))
    return torch.searchsorted(total, at, right=True).clamp(max=total.shape[-1] - 1).squeeze(-1)  # NaN: past the end

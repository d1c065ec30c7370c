"""How the next token is chosen from logits.

B sequences, V vocabulary.  The order of what is done is that of transformers 5.23 `generate`: repetition penalty,
temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
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
        if self.temperature == 0:
            return self._penalized(logits, seen).argmax(-1).tolist()
        return draw(self.probabilities(logits, seen), [chance.random() for chance in chances])

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


def draw(probabilities: Tensor, numbers: Sequence[float]) -> list[int]:
    """One id per row by inversion.  `probabilities`: `[B, V]`, of any sum; `numbers`: uniform in [0, 1), one per row.

    An id of probability 0 is never drawn.
    """
    total = probabilities.double().cumsum(-1)
    # The first id whose running sum is above the number; the number stays below the last sum despite rounding.
    end = total[:, -1:].contiguous()
    at = torch.tensor(numbers, dtype=torch.float64, device=total.device).unsqueeze(-1) * end
    at = at.minimum(end.nextafter(torch.zeros_like(end)))
    return torch.searchsorted(total, at, right=True).clamp(max=total.shape[-1] - 1).squeeze(-1).tolist()  # NaN: past the end

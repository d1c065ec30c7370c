"""How likely a model finds given tokens, and how far two models are apart, in bounded memory.

V vocabulary.  Log-probabilities are natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.decode import PREFILL_TOKENS
from runtime.models.base import CausalLM

LOGITS = 1 << 26  # elements of a block of logits: 256 MiB in float32
FLOAT64S = 1 << 23  # elements of a part of a block that is compared in float64


class Window(NamedTuple):
    """Tokens `begin` to `end` are seen together; those from `first` on are scored."""

    begin: int
    end: int
    first: int


def windows(count: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of up to `context` tokens over `count`, each `stride` after the one before.

    A token is scored where it first comes up, unless it is the first of a window: with `stride < context` that is every
    token but the first of all.  Source: "Perplexity of fixed-length models" in the documentation of transformers.
    """
    seen = 0
    for begin in range(0, count, stride):
        end = min(begin + context, count)
        first = max(seen, begin + 1)
        if first < end:
            yield Window(begin, end, first)
        seen = end
        if end == count:
            return


def score(
    model: CausalLM, rows: Sequence[Sequence[int]], firsts: Sequence[int]
) -> Iterator[tuple[list[int], list[int], Tensor]]:
    """Logits for the tokens of `rows` from index `firsts[row]` on, which must be 1 or more and below the row's length.

    Yields the rows and the indices of some tokens, and float32 `[tokens, V]`: what the model, having seen the row before
    each of them, expects there.  Every token comes once; those of one row in order.
    Memory: a state of all rows, the activations of `PREFILL_TOKENS` tokens, and `LOGITS` logits.
    """
    inputs = [torch.tensor(row[:-1]) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    state = model.new_state(len(rows), ids.shape[1])
    columns = max(1, PREFILL_TOKENS // len(rows))
    block = max(1, LOGITS // model.architecture.vocab_size)
    for start in range(0, ids.shape[1], columns):
        piece = ids[:, start : start + columns]
        counts = [min(max(len(row) - start, 0), piece.shape[1]) for row in inputs]
        hidden = model.hidden(piece, state, counts)
        places = [
            (row, column)
            for row, (count, first) in enumerate(zip(counts, firsts, strict=True))
            for column in range(max(first - 1 - start, 0), count)
        ]
        for at in range(0, len(places), block):
            which, where = (list(part) for part in zip(*places[at : at + block], strict=True))
            yield which, [column + start + 1 for column in where], model.logits(hidden[which, where])


class Continuation(NamedTuple):
    """`logprob`: of all its tokens together.  `greedy`: whether each is the most likely one at its place."""

    logprob: float
    greedy: bool


def score_continuations(
    model: CausalLM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> list[Continuation]:
    """How likely the second part of each pair is after the first, which must not be empty; all in one batch.

    `max_length`: of what the model sees, which loses tokens at its beginning; the second part must be that short.
    """
    rows = [[*context, *rest][-max_length - 1 :] for context, rest in pairs]
    firsts = [len(row) - len(rest) for row, (_, rest) in zip(rows, pairs, strict=True)]
    logprobs = [0.0] * len(pairs)
    greedy = [True] * len(pairs)
    wanted = [row for row, (_, rest) in enumerate(pairs) if rest]
    scored = score(model, [rows[row] for row in wanted], [firsts[row] for row in wanted]) if wanted else iter(())
    for which, where, logits in scored:
        targets = torch.tensor([rows[wanted[row]][place] for row, place in zip(which, where, strict=True)])
        values, best = _of_targets(logits, targets)
        for row, value, same in zip(which, values.tolist(), best.tolist(), strict=True):
            logprobs[wanted[row]] += value
            greedy[wanted[row]] &= same
    return [Continuation(*pair) for pair in zip(logprobs, greedy, strict=True)]


def _of_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of int64 `[tokens]` in float64, and whether each is the most likely one."""
    targets = targets.to(logits.device)
    own = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return own.double() - logits.logsumexp(-1).double(), logits.argmax(-1) == targets


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a model predicts a text.  `nats`: minus the log-probability of all `tokens`; `nbytes`: of their UTF-8 text."""

    tokens: int
    nats: float
    nbytes: int

    def as_json(self) -> dict[str, float | None]:
        """The usual figures."""
        mean = self.nats / self.tokens
        return {
            "tokens": self.tokens,
            "nats_per_token": mean,
            "perplexity": math.exp(min(mean, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / self.nbytes if self.nbytes else None,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far model B is from model A on the same text, over the tokens scored.

    `mean_kl`, `max_kl`: of KL(A || B) in nats, where each expects a token.  `worst`: index of the token where it is
    largest.  `agreement`: part of the tokens where both find the same one most likely.
    """

    mean_kl: float
    max_kl: float
    worst: int
    agreement: float


def measure(
    model: CausalLM,
    ids: Sequence[int],
    ends: Sequence[int],
    text: str,
    context: int,
    stride: int,
    other: CausalLM | None = None,
    done: Callable[[int], object] = lambda tokens: None,
) -> tuple[Perplexity, Perplexity | None, Comparison | None]:
    """Perplexity of a text, window by window; with `other`, that of both and how far they are apart.

    `ids`, `ends`: the text's tokens, and the index in `text` behind each.  `done` is told how many tokens were scored.
    Both models must have the same vocabulary.  Raises `ValueError` where no token can be scored.
    Memory: as `score`, of one window; the models' logits of one block, and `FLOAT64S` float64 numbers a few times.
    """
    nats, other_nats, tokens, nbytes, same = 0.0, 0.0, 0, 0, 0
    total_kl, worst = 0.0, (-1.0, 0)
    for window in windows(len(ids), context, stride):
        row = ids[window.begin : window.end]
        nbytes += len(text[ends[window.first - 1] : ends[window.end - 1]].encode())
        blocks = score(model, [row], [window.first - window.begin])
        others = score(other, [row], [window.first - window.begin]) if other is not None else None
        for _, where, logits in blocks:
            targets = torch.tensor([row[place] for place in where])
            nats -= float(_of_targets(logits, targets)[0].sum())
            tokens += len(where)
            if others is not None:
                theirs = next(others)[2]
                other_nats -= float(_of_targets(theirs, targets)[0].sum())
                same += int((logits.argmax(-1) == theirs.argmax(-1)).sum())
                apart = divergences(logits, theirs)
                total_kl += float(apart.sum())
                at = int(apart.argmax())
                worst = max(worst, (float(apart[at]), window.begin + where[at]), key=lambda one: one[0])
            done(len(where))
    if tokens == 0:
        raise ValueError("expected a text of at least two tokens")
    own = Perplexity(tokens, nats, nbytes)
    if other is None:
        return own, None, None
    return own, Perplexity(tokens, other_nats, nbytes), Comparison(total_kl / tokens, worst[0], worst[1], same / tokens)


def divergences(logits: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(other)) in nats, row by row: `[tokens, V]` twice to float64 `[tokens]`."""
    rows = max(1, FLOAT64S // logits.shape[-1])
    found = []
    for ours, theirs in zip(logits.split(rows), other.to(logits.device).split(rows), strict=True):
        p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found).clamp(min=0)  # rounding makes equal ones slightly negative


def rolling_pairs(ids: Sequence[int], prefix: int, max_length: int) -> list[tuple[list[int], list[int]]]:
    """A text in parts of up to `max_length` tokens, each with what the model sees before it.

    The first part follows `prefix`; the last one gets as much before it as there is room for.  So every token is scored
    once.  Source: lm-evaluation-harness 0.4, `loglikelihood_rolling`.
    """
    sequence = [prefix, *ids]
    ends = list(accumulate([min(max_length, len(ids) - at) for at in range(0, len(ids), max_length)]))
    pairs = []
    for begin, end in zip([0, *ends], ends):
        seen = max(0, end - max_length)  # in `sequence`, whose index is one more than that in `ids`
        pairs.append((sequence[seen : begin + 1], list(ids[begin:end])))
    return pairs

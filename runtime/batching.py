"""Requests of many clients, answered together: those that wait start as one batch, and batches take turns token by token.

So a request never waits for the end of another's answer, only for its turn, and for room.  One thread runs the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from runtime.answer import Answer

if TYPE_CHECKING:
    from runtime.decode import Decoding, Drawn
    from runtime.models.base import CausalLM
    from runtime.sampling import Sampling
    from runtime.tokenizer import ChatTokenizer


class BusyError(Exception):
    """There is no room for a request: too many wait already, or the server is about to stop."""


class GaveUpError(Exception):
    """A request was given up: its time was over, or the server stops."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it.  `time_limit_s`: from when it was submitted; None for none."""

    token_ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    time_limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer: certain text, perhaps empty, and the tokens since the last piece."""

    text: str
    drawn: tuple[Drawn, ...]
    finish_reason: str | None = None  # "stop" or "length" in the last piece


Deliver = Callable[[Piece | Exception], object]  # called from the model's thread; a last piece or an error is the last call


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that was submitted."""

    request: Request
    deliver: Deliver
    answer: Answer
    deadline: float | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody wants the answer any more; from any thread."""
        self.cancelled = True


@dataclass(slots=True)
class _Batch:
    decoding: Decoding
    tickets: list[Ticket | None] = field(default_factory=list)  # None: over

    @property
    def size(self) -> int:
        return sum(ticket is not None for ticket in self.tickets)


class Batcher:
    """Runs requests on a model.

    `max_batch`: sequences that run at a time.  `max_waiting`: requests that wait for room; more are refused.
    `gather_s`: how long an idle model waits for more requests to start with the first one.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: ChatTokenizer,
        eos_ids: frozenset[int],
        max_batch: int = 8,
        max_waiting: int = 64,
        gather_s: float = 0.005,
    ) -> None:
        self._model, self._tokenizer, self._eos_ids = model, tokenizer, eos_ids
        self._max_batch, self._max_waiting, self._gather_s = max_batch, max_waiting, gather_s
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []
        self._active: list[_Batch] = []
        self._closed = False
        self.batch_sizes: list[int] = []  # of the batches started so far, the last thousand
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Queue a request.  Raises `BusyError`; `ValueError` for tokens that the model has not."""
        from runtime.decode import check_prompt

        architecture = self._model.architecture
        check_prompt(request.token_ids, architecture.vocab_size, architecture.max_position_embeddings)
        ticket = Ticket(request, deliver, Answer(self._tokenizer, self._eos_ids, request.stop))
        if request.time_limit_s is not None:
            ticket.deadline = time.monotonic() + request.time_limit_s
        with self._changed:
            if self._closed:
                raise BusyError("the server is about to stop")
            if len(self._waiting) >= self._max_waiting:
                raise BusyError(f"{len(self._waiting)} requests wait already")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def close(self, wait_s: float = 10.0) -> None:
        """Take no more requests, give up those that are not answered, and return when the model is idle."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(wait_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._active)
                if not self._closed and not self._active:
                    self._changed.wait_for(lambda: self._closed or len(self._waiting) >= self._max_batch, self._gather_s)
                closed = self._closed
                room = self._max_batch - sum(batch.size for batch in self._active)
                starting, self._waiting = ([], self._waiting) if closed else (self._waiting[:room], self._waiting[room:])
            if closed:
                self._give_up()
                return
            self._start(starting)
            self._drop_expired()
            for batch in self._active:
                self._step(batch)
            self._active = [batch for batch in self._active if batch.size]

    def _start(self, tickets: Sequence[Ticket]) -> None:
        """Begin with new requests: those that are drawn alike in one batch."""
        from runtime.decode import Decoding

        alike: dict[Any, list[Ticket]] = {}
        for ticket in tickets:
            if not ticket.cancelled:
                alike.setdefault((replace(ticket.request.sampling, seed=None), ticket.request.logprobs), []).append(ticket)
        for (sampling, logprobs), group in alike.items():
            requests = [ticket.request for ticket in group]
            with self._failing(group):
                import torch

                prompts = [torch.tensor(request.token_ids) for request in requests]
                limits = [request.max_new_tokens for request in requests]
                seeds = [request.sampling.seed for request in requests]
                decoding = Decoding(self._model, prompts, sampling, limits, self._eos_ids, seeds, logprobs)
                self._active.append(_Batch(decoding, list(group)))
                self.batch_sizes = [*self.batch_sizes[-999:], len(group)]

    def _step(self, batch: _Batch) -> None:
        """One token for each sequence of a batch."""
        with self._failing(batch.tickets, batch):
            for row, ticket in enumerate(batch.tickets):
                if ticket is not None and ticket.cancelled:
                    self._over(batch, row)
            step = next(batch.decoding, None)
            for row, ticket in enumerate(batch.tickets):
                if ticket is None:
                    continue
                drawn = step[row] if step is not None else None
                if drawn is None:  # its limit was reached
                    ticket.deliver(Piece(ticket.answer.finish(), (), ticket.answer.finish_reason))
                    self._over(batch, row)
                    continue
                text = ticket.answer.push(drawn)
                if ticket.answer.ended:
                    ticket.deliver(Piece(text + ticket.answer.finish(), (drawn,), ticket.answer.finish_reason))
                    self._over(batch, row)
                else:
                    ticket.deliver(Piece(text, (drawn,)))

    @staticmethod
    def _over(batch: _Batch, row: int) -> None:
        batch.decoding.end(row)
        batch.tickets[row] = None

    def _drop_expired(self) -> None:
        """Give up what took too long, waiting or running."""
        now = time.monotonic()

        def expired(ticket: Ticket | None) -> bool:
            return ticket is not None and ticket.deadline is not None and now > ticket.deadline

        with self._changed:
            late = [ticket for ticket in self._waiting if expired(ticket)]
            self._waiting = [ticket for ticket in self._waiting if not expired(ticket)]
        for batch in self._active:
            for row, ticket in enumerate(batch.tickets):
                if ticket is not None and expired(ticket):
                    late.append(ticket)
                    self._over(batch, row)
        for ticket in late:
            ticket.deliver(GaveUpError(f"no complete answer within {ticket.request.time_limit_s:g} s"))

    def _give_up(self) -> None:
        """The end: tell everybody."""
        with self._changed:
            left = [*self._waiting, *(t for batch in self._active for t in batch.tickets if t is not None)]
            self._waiting, self._active = [], []
        for ticket in left:
            ticket.deliver(GaveUpError("the server stops"))

    @contextmanager
    def _failing(self, tickets: Sequence[Ticket | None], batch: _Batch | None = None) -> Iterator[None]:
        """Whatever goes wrong, such as memory that runs out, is told to those concerned, and the model goes on."""
        try:
            yield
        except Exception as error:  # the thread serves everybody else, and each client gets the error
            for ticket in [ticket for ticket in tickets if ticket is not None]:
                ticket.deliver(error)
            if batch is not None:
                batch.tickets = [None] * len(batch.tickets)

"""Decoding in steps that the host only starts: nothing is asked of the device, and on CUDA a step is replayed as a graph.

All that a step depends on lies in tensors of fixed size on the device: tokens, places, how many tokens each sequence may still
get, the tokens that it has, random numbers.  A step runs the model, chooses tokens and counts them; a sequence that has ended
is left alone, as are the rows that fill a batch up to a power of two.  So the host may start the next step before it has seen
what the last one gave, and reads results while the device works.  What ends a sequence before its limit, only the host
knows: it takes no notice of the tokens that still come.

B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import functools
import random
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from runtime.models.base import CausalLM
from runtime.sampling import Picked, Sampling, with_likelihoods

NUMBERS = 64  # random numbers per sequence that are sent to the device at once
KEPT = 4  # steps that a model keeps for later
LENGTHS = 256  # a state has room for a multiple of this many tokens, so that a longer answer may use it too


@dataclass(frozen=True, slots=True)
class Kind:
    """What a graph is made for.

    `rows`: B, a power of two.  `sampling`: without its seed.  `logprobs`: as for `Decoding`.
    """

    rows: int
    sampling: Sampling
    logprobs: int | None


def kind_of(count: int, sampling: Sampling, logprobs: int | None = None) -> Kind:
    """What `count` sequences need."""
    return Kind(1 << (count - 1).bit_length(), replace(sampling, seed=None), logprobs)


class Steps:
    """A state on the device, and the step that advances it.  For one user at a time, who calls, in this order: `begin`,
    `choose` once the prompts are in `state`, then `start` and `receive`, at most two starts ahead."""

    def __init__(self, model: CausalLM, kind: Kind, max_length: int) -> None:
        device, rows, vocabulary = model.device, kind.rows, model.architecture.vocab_size
        self.model: Any = weakref.proxy(model)  # steps are kept as long as the model, not the other way round
        self.kind = kind
        self.max_length = max_length
        self.state = model.new_state(rows, max_length)
        self.state.settle()
        self.user: weakref.ref[object] | None = None
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)  # that the next step takes
        self._left = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens that each sequence may still get
        self._turn = torch.zeros(1, dtype=torch.int64, device=device)  # the row of `_numbers` that comes next
        self._numbers = torch.zeros(NUMBERS, rows, dtype=torch.float64, device=device)
        self._seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device) if kind.sampling.penalizes else None
        self._logits = torch.zeros(rows, vocabulary, device=device)  # of the prompts
        self._results = with_likelihoods(self._tokens.clone(), self._logits, kind.logprobs)
        self._slots = tuple(Slot(self._results) for _ in range(2))
        self._chances: list[random.Random] = []
        self._sent = self._received = 0
        self._replay: Callable[[], object] | None = None

    @property
    def ready(self) -> bool:
        """Whether a step can be started at once: the first one takes the time to record it."""
        return self._replay is not None

    @property
    def ahead(self) -> int:
        """How many steps have been started whose results have not been received."""
        return self._sent - self._received

    def begin(self, limits: Sequence[int], chances: Sequence[random.Random], seen: Tensor | None) -> None:
        """Forget everything, for as many sequences as there are `limits` of tokens.

        `chances`: the sources of their random numbers.  `seen`: bool `[sequences, V]`, where the sampling penalises.
        """
        self.state.clear()
        self._left.copy_(torch.tensor([*limits, *[0] * (self.kind.rows - len(limits))]))
        self._turn.zero_()
        if self._seen is not None:
            assert seen is not None
            self._seen[: len(limits)] = seen
        self._chances = list(chances)
        self._sent = self._received = 0

    def choose(self, logits: Tensor, lengths: Sequence[int]) -> None:
        """Draw the first tokens.  `logits`: float32 `[sequences, V]`; `lengths`: tokens of each sequence in `state`."""
        self.state.lengths = [*lengths, *[0] * (self.kind.rows - len(lengths))]
        self.state.settle()
        self._logits[: len(logits)] = logits
        self._send_numbers()
        self._choose(self._logits)
        self._return()

    def start(self) -> None:
        """Draw one more token of each sequence that has not ended.  Returns before the device has done so."""
        self._send_numbers()
        if self._replay is None:
            self._replay = self._prepare()
        self._replay()
        self._return()

    def receive(self) -> Picked:
        """Wait for the oldest step that was started and not received; what it gave, on the CPU until the next `start`."""
        found = self._slots[self._received % 2].wait()
        self._received += 1
        return found

    def step(self) -> None:
        """The work of one step, on the device alone."""
        self._choose(self.model.step(self._tokens, self.state, self._left > 0))

    @torch.no_grad()
    def _choose(self, logits: Tensor) -> None:
        """Tokens from float32 `[B, V]`, and all that follows from them; those of sequences that have ended are 0."""
        alive = self._left > 0
        sampling, numbers = self.kind.sampling, None
        if sampling.temperature > 0:
            numbers = self._numbers.index_select(0, self._turn).squeeze(0)
            self._turn.add_(1).remainder_(NUMBERS)
        tokens = sampling.pick(logits, numbers, self._seen).masked_fill(~alive, 0)
        column = tokens.unsqueeze(-1)
        if self._seen is not None:
            self._seen.scatter_(1, column, self._seen.gather(1, column) | alive.unsqueeze(-1))
        self._left.sub_(1).clamp_(min=0)
        self._tokens.copy_(tokens)
        for result, value in zip(self._results.tensors, with_likelihoods(tokens, logits, self.kind.logprobs).tensors):
            result.copy_(value)

    def _send_numbers(self) -> None:
        """Random numbers for the next `NUMBERS` tokens, when those of the last ones are used up."""
        if self.kind.sampling.temperature == 0 or self._sent % NUMBERS:
            return
        filling = [0.0] * (self.kind.rows - len(self._chances))
        rows = [[*(chance.random() for chance in self._chances), *filling] for _ in range(NUMBERS)]
        numbers = torch.tensor(rows, dtype=torch.float64)
        if self._numbers.device.type == "cuda":
            numbers = numbers.pin_memory()  # so that the copy waits for nothing
        self._numbers.copy_(numbers, non_blocking=True)

    def _return(self) -> None:
        self._slots[self._sent % 2].copy(self._results)
        self._sent += 1

    def _prepare(self) -> Callable[[], object]:
        """The step as a graph; as it is where recording it fails, which is said."""
        changed = (self._tokens, self._left, self._turn)
        before = [tensor.clone() for tensor in changed]
        self._left.zero_()  # a step of nobody leaves no trace
        try:
            return capture(self.step, self._left.device)
        except RuntimeError as error:
            warnings.warn(f"decoding without a CUDA graph, which could not be recorded: {error}", stacklevel=2)
            return self.step
        finally:
            for tensor, value in zip(changed, before):
                tensor.copy_(value)


class Slot:
    """Where results wait for the host."""

    def __init__(self, like: Picked) -> None:
        on_cuda = like.tokens.device.type == "cuda"
        self._results = like.map(lambda t: torch.empty(t.shape, dtype=t.dtype, pin_memory=on_cuda))
        self._event = torch.cuda.Event() if on_cuda else None

    def copy(self, results: Picked) -> None:
        """Copy from the device, in the order of its stream."""
        for here, there in zip(self._results.tensors, results.tensors):
            here.copy_(there, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> Picked:
        """The results, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        return self._results


def capture(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Record what `work` does on a CUDA device; returns what does it again.  On any other device, `work` itself.

    `work` runs once before, so that kernels are compiled and tables made, and is not run by being recorded.
    """
    if device.type != "cuda":
        return work
    current, side = torch.cuda.current_stream(device), _recording_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        work()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(current), torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        work()  # the outer one because the inner one leaves `side` in place where what it recorded cannot be used
    return graph.replay


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The same for all graphs: torch keeps 32 MiB for each stream that it multiplies on."""
    return torch.cuda.Stream(device)


_KEPT: weakref.WeakKeyDictionary[CausalLM, list[Steps]] = weakref.WeakKeyDictionary()


def take(model: CausalLM, kind: Kind, max_length: int, user: object) -> Steps:
    """Steps of `kind` for sequences of up to `max_length` tokens, for as long as `user` lives or until `give_back`.

    Each model keeps a few, whose graphs are recorded; they are taken again when they fit and nobody has them.
    Raises `MemoryError` where there is no room for their state, even without those that nobody has.
    """
    kept = _KEPT.setdefault(model, [])
    fitting = [steps for steps in kept if _is_free(steps) and steps.kind == kind and steps.max_length >= max_length]
    if fitting:
        found = fitting[0]
    else:
        kept[:] = [steps for steps in kept if steps.kind != kind or not _is_free(steps)]  # too short: these take their place
        length = -(-max_length // LENGTHS) * LENGTHS
        try:
            found = Steps(model, kind, length)
        except MemoryError:
            kept[:] = [steps for steps in kept if not _is_free(steps)]
            found = Steps(model, kind, length)
        idle = [steps for steps in kept if _is_free(steps)]
        for steps in idle[: max(len(kept) + 1 - KEPT, 0)]:
            kept.remove(steps)
        if len(kept) < KEPT:
            kept.append(found)
    found.user = weakref.ref(user)
    return found


def give_back(steps: Steps) -> None:
    """Whoever took these has no more use for them."""
    steps.user = None


def _is_free(steps: Steps) -> bool:
    return steps.user is None or steps.user() is None

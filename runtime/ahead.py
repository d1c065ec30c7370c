"""Compiles kernels while a checkpoint is read: all that its first prompts and the steps after them launch, on all cores.

Otherwise each kernel is compiled when it is first launched, one after another: 0.3 to 1 s each where Triton has none in its
cache.  Which ones they are, and for which shapes, the model itself says: a twin without memory, on the meta device, takes the
prompts and makes a step, and what it would launch is compiled instead.  Results stay in Triton's own cache of this process.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from runtime.decode import prefill
from runtime.kernels import table
from runtime.kernels.twin import standing_for
from runtime.models.base import CausalLM
from runtime.sampling import Sampling
from runtime.steps import LENGTHS, Steps, kind_of

_COMPILES_ONLY: ContextVar[bool] = ContextVar("compiles_only", default=False)
_LOCK = threading.Lock()  # of `JITFunction.run`


@dataclass(frozen=True, slots=True)
class Use:
    """Prompts that are continued together, as `runtime.decode.Decoding` will: their lengths, the tokens of the longest one
    with its answer, and how tokens are chosen."""

    lengths: tuple[int, ...]
    longest: int
    sampling: Sampling
    logprobs: int | None = None


@contextmanager
def compiling(twin: Callable[[], CausalLM], uses: Sequence[Use], device: torch.device) -> Iterator[None]:
    """Meanwhile, compile what `uses` need on `device`; leaves when both are done.

    `twin`: makes the model on the meta device.  A warning says why where this fails; kernels are then compiled when launched.
    """
    at = table.machine(device)
    if not uses or at.generation is None or not at.triton:
        yield
        return
    worker = threading.Thread(target=_compile_quietly, args=(twin, uses, device), daemon=True)
    worker.start()
    try:
        yield
    finally:
        worker.join()


def _compile_quietly(twin: Callable[[], CausalLM], uses: Sequence[Use], device: torch.device) -> None:
    try:
        compile_for(twin(), uses, device)
    except Exception as error:
        warnings.warn(f"kernels are compiled when they are first used: {error}", RuntimeWarning, stacklevel=2)


@torch.no_grad()
def compile_for(twin: CausalLM, uses: Sequence[Use], device: torch.device) -> None:
    """Compile what `uses` launch on `device`.  `twin`: the model on the meta device, with the stored dtypes."""
    from triton.runtime._async_compile import AsyncCompileMode

    if device.index is not None:
        torch.cuda.set_device(device)  # of this thread; Triton compiles for the current one
    for row in table.ROWS:
        if row.cuda is not None and device.type != "cpu" and table.obstacle(row, table.machine(device)) is None:
            table.works(row.module, device)  # by launches, which there are none of below
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        with standing_for(device), AsyncCompileMode(pool), _compiles_only() as kernels:
            _launch(twin, uses)
        list(pool.map(_load, kernels))


def _launch(twin: CausalLM, uses: Sequence[Use]) -> None:
    """Everything that `uses` launch."""
    for use in uses:
        longest = -(-use.longest // LENGTHS) * LENGTHS
        steps = Steps(twin, kind_of(len(use.lengths), use.sampling, use.logprobs), longest)
        prompts = [torch.zeros(length, dtype=torch.int64) for length in use.lengths]
        twin.logits(prefill(twin, prompts, steps.state.first(len(prompts))))
        steps.step()


def _load(kernel: Any) -> None:
    """Bring a compiled kernel to the device; some versions of Triton also build a launcher in C, which takes as long."""
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    kernel.run  # noqa: B018 (a property that does it)


@contextmanager
def _compiles_only() -> Iterator[list[Any]]:
    """In this thread, launches compile and do no more; Triton has that for a single launch, as `warmup`.  Gives the kernels."""
    from triton.runtime.jit import JITFunction

    run, kernels = JITFunction.run, {}

    def either(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        found = run(self, *args, grid=grid, warmup=warmup or _COMPILES_ONLY.get(), **options)
        if _COMPILES_ONLY.get():
            kernels[id(found)] = found
        return found

    with _LOCK:
        JITFunction.run = either
        token = _COMPILES_ONLY.set(True)
        try:
            found: list[Any] = []
            yield found
            found.extend(kernels.values())
        finally:
            _COMPILES_ONLY.reset(token)
            JITFunction.run = run

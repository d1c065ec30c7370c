"""Layers with a recurrent state: what lies between their projections, by a kernel for one token where there is one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from runtime.kernels.table import FEW_TOKENS, module_for
from runtime.layers import Linear, QuantizedLinear
from runtime.state import RecurrentCache, Tokens


class RecurrentMixer(nn.Module):
    """A convolution over time, a recurrence and a gated norm.  A family's layer says what they are in `mix`.

    `step_operation`: of `kernels.table`, the same for a single token; `sizes`: what a kernel for it has to know.
    `recurrence`: in torch, from inputs `[B, heads, T, ...]` and the state; `scan_operation`: the same for many tokens.
    """

    step_operation: ClassVar[str]
    scan_operation: ClassVar[str]
    recurrence: Callable[..., Tensor]
    sizes: Any
    out_proj: Linear  # takes what `recur` returns, as it is: single tokens are quantised for it by the kernel
    mix: Callable[..., Tensor]  # what the projections gave, `[B, T, ...]`, to what the output projection takes

    def recur(self, *inputs: Tensor, at: Tokens, cache: RecurrentCache) -> Tensor:
        """As `mix`: single tokens in bfloat16, and those that may be taken back, go to a kernel where there is one."""
        few = inputs[0].dtype == torch.bfloat16 and (at.length == 1 or at.reversible)
        if not few or self._one_token is None:
            return self.mix(*inputs, at=at, cache=cache)
        alone = at.length == 1 and not at.reversible and len(inputs[0]) <= FEW_TOKENS  # else the outputs are joined
        reader = self.out_proj if alone and isinstance(self.out_proj, QuantizedLinear) else None
        return cache.step(functools.partial(self._one_token, reader=reader), self.for_kernel(*inputs), at)

    def for_kernel(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What a kernel for a single token takes in the place of the inputs of `mix`."""
        return inputs

    @functools.cached_property
    def _one_token(self) -> Callable[..., Tensor] | None:
        module = module_for(self.step_operation, "state fp32", next(self.parameters()).device)
        return None if module is None else module.prepare(self.sizes, dict(self.named_parameters()))

    def over_time(self, dtype: torch.dtype) -> Callable[..., Tensor]:
        """What runs the recurrence for a network in `dtype`."""
        return self.recurrence if dtype != torch.bfloat16 or self._many_tokens is None else self._many_tokens

    @functools.cached_property
    def _many_tokens(self) -> Callable[..., Tensor] | None:
        module = module_for(self.scan_operation, "state fp32", next(self.parameters()).device)
        if module is None:
            return None
        scan: Callable[..., Tensor] = module.prepare()
        return lambda *inputs: (scan if inputs[0].shape[2] > 1 else self.recurrence)(*inputs)

"""Layers with a recurrent state: what lies between their projections, by a kernel for one token where there is one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from runtime.kernels.table import module_for
from runtime.state import RecurrentCache, Tokens


class RecurrentMixer(nn.Module):
    """A convolution over time, a recurrence and a gated norm.  A family's layer says what they are in `mix`.

    `operation`: of `kernels.table`, the same for a single token.  `sizes`: what a kernel for it has to know.
    """

    operation: ClassVar[str]
    sizes: Any
    mix: Callable[..., Tensor]  # what the projections gave, `[B, T, ...]`, to what the output projection takes

    def recur(self, *inputs: Tensor, at: Tokens, cache: RecurrentCache) -> Tensor:
        """As `mix`: single tokens in bfloat16, and those that may be taken back, go to a kernel where there is one."""
        few = inputs[0].dtype == torch.bfloat16 and (at.length == 1 or at.reversible)
        if not few or self._one_token is None:
            return self.mix(*inputs, at=at, cache=cache)
        return cache.step(self._one_token, inputs, at)

    @functools.cached_property
    def _one_token(self) -> Callable[..., Tensor] | None:
        module = module_for(self.operation, "state fp32", next(self.parameters()).device)
        return None if module is None else module.prepare(self.sizes, dict(self.named_parameters()))

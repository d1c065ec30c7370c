"""How a token comes to its experts: scores, what has a say in the choice, and what the chosen ones weigh.

E experts, k of them for each of T tokens, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kernels.table import ROUTE, ROUTED_TOKENS, module_for
from runtime.layers import Linear


@dataclass(frozen=True)
class Rule:
    """`scores`: "softmax" over all experts, or "sigmoid" of each.  A bias, if any, has a say in the choice only.

    With groups, experts are chosen among the `kept_groups` groups whose two best experts have the largest sum.
    `normalize`: weights are divided by their sum plus `floor`.  `scale`: then multiplies them.
    """

    per_token: int
    scores: str
    normalize: bool
    floor: float = 0.0
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1

    def choose(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Float32 `[T, E]` and `[E]` to the chosen experts, int64 `[T, k]`, and their weights, float32 `[T, k]`."""
        scores = torch.softmax(logits, -1) if self.scores == "softmax" else torch.sigmoid(logits)
        biased = scores if bias is None else scores + bias.float()
        chosen = self._among_groups(biased).topk(self.per_token, -1).indices
        weights = scores.gather(-1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + self.floor)
        return chosen, weights * self.scale

    def _among_groups(self, scores: Tensor) -> Tensor:
        """Minus infinity for the experts of groups that are not kept."""
        if self.groups == 1:
            return scores
        grouped = scores.unflatten(-1, (self.groups, -1))  # (T, groups, E / groups)
        best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(self.kept_groups, -1).indices, True)
        return grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)


class Router:
    """The matrix of a router and its rule.  Holds no parameters of its own: `gate`, and `bias` if any, belong to the model.

    `beside`: a layer of one row `[1, H]` that takes the same input and is no expert's, as a gate of shared experts is.
    """

    def __init__(
        self, rule: Rule, gate: Linear, bias: Callable[[], Tensor | None] = lambda: None, beside: Linear | None = None
    ) -> None:
        """`bias`: asks the model for its parameter, which the loader replaces."""
        self.rule, self.gate, self.bias, self.beside = rule, gate, bias, beside

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[T, H]` to the chosen experts, int64 `[T, k]`, and their weights, float32 `[T, k]`.

        Logits are float32.  Few tokens in bfloat16 go to a kernel where `kernels.table` has one for the device.
        """
        return self._choose(x)[:2]

    def with_logit(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and what `beside` makes of `x`: `[T, 1]` in its dtype.  The kernel computes that too."""
        assert self.beside is not None
        chosen, weights, logit = self._choose(x)
        return chosen, weights, self.beside(x) if logit is None else logit

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if x.dtype == torch.bfloat16 and 0 < len(x) <= ROUTED_TOKENS and self._kernel is not None:
            return self._kernel(x)
        return *self.rule.choose(self.gate(x.float()), self.bias()), None

    @functools.cached_property
    def _kernel(self) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]] | None:
        if not _plain(self.gate):
            return None
        weight, beside = self.gate.weight, self.beside
        module = module_for(ROUTE, "router", weight.device)
        row = beside.weight if beside is not None and _plain(beside) and beside.weight.dtype == weight.dtype else None
        return None if module is None else module.prepare(self.rule, weight, self.bias(), row)


def _plain(layer: Linear) -> bool:
    """Whether a layer is a dense matrix and nothing else."""
    return type(layer) is Linear and layer.bias is None

"""Mixtures of experts: stacks of linears, and the loop that sends each token to its experts.

E experts, k of them for each token, T tokens, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runtime.fixed import in_fixed_step
from runtime.kernels.table import Stack, prepare_experts
from runtime.layers import Linear, QuantizedLinear
from runtime.nonlinear import ReLU2, SwiGLU

if TYPE_CHECKING:
    from runtime.builder import LayerBuilder


class ExpertLinears(nn.Module):
    """E linears of one shape and scheme; each stored tensor has the experts as its first axis."""

    def __init__(self, count: int, make: Callable[[], Linear]) -> None:
        super().__init__()
        self._make = make
        self._experts: dict[int, Linear] = {}
        like = make()
        self._quantized = (like.spec, like.activations) if isinstance(like, QuantizedLinear) else None
        for name, one in like.named_parameters():
            stack = torch.empty(count, *one.shape, dtype=one.dtype, device=one.device)
            self.register_parameter(name, nn.Parameter(stack, requires_grad=False))

    def expert(self, index: int) -> Linear:
        """One of the linears: views of the stacks.  Made when first asked for, and kept."""
        if index not in self._experts:
            layer = self._make()
            for name, stack in self.named_parameters():
                setattr(layer, name, nn.Parameter(stack[index], requires_grad=False))
            self._experts[index] = layer
        return self._experts[index]

    def gathered(self, index: Tensor) -> Linear:
        """One of the linears, int64 `[1]`: a copy, for which nothing is read from the device.  Made anew each time."""
        layer = self._make()
        for name, stack in self.named_parameters():
            codes = stack.view(torch.uint8) if stack.dtype == torch.float8_e4m3fn else stack  # not indexed on every device
            setattr(layer, name, nn.Parameter(codes.index_select(0, index)[0].view(stack.dtype), requires_grad=False))
        if isinstance(layer, QuantizedLinear):
            layer.without_reading()
        return layer

    def stack(self) -> Stack | None:
        """Entry, activations and tensors for a kernel; None for experts that are not quantised."""
        return None if self._quantized is None else (*self._quantized, dict(self.named_parameters()))


@dataclass(frozen=True)
class ExpertProjections:
    """Several projections of each expert: a fused stack, or one stack per projection.  Holds no parameters of its own."""

    stacks: tuple[ExpertLinears, ...]
    sizes: tuple[int, ...]

    def __call__(self, expert: int, x: Tensor) -> tuple[Tensor, ...]:
        """`[T, K]` to one `[T, size]` per projection, in their order."""
        if len(self.stacks) == 1:
            return self.stacks[0].expert(expert)(x).split(self.sizes, -1)
        return tuple(stack.expert(expert)(x) for stack in self.stacks)

    def gathered(self, expert: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The same for an expert that only the device knows, int64 `[1]`."""
        if len(self.stacks) == 1:
            return self.stacks[0].gathered(expert)(x).split(self.sizes, -1)
        return tuple(stack.gathered(expert)(x) for stack in self.stacks)


class Experts(nn.Module):
    """`sum over its k experts e of weight_e * down_e(activation(gate_e(x), up_e(x)))` for each token.

    `count`: E.  `inner`: rows of each gate and up.  Without `gated` there is no gate: `activation(up_e(x))`.
    """

    def __init__(
        self,
        build: LayerBuilder,
        name: str,
        count: int,
        inner: int,
        hidden: int,
        activation: SwiGLU | ReLU2,
        gated: bool = True,
    ) -> None:
        super().__init__()
        parts = {"gate_proj": (inner,), "up_proj": (inner,)} if gated else {"up_proj": (inner,)}
        self.first = build.expert_projections(self, f"{name}.{'gate_up_proj' if gated else 'up_proj'}", parts, hidden, count)
        self.down_proj = build.expert_linears(f"{name}.down_proj", hidden, inner, count)
        self.activation = activation
        self._left: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @property
    def input_kind(self) -> tuple[str, None] | None:
        """How the kernels quantise tokens, where that is the same for all experts; see `QuantizedLinear.input_kind`."""
        if self._kernel is None or self._kernel.input_kind is None:
            return None
        return self._kernel.input_kind, None

    def leave(self, x: Tensor, codes: Tensor, scales: Tensor) -> None:
        """What quantising `x` gives, made elsewhere: the next call takes it if its tokens are those of `x`."""
        self._left = x, (codes, scales)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`x` `[T, H]`, `chosen` int64 `[T, k]`, `weights` `[T, k]`; returns `[T, H]` in the dtype of `x`.

        Bfloat16 goes to a kernel where `kernels.table` has one for the device.  Otherwise experts run one after another on the
        tokens that chose them; sums are in float32.
        """
        if x.dtype == torch.bfloat16 and len(x) and self._kernel is not None:
            left, self._left = self._left, None
            same = left is not None and (left[0].data_ptr(), left[0].numel()) == (x.data_ptr(), x.numel())
            return self._kernel(x, chosen, weights, left[1] if left is not None and same else None)
        if in_fixed_step():
            return self._slot_by_slot(x, chosen, weights)
        order = chosen.flatten().argsort(stable=True)
        tokens, share = order // chosen.shape[1], weights.flatten()[order].float()
        y = torch.zeros(x.shape, device=x.device, dtype=torch.float32)
        start = 0
        for expert, count in enumerate(chosen.flatten().bincount().tolist()):
            if count:
                rows = slice(start, start + count)
                out = self.down_proj.expert(expert)(self.activation(*self.first(expert, x[tokens[rows]])))
                y.index_add_(0, tokens[rows], out.float() * share[rows].unsqueeze(-1))
                start += count
        return y.to(x.dtype)

    def _slot_by_slot(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The same where the host must not learn who chose whom: T * k experts in turn, copied out of their stacks."""
        y = torch.zeros(x.shape, device=x.device, dtype=torch.float32)
        for token in range(len(x)):
            for slot in range(chosen.shape[1]):
                expert = chosen[token, slot : slot + 1]
                inner = self.activation(*self.first.gathered(expert, x[token : token + 1]))
                y[token] += self.down_proj.gathered(expert)(inner)[0].float() * weights[token, slot].float()
        return y.to(x.dtype)

    @functools.cached_property
    def _kernel(self) -> Any:
        """All experts on the device of their weights, None where there is nothing for them."""
        first, down = [stack.stack() for stack in self.first.stacks], self.down_proj.stack()
        if len(first) != 1 or first[0] is None or down is None:
            return None
        return prepare_experts(first[0], down, self.activation)

"""What decoder families share: the trunk, the head, the state between calls, and the gated MLP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.architecture import Architecture
from runtime.attention import Positions, Rope
from runtime.builder import LayerBuilder
from runtime.format import CanonicalConfig
from runtime.layers import Linear


@dataclass
class State:
    """What a sequence leaves behind: one cache per layer and the number of tokens seen.  A call updates it in place."""

    caches: list[Any]
    max_length: int
    position: int = 0


class DecoderLayer(Protocol):
    """A block of the trunk."""

    def __call__(self, x: Tensor, at: Positions, cache: Any) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`; `cache` is updated in place."""

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> Any:
        """An empty cache for `max_length` tokens."""


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, architecture: Architecture, build: LayerBuilder, name: str) -> None:
        super().__init__()
        hidden, inner = architecture.hidden_size, architecture.intermediate_size
        parts = {"gate_proj": (inner,), "up_proj": (inner,)}
        self.gate_up = build.projections(self, f"{name}.gate_up_proj", parts, hidden)
        self.down_proj = build.linear(f"{name}.down_proj", hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        gate, up = self.gate_up(x)
        return self.down_proj(F.silu(gate) * up)


class Trunk(nn.Module):
    """Embedding, layers, final norm: everything but the head."""

    def __init__(
        self,
        architecture: Architecture,
        build: LayerBuilder,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        rotary_dim: int,
    ) -> None:
        super().__init__()
        self.dtype = build.dtype
        self.embed_tokens = build.linear("model.embed_tokens", architecture.vocab_size, architecture.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rope = Rope(architecture, rotary_dim, build.device)

    def forward(self, input_ids: Tensor, state: State) -> Tensor:
        """int64 `[B, T]` to hidden states `[B, T, H]` in the compute dtype."""
        x = self.embed_tokens.lookup(input_ids, self.dtype)
        at = self.rope(state.position, input_ids.shape[1], self.dtype)
        for layer, cache in zip(self.layers, state.caches, strict=True):
            x = layer(x, at, cache)
        state.position += input_ids.shape[1]
        return self.norm(x)


class CausalLM(nn.Module):
    """A language model: trunk and head.  A family subclasses it with its layers."""

    architecture_type: ClassVar[type[Architecture]]

    def __init__(self, architecture: Any, build: LayerBuilder) -> None:
        super().__init__()
        self.architecture: Architecture = architecture
        self.config: CanonicalConfig = build.config
        self.device = build.device
        self.model = self.build_trunk(architecture, build)
        self.lm_head: Linear | None = None
        if architecture.head == "separate":
            self.lm_head = build.linear("lm_head", architecture.vocab_size, architecture.hidden_size)

    def build_trunk(self, architecture: Any, build: LayerBuilder) -> Trunk:
        """The trunk of the family."""
        raise NotImplementedError

    def new_state(self, batch: int, max_length: int) -> State:
        """An empty state for `batch` sequences of up to `max_length` tokens, allocated on the model's device.

        Memory: per softmax attention layer 2 * batch * Nkv * max_length * head_dim elements of the compute dtype.
        """
        layers: Iterable[Any] = self.model.layers
        caches = [layer.new_cache(batch, max_length, self.device, self.model.dtype) for layer in layers]
        return State(caches, max_length)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, state: State | None = None, *, last_only: bool = False) -> Tensor:
        """Token ids, int64 `[B, T]`, to float32 logits `[B, T, V]`, or `[B, 1, V]` with `last_only`.

        `state`: what earlier calls on the same sequences left; updated in place.  Without it the sequences start here.
        Raises `ValueError` when `input_ids` has another shape or dtype, or when the state has no room for it.
        """
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids: expected int64 [B, T] with at least one token, found {input_ids.dtype} {list(input_ids.shape)}"
            )
        batch, length = input_ids.shape
        if state is None:
            state = self.new_state(batch, length)
        if state.position + length > state.max_length:
            raise ValueError(
                f"state: expected room for {state.position + length} tokens, found a max_length of {state.max_length}"
            )
        x = self.model(input_ids.to(self.device), state)
        head = self.lm_head if self.lm_head is not None else self.model.embed_tokens
        return head(x[:, -1:] if last_only else x).float()

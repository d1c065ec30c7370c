"""What decoder families share: the trunk, the head, the state between calls, and MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from runtime.architecture import Architecture
from runtime.builder import LayerBuilder
from runtime.fixed import fixed_step
from runtime.format import CONFIG_FILE, CanonicalConfig, FormatError
from runtime.layers import Linear
from runtime.machine import check_memory
from runtime.nonlinear import Feeding, swiglu
from runtime.norms import Delta, total
from runtime.rotary import Rope
from runtime.state import Cache, CacheSize, State, Tokens


class DecoderLayer(Protocol):
    """A block of the trunk."""

    def __call__(self, x: Tensor, delta: Delta | None, at: Tokens, cache: Any) -> tuple[Tensor, Delta]:
        """Takes the residual `[B, T, H]` and what the layer before adds to it, None for nothing; returns both anew: the first
        norm of each layer does the addition.  `cache` is updated in place."""

    def new_cache(self, size: CacheSize) -> Cache | None:
        """An empty cache, or None for a layer that remembers nothing."""


class GatedMLP(nn.Module):
    """`down(activation(gate(x), up(x)))`.  `inner`: rows of each of gate and up."""

    def __init__(
        self,
        build: LayerBuilder,
        name: str,
        hidden: int,
        inner: int,
        activation: Callable[[Tensor, Tensor], Tensor] = swiglu,
        bias: bool = False,
    ) -> None:
        super().__init__()
        parts = {"gate_proj": (inner,), "up_proj": (inner,)}
        self.gate_up = build.projections(self, f"{name}.gate_up_proj", parts, hidden, bias)
        self.down_proj = build.linear(f"{name}.down_proj", hidden, inner, bias)
        self.activation = Feeding(activation, self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., H]` to `[..., H]`."""
        return self.down_proj(self.activation(*self.gate_up(x)))


def readers_of(mlp: nn.Module) -> tuple[nn.Module | None, ...]:
    """What takes the input of an MLP as it is: its first layer, of a mixture that of the shared expert and the experts."""
    shared = getattr(mlp, "shared_expert", mlp)
    return shared.gate_up.only if isinstance(shared, GatedMLP) else None, getattr(mlp, "experts", None)


class Trunk(nn.Module):
    """Embedding, layers, final norm: everything but the head.

    `ropes`: kind of layer -> its rotary positions.  `norm`: name and module of the final norm.  `blocks` are the layers
    that run; where draft heads are stored behind them in one list, `layers` has these too.
    """

    def __init__(
        self,
        architecture: Architecture,
        build: LayerBuilder,
        layers: Iterable[nn.Module],
        norm: tuple[str, nn.Module],
        ropes: Mapping[str, Rope],
    ) -> None:
        super().__init__()
        self.dtype = build.dtype
        self.embed_tokens = build.linear("model.embed_tokens", architecture.vocab_size, architecture.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.blocks = tuple(self.layers)
        self.norm_name = norm[0]
        self.add_module(*norm)
        self.ropes = nn.ModuleDict(ropes)

    def forward(self, input_ids: Tensor, at: Tokens, caches: Sequence[Cache | None]) -> Tensor:
        """int64 `[B, T]` to hidden states before the final norm, `[B, T, H]` in the compute dtype."""
        x, delta = self.embed_tokens.lookup(input_ids, self.dtype), None
        for layer, cache in zip(self.blocks, caches, strict=True):
            x, delta = layer(x, delta, at, cache)
        return x if delta is None else total(x, delta)

    def turned(self, at: Tokens) -> Tokens:
        """`at` with the cosines and sines of its positions."""
        return replace(at, turns={kind: rope(at.positions, self.dtype) for kind, rope in self.ropes.items()})

    def normalize(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.get_submodule(self.norm_name)(x)


class Draft(Protocol):
    """A draft head of the checkpoint (MTP): guesses a token further ahead than the trunk's head.

    It joins what the trunk, or the draft before it, made of each token with the embedding of a later token: for head j that
    of the token j + 1 places on.  Its logits are of the token after that one.
    """

    def __call__(self, hidden: Tensor, embedded: Tensor, at: Tokens, cache: Any) -> Tensor:
        """`[B, T, H]` twice, in the compute dtype, to the `[B, T, H]` that the next draft takes; `cache` is updated."""

    def logits(self, hidden: Tensor, head: Linear) -> Tensor:
        """What a call returned, to float32 logits `[B, T, V]`; `head`: the trunk's, for drafts without one of their own."""

    def new_cache(self, size: CacheSize) -> Cache | None:
        """An empty cache."""


class CausalLM(nn.Module):
    """A language model: trunk, head and perhaps draft heads.  A family subclasses it with its layers.

    `drafts`: also build the draft heads, which the checkpoint must have.
    """

    architecture_type: ClassVar[type[Architecture]]

    def __init__(self, architecture: Any, build: LayerBuilder, drafts: bool = False) -> None:
        super().__init__()
        self.architecture: Architecture = architecture
        self.config: CanonicalConfig = build.config
        self.device = build.device
        self.model = self.build_trunk(architecture, build)
        self.lm_head: Linear | None = None
        if architecture.head == "separate":
            self.lm_head = build.linear("lm_head", architecture.vocab_size, architecture.hidden_size)
        self.drafts: tuple[Draft, ...] = self.build_drafts(architecture, build) if drafts else ()
        if drafts and not self.drafts:
            raise FormatError(
                f"{CONFIG_FILE}: architecture: expected draft heads (MTP), found none; this checkpoint cannot speculate"
            )

    def build_trunk(self, architecture: Any, build: LayerBuilder) -> Trunk:
        """The trunk of the family."""
        raise NotImplementedError

    def build_drafts(self, architecture: Any, build: LayerBuilder) -> tuple[Draft, ...]:
        """The draft heads of the family, registered as modules under their stored names; none where there are none."""
        return ()

    def draft_input(self, hidden: Tensor) -> Tensor:
        """What the first draft takes from the trunk's output before the final norm: here the normalised output."""
        return self.model.normalize(hidden)

    @property
    def head(self) -> Linear:
        """The output head, which may be the embedding."""
        return self.lm_head if self.lm_head is not None else self.model.embed_tokens

    def new_state(self, batch: int, max_length: int, draft: int = 0) -> State:
        """An empty state for `batch` sequences of up to `max_length` tokens, allocated on the model's device.

        `draft`: how many tokens of one call may be taken back (`State.keep`).  Memory: per layer of full attention
        2 * batch * Nkv * max_length * head_dim elements, of the compute dtype or of one byte where the checkpoint has
        scales for its KV cache; layers with a window hold the window; recurrent layers a state of fixed size.
        Raises `MemoryError`, one line with the sizes, before anything is allocated when there is less than that left.
        """
        check_memory(
            self.device,
            self.state_nbytes(batch, max_length, draft),
            f"what {batch} x {max_length} tokens leave behind (KV cache and states)",
            "take fewer or shorter sequences",
        )
        size = CacheSize(batch, max_length, draft, self.device, self.model.dtype)
        return State(self._new_caches(size), size, [0] * batch)

    def state_nbytes(self, batch: int, max_length: int, draft: int = 0) -> int:
        """Bytes that `new_state` allocates for the same arguments."""
        size = CacheSize(batch, max_length, draft, torch.device("meta"), self.model.dtype)
        return sum(x.nbytes for cache in self._new_caches(size) if cache for x in vars(cache).values() if isinstance(x, Tensor))

    def _new_caches(self, size: CacheSize) -> list[Cache | None]:
        blocks: Iterable[Any] = self.model.blocks
        return [block.new_cache(size) for block in blocks]

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        state: State | None = None,
        *,
        counts: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Token ids, int64 `[B, T]`, to float32 logits `[B, T, V]`.

        `state`: what earlier calls on the same sequences left; updated in place.  Without it the sequences start here.
        `counts`: how many of the T tokens are real, for each sequence; the others stand after them, leave no trace, and
        their logits mean nothing.  `last_only`: logits of each sequence's last real token, `[B, 1, V]`.
        Raises `ValueError` when `input_ids` has another shape or dtype, or when the state has no room for it.
        """
        x = self.hidden(input_ids, state, counts)
        if last_only:
            last = [count - 1 for count in counts] if counts is not None else [-1] * len(x)
            x = x[torch.arange(len(x)), last].unsqueeze(1)
        return self.logits(x)

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, state: State | None = None, counts: Sequence[int] | None = None) -> Tensor:
        """As `forward`, up to the output of the last layer: `[B, T, H]` in the compute dtype, before the final norm."""
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids: expected int64 [B, T] with at least one token, found {input_ids.dtype} {list(input_ids.shape)}"
            )
        batch, length = input_ids.shape
        if state is None:
            state = self.new_state(batch, length)
        if len(state.lengths) != batch:
            raise ValueError(f"state: expected one of {batch} sequences, found one of {len(state.lengths)}")
        at = state.place(length, counts)
        longest = max(start + count for start, count in zip(at.starts, at.counts, strict=True))
        if longest > state.max_length:
            raise ValueError(f"state: expected room for {longest} tokens, found a max_length of {state.max_length}")
        x = self.model(input_ids.to(self.device), self.model.turned(at), state.caches)
        state.advance(at.counts)
        return x

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State, real: Tensor) -> Tensor:
        """One more token of each sequence, int64 `[B]`, to float32 logits `[B, V]`, for a graph: nothing is read from the
        device, and no shape depends on a value.

        `state`: settled; its `places` advance.  `real`: bool `[B]`; tokens of the others leave no trace, and their logits mean
        nothing.  The caller sees to it that no sequence outgrows the state.
        """
        at = state.place_fixed(real)
        with fixed_step():
            x = self.model(tokens.unsqueeze(1), self.model.turned(at), state.caches)
            assert state.places is not None
            state.places.add_(real)
            return self.logits(x[:, 0])

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The final norm and the head: `[..., H]` to float32 `[..., V]`."""
        return self.head(self.model.normalize(hidden)).float()

"""Qwen3 dense.  Source: transformers 5.23 `Qwen3ForCausalLM`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from runtime.architecture import RotaryArchitecture, refused
from runtime.builder import LayerBuilder
from runtime.models.base import CausalLM, GatedMLP, Trunk, readers_of
from runtime.norms import Delta, RMSNorm
from runtime.rotary import Rope, rotate, split_heads
from runtime.state import CacheSize, KVCache, Tokens


@dataclass(frozen=True)
class AttentionArchitecture(RotaryArchitecture):
    """The facts of a network whose layers all have softmax attention."""

    layer_kinds = ("full_attention", "sliding_attention")

    sliding_window: int | None

    def check(self) -> None:
        """Raise `FormatError` for values that no such network has."""
        super().check()
        if "sliding_attention" in self.layer_types and not (self.sliding_window and self.sliding_window > 0):
            raise refused("sliding_window", "a number above 0 for layers of type sliding_attention", self.sliding_window)


@dataclass(frozen=True)
class Qwen3Architecture(AttentionArchitecture):
    """The facts of a Qwen3 network."""

    intermediate_size: int


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalised where the family does so (`qk_norm`).

    `out_bias`: whether the output projection has a bias; None: as the others have.
    """

    def __init__(
        self,
        a: AttentionArchitecture,
        build: LayerBuilder,
        name: str,
        index: int,
        qk_norm: bool = True,
        out_bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = a.head_dim
        q_rows, kv_rows = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        parts = {"q_proj": (q_rows,), "k_proj": (kv_rows,), "v_proj": (kv_rows,)}
        self.qkv = build.projections(self, f"{name}.qkv_proj", parts, a.hidden_size, a.attention_bias)
        self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if qk_norm else None
        out_bias = a.attention_bias if out_bias is None else out_bias
        self.o_proj = build.linear(f"{name}.o_proj", a.hidden_size, q_rows, out_bias)
        window = a.sliding_window if a.layer_types[index] == "sliding_attention" else None
        self.kv = build.kv_cache(self, name, a.num_key_value_heads, a.head_dim, window)

    def forward(self, x: Tensor, at: Tokens, cache: KVCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        q, k, v = (split_heads(y, self.head_dim) for y in self.qkv(x))
        y = cache.attend(*rotate(q, k, at, self.q_norm, self.k_norm), v, at)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, a: AttentionArchitecture, attention: Attention, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.mlp = mlp
        self.input_layernorm.feeds(attention.qkv.only)
        self.post_attention_layernorm.feeds(*readers_of(mlp))

    def forward(self, x: Tensor, delta: Delta | None, at: Tokens, cache: KVCache) -> tuple[Tensor, Delta]:
        """See `DecoderLayer`."""
        x, y = self.input_layernorm.after_sum(x, delta)
        x, y = self.post_attention_layernorm.after_sum(x, self.self_attn(y, at, cache))
        return x, self.mlp(y)

    def new_cache(self, size: CacheSize) -> KVCache:
        """An empty cache."""
        return self.self_attn.kv.new_cache(size)


class AttentionLM(CausalLM):
    """A decoder whose layers are `Layer`s: plain norms, rotary positions over the whole head.  A family says `build_layer`."""

    def build_layer(self, architecture: Any, build: LayerBuilder, index: int) -> Layer:
        """Layer `index`."""
        raise NotImplementedError

    def build_trunk(self, architecture: AttentionArchitecture, build: LayerBuilder) -> Trunk:
        """All layers."""
        a = architecture
        layers = [self.build_layer(a, build, i) for i in range(a.num_hidden_layers)]
        rope = Rope(a.rope_theta, a.rope_scaling, a.head_dim, build.device)
        return Trunk(a, build, layers, ("norm", RMSNorm(a.hidden_size, a.rms_norm_eps)), {"default": rope})


class Qwen3(AttentionLM):
    """Qwen3 dense."""

    architecture_type = Qwen3Architecture

    def build_layer(self, architecture: Qwen3Architecture, build: LayerBuilder, index: int) -> Layer:
        """Normalised attention and a gated MLP."""
        a, name = architecture, f"model.layers.{index}"
        attention = Attention(a, build, f"{name}.self_attn", index)
        return Layer(a, attention, GatedMLP(build, f"{name}.mlp", a.hidden_size, a.intermediate_size))

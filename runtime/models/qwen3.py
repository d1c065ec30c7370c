"""Qwen3 dense.  Source: transformers 5.23 `Qwen3ForCausalLM`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.architecture import Architecture, refused
from runtime.attention import KVCache, Positions, causal_attention, split_heads
from runtime.builder import LayerBuilder
from runtime.models.base import MLP, CausalLM, Trunk
from runtime.norms import RMSNorm


@dataclass(frozen=True)
class Qwen3Architecture(Architecture):
    """The facts of a Qwen3 network."""

    sliding_window: int | None

    def check(self) -> None:
        """Raise `FormatError` for values that no Qwen3 has."""
        super().check()
        for kind in self.layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise refused("layer_types", "full_attention or sliding_attention", kind)
        if "sliding_attention" in self.layer_types and not (self.sliding_window and self.sliding_window > 0):
            raise refused("sliding_window", "a number above 0 for layers of type sliding_attention", self.sliding_window)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, a: Qwen3Architecture, build: LayerBuilder, name: str, window: int | None) -> None:
        super().__init__()
        self.head_dim, self.kv_heads, self.window = a.head_dim, a.num_key_value_heads, window
        q_rows, kv_rows = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        parts = {"q_proj": (q_rows,), "k_proj": (kv_rows,), "v_proj": (kv_rows,)}
        self.qkv = build.projections(self, f"{name}.qkv_proj", parts, a.hidden_size, a.attention_bias)
        self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps)
        self.k_norm = RMSNorm(a.head_dim, a.rms_norm_eps)
        self.o_proj = build.linear(f"{name}.o_proj", a.hidden_size, q_rows, a.attention_bias)
        self.round_kv = build.kv_cache(self, name, a.num_key_value_heads)

    def forward(self, x: Tensor, at: Positions, cache: KVCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        q, k, v = (split_heads(y, self.head_dim) for y in self.qkv(x))
        q, k = at.rotate(self.q_norm(q)), at.rotate(self.k_norm(k))
        k, v = cache.append(*self.round_kv(k, v), at.start)
        y = causal_attention(q, k, v, at.start, self.window)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, a: Qwen3Architecture, build: LayerBuilder, index: int) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        window = a.sliding_window if a.layer_types[index] == "sliding_attention" else None
        self.input_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.self_attn = Attention(a, build, f"{name}.self_attn", window)
        self.post_attention_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.mlp = MLP(a, build, f"{name}.mlp")

    def forward(self, x: Tensor, at: Positions, cache: KVCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        x = x + self.self_attn(self.input_layernorm(x), at, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `max_length` tokens."""
        return KVCache(batch, self.self_attn.kv_heads, max_length, self.self_attn.head_dim, device, dtype)


class Qwen3(CausalLM):
    """Qwen3 dense."""

    architecture_type = Qwen3Architecture

    def build_trunk(self, architecture: Qwen3Architecture, build: LayerBuilder) -> Trunk:
        """Layers of full or sliding attention, plain norms, rotary positions over the whole head."""
        a = architecture
        layers = [Layer(a, build, i) for i in range(a.num_hidden_layers)]
        return Trunk(a, build, layers, RMSNorm(a.hidden_size, a.rms_norm_eps), a.head_dim)

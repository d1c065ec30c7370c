"""Qwen3.5 and Qwen3.6 dense, the text network.  Source: transformers 5.23 `Qwen3_5ForConditionalGeneration`.

Layers of linear attention (a gated delta net) and of gated softmax attention alternate.  Every norm multiplies by
`1 + weight`, but the one inside the delta net by `weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.architecture import Architecture, refused
from runtime.attention import KVCache, Positions, causal_attention, split_heads
from runtime.builder import LayerBuilder
from runtime.kernels.gated_delta import gated_delta
from runtime.layers import stored
from runtime.models.base import MLP, CausalLM, Trunk
from runtime.norms import GatedRMSNorm, ZeroCenteredRMSNorm


@dataclass(frozen=True)
class Qwen3_5Architecture(Architecture):  # noqa: N801 (the family's own spelling)
    """The facts of a Qwen3.5 network."""

    rotary_dim: int
    attn_output_gate: bool
    output_gate: str
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    mtp_num_hidden_layers: int

    def check(self) -> None:
        """Raise `FormatError` for values that no Qwen3.5 has."""
        super().check()
        for kind in self.layer_types:
            if kind not in ("full_attention", "linear_attention"):
                raise refused("layer_types", "full_attention or linear_attention", kind)
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise refused("rotary_dim", f"an even number up to the head size {self.head_dim}", self.rotary_dim)
        if not self.attn_output_gate:
            raise refused("attn_output_gate", "true", self.attn_output_gate)
        if self.output_gate not in ("silu", "sigmoid"):
            raise refused("output_gate", "'silu' or 'sigmoid'", self.output_gate)
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise refused(
                "linear_num_value_heads",
                f"a multiple of {self.linear_num_key_heads} key heads",
                self.linear_num_value_heads,
            )


class Attention(nn.Module):
    """Grouped-query attention whose output is gated; the gate comes with the query, head by head."""

    def __init__(self, a: Qwen3_5Architecture, build: LayerBuilder, name: str) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = a.head_dim, a.num_key_value_heads
        q_rows, kv_rows = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        parts = {"q_proj": (2 * q_rows,), "k_proj": (kv_rows,), "v_proj": (kv_rows,)}
        self.qkv = build.projections(self, f"{name}.qkv_proj", parts, a.hidden_size, a.attention_bias)
        self.q_norm = ZeroCenteredRMSNorm(a.head_dim, a.rms_norm_eps)
        self.k_norm = ZeroCenteredRMSNorm(a.head_dim, a.rms_norm_eps)
        self.o_proj = build.linear(f"{name}.o_proj", a.hidden_size, q_rows, a.attention_bias)
        self.round_kv = build.kv_cache(self, name, a.num_key_value_heads)

    def forward(self, x: Tensor, at: Positions, cache: KVCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        q_gate, k, v = self.qkv(x)
        q, gate = split_heads(q_gate, 2 * self.head_dim).chunk(2, -1)  # (B, Nq, T, D) each
        k, v = split_heads(k, self.head_dim), split_heads(v, self.head_dim)
        q, k = at.rotate(self.q_norm(q)), at.rotate(self.k_norm(k))
        k, v = cache.append(*self.round_kv(k, v), at.start)
        y = causal_attention(q, k, v, at.start) * torch.sigmoid(gate)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `max_length` tokens."""
        return KVCache(batch, self.kv_heads, max_length, self.head_dim, device, dtype)


class DeltaCache:
    """What a delta net remembers: inputs of the convolution `[B, C, width - 1]`, and S, float32 `[B, Hv, dk, dv]`."""

    def __init__(self, conv: Tensor, state: Tensor) -> None:
        self.conv = conv
        self.state = state


class CausalConv1d(nn.Module):
    """A convolution over time, channel by channel, that sees the `width - 1` inputs before the first."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = stored(channels, 1, width)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        """`[B, T, C]` to the same.  `history` `[B, C, width - 1]` is used and replaced by the last inputs."""
        seen = torch.cat([history, x.transpose(1, 2)], -1)
        history.copy_(seen[..., seen.shape[-1] - history.shape[-1] :])
        return F.conv1d(seen, self.weight.to(x.dtype), groups=x.shape[-1]).transpose(1, 2)


class GatedDeltaNet(nn.Module):
    """Linear attention: a short convolution, the gated delta rule, a gated norm."""

    def __init__(self, a: Qwen3_5Architecture, build: LayerBuilder, name: str) -> None:
        super().__init__()
        self.key_heads, self.key_dim = a.linear_num_key_heads, a.linear_key_head_dim
        self.value_heads, self.value_dim = a.linear_num_value_heads, a.linear_value_head_dim
        k_rows, v_rows = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        qkvz = {"in_proj_qkv": (k_rows, k_rows, v_rows), "in_proj_z": (v_rows,)}
        ba = {"in_proj_b": (self.value_heads,), "in_proj_a": (self.value_heads,)}
        self.qkv_z = build.projections(self, f"{name}.in_proj_qkvz", qkvz, a.hidden_size)
        self.b_a = build.projections(self, f"{name}.in_proj_ba", ba, a.hidden_size)
        self.conv1d = CausalConv1d(2 * k_rows + v_rows, a.linear_conv_kernel_dim)
        self.A_log = stored(self.value_heads)
        self.dt_bias = stored(self.value_heads)
        self.norm = GatedRMSNorm(self.value_dim, a.rms_norm_eps, a.output_gate)
        self.out_proj = build.linear(f"{name}.out_proj", a.hidden_size, v_rows)

    def forward(self, x: Tensor, at: Positions, cache: DeltaCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`; the positions are not used: order is in the recurrence."""
        qkv, z = self.qkv_z(x)
        b, a = self.b_a(x)
        qkv = F.silu(self.conv1d(qkv, cache.conv))
        k_rows = self.key_heads * self.key_dim
        q, k, v = qkv.split([k_rows, k_rows, self.value_heads * self.value_dim], -1)
        repeats = self.value_heads // self.key_heads  # value head j uses key head j // repeats
        q, k = (
            _unit(split_heads(y, self.key_dim).float()).repeat_interleave(repeats, 1)  # (B, Hv, T, dk)
            for y in (q, k)
        )
        v = split_heads(v, self.value_dim).float()
        beta = b.sigmoid().float().transpose(1, 2)
        g = (-self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)).transpose(1, 2)
        o = gated_delta(q * self.key_dim**-0.5, k, v, g, beta, cache.state)
        o = self.norm(o.transpose(1, 2).to(x.dtype), z.unflatten(-1, (-1, self.value_dim)))
        return self.out_proj(o.flatten(2))

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> DeltaCache:
        """An empty cache; its size does not depend on `max_length`."""
        channels, _, width = self.conv1d.weight.shape
        return DeltaCache(
            torch.zeros(batch, channels, width - 1, device=device, dtype=dtype),
            torch.zeros(batch, self.value_heads, self.key_dim, self.value_dim, device=device, dtype=torch.float32),
        )


def _unit(x: Tensor) -> Tensor:
    """Divide by the length along the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Layer(nn.Module):
    """One of the two attentions and an MLP, each behind a norm and around a residual."""

    def __init__(self, a: Qwen3_5Architecture, build: LayerBuilder, index: int) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        self.input_layernorm = ZeroCenteredRMSNorm(a.hidden_size, a.rms_norm_eps)
        self.is_linear = a.layer_types[index] == "linear_attention"
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(a, build, f"{name}.linear_attn")
        else:
            self.self_attn = Attention(a, build, f"{name}.self_attn")
        self.post_attention_layernorm = ZeroCenteredRMSNorm(a.hidden_size, a.rms_norm_eps)
        self.mlp = MLP(a, build, f"{name}.mlp")

    @property
    def mixer(self) -> GatedDeltaNet | Attention:
        """The layer's attention, of either kind."""
        return self.linear_attn if self.is_linear else self.self_attn

    def forward(self, x: Tensor, at: Positions, cache: KVCache | DeltaCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        x = x + self.mixer(self.input_layernorm(x), at, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> KVCache | DeltaCache:
        """An empty cache for `max_length` tokens."""
        return self.mixer.new_cache(batch, max_length, device, dtype)


class Qwen3_5(CausalLM):  # noqa: N801 (the family's own spelling)
    """Qwen3.5 and Qwen3.6 dense."""

    architecture_type = Qwen3_5Architecture

    def build_trunk(self, architecture: Qwen3_5Architecture, build: LayerBuilder) -> Trunk:
        """Both kinds of layers, zero-centred norms, rotary positions over part of the head."""
        a = architecture
        layers = [Layer(a, build, i) for i in range(a.num_hidden_layers)]
        return Trunk(a, build, layers, ZeroCenteredRMSNorm(a.hidden_size, a.rms_norm_eps), a.rotary_dim)

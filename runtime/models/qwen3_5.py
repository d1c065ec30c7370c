"""Qwen3.5 and Qwen3.6 dense, the text network.  Source: transformers 5.23 `Qwen3_5ForConditionalGeneration`.

Layers of linear attention (a gated delta net) and of gated softmax attention alternate.  Every norm multiplies by
`1 + weight`, but the one inside the delta net by `weight`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.architecture import RotaryArchitecture, refused
from runtime.builder import LayerBuilder
from runtime.convolution import CausalConv1d
from runtime.kernels.gated_delta import Sizes, gated_delta, projects
from runtime.kernels.table import DELTA_SCAN, DELTA_STEP
from runtime.layers import Linear, stored
from runtime.models.base import CausalLM, Draft, GatedMLP, Trunk, readers_of
from runtime.nonlinear import Feeding, output_gate
from runtime.norms import Delta, GatedRMSNorm, ZeroCenteredRMSNorm
from runtime.recurrent import RecurrentMixer
from runtime.rotary import Rope, rotate, split_heads
from runtime.state import CacheSize, KVCache, RecurrentCache, Tokens


@dataclass(frozen=True)
class HybridArchitecture(RotaryArchitecture):
    """The facts of a network of linear and softmax attention."""

    layer_kinds = ("full_attention", "linear_attention")

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


@dataclass(frozen=True)
class Qwen3_5Architecture(HybridArchitecture):  # noqa: N801 (the family's own spelling)
    """The facts of a Qwen3.5 network."""

    intermediate_size: int


class Attention(nn.Module):
    """Grouped-query attention whose output is gated; the gate comes with the query, head by head."""

    def __init__(self, a: HybridArchitecture, build: LayerBuilder, name: str) -> None:
        super().__init__()
        self.head_dim = a.head_dim
        q_rows, kv_rows = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        parts = {"q_proj": (2 * q_rows,), "k_proj": (kv_rows,), "v_proj": (kv_rows,)}
        self.qkv = build.projections(self, f"{name}.qkv_proj", parts, a.hidden_size, a.attention_bias)
        self.first = (self.qkv.only,)  # what takes the input; no child of this name
        self.q_norm = ZeroCenteredRMSNorm(a.head_dim, a.rms_norm_eps)
        self.k_norm = ZeroCenteredRMSNorm(a.head_dim, a.rms_norm_eps)
        self.o_proj = build.linear(f"{name}.o_proj", a.hidden_size, q_rows, a.attention_bias)
        self.gated = Feeding(output_gate, self.o_proj)
        self.kv = build.kv_cache(self, name, a.num_key_value_heads, a.head_dim)

    def forward(self, x: Tensor, at: Tokens, cache: KVCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        q_gate, k, v = self.qkv(x)
        q, gate = split_heads(q_gate, 2 * self.head_dim).chunk(2, -1)  # (B, Nq, T, D) each
        k, v = split_heads(k, self.head_dim), split_heads(v, self.head_dim)
        y = cache.attend(*rotate(q, k, at, self.q_norm, self.k_norm), v, at)
        return self.o_proj(self.gated(y, gate))

    def new_cache(self, size: CacheSize) -> KVCache:
        """An empty cache."""
        return self.kv.new_cache(size)


class GatedDeltaNet(RecurrentMixer):
    """Linear attention: a short convolution, the gated delta rule, a gated norm."""

    step_operation, scan_operation = DELTA_STEP, DELTA_SCAN
    recurrence = staticmethod(gated_delta)

    def __init__(self, a: HybridArchitecture, build: LayerBuilder, name: str) -> None:
        super().__init__()
        self.key_heads, self.key_dim = a.linear_num_key_heads, a.linear_key_head_dim
        self.value_heads, self.value_dim = a.linear_num_value_heads, a.linear_value_head_dim
        k_rows, v_rows = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        qkvz = {"in_proj_qkv": (k_rows, k_rows, v_rows), "in_proj_z": (v_rows,)}
        ba = {"in_proj_b": (self.value_heads,), "in_proj_a": (self.value_heads,)}
        self.qkv_z = build.projections(self, f"{name}.in_proj_qkvz", qkvz, a.hidden_size)
        self.first = (self.qkv_z.only,)  # what takes the input; no child of this name
        self.b_a = build.projections(self, f"{name}.in_proj_ba", ba, a.hidden_size)
        self.conv1d = CausalConv1d(2 * k_rows + v_rows, a.linear_conv_kernel_dim)
        self.A_log = stored(self.value_heads)
        self.dt_bias = stored(self.value_heads)
        self.norm = GatedRMSNorm(self.value_dim, a.rms_norm_eps, a.output_gate)
        self.out_proj = build.linear(f"{name}.out_proj", a.hidden_size, v_rows)
        self.sizes = Sizes(
            self.key_heads, self.value_heads, self.key_dim, self.value_dim,
            a.linear_conv_kernel_dim, a.rms_norm_eps, a.output_gate,
        )  # fmt: skip

    def forward(self, x: Tensor, at: Tokens, cache: RecurrentCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`; no rotary positions: order is in the recurrence."""
        return self.out_proj(self.recur(*self.qkv_z(x), x, at=at, cache=cache))

    def for_kernel(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """With b and a, unless it projects them itself."""
        qkv, z, x = inputs
        return inputs if self._kernel_projects else (qkv, z, torch.cat(self.b_a(x), -1))

    @functools.cached_property
    def _kernel_projects(self) -> bool:
        return projects(dict(self.named_parameters()))

    def mix(self, qkv: Tensor, z: Tensor, x: Tensor, *, at: Tokens, cache: RecurrentCache) -> Tensor:
        """`[B, T, channels]`, `[B, T, Hv * dv]` and the layer's input `[B, T, H]` to `[B, T, Hv * dv]`."""
        b, a = self.b_a(x)
        qkv = F.silu(self.conv1d(qkv, at, cache))
        k_rows = self.key_heads * self.key_dim
        q, k, v = qkv.split([k_rows, k_rows, self.value_heads * self.value_dim], -1)
        repeats = self.value_heads // self.key_heads  # value head j uses key head j // repeats
        q, k = (
            _unit(split_heads(y, self.key_dim).float()).repeat_interleave(repeats, 1)  # (B, Hv, T, dk)
            for y in (q, k)
        )
        v = split_heads(v, self.value_dim).float()
        beta = at.silence(b.sigmoid().float()).transpose(1, 2)  # no write and no decay where no token is
        g = at.silence(-self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)).transpose(1, 2)
        o = cache.scan(self.over_time(z.dtype), (q * self.key_dim**-0.5, k, v, g, beta), at)
        return self.norm(o.transpose(1, 2).to(z.dtype), z.unflatten(-1, (-1, self.value_dim))).flatten(2)

    def new_cache(self, size: CacheSize) -> RecurrentCache:
        """An empty cache; its size does not depend on how long the sequence is."""
        channels, _, width = self.conv1d.weight.shape
        return RecurrentCache(size, channels, width, (self.value_heads, self.key_dim, self.value_dim))


def _unit(x: Tensor) -> Tensor:
    """Divide by the length along the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Layer(nn.Module):
    """One of the two attentions and an MLP, each behind a norm and around a residual."""

    def __init__(self, a: HybridArchitecture, build: LayerBuilder, name: str, kind: str, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = ZeroCenteredRMSNorm(a.hidden_size, a.rms_norm_eps)
        self.is_linear = kind == "linear_attention"
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(a, build, f"{name}.linear_attn")
        else:
            self.self_attn = Attention(a, build, f"{name}.self_attn")
        self.post_attention_layernorm = ZeroCenteredRMSNorm(a.hidden_size, a.rms_norm_eps)
        self.mlp = mlp
        self.input_layernorm.feeds(*self.mixer.first)
        self.post_attention_layernorm.feeds(*readers_of(mlp))

    @property
    def mixer(self) -> GatedDeltaNet | Attention:
        """The layer's attention, of either kind."""
        return self.linear_attn if self.is_linear else self.self_attn

    def forward(self, x: Tensor, delta: Delta | None, at: Tokens, cache: KVCache | RecurrentCache) -> tuple[Tensor, Delta]:
        """See `DecoderLayer`."""
        x, y = self.input_layernorm.after_sum(x, delta)
        x, y = self.post_attention_layernorm.after_sum(x, self.mixer(y, at, cache))
        return x, self.mlp(y)

    def new_cache(self, size: CacheSize) -> KVCache | RecurrentCache:
        """An empty cache."""
        return self.mixer.new_cache(size)


class MTP(nn.Module):
    """The draft head: a layer of softmax attention on the embedding and the hidden state joined.

    One such layer may be run again on its own output.  Source: vLLM 0.33 `qwen3_5_mtp.py`.
    """

    def __init__(self, a: HybridArchitecture, build: LayerBuilder, mlp: nn.Module) -> None:
        super().__init__()
        hidden = a.hidden_size
        self.pre_fc_norm_embedding = ZeroCenteredRMSNorm(hidden, a.rms_norm_eps)
        self.pre_fc_norm_hidden = ZeroCenteredRMSNorm(hidden, a.rms_norm_eps)
        self.fc = build.linear("mtp.fc", hidden, 2 * hidden)
        self.layers = nn.ModuleList([Layer(a, build, "mtp.layers.0", "full_attention", mlp)])
        self.norm = ZeroCenteredRMSNorm(hidden, a.rms_norm_eps)

    def forward(self, hidden: Tensor, embedded: Tensor, at: Tokens, cache: KVCache) -> Tensor:
        """`[B, T, H]` twice to `[B, T, H]`."""
        joined = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], -1)
        return self.norm.after_sum(*self.layers[0](self.fc(joined), None, at, cache))[1]

    def logits(self, hidden: Tensor, head: Linear) -> Tensor:
        """By the trunk's head."""
        return head(hidden).float()

    def new_cache(self, size: CacheSize) -> KVCache | RecurrentCache:
        """An empty cache."""
        layer = self.layers[0]
        assert isinstance(layer, Layer)
        return layer.new_cache(size)


class HybridLM(CausalLM):
    """Layers of both kinds, zero-centred norms, rotary positions over part of the head.  A family says `build_mlp`."""

    def build_mlp(self, architecture: Any, build: LayerBuilder, name: str) -> nn.Module:
        """The MLP called `name`."""
        raise NotImplementedError

    def build_trunk(self, architecture: HybridArchitecture, build: LayerBuilder) -> Trunk:
        """All layers."""
        a = architecture
        layers = [
            Layer(a, build, f"model.layers.{i}", kind, self.build_mlp(a, build, f"model.layers.{i}.mlp"))
            for i, kind in enumerate(a.layer_types)
        ]
        rope = Rope(a.rope_theta, a.rope_scaling, a.rotary_dim, build.device)
        return Trunk(a, build, layers, ("norm", ZeroCenteredRMSNorm(a.hidden_size, a.rms_norm_eps)), {"default": rope})


    def build_drafts(self, architecture: HybridArchitecture, build: LayerBuilder) -> tuple[Draft, ...]:
        """One head; published models have no more."""
        if "mtp" not in build.config.carried:
            return ()
        if architecture.mtp_num_hidden_layers != 1:
            raise refused("mtp_num_hidden_layers", "1, as there is a draft head", architecture.mtp_num_hidden_layers)
        self.mtp = MTP(architecture, build, self.build_mlp(architecture, build, "mtp.layers.0.mlp"))
        return (self.mtp,)


class Qwen3_5(HybridLM):  # noqa: N801 (the family's own spelling)
    """Qwen3.5 and Qwen3.6 dense."""

    architecture_type = Qwen3_5Architecture

    def build_mlp(self, architecture: Qwen3_5Architecture, build: LayerBuilder, name: str) -> GatedMLP:
        """A gated MLP."""
        return GatedMLP(build, name, architecture.hidden_size, architecture.intermediate_size)

"""Step3: attention with factorised queries and one key and value head, experts beside one that every token has.

Source: vLLM 0.33 `step3_text.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from runtime.architecture import Architecture, refused
from runtime.builder import LayerBuilder, Projections
from runtime.experts import Experts
from runtime.models.base import CausalLM, GatedMLP, Trunk, readers_of
from runtime.models.qwen3_moe import check_experts
from runtime.nonlinear import swiglu
from runtime.norms import Delta, Parts, RMSNorm
from runtime.rotary import Rope, rotate, split_heads
from runtime.routing import Router, Rule
from runtime.state import CacheSize, KVCache, KVFormat, Tokens


@dataclass(frozen=True)
class StepArchitecture(Architecture):
    """The facts of both generations of Step."""

    may_be_zero = frozenset({"num_experts", "num_experts_per_tok", "moe_intermediate_size", "share_expert_dim"})

    intermediate_size: int
    mlp_layer_types: tuple[str, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    share_expert_dim: int
    norm_expert_weight: bool | None
    rope_scaling: dict[str, Any] | None

    def check(self) -> None:
        """Raise `FormatError` for values that no Step has."""
        super().check()
        if len(self.mlp_layer_types) != self.num_hidden_layers or not {*self.mlp_layer_types} <= {"dense", "sparse"}:
            raise refused(
                "mlp_layer_types", f"{self.num_hidden_layers} entries of dense or sparse", list(self.mlp_layer_types)
            )
        check_experts(self.num_experts, self.num_experts_per_tok)
        for name in sorted(StepArchitecture.may_be_zero):
            if "sparse" in self.mlp_layer_types and getattr(self, name) == 0:
                raise refused(name, "a number above 0, as there are sparse layers", 0)

    @property
    def normalize(self) -> bool:
        """Whether the weights of a token's experts are divided by their sum; so where the config says nothing."""
        return self.norm_expert_weight is not False


@dataclass(frozen=True)
class Step3Architecture(StepArchitecture):
    """The facts of a Step3 network."""

    share_q_dim: int
    rope_theta: float

    def check(self) -> None:
        """Raise `FormatError` for values that no Step3 has."""
        super().check()
        if self.num_key_value_heads != 1:
            raise refused("num_key_value_heads", "1", self.num_key_value_heads)


class StepAttention(nn.Module):
    """Attention of either generation; `qkv` takes the input, `kv` says how it keeps keys and values."""

    qkv: Projections
    kv: KVFormat


class Attention(StepAttention):
    """All query heads, which come out of a bottleneck, share one key and value head."""

    def __init__(self, a: Step3Architecture, build: LayerBuilder, name: str) -> None:
        super().__init__()
        self.head_dim = a.head_dim
        q_rows = a.num_attention_heads * a.head_dim
        parts = {"q_proj": (a.share_q_dim,), "k_proj": (a.head_dim,), "v_proj": (a.head_dim,)}
        self.qkv = build.projections(self, f"{name}.qkv_proj", parts, a.hidden_size)
        self.inter_norm = RMSNorm(a.share_q_dim, a.rms_norm_eps)
        self.wq = build.linear(f"{name}.wq", q_rows, a.share_q_dim)
        self.o_proj = build.linear(f"{name}.o_proj", a.hidden_size, q_rows)
        self.kv = build.kv_cache(self, name, a.num_key_value_heads, a.head_dim)

    def forward(self, x: Tensor, at: Tokens, cache: KVCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        q, k, v = self.qkv(x)
        q, k, v = (split_heads(y, self.head_dim) for y in (self.wq(self.inter_norm(q)), k, v))
        y = cache.attend(*rotate(q, k, at), v, at)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MoE(nn.Module):
    """Routed experts."""

    def __init__(self, a: Step3Architecture, build: LayerBuilder, name: str) -> None:
        super().__init__()
        self.gate = build.linear(f"{name}.gate", a.num_experts, a.hidden_size)
        self.route = Router(Rule(a.num_experts_per_tok, "softmax", a.normalize), self.gate)
        self.experts = Experts(build, f"{name}.experts", a.num_experts, a.moe_intermediate_size, a.hidden_size, swiglu)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        tokens = x.flatten(0, 1)
        return self.experts(tokens, *self.route(tokens)).view_as(x)


class Layer(nn.Module):
    """Attention, and the sum of `branches`, each behind a norm and around a residual.

    `branches`: name -> MLP, routed experts, or the expert that every token has.  `norm`: the class of both norms.
    """

    def __init__(
        self, a: StepArchitecture, norm: type[RMSNorm], attention: StepAttention, branches: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.input_layernorm = norm(a.hidden_size, a.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = norm(a.hidden_size, a.rms_norm_eps)
        self.branches = tuple(branches.values())
        for name, branch in branches.items():
            self.add_module(name, branch)
        self.input_layernorm.feeds(attention.qkv.only)
        self.post_attention_layernorm.feeds(*chain.from_iterable(map(readers_of, self.branches)))

    def forward(self, x: Tensor, delta: Delta | None, at: Tokens, cache: KVCache) -> tuple[Tensor, Delta]:
        """See `DecoderLayer`."""
        x, y = self.input_layernorm.after_sum(x, delta)
        x, y = self.post_attention_layernorm.after_sum(x, self.self_attn(y, at, cache))
        first, *rest = [branch(y) for branch in self.branches]
        return x, Parts(first, *rest) if rest else first

    def new_cache(self, size: CacheSize) -> KVCache:
        """An empty cache."""
        return self.self_attn.kv.new_cache(size)


class Step3(CausalLM):
    """Step3."""

    architecture_type = Step3Architecture

    def build_trunk(self, architecture: Step3Architecture, build: LayerBuilder) -> Trunk:
        """All layers."""
        a = architecture
        layers = [self.build_layer(a, build, i) for i in range(a.num_hidden_layers)]
        rope = Rope(a.rope_theta, a.rope_scaling, a.head_dim, build.device)
        return Trunk(a, build, layers, ("norm", RMSNorm(a.hidden_size, a.rms_norm_eps)), {"default": rope})

    def build_layer(self, a: Step3Architecture, build: LayerBuilder, index: int) -> Layer:
        """Factorised attention, and an MLP or experts."""
        name, branches = f"model.layers.{index}", dict[str, nn.Module]()
        if a.mlp_layer_types[index] == "sparse":
            branches["moe"] = MoE(a, build, f"{name}.moe")
            branches["share_expert"] = GatedMLP(build, f"{name}.share_expert", a.hidden_size, a.share_expert_dim)
        else:
            branches["mlp"] = GatedMLP(build, f"{name}.mlp", a.hidden_size, a.intermediate_size)
        return Layer(a, RMSNorm, Attention(a, build, f"{name}.self_attn"), branches)

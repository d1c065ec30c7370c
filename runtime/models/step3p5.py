"""Step-3.5 and Step-3.7, the text network.

Full and sliding attention have different numbers of heads, and layers their own rotary positions.  Every norm multiplies by
`1 + weight`.  Source: transformers 5.23 `Step3p7ForConditionalGeneration`; vLLM 0.33 `step3p5.py`, `step3p5_mtp.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from runtime.architecture import refused
from runtime.builder import LayerBuilder
from runtime.experts import Experts
from runtime.layers import Linear, stored
from runtime.models.base import CausalLM, Draft, GatedMLP, Trunk
from runtime.models.step3_text import Layer, StepArchitecture, StepAttention
from runtime.nonlinear import Feeding, SwiGLU, output_gate
from runtime.norms import ZeroCenteredRMSNorm, total
from runtime.rotary import Rope, rotate, split_heads
from runtime.routing import Router, Rule
from runtime.state import KVCache, Tokens

V = TypeVar("V")
KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Step3p5Architecture(StepArchitecture):
    """The facts of a Step-3.5 network.  Lists by layer go on with the draft heads."""

    may_be_zero = StepArchitecture.may_be_zero | {"num_nextn_predict_layers"}

    layer_types: tuple[str, ...]
    layer_kinds: tuple[str, ...]
    mtp_layer_kinds: tuple[str, ...]
    num_sliding_attention_heads: int
    num_sliding_key_value_heads: int
    sliding_window: int | None
    rope_theta: float | tuple[float, ...] | None
    partial_rotary_factors: tuple[float, ...] | None
    rope_parameters: dict[str, Any] | None
    yarn_only_types: tuple[str, ...] | None
    router_scaling_factor: float
    swiglu_limits: tuple[float | None, ...] | None
    swiglu_limits_shared: tuple[float | None, ...] | None
    use_moe_router_bias: bool
    layer_scale: bool
    num_nextn_predict_layers: int

    def check(self) -> None:
        """Raise `FormatError` for values that no Step-3.5 has."""
        super().check()
        count = self.num_hidden_layers
        kinds = tuple(f"{kind}.{mlp}" for kind, mlp in zip(self.layer_types, self.mlp_layer_types))
        if len(self.layer_types) != count or self.layer_kinds != kinds:
            raise refused("layer_kinds", f"{count} entries, of layer_types and mlp_layer_types", list(self.layer_kinds))
        for kind in (*self.layer_types, *(kind.removesuffix(".dense") for kind in self.mtp_layer_kinds)):
            if kind not in KINDS:
                raise refused("layer_types or mtp_layer_kinds", " or ".join(KINDS), kind)
        if "sliding_attention" in self.layer_types and not (self.sliding_window and self.sliding_window > 0):
            raise refused("sliding_window", "a number above 0 for layers of type sliding_attention", self.sliding_window)
        if self.num_sliding_attention_heads % self.num_sliding_key_value_heads:
            raise refused(
                "num_sliding_attention_heads",
                f"a multiple of {self.num_sliding_key_value_heads} KV heads",
                self.num_sliding_attention_heads,
            )
        if self.layer_scale:
            raise refused("layer_scale", "false", True)

    def attention_type(self, index: int) -> str:
        """Of a layer, or of the draft head that comes `index - num_hidden_layers` after the layers."""
        return (*self.layer_kinds, *self.mtp_layer_kinds)[index].partition(".")[0]

    def rope(self, index: int) -> tuple[float, dict[str, Any] | None, int]:
        """Base, scaling and number of turned elements per head of a layer."""
        kind = self.attention_type(index)
        if self.rope_parameters is not None:
            if not isinstance(self.rope_parameters.get(kind), dict):
                raise refused("rope_parameters", f"an object for {kind}", self.rope_parameters)
            fields = {"rope_type": "default", **self.rope_parameters[kind]}
            theta, factor = fields.pop("rope_theta", None), fields.pop("partial_rotary_factor", 1.0)
            scaling: dict[str, Any] | None = fields
        else:
            scaling = self.rope_scaling if not self.yarn_only_types or kind in self.yarn_only_types else None
            theta = self.rope_theta
            if isinstance(theta, tuple):
                theta = entry("rope_theta", theta, index)
            factors = self.partial_rotary_factors
            factor = entry("partial_rotary_factors", factors, index) if factors else 1.0
        rotary_dim = int(self.head_dim * factor)
        if not isinstance(theta, float | int) or theta <= 0:
            raise refused("rope_theta", "a number above 0", theta)
        if rotary_dim % 2 or not 0 < rotary_dim <= self.head_dim:
            raise refused("partial_rotary_factors", f"an even part of the head size {self.head_dim}", factor)
        return theta, scaling, rotary_dim

    def rope_name(self, index: int) -> str:
        """The first layer whose rotary positions are those of layer `index`, as a name."""
        same = next(i for i in range(index + 1) if self.rope(i) == self.rope(index))
        return f"as in layer {same}"


def entry(name: str, values: tuple[V, ...], index: int) -> V:
    """Element `index` of a list by layer.  Raises `FormatError` when the list is too short."""
    if index >= len(values):
        raise refused(name, f"an entry for layer {index}", list(values))
    return values[index]


def clipped_swiglu(limits: tuple[float | None, ...] | None, index: int) -> SwiGLU:
    """The activation of layer `index`; 0, null and no entry are no limit."""
    return SwiGLU((limits[index] if limits is not None and index < len(limits) else None) or None)


class Attention(StepAttention):
    """Grouped-query attention; each head's output is gated by one number."""

    def __init__(self, a: Step3p5Architecture, build: LayerBuilder, name: str, index: int) -> None:
        super().__init__()
        self.head_dim, self.rope = a.head_dim, a.rope_name(index)
        heads, kv_heads, window = a.num_attention_heads, a.num_key_value_heads, None
        if a.attention_type(index) == "sliding_attention":
            heads, kv_heads, window = a.num_sliding_attention_heads, a.num_sliding_key_value_heads, a.sliding_window
        q_rows, kv_rows = heads * a.head_dim, kv_heads * a.head_dim
        parts = {"q_proj": (q_rows,), "k_proj": (kv_rows,), "v_proj": (kv_rows,)}
        self.qkv = build.projections(self, f"{name}.qkv_proj", parts, a.hidden_size)
        self.q_norm = ZeroCenteredRMSNorm(a.head_dim, a.rms_norm_eps)
        self.k_norm = ZeroCenteredRMSNorm(a.head_dim, a.rms_norm_eps)
        self.g_proj = build.linear(f"{name}.g_proj", heads, a.hidden_size)
        self.o_proj = build.linear(f"{name}.o_proj", a.hidden_size, q_rows)
        self.gated = Feeding(output_gate, self.o_proj)
        self.kv = build.kv_cache(self, name, kv_heads, a.head_dim, window)

    def forward(self, x: Tensor, at: Tokens, cache: KVCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        q, k, v = (split_heads(y, self.head_dim) for y in self.qkv(x))
        q, k = rotate(q, k, at, self.q_norm, self.k_norm, self.rope)
        gate = self.g_proj(x).transpose(1, 2).unsqueeze(-1)  # (B, Nq, T, 1)
        return self.o_proj(self.gated(cache.attend(q, k, v, at), gate))


class MoE(nn.Module):
    """Routed experts: a sigmoid scores each, and a bias has a say in which are chosen but not in their weights."""

    def __init__(self, a: Step3p5Architecture, build: LayerBuilder, name: str, index: int) -> None:
        super().__init__()
        self.gate = build.linear(f"{name}.gate", a.num_experts, a.hidden_size)
        self.router_bias = stored(a.num_experts, dtype="F32") if a.use_moe_router_bias else None
        rule = Rule(a.num_experts_per_tok, "sigmoid", a.normalize, scale=a.router_scaling_factor)
        self.route = Router(rule, self.gate, lambda: self.router_bias)
        activation = clipped_swiglu(a.swiglu_limits, index)
        self.experts = Experts(
            build, f"{name}.experts", a.num_experts, a.moe_intermediate_size, a.hidden_size, activation
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        tokens = x.flatten(0, 1)
        return self.experts(tokens, *self.route(tokens)).view_as(x)


def step_layer(a: Step3p5Architecture, build: LayerBuilder, index: int, sparse: bool) -> tuple[Attention, dict[str, nn.Module]]:
    """Gated attention, and an MLP or experts: what a `Layer` is made of."""
    name, activation = f"model.layers.{index}", clipped_swiglu(a.swiglu_limits_shared, index)
    branches: dict[str, nn.Module] = {}
    if sparse:
        branches["moe"] = MoE(a, build, f"{name}.moe", index)
        branches["share_expert"] = GatedMLP(build, f"{name}.share_expert", a.hidden_size, a.share_expert_dim, activation)
    else:
        branches["mlp"] = GatedMLP(build, f"{name}.mlp", a.hidden_size, a.intermediate_size, activation)
    return Attention(a, build, f"{name}.self_attn", index), branches


class MTP(Layer):
    """A draft head: a dense layer on the embedding and the hidden state joined, with an output norm and matrix of its own.

    The first takes the trunk's output before the final norm, the next that of the first before its norm, and so on.
    """

    def __init__(self, a: Step3p5Architecture, build: LayerBuilder, index: int) -> None:
        super().__init__(a, ZeroCenteredRMSNorm, *step_layer(a, build, index, sparse=False))
        name, hidden = f"model.layers.{index}", a.hidden_size
        self.enorm = ZeroCenteredRMSNorm(hidden, a.rms_norm_eps)
        self.hnorm = ZeroCenteredRMSNorm(hidden, a.rms_norm_eps)
        self.eh_proj = build.linear(f"{name}.eh_proj", hidden, 2 * hidden)
        head = build.linear(f"{name}.shared_head.head", a.vocab_size, hidden)
        self.shared_head = nn.ModuleDict({"norm": ZeroCenteredRMSNorm(hidden, a.rms_norm_eps), "head": head})

    def forward(self, hidden: Tensor, embedded: Tensor, at: Tokens, cache: KVCache) -> Tensor:  # type: ignore[override]
        """`[B, T, H]` twice to `[B, T, H]`."""
        joined = torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1)
        return total(*super().forward(self.eh_proj(joined), None, at, cache))

    def logits(self, hidden: Tensor, head: Linear) -> Tensor:
        """By its own norm and matrix."""
        return self.shared_head["head"](self.shared_head["norm"](hidden)).float()


class Step3p5(CausalLM):
    """Step-3.5 and Step-3.7."""

    architecture_type = Step3p5Architecture

    def build_trunk(self, architecture: Step3p5Architecture, build: LayerBuilder) -> Trunk:
        """All layers."""
        a = architecture
        layers = [
            Layer(a, ZeroCenteredRMSNorm, *step_layer(a, build, i, sparse=kind == "sparse"))
            for i, kind in enumerate(a.mlp_layer_types)
        ]
        ropes = {a.rope_name(i): Rope(*a.rope(i), build.device) for i in range(a.num_hidden_layers)}
        return Trunk(a, build, layers, ("norm", ZeroCenteredRMSNorm(a.hidden_size, a.rms_norm_eps)), ropes)

    def build_drafts(self, architecture: Step3p5Architecture, build: LayerBuilder) -> tuple[Draft, ...]:
        """The heads that the checkpoint has; they are stored behind the trunk's layers, in the same list."""
        a, drafts = architecture, []
        for i in range(a.num_hidden_layers, a.num_hidden_layers + len(a.mtp_layer_kinds)):
            if f"model.layers.{i}" in build.config.carried:
                drafts.append(MTP(a, build, i))
                self.model.layers.append(drafts[-1])
                self.model.ropes[a.rope_name(i)] = Rope(*a.rope(i), build.device)
        return tuple(drafts)

    def draft_input(self, hidden: Tensor) -> Tensor:
        """The trunk's output as it is."""
        return hidden

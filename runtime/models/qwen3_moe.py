"""Qwen3-MoE, and the text network of Qwen3-VL-MoE.

Source: transformers 5.23 `Qwen3MoeForCausalLM`, `Qwen3VLMoeForConditionalGeneration`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from runtime.architecture import refused
from runtime.builder import LayerBuilder
from runtime.experts import Experts
from runtime.models.base import GatedMLP
from runtime.models.qwen3 import Attention, AttentionArchitecture, AttentionLM, Layer
from runtime.nonlinear import swiglu
from runtime.routing import Router, Rule


@dataclass(frozen=True)
class Qwen3MoeArchitecture(AttentionArchitecture):
    """The facts of a Qwen3-MoE network."""

    intermediate_size: int | None
    mlp_layer_types: tuple[str, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool

    def check(self) -> None:
        """Raise `FormatError` for values that no Qwen3-MoE has."""
        super().check()
        check_experts(self.num_experts, self.num_experts_per_tok)
        if len(self.mlp_layer_types) != self.num_hidden_layers or not {*self.mlp_layer_types} <= {"dense", "sparse"}:
            raise refused(
                "mlp_layer_types", f"{self.num_hidden_layers} entries of dense or sparse", list(self.mlp_layer_types)
            )
        if "dense" in self.mlp_layer_types and self.intermediate_size is None:
            raise refused("intermediate_size", "a number, as there are dense layers", None)


def check_experts(count: int, per_token: int) -> None:
    """Raise `FormatError` when a token cannot have so many experts."""
    if per_token > count:
        raise refused("num_experts_per_tok", f"at most the {count} experts", per_token)


class SparseMLP(nn.Module):
    """Routed experts."""

    def __init__(self, a: Qwen3MoeArchitecture, build: LayerBuilder, name: str) -> None:
        super().__init__()
        self.gate = build.linear(f"{name}.gate", a.num_experts, a.hidden_size)
        self.route = Router(Rule(a.num_experts_per_tok, "softmax", a.norm_topk_prob), self.gate)
        self.experts = Experts(build, f"{name}.experts", a.num_experts, a.moe_intermediate_size, a.hidden_size, swiglu)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        tokens = x.flatten(0, 1)
        return self.experts(tokens, *self.route(tokens)).view_as(x)


class Qwen3Moe(AttentionLM):
    """Qwen3-MoE and Qwen3-VL-MoE."""

    architecture_type = Qwen3MoeArchitecture

    def build_layer(self, architecture: Qwen3MoeArchitecture, build: LayerBuilder, index: int) -> Layer:
        """Normalised attention, and experts or a gated MLP."""
        a, name = architecture, f"model.layers.{index}"
        mlp: nn.Module
        if a.mlp_layer_types[index] == "sparse":
            mlp = SparseMLP(a, build, f"{name}.mlp")
        else:
            mlp = GatedMLP(build, f"{name}.mlp", a.hidden_size, a.intermediate_size or 0)
        return Layer(a, Attention(a, build, f"{name}.self_attn", index), mlp)

"""Qwen3.5 and Qwen3.6 with experts, the text network.  Source: transformers 5.23 `Qwen3_5MoeForConditionalGeneration`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from runtime.builder import LayerBuilder
from runtime.experts import Experts
from runtime.models.base import GatedMLP
from runtime.models.qwen3_5 import HybridArchitecture, HybridLM
from runtime.models.qwen3_moe import check_experts
from runtime.nonlinear import swiglu
from runtime.norms import Parts
from runtime.routing import Router, Rule


@dataclass(frozen=True)
class Qwen3_5MoeArchitecture(HybridArchitecture):  # noqa: N801 (the family's own spelling)
    """The facts of a Qwen3.5-MoE network."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int

    def check(self) -> None:
        """Raise `FormatError` for values that no Qwen3.5-MoE has."""
        super().check()
        check_experts(self.num_experts, self.num_experts_per_tok)


class SharedSparseMLP(nn.Module):
    """Routed experts, and one that every token has, whose share each token decides."""

    def __init__(self, a: Qwen3_5MoeArchitecture, build: LayerBuilder, name: str) -> None:
        super().__init__()
        self.gate = build.linear(f"{name}.gate", a.num_experts, a.hidden_size)
        self.experts = Experts(build, f"{name}.experts", a.num_experts, a.moe_intermediate_size, a.hidden_size, swiglu)
        self.shared_expert = GatedMLP(build, f"{name}.shared_expert", a.hidden_size, a.shared_expert_intermediate_size)
        self.shared_expert_gate = build.linear(f"{name}.shared_expert_gate", 1, a.hidden_size)
        rule = Rule(a.num_experts_per_tok, "softmax", normalize=True)
        self.route = Router(rule, self.gate, beside=self.shared_expert_gate)

    def forward(self, x: Tensor) -> Parts:
        """`[B, T, H]` to parts of `[B, T, H]`."""
        tokens = x.flatten(0, 1)
        chosen, weights, gate = self.route.with_logit(tokens)
        routed = self.experts(tokens, chosen, weights)
        return Parts(routed.view_as(x), self.shared_expert(x), gate.view(*x.shape[:-1], 1))


class Qwen3_5Moe(HybridLM):  # noqa: N801 (the family's own spelling)
    """Qwen3.5-MoE and Qwen3.6-MoE."""

    architecture_type = Qwen3_5MoeArchitecture

    def build_mlp(self, architecture: Qwen3_5MoeArchitecture, build: LayerBuilder, name: str) -> SharedSparseMLP:
        """Routed experts and a shared one."""
        return SharedSparseMLP(architecture, build, name)

"""Llama and Mistral.  Source: transformers 5.23 `LlamaForCausalLM`, `MistralForCausalLM`."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.builder import LayerBuilder
from runtime.models.base import GatedMLP
from runtime.models.qwen3 import Attention, AttentionLM, Layer, Qwen3Architecture


@dataclass(frozen=True)
class LlamaArchitecture(Qwen3Architecture):
    """The facts of a Llama network."""

    mlp_bias: bool


class Llama(AttentionLM):
    """Llama, and models with its exact layers such as Mistral, whose attention may have a window."""

    architecture_type = LlamaArchitecture

    def build_layer(self, architecture: LlamaArchitecture, build: LayerBuilder, index: int) -> Layer:
        """Attention without norms of its own, and a gated MLP."""
        a, name = architecture, f"model.layers.{index}"
        attention = Attention(a, build, f"{name}.self_attn", index, qk_norm=False)
        mlp = GatedMLP(build, f"{name}.mlp", a.hidden_size, a.intermediate_size, bias=a.mlp_bias)
        return Layer(a, attention, mlp)

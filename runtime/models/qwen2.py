"""Qwen2 and Qwen2.5 dense.  Source: transformers 5.23 `Qwen2ForCausalLM`."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.builder import LayerBuilder
from runtime.models.base import GatedMLP
from runtime.models.llama import LlamaArchitecture
from runtime.models.qwen3 import Attention, AttentionLM, Layer


@dataclass(frozen=True)
class Qwen2Architecture(LlamaArchitecture):
    """The facts of a Qwen2 network; `attention_bias` is that of queries, keys and values."""

    attention_out_bias: bool


class Qwen2(AttentionLM):
    """Llama with biases of queries, keys and values alone."""

    architecture_type = Qwen2Architecture

    def build_layer(self, architecture: Qwen2Architecture, build: LayerBuilder, index: int) -> Layer:
        """Attention without norms of its own, and a gated MLP."""
        a, name = architecture, f"model.layers.{index}"
        attention = Attention(a, build, f"{name}.self_attn", index, qk_norm=False, out_bias=a.attention_out_bias)
        mlp = GatedMLP(build, f"{name}.mlp", a.hidden_size, a.intermediate_size, bias=a.mlp_bias)
        return Layer(a, attention, mlp)

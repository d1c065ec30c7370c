"""Qwen3-MoE and the text model of Qwen3-VL-MoE.  Source: transformers 5.23.0, run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..names import NameSpace
from . import qwen3
from .base import Family, Field, Item, experts, linear, tower
from .qwen3 import ATTENTION, HEAD, INPUT_NORM, MLP, POST_NORM, ROUTED_EXPERTS, WRAPPERS, trunk

FIELDS = (
    *(replace(f, default=None) if f.name == "intermediate_size" else f for f in qwen3.DECODER_FIELDS),
    Field("num_experts", ("num_experts", "num_local_experts"), kind=int),
    Field("num_experts_per_tok", ("num_experts_per_tok",), kind=int),
    Field("moe_intermediate_size", ("moe_intermediate_size",), kind=int),
    Field("mlp_only_layers", ("mlp_only_layers",), default=(), kind=(list, tuple)),
    Field("decoder_sparse_step", ("decoder_sparse_step",), default=1, kind=int),
    Field("norm_topk_prob", ("norm_topk_prob",), default=False, kind=bool),
)

ROUTER = linear("mlp.gate", "experts", "hidden")


def moe_layers(export: str) -> dict[str, tuple[Item, ...]]:
    """Layer type -> items: attention with a dense MLP, or with a router and experts."""
    before: tuple[Item, ...] = (INPUT_NORM, *ATTENTION, POST_NORM)
    routed = experts("mlp.experts", "experts", "moe_inter", "hidden", export=export)
    return {"dense": (*before, *MLP), "sparse": (*before, ROUTER, *routed)}


def mlp_layer_types(architecture: dict[str, Any]) -> None:
    """Which layers are sparse, from the two keys that say so together."""
    step, dense = architecture.pop("decoder_sparse_step"), architecture.pop("mlp_only_layers")
    count = architecture["num_hidden_layers"]
    architecture["mlp_layer_types"] = [
        "sparse" if i not in dense and step > 0 and (i + 1) % step == 0 else "dense" for i in range(count)
    ]


def _finish(architecture: dict[str, Any], config: Mapping[str, Any]) -> None:
    mlp_layer_types(architecture)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    qwen3.finish_attention(architecture, config, text or config)


def _finish_vl(architecture: dict[str, Any], config: Mapping[str, Any]) -> None:
    _finish(architecture, config)
    architecture["norm_topk_prob"] = True  # this class always renormalises


def _dimensions(a: Mapping[str, Any]) -> dict[str, int]:
    sizes = qwen3.dimensions({**a, "intermediate_size": a["intermediate_size"] or 0})
    return {**sizes, "experts": a["num_experts"], "moe_inter": a["moe_intermediate_size"]}


FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    text_keys=(),
    names=NameSpace(WRAPPERS, qwen3.ROOTS, ROUTED_EXPERTS),
    fields=FIELDS,
    finish=_finish,
    dimensions=_dimensions,
    parts=(trunk(moe_layers("each"), "mlp_layer_types"), HEAD),
    attention="self_attn.qkv_proj",
    kv_heads="num_key_value_heads",
    bare=frozenset({"Qwen3MoeModel"}),
    hub_roots=qwen3.FAMILY.hub_roots,
    fuses_adapters=True,
)

VL_FAMILY = Family(
    name="qwen3_vl_moe",
    model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
    text_keys=("text_config",),
    names=NameSpace(WRAPPERS, {**qwen3.ROOTS, "visual": "visual"}, ROUTED_EXPERTS),
    fields=FIELDS,
    finish=_finish_vl,
    dimensions=_dimensions,
    parts=(trunk(moe_layers("stacked"), "mlp_layer_types"), HEAD, tower("visual")),
    attention="self_attn.qkv_proj",
    kv_heads="num_key_value_heads",
    bare=frozenset({"Qwen3VLMoeModel", "Qwen3VLMoeTextModel"}),
    hub_roots=(
        {"model": "model.language_model", "lm_head": "lm_head", "visual": "model.visual"},
        {"model": "model", "lm_head": "lm_head", "visual": "model.visual"},
    ),
)

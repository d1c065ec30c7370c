"""Step-3.5 and Step-3.7 (with MTP heads inside the trunk's layer list), and Step3 (multi-matrix factorised attention).

Source: transformers 5.23.0 (Step-3.7), run; Step-3.5, MTP and Step3 from vLLM 0.33 and published configs, read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import ConvertError, Problem
from ..names import NameSpace, aliases
from .base import Family, Field, Item, Parameter, Part, experts, fused, linear, text_config, tower, zero_centred
from .qwen3 import HEAD, INPUT_NORM, MLP, NORM, POST_NORM, ROOTS, WRAPPERS, trunk

TOWERS = ("vision_model", "vit_large_projector", "vit_downsampler", "vit_downsampler2", "multi_modal_projector")
NAMES = NameSpace(
    WRAPPERS,
    {**ROOTS, **{root: root for root in TOWERS}},
    aliases(
        ("moe.gate_proj", "moe.experts.gate_proj"),  # stacked by projection on the hub
        ("moe.up_proj", "moe.experts.up_proj"),
        ("moe.down_proj", "moe.experts.down_proj"),
        ("moe.w13_weight", "moe.experts.w13_weight"),
        ("moe.w2_weight", "moe.experts.w2_weight"),
        ("moe.experts.routed_experts", "moe.experts"),
        ("experts.w13", "experts.gate_up_proj"),
        ("experts.w2", "experts.down_proj"),
        ("moe.share_expert", "share_expert"),  # beside `moe` in tensors, below it in some quantisation configs
        ("transformer.shared_head", "shared_head"),
        ("transformer.shared_head.output", "shared_head.head"),
        ("shared_head.output", "shared_head.head"),
        ("mtp_block", ""),
        ("mlp.experts", "moe.experts"),  # modules of transformers 5
        ("mlp.gate", "moe.gate"),
        ("mlp.gate.e_score_correction_bias", "moe.router_bias"),
        ("mlp.shared_experts", "share_expert"),
    ),
)

COMMON = (
    Field("vocab_size", ("vocab_size",), kind=int),
    Field("hidden_size", ("hidden_size",), kind=int),
    Field("intermediate_size", ("intermediate_size",), kind=int),
    Field("num_hidden_layers", ("num_hidden_layers",), kind=int),
    Field("num_attention_heads", ("num_attention_heads",), kind=int),
    Field("head_dim", ("head_dim",), kind=int),
    Field("moe_layers", ("moe_layers_enum", "mlp_layer_types"), default=None, kind=(str, list, tuple)),
    Field("num_experts", ("moe_num_experts", "n_routed_experts", "num_experts"), default=0, kind=int),
    Field("num_experts_per_tok", ("moe_top_k", "num_experts_per_tok"), default=0, kind=int),
    Field("moe_intermediate_size", ("moe_intermediate_size",), default=0, kind=int),
    Field("share_expert_dim", ("share_expert_dim", "share_expert_dims"), default=0, kind=int),
    Field("norm_expert_weight", ("norm_expert_weight",), default=None, kind=bool),
    Field("rms_norm_eps", ("rms_norm_eps",), default=1e-5, kind=(int, float)),
    Field("max_position_embeddings", ("max_position_embeddings", "max_position_embedding"), default=None, kind=int),
    Field("bos_token_id", ("bos_token_id",), default=None, kind=int),
    Field("eos_token_id", ("eos_token_id",), default=None, kind=(int, list)),
    Field("pad_token_id", ("pad_token_id",), default=None, kind=int),
)
STEP3P5_FIELDS = (
    *COMMON,
    Field("num_key_value_heads", ("num_attention_groups", "num_key_value_heads"), kind=int),
    Field("layer_types", ("layer_types",), default=None, kind=list),
    Field("num_sliding_attention_heads",
          ("attention_other_setting.num_attention_heads", "num_sliding_attention_heads"), default=None, kind=int),
    Field("num_sliding_key_value_heads",
          ("attention_other_setting.num_attention_groups", "num_sliding_key_value_heads"), default=None, kind=int),
    Field("sliding_window", ("sliding_window",), default=None, kind=int),
    Field("rope_theta", ("rope_theta",), default=None, kind=(int, float, list)),
    Field("partial_rotary_factors", ("partial_rotary_factors",), default=None, kind=list),
    Field("rope_scaling", ("rope_scaling",), default=None, kind=dict),
    Field("rope_parameters", ("rope_parameters",), default=None, kind=dict),
    Field("yarn_only_types", ("yarn_only_types",), default=None, kind=list),
    Field("router_scaling_factor", ("moe_router_scaling_factor",), default=1.0, kind=(int, float)),
    Field("swiglu_limits", ("swiglu_limits",), default=None, kind=list),
    Field("swiglu_limits_shared", ("swiglu_limits_shared",), default=None, kind=list),
    Field("use_moe_router_bias", ("use_moe_router_bias",), default=True, kind=bool),
    Field("layer_scale", ("layer_scale",), default=False, kind=bool),
    Field("num_nextn_predict_layers", ("num_nextn_predict_layers",), default=0, kind=int),
)  # fmt: skip
STEP3_FIELDS = (
    *COMMON,
    Field("num_key_value_heads", ("num_attention_groups", "num_key_value_heads"), default=1, kind=int),
    Field("share_q_dim", ("share_q_dim",), kind=int),
    Field("rope_theta", ("rope_theta", "rope_parameters.rope_theta"), kind=(int, float)),
    Field("rope_scaling", ("rope_scaling", "rope_parameters"), default=None, kind=dict),
)

SHARED_EXPERT: tuple[Item, ...] = (
    fused(
        "share_expert.gate_up_proj", "hidden",
        ("gate_proj", (("gate", "shared_inter"),)), ("up_proj", (("up", "shared_inter"),)),
    ),
    linear("share_expert.down_proj", "hidden", "shared_inter"),
)  # fmt: skip
MOE: tuple[Item, ...] = (
    linear("moe.gate", "experts", "hidden"),
    *experts("moe.experts", "experts", "moe_inter", "hidden", export="projection"),
    *SHARED_EXPERT,
)
ROUTER_BIAS = Parameter("moe.router_bias", ("experts",), flag="use_moe_router_bias")


def gated_attention(query: str, key_value: str, heads: str) -> tuple[Item, ...]:
    """Attention of Step-3.5 with a gate for each head; sizes differ between full and sliding layers."""
    return (
        zero_centred(INPUT_NORM),
        fused(
            "self_attn.qkv_proj", "hidden",
            ("q_proj", (("q", query),)), ("k_proj", (("k", key_value),)), ("v_proj", (("v", key_value),)),
        ),
        Parameter("self_attn.q_norm.weight", ("head",), zero_centred=True),
        Parameter("self_attn.k_norm.weight", ("head",), zero_centred=True),
        linear("self_attn.g_proj", heads, "hidden"),
        linear("self_attn.o_proj", "hidden", query),
        zero_centred(POST_NORM),
    )  # fmt: skip


FULL = gated_attention("query", "key_value", "heads")
SLIDING = gated_attention("sliding_query", "sliding_key_value", "sliding_heads")
STEP3P5_LAYERS: Mapping[str, tuple[Item, ...]] = {
    "full_attention.dense": (*FULL, *MLP),
    "full_attention.sparse": (*FULL, *MOE, ROUTER_BIAS),
    "sliding_attention.dense": (*SLIDING, *MLP),
    "sliding_attention.sparse": (*SLIDING, *MOE, ROUTER_BIAS),
}
DRAFT: tuple[Item, ...] = (  # around a dense layer of the trunk's kind; each head has its own output matrix
    Parameter("enorm.weight", ("hidden",)),
    Parameter("hnorm.weight", ("hidden",)),
    linear("eh_proj", "hidden", "two_hidden"),
    Parameter("shared_head.norm.weight", ("hidden",)),
    linear("shared_head.head", "vocab", "hidden"),
)
FACTORISED: tuple[Item, ...] = (  # one shared key and value head; queries through a bottleneck
    INPUT_NORM,
    fused(
        "self_attn.qkv_proj", "hidden",
        ("q_proj", (("q", "share_q"),)), ("k_proj", (("k", "head"),)), ("v_proj", (("v", "head"),)),
    ),
    Parameter("self_attn.inter_norm.weight", ("share_q",)),
    linear("self_attn.wq", "query", "share_q"),
    linear("self_attn.o_proj", "hidden", "query"),
    POST_NORM,
)  # fmt: skip


def _common(architecture: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Which layers are sparse, ids of ends, and whether the head is tied."""
    count, named = architecture["num_hidden_layers"], architecture.pop("moe_layers")
    if isinstance(named, str):
        named = [int(i) for i in named.split(",") if i.strip().isdecimal()]
    if named and isinstance(named[0], str):
        sparse = {i for i, kind in enumerate(named) if kind == "sparse"}
    else:
        sparse = set(named) if named is not None else set(range(1, count)) if architecture["num_experts"] else set()
    architecture["mlp_layer_types"] = ["sparse" if i in sparse else "dense" for i in range(count)]
    eos = architecture["eos_token_id"]
    architecture["eos_token_id"] = eos if isinstance(eos, list) else [] if eos is None else [eos]
    architecture["head"] = "tied" if config.get("tie_word_embeddings") else "separate"


def _check_variant(text: Mapping[str, Any]) -> None:
    """Refuse what changes the network without changing its tensors, and no published model has."""
    rope = text.get("use_rope_layers")
    for key, expected, known in (
        ("layer_scale", "false", not text.get("layer_scale")),
        ("moe_router_activation", "sigmoid", text.get("moe_router_activation") in (None, "sigmoid")),
        ("zero_centered", "true", text.get("zero_centered") in (None, True)),
        ("use_rope_layers", "rotary positions in every layer", rope is None or (isinstance(rope, list) and all(rope))),
    ):
        if not known:
            found = json.dumps(text[key])
            raise ConvertError(Problem("config.json", key, expected, f"{found:.60}", "this variant is not supported"))


def _finish_step3(architecture: dict[str, Any], config: Mapping[str, Any]) -> None:
    _common(architecture, config)
    scaling = architecture["rope_scaling"] or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    fields = {key: value for key, value in scaling.items() if key not in ("rope_theta", "type")}
    architecture["rope_scaling"] = None if kind == "default" else fields | {"rope_type": kind}


def _finish_step3p5(architecture: dict[str, Any], config: Mapping[str, Any]) -> None:
    _common(architecture, config)
    _check_variant(text_config(STEP3P5, config))
    count, drafts = architecture["num_hidden_layers"], architecture["num_nextn_predict_layers"]
    types = list(architecture["layer_types"] or ["full_attention"] * count)
    types += list(text_config(STEP3P5, config).get("mtp_layer_types") or [])
    types += ["sliding_attention"] * (count + drafts - len(types))  # the pattern that published heads continue
    kinds = ("full_attention", "sliding_attention")
    wrong = sorted({str(t) for t in types} - set(kinds))
    if wrong or len(architecture["layer_types"] or types) < count:
        found = ", ".join(wrong) or f"{len(architecture['layer_types'])} entries"
        raise ConvertError(
            Problem("config.json", "layer_types", f"{count} of {' or '.join(kinds)}", found, "correct the config")
        )
    architecture["layer_types"] = types[:count]
    sparse = architecture["mlp_layer_types"]
    architecture["layer_kinds"] = [f"{types[i]}.{sparse[i]}" for i in range(count)]
    architecture["mtp_layer_kinds"] = [f"{types[count + j]}.dense" for j in range(drafts)]
    for key in ("num_attention_heads", "num_key_value_heads"):
        sliding = key.replace("num_", "num_sliding_")
        architecture[sliding] = architecture[sliding] or architecture[key]


def _dimensions(a: Mapping[str, Any]) -> dict[str, int]:
    head = a["head_dim"]
    return {
        "vocab": a["vocab_size"],
        "hidden": a["hidden_size"],
        "two_hidden": 2 * a["hidden_size"],
        "inter": a["intermediate_size"],
        "head": head,
        "heads": a["num_attention_heads"],
        "query": a["num_attention_heads"] * head,
        "key_value": a["num_key_value_heads"] * head,
        "experts": a["num_experts"],
        "moe_inter": a["moe_intermediate_size"],
        "shared_inter": a["share_expert_dim"],
    }


def _step3p5_dimensions(a: Mapping[str, Any]) -> dict[str, int]:
    return {
        **_dimensions(a),
        "sliding_heads": a["num_sliding_attention_heads"],
        "sliding_query": a["num_sliding_attention_heads"] * a["head_dim"],
        "sliding_key_value": a["num_sliding_key_value_heads"] * a["head_dim"],
    }


def _step3_dimensions(a: Mapping[str, Any]) -> dict[str, int]:
    return {**_dimensions(a), "share_q": a["share_q_dim"]}


HUB = {"model": "model", "lm_head": "lm_head", **{root: root for root in TOWERS}}

STEP3P5 = Family(
    name="step3p5",
    model_types=("step3p5", "step3p7"),
    text_keys=("text_config",),
    names=NAMES,
    fields=STEP3P5_FIELDS,
    finish=_finish_step3p5,
    dimensions=_step3p5_dimensions,
    parts=(
        trunk(STEP3P5_LAYERS, "layer_kinds", zero_centred(NORM)),
        HEAD,
        Part(  # layers L, L + 1, ... of the trunk's own list
            "mtp",
            prefix="model",
            layers={kind: (*items, *DRAFT) for kind, items in STEP3P5_LAYERS.items()},
            layer_types="mtp_layer_kinds",
            layer_offset="num_hidden_layers",
            layer_count=("num_nextn_predict_layers",),
            drafts=True,
            optional=True,
            carried=True,
        ),
        *(tower(root) for root in TOWERS),
    ),
    attention="self_attn.qkv_proj",
    kv_heads="num_key_value_heads",
    bare=frozenset({"Step3p7TextModel", "Step3p7Model"}),
    hub_roots=(HUB, HUB),
    hub_runs=aliases(
        ("shared_head.head", "transformer.shared_head.output"), ("shared_head.norm", "transformer.shared_head.norm")
    ),
    modules=(
        {
            "model": "model.language_model",
            "lm_head": "lm_head",
            "vit_large_projector": "model.multi_modal_projector",
            **{root: f"model.{root}" for root in TOWERS if root != "vit_large_projector"},
        },
        aliases(("moe.experts", "mlp.experts"), ("moe.gate", "mlp.gate"), ("share_expert", "mlp.shared_experts")),
    ),
)

STEP3 = Family(
    name="step3_text",
    model_types=("step3_text", "step3_vl"),
    text_keys=("text_config",),
    names=NAMES,
    fields=STEP3_FIELDS,
    finish=_finish_step3,
    dimensions=_step3_dimensions,
    parts=(
        trunk({"dense": (*FACTORISED, *MLP), "sparse": (*FACTORISED, *MOE)}, "mlp_layer_types"),
        HEAD,
        *(tower(root) for root in TOWERS),
    ),
    attention="self_attn.qkv_proj",
    kv_heads="num_key_value_heads",
    bare=frozenset(),
    hub_roots=(HUB, HUB),
)

"""Qwen3 dense.  Source: transformers 5.23.0, run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConvertError, Problem
from ..names import NameSpace, aliases
from .base import Family, Field, Item, Parameter, Part, embedding, fused, linear

WRAPPERS = frozenset({"model", "language_model"})

ROOTS: Mapping[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "lm_head": "lm_head",
}

ROUTED_EXPERTS = aliases(
    ("experts.routed_experts", "experts"),  # vLLM 0.33 keeps the routed ones apart from the shared
    ("experts.w13", "experts.gate_up_proj"),
    ("experts.w2", "experts.down_proj"),
)

# Facts that every decoder of the Qwen line has.
DECODER_FIELDS = (
    Field("vocab_size", ("vocab_size",), kind=int),
    Field("hidden_size", ("hidden_size",), kind=int),
    Field("intermediate_size", ("intermediate_size",), kind=int),
    Field("num_hidden_layers", ("num_hidden_layers",), kind=int),
    Field("layer_types", ("layer_types",), default=None, kind=list),
    Field("num_attention_heads", ("num_attention_heads",), kind=int),
    Field("num_key_value_heads", ("num_key_value_heads",), kind=int),
    Field("head_dim", ("head_dim",), kind=int),
    Field("attention_bias", ("attention_bias",), default=False, kind=bool),
    Field("rms_norm_eps", ("rms_norm_eps",), kind=(int, float)),
    Field("hidden_act", ("hidden_act",), default="silu", kind=str),
    Field("rope_theta", ("rope_parameters.rope_theta", "rope_theta"), kind=(int, float)),
    Field("rope_scaling", ("rope_scaling", "rope_parameters"), default=None, kind=dict),
    Field("max_position_embeddings", ("max_position_embeddings",), default=None, kind=int),
    Field("bos_token_id", ("bos_token_id",), default=None, kind=int),
    Field("eos_token_id", ("eos_token_id",), default=None, kind=(int, list)),
    Field("pad_token_id", ("pad_token_id",), default=None, kind=int),
)

ATTENTION = (
    fused(
        "self_attn.qkv_proj", "hidden",
        ("q_proj", (("q", "query"),)), ("k_proj", (("k", "key_value"),)), ("v_proj", (("v", "key_value"),)),
        bias="attention_bias",
    ),
    Parameter("self_attn.q_norm.weight", ("head",)),
    Parameter("self_attn.k_norm.weight", ("head",)),
    linear("self_attn.o_proj", "hidden", "attention", bias="attention_bias"),
)  # fmt: skip
MLP = (
    fused("mlp.gate_up_proj", "hidden", ("gate_proj", (("gate", "inter"),)), ("up_proj", (("up", "inter"),))),
    linear("mlp.down_proj", "hidden", "inter"),
)
INPUT_NORM = Parameter("input_layernorm.weight", ("hidden",))
POST_NORM = Parameter("post_attention_layernorm.weight", ("hidden",))
EMBEDDING = embedding("embed_tokens", "vocab", "hidden")
NORM = Parameter("norm.weight", ("hidden",))
HEAD = Part("lm_head", first=(linear("lm_head", "vocab", "hidden"),), optional=True)



def trunk(layers: Mapping[str, tuple[Item, ...]], layer_types: str, norm: Parameter = NORM) -> Part:
    """Embedding, layers and final norm of a decoder.  `layer_types`: architecture key of the list of layer types."""
    return Part("model", prefix="model", first=(EMBEDDING,), layers=layers, layer_types=layer_types, last=(norm,))


LAYER = (INPUT_NORM, *ATTENTION, POST_NORM, *MLP)


def normalise_decoder(architecture: dict[str, Any], config: Mapping[str, Any], layer_types: tuple[str, ...]) -> None:
    """Bring the facts that configs spell in several ways to one: rope scaling, layer types, end-of-text ids."""
    scaling = architecture["rope_scaling"]
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        dropped = ("rope_theta", "type", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
        scaling = {**{k: v for k, v in scaling.items() if k not in dropped}, "rope_type": kind}
        # mRoPE equals plain rotary embedding on text, where its three positions are equal.
        architecture["rope_scaling"] = None if kind in ("default", "mrope") else scaling
    eos = architecture["eos_token_id"]
    architecture["eos_token_id"] = eos if isinstance(eos, list) else [] if eos is None else [eos]
    types = architecture["layer_types"]
    wrong = sorted({str(t) for t in types} - set(layer_types))
    if wrong:
        raise ConvertError(
            Problem("config.json", "layer_types", " or ".join(layer_types), ", ".join(wrong), "another family?")
        )
    if len(types) != architecture["num_hidden_layers"]:
        raise ConvertError(
            Problem("config.json", "layer_types", f"{architecture['num_hidden_layers']} entries (num_hidden_layers)",
                    f"{len(types)}", "correct the config")
        )  # fmt: skip
    if architecture["hidden_act"] != "silu":
        raise ConvertError(
            Problem("config.json", "hidden_act", "silu", str(architecture["hidden_act"]), "another family?")
        )
    # The flag of the outermost config decides; a nested one may contradict it.
    architecture["head"] = "tied" if config.get("tie_word_embeddings") else "separate"


def finish_attention(architecture: dict[str, Any], config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Layer types and window of attention, from the text config; then what all decoders share."""
    window = text.get("sliding_window", 4096) if text.get("use_sliding_window") else None
    if architecture["layer_types"] is None:
        first = text.get("max_window_layers", 28) if window is not None else None
        count = architecture["num_hidden_layers"]
        architecture["layer_types"] = [
            "sliding_attention" if first is not None and i >= first else "full_attention" for i in range(count)
        ]
    architecture["sliding_window"] = window
    normalise_decoder(architecture, config, ("full_attention", "sliding_attention"))


def _finish(architecture: dict[str, Any], config: Mapping[str, Any]) -> None:
    finish_attention(architecture, config, config)


def dimensions(a: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of a decoder with plain attention."""
    return {
        "vocab": a["vocab_size"],
        "hidden": a["hidden_size"],
        "inter": a["intermediate_size"],
        "head": a["head_dim"],
        "query": a["num_attention_heads"] * a["head_dim"],
        "attention": a["num_attention_heads"] * a["head_dim"],
        "key_value": a["num_key_value_heads"] * a["head_dim"],
    }


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    text_keys=(),
    names=NameSpace(WRAPPERS, ROOTS),
    fields=DECODER_FIELDS,
    finish=_finish,
    dimensions=dimensions,
    parts=(
        trunk({"full_attention": LAYER, "sliding_attention": LAYER}, "layer_types"),
        HEAD,
    ),
    attention="self_attn.qkv_proj",
    kv_heads="num_key_value_heads",
    bare=frozenset({"Qwen3Model"}),
    hub_roots=({"model": "model", "lm_head": "lm_head"}, {"model": "model", "lm_head": "lm_head"}),
)

"""What tiny models of each family consist of, their `config.json`, and where wrappers put their names.

Nothing here calls `convert` or `runtime`, and nothing knows about quantisation.  A family is one `Family` record: its tensors
by plain name, the config that its producers write, and the `architecture` that docs/format.md asks for.

A *plain* name is a Hugging Face name without its wrapper prefix and before fusing: `model.layers.0.self_attn.q_proj`,
`model.layers.0.mlp.experts.2.gate_proj`, `lm_head`, `mtp.fc`, `visual.pos_embed`.  `PREFIXES` turns plain names into the
names on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# ------------------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True, slots=True)
class Sizes:
    """Dimensions of a tiny network.

    `key_heads` to `value_dim` describe the linear attention of qwen3_5; `experts` (how many), `moe_inter` (rows of one
    expert's gate) and `shared_inter` a mixture of experts.
    """

    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    experts: int = 3
    moe_inter: int = 96
    shared_inter: int = 32


SIZES: Mapping[str, Sizes] = {
    # Every K a multiple of 32, no two partitions of a group equal where the architecture lets them differ.
    "small": Sizes(64, 96, 80, 4, 2, 16, 2, 4, 16, 24),
    # Partial last blocks along N and K; q, k, v of linear attention, and gate and up of experts, end inside a block.
    "block": Sizes(160, 224, 144, 6, 2, 32, 2, 4, 32, 40, moe_inter=192, shared_inter=96),
    # q, k, v of linear attention, and gate of experts, end on block boundaries; only the end of v is partial.
    "aligned": Sizes(160, 224, 144, 4, 2, 64, 2, 4, 64, 40, moe_inter=128, shared_inter=96),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """Which model of a family, and with which parts.

    `whole_experts`: gate and up of an expert are one projection of the source, quantised as one.
    """

    sizes: Sizes
    tied: bool = False
    wrapper: bool = False
    mtp: bool = False
    bias: bool = False
    whole_experts: bool = False
    dtype: str = "bfloat16"


# ---------------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection of the source: plain name, logical partitions `(name, rows)` that it covers, K, bias or not."""

    name: str
    partitions: tuple[tuple[str, int], ...]
    columns: int
    bias: bool = False

    @property
    def rows(self) -> int:
        """N."""
        return sum(rows for _, rows in self.partitions)


# Last segment of a projection -> last segment of the module that it is fused into, in the order of the partitions.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
_FUSED_INTO = {part: fused for fused, parts in FUSED.items() for part in parts}


def fused_name(linear: str, gated: bool = True) -> str:
    """Plain name of the canonical module that a projection belongs to.  `gated`: its `up_proj` has a `gate_proj`."""
    parent, _, last = linear.rpartition(".")
    return f"{parent}.{_FUSED_INTO[last]}" if last in _FUSED_INTO and (gated or last != "up_proj") else linear


def expert_of(name: str) -> tuple[str, int, str] | None:
    """`(container, index, projection)` of a projection of an expert, None for any other."""
    container, _, rest = name.rpartition(".experts.")
    index, _, projection = rest.partition(".")
    return (f"{container}.experts", int(index), projection) if container and index.isdecimal() and projection else None


@dataclass(slots=True)
class Network:
    """What a checkpoint contains before quantisation: projections, and the plain name -> shape of everything else.

    `dropped`: names among them that a converter leaves out.
    """

    linears: list[Linear] = field(default_factory=list)
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def linear(self, name: str, rows: int, columns: int, part: str = "", bias: bool = False) -> None:
        """Add a projection of one partition."""
        self.linears.append(Linear(name, ((part, rows),), columns, bias))

    def vectors(self, below: str, size: int, *names: str) -> None:
        """Add `<below>.<name>.weight` of one size."""
        self.others |= {f"{below}.{name}.weight": (size,) for name in names}

    def gated_mlp(self, name: str, inner: int, hidden: int, bias: bool = False) -> None:
        """Add gate, up and down projections."""
        self.linear(f"{name}.gate_proj", inner, hidden, "gate", bias)
        self.linear(f"{name}.up_proj", inner, hidden, "up", bias)
        self.linear(f"{name}.down_proj", hidden, inner, bias=bias)

    def experts(self, name: str, v: Variant, hidden: int, gated: bool = True) -> None:
        """Add every projection of every expert below `name`."""
        inner = v.sizes.moe_inter
        for e in range(v.sizes.experts):
            if gated and v.whole_experts:
                self.linears.append(Linear(f"{name}.{e}.gate_up_proj", (("gate", inner), ("up", inner)), hidden))
            elif gated:
                self.linear(f"{name}.{e}.gate_proj", inner, hidden, "gate")
                self.linear(f"{name}.{e}.up_proj", inner, hidden, "up")
            else:
                self.linear(f"{name}.{e}.up_proj", inner, hidden)
            self.linear(f"{name}.{e}.down_proj", hidden, inner)

    def gated(self, name: str) -> bool:
        """Whether an `up_proj` stands beside a `gate_proj`."""
        below = name.rpartition(".")[0]
        return any(linear.name in (f"{below}.gate_proj", f"{below}.gate_up_proj") for linear in self.linears)

    def attentions(self) -> list[str]:
        """Attention modules of the trunk."""
        return [n.name.removesuffix(".q_proj") for n in self.linears if n.name.endswith(".q_proj") and n.name[:6] == "model."]


def _attention(net: Network, name: str, s: Sizes, *, gated: bool = False, bias: bool = False, norms: bool = True) -> None:
    """Query, key, value and output projections; `gated`: each head of q has as many rows of output gate."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    net.linear(f"{name}.q_proj", q * (2 if gated else 1), s.hidden, "q", bias)
    net.linear(f"{name}.k_proj", kv, s.hidden, "k", bias)
    net.linear(f"{name}.v_proj", kv, s.hidden, "v", bias)
    net.linear(f"{name}.o_proj", s.hidden, q, bias=bias)
    if norms:
        net.vectors(name, s.head_dim, "q_norm", "k_norm")


def _linear_attention(net: Network, name: str, s: Sizes) -> None:
    key, value = s.key_heads * s.key_dim, s.value_heads * s.value_dim
    parts = (("q", key), ("k", key), ("v", value))
    net.linears.append(Linear(f"{name}.in_proj_qkv", parts, s.hidden))
    net.linear(f"{name}.in_proj_z", value, s.hidden, "z")
    net.linear(f"{name}.in_proj_b", s.value_heads, s.hidden, "b")
    net.linear(f"{name}.in_proj_a", s.value_heads, s.hidden, "a")
    net.linear(f"{name}.out_proj", s.hidden, value)
    net.others |= {
        f"{name}.conv1d.weight": (2 * key + value, 1, 4),
        f"{name}.A_log": (s.value_heads,),
        f"{name}.dt_bias": (s.value_heads,),
        f"{name}.norm.weight": (s.value_dim,),
    }


DECODER_NORMS = ("input_layernorm", "post_attention_layernorm")


def _trunk(s: Sizes) -> Network:
    """Embedding and final norm."""
    return Network(others={"model.embed_tokens.weight": (s.vocab, s.hidden), "model.norm.weight": (s.hidden,)})


def _head(net: Network, v: Variant) -> Network:
    if not v.tied:
        net.linear("lm_head", v.sizes.vocab, v.sizes.hidden)
    return net


_VISION = {"hidden": 32, "intermediate": 48, "depth": 2, "positions": 16, "patch": 4}


def _vision_tower(net: Network, s: Sizes, deepstack: bool = False) -> None:
    h, i = _VISION["hidden"], _VISION["intermediate"]
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj": (h, 3, 1, _VISION["patch"], _VISION["patch"])}
    for b in range(_VISION["depth"]):
        block = {"norm1": (h,), "norm2": (h,), "attn.qkv": (3 * h, h), "attn.proj": (h, h)}
        shapes |= {f"blocks.{b}.{n}": shape for n, shape in block.items()}
        shapes |= {f"blocks.{b}.mlp.linear_fc1": (i, h), f"blocks.{b}.mlp.linear_fc2": (h, i)}
    mergers = {"merger": h} | ({"deepstack_merger_list.0": 4 * h} if deepstack else {})
    for merger, norm in mergers.items():
        shapes |= {f"{merger}.norm": (norm,), f"{merger}.linear_fc1": (4 * h, 4 * h), f"{merger}.linear_fc2": (s.hidden, 4 * h)}
    net.others["visual.pos_embed.weight"] = (_VISION["positions"], h)
    for name, shape in shapes.items():
        net.others[f"visual.{name}.weight"] = shape
        net.others[f"visual.{name}.bias"] = shape[:1]


# ---------------------------------------------------------------------------------------------- the families of Qwen

QWEN3_5_LAYERS = ("linear_attention", "full_attention")


def _qwen3(v: Variant) -> Network:
    net, s = _trunk(v.sizes), v.sizes
    for layer in ("model.layers.0", "model.layers.1"):
        _attention(net, f"{layer}.self_attn", s, bias=v.bias)
        net.gated_mlp(f"{layer}.mlp", s.intermediate, s.hidden)
        net.vectors(layer, s.hidden, *DECODER_NORMS)
    return _head(net, v)


def _qwen3_moe(sparse: tuple[bool, bool], tower: bool) -> Callable[[Variant], Network]:
    def build(v: Variant) -> Network:
        net, s = _trunk(v.sizes), v.sizes
        for i, moe in enumerate(sparse):
            layer = f"model.layers.{i}"
            _attention(net, f"{layer}.self_attn", s, bias=v.bias)
            if moe:
                net.linear(f"{layer}.mlp.gate", s.experts, s.hidden)
                net.experts(f"{layer}.mlp.experts", v, s.hidden)
            else:
                net.gated_mlp(f"{layer}.mlp", s.intermediate, s.hidden)
            net.vectors(layer, s.hidden, *DECODER_NORMS)
        if tower and v.wrapper:
            _vision_tower(net, s, deepstack=True)
        return _head(net, v)

    return build


def _qwen3_5(moe: bool) -> Callable[[Variant], Network]:
    def feed_forward(net: Network, layer: str, v: Variant) -> None:
        s = v.sizes
        if moe:
            net.linear(f"{layer}.mlp.gate", s.experts, s.hidden)
            net.experts(f"{layer}.mlp.experts", v, s.hidden)
            net.gated_mlp(f"{layer}.mlp.shared_expert", s.shared_inter, s.hidden)
            net.linear(f"{layer}.mlp.shared_expert_gate", 1, s.hidden)
        else:
            net.gated_mlp(f"{layer}.mlp", s.intermediate, s.hidden)
        net.vectors(layer, s.hidden, *DECODER_NORMS)

    def build(v: Variant) -> Network:
        net, s = _trunk(v.sizes), v.sizes
        for i, kind in enumerate(QWEN3_5_LAYERS):
            layer = f"model.layers.{i}"
            if kind == "full_attention":
                _attention(net, f"{layer}.self_attn", s, gated=True, bias=v.bias)
            else:
                _linear_attention(net, f"{layer}.linear_attn", s)
            feed_forward(net, layer, v)
        if v.mtp:
            net.linear("mtp.fc", s.hidden, 2 * s.hidden)
            net.vectors("mtp", s.hidden, "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
            _attention(net, "mtp.layers.0.self_attn", s, gated=True)
            feed_forward(net, "mtp.layers.0", v)
        if v.wrapper:
            _vision_tower(net, s)
        return _head(net, v)

    return build


def _decoder_config(v: Variant, layers: int) -> dict[str, Any]:
    """What every decoder's config says."""
    s = v.sizes
    return {
        "attention_bias": v.bias, "attention_dropout": 0.0, "bos_token_id": 0, "dtype": v.dtype, "eos_token_id": 1,
        "head_dim": s.head_dim, "hidden_act": "silu", "hidden_size": s.hidden, "initializer_range": 0.02,
        "intermediate_size": s.intermediate, "max_position_embeddings": 512, "num_attention_heads": s.heads,
        "num_hidden_layers": layers, "num_key_value_heads": s.kv_heads, "pad_token_id": 0, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": v.tied, "use_cache": True, "vocab_size": s.vocab,
    }  # fmt: skip


_DEFAULT_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


def _qwen3_text(v: Variant) -> dict[str, Any]:
    return _decoder_config(v, 2) | {
        "layer_types": ["full_attention"] * 2, "model_type": "qwen3", "max_window_layers": 28, "sliding_window": None,
        "use_sliding_window": False, "rope_parameters": _DEFAULT_ROPE,
    }  # fmt: skip


def _qwen3_moe_text(v: Variant) -> dict[str, Any]:
    """Layer 0 sparse, layer 1 dense."""
    return _decoder_config(v, 2) | {
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "model_type": "qwen3_moe", "moe_intermediate_size": v.sizes.moe_inter,
        "norm_topk_prob": True, "num_experts": v.sizes.experts, "num_experts_per_tok": 2, "rope_parameters": _DEFAULT_ROPE,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False,
    }  # fmt: skip


def _qwen3_vl_moe_text(v: Variant) -> dict[str, Any]:
    """Layer 0 dense, layer 1 sparse; the nested flag of tying contradicts the outer one, which decides."""
    rope = _DEFAULT_ROPE | {"mrope_interleaved": True, "mrope_section": [4, 2, 2]}
    return _decoder_config(v, 2) | {
        "decoder_sparse_step": 2, "mlp_only_layers": [], "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": v.sizes.moe_inter, "num_experts_per_tok": 2, "num_local_experts": v.sizes.experts,
        "rope_parameters": rope, "router_aux_loss_coef": 0.001, "tie_word_embeddings": True,
    }  # fmt: skip


def _qwen3_5_text(moe: bool) -> Callable[[Variant], dict[str, Any]]:
    def text(v: Variant) -> dict[str, Any]:
        s = v.sizes
        config = _decoder_config(v, 2) | {
            "layer_types": list(QWEN3_5_LAYERS), "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
            "linear_conv_kernel_dim": 4, "linear_key_head_dim": s.key_dim, "linear_num_key_heads": s.key_heads,
            "linear_num_value_heads": s.value_heads, "linear_value_head_dim": s.value_dim,
            "rope_parameters": _DEFAULT_ROPE | {"partial_rotary_factor": 0.25},
        }  # fmt: skip
        if moe:
            del config["intermediate_size"]
            config |= {
                "moe_intermediate_size": s.moe_inter, "num_experts": s.experts, "num_experts_per_tok": 2,
                "shared_expert_intermediate_size": s.shared_inter,
            }  # fmt: skip
        return config | ({"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False} if v.mtp else {})

    return text


def _qwen_config(
    text: Callable[[Variant], dict[str, Any]], stem: str, wrapper_type: str = "", deepstack: bool = False
) -> _Config:
    """Config of a text model, or of a wrapper with a vision tower.  `stem`: how the names of its classes begin."""

    def config(v: Variant, bare: bool) -> dict[str, Any]:
        if not v.wrapper:
            name = (f"{stem}TextModel" if wrapper_type else f"{stem}Model") if bare else f"{stem}ForCausalLM"
            return {"architectures": [name], **text(v), "transformers_version": "5.23.0"}
        vision = {
            "depth": _VISION["depth"], "dtype": v.dtype, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": _VISION["hidden"], "in_channels": 3, "initializer_range": 0.02,
            "intermediate_size": _VISION["intermediate"], "model_type": f"{wrapper_type}_vision", "num_heads": 2,
            "num_position_embeddings": _VISION["positions"], "out_hidden_size": v.sizes.hidden,
            "patch_size": _VISION["patch"], "spatial_merge_size": 2, "temporal_patch_size": 1,
        }  # fmt: skip
        if deepstack:
            vision["deepstack_visual_indexes"] = [0]
        return {
            "architectures": [f"{stem}Model" if bare else f"{stem}ForConditionalGeneration"], "dtype": v.dtype,
            "image_token_id": 76, "model_type": wrapper_type, "text_config": text(v),
            "tie_word_embeddings": v.tied, "transformers_version": "5.23.0", "video_token_id": 77,
            "vision_config": vision, "vision_start_token_id": 78, "vision_end_token_id": 79,
        }  # fmt: skip

    return config


_SHARED_FACTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "attention_bias", "rms_norm_eps", "hidden_act", "max_position_embeddings", "bos_token_id", "pad_token_id",
)  # fmt: skip


def _decoder_facts(text: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The part of `architecture` that says the same under the same name as the text config."""
    facts = {key: text[key] for key in (*_SHARED_FACTS, *more)}
    return facts | {"rope_theta": 10000.0, "rope_scaling": None, "eos_token_id": [text["eos_token_id"]]}


def _qwen3_facts(v: Variant) -> dict[str, Any]:
    return _decoder_facts(_qwen3_text(v), "intermediate_size", "layer_types") | {"sliding_window": None}


def _moe_facts(text: Callable[[Variant], dict[str, Any]], layers: tuple[str, str]) -> Callable[[Variant], dict[str, Any]]:
    def facts(v: Variant) -> dict[str, Any]:
        return _decoder_facts(text(v), "intermediate_size", "moe_intermediate_size", "num_experts_per_tok") | {
            "layer_types": ["full_attention"] * 2, "mlp_layer_types": list(layers), "norm_topk_prob": True,
            "num_experts": v.sizes.experts, "sliding_window": None,
        }  # fmt: skip

    return facts


def _qwen3_5_facts(moe: bool) -> Callable[[Variant], dict[str, Any]]:
    linear = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    sparse = ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "shared_expert_intermediate_size")

    def facts(v: Variant) -> dict[str, Any]:
        more = sparse if moe else ("intermediate_size",)
        return _decoder_facts(_qwen3_5_text(moe)(v), "layer_types", *more, *(f"linear_{key}" for key in linear)) | {
            "rotary_dim": v.sizes.head_dim // 4, "attn_output_gate": True, "output_gate": "silu",
            "mtp_num_hidden_layers": int(v.mtp),
        }  # fmt: skip

    return facts


# ---------------------------------------------------------------------------------------------------------- prefixes


@dataclass(frozen=True, slots=True)
class Prefix:
    """Where the parts of a model live on disk; None: this variant does not store the part.

    `towers`: first segment of further parts -> their place.  `inner`: (plain, on disk) runs of segments that differ.
    """

    trunk: str
    head: str | None
    visual: str | None
    mtp: str | None
    towers: Mapping[str, str] = field(default_factory=dict)
    inner: tuple[tuple[str, str], ...] = ()

    def under(self, outer: str) -> Prefix:
        """The same variant below an outer prefix."""
        parts = {key: getattr(self, key) for key in ("trunk", "head", "visual", "mtp")}
        places = {key: None if part is None else outer + part for key, part in parts.items()}
        return replace(self, towers={root: outer + place for root, place in self.towers.items()}, **places)

    def name(self, plain: str) -> str | None:
        """Name on disk of a plain tensor or module name, or None."""
        first, _, rest = plain.partition(".")
        part = {"model": self.trunk, "lm_head": self.head, "visual": self.visual, "mtp": self.mtp, **self.towers}.get(first)
        if part is None:
            return None
        for run, spelling in self.inner:
            rest = f".{rest}.".replace(f".{run}.", f".{spelling}.")[1:-1]
        return f"{part}{rest}".rstrip(".")


PREFIXES: dict[str, Prefix] = {
    "Q1": Prefix("model.language_model.", "lm_head.", "model.visual.", "mtp."),
    "Q1-inner-head": Prefix("model.language_model.", "model.language_model.lm_head.", "model.visual.", "mtp."),
    "Q2": Prefix("language_model.model.", "language_model.lm_head.", "visual.", "mtp."),
    "Q2-model-visual": Prefix("language_model.model.", "language_model.lm_head.", "model.visual.", "mtp."),
    "Q3": Prefix("model.", "lm_head.", None, "mtp."),
    "Q3-inner-head": Prefix("model.", "model.lm_head.", None, "mtp."),
    "Q4": Prefix("model.language_model.", "lm_head.", None, None),
    "Q5": Prefix("language_model.", None, "visual.", None),
    "Q6": Prefix("", None, None, None),
    "Q8": Prefix("language_model.model.", "lm_head.", None, "language_model.mtp."),
    "Q8-model-mtp": Prefix("language_model.model.", "language_model.lm_head.", None, "model.mtp."),
}
PREFIXES |= {f"Q7-{inner}": PREFIXES[inner].under("base_model.model.") for inner in ("Q1", "Q2", "Q3", "Q4")}


# ---------------------------------------------------------------------------------------------------------- families

_Config = Callable[[Variant, bool], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Family:
    """How to build a checkpoint of a family.

    network    every tensor of a model
    config     `config.json`; the flag is whether the checkpoint is a bare trunk
    facts      `architecture` of the canonical config, without `head`
    hub        keys of `PREFIXES` under which the hub stores it: a wrapper, a text model
    stacked    the hub stores experts stacked and fused (X2), not one by one
    """

    network: Callable[[Variant], Network]
    config: _Config
    facts: Callable[[Variant], dict[str, Any]]
    hub: tuple[str, str] = ("Q1", "Q3")
    stacked: bool = False


FAMILIES: Mapping[str, Family] = {
    "qwen3": Family(_qwen3, _qwen_config(_qwen3_text, "Qwen3"), _qwen3_facts),
    "qwen3_moe": Family(
        _qwen3_moe((True, False), tower=False), _qwen_config(_qwen3_moe_text, "Qwen3Moe"),
        _moe_facts(_qwen3_moe_text, ("sparse", "dense")),
    ),
    "qwen3_vl_moe": Family(
        _qwen3_moe((False, True), tower=True),
        _qwen_config(_qwen3_vl_moe_text, "Qwen3VLMoe", "qwen3_vl_moe", deepstack=True),
        _moe_facts(_qwen3_vl_moe_text, ("dense", "sparse")), stacked=True,
    ),
    "qwen3_5": Family(_qwen3_5(False), _qwen_config(_qwen3_5_text(False), "Qwen3_5", "qwen3_5"), _qwen3_5_facts(False)),
    "qwen3_5_moe": Family(
        _qwen3_5(True), _qwen_config(_qwen3_5_text(True), "Qwen3_5Moe", "qwen3_5_moe"), _qwen3_5_facts(True), stacked=True,
    ),
}  # fmt: skip

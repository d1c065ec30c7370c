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
    `key_heads` to `value_dim` describe the linear attention of qwen3_5, and as groups, heads, state size and head size the
    Mamba blocks of nemotron_h; `experts` (how many), `moe_inter` (rows of one expert's gate) and `shared_inter` a mixture of
    experts; `latent` what experts of Nemotron 3 Super, and the queries of Step3, are squeezed into.
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
    latent: int = 32


SIZES: Mapping[str, Sizes] = {
    # Every K a multiple of 32, no two partitions of a group equal where the architecture lets them differ.
    "small": Sizes(64, 96, 80, 4, 2, 16, 2, 4, 16, 24),
    # Partial last blocks along N and K; q, k, v of linear attention, and gate and up of experts, end inside a block.
    "block": Sizes(160, 224, 144, 6, 2, 32, 2, 4, 32, 40, moe_inter=192, shared_inter=96, latent=96),
    # q, k, v of linear attention, and gate of experts, end on block boundaries; only the end of v is partial.
    "aligned": Sizes(160, 224, 144, 4, 2, 64, 2, 4, 64, 40, moe_inter=128, shared_inter=96, latent=96),
    # z, x, B and C of Mamba end on block boundaries; dt, the last one, is partial.
    "mamba": Sizes(160, 224, 144, 4, 2, 64, 2, 4, 64, 32, moe_inter=192, shared_inter=96, latent=96),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """Which model of a family, and with which parts.

    `variety`: a word that the family knows, "" for its usual model.  `whole_experts`: gate and up of an expert are one
    projection of the source, quantised as one.
    """

    sizes: Sizes
    variety: str = ""
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

    `drafts`: layers of the trunk's own list that only draft tokens.
    """

    linears: list[Linear] = field(default_factory=list)
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)
    drafts: list[str] = field(default_factory=list)

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


# ------------------------------------------------------------------------------------------------------------- Llama


def _llama(v: Variant) -> Network:
    net, s = _trunk(v.sizes), v.sizes
    for layer in ("model.layers.0", "model.layers.1"):
        _attention(net, f"{layer}.self_attn", s, bias=v.bias, norms=False)
        net.gated_mlp(f"{layer}.mlp", s.intermediate, s.hidden, v.bias)
        net.vectors(layer, s.hidden, *DECODER_NORMS)
    return _head(net, v)


def _llama_text(v: Variant) -> dict[str, Any]:
    return _decoder_config(v, 2) | {"mlp_bias": v.bias, "model_type": "llama", "rope_parameters": _DEFAULT_ROPE}


def _llama_facts(v: Variant) -> dict[str, Any]:
    facts = _decoder_facts(_llama_text(v), "intermediate_size", "mlp_bias")
    return facts | {"layer_types": ["full_attention"] * 2, "sliding_window": None}


# -------------------------------------------------------------------------------------------------------- Nemotron-H

_NEMOTRON_PATTERN = {"": "ME*-", "latent": "ME*-", "dense": "M-*-"}
_BLOCKS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
_SQUEEZED = ("latent",)  # varieties whose experts work in a smaller space


def _nemotron_block(net: Network, block: str, kind: str, v: Variant) -> None:
    """One mixer with the norm before it."""
    s, mixer = v.sizes, f"{block}.mixer"
    net.vectors(block, s.hidden, "norm")
    if kind == "M":
        inner, groups = s.value_heads * s.value_dim, s.key_heads * s.key_dim
        parts = (("z", inner), ("x", inner), ("B", groups), ("C", groups), ("dt", s.value_heads))
        net.linears.append(Linear(f"{mixer}.in_proj", parts, s.hidden))
        net.linear(f"{mixer}.out_proj", s.hidden, inner)
        net.others |= {f"{mixer}.{name}": (s.value_heads,) for name in ("A_log", "D", "dt_bias")}
        conv = inner + 2 * groups
        net.others |= {f"{mixer}.conv1d.weight": (conv, 1, 4), f"{mixer}.conv1d.bias": (conv,)}
        net.vectors(mixer, inner, "norm")
    elif kind == "*":
        _attention(net, mixer, s, bias=v.bias, norms=False)
    elif kind == "-":
        net.linear(f"{mixer}.up_proj", s.intermediate, s.hidden)
        net.linear(f"{mixer}.down_proj", s.hidden, s.intermediate)
    else:
        hidden = s.latent if v.variety in _SQUEEZED else s.hidden
        net.linear(f"{mixer}.gate", s.experts, s.hidden)
        net.others[f"{mixer}.gate.e_score_correction_bias"] = (s.experts,)
        if v.variety in _SQUEEZED:
            net.linear(f"{mixer}.fc1_latent_proj", hidden, s.hidden)
            net.linear(f"{mixer}.fc2_latent_proj", s.hidden, hidden)
        net.experts(f"{mixer}.experts", v, hidden, gated=False)
        net.linear(f"{mixer}.shared_experts.up_proj", s.shared_inter, s.hidden)
        net.linear(f"{mixer}.shared_experts.down_proj", s.hidden, s.shared_inter)


def _nemotron_h(v: Variant) -> Network:
    s = v.sizes
    net = Network(others={"model.embed_tokens.weight": (s.vocab, s.hidden), "model.norm_f.weight": (s.hidden,)})
    for i, kind in enumerate(_NEMOTRON_PATTERN[v.variety]):
        _nemotron_block(net, f"model.layers.{i}", kind, v)
    if v.mtp:
        net.vectors("mtp.layers.0", s.hidden, "enorm", "hnorm")
        net.linear("mtp.layers.0.eh_proj", s.hidden, 2 * s.hidden)
        _nemotron_block(net, "mtp.layers.0", "*", v)
        _nemotron_block(net, "mtp.layers.1", "E", v)
        net.vectors("mtp.layers.1", s.hidden, "final_layernorm")
    if v.wrapper:
        block = "vision_model.radio_model.model.blocks.0"
        net.others |= {
            "vision_model.radio_model.input_conditioner.norm_mean": (3, 1, 1),
            "vision_model.radio_model.model.patch_generator.pos_embed": (1, 16, 32),
            f"{block}.attn.qkv.weight": (96, 32), f"{block}.attn.qkv.bias": (96,), f"{block}.norm1.weight": (32,),
            "mlp1.0.weight": (128,), "mlp1.1.weight": (48, 128), "mlp1.3.weight": (s.hidden, 48),
            "sound_projection.linear1.weight": (48, 24), "sound_encoder.encoder.layers.0.norm.bias": (24,),
        }  # fmt: skip
    return _head(net, v)


def _nemotron_text(v: Variant) -> dict[str, Any]:
    s, pattern = v.sizes, _NEMOTRON_PATTERN[v.variety]
    config = {
        "attention_bias": v.bias, "attention_dropout": 0.0, "bos_token_id": 0, "chunk_size": 4, "conv_kernel": 4,
        "dtype": v.dtype, "eos_token_id": 1, "expand": 2, "head_dim": s.head_dim, "hidden_size": s.hidden,
        "hybrid_override_pattern": pattern, "intermediate_size": s.intermediate, "layer_norm_epsilon": 1e-05,
        "mamba_head_dim": s.value_dim, "mamba_hidden_act": "silu", "mamba_num_heads": s.value_heads, "mamba_proj_bias": False,
        "max_position_embeddings": 512, "mlp_bias": False, "mlp_hidden_act": "relu2", "model_type": "nemotron_h",
        "n_groups": s.key_heads, "num_attention_heads": s.heads, "num_hidden_layers": len(pattern),
        "num_key_value_heads": s.kv_heads, "pad_token_id": 0, "residual_in_fp32": False, "ssm_state_size": s.key_dim,
        "tie_word_embeddings": v.tied, "time_step_limit": [0.0, float("inf")], "time_step_min": 0.001, "use_bias": False,
        "use_conv_bias": True, "vocab_size": s.vocab,
    }  # fmt: skip
    if "E" in pattern:
        config |= {
            "moe_intermediate_size": s.moe_inter, "moe_shared_expert_intermediate_size": s.shared_inter, "n_group": 1,
            "n_routed_experts": s.experts, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 2,
            "routed_scaling_factor": 2.5, "topk_group": 1, "moe_latent_size": s.latent if v.variety in _SQUEEZED else None,
        }  # fmt: skip
    return config | ({"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"} if v.mtp else {})


def _nemotron_config(v: Variant, bare: bool) -> dict[str, Any]:
    if not v.wrapper:
        name = "NemotronHModel" if bare else "NemotronHForCausalLM"
        return {"architectures": [name], **_nemotron_text(v), "transformers_version": "5.23.0"}
    return {
        "architectures": ["NemotronH_Nano_VL_V2"], "downsample_ratio": 0.5, "dtype": v.dtype, "force_image_size": 512,
        "llm_config": _nemotron_text(v), "model_type": "NemotronH_Nano_VL_V2", "patch_size": 16,
        "projector_hidden_size": 48, "vision_config": {"hidden_size": 32}, "vit_hidden_size": 32,
    }  # fmt: skip


def _nemotron_facts(v: Variant) -> dict[str, Any]:
    text = _nemotron_text(v)
    same = (
        "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias",
        "intermediate_size", "mlp_bias", "mlp_hidden_act", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups",
        "conv_kernel", "use_conv_bias", "max_position_embeddings", "bos_token_id", "pad_token_id", "num_hidden_layers",
    )  # fmt: skip
    without = {"n_routed_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "n_shared_experts": 1,
               "moe_latent_size": None, "routed_scaling_factor": 1.0, "norm_topk_prob": True, "n_group": 1,
               "topk_group": 1}  # fmt: skip
    moe = f"{'latent_' if v.variety in _SQUEEZED else ''}moe"
    kinds = {**_BLOCKS, "E": moe}
    return {
        **{key: text[key] for key in same}, **{key: text.get(key, value) for key, value in without.items()},
        "eos_token_id": [1], "layer_types": [kinds[k] for k in text["hybrid_override_pattern"]], "mamba_bias": False,
        "mtp_layer_types": ["start_attention", f"{moe}_end"], "num_nextn_predict_layers": int(v.mtp), "rms_norm_eps": 1e-05,
        "shared_intermediate_size": text.get("moe_shared_expert_intermediate_size", 0), "time_step_limit": [0.0, None],
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- Step

_STEP_TOWERS = ("vision_model", "vit_large_projector")
_STEP3_TOWERS = (*_STEP_TOWERS, "vit_downsampler")


def _step_feed_forward(net: Network, layer: str, v: Variant, sparse: bool) -> None:
    s = v.sizes
    if sparse:
        net.linear(f"{layer}.moe.gate", s.experts, s.hidden)
        net.experts(f"{layer}.moe.experts", v, s.hidden)
        net.gated_mlp(f"{layer}.share_expert", s.shared_inter, s.hidden)
    else:
        net.gated_mlp(f"{layer}.mlp", s.intermediate, s.hidden)
    net.vectors(layer, s.hidden, *DECODER_NORMS)


def _step_towers(net: Network, s: Sizes, roots: tuple[str, ...]) -> None:
    net.others["vision_model.conv1.weight"] = (32, 3, 4, 4)
    net.others["vision_model.transformer.resblocks.0.attn.in_proj_weight"] = (96, 32)
    for root in roots[1:]:
        net.others |= {f"{root}.weight": (s.hidden, 128)}


def _step3p5(v: Variant) -> Network:
    """Layer 0 full attention and dense, layer 1 sliding and sparse; after them, in the same list, a draft layer."""
    net, s = _trunk(v.sizes), v.sizes
    sliding = replace(s, heads=s.heads + 2)
    for i in range(3 if v.mtp else 2):
        layer, sizes = f"model.layers.{i}", sliding if i else s
        _attention(net, f"{layer}.self_attn", sizes)
        net.linear(f"{layer}.self_attn.g_proj", sizes.heads, s.hidden)
        _step_feed_forward(net, layer, v, sparse=i == 1)
        if i == 1:
            net.others[f"{layer}.moe.router_bias"] = (s.experts,)
    if v.mtp:
        net.drafts.append(layer)
        net.vectors(layer, s.hidden, "enorm", "hnorm", "shared_head.norm")
        net.linear(f"{layer}.eh_proj", s.hidden, 2 * s.hidden)
        net.linear(f"{layer}.shared_head.head", s.vocab, s.hidden)
    if v.wrapper:
        _step_towers(net, s, _STEP_TOWERS)
    return _head(net, v)


def _step3p5_text(v: Variant) -> dict[str, Any]:
    s, layers = v.sizes, ["full_attention", "sliding_attention"] + ["sliding_attention"] * v.mtp
    return {
        "att_impl_type": "GQA", "bos_token_id": 0, "dtype": v.dtype, "eos_token_id": 1, "pad_token_id": 0,
        "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": s.heads + 2,
                                    "num_attention_groups": s.kv_heads, "head_dim": s.head_dim},
        "head_dim": s.head_dim, "hidden_size": s.hidden, "intermediate_size": s.intermediate, "layer_types": layers,
        "max_position_embeddings": 512, "model_type": "step3p5", "moe_intermediate_size": s.moe_inter,
        "moe_layers_enum": "1", "moe_num_experts": s.experts, "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0, "moe_top_k": 2, "need_fp32_gate": True, "norm_expert_weight": True,
        "num_attention_groups": s.kv_heads, "num_attention_heads": s.heads, "num_hidden_layers": 2,
        "num_nextn_predict_layers": int(v.mtp), "partial_rotary_factors": [0.5] + [1.0] * (len(layers) - 1),
        "rms_norm_eps": 1e-05, "rope_theta": [5e6] + [1e4] * (len(layers) - 1), "share_expert_dim": s.shared_inter,
        "rope_scaling": {"factor": 2.0, "high_freq_factor": 32.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 256, "rope_type": "llama3"},
        "sliding_window": 8, "swiglu_limits": [0.0, 7.0] + [0.0] * v.mtp, "swiglu_limits_shared": [0.0, 16.0] + [0.0] * v.mtp,
        "tie_word_embeddings": v.tied, "use_head_wise_attn_gate": True, "use_moe_router_bias": True, "use_qk_norm": True,
        "vocab_size": s.vocab, "yarn_only_types": ["full_attention"], "zero_centered": True,
    }  # fmt: skip


def _step_config(
    text: Callable[[Variant], dict[str, Any]], name: str, wrapper: tuple[str, str], bare_name: str
) -> _Config:
    """`wrapper`: class and model type of the vision-language wrapper."""

    def config(v: Variant, bare: bool) -> dict[str, Any]:
        if not v.wrapper:
            return {"architectures": [bare_name if bare else name], **text(v)}
        return {
            "architectures": [wrapper[0]], "dtype": v.dtype, "image_token_id": 76, "model_type": wrapper[1],
            "text_config": text(v), "tie_word_embeddings": v.tied, "vision_config": {"layers": 1, "patch_size": 4, "width": 32},
        }  # fmt: skip

    return config


def _step_facts(text: Mapping[str, Any]) -> dict[str, Any]:
    """What both generations say."""
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "moe_intermediate_size", "share_expert_dim", "norm_expert_weight", "rms_norm_eps", "bos_token_id", "pad_token_id",
    )  # fmt: skip
    return {key: text[key] for key in same} | {
        "eos_token_id": [1], "max_position_embeddings": 512, "mlp_layer_types": ["dense", "sparse"],
        "num_experts": text["moe_num_experts"], "num_experts_per_tok": 2, "num_key_value_heads": text["num_attention_groups"],
        "rope_scaling": text["rope_scaling"], "rope_theta": text["rope_theta"],
    }  # fmt: skip


def _step3p5_facts(v: Variant) -> dict[str, Any]:
    text = _step3p5_text(v)
    same = ("partial_rotary_factors", "yarn_only_types", "swiglu_limits", "swiglu_limits_shared", "sliding_window",
            "use_moe_router_bias", "num_nextn_predict_layers")  # fmt: skip
    return _step_facts(text) | {key: text[key] for key in same} | {
        "layer_kinds": ["full_attention.dense", "sliding_attention.sparse"], "layer_scale": False,
        "layer_types": ["full_attention", "sliding_attention"], "mtp_layer_kinds": ["sliding_attention.dense"] * v.mtp,
        "num_sliding_attention_heads": v.sizes.heads + 2, "num_sliding_key_value_heads": v.sizes.kv_heads,
        "rope_parameters": None, "router_scaling_factor": 3.0,
    }  # fmt: skip


def _step3(v: Variant) -> Network:
    """Layer 0 dense, layer 1 sparse; queries through a bottleneck, one shared key and value head."""
    net, s = _trunk(v.sizes), v.sizes
    for i in range(2):
        layer = f"model.layers.{i}"
        net.linear(f"{layer}.self_attn.q_proj", s.latent, s.hidden, "q")
        net.linear(f"{layer}.self_attn.k_proj", s.head_dim, s.hidden, "k")
        net.linear(f"{layer}.self_attn.v_proj", s.head_dim, s.hidden, "v")
        net.vectors(f"{layer}.self_attn", s.latent, "inter_norm")
        net.linear(f"{layer}.self_attn.wq", s.heads * s.head_dim, s.latent)
        net.linear(f"{layer}.self_attn.o_proj", s.hidden, s.heads * s.head_dim)
        _step_feed_forward(net, layer, v, sparse=i == 1)
    if v.wrapper:
        _step_towers(net, s, _STEP3_TOWERS)
    return _head(net, v)


def _step3_text(v: Variant) -> dict[str, Any]:
    s = v.sizes
    return {
        "bos_token_id": 0, "dtype": v.dtype, "eos_token_id": 1, "head_dim": s.head_dim, "hidden_size": s.hidden,
        "intermediate_size": s.intermediate, "max_position_embedding": 512, "model_type": "step3_text",
        "moe_intermediate_size": s.moe_inter, "moe_layers_enum": "1", "moe_num_experts": s.experts, "moe_top_k": 2,
        "norm_expert_weight": False, "num_attention_groups": 1, "num_attention_heads": s.heads, "num_hidden_layers": 2,
        "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5e5, "share_expert_dim": s.shared_inter,
        "share_q_dim": s.latent, "tie_word_embeddings": v.tied, "vocab_size": s.vocab,
    }  # fmt: skip


def _step3_facts(v: Variant) -> dict[str, Any]:
    return _step_facts(_step3_text(v)) | {"share_q_dim": v.sizes.latent}


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

        def inside(part: str | None) -> str | None:
            return None if part is None else outer + part

        towers = {root: outer + place for root, place in self.towers.items()}
        parts = (inside(self.head), inside(self.visual), inside(self.mtp))
        return Prefix(outer + self.trunk, *parts, towers, self.inner)

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
_NANO_TOWERS = {root: f"{root}." for root in ("vision_model", "mlp1", "sound_encoder", "sound_projection", "vision_projector")}
_EMBEDDINGS = (("embed_tokens", "embeddings"),)
PREFIXES |= {
    "N1": Prefix("backbone.", "lm_head.", None, "mtp.", inner=_EMBEDDINGS),
    "N2": Prefix("model.", "lm_head.", None, None, inner=_EMBEDDINGS),
    "N3": Prefix("model.", "lm_head.", None, None),
    "N4": Prefix("language_model.backbone.", "language_model.lm_head.", None, "mtp.", _NANO_TOWERS, _EMBEDDINGS),
    "N4-inner-mtp": Prefix(
        "language_model.backbone.", "language_model.lm_head.", None, "language_model.mtp.", _NANO_TOWERS, _EMBEDDINGS
    ),
    "N5": Prefix("language_model.model.", "language_model.lm_head.", None, None),
    "N6": Prefix("", None, None, None, inner=_EMBEDDINGS),
}
_SHARED_HEAD = (("shared_head.head", "transformer.shared_head.output"), ("shared_head.norm", "transformer.shared_head.norm"))
_VIT = {root: f"{root}." for root in _STEP_TOWERS}
PREFIXES |= {
    "S1": Prefix("model.", "lm_head.", None, None, _VIT, _SHARED_HEAD),
    "S1-plain-head": Prefix("model.", "lm_head.", None, None, _VIT, (("shared_head.head", "shared_head.output"),)),
    "S2": Prefix(
        "model.language_model.", "lm_head.", None, None, {root: f"model.{place}" for root, place in _VIT.items()}, _SHARED_HEAD
    ),
    "S3": Prefix("language_model.model.", "language_model.lm_head.", None, None, _VIT),
    "T1": Prefix("model.", "lm_head.", None, None, {root: f"{root}." for root in _STEP3_TOWERS}),
    "T1-inner": Prefix("language_model.model.", "language_model.lm_head.", None, None, {r: f"{r}." for r in _STEP3_TOWERS}),
}
PREFIXES |= {
    f"Q7-{inner}": PREFIXES[inner].under("base_model.model.")
    for inner in ("Q1", "Q2", "Q3", "Q4", "N1", "N4", "S1", "S2", "T1")
}


# ---------------------------------------------------------------------------------------------------------- families

_Config = Callable[[Variant, bool], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Family:
    """How to build a checkpoint of a family.

    network    every tensor of a model
    config     `config.json`; the flag is whether the checkpoint is a bare trunk
    facts      `architecture` of the canonical config, without `head`
    hub        keys of `PREFIXES` under which the hub stores it: a wrapper, a text model
    experts    how the hub stores experts: "X1" one by one, "X2" stacked and fused, "X4" stacked by projection
    """

    network: Callable[[Variant], Network]
    config: _Config
    facts: Callable[[Variant], dict[str, Any]]
    hub: tuple[str, str] = ("Q1", "Q3")
    experts: str = "X1"


FAMILIES: Mapping[str, Family] = {
    "llama": Family(_llama, _qwen_config(_llama_text, "Llama"), _llama_facts),
    "qwen3": Family(_qwen3, _qwen_config(_qwen3_text, "Qwen3"), _qwen3_facts),
    "qwen3_moe": Family(
        _qwen3_moe((True, False), tower=False), _qwen_config(_qwen3_moe_text, "Qwen3Moe"),
        _moe_facts(_qwen3_moe_text, ("sparse", "dense")),
    ),
    "qwen3_vl_moe": Family(
        _qwen3_moe((False, True), tower=True),
        _qwen_config(_qwen3_vl_moe_text, "Qwen3VLMoe", "qwen3_vl_moe", deepstack=True),
        _moe_facts(_qwen3_vl_moe_text, ("dense", "sparse")), experts="X2",
    ),
    "qwen3_5": Family(_qwen3_5(False), _qwen_config(_qwen3_5_text(False), "Qwen3_5", "qwen3_5"), _qwen3_5_facts(False)),
    "qwen3_5_moe": Family(
        _qwen3_5(True), _qwen_config(_qwen3_5_text(True), "Qwen3_5Moe", "qwen3_5_moe"), _qwen3_5_facts(True), experts="X2",
    ),
    "nemotron_h": Family(_nemotron_h, _nemotron_config, _nemotron_facts, ("N4", "N1")),
    "step3p5": Family(
        _step3p5,
        _step_config(_step3p5_text, "Step3p5ForCausalLM", ("Step3p7ForConditionalGeneration", "step3p7"), "Step3p7TextModel"),
        _step3p5_facts, ("S1", "S1"), "X4",
    ),
    "step3_text": Family(
        _step3,
        _step_config(_step3_text, "Step3TextForCausalLM", ("Step3VLForConditionalGeneration", "step3_vl"), "Step3TextModel"),
        _step3_facts, ("T1", "T1"), "X4",
    ),
}  # fmt: skip

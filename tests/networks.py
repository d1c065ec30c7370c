"""What describes a tiny model: its sizes, its tensors, where wrappers put their names; and what many families share.

Nothing here calls `convert` or `runtime`, and nothing knows about quantisation.  A family is one `Family` record in a file of
`tests/families/`: its tensors by plain name, the config that its producers write, and the `architecture` that
docs/format.md asks for.

A *plain* name is a Hugging Face name without its wrapper prefix and before fusing: `model.layers.0.self_attn.q_proj`,
`model.layers.0.mlp.experts.2.gate_proj`, `lm_head`, `mtp.fc`, `visual.pos_embed`.  A `Prefix` turns plain names into the
names on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# ------------------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True, slots=True)
class Sizes:
    """Dimensions of a tiny network.

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


def attention(
    net: Network, name: str, s: Sizes, *, gated: bool = False, bias: bool = False, out_bias: bool | None = None,
    norms: bool = True,
) -> None:  # fmt: skip
    """Query, key, value and output projections.

    `gated`: each head of q has as many rows of output gate; `out_bias`: whether `o_proj` has a bias, when not as the others.
    """
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    net.linear(f"{name}.q_proj", q * (2 if gated else 1), s.hidden, "q", bias)
    net.linear(f"{name}.k_proj", kv, s.hidden, "k", bias)
    net.linear(f"{name}.v_proj", kv, s.hidden, "v", bias)
    net.linear(f"{name}.o_proj", s.hidden, q, bias=bias if out_bias is None else out_bias)
    if norms:
        net.vectors(name, s.head_dim, "q_norm", "k_norm")


DECODER_NORMS = ("input_layernorm", "post_attention_layernorm")


def trunk(s: Sizes) -> Network:
    """Embedding and final norm."""
    return Network(others={"model.embed_tokens.weight": (s.vocab, s.hidden), "model.norm.weight": (s.hidden,)})


def head(net: Network, v: Variant) -> Network:
    """Add the head, unless it is tied."""
    if not v.tied:
        net.linear("lm_head", v.sizes.vocab, v.sizes.hidden)
    return net


_VISION = {"hidden": 32, "intermediate": 48, "depth": 2, "positions": 16, "patch": 4}


def vision_tower(net: Network, s: Sizes, deepstack: bool = False) -> None:
    """Add a small tower below `visual`; `deepstack`: with a second merger."""
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


# ------------------------------------------------------------------------------- configs and facts that decoders share


def decoder_config(v: Variant, layers: int) -> dict[str, Any]:
    """What every decoder's config says."""
    s = v.sizes
    return {
        "attention_bias": v.bias, "attention_dropout": 0.0, "bos_token_id": 0, "dtype": v.dtype, "eos_token_id": 1,
        "head_dim": s.head_dim, "hidden_act": "silu", "hidden_size": s.hidden, "initializer_range": 0.02,
        "intermediate_size": s.intermediate, "max_position_embeddings": 512, "num_attention_heads": s.heads,
        "num_hidden_layers": layers, "num_key_value_heads": s.kv_heads, "pad_token_id": 0, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": v.tied, "use_cache": True, "vocab_size": s.vocab,
    }  # fmt: skip


DEFAULT_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


def text_or_wrapper(
    text: Callable[[Variant], dict[str, Any]], stem: str, wrapper_type: str = "", deepstack: bool = False
) -> Config:
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


def decoder_facts(text: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The part of `architecture` that says the same under the same name as the text config."""
    facts = {key: text[key] for key in (*_SHARED_FACTS, *more)}
    return facts | {"rope_theta": 10000.0, "rope_scaling": None, "eos_token_id": [text["eos_token_id"]]}


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


# ---------------------------------------------------------------------------------------------------------- families

Text = Callable[[Variant], dict[str, Any]]
Config = Callable[[Variant, bool], dict[str, Any]]
Options = Mapping[str, Any]  # further keywords of `build.build`


@dataclass(frozen=True, slots=True)
class Family:
    """How to build a checkpoint of a family.

    network    every tensor of a model
    config     `config.json`; the flag is whether the checkpoint is a bare trunk
    facts      `architecture` of the canonical config, without `head`
    hub        keys of `PREFIXES` under which the hub stores it: a wrapper, a text model
    models     rows of the matrix: id -> further keywords of `build`
    spellings  id -> further keywords of `build`, the prefix to compare with, other prefixes of the same model
    experts    how the hub stores experts: "X1" one by one, "X2" stacked and fused, "X4" stacked by projection
    """

    network: Callable[[Variant], Network]
    config: Config
    facts: Text
    models: Mapping[str, Options]
    spellings: Mapping[str, tuple[Options, str, tuple[str, ...]]]
    hub: tuple[str, str] = ("Q1", "Q3")
    experts: str = "X1"

"""Writes tiny source checkpoints the way their producers do, together with the values that they stand for.

Nothing here calls `convert` or `runtime`.  The builder chooses quantised codes and scales at random, stores them in a
producer's dialect, and computes from the same codes and scales, with numpy in float32, the dense weights and the
canonical tensors that a converter must arrive at.  The formulas are those of the producers (docs/format.md names them).

A *plain* name is a Hugging Face name without its wrapper prefix and before fusing: `model.layers.0.self_attn.q_proj`,
`lm_head`, `mtp.fc`, `visual.pos_embed`.  `PREFIXES` turns plain names into the names on disk.

Letters: N out features, K in features, P partitions of a fused module.
"""

from __future__ import annotations

import fnmatch
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]

BLOCK = 128  # rows and columns of an FP8 block
INDEX = "model.safetensors.index.json"
SIDE_FILES: Mapping[str, bytes] = {
    "generation_config.json": b'{\n  "bos_token_id": 0,\n  "eos_token_id": 1,\n  "pad_token_id": 0\n}\n',
    "tokenizer_config.json": b'{"model_max_length": 512,   "padding_side": "left"}\n',
    "chat_template.jinja": b"{% for m in messages %}<|{{ m.role }}|>\r\n{{ m.content }}{% endfor %}",
    "LICENSE": b"Made by a test; do what you like with it.\n",
}


# ---------------------------------------------------------------------------------------------------- number formats

_WIDTH = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F16": 2, "BF16": 2, "I16": 2,
    "F32": 4, "I32": 4, "I64": 8, "F64": 8,
}  # fmt: skip


def _e4m3(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3: Floats = np.array([_e4m3(code) for code in range(256)], np.float32)
E2M1: Floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E8M0: Floats = np.array([2.0 ** (code - 127) for code in range(255)] + [np.nan], np.float32)


def unpack_e2m1(packed: Array) -> Floats:
    """Values of packed FP4 codes: U8 `(N, K / 2)` -> F32 `(N, K)`, the low nibble first."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    return E2M1[codes]


@dataclass(frozen=True, slots=True)
class Raw:
    """A tensor as it lies on disk: safetensors dtype name, shape, little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def floats(self) -> Floats:
        """The values as float32 (an exact widening)."""
        match self.dtype:
            case "F32":
                values = np.frombuffer(self.data, "<f4")
            case "F16":
                values = np.frombuffer(self.data, "<f2").astype(np.float32)
            case "BF16":
                values = (np.frombuffer(self.data, "<u2").astype(np.uint32) << 16).view(np.float32)
            case "F8_E4M3":
                values = E4M3[np.frombuffer(self.data, np.uint8)]
            case "F8_E8M0":
                values = E8M0[np.frombuffer(self.data, np.uint8)]
            case _:
                raise TypeError(f"{self.dtype} holds no floats")
        return values.reshape(self.shape)

    def codes(self) -> Array:
        """The bytes of a one-byte dtype, in the tensor's shape."""
        assert _WIDTH[self.dtype] == 1
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)


def raw(dtype: str, values: Any) -> Raw:
    """A tensor of `dtype`: floats for F32, F16 and BF16 (rounded to nearest, ties up), bytes for one-byte dtypes."""
    array = np.asarray(values)
    match dtype:
        case "F32":
            data = array.astype("<f4").tobytes()
        case "F16":
            data = array.astype("<f2").tobytes()
        case "BF16":
            data = ((array.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype("<u2").tobytes()
        case "I32" | "I64":
            data = array.astype("<i" + str(_WIDTH[dtype])).tobytes()
        case _:
            data = array.astype(np.uint8).tobytes()
    return Raw(dtype, array.shape, data)


def join(tensors: Iterable[Raw]) -> Raw:
    """Concatenate along the first axis."""
    parts = list(tensors)
    assert len({(t.dtype, t.shape[1:]) for t in parts}) == 1
    shape = (sum(t.shape[0] for t in parts), *parts[0].shape[1:])
    return Raw(parts[0].dtype, shape, b"".join(t.data for t in parts))


# ------------------------------------------------------------------------------------------------------ files on disk


def safetensors_bytes(tensors: Mapping[str, Raw], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file, in the order of the real library: widest dtype first, then by name."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    data = bytearray()
    for name in sorted(tensors, key=lambda n: (-_WIDTH[tensors[n].dtype], n)):
        tensor = tensors[name]
        offsets = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(data)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file without `__metadata__`, and the offset at which its data begins."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def read_file(path: Path) -> dict[str, Raw]:
    """Every tensor of one safetensors file."""
    header, start = read_header(path)
    content = path.read_bytes()
    return {
        name: Raw(e["dtype"], tuple(e["shape"]), content[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for name, e in header.items()
    }


def read_tensors(directory: Path) -> dict[str, Raw]:
    """Every tensor of the `*.safetensors` files of a directory; a name must occur once."""
    tensors: dict[str, Raw] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found = read_file(path)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as Hugging Face does: two spaces, a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def edit_tensors(directory: Path, change: Callable[[dict[str, Raw]], object]) -> None:
    """Let `change` alter the tensors of a single-file checkpoint in place."""
    path = directory / "model.safetensors"
    tensors = read_file(path)
    change(tensors)
    path.write_bytes(safetensors_bytes(tensors))


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Let `change` alter a JSON file in place."""
    value = read_json(path)
    change(value)
    write_json(path, value)


# ---------------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True, slots=True)
class Sizes:
    """Dimensions of a tiny network; `key_heads` to `value_dim` describe the linear attention of qwen3_5."""

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


SIZES: Mapping[str, Sizes] = {
    # Every K a multiple of 32, no two partitions of a group equal where the architecture lets them differ.
    "small": Sizes(64, 96, 80, 4, 2, 16, 2, 4, 16, 24),
    # Partial last blocks along N and K; q, k, v of linear attention end inside a block.
    "block": Sizes(160, 224, 144, 6, 2, 32, 2, 4, 32, 40),
    # q, k, v of linear attention end on block boundaries; only the end of v is partial.
    "aligned": Sizes(160, 224, 144, 4, 2, 64, 2, 4, 64, 40),
}


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


def fused_name(linear: str) -> str:
    """Plain name of the canonical module that a projection belongs to."""
    parent, _, last = linear.rpartition(".")
    return f"{parent}.{_FUSED_INTO[last]}" if last in _FUSED_INTO else linear


@dataclass(slots=True)
class Network:
    """What a checkpoint contains before quantisation: projections, and the plain name -> shape of everything else."""

    linears: list[Linear] = field(default_factory=list)
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def linear(self, name: str, rows: int, columns: int, part: str = "", bias: bool = False) -> None:
        """Add a projection of one partition."""
        self.linears.append(Linear(name, ((part, rows),), columns, bias))


def _attention_layer(net: Network, layer: str, s: Sizes, gated: bool, bias: bool = False) -> None:
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    net.linear(f"{layer}.self_attn.q_proj", q * (2 if gated else 1), s.hidden, "q", bias)
    net.linear(f"{layer}.self_attn.k_proj", kv, s.hidden, "k", bias)
    net.linear(f"{layer}.self_attn.v_proj", kv, s.hidden, "v", bias)
    net.linear(f"{layer}.self_attn.o_proj", s.hidden, q, bias=bias)
    net.others |= {f"{layer}.self_attn.{norm}.weight": (s.head_dim,) for norm in ("q_norm", "k_norm")}


def _linear_attention_layer(net: Network, layer: str, s: Sizes) -> None:
    key, value = s.key_heads * s.key_dim, s.value_heads * s.value_dim
    parts = (("q", key), ("k", key), ("v", value))
    net.linears.append(Linear(f"{layer}.linear_attn.in_proj_qkv", parts, s.hidden))
    net.linear(f"{layer}.linear_attn.in_proj_z", value, s.hidden, "z")
    net.linear(f"{layer}.linear_attn.in_proj_b", s.value_heads, s.hidden, "b")
    net.linear(f"{layer}.linear_attn.in_proj_a", s.value_heads, s.hidden, "a")
    net.linear(f"{layer}.linear_attn.out_proj", s.hidden, value)
    net.others |= {
        f"{layer}.linear_attn.conv1d.weight": (2 * key + value, 1, 4),
        f"{layer}.linear_attn.A_log": (s.value_heads,),
        f"{layer}.linear_attn.dt_bias": (s.value_heads,),
        f"{layer}.linear_attn.norm.weight": (s.value_dim,),
    }


def _mlp_and_norms(net: Network, layer: str, s: Sizes) -> None:
    net.linear(f"{layer}.mlp.gate_proj", s.intermediate, s.hidden, "gate")
    net.linear(f"{layer}.mlp.up_proj", s.intermediate, s.hidden, "up")
    net.linear(f"{layer}.mlp.down_proj", s.hidden, s.intermediate)
    net.others |= {f"{layer}.{n}.weight": (s.hidden,) for n in ("input_layernorm", "post_attention_layernorm")}


_VISION = {"hidden": 32, "intermediate": 48, "depth": 2, "positions": 16, "patch": 4}


def _vision_tower(net: Network, s: Sizes) -> None:
    h, i = _VISION["hidden"], _VISION["intermediate"]
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj": (h, 3, 1, _VISION["patch"], _VISION["patch"])}
    for b in range(_VISION["depth"]):
        block = {"norm1": (h,), "norm2": (h,), "attn.qkv": (3 * h, h), "attn.proj": (h, h)}
        shapes |= {f"blocks.{b}.{n}": shape for n, shape in block.items()}
        shapes |= {f"blocks.{b}.mlp.linear_fc1": (i, h), f"blocks.{b}.mlp.linear_fc2": (h, i)}
    shapes |= {"merger.norm": (h,), "merger.linear_fc1": (4 * h, 4 * h), "merger.linear_fc2": (s.hidden, 4 * h)}
    net.others["visual.pos_embed.weight"] = (_VISION["positions"], h)
    for name, shape in shapes.items():
        net.others[f"visual.{name}.weight"] = shape
        net.others[f"visual.{name}.bias"] = shape[:1]


LAYER_TYPES = {"qwen3": ("full_attention",) * 2, "qwen3_5": ("linear_attention", "full_attention")}


def network(family: str, s: Sizes, *, tied: bool, wrapper: bool, mtp: bool, bias: bool) -> Network:
    """The tensors of a whole model, by plain name."""
    net = Network(others={"model.embed_tokens.weight": (s.vocab, s.hidden), "model.norm.weight": (s.hidden,)})
    gated = family == "qwen3_5"
    for i, kind in enumerate(LAYER_TYPES[family]):
        layer = f"model.layers.{i}"
        if kind == "full_attention":
            _attention_layer(net, layer, s, gated, bias)
        else:
            _linear_attention_layer(net, layer, s)
        _mlp_and_norms(net, layer, s)
    if mtp:
        net.linear("mtp.fc", s.hidden, 2 * s.hidden)
        net.others |= {f"mtp.{n}.weight": (s.hidden,) for n in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
        _attention_layer(net, "mtp.layers.0", s, gated)
        _mlp_and_norms(net, "mtp.layers.0", s)
    if wrapper:
        _vision_tower(net, s)
    if not tied:
        net.linear("lm_head", s.vocab, s.hidden)
    return net


def _text_config(family: str, s: Sizes, *, tied: bool, mtp: bool, bias: bool, dtype: str) -> dict[str, Any]:
    types = LAYER_TYPES[family]
    config: dict[str, Any] = {
        "attention_bias": bias, "attention_dropout": 0.0, "bos_token_id": 0, "dtype": dtype, "eos_token_id": 1,
        "head_dim": s.head_dim, "hidden_act": "silu", "hidden_size": s.hidden, "initializer_range": 0.02,
        "intermediate_size": s.intermediate, "layer_types": list(types), "max_position_embeddings": 512,
        "num_attention_heads": s.heads, "num_hidden_layers": len(types), "num_key_value_heads": s.kv_heads,
        "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": tied, "use_cache": True,
        "vocab_size": s.vocab,
    }  # fmt: skip
    if family == "qwen3":
        return config | {
            "model_type": "qwen3", "max_window_layers": 28, "sliding_window": None, "use_sliding_window": False,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        }  # fmt: skip
    config |= {
        "model_type": "qwen3_5_text", "linear_conv_kernel_dim": 4, "linear_key_head_dim": s.key_dim,
        "linear_num_key_heads": s.key_heads, "linear_num_value_heads": s.value_heads,
        "linear_value_head_dim": s.value_dim,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000.0, "rope_type": "default"},
    }  # fmt: skip
    return config | ({"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False} if mtp else {})


def _model_config(text: dict[str, Any], s: Sizes, *, wrapper: bool, bare: bool) -> dict[str, Any]:
    family = {"qwen3": "Qwen3", "qwen3_5_text": "Qwen3_5"}[text["model_type"]]
    if not wrapper:
        bare_name = {"Qwen3": "Qwen3Model", "Qwen3_5": "Qwen3_5TextModel"}[family]
        name = bare_name if bare else f"{family}ForCausalLM"
        return {"architectures": [name], **text, "transformers_version": "5.23.0"}
    vision = {
        "depth": _VISION["depth"], "dtype": text["dtype"], "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": _VISION["hidden"], "in_channels": 3, "initializer_range": 0.02,
        "intermediate_size": _VISION["intermediate"], "model_type": "qwen3_5_vision", "num_heads": 2,
        "num_position_embeddings": _VISION["positions"], "out_hidden_size": s.hidden, "patch_size": _VISION["patch"],
        "spatial_merge_size": 2, "temporal_patch_size": 1,
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5Model" if bare else "Qwen3_5ForConditionalGeneration"], "dtype": text["dtype"],
        "image_token_id": 76, "model_type": "qwen3_5", "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"], "transformers_version": "5.23.0", "video_token_id": 77,
        "vision_config": vision, "vision_start_token_id": 78, "vision_end_token_id": 79,
    }  # fmt: skip


def _architecture(family: str, text: Mapping[str, Any], head: str) -> dict[str, Any]:
    """`architecture` of the canonical config, as docs/format.md lists it."""
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types", "num_attention_heads",
        "num_key_value_heads", "head_dim", "attention_bias", "rms_norm_eps", "hidden_act", "max_position_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    expected = {key: text[key] for key in same} | {"rope_theta": 10000.0, "rope_scaling": None, "head": head}
    expected["eos_token_id"] = [text["eos_token_id"]]
    if family == "qwen3":
        return expected | {"sliding_window": None}
    linear = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    return (
        expected
        | {f"linear_{key}": text[f"linear_{key}"] for key in linear}
        | {"rotary_dim": text["head_dim"] // 4, "attn_output_gate": True, "output_gate": "silu"}
        | {"mtp_num_hidden_layers": text.get("mtp_num_hidden_layers", 0)}
    )


# ---------------------------------------------------------------------------------------------------------- prefixes


@dataclass(frozen=True, slots=True)
class Prefix:
    """Where the four parts of a model live on disk; None: this variant does not store the part."""

    trunk: str
    head: str | None
    visual: str | None
    mtp: str | None

    def under(self, outer: str) -> Prefix:
        """The same variant below an outer prefix."""
        parts = (self.trunk, self.head, self.visual, self.mtp)
        return Prefix(*(None if part is None else outer + part for part in parts))  # type: ignore[arg-type]

    def name(self, plain: str) -> str | None:
        """Name on disk of a plain tensor or module name, or None."""
        first, _, rest = plain.partition(".")
        part = {"model": self.trunk, "lm_head": self.head, "visual": self.visual, "mtp": self.mtp}[first]
        return None if part is None else f"{part}{rest}".rstrip(".")


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

NUL_SENTINEL = ".\0backbone.pt_name_sentinel"  # what modelopt 0.47 leaves in names of its config (formats.md, 2.5)


def _with_sentinel(entry: str) -> str:
    stem = entry.rstrip("*")
    return stem.rstrip(".") + NUL_SENTINEL + entry[len(stem.rstrip(".")) :]


# ------------------------------------------------------------------------------------------------ quantised modules


@dataclass(frozen=True, slots=True)
class Kind:
    """A number format of a module: canonical scheme and what its input is quantised to (None: not at all)."""

    scheme: str
    activations: str | None


KINDS: Mapping[str, Kind] = {
    "fp8": Kind("fp8_tensor", "fp8_static"),
    "fp8_dynamic": Kind("fp8_tensor", "fp8_tensor"),
    "fp8_dynamic_token": Kind("fp8_tensor", "fp8_token"),
    "fp8_wo": Kind("fp8_tensor", None),
    "fp8_channel": Kind("fp8_channel", "fp8_token"),
    "fp8_channel_wo": Kind("fp8_channel", None),
    "fp8_block": Kind("fp8_block", "fp8_group"),
    "fp8_block_e8m0": Kind("fp8_block", "fp8_group_e8m0"),
    "fp8_block_wo": Kind("fp8_block", None),
    "nvfp4": Kind("nvfp4", "nvfp4"),
    "nvfp4_wo": Kind("nvfp4", None),
    "nvfp4_awq": Kind("nvfp4", "nvfp4"),
    "mxfp8": Kind("mxfp8", "mxfp8"),
    "mxfp8_wo": Kind("mxfp8", None),
    "mxfp4": Kind("mxfp4", "mxfp4"),
    "mxfp4_wo": Kind("mxfp4", None),
}
_AWQ_KEEPS = ("o_proj", "down_proj", "out_proj")  # projections whose pre_quant_scale cannot be folded into a norm


@dataclass(frozen=True, slots=True)
class Quantised:
    """One quantised projection: its codes and scales, as multipliers, and what they are worth."""

    kind: Kind
    weight: Array  # codes, (N, K) or packed (N, K / 2)
    scale: Array  # F32: (), (n partitions), (N,) or (block rows, block columns); U8 codes (N, K / group)
    scale_2: Floats | None  # () or (n partitions)
    divisor: Floats | None  # () where the dialect stores a divisor instead of scale_2
    input_scale: Floats | None  # ()
    input_divisor: Floats | None
    pre_quant_scale: Raw | None  # (K,)
    dense: Floats  # (N, K), `pre_quant_scale` multiplied in
    division: Floats | None  # the same where `divisor` divides instead of its reciprocal multiplying


def random_scale(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, low: float, high: float) -> Floats:
    """Positive scales of a stored `dtype`: no powers of two, and none that survives two reciprocals in float32."""
    one = np.float32(1)

    def draw() -> np.float32:
        while True:
            value: np.float32 = np.float32(raw(dtype, np.exp(rng.uniform(np.log(low), np.log(high), ()))).floats()[()])
            if np.frexp(value)[0] != 0.5 and (dtype == "BF16" or one / (one / value) != value):
                return value

    return np.array([draw() for _ in range(int(np.prod(shape, dtype=int)))], np.float32).reshape(shape)


def _fp8_codes(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    codes = rng.integers(0, 256, shape, np.uint8)
    return np.where(codes & 0x7F == 0x7F, codes ^ 1, codes).astype(np.uint8)


def _mx_scales(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    codes = rng.integers(100, 135, shape, np.uint8)
    codes[0, 0] = 0  # 2**-127, not zero
    return codes


def per_row(values: Floats, partitions: Iterable[tuple[str, int]]) -> Floats:
    """One scale per partition -> one per row."""
    return np.repeat(values, [rows for _, rows in partitions])


def quantise(rng: np.random.Generator, kind_name: str, linear: Linear, scale_dtype: str, options: Options) -> Quantised:
    """Choose random codes and scales for a projection.  `scale_dtype`: how the dialect stores its float scales."""
    kind, n, k = KINDS[kind_name], linear.rows, linear.columns
    scale_2 = divisor = input_scale = input_divisor = pre = division = None
    match kind.scheme:
        case "fp8_tensor":
            weight = _fp8_codes(rng, (n, k))
            vector = options.vector_scales and len(linear.partitions) > 1
            scale = random_scale(rng, (len(linear.partitions),) if vector else (), scale_dtype, 1e-4, 1e-2)
            rows = per_row(scale, linear.partitions)[:, None] if vector else scale
            dense = E4M3[weight] * rows
        case "fp8_channel":
            weight = _fp8_codes(rng, (n, k))
            scale = random_scale(rng, (n,), scale_dtype, 1e-4, 1e-2)
            dense = E4M3[weight] * scale[:, None]
        case "fp8_block":
            weight = _fp8_codes(rng, (n, k))
            grid = (-(-n // BLOCK), -(-k // BLOCK))
            if scale_dtype == "F8_E8M0":
                scale = E8M0[rng.integers(110, 122, grid)]
            else:
                scale = random_scale(rng, grid, scale_dtype, 1e-4, 1e-2)
            dense = E4M3[weight] * scale.repeat(BLOCK, 0)[:n].repeat(BLOCK, 1)[:, :k]
        case "nvfp4":
            weight = rng.integers(0, 256, (n, k // 2), np.uint8)
            scale = rng.integers(1, 0x7F, (n, k // 16), np.uint8)
            if options.dialect == "compressed-tensors":
                divisor = random_scale(rng, (), "F32", 2e3, 4e4)
                scale_2 = np.float32(1) / divisor
                division = unpack_e2m1(weight) * (E4M3[scale] / divisor).repeat(16, 1)
            else:
                scale_2 = random_scale(rng, (), "F32", 1e-5, 1e-3)
            dense = unpack_e2m1(weight) * (E4M3[scale] * scale_2).repeat(16, 1)
        case "mxfp8":
            weight, scale = _fp8_codes(rng, (n, k)), _mx_scales(rng, (n, k // 32))
            dense = E4M3[weight] * E8M0[scale].repeat(32, 1)
        case "mxfp4":
            weight, scale = rng.integers(0, 256, (n, k // 2), np.uint8), _mx_scales(rng, (n, k // 32))
            dense = unpack_e2m1(weight) * E8M0[scale].repeat(32, 1)
        case other:
            raise ValueError(other)
    if kind.activations == "fp8_static":
        input_scale = random_scale(rng, (), scale_dtype, 1e-3, 1e-1)
    elif kind.activations == "nvfp4" and options.dialect == "compressed-tensors":
        input_divisor = random_scale(rng, (), "F32", 10, 1e3)
        input_scale = np.float32(1) / input_divisor
    elif kind.activations == "nvfp4":
        input_scale = random_scale(rng, (), "F32", 1e-4, 1e-2)
    keeps = (*_AWQ_KEEPS, *options.pre_quant_scale_on)
    if kind_name == "nvfp4_awq" and linear.name.rpartition(".")[2] in keeps:
        pre = raw("BF16", rng.uniform(0.5, 2.0, k))
        dense = dense * pre.floats()
    return Quantised(kind, weight, scale, scale_2, divisor, input_scale, input_divisor, pre, dense, division)


# ---------------------------------------------------------------------------------------------------------- dialects


def _modelopt_tensors(q: Quantised, stored: str) -> dict[str, Raw]:
    """ModelOpt 0.47 (formats.md, 2.1): scalars are 0-d F32, block scales 4-D F32, E8M0 scales U8."""
    scheme = q.kind.scheme
    packed = scheme in ("nvfp4", "mxfp4")
    tensors = {"weight": raw("U8" if packed else "F8_E4M3", q.weight)}
    if scheme == "fp8_block":
        tensors["weight_scale"] = raw("F32", q.scale[:, None, :, None])
    else:
        tensors["weight_scale"] = raw({"nvfp4": "F8_E4M3", "mxfp8": "U8", "mxfp4": "U8"}.get(scheme, "F32"), q.scale)
    if q.scale_2 is not None:
        tensors["weight_scale_2"] = raw("F32", q.scale_2)
    if q.input_scale is not None:
        tensors["input_scale"] = raw("F32", q.input_scale)
    if q.pre_quant_scale is not None:
        tensors["pre_quant_scale"] = q.pre_quant_scale
    return tensors


def _compressed_tensors_tensors(q: Quantised, stored: str) -> dict[str, Raw]:
    """compressed-tensors 0.20 (formats.md, 3.1): scales in the model dtype, `[1]` or `[N, 1]`; global scales divide."""
    scheme = q.kind.scheme
    packed = scheme in ("nvfp4", "mxfp4")
    tensors = {"weight_packed" if packed else "weight": raw("U8" if packed else "F8_E4M3", q.weight)}
    match scheme:
        case "fp8_tensor":
            tensors["weight_scale"] = raw(stored, q.scale.reshape(1))
        case "fp8_channel":
            tensors["weight_scale"] = raw(stored, q.scale[:, None])
        case "fp8_block":
            tensors["weight_scale"] = raw(stored, q.scale)
        case "nvfp4":
            assert q.divisor is not None
            tensors["weight_scale"] = raw("F8_E4M3", q.scale)
            tensors["weight_global_scale"] = raw("F32", q.divisor.reshape(1))
        case _:
            tensors["weight_scale"] = raw("U8", q.scale)
    if q.input_divisor is not None:
        tensors["input_global_scale"] = raw("F32", q.input_divisor.reshape(1))
    elif q.input_scale is not None:
        tensors["input_scale"] = raw(stored, q.input_scale.reshape(1))
    return tensors


def _hf_fp8_tensors(q: Quantised, stored: str) -> dict[str, Raw]:
    """transformers fine-grained FP8 (formats.md, 4): `weight_scale_inv` multiplies, whatever its name says."""
    scale = raw("U8", np.log2(q.scale).astype(int) + 127) if stored == "F8_E8M0" else raw(stored, q.scale)
    tensors = {"weight": raw("F8_E4M3", q.weight), "weight_scale_inv": replace(scale, dtype=stored)}
    if q.input_scale is not None:
        tensors["activation_scale"] = raw("F32", q.input_scale)
    return tensors


_TENSORS: Mapping[str, Callable[[Quantised, str], dict[str, Raw]]] = {
    "modelopt": _modelopt_tensors,
    "compressed-tensors": _compressed_tensors_tensors,
    "fp8": _hf_fp8_tensors,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which projections a producer quantises, and how.

    `rules`: (shell pattern over plain names, kind or None) pairs, tried before and `default` after the projections that
    producers leave alone.  `groups`: compressed-tensors config groups as (targets, kind).  `scale_dtype`: how float
    scales are stored.  `renamed`: (usual suffix, other spelling) pairs.
    """

    default: str | None
    rules: tuple[tuple[str, str | None], ...] = ()
    groups: tuple[tuple[tuple[str, ...], str], ...] = ()
    scale_dtype: str = "F32"
    sizes: str = "small"
    renamed: tuple[tuple[str, str], ...] = ()

    def kind(self, name: str) -> str | None:
        """Kind of a projection by plain name, or None when it stays dense."""
        rules = (*self.rules, ("lm_head", None), ("*.in_proj_[ab]", None), ("mtp.*", None), ("*", self.default))
        return next(kind for pattern, kind in rules if fnmatch.fnmatchcase(name, pattern))


def _ct(kind: str, **options: Any) -> Recipe:
    return Recipe(kind, groups=((("Linear",), kind),), scale_dtype="BF16", **options)


RECIPES: Mapping[tuple[str, str], Recipe] = {
    ("modelopt", "fp8"): Recipe("fp8"),
    ("modelopt", "fp8_weight_only"): Recipe("fp8_wo"),
    ("modelopt", "fp8_pc_pt"): Recipe("fp8_channel"),
    ("modelopt", "fp8_pb_wo"): Recipe("fp8_block_wo", sizes="block"),
    ("modelopt", "nvfp4"): Recipe("nvfp4"),
    ("modelopt", "w4a16_nvfp4"): Recipe("nvfp4_wo"),
    ("modelopt", "nvfp4_awq"): Recipe("nvfp4_awq"),
    ("modelopt", "mxfp8"): Recipe("mxfp8"),
    ("modelopt", "mxfp4"): Recipe("mxfp4_wo"),
    ("modelopt", "mixed"): Recipe(None, (("lm_head", "nvfp4"), ("model.*.mlp.*", "nvfp4"), ("*.in_proj_[ab]", None),
                                         ("model.*_attn.*", "fp8"))),
    # One fusable group, several number formats; and a quantised in_proj_ba (seen in Qwen3.8 recipes).
    ("modelopt", "mixed_groups"): Recipe(None, (("lm_head", "fp8_wo"), ("model.*.q_proj", "fp8"),
                                                ("model.*.in_proj_qkv", "fp8"), ("*.in_proj_[ab]", "fp8"),
                                                ("model.*.gate_proj", "nvfp4"), ("model.*.up_proj", "fp8"),
                                                ("model.*.down_proj", "nvfp4_wo"))),
    # One fusable group, one number format of weights, inputs quantised or not.
    ("modelopt", "mixed_inputs"): Recipe(None, (("model.*.gate_proj", "nvfp4"), ("model.*.up_proj", "nvfp4_wo"),
                                                ("model.*.in_proj_qkv", "nvfp4_wo"), ("model.*.in_proj_z", "nvfp4"),
                                                ("model.*.[qk]_proj", "nvfp4"), ("model.*.v_proj", "nvfp4_awq"))),
    ("compressed-tensors", "fp8_static"): _ct("fp8"),
    ("compressed-tensors", "fp8_dynamic"): _ct("fp8_channel"),
    ("compressed-tensors", "fp8_tensor_dynamic"): _ct("fp8_dynamic"),
    ("compressed-tensors", "fp8_block"): _ct("fp8_block", sizes="block"),
    ("compressed-tensors", "fp8_weight_only"): _ct("fp8_channel_wo"),
    ("compressed-tensors", "fp8_tensor_weight_only"): _ct("fp8_wo"),
    ("compressed-tensors", "nvfp4"): _ct("nvfp4"),
    ("compressed-tensors", "nvfp4a16"): _ct("nvfp4_wo"),
    ("compressed-tensors", "mxfp4"): _ct("mxfp4"),
    ("compressed-tensors", "mxfp4a16"): _ct("mxfp4_wo"),
    ("compressed-tensors", "mxfp8"): _ct("mxfp8"),
    ("compressed-tensors", "mxfp8a16"): _ct("mxfp8_wo"),
    ("compressed-tensors", "mixed"): Recipe(
        "fp8_channel",
        (("*.in_proj_[ab]", None), ("model.*.mlp.*", "nvfp4")),
        ((("re:.*mlp.*",), "nvfp4"), (("Linear",), "fp8_channel")),
        "BF16",
    ),
    ("fp8", "block"): Recipe("fp8_block", (("mtp.layers.*", "fp8_block"),), sizes="block"),
    ("fp8", "block_bf16"): Recipe("fp8_block", scale_dtype="BF16", sizes="aligned"),
    ("fp8", "block_e8m0"): Recipe("fp8_block_e8m0", scale_dtype="F8_E8M0", sizes="block"),
    ("fp8", "tensor_static"): Recipe("fp8"),
    ("fp8", "tensor_static_vllm"): Recipe("fp8", renamed=(("weight_scale_inv", "weight_scale"),
                                                          ("activation_scale", "input_scale"))),
    ("fp8", "tensor_dynamic"): Recipe("fp8_dynamic_token"),  # transformers: one scale for the K inputs of a token
    ("dense", "bf16"): Recipe(None),
    ("dense", "f16"): Recipe(None),
    ("dense", "f32"): Recipe(None),
}  # fmt: skip

_DENSE_DTYPE = {"f16": "F16", "f32": "F32"}  # schemes whose unquantised tensors are not BF16
_TORCH_NAME = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Options:
    """How a checkpoint is written; every field is a keyword of `build`.

    tied               no `lm_head`; the config says that it is the embedding
    wrapper            qwen3_5 as a vision-language wrapper with its tower (default: a flat text config)
    mtp                a multi-token-prediction head under `mtp.*`
    bias               attention projections have biases (qwen3)
    sizes              dimensions, or a key of `SIZES`; None: what suits the scheme
    f32_gates          `A_log` and `linear_attn.norm` are F32, as Qwen3.5 stores them
    kv                 KV-cache scales: "tensor", "head" (compressed-tensors only) or None
    meta_prefix        prefix variant of names in the quantisation config; None: that of the tensors
    base_layer         insert `.base_layer` after projections: "some" (q and v, as PEFT does) or "all"
    meta_base_layer    the quantisation config has the inserted names too
    nul_names          names in a ModelOpt config carry the NUL sentinel
    form               ModelOpt config: "embedded", "hf_quant", "both" or "nested" (old: no quant_method, nested)
    letter_case        function applied to ModelOpt's `quant_algo`
    vector_scales      a projection that covers several partitions stores one per-tensor scale for each of them
    pre_quant_scale_on more projections (last segments) that keep a `pre_quant_scale` under NVFP4_AWQ
    shards             number of files; more than one writes an index
    scales_apart       the last shard holds every scale and nothing else
    """

    dialect: str
    scheme: str
    tied: bool = False
    wrapper: bool = False
    mtp: bool = False
    bias: bool = False
    sizes: str | Sizes | None = None
    f32_gates: bool = False
    kv: str | None = None
    meta_prefix: str | None = None
    base_layer: str | None = None
    meta_base_layer: bool = False
    nul_names: bool = False
    form: str = "embedded"
    letter_case: Callable[[str], str] = str
    vector_scales: bool = False
    pre_quant_scale_on: tuple[str, ...] = ()
    shards: int = 1
    scales_apart: bool = False


_ALGO = {
    "fp8": "FP8", "fp8_wo": "FP8", "fp8_channel": "FP8_PER_CHANNEL_PER_TOKEN", "fp8_block_wo": "fp8_pb_wo",
    "nvfp4": "NVFP4", "nvfp4_wo": "W4A16_NVFP4", "nvfp4_awq": "NVFP4_AWQ", "mxfp8": "MXFP8",
    "mxfp4_wo": "mxfp4",
}  # fmt: skip


def _modelopt_layer(kind: str, with_scale: bool, case: Callable[[str], str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"quant_algo": case(_ALGO[kind])}
    if kind.startswith("nvfp4"):
        entry["group_size"] = 16
    if kind == "nvfp4_awq":
        entry |= {"has_zero_point": False, "pre_quant_scale": with_scale}
    return entry


def _modelopt_group(kind: str, targets: list[str]) -> dict[str, Any]:
    bits = 4 if kind.startswith("nvfp4") else 8
    args: dict[str, Any] = {"dynamic": False, "num_bits": bits, "type": "float"}
    if bits == 4:
        args["group_size"] = 16
    activations = {} if kind == "nvfp4_wo" else {"input_activations": args}  # weight-only FP8 still claims an input
    return activations | {"weights": args, "targets": targets}


def _modelopt_config(
    kinds: Mapping[str, str], excluded: list[str], o: Options, name: Callable[[str], str]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """`quantization_config` and `hf_quant_config.json` (either may be None).  `kinds`: plain name -> kind."""
    case, producer = o.letter_case, {"name": "modelopt", "version": "0.47.0"}
    headline = {_ALGO[kind] for kind in kinds.values()}
    layers = {name(m): _modelopt_layer(kind, m.endswith(_AWQ_KEEPS), case) for m, kind in kinds.items()}
    if len(headline) > 1:
        groups = {
            f"group_{i}": _modelopt_group(kind, sorted(name(m) for m in kinds if kinds[m] == kind))
            for i, kind in enumerate(dict.fromkeys(kinds.values()))
        }
        what: dict[str, Any] = {"quant_algo": case("MIXED_PRECISION"), "quantized_layers": layers}
        excluded = []
    else:
        kind = next(iter(kinds.values()))
        what = {"quant_algo": case(_ALGO[kind])}
        with_groups = _ALGO[kind] in ("FP8", "NVFP4", "W4A16_NVFP4")
        groups = {"group_0": _modelopt_group(kind, ["Linear"])} if with_groups else {}
    embedded: dict[str, Any] = {"config_groups": groups} if groups else {}
    embedded |= {"ignore": excluded, **what, "producer": producer, "quant_method": "modelopt"}
    if o.kv:
        embedded["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    legacy: dict[str, Any] = {"quant_algo": what["quant_algo"], "kv_cache_quant_algo": "FP8" if o.kv else None}
    if len(headline) == 1 and "NVFP4" in next(iter(headline)):
        legacy["group_size"] = 16
    legacy |= {"quantized_layers": layers} if len(headline) > 1 else {"exclude_modules": excluded}
    nested = {"producer": producer, "quantization": legacy}
    match o.form:
        case "embedded":
            return embedded, None
        case "hf_quant":
            return None, nested
        case "both":
            return embedded, nested
        case "nested":
            return nested, None
    raise ValueError(o.form)


def _ct_args(kind: str, part: str) -> dict[str, Any] | None:
    """QuantizationArgs of weights or input activations, null fields included, as compressed-tensors writes them."""
    args: dict[str, Any] = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
        "observer": "memoryless_minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": "tensor",
        "symmetric": True, "type": "float", "zp_dtype": None,
    }  # fmt: skip
    scheme, activations = KINDS[kind].scheme, KINDS[kind].activations
    four: dict[str, Any] = {
        "num_bits": 4,
        "group_size": 16,
        "strategy": "tensor_group",
        "scale_dtype": "torch.float8_e4m3fn",
    }
    mx: dict[str, Any] = {"group_size": 32, "strategy": "group", "scale_dtype": "torch.uint8"}
    if part == "weights":
        changes: Mapping[str, dict[str, Any]] = {
            "fp8_tensor": {},
            "fp8_channel": {"strategy": "channel"},
            "fp8_block": {"strategy": "block", "block_structure": [BLOCK, BLOCK]},
            "nvfp4": four,
            "mxfp8": mx,
            "mxfp4": mx | {"num_bits": 4},
        }
        return args | changes[scheme]
    if activations is None:
        return None
    changes = {
        "fp8_static": {"observer": "static_minmax"},
        "fp8_tensor": {"dynamic": True, "observer": None},
        "fp8_token": {"dynamic": True, "observer": None, "strategy": "token"},
        "fp8_group": {"dynamic": True, "observer": None, "strategy": "group", "group_size": BLOCK},
        "nvfp4": four | {"dynamic": "local", "observer": "static_minmax"},
        "mxfp8": mx | {"dynamic": True, "observer": None},
        "mxfp4": mx | {"num_bits": 4, "dynamic": True, "observer": None},
    }
    return args | changes[activations]


def _ct_format(kind: str) -> str:
    return {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}.get(
        KINDS[kind].scheme, "float-quantized" if KINDS[kind].activations else "naive-quantized"
    )


def _ct_config(recipe: Recipe, ignore: list[str], o: Options) -> dict[str, Any]:
    formats = {_ct_format(kind) for _, kind in recipe.groups}
    kv = None
    if o.kv:
        strategy = {"tensor": "tensor", "head": "attn_head"}[o.kv]
        kv = (_ct_args("fp8", "weights") or {}) | {"strategy": strategy}
    return {
        "config_groups": {
            f"group_{i}": {
                "format": _ct_format(kind), "input_activations": _ct_args(kind, "input_activations"),
                "output_activations": None, "targets": list(targets), "weights": _ct_args(kind, "weights"),
            }
            for i, (targets, kind) in enumerate(recipe.groups)
        },
        "format": "mixed-precision" if len(formats) > 1 else next(iter(formats)),
        "global_compression_ratio": None, "ignore": ignore, "kv_cache_scheme": kv,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.20.0",
    }  # fmt: skip


def _hf_fp8_config(recipe: Recipe, ignore: list[str]) -> dict[str, Any]:
    kind = KINDS[recipe.default or ""]
    return {
        "quant_method": "fp8", "modules_to_not_convert": ignore,
        "activation_scheme": "static" if kind.activations == "fp8_static" else "dynamic",
        "weight_block_size": [BLOCK, BLOCK] if kind.scheme == "fp8_block" else None,
        "scale_fmt": "ue8m0" if recipe.scale_dtype == "F8_E8M0" else "float",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ build


@dataclass(frozen=True, slots=True)
class Built:
    """A checkpoint on disk and what a converter must make of it.

    dense         every weight under Hugging Face names (unfused, the family's own prefix), exact float32 values
    division      the quantised ones among them where the dialect stores divisors, computed by dividing
    canonical     every canonical tensor: name -> dtype, shape and bytes
    modules       `quantization.modules` of the canonical config; kv_cache, unfused, carried, architecture likewise
    disk          plain name of a source tensor -> its name on disk
    """

    directory: Path
    family: str
    dense: dict[str, Floats]
    division: dict[str, Floats]
    canonical: dict[str, Raw]
    modules: dict[str, dict[str, Any]]
    kv_cache: dict[str, str]
    unfused: dict[str, list[str]]
    carried: list[str]
    architecture: dict[str, Any]
    disk: dict[str, str]


def _partitions(linear: Linear, scheme: str) -> list[tuple[str, int]]:
    """Canonical partitions of a projection; blocks that cross a boundary keep the projection in one piece."""
    ends = np.cumsum([rows for _, rows in linear.partitions])[:-1]
    if scheme == "fp8_block" and (ends % BLOCK).any():
        return [("".join(name for name, _ in linear.partitions), linear.rows)]
    return list(linear.partitions)


def _expect_module(built: Built, module: str, members: list[tuple[Linear, Quantised]]) -> None:
    """Record the canonical tensors and the config entry of one quantised module, fused from `members`."""
    kind, scheme = members[0][1].kind, members[0][1].kind.scheme
    partitions = [part for linear, _ in members for part in _partitions(linear, scheme)]
    counts = [len(_partitions(linear, scheme)) for linear, _ in members]

    def put(role: str, tensors: Iterable[Raw]) -> None:
        built.canonical[f"{module}.{role}"] = join(tensors)

    def per_partition(values: Iterable[Floats | None]) -> Iterable[Raw]:
        pairs = zip(values, counts, strict=True)
        return (raw("F32", np.broadcast_to(np.asarray(value), (count,))) for value, count in pairs)

    put("weight", (raw("U8" if scheme in ("nvfp4", "mxfp4") else "F8_E4M3", q.weight) for _, q in members))
    if scheme == "fp8_tensor":
        put("weight_scale", per_partition(q.scale for _, q in members))
    else:
        dtype = {"nvfp4": "F8_E4M3", "mxfp8": "U8", "mxfp4": "U8"}.get(scheme, "F32")
        put("weight_scale", (raw(dtype, q.scale) for _, q in members))
    if scheme == "nvfp4":
        put("weight_scale_2", per_partition(q.scale_2 for _, q in members))
    if members[0][1].input_scale is not None:
        put("input_scale", per_partition(q.input_scale for _, q in members))
    entry: dict[str, Any] = {
        "scheme": scheme,
        "shape": [sum(linear.rows for linear, _ in members), members[0][0].columns],
        "activations": kind.activations,
    }
    if len(partitions) > 1:
        entry["partitions"] = [list(part) for part in partitions]
    if members[0][1].pre_quant_scale is not None:
        built.canonical[f"{module}.pre_quant_scale"] = members[0][1].pre_quant_scale
        entry["pre_quant_scale"] = True
    built.modules[module] = entry


def _expect_group(
    built: Built, fused: str, linears: list[Linear], q: Mapping[str, Quantised], plain: Mapping[str, Raw]
) -> None:
    """Record what becomes of the projections of one canonical module: fused, or left apart."""
    found = [q.get(linear.name) for linear in linears]
    alike = len({f and f.kind for f in found}) == 1
    if len(linears) > 1 and (not alike or any(f and f.pre_quant_scale for f in found)):
        built.unfused[fused] = [linear.name.rpartition(".")[2] for linear in linears]
        groups = [(linear.name, [linear]) for linear in linears]
    else:
        groups = [(fused, linears)]
    for module, members in groups:
        if members[0].name in q:
            _expect_module(built, module, [(linear, q[linear.name]) for linear in members])
        else:
            built.canonical[f"{module}.weight"] = join(plain[f"{linear.name}.weight"] for linear in members)
        if members[0].bias:
            built.canonical[f"{module}.bias"] = join(plain[f"{linear.name}.bias"] for linear in members)


@dataclass(slots=True)
class _Source:
    """A checkpoint before it is named and written: its network, tensors by plain name, and quantised projections."""

    net: Network
    sizes: Sizes
    plain: dict[str, Raw] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    quantised: dict[str, Quantised] = field(default_factory=dict)


def _choose(family: str, o: Options, place: Prefix, seed: int) -> _Source:
    """Choose every value of a checkpoint, in the parts of the model that a prefix variant stores."""
    recipe, dtype = RECIPES[o.dialect, o.scheme], _DENSE_DTYPE.get(o.scheme, "BF16")
    sizes = o.sizes if isinstance(o.sizes, Sizes) else SIZES[o.sizes or recipe.sizes]
    net = network(family, sizes, tied=o.tied, wrapper=o.wrapper, mtp=o.mtp, bias=o.bias)
    net.linears = [linear for linear in net.linears if place.name(linear.name) is not None]
    net.others = {name: shape for name, shape in net.others.items() if place.name(name) is not None}
    source = _Source(net, sizes)

    def rng(name: str) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(name.encode())])

    for name, shape in net.others.items():
        f32 = o.f32_gates and name.endswith(("A_log", "linear_attn.norm.weight"))
        source.plain[name] = raw("F32" if f32 else dtype, rng(name).normal(0, 0.05, shape))
    for linear in net.linears:
        if (kind := recipe.kind(linear.name)) is None:
            values = rng(linear.name).normal(0, 0.05, (linear.rows, linear.columns))
            source.plain[f"{linear.name}.weight"] = raw(dtype, values)
        else:
            q = quantise(rng(linear.name), kind, linear, recipe.scale_dtype, o)
            source.kinds[linear.name], source.quantised[linear.name] = kind, q
            tensors = _TENSORS[o.dialect](q, recipe.scale_dtype)
            suffixes = {role: role for role in tensors} | dict(recipe.renamed)
            source.plain |= {f"{linear.name}.{suffixes[role]}": tensor for role, tensor in tensors.items()}
        if linear.bias:
            name = f"{linear.name}.bias"
            source.plain[name] = raw(dtype, rng(name).normal(0, 0.05, linear.rows))
    if o.kv:
        for attention in _attentions(family):
            source.plain |= _kv_scales(attention, o, sizes.kv_heads, rng(f"{attention}.kv"))
    return source


def _expect(built: Built, source: _Source, o: Options) -> None:
    """Record what a converter must make of the source: dense values, canonical tensors, entries of the config."""
    hub = PREFIXES["Q1" if o.wrapper else "Q3"]
    groups: dict[str, list[Linear]] = {}
    for name in source.net.others:
        built.canonical[name] = source.plain[name]
        built.dense[str(hub.name(name))] = source.plain[name].floats()
    for linear in source.net.linears:
        groups.setdefault(fused_name(linear.name), []).append(linear)
        name, q = str(hub.name(linear.name)), source.quantised.get(linear.name)
        built.dense[f"{name}.weight"] = q.dense if q else source.plain[f"{linear.name}.weight"].floats()
        if q and q.division is not None:
            built.division[f"{name}.weight"] = q.division
        if linear.bias:
            built.dense[f"{name}.bias"] = source.plain[f"{linear.name}.bias"].floats()
    for fused, linears in groups.items():
        _expect_group(built, fused, linears, source.quantised, source.plain)
    if o.kv:
        for attention in _attentions(built.family):
            built.kv_cache[attention] = o.kv
            for letter in "kv":
                on_disk = "{0}.{1}_proj.{1}_scale" if o.dialect == "modelopt" else "{0}.{1}_scale"
                values = source.plain[on_disk.format(attention, letter)].floats().reshape(-1)
                built.canonical[f"{attention}.{letter}_scale"] = raw("F32", values)


def _quantisation_config(source: _Source, o: Options, meta: Prefix, spell: Callable[[str], str]) -> tuple[Any, Any]:
    """`quantization_config` and the content of `hf_quant_config.json`; None for what the producer does not write."""
    excluded = _excluded(source.net, source.kinds, o.dialect, meta)
    match o.dialect:
        case "modelopt":
            named = {module: kind for module, kind in source.kinds.items() if meta.name(module) is not None}
            if o.nul_names:
                excluded = [_with_sentinel(entry) for entry in excluded]
                return _modelopt_config(named, excluded, o, lambda module: _with_sentinel(spell(module)))
            return _modelopt_config(named, excluded, o, spell)
        case "compressed-tensors":
            return _ct_config(RECIPES[o.dialect, o.scheme], excluded, o), None
        case "fp8":
            return _hf_fp8_config(RECIPES[o.dialect, o.scheme], excluded), None
    return None, None


def build(
    directory: Path, *, family: str, dialect: str, scheme: str, prefix: str | None = None, seed: int = 0, **options: Any
) -> Built:
    """Write a tiny, complete checkpoint and return what it stands for.

    `family`: "qwen3" or "qwen3_5".  `dialect`, `scheme`: a key of `RECIPES`.  `prefix`: a key of `PREFIXES`; None: what
    the family's own checkpoints use.  `options`: fields of `Options`.  Values depend on `seed` and on plain names only,
    so two prefix variants, config forms or shardings of one checkpoint hold the same numbers.
    """
    o = Options(dialect, scheme, **options)
    prefix = prefix or ("Q1" if o.wrapper else "Q3")
    place, meta = PREFIXES[prefix], PREFIXES[o.meta_prefix or prefix]
    source = _choose(family, o, place, seed)
    dtype = _TORCH_NAME[_DENSE_DTYPE.get(scheme, "BF16")]
    text = _text_config(family, source.sizes, tied=o.tied, mtp=o.mtp, bias=o.bias, dtype=dtype)
    head = "tied" if o.tied else "absent" if place.head is None else "separate"
    built = Built(
        directory, family, dense={}, division={}, canonical={}, modules={}, kv_cache={}, unfused={},
        carried=sorted({name.partition(".")[0] for name in source.plain} & {"mtp", "visual"}),
        architecture=_architecture(family, text, head), disk={},
    )  # fmt: skip
    _expect(built, source, o)

    projections = {linear.name for linear in source.net.linears}
    wrapped = {n for n in projections if o.base_layer == "all" or n.endswith(_PEFT_TARGETS)} if o.base_layer else set()

    def spell(name: str, where: Prefix, inserted: bool) -> str:
        module = next((p for p in (name, name.rpartition(".")[0]) if p in wrapped), None) if inserted else None
        path = str(where.name(name))
        if module is None:
            return path
        at = len(str(where.name(module)))
        return f"{path[:at]}.base_layer{path[at:]}"

    built.disk.update({name: spell(name, place, True) for name in source.plain})
    directory.mkdir(parents=True, exist_ok=True)
    config = _model_config(text, source.sizes, wrapper=o.wrapper, bare=place.head is None)
    if source.kinds:
        embedded, legacy = _quantisation_config(source, o, meta, lambda m: spell(m, meta, o.meta_base_layer))
        if embedded is not None:
            config["quantization_config"] = embedded
        if legacy is not None:
            write_json(directory / "hf_quant_config.json", legacy)
    write_json(directory / "config.json", config)
    for side_file, content in SIDE_FILES.items():
        (directory / side_file).write_bytes(content)
    on_disk = {built.disk[name]: tensor for name, tensor in source.plain.items()}
    write_shards(directory, on_disk, o.shards, o.scales_apart)
    return built


_PEFT_TARGETS = ("q_proj", "v_proj", "gate_proj", "in_proj_qkv")  # what `base_layer="some"` wraps


def _attentions(family: str) -> list[str]:
    return [f"model.layers.{i}.self_attn" for i, kind in enumerate(LAYER_TYPES[family]) if kind == "full_attention"]


def _kv_scales(attention: str, o: Options, heads: int, rng: np.random.Generator) -> dict[str, Raw]:
    """ModelOpt: `k_proj.k_scale`, F32 0-d.  compressed-tensors: `self_attn.k_scale`, BF16 `[1]` or `[heads, 1, 1]`."""
    if o.dialect == "modelopt":
        return {f"{attention}.{c}_proj.{c}_scale": raw("F32", random_scale(rng, (), "F32", 1e-3, 1e-1)) for c in "kv"}
    shape = {"tensor": (1,), "head": (heads, 1, 1)}[str(o.kv)]
    return {f"{attention}.{c}_scale": raw("BF16", random_scale(rng, shape, "BF16", 1e-3, 1e-1)) for c in "kv"}


def _excluded(net: Network, kinds: Mapping[str, str], dialect: str, meta: Prefix) -> list[str]:
    """The ignore list that a producer writes: shell patterns (modelopt) or every name in full."""
    names = [linear.name for linear in net.linears if linear.name not in kinds]
    towers = [n.removesuffix(".weight") for n in net.others if n.startswith("visual.") and n.endswith(".weight")]
    if dialect != "modelopt":
        return [n for name in (*towers, *names) if (n := meta.name(name)) is not None]
    convolutions = [n.removesuffix(".weight") for n in net.others if n.endswith("conv1d.weight")]
    alone = ["model.embed_tokens", *convolutions, *(n for n in names if not n.startswith("mtp."))]
    whole = (["visual"] if towers else []) + (["mtp"] if any(n.startswith("mtp.") for n in names) else [])
    found = sorted(n for name in alone if (n := meta.name(name)) is not None)
    return found + [f"{n}*" for part in whole if (n := meta.name(part)) is not None]


def write_shards(directory: Path, tensors: Mapping[str, Raw], shards: int = 1, scales_apart: bool = False) -> None:
    """Write `model.safetensors`, or several files and their index."""
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return
    files: list[dict[str, Raw]] = [{} for _ in range(shards)]
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        scale = name.endswith(("_scale", "_scale_2", "_scale_inv"))
        at = (-1 if scale else i % (shards - 1)) if scales_apart else i % shards
        files[at][name] = tensor
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for file_name, content in zip(names, files, strict=True):
        (directory / file_name).write_bytes(safetensors_bytes(content))
    weight_map = {name: file_name for file_name, content in zip(names, files, strict=True) for name in content}
    total = sum(len(tensor.data) for tensor in tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

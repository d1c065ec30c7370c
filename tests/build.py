"""Writes tiny source checkpoints the way their producers do, together with the values that they stand for.

Nothing here calls `convert` or `runtime`.  The builder chooses quantised codes and scales at random, stores them in a
producer's dialect, and computes from the same codes and scales, with numpy in float32, the dense weights and the
canonical tensors that a converter must arrive at.  The formulas are those of the producers (docs/format.md names them).

What a model consists of, and *plain* names, are the business of `networks` and `families`.  A plain name of a projection
with a suffix (`...experts.2.gate_proj.weight_scale`) names a tensor; `LAYOUTS` say how the tensors of experts lie on disk.

Letters: N out features, K in features, P partitions of a fused module, E experts.
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
from families import FAMILIES, PREFIXES
from networks import SIZES, Linear, Network, Prefix, Sizes, Variant, expert_of, fused_name
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


def stack(tensors: Iterable[Raw], transposed: bool = False) -> Raw:
    """Put tensors of one shape on a new first axis; `transposed`: with the axes of each matrix exchanged."""
    parts = list(tensors)
    assert len({(t.dtype, t.shape) for t in parts}) == 1
    dtype, shape = parts[0].dtype, parts[0].shape
    cells = np.frombuffer(b"".join(t.data for t in parts), f"V{_WIDTH[dtype]}").reshape(len(parts), *shape)
    if transposed and len(shape) == 2:
        cells = np.ascontiguousarray(cells.transpose(0, 2, 1))
    return Raw(dtype, cells.shape, cells.tobytes())


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


NUL_SENTINEL = ".\0backbone.pt_name_sentinel"  # what modelopt 0.47 leaves in names of its config


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


def quantise(
    rng: np.random.Generator,
    kind_name: str,
    linear: Linear,
    scale_dtype: str,
    options: Options,
    scalars: np.random.Generator | None = None,
) -> Quantised:
    """Choose random codes and scales for a projection.

    `scale_dtype`: how the dialect stores its float scales.  `scalars`: where scales of a whole projection come from, when
    not from `rng`.
    """
    scalars = scalars or rng
    kind, n, k = KINDS[kind_name], linear.rows, linear.columns
    scale_2 = divisor = input_scale = input_divisor = pre = division = None
    match kind.scheme:
        case "fp8_tensor":
            weight = _fp8_codes(rng, (n, k))
            vector = options.vector_scales and len(linear.partitions) > 1
            scale = random_scale(scalars, (len(linear.partitions),) if vector else (), scale_dtype, 1e-4, 1e-2)
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
                divisor = random_scale(scalars, (), "F32", 2e3, 4e4)
                scale_2 = np.float32(1) / divisor
                division = unpack_e2m1(weight) * (E4M3[scale] / divisor).repeat(16, 1)
            else:
                scale_2 = random_scale(scalars, (), "F32", 1e-5, 1e-3)
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
        input_scale = random_scale(scalars, (), scale_dtype, 1e-3, 1e-1)
    elif kind.activations == "nvfp4" and options.dialect == "compressed-tensors":
        input_divisor = random_scale(scalars, (), "F32", 10, 1e3)
        input_scale = np.float32(1) / input_divisor
    elif kind.activations == "nvfp4":
        input_scale = random_scale(scalars, (), "F32", 1e-4, 1e-2)
    keeps = (*_AWQ_KEEPS, *options.pre_quant_scale_on)
    if kind_name == "nvfp4_awq" and linear.name.rpartition(".")[2] in keeps:
        pre = raw("BF16", rng.uniform(0.5, 2.0, k))
        dense = dense * pre.floats()
    return Quantised(kind, weight, scale, scale_2, divisor, input_scale, input_divisor, pre, dense, division)


# ---------------------------------------------------------------------------------------------------------- dialects


def _modelopt_tensors(q: Quantised, stored: str) -> dict[str, Raw]:
    """ModelOpt 0.47: scalars are 0-d F32, block scales 4-D F32, E8M0 scales U8."""
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
    """compressed-tensors 0.20: scales in the model dtype, `[1]` or `[N, 1]`; global scales divide."""
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
    """transformers fine-grained FP8: `weight_scale_inv` multiplies, whatever its name says."""
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

    def kind(self, name: str, first: tuple[tuple[str, str | None], ...] = ()) -> str | None:
        """Kind of a projection by plain name, or None when it stays dense.  `first`: rules that win over all others."""
        routers = ((pattern, None) for pattern in ("*.mlp.gate", "*.mixer.gate", "*.moe.gate", "*.shared_expert_gate"))
        drafts = (("mtp.*", None), ("*.eh_proj", None), ("*.shared_head.head", None))
        usual = (("lm_head", None), ("*.in_proj_[ab]", None), *drafts, ("*", self.default))
        rules = (*first, *routers, *self.rules, *usual)
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
                                         ("model.*_attn.*", "fp8"), ("model.*.experts.*", "nvfp4"),
                                         ("model.*.mixer.*", "fp8"), ("model.*.share_expert.*", "nvfp4"))),
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

_ROUTER_BIASES = ("e_score_correction_bias", "router_bias")  # F32, whatever the model is
_DENSE_DTYPE = {"f16": "F16", "f32": "F32"}  # schemes whose unquantised tensors are not BF16
_TORCH_NAME = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Options:
    """How a checkpoint is written; every field is a keyword of `build`.

    tied               no `lm_head`; the config says that it is the embedding
    wrapper            a vision-language wrapper with its towers (default: a flat text config)
    mtp                a multi-token-prediction head under `mtp.*`
    variety            which model of the family, where it has several kinds (nemotron_h: "dense", "latent")
    bias               attention projections have biases (qwen3, llama: with those of the MLP)
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
    rules              (shell pattern over plain names, kind or None) pairs that win over the recipe's
    layout             how experts lie on disk, a key of `LAYOUTS`
    expert_scales      "each": gate and up of an expert have per-tensor scales of their own; "expert": one for both;
                       "one": all experts of a stack have the same
    expert_names       what the quantisation config calls experts: "each" projection, "fused" (one name for the stack),
                       "container" (`...experts`) or "first" (the projections of expert 0 only)
    """

    dialect: str
    scheme: str
    tied: bool = False
    wrapper: bool = False
    mtp: bool = False
    variety: str = ""
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
    rules: tuple[tuple[str, str | None], ...] = ()
    layout: str = "X1"
    expert_scales: str = "each"
    expert_names: str = "each"


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


def _module(members: list[tuple[Linear, Quantised]]) -> tuple[dict[str, Raw], dict[str, Any]]:
    """Canonical tensors, by role, and the config entry of one quantised module, fused from `members`."""
    kind, scheme = members[0][1].kind, members[0][1].kind.scheme
    partitions = [part for linear, _ in members for part in _partitions(linear, scheme)]
    counts = [len(_partitions(linear, scheme)) for linear, _ in members]

    def per_partition(values: Iterable[Floats | None]) -> Raw:
        pairs = zip(values, counts, strict=True)
        return join(raw("F32", np.broadcast_to(np.asarray(value), (count,))) for value, count in pairs)

    tensors = {"weight": join(raw("U8" if scheme in ("nvfp4", "mxfp4") else "F8_E4M3", q.weight) for _, q in members)}
    if scheme == "fp8_tensor":
        tensors["weight_scale"] = per_partition(q.scale for _, q in members)
    else:
        dtype = {"nvfp4": "F8_E4M3", "mxfp8": "U8", "mxfp4": "U8"}.get(scheme, "F32")
        tensors["weight_scale"] = join(raw(dtype, q.scale) for _, q in members)
    if scheme == "nvfp4":
        tensors["weight_scale_2"] = per_partition(q.scale_2 for _, q in members)
    if members[0][1].input_scale is not None:
        tensors["input_scale"] = per_partition(q.input_scale for _, q in members)
    entry: dict[str, Any] = {
        "scheme": scheme,
        "shape": [sum(linear.rows for linear, _ in members), members[0][0].columns],
        "activations": kind.activations,
    }
    if len(partitions) > 1:
        entry["partitions"] = [list(part) for part in partitions]
    if members[0][1].pre_quant_scale is not None:
        tensors["pre_quant_scale"] = members[0][1].pre_quant_scale
        entry["pre_quant_scale"] = True
    return tensors, entry


def _alike(linears: Iterable[Linear], q: Mapping[str, Quantised]) -> bool:
    return len({f and f.kind for f in (q.get(linear.name) for linear in linears)}) == 1


def _fusable(linears: list[Linear], q: Mapping[str, Quantised]) -> bool:
    """Whether projections can be one module: one number format, and no factors of the input of their own."""
    own = len(linears) > 1 and any((f := q.get(linear.name)) and f.pre_quant_scale for linear in linears)
    return _alike(linears, q) and not own


def _expect_module(built: Built, module: str, source: _Source, rows: list[list[Linear]], stacked: bool) -> None:
    """Record one canonical module.  `rows`: what it is fused from, for each expert of a stack."""
    tensors: dict[str, list[Raw]] = {}
    for members in rows:
        found: dict[str, Raw] = {}
        if members[0].name in source.quantised:
            found, entry = _module([(linear, source.quantised[linear.name]) for linear in members])
            built.modules[module] = entry | ({"experts": len(rows)} if stacked else {})
        else:
            found["weight"] = join(source.plain[f"{linear.name}.weight"] for linear in members)
        if members[0].bias:
            found["bias"] = join(source.plain[f"{linear.name}.bias"] for linear in members)
        for role, tensor in found.items():
            tensors.setdefault(role, []).append(tensor)
    for role, parts in tensors.items():
        built.canonical[f"{module}.{role}"] = stack(parts) if stacked else parts[0]


def _expect_group(built: Built, source: _Source, fused: str, linears: list[Linear]) -> None:
    """Record what becomes of the projections of one canonical module: fused, or left apart."""
    if _fusable(linears, source.quantised):
        _expect_module(built, fused, source, [linears], stacked=False)
        return
    built.unfused[fused] = [linear.name.rpartition(".")[2] for linear in linears]
    for linear in linears:
        _expect_module(built, linear.name, source, [[linear]], stacked=False)


def _expect_stack(built: Built, source: _Source, fused: str, rows: list[list[Linear]]) -> None:
    """Record what becomes of a stack of experts: one module, one for each projection, or experts left apart."""
    q = source.quantised
    container, _, last = fused.rpartition(".")
    own_input = len(rows[0]) > 1 and not all(_fusable(row, q) for row in rows)
    if _alike((linear for row in rows for linear in row), q) and not own_input:
        _expect_module(built, fused, source, rows, stacked=True)
        return
    columns = [list(column) for column in zip(*rows, strict=True)]
    if len(columns) > 1 and all(_alike(column, q) for column in columns):
        built.unfused[fused] = [column[0].name.rpartition(".")[2] for column in columns]
        for name, column in zip(built.unfused[fused], columns, strict=True):
            _expect_module(built, f"{container}.{name}", source, [[linear] for linear in column], stacked=True)
        return
    built.unfused[fused] = []
    for e, row in enumerate(rows):
        groups = {last: row} if _fusable(row, q) else {linear.name.rpartition(".")[2]: [linear] for linear in row}
        for name, members in groups.items():
            built.unfused[fused].append(f"{e}.{name}")
            _expect_module(built, f"{container}.{e}.{name}", source, [members], stacked=False)


@dataclass(slots=True)
class _Source:
    """A checkpoint before it is named and written: its network, tensors by plain name, and quantised projections."""

    net: Network
    sizes: Sizes
    plain: dict[str, Raw] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    quantised: dict[str, Quantised] = field(default_factory=dict)


def _variant(o: Options) -> Variant:
    """The model that the options ask for."""
    recipe = RECIPES[o.dialect, o.scheme]
    sizes = o.sizes if isinstance(o.sizes, Sizes) else SIZES[o.sizes or recipe.sizes]
    blocks = KINDS[recipe.default or "fp8"].scheme == "fp8_block"
    # Blocks of a fused stack that run across the end of gate cannot come from gate and up, each quantised on its own.
    whole = LAYOUTS[o.layout].fused and blocks and sizes.moe_inter % BLOCK > 0
    dtype = _TORCH_NAME[_DENSE_DTYPE.get(o.scheme, "BF16")]
    return Variant(sizes, o.variety, o.tied, o.wrapper, o.mtp, o.bias, whole, dtype)


def _owner_of_scalars(name: str, expert_scales: str) -> str:
    """What the per-tensor scales of a projection of an expert belong to, when not to the projection alone."""
    expert = expert_of(name)
    if expert is None or expert_scales == "each":
        return ""
    container, index, last = expert
    first = {"up_proj": "gate_proj"}.get(last, last)
    return f"{container}.{first}" if expert_scales == "one" else f"{container}.{index}.{first}"


def _choose(family: str, o: Options, place: Prefix, seed: int) -> _Source:
    """Choose every value of a checkpoint, in the parts of the model that a prefix variant stores."""
    recipe, dtype = RECIPES[o.dialect, o.scheme], _DENSE_DTYPE.get(o.scheme, "BF16")
    variant = _variant(o)
    sizes, net = variant.sizes, FAMILIES[family].network(variant)
    net.linears = [linear for linear in net.linears if place.name(linear.name) is not None]
    net.others = {name: shape for name, shape in net.others.items() if place.name(name) is not None}
    source = _Source(net, sizes)

    def rng(name: str) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(name.encode())])

    for name, shape in net.others.items():
        f32 = name.endswith(_ROUTER_BIASES) or (o.f32_gates and name.endswith(("A_log", "linear_attn.norm.weight")))
        source.plain[name] = raw("F32" if f32 else dtype, rng(name).normal(0, 0.05, shape))
    for linear in net.linears:
        if (kind := recipe.kind(linear.name, o.rules)) is None:
            values = rng(linear.name).normal(0, 0.05, (linear.rows, linear.columns))
            source.plain[f"{linear.name}.weight"] = raw(dtype, values)
        else:
            owner = _owner_of_scalars(linear.name, o.expert_scales)
            scalars = rng(f"{owner} scalars") if owner else None
            q = quantise(rng(linear.name), kind, linear, recipe.scale_dtype, o, scalars)
            source.kinds[linear.name], source.quantised[linear.name] = kind, q
            tensors = _TENSORS[o.dialect](q, recipe.scale_dtype)
            suffixes = {role: role for role in tensors} | dict(recipe.renamed)
            source.plain |= {f"{linear.name}.{suffixes[role]}": tensor for role, tensor in tensors.items()}
        if linear.bias:
            name = f"{linear.name}.bias"
            source.plain[name] = raw(dtype, rng(name).normal(0, 0.05, linear.rows))
    if o.kv:
        for attention in net.attentions():
            source.plain |= _kv_scales(attention, o, sizes.kv_heads, rng(f"{attention}.kv"))
    return source


def _expect(built: Built, source: _Source, o: Options) -> None:
    """Record what a converter must make of the source: dense values, canonical tensors, entries of the config."""
    groups: dict[str, list[Linear]] = {}
    stacks: dict[str, dict[int, list[Linear]]] = {}
    for name in source.net.others:
        built.canonical[name] = source.plain[name]
    for linear in source.net.linears:
        fused = fused_name(linear.name, source.net.gated(linear.name))
        if (expert := expert_of(fused)) is not None:
            container, index, last = expert
            stacks.setdefault(f"{container}.{last}", {}).setdefault(index, []).append(linear)
        else:
            groups.setdefault(fused, []).append(linear)
    for fused, linears in groups.items():
        _expect_group(built, source, fused, linears)
    for fused, rows in stacks.items():
        _expect_stack(built, source, fused, list(rows.values()))
    family = FAMILIES[built.family]
    hub = PREFIXES[family.hub[0 if o.wrapper else 1]]
    dense = {name: source.plain[name].floats() for name in source.net.others}
    divided = {}
    for linear in source.net.linears:
        if linear.bias:
            dense[f"{linear.name}.bias"] = source.plain[f"{linear.name}.bias"].floats()
        q = source.quantised.get(linear.name)
        dense[f"{linear.name}.weight"] = q.dense if q else source.plain[f"{linear.name}.weight"].floats()
        if q and q.division is not None:
            divided[f"{linear.name}.weight"] = q.division
    whole = {fused: list(rows.values()) for fused, rows in stacks.items() if fused not in built.unfused}
    stacked = _stacks_on_the_hub(whole, family.experts)
    for found, values in ((built.dense, dense), (built.division, divided)):
        found |= {str(hub.name(name)): value for name, value in _as_on_the_hub(values, source.net, stacked).items()}
    if o.kv:
        for attention in source.net.attentions():
            built.kv_cache[attention] = o.kv
            for letter in "kv":
                on_disk = "{0}.{1}_proj.{1}_scale" if o.dialect == "modelopt" else "{0}.{1}_scale"
                scale = source.plain[on_disk.format(attention, letter)].floats().reshape(-1)
                built.canonical[f"{attention}.{letter}_scale"] = raw("F32", scale)


def _stacks_on_the_hub(stacks: Mapping[str, list[list[Linear]]], layout: str) -> dict[str, list[list[str]]]:
    """Names of stacked tensors of the family's own checkpoints -> the projections of each expert in them."""
    if layout == "X1":
        return {}
    rows = {fused: [[part for linear in row for part in _parts_of(linear)] for row in rows] for fused, rows in stacks.items()}
    if layout == "X2":
        return rows
    found = {}
    for members in rows.values():
        for column in zip(*members, strict=True):
            container, _, projection = expert_of(column[0]) or ("", 0, "")
            found[_as_modules(container, projection, "weight", "")] = [[name] for name in column]
    return found


def _as_on_the_hub(values: Mapping[str, Floats], net: Network, stacked: Mapping[str, list[list[str]]]) -> dict[str, Floats]:
    """Dense values by plain name -> as the family's own checkpoints store them: experts stacked, or gate and up apart."""
    found = dict(values)
    for linear in net.linears:
        name = f"{linear.name}.weight"
        if linear.name.endswith(".gate_up_proj") and name in found:
            below, both = linear.name.rpartition(".")[0], found.pop(name)
            found[f"{below}.gate_proj.weight"], found[f"{below}.up_proj.weight"] = np.split(both, 2)
    for name, rows in stacked.items():
        if f"{rows[0][0]}.weight" in found:
            found[name] = np.stack([np.concatenate([found.pop(f"{part}.weight") for part in row]) for row in rows])
    return found


def _parts_of(linear: Linear) -> list[str]:
    """Names of the projections of one partition that a projection stands for."""
    below, _, last = linear.name.rpartition(".")
    return [f"{below}.gate_proj", f"{below}.up_proj"] if last == "gate_up_proj" else [linear.name]


# ----------------------------------------------------------------------------------------------------- expert layouts


@dataclass(frozen=True, slots=True)
class Layout:
    """How the experts of a layer lie on disk.

    stacked     one tensor for all experts; fused: with gate and up in one; transposed: input-major
    name        (container, stacked module, suffix, `.base_layer` segments) -> name on disk
    """

    stacked: bool = True
    fused: bool = False
    transposed: bool = False
    name: Callable[[str, str, str, str], str] = lambda container, module, suffix, inner: ""


_ENGINE = {"gate_up_proj": "w13", "up_proj": "w13", "down_proj": "w2"}


def _as_parameters(container: str, module: str, suffix: str, inner: str) -> str:
    return f"{container}{inner}.{module}" + ("" if suffix == "weight" else f"_{suffix}")


def _as_modules(container: str, module: str, suffix: str, inner: str) -> str:
    return f"{container.removesuffix('moe.experts')}moe.{module}{inner}.{suffix}" if container.endswith(".moe.experts") else (
        f"{container}.{module}{inner}.{suffix}"
    )


LAYOUTS: Mapping[str, Layout] = {
    "X1": Layout(stacked=False),
    "X2": Layout(fused=True, name=_as_parameters),
    "X3": Layout(fused=True, transposed=True, name=_as_parameters),
    "X4": Layout(name=_as_modules),
    "X8": Layout(fused=True, name=lambda at, module, suffix, inner: f"{at}{inner}.{_ENGINE[module]}_{suffix}"),
    "X8-routed": Layout(
        fused=True, name=lambda at, module, suffix, inner: f"{at}.routed_experts{inner}.{_ENGINE[module]}_{suffix}"
    ),
}


def _stacked_scalars(rows: list[list[Raw]], expert_scales: str) -> Raw:
    """Per-tensor scales of a stack, as few as say it all: 0-d, `[E]`, or `[E, P]`."""
    dtype, distinct = rows[0][0].dtype, {tensor.data for row in rows for tensor in row}
    if expert_scales == "one":
        assert len(distinct) == 1
        return Raw(dtype, (), distinct.pop())
    if len(rows[0]) == 1 or expert_scales == "expert":
        assert all(len({tensor.data for tensor in row}) == 1 for row in rows)
        return Raw(dtype, (len(rows),), b"".join(row[0].data for row in rows))
    return Raw(dtype, (len(rows), len(rows[0])), b"".join(tensor.data for row in rows for tensor in row))


def _lay_out(source: _Source, o: Options) -> dict[str, tuple[str, Raw]]:
    """Plain name of every tensor of the checkpoint -> its name without prefix, and the tensor, experts laid out."""
    layout = LAYOUTS[o.layout]
    stored = {name: (name, tensor) for name, tensor in source.plain.items()}
    if not layout.stacked:
        return stored
    stacks: dict[tuple[str, str], dict[int, list[Linear]]] = {}
    for linear in source.net.linears:
        if (expert := expert_of(linear.name)) is not None:
            container, index, last = expert
            if layout.fused:
                last = fused_name(linear.name, source.net.gated(linear.name)).rpartition(".")[2]
            stacks.setdefault((container, last), {}).setdefault(index, []).append(linear)
    dotted = layout.name is _as_modules
    inner = {None: "", "some": ".base_layer", "all": ".base_layer" if dotted else ".base_layer.base_layer"}[o.base_layer]
    for (container, last), rows in stacks.items():
        first = f"{rows[0][0].name}."
        for suffix in [name.removeprefix(first) for name in source.plain if name.startswith(first)]:
            tensors = [[stored.pop(f"{linear.name}.{suffix}")[1] for linear in row] for row in rows.values()]
            if tensors[0][0].shape in ((), (1,)):
                tensor = _stacked_scalars(tensors, o.expert_scales)
            else:
                tensor = stack((join(row) for row in tensors), layout.transposed)
            plain = layout.name(container, last, suffix, "")
            stored[plain] = (layout.name(container, last, suffix, inner), tensor)
    return stored


def _names_of_experts(names: Iterable[str], o: Options, gated: Callable[[str], bool]) -> dict[str, str]:
    """Plain names of projections -> what a quantisation config calls them; names that it leaves out are missing."""
    called = {}
    for name in names:
        expert = expert_of(name)
        if expert is None or o.expert_names == "each":
            called[name] = name
        elif o.expert_names == "container":
            called[name] = expert[0]
        elif o.expert_names == "fused":
            called[name] = f"{expert[0]}.{fused_name(name, gated(name)).rpartition('.')[2]}"
        elif expert[1] == 0:
            called[name] = name
    return called


def _quantisation_config(source: _Source, o: Options, meta: Prefix, spell: Callable[[str], str]) -> tuple[Any, Any]:
    """`quantization_config` and the content of `hf_quant_config.json`; None for what the producer does not write."""
    called = _names_of_experts((linear.name for linear in source.net.linears), o, source.net.gated)
    kinds = {called[module]: kind for module, kind in source.kinds.items() if module in called}
    excluded = _excluded(source.net, source.kinds, o.dialect, meta, called)
    match o.dialect:
        case "modelopt":
            named = {module: kind for module, kind in kinds.items() if meta.name(module) is not None}
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

    `family`: a key of `families.FAMILIES`.  `dialect`, `scheme`: a key of `RECIPES`.  `prefix`: a key of `PREFIXES`; None: what
    the family's own checkpoints use.  `options`: fields of `Options`.  Values depend on `seed` and on plain names only,
    so two prefix variants, config forms or shardings of one checkpoint hold the same numbers.
    """
    o = Options(dialect, scheme, **options)
    facts, variant = FAMILIES[family], _variant(o)
    prefix = prefix or facts.hub[0 if o.wrapper else 1]
    place, meta = PREFIXES[prefix], PREFIXES[o.meta_prefix or prefix]
    source = _choose(family, o, place, seed)
    head = "tied" if o.tied else "absent" if place.head is None else "separate"
    built = Built(
        directory, family, dense={}, division={}, canonical={}, modules={}, kv_cache={}, unfused={},
        carried=sorted({*source.net.drafts, *(name.partition(".")[0] for name in source.plain)} - {"model", "lm_head"}),
        architecture=facts.facts(variant) | {"head": head}, disk={},
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

    on_disk: dict[str, Raw] = {}
    for plain, (name, tensor) in _lay_out(source, o).items():
        built.disk[plain] = str(place.name(name)) if name != plain else spell(plain, place, True)
        on_disk[built.disk[plain]] = tensor
    directory.mkdir(parents=True, exist_ok=True)
    config = facts.config(variant, place.head is None)
    if source.kinds:
        embedded, legacy = _quantisation_config(source, o, meta, lambda m: spell(m, meta, o.meta_base_layer))
        if embedded is not None:
            config["quantization_config"] = embedded
        if legacy is not None:
            write_json(directory / "hf_quant_config.json", legacy)
    write_json(directory / "config.json", config)
    for side_file, content in SIDE_FILES.items():
        (directory / side_file).write_bytes(content)
    write_shards(directory, on_disk, o.shards, o.scales_apart)
    return built


_PEFT_TARGETS = ("q_proj", "v_proj", "gate_proj", "in_proj_qkv")  # what `base_layer="some"` wraps


def _kv_scales(attention: str, o: Options, heads: int, rng: np.random.Generator) -> dict[str, Raw]:
    """ModelOpt: `k_proj.k_scale`, F32 0-d.  compressed-tensors: `self_attn.k_scale`, BF16 `[1]` or `[heads, 1, 1]`."""
    if o.dialect == "modelopt":
        return {f"{attention}.{c}_proj.{c}_scale": raw("F32", random_scale(rng, (), "F32", 1e-3, 1e-1)) for c in "kv"}
    shape = {"tensor": (1,), "head": (heads, 1, 1)}[str(o.kv)]
    return {f"{attention}.{c}_scale": raw("BF16", random_scale(rng, shape, "BF16", 1e-3, 1e-1)) for c in "kv"}


def _excluded(net: Network, kinds: Mapping[str, str], dialect: str, meta: Prefix, called: Mapping[str, str]) -> list[str]:
    """The ignore list that a producer writes: shell patterns (modelopt) or every name in full."""
    dense = [linear.name for linear in net.linears if linear.name not in kinds]
    names = list(dict.fromkeys(called[name] for name in dense if name in called))
    roots = dict.fromkeys(root for n in net.others if (root := n.partition(".")[0]) not in ("model", "mtp"))
    inside = [n for n in net.others if n.partition(".")[0] in roots]
    towers = [n.removesuffix(".weight") for n in inside if n.endswith(".weight")]
    if dialect != "modelopt":
        return [n for name in (*towers, *names) if (n := meta.name(name)) is not None]
    convolutions = [n.removesuffix(".weight") for n in net.others if n.endswith("conv1d.weight")]
    alone = ["model.embed_tokens", *convolutions, *(n for n in names if not n.startswith("mtp."))]
    whole = [*roots] + (["mtp"] if any(n.startswith("mtp.") for n in names) else [])
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

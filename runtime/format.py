"""The canonical checkpoint, version 1: the one contract that `convert` writes and `runtime` reads.

Standard library only.  `docs/format.md` is the same contract in prose.

Letters in shapes: N out features, K in features, P partitions of a fused module, E experts of a stack.  Every scale multiplies:
`value = code * scale`.  No scale is 0-d.  The exact dequantised value of a module is, in float32 and in this order:

    fp8_tensor   f32(weight) * weight_scale[p]
    fp8_channel  f32(weight) * weight_scale[n]
    fp8_block    f32(weight) * weight_scale[block row, block column]
    nvfp4        e2m1(weight) * (f32(weight_scale) * weight_scale_2[p])
    mxfp8        f32(weight) * 2**(weight_scale - 127)
    mxfp4        e2m1(weight) * 2**(weight_scale - 127)

where `p` is the partition that row `n` belongs to.  A module with `pre_quant_scale` multiplies its *input* by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

FORMAT = "qconvert"
FORMAT_VERSION = 1

CONFIG_FILE = "config.json"
REPORT_FILE = "conversion.json"
INDEX_FILE = "model.safetensors.index.json"

# Safetensors dtype name -> bytes per element.  Plans and headers use these names, so neither needs torch.
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
DENSE_DTYPES = ("BF16", "F16", "F32")  # what an unquantised tensor may be

FP8_MAX = 448.0  # largest finite float8_e4m3fn
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0..7; codes 8..15 are their negatives
FP8_BLOCK = 128  # rows and columns of an fp8_block block
NVFP4_GROUP = 16  # elements along K that share an NVFP4 block scale
MX_GROUP = 32  # elements along K that share an MX block scale


# Limits on what is read; convert/limits.py has those of the converter alone.
MAX_HEADER_BYTES = 100_000_000  # of one safetensors file; the limit of the safetensors library
MAX_JSON_BYTES = 100_000_000  # of a config or index
MAX_NUMBER = (1 << 63) - 1  # elements of a tensor
MAX_SIZE = (1 << 31) - 1  # one size or count of a network; the largest published vocabulary is 262144
MAX_EXPERTS = 10_000  # of one layer; the largest published model has 512
MAX_LAYERS = 10_000  # of one part; the largest published model has 128


def escaped(text: object) -> str:
    """`text` on one line: control characters of untrusted names are written as escapes, and reach no terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class FormatError(ValueError):
    """A canonical checkpoint that breaks the contract.  The message is one line that says what to do.

    `parts`: place in `config.json`, expected, found and remedy, where the error is about such a place; else None.
    """

    def __init__(self, message: str, parts: tuple[str, str, str, str] | None = None) -> None:
        super().__init__(escaped(message))
        self.parts = parts


def _broken(place: str, expected: str, found: object, remedy: str = "the checkpoint is damaged: convert again") -> FormatError:
    shown = found if isinstance(found, str) else f"{found!r:.80}"
    where = f"{CONFIG_FILE}: {place}: " if place else f"{CONFIG_FILE}: "
    return FormatError(f"{where}expected {expected}, found {shown}; {remedy}", (place, expected, shown, remedy))


def _entries(data: Any, place: str) -> dict[str, Any]:
    """`data` if it is an object."""
    if not isinstance(data, dict):
        raise _broken(place, "an object", f"{data!r:.80}")
    return data


def _architecture(data: Any) -> dict[str, Any]:
    """`data` if it is an object whose lists, and numbers of layers and experts, are within the limits."""
    for name, value in _entries(data, "architecture").items():
        limit = MAX_EXPERTS if "experts" in name else MAX_LAYERS
        if isinstance(value, (list, str)) and len(value) > limit:
            raise _broken(f"architecture.{name}", f"at most {limit} entries", f"{len(value)}")
        if ("experts" in name or name.endswith("_layers")) and isinstance(value, int) and value > limit:
            raise _broken(f"architecture.{name}", f"at most {limit}", f"{value}")
    return dict(data)


def _names(data: Any, place: str) -> tuple[str, ...]:
    """`data` as a tuple of names."""
    if not isinstance(data, list) or not all(isinstance(name, str) for name in data):
        raise _broken(place, "a list of names", f"{data!r:.80}")
    return tuple(data)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_NUMBER


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one stored tensor must be: safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        count = DTYPE_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One quantised module of the canonical config.

    `shape`: logical (N, K).  `partitions`: ordered (name, rows) pairs of a fused module; a module that is not fused
    has the single partition ("", N).  `activations`: a key of `ACTIVATIONS`, or None for full-precision input.
    `pre_quant_scale`: the module stores an input multiplier `[K]`.  `experts`: E when the module is a stack of experts, whose
    tensors all have E as their first axis; shape and partitions are those of one expert.
    """

    scheme: str
    shape: tuple[int, int]
    partitions: tuple[tuple[str, int], ...]
    activations: str | None = None
    pre_quant_scale: bool = False
    experts: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry of `config.json`; single partitions and absent options are left out."""
        entry: dict[str, Any] = {"scheme": self.scheme, "shape": list(self.shape), "activations": self.activations}
        if len(self.partitions) > 1:
            entry["partitions"] = [list(p) for p in self.partitions]
        if self.pre_quant_scale:
            entry["pre_quant_scale"] = True
        if self.experts is not None:
            entry["experts"] = self.experts
        return entry

    def tall(self) -> ModuleSpec:
        """A stack of experts read as one tall module `[E * N, K]` whose partitions repeat: the same bytes in the same order."""
        count = self.experts or 1
        return replace(self, shape=(count * self.shape[0], self.shape[1]), partitions=self.partitions * count, experts=None)

    @classmethod
    def from_json(cls, name: str, entry: Any) -> ModuleSpec:
        """Read one entry.  Raises `FormatError` when it names an unknown scheme or its partitions do not add up."""
        place = f"quantization.modules.{name}"
        newer = "convert again, or use a newer runtime"
        entry = _entries(entry, place)
        shape, scheme, activations = entry.get("shape"), entry.get("scheme"), entry.get("activations")
        partitions, experts = entry.get("partitions"), entry.get("experts")
        if not isinstance(scheme, str) or scheme not in SCHEMES:
            raise _broken(place, f"a scheme of {', '.join(SCHEMES)}", f"{scheme!r:.80}", newer)
        known = activations is None or (isinstance(activations, str) and activations in ACTIVATIONS)
        if "activations" not in entry or not known:
            raise _broken(place, f"activations of {', '.join(ACTIVATIONS)}", f"{activations!r:.80}", newer)
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_count, shape)) or shape[0] * shape[1] > MAX_NUMBER:
            raise _broken(place, "a shape of two positive numbers", f"{shape!r:.80}")
        if "experts" in entry and not (_is_count(experts) and experts * shape[0] * shape[1] <= MAX_NUMBER):
            raise _broken(place, "a number of experts", f"{experts!r:.80}")
        if type(entry.get("pre_quant_scale", False)) is not bool:
            raise _broken(place, "pre_quant_scale true or false", f"{entry['pre_quant_scale']!r:.80}")
        pairs: list[Any] = [["", shape[0]]]
        if "partitions" in entry:
            pairs = partitions if isinstance(partitions, list) else []
        good = all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and _is_count(p[1]) for p in pairs)
        if not pairs or not good:
            raise _broken(place, "partitions of names and rows", f"{partitions!r:.80}")
        if sum(rows for _, rows in pairs) != shape[0]:
            rows = sum(rows for _, rows in pairs)
            raise _broken(place, f"partitions of {shape[0]} rows in total", f"{rows}", "convert again")
        named = tuple((p, n) for p, n in pairs)
        spec = cls(scheme, (shape[0], shape[1]), named, activations, entry.get("pre_quant_scale", False), experts)
        return spec


# How a module's input is quantised when activations are quantised.  Value: whether `input_scale` [P] is stored.
ACTIVATIONS: Mapping[str, bool] = {
    "fp8_static": True,  # e4m3(x / input_scale), one stored scale per partition
    "fp8_tensor": False,  # e4m3, scale = amax / 448 over the whole input
    "fp8_token": False,  # e4m3, scale = amax / 448 per token
    "fp8_group": False,  # e4m3, scale = amax / 448 per token and 128 inputs
    "fp8_group_e8m0": False,  # the same with the scale rounded up to a power of two
    "nvfp4": True,  # e2m1 with e4m3 scales per 16 inputs below the stored global scale
    "mxfp8": False,  # e4m3 with a power-of-two scale per 32 inputs
    "mxfp4": False,  # e2m1 with a power-of-two scale per 32 inputs
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """A number format of weights: what it stores beside its input scale, and its bits per weight."""

    name: str
    bits_per_weight: float
    weight_tensors: Callable[[ModuleSpec], dict[str, TensorSpec]]


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


def block_rows(spec: ModuleSpec) -> int:
    """Rows of an fp8_block scale: blocks restart at each partition."""
    return sum(ceil_div(rows, FP8_BLOCK) for _, rows in spec.partitions)


def _fp8(spec: ModuleSpec, scale_shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    return {"weight": TensorSpec("F8_E4M3", spec.shape), "weight_scale": TensorSpec("F32", scale_shape)}


def _grouped(spec: ModuleSpec, dtype: str, per_byte: int, group: int, scale_dtype: str) -> dict[str, TensorSpec]:
    n, k = spec.shape
    return {
        "weight": TensorSpec(dtype, (n, k // per_byte)),
        "weight_scale": TensorSpec(scale_dtype, (n, k // group)),
    }


SCHEMES: Mapping[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("fp8_tensor", 8, lambda m: _fp8(m, (len(m.partitions),))),
        Scheme("fp8_channel", 8, lambda m: _fp8(m, (m.shape[0],))),
        Scheme("fp8_block", 8, lambda m: _fp8(m, (block_rows(m), ceil_div(m.shape[1], FP8_BLOCK)))),
        Scheme("nvfp4", 4.5, lambda m: {
            **_grouped(m, "U8", 2, NVFP4_GROUP, "F8_E4M3"),
            "weight_scale_2": TensorSpec("F32", (len(m.partitions),)),
        }),
        Scheme("mxfp8", 8.25, lambda m: _grouped(m, "F8_E4M3", 1, MX_GROUP, "U8")),
        Scheme("mxfp4", 4.25, lambda m: _grouped(m, "U8", 2, MX_GROUP, "U8")),
    )
}  # fmt: skip


def module_tensors(spec: ModuleSpec) -> dict[str, TensorSpec]:
    """Every tensor that a quantised module stores, by role, with dtype and shape.

    `pre_quant_scale` keeps the dtype of its source, one of `DENSE_DTYPES`; BF16 stands for it here.
    """
    tensors = SCHEMES[spec.scheme].weight_tensors(spec)
    if spec.activations and ACTIVATIONS[spec.activations]:
        tensors["input_scale"] = TensorSpec("F32", (len(spec.partitions),))
    if spec.pre_quant_scale:
        tensors["pre_quant_scale"] = TensorSpec("BF16", (spec.shape[1],))
    if spec.experts is None:
        return tensors
    return {role: TensorSpec(t.dtype, (spec.experts, *t.shape)) for role, t in tensors.items()}


@dataclass(frozen=True, slots=True)
class CanonicalConfig:
    """`config.json` of a canonical checkpoint.

    family         name of the model family, such as "qwen3_5"
    architecture   flat facts of the network, one spelling per field (docs/format.md lists them per family)
    modules        canonical module name -> its quantisation; a module that is not listed is not quantised
    kv_cache       attention module name -> "tensor" or "head": it stores `k_scale` and `v_scale`, F32 `[1]` or `[Nkv]`
    unfused        fused module name -> names of the modules that stand in its place, because their schemes differ
    carried        dotted prefixes of tensor names that are stored but that no text runtime needs (towers, MTP heads)
    hf_config      the source's `config.json` without its quantisation, for `export` and for people
    """

    family: str
    architecture: Mapping[str, Any]
    modules: Mapping[str, ModuleSpec]
    kv_cache: Mapping[str, str]
    unfused: Mapping[str, tuple[str, ...]]
    carried: tuple[str, ...]
    hf_config: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`, keys in a fixed order."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "family": self.family,
            "architecture": dict(self.architecture),
            "quantization": {
                "modules": {name: spec.to_json() for name, spec in self.modules.items()},
                "kv_cache": dict(self.kv_cache),
            },
            "unfused": {name: list(parts) for name, parts in self.unfused.items()},
            "carried": list(self.carried),
            "hf_config": dict(self.hf_config),
        }

    @classmethod
    def from_json(cls, data: Any) -> CanonicalConfig:
        """Read `config.json`.  Raises `FormatError` for another format, a newer version or a malformed part."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = repr(data.get("format")) if isinstance(data, dict) else type(data).__name__
            remedy = "this is not a canonical checkpoint: run `qconvert IN OUT` first"
            raise _broken("", f"format {FORMAT!r}", f"{found:.80}", remedy)
        if type(data.get("format_version")) is not int or data["format_version"] != FORMAT_VERSION:
            remedy = "use the version of qconvert that wrote it, or convert again"
            raise _broken("", f"format_version {FORMAT_VERSION}", f"{data.get('format_version')!r:.80}", remedy)
        if not isinstance(data.get("family"), str):
            raise _broken("family", "the name of a family", f"{data.get('family')!r:.80}")
        quantization = _entries(data.get("quantization"), "quantization")
        kv_cache = _entries(quantization.get("kv_cache"), "quantization.kv_cache")
        for name, kind in kv_cache.items():
            if kind not in ("tensor", "head"):
                raise _broken(f"quantization.kv_cache.{name}", "tensor or head", f"{kind!r:.80}")
        return cls(
            family=data["family"],
            architecture=_architecture(data.get("architecture")),
            modules={
                n: ModuleSpec.from_json(n, e) for n, e in _entries(quantization.get("modules"), "quantization.modules").items()
            },
            kv_cache=kv_cache,
            unfused={n: _names(parts, f"unfused.{n}") for n, parts in _entries(data.get("unfused"), "unfused").items()},
            carried=_names(data.get("carried"), "carried"),
            hf_config=_entries(data.get("hf_config"), "hf_config"),
        )

    def is_carried(self, tensor: str) -> bool:
        """Whether a tensor is stored only to be carried: a dotted prefix of its name is listed in `carried`."""
        return any(tensor == prefix or tensor.startswith(f"{prefix}.") for prefix in self.carried)

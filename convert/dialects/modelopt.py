"""NVIDIA ModelOpt: tables of what it stores, and its two config forms.  Source: nvidia-modelopt 0.47.0, run.

Every scale multiplies.  Scalars are 0-d on disk.  Older exports nest the config under `quantization` with
`exclude_modules` and `kv_cache_quant_algo`; newer ones embed it flat with `ignore` and `kv_cache_scheme`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConvertError, Problem
from ..names import CanonicalNames, NameSpace
from .base import (
    FLOATS,
    SCALAR,
    Claim,
    Dialect,
    Encoding,
    KvClaim,
    ModuleNames,
    Rules,
    Stored,
    config_name,
    expect_mapping,
    expect_names,
    has_wildcard,
)

_FP8 = Stored("weight", "weight", ("F8_E4M3",), (("N", "K"),), "copy")
_FP4 = Stored("weight", "weight", ("U8",), (("N", "K/2"),), "copy")
_INPUT = Stored("input_scale", "input_scale", ("F32",), SCALAR, "f32", optional=True)
_PRE = Stored("pre_quant_scale", "pre_quant_scale", FLOATS, (("K",),), "copy", optional=True)
_SOURCE = "nvidia-modelopt 0.47.0"

ENCODINGS = (
    Encoding(
        "fp8_tensor", (_FP8, Stored("weight_scale", "weight_scale", ("F32",), SCALAR, "f32"), _INPUT), _SOURCE
    ),
    Encoding("fp8_channel", (_FP8, Stored("weight_scale", "weight_scale", ("F32",), (("N",),), "f32")), _SOURCE),
    Encoding(  # 4-D on disk: [block rows, 1, block columns, 1]; 0-d when there is a single block
        "fp8_block",
        (_FP8, Stored("weight_scale", "weight_scale", ("F32",), (("NB", "1", "KB", "1"), ("B0",)), "f32")),
        _SOURCE,
    ),
    Encoding(
        "nvfp4",
        (
            _FP4,
            Stored("weight_scale", "weight_scale", ("F8_E4M3",), (("N", "K/16"),), "copy"),
            Stored("weight_scale_2", "weight_scale_2", ("F32",), SCALAR, "f32"),
            _INPUT,
            _PRE,  # NVFP4_AWQ, for layers whose input scale could not be folded into the norm before them
        ),
        _SOURCE,
    ),
    Encoding(
        "mxfp8", (_FP8, Stored("weight_scale", "weight_scale", ("U8", "F8_E8M0"), (("N", "K/32"),), "copy")), _SOURCE
    ),
    Encoding(
        "mxfp4", (_FP4, Stored("weight_scale", "weight_scale", ("U8", "F8_E8M0"), (("N", "K/32"),), "copy")), _SOURCE
    ),
)

# quant_algo (compared in upper case) -> (scheme, activations, whether weight-only modules use the same word).
ALGORITHMS: Mapping[str, tuple[str, str | None, bool]] = {
    "FP8": ("fp8_tensor", "fp8_static", True),  # weight-only FP8 is exported under the same name, without input_scale
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_channel", "fp8_token", False),
    "FP8_PB_WO": ("fp8_block", None, False),  # per block, weight-only
    "FP8_BLOCK_SCALES": ("fp8_block", "fp8_group", False),
    "NVFP4": ("nvfp4", "nvfp4", True),
    "NVFP4_AWQ": ("nvfp4", "nvfp4", True),
    "W4A16_NVFP4": ("nvfp4", None, False),
    "MXFP8": ("mxfp8", "mxfp8", False),
    "MXFP4": ("mxfp4", None, False),
}
REFUSED_ALGORITHMS: Mapping[str, str] = {
    "NVFP4_SVD": "its low-rank branch has no place in the canonical format: export with NVFP4 or NVFP4_AWQ",
    "W4A8_NVFP4_FP8": "export with NVFP4 or W4A16_NVFP4",
    "W4A8_MXFP4_FP8": "export with NVFP4 or MXFP8",
    "W4A8_AWQ": "integer formats are not supported: export with NVFP4 or FP8",
    "W4A16_AWQ": "integer formats are not supported: export with W4A16_NVFP4",
    "INT4_AWQ": "integer formats are not supported: export with W4A16_NVFP4",
    "W8A16": "integer formats are not supported: export with FP8",
    "W4A16": "integer formats are not supported: export with W4A16_NVFP4",
    "W8A8_SQ_PER_CHANNEL": "integer formats are not supported: export with FP8",
}


def _claim(entry: Mapping[str, Any], where: str, what: str) -> Claim:
    algorithm = entry.get("quant_algo")
    name = str(algorithm).upper()
    if name in REFUSED_ALGORITHMS:
        raise ConvertError(
            Problem(where, what, "a supported quant_algo", f"{algorithm}", REFUSED_ALGORITHMS[name])
        )
    if name not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise ConvertError(Problem(where, what, f"a quant_algo of {known}", f"{algorithm}", "export with one of these"))
    scheme, activations, optional = ALGORITHMS[name]
    size = entry.get("group_size")
    return Claim(scheme, activations, str(algorithm), optional, size if isinstance(size, int) else None)


def _listed_claim(entry: Mapping[str, Any], where: str, what: str) -> Claim:
    """The claim of one entry of `quantized_layers`."""
    claim = _claim(entry, where, what)
    if claim.scheme == "nvfp4" and entry.get("with_input_scale") is not False:
        return replace(claim, optional_input_scale=False)  # weight-only has a word of its own here: W4A16_NVFP4
    return claim


def _no_inputs(groups: Any) -> bool:
    """Whether no group quantises its input: NVFP4 is then W4A16 under the old name."""
    if not isinstance(groups, Mapping) or not groups:
        return False
    return all(isinstance(g, Mapping) and g.get("input_activations") is None for g in groups.values())


def _kv_claim(value: Any) -> KvClaim | None:
    if value is None:
        return None
    if isinstance(value, Mapping):  # {"num_bits": 8, "type": "float", "dynamic": false}
        name = "fp8" if value.get("num_bits") == 8 and value.get("type") == "float" else str(dict(value))
        return KvClaim(name, "FP8" if name == "fp8" else name)
    return KvClaim(str(value).lower(), str(value))


def read(block: Mapping[str, Any], where: str, space: NameSpace) -> Rules:
    """Read either config form.  Raises `ConvertError` for an algorithm that cannot be converted, naming it."""
    form = block
    if isinstance(block.get("quantization"), Mapping):  # hf_quant_config.json, and old exports that embed the same
        form = block["quantization"]
        where = f"{where}: quantization"
    rules = Rules(where, DIALECT.name)
    rules.kv_cache = _kv_claim(form.get("kv_cache_scheme", form.get("kv_cache_quant_algo")))
    for name in expect_names(form.get("ignore", form.get("exclude_modules")), where, "ignore"):
        pattern = config_name(name, space, rules)
        if has_wildcard(pattern):
            rules.ignored.add_wildcard(pattern, space, where)
        else:
            rules.ignored.add_name(pattern, space)
    algorithm = form.get("quant_algo")
    layers = form.get("quantized_layers")
    if layers is not None or str(algorithm).upper() == "MIXED_PRECISION":
        # An allow list: what it does not name is not quantised.  `config_groups` repeats it and is ignored, because the
        # two disagree in released checkpoints (groups synthesise their activations from the algorithm's name).
        rules.silent = layers is None
        canonical = CanonicalNames(space)
        claims: dict[str, Claim] = {}  # entries repeat few claims thousands of times
        for name, entry in expect_mapping(layers or {}, where, "quantized_layers").items():
            key = config_name(name, space, rules)
            look = repr(entry)
            if look not in claims:
                claims[look] = _listed_claim(expect_mapping(entry, where, key), where, key)
            claim = claims[look]
            if not has_wildcard(key):
                rules.listed[key] = canonical(key) or key
                rules.exact[rules.listed[key]] = claim
                continue
            if not rules.ordered or rules.ordered[-1][1] != claim:
                rules.ordered.append((ModuleNames(), claim))
            rules.ordered[-1][0].add_wildcard(key, space, where)
    elif algorithm is not None:
        rules.default = replace(_claim(form, where, "quant_algo"), explicit=False)
        if rules.default.scheme == "nvfp4" and _no_inputs(form.get("config_groups")):
            label = f"{algorithm} without input_activations"
            rules.default = replace(rules.default, activations=None, label=label, optional_input_scale=False)
    return rules


DIALECT = Dialect("modelopt", ENCODINGS, ("modelopt", "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8"), read)

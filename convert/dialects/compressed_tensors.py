"""compressed-tensors, written by llm-compressor and others.  Source: compressed-tensors 0.20.0, run.

`weight_scale` and `input_scale` multiply and have the model's dtype; the two `*_global_scale` divide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConvertError, Problem
from ..names import NameSpace
from .base import (
    FLOATS,
    SCALAR,
    Claim,
    Dialect,
    Encoding,
    KvClaim,
    Module,
    ModuleNames,
    Rules,
    Stored,
    config_name,
    expect_mapping,
    expect_names,
)

_FP8 = Stored("weight", "weight", ("F8_E4M3",), (("N", "K"),), "copy")
_FP4 = Stored("weight_packed", "weight", ("U8",), (("N", "K/2"),), "copy")
_INPUT = Stored("input_scale", "input_scale", FLOATS, SCALAR, "f32", optional=True)
_E8M0 = Stored("weight_scale", "weight_scale", ("U8", "F8_E8M0"), (("N", "K/32"),), "copy")
_SOURCE = "compressed-tensors 0.20.0"

ENCODINGS = (
    Encoding(
        "fp8_tensor",
        (_FP8, Stored("weight_scale", "weight_scale", FLOATS, (*SCALAR, ("1", "1")), "f32"), _INPUT),
        _SOURCE,
    ),
    Encoding(
        "fp8_channel", (_FP8, Stored("weight_scale", "weight_scale", FLOATS, (("N", "1"),), "f32"), _INPUT), _SOURCE
    ),
    Encoding("fp8_block", (_FP8, Stored("weight_scale", "weight_scale", FLOATS, (("NB", "KB"),), "f32")), _SOURCE),
    Encoding(
        "nvfp4",
        (
            _FP4,
            Stored("weight_scale", "weight_scale", ("F8_E4M3",), (("N", "K/16"),), "copy"),
            Stored("weight_global_scale", "weight_scale_2", ("F32",), SCALAR, "reciprocal"),
            Stored("input_global_scale", "input_scale", ("F32",), SCALAR, "reciprocal", optional=True),
        ),
        _SOURCE,
    ),
    Encoding("mxfp4", (_FP4, _E8M0), _SOURCE),
    Encoding("mxfp8", (_FP8, _E8M0), _SOURCE),
)

# (type, num_bits, strategy, group_size) of weights -> scheme.
WEIGHTS: Mapping[tuple[Any, ...], str] = {
    ("float", 8, "tensor", None): "fp8_tensor",
    ("float", 8, "channel", None): "fp8_channel",
    ("float", 8, "block", None): "fp8_block",
    ("float", 8, "group", 32): "mxfp8",
    ("float", 4, "tensor_group", 16): "nvfp4",
    ("float", 4, "group", 32): "mxfp4",
}
# (type, num_bits, strategy, dynamic) of input activations -> activations; "local": block scales dynamic, global stored.
INPUTS: Mapping[tuple[Any, ...], str] = {
    ("float", 8, "tensor", False): "fp8_static",
    ("float", 8, "tensor", True): "fp8_tensor",
    ("float", 8, "token", True): "fp8_token",
    ("float", 4, "tensor_group", "local"): "nvfp4",
}
GROUPED_INPUTS: Mapping[tuple[Any, ...], str] = {  # (type, num_bits, group_size), all dynamic
    ("float", 8, 128): "fp8_group",
    ("float", 8, 32): "mxfp8",
    ("float", 4, 32): "mxfp4",
}
REMEDY = "export with a float8, NVFP4 or MX preset (FP8, FP8_DYNAMIC, FP8_BLOCK, NVFP4, NVFP4A16, MXFP4, MXFP8)"


def _describe(args: Mapping[str, Any]) -> str:
    keys = ("num_bits", "type", "strategy", "group_size", "dynamic", "symmetric")
    return ", ".join(f"{k} {args[k]}" for k in keys if args.get(k) is not None)


def _weights(args: Mapping[str, Any], where: str, group: str) -> str:
    strategy = args.get("strategy") or "tensor"  # the library's default for 8-bit floats
    size = args.get("group_size") if strategy in ("group", "tensor_group") else None
    scheme = WEIGHTS.get((args.get("type"), args.get("num_bits"), strategy, size))
    blocks = args.get("block_structure") or [128, 128]
    if scheme == "fp8_block" and (blocks.split("x") if isinstance(blocks, str) else list(blocks)) not in (
        [128, 128],
        ["128", "128"],
    ):
        scheme = None
    if scheme is None or args.get("symmetric") is False or args.get("actorder"):
        kind = "INT" if args.get("type") == "int" else "weights"
        raise ConvertError(
            Problem(where, group, "weights of a supported format", f"{kind} with {_describe(args)}", REMEDY)
        )
    return scheme


def _inputs(args: Mapping[str, Any] | None, where: str, group: str) -> str | None:
    if args is None:
        return None
    args = expect_mapping(args, where, group)
    key = (args.get("type"), args.get("num_bits"))
    if args.get("strategy") == "group":
        found = GROUPED_INPUTS.get((*key, args.get("group_size"))) if args.get("dynamic") else None
    else:
        found = INPUTS.get((*key, args.get("strategy") or "tensor", args.get("dynamic") or False))
    if found is None:
        raise ConvertError(
            Problem(where, group, "input activations of a supported format", _describe(args) or repr(args)[:80], REMEDY)
        )
    return found


def _is_class(target: str) -> bool:
    """Whether a target is the class name Linear, or one that derives from it."""
    return "." not in target and target.endswith("Linear")


def _names(targets: Iterable[str], where: str, space: NameSpace) -> ModuleNames:
    """`targets` or `ignore` entries: `re:` patterns, module paths, or class names."""
    names = ModuleNames()
    for target in targets:
        if target.startswith("re:"):
            names.add_regex(target[3:], where)
        elif _is_class(target):
            names.patterns.append(_is_linear)
        else:
            names.add_name(target, space)
    return names


def _is_linear(module: Module) -> bool:
    return module.is_linear


def _kv_claim(args: Any) -> KvClaim | None:
    if not isinstance(args, Mapping):
        return None
    fp8 = args.get("type") == "float" and args.get("num_bits") == 8 and not args.get("dynamic")
    return KvClaim("fp8" if fp8 else _describe(args), _describe(args))


def read(block: Mapping[str, Any], where: str, space: NameSpace) -> Rules:
    """Read a compressed-tensors config.  Raises `ConvertError` for formats and transforms that cannot be converted."""
    rules = Rules(where, DIALECT.name)
    if block.get("transform_config"):
        raise ConvertError(
            Problem(where, "transform_config", "none", "transforms that change the maths at run time",
                    "export without transforms (Hadamard, SpinQuant)")
        )  # fmt: skip
    sparsity = expect_mapping(block.get("sparsity_config") or {}, where, "sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise ConvertError(
            Problem(where, "sparsity_config", "dense weights", str(sparsity.get("format")), "export without sparsity")
        )
    claims: list[tuple[Mapping[str, Any], Claim]] = []
    for name, group in expect_mapping(block.get("config_groups") or {}, where, "config_groups").items():
        group = expect_mapping(group, where, name)
        weights = group.get("weights")
        if weights is None:
            continue  # a group that only quantises activations (a KV cache or attention group)
        scheme = _weights(expect_mapping(weights, where, name), where, name)
        inputs = _inputs(group.get("input_activations"), where, name)
        claims.append((group, Claim(scheme, inputs, f"{group.get('format') or block.get('format')} ({name})")))
    classes: list[tuple[ModuleNames, Claim]] = []
    for group, claim in claims:
        targets = [config_name(t, space, rules) for t in expect_names(group.get("targets"), where, "targets")]
        rules.ordered.append((_names((t for t in targets if not _is_class(t)), where, space), claim))
        classes.append((_names(filter(_is_class, targets), where, space), replace(claim, explicit=False)))
    # Path and pattern targets win over class names, whatever the order of the groups.
    rules.ordered += classes
    ignored = [config_name(name, space, rules) for name in expect_names(block.get("ignore"), where, "ignore")]
    rules.ignored = _names(ignored, where, space)
    rules.kv_cache = _kv_claim(block.get("kv_cache_scheme"))
    return rules


DIALECT = Dialect("compressed-tensors", ENCODINGS, ("compressed-tensors", "compressed_tensors"), read)

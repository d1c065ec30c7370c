"""Hugging Face `fp8` (Qwen and DeepSeek official FP8).  Source: transformers 5.23.0, run.

`weight_scale_inv` multiplies; its name is historical.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    Rules,
    Stored,
    config_name,
    expect_names,
)

_FP8 = Stored("weight", "weight", ("F8_E4M3",), (("N", "K"),), "copy")
_SOURCE = "transformers 5.23.0"

ENCODINGS = (
    Encoding(
        "fp8_block", (_FP8, Stored("weight_scale_inv", "weight_scale", FLOATS, (("NB", "KB"),), "f32")), _SOURCE
    ),
    Encoding(  # scale_fmt "ue8m0"
        "fp8_block", (_FP8, Stored("weight_scale_inv", "weight_scale", ("F8_E8M0", "U8"), (("NB", "KB"),), "e8m0")), _SOURCE
    ),
    Encoding(
        "fp8_tensor",
        (
            _FP8,
            Stored("weight_scale_inv", "weight_scale", FLOATS, SCALAR, "f32"),
            Stored("activation_scale", "input_scale", FLOATS, SCALAR, "f32", optional=True),
        ),
        _SOURCE,
    ),
    Encoding(  # the spelling that vLLM's loader reads
        "fp8_tensor",
        (
            _FP8,
            Stored("weight_scale", "weight_scale", FLOATS, SCALAR, "f32"),
            Stored("input_scale", "input_scale", FLOATS, SCALAR, "f32", optional=True),
        ),
        "vLLM 0.33.0",
    ),
)


def read(block: Mapping[str, Any], where: str, space: NameSpace) -> Rules:
    """Read a `quant_method: fp8` config.  Raises `ConvertError` for block sizes other than 128 x 128."""
    rules = Rules(where, DIALECT.name)
    size = block.get("weight_block_size")
    static = block.get("activation_scheme") == "static"
    if size is not None and list(size) != [128, 128]:
        raise ConvertError(
            Problem(where, "weight_block_size", "[128, 128] or null", repr(size)[:80], "export with 128 x 128 blocks")
        )
    if size is None:
        # Dynamic per-tensor FP8 quantises each token over all its inputs (transformers: block = K).
        claim = Claim("fp8_tensor", "fp8_static" if static else "fp8_token", "fp8 per tensor", explicit=False)
    elif static:
        raise ConvertError(
            Problem(where, "activation_scheme", "dynamic for block FP8", "static", "export with dynamic activations")
        )
    else:
        activations = "fp8_group_e8m0" if block.get("scale_fmt") == "ue8m0" else "fp8_group"
        claim = Claim("fp8_block", activations, "fp8 block", explicit=False)
    rules.default = claim
    if block.get("kv_cache_scheme") is not None:  # AutoFP8: "static", a `kv_scale` for each layer
        rules.kv_cache = KvClaim("fp8", str(block["kv_cache_scheme"]))
    for key in ("modules_to_not_convert", "ignored_layers"):
        for name in expect_names(block.get(key), where, key):
            rules.ignored.add_name(config_name(name, space, rules), space)
    return rules


DIALECT = Dialect("fp8", ENCODINGS, ("fp8",), read)

"""Everything that must be refused: exit code 1, one line per problem that a person can act on, and nothing left behind.

Each row breaks a checkpoint that converts, and names the file, the tensor and the words that its line must hold.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import INDEX, Built, Raw, build, edit_json, edit_tensors, raw, read_file, read_json, read_tensors, safetensors_bytes
from conftest import Ran

import convert

FILE = "model.safetensors"
LINE = re.compile(r"expected .+, found .+; .+")
MORE = re.compile(r"\d+ more")
Breaks = Callable[[Path, Built], object]
Cli = Callable[..., Ran]

FP8: dict[str, Any] = {"family": "qwen3_5", "dialect": "modelopt", "scheme": "fp8"}
NVFP4 = FP8 | {"scheme": "nvfp4"}
AWQ = FP8 | {"scheme": "nvfp4_awq"}
CHANNEL = FP8 | {"scheme": "fp8_pc_pt"}
BLOCK4D = FP8 | {"scheme": "fp8_pb_wo"}
MXFP8 = FP8 | {"scheme": "mxfp8"}
KV = FP8 | {"kv": "tensor"}
CT_FP8: dict[str, Any] = {"family": "qwen3_5", "dialect": "compressed-tensors", "scheme": "fp8_static"}
CT_CHANNEL = CT_FP8 | {"scheme": "fp8_dynamic"}
CT_NVFP4 = CT_FP8 | {"scheme": "nvfp4"}
CT_MXFP4 = CT_FP8 | {"scheme": "mxfp4"}
HF_BLOCK: dict[str, Any] = {"family": "qwen3_5", "dialect": "fp8", "scheme": "block"}
HF_E8M0 = HF_BLOCK | {"scheme": "block_e8m0"}
HF_STATIC = HF_BLOCK | {"scheme": "tensor_static"}
DENSE: dict[str, Any] = {"family": "qwen3_5", "dialect": "dense", "scheme": "bf16"}
QWEN3: dict[str, Any] = {"family": "qwen3", "dialect": "dense", "scheme": "bf16"}
VLM = DENSE | {"wrapper": True, "mtp": True}
SHARDED = FP8 | {"shards": 3}

Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
QKV = "model.layers.0.linear_attn.in_proj_qkv"


@dataclass(frozen=True)
class Case:
    """`options`: what to build; `breaks`: how it is damaged; then what the error line must contain."""

    id: str
    options: dict[str, Any]
    breaks: Breaks
    file: str = FILE
    tensor: str = ""
    words: tuple[str, ...] = field(default=())


# ------------------------------------------------------------------------------------------------ ways to break things


def tensors(change: Callable[[dict[str, Raw]], object]) -> Breaks:
    """Change the tensors of the only file."""
    return lambda folder, built: edit_tensors(folder, change)


def drop(*names: str) -> Breaks:
    """Remove tensors."""
    return tensors(lambda stored: [stored.pop(name) for name in names])


def put(name: str, tensor: Raw) -> Breaks:
    """Add or replace a tensor."""
    return tensors(lambda stored: stored.update({name: tensor}))


def value(name: str, number: float, dtype: str = "F32") -> Breaks:
    """Set the last element of a float tensor."""

    def change(stored: dict[str, Raw]) -> None:
        values = stored[name].floats().copy()
        values.reshape(-1)[-1] = number
        stored[name] = raw(dtype, values)

    return tensors(change)


def code(name: str, byte: int, at: int = -1) -> Breaks:
    """Set one byte of a tensor of one-byte codes."""

    def change(stored: dict[str, Raw]) -> None:
        codes = stored[name].codes().copy()
        codes.reshape(-1)[at] = byte
        stored[name] = Raw(stored[name].dtype, stored[name].shape, codes.tobytes())

    return tensors(change)


def zeros(name: str, dtype: str, *shape: int) -> Breaks:
    """Replace a tensor by one of another dtype or shape (ones, so that no value is at fault)."""
    return put(name, raw(dtype, np.ones(shape)))


def content(change: Callable[[bytes], bytes], file: str = FILE) -> Breaks:
    """Change the bytes of a file."""
    return lambda folder, built: (folder / file).write_bytes(change((folder / file).read_bytes()))


def header(change: Callable[[dict[str, Any]], object]) -> Breaks:
    """Change the header of the only file, leaving its data alone."""

    def rewrite(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return content(rewrite)


def header_text(change: Callable[[str], str]) -> Breaks:
    """Change the text of the header."""

    def rewrite(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        text = change(data[8 : 8 + length].decode()).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return content(rewrite)


def config(change: Callable[[Any], object], file: str = "config.json") -> Breaks:
    """Change a JSON file."""
    return lambda folder, built: edit_json(folder / file, change)


def quantised_by(method: str, **more: Any) -> Breaks:
    """Give the checkpoint a quantization config."""
    return config(lambda c: c.update(quantization_config={"quant_method": method, **more}))


def index(change: Callable[[dict[str, str]], object]) -> Breaks:
    """Change the weight map of the index."""
    return config(lambda i: change(i["weight_map"]), INDEX)


def only(*files: tuple[str, bytes]) -> Breaks:
    """Empty the directory, then write these files."""

    def breaks(folder: Path, built: Built) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name, data in files:
            (folder / name).write_bytes(data)

    return breaks


def both(*steps: Breaks) -> Breaks:
    """Several breaks, one after the other."""

    def breaks(folder: Path, built: Built) -> None:
        for step in steps:
            step(folder, built)

    return breaks


def second_shard_repeats(folder: Path, built: Built) -> None:
    """A tensor of the first shard is stored in the second as well."""
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name, tensor = sorted(read_tensors(folder).items())[0]
    assert name in read_file(first)
    second.write_bytes(safetensors_bytes(read_file(second) | {name: tensor}))


def orphan_in_shard(folder: Path, built: Built) -> None:
    """The index forgets a tensor that a shard holds."""
    edit_json(folder / INDEX, lambda i: i["weight_map"].pop("model.norm.weight"))


def to_link(outside: bool) -> Breaks:
    """Replace the file by a link to a copy beside the checkpoint (`outside`), or by a pipe."""

    def breaks(folder: Path, built: Built) -> None:
        if outside:
            (folder / FILE).rename(folder.parent / "elsewhere")
            (folder / FILE).symlink_to(folder.parent / "elsewhere")
        else:
            (folder / FILE).unlink()
            os.mkfifo(folder / FILE)

    return breaks


def to_folder(folder: Path, built: Built) -> None:
    """Replace the file by a folder of its name."""
    (folder / FILE).unlink()
    (folder / FILE).mkdir()


# ----------------------------------------------------------------------------------------------------------- the table


def _values(options: dict[str, Any], name: str, bad: Iterable[float], dtype: str = "F32") -> list[Case]:
    role = name.rpartition(".")[2]
    scheme = f"{options['dialect']}-{options['scheme']}"
    return [Case(f"{scheme}-{role}-is-{b}", options, value(name, b, dtype), tensor=name) for b in bad]


NAN, INF = float("nan"), float("inf")
BAD = (NAN, INF, -INF, -0.5, 0.0)
ABSMAX = raw("F32", np.ones(4))

MISSING = [
    Case("missing-fp8-weight_scale", FP8, drop(f"{Q}.weight_scale"), tensor=f"{Q}.weight_scale"),
    Case("missing-fp8-input_scale-of-one-partition", FP8, drop(f"{Q}.input_scale"), tensor=f"{Q}.input_scale"),
    Case("missing-channel-weight_scale", CHANNEL, drop(f"{Q}.weight_scale"), tensor=f"{Q}.weight_scale"),
    Case("missing-block-weight_scale", BLOCK4D, drop(f"{Q}.weight_scale"), tensor=f"{Q}.weight_scale"),
    Case("missing-nvfp4-weight_scale", NVFP4, drop(f"{Q}.weight_scale"), tensor=f"{Q}.weight_scale"),
    Case("missing-nvfp4-weight_scale_2", NVFP4, drop(f"{Q}.weight_scale_2"), tensor=f"{Q}.weight_scale_2"),
    Case("missing-mxfp8-weight_scale", MXFP8, drop(f"{Q}.weight_scale"), tensor=f"{Q}.weight_scale"),
    Case("missing-ct-weight_scale", CT_FP8, drop(f"{Q}.weight_scale"), tensor=f"{Q}.weight_scale"),
    Case("missing-ct-input_scale", CT_FP8, drop(f"{Q}.input_scale"), tensor=f"{Q}.input_scale"),
    Case("missing-ct-nvfp4-weight_scale", CT_NVFP4, drop(f"{Q}.weight_scale"), tensor=f"{Q}.weight_scale"),
    Case("missing-ct-weight_global_scale", CT_NVFP4, drop(f"{Q}.weight_global_scale"), tensor=f"{Q}.weight_global_scale"),
    Case("missing-ct-input_global_scale", CT_NVFP4, drop(f"{Q}.input_global_scale"), tensor=f"{Q}.input_global_scale"),
    Case("missing-ct-mxfp4-weight_scale", CT_MXFP4, drop(f"{Q}.weight_scale"), tensor=f"{Q}.weight_scale"),
    Case("missing-hf-weight_scale_inv", HF_BLOCK, drop(f"{Q}.weight_scale_inv"), tensor=f"{Q}.weight_scale_inv"),
    Case("missing-hf-activation_scale", HF_STATIC, drop(f"{Q}.activation_scale"), tensor=f"{Q}.activation_scale"),
    Case("missing-weight-of-scales", FP8, drop(f"{Q}.weight"), tensor=f"{Q}.weight"),
    Case("missing-packed-weight", CT_NVFP4, drop(f"{Q}.weight_packed"), tensor=Q),
    Case(
        "missing-v_scale",
        KV,
        drop("model.layers.1.self_attn.v_proj.v_scale"),
        tensor="model.layers.1.self_attn",
        words=("v_scale",),
    ),
    Case(
        "kv-scales-on-one-layer-only",
        KV | {"family": "qwen3"},
        drop(*(f"model.layers.0.self_attn.{c}_proj.{c}_scale" for c in "kv")),
        tensor="model.layers.0.self_attn",
        words=("k_scale",),
    ),
    Case("missing-norm", DENSE, drop("model.norm.weight"), tensor="model.norm.weight"),
    Case(
        "missing-projection",
        DENSE,
        drop("model.layers.1.self_attn.k_proj.weight"),
        tensor="model.layers.1.self_attn.k_proj.weight",
    ),
    Case(
        "missing-conv1d",
        DENSE,
        drop("model.layers.0.linear_attn.conv1d.weight"),
        tensor="model.layers.0.linear_attn.conv1d.weight",
    ),
    Case("missing-head", QWEN3, drop("lm_head.weight"), tensor="lm_head"),
    Case(
        "missing-bias",
        QWEN3 | {"bias": True},
        drop("model.layers.0.self_attn.k_proj.bias"),
        tensor="model.layers.0.self_attn.k_proj.bias",
    ),
    Case("missing-vision-tensor", VLM, drop("model.visual.blocks.1.norm2.bias"), tensor="visual.blocks.1.norm2.bias"),
    Case("missing-mtp-tensor", VLM, drop("mtp.fc.weight"), tensor="mtp.fc.weight"),
    Case(
        "missing-layer",
        DENSE,
        config(lambda c: c.update(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "full_attention"])),
        tensor="model.layers.2.",
    ),
]
VALUES = [
    *_values(FP8, f"{QKV}.weight_scale", BAD),
    *_values(FP8, f"{QKV}.input_scale", BAD),
    *_values(CHANNEL, f"{Q}.weight_scale", BAD),
    *_values(CT_CHANNEL, f"{Q}.weight_scale", BAD, "BF16"),
    *_values(CT_FP8, f"{Q}.weight_scale", BAD, "BF16"),
    *_values(NVFP4, f"{DOWN}.weight_scale_2", BAD),
    *_values(NVFP4, f"{DOWN}.input_scale", (NAN, 0.0)),
    *_values(CT_NVFP4, f"{DOWN}.weight_global_scale", (*BAD, 1e-39)),  # 1 / 1e-39 is infinite in float32
    *_values(CT_NVFP4, f"{DOWN}.input_global_scale", BAD),
    *_values(BLOCK4D, f"{DOWN}.weight_scale", (NAN, INF, -0.5)),
    *_values(HF_BLOCK, f"{DOWN}.weight_scale_inv", (NAN, INF, -0.5)),
    *_values(HF_STATIC, f"{DOWN}.weight_scale_inv", (NAN, 0.0)),
    *_values(HF_STATIC, f"{DOWN}.activation_scale", (INF, 0.0)),
    *_values(AWQ, f"{DOWN}.pre_quant_scale", (NAN, INF), "BF16"),
    *_values(KV, "model.layers.1.self_attn.k_proj.k_scale", BAD),
    Case("nan-code-7f-in-fp8-weight", FP8, code(f"{Q}.weight", 0x7F, 1000), tensor=f"{Q}.weight", words=("nan",)),
    Case("nan-code-ff-in-fp8-weight", HF_BLOCK, code(f"{Q}.weight", 0xFF), tensor=f"{Q}.weight", words=("nan",)),
    Case("nan-code-in-mxfp8-weight", MXFP8, code(f"{Q}.weight", 0x7F, 0), tensor=f"{Q}.weight", words=("nan",)),
    Case("nan-block-scale-7f", NVFP4, code(f"{Q}.weight_scale", 0x7F), tensor=f"{Q}.weight_scale", words=("nan",)),
    Case("nan-block-scale-ff", CT_NVFP4, code(f"{Q}.weight_scale", 0xFF, 0), tensor=f"{Q}.weight_scale", words=("nan",)),
    Case("negative-block-scale", NVFP4, code(f"{Q}.weight_scale", 0xB0, 3), tensor=f"{Q}.weight_scale"),
    Case("nan-e8m0-scale", CT_MXFP4, code(f"{Q}.weight_scale", 0xFF, 3), tensor=f"{Q}.weight_scale", words=("nan",)),
    Case(
        "nan-e8m0-block-scale",
        HF_E8M0,
        code(f"{Q}.weight_scale_inv", 0xFF, 0),
        tensor=f"{Q}.weight_scale_inv",
        words=("nan",),
    ),
]
SHAPES = [
    Case(
        "two-scales-for-three-partitions",
        FP8,
        zeros(f"{QKV}.weight_scale", "F32", 2),
        tensor=f"{QKV}.weight_scale",
        words=("3", "2"),
    ),
    Case("four-scales-for-three-partitions", FP8, zeros(f"{QKV}.weight_scale", "F32", 4), tensor=f"{QKV}.weight_scale"),
    Case("two-input-scales-for-one-partition", FP8, zeros(f"{Q}.input_scale", "F32", 2), tensor=f"{Q}.input_scale"),
    Case(
        "nvfp4-scale-half-as-wide",
        NVFP4,
        zeros(f"{DOWN}.weight_scale", "F8_E4M3", 64, 3),
        tensor=f"{DOWN}.weight_scale",
        words=("groups of 16", "groups of 32"),
    ),
    Case(
        "nvfp4-scale-twice-as-wide",
        NVFP4,
        zeros(f"{DOWN}.weight_scale", "F8_E4M3", 64, 12),
        tensor=f"{DOWN}.weight_scale",
        words=("64, 6", "64, 12"),
    ),
    Case(
        "ct-nvfp4-scale-half-as-wide",
        CT_NVFP4,
        zeros(f"{DOWN}.weight_scale", "F8_E4M3", 64, 3),
        tensor=f"{DOWN}.weight_scale",
    ),
    Case(
        "nvfp4-scale-short-of-a-row",
        NVFP4,
        zeros(f"{DOWN}.weight_scale", "F8_E4M3", 63, 6),
        tensor=f"{DOWN}.weight_scale",
    ),
    Case("nvfp4-weight-half-as-wide", NVFP4, zeros(f"{DOWN}.weight", "U8", 64, 24), tensor=f"{DOWN}.weight"),
    Case("nvfp4-weight-of-no-dimension", NVFP4, zeros(f"{DOWN}.weight", "U8"), tensor=f"{DOWN}.weight"),
    Case("nvfp4-weight_scale_2-of-two", NVFP4, zeros(f"{DOWN}.weight_scale_2", "F32", 2), tensor=f"{DOWN}.weight_scale_2"),
    Case("channel-scale-of-another-length", CHANNEL, zeros(f"{Q}.weight_scale", "F32", 127), tensor=f"{Q}.weight_scale"),
    Case(
        "block-grid-of-another-size",
        HF_BLOCK,
        zeros(f"{DOWN}.weight_scale_inv", "F32", 2, 1),
        tensor=f"{DOWN}.weight_scale_inv",
        words=("2, 2",),
    ),
    Case(
        "block-grid-4d-of-another-size",
        BLOCK4D,
        zeros(f"{DOWN}.weight_scale", "F32", 2, 1, 1, 1),
        tensor=f"{DOWN}.weight_scale",
    ),
    Case("mx-scale-half-as-wide", MXFP8, zeros(f"{Q}.weight_scale", "U8", 128, 1), tensor=f"{Q}.weight_scale"),
    Case("scale-of-another-dtype", FP8, zeros(f"{Q}.weight_scale", "I64"), tensor=f"{Q}.weight_scale", words=("I64",)),
    Case("pre_quant_scale-too-short", AWQ, zeros(f"{DOWN}.pre_quant_scale", "BF16", 95), tensor=f"{DOWN}.pre_quant_scale"),
    Case(
        "kv-scale-of-three",
        KV,
        zeros("model.layers.1.self_attn.k_proj.k_scale", "F32", 3),
        tensor="model.layers.1.self_attn.k_proj.k_scale",
    ),
    Case(
        "weight-of-another-shape",
        DENSE,
        zeros(f"{Q}.weight", "BF16", 128, 63),
        tensor=f"{Q}.weight",
        words=("128, 64", "128, 63"),
    ),
    Case("fp8-weight-of-another-shape", FP8, zeros(f"{Q}.weight", "F8_E4M3", 127, 64), tensor=f"{Q}.weight"),
    Case("norm-of-another-shape", DENSE, zeros("model.norm.weight", "BF16", 65), tensor="model.norm.weight"),
    Case("config-of-another-size", FP8, config(lambda c: c.update(intermediate_size=128)), tensor="mlp", words=("128",)),
    Case("integer-norm", DENSE, zeros("model.norm.weight", "I32", 64), tensor="model.norm.weight", words=("I32",)),
]
FILES = [
    Case("truncated", FP8, content(lambda b: b[:-1]), words=("truncated",)),
    Case("truncated-in-header", FP8, content(lambda b: b[:100])),
    Case("trailing-bytes", FP8, content(lambda b: b + b"\0"), words=("trailing",)),
    Case("empty-file", FP8, content(lambda b: b"")),
    Case("garbage-header", FP8, content(lambda b: b[:8] + b"\xff" * 64 + b[72:])),
    Case("header-is-a-list", FP8, content(lambda b: struct.pack("<Q", 2) + b"[]")),
    Case("header-length-2**63", FP8, content(lambda b: struct.pack("<Q", 1 << 63) + b[8:])),
    Case("header-length-101-MB", FP8, content(lambda b: struct.pack("<Q", 101_000_000) + b[8:])),
    Case("nested-brackets", FP8, content(lambda b: struct.pack("<Q", 200_000) + b"[" * 200_000)),
    Case(
        "duplicate-header-key",
        FP8,
        header_text(
            lambda t: t.replace(
                '"model.norm.weight":',
                '"model.norm.weight":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]},"model.norm.weight":',
            )
        ),
        words=("duplicate", "model.norm.weight"),
    ),
    # The same with an escaped letter in the first entry, which a search for the text "data_offsets" does not see.
    Case(
        "duplicate-header-key-escaped",
        FP8,
        header_text(
            lambda t: t.replace(
                '"model.norm.weight":',
                '"model.norm.weight":{"dtype":"BF16","shape":[0],"data\\u005foffsets":[0,0]},"model.norm.weight":',
            )
        ),
        words=("duplicate", "model.norm.weight"),
    ),
    Case(
        "overlapping-tensors",
        FP8,
        header(
            lambda h: h["model.norm.weight"].update(
                data_offsets=h["model.embed_tokens.weight"]["data_offsets"][:1] * 2, shape=[0]
            )
        ),
        words=("found",),
    ),
    Case("two-names-one-range", FP8, header(lambda h: h.update(alias=dict(h["model.norm.weight"]))), words=("overlap",)),
    Case("gap", FP8, header(lambda h: h.pop("model.norm.weight")), words=("found",)),
    Case(
        "bytes-do-not-fit-shape",
        FP8,
        header(lambda h: h["model.norm.weight"].update(shape=[63])),
        tensor="model.norm.weight",
        words=("128",),
    ),
    Case(
        "end-before-begin",
        FP8,
        header(lambda h: h["model.norm.weight"]["data_offsets"].reverse()),
        tensor="model.norm.weight",
    ),
    Case("negative-shape", FP8, header(lambda h: h["model.norm.weight"].update(shape=[-64])), tensor="model.norm.weight"),
    Case(
        "huge-shape",
        FP8,
        header(lambda h: h["model.norm.weight"].update(shape=[2**62, 2**62])),
        tensor="model.norm.weight",
    ),
    Case(
        "unknown-dtype",
        FP8,
        header(lambda h: h["model.norm.weight"].update(dtype="F99")),
        tensor="model.norm.weight",
        words=("F99",),
    ),
    Case("metadata-not-text", FP8, header(lambda h: h.update(__metadata__={"n": 1})), words=("metadata",)),
    Case("name-with-escape", FP8, put("model.\x1b[31m.weight", raw("BF16", np.ones(2))), words=("x1b",)),
    Case("name-with-parent-path", FP8, put("../../x", raw("BF16", np.ones(2))), tensor="../../x"),
    Case("link-out-of-the-tree", FP8, to_link(outside=True), words=("link",)),
    Case("a-pipe", FP8, to_link(outside=False)),
    Case("a-folder", FP8, to_folder),
    Case(
        "index-names-missing-shard",
        SHARDED,
        lambda folder, built: (folder / "model-00002-of-00003.safetensors").unlink(),
        file="model-00002-of-00003.safetensors",
    ),
    *(
        Case(
            f"index-path-{name}",
            SHARDED,
            index(lambda m, path=path: m.update({"lm_head.weight": path})),
            file=INDEX,
            tensor="lm_head.weight",
        )
        for name, path in (
            ("parent", "../model-00001-of-00003.safetensors"),
            ("absolute", "/etc/passwd"),
            ("backslash", "..\\model.safetensors"),
            ("folder", "sub/model.safetensors"),
            ("empty", ""),
        )
    ),
    Case(
        "indexed-tensor-not-in-shard",
        SHARDED,
        index(lambda m: m.update({"model.extra.weight": m["lm_head.weight"]})),
        file="model-0000",
        tensor="model.extra.weight",
        words=("index",),
    ),
    Case(
        "indexed-in-another-shard",
        SHARDED,
        index(lambda m: m.update({"lm_head.weight": next(f for f in sorted(set(m.values())) if f != m["lm_head.weight"])})),
        file="model-0000",
        tensor="lm_head.weight",
    ),
    Case("tensor-not-in-index", SHARDED, orphan_in_shard, file="model-0000", tensor="model.norm.weight", words=("index",)),
    Case(
        "tensor-in-two-shards",
        SHARDED,
        second_shard_repeats,
        file="model-00002-of-00003.safetensors",
        tensor="lm_head.weight",
        words=("model-00001-of-00003.safetensors",),
    ),
    Case(
        "index-with-duplicate-keys",
        SHARDED,
        content(
            lambda b: b.replace(b'"weight_map": {', b'"weight_map": {"lm_head.weight": "model-00001-of-00003.safetensors",'),
            INDEX,
        ),
        file=INDEX,
        words=("duplicate", "lm_head.weight"),
    ),
    Case("index-without-map", SHARDED, config(lambda i: i.pop("weight_map"), INDEX), file=INDEX, words=("weight_map",)),
    Case(
        "config-with-duplicate-keys",
        FP8,
        content(lambda b: b.replace(b"{", b'{"head_dim": 16,', 1), "config.json"),
        file="config.json",
        words=("duplicate", "head_dim"),
    ),
    Case(
        "config-with-nan",
        FP8,
        content(lambda b: b.replace(b"1e-06", b"NaN"), "config.json"),
        file="config.json",
        words=("nan",),
    ),
    Case("config-with-bom", FP8, content(lambda b: b"\xef\xbb\xbf" + b, "config.json"), file="config.json"),
    Case("config-is-a-list", FP8, content(lambda b: b"[]", "config.json"), file="config.json"),
    Case("config-is-cut", FP8, content(lambda b: b[:40], "config.json"), file="config.json"),
    Case(
        "hf-quant-config-is-cut",
        FP8 | {"form": "both"},
        content(lambda b: b[:40], "hf_quant_config.json"),
        file="hf_quant_config.json",
    ),
    Case("no-config", FP8, lambda folder, built: (folder / "config.json").unlink(), file="config.json"),
    Case("no-weights", FP8, lambda folder, built: (folder / FILE).unlink(), file="in", words=("safetensors",)),
    Case("empty-directory", FP8, only(), file="in", words=("empty",)),
    Case(
        "pickles-only",
        FP8,
        only(("config.json", b"{}"), ("pytorch_model.bin", b"\x80\x04.")),
        file="pytorch_model.bin",
        words=("pickle", "safetensors"),
    ),
    Case(
        "adapter",
        FP8,
        only(("adapter_config.json", b"{}"), ("adapter_model.safetensors", safetensors_bytes({}))),
        file="in",
        words=("adapter", "base model"),
    ),
    Case("gguf", FP8, only(("model.gguf", b"GGUF")), file="model.gguf", words=("gguf",)),
]
NAMES = [
    Case(
        "two-prefixes-for-one-name",
        DENSE,
        put("model.language_model.norm.weight", raw("BF16", np.ones(64))),
        tensor="model.norm.weight",
        words=("model.language_model.norm.weight",),
    ),
    Case(
        "base_layer-beside-the-bare-name",
        DENSE,
        put(f"{Q}.base_layer.weight", raw("BF16", np.ones((128, 64)))),
        tensor=f"{Q}.base_layer.weight",
        words=(f"{Q}.weight",),
    ),
    Case(
        "two-kv-spellings",
        KV,
        put("model.layers.1.self_attn.k_scale", raw("F32", [0.5])),
        tensor="model.layers.1.self_attn.k_scale",
        words=("k_proj.k_scale",),
    ),
    Case(
        "unknown-tensor",
        DENSE,
        put("model.layers.0.mlp.extra.weight", raw("BF16", np.ones(2))),
        tensor="model.layers.0.mlp.extra.weight",
    ),
    Case("unknown-root", DENSE, put("transformer.h.0.weight", raw("BF16", np.ones(2))), tensor="transformer.h.0.weight"),
    Case(
        "substring-of-a-known-name",
        DENSE,
        put("model.layers.0.linear_attn.in_proj_qkvzz.weight", raw("BF16", np.ones((2, 2)))),
        tensor="model.layers.0.linear_attn.in_proj_qkvzz.weight",
    ),
    Case("unknown-scale", FP8, put(f"{Q}.weight_scale_3", raw("F32", 0.5)), tensor=f"{Q}.weight_scale_3"),
    Case("scale-of-a-dense-weight", DENSE, put(f"{Q}.weight_scale", raw("F32", 0.5)), tensor=f"{Q}.weight_scale"),
    Case(
        "bias-without-bias",
        QWEN3,
        put("model.layers.0.self_attn.q_proj.bias", raw("BF16", np.ones(64))),
        tensor="model.layers.0.self_attn.q_proj.bias",
    ),
    Case(
        "one-layer-too-many",
        DENSE,
        put("model.layers.2.input_layernorm.weight", raw("BF16", np.ones(64))),
        file="config.json",
        words=("num_hidden_layers", "3 layers", "2"),
    ),
    Case(
        "fp8-weight-without-any-config",
        DENSE,
        put(f"{Q}.weight", raw("F8_E4M3", np.ones((128, 64)))),
        tensor=Q,
        words=("scale",),
    ),
    Case(
        "lora-without-its-other-half",
        DENSE,
        put(f"{Q}.lora_A.default.weight", raw("BF16", np.ones((4, 64)))),
        tensor=f"{Q}.lora_A.default.weight",
        words=("lora_B", "only one"),
    ),
    Case(
        "saved-module-of-no-module",
        DENSE,
        put("model.layers.0.mlp.extra.modules_to_save.default.weight", raw("BF16", np.ones((80, 64)))),
        tensor="model.layers.0.mlp.extra.modules_to_save.default.weight",
        words=("unknown",),
    ),
]
PRODUCERS = [
    *(
        Case(f"quant_method-{method}", DENSE, quantised_by(method), file="config.json", words=(method, *words))
        for method, *words in (
            ("gptq", "integer"),
            ("awq", "integer"),
            ("auto-round", "integer"),
            ("bitsandbytes", "integer"),
            ("hqq",),
            ("aqlm",),
            ("mxfp4", "gpt-oss"),
            ("quark",),
            ("fp_quant",),
            ("fbgemm_fp8",),
            ("torchao",),
            ("nvfp4",),
            ("fouroversix",),
            ("gguf",),
            ("a-method-of-tomorrow", "modelopt"),
        )
    ),
    *(
        Case(
            f"step3p5-{key}",
            {"family": "step3p5", "dialect": "dense", "scheme": "bf16"},
            config(lambda c, key=key, value=value: c.update({key: value})),
            file="config.json",
            words=(key, "variant"),
        )
        for key, value in (
            ("layer_scale", True),
            ("moe_router_activation", "softmax"),
            ("zero_centered", False),
            ("use_rope_layers", [True, False, True]),
        )
    ),
    Case(
        "load_in_4bit",
        DENSE,
        config(lambda c: c.update(quantization_config={"load_in_4bit": True})),
        file="config.json",
        words=("bitsandbytes",),
    ),
    *(
        Case(
            f"quant_algo-{algo}",
            FP8,
            config(lambda c, algo=algo: c["quantization_config"].update(quant_algo=algo)),
            file="config.json",
            words=(algo, "export"),
        )
        for algo in (
            "W4A8_AWQ",
            "W4A16_AWQ",
            "NVFP4_SVD",
            "W4A8_NVFP4_FP8",
            "W4A8_MXFP4_FP8",
            "W8A8_SQ_PER_CHANNEL",
            "ALGO_OF_TOMORROW",
        )
    ),
    Case(
        "ct-int4",
        CT_FP8,
        config(
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(
                num_bits=4, type="int", strategy="group", group_size=128
            )
        ),
        file="config.json",
        words=("int", "group_0"),
    ),
    Case(
        "ct-transforms",
        CT_FP8,
        config(lambda c: c["quantization_config"].update(transform_config={"config_groups": {"R1": {"type": "hadamard"}}})),
        file="config.json",
        words=("transform",),
    ),
    Case(
        "ct-sparsity",
        CT_FP8,
        config(lambda c: c["quantization_config"].update(sparsity_config={"format": "sparse-24-bitmask"})),
        file="config.json",
        words=("spars",),
    ),
    Case(
        "ct-asymmetric",
        CT_FP8,
        config(lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(symmetric=False)),
        file="config.json",
        words=("group_0",),
    ),
    Case(
        "hf-other-blocks",
        HF_BLOCK,
        config(lambda c: c["quantization_config"].update(weight_block_size=[64, 64])),
        file="config.json",
        words=("64", "128"),
    ),
    Case(
        "gptq-tensors",
        DENSE,
        both(
            drop(f"{Q}.weight"),
            put(f"{Q}.qweight", raw("I32", np.ones((8, 128)))),
            put(f"{Q}.g_idx", raw("I32", np.ones(64))),
        ),
        tensor=Q,
        words=("gptq",),
    ),
    Case(
        "awq-tensors",
        DENSE,
        both(
            drop(f"{Q}.weight"),
            put(f"{Q}.qweight", raw("I32", np.ones((64, 16)))),
            put(f"{Q}.qzeros", raw("I32", np.ones((1, 16)))),
        ),
        tensor=Q,
        words=("awq",),
    ),
    Case(
        "bitsandbytes-4bit-tensors",
        DENSE,
        both(
            put(f"{Q}.weight", raw("U8", np.ones((4096, 1)))),
            put(f"{Q}.weight.absmax", ABSMAX),
            put(f"{Q}.weight.quant_state.bitsandbytes__nf4", raw("U8", np.ones(9))),
        ),
        tensor=Q,
        words=("bitsandbytes",),
    ),
    Case(
        "bitsandbytes-int8-tensors",
        DENSE,
        both(put(f"{Q}.weight", raw("I8", np.ones((128, 64)))), put(f"{Q}.SCB", ABSMAX)),
        tensor=Q,
        words=("bitsandbytes",),
    ),
    Case("int8-tensors", FP8, put(f"{Q}.weight", raw("I8", np.ones((128, 64)))), tensor=f"{Q}.weight", words=("int8",)),
    Case(
        "e5m2-tensors",
        FP8,
        put(f"{Q}.weight", raw("F8_E5M2", np.ones((128, 64)))),
        tensor=f"{Q}.weight",
        words=("e5m2",),
    ),
    Case(
        "ct-packed-int-tensors",
        DENSE,
        both(
            drop(f"{Q}.weight"),
            put(f"{Q}.weight_packed", raw("I32", np.ones((128, 8)))),
            put(f"{Q}.weight_scale", raw("BF16", np.ones((128, 1)))),
            put(f"{Q}.weight_shape", raw("I64", [128, 64])),
        ),
        tensor=Q,
        words=("int",),
    ),
    Case(
        "gpt-oss-tensors",
        DENSE,
        both(
            put("model.layers.0.mlp.experts.gate_up_proj_blocks", raw("U8", np.ones((2, 2)))),
            put("model.layers.0.mlp.experts.gate_up_proj_scales", raw("U8", np.ones((2, 2)))),
        ),
        tensor="model.layers.0.mlp.experts.gate_up_proj_blocks",
    ),
    Case(
        "torchao-tensors",
        DENSE,
        both(
            drop(f"{Q}.weight"),
            put(f"{Q}._weight_qdata", raw("F8_E4M3", np.ones((128, 64)))),
            put(f"{Q}._weight_scale", raw("F32", np.ones((128, 1)))),
        ),
        tensor=Q,
        words=("torchao",),
    ),
    Case("nvfp4-svd-tensors", NVFP4, put(f"{Q}.svdquant_lora_a", raw("BF16", np.ones((4, 64)))), tensor=Q, words=("svd",)),
    *(
        Case(
            f"model_type-{kind}",
            DENSE,
            config(lambda c, kind=kind: c.update(model_type=kind)),
            file="config.json",
            words=(kind, "model_type"),
        )
        for kind in ("qwen3_next", "gpt2", "gpt_oss", "model_of_tomorrow")
    ),
    Case("no-model_type", DENSE, config(lambda c: c.pop("model_type")), file="config.json", words=("model_type",)),
    Case(
        "layer-types-of-another-length",
        DENSE,
        config(lambda c: c.update(layer_types=["full_attention"])),
        file="config.json",
        words=("layer_types",),
    ),
    Case("no-hidden-size", DENSE, config(lambda c: c.pop("hidden_size")), file="config.json", words=("hidden_size",)),
    Case(
        "hidden-size-is-text",
        DENSE,
        config(lambda c: c.update(hidden_size="64")),
        file="config.json",
        words=("hidden_size",),
    ),
    Case("quantization-config-is-text", DENSE, config(lambda c: c.update(quantization_config="fp8")), file="config.json"),
    # Nothing in the tensors decides between two configs that disagree on how inputs are quantised.
    Case(
        "two-configs-disagree-on-inputs",
        CT_CHANNEL,
        config(lambda c: c.update(compression_config=_without_inputs(c["quantization_config"]))),
        file="config.json",
        words=("compression_config",),
    ),
    Case(
        "two-producers",
        BLOCK4D,
        config(
            lambda c: c.update(
                quantization_config={
                    "quant_method": "fp8",
                    "activation_scheme": "dynamic",
                    "weight_block_size": [128, 128],
                },
                compression_config=c["quantization_config"],
            )
        ),
        file="config.json",
    ),
]


def _without_inputs(block: dict[str, Any]) -> dict[str, Any]:
    block = json.loads(json.dumps(block))
    block["config_groups"]["group_0"]["input_activations"] = None
    return block


HOSTILE = [
    # Qwen3-Next has this name for rows that are interleaved per key head: not to be taken for plain concatenation.
    Case(
        "interleaved-in_proj_qkvz",
        DENSE,
        both(
            drop(f"{QKV}.weight", "model.layers.0.linear_attn.in_proj_z.weight"),
            put("model.layers.0.linear_attn.in_proj_qkvz.weight", raw("BF16", np.ones((256, 64)))),
        ),
        tensor="model.layers.0.linear_attn.in_proj_qkvz.weight",
        words=("in_proj_qkv and in_proj_z", "Qwen3-Next", "interleaved by key group", "split safely"),
    ),
    Case(
        "interleaved-in_proj_ba",
        DENSE,
        both(
            drop("model.layers.0.linear_attn.in_proj_b.weight", "model.layers.0.linear_attn.in_proj_a.weight"),
            put("model.layers.0.linear_attn.in_proj_ba.weight", raw("BF16", np.ones((8, 64)))),
        ),
        tensor="model.layers.0.linear_attn.in_proj_ba.weight",
        words=("in_proj_b and in_proj_a", "Qwen3-Next"),
    ),
    Case(
        "bias-that-the-family-has-not",
        {"family": "qwen2", "dialect": "modelopt", "scheme": "fp8"},
        put("model.layers.0.self_attn.o_proj.bias", raw("BF16", np.ones(64))),
        tensor="model.layers.0.self_attn.o_proj.bias",
        words=("no bias", "BF16 [64]", "family has no bias here", "same checkpoint"),
    ),
    Case(
        "missing-below-a-wrapper",
        {"family": "qwen3", "dialect": "dense", "scheme": "bf16", "base_layer": "all"},
        drop("model.layers.1.self_attn.v_proj.base_layer.weight"),
        tensor="model.layers.1.self_attn.v_proj.base_layer.weight",
        words=("a weight of [32, 64]", "no such tensor"),
    ),
    Case(
        "channels-last",
        FP8,
        zeros("model.layers.0.linear_attn.conv1d.weight", "BF16", 160, 4, 1),
        tensor="model.layers.0.linear_attn.conv1d.weight",
        words=("[160, 1, 4]", "[160, 4, 1]", "MLX", "original publisher"),
    ),
    Case(
        "regex-that-never-ends",
        CT_FP8,
        config(lambda c: c["quantization_config"]["ignore"].append("re:(([a-z_.0-9])+)+!$")),
        file="config.json",
        words=("pattern",),
    ),
]
CASES = [*HOSTILE, *MISSING, *VALUES, *SHAPES, *FILES, *NAMES, *PRODUCERS]


def snapshot(folder: Path) -> dict[str, Any]:
    """Every path below a folder with its content (pipes and folders by kind)."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else "folder" if p.is_dir() else "other"
        for p in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_refused(case: Case, make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """Exit code 1; each line has all its parts; one line names file, tensor and cause; nothing is written anywhere."""
    built = make(**case.options)
    case.breaks(built.directory, built)
    before = snapshot(tmp_path)
    ran = cli(built.directory, tmp_path / "out")
    assert (ran.code, ran.out) == (1, "")
    lines = ran.err.splitlines()
    assert lines
    assert "Traceback" not in ran.err
    assert [line for line in lines if not LINE.search(line) and not MORE.search(line)] == []
    wanted = [case.file.lower(), case.tensor.lower(), *(word.lower() for word in case.words)]
    assert [line for line in lines if all(word in line.lower() for word in wanted)], ran.err
    assert snapshot(tmp_path) == before


def test_ids_are_unique() -> None:
    """Two rows of one name would hide each other in a report."""
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "options", [FP8, CHANNEL, BLOCK4D, NVFP4, AWQ, MXFP8, KV, CT_NVFP4, HF_E8M0, HF_STATIC, VLM, QWEN3, SHARDED],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)  # fmt: skip
def test_the_unbroken_checkpoint_converts(
    options: dict[str, Any], make: Callable[..., Built], cli: Cli, tmp_path: Path
) -> None:
    """The rows above fail because of what they break, not because of what they start from."""
    ran = cli(make(**options).directory, tmp_path / "out")
    assert ran.code == 0, ran.err


def test_a_process_of_its_own(make: Callable[..., Built], cli_apart: Cli, tmp_path: Path) -> None:
    """The same as above through a real process: exit code, streams, no traceback, nothing left."""
    built = make(**FP8)
    value(f"{QKV}.weight_scale", NAN)(built.directory, built)
    ran = cli_apart(built.directory, tmp_path / "out")
    assert (ran.code, ran.out) == (1, "")
    assert len(ran.err.splitlines()) == 1
    assert f"{QKV}.weight_scale" in ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
sys.argv = ["qconvert", *sys.argv[1:]]
runpy.run_module("convert", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "claim",
    [{"num_hidden_layers": 1 << 31, "layer_types": None}, {"vision_config": {"depth": 1 << 31}, "family": "vlm"}],
    ids=["layers", "vision-blocks"],
)
def test_a_config_cannot_fill_the_memory(
    claim: dict[str, Any], make: Callable[..., Built], cli_apart: Cli, tmp_path: Path
) -> None:
    """Two thousand million layers in the config of a small checkpoint are refused, in 2 GB of memory."""
    built = make(**(VLM if "family" in claim else DENSE))
    edit_json(built.directory / "config.json", lambda c: c.update({k: v for k, v in claim.items() if k != "family"}))
    ran = cli_apart(built.directory, tmp_path / "out", "--dry-run", code=LIMITED)
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert LINE.search(ran.err)


def test_two_dtypes_in_one_group(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """Weights or biases of different dtypes cannot be one tensor: kept apart or refused, never written as garbage."""
    for number, (name, shape) in enumerate({"weight": (64, 64), "bias": (64,)}.items()):
        built = make(name=f"in{number}", **QWEN3, bias=True)
        put(f"model.layers.0.self_attn.q_proj.{name}", raw("F32", np.ones(shape)))(built.directory, built)
        out = tmp_path / f"out{number}"
        if cli(built.directory, out).code == 0:
            convert.verify_conversion(built.directory, out)
            assert read_json(out / "config.json")["unfused"].keys() == {"model.layers.0.self_attn.qkv_proj"}
        else:
            assert not out.exists()


def test_many_problems_are_one_list(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """Every problem of a plan at once: ten lines, then a count; the API has them all."""
    built = make(**NVFP4)

    def change(stored: dict[str, Raw]) -> None:
        for name in [n for n in stored if n.endswith(".weight_scale_2")]:
            del stored[name]

    edit_tensors(built.directory, change)
    count = sum(entry["scheme"] == "nvfp4" for entry in built.modules.values())
    ran = cli(built.directory, tmp_path / "out")
    assert ran.code == 1
    lines = ran.err.splitlines()
    assert len(lines) == 11
    assert MORE.search(lines[-1])
    with pytest.raises(convert.ConvertError) as caught:
        convert.convert_checkpoint(built.directory, tmp_path / "out")
    assert len(caught.value.problems) > max(count, 10)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "tensor", "byte"),
    [(NVFP4, f"{Q}.weight_scale", 0), (CT_NVFP4, f"{Q}.weight_scale", 0)],
    ids=["modelopt", "compressed-tensors"],
)
def test_zero_block_scales_are_legal(
    options: dict[str, Any], tensor: str, byte: int, make: Callable[..., Built], cli: Cli, tmp_path: Path
) -> None:
    """A block of zeros may have the scale 0; the report counts such blocks."""
    built = make(**options)
    for at in (0, 5, -1):
        code(tensor, byte, at)(built.directory, built)
    assert cli(built.directory, tmp_path / "out").code == 0
    assert read_json(tmp_path / "out" / "conversion.json")["zero_block_scales"] == 3
    name = "model.layers.1.self_attn.qkv_proj.weight_scale"
    found, source = read_tensors(tmp_path / "out")[name], read_tensors(built.directory)[tensor]
    assert found.data.startswith(source.data)


def test_no_zero_block_scales(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """The count is 0 when there are none."""
    assert cli(make(**NVFP4).directory, tmp_path / "out").code == 0
    assert read_json(tmp_path / "out" / "conversion.json")["zero_block_scales"] == 0


# --------------------------------------------------------------------------------------------------------- where OUT is


def test_existing_output_is_not_touched(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """Exit code 2 without `--force`; with it, OUT is replaced whole; an empty folder is no obstacle."""
    built, out = make(**FP8), tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("do not lose this")
    before = snapshot(tmp_path)
    ran = cli(built.directory, out)
    assert (ran.code, ran.out) == (2, "")
    assert str(out) in ran.err
    assert "--force" in ran.err
    assert snapshot(tmp_path) == before
    assert cli(built.directory, out, "--force").code == 0
    assert not (out / "precious").exists()
    assert read_tensors(out) == built.canonical
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    (tmp_path / "empty").mkdir()
    assert cli(built.directory, tmp_path / "empty").code == 0


def test_force_does_not_destroy_before_it_can_replace(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """A refused checkpoint leaves the old OUT as it was, even with `--force`."""
    built, out = make(**FP8), tmp_path / "out"
    assert cli(built.directory, out).code == 0
    for breaks in (drop(f"{Q}.weight_scale"), value(f"{QKV}.weight_scale", NAN)):
        broken = build(tmp_path / "broken", **FP8)
        breaks(broken.directory, broken)
        before = snapshot(tmp_path)
        assert cli(broken.directory, out, "--force").code == 1
        assert snapshot(tmp_path) == before


def _link(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(tmp_path / "in")
    return tmp_path / "link"


def _file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("a file")
    return tmp_path / "file"


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
@pytest.mark.parametrize(
    "place",
    [
        pytest.param(lambda t: t / "in", id="equal-to-IN"),
        pytest.param(lambda t: t / "in" / "out", id="inside-IN"),
        pytest.param(lambda t: t / "in" / ".." / "in" / "x" / "y", id="deep-inside-IN"),
        pytest.param(lambda t: t, id="above-IN"),
        pytest.param(_link, id="link-to-IN"),
        pytest.param(lambda t: _link(t) / "out", id="inside-link-to-IN"),
        pytest.param(_file, id="a-file"),
    ],
)
def test_output_in_a_bad_place(
    place: Callable[[Path], Path], force: tuple[str, ...], make: Callable[..., Built], cli: Cli, tmp_path: Path
) -> None:
    """Exit code 2, one line, and nothing is changed: the source least of all."""
    built, out = make(**FP8), place(tmp_path)
    before = snapshot(tmp_path)
    ran = cli(built.directory, out, *force)
    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.splitlines()) == 1
    assert snapshot(tmp_path) == before


def test_no_such_input(cli: Cli, tmp_path: Path) -> None:
    """A path that does not exist, and a file, are the caller's mistake: exit code 2."""
    for path in (tmp_path / "nothing", _file(tmp_path)):
        ran = cli(path, tmp_path / "out")
        assert ran.code == 2
        assert str(path) in ran.err
        assert not (tmp_path / "out").exists()


def test_a_canonical_checkpoint_is_not_a_source(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """Converting twice is refused, and the line says that there is nothing to do."""
    assert cli(make(**FP8).directory, tmp_path / "out").code == 0
    ran = cli(tmp_path / "out", tmp_path / "again")
    assert ran.code == 1
    assert LINE.search(ran.err)
    assert "canonical" in ran.err
    assert not (tmp_path / "again").exists()

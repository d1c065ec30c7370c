"""The 68 hostile inputs: what is expected of each, in one table, with message, exit code, and nothing left behind.

`REFUSED` rows break a checkpoint that converts: exit code 1 (2 where the command itself is at fault), one line that names file,
tensor and cause, no OUT, IN as it was, within `MAX_SECONDS` and `MAX_MEMORY`.  `ACCEPTED` rows convert and verify, and say what
they must in the report.  `ELSEWHERE` are those about a running conversion, and the tests that have them.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import INDEX, Built, build, edit_json, raw, read_json, read_tensors, safetensors_bytes
from conftest import ROOT, Ran
from test_errors import (
    CT_FP8,
    DENSE,
    DOWN,
    FILE,
    FP8,
    LINE,
    MORE,
    NVFP4,
    QKV,
    SHARDED,
    Breaks,
    Q,
    both,
    code,
    config,
    content,
    drop,
    header,
    header_text,
    index,
    orphan_in_shard,
    put,
    second_shard_repeats,
    snapshot,
    tensors,
    to_folder,
    to_link,
    value,
    zeros,
)  # fmt: skip

import convert.dialects.base
from convert import limits

Cli = Callable[..., Ran]
Check = Callable[[Path, dict[str, Any], Built], object]
MAX_SECONDS = 5.0
MAX_MEMORY = 500 << 20
NORM = "model.norm.weight"
MLP = "model.layers.0.mlp"
MIXED = FP8 | {"scheme": "mixed"}
KV_MIXED = MIXED | {"mtp": True}
MOE: dict[str, Any] = {"family": "qwen3_5_moe", "dialect": "dense", "scheme": "bf16"}


@dataclass(frozen=True)
class Refused:
    """Case `number`, variant `id`: `breaks` a checkpoint built with `options`, and one line has `file`, `tensor`, `words`."""

    number: int
    id: str
    options: dict[str, Any]
    breaks: Breaks
    words: tuple[str, ...] = ()
    file: str = FILE
    tensor: str = ""
    code: int = 1


@dataclass(frozen=True)
class Accepted:
    """Case `number`, variant `id`: converts and verifies although `breaks`; then `check` (OUT, its report, what was built)."""

    number: int
    id: str
    options: dict[str, Any]
    breaks: Breaks
    check: Check = field(default=lambda out, report, built: None)


def head(text: bytes, data: bytes = b"") -> Breaks:
    """Replace the file by one with this header and data."""
    return content(lambda b: struct.pack("<Q", len(text)) + text + data)


def length(stated: int, size: int | None = None) -> Breaks:
    """State another length of the header, in a file of `size` bytes."""
    return content(lambda b: (struct.pack("<Q", stated) + b[8:])[:size])


def named(name: str) -> Breaks:
    """Add a tensor of a hostile name."""
    return put(name, raw("BF16", np.ones(2)))


def entry(**fields: Any) -> Breaks:
    """Change the header's entry of the norm."""
    return header(lambda h: h[NORM].update(fields))


def twice(text: str) -> Breaks:
    """Put a first, other entry of the norm before its own."""
    return header_text(lambda t: t.replace(f'"{NORM}":', f'"{NORM}":{text},"{NORM}":'))


def again(folder: Path, built: Built) -> None:
    """State the norm twice with the same content."""
    path = folder / FILE
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    same = json.dumps(json.loads(data[8 : 8 + size])[NORM])
    twice(same)(folder, built)


def to_shard(path: str) -> Breaks:
    """Let the index say that the head is in another file."""
    return index(lambda m: m.update({"lm_head.weight": path}))


def kind(make: Callable[[Path], object]) -> Breaks:
    """Put something that is no file in the place of the weights."""

    def breaks(folder: Path, built: Built) -> None:
        (folder / FILE).unlink()
        make(folder / FILE)

    return breaks


def a_socket(path: Path) -> None:
    """A socket: reading it would fail, or wait."""
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(path.parent)  # its path may have 108 bytes
        try:
            server.bind(path.name)
        finally:
            os.chdir(before)


def text(file: str, content_: str | bytes) -> Breaks:
    """Write a file."""
    data = content_.encode() if isinstance(content_, str) else content_

    def breaks(folder: Path, built: Built) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)

    return breaks


def side_link(target: str) -> Breaks:
    """A side file that is a link out of the checkpoint to a secret beside it."""

    def breaks(folder: Path, built: Built) -> None:
        (folder.parent / "secret.txt").write_text("a secret")
        (folder / "notes.txt").symlink_to(target.format(outside=folder.parent))

    return breaks


def two_names(second: str, shard: int | None) -> Breaks:
    """Store the norm under a second name that means the same, in the same or in another shard."""

    def breaks(folder: Path, built: Built) -> None:
        weight = read_tensors(folder)[NORM]
        if shard is None:
            put(second, weight)(folder, built)
            return
        home = read_json(folder / INDEX)["weight_map"][NORM]
        other = next(p for p in sorted(folder.glob("*.safetensors")) if p.name != home)
        from build import read_file

        other.write_bytes(safetensors_bytes(read_file(other) | {second: weight}))
        edit_json(folder / INDEX, lambda i: i["weight_map"].update({second: other.name}))

    return breaks


def sparse_config(folder: Path, built: Built) -> None:
    """A config.json of 101 MB, a hole in a sparse file."""
    with (folder / "config.json").open("r+b") as stream:
        stream.truncate(101_000_000)


def huge_metadata(folder: Path, built: Built) -> None:
    """50 MB of text in the metadata."""
    path = folder / FILE
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    entries = data[8 : 8 + size].strip()
    metadata = b'{"__metadata__":{"x":"' + b"m" * 50_000_000 + b'"},'
    text_ = metadata + entries[1:].replace(b'"__metadata__":{"format":"pt"},', b"")
    path.write_bytes(struct.pack("<Q", len(text_)) + text_ + data[8 + size :])


def many_tensors(count: int) -> Breaks:
    """That many tensors without elements, ahead of the others."""

    def breaks(folder: Path, built: Built) -> None:
        path = folder / FILE
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
        text_ = b"{" + "".join(f'"model.x{i}":{empty}' for i in range(count)).encode() + data[8 : 8 + size].strip()[1:]
        path.write_bytes(struct.pack("<Q", len(text_)) + text_ + data[8 + size :])

    return breaks


def nothing(folder: Path, built: Built) -> None:
    """Leave the checkpoint as it is: its options are the case."""


def quantisation(change: Callable[[Any], object]) -> Breaks:
    """Change the quantization config of config.json."""
    return config(lambda c: change(c["quantization_config"]))


NAN, INF = float("nan"), float("inf")
ROUTERLESS = "model.layers.0.mlp.experts.gate_up_proj"

REFUSED = [
    Refused(1, "empty-file", FP8, content(lambda b: b""), ("0 bytes",)),
    Refused(2, "header-of-2**63-bytes", FP8, length(1 << 63), (str(1 << 63),)),
    Refused(2, "header-of-2**64-1-bytes", FP8, length((1 << 64) - 1), (str((1 << 64) - 1),)),
    Refused(3, "header-of-101-MB-in-10-bytes", FP8, length(101_000_000, 10), ("10 bytes", "101000000")),
    Refused(4, "header-longer-than-file", FP8, content(lambda b: struct.pack("<Q", len(b)) + b[8:]), ("header length",)),
    Refused(5, "header-not-json", FP8, head(b"{'a': 1}"), ("valid json",)),
    Refused(5, "header-not-utf-8", FP8, head(b'{"\xff":1}'), ("utf-8",)),
    Refused(5, "header-an-array", FP8, head(b"[1, 2]"), ("begins with {",)),
    Refused(5, "header-begins-with-a-space", FP8, header_text(lambda t: " " + t), ("begins with {",)),
    Refused(5, "header-with-infinity", FP8, header(lambda h: h[NORM].update(x=INF)), ("valid json",)),
    Refused(6, "nested-brackets-in-header", FP8, head(b'{"a":' + b"[" * 200_000), ("nested",)),
    Refused(6, "nested-objects-in-header", FP8, head(b'{"a":' * 200_000), ("nested",)),
    Refused(6, "nested-brackets-in-config", FP8, config(lambda c: c.update(x="DEEP")), ("nested",), "config.json"),
    Refused(7, "key-twice-with-another-shape", FP8, twice('{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}'),
            ("duplicate", NORM)),
    Refused(8, "key-twice-with-the-same-content", FP8, again, ("duplicate", NORM)),
    Refused(9, "overlapping-ranges", FP8, header(lambda h: h[NORM]["data_offsets"].__setitem__(0, 0)), ("bytes for",),
            tensor=NORM),
    Refused(9, "overlapping-ranges-that-fit", FP8, header(lambda h: h.update(extra={
        "dtype": "U8", "shape": [4], "data_offsets": [2, 6]})), ("overlap",)),
    Refused(10, "two-names-for-one-range", FP8, header(lambda h: h.update(alias=dict(h[NORM]))), ("overlap",)),
    Refused(11, "gap", FP8, header(lambda h: h.pop(NORM)), ("gap",)),
    Refused(12, "trailing-bytes", FP8, content(lambda b: b + b"PK\x03\x04"), ("trailing",)),
    Refused(13, "data-too-short", FP8, content(lambda b: b[:-1]), ("truncated", "weight")),
    Refused(14, "end-before-begin", FP8, header(lambda h: h[NORM]["data_offsets"].reverse()), tensor=NORM),
    Refused(15, "negative-shape", FP8, entry(shape=[-64]), tensor=NORM),
    Refused(15, "overflowing-shape", FP8, entry(shape=[2**62, 2**62]), tensor=NORM),
    Refused(16, "shape-does-not-fit-bytes", FP8, entry(shape=[63]), ("126 bytes",), tensor=NORM),
    Refused(17, "unknown-dtype", FP8, entry(dtype="F99"), ("f99", "f8_e4m3"), tensor=NORM),
    Refused(18, "f4", FP8, entry(dtype="F4"), ("'f4'", "f8_e8m0"), tensor=NORM),
    Refused(18, "f6", FP8, entry(dtype="F6_E3M2"), ("'f6_e3m2'",), tensor=NORM),
    Refused(19, "metadata-with-a-number", FP8, header(lambda h: h.update(__metadata__={"a": 1})), ("text",),
            tensor="__metadata__"),
    Refused(19, "metadata-a-list", FP8, header(lambda h: h.update(__metadata__=[])), ("text",), tensor="__metadata__"),
    Refused(20, "metadata-of-50-MB", FP8, huge_metadata, ("1000000",), tensor="__metadata__"),
    Refused(21, "empty-name", FP8, named(""), ("a plain tensor name",)),
    Refused(21, "name-with-nul", FP8, named("model.\0x"), ("\\x00",)),
    Refused(21, "name-with-newline", FP8, named("model.a\nqconvert: all is well"), ("\\n",)),
    Refused(21, "name-with-ansi-escape", FP8, named("model.\x1b[2Jx"), ("\\x1b",)),
    Refused(21, "name-with-osc-title", FP8, named("model.\x1b]0;x\x07"), ("\\x07",)),
    Refused(21, "name-with-right-to-left", FP8, named("model.\u202ex"), ("\\u202e",)),
    Refused(22, "name-a-path-out", FP8, named("../../x"), tensor="../../x"),
    Refused(22, "name-an-absolute-path", FP8, named("/etc/x"), tensor="/etc/x"),
    Refused(23, "name-of-1-MB", FP8, named("model." + "x" * 1_000_000), ("overlong", "1000006 characters")),
    Refused(24, "300000-empty-tensors", FP8, many_tensors(300_000), ("unknown",)),
    Refused(25, "index-leads-out", SHARDED, to_shard("../other.safetensors"), ("inside the checkpoint",), INDEX,
            "lm_head.weight"),
    Refused(26, "index-absolute", SHARDED, to_shard("/etc/passwd"), ("inside the checkpoint",), INDEX, "lm_head.weight"),
    *(
        Refused(27, f"index-{name}", SHARDED, to_shard(path), ("inside the checkpoint",), INDEX, "lm_head.weight")
        for name, path in (
            ("backslash", "..\\x.safetensors"), ("drive", "C:x.safetensors"), ("home", "~x.safetensors"),
            ("url", "https://x/y.safetensors"), ("nul", "x\0.safetensors"), ("escape", "\x1b[2Jx.safetensors"),
            ("dots", ".."), ("empty", ""), ("overlong", "x" * 5000), ("config", "config.json"),
        )
    ),
    Refused(28, "shard-a-link-out", FP8, to_link(outside=True), ("link",)),
    Refused(28, "config-a-link-out", FP8, lambda folder, built: (
        (folder / "config.json").rename(folder.parent / "elsewhere.json"),
        (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")), ("link",), "config.json"),
    Refused(28, "index-a-link-out", SHARDED, lambda folder, built: (
        (folder / INDEX).rename(folder.parent / "elsewhere.json"),
        (folder / INDEX).symlink_to(folder.parent / "elsewhere.json")), ("link",), INDEX),
    Refused(31, "shard-a-pipe", FP8, kind(os.mkfifo), ("a regular file",)),
    Refused(31, "shard-a-socket", FP8, kind(a_socket), ("a regular file",)),
    Refused(31, "shard-a-folder", FP8, to_folder, ("a regular file",)),
    Refused(31, "shard-a-link-to-a-device", FP8, kind(lambda p: p.symlink_to("/dev/zero")), ("link",)),
    Refused(31, "config-a-pipe", FP8, lambda folder, built: (
        (folder / "config.json").unlink(), os.mkfifo(folder / "config.json")), ("a regular file",), "config.json"),
    Refused(32, "index-names-a-tensor-that-no-shard-has", SHARDED,
            index(lambda m: m.update({"model.extra.weight": m["lm_head.weight"]})), ("index", "in no file"), "model-0000",
            "model.extra.weight"),
    Refused(33, "tensor-that-the-index-has-not", SHARDED, orphan_in_shard, ("index",), "model-0000", NORM),
    Refused(35, "tensor-in-two-shards", SHARDED, second_shard_repeats, ("model-00001-of-00003",),
            "model-00002-of-00003.safetensors", "lm_head.weight"),
    Refused(36, "index-key-twice", SHARDED, content(lambda b: b.replace(
        b'"weight_map": {', b'"weight_map": {"lm_head.weight": "model-00001-of-00003.safetensors",'), INDEX),
            ("duplicate", "lm_head.weight"), INDEX),
    Refused(37, "two-names-for-one-tensor", DENSE, two_names("model.language_model.norm.weight", None),
            ("two", "model.language_model.norm.weight", NORM)),
    Refused(38, "two-names-in-two-shards", DENSE | {"shards": 3}, two_names("model.language_model.norm.weight", 3),
            ("two", "model.language_model.norm.weight", NORM), "model-0000"),
    Refused(39, "nan-scale", FP8, value(f"{QKV}.weight_scale", NAN), ("finite", "nan"), tensor=f"{QKV}.weight_scale"),
    *(
        Refused(40, f"scale-{number}", FP8, value(f"{QKV}.weight_scale", number), ("finite",), tensor=f"{QKV}.weight_scale")
        for number in (INF, -INF, -0.5, 0.0)
    ),
    Refused(41, "block-scale-7f", NVFP4, code(f"{Q}.weight_scale", 0x7F), ("nan",), tensor=f"{Q}.weight_scale"),
    Refused(41, "block-scale-ff", NVFP4, code(f"{Q}.weight_scale", 0xFF, 3), ("nan",), tensor=f"{Q}.weight_scale"),
    Refused(42, "two-scales-for-three-partitions", FP8, zeros(f"{QKV}.weight_scale", "F32", 2), ("[2]",),
            tensor=f"{QKV}.weight_scale"),
    Refused(44, "half-the-block-scales", NVFP4, zeros(f"{DOWN}.weight_scale", "F8_E4M3", 64, 2), tensor=f"{DOWN}.weight_scale"),
    Refused(44, "twice-the-block-scales", NVFP4, zeros(f"{DOWN}.weight_scale", "F8_E4M3", 64, 10),
            tensor=f"{DOWN}.weight_scale"),
    Refused(45, "odd-K", NVFP4, both(zeros(f"{DOWN}.weight", "U8", 64, 33), config(lambda c: c.update(intermediate_size=65)),
                                     zeros(f"{DOWN}.weight_scale", "F8_E4M3", 64, 5)), tensor=DOWN),
    Refused(46, "fp8-weight-without-scale", FP8, drop(f"{Q}.weight_scale"), tensor=f"{Q}.weight_scale"),
    Refused(46, "fp8-weight-without-scale-nor-config", FP8, both(drop(f"{Q}.weight_scale", f"{Q}.input_scale"),
                                                                config(lambda c: c.pop("quantization_config"))), tensor=Q),
    *(
        Refused(50, f"config-{name}", FP8, breaks, words, "config.json")
        for name, breaks, words in (
            ("with-nan", content(lambda b: b.replace(b"1e-06", b"NaN"), "config.json"), ("nan",)),
            ("key-twice", content(lambda b: b.replace(b"{", b'{"head_dim": 16,', 1), "config.json"), ("duplicate", "head_dim")),
            ("with-bom", content(lambda b: b"\xef\xbb\xbf" + b, "config.json"), ("bom",)),
            ("of-101-MB", sparse_config, ("100000000",)),
            ("with-5000-digits", content(lambda b: b.replace(b"{", b'{"x": ' + b"9" * 5000 + b",", 1), "config.json"),
             ("json",)),
        )
    ),
    Refused(51, "regex-that-never-ends", CT_FP8, quantisation(lambda q: q["ignore"].append("re:(([a-z_.0-9])+)+!$")),
            ("pattern",), "config.json"),
    Refused(51, "regexes-that-are-slow-together", CT_FP8, quantisation(lambda q: q["ignore"].extend(
        f"re:{'.*' * 5}x{number}$" for number in range(3000))), ("pattern",), "config.json"),
    *(
        Refused(51, f"regex-{name}", CT_FP8, quantisation(lambda q, regex=regex: q["ignore"].append(f"re:{regex}")),
                words, "config.json")
        for name, regex, words in (
            ("that-is-none", "(", ("regular expression",)), ("with-too-many-groups", "(" * 9000 + ")" * 9000, ("regular",)),
            ("with-a-huge-count", "a{99999999999999999999}", ("regular",)), ("of-1-MB", "x|" * 500_000, ("100000",)),
        )
    ),
    Refused(51, "wildcards-that-are-slow-together", FP8, quantisation(lambda q: q["ignore"].extend(
        f"*m*o*d*e*l*{number}x" for number in range(20_000))), ("pattern",), "config.json"),
    Refused(51, "wildcard-of-1-MB", FP8, quantisation(lambda q: q["ignore"].append("*a" * 500_000)), ("100000",),
            "config.json"),
    Refused(51, "wildcards-with-schemes-of-their-own", FP8, config(lambda c: c.update(quantization_config={
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            f"model.x{number}*": {"quant_algo": ("FP8", "W4A16_NVFP4")[number % 2]} for number in range(2000)}})),
            ("1000 groups", "2000"), "config.json"),
    Refused(52, "pickles-only", FP8, both(lambda folder, built: (folder / FILE).rename(folder / "pytorch_model.bin"), nothing),
            ("pickle", "safetensors"), "pytorch_model.bin"),
    Refused(65, "unknown-model-type", DENSE, config(lambda c: c.update(model_type="model_of_tomorrow")),
            ("model_of_tomorrow", "model_type"), "config.json"),
    Refused(65, "unknown-suffix", FP8, put(f"{Q}.weight_scale_3", raw("F32", 0.5)), tensor=f"{Q}.weight_scale_3"),
]  # fmt: skip


def contradicts(*words: str) -> Check:
    """A line of the report's contradictions has these words."""

    def check(out: Path, report: dict[str, Any], built: Built) -> None:
        lines = report["contradictions"]
        assert [line for line in lines if all(word in line for word in words)], lines

    return check


def skipped(*names: str) -> Check:
    """These files are not in OUT, and the report says why."""

    def check(out: Path, report: dict[str, Any], built: Built) -> None:
        for name in names:
            assert not os.path.lexists(out / name)
            assert report["skipped_files"][name]
        assert not [p for p in out.rglob("*") if p.is_file() and b"a secret" in p.read_bytes()]

    return check


def carried(*names: str) -> Check:
    """These files are in OUT byte for byte, and hashed."""
    import hashlib

    def check(out: Path, report: dict[str, Any], built: Built) -> None:
        hashes = {e["file"]: e["sha256"] for e in report["outputs"] if "sha256" in e}
        for name in names:
            data = (built.directory / name).read_bytes()
            assert (out / name).read_bytes() == data
            assert hashes[name] == hashlib.sha256(data).hexdigest()

    return check


def sliced(out: Path, report: dict[str, Any], built: Built) -> None:
    """The three numbers of the vector are the first three partitions."""
    scale = read_tensors(out)["model.layers.0.linear_attn.in_proj_qkvz.weight_scale"].floats()
    assert scale[:3].tolist() == [1.0, 2.0, 4.0]


def is_zero(name: str) -> Check:
    """That scale is 0 in OUT, and counted."""

    def check(out: Path, report: dict[str, Any], built: Built) -> None:
        assert report["zero_block_scales"] == 1

    return check


def untouched(out: Path, report: dict[str, Any], built: Built) -> None:
    """Block scales of powers of two are the bytes of the source."""
    found, stored = read_tensors(out), read_tensors(built.directory)
    for name in (f"{MLP}.down_proj.weight_scale",):
        assert found[name].data == stored[name].data


def separate_head(out: Path, report: dict[str, Any], built: Built) -> None:
    """The quantised head is kept, and the flag put right."""
    assert read_json(out / "config.json")["architecture"]["head"] == "separate"
    assert "lm_head.weight" in read_tensors(out)
    contradicts("tie_word_embeddings")(out, report, built)


def head_stored(out: Path, report: dict[str, Any], built: Built) -> None:
    """The stale file is not carried over; the report has the difference."""
    skipped("hf_quant_config.json")(out, report, built)
    contradicts("hf_quant_config.json")(out, report, built)


def no_code_runs(folder: Path, built: Built) -> None:
    """Files that would leave a mark if they were imported."""
    mark = folder.parent / "mark"
    for name in ("modeling_x.py", "torch.py", "json.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')")
    edit_json(folder / "config.json", lambda c: c.update(auto_map={"AutoModel": "modeling_x.X"}, trust_remote_code=True))


def code_stays(out: Path, report: dict[str, Any], built: Built) -> None:
    """No code in OUT, and none has run."""
    skipped("modeling_x.py", "torch.py", "json.py")(out, report, built)
    assert not (out.parent / "mark").exists()


ACCEPTED = [
    Accepted(18, "e8m0-block-scales", {"family": "qwen3_5", "dialect": "modelopt", "scheme": "mxfp8"}, nothing, untouched),
    Accepted(24, "empty-tensor-padding", DENSE, header_text(lambda t: t.rstrip() + " " * 4096)),
    Accepted(28, "link-inside", DENSE, lambda folder, built: (
        (folder / FILE).rename(folder / "weights.bin0"), (folder / FILE).symlink_to("weights.bin0"))),
    Accepted(29, "side-file-a-link-to-a-secret", FP8, side_link("{outside}/secret.txt"), skipped("notes.txt")),
    Accepted(29, "side-file-a-relative-link-to-a-secret", FP8, side_link("../secret.txt"), skipped("notes.txt")),
    Accepted(29, "side-file-with-an-escape-in-its-name", FP8, text("a\x1b[2Jb.txt", "x")),
    Accepted(30, "folder-loop", FP8, lambda folder, built: (folder / "loop").symlink_to(folder, target_is_directory=True)),
    Accepted(31, "side-file-a-pipe", FP8, lambda folder, built: os.mkfifo(folder / "pipe.txt"), skipped("pipe.txt")),
    Accepted(31, "side-file-a-link-to-a-device", FP8, lambda folder, built: (folder / "zero.txt").symlink_to("/dev/zero"),
             skipped("zero.txt")),
    Accepted(34, "shard-that-the-index-has-not", SHARDED, text("stray.safetensors", safetensors_bytes({})),
             skipped("stray.safetensors")),
    Accepted(40, "zero-block-scale", NVFP4, code(f"{Q}.weight_scale", 0, 0), is_zero(f"{Q}.weight_scale")),
    Accepted(40, "subnormal-scale", FP8, value(f"{Q}.weight_scale", 1e-40)),
    Accepted(43, "three-scales-for-in_proj_qkv", FP8, put(f"{QKV}.weight_scale", raw("F32", [1.0, 2.0, 4.0])), sliced),
    Accepted(47, "excluded-but-quantised", FP8, quantisation(lambda q: q["ignore"].append("model.layers.0.mlp*")),
             contradicts("model.layers.0.mlp")),
    Accepted(48, "quantised-by-config-alone", DENSE, config(lambda c: c.update(quantization_config={
        "quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]})), contradicts("FP8")),
    Accepted(49, "two-configs-disagree", NVFP4 | {"form": "both", "family": "qwen3"},
             config(lambda q: q["quantization"].update(quant_algo="FP8"), "hf_quant_config.json"), head_stored),
    Accepted(52, "pickles-beside", FP8, both(text("pytorch_model.bin", b"\x80\x04a secret"), text("x.pt", b""),
                                             text("y.pkl", b"")),
             skipped("pytorch_model.bin", "x.pt", "y.pkl")),
    Accepted(53, "code-beside", FP8, no_code_runs, code_stays),
    Accepted(54, "side-files", FP8, both(text("chat_template.jinja", "{{ x }}\r\n"), text("LICENSE", "l"), text("NOTICE", "n"),
                                         text("tokenizer.json", b"{}")),
             carried("chat_template.jinja", "LICENSE", "NOTICE", "tokenizer.json")),
    Accepted(67, "mtp-declared-but-absent", FP8 | {"mtp": True}, tensors(lambda stored: [
        stored.pop(n) for n in list(stored) if n.startswith("mtp.")]), contradicts("mtp")),
    Accepted(67, "mtp-stored-but-not-declared", FP8 | {"mtp": True}, config(lambda c: c.pop("mtp_num_hidden_layers")),
             contradicts("mtp")),
    Accepted(68, "tied-flag-beside-a-quantised-head", MIXED, config(lambda c: c.update(tie_word_embeddings=True)),
             separate_head),
]  # fmt: skip

# About a conversion while it runs, or about paths: the tests that have them, `file::function`.
ELSEWHERE = {
    55: ("test_errors.py::test_existing_output_is_not_touched",
         "test_errors.py::test_force_does_not_destroy_before_it_can_replace"),
    56: ("test_errors.py::test_output_in_a_bad_place", "test_hostile.py::test_out_of_hard_links_to_in"),
    57: ("test_durability.py::test_killed_at_random_moments", "test_durability.py::test_resume"),
    58: ("test_durability.py::test_signals_leave_a_hint",),
    59: ("test_durability.py::test_full_disk", "test_durability.py::test_no_room", "test_faults.py::test_a_call_fails"),
    60: ("test_durability.py::test_file_size_limit", "test_durability.py::test_read_error",
         "test_durability.py::test_read_only_target", "test_faults.py::test_a_call_fails"),
    61: ("test_durability.py::test_source_that_changes", "test_durability.py::test_source_that_shrinks"),
    62: ("test_durability.py::test_order_of_writes_and_syncs", "test_power_loss.py::test_what_is_relied_on_is_on_disk"),
    63: ("test_durability.py::test_second_writer_is_refused", "test_durability.py::test_lock_goes_with_its_process"),
    64: ("test_errors.py::test_a_canonical_checkpoint_is_not_a_source",
         "test_durability.py::test_report_is_the_same_for_the_same_input"),
    66: ("test_experts.py::test_a_square_down_projection",),
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any], Path], Built]:
    """Build each kind of checkpoint once; a test gets a copy."""
    kept: dict[str, Built] = {}
    home = tmp_path_factory.mktemp("hostile")

    def prepare(options: dict[str, Any], folder: Path) -> Built:
        from dataclasses import replace

        key = repr(options)
        if key not in kept:
            kept[key] = build(home / str(len(kept)), **options)
        shutil.copytree(kept[key].directory, folder)
        return replace(kept[key], directory=folder)

    return prepare


def peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def quickly(cli: Cli, *args: object) -> Ran:
    """Run a command within the bounds of time and memory; what it says has no control characters."""
    start, before = time.process_time(), peak()
    ran = cli(*args)
    assert time.process_time() - start < MAX_SECONDS
    assert peak() - before < MAX_MEMORY
    for line in (ran.out + ran.err).split("\n"):
        assert line.isprintable(), line
    assert "Traceback" not in ran.err
    return ran


@pytest.mark.parametrize("case", REFUSED, ids=[f"{c.number}-{c.id}" for c in REFUSED])
def test_refused(
    case: Refused, prepared: Callable[..., Built], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by every command that reads a source, in words, leaving nothing; IN keeps every byte."""
    built = prepared(case.options, tmp_path / "in")
    case.breaks(built.directory, built)
    if case.id == "nested-brackets-in-config":
        content(lambda b: b.replace(b'"DEEP"', b"[" * 200_000 + b"]" * 200_000), "config.json")(built.directory, built)
    if case.number == 51:  # the same with less patience
        monkeypatch.setattr(convert.dialects.base, "MAX_REGEXES_S", 0.5)
    before = snapshot(tmp_path)
    ran = quickly(cli, built.directory, tmp_path / "out")
    assert (ran.code, ran.out) == (case.code, "")
    lines = ran.err.splitlines()
    assert [line for line in lines if not LINE.search(line) and not MORE.search(line)] == []
    wanted = [case.file.lower(), case.tensor.lower(), *(word.lower() for word in case.words)]
    assert [line for line in lines if all(word in line.lower() for word in wanted)], ran.err
    assert all(len(line) < 2000 for line in lines)
    assert snapshot(tmp_path) == before
    if case.number not in (24, 39, 40, 41, 51):  # values are read by a conversion only
        assert quickly(cli, "inspect", built.directory).code == case.code


@pytest.mark.parametrize("case", ACCEPTED, ids=[f"{c.number}-{c.id}" for c in ACCEPTED])
def test_accepted(case: Accepted, prepared: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """Converted exactly, with what a user must know in the report; IN keeps every byte."""
    built = prepared(case.options, tmp_path / "in")
    case.breaks(built.directory, built)
    before, out = snapshot(built.directory), tmp_path / "out"
    for args in (("inspect", built.directory), (built.directory, out, "--dry-run"), (built.directory, out, "--verify")):
        ran = quickly(cli, *args)
        assert ran.code == 0, ran.err
    assert quickly(cli, "verify", out).code == 0
    assert not [p for p in out.rglob("*") if p.is_symlink()]
    case.check(out, read_json(out / "conversion.json"), built)
    assert snapshot(built.directory) == before


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [("(a+)+$", True), ("(([a-z_.0-9])+)+!$", True), (".*" * 5 + "x", True), ("(?:.*a|b)*$", True),
     (".*mlp.*(gate|up)_proj$", False),
     (r"(?:.*\.)?layers\.\d+\.mlp\..*", False), ("(?!.*visual).*q_proj", False)],
)  # fmt: skip
def test_regexes_in_other_threads(
    pattern: str, refused: bool, prepared: Callable[..., Built], tmp_path: Path
) -> None:
    """51: a thread that is not the main one cannot be interrupted, so what may never end is refused before it is tried."""
    built = prepared(CT_FP8, tmp_path / "in")
    quantisation(lambda q: q["ignore"].append(f"re:{pattern}"))(built.directory, built)
    with ThreadPoolExecutor(1) as pool:
        planned = pool.submit(convert.plan_conversion, built.directory)
        assert isinstance(planned.exception(), convert.ConvertError) == refused


def test_many_patterns_in_other_threads(
    prepared: Callable[..., Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """51: there the time of all patterns together is limited between matches."""
    built = prepared(FP8, tmp_path / "in")
    quantisation(lambda q: q["ignore"].extend(f"*m*o*d*e*l*{number}x" for number in range(20_000)))(built.directory, built)
    monkeypatch.setattr(convert.dialects.base, "MAX_REGEXES_S", 0.2)
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(convert.plan_conversion, built.directory).exception()
    assert isinstance(error, convert.ConvertError)
    assert "patterns that match within 0.2 s" in str(error)


def test_out_of_hard_links_to_in(prepared: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """56: an OUT whose files are those of IN is refused, and with `--force` replaced without a byte of IN changing."""
    built, out = prepared(FP8, tmp_path / "in"), tmp_path / "out"
    shutil.copytree(built.directory, out, copy_function=os.link)
    before = snapshot(tmp_path)
    assert quickly(cli, built.directory, out).code == 2
    assert snapshot(tmp_path) == before
    assert quickly(cli, built.directory, out, "--force").code == 0
    assert snapshot(built.directory) == {k.removeprefix("in/"): v for k, v in before.items() if k.startswith("in/")}
    assert quickly(cli, "verify", built.directory, out).code == 0


def test_hub_cache(prepared: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """28: links from snapshots/<revision> into blobs/ of the same repository are followed, those into another one are not."""
    built = prepared(FP8, tmp_path / "plain")
    for repository in ("models--a--b", "models--c--d"):
        (tmp_path / repository / "blobs").mkdir(parents=True)
    snapshot_ = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot_.mkdir(parents=True)
    for file in built.directory.iterdir():
        for repository in ("models--a--b", "models--c--d"):
            shutil.copyfile(file, tmp_path / repository / "blobs" / file.name)
        (snapshot_ / file.name).symlink_to(f"../../blobs/{file.name}")
    assert quickly(cli, snapshot_, tmp_path / "out", "--verify").code == 0
    (snapshot_ / FILE).unlink()
    (snapshot_ / FILE).symlink_to(f"../../../models--c--d/blobs/{FILE}")
    ran = quickly(cli, snapshot_, tmp_path / "other")
    assert ran.code == 1
    assert "link that leaves" in ran.err
    assert not (tmp_path / "other").exists()


def test_limits_are_documented() -> None:
    """The page has every limit with its value, and no other."""
    page = (ROOT / "docs" / "hostile.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(MAX_\w+)` \| ([\d.]+) \|", page, re.MULTILINE))
    assert table == {name: str(value) for name, value in vars(limits).items() if name.startswith("MAX_")}


def test_every_number_has_a_row() -> None:
    """All 68 are here, those about a running conversion by the name of their test."""
    here = {c.number for c in REFUSED} | {c.number for c in ACCEPTED}
    assert here | ELSEWHERE.keys() == set(range(1, 69))
    for names in ELSEWHERE.values():
        for name in names:
            file, _, function = name.partition("::")
            assert f"def {function}(" in (ROOT / "tests" / file).read_text(), name

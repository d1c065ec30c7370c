"""Fuzzing in bounded time: the corpus, what was once found, and some hundred mutations of each kind.

`python tests/fuzz.py` runs the same without end.  `tests/corpus` holds small files: `good-*` must be accepted, `bad-*` refused.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
from build import build, edit_json
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert.limits
from convert.strict_json import parse_json

CORPUS = sorted(fuzz.CORPUS.glob("*.safetensors"))
SHARED = HealthCheck.function_scoped_fixture
FUZZED = settings(max_examples=300, deadline=None, database=None, suppress_health_check=[SHARED, HealthCheck.too_slow])


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.stem)
def test_corpus(path: Path, tmp_path: Path) -> None:
    """Each file is accepted or refused as its name says, by the converter, the runtime and the library alike."""
    assert fuzz.check_header(tmp_path, path.read_bytes()) == path.name.startswith("good")


@FUZZED
@given(st.randoms(use_true_random=False), st.sampled_from(CORPUS))
def test_mutated_headers(tmp_path: Path, rng: random.Random, path: Path) -> None:
    """Damage of any kind: accepted only where the library accepts it, as the same tensors; else refused in words."""
    fuzz.check_header(tmp_path, fuzz.mutate_header(rng, path.read_bytes()))


SIZES = {"F32": 4, "BF16": 2, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I64": 8, "BOOL": 1}
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20).filter(
    lambda name: name.isprintable() and name != "__metadata__" and not any(part in name for part in ("/", "\\", ".."))
)
TEXT = st.text(st.characters(codec="utf-8"), max_size=9)
ENTRIES = st.tuples(st.sampled_from(sorted(SIZES)), st.lists(st.integers(0, 4), max_size=4))


def file_of(tensors: list[tuple[str, tuple[str, list[int]]]], metadata: dict[str, str] | None, padding: int) -> bytes:
    """A safetensors file of tensors of zeros, in this order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape) in tensors:
        size = SIZES[dtype]
        for number in shape:
            size *= number
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, ensure_ascii=False).encode() + b" " * padding
    return struct.pack("<Q", len(text)) + text + bytes(position)


@FUZZED
@given(
    st.lists(st.tuples(NAMES, ENTRIES), max_size=5, unique_by=lambda item: item[0]),
    st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
    st.integers(0, 9),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_sound_headers(
    tmp_path: Path, tensors: list[tuple[str, tuple[str, list[int]]]], metadata: dict[str, str] | None, padding: int,
    rng: random.Random,
) -> None:  # fmt: skip
    """Whatever the names, dtypes, sizes and metadata: a sound file is accepted; in every order of its entries, too."""
    data = file_of(tensors, metadata, padding)
    assert fuzz.check_header(tmp_path, data)
    (size,) = struct.unpack("<Q", data[:8])
    entries = list(json.loads(data[8 : 8 + size]).items())
    rng.shuffle(entries)
    text = json.dumps(dict(entries)).encode()
    assert fuzz.check_header(tmp_path, struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(("target", "count"), [("headers", 1000), ("source", 120), ("canonical", 60), ("network", 100)])
def test_a_while_of_fuzzing(target: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first inputs of the long run: every command answers in words and in time."""
    monkeypatch.setattr(fuzz, "SOURCES", fuzz.SOURCES[::3])
    inputs = fuzz.TARGETS[target](random.Random(0), tmp_path)
    results = {step() for step, _ in zip(inputs, range(count), strict=False)}
    assert results >= {"refused"}


def test_the_driver_stops_at_a_fault(tmp_path: Path) -> None:
    """A reader that raises anything else is found, and the run ends with exit code 1: the fuzzer can fail."""
    broken = "import sys; sys.argv = ['fuzz']; sys.path.insert(0, 'tests'); import fuzz, convert.source as s;" \
        "s._check_names = lambda *a: 1 / 0; sys.exit(fuzz.main(['headers', '--count', '200', '--folder', " \
        f"{str(tmp_path)!r}]))"  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", broken], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 1
    assert "ZeroDivisionError" in ran.stdout + ran.stderr
    assert (tmp_path / "fault1").exists()


# ----------------------------------------------------------------------------------------------- what was once found


def report(change: Callable[[Any], object]) -> tuple[str, Callable[[Any], object]]:
    """A change of conversion.json."""
    return "conversion.json", change


def config(change: Callable[[Any], object]) -> tuple[str, Callable[[Any], object]]:
    """A change of config.json."""
    return "config.json", change


def module(**fields: Any) -> tuple[str, Callable[[Any], object]]:
    """Other fields of the first quantised module."""
    return config(lambda c: next(iter(c["quantization"]["modules"].values())).update(fields))


INF = float("inf")
FOUND: dict[str, tuple[str, Callable[[Any], object]]] = {
    "report-names-a-file-with-nul": report(lambda r: r["outputs"][0].update(file="a\0b")),
    "report-names-a-file-with-half-a-character": report(lambda r: r["outputs"][0].update(file="\ud800")),
    "report-names-a-long-file": report(lambda r: r["outputs"][0].update(file="x" * 5000)),
    "report-names-a-file-outside": report(lambda r: r["outputs"][0].update(file="../in/config.json")),
    "report-names-a-number": report(lambda r: r["outputs"][0].update(file=1.5)),
    "report-adapters-a-flag": report(lambda r: r.update(adapters=True)),
    "report-adapters-of-text": report(lambda r: r.update(adapters=["x"])),
    "report-dropped-of-objects": report(lambda r: r.update(dropped=[{"tensor": {}, "reason": []}])),
    "report-repairs-of-objects": report(lambda r: r.update(repairs=[{}])),
    "report-producer-with-escape": report(lambda r: r.update(producer="\x1b[2J", dialect="\x1b[2J")),
    "module-without-fields": config(lambda c: c["quantization"]["modules"].update({"format": None})),
    "module-shape-infinite": module(shape=[64, INF]),
    "module-shape-overflows": module(shape=[2**62, 2**62]),
    "module-shape-of-text": module(shape=["64", 64]),
    "module-partitions-infinite": module(partitions=[["", INF]]),
    "module-partitions-of-triples": module(partitions=[["a", 1, 2]]),
    "module-scheme-a-list": module(scheme=[]),
    "module-activations-a-list": module(activations=[]),
    "module-name-with-newline": config(lambda c: c["quantization"]["modules"].update({"\n": ""})),
    "no-quantization": config(lambda c: c.pop("quantization")),
    "kv-cache-a-list": config(lambda c: c["quantization"].update(kv_cache=["x"])),
    "kv-cache-of-objects": config(lambda c: c["quantization"].update(kv_cache={"x": {}})),
    "unfused-of-objects": config(lambda c: c.update(unfused={"x": [{}]})),
    "carried-of-numbers": config(lambda c: c.update(carried=[1])),
    "family-a-list": config(lambda c: c.update(family=[])),
    "architecture-field-a-newline": config(lambda c: c["architecture"].update({"\n": 1})),
    "architecture-head-with-escape": config(lambda c: c["architecture"].update(head="\x1b[2J")),
    "architecture-sizes-overflow": config(lambda c: c["architecture"].update(hidden_size=2**63, vocab_size=2**63)),
    "architecture-of-another-size": config(lambda c: c["architecture"].update(intermediate_size=10**30)),
    "architecture-of-a-broken-size": config(lambda c: c["architecture"].update(num_key_value_heads=0.02)),
    "architecture-of-a-size-with-a-point": config(lambda c: c["architecture"].update(head_dim=16.0)),
    "rope-scaling-of-lists": config(lambda c: c["architecture"].update(rope_scaling={
        "rope_type": "llama3", "factor": [2.0], "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": [8]})),
    "rope-theta-zero": config(lambda c: c["architecture"].update(rope_theta=0.0)),
    "index-names-a-file-with-nul": ("model.safetensors.index.json", lambda i: i["weight_map"].update(x="a\0.safetensors")),
    "index-names-a-long-file": (
        "model.safetensors.index.json", lambda i: i["weight_map"].update(x="a" * 5000 + ".safetensors")),
    "index-tensor-with-newline": ("model.safetensors.index.json", lambda i: i["weight_map"].update({"\n": "x.safetensors"})),
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `in` and its conversion as `out`."""
    home = tmp_path_factory.mktemp("found")
    build(home / "in", family="qwen3_5", dialect="modelopt", scheme="mixed")
    convert.convert_checkpoint(home / "in", home / "out")
    return home


@pytest.mark.parametrize("name", FOUND)
def test_found_in_canonical(name: str, converted: Path, tmp_path: Path) -> None:
    """No traceback, no failure of the machine, no control character: one complete line from every reader of OUT."""
    out = tmp_path / "out"
    shutil.copytree(converted / "out", out)
    shutil.copytree(converted / "in", tmp_path / "in")
    file, change = FOUND[name]
    edit_json(out / file, change)
    assert fuzz.run_cli("verify", out) == 1
    fuzz.run_cli("inspect", out)
    fuzz.run_cli("verify", tmp_path / "in", out)
    if fuzz.run_cli("export", out, tmp_path / "dense"):
        assert not (tmp_path / "dense").exists()
    loads = fuzz.check_network(out, random.Random(0)) == "accepted"
    assert loads == (file == "conversion.json"), "the runtime does not read the report, and refuses everything else"


@pytest.mark.parametrize("depth", [60, 70, 900, 100_000])
def test_nested_config(depth: int, tmp_path: Path) -> None:
    """Brackets inside brackets of a config: carried up to the limit, refused beyond it, in IN and in OUT."""
    build(tmp_path / "in", family="qwen3", dialect="dense", scheme="bf16")
    path = tmp_path / "in" / "config.json"
    path.write_text(path.read_text().replace("{", '{"deep": ' + "[" * depth + "]" * depth + ",", 1))
    code = fuzz.run_cli(tmp_path / "in", tmp_path / "out", "--verify")
    assert code == (depth > convert.limits.MAX_NESTING)
    if code == 0:
        assert fuzz.check_network(tmp_path / "out", random.Random(0)) == "accepted"
    assert fuzz.run_cli("inspect", tmp_path / "in") == code


@pytest.mark.parametrize("empty", ["model_type", "quant_algo"])
def test_empty_words_are_shown(empty: str, tmp_path: Path) -> None:
    """An empty text where a word belongs: the line still says what was found."""
    build(tmp_path / "in", family="qwen3", dialect="modelopt", scheme="fp8")
    edit_json(tmp_path / "in" / "config.json", lambda c: (
        c if empty in c else c["quantization_config"]).update({empty: ""}))  # fmt: skip
    fuzz.run_cli("inspect", tmp_path / "in")


class Pairs(list[Any]):
    """An object as its pairs, in which a key may stand twice."""


VALUES = st.recursive(
    st.one_of(st.integers(0, 9), st.booleans(), st.none(), st.text('ab":\\{', max_size=3)),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(st.text('ab":', max_size=2), inner), max_size=4).map(Pairs),
    max_leaves=12,
)


def written(value: Any, escaped: bool) -> str:
    """A value as JSON."""
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=escaped)} :{written(v, escaped)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(v, escaped) for v in value) + "]"
    return json.dumps(value, ensure_ascii=escaped)


def repeats(value: Any) -> bool:
    """Whether a key stands twice in an object, at any depth."""
    if not isinstance(value, list):
        return False
    if isinstance(value, Pairs):
        return len({k for k, _ in value}) < len(value) or any(repeats(v) for _, v in value)
    return any(map(repeats, value))


@FUZZED
@given(VALUES, st.booleans())
def test_keys_given_twice_in_configs(value: Any, escaped: bool) -> None:
    """Refused wherever they are, however they are written; everything else is read as the standard library reads it."""
    text = written(Pairs([("k", value)]), escaped).encode()
    if repeats(value):
        with pytest.raises(convert.ConvertError, match="duplicate key"):
            parse_json(text, "config.json")
    else:
        assert parse_json(text, "config.json") == json.loads(text)

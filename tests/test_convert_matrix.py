"""Dialect x scheme x family: every source becomes exactly the canonical checkpoint that the builder computed.

Two routes to the truth, neither through the converter: the builder's canonical tensors (bytes) and dense weights, and a
second reader of the output written from docs/format.md alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from blake3 import blake3
from build import (
    RECIPES,
    Built,
    Floats,
    Raw,
    build,
    edit_json,
    edit_tensors,
    join,
    per_row,
    random_scale,
    raw,
    read_file,
    read_json,
    read_tensors,
)
from safetensors import safe_open
from safetensors.torch import load_file

import convert
from convert.dialects import DIALECTS
from convert.families import FAMILIES as CONVERT_FAMILIES
from runtime.format import ACTIVATIONS, SCHEMES, CanonicalConfig, module_tensors

# ------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One checkpoint to build.  `family`: key of `MODELS`; `options`: further keywords of `build`."""

    family: str
    dialect: str
    scheme: str
    options: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def id(self) -> str:
        """Readable test id."""
        more = [f"{k}={getattr(v, '__name__', v)}" for k, v in self.options]
        return "-".join((self.dialect, self.scheme, self.family, *more)).replace(" ", "")


REGISTERED = {family.name for family in CONVERT_FAMILIES}
# Every model that `families` describes, of the families that the converter has.
MODELS: dict[str, dict[str, Any]] = {
    model: {"family": name, **options}
    for name, family in families.FAMILIES.items()
    if name in REGISTERED
    for model, options in family.models.items()
}
ALL_SCHEMES = ("qwen3", "qwen3_tied_bias", "qwen3_5", "qwen3_5_mtp", "qwen3_5_vlm")
# The number format of a module does not depend on the family: these have a few rows of each dialect (and test_experts.py).
FEW_SCHEMES = {
    "modelopt": ("fp8", "nvfp4", "fp8_pb_wo", "mixed"),
    "compressed-tensors": ("fp8_static", "nvfp4", "mxfp4"),
    "fp8": ("block", "tensor_static"),
    "dense": ("bf16",),
}
MATRIX = [
    Row(family, dialect, scheme)
    for dialect, scheme in RECIPES
    for family in MODELS
    if family in ALL_SCHEMES or scheme in FEW_SCHEMES[dialect]
]


def _rows(family: str, dialect: str, scheme: str, *variants: dict[str, Any]) -> list[Row]:
    return [Row(family, dialect, scheme, tuple(v.items())) for v in variants]


VARIANTS = [
    # The two config files of ModelOpt, its old form, and its spellings of algorithm names.
    *_rows("qwen3_5_vlm", "modelopt", "fp8", {"form": "hf_quant"}, {"form": "both"}, {"form": "nested"}),
    *_rows("qwen3_5_vlm", "modelopt", "mixed", {"form": "hf_quant"}, {"form": "both"}, {"form": "nested"}),
    *_rows("qwen3", "modelopt", "nvfp4", {"form": "hf_quant"}, {"letter_case": str.lower}, {"letter_case": str.title}),
    *_rows("qwen3", "modelopt", "w4a16_nvfp4", {"form": "nested", "letter_case": str.lower}),
    *_rows("qwen3", "modelopt", "mxfp8", {"form": "nested"}),
    *_rows("qwen3_5", "modelopt", "fp8_pb_wo", {"letter_case": str.upper}, {"form": "hf_quant"}),
    *_rows("qwen3_5", "modelopt", "fp8_pc_pt", {"letter_case": str.lower}),
    *_rows("qwen3_5", "modelopt", "mixed", {"letter_case": str.lower}),
    # KV-cache scales.
    *_rows("qwen3_5_vlm", "modelopt", "fp8", {"kv": "tensor"}, {"kv": "tensor", "form": "hf_quant"}),
    *_rows("qwen3", "modelopt", "nvfp4", {"kv": "tensor"}),
    *_rows("qwen3", "compressed-tensors", "fp8_static", {"kv": "tensor"}, {"kv": "head"}),
    *_rows("qwen3_5_vlm", "compressed-tensors", "nvfp4", {"kv": "tensor"}, {"kv": "head"}),
    # Blocks whose rows do and do not end where partitions end.
    *_rows("qwen3_5", "modelopt", "fp8_pb_wo", {"sizes": "aligned"}),
    *_rows("qwen3_5_vlm", "compressed-tensors", "fp8_block", {"sizes": "aligned"}),
    *_rows("qwen3_5", "fp8", "block", {"sizes": "small"}),
    *_rows("qwen3_5_vlm", "fp8", "block_bf16", {"sizes": "block"}),
    *_rows("qwen3_5", "fp8", "block_e8m0", {"sizes": "aligned"}),
    *_rows("qwen3_5", "modelopt", "nvfp4", {"sizes": "block"}),
    *_rows("nemotron_h", "fp8", "block", {"sizes": "mamba"}),
    *_rows("nemotron_h_dense", "modelopt", "fp8_pb_wo", {"sizes": "mamba"}),
    # A shard that covers q, k and v stores one scale for each of them.
    *_rows("qwen3_5", "modelopt", "fp8", {"vector_scales": True}),
    # A pre_quant_scale inside a group that is normally fused.
    *_rows("qwen3", "modelopt", "nvfp4_awq", {"pre_quant_scale_on": ("q_proj", "k_proj", "v_proj")}),
    *_rows("qwen3_5", "modelopt", "nvfp4_awq", {"pre_quant_scale_on": ("in_proj_z", "up_proj")}),
    # Other families: KV-cache scales, head and embedding tied.
    *_rows("nemotron_h", "modelopt", "fp8", {"kv": "tensor"}, {"bias": True}),
    *_rows("step3p5", "compressed-tensors", "nvfp4", {"kv": "head", "mtp": False}),
    *_rows("llama", "modelopt", "nvfp4", {"tied": True}),
    # Several files.
    *_rows("qwen3_5_vlm", "modelopt", "mixed", {"shards": 3}, {"shards": 4, "scales_apart": True}),
    *_rows("qwen3", "compressed-tensors", "nvfp4", {"shards": 2}, {"shards": 3, "scales_apart": True}),
    *_rows("qwen3_5", "fp8", "block", {"shards": 3, "scales_apart": True}),
]
ROWS = MATRIX + VARIANTS
EXPORTED = [row for row in MATRIX if row.family not in ("qwen3", "qwen3_5", "qwen3_5_mtp")] + [
    row for row in VARIANTS if "shards" not in dict(row.options)
]
over_rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row], tuple[Built, Path]]:
    """`converted(row)`: the built source and the folder it was converted into, once per row."""

    @functools.cache
    def of(row: Row) -> tuple[Built, Path]:
        folder = tmp_path_factory.mktemp("row")
        options = MODELS[row.family] | dict(row.options)
        built = build(folder / "in", dialect=row.dialect, scheme=row.scheme, **options)
        convert.convert_checkpoint(folder / "in", folder / "out")
        return built, folder / "out"

    return of


def bits(values: Floats) -> Any:
    """Float32 values as integers, so that equality is of bits and counts the sign of zero."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def assert_same(found: dict[str, Floats], expected: dict[str, Floats]) -> None:
    """Assert equality of names, shapes and bits, naming the first tensors that differ."""
    assert found.keys() == expected.keys()
    different = [
        name
        for name in expected
        if found[name].shape != expected[name].shape or not np.array_equal(bits(found[name]), bits(expected[name]))
    ]
    assert not different


# ------------------------------------------------------------------------------- a second reader, from docs/format.md

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
SOURCES = {  # canonical module -> the Hugging Face projections that it holds, in order
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}


def dequantised(entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Floats:
    """Dense float32 value of one quantised module.  `tensors`: role -> stored tensor."""
    rows, columns = entry["shape"]
    partitions = entry.get("partitions", [["", rows]])
    weight = tensors["weight"]
    if weight.dtype == torch.float8_e4m3fn:
        values = weight.float().numpy()
    else:
        packed = weight.numpy()
        values = np.empty((rows, columns), np.float32)
        values[:, 0::2], values[:, 1::2] = FP4[packed & 15], FP4[packed >> 4]
    scale = tensors["weight_scale"]
    match entry["scheme"]:
        case "fp8_tensor":
            return values * per_row(scale.numpy(), partitions)[:, None]
        case "fp8_channel":
            return values * scale.numpy()[:, None]
        case "fp8_block":
            pieces, row, block = [], 0, 0
            for _, count in partitions:
                blocks = -(-count // 128)
                grid = scale.numpy()[block : block + blocks]
                pieces.append(values[row : row + count] * grid.repeat(128, 0)[:count].repeat(128, 1)[:, :columns])
                row, block = row + count, block + blocks
            assert block == scale.shape[0]
            return np.concatenate(pieces)
        case "nvfp4":
            per_group = scale.float().numpy() * per_row(tensors["weight_scale_2"].numpy(), partitions)[:, None]
            return values * per_group.repeat(16, 1)
        case "mxfp8" | "mxfp4":
            return values * np.ldexp(np.float32(1), scale.numpy().astype(np.int32) - 127).repeat(32, 1)
    raise AssertionError(entry["scheme"])


STACKED_ON_THE_HUB = ("qwen3_5_moe", "qwen3_vl_moe")  # families whose own checkpoints store experts stacked and fused
STACKED_BY_PROJECTION = ("step3p5", "step3_text")  # likewise stacked, gate and up apart, without the segment `experts`
NEMOTRON_TOWERS = ("vision_model", "mlp1", "sound_encoder", "sound_projection", "vision_projector")
HUB_NAMES: dict[str, tuple[dict[str, str], dict[str, str]]] = {  # canonical prefix -> hub's, of a wrapper and of a text model
    "nemotron_h": (
        {"model.embed_tokens": "language_model.backbone.embeddings", "model": "language_model.backbone",
         "lm_head": "language_model.lm_head"},
        {"model.embed_tokens": "backbone.embeddings", "model": "backbone"},
    ),
    "step3p5": ({}, {}),
    "step3_text": ({}, {}),
}  # fmt: skip
WRAPPED_QWEN: tuple[dict[str, str], dict[str, str]] = ({"model": "model.language_model", "visual": "model.visual"}, {})


def hub_name(name: str, config: dict[str, Any]) -> str:
    """A canonical name as the family's own checkpoints have it."""
    wrapper = not config["hf_config"].keys().isdisjoint(("text_config", "llm_config"))
    places = HUB_NAMES.get(config["family"], WRAPPED_QWEN)[0 if wrapper else 1]
    for prefix in sorted(places, key=len, reverse=True):
        if f"{name}.".startswith(f"{prefix}."):
            return places[prefix] + name.removeprefix(prefix)
    drafts = {".shared_head.head.": ".transformer.shared_head.output.", ".shared_head.norm.": ".transformer.shared_head.norm."}
    for run, spelling in drafts.items():
        name = name.replace(run, spelling)
    return name


def stacks(config: dict[str, Any], stored: dict[str, torch.Tensor]) -> dict[str, list[Floats]]:
    """Each stack of experts -> the dense float32 value of each expert."""
    modules, found = config["quantization"]["modules"], {}
    for module in {name.rpartition(".")[0] for name in stored}:
        roles = {name.rpartition(".")[2]: t for name, t in stored.items() if name.rpartition(".")[0] == module}
        if module in modules and "experts" in modules[module]:
            experts = [{role: tensor[e] for role, tensor in roles.items()} for e in range(modules[module]["experts"])]
            values = [dequantised(modules[module], expert) for expert in experts]
            factors = [e["pre_quant_scale"].float().numpy() if "pre_quant_scale" in e else np.float32(1) for e in experts]
            found[module] = [value * factor for value, factor in zip(values, factors, strict=True)]
        elif module not in modules and module.rpartition(".")[0].endswith(".experts"):
            found[module] = list(roles["weight"].float().numpy())
    return found


def projections(architecture: dict[str, Any], module: str, rows: int) -> list[tuple[str, int]]:
    """Hugging Face projections (last name segment, rows) of a canonical module that is not split by its config."""
    a, last = architecture, module.rpartition(".")[2]
    if last == "qkv_proj":
        kv = a["num_key_value_heads"] * a["head_dim"]
        return [("q_proj", rows - 2 * kv), ("k_proj", kv), ("v_proj", kv)]
    if last == "in_proj_qkvz":
        z = a["linear_num_value_heads"] * a["linear_value_head_dim"]
        return [("in_proj_qkv", rows - z), ("in_proj_z", z)]
    names = SOURCES.get(last, (last,))
    return [(name, rows // len(names)) for name in names]


def read_dense(out: Path) -> dict[str, Floats]:
    """Every weight of a canonical checkpoint as float32, under the names of the family on the Hugging Face hub."""
    config = json.loads((out / "config.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        stored |= load_file(out / file)
    modules = config["quantization"]["modules"]
    dense: dict[str, Floats] = {}

    def put(name: str, values: Floats) -> None:
        dense[hub_name(name, config)] = values

    experts = stacks(config, stored)
    for module, each in experts.items():
        parent, _, last = module.rpartition(".")
        if config["family"] in STACKED_ON_THE_HUB and last not in SOURCES["gate_up_proj"]:
            put(module, np.stack(each))
            continue
        names = SOURCES.get(last, (last,))
        if config["family"] in STACKED_BY_PROJECTION:
            for projection, part in zip(names, np.split(np.stack(each), len(names), 1), strict=True):
                put(f"{parent.removesuffix('.experts')}.{projection}.weight", part)
            continue
        for e, value in enumerate(each):
            for projection, part in zip(names, np.split(value, len(names)), strict=True):
                put(f"{parent}.{e}.{projection}.weight", part)
    for name, tensor in stored.items():
        if name.rpartition(".")[0] in experts:
            continue
        module, _, role = name.rpartition(".")
        if (module in modules and role not in ("weight", "bias")) or role in ("k_scale", "v_scale"):
            continue
        values = tensor.float().numpy() if module not in modules or role == "bias" else None
        if values is None:
            entry = modules[module]
            values = dequantised(entry, {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == module})
            if entry.get("pre_quant_scale"):
                values = values * stored[f"{module}.pre_quant_scale"].float().numpy()
        parent, dot, last = module.rpartition(".")
        pieces = [(last, len(values))] if last not in SOURCES else projections(config["architecture"], module, len(values))
        row = 0
        for projection, rows in pieces:
            put(f"{parent}{dot}{projection}.{role}", values[row : row + rows])
            row += rows
        assert row == len(values)
    return dense


# ------------------------------------------------------------------------------------------------------------ tests


def test_every_scheme_and_dialect_has_a_row(converted: Callable[[Row], tuple[Built, Path]]) -> None:
    """A scheme of the contract, an encoding of a dialect or a family without a row here is untested: fail."""
    seen: set[tuple[str, str]] = set()
    schemes, activations = set(), set()
    for row in MATRIX:
        if row.family in ("qwen3", "qwen3_5"):
            built, _ = converted(row)
            seen |= {(row.dialect, entry["scheme"]) for entry in built.modules.values()}
            schemes |= {entry["scheme"] for entry in built.modules.values()}
            activations |= {entry["activations"] for entry in built.modules.values()}
    assert schemes == set(SCHEMES)
    assert activations == {*ACTIVATIONS, None}
    assert {(d.name, e.scheme) for d in DIALECTS for e in d.encodings} == seen
    dialects = {*(d.name for d in DIALECTS), "dense"}
    assert {row.dialect for row in MATRIX} == dialects
    pairs = {(MODELS[row.family]["family"], row.dialect) for row in MATRIX}
    assert pairs == {(family.name, dialect) for family in CONVERT_FAMILIES for dialect in dialects}


@over_rows
def test_tensors(row: Row, converted: Callable[[Row], tuple[Built, Path]]) -> None:
    """Names, dtypes, shapes and bytes: codes and block scales copied, a scale per partition, divisors inverted."""
    built, out = converted(row)
    found = read_tensors(out)
    assert found.keys() == built.canonical.keys()
    described = {name: (t.dtype, t.shape) for name, t in found.items()}
    assert described == {name: (t.dtype, t.shape) for name, t in built.canonical.items()}
    assert not [name for name, tensor in found.items() if tensor.data != built.canonical[name].data]


def without_infinity(value: Any) -> Any:
    """A JSON value with transformers 5's spelling of infinity, for which JSON has no number."""
    if isinstance(value, dict):
        return {key: without_infinity(v) for key, v in value.items()}
    if isinstance(value, list):
        return [without_infinity(v) for v in value]
    return {"__float__": "Infinity"} if value == math.inf else value


@over_rows
def test_config(row: Row, converted: Callable[[Row], tuple[Built, Path]]) -> None:
    """`config.json` says what the builder knows, and the contract's own rules hold for every module it lists."""
    built, out = converted(row)
    config = read_json(out / "config.json")
    assert config["family"] == built.family
    assert config["architecture"] == built.architecture
    assert config["quantization"]["modules"] == built.modules
    assert config["quantization"]["kv_cache"] == built.kv_cache
    assert config["unfused"] == built.unfused
    assert sorted(config["carried"]) == built.carried
    source = read_json(built.directory / "config.json")
    assert config["hf_config"] == without_infinity({k: v for k, v in source.items() if k != "quantization_config"})
    header = {name: (t.dtype, t.shape) for name, t in read_tensors(out).items()}
    for name, spec in CanonicalConfig.from_json(config).modules.items():
        stored = {role: (t.dtype, t.shape) for role, t in module_tensors(spec).items()}
        assert {role: header[f"{name}.{role}"] for role in stored} == stored


@over_rows
def test_dense_values(row: Row, converted: Callable[[Row], tuple[Built, Path]]) -> None:
    """A second reader of the output arrives at the builder's dense weights, bit for bit."""
    built, out = converted(row)
    assert_same(read_dense(out), built.dense)


@over_rows
def test_verify(row: Row, converted: Callable[[Row], tuple[Built, Path]]) -> None:
    """`verify` agrees, and has looked at every stored element."""
    built, out = converted(row)
    result = convert.verify_conversion(built.directory, out)
    assert result.tensors == len(built.canonical)
    assert result.elements == sum(math.prod(tensor.shape) for tensor in built.canonical.values())


def test_files(converted: Callable[[Row], tuple[Built, Path]]) -> None:
    """The index names every tensor and the total size; any safetensors reader opens the files; the report adds up."""
    built, out = converted(Row("qwen3_5_vlm", "modelopt", "mixed", (("shards", 3),)))
    index = read_json(out / "model.safetensors.index.json")
    assert index["weight_map"].keys() == built.canonical.keys()
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in built.canonical.values())
    for file in set(index["weight_map"].values()):
        with safe_open(out / file, "pt") as opened:
            assert set(opened.keys()) == {n for n, f in index["weight_map"].items() if f == file}
    report = read_json(out / "conversion.json")
    for key, folder in (("sources", built.directory), ("outputs", out)):
        assert report[key]
        for entry in report[key]:
            content = (folder / entry["file"]).read_bytes()
            assert entry["size"] == len(content)
            if "tensors_blake3" in entry:
                stored = read_file(folder / entry["file"])
                assert entry["tensors_blake3"] == {n: blake3(t.data).hexdigest() for n, t in stored.items()}
                header = content[: len(content) - sum(len(t.data) for t in stored.values())]
                assert entry["header_sha256"] == hashlib.sha256(header).hexdigest()
            else:
                assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert {e["file"] for e in report["outputs"]} >= {*index["weight_map"].values()}
    assert {e["file"] for e in report["sources"]} >= {f.name for f in built.directory.glob("*.safetensors")}
    assert report["dialect"] == "modelopt"
    assert report["family"] == "qwen3_5"


def test_many_output_shards(tmp_path: Path) -> None:
    """A small `shard_size` splits the output without changing a byte of it."""
    built = build(tmp_path / "in", family="qwen3_5", dialect="modelopt", scheme="mixed")
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out", shard_size=20_000, workers=2)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert read_tensors(tmp_path / "out") == built.canonical
    convert.verify_conversion(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_output_does_not_depend_on_workers(workers: int, tmp_path: Path) -> None:
    """Same bytes, file by file, whatever the number of workers."""
    build(tmp_path / "in", family="qwen3", dialect="compressed-tensors", scheme="nvfp4", shards=3)
    for out, count in (("a", workers), ("b", None)):
        convert.convert_checkpoint(tmp_path / "in", tmp_path / out, workers=count, shard_size=30_000)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in "ab")
    assert a.keys() == b.keys()
    assert {name for name in a if a[name] != b[name]} == set()


# The seed of the project: one scale of a shard that covers three partitions, plus that of z.
@pytest.mark.parametrize(
    ("dialect", "scheme", "role"),
    [
        ("modelopt", "fp8", "weight_scale"),
        ("modelopt", "fp8", "input_scale"),
        ("modelopt", "nvfp4", "weight_scale_2"),
        ("modelopt", "nvfp4", "input_scale"),
        ("compressed-tensors", "fp8_static", "weight_scale"),
        ("compressed-tensors", "nvfp4", "weight_scale_2"),
        ("compressed-tensors", "nvfp4", "input_scale"),
        ("fp8", "tensor_static", "weight_scale"),
    ],
)
def test_tuple_shard(dialect: str, scheme: str, role: str, converted: Callable[[Row], tuple[Built, Path]]) -> None:
    """`in_proj_qkvz` has `[s_qkv, s_qkv, s_qkv, s_z]`, read from the source file here and not from the builder."""
    built, out = converted(Row("qwen3_5", dialect, scheme))
    stored = read_tensors(out)[f"model.layers.0.linear_attn.in_proj_qkvz.{role}"]
    divides = (dialect, scheme) == ("compressed-tensors", "nvfp4")
    on_disk = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"} if divides else {}
    on_disk |= {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"} if dialect == "fp8" else {}
    source = read_tensors(built.directory)
    qkv, z = (
        source[f"model.layers.0.linear_attn.{part}.{on_disk.get(role, role)}"].floats().reshape(())
        for part in ("in_proj_qkv", "in_proj_z")
    )
    assert qkv != z
    expected = np.array([qkv, qkv, qkv, z], np.float32)
    assert stored.dtype == "F32"
    assert_same({role: stored.floats()}, {role: np.float32(1) / expected if divides else expected})


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4"])
def test_mamba_tuple_shard(scheme: str, converted: Callable[[Row], tuple[Built, Path]]) -> None:
    """`in_proj` of a Mamba block has five partitions and stores one scale: it is given to each of them."""
    built, out = converted(Row("nemotron_h", "modelopt", scheme))
    role = {"fp8": "weight_scale", "nvfp4": "weight_scale_2"}[scheme]
    stored = read_tensors(built.directory)[f"backbone.layers.0.mixer.in_proj.{role}"]
    assert read_tensors(out)[f"model.layers.0.mixer.in_proj.{role}"] == Raw("F32", (5,), stored.data * 5)
    entry = read_json(out / "config.json")["quantization"]["modules"]["model.layers.0.mixer.in_proj"]
    assert [name for name, _ in entry["partitions"]] == ["z", "x", "B", "C", "dt"]


def ulps(a: Floats, b: Floats) -> int:
    """Largest distance between two arrays of the same signs, in float32 steps."""
    return int(np.abs(bits(a).astype(np.int64) - bits(b).astype(np.int64)).max())


@pytest.mark.parametrize("scheme", ["nvfp4", "nvfp4a16"])
def test_divisors(scheme: str, converted: Callable[[Row], tuple[Built, Path]]) -> None:
    """compressed-tensors NVFP4: the multiplier is the float32 nearest to 1/g, and dividing by g differs by little.

    The block scale times the multiplier is at most one float32 step from the block scale over g.  Its product with
    a code can be two steps away (a scale just below a power of two, a code of 1.5 or 3).
    """
    built, out = converted(Row("qwen3_5_vlm", "compressed-tensors", scheme))
    source, canonical = read_tensors(built.directory), read_tensors(out)
    name = "model.language_model.layers.0.mlp.down_proj"
    g = source[f"{name}.weight_global_scale"].floats()
    m = canonical["model.layers.0.mlp.down_proj.weight_scale_2"].floats()
    exact = np.float64(1) / g.astype(np.float64)
    neighbours = np.array([np.nextafter(m, np.float32(0)), m, np.nextafter(m, np.float32(np.inf))]).astype(np.float64)
    assert np.abs(neighbours - exact).argmin() == 1
    assert np.float32(1) / m != g  # the builder picks divisors that do not survive a second reciprocal
    scales = source[f"{name}.weight_scale"].floats()
    assert ulps(scales * m, scales / g) <= 1
    dense = read_dense(out)
    assert built.division
    for weight, divided in built.division.items():
        assert ulps(dense[weight], divided) <= 2


# ------------------------------------------------------------------------------------------------- verify can say no

DAMAGED = [  # (row, canonical tensor, byte)
    (Row("qwen3_5", "modelopt", "fp8"), "model.layers.0.linear_attn.in_proj_qkvz.weight", 70),
    (Row("qwen3_5", "modelopt", "fp8"), "model.layers.0.linear_attn.in_proj_qkvz.weight_scale", 5),
    (Row("qwen3_5", "modelopt", "fp8"), "model.layers.1.self_attn.qkv_proj.input_scale", 8),
    (Row("qwen3_5", "modelopt", "nvfp4"), "model.layers.0.mlp.gate_up_proj.weight_scale", 9),
    (Row("qwen3_5", "modelopt", "nvfp4"), "model.layers.0.mlp.gate_up_proj.weight_scale_2", 4),
    (Row("qwen3_5_vlm", "compressed-tensors", "nvfp4"), "model.layers.1.self_attn.qkv_proj.weight_scale_2", 0),
    (Row("qwen3_5_vlm", "compressed-tensors", "nvfp4"), "model.layers.1.self_attn.qkv_proj.input_scale", 0),
    (Row("qwen3_5_vlm", "compressed-tensors", "nvfp4"), "visual.blocks.1.attn.qkv.bias", 3),
    (Row("qwen3_5_vlm", "compressed-tensors", "nvfp4"), "mtp.fc.weight", 100),
    (Row("qwen3_5", "fp8", "block_e8m0"), "model.layers.1.mlp.down_proj.weight_scale", 3),
    (Row("qwen3_5", "compressed-tensors", "mxfp4"), "model.layers.1.mlp.down_proj.weight_scale", 3),
    (Row("qwen3", "modelopt", "nvfp4_awq"), "model.layers.1.mlp.down_proj.pre_quant_scale", 6),
    (Row("qwen3", "modelopt", "nvfp4", (("kv", "tensor"),)), "model.layers.1.self_attn.v_scale", 1),
    (Row("qwen3", "dense", "bf16"), "model.norm.weight", 0),
]


@pytest.mark.parametrize(("row", "tensor", "byte"), DAMAGED, ids=lambda v: v.id if isinstance(v, Row) else str(v))
def test_verify_sees_a_flipped_bit(
    row: Row, tensor: str, byte: int, converted: Callable[[Row], tuple[Built, Path]], tmp_path: Path
) -> None:
    """One bit of one tensor of OUT, the lowest that matters: `verify` raises and names the tensor."""
    built, out = converted(row)
    copy = tmp_path / "out"
    copy.mkdir()
    for file in out.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    file = copy / read_json(out / "model.safetensors.index.json")["weight_map"][tensor]
    content, data = bytearray(file.read_bytes()), read_file(file)[tensor].data
    assert content.count(data) == 1
    content[content.index(data) + byte] ^= 1
    file.write_bytes(content)
    with pytest.raises(convert.ConvertError, match=tensor.rpartition(".")[0].replace(".", r"\.")):
        convert.verify_conversion(built.directory, copy)


def test_verify_sees_a_missing_and_a_foreign_tensor(tmp_path: Path) -> None:
    """OUT of another checkpoint with the same names does not pass."""
    for seed in (0, 1):
        build(tmp_path / f"in{seed}", family="qwen3", dialect="modelopt", scheme="fp8", seed=seed)
        convert.convert_checkpoint(tmp_path / f"in{seed}", tmp_path / f"out{seed}")
    with pytest.raises(convert.ConvertError):
        convert.verify_conversion(tmp_path / "in0", tmp_path / "out1")


def _swap(names: list[Any]) -> None:
    names[0], names[1] = names[1], names[0]


MISREAD = [  # what OUT's config may not claim without `verify` noticing
    ("module-gone", lambda c: c["quantization"]["modules"].pop("model.layers.0.mlp.down_proj")),
    ("fused-module-gone", lambda c: c["quantization"]["modules"].pop("model.layers.0.mlp.gate_up_proj")),
    ("partitions-swapped", lambda c: _swap(
        c["quantization"]["modules"]["model.layers.1.self_attn.qkv_proj"]["partitions"])),
    ("activations-changed", lambda c: c["quantization"]["modules"]["model.layers.0.mlp.down_proj"].update(
        activations="fp8_token")),
    ("cache-forgotten", lambda c: c["quantization"]["kv_cache"].clear()),
    ("carried-forgotten", lambda c: c["carried"].clear()),
    ("another-head-size", lambda c: c["architecture"].update(head_dim=32)),
    ("another-epsilon", lambda c: c["architecture"].update(rms_norm_eps=1e-5)),
    ("another-hf-config", lambda c: c["hf_config"].update(rms_norm_eps=1e-5)),
]  # fmt: skip


@pytest.mark.parametrize("change", [c for _, c in MISREAD], ids=[name for name, _ in MISREAD])
def test_verify_sees_a_changed_config(change: Callable[[Any], Any], tmp_path: Path) -> None:
    """The same bytes under a config that gives them another meaning are not a conversion of IN."""
    build(tmp_path / "in", family="qwen3_5", dialect="modelopt", scheme="nvfp4", mtp=True, kv="tensor")
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    convert.verify_conversion(tmp_path / "in", tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", change)
    with pytest.raises(convert.ConvertError):
        convert.verify_conversion(tmp_path / "in", tmp_path / "out")


# --------------------------------------------------------------------------------------------- other spellings of facts


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_e8m0_scales_under_their_own_dtype(dialect: str, scheme: str, tmp_path: Path) -> None:
    """Some producers store MX scales as F8_E8M0, not as U8: the same bytes come out."""
    built = build(tmp_path / "in", family="qwen3", dialect=dialect, scheme=scheme)

    def change(stored: dict[str, Raw]) -> None:
        for name in [n for n in stored if n.endswith(".weight_scale")]:
            stored[name] = Raw("F8_E8M0", stored[name].shape, stored[name].data)

    edit_tensors(tmp_path / "in", change)
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    convert.verify_conversion(tmp_path / "in", tmp_path / "out")
    assert read_tensors(tmp_path / "out") == built.canonical


@pytest.mark.parametrize("spelling", ["{}_scale", "attn.{}_scale", "qkv_proj.{}_scale", "{}_proj.output_scale"])
def test_spellings_of_cache_scales(spelling: str, tmp_path: Path) -> None:
    """KV-cache scales wherever producers put them below the attention module."""
    built = build(tmp_path / "in", family="qwen3", dialect="modelopt", scheme="fp8", kv="tensor")

    def change(stored: dict[str, Raw]) -> None:
        for attention in built.kv_cache:
            for letter in "kv":
                scale = stored.pop(f"{attention}.{letter}_proj.{letter}_scale")
                stored[f"{attention}.{spelling.format(letter)}"] = scale

    edit_tensors(tmp_path / "in", change)
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    convert.verify_conversion(tmp_path / "in", tmp_path / "out")
    assert read_tensors(tmp_path / "out") == built.canonical


@pytest.mark.parametrize("key", ["model.layers.0.mlp", "model.layers.0"])
def test_containers_in_quantized_layers(key: str, tmp_path: Path) -> None:
    """A key of `quantized_layers` may be a container: it speaks for what is below it, without contradiction."""
    built = build(tmp_path / "in", family="qwen3", dialect="modelopt", scheme="nvfp4")
    block = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": []}
    layers = {key: {"quant_algo": "NVFP4", "group_size": 16}}
    others = [n for n in built.disk if n.endswith(".weight_scale") and not n.startswith(f"{key}.")]
    layers |= {n.removesuffix(".weight_scale"): layers[key] for n in others}
    edit_json(tmp_path / "in" / "config.json", lambda c: c.update(quantization_config=block | {"quantized_layers": layers}))
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert read_tensors(tmp_path / "out") == built.canonical
    assert read_json(tmp_path / "out" / "config.json")["quantization"]["modules"] == built.modules
    assert read_json(tmp_path / "out" / "conversion.json")["contradictions"] == []


@pytest.mark.parametrize("scales", [(), (1,), (3,)], ids=["0-d", "one", "one-per-partition"])
def test_a_source_that_is_fused_already(scales: tuple[int, ...], tmp_path: Path) -> None:
    """`qkv_proj` in the source itself, with one scale for all or one for each partition: the same canonical module."""
    built = build(tmp_path / "in", family="qwen3", dialect="modelopt", scheme="fp8")
    fused = "model.layers.0.self_attn.qkv_proj"
    values = random_scale(np.random.default_rng(0), scales, "F32", 1e-3, 1e-2)

    def change(stored: dict[str, Raw]) -> None:
        parts = [f"{fused.rpartition('.')[0]}.{p}_proj" for p in "qkv"]
        stored[f"{fused}.weight"] = join(stored[f"{part}.weight"] for part in parts)
        stored[f"{fused}.weight_scale"] = stored[f"{fused}.input_scale"] = raw("F32", values)
        for name in [n for n in stored if n.startswith(tuple(f"{part}." for part in parts))]:
            del stored[name]

    edit_tensors(tmp_path / "in", change)
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    convert.verify_conversion(tmp_path / "in", tmp_path / "out")
    expanded = raw("F32", np.broadcast_to(values, (3,)))
    expected = built.canonical | {f"{fused}.weight_scale": expanded, f"{fused}.input_scale": expanded}
    assert read_tensors(tmp_path / "out") == expected
    assert read_json(tmp_path / "out" / "config.json")["quantization"]["modules"] == built.modules


Change = Callable[[dict[str, Raw]], object]


def _in_mtp_block(stored: dict[str, Raw]) -> None:
    inner = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    for name in [n for n in stored if n.startswith("model.layers.2.") and n.split(".")[3] in inner]:
        stored[name.replace("layers.2.", "layers.2.mtp_block.")] = stored.pop(name)


def _shared_head(stored: dict[str, Raw]) -> None:
    for name in [n for n in stored if ".transformer.shared_head." in n]:
        stored[name.replace(".transformer.", ".")] = stored.pop(name)


def _old_rotary(stored: dict[str, Raw]) -> None:
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = raw("F32", np.ones(8))


def _container_of_the_shared_expert(config: Any) -> None:
    block = json.dumps(config["quantization_config"]).replace(".share_expert.", ".moe.share_expert.")
    config["quantization_config"] = json.loads(block)


def _nothing(content: Any) -> None:
    pass


INNER: dict[str, tuple[str, Change, Callable[[Any], object]]] = {  # id: (family, change of tensors, of config)
    "mtp-block": ("step3p5", _in_mtp_block, _nothing),
    "shared-head": ("step3p5", _shared_head, _nothing),
    "container-of-the-shared-expert": ("step3p5", _nothing, _container_of_the_shared_expert),
    "old-rotary": ("llama", _old_rotary, _nothing),
}


@pytest.mark.parametrize(("family", "change", "change_config"), INNER.values(), ids=INNER)
def test_inner_spellings(
    family: str, change: Change, change_config: Callable[[Any], object], tmp_path: Path
) -> None:
    """Names inside a layer that repacks and engines spell otherwise, and a tensor that is dropped: the same result."""
    built = build(tmp_path / "in", family=family, dialect="modelopt", scheme="mixed", mtp=family == "step3p5")
    edit_tensors(tmp_path / "in", change)
    edit_json(tmp_path / "in" / "config.json", change_config)
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    convert.verify_conversion(tmp_path / "in", tmp_path / "out")
    assert read_tensors(tmp_path / "out") == built.canonical
    assert read_json(tmp_path / "out" / "config.json")["quantization"]["modules"] == built.modules
    assert read_json(tmp_path / "out" / "conversion.json")["contradictions"] == []


def test_a_convolution_without_bias(tmp_path: Path) -> None:
    """`use_conv_bias: false`: the bias is neither asked for nor invented; without the flag it is missing."""
    name = "model.layers.0.mixer.conv1d.bias"
    built = build(tmp_path / "in", family="nemotron_h", dialect="dense", scheme="bf16")
    edit_tensors(tmp_path / "in", lambda stored: stored.pop(f"backbone.{name.removeprefix('model.')}"))
    with pytest.raises(convert.ConvertError, match=r"conv1d\.bias"):
        convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    edit_json(tmp_path / "in" / "config.json", lambda config: config.update(use_conv_bias=False))
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert read_tensors(tmp_path / "out") == {n: tensor for n, tensor in built.canonical.items() if n != name}


def test_a_quantised_tower(tmp_path: Path) -> None:
    """A quantised projection of the vision tower is carried with its scales, and exported dense."""
    build(tmp_path / "in", family="qwen3_5", dialect="modelopt", scheme="fp8", wrapper=True)
    name = "model.visual.blocks.0.attn.qkv"
    codes = np.arange(96 * 32, dtype=np.uint8).reshape(96, 32) & 0x7B
    tower = {"weight": raw("F8_E4M3", codes), "weight_scale": raw("F32", 0.3), "input_scale": raw("F32", 0.7)}
    edit_tensors(tmp_path / "in", lambda stored: stored.update({f"{name}.{role}": t for role, t in tower.items()}))
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    convert.verify_conversion(tmp_path / "in", tmp_path / "out")
    entry = read_json(tmp_path / "out" / "config.json")["quantization"]["modules"]["visual.blocks.0.attn.qkv"]
    assert entry == {"scheme": "fp8_tensor", "shape": [96, 32], "activations": "fp8_static"}
    convert.export_checkpoint(tmp_path / "out", tmp_path / "dense", to="dense", dtype="float32")
    exported = read_tensors(tmp_path / "dense")[f"{name}.weight"].floats()
    assert_same({name: exported}, {name: tower["weight"].floats() * np.float32(0.3)})


OLD_ROPE = {"rope_parameters": None, "rope_theta": 10000.0}
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
ARCHITECTURES = [  # (family, what config.json says instead, None being an absent key; what `architecture` then says)
    ("qwen3", OLD_ROPE | {"rope_scaling": None}, {}),
    ("qwen3", OLD_ROPE | {"rope_scaling": {"type": "yarn", **YARN}}, {"rope_scaling": {"rope_type": "yarn", **YARN}}),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
     {"rope_scaling": {"rope_type": "yarn", **YARN}, "rope_theta": 1e6}),
    ("qwen3", {"layer_types": None}, {}),
    ("qwen3", {"tie_word_embeddings": None}, {}),
    ("qwen3", {"eos_token_id": [1, 2]}, {"eos_token_id": [1, 2]}),
    ("qwen3", {"sliding_window": 64}, {}),
    ("qwen3", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
     {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}),
    ("qwen3_5", OLD_ROPE | {"partial_rotary_factor": 0.25}, {}),
    ("qwen3_5", {"layer_types": None, "full_attention_interval": 2}, {}),
    ("qwen3_5", {"output_gate_type": "swish"}, {}),
    ("qwen3_5", {"output_gate_type": "sigmoid"}, {"output_gate": "sigmoid"}),
    ("qwen3_moe", {"num_experts": None, "num_local_experts": 3}, {}),
    ("llama", OLD_ROPE | {"rope_scaling": {"type": "llama3", **LLAMA3}}, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    ("llama", {"head_dim": None}, {}),
    ("nemotron_h", {"hybrid_override_pattern": None, "layers_block_type": ["mamba", "moe", "attention", "mlp"]}, {}),
    ("nemotron_h", {"hybrid_override_pattern": None,
                    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}, {}),
    ("nemotron_h", {"num_hidden_layers": 77}, {}),
    ("nemotron_h", {"time_step_limit": [0.0, {"__float__": "Infinity"}]}, {}),
    ("nemotron_h", {"time_step_limit": [0.001, 0.1]}, {"time_step_limit": [0.001, 0.1]}),
    ("nemotron_h", {"layer_norm_epsilon": None, "norm_eps": 1e-5}, {}),
    ("nemotron_h", {"n_groups": None, "mamba_n_groups": 2, "conv_kernel": None, "mamba_d_conv": 4}, {}),
    ("step3p5", {"moe_layers_enum": None, "mlp_layer_types": ["dense", "sparse"]}, {}),
    ("step3p5", {"moe_num_experts": None, "n_routed_experts": 3, "moe_top_k": None, "num_experts_per_tok": 2}, {}),
    ("step3p5", {"num_attention_groups": None, "num_key_value_heads": 2, "attention_other_setting": None,
                 "num_sliding_attention_heads": 6}, {}),
    ("step3p5", {"moe_router_activation": None, "zero_centered": None, "use_rope_layers": []}, {}),
    ("step3_text", {"max_position_embedding": None, "max_position_embeddings": 512}, {}),
    ("step3_text", {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}),
    ("step3_text", {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
     {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    ("step3_text", {"rope_scaling": {"type": "llama3", **LLAMA3}}, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "says", "has"), ARCHITECTURES, ids=[str(i) for i in range(len(ARCHITECTURES))])
def test_spellings_of_the_architecture(family: str, says: dict[str, Any], has: dict[str, Any], tmp_path: Path) -> None:
    """Configs of several transformers versions say the same thing; the canonical config has one spelling."""
    built = build(tmp_path / "in", family=family, dialect="dense", scheme="bf16")

    def change(config: Any) -> None:
        for key, value in says.items():
            config.pop(key, None) if value is None else config.update({key: value})

    edit_json(tmp_path / "in" / "config.json", change)
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["architecture"] == built.architecture | has


# ------------------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("row", EXPORTED, ids=lambda row: row.id)
def test_export_float32(row: Row, converted: Callable[[Row], tuple[Built, Path]], tmp_path: Path) -> None:
    """Dense weights under Hugging Face names, unfused, are the builder's bit for bit."""
    built, out = converted(row)
    convert.export_checkpoint(out, tmp_path / "dense", to="dense", dtype="float32")
    exported = read_tensors(tmp_path / "dense")
    assert {t.dtype for t in exported.values()} == {"F32"}
    assert_same({name: tensor.floats() for name, tensor in exported.items()}, built.dense)
    config = read_json(tmp_path / "dense" / "config.json")
    assert "quantization_config" not in config
    assert config["architectures"] == read_json(built.directory / "config.json")["architectures"]


@pytest.mark.parametrize(
    "row",
    [Row("qwen3_5_vlm", "modelopt", "mixed"), Row("qwen3", "compressed-tensors", "mxfp4")],
    ids=lambda row: row.id,
)
def test_export_bfloat16(row: Row, converted: Callable[[Row], tuple[Built, Path]], tmp_path: Path) -> None:
    """bfloat16 is the float32 value rounded once, ties to even (torch's own rounding)."""
    built, out = converted(row)
    convert.export_checkpoint(out, tmp_path / "dense", to="dense", dtype="bfloat16")
    exported = read_tensors(tmp_path / "dense")
    assert {t.dtype for t in exported.values()} == {"BF16"}
    rounded = {name: torch.from_numpy(v.copy()).bfloat16().float().numpy() for name, v in built.dense.items()}
    assert_same({name: tensor.floats() for name, tensor in exported.items()}, rounded)


def test_export_bfloat16_ties(tmp_path: Path) -> None:
    """Values half-way between two bfloat16 numbers go to the even one."""
    build(tmp_path / "in", family="qwen3", dialect="modelopt", scheme="fp8")
    module = "model.layers.0.mlp.down_proj"
    scale = raw("F32", 1 + 2.0**-8)  # 1.0 times this lies half-way between 1 and 1 + 2**-7
    edit_tensors(tmp_path / "in", lambda stored: stored.update({f"{module}.weight_scale": scale}))
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    convert.export_checkpoint(tmp_path / "out", tmp_path / "dense", to="dense", dtype="bfloat16")
    values = read_tensors(tmp_path / "in")[f"{module}.weight"].floats() * scale.floats()
    assert (bits(values) & 0xFFFF == 0x8000).any()
    rounded = torch.from_numpy(values).bfloat16().float().numpy()
    assert_same({module: read_tensors(tmp_path / "dense")[f"{module}.weight"].floats()}, {module: rounded})


@pytest.mark.parametrize(
    "row",
    [
        Row("qwen3", "modelopt", "nvfp4"),
        Row("qwen3_tied_bias", "compressed-tensors", "fp8_static"),
        Row("qwen3_5_mtp", "fp8", "block"),
        Row("qwen3_5_vlm", "modelopt", "mixed_groups"),
        Row("qwen3_moe", "modelopt", "nvfp4"),
        Row("qwen3_vl_moe", "fp8", "block"),
        Row("qwen3_5_moe", "modelopt", "mixed"),
        Row("qwen3_5_moe_vlm", "compressed-tensors", "nvfp4"),
        Row("llama", "modelopt", "fp8"),
        Row("mistral", "modelopt", "fp8"),
        Row("qwen2", "modelopt", "nvfp4"),
    ],
    ids=lambda row: row.id,
)
def test_export_loads_in_transformers(row: Row, converted: Callable[[Row], tuple[Built, Path]], tmp_path: Path) -> None:
    """`from_pretrained` finds every key it wants and nothing else, and holds the builder's weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    built, out = converted(row)
    convert.export_checkpoint(out, tmp_path / "dense", to="dense", dtype="float32")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    model_class = getattr(transformers, config.architectures[0])
    model, loading = model_class.from_pretrained(tmp_path / "dense", dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    assert not [key for key in loading["unexpected_keys"] if not key.startswith("mtp.")]
    held = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    wanted = {name: v for name, v in stacked_experts(built.dense).items() if not name.startswith("mtp.")}
    if built.architecture["head"] == "tied":
        assert np.array_equal(held.pop("lm_head.weight"), held["model.embed_tokens.weight"])
    assert_same(held, wanted)


@pytest.mark.parametrize(
    "row",
    [
        Row("nemotron_h", "modelopt", "nvfp4"),
        Row("nemotron_h_latent", "fp8", "block"),
        Row("nemotron_h_dense", "modelopt", "fp8"),
        Row("step3p7", "modelopt", "nvfp4"),
    ],
    ids=lambda row: row.id,
)
def test_export_is_what_transformers_would_save(
    row: Row, converted: Callable[[Row], tuple[Built, Path]], tmp_path: Path
) -> None:
    """Classes that rename while loading: what they loaded, saved again, is the export itself (towers and drafts aside)."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    built, out = converted(row)
    convert.export_checkpoint(out, tmp_path / "dense", to="dense", dtype="float32")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    model_class = getattr(transformers, config.architectures[0])
    model, loading = model_class.from_pretrained(tmp_path / "dense", dtype=torch.float32, output_loading_info=True)
    towers = ("vision_model", "vit_large_projector", "multi_modal_projector")
    assert not [key for key in loading["missing_keys"] if not any(tower in key for tower in towers)]
    model.save_pretrained(tmp_path / "saved")
    saved = {name: tensor.floats() for name, tensor in read_tensors(tmp_path / "saved").items()}
    carried = ("mtp.", "model.layers.2.", *(f"{tower}." for tower in towers)) if row.family == "step3p7" else ("mtp.",)
    assert_same(
        {name: value for name, value in saved.items() if not name.startswith(carried)},
        {name: value for name, value in built.dense.items() if not name.startswith(carried)},
    )


def stacked_experts(dense: dict[str, Floats]) -> dict[str, Floats]:
    """Dense weights with the experts that are stored one by one stacked and fused, as transformers 5 holds them."""
    found = dict(dense)
    for name in [n for n in dense if ".experts.0.down_proj.weight" in n]:
        container = name.partition(".0.down_proj")[0]
        count = sum(n.startswith(f"{container}.") and n.endswith(".down_proj.weight") for n in dense)
        parts = [[found.pop(f"{container}.{e}.{part}_proj.weight") for part in ("gate", "up", "down")] for e in range(count)]
        found[f"{container}.gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up, _ in parts])
        found[f"{container}.down_proj"] = np.stack([down for _, _, down in parts])
    return found


def test_export_refuses_what_it_cannot_do(converted: Callable[[Row], tuple[Built, Path]], tmp_path: Path) -> None:
    """An unknown dtype, and a source instead of a canonical checkpoint, are refused; nothing is written."""
    built, out = converted(Row("qwen3", "modelopt", "fp8"))
    with pytest.raises((convert.ConvertError, ValueError)):
        convert.export_checkpoint(out, tmp_path / "a", to="dense", dtype="int8")
    with pytest.raises(convert.ConvertError):
        convert.export_checkpoint(built.directory, tmp_path / "b", to="dense", dtype="float32")
    assert not list(tmp_path.iterdir())


def test_builder_is_no_echo() -> None:
    """The builder's own tables against torch's: the values of all FP8 codes, and rounding to bfloat16."""
    codes = torch.arange(256, dtype=torch.uint8)
    assert_same(
        {"e4m3": Raw("F8_E4M3", (256,), bytes(range(256))).floats()[:127]},
        {"e4m3": codes.view(torch.float8_e4m3fn).float().numpy()[:127]},
    )
    assert_same(
        {"e8m0": Raw("F8_E8M0", (256,), bytes(range(256))).floats()[:255]},
        {"e8m0": codes.view(torch.float8_e8m0fnu).float().numpy()[:255]},
    )

"""Experts, however they are stored: every layout of a model becomes the same canonical bytes, or is refused by name."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import BLOCK, LAYOUTS, RECIPES, Built, Raw, build, edit_json, edit_tensors, join, raw, read_file, read_json
from build import read_tensors as read
from conftest import Ran
from networks import SIZES, Sizes

import convert

EXPERTS = "model.layers.0.mlp.experts"
MOE: dict[str, Any] = {"family": "qwen3_moe"}
MTP: dict[str, Any] = {"family": "qwen3_5_moe", "mtp": True}
VLM: dict[str, Any] = MTP | {"wrapper": True}
NEMOTRON: dict[str, Any] = {"family": "nemotron_h"}  # not gated: one partition
STEP: dict[str, Any] = {"family": "step3p5"}
STACKED = [name for name, layout in LAYOUTS.items() if layout.stacked]
Plain = Callable[..., tuple[dict[str, Raw], dict[str, Any]]]


def convert_and_check(built: Built, out: Path) -> tuple[dict[str, Raw], dict[str, Any]]:
    """Convert, compare with what the builder expects, and verify.  Returns canonical tensors and config."""
    convert.convert_checkpoint(built.directory, out)
    found, config = read(out), read_json(out / "config.json")
    described = {name: (t.dtype, t.shape) for name, t in found.items()}
    assert described == {name: (t.dtype, t.shape) for name, t in built.canonical.items()}
    assert not [name for name, tensor in found.items() if tensor.data != built.canonical[name].data]
    assert config["quantization"] == {"modules": built.modules, "kv_cache": built.kv_cache}
    assert config["unfused"] == built.unfused
    assert config["architecture"] == built.architecture
    result = convert.verify_conversion(built.directory, out)
    assert result.elements == sum(math.prod(tensor.shape) for tensor in built.canonical.values())
    return found, config


def assert_exported(built: Built, out: Path, dense: Path) -> None:
    """The dense export has the builder's names, shapes and bits."""
    convert.export_checkpoint(out, dense, to="dense", dtype="float32")
    exported = {name: tensor.floats() for name, tensor in read(dense).items()}
    assert {name: value.shape for name, value in exported.items()} == {name: v.shape for name, v in built.dense.items()}
    different = [n for n, v in exported.items() if v.tobytes() != np.ascontiguousarray(built.dense[n], np.float32).tobytes()]
    assert not different


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Canonical tensors and config of the same model stored expert by expert; each combination is converted once."""
    done: dict[str, tuple[dict[str, Raw], dict[str, Any]]] = {}

    def of(**options: Any) -> tuple[dict[str, Raw], dict[str, Any]]:
        key = repr(sorted(options.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("each")
            done[key] = convert_and_check(build(folder / "in", **options), folder / "out")
        return done[key]

    return of


# -------------------------------------------------------------------------------------------- one model, many layouts

TWO_I_IS_H = Sizes(64, 96, 80, 4, 2, 16, 2, 4, 16, 24, moe_inter=32)  # gate_up is square, down_proj decides
SQUARE = Sizes(64, 96, 80, 4, 2, 16, 2, 4, 16, 24, moe_inter=64)  # down_proj is square, fused gate_up decides
PACKED_SQUARE = Sizes(64, 96, 80, 4, 2, 16, 2, 4, 16, 24, moe_inter=16)  # the same after two codes to a byte
MANY = replace(SIZES["small"], experts=12)  # expert 10 comes after expert 9, not after expert 1
ONE = replace(SIZES["small"], experts=1)
TWO = replace(SIZES["small"], experts=2)  # as many as gate and up
SAME: list[tuple[dict[str, Any], str, str, dict[str, Any]]] = [  # (model, dialect, scheme, further options)
    (VLM, "modelopt", "nvfp4", {}),
    (VLM, "modelopt", "nvfp4", {"expert_scales": "expert"}),
    (MOE, "modelopt", "nvfp4", {"expert_scales": "one"}),
    (MOE, "modelopt", "nvfp4", {"sizes": PACKED_SQUARE}),
    (MOE, "modelopt", "nvfp4", {"shards": 3, "scales_apart": True}),
    (MOE, "modelopt", "w4a16_nvfp4", {"expert_scales": "expert", "form": "hf_quant"}),
    (MTP, "modelopt", "fp8", {}),
    (MOE, "modelopt", "fp8", {"expert_scales": "expert", "sizes": TWO_I_IS_H}),
    (MOE, "modelopt", "fp8", {"expert_scales": "one", "wrapper": True, "family": "qwen3_vl_moe"}),
    (MOE, "modelopt", "fp8_pc_pt", {}),
    (MOE, "modelopt", "fp8_pb_wo", {"sizes": "aligned"}),
    (MOE, "modelopt", "mxfp8", {}),
    (VLM, "modelopt", "mixed", {"form": "both"}),
    (MOE, "compressed-tensors", "nvfp4", {"sizes": "block"}),
    (MOE, "compressed-tensors", "nvfp4", {"expert_scales": "one"}),
    (MOE, "compressed-tensors", "fp8_static", {"expert_scales": "expert"}),
    (MTP, "compressed-tensors", "fp8_dynamic", {}),
    (MOE, "compressed-tensors", "mxfp4", {}),
    (MOE, "compressed-tensors", "fp8_block", {"sizes": "aligned"}),
    (VLM, "compressed-tensors", "mixed", {}),
    (VLM, "fp8", "block", {"sizes": "aligned"}),
    (MOE, "fp8", "block_bf16", {}),
    (MOE, "fp8", "block_e8m0", {"sizes": "aligned"}),
    (MOE, "fp8", "tensor_static", {}),
    (VLM, "dense", "bf16", {}),
    (MOE, "dense", "f32", {"sizes": TWO_I_IS_H}),
    (VLM | {"family": "qwen3_vl_moe", "mtp": False}, "dense", "f16", {}),
    (MOE, "modelopt", "nvfp4", {"sizes": MANY}),
    (MOE, "compressed-tensors", "fp8_static", {"sizes": TWO, "expert_scales": "expert"}),
    (MOE, "compressed-tensors", "nvfp4", {"sizes": ONE}),
    (NEMOTRON, "modelopt", "nvfp4", {"mtp": True, "variety": "latent"}),
    (NEMOTRON, "modelopt", "fp8", {"wrapper": True, "expert_scales": "one"}),
    (NEMOTRON, "compressed-tensors", "nvfp4", {"expert_scales": "expert"}),
    (NEMOTRON, "fp8", "block", {}),
    (NEMOTRON, "dense", "bf16", {}),
    (STEP, "modelopt", "nvfp4", {"mtp": True, "wrapper": True}),
    (STEP, "modelopt", "fp8", {"expert_scales": "one"}),
    (STEP, "fp8", "block", {"sizes": "aligned", "mtp": True}),
    (STEP, "dense", "bf16", {}),
    (STEP | {"family": "step3_text"}, "modelopt", "mixed", {"expert_scales": "expert"}),
]
SAME_IDS = [
    "-".join((model["family"], dialect, scheme,
              *(f"E={v.experts}-I={v.moe_inter}" if isinstance(v, Sizes) else f"{k}={v}" for k, v in more.items())))
    for model, dialect, scheme, more in SAME
]  # fmt: skip


@pytest.mark.parametrize("layout", [name for name in STACKED if name != "X8-routed"])  # another prefix of X8, tested below
@pytest.mark.parametrize(("model", "dialect", "scheme", "more"), SAME, ids=SAME_IDS)
def test_every_layout_gives_the_same_bytes(
    layout: str, model: dict[str, Any], dialect: str, scheme: str, more: dict[str, Any], one_by_one: Plain, tmp_path: Path
) -> None:
    """Canonical tensors and quantisation do not depend on the layout, and are the builder's; `verify` agrees."""
    options = model | {"dialect": dialect, "scheme": scheme} | more
    tensors, config = one_by_one(**options)
    built = build(tmp_path / "in", layout=layout, **options)
    found, found_config = convert_and_check(built, tmp_path / "out")
    assert found == tensors
    assert found_config["quantization"] == config["quantization"]
    assert read_json(tmp_path / "out" / "conversion.json")["contradictions"] == []


@pytest.mark.parametrize("layout", [name for name in STACKED if LAYOUTS[name].fused])
@pytest.mark.parametrize(("dialect", "scheme"), [("dense", "bf16"), ("modelopt", "fp8"), ("modelopt", "mxfp8")])
def test_a_square_down_projection(layout: str, dialect: str, scheme: str, one_by_one: Plain, tmp_path: Path) -> None:
    """I == H: only the fused gate and up show which axis is which, for down as well."""
    options = MOE | {"dialect": dialect, "scheme": scheme, "sizes": SQUARE}
    found, _ = convert_and_check(build(tmp_path / "in", layout=layout, **options), tmp_path / "out")
    assert found == one_by_one(**options)[0]


def test_gate_and_up_fused_in_each_expert(tmp_path: Path) -> None:
    """`experts.0.gate_up_proj.weight` and one scale for it: as if stored apart with equal scales."""
    built = build(tmp_path / "in", dialect="modelopt", scheme="nvfp4", expert_scales="expert", **MOE)

    def change(stored: dict[str, Raw]) -> None:
        for e in range(3):
            gate, up = f"{EXPERTS}.{e}.gate_proj", f"{EXPERTS}.{e}.up_proj"
            for role in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
                parts = [stored.pop(f"{module}.{role}") for module in (gate, up)]
                assert parts[0].shape or parts[0] == parts[1]
                stored[f"{EXPERTS}.{e}.gate_up_proj.{role}"] = join(parts) if parts[0].shape else parts[0]

    edit_tensors(tmp_path / "in", change)
    convert_and_check(built, tmp_path / "out")


WRAPPED = [  # (layout, base_layer, a name on disk)
    ("X1", "some", f"{EXPERTS}.2.gate_proj.base_layer.weight"),
    ("X1", "all", f"{EXPERTS}.2.down_proj.base_layer.weight_scale_2"),
    ("X2", "some", f"{EXPERTS}.base_layer.gate_up_proj"),
    ("X2", "all", f"{EXPERTS}.base_layer.base_layer.gate_up_proj_weight_scale"),
    ("X3", "all", f"{EXPERTS}.base_layer.base_layer.down_proj"),
    ("X4", "all", f"{EXPERTS}.gate_proj.base_layer.weight_scale_2"),
    ("X8", "some", f"{EXPERTS}.base_layer.w13_weight"),
    ("X8", "all", f"{EXPERTS}.base_layer.base_layer.w2_input_scale"),
    ("X8-routed", "some", f"{EXPERTS}.routed_experts.base_layer.w2_weight"),
]
WRAPPED_ELSEWHERE = [  # (model, prefix, layout, base_layer, a name on disk)
    (STEP, "S1", "X4", "all", "model.layers.1.moe.gate_proj.base_layer.weight"),
    (STEP, "S2", "X1", "all", "model.language_model.layers.1.moe.experts.2.down_proj.base_layer.input_scale"),
    (STEP, "S3", "X8", "some", "language_model.model.layers.1.moe.experts.base_layer.w13_weight"),
    (NEMOTRON, "N1", "X2", "all", "backbone.layers.1.mixer.experts.base_layer.base_layer.up_proj"),
    (NEMOTRON, "Q7-N1", "X1", "all", "base_model.model.backbone.layers.1.mixer.experts.0.up_proj.base_layer.weight_scale"),
    (NEMOTRON, "N1", "X8", "all", "backbone.layers.1.mixer.experts.base_layer.base_layer.w2_weight_scale_2"),
]


@pytest.mark.parametrize("outer", ["", "Q7-"], ids=["inner", "peft"])
@pytest.mark.parametrize(("layout", "base_layer", "name"), WRAPPED, ids=[f"{w[0]}-{w[1]}" for w in WRAPPED])
def test_base_layers(layout: str, base_layer: str, name: str, outer: str, one_by_one: Plain, tmp_path: Path) -> None:
    """`.base_layer.` of a LoRA-wrapped checkpoint goes away in every layout, once or doubled, before scale suffixes too."""
    options = MTP | {"dialect": "modelopt", "scheme": "nvfp4"}
    tensors, config = one_by_one(**options)
    built = build(tmp_path / "in", layout=layout, base_layer=base_layer, prefix=f"{outer}Q3", **options)
    assert ("base_model.model." if outer else "") + name in read(tmp_path / "in")
    found, found_config = convert_and_check(built, tmp_path / "out")
    assert found == tensors
    assert found_config["quantization"] == config["quantization"]
    report = read_json(tmp_path / "out" / "conversion.json")
    assert any("base_layer" in repair for repair in report["repairs"])
    assert not report["contradictions"]


@pytest.mark.parametrize(
    ("model", "prefix", "layout", "base_layer", "name"), WRAPPED_ELSEWHERE, ids=["-".join(w[1:4]) for w in WRAPPED_ELSEWHERE]
)
def test_base_layers_of_other_families(
    model: dict[str, Any], prefix: str, layout: str, base_layer: str, name: str, one_by_one: Plain, tmp_path: Path
) -> None:
    """The same below the prefixes and in the layouts of Step and Nemotron."""
    options = model | {"dialect": "modelopt", "scheme": "nvfp4"}
    built = build(tmp_path / "in", layout=layout, base_layer=base_layer, prefix=prefix, **options)
    assert name in read(tmp_path / "in")
    found, _ = convert_and_check(built, tmp_path / "out")
    assert found == one_by_one(**options)[0]
    assert not read_json(tmp_path / "out" / "conversion.json")["contradictions"]


EXPORTS = [
    (model, layout, dialect, scheme)
    for model in (MOE, VLM, NEMOTRON, STEP)
    for layout, dialect, scheme in (
        ("X1", "modelopt", "nvfp4"), ("X2", "modelopt", "nvfp4"), ("X3", "compressed-tensors", "nvfp4"),
        ("X4", "compressed-tensors", "fp8_dynamic"), ("X1", "fp8", "block"), ("X2", "fp8", "block"),
        ("X8", "fp8", "tensor_static"), ("X1", "modelopt", "nvfp4_awq"), ("X2", "modelopt", "mxfp8"), ("X3", "dense", "bf16"),
        ("X1", "modelopt", "mixed_groups"),
    )
]  # fmt: skip


EXPORT_IDS = ["-".join((model["family"], *row)) for model, *row in EXPORTS]


@pytest.mark.parametrize(("model", "layout", "dialect", "scheme"), EXPORTS, ids=EXPORT_IDS)
def test_export(model: dict[str, Any], layout: str, dialect: str, scheme: str, tmp_path: Path) -> None:
    """The dense weights of the export are the builder's, in the layout of the family's own checkpoints."""
    built = build(tmp_path / "in", layout=layout, dialect=dialect, scheme=scheme, **model)
    convert_and_check(built, tmp_path / "out")
    assert_exported(built, tmp_path / "out", tmp_path / "dense")


# --------------------------------------------------------------------------------------------------- what is stored


def test_gate_and_up_keep_their_own_scales(tmp_path: Path) -> None:
    """Global and input scales of gate and up differ and stay apart, `[E, 2]`, read from the source file itself."""
    built = build(tmp_path / "in", dialect="modelopt", scheme="nvfp4", **MOE)
    source = read(tmp_path / "in")
    found, config = convert_and_check(built, tmp_path / "out")
    for role in ("weight_scale_2", "input_scale"):
        stored = [[source[f"{EXPERTS}.{e}.{part}_proj.{role}"].data for part in ("gate", "up")] for e in range(3)]
        assert len({data for row in stored for data in row}) == 6
        tensor = found[f"{EXPERTS}.gate_up_proj.{role}"]
        assert (tensor.dtype, tensor.shape) == ("F32", (3, 2))
        assert tensor.data == b"".join(data for row in stored for data in row)
        assert found[f"{EXPERTS}.down_proj.{role}"].shape == (3, 1)
    assert config["quantization"]["modules"][f"{EXPERTS}.gate_up_proj"] == {
        "scheme": "nvfp4", "shape": [192, 64], "activations": "nvfp4", "partitions": [["gate", 96], ["up", 96]], "experts": 3,
    }  # fmt: skip


@pytest.mark.parametrize("scheme", ["block", "block_e8m0"])
@pytest.mark.parametrize("layout", [name for name in STACKED if LAYOUTS[name].fused])
def test_a_block_that_holds_the_end_of_gate_and_the_start_of_up(layout: str, scheme: str, tmp_path: Path) -> None:
    """Blocks of a fused stack that run across the border: one partition for both, so nothing is quantised again."""
    inner, hidden = SIZES["block"].moe_inter, SIZES["block"].hidden
    assert inner % BLOCK
    built = build(tmp_path / "in", dialect="fp8", scheme=scheme, layout=layout, **VLM)
    found, config = convert_and_check(built, tmp_path / "out")
    entry = config["quantization"]["modules"][f"{EXPERTS}.gate_up_proj"]
    assert "partitions" not in entry
    assert entry["shape"] == [2 * inner, hidden]
    assert found[f"{EXPERTS}.gate_up_proj.weight_scale"].shape == (3, -(-2 * inner // BLOCK), -(-hidden // BLOCK))
    assert_exported(built, tmp_path / "out", tmp_path / "dense")


def test_blocks_of_experts_one_by_one_restart_at_up(tmp_path: Path) -> None:
    """Gate and up stored apart have blocks of their own, partial at the end: two partitions."""
    inner = SIZES["block"].moe_inter
    found, config = convert_and_check(build(tmp_path / "in", dialect="fp8", scheme="block", **MOE), tmp_path / "out")
    entry = config["quantization"]["modules"][f"{EXPERTS}.gate_up_proj"]
    assert entry["partitions"] == [["gate", inner], ["up", inner]]
    assert found[f"{EXPERTS}.gate_up_proj.weight_scale"].shape == (3, 2 * -(-inner // BLOCK), 2)


RENAMED = [  # (layout, dialect, scheme, spelling of a suffix on disk, another one)
    ("X2", "fp8", "block_bf16", "_proj_weight_scale_inv", "_proj_scale_inv"),  # transformers' own FP8 experts
    ("X8", "fp8", "block_bf16", "_weight_scale_inv", "_scale_inv"),
]


@pytest.mark.parametrize(("layout", "dialect", "scheme", "usual", "other"), RENAMED, ids=[f"{r[0]}-{r[-1]}" for r in RENAMED])
def test_other_spellings_of_scales(layout: str, dialect: str, scheme: str, usual: str, other: str, tmp_path: Path) -> None:
    """Scales of stacks under another name."""
    built = build(tmp_path / "in", dialect=dialect, scheme=scheme, layout=layout, **MOE)

    def change(stored: dict[str, Raw]) -> None:
        names = [name for name in stored if name.endswith(usual) and ".experts." in name]
        assert names
        for name in names:
            stored[name.removesuffix(usual) + other] = stored.pop(name)

    edit_tensors(tmp_path / "in", change)
    convert_and_check(built, tmp_path / "out")


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe"])
def test_spellings_of_the_number_of_experts(family: str, key: str, tmp_path: Path) -> None:
    """transformers 5 writes `num_local_experts` where hub configs have `num_experts`."""
    built = build(tmp_path / "in", family=family, dialect="dense", scheme="bf16")
    edit_json(tmp_path / "in" / "config.json", lambda config: config.update({key: config.pop("num_experts")}))
    convert_and_check(built, tmp_path / "out")


def test_scalars_of_one_element(tmp_path: Path) -> None:
    """A scale for all experts may be stored as `[1]` instead of 0-d, and one for each expert as `[E, 1]`."""
    options = MOE | {"dialect": "modelopt", "scheme": "fp8", "layout": "X4"}
    for shape, expert_scales in (((1,), "one"), ((3, 1), "expert")):
        folder = tmp_path / expert_scales
        built = build(folder / "in", expert_scales=expert_scales, **options)

        def change(stored: dict[str, Raw], shape: tuple[int, ...] = shape) -> None:
            for name in [n for n in stored if ".experts." in n and n.endswith("_scale")]:
                stored[name] = Raw(stored[name].dtype, shape, stored[name].data)

        edit_tensors(folder / "in", change)
        convert_and_check(built, folder / "out")


NAMED = [  # (dialect, scheme, rules): who says what about experts
    ("modelopt", "mixed", ()),
    ("modelopt", "mixed", (("*.experts.*", "fp8_block_wo"),)),
    ("modelopt", "mixed", (("*.experts.*", "nvfp4_wo"),)),
    ("modelopt", "fp8", (("*.experts.*", None),)),
    ("compressed-tensors", "nvfp4", (("*.experts.*", None),)),
    ("fp8", "block_bf16", (("*.experts.*", None),)),
]
NAMED_IDS = [f"{d}-{s}-{rules[0][1] if rules else 'as-is'}" for d, s, rules in NAMED]


@pytest.mark.parametrize("names", ["each", "fused", "container", "first"])
@pytest.mark.parametrize("layout", ["X1", "X2", "X4"])
@pytest.mark.parametrize(("dialect", "scheme", "rules"), NAMED, ids=NAMED_IDS)
def test_what_a_config_calls_experts(
    dialect: str, scheme: str, rules: tuple[tuple[str, str | None], ...], layout: str, names: str, tmp_path: Path
) -> None:
    """A config may name every projection, the fused stack, the container or expert 0 alone: it means all experts."""
    built = build(
        tmp_path / "in", dialect=dialect, scheme=scheme, rules=rules, layout=layout, expert_names=names, sizes="aligned", **MTP
    )
    convert_and_check(built, tmp_path / "out")
    assert read_json(tmp_path / "out" / "conversion.json")["contradictions"] == []


# ------------------------------------------------------------------------------------------------------- kept apart

APART = [  # (rules, layout, what is listed for layer 0 under `unfused`)
    ((("*.experts.1.*", "fp8"),), "X1", {
        f"{EXPERTS}.gate_up_proj": ["0.gate_up_proj", "1.gate_up_proj", "2.gate_up_proj"],
        f"{EXPERTS}.down_proj": ["0.down_proj", "1.down_proj", "2.down_proj"]}),
    ((("*.experts.1.*", None),), "X1", {
        f"{EXPERTS}.gate_up_proj": ["0.gate_up_proj", "1.gate_up_proj", "2.gate_up_proj"],
        f"{EXPERTS}.down_proj": ["0.down_proj", "1.down_proj", "2.down_proj"]}),
    ((("*.experts.2.down_proj", "nvfp4_wo"),), "X1", {f"{EXPERTS}.down_proj": ["0.down_proj", "1.down_proj", "2.down_proj"]}),
    ((("*.experts.1.up_proj", "nvfp4_wo"),), "X1", {
        f"{EXPERTS}.gate_up_proj": ["0.gate_up_proj", "1.gate_proj", "1.up_proj", "2.gate_up_proj"]}),
    ((("*.experts.*.gate_proj", "fp8"),), "X1", {f"{EXPERTS}.gate_up_proj": ["gate_proj", "up_proj"]}),
    ((("*.experts.*.gate_proj", "fp8"),), "X4", {f"{EXPERTS}.gate_up_proj": ["gate_proj", "up_proj"]}),
    ((("*.experts.*.up_proj", None),), "X4", {f"{EXPERTS}.gate_up_proj": ["gate_proj", "up_proj"]}),
    ((("*.experts.*.gate_proj", "nvfp4_awq"),), "X1", {f"{EXPERTS}.gate_up_proj": ["gate_proj", "up_proj"]}),
    ((("*.experts.*.down_proj", "fp8"),), "X2", {}),
    ((("*.experts.*.down_proj", None),), "X3", {}),
]  # fmt: skip


@pytest.mark.parametrize("model", [MOE, MTP], ids=lambda m: m["family"])
@pytest.mark.parametrize(("rules", "layout", "unfused"), APART, ids=[f"{r[0][0]}={r[0][1]}-{layout}" for r, layout, _ in APART])
def test_schemes_that_differ_are_kept_apart(
    rules: tuple[tuple[str, str | None], ...], layout: str, unfused: dict[str, list[str]], model: dict[str, Any], tmp_path: Path
) -> None:
    """One expert in another format, or gate in another than up: separate modules, listed; export puts them together."""
    options = model | {"dialect": "modelopt", "scheme": "mixed", "pre_quant_scale_on": ("gate_proj",)}
    built = build(tmp_path / "in", rules=rules, layout=layout, **options)
    _, config = convert_and_check(built, tmp_path / "out")
    assert {name: parts for name, parts in config["unfused"].items() if name.startswith(EXPERTS)} == unfused
    for module, entry in config["quantization"]["modules"].items():
        assert ("experts" in entry) == (".experts." in module and not module.rpartition(".")[0][-1].isdecimal())
    assert_exported(built, tmp_path / "out", tmp_path / "dense")


# ------------------------------------------------------------------------------------------------- verify can say no

NVFP4_ROLES = ("weight", "weight_scale", "weight_scale_2", "input_scale")
KINDS = [  # (options, roles of a stack)
    (MOE | {"dialect": "modelopt", "scheme": "nvfp4"}, NVFP4_ROLES),
    (MOE | {"dialect": "modelopt", "scheme": "nvfp4_awq"}, ("weight", "pre_quant_scale")),
    (MOE | {"dialect": "modelopt", "scheme": "nvfp4", "layout": "X3"}, NVFP4_ROLES),
    (MOE | {"dialect": "compressed-tensors", "scheme": "nvfp4", "layout": "X4"}, ("weight", "weight_scale_2", "input_scale")),
    (MOE | {"dialect": "modelopt", "scheme": "fp8", "layout": "X2", "expert_scales": "one"}, ("weight_scale", "input_scale")),
    (MOE | {"dialect": "modelopt", "scheme": "fp8_pc_pt", "layout": "X3"}, ("weight", "weight_scale")),
    (MOE | {"dialect": "fp8", "scheme": "block", "layout": "X3"}, ("weight", "weight_scale")),
    (MOE | {"dialect": "fp8", "scheme": "block_e8m0", "layout": "X8"}, ("weight", "weight_scale")),
    (MOE | {"dialect": "compressed-tensors", "scheme": "mxfp4"}, ("weight", "weight_scale")),
    (MOE | {"dialect": "dense", "scheme": "bf16", "layout": "X3"}, ("weight",)),
]


@pytest.mark.parametrize(
    ("options", "roles"), KINDS, ids=["-".join(str(v) for k, v in o.items() if k != "family") for o, _ in KINDS]
)
def test_verify_sees_a_flipped_bit(options: dict[str, Any], roles: Iterable[str], tmp_path: Path) -> None:
    """One bit of any tensor of a stack, in its first, middle and last expert: `verify` names the tensor."""
    built = build(tmp_path / "in", **options)
    convert_and_check(built, tmp_path / "out")
    weight_map = read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    tensors = [f"{EXPERTS}.{last}_proj.{role}" for last in ("gate_up", "down") for role in roles]
    for tensor in [name for name in tensors if name in weight_map]:
        file = tmp_path / "out" / weight_map[tensor]
        sound, data = file.read_bytes(), read_file(file)[tensor].data
        start = sound.index(data)
        for at in (0, len(data) // 2, len(data) - 4):
            content = bytearray(sound)
            content[start + at] ^= 1
            file.write_bytes(content)
            with pytest.raises(convert.ConvertError, match=tensor.rpartition(".")[0].replace(".", r"\.")):
                convert.verify_conversion(built.directory, tmp_path / "out")
        file.write_bytes(sound)


def test_verify_sees_exchanged_experts(tmp_path: Path) -> None:
    """The right bytes in the wrong order."""
    built = build(tmp_path / "in", layout="X2", dialect="modelopt", scheme="nvfp4", **MOE)
    convert_and_check(built, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    content = file.read_bytes()
    data = read_file(file)[f"{EXPERTS}.down_proj.weight"].data
    size, start = len(data) // 3, content.index(data)
    file.write_bytes(content[:start] + data[size : 2 * size] + data[:size] + data[2 * size :] + content[start + len(data) :])
    with pytest.raises(convert.ConvertError, match=r"experts\.down_proj"):
        convert.verify_conversion(built.directory, tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------- refused

NVFP4: dict[str, Any] = MOE | {"dialect": "modelopt", "scheme": "nvfp4"}
PLAIN: dict[str, Any] = MOE | {"dialect": "dense", "scheme": "bf16"}
Change = Callable[[dict[str, Raw]], object]


def without(*names: str) -> Change:
    """Remove tensors below the experts of layer 0; names may be shell patterns."""

    def change(stored: dict[str, Raw]) -> None:
        for name in names:
            found = fnmatch.filter(stored, f"{EXPERTS}.{name}")
            assert found
            for stale in found:
                del stored[stale]

    return change


def zeros(name: str, dtype: str, *shape: int) -> Change:
    """Add or replace a tensor below the experts of layer 0."""
    return lambda stored: stored.update({f"{EXPERTS}.{name}": raw(dtype, np.zeros(shape))})


def set_in_config(**values: Any) -> Callable[[Any], object]:
    """Set keys of config.json."""
    return lambda config: config.update(values)


REFUSED: dict[str, tuple[dict[str, Any], Change | None, Callable[[Any], object] | None, tuple[str, ...]]] = {
    # id: (options, change of the tensors, change of the config, what the message has to name)
    "a-weight-missing": (NVFP4, without("1.up_proj.weight"), None, (f"{EXPERTS}.1.up_proj.weight:",)),
    "a-block-scale-missing": (NVFP4, without("1.up_proj.weight_scale"), None, (f"{EXPERTS}.1.up_proj.weight_scale:",)),
    "a-global-scale-missing": (NVFP4, without("2.down_proj.weight_scale_2"), None, (f"{EXPERTS}.2.down_proj.weight_scale_2:",)),
    "a-projection-missing": (NVFP4, without("2.down_proj.*"), None, (f"{EXPERTS}.2.down_proj.weight:",)),
    "an-expert-missing": (NVFP4, without("1.*"), None, (f"{EXPERTS}.1.gate_proj.weight:", f"{EXPERTS}.1.down_proj.weight:")),
    "the-first-expert-missing": (NVFP4, without("0.*"), None, (f"{EXPERTS}.0.gate_proj.weight:",)),
    "an-input-scale-missing": (
        NVFP4, without("1.up_proj.input_scale"), None, (f"{EXPERTS}.1.up_proj.input_scale:", "calibrate"),
    ),
    "an-expert-not-calibrated": (
        NVFP4 | {"scheme": "fp8"}, without(*(f"1.{p}_proj.input_scale" for p in ("gate", "up", "down"))), None,
        (f"{EXPERTS}.1.gate_proj.input_scale:", f"{EXPERTS}.1.down_proj.input_scale:"),
    ),
    "an-expert-not-calibrated-mixed": (
        NVFP4 | {"scheme": "mixed"}, without("1.up_proj.input_scale"), None, (f"{EXPERTS}.1.up_proj.input_scale:",),
    ),
    "a-divisor-missing": (
        NVFP4 | {"dialect": "compressed-tensors"}, without("1.up_proj.input_global_scale"), None,
        (f"{EXPERTS}.1.up_proj.input_global_scale:",),
    ),
    "an-expert-too-many": (NVFP4, None, set_in_config(num_experts=2), (f"{EXPERTS}.2.", "mlp.gate.weight: expected")),
    "an-expert-too-few": (NVFP4, None, set_in_config(num_experts=4), (f"{EXPERTS}.3.gate_proj.weight:",)),
    "an-expert-of-another-size": (
        PLAIN, zeros("1.down_proj.weight", "BF16", 64, 64), None, (f"{EXPERTS}.1.down_proj.weight:",),
    ),
    "an-index-with-a-zero": (PLAIN, zeros("03.down_proj.weight", "BF16", 64, 96), None, (f"{EXPERTS}.03.down_proj.weight:",)),
    "an-expert-twice": (
        PLAIN, zeros("1.down_proj.base_layer.weight", "BF16", 64, 96), None, (f"one source for {EXPERTS}.1.down_proj.weight",),
    ),
    "one-by-one-and-stacked": (PLAIN, zeros("down_proj", "BF16", 3, 64, 96), None, (f"{EXPERTS}.down_proj:",)),
    "stacked-twice": (
        PLAIN | {"layout": "X2"}, zeros("w2_weight", "BF16", 3, 64, 96), None, (f"one source for {EXPERTS}.down_proj.weight",),
    ),
    "a-stack-too-tall": (
        NVFP4 | {"layout": "X2"}, None, set_in_config(num_experts=2), (f"{EXPERTS}.gate_up_proj:", "[2, 192, 32]"),
    ),
    "a-stack-too-short": (NVFP4 | {"layout": "X2"}, None, set_in_config(num_experts=4), (f"{EXPERTS}.gate_up_proj:",)),
    "half-a-stack": (NVFP4 | {"layout": "X2"}, without("down_proj*"), None, (f"{EXPERTS}.down_proj",)),
    "a-stack-without-its-scale": (
        NVFP4 | {"layout": "X2"}, without("down_proj_weight_scale"), None, (f"{EXPERTS}.down_proj_weight_scale:",),
    ),
    "a-dumped-stack-without-its-scale": (
        NVFP4 | {"layout": "X8"}, without("w2_weight_scale"), None, (f"{EXPERTS}.w2_weight_scale:",),
    ),
    "a-stack-without-its-input-scale": (
        NVFP4 | {"layout": "X2"}, without("down_proj_input_scale"), None, (f"{EXPERTS}.down_proj_input_scale:",),
    ),
    "three-scales-for-two-partitions": (
        NVFP4 | {"layout": "X2"}, zeros("gate_up_proj_weight_scale_2", "F32", 3, 3), None,
        (f"{EXPERTS}.gate_up_proj_weight_scale_2:", "[3, 3]"),
    ),
    "scales-of-other-experts": (
        NVFP4 | {"layout": "X2"}, zeros("gate_up_proj_weight_scale_2", "F32", 2), None,
        (f"{EXPERTS}.gate_up_proj_weight_scale_2:",),
    ),
    "a-scale-of-zero": (
        NVFP4 | {"layout": "X2"}, zeros("gate_up_proj_weight_scale_2", "F32", 3), None,
        (f"{EXPERTS}.gate_up_proj_weight_scale_2:", "greater than 0"),
    ),
    "two-orientations": (PLAIN | {"layout": "X2"}, zeros("down_proj", "BF16", 3, 96, 64), None, (f"{EXPERTS}.down_proj:",)),
    "neither-orientation": (PLAIN | {"layout": "X3"}, zeros("down_proj", "BF16", 3, 48, 128), None, (f"{EXPERTS}.down_proj:",)),
    "far-too-many-experts-of-nemotron": (
        NEMOTRON | {"dialect": "dense", "scheme": "bf16"}, None, set_in_config(n_routed_experts=1 << 40), ("n_routed_experts",),
    ),
    "too-few-experts-of-step": (
        STEP | {"dialect": "fp8", "scheme": "block", "layout": "X4"}, None, set_in_config(moe_num_experts=4),
        ("model.layers.1.moe.gate_proj.weight:", "model.layers.1.moe.down_proj.weight_scale_inv:"),
    ),
    "too-many-experts-of-nemotron": (
        NEMOTRON | {"dialect": "dense", "scheme": "bf16"}, None, set_in_config(n_routed_experts=2),
        ("backbone.layers.1.mixer.experts.2.up_proj.weight:",),
    ),
    "square-and-not-gated": (
        NEMOTRON | {"dialect": "dense", "scheme": "bf16", "layout": "X2", "sizes": SQUARE}, None, None, ("orientation",),
    ),
    "far-too-many-experts": (NVFP4, None, set_in_config(num_experts=1 << 30), ("config.json", "num_experts")),
    "a-flat-stack": (PLAIN | {"layout": "X2"}, zeros("down_proj", "BF16", 192, 96), None, (f"{EXPERTS}.down_proj:",)),
    "square": (PLAIN | {"layout": "X4", "sizes": SQUARE}, None, None, (f"{EXPERTS}.", "orientation", "one by one")),
    "square-fp8": (NVFP4 | {"scheme": "fp8", "layout": "X4", "sizes": SQUARE}, None, None, ("orientation",)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, cli: Callable[..., Ran], tmp_path: Path) -> None:
    """Exit code 1, a line that names the tensor, and no output."""
    options, change, change_config, words = REFUSED[name]
    build(tmp_path / "in", **options)
    if change is not None:
        edit_tensors(tmp_path / "in", change)
    if change_config is not None:
        edit_json(tmp_path / "in" / "config.json", change_config)
    ran = cli(tmp_path / "in", tmp_path / "out")
    assert ran.code == 1
    assert not [word for word in words if word not in ran.err], ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


def test_stacked_and_one_by_one_in_one_layer(tmp_path: Path) -> None:
    """Gate and up stacked and fused while down is stored expert by expert: each projection decides for itself."""
    built = build(tmp_path / "in", layout="X2", **PLAIN)

    def change(stored: dict[str, Raw]) -> None:
        tall = stored.pop(f"{EXPERTS}.down_proj")
        size = len(tall.data) // 3
        for e in range(3):
            stored[f"{EXPERTS}.{e}.down_proj.weight"] = Raw("BF16", tall.shape[1:], tall.data[e * size : (e + 1) * size])

    edit_tensors(tmp_path / "in", change)
    convert_and_check(built, tmp_path / "out")


def test_layouts_are_tested() -> None:
    """Every dialect and every stacked layout occurs above."""
    assert {dialect for _, dialect, _, _ in SAME} == {dialect for dialect, _ in RECIPES}
    assert {layout for layout, *_ in WRAPPED} == set(LAYOUTS)


def lose(below: str) -> Callable[[dict[str, Raw]], object]:
    """Remove every tensor one of whose last two segments begins with `below`."""

    def change(stored: dict[str, Raw]) -> None:
        gone = [name for name in stored if any(part.startswith(below) for part in name.split(".")[-2:])]
        assert gone
        for name in gone:
            del stored[name]

    return change


LOST = {  # id: (options, what is lost, name and expectation of the first missing tensor)
    "stacked": ({"layout": "X2"}, "down_proj", "experts.down_proj: expected experts of [3, 64, 96]"),
    "stacked-first": ({"layout": "X2"}, "gate_up_proj", "experts.gate_up_proj: expected experts of [3, 192, 64]"),
    "transposed": ({"layout": "X3"}, "down_proj", "experts.down_proj: expected experts of [3, 64, 96]"),
    "engine": ({"layout": "X8"}, "w2", "experts.w2_weight: expected experts of [3, 64, 96]"),
    "engine-routed": ({"layout": "X8-routed"}, "w13", "experts.routed_experts.w13_weight: expected experts of [3, 192, 64]"),
    "by-projection": ({"family": "step3p5", "layout": "X4"}, "up_proj", "model.layers.1.moe.up_proj.weight: expected"),
    "one-by-one": ({}, "down_proj", "experts.0.down_proj.weight: expected a weight of [64, 96], as each of 3 experts has"),
}


@pytest.mark.parametrize("scheme", [("dense", "bf16"), ("modelopt", "nvfp4")], ids="-".join)
@pytest.mark.parametrize(("options", "lost", "says"), LOST.values(), ids=LOST)
def test_lost_stacks_under_their_own_names(
    options: dict[str, Any], lost: str, says: str, scheme: tuple[str, str], tmp_path: Path
) -> None:
    """A projection that all layers, or one, lack is named as this checkpoint would name it."""
    made = {"family": "qwen3_5_moe", "dialect": scheme[0], "scheme": scheme[1], **options}
    build(tmp_path / "in", **made)
    edit_tensors(tmp_path / "in", lose(lost))
    with pytest.raises(convert.ConvertError) as caught:
        convert.plan_conversion(tmp_path / "in")
    assert any(says in str(problem) for problem in caught.value.problems), caught.value


def test_a_layer_without_experts(tmp_path: Path) -> None:
    """The other layer shows how they would be called."""
    build(tmp_path / "in", family="qwen3_5_moe", dialect="modelopt", scheme="nvfp4", layout="X8-routed")
    experts = "model.layers.1.mlp.experts"
    edit_tensors(tmp_path / "in", lambda stored: [stored.pop(n) for n in list(stored) if n.startswith(experts)])
    with pytest.raises(convert.ConvertError) as caught:
        convert.plan_conversion(tmp_path / "in")
    assert [problem.tensor for problem in caught.value.problems] == [
        f"model.layers.1.mlp.experts.routed_experts.{name}_weight" for name in ("w13", "w2")
    ]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_5_moe", ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]),
        ("qwen3_moe", [f"model.layers.0.mlp.experts.0.{p}_proj.weight" for p in ("gate", "up", "down")]),
        ("step3p5", [f"model.layers.1.moe.{p}_proj.weight" for p in ("gate", "up", "down")]),
    ],
)
def test_a_checkpoint_without_experts(family: str, names: list[str], tmp_path: Path) -> None:
    """Nothing shows how they would be called: they are named as the family's own checkpoints do."""
    build(tmp_path / "in", family=family, dialect="modelopt", scheme="nvfp4")
    edit_tensors(tmp_path / "in", lambda stored: [stored.pop(n) for n in list(stored) if "experts" in n.split(".")])
    with pytest.raises(convert.ConvertError) as caught:
        convert.plan_conversion(tmp_path / "in")
    layer = names[0].split(".")[2]
    assert [p.tensor for p in caught.value.problems if p.tensor.split(".")[2] == layer] == names


@pytest.mark.parametrize("scales", ["expert", "each"])
@pytest.mark.parametrize(("bad", "says"), [((1,), "in expert 1;"), ((1, 2), "in expert 1, the first of 2 such experts;")])
def test_a_fault_in_a_stack_is_one_line(scales: str, bad: tuple[int, ...], says: str, tmp_path: Path) -> None:
    """However many experts have it, and however often their scale is used."""
    build(tmp_path / "in", family="qwen3_5_moe", dialect="modelopt", scheme="nvfp4", layout="X2", expert_scales=scales)
    name = "model.layers.1.mlp.experts.gate_up_proj_weight_scale_2"

    def damage(stored: dict[str, Raw]) -> None:
        values = stored[name].floats().copy()
        values[list(bad)] = np.nan
        stored[name] = raw("F32", values)

    edit_tensors(tmp_path / "in", damage)
    with pytest.raises(convert.ConvertError) as caught:
        convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    (line,) = str(caught.value).splitlines()
    assert name in line
    assert says in line

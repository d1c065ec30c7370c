"""`qconvert diff`: equal in meaning whatever the dialect, and every kind of difference with its measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import E2M1, E4M3, Built, Raw, build, edit_json, edit_tensors, raw, read_file, read_tensors, safetensors_bytes
from conftest import Ran

import convert
from convert.canonical import open_canonical
from convert.copying import Sources
from convert.differ import Difference
from convert.view import view_canonical, view_plan

Cli = Callable[..., Ran]
PAGE = (Path(__file__).parents[1] / "docs" / "inspect.md").read_text("utf-8")
NVFP4 = {"family": "qwen3", "dialect": "modelopt", "scheme": "nvfp4"}
FP8 = {"family": "qwen3", "dialect": "modelopt", "scheme": "fp8"}
MIXED = {"family": "qwen3_5", "wrapper": True, "mtp": True, "dialect": "modelopt", "scheme": "mixed", "kv": "tensor"}
BLOCK = {"family": "qwen3", "dialect": "fp8", "scheme": "block"}
EXPERTS = {"family": "qwen3_moe", "dialect": "modelopt", "scheme": "nvfp4"}


def difference(a: Path, b: Path) -> dict[str, Any]:
    """What `diff_checkpoints` finds, as JSON values."""
    return json.loads(json.dumps(convert.diff_checkpoints(a, b).to_json()))


@pytest.mark.parametrize(
    "options",
    [NVFP4, MIXED, EXPERTS, BLOCK, {"family": "qwen3", "dialect": "compressed-tensors", "scheme": "nvfp4"},
     {"family": "qwen3_moe", "dialect": "fp8", "scheme": "block_e8m0"}, EXPERTS | {"layout": "X3"},
     {"family": "qwen3_vl_moe", "dialect": "fp8", "scheme": "block_e8m0", "layout": "X3"}],
    ids=["nvfp4", "mixed", "experts", "blocks", "divisors", "powers", "transposed", "transposed-powers"],
)  # fmt: skip
def test_a_source_and_what_is_made_of_it(options: dict[str, Any], make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """They mean the same, in either order; the files are other ones."""
    built, out = make(**options), tmp_path / "out"
    convert.convert_checkpoint(built.directory, out)
    for a, b in ((built.directory, out), (out, built.directory), (built.directory, built.directory), (out, out)):
        ran = cli("diff", a, b)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.splitlines()[-1] == "the same tensors and meaning"
    assert difference(built.directory, out)["tensors"] == len(built.canonical)


def test_other_names_mean_the_same(tmp_path: Path, cli: Cli) -> None:
    """Wrapper prefixes and `.base_layer.` change no meaning."""
    first = build(tmp_path / "a", **MIXED)
    second = build(tmp_path / "b", **MIXED, prefix="Q2", base_layer="all")
    found = difference(first.directory, second.directory)
    assert (found["equal"], found["stored_alike"], found["compared"]) == (True, False, "canonical")
    assert "stored under other names" in cli("diff", first.directory, second.directory).out


def _flip(data: bytes, at: int, bits: int) -> bytes:
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


Q = "model.layers.1.self_attn.q_proj"
CHANGES: dict[str, tuple[dict[str, Any], str, Callable[[Raw], Raw], Callable[[Raw, Raw], float]]] = {
    # stored name, change, distance of what is stored
    "fp8": (FP8, f"{Q}.weight", lambda t: Raw(t.dtype, t.shape, _flip(t.data, 5, 0x84)),
            lambda a, b: float(np.abs(E4M3[a.codes()] - E4M3[b.codes()]).max())),
    "nvfp4": (NVFP4, f"{Q}.weight", lambda t: Raw(t.dtype, t.shape, _flip(t.data, 5, 0x90)),
              lambda a, b: float(np.abs(E2M1[a.codes() >> 4] - E2M1[b.codes() >> 4]).max())),
    "scale": (FP8, f"{Q}.weight_scale", lambda t: raw("F32", t.floats() * 2),
              lambda a, b: float(np.abs(a.floats() - b.floats()))),
    "bf16": (FP8, "model.embed_tokens.weight", lambda t: Raw(t.dtype, t.shape, _flip(t.data, 9, 0x80)),
             lambda a, b: float(np.abs(a.floats() - b.floats()).max())),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_one_element(name: str, tmp_path: Path, cli: Cli) -> None:
    """A single element that differs is found, counted and measured."""
    options, tensor, change, distance = CHANGES[name]
    a, b = build(tmp_path / "a", **options), build(tmp_path / "b", **options)
    before = read_tensors(b.directory)[tensor]
    edit_tensors(b.directory, lambda stored: stored.update({tensor: change(stored[tensor])}))
    after = read_tensors(b.directory)[tensor]
    found = difference(a.directory, b.directory)
    (value,) = found["values"]
    assert not found["equal"]
    assert value["tensor"] == tensor.replace("q_proj", "qkv_proj")
    assert (value["differ"], value["max_abs"]) == (1, distance(before, after))
    canonical = a.canonical[value["tensor"]]
    assert value["elements"] == np.prod(canonical.shape) * (2 if name == "nvfp4" else 1)
    ran = cli("diff", a.directory, b.directory)
    assert (ran.code, ran.err) == (1, "")
    assert value["tensor"] in ran.out
    assert difference(a.directory, b.directory) == json.loads(cli("diff", a.directory, b.directory, "--json").out)
    assert cli("diff", a.directory, b.directory, "--no-values").code == 0


def test_not_a_number(tmp_path: Path) -> None:
    """NaN equals the same NaN, and has no distance to a number."""
    a, b = build(tmp_path / "a", **FP8), build(tmp_path / "b", **FP8)
    nan = raw("BF16", np.full(a.architecture["hidden_size"], np.nan))
    edit_tensors(a.directory, lambda stored: stored.update({"model.norm.weight": nan}))
    (value,) = difference(a.directory, b.directory)["values"]
    assert (value["differ"], value["max_abs"]) == (a.architecture["hidden_size"], None)
    edit_tensors(b.directory, lambda stored: stored.update({"model.norm.weight": nan}))
    assert difference(a.directory, b.directory)["equal"]


def test_minus_zero(tmp_path: Path) -> None:
    """Another bit pattern of the same number is a difference of 0."""
    a, b = build(tmp_path / "a", **FP8), build(tmp_path / "b", **FP8)
    for built, zero in ((a, 0.0), (b, -0.0)):
        norm = raw("F32", np.full(built.architecture["hidden_size"], zero))
        edit_tensors(built.directory, lambda stored, norm=norm: stored.update({"model.norm.weight": norm}))
    (value,) = difference(a.directory, b.directory)["values"]
    assert (value["differ"], value["max_abs"]) == (a.architecture["hidden_size"], 0.0)


@pytest.mark.parametrize(
    "options", [MIXED, EXPERTS | {"layout": "X3"}, EXPERTS, BLOCK], ids=["mixed", "transposed", "experts", "blocks"]
)
def test_any_range_can_be_read(options: dict[str, Any], make: Callable[..., Built], tmp_path: Path) -> None:
    """A tensor is the same whether it is read at once, in odd pieces, or from its middle; in a source and in OUT."""
    built, out = make(**options), tmp_path / "out"
    convert.convert_checkpoint(built.directory, out)
    for view in (view_plan(convert.plan_conversion(built.directory)), view_canonical(open_canonical(out))):
        with view:
            assert view.tensors.keys() == built.canonical.keys()
            for name, tensor in built.canonical.items():
                size = len(tensor.data)
                assert view.read(name) == tensor.data
                cuts = sorted({0, size // 7, size // 3, size - 1, size})
                assert b"".join(view.read(name, i, j) for i, j in pairwise(cuts)) == tensor.data
                assert view.read(name, size // 2) == tensor.data[size // 2 :]


@pytest.mark.parametrize(
    "options",
    [NVFP4, FP8, NVFP4 | {"scheme": "nvfp4_awq"}, BLOCK, EXPERTS, NVFP4 | {"scheme": "mxfp8"}, NVFP4 | {"scheme": "mxfp4"}],
    ids=["nvfp4", "fp8", "awq", "blocks", "experts", "mxfp8", "mxfp4"],
)
def test_weights_of_other_schemes(options: dict[str, Any], make: Callable[..., Built], tmp_path: Path) -> None:
    """A dequantised copy has the same weights, though hardly a tensor is alike; what was doubled is 1 away."""
    built, out, dense = make(**options), tmp_path / "out", tmp_path / "dense"
    convert.convert_checkpoint(built.directory, out)
    convert.export_checkpoint(out, dense, to="dense", dtype="float32")
    found = difference(built.directory, dense)
    assert not found["equal"]
    assert {entry["module"] for entry in found["weights"]} == set(built.modules)
    for entry in found["weights"]:
        assert (entry["a"], entry["b"]) == (built.modules[entry["module"]]["scheme"], "F32")
        assert (entry["differ"], entry["max_abs"], entry["relative"]) == (0, 0.0, 0.0)
    path = next(p for p in dense.glob("*.safetensors") if any(n.endswith("o_proj.weight") for n in read_file(p)))
    stored = read_file(path)
    name = next(n for n in stored if n.endswith("o_proj.weight"))
    stored[name] = raw("F32", stored[name].floats() * np.float32(2))
    path.write_bytes(safetensors_bytes(stored))
    (entry,) = (e for e in difference(built.directory, dense)["weights"] if e["differ"])
    assert entry["module"] == name.removesuffix(".weight")
    assert entry["relative"] == pytest.approx(1.0)
    assert entry["max_abs"] == np.abs(built.dense[name]).max()


def test_structure_of_refused_checkpoints(tmp_path: Path, cli: Cli) -> None:
    """A checkpoint that is refused is compared as it is stored, by names, dtypes and shapes; not with a canonical one."""
    a, b = build(tmp_path / "a", **FP8), build(tmp_path / "b", **FP8)

    def change(stored: dict[str, Raw]) -> None:
        del stored["model.norm.weight"]
        stored["model.extra"] = raw("F32", [1.0])
        stored["lm_head.weight"] = raw("F32", [[1.0]])

    edit_tensors(b.directory, change)
    found = difference(a.directory, b.directory)
    assert (found["compared"], found["equal"]) == ("stored", False)
    assert (found["only_in_a"], found["only_in_b"]) == (["model.norm.weight"], ["model.extra"])
    (entry,) = found["changed"]
    assert (entry["tensor"], entry["b"]) == ("lm_head.weight", {"dtype": "F32", "shape": [1, 1]})
    assert "as they are stored" in cli("diff", a.directory, b.directory).out
    convert.convert_checkpoint(a.directory, tmp_path / "out")
    ran = cli("diff", tmp_path / "out", b.directory)
    assert (ran.code, ran.out) == (1, "")
    assert "model.norm.weight" in ran.err


@pytest.mark.parametrize(
    ("field", "matters"), [("rope_theta", True), ("eos_token_id", True), ("transformers_version", False)]
)
def test_config_fields(field: str, matters: bool, tmp_path: Path) -> None:
    """Fields that differ are listed; who wrote the config changes no meaning."""
    a, b = build(tmp_path / "a", **FP8), build(tmp_path / "b", **FP8)
    edit_json(b.directory / "config.json", lambda c: c.update({field: 12345 if matters else "9.9.9"}))
    found = difference(a.directory, b.directory)
    assert {entry["field"].rpartition(".")[2] for entry in found["config"]} >= {field}
    assert found["equal"] is not matters
    assert {entry["matters"] for entry in found["config"]} == {matters}


@pytest.mark.parametrize(
    ("file", "matters"), [("tokenizer_config.json", True), ("chat_template.jinja", True), ("LICENSE", False)]
)
def test_other_files(file: str, matters: bool, tmp_path: Path) -> None:
    """Files that change what comes out count; others are listed."""
    a, b = build(tmp_path / "a", **FP8), build(tmp_path / "b", **FP8)
    (b.directory / file).write_text("{}")
    found = difference(a.directory, b.directory)
    assert found["files"] == [{"file": file, "what": "differs", "matters": matters}]
    assert found["equal"] is not matters
    (b.directory / file).unlink()
    assert difference(a.directory, b.directory)["files"][0]["what"] == "only in A"


def test_the_same_files_are_not_read(make: Callable[..., Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard links to the same files are equal without reading."""
    built, out, linked = make(**NVFP4), tmp_path / "out", tmp_path / "linked"
    convert.convert_checkpoint(built.directory, out)
    linked.mkdir()
    for path in out.iterdir():
        (linked / path.name).hardlink_to(path)

    def read(*_: object) -> None:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(Sources, "read_into", read)
    assert convert.diff_checkpoints(out, linked).equal


def test_wrong_paths(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """A missing directory is a mistake in the command, a damaged checkpoint its own."""
    built = make(**FP8)
    assert cli("diff", built.directory, tmp_path / "nothing").code == 2
    (tmp_path / "empty").mkdir()
    ran = cli("diff", built.directory, tmp_path / "empty")
    assert (ran.code, ran.out) == (1, "")
    assert len(ran.err.splitlines()) == 1


def test_keys_are_documented() -> None:
    """docs/inspect.md lists the keys of `diff --json`."""
    table = PAGE.partition("## `qconvert diff`")[2]
    missing = [name for name in Difference.__dataclass_fields__ if f"`{name}`" not in table]
    assert not missing

"""Limits on what a canonical checkpoint may claim: every reader refuses at once, in words, what would take it for ever."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import INDEX, build, edit_json
from conftest import Ran
from test_hostile import quickly

import convert
import runtime
from runtime.errors import LoadError
from runtime.format import MAX_EXPERTS, MAX_LAYERS, FormatError

Cli = Callable[..., Ran]
Change = Callable[[Path], object]
BILLION = 10**9
FILE = "model-00001-of-00001.safetensors"
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5": {"dialect": "modelopt", "scheme": "fp8", "mtp": True},
    "qwen3_moe": {"dialect": "dense", "scheme": "bf16"},
    "nemotron_h": {"dialect": "modelopt", "scheme": "mixed"},
    "step3p5": {"dialect": "fp8", "scheme": "tensor_static"},
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small conversion of each family."""
    folder = tmp_path_factory.mktemp("limits")
    for family, options in FAMILIES.items():
        build(folder / family / "in", family=family, **options)
        convert.convert_checkpoint(folder / family / "in", folder / family / "out")
    return {family: folder / family / "out" for family in FAMILIES}


def fact(**facts: Any) -> Change:
    """Change facts of the architecture."""
    return lambda out: edit_json(out / "config.json", lambda c: c["architecture"].update(facts))


def repeated(name: str, count: int) -> Change:
    """Make a list of the architecture that long."""

    def change(config: Any) -> None:
        entries = config["architecture"][name]
        config["architecture"][name] = (entries * count)[:count]

    return lambda out: edit_json(out / "config.json", change)


def huge(name: str) -> Change:
    """Make a file 101 MB long, most of it a hole."""
    return lambda out: os.truncate(out / name, 101_000_000)


def pipe(name: str) -> Change:
    """Put a pipe into the place of a file."""
    return lambda out: ((out / name).unlink(), os.mkfifo(out / name))


LAYERS, EXPERTS = f"at most {MAX_LAYERS}", f"at most {MAX_EXPERTS}"
CASES: list[tuple[str, str, Change, tuple[str, ...]]] = [
    ("qwen3_5", "layers", fact(num_hidden_layers=BILLION), ("num_hidden_layers", LAYERS, str(BILLION))),
    ("qwen3_5", "list-of-layers", repeated("layer_types", 200_000), ("layer_types", LAYERS, "200000")),
    ("qwen3_5", "draft-layers", fact(mtp_num_hidden_layers=BILLION), ("mtp_num_hidden_layers", LAYERS)),
    ("qwen3_moe", "experts", fact(num_experts=BILLION), ("num_experts", EXPERTS)),
    ("qwen3_moe", "layers-in-a-text", fact(mlp_layer_types="d" * 200_000), ("mlp_layer_types", LAYERS)),
    ("nemotron_h", "list-of-draft-layers", repeated("mtp_layer_types", 200_000), ("mtp_layer_types", LAYERS)),
    ("step3p5", "list-of-kinds", repeated("layer_kinds", 200_000), ("layer_kinds", LAYERS)),
    ("step3p5", "draft-layers", fact(num_nextn_predict_layers=BILLION), ("num_nextn_predict_layers", LAYERS)),
    ("qwen3_5", "config-of-101-MB", huge("config.json"), ("config.json", "100000000")),
    ("qwen3_5", "index-of-101-MB", huge(INDEX), (INDEX, "100000000")),
    *(("qwen3_5", f"pipe-for-{name}", pipe(name), (name, "a regular file")) for name in ("config.json", INDEX, FILE)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "change", "words"), [pytest.param(f, c, w, id=f"{f}-{name}") for f, name, c, w in CASES]
)
def test_every_reader_refuses(
    family: str, change: Change, words: tuple[str, ...], converted: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:
    """`verify`, `inspect`, `export` and the runtime: within bounds of time and memory, in one line that names the place."""
    out, source = tmp_path / "out", converted[family].parent / "in"
    shutil.copytree(converted[family], out)
    change(out)
    for args in (("verify", out), ("verify", source, out), ("inspect", out), ("export", out, tmp_path / "dense")):
        ran = quickly(cli, *args)
        assert (ran.code, ran.out) == (1, ""), args
        assert [word for word in words if word not in ran.err] == []
        assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "dense").exists()
    with pytest.raises((LoadError, FormatError)) as caught:
        runtime.load_model(out)
    assert [word for word in words if word not in str(caught.value)] == []
    assert str(caught.value).isprintable()

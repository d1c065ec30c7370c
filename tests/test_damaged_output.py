"""A damaged canonical checkpoint: `verify`, `export` and `inspect` say so in one line, never by a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import Built, build, edit_json, read_file, safetensors_bytes
from conftest import Ran

Cli = Callable[..., Ran]
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Built, Path]:
    """A source with all parts, and its conversion."""
    import convert

    folder = tmp_path_factory.mktemp("damaged")
    built = build(folder / "in", family="qwen3_5", dialect="modelopt", scheme="mixed", wrapper=True, mtp=True)
    convert.convert_checkpoint(built.directory, folder / "out")
    return built, folder / "out"


def shard(out: Path) -> Path:
    """The one file of tensors."""
    return out / "model-00001-of-00001.safetensors"


def config(change: Callable[[Any], object]) -> Change:
    """Edit config.json."""
    return lambda out: edit_json(out / "config.json", change)


def index(change: Callable[[Any], object]) -> Change:
    """Edit the index."""
    return lambda out: edit_json(out / "model.safetensors.index.json", lambda i: change(i["weight_map"]))


def without(tensor: str) -> Change:
    """Take one tensor out of file and index."""

    def change(out: Path) -> None:
        stored = read_file(shard(out))
        del stored[tensor]
        shard(out).write_bytes(safetensors_bytes(stored))
        index(lambda m: m.pop(tensor))(out)

    return change


QKVZ = "model.layers.0.linear_attn.in_proj_qkvz"
DAMAGE: list[tuple[str, Change, str]] = [
    ("parameter-gone", without("model.layers.0.linear_attn.A_log"), "A_log"),
    ("scale-gone", without(f"{QKVZ}.weight_scale"), f"{QKVZ}.weight_scale"),
    ("weight-gone", without("lm_head.weight"), "lm_head.weight"),
    ("index-forgets-a-tensor", index(lambda m: m.pop("model.norm.weight")), "model.norm.weight"),
    ("index-names-a-ghost", index(lambda m: m.update({"ghost.weight": next(iter(m.values()))})), "ghost.weight"),
    ("empty-file", lambda out: shard(out).write_bytes(b""), "model-00001-of-00001.safetensors"),
    ("no-file", lambda out: shard(out).unlink(), "model-00001-of-00001.safetensors"),
    ("architecture-without-layers", config(lambda c: c["architecture"].pop("layer_types")), "config.json"),
    ("architecture-of-text", config(lambda c: c["architecture"].update(hidden_size="64")), "config.json"),
    ("unknown-layer-type", config(lambda c: c["architecture"]["layer_types"].__setitem__(0, "x")), "config.json"),
    ("hf-config-a-list", config(lambda c: c.update(hf_config=[])), ""),
    ("modules-a-list", config(lambda c: c["quantization"].update(modules=[])), "config.json"),
    ("config-a-list", lambda out: (out / "config.json").write_text("[]"), "config.json"),
    ("another-family", config(lambda c: c.update(family="unheard_of")), "unheard_of"),
]


@pytest.mark.parametrize(("change", "word"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damage_is_one_line(
    converted: tuple[Built, Path], change: Change, word: str, cli: Cli, tmp_path: Path
) -> None:
    """Each command that reads OUT says what is wrong with it; export leaves nothing behind."""
    built, good = converted
    out = tmp_path / "out"
    shutil.copytree(good, out)
    change(out)
    for args in (("verify", built.directory, out), ("export", out, tmp_path / "dense")):
        ran = cli(*args)
        assert ran.code == 1, args
        assert word in ran.err
        assert all(line.startswith("qconvert: ") for line in ran.err.splitlines())
    assert not (tmp_path / "dense").exists()
    assert cli("inspect", out).code in (0, 1)


def test_verify_alone_checks_digests(converted: tuple[Built, Path], cli: Cli, tmp_path: Path) -> None:
    """`verify OUT` passes on what was written, and names the file in which one bit has changed."""
    out = tmp_path / "out"
    shutil.copytree(converted[1], out)
    ran = cli("verify", out)
    assert (ran.code, ran.err) == (0, "")
    content = bytearray(shard(out).read_bytes())
    content[-1] ^= 1
    shard(out).write_bytes(content)
    ran = cli("verify", out)
    assert ran.code == 1
    assert shard(out).name in ran.err


MEANT = [("", "out"), ("in", ""), ("inspect", ""), ("verify",), ("verify", "a", "b", "c"), ("in", ".")]


@pytest.mark.parametrize("args", MEANT, ids=repr)
def test_paths_that_cannot_be_meant(args: tuple[str, ...], cli_apart: Cli, tmp_path: Path) -> None:
    """An empty path, as an unset variable gives, and the working directory are refused as usage, with or without --force."""
    assert cli_apart(*args).code == 2
    if len(args) == 2 and args[0] != "verify":
        assert cli_apart(*args, "--json").code == 2


def test_report_holds_any_text(tmp_path: Path, cli: Cli) -> None:
    """A lone surrogate in a config is written and read again, not a traceback."""
    built = build(tmp_path / "in", family="qwen3", dialect="dense", scheme="bf16")
    text = (built.directory / "config.json").read_text()
    (built.directory / "config.json").write_text(text.replace("{", '{"note": "\\ud800",', 1))
    assert cli(built.directory, tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["hf_config"]["note"] == "\ud800"

"""A scale that was lost must not pass for one that never was, and one that never was must not be missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import Built, edit_json, edit_tensors
from conftest import Ran

MIXED: dict[str, Any] = {"family": "qwen3_5", "dialect": "modelopt", "scheme": "mixed"}
AWQ: dict[str, Any] = {"family": "qwen3_5", "dialect": "modelopt", "scheme": "nvfp4_awq"}
CT: dict[str, Any] = {"family": "qwen3_5", "dialect": "compressed-tensors", "scheme": "fp8_static"}
LOST = [  # id, how the source is built, the tensor that is lost (the last part of its name)
    ("head-of-a-mix", MIXED, "lm_head.input_scale"),
    ("only-module-of-its-kind", MIXED, "self_attn.o_proj.input_scale"),
    ("awq-multiplier-of-one-layer", AWQ, "layers.1.mlp.down_proj.pre_quant_scale"),
]


@pytest.mark.parametrize(("options", "tail"), [row[1:] for row in LOST], ids=[row[0] for row in LOST])
def test_lost_scale_is_refused(
    options: dict[str, Any], tail: str, make: Callable[..., Built], cli: Callable[..., Ran], tmp_path: Path
) -> None:
    """The one tensor that is gone is named, and nothing is written."""
    built = make(**options)
    gone: list[str] = []

    def change(stored: dict[str, Any]) -> None:
        gone.extend(name for name in stored if name.endswith(tail))
        for name in gone:
            del stored[name]

    edit_tensors(built.directory, change)
    assert gone
    ran = cli(built.directory, tmp_path / "out")
    assert ran.code == 1
    assert any(name in ran.err for name in gone)
    assert not (tmp_path / "out").exists()


def test_no_config_and_one_scale_gone(make: Callable[..., Built], cli: Callable[..., Ran], tmp_path: Path) -> None:
    """Without any quantisation config the tensors still show that one of them is missing."""
    built = make(**CT)
    edit_json(built.directory / "config.json", lambda c: c.pop("quantization_config"))
    assert cli(built.directory, tmp_path / "whole").code == 0

    def change(stored: dict[str, Any]) -> None:
        del stored[next(name for name in stored if name.endswith("self_attn.q_proj.input_scale"))]

    edit_tensors(built.directory, change)
    ran = cli(built.directory, tmp_path / "out")
    assert ran.code == 1
    assert "q_proj.input_scale" in ran.err


CONFIGS = [  # values that a compressed-tensors config may leave to the library's defaults, or spell otherwise
    ("block-structure-as-text", "fp8_block", lambda g: g["weights"].update(block_structure="128x128")),
    ("no-strategy", "fp8_static", lambda g: (g["weights"].pop("strategy"), g["input_activations"].pop("strategy"))),
    ("no-dynamic", "fp8_static", lambda g: g["input_activations"].pop("dynamic")),
]


@pytest.mark.parametrize(("scheme", "change"), [c[1:] for c in CONFIGS], ids=[c[0] for c in CONFIGS])
def test_defaults_of_compressed_tensors(
    scheme: str, change: Callable[[Any], Any], make: Callable[..., Built], cli: Callable[..., Ran], tmp_path: Path
) -> None:
    """What compressed-tensors 0.20 fills in itself is filled in the same way."""
    built = make(family="qwen3", dialect="compressed-tensors", scheme=scheme)
    edit_json(
        built.directory / "config.json", lambda c: [change(g) for g in c["quantization_config"]["config_groups"].values()]
    )
    assert cli(built.directory, tmp_path / "out").code == 0


MALFORMED = [
    ("fp8", "block", {"weight_block_size": 128}),
    ("fp8", "block", {"weight_block_size": True}),
    ("compressed-tensors", "fp8_static", {"sparsity_config": 3}),
    ("compressed-tensors", "fp8_static", {"config_groups": {"g": {"weights": {"type": [], "num_bits": {}}, "targets": []}}}),
    ("modelopt", "fp8", {"quant_algo": ["FP8"]}),
    ("modelopt", "fp8", {"ignore": 7}),
]


@pytest.mark.parametrize(("dialect", "scheme", "update"), MALFORMED, ids=lambda v: str(v)[:40])
def test_malformed_config_is_one_line(
    dialect: str, scheme: str, update: dict[str, Any], make: Callable[..., Built], cli: Callable[..., Ran], tmp_path: Path
) -> None:
    """Values of the wrong kind in a quantisation config are refused, never a traceback."""
    built = make(family="qwen3", dialect=dialect, scheme=scheme)
    edit_json(built.directory / "config.json", lambda c: c["quantization_config"].update(update))
    ran = cli(built.directory, tmp_path / "out")
    assert ran.code == 1
    assert ran.err.startswith("qconvert: config.json")

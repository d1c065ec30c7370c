"""A family is one file of tables: it is found by itself, and converts."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from build import Built, edit_json, read_json, read_tensors
from networks import SIZES

import convert
from convert.families import FAMILIES
from convert.families.base import Family

ROOT = Path(__file__).parents[1]
FILES = sorted(p.stem for p in (ROOT / "convert" / "families").glob("*.py") if p.stem not in ("__init__", "base"))


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_registered(file: str) -> None:
    """Each file defines a family, and the registry has all that it defines."""
    module = importlib.import_module(f"convert.families.{file}")
    defined = [value for value in vars(module).values() if isinstance(value, Family)]
    assert defined
    assert all(any(family is known for known in FAMILIES) for family in defined)


def test_model_types_mean_one_family() -> None:
    """No `model_type` is claimed twice."""
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))


def test_a_new_family_is_one_file(make: Callable[..., Built], tmp_path: Path) -> None:
    """A file put beside the others, and nothing else: checkpoints of that family are converted and verified."""
    for package in ("convert", "runtime"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "convert" / "families" / "zebra.py").write_text(
        "from dataclasses import replace\nfrom . import llama\n"
        'ZEBRA = replace(llama.FAMILY, name="zebra", model_types=("striped",))\n'
    )
    built = make(family="llama", dialect="modelopt", scheme="mixed")
    edit_json(built.directory / "config.json", lambda config: config.update(model_type="striped"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "convert", str(built.directory), str(tmp_path / "out"), "--verify"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert read_tensors(tmp_path / "out") == built.canonical
    assert read_json(tmp_path / "out" / "config.json")["family"] == "zebra"


def without_grouped_queries(config: Any) -> None:
    """As before 2023: no key says how many key and value heads there are, because there are as many as query heads."""
    del config["num_key_value_heads"], config["head_dim"]


def test_llama_before_grouped_queries(make: Callable[..., Built], tmp_path: Path) -> None:
    """The first Llama's config has neither `num_key_value_heads` nor `head_dim`."""
    built = make(family="llama", dialect="modelopt", scheme="fp8", sizes=replace(SIZES["small"], kv_heads=4))
    edit_json(built.directory / "config.json", without_grouped_queries)
    convert.convert_checkpoint(built.directory, tmp_path / "out")
    assert read_tensors(tmp_path / "out") == built.canonical
    assert read_json(tmp_path / "out" / "config.json")["architecture"] == built.architecture


WINDOWS = [
    {"use_sliding_window": True},
    {"use_sliding_window": True, "max_window_layers": 1},
    {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 64},
    {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": None},
    {"use_sliding_window": False, "max_window_layers": 1, "sliding_window": 64},
    {"max_window_layers": 0, "sliding_window": 64},
    {"sliding_window": None},
    {},
]


@pytest.mark.parametrize("family", [name for name in ("mistral", "qwen2", "qwen3") if name in {f.name for f in FAMILIES}])
@pytest.mark.parametrize("says", WINDOWS, ids=str)
def test_windows_are_those_of_transformers(
    family: str, says: dict[str, Any], make: Callable[..., Built], tmp_path: Path
) -> None:
    """The window of each layer, where the config says something, nothing, or null, is the one that transformers has."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    built = make(family=family, dialect="dense", scheme="bf16")

    def change(config: Any) -> None:
        for key in ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"):
            config.pop(key, None)
        config.update(says)

    edit_json(built.directory / "config.json", change)
    there = transformers.AutoConfig.from_pretrained(built.directory)
    kinds = getattr(there, "layer_types", None) or ["sliding_attention"] * 2
    wanted = [there.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    facts = convert.plan_conversion(built.directory).config.architecture
    found = [facts["sliding_window"] if kind == "sliding_attention" else None for kind in facts["layer_types"]]
    assert found == wanted

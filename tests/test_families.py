"""A family is one file of tables: it is found by itself, and converts."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from build import Built, edit_json, read_json, read_tensors

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

"""The layers of the project: who may import whom, and what must not be imported for a task."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            yield ".".join(part for part in (base, node.module or "") if part)


def files(package: str) -> list[Path]:
    """Every Python file of a package."""
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files("runtime"), ids=lambda p: str(p.relative_to(ROOT)))
def test_runtime_never_imports_convert(path: Path) -> None:
    """The runtime needs nothing of the converter, and click only for its commands."""
    roots = {name.partition(".")[0] for name in imports(path)}
    assert "convert" not in roots
    assert "click" not in roots or path.name in ("command.py", "evaluate.py", "generate.py", "serve.py")


@pytest.mark.parametrize("path", files("convert"), ids=lambda p: str(p.relative_to(ROOT)))
def test_convert_imports_only_the_contract(path: Path) -> None:
    """`runtime.format` is all that the converter shares, and torch is none of its business."""
    names = set(imports(path))
    assert {n for n in names if n.partition(".")[0] == "runtime"} <= {"runtime.format"}
    assert not {n.partition(".")[0] for n in names} & {"torch", "torchao", "safetensors", "transformers"}


def test_contract_is_standard_library() -> None:
    """`runtime/format.py` imports nothing that has to be installed."""
    assert {n.partition(".")[0] for n in imports(ROOT / "runtime" / "format.py")} <= STANDARD


def test_verifier_shares_no_recipe() -> None:
    """The proof of the tensors is independent of encodings, operations and the functions that transform values."""
    names = set(imports(ROOT / "convert" / "verifier.py"))
    recipes = {"plan", "ops", "apply", "recognise", "dialects", "dequantize"}
    assert not {n for n in names if n.rpartition(".")[2] in recipes or ".dialects" in n}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import convert.cli", ("torch", "torchao", "numpy", "tqdm")),
        ("from convert import plan_conversion", ("torch", "torchao", "numpy")),
        ("from convert import convert_checkpoint, verify_conversion, export_checkpoint", ("torch", "torchao")),
        ("import runtime.format", ("numpy", "torchao")),
        ("import runtime", ("click", "transformers", "torchao")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_import_is_light(code: str, absent: tuple[str, ...]) -> None:
    """Importing for one task does not load what another needs."""
    check = f"import sys; {code}; found = sorted(set({absent!r}) & set(sys.modules)); sys.exit(repr(found) if found else 0)"
    run = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

"""The documentation is checked against the code: commands run, tables match, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import errors_page
import families
import pytest
from support_table import BEGIN, END, table
from test_casebook import CASES

import convert
from convert.cli import cli
from convert.dialects import DIALECTS
from convert.families import FAMILIES
from convert.families.base import Family
from runtime.format import ACTIVATIONS, SCHEMES

# Facts that a config may hold and that the architecture replaces by others.
ARCHITECTURE_INPUTS = {
    "full_attention_interval", "partial_rotary_factor", "mlp_only_layers", "decoder_sparse_step", "moe_layers",
}  # fmt: skip

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FORMAT = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "samples" / "README.md"]


def test_support_table() -> None:
    """README's table is what the registries make of it: run `python tests/support_table.py` after a change to them.

    Rows of families that are described and tested, and not there yet, may come first.
    """
    awaited = tuple(f"| `{name}` |" for name in families.FAMILIES.keys() - {f.name for f in FAMILIES})
    lines = README.partition(BEGIN)[2].partition(END)[0].splitlines(keepends=True)
    assert "".join(line for line in lines if not awaited or not line.startswith(awaited)) == table()
    for name in (*(d.name for d in DIALECTS), *(f.name for f in FAMILIES)):
        assert f"| `{name}` |" in README


def test_errors_page() -> None:
    """docs/errors.md is what the code raises: run `python tests/errors_page.py` after a change to an error."""
    page = errors_page.page()
    assert errors_page.PAGE.read_text(encoding="utf-8") == page
    assert "| an empty or absent OUT | files in it | choose another OUT, or replace it with --force (exit 2) |" in page
    assert "| a safetensors header within ... bytes | header length ... |" in page  # made by a helper


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_format_page_describes_family(family: Family) -> None:
    """docs/format.md names each family and every field of its architecture."""
    assert f"`{family.name}`" in FORMAT
    fields = {field.name for field in family.fields} - ARCHITECTURE_INPUTS
    missing = sorted(name for name in fields if not re.search(rf"\b{name}\b", FORMAT))
    assert not missing


def commands(page: str) -> list[list[str]]:
    """The `qconvert` lines of a page's shell blocks, split."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("qconvert ")]


@pytest.mark.parametrize("args", commands(README), ids=" ".join)
def test_commands_parse(args: list[str]) -> None:
    """Each command of the README is accepted by the command line as it is written."""
    context = cli.make_context("qconvert", list(args), resilient_parsing=False)
    name, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    command.make_context(name, list(rest), parent=context)


def runtime_commands() -> list[tuple[str, list[str]]]:
    """The `python -m runtime....` lines of the README: module, and the options that each gives."""
    lines = re.findall(r"^python -m (runtime\.\w+) (.*)$", README, re.MULTILINE)
    return [(module, [w for w in shlex.split(rest, comments=True) if w.startswith("--")]) for module, rest in lines]


@pytest.mark.parametrize(("module", "options"), runtime_commands(), ids=str)
def test_runtime_commands_exist(module: str, options: list[str]) -> None:
    """Each command of the README has the options that it is shown with."""
    command = import_module(module).main
    assert {*options} <= {name for parameter in command.params for name in parameter.opts}


def test_format_page_is_complete() -> None:
    """docs/format.md names every scheme and every kind of activations."""
    for name in (*SCHEMES, *ACTIVATIONS):
        assert f"`{name}`" in FORMAT, name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links point to files that exist."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_architecture_names_real_files() -> None:
    """Every path that docs/architecture.md mentions exists."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:convert|runtime|tests|bench)/[\w/.]*)`", page):
        assert (ROOT / path).exists(), path


def test_faq_names_cases() -> None:
    """Every case that the questions point at is in the case book, and every key of a report is explained."""
    names = {case.name for case in CASES}
    page = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    mentioned = set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+){2,})`", page))
    assert mentioned
    assert mentioned <= names


def test_report_page_explains_every_key(tmp_path: Path) -> None:
    """docs/report.md has each key of a conversion report."""
    report = convert.convert_checkpoint(ROOT / "samples" / "qwen3_5-modelopt-mixed", tmp_path / "out", verify=True)
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    explained = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert report.to_json().keys() - explained == {"tensors", "bytes"}

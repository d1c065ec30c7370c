"""Makes docs/errors.md: every error of the converter, from where it is raised.  `python tests/errors_page.py` writes it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
HOLE = "..."
CODES = {"ConvertError": 1, "UsageError": 2, "MachineError": 3, "NetworkError": 3}
HEAD = """# Errors and remedies

Every error of `qconvert` is one line a problem: `file: tensor: expected E, found F; what to do`. This page lists them all, as
`tests/errors_page.py` reads them from the code; `...` stands for names and numbers. The exit code is 1 where a checkpoint is
refused, and stands beside the others: 2 for a command that cannot be carried out as asked, 3 for a machine that failed. Nothing
is written then, or what was there before is still there.
"""
# What the files of `convert/` are about; a file that is not here is headed by its docstring.
TITLES = {
    "base": "Configs of producers",
    "copying": "Copying",
    "source": "Reading IN",
    "planner": "Planning",
    "linears": "Linears and experts",
    "recognise": "What a stored module is",
    "staging": "Writing OUT",
    "verifier": "Verifying",
    "canonical": "Opening a canonical checkpoint",
    "errors": "IN that changes",
    "remote": "Reading IN from a URL",
    "huggingface": "Reading IN from a Hub",
}


class Row(NamedTuple):
    """One kind of error."""

    code: int
    expected: str
    found: str
    remedy: str


def constants(tree: ast.Module) -> dict[str, str]:
    """Names of a module that stand for text."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = template(node.value, {})
            if text != HOLE:
                found[node.targets[0].id] = text
    return found


def template(node: ast.expr, names: dict[str, str]) -> str:
    """The text of an expression, with holes where it depends on something."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else HOLE
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return template(node.value, names)
    if isinstance(node, ast.Name):
        return names.get(node.id, HOLE)
    if isinstance(node, ast.IfExp):
        texts = dict.fromkeys((template(node.body, names), template(node.orelse, names)))
        return " | ".join(text or "nothing" for text in texts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, names) + template(node.right, names)
    return HOLE


Call = tuple[ast.expr, ...]  # the arguments of a `Problem`


def problems(tree: ast.AST) -> Iterator[tuple[ast.Call, Call]]:
    """Every `Problem(...)` below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
            given = (*node.args, *(keyword.value for keyword in node.keywords))
            if len(given) == 5 and not any(isinstance(one, ast.Starred) for one in given):
                yield node, given


def helpers(tree: ast.Module) -> dict[str, tuple[list[str], Call, dict[str, ast.expr]]]:
    """Functions that make a `Problem` of what they are given: name -> parameters, the arguments of it, defaults."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            parameters = [one.arg for one in node.args.args if one.arg not in ("self", "cls")]
            defaults = dict(zip(reversed([one.arg for one in node.args.args]), reversed(node.args.defaults), strict=False))
            inside = list(problems(node))
            used = {name.id for _, given in inside for one in given[2:] for name in ast.walk(one) if isinstance(name, ast.Name)}
            if len(inside) == 1 and used & set(parameters):
                found[node.name] = (parameters, inside[0][1], defaults)
    return found


def rows(path: Path, shared: dict[str, str]) -> Iterator[Row]:
    """The errors that a file raises, in the order of its lines: its own `Problem`s, and those that its helpers make."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    names = {name: text for name, text in shared.items() if name in imported} | constants(tree)
    codes: dict[int, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODES:
            codes |= {id(argument): CODES[node.func.id] for argument in node.args}
    found: list[tuple[int, Row]] = []
    helping = helpers(tree)
    made = {id(given) for _, given, _ in helping.values()}
    for call, given in problems(tree):
        if id(given) not in made and not any(given == inner for _, inner, _ in helping.values()):
            found.append((call.lineno, Row(codes.get(id(call), 1), *(template(one, names) for one in given[2:]))))
    for node in ast.walk(tree):
        name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and name in helping:
            parameters, given, defaults = helping[name]
            passed = defaults | dict(zip(parameters, node.args, strict=False))
            passed |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            texts = {parameter: template(value, names) for parameter, value in passed.items()}
            found.append((node.lineno, Row(1, *(template(one, names | texts) for one in given[2:]))))
    for _, row in sorted(found):
        yield row


def cell(text: str) -> str:
    """Text for a table: neighbouring holes are one."""
    while HOLE * 2 in text:
        text = text.replace(HOLE * 2, HOLE)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").strip() or HOLE


def page() -> str:
    """docs/errors.md."""
    files = sorted((ROOT / "convert").rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    shared = {name: text for tree in trees.values() for name, text in constants(tree).items()}
    parts = [HEAD]
    for path in files:
        found = dict.fromkeys(row for row in rows(path, shared) if cell(row.expected) != HOLE)
        if not found:
            continue
        summary = re.split(r"[:.,]", ast.get_docstring(trees[path]) or path.stem)[0]
        name = path.relative_to(ROOT).as_posix()
        parts.append(f"\n## {TITLES.get(path.stem, summary)}\n`{name}`\n\n| expected | found | what to do |\n|---|---|---|\n")
        for row in found:
            code = "" if row.code == 1 else f" (exit {row.code})"
            parts.append(f"| {cell(row.expected)} | {cell(row.found)} | {cell(row.remedy)}{code} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

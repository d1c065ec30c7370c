"""The command line: what each command prints, where it prints it, its exit code, and what it imports."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import Built, edit_tensors, read_json, read_tensors
from conftest import Ran

import convert

Cli = Callable[..., Ran]
MIXED = {"family": "qwen3_5", "wrapper": True, "mtp": True, "dialect": "modelopt", "scheme": "mixed"}
FP8 = {"family": "qwen3_5", "dialect": "modelopt", "scheme": "fp8"}
CT = {"family": "qwen3", "dialect": "compressed-tensors", "scheme": "nvfp4"}
COMMANDS = ("inspect", "diff", "verify", "export")

# Runs the command line in a fresh interpreter and prints which of the heavy modules it imported.
IMPORTED = """
import runpy, sys
sys.argv = ["qconvert", *sys.argv[1:]]
try:
    runpy.run_module("convert", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    code = stop.code
print("IMPORTED", code, *(m for m in ("torch", "torchao", "numpy", "safetensors", "transformers") if m in sys.modules))
"""


def imported(cli_apart: Cli, *args: object) -> tuple[str, set[str]]:
    """Exit code, and the heavy modules that a command imported."""
    _, code, *modules = cli_apart(*args, code=IMPORTED).out.splitlines()[-1].split()
    return code, set(modules)


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS)], ids=lambda c: " ".join(c) or "main")
def test_help_imports_nothing_heavy(command: tuple[str, ...], cli_apart: Cli) -> None:
    """`--help` answers at once: neither torch nor torchao nor numpy."""
    code, modules = imported(cli_apart, *command, "--help")
    assert code in ("0", "None")
    assert not modules & {"torch", "torchao", "numpy", "transformers"}


def test_planning_needs_no_torch(make: Callable[..., Built], cli_apart: Cli, tmp_path: Path) -> None:
    """`--dry-run` reads headers and configs with the standard library."""
    code, modules = imported(cli_apart, make(**MIXED).directory, tmp_path / "out", "--dry-run")
    assert code in ("0", "None")
    assert not modules & {"torch", "torchao", "transformers"}


def test_inspect_needs_no_torch(make: Callable[..., Built], cli_apart: Cli) -> None:
    """`inspect` reads headers and configs only."""
    code, modules = imported(cli_apart, "inspect", make(**MIXED).directory)
    assert code in ("0", "None")
    assert not modules & {"torch", "torchao", "transformers"}


def test_help(cli: Cli) -> None:
    """Help names the commands and options, with the main job first."""
    out = cli("--help").out
    for word in ("IN", "OUT", "--dry-run", "Exit codes", *COMMANDS):
        assert word in out
    out = cli("IN", "OUT", "--help").out
    for word in ("--dry-run", "--json", "--verify", "--force", "--workers", "--shard-size"):
        assert word in out
    for command in COMMANDS:
        ran = cli(command, "--help")
        assert (ran.code, ran.err) == (0, "")


def test_dry_run(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """A plan for people: what is renamed, fused, expanded, reshaped, dropped and kept.  Writes nothing."""
    built = make(**MIXED)
    ran = cli(built.directory, tmp_path / "out", "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    for word in ("keep", "rename", "fuse", "expand", "reshape", "drop", "modelopt", "qwen3_5", "in_proj_qkvz"):
        assert word in ran.out.lower(), word
    assert max(map(len, ran.out.splitlines())) < 200
    assert "{" not in ran.out.splitlines()[0]


def test_dry_run_json(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """The same as one JSON document on standard output, equal to the API's plan; every tensor accounted for once."""
    built = make(**MIXED)
    ran = cli(built.directory, tmp_path / "out", "--dry-run", "--json")
    assert (ran.code, ran.err) == (0, "")
    plan = json.loads(ran.out)
    assert plan == json.loads(json.dumps(convert.plan_conversion(built.directory).to_json()))
    assert not (tmp_path / "out").exists()
    text = json.dumps(plan)
    assert [name for name in read_tensors(built.directory) if f'"{name}"' not in text] == []
    assert [name for name in built.canonical if f'"{name}"' not in text] == []


def test_dry_run_still_refuses(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """A plan that cannot be made is an error with `--dry-run` too, also under `--json`."""
    built = make(**FP8)
    edit_tensors(built.directory, lambda stored: stored.pop("model.norm.weight"))
    for more in ((), ("--json",)):
        ran = cli(built.directory, tmp_path / "out", "--dry-run", *more)
        assert ran.code == 1
        assert "model.norm.weight" in ran.err + ran.out


def test_convert(make: Callable[..., Built], cli_apart: Cli, tmp_path: Path) -> None:
    """The main job as a process: exit 0, no progress bar in a pipe, a short account on standard output."""
    built = make(**MIXED)
    ran = cli_apart(built.directory, tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    assert "\r" not in ran.out
    assert read_tensors(tmp_path / "out") == built.canonical
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_convert_json(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """`--json`: the report, valid JSON and nothing else on standard output."""
    ran = cli(make(**MIXED).directory, tmp_path / "out", "--json")
    assert (ran.code, ran.err) == (0, "")
    report, written = json.loads(ran.out), read_json(tmp_path / "out" / "conversion.json")
    for key in ("dialect", "family", "sources", "outputs", "repairs", "contradictions", "dropped", "zero_block_scales"):
        assert report[key] == written[key], key


def test_json_of_a_refusal(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """`--json` when refused: exit code 1, and the line is still on standard error."""
    built = make(**FP8)
    edit_tensors(built.directory, lambda stored: stored.pop("model.norm.weight"))
    ran = cli(built.directory, tmp_path / "out", "--json")
    assert ran.code == 1
    assert "model.norm.weight" in ran.err
    if ran.out:
        assert "model.norm.weight" in json.dumps(json.loads(ran.out))


@pytest.mark.parametrize("workers", ["1", "3"])
def test_convert_and_verify(workers: str, make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """`--verify` proves the conversion before it ends, and says how much was compared."""
    ran = cli(make(**CT).directory, tmp_path / "out", "--verify", "--workers", workers)
    assert (ran.code, ran.err) == (0, "")
    assert "verif" in ran.out.lower()
    assert any(c.isdigit() for c in ran.out)


def test_shard_size(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """`--shard-size` takes a size with a unit."""
    built = make(**CT)
    assert cli(built.directory, tmp_path / "out", "--shard-size", "20KB").code == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert read_tensors(tmp_path / "out") == built.canonical


def test_verify(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """`verify IN OUT`: exit 0 and a count; exit 1 and one line when OUT is damaged."""
    built = make(**CT)
    assert cli(built.directory, tmp_path / "out").code == 0
    ran = cli("verify", built.directory, tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    result = convert.verify_conversion(built.directory, tmp_path / "out")
    assert f"{result.elements:,}" in ran.out or str(result.elements) in ran.out
    as_json = cli("verify", built.directory, tmp_path / "out", "--json")
    assert json.loads(as_json.out)["elements"] == result.elements
    file = next((tmp_path / "out").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ran = cli("verify", built.directory, tmp_path / "out")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert file.name in ran.err


def _facts(found: Any) -> str:
    return json.dumps(found).lower()


@pytest.mark.parametrize("what", ["source", "canonical"])
@pytest.mark.parametrize("options", [MIXED, CT, FP8 | {"kv": "tensor"}], ids=["mixed", "ct", "kv"])
def test_inspect(what: str, options: dict[str, Any], make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """`inspect` says dialect, family and schemes of sources and canonical checkpoints; `--json` has every module."""
    built = make(**options)
    folder = built.directory
    if what == "canonical":
        folder = tmp_path / "out"
        assert cli(built.directory, folder).code == 0
    ran = cli("inspect", folder)
    assert (ran.code, ran.err) == (0, "")
    facts = [built.family, options["dialect"], *{entry["scheme"] for entry in built.modules.values()}]
    assert [fact for fact in facts if fact not in ran.out.lower()] == []
    assert len(ran.out.splitlines()) > 3
    as_json = cli("inspect", folder, "--json")
    assert (as_json.code, as_json.err) == (0, "")
    found = json.loads(as_json.out)
    assert found == json.loads(json.dumps(dict(convert.inspect_checkpoint(folder))))
    assert [fact for fact in (*facts, *built.modules) if fact.lower() not in _facts(found)] == []


def test_inspect_refuses_what_it_cannot_read(cli: Cli, tmp_path: Path) -> None:
    """An empty folder is exit code 1, a missing one exit code 2, each with one line."""
    (tmp_path / "empty").mkdir()
    for folder, code in ((tmp_path / "empty", 1), (tmp_path / "nothing", 2)):
        ran = cli("inspect", folder)
        assert (ran.code, ran.out) == (code, "")
        assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export(dtype: str, make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """`export OUT DIR --to dense --dtype ...` writes hub names; a target that is not empty is exit code 2."""
    built = make(**CT)
    assert cli(built.directory, tmp_path / "out").code == 0
    ran = cli("export", tmp_path / "out", tmp_path / "dense", "--to", "dense", "--dtype", dtype)
    assert (ran.code, ran.err) == (0, "")
    exported = read_tensors(tmp_path / "dense")
    assert exported.keys() == built.dense.keys()
    assert {t.dtype for t in exported.values()} == {{"float32": "F32", "bfloat16": "BF16"}[dtype]}
    again = cli("export", tmp_path / "out", tmp_path / "dense", "--to", "dense", "--dtype", dtype)
    assert again.code == 2
    assert read_tensors(tmp_path / "dense") == exported


@pytest.mark.parametrize(
    "args",
    [
        pytest.param((), id="nothing"),
        pytest.param(("only-in",), id="no-out"),
        pytest.param(("a", "b", "c"), id="too-many"),
        pytest.param(("a", "b", "--nonsense"), id="unknown-option"),
        pytest.param(("a", "b", "--workers", "0"), id="no-workers"),
        pytest.param(("a", "b", "--workers", "many"), id="workers-not-a-number"),
        pytest.param(("a", "b", "--shard-size", "big"), id="size-not-a-size"),
        pytest.param(("a", "b", "--shard-size", "0"), id="size-zero"),
        pytest.param(("export", "a", "b", "--to", "gguf"), id="unknown-target"),
        pytest.param(("export", "a", "b", "--to", "dense", "--dtype", "int8"), id="unknown-dtype"),
        pytest.param(("verify",), id="verify-nothing"),
    ],
)
def test_usage(args: tuple[str, ...], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that makes no sense is exit code 2 with a hint, and touches nothing."""
    monkeypatch.chdir(tmp_path)
    ran = cli(*args)
    assert ran.code == 2
    assert ran.err
    assert "Traceback" not in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("failure", "code", "word"),
    [(OSError(errno.ENOSPC, "No space left on device"), 3, "space"), (KeyboardInterrupt(), 130, "interrupted")],
    ids=["disk-full", "ctrl-c"],
)
@pytest.mark.parametrize("force", [False, True], ids=["new", "replacing"])
def test_failures_leave_nothing(
    failure: BaseException, code: int, word: str, force: bool, make: Callable[..., Built], cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A full disk or Ctrl-C while writing: its exit code, one line, and neither OUT nor anything beside it is new."""
    built, out = make(**CT), tmp_path / "out"
    if force:
        out.mkdir()
        (out / "old").write_text("still here")

    def fail(descriptor: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    ran = cli(built.directory, out, *(["--force"] if force else []))
    assert (ran.code, ran.out) == (code, "")
    assert len(ran.err.strip().splitlines()) == 1
    assert word in ran.err.lower()
    assert sorted(p.name for p in tmp_path.iterdir()) == (["in", "out"] if force else ["in"])
    assert not force or [p.name for p in out.iterdir()] == ["old"]


@pytest.mark.parametrize("out", [".", "new/../out", "out/"])
def test_spellings_of_out(
    out: str, make: Callable[..., Built], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT is a path like any other: converted into, or refused as usage; the machine is not to blame."""
    built, here = make(**CT), tmp_path / "here"
    (here / "new").mkdir(parents=True)
    if out == ".":
        (here / "new").rmdir()
    monkeypatch.chdir(here)
    ran = cli(built.directory, out)
    assert ran.code in (0, 2), ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "in"]
    if ran.code == 0:
        assert read_tensors((here / out).resolve()) == built.canonical


def test_folders_named_like_commands(make: Callable[..., Built], cli: Cli, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A checkpoint in a folder called `inspect` can still be converted, by writing `./inspect`."""
    make(name="inspect", **CT)
    monkeypatch.chdir(tmp_path)
    assert cli("./inspect", "out").code == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_api_never_prints(make: Callable[..., Built], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No function of the API writes to standard output or standard error."""
    built = make(**CT)
    convert.plan_conversion(built.directory)
    convert.inspect_checkpoint(built.directory)
    convert.diff_checkpoints(built.directory, built.directory)
    report = convert.convert_checkpoint(built.directory, tmp_path / "out")
    convert.verify_conversion(built.directory, tmp_path / "out")
    convert.export_checkpoint(tmp_path / "out", tmp_path / "dense", to="dense", dtype="float32")
    with pytest.raises(convert.ConvertError):
        convert.plan_conversion(tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert json.loads(json.dumps(report.to_json()))["dialect"] == "compressed-tensors"

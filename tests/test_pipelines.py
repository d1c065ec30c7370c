"""What pipelines rely on: JSON on standard output, events on standard error, exit codes, the environment, completion."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from build import Built, edit_tensors
from conftest import Ran

import convert
from convert.cli import cli as group
from convert.errors import SHOWN_PROBLEMS

Cli = Callable[..., Ran]
NVFP4 = {"family": "qwen3", "dialect": "compressed-tensors", "scheme": "nvfp4"}
PARTS = {"file", "tensor", "expected", "found", "remedy"}


def events(ran: Ran) -> list[dict[str, Any]]:
    """The events of a run: each line of standard error is one."""
    found = [json.loads(line) for line in ran.err.splitlines()]
    assert all(datetime.fromisoformat(event["time"]).utcoffset() == timedelta(0) for event in found)
    return found


def test_events(make: Callable[..., Built], cli_apart: Cli, tmp_path: Path) -> None:
    """`--log-json`: start, progress up to the whole, what a person should know, done; standard output as without."""
    built = make(**NVFP4)
    out = tmp_path / "out"
    ran = cli_apart(built.directory, out, "--log-json")
    assert ran.code == 0
    found = events(ran)
    assert [event["event"] for event in found if event["event"] not in ("progress", "note")] == ["start", "done"]
    assert (found[0]["in"], found[0]["out"]) == (str(built.directory), str(tmp_path / "out"))
    progress = [event for event in found if event["event"] == "progress"]
    assert progress[-1]["bytes"] == progress[-1]["total_bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert found[-1]["tensors"] == len(built.canonical)
    assert ran.out.startswith(str(out))


def test_events_of_a_refusal(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """The last event holds the parts of each problem; with `--json`, standard output holds the same."""
    built = make(**NVFP4)
    edit_tensors(built.directory, lambda stored: stored.pop("model.norm.weight"))
    ran = cli(built.directory, tmp_path / "out", "--log-json", "--json")
    assert ran.code == 1
    last = events(ran)[-1]
    assert (last["event"], last["exit_code"], last["problem_count"]) == ("error", 1, 1)
    (problem,) = last["problems"]
    assert problem.keys() == PARTS
    assert problem["tensor"] == "model.norm.weight"
    assert json.loads(ran.out) == {"error": {k: last[k] for k in ("exit_code", "problems", "problem_count")}}


@pytest.mark.parametrize("options", [("--json",), ("--json", "--log-json")], ids=["json", "both"])
def test_many_problems_are_counted(options: tuple[str, ...], make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """The first ten problems in full, and how many there are."""
    built = make(**NVFP4)

    def scales_go(stored: dict[str, Any]) -> None:
        for name in [name for name in stored if name.endswith("_scale")]:
            del stored[name]

    edit_tensors(built.directory, scales_go)
    error = json.loads(cli(built.directory, tmp_path / "out", *options).out)["error"]
    assert len(error["problems"]) == SHOWN_PROBLEMS < error["problem_count"]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("a", "b", "--workers", "0"), 2),
        (("inspect", "nothing"), 2),
        (("verify", "a", "b", "c"), 2),
        (("batch", "nothing"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_usage_as_an_event(
    args: tuple[str, ...], code: int, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that makes no sense is an event as well, wherever the option stands."""
    monkeypatch.chdir(tmp_path)
    name, *rest = args if args[0] in group.commands else ("convert", *args)
    for order in ((name, "--log-json", "--json", *rest), (name, *rest, "--log-json", "--json")):
        ran = cli(*order)
        assert ran.code == code
        (event,) = events(ran)
        assert (event["event"], event["exit_code"]) == ("error", code)
        assert event["problems"][0].keys() == json.loads(ran.out)["error"]["problems"][0].keys() == PARTS


def test_an_interrupt_as_an_event(
    make: Callable[..., Built], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is an event with exit code 130 and how to go on."""

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    ran = cli(make(**NVFP4).directory, tmp_path / "out", "--log-json")
    last = events(ran)[-1]
    assert (ran.code, last["event"], last["exit_code"]) == (130, "interrupted", 130)
    assert "run the same command again" in last["remedy"]


def test_a_disk_that_fails_as_an_event(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the system is an event with the path."""

    def fail(directory: Path, **options: object) -> None:
        raise OSError(5, "Input/output error", str(directory))

    monkeypatch.setattr("convert.inspector.inspect", fail)
    ran = cli("inspect", tmp_path, "--log-json")
    (event,) = events(ran)
    assert (ran.code, event["exit_code"], event["problems"][0]["file"]) == (3, 3, str(tmp_path))


@pytest.mark.parametrize("name", sorted(group.commands))
def test_every_command_speaks_json(name: str) -> None:
    """Each command has `--json` and `--log-json`, and takes its options from the environment."""
    command = group.commands[name]
    assert {"--json", "--log-json"} <= {option for parameter in command.params for option in parameter.opts}
    assert command.context_settings["auto_envvar_prefix"] == "QCONVERT"


def test_environment(make: Callable[..., Built], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options have defaults in the environment; the command line wins; what makes no sense is exit code 2."""
    built = make(**NVFP4)
    monkeypatch.setenv("QCONVERT_SHARD_SIZE", "20KB")
    monkeypatch.setenv("QCONVERT_JSON", "1")
    ran = cli(built.directory, tmp_path / "small")
    assert len(json.loads(ran.out)["outputs"]) > len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    ran = cli(built.directory, tmp_path / "whole", "--shard-size", "1GB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1
    monkeypatch.setenv("QCONVERT_WORKERS", "many")
    ran = cli(built.directory, tmp_path / "none")
    assert ran.code == 2
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("QCONVERT_VERSION", "1.2.3")  # somebody's own variable
    assert cli("--version").out.strip().endswith(convert.__version__)
    assert "Usage" in cli("--help").out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("qconvert in", {"plain,inspect", "dir,in"}),
        ("qconvert ba", {"plain,batch", "dir,ba"}),
        ("qconvert IN OUT --sh", {"plain,--shard-size"}),
        ("qconvert inspect fol", {"dir,fol"}),
        ("qconvert export OUT DIR --dtype b", {"plain,bfloat16"}),
    ],
)
def test_completion(words: str, wanted: set[str], cli_apart: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells complete commands, options, choices and directories."""
    monkeypatch.setenv("_QCONVERT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    ran = cli_apart()
    assert wanted <= set(ran.out.splitlines())
    assert ran.err == ""

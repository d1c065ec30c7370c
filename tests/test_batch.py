"""`qconvert batch`: many checkpoints, one report; what fails leaves the others alone, and what is done is not done again."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from build import build, read_tensors
from conftest import Ran

import convert
from convert import batch

Cli = Callable[..., Ran]
NVFP4 = {"family": "qwen3", "dialect": "compressed-tensors", "scheme": "nvfp4"}
FP8 = {"family": "qwen3_5", "dialect": "modelopt", "scheme": "fp8"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `hub` with two checkpoints, one that is none, and a file."""
    hub = tmp_path_factory.mktemp("batch") / "hub"
    build(hub / "a", **NVFP4)
    build(hub / "b", **FP8)
    build(hub / "c", **FP8)
    (hub / "c" / "model.safetensors").unlink()
    (hub / "README.md").write_text("Not a checkpoint.\n")
    return hub


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def states(report: dict[str, Any]) -> list[tuple[str, int | None]]:
    """State and exit code of each job."""
    return [(job["state"], job["exit_code"]) for job in report["jobs"]]


def test_batch(sources: Path, cli: Cli, tmp_path: Path) -> None:
    """YAML with defaults and options, two at a time: one is refused, the others equal plain conversions; then again."""
    out = tmp_path / "out"
    jobs = [
        {"in": str(sources / "a"), "out": str(out / "one"), "shard_size": "20KB"},
        {"in": str(sources / "c"), "out": str(out / "two")},
        {"in": str(sources / "b"), "out": str(out / "three"), "verify": False, "no_hash": True},
    ]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"defaults": {"verify": True}, "jobs": jobs}))
    command = ("batch", tmp_path / "jobs.yaml", "--jobs", 2, "--report", tmp_path / "report.json")
    ran = cli(*command)
    assert ran.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert states(report) == [("done", 0), ("refused", 1), ("done", 0)]
    assert report["counts"] == {"done": 2, "refused": 1}
    assert report["exit_code"] == 1
    assert [job["options"] for job in report["jobs"]] == [{"verify": True, "shard_size": "20KB"}, {"verify": True},
                                                          {"verify": False, "no_hash": True}]  # fmt: skip
    (problem,) = report["jobs"][1]["error"]["problems"]
    assert problem["found"].startswith("no *.safetensors")
    convert.convert_checkpoint(sources / "a", tmp_path / "a", shard_size=20_000)
    convert.convert_checkpoint(sources / "b", tmp_path / "b", hashes=False)
    assert contents(out / "one") == contents(tmp_path / "a")
    assert contents(out / "three") == contents(tmp_path / "b")
    assert sorted(os.listdir(out)) == ["one", "three"]
    lines = ran.err.splitlines()
    assert len(lines) == 3
    assert sum("refused" in line and "no *.safetensors" in line for line in lines) == 1
    for word in ("family", "modelopt", "compressed-tensors", "2 done, 1 refused"):
        assert word in ran.out

    # The refused one is mended, one is complete, one is gone.
    before = {path: path.stat().st_mtime_ns for path in (out / "one").iterdir()}
    jobs[1]["in"] = str(sources / "b")
    shutil.rmtree(out / "three")
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"defaults": {"verify": True}, "jobs": jobs}))
    ran = cli(*command, "--resume", "--json")
    assert ran.code == 0
    assert json.loads(ran.out) == json.loads((tmp_path / "report.json").read_text())
    assert [job["written_bytes"] > 0 for job in json.loads(ran.out)["jobs"]] == [False, True, True]
    assert {path: path.stat().st_mtime_ns for path in (out / "one").iterdir()} == before
    assert contents(out / "three") == contents(tmp_path / "b")
    assert cli(*command).code == 2


@pytest.mark.parametrize("how", ["glob", "expanded", "lines", "stdin"])
def test_ways_to_name_jobs(how: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A glob, the folders that a shell made of it, JSON lines in a file or on standard input: the same jobs."""
    monkeypatch.chdir(sources.parent)
    lines = "".join(json.dumps({"in": f"hub/{name}"}) + "\n\n" for name in "abc")
    (tmp_path / "jobs.jsonl").write_text(lines)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    expanded, file = ["hub/a", "hub/b/", "hub/c"], str(tmp_path / "jobs.jsonl")
    jobs = convert.read_jobs({"glob": ["hub/*"], "expanded": expanded, "lines": [file], "stdin": ["-"]}[how], "canonical")
    assert [(job.source.rstrip("/"), job.out) for job in jobs] == [(f"hub/{name}", f"canonical/{name}") for name in "abc"]


def test_a_url_is_a_source(sources: Path) -> None:
    """A remote checkpoint is a job like any other, and never looked for on the disk."""
    (job,) = convert.read_jobs(["hf://org/name"], "canonical")
    assert (job.source, job.out) == ("hf://org/name", "canonical/name")


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("jobs.jsonl", '{"in": "a"}', 'jobs.jsonl:1: .*no "out", and no --out-dir'),
        ("jobs.jsonl", '{"in": "a", "out": "b"}\n\n{"out": "b"}', 'jobs.jsonl:3: .*no "in"'),
        ("jobs.jsonl", '{"in": "a", "out": ', "jobs.jsonl:1: .*no JSON"),
        ("jobs.jsonl", "[" * 10**5, "jobs.jsonl:1: .*no JSON"),
        ("jobs.jsonl", "[1]", "jobs.jsonl:1: .*found a list"),
        ("jobs.jsonl", '{"in": "a", "out": "b", "colour": 1}', "colour.*there are verify, force"),
        ("jobs.jsonl", '{"in": "a", "out": "b", "dry_run": true}', "dry_run"),
        ("jobs.jsonl", '{"in": "a", "out": "b", "workers": 0}', "--workers"),
        ("jobs.jsonl", '{"in": "a", "out": "b", "workers": true}', "--workers"),
        ("jobs.jsonl", '{"in": "a", "out": "b", "verify": "yes"}', "unexpected extra argument"),
        ("jobs.jsonl", '{"in": "a", "out": "b", "shard_size": [1]}', r"shard_size of \[1\]"),
        ("jobs.jsonl", '{"in": "a", "out": "b"}\n{"in": "c", "out": "./b/"}', ":2: .*the OUT of .*:1"),
        ("jobs.jsonl", '{"in": "a", "out": "b/c"}\n{"in": "c", "out": "b"}', ":1: .*inside the OUT of .*:2"),
        ("jobs.jsonl", "\n", "at least one job"),
        ("jobs.jsonl", b"\xff\xfe", "no text in UTF-8"),
        ("jobs.yaml", "jobs: {a: 1}", "neither a list of jobs"),
        ("jobs.yaml", "a: [", "flow sequence|flow node"),
        ("jobs.yaml", "- in: a\n  out: b\n- 7", "jobs.yaml: job 2: .*found a int"),
        ("jobs.json", '{"jobs": ', "Expecting value"),
    ],
)  # fmt: skip
def test_no_jobs(
    name: str, content: str | bytes, found: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that makes no sense is exit code 2 with one line for each entry, and nothing is started."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    ran = cli("batch", name)
    assert (ran.code, ran.out) == (2, "")
    assert re.search(found, ran.err), ran.err
    assert len(ran.err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_nothing_that_matches(cli: Cli, tmp_path: Path) -> None:
    """A glob without a match, or a file that is not there."""
    for name, found in (("*.none", "no directory that matches"), ("jobs.yaml", "no such file")):
        ran = cli("batch", tmp_path / name, "--out-dir", tmp_path / "out")
        assert ran.code == 2
        assert found in ran.err


# A process that breaks down, as for want of memory or by a defect, before it converts "a".
BREAKDOWN = """
import os, sys
if sys.argv[-1].endswith("one"):
    {how}
"""


@pytest.mark.parametrize(
    ("how", "found"),
    [("os.kill(os.getpid(), 9)", "killed by SIGKILL"), ("raise ValueError('what')", "exit code 1: ValueError: what")],
)
def test_a_job_breaks_down(how: str, found: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job has failed, with what is known of it, and the others are done."""
    monkeypatch.setattr(batch, "COMMAND", BREAKDOWN.format(how=how) + batch.COMMAND)
    jobs = [convert.Job(str(sources / "a"), str(tmp_path / name)) for name in ("one", "two")]
    report = convert.convert_batch(jobs)
    assert states(report) == [("failed", 3), ("done", 0)]
    assert report["exit_code"] == 3
    assert found in report["jobs"][0]["error"]["problems"][0]["found"]


# A conversion that takes too long.
HANGING = """
import sys, time
sys.path[:] = sys.argv[1].split({separator!r})
import convert.executor
convert.executor.convert_checkpoint = lambda *args, **options: time.sleep(60)
"""


def test_interrupted(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C: what runs is interrupted, what waits is not begun, the report says so, and `resume` does the rest."""
    jobs = [convert.Job(str(sources / "a"), str(tmp_path / name)) for name in ("one", "two", "three")]
    started = []

    def interrupt(run: convert.batch.JobRun) -> None:
        started.append(run)
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background shell ignores
    try:
        with monkeypatch.context() as patch:
            patch.setattr(batch, "COMMAND", HANGING + batch.COMMAND)
            with pytest.raises(KeyboardInterrupt, match="0 of 3 jobs are done: run again with --resume"):
                convert.convert_batch(jobs, processes=2, report=tmp_path / "report.json", progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    report = json.loads((tmp_path / "report.json").read_text())
    assert states(report) == [("interrupted", 130), ("interrupted", 130), ("waiting", None)]
    assert report["exit_code"] == 130
    assert sorted(os.listdir(tmp_path)) == ["report.json"]
    assert states(convert.convert_batch(jobs[:2], defaults={"resume": True})) == [("done", 0)] * 2


def test_exit_code_says_what_to_do() -> None:
    """3, a machine that failed, wins over 1 and 2, as a retry may help; an interrupt wins over all."""

    def code(*codes: int | None) -> int:
        return batch.exit_code(batch.JobRun(convert.Job("in", "out"), exit_code=c) for c in codes)

    assert [code(), code(0, 0), code(0, 2), code(2, 1, 0), code(1, 3, 2)] == [0, 0, 2, 1, 3]
    assert [code(3, 130), code(0, None)] == [130, 130]


def test_a_report_that_cannot_be_written(sources: Path, cli: Cli, tmp_path: Path) -> None:
    """Exit code 3 and one line, before anything is converted."""
    ran = cli("batch", sources / "a", "--out-dir", tmp_path / "out", "--report", tmp_path / "none" / "report.json")
    assert ran.code == 3
    assert len(ran.err.splitlines()) == 1
    assert "--report" in ran.err
    assert not list(tmp_path.iterdir())


def test_options_come_from_the_environment(sources: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`QCONVERT_SHARD_SIZE` is a default of the batch, and a job's own option wins over it."""
    monkeypatch.setenv("QCONVERT_SHARD_SIZE", "20KB")
    jobs = [{"in": str(sources / "a"), "out": "one"}, {"in": str(sources / "a"), "out": "two", "shard_size": "1GB"}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    monkeypatch.chdir(tmp_path)
    assert cli("batch", "jobs.json").code == 0
    assert [len(list(Path(name).glob("*.safetensors"))) > 1 for name in ("one", "two")] == [True, False]
    assert read_tensors(Path("one")) == read_tensors(Path("two"))

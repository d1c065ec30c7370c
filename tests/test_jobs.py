"""One conversion as jobs of a scheduler: `plan`, `run-job`, `commit`.  The result is that of `qconvert IN OUT`, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from build import Built, build, edit_tensors, read_tensors
from conftest import ROOT, Ran

import convert
from convert.journal import Journal

Cli = Callable[..., Ran]
SIZE = 40_000  # of the files of OUT: a dozen for the tiny model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A checkpoint in three files, with scales, fused projections and side files in folders."""
    built = build(
        tmp_path_factory.mktemp("jobs") / "in", family="qwen3_5", dialect="modelopt", scheme="mixed", wrapper=True, mtp=True,
        shards=3,
    )  # fmt: skip
    (built.directory / "tokenizer").mkdir()
    (built.directory / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return built


@pytest.fixture(scope="module")
def plain(source: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of `qconvert IN OUT`."""
    out = tmp_path_factory.mktemp("plain") / "out"
    convert.convert_checkpoint(source.directory, out, shard_size=SIZE)
    return contents(out)


@pytest.fixture
def plan(source: Built, tmp_path: Path) -> convert.JobPlan:
    """A plan for `tmp_path / "out"`."""
    return convert.plan_jobs(source.directory, tmp_path / "out", shard_size=SIZE)


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_all(plan: convert.JobPlan) -> None:
    """Run every job."""
    for number in range(len(plan.jobs)):
        convert.run_job(plan, number)


def test_commands(source: Built, plain: dict[str, bytes], cli: Cli, tmp_path: Path) -> None:
    """Jobs in any order, some twice; then OUT equals a plain conversion, and nothing else is left."""
    here, out = tmp_path / "plan.json", tmp_path / "new" / "out"
    ran = cli("plan", source.directory, out, "-o", here, "--shard-size", SIZE)
    assert (ran.code, ran.err) == (0, "")
    jobs = json.loads(here.read_text())["jobs"]
    assert [job["id"] for job in jobs] == list(range(len(jobs)))
    assert [job["file"] for job in jobs] == sorted(name for name in plain if name.startswith("model-"))
    assert [job["bytes"] for job in jobs] == [len(plain[job["file"]]) for job in jobs]
    assert not out.parent.exists()
    for number in [*reversed(range(len(jobs))), 1]:
        ran = cli("run-job", here, number, "--json")
        assert (ran.code, ran.err) == (0, "")
        assert json.loads(ran.out)["file"] == jobs[number]["file"]
        assert not out.exists()
    ran = cli("commit", here, "--verify")
    assert (ran.code, ran.err) == (0, "")
    assert "verified" in ran.out
    assert contents(out) == plain
    for again in (("commit", here), ("run-job", here, 0)):  # a scheduler that starts something twice does no harm
        assert cli(*again).code == 0
    assert os.listdir(out.parent) == ["out"]
    assert contents(out) == plain


def test_plans_are_deterministic(source: Built, plan: convert.JobPlan, cli: Cli, tmp_path: Path) -> None:
    """The same plan each time, and the one that was written is the one that is read."""
    assert convert.plan_jobs(source.directory, tmp_path / "out", shard_size=SIZE) == plan
    convert.write_plan(tmp_path / "plan.json", plan)
    assert convert.read_plan(tmp_path / "plan.json") == plan
    assert os.listdir(tmp_path) == ["plan.json"]


def test_without_digests(source: Built, tmp_path: Path) -> None:
    """As a conversion without digests."""
    convert.convert_checkpoint(source.directory, tmp_path / "plain", shard_size=SIZE, hashes=False)
    plan = convert.plan_jobs(source.directory, tmp_path / "out", shard_size=SIZE, hashes=False)
    run_all(plan)
    convert.commit_jobs(plan)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


# Does a job or the commit, and dies at a call of a function, which is counted from 0.
DYING = """
import os, sys
import convert
plan, number, name, deaths = convert.read_plan(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
call, calls = getattr(os, name), iter(range(1000))
def die(*args, **options):
    if next(calls) == deaths:
        os._exit(9)
    return call(*args, **options)
setattr(os, name, die)
convert.run_job(plan, number) if number >= 0 else convert.commit_jobs(plan)
"""


EVERY_JOB = """
import convert, sys
plan = convert.read_plan(sys.argv[1])
for number in range(len(plan.jobs)):
    convert.run_job(plan, number)
"""


def dies(path: Path, number: int, name: str, deaths: int) -> bool:
    """Whether a process died where it was to die, rather than end before."""
    command = [sys.executable, "-c", DYING, str(path), str(number), name, str(deaths)]
    code = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=False).returncode
    assert code in (0, 9)
    return code == 9


def test_killed_anywhere(plan: convert.JobPlan, plain: dict[str, bytes], tmp_path: Path) -> None:
    """Jobs and commits that die leave OUT absent, and are run again."""
    path, out = tmp_path / "plan.json", tmp_path / "out"
    convert.write_plan(path, plan)
    for number, (name, deaths) in enumerate([("fsync", 0), ("fsync", 2), ("replace", 0), ("replace", 1)]):
        assert dies(path, number, name, deaths)
    with pytest.raises(convert.MachineError) as caught:
        convert.commit_jobs(plan)
    assert len(caught.value.problems) == len(plan.jobs)
    run_all(plan)
    for name, deaths in (("fsync", 0), ("fsync", 5), ("rename", 0)):
        assert dies(path, -1, name, deaths)
        assert not out.exists()
    assert dies(path, -1, "fsync", 9) or out.exists()
    convert.commit_jobs(plan)
    assert contents(out) == plain
    assert sorted(os.listdir(tmp_path)) == ["out", "plan.json"]


def test_two_at_a_time(plan: convert.JobPlan, plain: dict[str, bytes], tmp_path: Path) -> None:
    """The same jobs in two processes at a time."""
    path = tmp_path / "plan.json"
    convert.write_plan(path, plan)
    processes = [subprocess.Popen([sys.executable, "-c", EVERY_JOB, str(path)], cwd=ROOT) for _ in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    convert.commit_jobs(plan)
    assert contents(tmp_path / "out") == plain


def test_commit_too_early(plan: convert.JobPlan, cli: Cli, tmp_path: Path) -> None:
    """Exit code 3, as a retry helps, with a line for each job that is missing."""
    convert.write_plan(tmp_path / "plan.json", plan)
    for number in range(2, len(plan.jobs)):
        convert.run_job(plan, number)
    ran = cli("commit", tmp_path / "plan.json")
    assert (ran.code, ran.out) == (3, "")
    assert [line.split(": ")[1] for line in ran.err.splitlines()] == ["job 0", "job 1"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["header", "tensor"])
def test_a_damaged_file(place: str, plan: convert.JobPlan, plain: dict[str, bytes], cli: Cli, tmp_path: Path) -> None:
    """The commit names the file, the tensor and the job; once that has run again, all is well."""
    convert.write_plan(tmp_path / "plan.json", plan)
    run_all(plan)
    name = plan.jobs[1][0]
    (file,) = tmp_path.glob(f".out.parts-*/{name}")
    content = bytearray(file.read_bytes())
    content[-1 if place == "tensor" else 20] ^= 1
    file.write_bytes(content)
    ran = cli("commit", tmp_path / "plan.json")
    assert ran.code == 3
    (line,) = ran.err.splitlines()
    header = json.loads(plain[name][8:][: int.from_bytes(plain[name][:8], "little")])
    last = max(header, key=lambda tensor: header[tensor].get("data_offsets", [0])[0])
    assert f"{name}: {last if place == 'tensor' else 'header'}: " in line
    assert "run job 1" in line
    assert not (tmp_path / "out").exists()
    assert cli("run-job", tmp_path / "plan.json", 1).code == 0
    assert cli("commit", tmp_path / "plan.json").code == 0
    assert contents(tmp_path / "out") == plain


def test_a_source_that_changes(source: Built, cli: Cli, tmp_path: Path) -> None:
    """Neither a job nor a commit goes on with another IN: exit code 3, and the file."""
    shutil.copytree(source.directory, tmp_path / "in")
    plan = convert.plan_jobs(tmp_path / "in", tmp_path / "out", shard_size=SIZE)
    convert.write_plan(tmp_path / "plan.json", plan)
    run_all(plan)
    os.utime(tmp_path / "in" / "config.json", ns=(1, 1))
    plan.receipt(0).unlink()
    for command, *more in (("commit",), ("run-job", 0)):
        ran = cli(command, tmp_path / "plan.json", *more)
        assert ran.code == 3
        assert "config.json" in ran.err
        assert "qconvert plan" in ran.err
    assert not (tmp_path / "out").exists()


def test_another_plan(plan: convert.JobPlan, tmp_path: Path) -> None:
    """A plan that IN no longer gives, as after a change of qconvert, is refused by jobs and commit."""
    other = replace(plan, plan_sha256="0" * 64)
    for step in (lambda: convert.run_job(other, 0), lambda: convert.commit_jobs(other)):
        with pytest.raises(convert.MachineError, match="the plan 0000000000000000"):
            step()
    assert not list(tmp_path.iterdir())


def test_what_lies_about(plan: convert.JobPlan, plain: dict[str, bytes], tmp_path: Path) -> None:
    """What a killed commit or job left is no part of OUT, nor stays beside it."""
    run_all(plan)
    (parts,) = tmp_path.glob(".out.parts-*")
    (parts / "stray.json").write_text("{}")
    (parts / "adapter").mkdir()
    (plan.work / "0.elsewhere.1").mkdir()
    convert.commit_jobs(plan)
    assert contents(tmp_path / "out") == plain
    assert os.listdir(tmp_path) == ["out"]


def test_refused_values(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """Scales are refused by the plan, which is then not written; codes by the one job that reads them."""
    built = make(family="qwen3", dialect="modelopt", scheme="fp8")
    scale = "model.layers.0.mlp.down_proj.weight_scale"
    weight = scale.removesuffix("_scale")
    before = read_tensors(built.directory)

    def spoil(name: str, data: bytes) -> None:
        edit_tensors(built.directory, lambda stored: stored.update({**before, name: replace(before[name], data=data)}))

    spoil(scale, bytes(4))
    ran = cli("plan", built.directory, tmp_path / "out", "-o", tmp_path / "plan.json")
    assert ran.code == 1
    assert scale in ran.err
    assert os.listdir(tmp_path) == ["in"]
    spoil(weight, b"\x7f" * len(before[weight].data))
    plan = convert.plan_jobs(built.directory, tmp_path / "out", shard_size=SIZE)
    refused = []
    for number in range(len(plan.jobs)):
        try:
            convert.run_job(plan, number)
        except convert.ConvertError as error:
            refused.append((error.exit_code, error.problems[0].tensor))
    assert refused == [(1, weight)]


def test_one_commit_at_a_time(plan: convert.JobPlan, tmp_path: Path) -> None:
    """While another run writes OUT, a commit says so."""
    run_all(plan)
    journal = Journal(tmp_path / ".out.journal")
    with pytest.raises(convert.UsageError, match="another qconvert"):
        convert.commit_jobs(plan)
    journal.close()
    convert.commit_jobs(plan)


@pytest.mark.parametrize("force", [False, True])
def test_an_out_that_is_there(force: bool, source: Built, plain: dict[str, bytes], tmp_path: Path) -> None:
    """It is refused when planning, and when it comes later; with `force` it is replaced by the commit."""
    out = tmp_path / "out"
    plan = convert.plan_jobs(source.directory, out, shard_size=SIZE, force=force)
    run_all(plan)
    out.mkdir()
    (out / "old").write_text("still here")
    if not force:
        with pytest.raises(convert.UsageError):
            convert.plan_jobs(source.directory, out)
        with pytest.raises(convert.UsageError):
            convert.commit_jobs(plan)
        assert os.listdir(out) == ["old"]
    else:
        convert.commit_jobs(plan)
        assert contents(out) == plain


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda plan: None, "no such file"),
        (lambda plan: b"{", "JSON"),
        (lambda plan: {}, "another file"),
        (lambda plan: {**plan, "format_version": 2}, "another file"),
        (lambda plan: {**plan, "converter": "qconvert 0.0.1"}, "qconvert 0.0.1"),
        (lambda plan: {**plan, "jobs": 7}, "damaged"),
        (lambda plan: {k: v for k, v in plan.items() if k != "zeros"}, "damaged"),
        (lambda plan: {**plan, "source_files": {"a": [1]}}, "damaged"),
    ],
    ids=["absent", "no-json", "other-json", "newer", "other-version", "jobs", "field", "files"],
)
def test_no_plan(change: Callable[..., object], found: str, plan: convert.JobPlan, cli: Cli, tmp_path: Path) -> None:
    """A file that is no plan is exit code 2 and one line."""
    path, value = tmp_path / "plan.json", change(plan.to_json())
    if value is not None:
        path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    for command in (("run-job", path, 0), ("commit", path)):
        ran = cli(*command)
        assert (ran.code, ran.out) == (2, "")
        assert len(ran.err.splitlines()) == 1
        assert found in ran.err, ran.err


@pytest.mark.parametrize("number", ["-1", "999", "first"])
def test_no_such_job(number: str, plan: convert.JobPlan, cli: Cli, tmp_path: Path) -> None:
    """An id that the plan does not have is exit code 2."""
    convert.write_plan(tmp_path / "plan.json", plan)
    assert cli("run-job", tmp_path / "plan.json", "--", number).code == 2
    assert os.listdir(tmp_path) == ["plan.json"]

"""`--engine ray`: one task for each file of OUT, on a cluster whose workers die.  Skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from build import Built, build, edit_tensors, read_tensors
from conftest import ROOT, Ran

import convert

Cli = Callable[..., Ran]
SIZE = 40_000  # of the files of OUT: a dozen for the tiny model

# Every flush takes a while in the workers, so that each job is long enough to be seen.
SLOW = """
import os, time
fsync = os.fsync
os.fsync = lambda descriptor: (time.sleep(0.03), fsync(descriptor))[1]
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray cluster of two nodes on this machine."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'qconvert[ray]'")
    import ray
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(SLOW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            nodes.add_node(num_cpus=1)
            yield nodes.address
        finally:
            ray.shutdown()
            nodes.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kill_a_job(parent: Path, killed: list[Path], ended: threading.Event) -> None:
    """Kill a worker that is in the middle of a job: it is stopped first, so that its job is certainly begun and not done."""
    while not (killed or ended.is_set()):
        for folder in parent.glob(".out.jobs-*/*.*.*"):
            pid = folder.name.rpartition(".")[2]
            if folder.is_dir() and pid.isdecimal():
                os.kill(int(pid), signal.SIGSTOP)
                there = folder.is_dir()
                os.kill(int(pid), signal.SIGKILL if there else signal.SIGCONT)
                if there:
                    killed.append(folder)
                    return
        time.sleep(0.002)


def test_a_worker_dies(cluster: str, tmp_path: Path) -> None:
    """A worker is killed in the middle of a job: the result is complete, and that of a conversion without Ray."""
    source = build(tmp_path / "in", family="qwen3_5", dialect="modelopt", scheme="mixed", wrapper=True, mtp=True, shards=3)
    convert.convert_checkpoint(source.directory, tmp_path / "plain", shard_size=SIZE)
    killed: list[Path] = []
    ended = threading.Event()
    killer = threading.Thread(target=kill_a_job, args=(tmp_path, killed, ended))
    killer.start()
    seen = []
    try:
        convert.convert_on_ray(
            source.directory, tmp_path / "out", address=cluster, shard_size=SIZE, verify=True,
            progress=lambda done, total: seen.append((done, total)),
        )  # fmt: skip
    finally:
        ended.set()
        killer.join()
    assert killed
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "plain"]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_command(cluster: str, cli: Cli, tmp_path: Path) -> None:
    """`--engine ray --address`, again with `--resume`, and a refusal: as without Ray, and nothing is left."""
    source = build(tmp_path / "in", family="qwen3", dialect="modelopt", scheme="fp8")
    command = (source.directory, tmp_path / "out", "--engine", "ray", "--address", cluster, "--shard-size", SIZE)
    ran = cli(*command)
    assert (ran.code, ran.err) == (0, "")
    assert read_tensors(tmp_path / "out") == source.canonical
    written = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    assert cli(*command, "--resume").code == 0
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == written
    assert cli(*command).code == 2

    weight = "model.layers.0.mlp.down_proj.weight"

    def spoil(stored: dict[str, Any]) -> None:
        stored[weight] = replace(stored[weight], data=b"\x7f" * len(stored[weight].data))

    edit_tensors(source.directory, spoil)
    ran = cli(*command, "--force")
    assert ran.code == 1
    assert weight in ran.err
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_without_ray(make: Callable[..., Built], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is an extra: without it, exit code 2 and what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    built = make(family="qwen3", dialect="modelopt", scheme="fp8")
    ran = cli(built.directory, tmp_path / "out", "--engine", "ray")
    assert ran.code == 2
    assert "pip install 'qconvert[ray]'" in ran.err
    ran = cli(built.directory, tmp_path / "out", "--address", "here:1")
    assert ran.code == 2
    assert "--engine ray" in ran.err
    assert os.listdir(tmp_path) == ["in"]


def test_no_cluster(make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """An address where nothing answers is exit code 3, at once."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'qconvert[ray]'")
    built = make(family="qwen3", dialect="modelopt", scheme="fp8")
    ran = cli(built.directory, tmp_path / "out", "--engine", "ray", "--address", "127.0.0.1:9")
    assert ran.code == 3
    assert "127.0.0.1:9" in ran.err
    assert os.listdir(tmp_path) == ["in"]

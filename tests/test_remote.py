"""Checkpoints at URLs: what is moved, what a network does, and that the result is that of a local copy, bit for bit."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from build import INDEX, Built, build, edit_json
from conftest import ROOT, Ran
from hub_server import COMMIT, Hub, Request, hub_server

import convert
from convert import huggingface, remote

Cli = Callable[..., Ran]
URL = "hf://org/name"
SHARDED = {"family": "qwen3", "dialect": "compressed-tensors", "scheme": "nvfp4", "shards": 3}
TOKEN = "hf_secretsecretsecret"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces, no waiting, and no proxy or token of whoever runs the tests."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "PIECE", 4096)
    monkeypatch.setattr(remote, "GAP", 64)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A checkpoint of several files, which no test changes."""
    built = build(tmp_path_factory.mktemp("remote") / "in", **SHARDED)
    (built.directory / "tokenizer.json").write_text(json.dumps({"vocab": list(range(5000))}))
    return built


@pytest.fixture(scope="module")
def expected(sharded: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Its conversion from the directory."""
    out = tmp_path_factory.mktemp("remote-out") / "out"
    convert.convert_checkpoint(sharded.directory, out)
    return contents(out)


@pytest.fixture
def hub(sharded: Built, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that has it."""
    with hub_server(sharded.directory) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


@pytest.fixture
def own_hub(sharded: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that has a copy, which a test may change."""
    shutil.copytree(sharded.directory, tmp_path / "repository")
    with hub_server(tmp_path / "repository") as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def contents(out: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def header_bytes(path: Path) -> int:
    """Length of a safetensors header, with the eight bytes that say so."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


# -- the result -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        SHARDED,
        {"family": "qwen3_moe", "dialect": "fp8", "scheme": "block", "shards": 2},
        {"family": "qwen3_5_moe", "dialect": "dense", "scheme": "bf16", "layout": "X3"},
        {"family": "qwen3", "dialect": "modelopt", "scheme": "fp8", "kv": "fp8"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_as_from_a_directory(
    options: dict[str, Any], make: Callable[..., Built], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every byte of OUT is that of a conversion of a local copy, the report included, and both are proved."""
    built = make(**options)
    (built.directory / "sub").mkdir()
    (built.directory / "sub" / "notes.txt").write_text("a file in a folder")
    convert.convert_checkpoint(built.directory, tmp_path / "local", verify=True)
    with hub_server(built.directory) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        convert.convert_checkpoint(URL, tmp_path / "remote", verify=True)
        assert contents(tmp_path / "remote") == contents(tmp_path / "local")
        convert.verify_conversion(f"{URL}@{COMMIT}", tmp_path / "local")


def test_headers_only(hub: Hub, sharded: Built, cli: Cli) -> None:
    """A dry run and an inspection move headers and configs, to the byte, and say the same as of a directory."""
    headers = {p.name: header_bytes(p) for p in sharded.directory.glob("*.safetensors")}
    configs = {name: (sharded.directory / name).stat().st_size for name in ("config.json", INDEX)}
    for command in (("convert", URL, "unused", "--dry-run", "--json"), ("inspect", "--json", URL)):
        hub.sent.clear()
        ran = cli(*command)
        assert ran.code == 0, ran.err
        moved = {path.rpartition("/")[2]: nbytes for path, nbytes in hub.sent.items() if path.startswith("/large/")}
        assert moved == headers
        direct = {p.rpartition("/")[2]: n for p, n in hub.sent.items() if "/resolve/" in p and not p.endswith(".safetensors")}
        assert direct.items() <= configs.items() | {("hf_quant_config.json", 0)}
        assert command[0] == "inspect" or json.loads(ran.out) == convert.plan_conversion(sharded.directory).to_json()


def test_tensors_move_once(hub: Hub, sharded: Built, tmp_path: Path) -> None:
    """A conversion fetches each file about once: only small scales come twice, and nothing is fetched for a digest."""
    convert.convert_checkpoint(URL, tmp_path / "out")
    for path in sharded.directory.glob("*.safetensors"):
        assert path.stat().st_size <= hub.sent[f"/large/{path.name}"] <= 1.3 * path.stat().st_size


def test_requests_overlap(hub: Hub) -> None:
    """Several announced ranges are under way at a time: each answer waits until there are four of them."""
    together = threading.Barrier(4)
    whole = remote.open_url(URL)
    path = max(hub.directory.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    size = path.stat().st_size

    def meet(request: Request) -> None:
        if not hub.over.is_set():
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(5)
                hub.over.set()

    hub.waiting = meet
    reader = remote.ReadAhead(whole.remote, [(path.name, 100, 5000), (path.name, 9000, size), (path.name, 300, 400)])
    for start, end in ((100, 5000), (9000, size), (300, 400), (200, 300)):
        found = bytearray(end - start)
        reader.read_into(memoryview(found), path.name, start)
        assert found == path.read_bytes()[start:end]
    reader.close()
    assert hub.over.is_set()


def test_memory_is_bounded(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No more pieces are under way or waiting than there is room for."""
    monkeypatch.setattr(remote, "IN_FLIGHT", 6)
    most = 0
    refill = remote.ReadAhead._refill

    def counted(reader: remote.ReadAhead) -> None:
        nonlocal most
        refill(reader)
        most = max(most, len(reader._flying))

    monkeypatch.setattr(remote.ReadAhead, "_refill", counted)
    convert.convert_checkpoint(URL, tmp_path / "out", workers=1)
    assert most == 6


# -- the network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "429", "503", "408", "reset", "truncated", "short", "wrong-range", "stalled"])
def test_faults_pass(
    fault: str, hub: Hub, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong now and then, the conversion is the same."""
    every = 3
    if fault == "stalled":
        every = 40
        monkeypatch.setattr(huggingface, "TIMEOUT_S", 1.0)  # no less: the others must do without a busy machine's mercy
    faults: Counter[tuple[str, int]] = Counter()

    def sometimes(request: Request) -> str:
        piece = (request.path, request.span[1] if request.span else 0)
        if request.number % every != 1 or faults[piece] == 3:  # no more than tries, whatever the order of the threads
            return ""
        faults[piece] += 1
        return fault

    hub.fault = sometimes
    convert.convert_checkpoint(URL, tmp_path / "out")
    assert contents(tmp_path / "out") == expected
    convert.verify_conversion(URL, tmp_path / "out")


def test_a_server_may_close_kept_connections(
    hub: Hub, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is no fault: the request goes again over a new connection, and is not counted as a try."""
    monkeypatch.setattr(remote, "TRIES", 2)  # a listing has half of them
    hub.fault = lambda request: "closed later"
    convert.convert_checkpoint(URL, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_a_body_cut_short_is_one_try(
    hub: Hub, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of its connection is not used again."""
    monkeypatch.setattr(remote, "TRIES", 2)
    cut: Counter[str] = Counter()

    def once(request: Request) -> str:
        cut[request.path] += 1
        return "truncated" if request.path.startswith("/large/") and cut[request.path] == 1 else ""

    hub.fault = once
    convert.convert_checkpoint(URL, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("500", 3, "status 500, 8 times"),
        ("reset", 3, "8 times"),
        ("short", 3, "bytes early, 8 times"),
        ("wrong-range", 3, "Content-Range"),
        ("no-ranges", 3, "whole files"),
        ("grown", 3, "changed meanwhile"),
        ("404", 3, "8 times"),
        ("403", 3, "status 403, 8 times"),
        ("redirect file:///etc/passwd", 3, "one to something else"),
        ("redirect http://[", 3, "one to something else"),
        ("redirect /large/model.safetensors", 3, "more than 5 redirects"),
    ],
)
def test_faults_that_stay(fault: str, code: int, said: str, hub: Hub, cli: Cli, tmp_path: Path) -> None:
    """In the end the file is named with what was found; OUT is absent, and the token is nowhere."""
    hub.fault = lambda request: fault if request.path.startswith("/large/") else ""
    ran = cli(URL, tmp_path / "out")
    assert ran.code == code
    assert said in ran.err
    assert ".safetensors" in ran.err or "redirect" in fault
    assert TOKEN not in ran.err + ran.out
    assert not list(tmp_path.iterdir())


def test_fault_in_the_middle(hub: Hub, cli: Cli, expected: dict[str, bytes], tmp_path: Path) -> None:
    """A server that goes away during a conversion: what is complete is kept, and the next run goes on."""
    total = sum(path.stat().st_size for path in hub.directory.glob("*.safetensors"))
    hub.fault = lambda request: "500" if sum(hub.sent.values()) > 0.8 * total else ""
    args = (URL, tmp_path / "out", "--shard-size", "8KB", "--workers", 1)
    ran = cli(*args)
    assert (ran.code, "--resume" in ran.err) == (3, True), ran.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.journal").exists()
    hub.fault = lambda request: ""
    assert cli(*args, "--resume").code == 0
    convert.verify_conversion(URL, tmp_path / "out")


@pytest.mark.parametrize("where", ["config.json", "header", "data"])
def test_interrupt(where: str, hub: Hub, tmp_path: Path) -> None:
    """An interrupt ends a command that waits for a silent server, before the network's own time is over."""
    silent = threading.Event()

    def wait(request: Request) -> None:
        header = request.path.startswith("/large/") and request.span is not None and request.span[0] == 0
        data = request.path.startswith("/large/") and request.span is not None and request.span[0] > 20_000
        if request.path.endswith(where) or (where == "header" and header) or (where == "data" and data):
            silent.set()
            hub.over.wait(60)

    hub.waiting = wait
    process = subprocess.Popen(
        [sys.executable, "-m", "convert", URL, str(tmp_path / "out")], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert silent.wait(60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, "interrupted" in said) == (130, True), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["other-content", "other-commit"])
def test_content_that_changed(fault: str, hub: Hub, cli: Cli, tmp_path: Path) -> None:
    """An answer with another ETag or commit than the listing stops everything."""
    hub.fault = lambda request: fault if "/resolve/" in request.path and request.path.endswith(".safetensors") else ""
    ran = cli(URL, tmp_path / "out")
    assert (ran.code, "changed meanwhile" in ran.err) == (3, True)
    assert not list(tmp_path.iterdir())


def test_token(hub: Hub, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The token goes to the Hub with every request, and to no other server; without it the reason is said."""
    hub.token = TOKEN
    convert.convert_checkpoint(URL, tmp_path / "out")
    assert {request.token for request in hub.requests if request.host == "127.0.0.1"} == {f"Bearer {TOKEN}"}
    assert {request.token for request in hub.requests if request.host == "localhost"} == {None}
    assert not any(TOKEN.encode() in data for data in contents(tmp_path / "out").values())
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    ran = cli(URL, tmp_path / "other")
    assert (ran.code, "set HF_TOKEN" in ran.err, "hf_another" in ran.err) == (2, True, False)


# -- hostile servers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "a//b", "", ".", "x" * 300, "a\\b", "a\0b"])
def test_names_that_lead_out(name: str, hub: Hub, cli: Cli, tmp_path: Path) -> None:
    """A listing cannot name a file that would be written anywhere but into OUT."""
    def listing(answer: dict[str, Any]) -> dict[str, Any]:
        return answer | {"siblings": [*answer["siblings"], {"rfilename": name, "size": 4, "blobId": "0" * 40}]}

    hub.listing = listing
    ran = cli(URL, tmp_path / "out")
    assert (ran.code, "inside the checkpoint" in ran.err) == (1, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"sha": "main"}, {"sha": None}, {"siblings": "x"}, {"siblings": [None]}, {"siblings": [{"rfilename": "a"}]},
        {"siblings": [{"rfilename": "a", "size": "1"}]}, {"siblings": [{"rfilename": "a", "size": True}]},
        {"siblings": [{"rfilename": "a", "size": -1}]}, {"siblings": [{"rfilename": "a", "size": 1, "lfs": 3}]},
        {"siblings": [{"rfilename": "a", "size": 1 << 80}]}, {"siblings": []},
    ],
    ids=str,
)  # fmt: skip
def test_listings_that_are_none(change: dict[str, Any], hub: Hub, cli: Cli, tmp_path: Path) -> None:
    """A listing of other types or values is refused in one line."""
    hub.listing = lambda answer: answer | change
    ran = cli("inspect", URL)
    assert ran.code in (1, 2, 3)
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.err


def test_index_that_leads_out(own_hub: Hub, cli: Cli, tmp_path: Path) -> None:
    """The index of a remote checkpoint is no more trusted than a local one."""
    edit_json(own_hub.directory / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "../x.safetensors"}))
    ran = cli(URL, tmp_path / "out")
    assert (ran.code, "correct the index" in ran.err) == (1, True)


def test_damaged_on_the_way(own_hub: Hub, cli: Cli, tmp_path: Path) -> None:
    """`verify` against a URL finds one bit; side files are compared too."""
    convert.convert_checkpoint(URL, tmp_path / "out")
    shard = sorted(own_hub.directory.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    ran = cli("verify", URL, tmp_path / "out")
    assert (ran.code, shard.name in ran.err) == (1, True)
    data[-5] ^= 1
    shard.write_bytes(data)
    assert cli("verify", URL, tmp_path / "out").code == 0
    (own_hub.directory / "tokenizer.json").write_text("{}")
    assert cli("verify", URL, tmp_path / "out").code == 1


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hf://org", "hf://org/name"),
        ("hf://org/other", "no such repository"),
        ("hf://datasets/org/name", "no such repository"),
        ("hf://org/name/nowhere", "no files"),
        ("nothing://x/y", "Protocol not known"),
        ("memory://nowhere", "no files"),
    ],
)
def test_urls_of_nothing(url: str, said: str, hub: Hub, cli: Cli, tmp_path: Path) -> None:
    """A URL that names no checkpoint is a mistake of the command."""
    ran = cli(url, tmp_path / "out")
    assert (ran.code, said in ran.err) == (2, True), ran.err
    assert not list(tmp_path.iterdir())


def test_package_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What has to be installed is said."""
    for module, url in (("huggingface_hub", URL), ("fsspec.core", "s3://bucket/folder")):
        monkeypatch.setitem(sys.modules, module, None)
        ran = cli(url, tmp_path / "out")
        assert (ran.code, "pip install 'qconvert[remote]'" in ran.err) == (2, True), ran.err


# -- resuming and pinning -------------------------------------------------------------------------------------------------


def test_resume_knows_content(own_hub: Hub, cli: Cli, tmp_path: Path) -> None:
    """With `--resume`, a complete OUT is left alone as long as the repository's digests are those of its conversion."""
    assert cli(URL, tmp_path / "out").code == 0
    own_hub.commit = "f" * 40
    own_hub.sent.clear()
    assert cli(URL, tmp_path / "out", "--resume").code == 0
    assert sum(own_hub.sent.values()) < sum(p.stat().st_size for p in own_hub.directory.iterdir())
    (own_hub.directory / "tokenizer.json").write_text((own_hub.directory / "tokenizer.json").read_text()[:-1] + " ")
    ran = cli(URL, tmp_path / "out", "--resume")
    assert (ran.code, "--force" in ran.err) == (2, True)


def test_jobs(hub: Hub, expected: dict[str, bytes], tmp_path: Path) -> None:
    """A plan file names the commit, and its jobs give the same OUT."""
    plan = convert.plan_jobs(URL, tmp_path / "out")
    assert plan.in_dir == f"{URL}@{COMMIT}"
    for number in range(len(plan.jobs)):
        convert.run_job(plan, number)
    convert.commit_jobs(plan)
    assert contents(tmp_path / "out") == expected


def test_jobs_of_a_server_that_changes(own_hub: Hub, tmp_path: Path) -> None:
    """A file of the same size with other content is another file, although a server has no times: its digest tells."""
    plan = convert.plan_jobs(URL, tmp_path / "out", shard_size=40_000)
    convert.run_job(plan, 0)
    file = own_hub.directory / "tokenizer.json"
    file.write_text(file.read_text()[:-1] + " ")
    for step in (lambda: convert.run_job(plan, 1), lambda: convert.commit_jobs(plan)):
        with pytest.raises(convert.MachineError, match=r"tokenizer\.json: .* as it was when planning"):
            step()


# -- fsspec ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(sharded: Built) -> Iterator[str]:
    """The checkpoint in fsspec's own memory."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.put(str(sharded.directory), "/models/in", recursive=True)
    yield "memory://models/in"
    system.rm("/models", recursive=True)


def without_digests(files: dict[str, bytes]) -> dict[str, Any]:
    """Files of OUT, and the report without the digests of IN, which only some servers publish, and without its own."""
    report = json.loads(files["conversion.json"])
    for entry in report["sources"]:
        entry["sha256"] = None
    del report["sha256"]
    return {**files, "conversion.json": report}


def test_fsspec(memory: str, expected: dict[str, bytes], cli: Cli, tmp_path: Path) -> None:
    """Any file system of fsspec will do; it publishes no SHA-256, so the report has none."""
    assert cli(memory, tmp_path / "out", "--verify").code == 0
    found = contents(tmp_path / "out")
    assert {entry["sha256"] for entry in json.loads(found["conversion.json"])["sources"]} == {None}
    assert without_digests(found)["conversion.json"].pop("verified", None) is None
    assert without_digests(found) == without_digests(expected)
    assert cli("verify", memory, tmp_path / "out").code == 0
    assert cli("inspect", memory).code == 0
    assert cli("diff", memory, tmp_path / "out").code == 0


def test_fsspec_that_changes(memory: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that is replaced during the conversion by one of the same size is found at the end, by another listing."""
    import fsspec

    system = fsspec.filesystem("memory")
    name = sorted(system.glob("/models/in/*.safetensors"))[-1]
    write_metadata = convert.executor.Run.write_metadata

    def replace(run: Any) -> None:
        write_metadata(run)
        data = system.cat_file(name)
        system.rm(name)
        system.pipe_file(name, data)

    monkeypatch.setattr("convert.executor.Run.write_metadata", replace)
    ran = cli(memory, tmp_path / "out")
    assert (ran.code, "changed meanwhile" in ran.err) == (3, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None, reason="needs qconvert[remote-test]"
)
def test_s3(sharded: Built, expected: dict[str, bytes], cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A bucket of a local S3 server: converted and proved; its ETags tell when an object is replaced."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        system = s3fs.S3FileSystem(skip_instance_cache=True)
        system.mkdir("bucket")
        system.put(str(sharded.directory), "bucket/models/in", recursive=True)
        url = "s3://bucket/models/in"
        ran = cli(url, tmp_path / "out", "--verify")
        assert ran.code == 0, ran.err
        assert without_digests(contents(tmp_path / "out")) == without_digests(expected)
        write_metadata = convert.executor.Run.write_metadata

        def replace(run: Any) -> None:
            write_metadata(run)
            data = bytearray(system.cat_file("bucket/models/in/tokenizer.json"))
            system.pipe_file("bucket/models/in/tokenizer.json", bytes(data[:-1] + b" "))

        monkeypatch.setattr("convert.executor.Run.write_metadata", replace)
        ran = cli(url, tmp_path / "again")
        assert (ran.code, "tokenizer.json" in ran.err, "changed meanwhile" in ran.err) == (3, True, True)
        assert cli("s3://bucket/nothing", tmp_path / "none").code == 2
    finally:
        server.stop()


def test_nothing_is_loaded_for_a_directory(cli_apart: Cli, sharded: Built) -> None:
    """A local checkpoint needs neither fsspec nor huggingface_hub nor HTTP."""
    code = (
        "import sys, convert; convert.plan_conversion(sys.argv[1]); "
        "print(*sorted({'fsspec', 'huggingface_hub', 'http.client', 'ssl'} & set(sys.modules)))"
    )
    assert cli_apart(sharded.directory, code=code).out.strip() == ""

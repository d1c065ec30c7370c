"""OUT is complete or absent, whatever happens: killed, interrupted, out of space, two writers, a source that changes."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import Built, build, read_json
from conftest import ROOT, Ran

import convert
from convert import copying, layout, staging

Cli = Callable[..., Ran]
KILLS = 30
SIZE = "40KB"  # of the files of OUT: a dozen for the tiny model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A checkpoint with scales, fused projections and side files."""
    built = build(
        tmp_path_factory.mktemp("durable") / "in", family="qwen3_5", dialect="modelopt", scheme="mixed", wrapper=True, mtp=True
    )
    (built.directory / "tokenizer").mkdir()
    (built.directory / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return built


@pytest.fixture(scope="module")
def clean(source: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of an undisturbed conversion."""
    out = tmp_path_factory.mktemp("clean") / "out"
    convert.convert_checkpoint(source.directory, out, shard_size=40_000)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def beside(out: Path) -> list[str]:
    """What lies in OUT's parent besides OUT."""
    return sorted(p.name for p in out.parent.iterdir() if p != out and p.name != "in")


# Runs the command line, slowed down so that every phase is as long as the start of the interpreter, and says when it starts.
SLOW = """
import os, sys, time
from convert import cli, executor, values
fsync = os.fsync
os.fsync = lambda d: (time.sleep(0.004), fsync(d))[1]
print("ready", flush=True)
sys.exit(cli.main(sys.argv[1:]))
"""


def start(*args: object) -> subprocess.Popen[str]:
    """A slowed-down conversion in a process of its own, which has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def undisturbed_seconds(source: Built, folder: Path) -> float:
    """How long a slowed-down conversion takes on this machine, now: the fastest of three."""
    times = []
    for number in range(3):
        process = start(source.directory, folder / f"undisturbed{number}", "--shard-size", SIZE)
        begun = time.monotonic()
        process.communicate()
        times.append(time.monotonic() - begun)
        assert process.returncode == 0
    return min(times)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_killed_at_random_moments(source: Built, clean: dict[str, bytes], tmp_path: Path) -> None:
    """SIGKILL: OUT is absent, or complete and verified; `--resume` completes it, and it equals an undisturbed run's."""
    moments = random.Random(0)
    whole = undisturbed_seconds(source, tmp_path)
    absent = resumed = 0
    for number in range(KILLS):
        out = tmp_path / f"{number}" / "out"
        out.parent.mkdir()
        process = start(source.directory, out, "--shard-size", SIZE)
        time.sleep(moments.uniform(0, 0.8 * whole))
        process.kill()
        process.communicate()
        if out.exists():
            assert contents(out) == clean
        absent += not out.exists()
        partial = out.parent / ".out.partial"
        resumed += partial.is_dir() and any(partial.glob("*.safetensors"))
        convert.convert_checkpoint(source.directory, out, shard_size=40_000, resume=True)
        assert contents(out) == clean
        assert beside(out) == []
        shutil.rmtree(out.parent)
    assert absent > KILLS // 4  # the moments lie in the run, not behind it
    assert resumed


def interrupted_after(files: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let a run fail once that many files are complete."""
    completed = staging.Staging.completed

    def fail(self: staging.Staging, name: str, **facts: object) -> None:
        if len(self.done) == files:
            raise error
        completed(self, name, **facts)

    monkeypatch.setattr(staging.Staging, "completed", fail)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, ("interrupted", "--resume", "3 of its")),
        (OSError(errno.ENOSPC, "No space left on device", "model"), 3, ("No space left", "--resume", "3 of its")),
        (OSError(errno.EIO, "Input/output error", "model"), 3, ("Input/output error", "--resume")),
    ],
    ids=["interrupted", "disk-full", "write-error"],
)
def test_resume(
    error: BaseException, code: int, words: tuple[str, ...], source: Built, clean: dict[str, bytes], cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What an interrupted run completed is kept, and said in one line; `--resume` does the rest, and the result is equal."""
    out = tmp_path / "out"
    args = (source.directory, out, "--shard-size", SIZE, "--workers", 1)
    with monkeypatch.context() as patch:
        interrupted_after(3, patch, error)
        ran = cli(*args)
    assert (ran.code, ran.out) == (code, "")
    assert len(ran.err.strip().splitlines()) == 1
    assert [word for word in words if word not in ran.err] == []
    assert beside(out) == [".out.journal", ".out.partial"]
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.partial").iterdir()}
    assert cli(*args, "--resume").code == 0
    assert contents(out) == clean
    same = [name for name, written in kept.items() if (out / name).stat().st_mtime_ns == written]
    assert len(same) >= 3
    assert beside(out) == []


def test_without_resume_it_starts_anew(
    source: Built, clean: dict[str, bytes], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run left is removed by a run that does not resume."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted_after(3, patch, KeyboardInterrupt())
        cli(source.directory, out, "--shard-size", SIZE)
    (tmp_path / ".out.partial" / "stray").write_text("of the earlier run")
    assert cli(source.directory, out, "--shard-size", SIZE).code == 0
    assert contents(out) == clean
    assert beside(out) == []


def damage_file(partial: Path) -> None:
    """A file that the journal names is not as it was left."""
    file = sorted(partial.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut_journal(partial: Path) -> None:
    """A crash while the journal was written."""
    journal = partial.with_name(".out.journal")
    journal.write_bytes(journal.read_bytes()[:-5])


def spoil_journal(partial: Path) -> None:
    """A journal that means nothing."""
    partial.with_name(".out.journal").write_bytes(b"\x00\xff\n{}\n")


@pytest.mark.parametrize("change", [damage_file, cut_journal, spoil_journal, shutil.rmtree], ids=lambda f: f.__name__)
def test_resume_trusts_only_what_is_as_it_was(
    change: Callable[[Path], object], source: Built, clean: dict[str, bytes], cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever is wrong with what the earlier run left, the result is right."""
    out = tmp_path / "out"
    args = (source.directory, out, "--shard-size", SIZE, "--workers", 1)
    with monkeypatch.context() as patch:
        interrupted_after(3, patch, KeyboardInterrupt())
        cli(*args)
    change(tmp_path / ".out.partial")
    assert cli(*args, "--resume").code == 0
    assert contents(out) == clean


def test_resume_with_another_source_or_plan_starts_anew(
    source: Built, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is taken over from a run with other shards, or of a source that has changed since."""
    shutil.copytree(source.directory, tmp_path / "in")
    out = tmp_path / "out"
    for size, touched in (("30KB", False), (SIZE, True)):
        with monkeypatch.context() as patch:
            interrupted_after(2, patch, KeyboardInterrupt())
            cli(tmp_path / "in", out, "--shard-size", SIZE)
        if touched:
            os.utime(tmp_path / "in" / "model.safetensors")
        kept = {p.stat().st_ino for p in (tmp_path / ".out.partial").iterdir()}
        with monkeypatch.context() as patch:
            keep = tmp_path / f"kept-{size}"
            # Moved away, not removed, so that no inode is given out again.
            patch.setattr(staging, "_remove", lambda path, keep=keep: path.exists() and path.rename(keep))
            assert cli(tmp_path / "in", out, "--shard-size", size, "--resume").code == 0
        assert not kept & {p.stat().st_ino for p in out.iterdir()}
        convert.verify_conversion(tmp_path / "in", out)
        shutil.rmtree(out)


def test_resume_of_a_complete_out_does_nothing(source: Built, cli: Cli, tmp_path: Path) -> None:
    """A pipeline may always say `--resume`: a complete OUT stays untouched, one of another source or plan is refused."""
    out = tmp_path / "out"
    shutil.copytree(source.directory, tmp_path / "in")
    assert cli(tmp_path / "in", out).code == 0
    before = {p: p.stat().st_ino for p in out.rglob("*")}
    assert cli(tmp_path / "in", out, "--resume").code == 0
    assert {p: p.stat().st_ino for p in out.rglob("*")} == before
    assert cli(tmp_path / "in", out, "--resume", "--shard-size", SIZE).code == 2
    os.utime(tmp_path / "in" / "model.safetensors", (time.time() + 10,) * 2)
    assert cli(tmp_path / "in", out, "--resume").code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signals_leave_a_hint(number: int, source: Built, clean: dict[str, bytes], tmp_path: Path) -> None:
    """One line that says how to continue; exit code 130; OUT absent; `--resume` completes it."""
    out = tmp_path / "out"
    process = start(source.directory, out, "--shard-size", "20KB", "--workers", 1)
    journal = tmp_path / ".out.journal"
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 2)
    process.send_signal(number)
    printed, said = process.communicate()
    assert (process.returncode, printed) == (130, "")
    assert len(said.strip().splitlines()) == 1
    assert "--resume" in said
    assert not out.exists()
    convert.convert_checkpoint(source.directory, out, shard_size=20_000, resume=True)
    convert.verify_conversion(source.directory, out)
    assert beside(out) == []


def test_second_writer_is_refused(source: Built, clean: dict[str, bytes], cli: Cli, tmp_path: Path) -> None:
    """While one run writes OUT, another one says so in one line, and disturbs nothing."""
    out = tmp_path / "out"
    process = start(source.directory, out, "--shard-size", SIZE)
    journal = tmp_path / ".out.journal"
    wait_for(lambda: journal.exists() and journal.stat().st_size > 0)  # its first line is written once it is locked
    os.kill(process.pid, signal.SIGSTOP)
    try:
        for more in ((), ("--resume",), ("--force",)):
            ran = cli(source.directory, out, *more)
            assert (ran.code, ran.out) == (2, "")
            assert "another qconvert" in ran.err
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert process.wait(60) == 0
    process.communicate()
    assert contents(out) == clean
    assert beside(out) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_modes_follow_the_umask(mask: int, source: Built, tmp_path: Path) -> None:
    """Files and directories of OUT have the modes that any program's would have."""
    before = os.umask(mask)
    try:
        convert.convert_checkpoint(source.directory, tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer/vocab.txt"])
def test_source_that_changes(
    name: str, source: Built, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of IN that is written during the run is noticed; nothing of OUT remains."""
    shutil.copytree(source.directory, tmp_path / "in")
    completed = staging.Staging.completed

    def change(self: staging.Staging, *args: Any, **facts: Any) -> None:
        os.utime(tmp_path / "in" / name, ns=(1, 1))
        completed(self, *args, **facts)

    monkeypatch.setattr(staging.Staging, "completed", change)
    ran = cli(tmp_path / "in", tmp_path / "out")
    assert (ran.code, ran.out) == (3, "")
    assert name in ran.err
    assert "changed" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_source_that_shrinks(source: Built, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of IN that ends too soon is that same error, not a loop and not a short OUT."""
    shutil.copytree(source.directory, tmp_path / "in")
    written = copying.Target.write

    def shrink(self: copying.Target, data: bytes) -> None:
        os.truncate(tmp_path / "in" / "model.safetensors", 9000)
        written(self, data)

    monkeypatch.setattr(copying.Target, "write", shrink)
    ran = cli(tmp_path / "in", tmp_path / "out")
    assert (ran.code, ran.out) == (3, "")
    assert "changed" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_read_error(source: Built, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that cannot be read: the file is named, exit code 3, nothing remains."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    ran = cli(source.directory, tmp_path / "out")
    assert (ran.code, ran.out) == (3, "")
    assert "model.safetensors" in ran.err
    assert "Input/output error" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_no_room(source: Built, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free space is asked for before anything is written."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    ran = cli(source.directory, tmp_path / "out")
    assert (ran.code, ran.out) == (3, "")
    assert "GB free" in ran.err
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
from convert import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_file_size_limit(source: Built, cli_apart: Cli, tmp_path: Path) -> None:
    """A disk that refuses to take more, here by a limit on file sizes: one line, and OUT absent."""
    ran = cli_apart(source.directory, tmp_path / "out", code=LIMITED)
    assert (ran.code, ran.out) == (3, "")
    assert len(ran.err.splitlines()) == 1
    assert "File too large" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system in memory; skipped where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=400k", "none", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk(
    source: Built, clean: dict[str, bytes], cli: Cli, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up although it seemed to have room: one line, OUT absent; with room, `--resume` gives the same."""
    (small_disk / "filler").write_bytes(bytes(200_000))
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "check_space", lambda *_: None)
        ran = cli(source.directory, small_disk / "out", "--shard-size", SIZE, "--workers", 1)
    assert (ran.code, ran.out) == (3, "")
    assert "No space left" in ran.err
    assert not (small_disk / "out").exists()
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert cli(source.directory, small_disk / "out", "--shard-size", SIZE, "--resume").code == 0
    assert contents(small_disk / "out") == clean


def test_read_only_target(source: Built, clean: dict[str, bytes], cli: Cli, small_disk: Path) -> None:
    """A target that cannot be written is one line and exit code 3; once it can, the same command completes."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    ran = cli(source.directory, small_disk / "new" / "out")
    assert (ran.code, ran.out) == (3, "")
    assert "Read-only file system" in ran.err
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,rw,size=4m", small_disk], check=True)
    assert cli(source.directory, small_disk / "new" / "out", "--shard-size", SIZE, "--resume").code == 0
    assert contents(small_disk / "new" / "out") == clean


def test_order_of_writes_and_syncs(source: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is relied on before it is on disk: file, its directory, its line; all directories, the rename, OUT's parent."""
    events: list[tuple[str, str]] = []
    journal, partial = tmp_path / ".out.journal", tmp_path / ".out.partial"

    def record(name: str, path_of: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            events.append((name, path_of(*args)))
            return real(*args, **more)

        monkeypatch.setattr(os, name, call)

    def place(descriptor: int, *_: object) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)

    for name in ("fsync", "pwrite"):
        record(name, place)
    record("write", lambda d, data: f"{place(d)} {data[:40].decode(errors='replace')}")
    record("rename", lambda a, b: f"{Path(a).name} -> {Path(b).name}")
    report = convert.convert_checkpoint(source.directory, tmp_path / "out", shard_size=40_000, workers=1)
    at = {event: [i for i, e in enumerate(events) if e == event] for event in events}
    shards = [o["file"] for o in report.outputs if "tensors_blake3" in o]
    assert len(shards) > 3
    (renamed,) = at["rename", f"{partial.name} -> out"]
    for shard in shards:
        last_write = at["pwrite", f"{partial.name}/{shard}"][-1]
        (flushed,) = at["fsync", f"{partial.name}/{shard}"]
        line = f'{journal.name} {{"file":"{shard}"'[: len(journal.name) + 41]
        (noted,) = (i for (what, text), (i, *_) in at.items() if what == "write" and text == line)
        assert last_write < flushed < noted
        assert any(flushed < i < noted for i in at["fsync", partial.name])  # the directory entry
        assert any(noted < i for i in at["fsync", journal.name])
    others = [o["file"] for o in report.outputs if "tensors_blake3" not in o]
    for name in (*others, "conversion.json"):
        assert max(at["fsync", f"{partial.name}/{name}"]) < renamed, name
    ends = [max(at["fsync", f"{partial.name}/{n}"]) for n in (shards[-1], "config.json", "conversion.json")]
    assert ends == sorted(ends)
    assert max(at["fsync", partial.name]) > ends[-1]
    assert max(at["fsync", f"{partial.name}/tokenizer"]) < renamed
    assert max(at["fsync", partial.name]) < renamed < max(at["fsync", "."])


def test_replacing_that_was_killed(source: Built, clean: dict[str, bytes], cli: Cli, tmp_path: Path) -> None:
    """`--force`, killed between the two renames: the next run finds the old OUT in its place again."""
    out = tmp_path / "out"
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "old").write_text("the old OUT")
    assert cli(source.directory / "nothing", out, "--force").code == 2
    ran = cli(source.directory, out, "--shard-size", SIZE, "--force")
    assert ran.code == 0
    assert contents(out) == clean
    assert beside(out) == []


def clone_by_copying(source: int, target: int, start: int, at: int, count: int) -> bool:
    """FICLONERANGE on a file system without it: refuses what the kernel would refuse."""
    assert start % 4096 == at % 4096 == count % 4096 == 0
    with open(f"/proc/self/fd/{target}", "r+b") as stream:  # a descriptor without O_DIRECT
        stream.seek(at)
        stream.write(os.pread(source, count, start))
    return True


def refused(*_: object, **__: object) -> int:
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("way", ["clone", "server", "server-short", "server-refuses", "buffers", "cached", "direct-refused"])
def test_every_way_of_copying_gives_the_same_bytes(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cloned, copied by a server (perhaps in small parts), or read and written, past the page cache or not: OUT is the same."""
    for module in (copying, layout):
        monkeypatch.setattr(module, "LARGE", 512)
    monkeypatch.setattr(copying, "BUFFER", 8192)
    monkeypatch.setattr(copying, "PIECE", 1000)
    monkeypatch.setattr(copying, "FLUSH_EVERY", 20_000)
    built = build(tmp_path / "in", family="qwen3", dialect="fp8", scheme="block")
    taken: list[int] = []
    pwrite, copy, create = os.pwrite, getattr(os, "copy_file_range", None), os.open

    def by_server(source: int, target: int, count: int, *at: int) -> int:
        assert copy is not None
        taken.append(copy(source, target, min(count, 700) if way == "server-short" else count, *at))
        return taken[-1]

    def open_cached(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        return refused() if flags & copying.DIRECT else create(path, flags, *rest, **more)

    def write_cached(descriptor: int, data: memoryview, at: int) -> int:
        direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & copying.DIRECT
        taken.append(len(data) if direct else 0)
        return refused() if direct else pwrite(descriptor, data, at)

    if way == "clone":
        monkeypatch.setattr(copying, "try_clone", lambda *args: taken.append(args[4]) or clone_by_copying(*args))
    elif way.startswith("server"):
        monkeypatch.setattr(copying, "on_network", lambda _: True)
        monkeypatch.setattr(os, "copy_file_range", refused if way == "server-refuses" else by_server)
    elif way == "cached":
        monkeypatch.setattr(os, "open", open_cached)
    elif way == "direct-refused":
        monkeypatch.setattr(os, "pwrite", write_cached)
    convert.convert_checkpoint(built.directory, tmp_path / "out")
    monkeypatch.undo()
    convert.verify_conversion(built.directory, tmp_path / "out")
    convert.verify_digests(tmp_path / "out")
    total = sum(len(t.data) for t in built.canonical.values())
    assert sum(taken) > total // 3 or way not in ("clone", "server", "server-short")
    assert max(taken, default=700) == 700 or way != "server-short"


def test_page_cache_is_left_alone(source: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has O_DIRECT, only what follows a file's last whole block goes through the page cache."""
    probe = tmp_path / "probe"
    try:
        assert copying.DIRECT, "not on Linux"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | copying.DIRECT))
    except (AssertionError, OSError):
        pytest.skip("the file system of the temporary files has no O_DIRECT")
    pwrite = os.pwrite
    cached: list[int] = []

    def record(descriptor: int, data: memoryview, at: int) -> int:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & copying.DIRECT:
            cached.append(len(data))
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", record)
    convert.convert_checkpoint(source.directory, tmp_path / "out", shard_size=40_000)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert max(cached) < copying.BLOCK
    assert sorted(cached) == sorted(s.stat().st_size % copying.BLOCK for s in shards if s.stat().st_size % copying.BLOCK)


def test_lock_goes_with_its_process(tmp_path: Path) -> None:
    """The journal that a killed process left behind is not a lock."""
    from convert.journal import Journal

    (tmp_path / "journal").write_text("")
    first = Journal(tmp_path / "journal")
    with pytest.raises(convert.UsageError):
        Journal(tmp_path / "journal")
    first.close()
    again = Journal(tmp_path / "journal")
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_report_is_the_same_for_the_same_input(source: Built, tmp_path: Path) -> None:
    """Neither time nor place is recorded: a copy of IN, converted elsewhere, gives the same bytes."""
    shutil.copytree(source.directory, tmp_path / "elsewhere")
    convert.convert_checkpoint(source.directory, tmp_path / "a")
    convert.convert_checkpoint(tmp_path / "elsewhere", tmp_path / "b", workers=4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert read_json(tmp_path / "a" / "conversion.json")["plan_sha256"]

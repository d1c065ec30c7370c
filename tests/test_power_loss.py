"""Power may fail at any moment: what a run relies on was on disk before, as its own system calls show (`strace`).

The model of a disk is the worst that POSIX allows: what was written to a file since its last `fsync` is lost, and so is each
new name in a directory since that one's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from build import build
from conftest import ROOT

CALLS = "openat,mkdir,rename,write,pwrite64,sendfile,copy_file_range,ftruncate,fsync,fdatasync"
RUN = """
import sys
from convert import cli, copying, layout
copying.LARGE = layout.LARGE = 512
copying.on_network = lambda _: {by_server}  # or the tiny ranges would all be gathered and written
sys.exit(cli.main(sys.argv[1:]))
"""
LINE = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(?: resumed>|\()(.*)")
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
NOTE = re.compile(r'\{\\"file\\":\\"([^"\\]+)')
PATHS = re.compile(r"\d+<([^>]*)>")


@dataclass
class Disk:
    """What would be lost.

    data      file -> how often it was written since it was flushed       names  paths whose directory was not flushed since
    flushing  process and call -> what a flush that has begun will save: a path, its number of writes, names in it
    """

    data: dict[str, int] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    flushing: dict[tuple[str, str], tuple[str, int, set[str]]] = field(default_factory=dict)

    def write(self, path: str) -> None:
        """A file gets data."""
        self.data[path] = self.data.get(path, 0) + 1

    def begin(self, flush: tuple[str, str], path: str) -> None:
        """A flush begins: what is written from now on it may miss."""
        self.flushing[flush] = (path, self.data.get(path, 0), {n for n in self.names if os.path.dirname(n) == path})

    def end(self, flush: tuple[str, str]) -> None:
        """A flush has ended."""
        path, writes, names = self.flushing.pop(flush)
        self.names -= names
        if self.data.get(path) == writes:
            del self.data[path]

    def lost(self, path: str) -> list[str]:
        """What of a file, or below a directory, would be lost."""
        return sorted(p for p in (*self.data, *self.names) if p == path or p.startswith(f"{path}/"))


@pytest.mark.parametrize("by_server", [False, True], ids=["written", "copied-by-the-kernel"])
def test_what_is_relied_on_is_on_disk(by_server: bool, tmp_path: Path) -> None:
    """A file before its line in the journal; everything before the rename; the rename before the run says that it is done."""
    strace = shutil.which("strace")
    if not strace or subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("needs strace, and the right to use it")
    built = build(tmp_path / "in", family="qwen3_5", dialect="modelopt", scheme="mixed", wrapper=True, mtp=True)
    (built.directory / "tokenizer").mkdir()
    (built.directory / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    log, home = tmp_path / "log", f"{tmp_path}"
    command = [strace, "-f", "-y", "-qq", "-s", "90", "-o", log, "-e", f"trace={CALLS}", sys.executable, "-c",
               RUN.format(by_server=by_server), built.directory, tmp_path / "out", "--shard-size", "40KB"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    disk, calls, noted = Disk(), set[str](), list[str]()
    partial, journal = f"{home}/.out.partial", f"{home}/.out.journal"
    for line in log.read_text(errors="replace").splitlines():
        found = LINE.match(line)
        if found is None:
            continue
        process, call, rest = found.groups()
        begins, ends = not line.split(maxsplit=1)[1].startswith("<..."), not line.endswith("<unfinished ...>")
        names, paths = QUOTED.findall(rest), PATHS.findall(rest)
        if call in ("fsync", "fdatasync"):
            if begins:
                disk.begin((process, call), paths[0])
            if ends:
                assert rest.endswith("= 0")
                disk.end((process, call))
        elif not begins or (ends and "= -1" in rest):
            continue
        elif call == "rename":
            assert names == [partial, f"{home}/out"]
            disk.names = disk.names - {partial} | {names[1]}
            assert disk.lost(partial) == []
        elif call == "mkdir" or (call == "openat" and "O_CREAT" in rest):
            disk.names.add(names[-1])
        elif call != "openat" and paths:
            path = paths[call == "copy_file_range"]  # which names its source first
            note = NOTE.search(rest) if path == journal else None
            if note:
                noted.append(note[1])
                assert disk.lost(f"{partial}/{noted[-1]}") == []
            disk.write(path)
            calls.add(call)
    assert disk.lost(f"{home}/out") == []
    assert len(noted) > 3
    assert sorted(noted) == sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert {"pwrite64", "sendfile"} <= calls
    assert ("copy_file_range" in calls) == by_server

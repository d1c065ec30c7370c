"""Files beside the weights: carried byte for byte, or left out with a reason; never followed out of the checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import SIDE_FILES, Built, read_json, safetensors_bytes

import convert

BASE = {"family": "qwen3", "dialect": "modelopt", "scheme": "fp8", "form": "both"}
CARRIED = {
    **SIDE_FILES,
    "tokenizer.json": '{"version": "1.0", "äöü": "\u20ac"}\r\n'.encode(),
    "merges.txt": b"a b\nc d",
    "vocab.json": b"{}",
    "preprocessor_config.json": b'{ "size": 3 }',
    "video_preprocessor_config.json": b"{}",
    "processor_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "README.md": b"# A model card\n",
    "NOTICE": b"notice",
    "LICENSE.txt": b"licence",
    "USE_POLICY.md": b"policy",
    "recipe.yaml": b"a: 1\n",
    "tokenizer.model": bytes(range(256)),
    "additional_chat_templates/tool.jinja": b"{{ tool }}",
    "empty.txt": b"",
}
LEFT_OUT = {
    "modeling_custom.py": b"raise SystemExit('never run')",
    "pytorch_model.bin": b"\x80\x04.",
    "optimizer.pt": b"\x80\x04.",
    "scheduler.pth": b"\x80\x04.",
    "training_args.pkl": b"\x80\x04.",
    "kernel.so": b"\x7fELF",
    "sub/code.py": b"x = 1",
}


@pytest.fixture
def source(make: Callable[..., Built]) -> Path:
    """A checkpoint with every kind of side file."""
    folder = make(**BASE).directory
    for name, content in (CARRIED | LEFT_OUT).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def report_of(out: Path) -> dict[str, Any]:
    """conversion.json."""
    report: dict[str, Any] = read_json(out / "conversion.json")
    return report


def test_carried_byte_for_byte(source: Path, tmp_path: Path) -> None:
    """Tokenizer, chat template, processor and generation files, licence and model card are identical in OUT."""
    convert.convert_checkpoint(source, tmp_path / "out")
    files = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {name: content for name, content in files.items() if name in CARRIED} == CARRIED
    ours = {"config.json", "conversion.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"}
    assert set(files) == {*CARRIED, *ours}


def test_hashed(source: Path, tmp_path: Path) -> None:
    """The report has size and digest of carried files too, so that OUT can be checked without IN."""
    convert.convert_checkpoint(source, tmp_path / "out")
    outputs = report_of(tmp_path / "out")["outputs"]
    listed = {entry["file"]: (entry["size"], entry["sha256"]) for entry in outputs if "sha256" in entry}
    expected = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in CARRIED.items()}
    assert {name: listed.get(name) for name in CARRIED} == expected


def test_left_out_and_reported(source: Path, tmp_path: Path) -> None:
    """Code, pickles and the old quantisation config are not passed on, and the report says why."""
    convert.convert_checkpoint(source, tmp_path / "out")
    for name in (*LEFT_OUT, "hf_quant_config.json"):
        assert not (tmp_path / "out" / name).exists()
    text = (tmp_path / "out" / "conversion.json").read_text()
    assert [name for name in (*LEFT_OUT, "hf_quant_config.json") if f'"{name}' not in text] == []


def test_nothing_is_executed(source: Path, tmp_path: Path) -> None:
    """`auto_map` and Python files in the checkpoint are data: converting does not import them."""
    marker = tmp_path / "marker"
    for name in ("sitecustomize.py", "configuration_custom.py", "torch.py", "numpy.py", "safetensors.py"):
        (source / name).write_text(f"open({str(marker)!r}, 'w').close()")
    before = Path.cwd()
    os.chdir(source)
    try:
        convert.convert_checkpoint(".", tmp_path / "out")
    finally:
        os.chdir(before)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "absolute-secret"])
def test_links_that_leave_are_not_followed(kind: str, source: Path, tmp_path: Path) -> None:
    """A side file that is a link out of the checkpoint is left out and reported; its target never reaches OUT."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "key.txt").write_text("a secret")
    target = {
        "file": Path("../secrets/key.txt"),
        "folder": secrets,
        "dangling": secrets / "nothing",
        "absolute-secret": secrets / "key.txt",
    }[kind]
    (source / "notes.txt").symlink_to(target)
    convert.convert_checkpoint(source, tmp_path / "out")
    assert not os.path.lexists(tmp_path / "out" / "notes.txt")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and b"a secret" in p.read_bytes()]
    if kind != "folder":
        assert "notes.txt" in (tmp_path / "out" / "conversion.json").read_text()


def test_links_inside_become_files(source: Path, tmp_path: Path) -> None:
    """A link to a file of the same checkpoint is copied as a file."""
    (source / "chat_template.txt").symlink_to("chat_template.jinja")
    convert.convert_checkpoint(source, tmp_path / "out")
    copied = tmp_path / "out" / "chat_template.txt"
    assert copied.read_bytes() == SIDE_FILES["chat_template.jinja"]
    assert not copied.is_symlink()


def test_folder_loops_and_pipes_end(source: Path, tmp_path: Path) -> None:
    """A link to the folder itself, and a pipe, neither hang nor fail the conversion."""
    (source / "loop").symlink_to(source, target_is_directory=True)
    os.mkfifo(source / "pipe.txt")
    convert.convert_checkpoint(source, tmp_path / "out")
    assert not os.path.lexists(tmp_path / "out" / "pipe.txt")
    assert "pipe.txt" in (tmp_path / "out" / "conversion.json").read_text()


def test_hub_cache_layout(make: Callable[..., Built], tmp_path: Path) -> None:
    """snapshots/<revision>/* are links into blobs/ of the same repository: followed, weights and side files alike."""
    built = make(name="plain", **BASE)
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(built.directory.iterdir())):
        (blobs / f"blob{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    convert.convert_checkpoint(built.directory, tmp_path / "a")
    convert.convert_checkpoint(snapshot, tmp_path / "b")
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir() if p.name != "conversion.json"} for out in "ab")
    assert a == b
    assert not [p for p in (tmp_path / "b").iterdir() if p.is_symlink()]


def test_stray_weights_are_reported(make: Callable[..., Built], tmp_path: Path) -> None:
    """A safetensors file that the index does not name is no part of the checkpoint: not copied, but mentioned."""
    built = make(**BASE, shards=2)
    (built.directory / "stray.safetensors").write_bytes(safetensors_bytes({}))
    convert.convert_checkpoint(built.directory, tmp_path / "out")
    assert not (tmp_path / "out" / "stray.safetensors").exists()
    assert "stray.safetensors" in (tmp_path / "out" / "conversion.json").read_text()


def test_the_source_is_not_changed(source: Path, tmp_path: Path) -> None:
    """Bytes and modification times of IN are as before."""

    def state() -> dict[str, tuple[int, bytes]]:
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in source.rglob("*") if p.is_file()}

    before = state()
    convert.convert_checkpoint(source, tmp_path / "out")
    convert.verify_conversion(source, tmp_path / "out")
    assert state() == before


def test_modes_follow_the_umask(source: Path, tmp_path: Path) -> None:
    """Files of OUT are readable as the umask says, not private to the writer."""
    before = os.umask(0o022)
    try:
        convert.convert_checkpoint(source, tmp_path / "out")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir() if p.is_file()} == {0o644}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755

"""The proof: one changed bit anywhere in OUT is found, by `verify IN OUT` and by `verify OUT` alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from build import build, read_json

import convert

SAMPLES = 8  # positions of each file, besides its first and last byte


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """IN with side files and fused experts, and OUT in several files."""
    folder = tmp_path_factory.mktemp("flipped")
    built = build(folder / "in", family="qwen3_5_moe", dialect="modelopt", scheme="mixed", wrapper=True, mtp=True)
    (built.directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (built.directory / "README.md").write_text("A model card.\n")
    convert.convert_checkpoint(built.directory, folder / "out", shard_size=100_000)
    return built.directory, folder / "out"


def found(in_dir: Path | None, out: Path) -> str:
    """What `verify` says about OUT, or nothing."""
    try:
        if in_dir is None:
            convert.verify_digests(out)
        else:
            convert.verify_conversion(in_dir, out)
    except convert.ConvertError as error:
        return str(error)
    return ""


def positions(content: bytes, name: str) -> list[int]:
    """Where bits are flipped: both ends, samples, and for safetensors files samples of the header alone."""
    drawn = random.Random(name)
    spots = {0, len(content) - 1, *(drawn.randrange(len(content)) for _ in range(SAMPLES))}
    if name.endswith(".safetensors"):
        header = 8 + int.from_bytes(content[:8], "little")
        spots |= {7, 8, header - 1, header, *(drawn.randrange(header) for _ in range(SAMPLES))}
    return sorted(spots)


def test_one_bit_anywhere(converted: tuple[Path, Path]) -> None:
    """In every file of OUT: data, headers and their padding, index, config, report, side files."""
    in_dir, out = converted
    assert found(None, out) == found(in_dir, out) == ""
    files = [p for p in sorted(out.rglob("*")) if p.is_file()]
    assert len(files) > 6
    missed = []
    for path in files:
        content = path.read_bytes()
        for position in positions(content, path.name):
            bit = random.Random(position).randrange(8)
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            for who in (None, in_dir):
                if not found(who, out):
                    missed.append((path.name, position, bit, "OUT" if who is None else "IN OUT"))
        path.write_bytes(content)
    assert missed == []
    assert found(None, out) == found(in_dir, out) == ""


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config.json", b"e-0", b"E-0"),
        ("config.json", b"\n  ", b"\n   "),
        ("model.safetensors.index.json", b'"total_size": 1', b'"total_size": 3'),
        ("model-00001-of-", b'{"format":"pt"}', b'{"format":"qt"}'),
        ("conversion.json", b'"modelopt"', b'"modelopu"'),
    ],
    ids=["same-number", "space", "total-size", "metadata", "report"],
)
def test_changes_that_mean_little(file: str, old: bytes, new: bytes, converted: tuple[Path, Path]) -> None:
    """Even what no reader would notice: another spelling of a number, a space, a field that nobody reads."""
    in_dir, out = converted
    path = next(p for p in sorted(out.iterdir()) if p.name.startswith(file))
    content = path.read_bytes()
    if old.endswith(b" 1"):
        old = b'"total_size": %d' % read_json(path)["metadata"]["total_size"]
        new = old[:-1] + bytes([old[-1] ^ 1])
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    try:
        for who in (None, in_dir):
            assert path.name in found(who, out), who
    finally:
        path.write_bytes(content)


def test_the_tensor_is_named(converted: tuple[Path, Path]) -> None:
    """`verify OUT` alone names file and tensor, from the digest of each tensor."""
    in_dir, out = converted
    path = sorted(out.glob("*.safetensors"))[0]
    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        said = found(None, out)
    finally:
        path.write_bytes(content)
    line = said.splitlines()
    assert len(line) == 1
    name = line[0].split(": ")[1]
    assert name.encode() in header
    assert in_dir.exists()

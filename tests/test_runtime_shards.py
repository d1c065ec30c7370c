"""Reading safetensors files: what is mapped, what is streamed, and what is no such file."""

from __future__ import annotations

import json
import struct
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from build import build
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert
import runtime.shards
from runtime import loader
from runtime.errors import LoadError
from runtime.shards import Copy, Part, Piece, Shard, pieces, stream, stream_to_cuda

FILE = "model.safetensors"


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Tensor]:
    """Tensors of all stored dtypes; odd sizes, so that some begin where no float32 is aligned."""
    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randint(0, 256, (7, 13), dtype=torch.uint8),
        "a.scale": torch.randn(5),
        "b.weight": torch.randn(3, 5, 11).bfloat16(),
        "b.codes": torch.randint(0, 127, (1001,), dtype=torch.uint8).view(torch.float8_e4m3fn),
        "c.half": torch.randn(4, 1, 9).half(),
        "empty": torch.empty(0, 3),
        "one": torch.tensor([2.5]),
    }
    save_file(tensors, tmp_path / FILE)
    return tensors


def same(a: Tensor, b: Tensor) -> bool:
    flat = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*flat)


def test_mapped_tensors_are_those_of_the_library(stored: dict[str, Tensor], tmp_path: Path) -> None:
    shard = Shard(tmp_path, FILE)
    expected = load_file(tmp_path / FILE)
    found = {name: shard.mapped(name) for name in shard.tensors}
    shard.close()  # what is mapped stays valid
    assert found.keys() == expected.keys() == stored.keys()
    assert all(same(found[name], expected[name]) for name in expected)


def test_writing_to_a_mapped_tensor_leaves_the_file(stored: dict[str, Tensor], tmp_path: Path) -> None:
    before = (tmp_path / FILE).read_bytes()
    tensor = Shard(tmp_path, FILE).mapped("a.scale")
    tensor.fill_(1)
    assert torch.equal(tensor, torch.ones(5))
    assert (tmp_path / FILE).read_bytes() == before


def rewritten(path: Path, change: Any) -> None:
    """Change the header of a file; its data stays."""
    raw = path.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:end])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])


def offsets(name: str, start: int, stop: int) -> Any:
    return lambda header: header[name].update(data_offsets=[start, stop])


HEADERS: dict[str, Any] = {
    "not JSON": lambda header: b"{]",
    "not UTF-8": lambda header: b'{"\xff": 1}',
    "nested too deeply": lambda header: b"[" * 100_000,
    "a list": lambda header: b"[]",
    "an entry that is no object": lambda header: header.update({"one": 3}),
    "no dtype": lambda header: header["one"].pop("dtype"),
    "a shape of text": lambda header: header["one"].update(shape=["1"]),
    "a negative shape": lambda header: header["one"].update(shape=[-1]),
    "a shape of another size": lambda header: header["one"].update(shape=[2]),
    "three offsets": lambda header: header["one"].update(data_offsets=[0, 4, 8]),
    "offsets in the header": offsets("one", -4, 0),
    "offsets beyond the end": offsets("one", 10**9, 10**9 + 4),
    "offsets that wrap": offsets("one", 2**64 - 4, 2**64),
    "two in one place": lambda header: header.update(two=header["one"]),
    "a gap": lambda header: header.pop("a.scale"),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_malformed_header_is_refused(change: Any, stored: dict[str, Tensor], tmp_path: Path) -> None:
    rewritten(tmp_path / FILE, change)
    with pytest.raises((SafetensorError, OSError)), safe_open(tmp_path / FILE, framework="pt") as opened:
        opened.keys()  # the library refuses the same
    with pytest.raises(LoadError, match=r"model\.safetensors: expected a complete safetensors file, found .*convert again"):
        Shard(tmp_path, FILE)


@pytest.mark.parametrize("size", [0, 7, 8, 40, -1])
def test_a_cut_file_is_refused(size: int, stored: dict[str, Tensor], tmp_path: Path) -> None:
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:size])
    with pytest.raises(LoadError, match="damaged or cut short"):
        Shard(tmp_path, FILE)


class SlowDevice:
    """Copies that are over only later, in another thread, as on a GPU; counts those under way."""

    def __init__(self) -> None:
        self.waited = 0

    def copy(self, parts: list[Part]) -> Any:
        def late() -> None:
            time.sleep(0.002)
            for target, source in parts:
                target.copy_(source)

        thread = threading.Thread(target=late)
        thread.start()

        def wait() -> None:
            self.waited += 1
            thread.join()

        return wait


@pytest.mark.parametrize(("size", "buffers"), [(1 << 20, 2), (64, 1), (64, 2), (7, 3), (1, 2)])
def test_streaming_fills_every_tensor(size: int, buffers: int, stored: dict[str, Tensor], tmp_path: Path) -> None:
    """Buffers are filled again only when their copy is over, whatever the sizes."""
    if size < 7:
        stored = {"one": torch.tensor([2.5]), "a": torch.arange(30, dtype=torch.uint8)}
        save_file(stored, tmp_path / FILE)
    shard = Shard(tmp_path, FILE)
    targets = {name: torch.full(t.shape, 0, dtype=torch.uint8).to(t.dtype) for name, t in stored.items()}
    work = list(pieces(shard, targets.items(), size))
    assert sum(piece.nbytes for piece in work) == sum(t.nbytes for t in stored.values())
    assert max(piece.nbytes for piece in work) <= size
    device = SlowDevice()
    stream(work, [torch.full((size,), 255, dtype=torch.uint8) for _ in range(buffers)], device.copy)
    assert device.waited >= len(work)
    assert all(same(targets[name], stored[name]) for name in stored)


def test_what_is_not_wanted_is_not_read(stored: dict[str, Tensor], tmp_path: Path) -> None:
    shard = Shard(tmp_path, FILE)
    wanted = sorted(stored, key=lambda name: shard.tensors[name].start)[::2]
    targets = {name: torch.empty_like(stored[name]) for name in wanted}
    read: list[tuple[int, int]] = []
    work = []
    for piece in pieces(shard, targets.items()):
        read.append((piece.start, piece.start + piece.nbytes))
        work.append(piece)
    for name, entry in shard.tensors.items():
        if entry.nbytes == 0:
            continue
        inside = any(start < entry.start + entry.nbytes and entry.start < stop for start, stop in read)
        assert inside == (name in wanted), name
    stream(work, [torch.empty(4096, dtype=torch.uint8)], SlowDevice().copy)
    assert all(same(targets[name], stored[name]) for name in wanted)


def test_reads_overlap_copies(stored: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next piece is read before the copy of the last is over."""
    shard = Shard(tmp_path, FILE)
    reads = threading.Semaphore(0)
    read_into = Shard.read_into
    monkeypatch.setattr(Shard, "read_into", lambda *args: (read_into(*args), reads.release()))
    seen = []

    def copy(parts: list[Part]) -> Any:
        def wait() -> None:
            if not seen:
                seen.append(all(reads.acquire(timeout=10) for _ in range(2)))  # while this copy runs, a second read ends
            for target, source in parts:
                target.copy_(source)

        return wait

    target = torch.empty(1001, dtype=torch.float8_e4m3fn)
    stream(pieces(shard, [("b.codes", target)], 100), [torch.empty(100, dtype=torch.uint8) for _ in range(2)], copy)
    assert seen == [True]
    assert same(target, stored["b.codes"])


def test_a_file_that_shrinks_meanwhile(stored: dict[str, Tensor], tmp_path: Path) -> None:
    shard = Shard(tmp_path, FILE)
    last = max(shard.tensors, key=lambda name: shard.tensors[name].start)
    work = list(pieces(shard, [(last, torch.empty_like(stored[last]))]))
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-1])
    with pytest.raises(LoadError, match="its end at byte"):
        stream(work, [torch.empty(4096, dtype=torch.uint8)], SlowDevice().copy)


def test_a_failed_copy_ends_the_stream(stored: dict[str, Tensor], tmp_path: Path) -> None:
    def copy(parts: list[Part]) -> Any:
        raise RuntimeError("no such device")

    work: list[Piece] = list(pieces(Shard(tmp_path, FILE), [("b.codes", torch.empty_like(stored["b.codes"]))], 100))
    failing: Copy = copy
    with pytest.raises(RuntimeError, match="no such device"):
        stream(work, [torch.empty(100, dtype=torch.uint8) for _ in range(2)], failing)


def test_an_error_ends_all_readers(stored: dict[str, Tensor], tmp_path: Path) -> None:
    """The others take no new piece, and what they have started is over when the error comes out."""
    under_way: set[int] = set()
    started = []

    def copy(parts: list[Part]) -> Any:
        started.append(number := len(started))
        if number == 3:
            raise RuntimeError("no such device")
        under_way.add(number)

        def wait() -> None:
            time.sleep(0.01)
            under_way.discard(number)

        return wait

    work = list(pieces(Shard(tmp_path, FILE), [("b.codes", torch.empty_like(stored["b.codes"]))], 10))
    with pytest.raises(RuntimeError, match="no such device"):
        stream(work, [torch.empty(10, dtype=torch.uint8) for _ in range(6)], copy)
    assert len(started) < len(work) == 101
    assert not under_way


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streaming_to_a_gpu(stored: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.shards, "PIECE", 100)
    shard, device = Shard(tmp_path, FILE), torch.device("cuda")
    targets = {name: torch.empty_like(t, device=device) for name, t in stored.items()}
    stream_to_cuda(pieces(shard, targets.items(), 100), device)
    assert all(same(targets[name].cpu(), stored[name]) for name in stored)


def test_a_model_is_streamed_into_one_allocation_per_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As to a GPU, here to memory: the parameters are those of a mapped model, aligned, and none lies in another."""
    build(tmp_path / "in", family="nemotron_h", dialect="compressed-tensors", scheme="fp8_dynamic", kv="tensor")
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    expected, model = runtime.load_model(tmp_path / "out"), runtime.load_model(tmp_path / "out")

    def to_memory(work: Any, device: torch.device) -> None:
        def copy(parts: list[Part]) -> Any:
            for target, source in parts:
                target.copy_(source)
            return lambda: None

        stream(work, [torch.empty(runtime.shards.PIECE, dtype=torch.uint8) for _ in range(2)], copy)

    monkeypatch.setattr(loader, "stream_to_cuda", to_memory)
    slots, files = dict(loader._slots(model)), loader._tensor_files(tmp_path / "out")
    shards = {file: Shard(tmp_path / "out", file) for file in set(files.values())}
    loader._stream_to_device(files, shards, slots, torch.device("cpu"))
    found = dict(model.named_parameters())
    assert all(same(found[name], parameter) for name, parameter in expected.named_parameters())
    assert len({parameter.untyped_storage().data_ptr() for parameter in found.values()}) == len(shards)
    places = sorted((parameter.data_ptr(), parameter.nbytes) for parameter in found.values())
    assert all(start + nbytes <= after for (start, nbytes), (after, _) in pairwise(places))
    assert {parameter.storage_offset() * parameter.element_size() % 512 for parameter in found.values()} == {0}

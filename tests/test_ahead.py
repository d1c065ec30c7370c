"""What `runtime.ahead` does around the compiler; `test_emulated.py` has it compile, and sees that nothing is missing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers_tiny import write_checkpoint
from torch import Tensor

from runtime import ahead, loader
from runtime.ahead import Use, compiling
from runtime.kernels import table, tiles, twin
from runtime.sampling import Sampling

CPU, META = torch.device("cpu"), torch.device("meta")
USE = Use((3,), 9, Sampling())


def no_twin() -> Any:
    raise AssertionError("nobody needs it")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "machine", lambda device: table.Machine(90, True))


def test_nothing_without_a_gpu_or_without_uses(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with compiling(no_twin, [], CPU):
        pass
    for machine in (table.Machine(None, True), table.Machine(90, False)):
        monkeypatch.setattr(table, "machine", lambda device, machine=machine: machine)
        with compiling(no_twin, [USE], CPU):
            pass


def test_it_runs_beside_and_is_waited_for(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_end, seen = threading.Event(), threading.Event(), []

    def compile_for(model: Any, uses: Sequence[Use], device: torch.device) -> None:
        began.set()
        assert may_end.wait(60)
        seen.append((model, uses, device))

    monkeypatch.setattr(ahead, "compile_for", compile_for)
    with compiling(lambda: "twin", [USE], CPU):
        assert began.wait(60)
        assert not seen
        may_end.set()
    assert seen == [("twin", [USE], CPU)]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_fails_is_said_and_stops_nothing(gpu: None) -> None:
    def broken() -> Any:
        raise RuntimeError("no compiler here")

    with pytest.warns(RuntimeWarning, match="when they are first used: no compiler here"), compiling(broken, [USE], CPU):
        pass


def test_meta_stands_for_a_device_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(table, "_machine", asked.append)
    with twin.standing_for(torch.device("cuda", 1)):
        table.machine(META)
        table.machine(CPU)
        other = threading.Thread(target=table.machine, args=(META,))
        other.start()
        other.join()
    table.machine(META)
    assert asked == [torch.device("cuda", 1), CPU, META, META]
    with twin.standing_for(CPU):
        assert tiles.multiprocessors(META) == tiles.H200_SMS


def test_values_of_a_twin() -> None:
    assert twin.values(torch.tensor([0.5, 2.0])) == [0.5, 2.0]
    assert twin.values(torch.empty(3, device=META)) == [0.0] * 3


def test_the_loader_makes_a_twin_with_the_stored_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is taken for a GPU."""
    seen: dict[str, Any] = {}

    class Seen:
        def __init__(self, make_twin: Any, uses: Any, device: torch.device) -> None:
            seen.update(twin=make_twin(), uses=uses)

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    def stream(files: Any, shards: Any, slots: Any, device: torch.device) -> None:
        for name, slot in slots.items():
            slot.put(shards[files[name]].mapped(name))

    monkeypatch.setattr(loader, "compiling", Seen)
    monkeypatch.setattr(loader, "find_device", lambda name: META)
    monkeypatch.setattr(loader, "check_schemes", lambda *_: None)
    monkeypatch.setattr(loader, "_stream_to_device", stream)
    write_checkpoint(tmp_path / "out")
    model = loader.load_model(tmp_path / "out", device="cuda", dtype=torch.bfloat16, uses=[USE])

    def facts(of: Any) -> dict[str, tuple[torch.dtype, torch.Size]]:
        tensors: dict[str, Tensor] = dict(of.named_parameters())
        return {name: (t.dtype, t.shape) for name, t in tensors.items()}

    assert seen["uses"] == [USE]
    assert facts(seen["twin"]) == facts(model)
    assert {t.device for t in seen["twin"].parameters()} == {META}
    assert not seen["twin"].training

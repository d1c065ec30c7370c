"""The GPU benchmark without a GPU: what it says then, and the parts that need none."""

from __future__ import annotations

import datetime
import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench import gpu
from runtime.kernels import fp8_linear, nvfp4_linear
from runtime.kernels.cases import Case


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "bench.gpu: no CUDA device; run it on a machine with an NVIDIA GPU\n"


def test_unknown_part() -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--part", "check,speed"])
    assert stop.value.code == 2


@pytest.mark.parametrize(("kernel", "index"), [(fp8_linear, 6), (nvfp4_linear, 6)], ids=["fp8", "nvfp4"])
@pytest.mark.parametrize("split", [None, 2])
def test_check_sees_what_is_wrong(kernel: object, index: int, split: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, in the interpreter: passes, and fails for a wrong result."""
    case, cpu = kernel.CASES[index], torch.device("cpu")
    assert gpu.error_of(kernel, case, 2, cpu, split) < 1e-6
    prepare = kernel.prepare
    monkeypatch.setattr(
        kernel, "prepare", lambda spec, tensors: lambda x, out, tiles: prepare(spec, tensors)(x[:1], out[:1], tiles)
    )
    assert not gpu.error_of(kernel, case, 2, cpu, split) < gpu.TOLERANCE  # a row is still NaN


def test_check_counts_nan_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([1e-7, float("nan"), *[1e-3] * 1000])
    monkeypatch.setattr(gpu, "kernels", lambda device: [fp8_linear])
    monkeypatch.setattr(gpu, "error_of", lambda *args: next(errors))
    lines = list(gpu.check(gpu.Bench(torch.device("cpu"), (1,))))
    assert len(lines) == len(fp8_linear.CASES)
    assert all(line.failed for line in lines)
    assert lines[0].values["at"] == "M=2"


def test_bytes_are_what_is_stored() -> None:
    assert gpu.weight_bytes(Case("", "fp8_tensor", (128, 64), 256)) == 192 * 256 + 2 * 4
    assert gpu.weight_bytes(Case("", "nvfp4", (128,), 256)) == 128 * 128 + 128 * 16 + 4
    assert gpu.moved_bytes(Case("", "nvfp4", (128,), 256), 3) == 128 * 128 + 128 * 16 + 4 + 2 * 3 * (256 + 128)


def test_report() -> None:
    lines = [
        gpu.Line("bandwidth", "copy", {"GB/s": 4321.5}),
        gpu.Line("linear", "a layer", {"M": 1, "us": 20.25, "of B": 0.5}),
        gpu.Line("linear", "b", {"M": 8, "us": 21.0}, failed=True),
    ]
    assert gpu.table(lines).splitlines() == [
        "bandwidth       GB/s",
        "copy        4.32e+03",
        "linear           M         us       of B",
        "a layer          1       20.2        0.5",
        "b                8         21             WRONG",
    ]
    data = json.loads(json.dumps(gpu.record(lines, "a GPU", datetime.datetime(2026, 1, 2, 3, 4, 5))))
    assert data["date"] == "2026-01-02T03:04:05"
    assert data["hardware"] == "a GPU"
    assert torch.__version__.startswith(data["versions"]["torch"])  # without the local part in some builds
    assert data["lines"][2] == {"part": "linear", "name": "b", "values": {"M": 8, "us": 21.0}, "failed": True}

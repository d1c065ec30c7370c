"""The GPU benchmark without a GPU: what it says then, the parts that need none, and how it goes on after failures."""

from __future__ import annotations

import datetime
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench import gpu, gpu_rows, models, targets
from bench.gpu_rows import Bench, Line, Part, Row
from runtime.kernels import fp8_experts, fp8_linear, nvfp4_experts, nvfp4_linear
from runtime.kernels.cases import Case, ExpertCase, make_inputs, make_tensors
from runtime.models import FAMILIES

CPU = torch.device("cpu")


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


def test_everything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All parts at their smallest, on the CPU: every kernel is checked in the interpreter, every row gives its lines."""
    code = gpu.main(["--device", "cpu", "--quick", "--in-process", "--tokens", "1", "--results", str(tmp_path)])
    said = capsys.readouterr().out
    (file,) = tmp_path.glob("*-gpu-*.json")
    data = json.loads(file.read_text())
    assert [line for line in data["lines"] if line["failed"]] == []
    assert code == 0
    assert {line["part"] for line in data["lines"]} == {
        "bandwidth", "check", "logits", "decode", "prefill", "load", "memory", "kernels", "layers", "targets",
    }  # fmt: skip
    checked = {line["name"].partition(":")[0] for line in data["lines"] if line["part"] == "check"}
    tiny = {name for name, kernel in gpu_rows.kernels_on(CPU) if any(case.tiny for case in kernel.CASES)}
    assert checked == tiny >= {"fp8_linear", "nvfp4_linear", "attention_decode"}
    assert data["dropped"] == []
    assert data["versions"]["torch"] == torch.__version__.partition("+")[0] or data["versions"]["torch"] == torch.__version__
    assert said.index("targets") > said.index("bandwidth")
    assert "process start to first token" in said
    targets = [line["values"]["verdict"] for line in data["lines"] if line["part"] == "targets"]
    assert {*targets} == {"not measured"}  # nothing of true size was


def test_processes_of_their_own(tmp_path: Path) -> None:
    bench = Bench(CPU, (1,), quick=True)
    worker, lines = gpu.Apart("bandwidth", bench, []), list[Line]()
    try:
        problem = worker.run(0, 120, lines.append)
    finally:
        worker.close()
    assert problem is None
    assert [line.name for line in lines] == ["copy on the device (B)", "read on the device", "copy from pinned memory"]


CHILD = """
import json, os, sys, time
for text in sys.stdin:
    n = int(text)
    line = {"part": "p", "name": f"row {n} of {os.getpid()}", "values": {"n": n}, "failed": False}
    print(json.dumps({"line": line}), flush=True)
    if n == 1:
        print("an illegal memory access", file=sys.stderr, flush=True)
        os._exit(9)
    if n == 2:
        time.sleep(60)
    print("what a library prints", flush=True)
    print(json.dumps({"end": "ValueError: no" if n == 3 else None, "fatal": n == 4}), flush=True)
"""


def test_rows_that_fail_leave_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends, one that hangs, an error, an error that makes the device useless: each is one failed row."""
    monkeypatch.setattr(gpu, "GRACE", 20.0)  # a busy machine starts a process in a few seconds

    def worker(*arguments: Any) -> gpu.Apart:
        made = gpu.Apart(*arguments)
        made._command = [sys.executable, "-c", CHILD]
        return made

    rows = [Row(f"row {n}", 0.0, _nothing) for n in range(7)]
    bench, shown = Bench(CPU), []
    dropped = gpu.run_part("p", Part(lambda bench: rows, 1.0), bench, worker, gpu.Clock(100), shown.append)
    assert dropped == []
    assert shown == bench.lines
    assert [line.values["n"] for line in bench.lines if "n" in line.values] == list(range(7))
    failed = {line.name: line.values["failed"] for line in bench.lines if line.failed}
    assert failed == {
        "row 1": "ended its process with code 9: an illegal memory access",
        "row 2": "took more than 20 s",
        "row 3": "ValueError: no",
    }
    processes = [line.name.rpartition(" ")[2] for line in bench.lines if "n" in line.values]
    assert processes[0] == processes[1] != processes[2] != processes[3] == processes[4] != processes[5] == processes[6]


def _nothing(bench: Bench) -> Iterator[Line]:
    yield Line("p", "nothing", {})


class Stopped(BaseException):
    """What ends the process."""


def test_a_run_that_is_ended_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a row."""
    read: list[Any] = []

    def row(bench: Bench) -> Iterator[Line]:
        yield Line("p", "first", {"GB/s": 1.0})
        read.extend(json.loads(file.read_text()) for file in tmp_path.glob("*.json"))
        raise Stopped

    def end(self: Any, *args: Any) -> None:
        for line in row(Bench(CPU)):
            args[-1](line)

    monkeypatch.setattr(gpu.Here, "run", end)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    gpu.main(["--device", "cpu", "--quick", "--in-process", "--part", "bandwidth", "--results", str(tmp_path)])
    (data,) = read
    assert data["lines"][0] == {"part": "p", "name": "first", "values": {"GB/s": 1.0}, "failed": False}
    assert data["versions"]["python"]


def test_a_worker_that_fails_leaves_the_other_rows() -> None:
    class Broken(gpu.Here):
        def run(self, index: int, limit_s: float, take: Any) -> str | None:
            if index == 0:
                raise OSError("no more processes")
            return super().run(index, limit_s, take)

    bench = Bench(CPU)
    gpu.run_part("p", Part(lambda bench: [Row("a", 0, _nothing), Row("b", 0, _nothing)], 1.0), bench, Broken, gpu.Clock(9), id)
    assert [(line.name, line.failed) for line in bench.lines] == [("a", True), ("nothing", False)]


def test_rows_for_which_there_is_no_time_are_said() -> None:
    def slow(bench: Bench) -> Iterator[Line]:
        time.sleep(0.2)
        yield Line("p", "slow", {})

    rows = [Row("first", 0.1, slow), Row("long", 50, _nothing), Row("short", 0.1, _nothing), Row("late", 0.85, _nothing)]
    bench, show = Bench(CPU), lambda line: None
    dropped = gpu.run_part("p", Part(lambda bench: rows, 0.5), bench, gpu.Here, gpu.Clock(2), show)
    assert [line.name for line in bench.lines] == ["slow", "nothing"]
    assert dropped == ["p: long", "p: late"]


def test_a_part_that_cannot_say_its_rows_is_a_failed_line() -> None:
    def rows(bench: Bench) -> list[Row]:
        raise ImportError("no such kernel")

    bench = Bench(CPU)
    gpu.run_part("p", Part(rows, 1.0), bench, gpu.Here, gpu.Clock(10), lambda line: None)
    assert [(line.failed, line.values) for line in bench.lines] == [(True, {"failed": "ImportError: no such kernel"})]


@pytest.mark.parametrize(("kernel", "index"), [(fp8_linear, 6), (nvfp4_linear, 6)], ids=["fp8", "nvfp4"])
@pytest.mark.parametrize("split", [None, 2])
def test_check_sees_what_is_wrong(kernel: Any, index: int, split: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, in the interpreter: passes, and fails for a wrong result."""
    case = kernel.CASES[index]
    assert gpu_rows.error_of(kernel, case, 2, CPU, split) < 1e-6
    prepare = kernel.prepare
    monkeypatch.setattr(
        kernel, "prepare", lambda spec, tensors: lambda x, out, tiles: prepare(spec, tensors)(x[:1], out[:1], tiles)
    )
    assert not gpu_rows.error_of(kernel, case, 2, CPU, split) < gpu_rows.TOLERANCE  # a row is still NaN


@pytest.mark.parametrize("kernel", [fp8_linear, nvfp4_linear])
def test_references_of_tall_layers_are_made_in_pieces(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("", {fp8_linear: "fp8_channel", nvfp4_linear: "nvfp4"}[kernel], (70,), 64, bias=True)
    tensors, x = make_tensors(case, CPU, 1), make_inputs(case, 3, CPU, 2)
    expected = kernel.reference(x, case.spec(), tensors)
    monkeypatch.setattr(gpu_rows, "ROWS_AT_ONCE", 32)
    assert torch.allclose(gpu_rows.reference_of(kernel, x, case.spec(), tensors), expected, rtol=1e-12)


@pytest.mark.parametrize("kernel", [fp8_experts, nvfp4_experts])
def test_experts_are_checked_in_every_way_that_a_kernel_has(kernel: Any) -> None:
    case = ExpertCase("", {fp8_experts: "fp8_tensor", nvfp4_experts: "nvfp4"}[kernel], 2, 1, 16, 32, gated=False, tiny=True)
    found = gpu_rows.errors_of(kernel, case, Bench(CPU))
    widths = {name.partition(", ")[2].rpartition(",")[0] for name in found}
    assert widths == {"slots", *(f"blocks of {shape.tokens}" for shape in kernel.BLOCK_SHAPES)}
    assert max(found.values()) < 1e-5


def test_check_counts_nan_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([1e-7, float("nan"), *[1e-3] * 1000])
    monkeypatch.setattr(gpu_rows, "kernels", lambda: [("fp8_linear", fp8_linear)])
    monkeypatch.setattr(gpu_rows, "error_of", lambda *args: next(errors))
    bench = Bench(CPU)
    rows = [row for row in gpu_rows.check_rows(bench) if not row.name.endswith("many tokens")]
    lines = [line for row in rows for line in row.run(bench)]
    assert len(lines) == len(fp8_linear.CASES)
    assert all(line.failed for line in lines)
    assert lines[0].values["at"] == "M=2"


def test_all_that_is_timed_is_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processes of the part before: with one process, kernels took longer to compile than to time."""
    bench = Bench(CPU)
    warm, timed = gpu_rows.warm_rows(bench), [*gpu_rows.kernel_rows(bench), *gpu_rows.gemm_rows(bench)]
    assert {row.name for row in timed} <= {row.name for row in warm}
    bench, launched = Bench(CPU, (1, 8), quick=True), []
    monkeypatch.setattr(gpu_rows, "seconds", lambda launch, bench, replays=1: launched.append(bench.warming) or 1.0)
    name = gpu_rows.kernel_rows(bench)[0].name
    (row,) = (row for row in gpu_rows.warm_rows(bench) if row.name == name)
    assert list(row.run(bench)) == []
    assert launched
    assert all(launched)


def test_layers_with_targets_are_timed_first() -> None:
    names = [row.name for row in gpu_rows.kernel_rows(Bench(CPU))]
    wanted = gpu_rows.big_layers("fp8", 50) | gpu_rows.big_layers("nvfp4", 28)
    assert {*names[: len(wanted)]} == wanted


def test_logits_see_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is wrong by an eighth on the device, and only there."""
    bench = Bench(CPU)
    assert not any(line.failed for line in gpu_rows.compare_logits("qwen3", "NVFP4", True, bench))
    on_device = gpu_rows.on_device

    def wrong(source: Any, target: Any) -> Any:
        found = on_device(source, target)
        found.get_submodule("model.layers.1.mlp.down_proj").weight_scale_2.data *= 1.5
        return found

    monkeypatch.setattr(gpu_rows, "on_device", wrong)
    assert next(iter(gpu_rows.compare_logits("qwen3", "NVFP4", True, bench))).failed


@pytest.mark.parametrize(("parting", "tries", "wrong"), [([24], 1, False), ([1, 3, 9], 3, False), ([1, 3, 7, 2], 4, True)])
def test_tokens_that_part_early_once_are_no_failure(
    parting: list[int], tries: int, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step in fifty draws another token: rounding is enough for that."""
    import runtime.decode

    calls = iter(same for lead in parting for same in (24, lead))
    monkeypatch.setattr(runtime.decode, "Decoding", lambda *args, fixed: [*range(next(calls)), *[-1] * 24][:24])
    *_, line = gpu_rows.compare_logits("qwen3", "NVFP4", True, Bench(CPU))
    assert (line.values["inputs"], line.failed) == (tries, wrong)


def test_bytes_are_what_is_stored() -> None:
    assert gpu_rows.weight_bytes(Case("", "fp8_tensor", (128, 64), 256)) == 192 * 256 + 2 * 4
    assert gpu_rows.weight_bytes(Case("", "nvfp4", (128,), 256)) == 128 * 128 + 128 * 16 + 4
    assert gpu_rows.moved_bytes(Case("", "nvfp4", (128,), 256), 3) == 128 * 128 + 128 * 16 + 4 + 2 * 3 * (256 + 128)


# Weights of published models, in billions, and those that a token meets: docs of their makers; embedding not counted twice.
PUBLISHED = {
    "Qwen3.5-9B FP8": (8.95, 7.94), "Qwen3.5-27B FP8": (26.9, 25.6), "Qwen3.5-35B-A3B FP8": (34.66, 2.95),
    "Nemotron-3-Nano-30B-A3B FP8": (31.58, 3.23), "Qwen3.5-27B NVFP4": (26.9, 25.6), "Qwen3.5-9B NVFP4": (8.95, 7.94),
}  # fmt: skip


@pytest.mark.parametrize("model", models.PUBLISHED, ids=lambda model: model.name)
def test_models_have_published_sizes(model: models.Model) -> None:
    meta = torch.device("meta")
    found = models.empty(model, meta, torch.bfloat16)
    roles = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")
    count = sum(
        p.numel() * (2 if p.dtype == torch.uint8 else 1)
        for name, p in found.named_parameters() if name.rpartition(".")[2] not in roles
    )  # fmt: skip
    total, active = PUBLISHED[model.name]
    assert count / 1e9 == pytest.approx(total, rel=0.004)
    assert models.active_weights(found) / 1e9 == pytest.approx(active, rel=0.01)
    # Bytes of a step, by hand: about those of the active weights, 1 or 0.5625 each, 2 in the head.
    head = found.architecture.vocab_size * found.architecture.hidden_size
    least = (models.active_weights(found) - head) * (0.5625 if "NVFP4" in model.name else 1) + 2 * head
    assert least < models.step_bytes(found, 1, 1024) < 1.3 * least
    assert models.step_bytes(found, 1, 1024) < models.step_bytes(found, 8, 1024) < 8 * models.step_bytes(found, 1, 1024)


@pytest.mark.parametrize("scheme", models.SCHEMES)
def test_tiny_models_of_every_family_are_finite(scheme: str) -> None:
    assert models.TINY_ARCHITECTURES.keys() == FAMILIES.keys()
    for family in FAMILIES:
        logits = models.make(models.tiny(family, scheme), CPU, torch.float32)(torch.arange(6).unsqueeze(0))
        assert 0.5 < float(logits.std()) < 2


def test_targets() -> None:
    layers = {
        (scheme, inputs): next(
            gpu_rows.label(kernel, case) for _, kernel in gpu_rows.kernels() for case in kernel.CASES
            if gpu_rows.is_linear(case) and gpu_rows.weight_bytes(case) > 50e6 and case.scheme.startswith(scheme)
            and case.activations == inputs
        )
        for scheme, inputs in (("fp8", None), ("nvfp4", None), ("nvfp4", "nvfp4"))
    }  # fmt: skip
    gemms = {case.scheme: str(case) for case in gpu_rows.GEMMS[:3]}
    lines = [
        Line("kernels", layers["fp8", None], {"M": 1, "of B": 0.85, "vs first M": 1.0}),
        Line("kernels", layers["fp8", None], {"M": 8, "of B": 0.5, "vs first M": 1.2}),
        Line("kernels", layers["nvfp4", None], {"M": 1, "of B": 0.5}),
        Line("kernels", layers["nvfp4", "nvfp4"], {"M": 1, "of B": 0.1}),  # not W4A16
        Line("decode", "Qwen3.5-9B FP8, batch 1", {"of B": 0.73}),
        Line("decode", "Qwen3.5-9B FP8, batch 8", {"of B": 0.1}),
        Line("decode", "Qwen3.5-9B NVFP4, batch 1", {"of B": float("nan")}),  # without B
        Line("decode", "Qwen3.5-27B FP8, batch 1", {"failed": "RuntimeError"}, True),
        Line("decode", "Qwen3.5-27B NVFP4", {"failed": "took more than 80 s"}, True),
        Line("layers", gemms["fp8_tensor"], {"of _scaled_mm": 1.1, "of fast": 0.8}),
        Line("layers", gemms["fp8_channel"], {"of _scaled_mm": 0.96, "of fast": 0.9}),
        Line("load", "Qwen3.5-9B FP8: a new process, kernels cold", {"to first token s": 14.0}),
        Line("load", "Qwen3.5-9B FP8: a new process, kernels warm", {"to first token s": 6.0}),
        Line("load", "qwen3_5 FP8 blocks: loading", {"of least": 2.5}),  # a tiny one
    ]
    dropped = ["kernels: another", "decode: Qwen3.5-35B-A3B FP8"]
    found = {line.name: line.values for line in targets.target_lines(lines, dropped)}
    verdicts = {name: values["verdict"] for name, values in found.items() if values["verdict"] != "not measured"}
    assert verdicts == {
        "FP8 GEMV, weight >= 50 MB: share of B": "accept",
        "NVFP4 W4A16 GEMV, packed >= 28 MB: share of B": "missed",
        "M = 8 against M = 1, FP8: time": "accept",
        "FP8 prefill GEMM, M = 4096, scales by row, of torch._scaled_mm alone": "accept",
        "FP8 prefill GEMM, M = 4096, scales by row, of it with fast sums": "missed",
        "decode, Qwen3.5-9B FP8: share of B": "target",
        "process start to first token, 9B FP8, s": "accept",
    }
    assert {name: values["failed"] for name, values in found.items() if "failed" in values} == {
        "M = 8 against M = 1, NVFP4: time": "gave no figure",
        "FP8 prefill GEMM, M = 4096, blocks, of torch._scaled_mm alone": "was not run",
        "decode, Qwen3.5-27B FP8: share of B": "Qwen3.5-27B FP8, batch 1: RuntimeError",
        "decode, Qwen3.5-27B NVFP4: share of B": "Qwen3.5-27B NVFP4: took more than 80 s",
        "decode, Qwen3.5-9B NVFP4: share of B": "gave no figure",
        "decode, Qwen3.5-35B-A3B FP8: share of B": "no time was left",
        "decode, Nemotron-3-Nano-30B-A3B FP8: share of B": "was not run",
        "load, page cache warm: of the least of copy and read": "gave no figure",
        "device memory above weights, KV and state": "gave no figure",
    }
    assert not any(line.failed for line in targets.target_lines([]))


def test_report() -> None:
    lines = [
        Line("bandwidth", "copy", {"GB/s": 4321.5}),
        Line("linear", "a layer", {"M": 1, "us": 20.25, "of B": 0.5}),
        Line("linear", "b", {"M": 8, "us": 21.0}, failed=True),
        Line("linear", "c", {"failed": "RuntimeError: no"}, failed=True),
    ]
    assert gpu.table(lines).splitlines() == [
        "bandwidth       GB/s",
        "copy        4.32e+03",
        "linear           M         us       of B",
        "a layer          1       20.2        0.5",
        "b                8         21  WRONG",
        "c         WRONG  RuntimeError: no",
    ]
    lines.append(Line("linear", "d", {"us": float("nan")}))
    made = gpu.record(lines, "a GPU", datetime.datetime(2026, 1, 2, 3, 4, 5), versions=gpu.versions())
    data = json.loads(json.dumps(made, allow_nan=False))
    assert data["date"] == "2026-01-02T03:04:05"
    assert data["hardware"] == "a GPU"
    assert torch.__version__.startswith(data["versions"]["torch"])  # without the local part in some builds
    assert data["lines"][2] == {"part": "linear", "name": "b", "values": {"M": 8, "us": 21.0}, "failed": True}
    assert data["lines"][4]["values"] == {"us": "nan"}

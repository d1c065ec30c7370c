"""Kernels as compiled for sm_90, executed on a CPU: codes in bfloat16, inline assembly, layouts of tensor cores, barriers.

`test_kernels*.py` run the same cases in Triton's interpreter, which computes in float32 and one program after another.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
from conftest import output_of_script

pytest.importorskip("triton", reason="triton is not installed")

import emulated

from bench import gpu_rows

TOLERANCE = 1e-5  # sums are rounded once per instruction here; a GPU is allowed more


@pytest.fixture(scope="session")
def emulated_runs() -> dict[str, dict[str, Any]]:
    """By label what `emulated.py` found."""
    return {run["name"]: run for run in output_of_script("emulated_runs")}


@pytest.mark.parametrize(("label", "name"), [(label, name) for label, name, _ in emulated.cases()])
def test_compiled_kernels(label: str, name: str, emulated_runs: dict[str, dict[str, Any]]) -> None:
    """Fresh inputs and poisoned outputs, against float64."""
    check(emulated_runs[label], name)


@pytest.fixture(scope="session")
def emulated_few() -> dict[str, dict[str, Any]]:
    """The same for sm_100."""
    return {run["name"]: run for run in output_of_script("emulated_few")}


@pytest.mark.parametrize(("label", "name"), [(label, name) for label, name, _ in emulated.few()])
def test_compiled_for_the_next_generation(label: str, name: str, emulated_few: dict[str, dict[str, Any]]) -> None:
    run = emulated_few[label]
    check(run, name)
    assert ("tcgen05" in run["instructions"]) == (name not in ("nvfp4_linear", "router"))


def check(run: dict[str, Any], name: str) -> None:
    assert "fault" not in run, run["fault"]
    kernel = import_module(f"runtime.kernels.{name}")
    tolerance = max(TOLERANCE, getattr(kernel, "TOLERANCE", 0.0))
    assert run["errors"]
    assert all(error < tolerance for error in run["errors"].values()), run["errors"]  # also where one is NaN


@pytest.mark.parametrize("model", emulated.MODELS, ids=str)
def test_whole_models(model: tuple[Any, ...], emulated_runs: dict[str, dict[str, Any]]) -> None:
    """As exact as the same without kernels in bfloat16, and no kernel is compiled when it is launched."""
    run = emulated_runs[" ".join(map(str, model))]
    assert "fault" not in run, run["fault"]
    found = run["errors"]
    assert found["logits"] < 1.5 * found["usual"] < 0.5
    assert found["ahead"] > 10
    assert found["late"] == 0


# Of the cycles in which memory gives an H200 the weights: how many shared memory and the cache may be busy.
BUSY = {("fp8_linear", 1): (0.40, 0.17), ("fp8_linear", 8): (0.40, 0.20),
        ("nvfp4_linear", 1): (0.53, 0.56), ("nvfp4_linear", 8): (0.53, 0.76)}  # fmt: skip


@pytest.mark.parametrize("linear", emulated.TRAFFIC, ids=str)
def test_memory_of_the_multiprocessor_keeps_up(linear: tuple[str, str, int], emulated_runs: dict[str, dict[str, Any]]) -> None:
    """No conflicts of banks, no scattered reads that would take longer than the weights themselves."""
    found = emulated_runs[" ".join(map(str, linear))]["errors"]
    turns, lines = BUSY[linear[0], linear[2]]
    assert 0.1 < found["turns"] < turns
    assert 0.1 < found["lines"] < lines


SAID = {
    "reads_beyond": "ld.global.b32 { %r1 }, [ %rd1 + 0 ]: thread 64 of program 1: 4 bytes at x + 768, which has 768 bytes",
    "writes_beyond": "thread 127 of program 1: 4 bytes at y + 1020, which has 1020 bytes",
    "writes_elsewhere": "different values at one place",
    "counts_without_order": "work + 0: warp 0 writes and warp 4 reads it, in no order",
}


@pytest.mark.parametrize("name", emulated.FAULTS)
def test_faulty_kernels(name: str, emulated_runs: dict[str, dict[str, Any]]) -> None:
    assert SAID[name] in emulated_runs[name].get("fault", "")


def test_the_report_runs_every_kernel() -> None:
    """`emulated.cases` leaves out only what has no kernel in Triton."""
    mine = {name for _, name, _ in emulated.cases()}
    every = {name for name, _ in gpu_rows.kernels()}
    assert every - mine <= {"gated_delta_fla", "scaled_mm_block", "scaled_mm_nvfp4"}

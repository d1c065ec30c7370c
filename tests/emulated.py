"""Kernels compiled for a GPU that is not there, and executed by `ptx.py`: the code that a GPU would run, on a CPU.

    python tests/emulated.py [generation]

runs the tiny cases of every kernel, and `faulty_kernels`, and prints one JSON list.  It is a process of its own because the
interpreter, which the other tests need, replaces the compiler when kernels are imported.

Everything before the launch is Triton's own: how arguments specialise a kernel, the compilation and its cache.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as Triton does so far; unset, 3.9 warns
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import triton
from ptx import parse
from ptx_machine import FaultError, Launch, Program, Region
from triton.backends.compiler import GPUTarget

SHARED = 232448  # bytes that a program may have on sm_90 and sm_100
SCRATCH = 2  # pointers that Triton appends to the arguments
# In a ring, one program writes the column of the new token while others may read it; they see a position too old for the
# window or none that is past, and what they read beside it counts 0 times.
UNORDERED = {("attend_kernel", argument) for argument in ("held", "kept_k", "kept_v")}
FAULTS = ("reads_beyond", "writes_beyond", "writes_elsewhere", "counts_without_order")


@functools.cache
def program(path: str) -> Program:
    return parse(Path(path).read_text())


def region(name: str, tensor: torch.Tensor, ordered: bool) -> Region:
    """The bytes from a tensor's first element to its last; a pointer given to a kernel says no more."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    count = reach * tensor.element_size() if tensor.numel() else 0
    memory = (ctypes.c_uint8 * count).from_address(tensor.data_ptr()) if count else bytearray()
    return Region(name, tensor.data_ptr(), np.frombuffer(memoryview(memory).cast("B"), np.uint8), ordered)


class Launcher:
    """What Triton calls for each launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name, self.names = source.fn.__name__, source.fn.arg_names
        self.kinds = list(source.signature.values())
        self.warps, self.shared = metadata.num_warps, metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, path: str, *rest: Any) -> None:
        values: list[int | float] = []
        regions = []
        for name, kind, argument in zip(self.names, self.kinds, rest[-len(self.kinds) :], strict=True):
            if kind == "constexpr":
                continue
            if isinstance(argument, torch.Tensor):
                regions.append(region(name, argument, (self.name, name) not in UNORDERED))
                values.append(argument.data_ptr())
            else:
                values.append(float(argument) if kind.startswith("fp") else int(argument))
        Launch(program(path), (x, y, z), self.warps, self.shared, values + [0] * SCRATCH, regions).run()


class Driver:
    """What Triton asks of a driver."""

    def __init__(self, generation: int) -> None:
        self.target = GPUTarget("cuda", generation, 32)
        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED, "multiprocessor_count": 132},
            load_binary=self.load,
            unload_module=lambda module: None,
        )
        self.path = ""

    def about_to_load(self, module: Any, function: Any, name: str, files: dict[str, Any], hash: str) -> None:
        self.path = str(next(path for file, path in files.items() if file.endswith(".ptx")))

    def load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, str, int, int, int]:
        """Module, function, registers, spills, threads."""
        return 1, self.path, 0, 0, 1024

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def use(generation: int) -> None:
    """From now on this process launches on a GPU that is not there, of compute capability `generation` / 10."""
    driver = Driver(generation)
    triton.runtime.driver.set_active(driver)
    triton.knobs.runtime.kernel_load_start_hook.add(driver.about_to_load)


# What is run


def cases() -> list[tuple[str, str, Any]]:
    """Label, kernel and tiny case of every kernel in Triton."""
    from bench.gpu_rows import kernels, label

    found = [(name, kernel) for name, kernel in kernels() if any(hasattr(o, "arg_names") for o in vars(kernel).values())]
    return [(label(kernel, case), name, case) for name, kernel in found for case in kernel.CASES if case.tiny]


def runs(kernel: ModuleType, case: Any) -> dict[str, float]:
    """Run -> error.  Of a linear layer and of experts: one token and as many as fit, split and not, slots and blocks."""
    from bench.gpu_rows import error_of, is_linear
    from runtime.kernels import slots
    from runtime.kernels.cases import ExpertCase

    cpu = torch.device("cpu")
    if is_linear(case):
        most = kernel.SHAPES[-1].tokens
        ways = ((1, None), (3, 2), (most, None))
        return {f"M={M}, split {split}": error_of(kernel, case, M, cpu, split) for M, split in ways}
    if isinstance(case, ExpertCase):
        plans = [(3, None, None), (40, kernel.BLOCK_SHAPES[-1].tokens, None)]
        found: dict[str, float] = slots.errors(kernel, kernel.reference, case, cpu, 0, plans)
    else:
        found = kernel.errors(case, cpu, 0)
    return found


def results() -> Iterator[dict[str, Any]]:
    """For each case its errors, or what went wrong."""
    faulty = importlib.import_module("faulty_kernels")
    work: list[tuple[str, Callable[[], dict[str, float]]]] = [(name, getattr(faulty, name)) for name in FAULTS]
    for label, name, case in cases():
        work.append((label, functools.partial(runs, importlib.import_module(f"runtime.kernels.{name}"), case)))
    for label, run in work:
        try:
            yield {"name": label, "errors": run()}
        except FaultError as fault:
            yield {"name": label, "fault": str(fault)}


def main() -> None:
    """Run everything and print it."""
    use(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
    json.dump(list(results()), sys.stdout)


if __name__ == "__main__":
    main()

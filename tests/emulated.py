"""Kernels compiled for a GPU that is not there, and executed by `ptx.py`: the code that a GPU would run, on a CPU.

    python tests/emulated.py [generation [few]]

runs the tiny cases of every kernel, and `faulty_kernels`, or those of `FEW`, and prints one JSON list.  It is a process of its
own because the interpreter, which the other tests need, replaces the compiler when kernels are imported.

Everything before the launch is Triton's own: how arguments specialise a kernel, the compilation and its cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as Triton does so far; unset, 3.9 warns
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import ptx_blackwell  # noqa: F401  (its instructions, and those of `ptx_matrices`)
import torch
import triton
from ptx import parse
from ptx_machine import FaultError, Launch, Program, Region
from traffic import Counted, aligned, shares
from triton.backends.compiler import GPUTarget

SHARED = 232448  # bytes that a program may have on sm_90 and sm_100
SCRATCH = 2  # pointers that Triton appends to the arguments
# In a ring, one program writes the column of the new token while others may read it; they see a position too old for the
# window or none that is past, and what they read beside it counts 0 times.
UNORDERED = {("attend_kernel", argument) for argument in ("held", "kept_k", "kept_v")}
MODELS = (("qwen3_5_moe", "NVFP4", False), ("nemotron_h", "FP8 static", True), ("step3p5", "FP8 blocks", False))
TARGET = [90]  # generation
LAUNCH: list[type[Launch]] = [Launch]  # what executes
LINEARS = (("fp8_linear", "fp8_channel"), ("nvfp4_linear", "nvfp4"))
TRAFFIC = tuple((*linear, M) for linear in LINEARS for M in (1, 8))
# For sm_100: where tensor memory is used, with one exponent per group too, and instructions that sm_90 does not have
FEW = (
    ("attention_decode", "many queries"), ("fp8_experts", "rows"), ("fp8_linear", "rows"), ("fp8_linear", "groups"),
    ("mxfp8_linear", "one tile"), ("ssd_scan", "chunks and a rest"), ("nvfp4_linear", "one row, one block"),
    ("router", "softmax"),
)  # fmt: skip
FAULTS = ("reads_beyond", "writes_beyond", "writes_elsewhere", "counts_without_order")
MULTIPLIED: set[str] = set()  # `mma`, `wgmma` and `tcgen05`, as far as kernels that ran have them


@functools.cache
def program(path: str) -> tuple[Program, set[str]]:
    text = Path(path).read_text()
    return parse(text), set(re.findall(r"\b(mma|wgmma|tcgen05)(?=\.(?:sync|mma_async|mma)\b)", text))


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
        code, multiplies = program(path)
        MULTIPLIED.update(multiplies)
        LAUNCH[0](code, (x, y, z), self.warps, self.shared, values + [0] * SCRATCH, regions).run()


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
        self.loading = threading.local()  # what this thread loads

    def about_to_load(self, module: Any, function: Any, name: str, files: dict[str, Any], hash: str) -> None:
        self.loading.path = str(next(path for file, path in files.items() if file.endswith(".ptx")))

    def load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, str, int, int, int]:
        """Module, function, registers, spills, threads."""
        return 1, self.loading.path, 0, 0, 1024

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


def few() -> list[tuple[str, str, Any]]:
    """Those of `FEW`."""
    return [found for found in cases() if (found[1], found[2].name) in FEW]


def runs(kernel: ModuleType, case: Any) -> dict[str, float]:
    """Run -> error.  Of a linear layer: one token and as many as fit, split and not.  Of experts: slots, and blocks of one of
    the widths in turn."""
    from bench.gpu_rows import error_of, is_linear
    from runtime.kernels import slots
    from runtime.kernels.cases import ExpertCase

    cpu = torch.device("cpu")
    if is_linear(case):
        most = kernel.SHAPES[-1].tokens
        ways = ((1, None), (3, 2), (most, None))
        return {f"M={M}, split {split}": error_of(kernel, case, M, cpu, split) for M, split in ways}
    if isinstance(case, ExpertCase):
        width = kernel.BLOCK_SHAPES[kernel.CASES.index(case) % len(kernel.BLOCK_SHAPES)].tokens
        plans = [(3, None, None), (40, width, None)]
        found: dict[str, float] = slots.errors(kernel, kernel.reference, case, cpu, 0, plans)
    else:
        found = kernel.errors(case, cpu, 0)
    return found


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """The names of the kernels that are compiled, or found in Triton's cache on disk, meanwhile."""
    names: list[str] = []

    def note(**facts: Any) -> None:
        names.append(facts["fn"].name)

    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook


def whole_model(family: str, scheme: str, quantized: bool) -> dict[str, float]:
    """A tiny model whose kernels were compiled ahead: errors of its logits, those of the same in bfloat16 without kernels, and
    how many kernels were compiled ahead, and how many only when they were launched.

    Two prompts, three tokens after them; of the eight root mean square errors over that of the logits in float32 the median, as
    an expert that is chosen by a hair changes a token.  `quantized`: inputs of
    linear layers too.
    """
    from bench.gpu_rows import on_device
    from bench.models import empty, make, tiny
    from runtime.ahead import Use, compile_for
    from runtime.decode import prefill
    from runtime.kernels import table
    from runtime.models.base import CausalLM
    from runtime.sampling import Sampling
    from runtime.steps import Steps, kind_of

    cpu, meta, model = torch.device("cpu"), torch.device("meta"), tiny(family, scheme)
    exact, rounded = (make(model, cpu, dtype, 7, quantized) for dtype in (torch.float32, torch.bfloat16))
    ids = torch.randint(0, 512, (2, 8), generator=torch.Generator().manual_seed(1))

    def logits(of: CausalLM) -> torch.Tensor:
        steps = Steps(of, kind_of(2, sampling), 256)
        state = steps.state.first(2)
        found = [of.logits(prefill(of, [ids[0, :5], ids[1, :3]], state))]
        steps.state.settle()
        real = torch.ones(2, dtype=torch.bool)
        return torch.stack([*found, *(of.step(ids[:, 5 + t], steps.state, real) for t in range(3))])

    sampling = Sampling(1.0, 40, 0.95, seed=3)
    expected, usual = logits(exact), logits(rounded)
    machine = table.machine
    table.machine = lambda device: table.Machine(TARGET[0], True)
    try:
        there = on_device(rounded, make(model, cpu, torch.bfloat16, 7, quantized))
        twin = empty(model, meta, torch.bfloat16, quantized)
        for module, other in zip(twin.modules(), there.modules(), strict=True):
            for name, parameter in other.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.to(meta), requires_grad=False))
        with compiled() as ahead:
            compile_for(twin, [Use((5, 3), 8, sampling)], cpu)
        with compiled() as late:
            found = logits(there)
    finally:
        table.machine = machine

    def error(of: torch.Tensor) -> float:
        return float(((of - expected).norm(dim=-1) / expected.norm(dim=-1)).median())

    return {"logits": error(found), "usual": error(usual), "ahead": len(ahead), "late": len(late)}


def traffic(name: str, scheme: str, M: int) -> dict[str, float]:
    """See `traffic.shares`, of a linear layer whose K is long and not split."""
    from runtime.kernels.cases import Case, make_inputs, make_tensors
    from runtime.kernels.tiles import choose_tiles

    cpu, case = torch.device("cpu"), Case("traffic", scheme, (128,), 4096)
    kernel = importlib.import_module(f"runtime.kernels.{name}")
    tensors, x = {role: aligned(t) for role, t in make_tensors(case, cpu, 1).items()}, aligned(make_inputs(case, M, cpu, 2))
    run, cut = kernel.prepare(case.spec(), tensors), choose_tiles(kernel.SHAPES, M, *case.spec().shape, sms=1)
    LAUNCH[0] = Counted
    try:
        return shares(lambda: run(x, tiles=cut), sum(t.nbytes for t in tensors.values()))
    finally:
        LAUNCH[0] = Launch


def results(chosen: list[tuple[str, str, Any]], faults: Sequence[str], models: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """For each case its errors, or what went wrong; also which instructions multiply matrices."""
    faulty = importlib.import_module("faulty_kernels")
    work: list[tuple[str, Callable[[], dict[str, float]]]] = [(name, getattr(faulty, name)) for name in faults]
    for label, name, case in chosen:
        work.append((label, functools.partial(runs, importlib.import_module(f"runtime.kernels.{name}"), case)))
    work += [(" ".join(map(str, model)), functools.partial(whole_model, *model)) for model in models]
    if models:
        work += [(" ".join(map(str, one)), functools.partial(traffic, *one)) for one in TRAFFIC]
    for label, run in work:
        MULTIPLIED.clear()
        try:
            yield {"name": label, "errors": run(), "instructions": sorted(MULTIPLIED)}
        except FaultError as fault:
            yield {"name": label, "fault": str(fault)}


def main() -> None:
    """Run everything, or a few, and print it."""
    TARGET[0] = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    use(TARGET[0])
    json.dump(list(results(few(), (), ()) if "few" in sys.argv else results(cases(), FAULTS, MODELS)), sys.stdout)


if __name__ == "__main__":
    main()

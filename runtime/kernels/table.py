"""Which implementation runs an operation: by scheme, way of the input, and GPU generation.

One table, first row that fits; torch, which `runtime.layers` itself is, comes last and fits everything.  A row names its module
and is imported only when it is chosen: this file needs neither triton nor a GPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from runtime.format import ACTIVATIONS, SCHEMES, ModuleSpec
from runtime.kernels.twin import actual

FEW_TOKENS = 64  # rows of input that "linear, few tokens" takes
LINEAR, FEW = "linear", f"linear, up to {FEW_TOKENS} tokens"
EXPERTS = "experts"
OPERATIONS = (FEW, LINEAR, EXPERTS)
ATTEND = "attention, one token"
ROUTED_TOKENS = 64  # rows of input that "router" takes
ROUTE = "router"
DELTA_STEP, MAMBA_STEP = "gated delta net, one token", "Mamba2, one token"
NORM = "norm"
ROTATE = "rotary positions"
ACTIVATE = "between two projections"
DELTA_SCAN, MAMBA_SCAN = "gated delta rule, many tokens", "Mamba2 recurrence, many tokens"
TORCH = "torch"
PACKAGES = {"fla": "fla-core, which is not installed (pip install qconvert[fla])"}  # optional, by the name to import
FP8_INPUTS = (None, "fp8_static", "fp8_tensor", "fp8_token", "fp8_group", "fp8_group_e8m0")


@dataclass(frozen=True, slots=True)
class Row:
    """An implementation and what it is for.

    `schemes`: of a weight, or how a cache keeps what it keeps.
    `module`: has `prepare`, which returns the function to call; `TORCH` for the layers' own arithmetic.
    `generations`: least compute capability, and the first that is too new, each as major * 10 + minor.  `activations`:
    the ways of the input that it knows.  `why`: for people.  `package`: of `PACKAGES`, that it needs.  `cuda`: least version
    of CUDA that torch is built for, where a library of it does the work.
    """

    schemes: tuple[str, ...]
    operations: tuple[str, ...]
    activations: tuple[str | None, ...] | None
    generations: tuple[int, int] | None
    module: str
    why: str
    package: str | None = None
    cuda: tuple[int, int] | None = None


ROWS = (
    Row(
        ("fp8_tensor", "fp8_channel", "fp8_block"), (FEW,), FP8_INPUTS, (90, 110), "runtime.kernels.fp8_linear",
        "reads each code once and decodes it in registers",
    ),
    Row(
        ("nvfp4",), (FEW,), (None, "nvfp4"), (90, 110), "runtime.kernels.nvfp4_linear",
        "reads each code once and decodes it in registers",
    ),
    Row(
        ("fp8_tensor", "fp8_channel", "fp8_block"), (EXPERTS,),
        (None, "fp8_static", "fp8_token", "fp8_group", "fp8_group_e8m0"), (90, 110), "runtime.kernels.fp8_experts",
        "two launches for all experts, which are chosen on the device",
    ),
    Row(
        ("nvfp4",), (EXPERTS,), (None, "nvfp4"), (90, 110), "runtime.kernels.nvfp4_experts",
        "two launches for all experts, which are chosen on the device",
    ),
    Row(
        ("mxfp8",), (FEW,), (None, "mxfp8"), (90, 110), "runtime.kernels.mxfp8_linear",
        "reads each code once and decodes it in registers",
    ),
    Row(
        ("mxfp4",), (FEW,), (None, "mxfp4"), (90, 110), "runtime.kernels.mxfp4_linear",
        "reads each code once and decodes it in registers",
    ),
    Row(
        ("kv bf16", "kv fp8"), (ATTEND,), (None,), (90, 110), "runtime.kernels.attention_decode",
        "reads each key and value once, of as many sequences as there are, whatever their lengths",
    ),
    Row(
        ("state fp32",), (DELTA_STEP,), (None,), (90, 110), "runtime.kernels.gated_delta_step",
        "convolution, gates, recurrence and norm in one launch; reads and writes the state once",
    ),
    Row(
        ("state fp32",), (MAMBA_STEP,), (None,), (90, 110), "runtime.kernels.mamba2_step",
        "convolution, time step, recurrence and norm in one launch; reads and writes the state once",
    ),
    Row(
        ("state fp32",), (DELTA_SCAN,), (None,), (90, 110), "runtime.kernels.gated_delta_fla",
        "chunks on the tensor cores, by fla-core", "fla",
    ),
    Row(
        ("state fp32",), (MAMBA_SCAN,), (None,), (90, 110), "runtime.kernels.ssd_scan",
        "chunks on the tensor cores, side by side",
    ),
    Row(("state fp32",), (DELTA_STEP, MAMBA_STEP), None, None, TORCH, "each part by itself; runs anywhere"),
    Row(("state fp32",), (DELTA_SCAN, MAMBA_SCAN), None, None, TORCH, "chunks in float32, one after another; runs anywhere"),
    Row(("kv bf16", "kv fp8"), (ATTEND,), None, None, TORCH, "scaled_dot_product_attention of decoded values; runs anywhere"),
    Row(("router",), (ROUTE,), (None,), (90, 110), "runtime.kernels.router", "the matrix and the choice in one launch"),
    Row(("router",), (ROUTE,), None, None, TORCH, "a float32 matmul and a handful of operations; runs anywhere"),
    Row(
        ("rms norm",), (NORM,), (None,), (90, 110), "runtime.kernels.rms_norm",
        "one launch, with the sum before it and the quantisation after it",
    ),
    Row(("rms norm",), (NORM,), None, None, TORCH, "one operation after another; runs anywhere"),
    Row(
        ("rotary",), (ROTATE,), (None,), (90, 110), "runtime.kernels.rotary",
        "queries and keys with their norms in one launch, cosines and sines in another",
    ),
    Row(("rotary",), (ROTATE,), None, None, TORCH, "one operation after another; runs anywhere"),
    Row(
        ("activation",), (ACTIVATE,), (None,), (90, 110), "runtime.kernels.activate",
        "one launch for few tokens, with the quantisation after it",
    ),
    Row(("activation",), (ACTIVATE,), None, None, TORCH, "one operation after another; runs anywhere"),
    Row(
        ("fp8_tensor", "fp8_channel"), (LINEAR,), ("fp8_static", "fp8_tensor", "fp8_token"), (90, 110),
        "runtime.kernels.scaled_mm",
        "FP8 tensor cores with a scale per row; shapes must be multiples of 16, for others the next",
    ),
    Row(
        ("fp8_block",), (LINEAR,), ("fp8_group", "fp8_group_e8m0"), (90, 100), "runtime.kernels.scaled_mm_block",
        "FP8 tensor cores with a scale per block; partitions and K must be multiples of 128, for others the next", cuda=(12, 9),
    ),
    Row(
        ("nvfp4",), (LINEAR,), ("nvfp4",), (100, 130), "runtime.kernels.scaled_mm_nvfp4",
        "FP4 tensor cores; K must be a multiple of 32 and rows of 16, for others the next", cuda=(12, 8),
    ),
    Row(
        tuple(SCHEMES), (FEW, LINEAR), (None, *ACTIVATIONS), (89, 130), "runtime.kernels.expand",
        "decodes weights to bfloat16 in one pass, then multiplies",
    ),
    Row(tuple(SCHEMES), OPERATIONS, None, None, TORCH, "weights are converted on every call; runs anywhere"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides: the compute capability of the GPU (None: no GPU), whether triton can be imported, which packages too, and
    the version of CUDA that torch is built for."""

    generation: int | None
    triton: bool
    packages: frozenset[str] = frozenset()
    cuda: tuple[int, int] = (13, 0)


def machine(device: torch.device) -> Machine:
    """What `device` is, or what it stands for."""
    return _machine(actual(device))


@functools.cache
def _machine(device: torch.device) -> Machine:
    generation, cuda = None, (0, 0)
    if device.type == "cuda" and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(device)
        generation = major * 10 + minor
        major, minor = (int(part) for part in torch.version.cuda.split(".")[:2])
        cuda = major, minor
    packages = frozenset(name for name in PACKAGES if find_spec(name))
    return Machine(generation, find_spec("triton") is not None, packages, cuda)


def choose(scheme: str, activations: str | None, operation: str, at: Machine) -> tuple[Row, tuple[str, ...]]:
    """The row for an operation on a machine, and why each row before it that is meant for it was passed over."""
    passed: list[str] = []
    for row in ROWS:
        if scheme not in row.schemes or operation not in row.operations:
            continue
        problem = _problem(row, activations, at)
        if problem is None:
            return row, tuple(passed)
        passed.append(f"{row.module}: {problem}")
    raise AssertionError(f"no row for {scheme}, {operation}")


def _problem(row: Row, activations: str | None, at: Machine) -> str | None:
    """Why a row cannot be used, or None."""
    if row.activations is not None and activations not in row.activations:
        return f"does not know input {activations}"
    return obstacle(row, at)


def obstacle(row: Row, at: Machine) -> str | None:
    """Why a machine cannot use a row, or None."""
    if row.generations is not None:
        low, high = row.generations
        if at.generation is None:
            return "needs an NVIDIA GPU"
        if not low <= at.generation < high:
            return f"written for sm_{low} to sm_{high - 1}, this is sm_{at.generation}"
        if not at.triton:
            return "needs triton, which is not installed"
    if row.package is not None and row.package not in at.packages:
        return f"needs {PACKAGES[row.package]}"
    if row.cuda is not None and at.cuda < row.cuda:
        return "needs torch for CUDA {}.{} or newer, this is for {}.{}".format(*row.cuda, *at.cuda)
    return None


@functools.cache
def works(module: str, device: torch.device) -> bool:
    """Whether a library does on `device` what a row takes it for: the module's first tiny case is right.  Warns if it is not.

    What a library supports depends on its version and the GPU, and it says so only when it is called.
    """
    kernel = import_module(module)
    case = next(case for case in kernel.CASES if case.tiny)
    try:
        found = kernel.errors(case, device, 0)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
    else:
        if all(error <= kernel.TOLERANCE for error in found.values()):  # so NaN does not pass
            return True
        problem = f"errors {found}"
    warnings.warn(f"{module} is passed over on {device}: {problem}", RuntimeWarning, stacklevel=2)
    return False


def module_for(operation: str, scheme: str, device: torch.device) -> ModuleType | None:
    """The module that runs `operation` on `device`; None where torch does."""
    row, _ = choose(scheme, None, operation, machine(device))
    return None if row.module == TORCH else import_module(row.module)


def prepare(
    operation: str, spec: ModuleSpec, activations: str | None, tensors: Mapping[str, Tensor]
) -> Callable[..., Tensor] | None:
    """The function that runs `operation` for a layer where its tensors are; None where the layer's own arithmetic does.

    `activations`: those that are used, which may be None where `spec` names some.  `tensors`: by role, as stored, and `bias`.
    """
    device = tensors["weight"].device
    at, function = machine(device), None
    for row in ROWS:
        if spec.scheme in row.schemes and operation in row.operations and _problem(row, activations, at) is None:
            if row.cuda is not None and device.type != "cpu" and not works(row.module, actual(device)):
                continue
            if row.module != TORCH:
                function = import_module(row.module).prepare(replace(spec, activations=activations), tensors)
            if function is not None or row.module == TORCH:
                break  # else the row cannot serve this shape
    return function


Stack = tuple[ModuleSpec, str | None, Mapping[str, Tensor]]  # linears of all experts: entry, activations, tensors by role


def prepare_experts(first: Stack, down: Stack, activation: object) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The function that runs all experts of a layer where their tensors are, for `Experts.forward`; None where torch does."""
    (row, _), (other, _) = (choose(spec.scheme, kind, EXPERTS, machine(t["weight"].device)) for spec, kind, t in (first, down))
    if row.module == TORCH or other is not row:
        return None
    specs = (replace(spec, activations=kind) for spec, kind, _ in (first, down))
    function: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    function = import_module(row.module).prepare(*specs, first[2], down[2], activation)
    return function

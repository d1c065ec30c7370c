"""GPU kernels without a GPU: numbers from Triton's interpreter, machine code from its compiler, and who chooses which.

Interpreted kernels compute in float32 and store float32, because the interpreter's bfloat16 is wrong; expected values are
float64.  Outputs start as NaN, so an element that is not written shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import row_scales
import torch
from compiled import BUILDS, Build, Compiled, take_apart
from conftest import output_of_script
from test_runtime_layers import awkward_input, held, random_layer, spec_of
from torch import Tensor

import runtime.kernels.__main__ as report
from runtime.activations import fake_quantize
from runtime.format import ACTIVATIONS, SCHEMES
from runtime.kernels import table
from runtime.kernels.table import FEW, TORCH, Machine, choose

pytest.importorskip("triton", reason="triton is not installed")

from runtime.kernels import fp8_linear, fp8_quantize, nvfp4_linear, nvfp4_quantize, tiles
from runtime.kernels.cases import Case, make_inputs, make_tensors

CPU = torch.device("cpu")
FP8_TINY = [case for case in fp8_linear.CASES if case.tiny]
NVFP4_TINY = [case for case in nvfp4_linear.CASES if case.tiny]


def label(value: object) -> str | None:
    return str(value) if isinstance(value, Case) else None


def check(kernel: ModuleType, case: Case, M: int, cut: tiles.Tiles | None = None) -> None:
    """Fresh inputs and a poisoned output through the interpreter, against float64."""
    spec, tensors, x = case.spec(), make_tensors(case, CPU, M), make_inputs(case, M, CPU, M)
    expected = kernel.reference(x, spec, tensors)
    found = torch.full(expected.shape, torch.nan)
    kernel.prepare(spec, tensors)(x, out=found, tiles=cut)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    assert not tiles.counters(CPU).any()  # ready for the next launch


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("case", FP8_TINY, ids=label)
def test_fp8_linear(case: Case, M: int) -> None:
    check(fp8_linear, case, M)


@pytest.mark.parametrize("M", [9, 17, 64])
@pytest.mark.parametrize("case", [FP8_TINY[1], FP8_TINY[4], FP8_TINY[9]], ids=label)
def test_fp8_linear_many_tokens(case: Case, M: int) -> None:
    check(fp8_linear, case, M)


@pytest.mark.parametrize("split", [2, 3, 5])
@pytest.mark.parametrize("case", [FP8_TINY[6], FP8_TINY[8], FP8_TINY[9]], ids=label)
def test_split_of_k(case: Case, split: int) -> None:
    """Also with ranges that reach beyond K, and one that lies beyond it."""
    steps = -(-case.K // (tiles.INPUTS * split))
    check(fp8_linear, case, 2, tiles.Tiles(32, 8, split, steps, 2, 2))


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("case", NVFP4_TINY, ids=label)
def test_nvfp4_linear(case: Case, M: int) -> None:
    check(nvfp4_linear, case, M)


@pytest.mark.parametrize("M", [9, 17, 64])
def test_nvfp4_linear_many_tokens(M: int) -> None:
    check(nvfp4_linear, NVFP4_TINY[1], M)


@pytest.mark.parametrize("split", [2, 3, 4])
@pytest.mark.parametrize("case", [NVFP4_TINY[1], NVFP4_TINY[6]], ids=label)
def test_nvfp4_split_of_k(case: Case, split: int) -> None:
    steps = -(-case.K // (tiles.INPUTS * split))
    check(nvfp4_linear, case, 2, tiles.Tiles(32, 8, split, steps, 2, 2))


@pytest.mark.parametrize("K", [384, 208])
@pytest.mark.parametrize("scale", [0.01, 1e-5])  # with the second one, block scales saturate
def test_nvfp4_quantize_is_exact(K: int, scale: float) -> None:
    x = awkward_input()[:, :K].bfloat16().contiguous()
    found = nvfp4_quantize.quantize(x, torch.tensor([scale])).float()
    expected = fake_quantize(x.float(), "nvfp4", torch.tensor(scale))
    # code * (block * scale), or (code * block) * scale: one rounding, at different places
    assert (found * scale - expected).abs().max() <= 1.2e-7 * expected.abs().max()
    assert torch.equal(found == 0, expected == 0)


def run_ptx(code: str, *operands: int) -> int:
    """Execute the few instructions that the decoding uses on 32-bit operands, `$0` being the result."""
    registers = {f"${i + 1}": value for i, value in enumerate(operands)}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def bf16(bits: int) -> float:
        return torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).double().item()

    def product(a: int, b: int) -> int:
        exact = torch.tensor(bf16(a) * bf16(b), dtype=torch.float64)
        assert exact.bfloat16().double() == exact, "a product was rounded"
        return exact.bfloat16().view(torch.uint16).item()

    for line in code.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        to, *inputs = [part.strip() for part in rest.split(",")]
        a, b, *more = [value(part) for part in inputs] + [0]
        match name:
            case "mov.b32":
                result = a
            case "shl.b32":
                result = a << b
            case "shr.u32":
                result = a >> b
            case "and.b32":
                result = a & b
            case "add.u32":
                result = a + b
            case "mul.lo.u32":
                result = a * b
            case "lop3.b32":
                assert more[1] == 0xEA
                result = (a & b) | more[0]
            case "prmt.b32":
                pool = (a | (b << 32)).to_bytes(8, "little")
                result = int.from_bytes(bytes(pool[(more[0] >> (4 * i)) & 7] for i in range(4)), "little")
            case "mul.rn.bf16x2":
                result = product(a & 0xFFFF, b & 0xFFFF) | (product(a >> 16, b >> 16) << 16)
            case _:
                raise AssertionError(name)
        registers[to] = result & 0xFFFFFFFF
    return registers["$0"]


@pytest.mark.parametrize("position", range(4))
def test_assembly_decodes_every_code(position: int) -> None:
    """Each nibble in each half beside others, times scales of all sizes, equals code * scale / 128 exactly."""
    code = [nvfp4_linear.NIBBLE_0, nvfp4_linear.NIBBLE_1, nvfp4_linear.NIBBLE_2, nvfp4_linear.NIBBLE_3][position].value
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat([values, -values])
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    for byte in (0, 1, 7, 8, 9, 55, 56, 120, 126):
        other = (byte * 37 + 11) % 127
        words = byte << 24 | other << 8, byte | other << 16
        pair = run_ptx(nvfp4_linear.SCALES.value, words[0], words[1], 0, 0, 0x3333, 0x0000)
        assert pair == run_ptx(nvfp4_linear.SCALES.value, 0, 0, words[0], words[1], 0x7777, 0x4444)
        for low in range(16):
            high = (low * 7 + 3) % 16
            p = (low | high << 16) << (4 * position) | (0xA5C3A5C3 & ~(0x000F000F << (4 * position)))
            bits = torch.tensor([run_ptx(code, p, pair)], dtype=torch.int64).to(torch.uint32).view(torch.bfloat16).double()
            assert bits[0] == values[low] * scales[byte] / 128
            assert bits[1] == values[high] * scales[byte] / 128


def test_assembly_takes_halves() -> None:
    assert run_ptx(nvfp4_linear.LOW_HALVES.value, 0x11112222, 0x33334444) == 0x44442222
    assert run_ptx(nvfp4_linear.HIGH_HALVES.value, 0x11112222, 0x33334444) == 0x33331111


@pytest.mark.parametrize("kind", fp8_quantize.KINDS)
@pytest.mark.parametrize("K", [384, 200])
def test_fp8_quantize_is_exact(kind: str, K: int) -> None:
    x = awkward_input()[:, :K].bfloat16()
    scale = torch.tensor([0.01])
    codes, scales = fp8_quantize.quantize(x.contiguous(), kind, scale)
    if kind == "fp8_token":
        scales = scales.unsqueeze(1)
    elif kind.startswith("fp8_group"):
        scales = scales.repeat_interleave(128, 1)[:, :K]
    assert torch.equal(codes.float() * scales, fake_quantize(x.float(), kind, scale))


def test_fp8_rounding_is_that_of_torch() -> None:
    """All of E4M3's range, subnormals, ties and what saturates."""
    ties = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([torch.linspace(-448, 448, 20001), torch.linspace(-0.04, 0.04, 20001), (ties[1:] + ties[:-1]) / 2])
    codes, _ = fp8_quantize.quantize(torch.cat([x, torch.tensor([449.0, -1e30])]).unsqueeze(0), "fp8_static", torch.ones(1))
    expected = torch.cat([x, torch.tensor([448.0, -448.0])]).to(torch.float8_e4m3fn)
    assert torch.equal(codes.float()[0], expected.float())


def test_sums_do_not_depend_on_the_last_program() -> None:
    """What a split stores is added in the order of K: float32 gives the same bits for every launch."""
    case = FP8_TINY[8]
    x = make_inputs(case, 3, CPU, 0)
    run = fp8_linear.prepare(case.spec(), make_tensors(case, CPU, 0))
    cut = tiles.Tiles(64, 8, 5, 1, 2, 2)
    assert torch.equal(run(x, out=torch.empty(3, 100), tiles=cut), run(x, out=torch.empty(3, 100), tiles=cut))


@pytest.mark.parametrize("shapes", [fp8_linear.SHAPES, nvfp4_linear.SHAPES], ids=["fp8", "nvfp4"])
@pytest.mark.parametrize("M", [1, 8, 9, 16, 32])
@pytest.mark.parametrize(("N", "K"), [(5120, 17408), (16384, 5120), (248320, 5120), (3, 16), (64, 2**20)])
def test_tiles_cover_the_work(shapes: tuple[tiles.Shape, ...], M: int, N: int, K: int) -> None:
    cut = tiles.choose_tiles(shapes, M, N, K)
    assert cut.tokens >= M
    assert cut.split * cut.steps * tiles.INPUTS >= K > (cut.split - 1) * cut.steps * tiles.INPUTS
    assert cut.split == 1 or -(-N // cut.rows) <= tiles.COUNTERS


# The table


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activations", [None, *ACTIVATIONS])
def test_torch_runs_everything(scheme: str, activations: str | None) -> None:
    for operation in table.OPERATIONS:
        for at in (Machine(None, True), Machine(90, False), Machine(75, True)):
            row, passed = choose(scheme, activations, operation, at)
            assert row.module == TORCH
            assert all(": " in reason for reason in passed)


def test_rows_name_their_module() -> None:
    """What the table says that a module knows, it knows."""
    for row in (row for row in table.ROWS if row.module != TORCH):
        module = __import__(row.module, fromlist=["x"])
        assert row.schemes == module.SCHEMES
        assert row.activations == module.ACTIVATIONS
        assert callable(module.prepare)


def test_report_names_what_runs() -> None:
    hopper = "\n".join(report.lines(Machine(90, True), "GPU"))
    assert "fp8_block    input full, fp8_static, fp8_tensor, fp8_token, fp8_group, fp8_group_e8m0: runtime.kernels" in hopper
    assert "needs triton" in "\n".join(report.lines(Machine(90, False), "GPU"))
    assert "needs an NVIDIA GPU" in "\n".join(report.lines(Machine(None, True), "CPU"))


def test_importing_the_runtime_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import runtime.loader, runtime.decode, runtime.kernels.table, runtime.kernels.__main__ as m\n"
        "m.main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_report_ends_quietly_where_nobody_reads() -> None:
    read, write = os.pipe()
    os.close(read)
    command, root = [sys.executable, "-m", "runtime.kernels"], Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (run.returncode, run.stderr) == (0, b"")


LAYERS = [
    ("fp8_tensor", (24, 8, 32), 96, "fp8_static", True),
    ("fp8_channel", (70,), 160, None),
    ("fp8_block", (200, 128, 5), 160, "fp8_group"),
    ("nvfp4", (24, 8, 37), 96, "nvfp4"),
]


@pytest.mark.parametrize("spec", LAYERS, ids=lambda spec: spec[0])
def test_layers_use_the_table(spec: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that believes its CPU to be a GPU: few tokens in bfloat16 take the kernel, everything else does not."""
    row_scales.provide(monkeypatch)
    monkeypatch.setattr(table, "machine", lambda device: Machine(90, True))
    layer = random_layer(spec_of(*spec), bias=True)
    layer.bias = held(torch.linspace(-9, 9, layer.shape[0]).bfloat16())
    calls = []
    module = import_module(choose(spec[0], spec[3], FEW, Machine(90, True))[0].module)
    prepare = module.prepare

    def counted(*args: Any) -> Callable[[Tensor], Tensor]:
        run = prepare(*args)
        return lambda x, **more: (calls.append(x), run(x, **more))[1]

    monkeypatch.setattr(module, "prepare", counted)
    x = torch.randn(2, 3, layer.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    found = layer(x)
    assert len(calls) == 1
    assert found.dtype == torch.bfloat16
    expected = layer(x.float())  # float32 is torch's
    assert (found.float() - expected).abs().max() < 0.02 * expected.abs().max()  # the interpreter truncates to bfloat16
    assert torch.equal(layer(x[1, 2]), found[1, 2])
    assert len(calls) == 2
    assert layer(x.reshape(1, 6, -1).expand(11, 6, -1)).shape == (11, 6, layer.shape[0])  # 66 tokens
    assert layer(x[:0]).shape == (0, 3, layer.shape[0])
    assert len(calls) == 2


# Machine code


@pytest.fixture(scope="session")
def builds() -> dict[tuple[str, int], Compiled]:
    """Everything that `compiled.py` compiles, in a process without the interpreter."""
    return {(c["name"], c["generation"]): Compiled(**c) for c in output_of_script("builds")}


@pytest.mark.parametrize(
    ("build", "generation"), [(b, g) for b in BUILDS for g in b.generations], ids=lambda value: getattr(value, "name", value)
)
def test_machine_code_keeps_its_budget(build: Build, generation: int, builds: dict[tuple[str, int], Compiled]) -> None:
    code = builds[build.name, generation]
    assert code.stack == 0, "registers are spilled"
    assert code.local == 0, "registers are spilled"
    assert code.registers <= build.registers
    assert code.shared <= build.shared
    if build.weights:
        assert 0.5 < code.per_weight <= build.budget, code.mix
        assert not any(op.startswith("F2F.") for op in code.mix), "converts at an eighth of the rate"


def test_loops_are_found() -> None:
    """The reader of machine code, on a listing."""
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, [R4] ;
.L_x_2:
        /*0020*/              @!P0 HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0050*/                   BRA `(.L_x_3);
"""
    opcodes, loops = take_apart(code)
    assert opcodes == ["MOV", "LDG.E", "HMMA.16816.F32", "BRA", "BRA", "BRA"]
    assert loops == [["HMMA.16816.F32", "BRA"], ["LDG.E", "HMMA.16816.F32", "BRA", "BRA"], ["BRA"]]

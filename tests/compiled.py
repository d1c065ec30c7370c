"""Compile kernels for GPUs that are not there, and read registers, spills, shared memory and instructions from the result.

    python tests/compiled.py

compiles `BUILDS` for each of `GENERATIONS` and prints one JSON list.  It is a process of its own because the interpreter, which
the other tests need, replaces the compiler when kernels are imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GENERATIONS = (90, 100)
POINTERS = {"f8": "*fp8e4nv", "f16": "*fp16", "bf16": "*bf16", "f32": "*fp32"}
POINTERS |= {"u8": "*u8", "i32": "*i32", "i64": "*i64", "bool": "*i1"}


@dataclass(frozen=True)
class Build:
    """One specialisation of a kernel: types of pointers, values of constants; other arguments are int32.

    `weights`: weights that one step of its loop takes, all threads together; 0 when there is no such loop.
    """

    name: str
    kernel: str  # module:function
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    limit: int | None = None  # registers per thread that the assembler is told
    weights: int = 0
    budget: float = 0.0  # instructions per weight
    registers: int = 255
    shared: int = 232448  # bytes that a program may have on both generations
    multiples: tuple[str, ...] = ("N", "out_N")  # integers that are known to be multiples of 16
    scalars: dict[str, str] = field(default_factory=dict)  # types of those that are no int32
    generations: tuple[int, ...] = GENERATIONS


@dataclass
class Compiled:
    """What came out.  `per_weight`: instructions of one step of the loop over K, times threads, over weights."""

    name: str
    generation: int
    registers: int
    stack: int
    local: int  # loads and stores of spilled registers
    shared: int
    per_weight: float
    mix: dict[str, int]


def tools() -> Path:
    """The folder of `nvdisasm` and `cuobjdump`, which come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_build(build: Build, generation: int) -> Compiled:
    """Compile for compute capability `generation` / 10 and take the machine code apart."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), function)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in build.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = POINTERS[build.pointers[name]] if name in build.pointers else build.scalars.get(name, "i32")
        if name in build.pointers or name in build.multiples:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, build.constants, attributes)
    options = {"num_warps": build.warps, "num_stages": build.stages, "maxnreg": build.limit}
    done = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(done.asm["cubin"])
        usage = run(tools() / "cuobjdump", "-res-usage", path)
        code = run(tools() / "nvdisasm", "-c", path)
    instructions, loops = take_apart(code)
    step = loop_over_k(loops)
    return Compiled(
        build.name,
        generation,
        max(int(n) for n in re.findall(r"REG:(\d+)", usage)),
        max(int(n) for n in re.findall(r"STACK:(\d+)", usage)),
        sum(op.startswith(("STL", "LDL")) for op in instructions),
        done.metadata.shared,
        round(len(step) * build.warps * 32 / build.weights, 3) if build.weights else 0.0,
        dict(Counter(step).most_common()),
    )


def run(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def take_apart(code: str) -> tuple[list[str], list[list[str]]]:
    """Opcodes of a listing, and those of each loop: from the target of a backward branch to the branch."""
    opcodes: list[str] = []
    targets: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_[\w$]+):", line):
            targets[label[1]] = len(opcodes)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            if found[1].startswith("BRA") and (at := re.search(r"\.L_[\w$]+", found[2])):
                branches.append((len(opcodes), at[0]))
            opcodes.append(found[1])
    loops = [opcodes[targets[name] : at + 1] for at, name in branches if targets.get(name, at + 1) <= at]
    return opcodes, loops


def loop_over_k(loops: list[list[str]]) -> list[str]:
    """The loop that multiplies matrices; an outer one has it inside, so the shortest."""
    matrix = [loop for loop in loops if any("MMA" in op for op in loop)]
    return min(matrix, key=len) if matrix else []


FP8 = {"weight": "f8", "scale": "f32", "out": "bf16", "work": "f32", "count": "i32"}


def fp8(name: str, tokens: int, block: bool = False, x_scale: int = 0, split: int = 2, **more: Any) -> Build:
    """One form of `fp8_linear_kernel`, K = 5120, cut as `SHAPES` says."""
    warps = 4 if tokens == 64 else 2
    pointers = FP8 | {"x": "f8" if x_scale else "bf16"}
    pointers |= ({"block_row": "i32"} if block else {}) | ({"x_scale": "f32"} if x_scale else {})
    constants = {
        "K": 5120, "ROWS": 64, "TOKENS": tokens, "SPLIT": split, "STEPS": 40 // split, "BLOCK": block,
        "X_SCALE": x_scale, "BIAS": False, "INTERPRETED": False, "bias": None,
    }  # fmt: skip
    constants |= {} if block else {"block_row": None}
    constants |= {} if x_scale else {"x_scale": None}
    name = f"fp8 {name}, {tokens} tokens"
    kernel = "runtime.kernels.fp8_linear:fp8_linear_kernel"
    return Build(
        name, kernel, pointers, constants, warps, 4, 224 if tokens == 64 else None, 64 * 128, **({"budget": 7.8} | more)
    )


def nvfp4(name: str, tokens: int, K: int = 5120, split: int = 2, mx: bool = False, **more: Any) -> Build:
    """One form of `nvfp4_linear_kernel`, cut as `SHAPES` says; `mx`: for MXFP4."""
    scales = "u8" if K % 64 else "i32" if mx or K % 128 else "i64"
    pointers = {"x": "i64", "weight": "i32", "block_scale": scales, "selectors": "i32", "scale": "f32"}
    pointers |= {"out": "bf16", "work": "f32", "count": "i32"}
    rows = 128 if tokens <= 16 else 64
    constants = {
        "K": K, "ROWS": rows, "TOKENS": tokens, "SPLIT": split, "STEPS": -(-K // (128 * split)), "BIAS": False,
        "INTERPRETED": False, "bias": None,
    }  # fmt: skip
    pointers |= {"offset": "i32"} if mx else {}
    constants |= {} if mx else {"offset": None}
    name = f"{'mxfp4' if mx else 'nvfp4'} {name}, {tokens} tokens"
    kernel = "runtime.kernels.nvfp4_linear:nvfp4_linear_kernel"
    return Build(name, kernel, pointers, constants, 2, 4, None, rows * 128, **({"budget": 4.4} | more))


def attention(name: str, heads: int, G: int, D: int, scales: int = 0, ring: bool = False, ranges: int = 32) -> Build:
    """One form of `attend_kernel`, cut as `choose_cut` says."""
    queries = max(16, 1 << (G - 1).bit_length())
    pointers = dict.fromkeys(("q", "k", "v", "out"), "bf16") | dict.fromkeys(("kept_k", "kept_v"), "f8" if scales else "bf16")
    pointers |= {"positions": "i64", "real": "bool", "work": "f32", "count": "i32"}
    constants = {
        "KV_HEADS": heads, "G": G, "QUERIES": queries, "D": D, "SIZE": D, "TILE": 2**13 // D, "RANGES": ranges, "LEAST": 4,
        "WINDOW": 512 if ring else 0, "BY_HEAD": scales == 2, "MOST": 0, "INTERPRETED": False,
    }  # fmt: skip
    for optional, there, kind in (("k_scale", scales, "f32"), ("v_scale", scales, "f32"), ("held", ring, "i64")):
        pointers |= {optional: kind} if there else {}
        constants |= {} if there else {optional: None}
    return Build(
        f"attention {name}", "runtime.kernels.attention_decode:attend_kernel", pointers, constants, 8 if queries > 16 else 4,
        3, registers=208, shared=136 * 2**10 if queries > 16 else 80 * 2**10, multiples=("q_row", "q_head", "k_row", "v_row"),
        scalars={"scale": "fp32"},
    )  # fmt: skip


def experts(
    scheme: str, name: str, N: int, K: int, tokens: int = 0, act: int = 1, x_scale: int = 0, block: bool = False,
    split: int = 1, codes: bool = False, **more: Any,
) -> Build:  # fmt: skip
    """One form of `fp8_experts_kernel` or `nvfp4_experts_kernel`.  `tokens`: width of the blocks, 0: a slot per program.

    A weight of a block of 128 occupies the tensor cores of sm_90 for as long as 8 instructions take to issue, one of 64 for 4.
    """
    fp8_ = scheme == "fp8"
    codes_ = "f16" if tokens == 128 else "f8"
    wide = not fp8_ and tokens >= 64
    pointers = {"chosen": "i64", "work": "f32", "count": "i32", "scale": "f32", "scale_row": "i32"}
    pointers |= {"out": codes_ if codes else "bf16"}
    pointers |= {"order": "i32", "table": "i32"} if tokens else {}
    pointers |= {"share": "f32"} if act == 0 and not tokens else {}
    pointers |= {"out_scale": "f32"} if codes else {}
    pointers |= {"x_scale": "f32"} if x_scale else {}
    words = {"x": "i64", "weight": "i32", "selectors": "i32", "block_scale": "i32" if K % 128 else "i64"}
    pointers |= {"x": codes_ if x_scale else "bf16", "weight": "f8"} if fp8_ else words
    pointers |= {"x": "bf16"} if wide else {}
    rows, warps = {("fp8", 64): (64, 4), ("fp8", 128): (128, 8), ("nvfp4", 16): (128, 2)}.get((scheme, tokens), (64, 2))
    rows, warps = (256, 16) if wide else (rows, warps)
    constants = {
        "N": N, "K": K, "SHARED": 8, "PER_TOKEN": 8, "ROWS": rows, "TOKENS": tokens or 8, "SPLIT": split,
        "STEPS": -(-K // (128 * split)), "ACT": act, "LIMIT": None, "INTERPRETED": False,
    }  # fmt: skip
    constants |= {"SCALES": 64, "BLOCK": block, "X_SCALE": x_scale} if fp8_ else {"SCALES": 2, "WIDE": wide}
    kernel = f"runtime.kernels.{scheme}_experts:{scheme}_experts_kernel"
    optional = ("order", "table", "share", *(("out_scale", "x_scale") if fp8_ else ()))
    constants |= {argument: None for argument in optional if argument not in pointers}
    limit = ({0: 128, 64: 224} if fp8_ else {0: 96, 64: 128, 128: 128}).get(tokens)
    name = f"{scheme} experts {name}, {f'blocks of {tokens}' if tokens else 'slots'}"
    return Build(name, kernel, pointers, constants, warps, 4, limit, rows * 128, **({"budget": 7.8 if fp8_ else 4.4} | more))


def router(name: str, E: int, H: int, per_token: int, softmax: bool, groups: int = 1, beside: bool = False) -> Build:
    """One form of `router_kernel`; of several groups, half are kept.  `beside`: with a row that is no expert's."""
    pointers = {"x": "bf16", "weight": "bf16", "logits": "f32", "count": "i32", "chosen": "i64", "weights": "f32"}
    constants = {
        "H": H, "E": E, "PER_TOKEN": per_token, "SOFTMAX": softmax, "NORMALIZE": True, "GROUPS": groups,
        "KEPT": -(-groups // 2), "WIDE": E // groups, "TALL": groups, "PLACES": 1 << (per_token - 1).bit_length(),
        "ROWS": 4, "STEP": 1024,
    }  # fmt: skip
    pointers |= {} if softmax else {"bias": "f32"}
    constants |= {"bias": None} if softmax else {}
    pointers |= {"beside": "bf16", "logit": "bf16"} if beside else {}
    constants |= {} if beside else {"beside": None, "logit": None}
    scalars = {"floor": "fp32", "scale": "fp32"}
    return Build(f"router {name}", "runtime.kernels.router:router_kernel", pointers, constants, registers=168, scalars=scalars)


STEP = {"conv": "bf16", "weight": "bf16", "A_log": "f32", "dt_bias": "f32", "norm": "f32", "state": "f32", "positions": "i64"}
STEP |= {"real": "bool", "out": "bf16"}


def delta_step(name: str, kind: int = 0, codes: str | None = None, hidden: int = 0) -> Build:
    """One form of `gated_delta_step_kernel`; `kind`: how the output is quantised, as in `quantized.KINDS`; `hidden`: with the
    projection of b and a from so many inputs."""
    left = {"codes": codes or "", "scales": "f32"}
    constants = {
        "KEY_HEADS": 16, "VALUE_HEADS": 48, "DK": 128, "DV": 128, "KEYS": 128, "VALUES": 128, "W": 4, "RING": 4, "SILU": True,
        "KIND": kind, "HIDDEN": hidden, "AT_ONCE": 1024,
    }  # fmt: skip
    pointers = STEP | dict.fromkeys(("qkv", "z", "ba", *(["projection"] if hidden else [])), "bf16")
    return Build(
        f"gated delta net, one token{name}", "runtime.kernels.gated_delta_step:gated_delta_step_kernel",
        pointers | (left if codes else {}),
        constants | ({} if codes else dict.fromkeys(left)) | ({} if hidden else {"projection": None}),
        warps=4, registers=248, shared=8 * 2**10, multiples=("qkv_row", "z_row", "ba_row"), scalars={"eps": "fp32"},
    )  # fmt: skip


def mamba_step(name: str, kind: int = 0, codes: str | None = None) -> Build:
    """The same of `mamba2_step_kernel`."""
    left = {"codes": codes or "", "scales": "f32"}
    constants = {
        "HEADS": 64, "P": 64, "GROUPS": 8, "N": 128, "ROWS": 64, "COLUMNS": 128, "GROUP": 512, "W": 4, "RING": 4, "KIND": kind,
    }
    pointers = dict.fromkeys(("z", "xbc", "dt", "bias"), "bf16") | {"D": "f32", "work": "f32", "count": "i32"}
    return Build(
        f"Mamba2, one token{name}", "runtime.kernels.mamba2_step:mamba2_step_kernel",
        STEP | pointers | (left if codes else {}), constants | ({} if codes else dict.fromkeys(left)),
        warps=4, registers=168, shared=8 * 2**10, multiples=("z_row", "xbc_row", "dt_row"),
        scalars=dict.fromkeys(("eps", "low", "high"), "fp32"),
    )  # fmt: skip


def mxfp8(tokens: int) -> Build:
    """One form of `mxfp8_linear_kernel`, K = 5120, cut as `SHAPES` says."""
    pointers = {"x": "bf16", "weight": "f8", "scale": "u8", "out": "bf16", "work": "f32", "count": "i32"}
    constants = {
        "K": 5120, "ROWS": 64, "TOKENS": tokens, "SPLIT": 2, "STEPS": 20, "BIAS": False, "INTERPRETED": False, "bias": None,
    }  # fmt: skip
    limit = {8: 128, 64: 224}.get(tokens)
    kernel = "runtime.kernels.mxfp8_linear:mxfp8_linear_kernel"
    wide = tokens == 64
    budget = 9.0 if wide else 7.8
    return Build(f"mxfp8 {tokens} tokens", kernel, pointers, constants, 4 if wide else 2, 4, limit, 64 * 128, budget)


def expand(scheme: str, K: int) -> Build:
    """One form of `expand_kernel`."""
    packed, group = scheme in ("nvfp4", "mxfp4"), {"fp8_block": 128, "nvfp4": 16, "mxfp8": 32, "mxfp4": 32}.get(scheme, 8192)
    kinds = {"nvfp4": ("f8", 1), "mxfp8": ("u8", 2), "mxfp4": ("u8", 2)}
    kind, size = kinds.get(scheme, ("f32", 0))
    pointers = {"weight": "u8" if packed else "f8", "scale": kind, "out": "bf16"}
    constants: dict[str, Any] = {"K": K, "GROUP": group, "EACH": min(group, 256), "PACKED": packed, "BYTES": size}
    constants |= {"ROWS": 16, "COLUMNS": 256}
    for argument, there, dtype in (
        ("scale_row", scheme in ("fp8_tensor", "fp8_block"), "i32"), ("outer", scheme == "nvfp4", "f32"),
    ):  # fmt: skip
        pointers |= {argument: dtype} if there else {}
        constants |= {} if there else {argument: None}
    return Build(f"expand {scheme}", "runtime.kernels.expand:expand_kernel", pointers, constants, registers=128)


def norm(name: str, H: int, kind: int, codes: str | None = None) -> Build:
    """One form of `rms_norm_kernel`, with a sum of all parts where there are codes."""
    pointers = dict.fromkeys(("x", "weight", "out"), "bf16")
    optional = dict.fromkeys(("delta", "shared", "gate", "summed"), "bf16") | {"codes": codes or "", "scales": "f32"}
    pointers |= optional if codes else {}
    size = 1 << (H - 1).bit_length()
    constants: dict[str, Any] = {"H": H, "SIZE": size, "FORM": 2, "KIND": kind}
    constants |= {} if codes else dict.fromkeys(optional)
    warps = min(16, size // 512)
    return Build(
        f"norm {name}", "runtime.kernels.rms_norm:rms_norm_kernel", pointers, constants, warps, registers=128,
        scalars={"eps": "fp32"},
    )  # fmt: skip


def rotary(name: str, heads: int, D: int, half: int, norms: bool) -> Build:
    """One form of `rotate_kernel`."""
    pointers = dict.fromkeys(("q", "k", "cos", "sin", "out"), "bf16")
    pointers |= dict.fromkeys(("q_weight", "k_weight"), "bf16") if norms else {}
    rest = D - 2 * half
    constants: dict[str, Any] = {"HEADS": heads, "D": D, "HALF": half, "SIZE": half, "FORM": 2}
    constants |= {"REST": 1 << (rest - 1).bit_length() if rest else 0} | ({} if norms else {"q_weight": None, "k_weight": None})
    return Build(
        f"rotary {name}", "runtime.kernels.rotary:rotate_kernel", pointers, constants, 1, registers=48, shared=0,
        multiples=("q_row", "q_head", "k_row", "k_head"), scalars={"eps": "fp32"},
    )  # fmt: skip


def activate(name: str, K: int, kind: str | None, codes: str | None = None, form: int = 0, D: int = 0) -> Build:
    """One form of `activate_kernel`."""
    pointers = {"a": "bf16", "out": "bf16"} | ({} if form == 1 else {"b": "bf16"}) | ({"codes": codes} if codes else {})
    pointers |= {"scales": "f32"} if codes and not (kind or "").startswith("mx") else {}
    kinds = (None, "fp8_static", "fp8_token", "fp8_group", "fp8_group_e8m0", "nvfp4", "mxfp8", "mxfp4")
    size = max(128, min(4096 if kind == "fp8_token" else 1024, 1 << (K - 1).bit_length()))
    constants: dict[str, Any] = {
        "K": K, "D": D or K, "SIZE": size, "FORM": form, "LIMIT": None, "BY_HEAD": False, "KIND": kinds.index(kind),
    }  # fmt: skip
    constants |= {argument: None for argument in ("b", "codes", "scales") if argument not in pointers}
    return Build(
        f"activate {name}", "runtime.kernels.activate:activate_kernel", pointers, constants, max(1, size // 256), registers=64,
        multiples=("a_row", "a_head", "b_row", "b_head"),
    )  # fmt: skip


SCAN = {"H": 64, "SHARED": 8, "P": 64, "N": 128, "ROWS": 64, "COLUMNS": 128, "CHUNK": 64, "INTERPRETED": False}
STRIDES = tuple(f"{name}_{axis}" for name in ("x", "b", "c", "out") for axis in ("row", "head", "group", "token"))
MAMBA_SCAN = [
    Build("Mamba2 scan, states of chunks", "runtime.kernels.ssd_scan:own_states_kernel",
          dict.fromkeys(("x", "b", "g", "own", "decay"), "f32"), SCAN, registers=168, shared=64 * 2**10, multiples=STRIDES),
    Build("Mamba2 scan, carrying", "runtime.kernels.ssd_scan:carry_kernel", dict.fromkeys(("own", "decay", "state"), "f32"),
          {"SIZE": 8192, "PART": 512, "MOST": 0, "INTERPRETED": False}, registers=64, shared=16 * 2**10),
    Build("Mamba2 scan, outputs", "runtime.kernels.ssd_scan:outputs_kernel",
          dict.fromkeys(("x", "b", "c", "g", "before", "out"), "f32"), SCAN, shared=96 * 2**10, multiples=STRIDES),
]  # fmt: skip


QUANTIZE = {"x": "bf16", "codes": "f8", "scales": "f32"}
BUILDS = [
    fp8("W8A16 rows", 8, split=1),
    fp8("W8A16 rows", 16),
    fp8("W8A16 rows", 32),
    fp8("W8A16 rows", 64),
    fp8("W8A16 blocks", 8, block=True),
    fp8("W8A16 blocks", 64, block=True),
    fp8("W8A8 one scale", 8, x_scale=1),
    fp8("W8A8 tokens", 64, x_scale=2),
    fp8("W8A8 groups", 8, block=True, x_scale=3),
    fp8("W8A8 groups", 64, block=True, x_scale=3),
    nvfp4("W4A16", 8, split=1),
    nvfp4("W4A16", 16),
    nvfp4("W4A16", 32, budget=4.95),
    nvfp4("W4A16, K ends inside a step", 8, K=1856),
    experts("fp8", "first, W8A16", 1024, 2048, split=4),
    experts("fp8", "first, W8A8 groups", 1024, 2048, x_scale=3, block=True, split=4),
    experts("fp8", "first, W8A8 to codes", 1856, 2688, act=2, x_scale=1, codes=True),
    experts("fp8", "down, W8A8 groups", 2048, 512, act=0, x_scale=3, block=True),
    experts("fp8", "down, W8A8, K ends inside a step", 2688, 1856, act=0, x_scale=1),
    experts("fp8", "first, W8A8 groups", 1024, 2048, 16, x_scale=3, block=True),
    experts("fp8", "first, W8A8 groups", 1024, 2048, 64, x_scale=3, block=True),
    experts("fp8", "down, W8A16", 2048, 512, 64, act=0),
    experts("fp8", "first, W8A16", 1024, 2048, 128, budget=5.5),
    experts("fp8", "first, W8A16 blocks", 1024, 2048, 128, block=True, budget=6.5),
    experts("fp8", "first, W8A8 groups", 1024, 2048, 128, x_scale=4, block=True, budget=6.5),
    experts("fp8", "first, W8A8 to codes, K ends inside a step", 1856, 2720, 128, act=2, x_scale=1, codes=True, budget=4.2),
    experts("fp8", "down, W8A8 tokens", 2048, 512, 128, act=0, x_scale=2, budget=4.2),
    Build("fp8 quantise groups", "runtime.kernels.fp8_quantize:quantize_groups_kernel", QUANTIZE,
          {"K": 5120, "GROUPS": 8, "STATIC": False, "E8M0": True, "SHARED": 1, "chosen": None}),
    Build("fp8 quantise tokens", "runtime.kernels.fp8_quantize:quantize_tokens_kernel", QUANTIZE,
          {"K": 5120, "STEP": 4096}, warps=8),
    experts("nvfp4", "first, W4A16", 1024, 2048, split=4),
    experts("nvfp4", "down, W4A16", 2048, 512, act=0),
    experts("nvfp4", "down, W4A16, K ends inside a step", 2688, 1856, act=0),
    experts("nvfp4", "first, W4A16", 1024, 2048, 16),
    experts("nvfp4", "first, W4A16", 1024, 2048, 32, budget=4.95),
    experts("nvfp4", "first, W4A16", 1024, 2048, 64, budget=6.2),
    experts("nvfp4", "first, W4A16", 1024, 2048, 128, budget=7.2),
    experts("nvfp4", "down, W4A16, K ends inside a step", 2688, 1856, 128, act=0, budget=6.2, generations=(90,)),
    *(mxfp8(tokens) for tokens in (8, 16, 64)),
    nvfp4("W4A16", 8, mx=True),
    nvfp4("W4A16", 16, mx=True),
    nvfp4("W4A16", 32, mx=True, budget=4.95),
    Build("mx quantise", "runtime.kernels.mx_quantize:mx_quantize_kernel", {"x": "bf16", "out": "bf16"},
          {"K": 5120, "GROUPS": 32, "E2M1": True}),
    *(expand(scheme, 5120) for scheme in ("fp8_tensor", "fp8_channel", "fp8_block", "nvfp4", "mxfp8", "mxfp4")),
    norm("plain", 2048, 0),
    norm("sum and token", 5120, 2, "f8"),
    norm("sum and groups", 5120, 4, "f8"),
    norm("sum and NVFP4", 8192, 5, "bf16"),
    rotary("64 of 256, norms", 16, 256, 32, True),
    rotary("all of 128, no norms", 32, 128, 64, False),
    Build("cosines and sines", "runtime.kernels.rotary:turns_kernel",
          {"positions": "i64", "inv_freq": "f32", "cos": "bf16", "sin": "bf16"}, {"HALF": 32, "SIZE": 32}, 1,
          registers=32, shared=0, scalars={"amplitude": "fp32"}),
    activate("swiglu and groups", 17408, "fp8_group", "f8"),
    activate("swiglu and token", 17408, "fp8_token", "f8"),
    activate("swiglu and NVFP4", 17408, "nvfp4", "bf16"),
    activate("swiglu and MXFP8", 17408, "mxfp8", "bf16"),
    activate("relu2 and static", 3712, "fp8_static", "f8", 1),
    activate("gate and groups", 6144, "fp8_group", "f8", 2, 256),
    activate("gate", 4096, None, None, 2, 128),
    router("softmax of 256", 256, 2048, 8, True),
    router("softmax of 256, a row beside", 256, 2048, 8, True, beside=True),
    router("sigmoid of 512", 512, 4096, 22, False),
    router("sigmoid of 256 in groups", 256, 2048, 8, False, 8),
    Build("sum over experts", "runtime.kernels.slots:combine_kernel", {"parts": "bf16", "share": "f32", "out": "bf16"},
          {"H": 2048, "PER_TOKEN": 8, "STEP": 1024}),
    Build("nvfp4 quantise", "runtime.kernels.nvfp4_quantize:quantize_kernel",
          {"x": "bf16", "out": "bf16", "input_scale": "f32"},
          {"K": 5120, "GROUPS": 64, "SHARED": 1, "BY_NIBBLE": False, "chosen": None}),
    Build("nvfp4 quantise by nibble", "runtime.kernels.nvfp4_quantize:quantize_kernel",
          {"x": "bf16", "out": "bf16", "input_scale": "f32", "chosen": "i64"},
          {"K": 2688, "GROUPS": 64, "SHARED": 6, "BY_NIBBLE": True}),
    Build("nvfp4 inputs by nibble", "runtime.kernels.nvfp4_wide:arrange_kernel", {"x": "bf16", "out": "bf16"},
          {"K": 1856, "GROUPS": 64}, registers=64),
    Build("nvfp4 quantise, packed", "runtime.kernels.nvfp4_quantize:quantize_packed_kernel",
          {"x": "bf16", "codes": "u8", "scales": "f8", "input_scale": "f32"}, {"K": 5120, "ROWS": 8, "GROUPS": 8}),
    delta_step(""),
    delta_step(", quantised in groups", 3, "f8", 2048),
    delta_step(", quantised to NVFP4", 5, "bf16", 5120),
    mamba_step(""),
    mamba_step(", quantised by one scale", 1, "f8"),
    mamba_step(", quantised in groups", 3, "f8"),
    *MAMBA_SCAN,
    attention("heads of 256", 4, 6, 256),
    attention("heads of 256, FP8, whole", 2, 8, 256, scales=1, ranges=1),
    attention("heads of 128, FP8 by head", 2, 16, 128, scales=2),
    attention("heads of 128, ring", 8, 12, 128, ring=True),
    attention("64 queries per head", 1, 64, 256),
]  # fmt: skip


def main() -> None:
    """Compile everything and print it."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    json.dump([asdict(compile_build(b, g)) for b in BUILDS for g in b.generations], sys.stdout)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as Triton does so far; unset, 3.9 warns
    main()

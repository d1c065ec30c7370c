"""What stands between two projections, element by element, with the quantisation for the second, in one launch.

    swiglu   y = s * u                     s = bf16(a / (1 + exp(-a))),  u = b;  with a limit l: s = min(s, l), u within +-l
    relu2    y = max(a, 0)^2
    gate     y = a * bf16(1 / (1 + exp(-b)))        of attention: a per head, b too or one number for all of a head
    codes, scales                          of y, as `quantized` makes them

`runtime.nonlinear` has the same in torch, which rounds to bfloat16 where this does.  Inputs are read where they are: parts of
the rows of a fused projection, heads before tokens.  Roundings are those of `quantized.round_to_bf16`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.fp8_quantize import to_codes
from runtime.kernels.quantized import KINDS, STATIC, codes_error, room, round_to_bf16, store_quantized
from runtime.nonlinear import OutputGate, ReLU2, SwiGLU, output_gate, relu2, swiglu

SCHEMES = ("activation",)
ACTIVATIONS: tuple[str | None, ...] = (None,)
SWIGLU, RELU2, GATE = 0, 1, 2  # forms of y, in the order above
AT_ONCE = 1024  # elements per program
TOKEN_STEP = 4096  # elements that a program takes at a time where the scale is that of the token

Function = SwiGLU | ReLU2 | OutputGate


@dataclass(frozen=True, slots=True)
class Case:
    """M tokens with K results each.  `heads`: of attention, K together; `by_head`: with one gate for each."""

    name: str
    M: int
    K: int
    function: Function = swiglu
    kind: str | None = None
    heads: int = 1
    by_head: bool = False
    tiny: bool = False

    @property
    def nbytes(self) -> int:
        """Everything that is read or written."""
        read = 2 * (1 + (self.function.inputs == 2 and not self.by_head))
        return self.M * self.K * (read + 2 + (0 if self.kind is None else 1 if self.kind.startswith("fp8") else 2))

    def __str__(self) -> str:
        heads = f" of {self.heads} heads{', a number for each' * self.by_head}" if self.heads > 1 else ""
        return f"{self.name}, {self.function}{heads}, {self.M}x{self.K}, {self.kind or 'not'} quantised"


CASES = (
    Case("plain", 3, 200, tiny=True),
    Case("limit", 2, 1300, SwiGLU(0.7), "fp8_static", tiny=True),
    Case("token", 3, 200, swiglu, "fp8_token", tiny=True),
    Case("long token", 2, 4200, relu2, "fp8_token", tiny=True),
    Case("groups", 2, 1400, swiglu, "fp8_group", tiny=True),
    Case("groups, powers of two", 3, 128, relu2, "fp8_group_e8m0", tiny=True),
    Case("NVFP4", 2, 1072, swiglu, "nvfp4", tiny=True),
    Case("MXFP8", 2, 1056, swiglu, "mxfp8", tiny=True),
    Case("MXFP4", 3, 160, relu2, "mxfp4", tiny=True),
    Case("gate", 3, 192, output_gate, "fp8_group", 3, tiny=True),
    Case("gate of heads of odd size", 2, 120, output_gate, None, 5, tiny=True),
    Case("gate of each head", 3, 256, output_gate, "nvfp4", 4, by_head=True, tiny=True),
    Case("Qwen3.5-27B", 1, 17408, swiglu, "fp8_group"),
    Case("Qwen3.5-27B", 64, 17408, swiglu, "fp8_group"),
    Case("Qwen3.5-27B", 1, 17408, swiglu, "fp8_token"),
    Case("Qwen3.5-27B", 1, 17408, swiglu, "nvfp4"),
    Case("Qwen3.5-35B-A3B shared", 1, 512, swiglu, "fp8_group"),
    Case("Qwen3.5-27B attention", 1, 6144, output_gate, "fp8_group", 24),
    Case("Nemotron 3 Nano shared", 1, 3712, relu2, "fp8_static"),
    Case("Step-3.5-Flash attention", 1, 12288, output_gate, "fp8_group", 96, by_head=True),
)


def make_inputs(case: Case, device: torch.device, seed: int) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Inputs of the function as projections and attention leave them, and the static scale."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=random, device=device)).bfloat16()

    M, K, D = case.M, case.K, case.K // case.heads
    scale = torch.tensor([0.02], device=device) if case.kind in STATIC else None
    if not isinstance(case.function, OutputGate):
        return normal(M, case.function.inputs * K + 16)[:, :-16].split(K, 1), scale
    gate = normal(M, 1, case.heads, 1) if case.by_head else normal(M, 1, case.heads, 2 * D)[..., D:]
    return (normal(M, case.heads, 1, D), gate.transpose(1, 2)), scale


def errors(case: Case, device: torch.device, seed: int) -> dict[str, float]:
    """Largest errors over the largest result: of y what exceeds a few roundings; of the codes, that must be those of y.

    And the share of y, beyond 1 %, that is another number than torch makes, whose exponential is another.
    """
    inputs, scale = make_inputs(case, device, seed)
    found = activate(case.function, inputs, case.kind, scale)
    exact = case.function(*(x.double() for x in inputs)).view(case.M, case.K)
    y = found.y.view(case.M, case.K)
    beyond = ((y.double() - exact).abs() - exact.abs() * 2.0**-6).clamp(min=0)
    rounded = (y != case.function(*inputs).view(case.M, case.K)).double().mean()
    worst = {"y": float(beyond.max() / exact.abs().max()), "rounded": max(0.0, float(rounded) - 0.01)}
    if found.codes is not None:
        worst["codes"] = codes_error(y, found.codes, found.scales, case.kind or "", scale)
    return worst


def launch(case: Case, device: torch.device, seed: int) -> Callable[[], object]:
    """A launch to time."""
    inputs, scale = make_inputs(case, device, seed)
    return lambda: activate(case.function, inputs, case.kind, scale)


@triton.jit
def results(
    a: tl.tensor, b: tl.tensor, at: tl.tensor, a_head: tl.tensor, b_head: tl.tensor,
    K: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr, LIMIT: tl.constexpr, BY_HEAD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Elements `at` of a row, which begins at `a` and `b`: float32 that bfloat16 holds, and 0 beyond K."""
    if D < K:
        head, place = at // D, at % D
        a += head * a_head
        b += head * b_head
    else:
        place = at
    x = tl.load(a + place, mask=at < K, other=0.0).to(tl.float32)
    if FORM == 1:
        x = tl.maximum(x, 0.0)
        y = x * x
    elif FORM == 2:
        gate = tl.load(b if BY_HEAD else b + place, mask=at < K, other=0.0).to(tl.float32)
        y = x * round_to_bf16(1.0 / (1.0 + tl.exp(-gate)))
    else:
        up = tl.load(b + place, mask=at < K, other=0.0).to(tl.float32)
        x = round_to_bf16(x / (1.0 + tl.exp(-x)))
        if LIMIT is not None:
            x = round_to_bf16(tl.minimum(x, LIMIT))
            up = round_to_bf16(tl.minimum(tl.maximum(up, -LIMIT), LIMIT))
        y = x * up
    return round_to_bf16(y)


@triton.jit
def activate_kernel(
    a: tl.tensor, b: tl.tensor, out: tl.tensor, codes: tl.tensor, scales: tl.tensor,
    a_row: tl.tensor, a_head: tl.tensor, b_row: tl.tensor, b_head: tl.tensor,
    K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, FORM: tl.constexpr, LIMIT: tl.constexpr, BY_HEAD: tl.constexpr,
    KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Program (m, n): `SIZE` elements of row m, from element n `SIZE` on; all of them for a scale per token.

    `D`: elements per head; K where there are no heads.  `b`: None for relu2.  `KIND`: of `quantized`.
    """
    row = tl.program_id(0).to(tl.int64)
    a += row * a_row
    if b is not None:
        b += row * b_row
    out += row * K
    i = tl.arange(0, SIZE)
    if KIND == 2:
        amax = tl.zeros((SIZE,), tl.float32)
        for start in range(0, K, SIZE):  # twice, the second time from cache
            amax = tl.maximum(amax, tl.abs(results(a, b, start + i, a_head, b_head, K, D, FORM, LIMIT, BY_HEAD)))
        scale = tl.div_rn(tl.max(amax, 0), 448.0)
        tl.store(scales + row, scale)
        for start in range(0, K, SIZE):
            y = results(a, b, start + i, a_head, b_head, K, D, FORM, LIMIT, BY_HEAD)
            tl.store(out + start + i, y.to(out.dtype.element_ty), mask=start + i < K)
            tl.store(codes + row * K + start + i, to_codes(y, scale), mask=start + i < K)
    else:
        first = tl.program_id(1) * SIZE
        y = results(a, b, first + i, a_head, b_head, K, D, FORM, LIMIT, BY_HEAD)
        tl.store(out + first + i, y.to(out.dtype.element_ty), mask=first + i < K)
        if KIND > 0:
            store_quantized(y, codes, scales, row, first, K, K - first, SIZE, KIND)


@dataclass(frozen=True, slots=True)
class Activated:
    """What a launch leaves.  `codes`, `scales`: of `y`, as `quantize` of its kind returns them."""

    y: Tensor
    codes: Tensor | None
    scales: Tensor | None


def activate(
    function: Function, inputs: tuple[Tensor, ...], kind: str | None = None, input_scale: Tensor | None = None
) -> Activated:
    """`function` of `inputs`, bfloat16 and of any strides; quantised as `kind` says, `input_scale` float32 `[1]` if static."""
    if isinstance(function, OutputGate):
        inputs = tuple(x.transpose(1, 2) for x in inputs)  # (B, T, heads, D)
        shape = inputs[0].flatten(2).shape
    else:
        shape = inputs[0].shape
        inputs = tuple(x.unsqueeze(-2) for x in inputs)
    a, *others = (x.flatten(0, -3) for x in inputs)  # (M, heads, D), without a copy as projections and attention leave them
    a, *others = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, *others))
    b = others[0] if others else None
    M, heads, D = a.shape
    K = heads * D
    y = torch.empty(shape, dtype=a.dtype, device=a.device)
    codes, scales = (None, None) if kind is None else room(M, K, kind, input_scale, a.device)
    most = TOKEN_STEP if kind == "fp8_token" else AT_ONCE
    size = max(128, min(most, triton.next_power_of_2(K)))
    by_head = b is not None and b.shape[-1] < D
    activate_kernel[(M, 1 if kind == "fp8_token" else triton.cdiv(K, size))](
        a, b, y, codes, scales, a.stride(0), a.stride(1), 0 if b is None else b.stride(0), 0 if b is None else b.stride(1),
        K, D, size, FORMS[type(function)], getattr(function, "limit", None), by_head, KINDS.index(kind),
        num_warps=max(1, size // 256),
    )  # fmt: skip
    return Activated(y, codes, scales)


FORMS: dict[type, int] = {SwiGLU: SWIGLU, ReLU2: RELU2, OutputGate: GATE}


def prepare(function: object) -> Callable[..., Activated] | None:
    """`activate` for one function, of what comes after it; None for a function that the kernel does not know."""
    if not isinstance(function, Function):
        return None
    return lambda *given: activate(function, *given)

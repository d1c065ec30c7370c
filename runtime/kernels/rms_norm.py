"""RMS normalisation of rows, with the addition before it and the quantisation after it, in one launch.

    s = x + d                                   where there is a `d`; rounded to bfloat16, and kept: it is the residual
    d = r + e or r + sigmoid(g) e               where it has parts: routed experts r, shared ones e, perhaps their gate g
    n = s / sqrt(mean(s^2) + eps)               float32
    y = bf16(w * bf16(n)), bf16(w * n) or bf16((1 + w) * n)             `runtime.norms` says who does which
    codes, scales                               of y, as `quantized` makes them

Roundings to bfloat16 are those of `quantized.round_to_bf16`, as the interpreter truncates; casts after them are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.quantized import KINDS, STATIC, codes_error, room, round_to_bf16, store_quantized

SCHEMES = ("rms norm",)
ACTIVATIONS: tuple[str | None, ...] = (None,)
EARLY, LATE, ZERO_CENTERED = 0, 1, 2  # forms of y, in the order above


@dataclass(frozen=True, slots=True)
class Case:
    """M rows of H; `form` as above; `add`: with `d`; `kind`: how y is quantised; `parts`: of `d`, 3 with the gate."""

    name: str
    M: int
    H: int
    form: int
    add: bool = False
    kind: str | None = None
    tiny: bool = False
    parts: int = 1

    @property
    def nbytes(self) -> int:
        """Everything that is read or written."""
        return self.M * self.H * (4 + 4 * self.add + 2 * (self.parts > 1) + (self.kind is not None))

    def __str__(self) -> str:
        added = f", after a sum of {self.parts + 1}" if self.add else ""
        return f"{self.name}, {self.M}x{self.H}, form {self.form}{added}, {self.kind or 'not'} quantised"


CASES = (
    Case("early", 3, 200, EARLY, tiny=True),
    Case("late", 2, 16, LATE, True, tiny=True),
    Case("zero-centred", 3, 136, ZERO_CENTERED, True, "fp8_static", tiny=True),
    Case("token", 3, 200, LATE, False, "fp8_token", tiny=True),
    Case("groups", 2, 400, EARLY, True, "fp8_group", tiny=True),
    Case("groups, powers of two", 2, 128, ZERO_CENTERED, False, "fp8_group_e8m0", tiny=True),
    Case("NVFP4", 3, 208, ZERO_CENTERED, True, "nvfp4", tiny=True),
    Case("MXFP8", 2, 160, LATE, True, "mxfp8", tiny=True),
    Case("MXFP4", 2, 160, EARLY, False, "mxfp4", tiny=True),
    Case("shared experts", 3, 144, LATE, True, "fp8_token", tiny=True, parts=2),
    Case("gated shared experts", 3, 256, ZERO_CENTERED, True, "fp8_group", tiny=True, parts=3),
    Case("Qwen3.5-27B", 1, 5120, ZERO_CENTERED, True, "fp8_static"),
    Case("Qwen3.5-35B-A3B", 1, 2048, ZERO_CENTERED, True, "fp8_group", parts=3),
    Case("Qwen3.5-27B prefill", 4096, 5120, ZERO_CENTERED, True, "fp8_token"),
    Case("Nemotron 3 Super", 8, 4096, LATE, True, "nvfp4"),
)


def make_inputs(case: Case, device: torch.device, seed: int) -> dict[str, Any]:
    """Arguments of `normalize`."""
    random = torch.Generator(device).manual_seed(seed)
    x, delta, shared = (torch.randn(case.M, case.H, generator=random, device=device).bfloat16() * (2 + 9 * i) for i in range(3))
    gate = torch.randn(case.M, 1, generator=random, device=device).bfloat16()
    weight = (1 + 0.3 * torch.randn(case.H, generator=random, device=device)).bfloat16()
    scale = torch.tensor([0.01], device=device)
    return {"x": x, "weight": weight, "eps": 1e-6, "form": case.form, "delta": delta if case.add else None, "kind": case.kind,
            "shared": shared if case.parts > 1 else None, "gate": gate if case.parts > 2 else None,
            "input_scale": scale if case.kind in STATIC else None}  # fmt: skip


def errors(case: Case, device: torch.device, seed: int) -> dict[str, float]:
    """Largest errors over the largest result: of y what exceeds one step of bfloat16, since sums differ; of the codes, that
    must be those of that y; infinite where a sum is not exact, but for a gate, which may round the other way once."""
    given = make_inputs(case, device, seed)
    found = normalize(**given)
    s = given["x"]
    if given["delta"] is not None:
        delta = given["delta"]
        if given["shared"] is not None:
            delta = delta + (given["shared"] if given["gate"] is None else torch.sigmoid(given["gate"]) * given["shared"])
        s = s + delta
        assert found.summed is not None
        if given["gate"] is not None and (found.summed - s).abs().max() <= 2.0**-6 * s.abs().max():
            s = found.summed
    n = s.double() * (s.double().square().mean(-1, keepdim=True) + given["eps"]).rsqrt()
    w = given["weight"].double()
    y = w * n.bfloat16().double() if case.form == EARLY else (w if case.form == LATE else 1 + w) * n
    beyond = ((found.y.double() - y).abs() - y.abs() * 2.0**-7).clamp(min=0)
    worst = {"y": float(beyond.max() / y.abs().max())}
    if found.summed is not None:
        worst["sum"] = 0.0 if torch.equal(found.summed, s) else torch.inf
    if found.codes is not None:
        worst["codes"] = codes_error(found.y, found.codes, found.scales, case.kind or "", given["input_scale"])
    return worst


def launch(case: Case, device: torch.device, seed: int) -> Callable[[], object]:
    """A launch to time."""
    given = make_inputs(case, device, seed)
    return lambda: normalize(**given)


@triton.jit
def weighted(n: tl.tensor, w: tl.tensor, FORM: tl.constexpr) -> tl.tensor:
    """y of n and the weight, all float32."""
    if FORM == 0:
        y = w * round_to_bf16(n)
    elif FORM == 1:
        y = w * n
    else:
        y = (1.0 + w) * n
    return round_to_bf16(y)


@triton.jit
def rms_norm_kernel(
    x: tl.tensor, delta: tl.tensor, shared: tl.tensor, gate: tl.tensor, weight: tl.tensor, summed: tl.tensor,
    out: tl.tensor, codes: tl.tensor, scales: tl.tensor, eps: tl.tensor,
    H: tl.constexpr, SIZE: tl.constexpr, FORM: tl.constexpr, KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Program m: row m.  `delta`, `shared`, `gate`, `summed`, `codes`, `scales`: None where there is none.  `SIZE`: H rounded
    up, at least 128.

    `KIND`: of `quantized`; `scales` is read for a static scale, else written.
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    real = at < H
    value = tl.load(x + token * H + at, mask=real, other=0.0).to(tl.float32)
    if delta is not None:
        added = tl.load(delta + token * H + at, mask=real, other=0.0).to(tl.float32)
        if shared is not None:
            part = tl.load(shared + token * H + at, mask=real, other=0.0).to(tl.float32)
            if gate is not None:
                part = round_to_bf16(round_to_bf16(1.0 / (1.0 + tl.exp(-tl.load(gate + token).to(tl.float32)))) * part)
            added = round_to_bf16(added + part)
        value = round_to_bf16(value + added)
        tl.store(summed + token * H + at, value.to(summed.dtype.element_ty), mask=real)
    value *= tl.rsqrt(tl.sum(value * value, 0) / H + eps)
    w = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    value = tl.where(real, weighted(value, w, FORM), 0.0)
    tl.store(out + token * H + at, value.to(out.dtype.element_ty), mask=real)
    if KIND > 0:
        store_quantized(value, codes, scales, token, 0, H, H, SIZE, KIND)


@dataclass(frozen=True, slots=True)
class Normalized:
    """What a launch leaves.  `summed`: the residual, None without a sum.  `codes`, `scales`: as `quantize` returns them."""

    y: Tensor
    summed: Tensor | None
    codes: Tensor | None
    scales: Tensor | None


def normalize(
    x: Tensor, weight: Tensor, eps: float, form: int, delta: Tensor | None = None, shared: Tensor | None = None,
    gate: Tensor | None = None, kind: str | None = None, input_scale: Tensor | None = None,
) -> Normalized:  # fmt: skip
    """`x`, `delta` and `shared` bfloat16 `[..., H]`, `gate` `[..., 1]`, `weight` `[H]` of any float dtype; `input_scale`
    float32 `[1]` for static kinds."""
    H = x.shape[-1]
    x = x.contiguous()
    M, device = x.numel() // H, x.device
    y = torch.empty_like(x)
    summed, codes, scales = None, None, None
    if delta is not None:
        delta, summed = delta.contiguous(), torch.empty_like(x)
    shared, gate = (None if part is None else part.contiguous() for part in (shared, gate))
    if kind is not None:
        codes, scales = room(M, H, kind, input_scale, device)
    size = max(128, triton.next_power_of_2(H))
    warps = min(16, max(1, size // 512))
    rms_norm_kernel[(M,)](
        x, delta, shared, gate, weight, summed, y, codes, scales, eps, H, size, form, KINDS.index(kind), num_warps=warps
    )
    return Normalized(y, summed, codes, scales)


def prepare(weight: Tensor, eps: float, form: int) -> Callable[..., Normalized]:
    """`normalize` for one norm: a function of `x` and what comes after `form`."""
    return lambda x, *more, **options: normalize(x, weight, eps, form, *more, **options)

"""The gated delta rule over many tokens by the chunked kernels of fla-core, an optional package (`qconvert[fla]`).

The same rule as `gated_delta`, which is the reference; see there for the formula.  Operands are bfloat16, decays, sums and
the state float32.  Source: fla-core 0.6 `fla.ops.gated_delta_rule.chunk_gated_delta_rule`: time before heads, decays in
logarithms, and `scale` multiplies the queries, which are scaled already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from runtime.kernels import gated_delta

SCHEMES = ("state fp32",)
ACTIVATIONS: tuple[str | None, ...] = (None,)
TOLERANCE = 2e-2  # of the largest result: the kernels round to bfloat16 at each product


@dataclass(frozen=True, slots=True)
class Case:
    """B sequences of T tokens; H heads with states `[Dk, Dv]`."""

    name: str
    B: int
    T: int
    H: int
    Dk: int
    Dv: int
    tiny: bool = False  # its kernels choose their configuration at run time, which the interpreter cannot

    def __str__(self) -> str:
        return f"{self.name}, gated delta rule, {self.B} x {self.T} tokens"

    @property
    def nbytes(self) -> int:
        """Inputs and outputs in the dtypes of this interface, and the state read and written."""
        return 4 * self.B * self.H * (self.T * (2 * self.Dk + 2 * self.Dv + 2) + 2 * self.Dk * self.Dv)


CASES = (
    Case("a rest only", 2, 21, 4, 64, 64),
    Case("Qwen3.5-27B", 1, 4096, 48, 128, 128),
    Case("Qwen3.5-35B-A3B", 1, 2048, 32, 128, 128),
) if find_spec("fla") else ()  # fmt: skip


def make_inputs(case: Case, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """`q`, `k`, `v`, `g`, `beta` and `state`, as a layer passes them: unit keys, views with time before heads."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    q, k, v = (normal(case.B, case.T, case.H, size).transpose(1, 2) for size in (case.Dk, case.Dk, case.Dv))
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    g, beta = (torch.rand(case.B, case.T, case.H, generator=random, device=device).transpose(1, 2) for _ in range(2))
    return q * case.Dk**-0.5, k, v, -g.pow(4) * 2, beta, normal(case.B, case.H, case.Dk, case.Dv)


def reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token in float64: outputs `[B, H, T, Dv]`, and the state afterwards."""
    q, k, v, g, beta, state = (x.double() for x in (q, k, v, g, beta, state))
    outputs = []
    for t in range(q.shape[2]):
        at = slice(t, t + 1)
        outputs.append(gated_delta.step(q[:, :, at], k[:, :, at], v[:, :, at], g[:, :, at], beta[:, :, at], state))
    return torch.cat(outputs, 2), state


def errors(case: Case, device: torch.device, seed: int) -> dict[str, float]:
    """Largest error of output and of state over the largest value, with fresh inputs."""
    q, k, v, g, beta, state = make_inputs(case, device, seed)
    y, after = reference(q, k, v, g, beta, state)
    pairs = {"output": (prepare()(q, k, v, g, beta, state), y), "state": (state, after)}
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def launch(case: Case, device: torch.device, seed: int) -> Callable[[], object]:
    """A launch to time."""
    inputs = make_inputs(case, device, seed)
    run = prepare()
    return lambda: run(*inputs)


def prepare() -> Callable[..., Tensor]:
    """A function in the place of `gated_delta.gated_delta`: the same arguments and results.

    Importing the package takes seconds, and its kernels choose their configuration when they are first used.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
        q, k, v, beta = (x.transpose(1, 2).bfloat16().contiguous() for x in (q, k, v, beta))
        y, after = chunk_gated_delta_rule(
            q, k, v, g.transpose(1, 2).contiguous(), beta, scale=1.0,
            initial_state=state.to(torch.float32), output_final_state=True,
        )  # fmt: skip
        state.copy_(after)
        outputs: Tensor = y.transpose(1, 2).float()
        return outputs

    return gated_delta

"""Linear layers to test and to time, as data, and random contents for them.  Used by tests and by `bench`, not by models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.format import ModuleSpec, module_tensors

_DTYPES = {"F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}


@dataclass(frozen=True, slots=True)
class Case:
    """A layer: `rows` of its partitions, K, and static input scales that differ between partitions where `runs`.

    `tiny`: small enough for the interpreter; the others have shapes of published models.
    """

    name: str
    scheme: str
    rows: tuple[int, ...]
    K: int
    activations: str | None = None
    runs: bool = False
    bias: bool = False
    tiny: bool = False

    def spec(self) -> ModuleSpec:
        """The entry of a config that this layer would have."""
        partitions = tuple((f"p{i}" if len(self.rows) > 1 else "", n) for i, n in enumerate(self.rows))
        return ModuleSpec(self.scheme, (sum(self.rows), self.K), partitions, self.activations)

    def __str__(self) -> str:
        return f"{self.name}, {self.scheme}, input {self.activations or 'full'}, {sum(self.rows)}x{self.K}"


def make_tensors(case: Case, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Stored tensors by role: every finite code may occur, scales differ everywhere; `bias` where the case has one."""
    spec, tensors = case.spec(), {}
    random = torch.Generator(device).manual_seed(seed)
    for role, tensor in module_tensors(spec).items():
        dtype = _DTYPES[tensor.dtype]
        if dtype == torch.float32:
            values = torch.rand(tensor.shape, generator=random, device=device) * 0.1 + 0.01
        else:
            values = torch.randint(0, 256, tensor.shape, generator=random, device=device, dtype=torch.uint8)
            if dtype == torch.float8_e4m3fn:
                values = torch.where(values & 127 == 127, values ^ 1, values)  # 0x7f and 0xff are NaN
                values = (values if role == "weight" else values & 127).view(dtype)
        tensors[role] = values
    if "input_scale" in tensors and not case.runs:
        tensors["input_scale"][:] = tensors["input_scale"][0].clone()
    if case.bias:
        tensors["bias"] = torch.randn(spec.shape[0], generator=random, device=device).bfloat16()
    return tensors


def make_inputs(case: Case, M: int, device: torch.device, seed: int) -> Tensor:
    """Bfloat16 `[M, K]`: tokens of different size, one of them zero where there are several."""
    random = torch.Generator(device).manual_seed(seed)
    x = torch.randn(M, case.K, generator=random, device=device) * torch.logspace(0, 1, M, device=device)[:, None]
    x[1:2] = 0
    return x.bfloat16()

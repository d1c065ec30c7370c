"""Layers to test and to time, as data, and random contents for them.  Used by tests and by `bench`, not by models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.format import ModuleSpec, module_tensors
from runtime.nonlinear import ReLU2, SwiGLU

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
    spec = case.spec()
    tensors = random_tensors(spec, device, seed)
    if "input_scale" in tensors and not case.runs:
        tensors["input_scale"][:] = tensors["input_scale"][0].clone()
    if case.bias:
        random = torch.Generator(device).manual_seed(seed + 1)
        tensors["bias"] = torch.randn(spec.shape[0], generator=random, device=device).bfloat16()
    return tensors


def random_tensors(spec: ModuleSpec, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Random contents of what `spec` stores, by role."""
    tensors = {}
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
            elif role == "weight_scale":
                values = values // 16 + 112  # powers of two, from 2**-15 to 1
        tensors[role] = values
    return tensors


def make_inputs(case: Case, M: int, device: torch.device, seed: int) -> Tensor:
    """Bfloat16 `[M, K]`: tokens of different size, one of them zero where there are several."""
    random = torch.Generator(device).manual_seed(seed)
    x = torch.randn(M, case.K, generator=random, device=device) * torch.logspace(0, 1, M, device=device)[:, None]
    x[1:2] = 0
    return x.bfloat16()


@dataclass(frozen=True, slots=True)
class ManyCase:
    """A layer, and numbers of tokens that are many."""

    layer: Case
    tokens: tuple[int, ...]

    @property
    def tiny(self) -> bool:
        """As the layer is."""
        return self.layer.tiny

    @property
    def nbytes(self) -> int:
        """What the largest number of tokens has to move: the stored tensors, bfloat16 inputs and outputs."""
        spec = self.layer.spec()
        return sum(tensor.nbytes for tensor in module_tensors(spec).values()) + 2 * max(self.tokens) * sum(spec.shape)

    def __str__(self) -> str:
        return f"{self.layer}, {max(self.tokens)} tokens"


Prepare = Callable[[ModuleSpec, Mapping[str, Tensor]], Callable[..., Tensor] | None]
Reference = Callable[[Tensor, ModuleSpec, Mapping[str, Tensor]], Tensor]


def many_errors(prepare: Prepare, reference: Reference, case: ManyCase, device: torch.device, seed: int) -> dict[str, float]:
    """Largest error over the largest result, for each number of tokens."""
    spec, tensors = case.layer.spec(), make_tensors(case.layer, device, seed)
    linear, found = prepare(spec, tensors), {}
    assert linear is not None
    for M in case.tokens:
        x = make_inputs(case.layer, M, device, seed + M)
        expected = reference(x, spec, tensors)
        found[f"M={M}"] = float((linear(x) - expected).abs().max() / expected.abs().max())
    return found


def many_launch(prepare: Prepare, case: ManyCase, device: torch.device, seed: int) -> Callable[[], object]:
    """The layer with its largest number of tokens, to time."""
    linear = prepare(case.layer.spec(), make_tensors(case.layer, device, seed))
    assert linear is not None
    x = make_inputs(case.layer, max(case.tokens), device, seed)
    return lambda: linear(x)


@dataclass(frozen=True, slots=True)
class ExpertCase:
    """Experts of a layer: E of them, `per_token` for each token, `inner` rows of each gate and up, H inputs and outputs.

    `parts`: partitions that gate and up have together, which is 1 or 2.  `limit`: of a clipped SwiGLU.
    """

    name: str
    scheme: str
    E: int
    per_token: int
    inner: int
    H: int
    activations: str | None = None
    gated: bool = True
    parts: int = 2
    limit: float | None = None
    tiny: bool = False

    def specs(self) -> tuple[ModuleSpec, ModuleSpec]:
        """The entries of a config for both stages."""
        rows = (self.inner,) * 2 if self.gated and self.parts == 2 else (self.inner * (1 + self.gated),)
        parts = tuple((f"p{i}" if len(rows) > 1 else "", n) for i, n in enumerate(rows))
        return (
            ModuleSpec(self.scheme, (sum(rows), self.H), parts, self.activations, experts=self.E),
            ModuleSpec(self.scheme, (self.H, self.inner), (("", self.H),), self.activations, experts=self.E),
        )

    @property
    def nbytes(self) -> int:
        """What one token reads: the stored tensors of its experts."""
        stored = sum(tensor.nbytes for spec in self.specs() for tensor in module_tensors(spec).values())
        return stored * self.per_token // self.E

    def activation(self) -> SwiGLU | ReLU2:
        """What stands between the stages."""
        return SwiGLU(self.limit) if self.gated else ReLU2()

    def tensors(self, device: torch.device, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Random contents of both stages; an input scale belongs to all partitions of an expert."""
        found = tuple(random_tensors(spec, device, seed + i) for i, spec in enumerate(self.specs()))
        for spec, tensors in zip(self.specs(), found, strict=True):
            outer = tensors["weight_scale_2" if "weight_scale_2" in tensors else "weight_scale"]
            outer *= spec.shape[1] ** -0.5 / 16  # so that a SwiGLU gets numbers around 1
            if "input_scale" in tensors:
                tensors["input_scale"][:] = tensors["input_scale"][:, :1].clone()
        return found[0], found[1]

    def chosen(self, T: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        """Int64 and float32 `[T, k]`: distinct experts of each token, the first of which all tokens share, and weights."""
        random = torch.Generator(device).manual_seed(seed)
        scores = torch.rand(T, self.E, generator=random, device=device)
        scores[:, seed % self.E] = 2
        return scores.topk(self.per_token).indices, torch.rand(T, self.per_token, generator=random, device=device) + 0.1

    def __str__(self) -> str:
        return f"{self.name}, {self.scheme}, input {self.activations or 'full'}, {self.E} experts {self.inner}x{self.H}"

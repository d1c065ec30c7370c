"""Stored projections: what each is by its tensors and the configs, and the terms that it contributes to canonical tensors.

Experts that are stored one by one are read together: where their tensors look alike and no config tells them apart, what is
found for the first holds for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from runtime.format import DTYPE_BYTES, FP8_BLOCK

from .dialects.base import DENSE, SCALAR, Claim
from .ops import Term
from .recognise import Recognised, Settled, Stack
from .source import TensorInfo

Partitions = tuple[tuple[str, int | None], ...]


class Read(NamedTuple):
    """A stored projection as it was read.

    name      its canonical name            spelling  its name as it is stored
    tensors   last segment -> tensor, without the bias of the model
    claims    what each config says about it
    """

    name: str
    spelling: str
    tensors: Mapping[str, TensorInfo]
    bias: TensorInfo | None
    claims: tuple[Claim, ...]

    @property
    def look(self) -> tuple[object, ...]:
        """What it must have in common with another for the same to be true of both."""
        bias = self.bias and self.bias[1:3]
        return (*self.tensors, *[info[1:3] for info in self.tensors.values()], bias, self.claims)


@dataclass(slots=True)
class Projection:
    """A stored projection, recognised and settled; or the same one of several experts that are alike.

    members   one for each expert; for a `stack`, a single one that holds all experts
    notes     what the configs say and the tensors contradict
    """

    members: Sequence[Read]
    partitions: tuple[tuple[str, int], ...]
    found: Recognised
    settled: Settled
    stack: Stack | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Canonical name of the first member."""
        return self.members[0].name

    @property
    def key(self) -> tuple[str, ...]:
        """What projections must have in common to be stored as one."""
        bias = self.members[0].bias
        return (
            self.found.scheme,
            self.settled.activations or "",
            bias.dtype if bias is not None else "",
            self.found.dtype if self.found.scheme == DENSE else "",
        )

    @property
    def own_input(self) -> bool:
        """Whether it multiplies its input by factors of its own."""
        return "pre_quant_scale" in self.found.roles

    @property
    def experts(self) -> int:
        """How many experts it stands for; 1 for a linear."""
        return self.stack.experts if self.stack is not None else len(self.members)

    def member(self, index: int) -> Projection:
        """The same of one expert."""
        return replace(self, members=self.members[index : index + 1])

    def tensor(self, role: str) -> TensorInfo:
        """The first member's tensor of a role."""
        return self.members[0].tensors[self.found.roles[role].suffix]

    def terms(self, role: str) -> list[Term]:
        """The terms that it contributes to the canonical tensor of a role, one for each expert, alike but for their source."""
        stored, info = self.found.roles[role], self.tensor(role)
        numel = (info.end - info.start) // DTYPE_BYTES[info.dtype]
        scalar, partitions = SCALAR[0] in stored.shapes, len(self.canonical_partitions())
        if self.stack is not None and numel > 1:
            transform = stored.transform
            if self.stack.transposed and len(info.shape) == 3:
                transform = "transpose" if transform == "copy" else f"transpose_{transform}"
            repeat = partitions if scalar and numel == info.shape[0] else 1
            return [Term(info.name, transform, repeat, (e, e + 1)) for e in range(self.stack.experts)]
        rest = (stored.transform, partitions if scalar and numel == 1 else 1, None)
        suffix = stored.suffix
        # The same as Term(...), in half the time.
        terms = [tuple.__new__(Term, (member.tensors[suffix].name, *rest)) for member in self.members]
        return terms * self.stack.experts if self.stack is not None else terms

    def canonical_partitions(self) -> list[tuple[str, int]]:
        """Partitions that it contributes to the canonical module.

        Blocks of a block scale run through a stored projection without regard to partitions, and restart at each canonical
        partition.  So where a partition ends inside a block, the projection is one partition, which is exact.
        """
        own = list(self.partitions)
        if self.found.scheme == "fp8_block" and any(rows % FP8_BLOCK for _, rows in own[:-1]):
            return [("".join(p for p, _ in own), sum(rows for _, rows in own))]
        return own

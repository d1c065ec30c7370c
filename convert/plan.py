"""A plan: everything that a conversion will do, as a plain value that can be printed, saved and tested without tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.format import CanonicalConfig

from .adapters import Adapter
from .ops import Step
from .source import Source, TensorInfo

ACTIONS: Mapping[str, str] = {
    "keep": "same name, same bytes",
    "rename": "same bytes under the canonical name",
    "reshape": "same bytes, canonical shape (0-d scalars become vectors)",
    "fuse": "rows of several projections one after another",
    "expand": "one scale given to each partition that it covers",
    "transpose": "input-major experts turned to output-major",
    "widen": "scales widened to float32, exact",
    "reciprocal": "divisors replaced by float32 multipliers",
}


@dataclass(frozen=True, slots=True)
class Dropped:
    """A source tensor that is not carried, and why."""

    tensor: str
    reason: str


@dataclass(slots=True)
class Plan:
    """The whole conversion.

    steps           every canonical tensor, in the order of the model
    shards          file name -> indices of `steps` it holds, in the order of their bytes
    adapters        LoRA adapters found in the checkpoint, written beside the base
    repairs         what was wrong and is mended; `contradictions`: where config and tensors (or two configs) disagree
    disagreements   the same contradictions -> all modules that each concerns
    """

    source: Source
    dialect: str
    producer: str
    config: CanonicalConfig
    steps: list[Step]
    dropped: list[Dropped] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    shards: dict[str, list[int]] = field(default_factory=dict)
    adapters: list[Adapter] = field(default_factory=list)
    disagreements: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data in OUT."""
        return sum(step.nbytes for step in self.steps)

    def action(self, step: Step) -> str:
        """The one word of `ACTIONS` that describes a step best."""
        tensors = self.source.tensors
        first = tensors[step.terms[0].source]
        if any(t.transform == "reciprocal" for t in step.terms):
            return "reciprocal"
        if any(t.repeat > 1 for t in step.terms):
            return "expand"
        if any(t.transform.startswith("transpose") for t in step.terms):
            return "transpose"
        if len(step.terms) > 1:
            return "fuse"
        if first.dtype != step.dtype and step.terms[0].transform != "copy":
            return "widen"
        if first.shape != step.shape:
            return "reshape"
        return "keep" if first.name == step.name else "rename"

    def actions(self) -> Counter[str]:
        """How many canonical tensors come about in which way."""
        return Counter(self.action(step) for step in self.steps)

    def source_of(self, step: Step) -> list[TensorInfo]:
        """The source tensors of a step, in order."""
        return [self.source.tensors[t.source] for t in step.terms]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values: enough to carry it out elsewhere, given the same source."""
        return {
            "family": self.config.family,
            "dialect": self.dialect,
            "producer": self.producer,
            "total_bytes": self.total_bytes,
            "shards": {name: [self.steps[i].name for i in indices] for name, indices in self.shards.items()},
            "steps": [
                {
                    "name": s.name,
                    "dtype": s.dtype,
                    "shape": list(s.shape),
                    "action": self.action(s),
                    "check": s.check,
                    "terms": [
                        {"source": t.source, "transform": t.transform, "repeat": t.repeat, "rows": t.rows}
                        for t in s.terms
                    ],
                }
                for s in self.steps
            ],
            "dropped": [{"tensor": d.tensor, "reason": d.reason} for d in self.dropped],
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "repairs": list(self.repairs),
            "contradictions": list(self.contradictions),
            "side_files": sorted(self.source.side_files),
            "skipped_files": dict(sorted(self.source.skipped.items())),
            "config": self.config.to_json(),
        }

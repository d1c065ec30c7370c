"""`qconvert inspect`: what a checkpoint is, on one screen.  Works on sources and on canonical checkpoints."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.format import CONFIG_FILE, FORMAT, CanonicalConfig

from .canonical import open_canonical, read_report
from .errors import ConvertError
from .planner import plan_conversion
from .source import read_json, regular_file


def _kind(module: str) -> str:
    """A module's kind: its path with layer numbers left out."""
    return ".".join("*" if s.isdecimal() else s for s in module.split("."))


def _summary(config: CanonicalConfig, tensors: Iterable[tuple[str, str, int]]) -> dict[str, Any]:
    """Schemes, sizes and parts of a canonical config; `tensors`: (name, dtype, bytes)."""
    schemes: dict[str, Counter[str]] = defaultdict(Counter)
    by_scheme: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    total = 0
    counted = set()
    for name, dtype, nbytes in tensors:
        module = name.rpartition(".")[0]
        spec = config.modules.get(module)
        scheme = spec.scheme if spec else dtype
        by_scheme[scheme] += nbytes
        parts[name.partition(".")[0]] += nbytes
        total += nbytes
        if spec is not None and module not in counted:
            counted.add(module)
            inputs = spec.activations or "full-precision input"
            schemes[_kind(module)][f"{spec.scheme}, {inputs}"] += 1
    return {
        "family": config.family,
        "layers": config.architecture.get("num_hidden_layers"),
        "hidden_size": config.architecture.get("hidden_size"),
        "vocab_size": config.architecture.get("vocab_size"),
        "head": config.architecture.get("head"),
        "bytes": total,
        "bytes_by_scheme": dict(by_scheme.most_common()),
        "bytes_by_part": dict(parts.most_common()),
        "modules": {name: spec.to_json() for name, spec in config.modules.items()},
        "schemes": {kind: dict(counts) for kind, counts in sorted(schemes.items())},
        "unfused": {name: list(names) for name, names in config.unfused.items()},
        "kv_cache": dict(Counter(config.kv_cache.values())),
        "carried": list(config.carried),
    }


def inspect_checkpoint(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint is: producer, dialect, family, schemes per kind of module, sizes and defects.

    Reads headers and configs only.  Raises `ConvertError` when the checkpoint would be refused.
    """
    path = Path(directory)
    config: Any = None
    with suppress(OSError, ConvertError):  # planning says what is wrong with it
        config = read_json(regular_file(path, CONFIG_FILE), CONFIG_FILE)
    if isinstance(config, Mapping) and config.get("format") == FORMAT:
        canonical = open_canonical(path)
        tensors = [(t.name, t.dtype, t.end - t.start) for t in canonical.tensors.values()]
        report = read_report(path)
        return {
            "kind": "canonical",
            "producer": report.get("producer", "unknown"),
            "dialect": report.get("dialect", "unknown"),
            "tensors": len(tensors),
            "files": len(canonical.files),
            **_summary(canonical.config, tensors),
            "repairs": report.get("repairs", []),
            "contradictions": report.get("contradictions", []),
            "dropped": report.get("dropped", []),
            "adapters": report.get("adapters", []),
        }
    plan = plan_conversion(path)
    return {
        "kind": "source",
        "producer": plan.producer,
        "dialect": plan.dialect,
        "tensors": len(plan.source.tensors),
        "files": len(plan.source.files),
        **_summary(plan.config, ((s.name, s.dtype, s.nbytes) for s in plan.steps)),
        "repairs": plan.repairs,
        "contradictions": plan.contradictions,
        "dropped": [{"tensor": d.tensor, "reason": d.reason} for d in plan.dropped],
        "adapters": [adapter.to_json() for adapter in plan.adapters],
    }

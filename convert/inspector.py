"""`qconvert inspect`: what a checkpoint is and what is wrong with it.  Works on sources, also refused ones, and on OUT.

Headers, configs and small scales are read.  `docs/inspect.md` describes the facts that come out.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.format import CONFIG_FILE, FORMAT, CanonicalConfig

from .canonical import open_canonical, read_report
from .collector import collector_paused
from .defects import Finding, as_json, from_plan, refusals
from .dialects import find_configs, refused
from .dialects.base import DENSE
from .errors import ConvertError, Problem
from .families import FAMILIES, detect_family
from .families.base import resolve_architecture
from .index import by_module
from .plan import Plan
from .planner import plan_source, producer
from .recognise import Recognised, encodings_for, recognise
from .remote import RemotePath
from .source import AnyPath, Location, Source, TensorInfo, located, read_json, read_source, regular_file

if TYPE_CHECKING:
    from .view import View

KV_SCALES = frozenset({"k_scale", "v_scale"})
DROPPED, ADAPTER = "dropped", "adapter"  # what stands for the scheme of tensors that are not part of the model


class Row(NamedTuple):
    """One stored tensor.  `canonical`: its name in the plan, "" for none; `scheme`: that of its module, or its dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    canonical: str
    scheme: str

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {**self._asdict(), "shape": list(self.shape)}


@dataclass(slots=True)
class Inspection:
    """`facts`: everything that `--json` prints; `rows`: every stored tensor; `histograms`: see `scales.histograms`."""

    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    histograms: list[dict[str, Any]] = field(default_factory=list)


def kind_of(module: str) -> str:
    """A module's kind: its path with layer numbers left out."""
    return ".".join("*" if s.isdecimal() else s for s in module.split("."))


# -- facts --------------------------------------------------------------------------------------------------------------


def _kinds(rows: Iterable[Row], config: CanonicalConfig | None) -> list[dict[str, Any]]:
    """Scheme, number and bytes of each kind of module, in the order of the model."""
    modules: dict[tuple[str, str, str | None], set[str]] = defaultdict(set)
    nbytes: Counter[tuple[str, str, str | None]] = Counter()
    known: dict[str, str] = {}
    for row in rows:
        module = (row.canonical or row.name).rpartition(".")[0] or row.name
        if module not in known:
            known[module] = kind_of(module)
        spec = config.modules.get(module) if config is not None else None
        key = (known[module], row.scheme, spec.activations if spec else None)
        modules[key].add(module)
        nbytes[key] += row.nbytes
    total = max(1, sum(nbytes.values()))
    return [
        {"kind": kind, "scheme": scheme, "activations": activations, "modules": len(modules[kind, scheme, activations]),
         "bytes": size, "share": round(size / total, 6)}
        for (kind, scheme, activations), size in nbytes.items()
    ]  # fmt: skip


def _sums(rows: Iterable[Row]) -> dict[str, Any]:
    """Totals of the stored tensors."""
    by_scheme: Counter[str] = Counter()
    by_part: Counter[str] = Counter()
    for row in rows:
        by_scheme[row.scheme] += row.nbytes
        by_part[(row.canonical or row.name).partition(".")[0]] += row.nbytes
    return {
        "bytes": by_scheme.total(),
        "bytes_by_scheme": dict(by_scheme.most_common()),
        "bytes_by_part": dict(by_part.most_common()),
    }


def _below(rows: Iterable[Row], config: CanonicalConfig, prefixes: Sequence[str]) -> dict[str, Any] | None:
    """Bytes and schemes of the tensors below some prefixes of canonical names; None when there are none."""
    own = [row for row in rows if any(f"{row.canonical}.".startswith(f"{prefix}.") for prefix in prefixes)]
    if not own:
        return None
    schemes = Counter(spec.scheme for m, spec in config.modules.items() if any(f"{m}.".startswith(f"{p}.") for p in prefixes))
    return {"tensors": len(own), "bytes": sum(row.nbytes for row in own), "schemes": dict(schemes)}


def _parameters(config: CanonicalConfig, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Number of weights: logical sizes of quantised modules, and everything that is no scale."""
    count = sum(math.prod(spec.shape) * (spec.experts or 1) for spec in config.modules.values())
    for name, shape in tensors:
        module, _, role = name.rpartition(".")
        if role not in KV_SCALES and (module not in config.modules or role == "bias"):
            count += math.prod(shape)
    return count


def _model(config: CanonicalConfig, rows: list[Row], tensors: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """What a canonical config, made or planned, says about the model."""
    architecture = config.architecture
    family = next((f for f in FAMILIES if f.name == config.family), None)
    towers = {p.root for p in family.parts if p.carried and not p.drafts} if family else set()
    drafts = [prefix for prefix in config.carried if prefix not in towers]
    mtp = _below(rows, config, drafts)
    if mtp is not None and family is not None:
        counts = (p.layer_count[0].rpartition(".")[2] for p in family.parts if p.drafts and p.layer_count)
        mtp["layers"] = next((architecture[key] for key in counts if isinstance(architecture.get(key), int)), len(drafts))
    head = config.modules.get("lm_head")
    types = architecture.get("layer_types")
    schemes: dict[str, Counter[str]] = defaultdict(Counter)
    for module, spec in config.modules.items():
        schemes[kind_of(module)][f"{spec.scheme}, {spec.activations or 'full-precision input'}"] += 1
    return {
        "family": config.family,
        "layers": architecture.get("num_hidden_layers"),
        "layer_types": dict(Counter(types)) if isinstance(types, list) and all(isinstance(t, str) for t in types) else {},
        "hidden_size": architecture.get("hidden_size"),
        "vocab_size": architecture.get("vocab_size"),
        "experts": next((spec.experts for spec in config.modules.values() if spec.experts), architecture.get("num_experts")),
        "parameters": _parameters(config, tensors),
        "head": architecture.get("head"),
        "head_scheme": head.scheme if head else None,
        "modules": {name: spec.to_json() for name, spec in config.modules.items()},
        "schemes": {kind: dict(counts) for kind, counts in sorted(schemes.items())},
        "unfused": {name: list(names) for name, names in config.unfused.items()},
        "kv_cache": dict(Counter(config.kv_cache.values())),
        "mtp": mtp,
        "towers": {root: _below(rows, config, [root]) for root in config.carried if root in towers},
        "carried": list(config.carried),
    }


# What is not known of a checkpoint that is refused; every inspection has the same keys.
UNKNOWN: Mapping[str, Any] = {
    "checkpoint": "", "kind": "", "refused": False, "values_read": False,
    "producer": "unknown", "dialect": "unknown", "tensors": 0, "files": 0,
    "bytes": 0, "bytes_by_scheme": {}, "bytes_by_part": {}, "kinds": [],
    "family": "unknown", "layers": None, "layer_types": {}, "hidden_size": None, "vocab_size": None, "experts": None,
    "parameters": None, "head": None, "head_scheme": None, "modules": {}, "schemes": {}, "unfused": {},
    "kv_cache": {}, "kv_scales": None, "mtp": None, "towers": {}, "carried": [], "adapters": [],
    "repairs": [], "contradictions": [], "dropped": [], "defects": [], "problems": [],
}  # fmt: skip


# -- the three kinds of checkpoints ---------------------------------------------------------------------------------------


def _rows_of_plan(plan: Plan) -> list[Row]:
    """Every stored tensor with what the plan makes of it, in the order of the files."""
    places: dict[str, tuple[str, str]] = {}
    for step in plan.steps:
        spec = plan.config.modules.get(step.name.rpartition(".")[0])
        places.update((term.source, (step.name, spec.scheme if spec else "")) for term in step.terms)
    places.update((d.tensor, ("", DROPPED)) for d in plan.dropped)
    places.update((info.name, ("", ADAPTER)) for adapter in plan.adapters for _, info in adapter.tensors)
    return [_row(info, *places.get(info.name, ("", DROPPED))) for info in plan.source.tensors.values()]


def _row(info: TensorInfo, canonical: str, scheme: str) -> Row:
    return Row(info.name, info.dtype, info.shape, info.end - info.start, info.file, canonical, scheme or info.dtype)


def _look_at_values(view: View, findings: list[Finding], inspection: Inspection, histograms: bool) -> list[Problem]:
    """Read small scales.  Adds what they show to `findings`, and returns what a conversion would refuse."""
    from . import scales

    try:
        view.check()
    except ConvertError as error:
        findings += refusals(error.problems)
        return list(error.problems)
    findings += scales.from_values(view)
    inspection.facts["kv_scales"] = scales.kv_range(view)
    if histograms:
        inspection.histograms = scales.histograms(view)
    return []


def _inspect_plan(plan: Plan, values: bool, histograms: bool) -> Inspection:
    rows = _rows_of_plan(plan)
    inspection = Inspection({
        **UNKNOWN,
        "kind": "source",
        "producer": plan.producer,
        "dialect": plan.dialect,
        "tensors": len(plan.source.tensors),
        "files": len(plan.source.files),
        **_sums(rows),
        "kinds": _kinds(rows, plan.config),
        **_model(plan.config, rows, ((s.name, s.shape) for s in plan.steps)),
        "adapters": [adapter.to_json() for adapter in plan.adapters],
        "repairs": plan.repairs,
        "contradictions": plan.contradictions,
        "dropped": [{"tensor": d.tensor, "reason": d.reason} for d in plan.dropped],
    }, rows)  # fmt: skip
    findings = from_plan(plan)
    problems: list[Problem] = []
    if values:
        from .view import view_plan

        with view_plan(plan) as view:
            problems = _look_at_values(view, findings, inspection, histograms)
    return _judged(inspection, findings, problems, values)


def _inspect_canonical(path: AnyPath, values: bool, histograms: bool) -> Inspection:
    canonical = open_canonical(path)
    report = read_report(path)
    specs = canonical.config.modules
    rows = []
    for info in canonical.tensors.values():
        spec = specs.get(info.name.rpartition(".")[0])
        rows.append(_row(info, info.name, spec.scheme if spec else ""))
    inspection = Inspection({
        **UNKNOWN,
        "kind": "canonical",
        "producer": report.get("producer", "unknown"),
        "dialect": report.get("dialect", "unknown"),
        "tensors": len(rows),
        "files": len(canonical.files),
        **_sums(rows),
        "kinds": _kinds(rows, canonical.config),
        **_model(canonical.config, rows, ((info.name, info.shape) for info in canonical.tensors.values())),
        "adapters": report.get("adapters", []),
        "repairs": report.get("repairs", []),
        "contradictions": report.get("contradictions", []),
        "dropped": report.get("dropped", []),
    }, rows)  # fmt: skip
    if values:
        from . import scales
        from .view import view_canonical

        with view_canonical(canonical) as view:
            inspection.facts["kv_scales"] = scales.kv_range(view)
            if histograms:
                inspection.histograms = scales.histograms(view)
    return _judged(inspection, [], [], values)


def _rough_scheme(tensors: Mapping[str, TensorInfo], encodings: Sequence[Any]) -> str:
    """The scheme of a stored module by its tensors alone, or the name of a foreign format, or ""."""
    for suffixes, name, _ in refused.TENSORS:
        if suffixes <= set(tensors):
            return name
    if not any(e.weight.suffix in tensors for e in encodings):
        return ""
    found = recognise(tensors, None, 1, encodings, None)
    if isinstance(found, Recognised):
        return "" if found.scheme == DENSE else found.scheme
    weight = tensors.get("weight")
    return refused.WEIGHT_DTYPES[weight.dtype][0] if weight is not None and weight.dtype in refused.WEIGHT_DTYPES else ""


def _inspect_refused(source: Source, error: ConvertError) -> Inspection:
    """What can be said of a checkpoint that no plan accounts for: what is stored, and why it is refused."""
    facts: dict[str, Any] = {"producer": producer(source)}
    with suppress(ConvertError):
        configs = find_configs(source.config, source.quant_file)
        facts["dialect"] = configs[0].dialect.name if configs else "unquantised"
    with suppress(ConvertError):
        family = detect_family(source.config)
        facts["family"] = family.name
        architecture = resolve_architecture(family, source.config)
        facts |= {"layers": architecture.get("num_hidden_layers"), "head": architecture.get("head")}
        facts |= {key: architecture.get(key) for key in ("hidden_size", "vocab_size")}
    encodings = encodings_for([])
    schemes: dict[tuple[Any, ...], str] = {}
    rows = []
    for tensors in by_module(source.tensors.items()).values():
        look = tuple((suffix, info.dtype, info.shape) for suffix, info in tensors.items())
        if look not in schemes:
            schemes[look] = _rough_scheme(tensors, encodings)
        rows += [_row(info, "", schemes[look]) for info in tensors.values()]
    inspection = Inspection({
        **UNKNOWN,
        "kind": "source",
        **facts,
        "tensors": len(source.tensors),
        "files": len(source.files),
        **_sums(rows),
        "kinds": _kinds(rows, None),
    }, rows)  # fmt: skip
    return _judged(inspection, refusals(error.problems), list(error.problems), False)


def _judged(inspection: Inspection, findings: list[Finding], problems: Sequence[Problem], values: bool) -> Inspection:
    inspection.facts |= {
        "refused": bool(problems),
        "values_read": values,
        "defects": as_json(findings),
        "problems": [
            {"file": p.file, "tensor": p.tensor, "expected": p.expected, "found": p.found, "remedy": p.remedy} for p in problems
        ],
    }
    return inspection


@collector_paused()
def inspect(
    directory: Location, *, values: bool | None = None, histograms: bool = False
) -> Inspection:
    """Inspect a checkpoint: `inspect_checkpoint` with its tensors, and with histograms of its scales if they are wanted."""
    path = located(directory)
    if values is None:
        values = not isinstance(path, RemotePath)
    config: Any = None
    with suppress(OSError, ConvertError):  # reading the source says what is wrong with it
        config = read_json(regular_file(path, CONFIG_FILE), CONFIG_FILE)
    source: Source | None = None
    try:
        if isinstance(config, Mapping) and config.get("format") == FORMAT:
            inspection = _inspect_canonical(path, values, histograms)
        else:
            source = read_source(path)
            inspection = _inspect_plan(plan_source(source), values, histograms)
    except ConvertError as error:
        if error.exit_code != ConvertError.exit_code:  # a mistake in the command, or the machine's
            raise
        unreadable = Inspection({**UNKNOWN, "kind": "unreadable"})
        inspection = (
            _inspect_refused(source, error) if source is not None
            else _judged(unreadable, refusals(error.problems), error.problems, False)
        )  # fmt: skip
    inspection.facts["checkpoint"] = str(path) if isinstance(path, RemotePath) else str(directory)
    return inspection


def inspect_checkpoint(
    directory: Location, *, values: bool | None = None, tensors: bool = False
) -> dict[str, Any]:
    """What a checkpoint is: producer, family, schemes per kind of module, sizes and defects, as JSON values (docs/inspect.md).

    `directory` may be a URL.  `values`: also read the per-tensor scales (a few bytes each), which show defects that headers do
    not; by default those of a directory, as each may be a request to a server.  `tensors`: add
    `tensor_list`, every stored tensor.  A checkpoint that a conversion refuses is described as far as it can be read, with
    `refused` true and the reasons as defects.  Raises `UsageError` when there is no such directory.  Reads headers, configs and
    small scales; memory grows with the number of tensors, not with their size.
    """
    found = inspect(directory, values=values)
    return found.facts | ({"tensor_list": [row.to_json() for row in found.rows]} if tensors else {})

"""What is wrong with a checkpoint, and what it does to an engine that loads it as it is.

A table of kinds says what never changes: how bad it is, what engines do with it, what `qconvert` does.  Findings fill it in:
from the words of a plan or of its refusal (two tables of patterns), from names and shapes, and from the values of scales.
What engines do was read in vLLM 0.33 and SGLang 0.5.23, or is told by the public reports that `seen` names.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from runtime.format import FP8_BLOCK

from .dialects import find_configs
from .errors import Problem
from .families import FAMILIES
from .families.base import Family, Linear, hub_name
from .index import by_module
from .names import PEFT_SEGMENTS, PEFT_WRAPPER, CanonicalNames, canonical_name, patterns, repair_sentinel
from .plan import Plan

SEVERITIES = ("fatal", "high", "medium", "low")  # fatal: qconvert refuses it
EFFECTS: Mapping[str, str] = {
    "garbage": "wrong numbers without an error",
    "lossy": "less precise than the checkpoint",
    "refuse": "an error while loading",
    "nothing": "no effect",
    "unknown": "not known",
}
SHOWN = 3  # findings of one kind whose measures are put into words
LISTED = 1000  # names that a defect lists; its count is of all
PATTERNS = 50  # of names, which stand for all of them


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of defect.  `effect`: a key of `EFFECTS`; `repaired`: whether a conversion mends it; `seen`: where it was met."""

    severity: str
    effect: str
    title: str
    engines: str
    repaired: bool
    repair: str
    seen: str = ""


_NO = "refused: "
KINDS: Mapping[str, Kind] = {
    # -- what a conversion refuses ------------------------------------------------------------------------------------
    "unsupported-format": Kind(
        "fatal", "unknown", "a number format that is not converted",
        "run it if they have kernels for that format", False, f"{_NO}only FP8, NVFP4, MXFP8, MXFP4 and dense are exact here"),
    "bad-scales": Kind(
        "fatal", "garbage", "scales that no quantisation gives: NaN, infinite, zero or negative",
        "multiply by them: NaN or zeros come out, for some inputs only where an expert is concerned", False,
        f"{_NO}the module was never calibrated, or the file is damaged", "vllm-project/vllm#45212"),
    "shifted-norms": Kind(
        "fatal", "garbage", "norms hold 1 + w where the model adds 1 itself",
        "add 1 again: every layer is scaled wrongly", False, f"{_NO}an MLX repack; take the original",
        "ml-explore/mlx-lm#1623"),
    "scale-missing": Kind(
        "fatal", "garbage", "quantised weights without one of their scales",
        "use what the buffer happens to hold, or a sentinel of -3.4e38", False,
        f"{_NO}no value can be made up", "sgl-project/sglang#34904"),
    "tensor-missing": Kind(
        "fatal", "refuse", "tensors of the model that no file has",
        "stop; transformers initialises them at random with a warning", False, f"{_NO}the checkpoint is incomplete"),
    "stored-twice": Kind(
        "fatal", "garbage", "two tensors for one place in the model",
        "take whichever is read last", False, f"{_NO}which one is stale cannot be told"),
    "shape-misfit": Kind(
        "fatal", "refuse", "tensors whose dtype or shape does not fit the config or their weight",
        "stop with a size mismatch, or cut them to fit", False, f"{_NO}the tensor or the config belongs to another checkpoint"),
    "unknown-tensor": Kind(
        "fatal", "refuse", "tensors that the model has no place for",
        "stop, or skip them without a word", False, f"{_NO}nothing is dropped in silence"),
    "configs-contradict": Kind(
        "fatal", "garbage", "two configs contradict each other where tensors cannot decide",
        "believe the one that they read first", False, f"{_NO}one of the configs must go"),
    "damaged-file": Kind(
        "fatal", "refuse", "files that are damaged or incomplete",
        "stop, or load the part that is there", False, f"{_NO}fetch the file again"),
    "unsupported-model": Kind(
        "fatal", "unknown", "a model or config that this version does not know",
        "may know it", False, f"{_NO}no table says which tensors it must have"),
    # -- names --------------------------------------------------------------------------------------------------------
    "wrapped-names": Kind(
        "high", "garbage", "names keep the wrappers of an adapter (`.base_layer.`, `base_model.model.`)",
        "skip weights or scales that they do not find: a score fell from 0.68 to 0.018", True, "wrappers removed from names",
        "vllm-project/vllm#38520"),
    "foreign-names": Kind(
        "high", "refuse", "names are not those that the model has on the hub",
        "stop at the first unknown name, or initialise anew what they do not find", True, "canonical names",
        "vllm-project/vllm#50355"),
    "names-not-as-stored": Kind(
        "high", "refuse", "the quantisation config calls modules otherwise than the tensors are called",
        "do not find the layer: take packed weights for dense ones, or quantise what is excluded", True,
        "lists and tensors go through one rewrite of names", "vllm-project/vllm#42546"),
    "unknown-names-quantised": Kind(
        "high", "refuse", "the config quantises names that no module has",
        "take the packed weights of these layers for dense ones", True, "each module is listed under its own name",
        "vllm-project/vllm#47215"),
    "unknown-names-excluded": Kind(
        "low", "refuse", "the config excludes names that no module has",
        "apply the exclusion to nothing: harmless, unless another spelling of the name was meant", True,
        "what is quantised is read from the tensors", "sgl-project/sglang#38781"),
    "corrupted-names": Kind(
        "high", "refuse", "names in the quantisation config carry a NUL and a sentinel",
        "match no module by them", True, "names repaired"),
    "stacked-quantised-experts": Kind(
        "high", "garbage", "quantised experts are stacked in one tensor where engines expect them one by one",
        "load the stack and skip its scales", True, "stacked with all scales, one of each expert and projection",
        "vllm-project/vllm#49638"),
    "transposed-experts": Kind(
        "low", "refuse", "stacked experts are stored input-major",
        "transpose them, if they know this model", True, "stored output-major", "huggingface/transformers#43201"),
    # -- scales -------------------------------------------------------------------------------------------------------
    "global-scales-differ": Kind(
        "high", "garbage", "the partitions of fused NVFP4 projections have different global scales",
        "use one of them for all (the largest, the smallest, or the gate's): the others are wrong by the ratio", True,
        "each partition keeps its own", "vllm-project/vllm#47515"),
    "fp8-scales-differ": Kind(
        "medium", "lossy", "the partitions of fused FP8 projections have different scales",
        "requantise all to the largest: 2.5 to 3.8 % is added, as large as the error of FP8 itself", True,
        "each partition keeps its own", "vllm-project/vllm#54974"),
    "one-scale-for-several": Kind(
        "high", "garbage", "one scale stands for several partitions of a fused projection",
        "fill the first slot only, and the maximum picks up what is in the others", True, "given to each partition",
        "vllm-project/vllm#38197"),
    "input-scales-differ": Kind(
        "medium", "lossy", "the partitions of fused projections have different input scales",
        "use the largest (coarser), or the largest divisor (which clips)", True, "each partition keeps its own"),
    "expert-input-scales-differ": Kind(
        "medium", "lossy", "the experts of a layer have different input scales",
        "use the largest of all experts; some stop when gate and up differ", True, "each expert keeps its own"),
    "zero-d-scales": Kind(
        "low", "refuse", "scales are scalars without a dimension",
        "need a special case for each kind of layer, and stop where it is missing", True, "stored as vectors",
        "vllm-project/vllm#37462"),
    "idle-input-scales": Kind(
        "low", "refuse", "input scales that the scheme does not use",
        "drop them if they expect that, or stop at an unknown name", True, "dropped, and listed", "vllm-project/vllm#41769"),
    "weight-only-called-static": Kind(
        "high", "garbage", "weight-only FP8 under the name of the static algorithm",
        "wait for an input scale that never comes, and use its sentinel of -3.4e38", True, "recorded as weight-only",
        "vllm-project/vllm-omni#5262"),
    "scale-direction-suspect": Kind(
        "high", "garbage", "global scales look like the other convention (a divisor where a multiplier belongs)",
        "give byte-identical garbage", False, "converted as the config says: check the producer", "modular/modular#6600"),
    "blocks-cross-partitions": Kind(
        "high", "refuse", "128-row blocks of FP8 scales cross the border between fused projections",
        "stop, or round offsets up and misalign every scale behind", True, "blocks restart at each partition"),
    "pre-quant-scales": Kind(
        "high", "refuse", "modules multiply their input first (NVFP4_AWQ)",
        "do not know the algorithm", True, "carried, and applied by the runtime"),
    "quantised-embedding": Kind(
        "high", "refuse", "the embedding is quantised",
        "have no quantised embedding", True, "carried, and dequantised by row"),
    "mx-from-modelopt": Kind(
        "medium", "refuse", "MXFP4 weights as nvidia-modelopt stores them",
        "refuse them", True, "converted"),
    "mixed-group": Kind(
        "high", "refuse", "projections that engines fuse have different schemes",
        "stop, or apply the scheme of the first to all", True, "kept apart under their own names"),
    # -- what configs say ---------------------------------------------------------------------------------------------
    "quantised-but-excluded": Kind(
        "high", "refuse", "modules are quantised, the config excludes them or does not list them",
        "build a dense layer: no place for the scales, or codes taken for values", True, "the tensors win",
        "vllm-project/vllm#45102"),
    "claimed-but-not-quantised": Kind(
        "high", "refuse", "the config says quantised, the tensors are not",
        "build a quantised layer: a size mismatch, or scales that are never set", True, "the tensors win",
        "vllm-project/vllm#38832"),
    "another-scheme": Kind(
        "high", "refuse", "the config names another scheme than the tensors have",
        "look for scales of the wrong name or shape", True, "the tensors win", "sgl-project/sglang#20375"),
    "group-size-differs": Kind(
        "medium", "refuse", "the config names another group size than the tensors have",
        "expect scales of another shape", True, "the tensors win"),
    "nothing-quantised": Kind(
        "medium", "refuse", "a quantisation config, and no quantised tensor",
        "wait for scales that are nowhere", True, "recorded as not quantised", "NVIDIA/Model-Optimizer#2202"),
    "no-quantisation-config": Kind(
        "high", "garbage", "quantised tensors, and no quantisation config",
        "take codes for values, or stop", True, "schemes are read from the tensors"),
    "separate-head-declared-tied": Kind(
        "high", "garbage", "a head of its own, and a config that ties it to the embedding",
        "ignore the head that was trained", True, "the head is kept"),
    "part-missing": Kind(
        "medium", "refuse", "layers that the config declares and no file has",
        "stop, or draft with weights at random", True, "recorded as absent", "modelscope/ms-swift#9802"),
    "drafts-undeclared": Kind(
        "low", "nothing", "draft layers that the config does not declare",
        "do not use them", True, "carried"),
    "kv-scales-missing": Kind(
        "medium", "lossy", "the config says that the KV cache is FP8, its scales are nowhere",
        "use a scale of 1", True, "no KV quantisation is recorded"),
    "kv-cache-undeclared": Kind(
        "medium", "nothing", "scales of a KV cache that no config mentions",
        "ignore them", True, "carried as FP8"),
    "kv-cache-in-one-config": Kind(
        "medium", "lossy", "one config mentions the KV cache, the other does not",
        "may read the other, and drop the scales", True, "carried as FP8", "sgl-project/sglang#27906"),
    "kv-scales-per-head": Kind(
        "low", "lossy", "KV scales for each head", "some backends take the largest of all heads", True, "carried"),
    "processor-missing": Kind(
        "low", "refuse", "a tower, and no file that says how its input is prepared",
        "serve the model as text only", False, "fetch preprocessor_config.json", "vllm-project/llm-compressor#1305"),
    "adapter-inside": Kind(
        "high", "garbage", "an adapter that is not merged lies among the weights",
        "drop it, and run the base model", True, "written to OUT/adapter as peft loads it", "vllm-project/vllm#41384"),
    "adapter-note": Kind(
        "low", "unknown", "something about an adapter is not as its config says", "do not read adapters here", True,
        "see the contradictions"),
    "label-unknown-to-engines": Kind(
        "medium", "refuse", "a quant_method that engines do not know", "stop", True, "a scheme for each module",
        "sgl-project/sglang#29769"),
    "other-contradiction": Kind(
        "medium", "unknown", "config and files contradict each other", "believe the config", True, "the files win"),
}  # fmt: skip

# A line of `Plan.contradictions` or `Plan.repairs` -> kind; the first that matches.
CONTRADICTIONS: Sequence[tuple[str, str]] = (
    (r"says group size ", "group-size-differs"),
    (r"which needs no input scale, tensors have one$", "idle-input-scales"),
    (r"\(not quantised\), tensors say ", "quantised-but-excluded"),
    (r", tensors are \S+ and not quantised$", "claimed-but-not-quantised"),
    (r", tensors say ", "another-scheme"),
    (r"says KV cache .*, the files have no KV scales", "kv-scales-missing"),
    (r"says KV cache .* does not mention it$", "kv-cache-in-one-config"),
    (r"^no config mentions a KV cache", "kv-cache-undeclared"),
    (r"quantises \d+ names that mean no module", "unknown-names-quantised"),
    (r"^config\.json declares \d+ layers of .* the files have none", "part-missing"),
    (r"^the files have \d+ layers of ", "drafts-undeclared"),
    (r"says tie_word_embeddings", "separate-head-declared-tied"),
    (r"describes a quantisation, no tensor is quantised$", "nothing-quantised"),
    (r"^no quantisation config", "no-quantisation-config"),
    (r"\badapter\b", "adapter-note"),
    (r"", "other-contradiction"),
)
REPAIRS: Sequence[tuple[str, str]] = (
    (r"^corrupted module names", "corrupted-names"),
    (r"excludes \d+ names that mean no module", "unknown-names-excluded"),
    (r"^input-major ", "transposed-experts"),
)
# What a refusal says, as `expected | found | remedy` -> kind; the first that matches.
REFUSALS: Sequence[tuple[str, str]] = (
    (r"1 is added already|these are the axes of MLX", "shifted-norms"),
    (r"^values ", "bad-scales"),
    (r"^(FP8, NVFP4, MX or|plain weights)|^safetensors files|integer formats|quant_algo|^one of modelopt, ",
     "unsupported-format"),
    (r"NVFP4 with groups of 16", "unsupported-format"),
    (r"^(the \w*scale\w*|a [kv]_scale|the static input scale) .*\| no such tensor", "scale-missing"),
    (r"\| no such tensor", "tensor-missing"),
    (r"^(one source for|each tensor once)|\| two: also", "stored-twice"),
    (r"^configs that agree|\| another with other", "configs-contradict"),
    (r"an unknown (one|name)|^no \w+ beside ", "unknown-tensor"),
    (r"damaged|incomplete: fetch|fetch the whole checkpoint|index is stale|in no file", "damaged-file"),
    (r"^(BF16|F16|F32|F8|U8|a tensor of|a float|experts whose)|does not fit|no bias", "shape-misfit"),
    (r"", "unsupported-model"),
)  # fmt: skip


class Finding(NamedTuple):
    """One kind of defect that was found: the names it concerns (modules, tensors, or entries of a config), and its measure."""

    kind: str
    names: Sequence[str]
    found: str
    total: int | None = None  # how many, when that is not the number of names

    def to_json(self) -> dict[str, Any]:
        """The defect as JSON values."""
        kind = KINDS[self.kind]
        return {
            "id": self.kind,
            "severity": kind.severity,
            "effect": kind.effect,
            "title": kind.title,
            "engines": kind.engines,
            "repaired": kind.repaired,
            "repair": kind.repair,
            "seen": kind.seen,
            "count": len(self.names) if self.total is None else self.total,
            "tensors": list(self.names[:LISTED]),
            "patterns": dict(islice(patterns(self.names).items(), PATTERNS)),
            "found": self.found,
        }


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Defects as JSON values, one of each kind, the worst first."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.kind].append(finding)
    merged = [
        Finding(
            kind, [name for f in members for name in f.names], "; ".join(f.found for f in members[:SHOWN] if f.found),
            sum(len(f.names) if f.total is None else f.total for f in members),
        )
        for kind, members in groups.items()
    ]  # fmt: skip
    return [f.to_json() for f in sorted(merged, key=lambda f: SEVERITIES.index(KINDS[f.kind].severity))]


def _kind(table: Sequence[tuple[str, str]], line: str) -> str | None:
    return next((kind for pattern, kind in table if re.search(pattern, line, re.DOTALL)), None)


def refusals(problems: Iterable[Problem]) -> list[Finding]:
    """What a conversion refuses, problems of one kind together."""
    groups: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        kind = _kind(REFUSALS, f"{problem.expected} | {problem.found} | {problem.remedy}")
        groups[kind or "unsupported-model"].append(problem)
    findings = []
    for kind, members in groups.items():
        first = members[0]
        more = f" (and {len(members) - 1} more)" if len(members) > 1 else ""
        found = f"expected {first.expected}, found {first.found or 'nothing'}; {first.remedy}{more}"
        findings.append(Finding(kind, [p.tensor or p.file for p in members], found))
    return findings


# -- what a plan shows --------------------------------------------------------------------------------------------------


def _from_words(plan: Plan) -> Iterator[Finding]:
    """The contradictions and repairs that the planner put into words."""
    for line, modules in plan.disagreements.items():
        yield Finding(_kind(CONTRADICTIONS, line) or "other-contradiction", modules, line, len(modules) or 1)
    for line in plan.repairs:
        kind = _kind(REPAIRS, line)
        if kind is not None:
            counted = re.search(r"\((\d+) (?:tensors|names)\)$|excludes (\d+) names", line)
            names = line.partition(": ")[2].split(", ") if kind == "unknown-names-excluded" else []
            yield Finding(kind, names, line, int(counted[1] or counted[2]) if counted else 1)


def _names(plan: Plan) -> Iterator[Finding]:
    """Names that are neither the hub's nor free of wrappers."""
    family = next(f for f in FAMILIES if f.name == plan.config.family)
    config = plan.source.config
    wrapper = any(isinstance(config.get(key), Mapping) for key in family.text_keys)
    roots = family.hub_roots[0 if wrapper else 1]
    adapters = {info.name for adapter in plan.adapters for _, info in adapter.tensors}
    wrapped, foreign, changes = [], [], []
    for module, tensors in by_module(plan.source.tensors.items()).items():
        names = [info.name for info in tensors.values() if info.name not in adapters]
        segments = module.split(".")
        if names and (segments[0] == PEFT_WRAPPER or not PEFT_SEGMENTS.isdisjoint(segments)):
            wrapped += names
            segments = [s for s in segments if s not in PEFT_SEGMENTS]
            module = ".".join(segments[2:] if segments[0] == PEFT_WRAPPER else segments)
        hub = _hub_spelling(module, family, roots) if names else None
        if hub not in (None, module):
            foreign += names
            changes.append(f"{names[0]}, on the hub {hub}.*")
    if wrapped:
        yield Finding("wrapped-names", wrapped, "")
    if foreign:
        yield Finding("foreign-names", foreign, f"such as {changes[0]}")


def _hub_spelling(module: str, family: Family, roots: Mapping[str, str]) -> str | None:
    canonical = canonical_name(module, family.names)
    return None if canonical is None else hub_name(canonical, roots, family.hub_runs)


def _lists(plan: Plan) -> Iterator[Finding]:
    """Entries of quantisation configs that mean modules, under names that no tensor has."""
    family = next(f for f in FAMILIES if f.name == plan.config.family)
    rewrite = CanonicalNames(family.names)
    stored, canonical = set(), {step.name.rpartition(".")[0] for step in plan.steps}
    for name in by_module(plan.source.tensors.items()):
        if not PEFT_SEGMENTS.isdisjoint(name.split(".")):
            name = ".".join(s for s in name.split(".") if s not in PEFT_SEGMENTS)
        while name and name not in stored:
            stored.add(name)
            canonical.add(rewrite(name) or name)
            name = name.rpartition(".")[0]
    strange = []
    ordered = sorted(stored)
    for config in find_configs(plan.source.config, plan.source.quant_file):
        rules = config.read(family.names)
        for written, meant in {**rules.listed, **rules.ignored.written}.items():
            if repair_sentinel(written) not in stored and meant in canonical:
                strange.append(written)
        for written, meant in rules.ignored.starred.items():
            head = repair_sentinel(written).partition("*")[0]
            at = bisect_left(ordered, head)
            if not (at < len(ordered) and ordered[at].startswith(head)) and meant.rstrip(".") in canonical:
                strange.append(written)
    if strange:
        yield Finding("names-not-as-stored", list(dict.fromkeys(strange)), "")


def _stored(plan: Plan, modules: Iterable[str], role: str) -> list[str]:
    """The stored tensors that a role of canonical modules is made of."""
    wanted = {f"{module}.{role}" for module in modules}
    return [name for step in plan.steps if step.name in wanted for name in dict.fromkeys(t.source for t in step.terms)]


def _shapes(plan: Plan) -> Iterator[Finding]:
    """Scalars without a dimension, scales that stand for several partitions, stacks."""
    tensors = plan.source.tensors
    scales = [(step, step.name.rpartition(".")) for step in plan.steps if step.name.endswith(("_scale", "_scale_2"))]
    zero_d = {t.source for step, _ in scales for t in step.terms if tensors[t.source].shape == ()}
    if zero_d:
        yield Finding("zero-d-scales", sorted(zero_d), "shape []")
    shared = [t.source for step, (_, _, role) in scales if role[0] not in "kv" for t in step.terms if t.repeat > 1]
    if shared:
        yield Finding("one-scale-for-several", shared, "")
    family = next(f for f in FAMILIES if f.name == plan.config.family)
    items = [item for part in family.parts for group in (part.layers or {}).values() for item in group]
    by_projection = {i.name.rpartition(".")[2] for i in items if isinstance(i, Linear) and i.export == "projection"}
    stacked = []
    for step in plan.steps:
        module, _, role = step.name.rpartition(".")
        spec = plan.config.modules.get(module)
        if role == "weight" and spec is not None and spec.experts and module.rpartition(".")[2] not in by_projection:
            stacked += [n for n in dict.fromkeys(t.source for t in step.terms) if len(tensors[n].shape) == 3]
    if stacked:
        yield Finding("stacked-quantised-experts", stacked, "")


def _modules(plan: Plan) -> Iterator[Finding]:
    """What the schemes of modules mean to engines, whatever the config says."""
    modules = plan.config.modules
    family = next(f for f in FAMILIES if f.name == plan.config.family)
    tables = {i.name for p in family.parts for i in (*p.first, *p.last) if isinstance(i, Linear) and not i.linear}
    rules: tuple[tuple[str, Callable[[str], bool], str, str], ...] = (
        ("weight-only-called-static", lambda m: plan.dialect == "modelopt" and modules[m].scheme == "fp8_tensor"
         and modules[m].activations is None, "weight", "no input scale beside FP8 weights"),
        ("mx-from-modelopt", lambda m: plan.dialect == "modelopt" and modules[m].scheme == "mxfp4", "weight", "mxfp4"),
        ("pre-quant-scales", lambda m: modules[m].pre_quant_scale, "pre_quant_scale", "pre_quant_scale beside the weights"),
        ("quantised-embedding", lambda m: m.rpartition(".")[2] in tables, "weight", "scales beside the embedding"),
        ("blocks-cross-partitions", lambda m: modules[m].scheme == "fp8_block"
         and any(rows % FP8_BLOCK for _, rows in modules[m].partitions[:-1]), "weight_scale", "rows no multiple of 128"),
    )  # fmt: skip
    for kind, holds, role, found in rules:
        concerned = [m for m in modules if holds(m)]
        if concerned:
            yield Finding(kind, _stored(plan, concerned, role), found)
    if plan.config.unfused:
        names = [f"{fused.rpartition('.')[0]}.{part}" for fused, parts in plan.config.unfused.items() for part in parts]
        yield Finding("mixed-group", names, f"{len(plan.config.unfused)} groups, such as {next(iter(plan.config.unfused))}")
    per_head = [f"{module}.{c}_scale" for module, kind in plan.config.kv_cache.items() if kind == "head" for c in "kv"]
    if per_head:
        yield Finding("kv-scales-per-head", per_head, f"in {len(per_head) // 2} layers")
    for adapter in plan.adapters:
        names = [info.name for _, info in adapter.tensors]
        yield Finding("adapter-inside", names, f"adapter {adapter.name}, r {adapter.config.get('r')}")
    towers = {part.root for part in family.parts if part.carried and not part.drafts}.intersection(plan.config.carried)
    if towers and PROCESSORS.isdisjoint(plan.source.side_files):
        yield Finding("processor-missing", sorted(towers), f"none of {', '.join(sorted(PROCESSORS))}")
    block = plan.source.config.get("quantization_config")
    if isinstance(block, Mapping) and block.get("quant_method") in LABELS_UNKNOWN:
        yield Finding("label-unknown-to-engines", ["quantization_config.quant_method"], str(block["quant_method"]))


LABELS_UNKNOWN = frozenset({"modelopt_mixed"})
PROCESSORS = frozenset({"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"})

DETECTORS: Sequence[Callable[[Plan], Iterator[Finding]]] = (_from_words, _names, _lists, _shapes, _modules)


def from_plan(plan: Plan) -> list[Finding]:
    """Everything that headers and configs show about a checkpoint that can be converted."""
    return [finding for detect in DETECTORS for finding in detect(plan)]

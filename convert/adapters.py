"""LoRA adapters inside a checkpoint: recognised by name, and written beside the base in the form that peft loads.

`peft` wraps modules.  A state dict of the wrapped model holds the base weights (`q_proj.base_layer.weight`), the adapter
(`q_proj.lora_A.default.weight`), and for modules that were trained whole the old and the new weights
(`lm_head.original_module.weight`, `lm_head.modules_to_save.default.weight`).  OUT is the base model, as it would be without
the wrapper: it has the *original* modules.  OUT/adapter is the adapter, trained modules included, byte for byte.  So
`PeftModel.from_pretrained(<exported OUT>, OUT/adapter)` is the wrapped model, and no tensor is lost.  Adapters are never
merged: that would round, and requantise a quantised base.

With one adapter the files lie in OUT/adapter, with several in OUT/adapter/<name>.

**Fused experts.**  peft wraps each parameter of `experts` on its own, one wrapper around the other, and no name says which
parameter a wrapper belongs to.  Measured with peft 0.21.2 and transformers 5.23 (Qwen3-MoE, Qwen3.5-MoE): whatever the order
of `target_parameters`, the parameter that the module registers first is wrapped first, so innermost:

    experts.base_layer.base_layer.gate_up_proj   [E, 2I, H]   the base weights
    experts.base_layer.lora_A.default.weight     [E * r, H]   inner: gate_up_proj    lora_B [2I, r * E]
    experts.lora_A.default.weight                [E * r, I]   outer: down_proj       lora_B [H, r * E]

When only one parameter is adapted there is one wrapper, `experts.lora_A...`, for either of them.  So the shapes decide, and
the files get the nesting of the first rule.

**What the configuration says and what the tensors say.**  `r`, `target_modules`, `target_parameters`, `modules_to_save` and
`use_dora` follow from the tensors, which win.  `lora_alpha` does not: without the training's `adapter_config.json` (in the
checkpoint, or in its folder `<name>`) it is written as `lora_alpha = r`, a scale of 1, and the report says so.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from runtime.format import DTYPE_BYTES

from .errors import Problem
from .families.base import Family, Placed, hub_name, text_config
from .names import PEFT_LAYER, Aliases, canonical_name
from .source import ADAPTER_CONFIG, Source, TensorInfo

DIRECTORY = "adapter"  # below OUT
PEFT_PREFIX = "base_model.model."
SAVED = "modules_to_save"
# Segment after the adapted module -> what follows it in the adapter's own file, where that is not the same as in the model.
PARTS: Mapping[str, str | None] = {
    "lora_A": None,
    "lora_B": None,
    "lora_embedding_A": None,
    "lora_embedding_B": None,
    "lora_magnitude_vector": "",  # peft keeps the file format from before it became a module: no `.weight`
    SAVED: None,
}
MARKS = frozenset(PARTS)
# A and B of one low-rank pair.
PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
# Modules that hold their weight as a bare parameter in transformers 5 (routers), so that peft must target the parameter.
BARE_PARAMETERS = frozenset({"gate", "router"})
# What only made sense while training, or would be applied a second time when the adapter is loaded: PiSSA, OLoRA, LoftQ, ...
# change the base weights when an adapter is created, and the base of this checkpoint has been changed already.
RESET: Mapping[str, Any] = {
    "bias": "none",  # trained biases are in the base
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "trainable_token_indices": None,
}
EXPORT_AGAIN = "save the wrapped model again, or merge the adapter first (peft: merge_and_unload)"


@dataclass(frozen=True, slots=True)
class Wrapped:
    """The name of an adapter's tensor, taken apart.

    path     the adapted module, with its prefix and without `base_layer`
    depth    how many `base_layer` stood at the end of it: how deep the wrapper is nested
    part     `lora_A`, ..., or `modules_to_save`
    adapter  the adapter's name
    rest     what follows: "weight", "bias", "", or a name below a module that was saved whole
    """

    path: str
    depth: int
    part: str
    adapter: str
    rest: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter to be written: its folder below OUT, its config, and (name in the file, source tensor) pairs."""

    name: str
    directory: str
    config: Mapping[str, Any]
    tensors: tuple[tuple[str, TensorInfo], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(info.end - info.start for _, info in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The adapter as JSON values."""
        return {
            "name": self.name,
            "directory": self.directory,
            "tensors": {name: info.name for name, info in self.tensors},
            "bytes": self.nbytes,
            "config": dict(self.config),
        }


def take_apart(name: str) -> Wrapped | None:
    """The parts of the name of an adapter's tensor, or None for a tensor of the base.

    A name without the adapter's own (`lora_A.weight`, as adapter files have it) belongs to the adapter "default".
    """
    segments = name.split(".")
    at = next((i for i, segment in enumerate(segments) if segment in MARKS), None)
    if at is None:
        return None
    path, after = segments[:at], segments[at + 1 :]
    depth = 0
    while path and path[-1] == PEFT_LAYER:
        path.pop()
        depth += 1
    named = len(after) > 1 or (len(after) == 1 and after[0] not in ("weight", "bias"))
    adapter, rest = (after[0], after[1:]) if named else ("default", after)
    return Wrapped(".".join(s for s in path if s != PEFT_LAYER), depth, segments[at], adapter, ".".join(rest))


def without_marks(name: str) -> str:
    """The name that a tensor has in the unwrapped model: `lm_head.modules_to_save.default.weight` is `lm_head.weight`."""
    wrapped = take_apart(name)
    return name if wrapped is None else f"{wrapped.path}.{wrapped.rest}"


def find_adapters(names: Iterable[str]) -> dict[str, Wrapped]:
    """The tensors among `names` that belong to adapters."""
    found = ((name, take_apart(name)) for name in names)
    return {name: wrapped for name, wrapped in found if wrapped is not None}


def stand_ins(adapters: Mapping[str, Wrapped], base: Container[str], family: Family, tied: bool) -> list[str]:
    """Saved modules whose originals are not in the checkpoint: the only weights that the base can have.

    base  canonical names of all other tensors
    tied  the head has no weights of its own, so a saved one is not a stand-in
    """
    count = len({w.adapter for w in adapters.values()})
    result = []
    for name, wrapped in adapters.items():
        canonical = canonical_name(without_marks(name), family.names)
        missing = canonical is not None and canonical not in base and not (tied and canonical == "lm_head.weight")
        if wrapped.part == SAVED and count == 1 and missing:
            result.append(name)
    return result


# -- from tensors to adapters ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Module:
    """One wrapper: hub path of what it adapts, its depth in the file, its rank."""

    path: str
    depth: int
    rank: int
    parameter: str = ""  # last segment of the target parameter; "" for a module


@dataclass(slots=True)
class _Build:
    """Builds the adapters of one checkpoint; `build_adapters` is the only user."""

    source: Source
    family: Family
    roots: Mapping[str, str]
    runs: Aliases
    stacks: Mapping[str, Sequence[Placed]]
    known: frozenset[str]  # paths of everything that the base has, as transformers' modules
    fused: frozenset[str]  # those that only exist in OUT or in an engine, not in the model that peft wraps
    problems: list[Problem]
    notes: list[str]

    def hub(self, wrapped: Wrapped) -> str | None:
        canonical = canonical_name(wrapped.path, self.family.names)
        return hub_name(canonical, self.roots, self.runs) if canonical is not None else None

    @staticmethod
    def root_as_stored(wrapped: Wrapped, path: str) -> str:
        """The hub path of a saved module, with the first segment that it was saved under.

        transformers 5 renames `backbone.` to `model.` as it loads; peft 0.21 does so for LoRA tensors, not for saved modules.
        """
        stored = wrapped.path.removeprefix(PEFT_PREFIX)
        return stored if stored.partition(".")[2] == path.partition(".")[2] else path

    def wrong(self, info: TensorInfo, expected: str, found: str, remedy: str = EXPORT_AGAIN) -> None:
        self.problems.append(Problem(info.file, info.name, expected, found, remedy))

    def adapter(self, name: str, tensors: Sequence[tuple[Wrapped, TensorInfo]], directory: str, alone: bool) -> Adapter:
        """One adapter from its tensors."""
        if not all(c.isalnum() or c in "-_ " for c in name) or len(name) > 100:
            self.wrong(tensors[0][1], "an adapter named with letters, digits, - and _", repr(name), "rename the adapter")
        if all(wrapped.part == SAVED for wrapped, _ in tensors):
            self.wrong(tensors[0][1], f"lora_A and lora_B of adapter {name} beside its saved modules", "no such tensors")
        pairs: dict[tuple[str, int], dict[str, TensorInfo]] = defaultdict(dict)
        plain: list[tuple[Wrapped, TensorInfo, str]] = []
        for wrapped, info in tensors:
            path = self.hub(wrapped)
            nameless = wrapped.part == SAVED and not wrapped.rest
            if path is None or nameless or (path not in self.known and wrapped.path.rpartition(".")[2] != "lm_head"):
                self.wrong(info, f"an adapter of a module of {self.family.name}", "one of an unknown module",
                           "remove it, or convert with a version that knows it")  # fmt: skip
                continue
            if path in self.fused:
                self.wrong(info, "adapters of the model's own modules", "one of a fused module, as an engine has it")
                continue
            plain.append((wrapped, info, path))
            if wrapped.part != SAVED:
                pairs[path, wrapped.depth][f"{wrapped.part}.bias" if wrapped.rest == "bias" else wrapped.part] = info
        modules: dict[tuple[str, int], _Module] = {}
        for path in dict.fromkeys(p for p, _ in pairs):
            inner_first = sorted((d for p, d in pairs if p == path), reverse=True)
            wrappers = [(depth, pairs[path, depth]) for depth in inner_first]
            modules.update(self.experts(path, wrappers, name) if path in self.stacks else self.plain(path, wrappers))
        named: dict[str, TensorInfo] = {}
        for wrapped, info, path in plain:
            if wrapped.part == SAVED:
                new = f"{PEFT_PREFIX}{self.root_as_stored(wrapped, path)}.{wrapped.rest}"
            elif (path, wrapped.depth) in modules:
                layers = f".{PEFT_LAYER}" * modules[path, wrapped.depth].depth
                rest = wrapped.rest if PARTS[wrapped.part] is None else PARTS[wrapped.part]
                new = f"{PEFT_PREFIX}{path}{layers}.{wrapped.part}" + (f".{rest}" if rest else "")
            else:
                continue
            twin = named.setdefault(new, info)
            if twin is not info:
                found = f"two: also {twin.name} in {twin.file}"
                self.wrong(info, f"one source for {new} of adapter {name}", found, "remove the one that is stale")
        saved = {path for wrapped, _, path in plain if wrapped.part == SAVED}
        parts = {(w.part, w.rest) for w, _, _ in plain}
        config = self.config(name, list(modules.values()), saved, parts, alone)
        # Wider elements first, so that each tensor is aligned to its element size.
        ordered = sorted(named.items(), key=lambda item: (-DTYPE_BYTES[item[1].dtype], item[0]))
        return Adapter(name, directory, config, tuple(ordered))

    def rank(self, path: str, found: Mapping[str, TensorInfo]) -> int | None:
        """Rows of A, which B must have as columns; None when there is a problem."""
        for a, b in PAIRS:
            first, second = found.get(a), found.get(b)
            if first is None and second is None:
                continue
            if first is None or second is None:
                there = first or second
                assert there is not None
                self.wrong(there, f"{a} and {b} of {path}", "only one of them", "fetch or save the checkpoint again")
                return None
            if len(first.shape) < 2 or len(second.shape) < 2 or first.shape[0] != second.shape[1] or not first.shape[0]:
                self.wrong(first, f"{a} [r, in] and {b} [out, r]", f"{list(first.shape)} and {list(second.shape)}")
                return None
            return first.shape[0]
        there = next(iter(found.values()))
        self.wrong(there, f"lora_A and lora_B of {path}", "neither of them", "fetch or save the checkpoint again")
        return None

    def plain(self, path: str, wrappers: Sequence[tuple[int, Mapping[str, TensorInfo]]]) -> dict[tuple[str, int], _Module]:
        """A module of its own, wrapped once."""
        (depth, found), rank = wrappers[0], self.rank(path, wrappers[0][1])
        if len(wrappers) > 1:
            self.wrong(next(iter(found.values())), f"one adapter of {path}", f"{len(wrappers)}, one inside the other")
        if rank is None:
            return {}
        parameter = "weight" if path.rpartition(".")[2] in BARE_PARAMETERS else ""
        return {(path, depth): _Module(path, 0, rank, parameter)}

    def experts(
        self, path: str, wrappers: Sequence[tuple[int, Mapping[str, TensorInfo]]], name: str
    ) -> dict[tuple[str, int], _Module]:
        """The wrappers around stacked experts: which is of which parameter, by shape.  Innermost first."""
        stacks = self.stacks[path]
        ranks = [self.rank(path, found) for _, found in wrappers]
        if None in ranks:
            return {}
        for _, found in wrappers:
            if "lora_A" not in found:
                self.wrong(next(iter(found.values())), f"lora_A and lora_B of {path}", "an adapter of an embedding")
                return {}

        def fits(stack: Placed, found: Mapping[str, TensorInfo]) -> bool:
            rows = sum(r or 0 for _, partitions in stack.shards for _, r in partitions)
            a, b = found.get("lora_A"), found.get("lora_B")
            many = bool(a and stack.experts and a.shape[0] % stack.experts == 0)
            return many and a is not None and b is not None and (b.shape[0], a.shape[1]) == (rows, stack.columns)

        def last(stack: Placed) -> str:
            return stack.name.rpartition(".")[2]

        orders = [o for o in permutations(stacks, len(wrappers)) if all(fits(s, w) for s, (_, w) in zip(o, wrappers))]
        if len(orders) > 1 and len(wrappers) < len(stacks):  # square: only the training's own config knows
            stated = self.settings(name, True)[1].get("target_parameters")
            wanted = {str(t).rpartition(".")[2] for t in stated} if isinstance(stated, list) else set()
            orders = [o for o in orders if {last(s) for s in o} == wanted]
        if not orders:
            odd = next((w for _, w in wrappers if not any(fits(s, w) for s in stacks)), wrappers[0][1])
            a, b = odd["lora_A"], odd["lora_B"]
            shapes = ", ".join(f"{last(s)} [{sum(r or 0 for _, p in s.shards for _, r in p)}, {s.columns}]" for s in stacks)
            sizes = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
            self.wrong(a, f"adapters of {stacks[0].experts} experts, {shapes}, as peft 0.21 stores them", sizes)
            return {}
        # peft nests them in the order of the model, the first innermost.
        chosen = dict(zip((last(s) for s in orders[0]), zip(wrappers, ranks)))
        ordered = [last(s) for s in stacks if last(s) in chosen]
        result = {}
        for depth, parameter in zip(reversed(range(len(ordered))), ordered):
            (stored, _), rank = chosen[parameter]
            result[path, stored] = _Module(path, depth, (rank or 0) // (stacks[0].experts or 1), parameter)
        return result

    def settings(self, name: str, alone: bool) -> tuple[str, Mapping[str, Any]]:
        """File and content of the training's config of an adapter; empty when there is none."""
        configs = self.source.adapter_configs
        if name in configs:
            return f"{name}/{ADAPTER_CONFIG}", configs[name]
        return (ADAPTER_CONFIG, configs[""]) if "" in configs and (alone or name == "default") else ("", {})

    def config(
        self, name: str, modules: Sequence[_Module], saved: set[str], parts: Collection[tuple[str, str]], alone: bool
    ) -> dict[str, Any]:
        """The adapter's `adapter_config.json`: what the training's says, where the tensors do not know better."""
        file, given = self.settings(name, alone)
        if given.get("peft_type") not in (None, "LORA"):
            remedy = "only LoRA adapters are carried: merge the adapter first (peft: merge_and_unload)"
            self.problems.append(Problem(file, "peft_type", "LORA", str(given["peft_type"]), remedy))
        ranks = {(f"{m.path}.{m.parameter}" if m.parameter else m.path): m.rank for m in modules}
        counts = Counter(ranks.values())
        r = given.get("r")
        if not isinstance(r, int) or r not in counts:
            common = counts.most_common(1)[0][0] if counts else 1
            if r is not None and counts:
                self.notes.append(f"{file} says r = {r}, the tensors of adapter {name} have rank {common}: they win")
            r = common
        rank_pattern = {}
        for other in sorted(counts.keys() - {r}):
            of_this_rank = [key for key, rank in ranks.items() if rank == other]
            rank_pattern.update({re.escape(s): other for s in self.suffixes(of_this_rank, ranks).values()})
        alpha = given.get("lora_alpha")
        alpha_pattern: Mapping[str, Any] = {}
        if isinstance(alpha, (int, float)) and not isinstance(alpha, bool):
            stated = given.get("alpha_pattern")
            alpha_pattern = {self.pattern(k): v for k, v in stated.items()} if isinstance(stated, Mapping) else {}
        else:
            alpha, alpha_pattern = r, rank_pattern
            why = f"{file} does not say it" if file else f"no {ADAPTER_CONFIG}"
            self.notes.append(
                f"lora_alpha of adapter {name} is not known ({why}): written as lora_alpha = r = {r}, a scale of 1: "
                f"correct the adapter's {ADAPTER_CONFIG} if it was trained with another"
            )
        targets = [key for key, m in zip(ranks, modules) if not m.parameter]
        parameters = [key for key, m in zip(ranks, modules) if m.parameter]
        singly = any(s.isdecimal() and f"{key.partition(f'.{s}.')[0]}" in self.stacks
                     for key in targets for s in key.split("."))  # fmt: skip
        if singly and not self.family.fuses_adapters:
            self.notes.append(
                f"adapter {name} is of single experts, which transformers 5 has stacked: peft 0.21 loads it without them; it "
                "fits a model whose experts are modules"
            )
        return {
            "base_model_name_or_path": None,
            "task_type": None,
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            "use_rslora": False,
            **given,
            **RESET,
            # peft refuses dropout beside target parameters, into which it also turns adapters of experts stored singly.
            **({"lora_dropout": 0.0} if parameters or singly else {}),
            "peft_type": "LORA",
            "r": r,
            "rank_pattern": rank_pattern,
            "lora_alpha": alpha,
            "alpha_pattern": dict(alpha_pattern),
            "lora_bias": ("lora_B", "bias") in parts,
            "use_dora": any(part == "lora_magnitude_vector" for part, _ in parts),
            "target_modules": sorted(set(self.suffixes(targets, self.known).values())),
            "target_parameters": sorted(set(self.suffixes(parameters, self.parameter_names(), least=2).values())) or None,
            "modules_to_save": sorted(set(self.suffixes(saved, self.known, parts_of_segments=True).values())) or None,
        }

    def pattern(self, key: str) -> str:
        """A key of `alpha_pattern` under hub names; a regular expression or the end of a name stays as it is."""
        plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        canonical = canonical_name(plain.removeprefix(PEFT_PREFIX), self.family.names)
        return key if canonical is None else re.escape(hub_name(canonical, self.roots, self.runs))

    def parameter_names(self) -> frozenset[str]:
        """Every parameter that a target could mean."""
        stacked = {f"{path}.{s.name.rpartition('.')[2]}" for path, stacks in self.stacks.items() for s in stacks}
        return frozenset(stacked | {f"{path}.weight" for path in self.known})

    @staticmethod
    def suffixes(
        wanted: Collection[str], known: Iterable[str], *, least: int = 1, parts_of_segments: bool = False
    ) -> dict[str, str]:
        """Each wanted name -> the shortest run of its last segments, `least` of them, that no unwanted name ends with.

        This is how peft reads lists of targets: whole segments; but it reads `modules_to_save` by `parts_of_segments`, where
        "norm" also means `q_norm`.
        """
        chosen = set(wanted)
        if not chosen:
            return {}
        taken: dict[str, set[str]] = defaultdict(set)  # what follows a segment -> the segments before it, of unwanted names
        for name in known:
            if name not in chosen:
                tail = ""
                for segment in reversed(name.split(".")):
                    taken[tail].add(segment)
                    tail = f".{segment}{tail}"

        def free(segment: str, tail: str) -> bool:
            before = taken.get(tail, ())
            return segment not in before and not (parts_of_segments and any(s.endswith(segment) for s in before))

        result = {}
        for name in wanted:
            tail = ""
            for count, segment in enumerate(reversed(name.split(".")), 1):
                found = count >= least and free(segment, tail)
                tail = f".{segment}{tail}"
                if found:
                    break
            result[name] = tail[1:]
        return result


def build_adapters(
    found: Mapping[str, Wrapped], source: Source, family: Family, placed: Sequence[Placed], base: Iterable[str]
) -> tuple[list[Adapter], list[Problem], list[str]]:
    """The adapters of a checkpoint, the problems that they have, and what must be said about them.

    found   the adapters' tensors, by `find_adapters`
    placed  every module and parameter of the model
    base    canonical names of the base's tensors
    """
    if not found:
        return [], [], []
    wrapper = text_config(family, source.config) is not source.config
    roots, runs = (family.modules if wrapper else None) or (family.hub_roots[0 if wrapper else 1], {})

    def module_name(name: str) -> str:
        return hub_name(name, roots, runs)

    stacks: dict[str, list[Placed]] = defaultdict(list)
    known: set[str] = set()
    for place in placed:
        if place.experts is not None:
            stacks[module_name(place.parent)].append(place)
    fused: set[str] = set()
    for place in placed:
        names = {place.name, *(shard for shard, _ in place.shards)}
        fused |= {module_name(n) for n in names} if place.experts is not None else set()
        fused |= {module_name(place.name)} if len(place.shards) > 1 else set()
    single = [shard for p in placed if p.experts is None for shard, _ in p.shards]
    for path in (*(module_name(n).rpartition(".")[0] for n in base), *(module_name(s) for s in single)):
        while path and path not in known:
            known.add(path)
            path = path.rpartition(".")[0]
    problems: list[Problem] = []
    notes: list[str] = []
    build = _Build(source, family, roots, runs, stacks, frozenset(known), frozenset(fused), problems, notes)
    groups: dict[str, list[tuple[Wrapped, TensorInfo]]] = defaultdict(list)
    for name, wrapped in found.items():
        groups[wrapped.adapter].append((wrapped, source.tensors[name]))
    alone = len(groups) == 1
    adapters = [
        build.adapter(name, tensors, DIRECTORY if alone else f"{DIRECTORY}/{name}", alone) for name, tensors in groups.items()
    ]
    return adapters, problems, notes

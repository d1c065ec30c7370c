"""The planner: headers and configs in, a `Plan` out.  A pure function of the source: no tensor data, no files written.

The way of a name: `names.canonical_name` gives every stored tensor its canonical path; the family's tables say which modules
that path must lead to; `recognise` tells each module's scheme; and a canonical tensor is written down as terms over its
sources.  Every stored tensor is used once or dropped for a stated reason; what is left over is an error.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from runtime.format import (
    DENSE_DTYPES,
    DTYPE_BYTES,
    FP8_BLOCK,
    CanonicalConfig,
    ModuleSpec,
    ceil_div,
    module_tensors,
)

from .adapters import Wrapped, build_adapters, find_adapters, stand_ins, without_marks
from .collector import collector_paused
from .describe import name_repairs, value_repairs
from .dialects import DIALECTS, find_configs, refused
from .dialects.base import DENSE, SCALAR, Encoding, Module, Rules, regexes_limited
from .errors import ORIGINAL, ConvertError, Problem
from .families import detect_family
from .families.base import (
    Family,
    Linear,
    Parameter,
    Part,
    Placed,
    carried_prefixes,
    count_layers,
    expand,
    hub_name,
    joined_names,
    look_up,
    open_items,
    present_layers,
    resolve_architecture,
    text_config,
)
from .lists import Inventory, idle_entries
from .names import CanonicalNames
from .ops import Step, Term, coalesce, term_nbytes
from .plan import Dropped, Plan
from .recognise import INCOMPLETE, Recognised, Settled, Stack, disagreements, encodings_for, recognise, settle, sibling
from .source import MAX_LAYERS, Source, TensorInfo, read_source
from .spelling import Spelling

DEFAULT_SHARD_SIZE = 5_000_000_000
QUANT_KEYS = ("quantization_config", "compression_config", "quantization")

# Which check of `ops.CHECKS` the values of a role go through, by scheme.
CHECK_OF: Mapping[tuple[str, str], str] = {
    ("fp8_tensor", "weight"): "fp8_codes",
    ("fp8_channel", "weight"): "fp8_codes",
    ("fp8_block", "weight"): "fp8_codes",
    ("mxfp8", "weight"): "fp8_codes",
    ("fp8_tensor", "weight_scale"): "scale",
    ("fp8_channel", "weight_scale"): "scale",
    ("fp8_block", "weight_scale"): "block_scale",
    ("nvfp4", "weight_scale"): "e4m3_scale",
    ("nvfp4", "weight_scale_2"): "scale",
    ("mxfp8", "weight_scale"): "e8m0_scale",
    ("mxfp4", "weight_scale"): "e8m0_scale",
}
CHECK_OF_ROLE: Mapping[str, str] = {"input_scale": "scale", "pre_quant_scale": "scale"}

CHANNELS_LAST = f"these are the axes of MLX, whose repacks also change norms: {ORIGINAL}"

Shards = tuple[str, tuple[tuple[str, int | None], ...]]  # name of a stored projection, its partitions
SUFFIXES = frozenset(t.suffix for d in DIALECTS for e in d.encodings for t in e.tensors)

# How KV-cache scales are spelt, relative to the attention module -> the canonical scales that the tensor stands for.
KV_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "k_proj.k_scale": ("k_scale",),
    "v_proj.v_scale": ("v_scale",),
    "qkv_proj.k_scale": ("k_scale",),
    "qkv_proj.v_scale": ("v_scale",),
    "attn.k_scale": ("k_scale",),
    "attn.v_scale": ("v_scale",),
    "k_scale": ("k_scale",),
    "v_scale": ("v_scale",),
    "k_proj.output_scale": ("k_scale",),
    "v_proj.output_scale": ("v_scale",),
    "kv_scale": ("k_scale", "v_scale"),  # AutoFP8: one for both
}


@dataclass(slots=True)
class _Stored:
    """One stored projection, recognised and settled."""

    name: str
    partitions: tuple[tuple[str, int], ...]
    found: Recognised
    settled: Settled
    bias: TensorInfo | None = None
    expert: int | None = None  # which expert of a stored stack this is
    transposed: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """What projections must have in common to be stored as one."""
        return (
            self.found.scheme,
            self.settled.activations or "",
            self.bias.dtype if self.bias is not None else "",
            self.found.tensors["weight"][0].dtype if self.found.scheme == DENSE else "",
        )

    @property
    def own_input(self) -> bool:
        """Whether it multiplies its input by factors of its own."""
        return "pre_quant_scale" in self.found.tensors

    def term(self, role: str, partitions: int) -> Term:
        """The term that this projection contributes to the canonical tensor of a role."""
        info, stored = self.found.tensors[role]
        transform = stored.transform
        if self.expert is None and partitions == 1:
            return Term(info.name, transform)
        if self.expert is not None and _numel(info) > 1:
            rows = (self.expert, self.expert + 1)
            if self.transposed and len(info.shape) == 3:
                transform = "transpose" if transform == "copy" else f"transpose_{transform}"
            repeat = partitions if SCALAR[0] in stored.shapes and _numel(info) == info.shape[0] else 1
            return Term(info.name, transform, repeat, rows)
        scalar = SCALAR[0] in stored.shapes and _numel(info) == 1
        return Term(info.name, transform, partitions if scalar else 1)


@dataclass(slots=True)
class _Planner:
    """State of one planning run; `plan_source` is the only user."""

    source: Source
    family: Family
    rules: list[Rules]
    architecture: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    modules: dict[str, ModuleSpec] = field(default_factory=dict)
    unfused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kv_cache: dict[str, str] = field(default_factory=dict)
    by_name: dict[str, TensorInfo] = field(default_factory=dict)
    by_module: dict[str, dict[str, TensorInfo]] = field(default_factory=lambda: defaultdict(dict))
    repairs: list[str] = field(default_factory=list)
    disagreements: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    optional_scales: list[tuple[str, str, _Stored]] = field(default_factory=list)
    joined: dict[str, tuple[str, str]] = field(default_factory=dict)
    encodings: list[Encoding] = field(default_factory=list)
    orientations: dict[str, bool] = field(default_factory=dict)
    recognised: dict[Any, Recognised] = field(default_factory=dict)
    files_near: dict[str, str] = field(default_factory=dict)
    spelling_of_root: dict[str, str] = field(default_factory=dict)
    spelling: Spelling | None = None
    wrapped: dict[str, Wrapped] = field(default_factory=dict)

    # -- names ------------------------------------------------------------------------------------------------------

    def index_names(self) -> None:
        """Give each stored tensor its canonical name; two that meet in one name are refused."""
        self.wrapped = find_adapters(self.source.tensors)
        base = [info for info in self.source.tensors.values() if info.name not in self.wrapped]
        self.index_tensors((info.name, info) for info in base)
        copies = stand_ins(self.wrapped, self.by_name, self.family, self.architecture["head"] == "tied")
        for copy in copies:
            del self.wrapped[copy]
            self.repairs.append(f"{copy} is the base's: the module it was copied from is not in the files")
        self.index_tensors((without_marks(copy), self.source.tensors[copy]) for copy in copies)

    def index_tensors(self, tensors: Iterable[tuple[str, TensorInfo]]) -> None:
        """Index stored tensors under the names that they have without adapters."""
        roots = ", ".join(self.family.names.roots)
        canonical_name = CanonicalNames(self.family.names)
        for stored, info in tensors:
            name = canonical_name(stored)
            if name is None:
                expected = f"a tensor of {self.family.name} (below {roots})"
                self.problem(info, expected, "an unknown name", "remove it, or convert with a version that knows it")
                continue
            module, _, suffix = name.rpartition(".")
            if suffix in self.joined and module.endswith(".experts"):
                last, suffix = self.joined[suffix]
                module = f"{module}.{last}"
                name = f"{module}.{suffix}"
            twin = self.by_name.setdefault(name, info)
            if twin is not info:
                found = f"two: also {twin.name} in {twin.file}"
                self.problem(info, f"one source for {name}", found, "remove the one that is stale")
                continue
            self.by_module[module][suffix] = info

    def problem(self, info: TensorInfo, expected: str, found: str, remedy: str) -> None:
        """Note one problem with a stored tensor."""
        self.problems.append(Problem(info.file, info.name, expected, found, remedy))

    def missing(self, name: str, expected: str, beside: Iterable[str] = ()) -> None:
        """Note a tensor that the architecture needs and no file has, under the name the checkpoint would use for it."""
        spelt = (self.spelling or self.spell()).of(name, beside)
        self.problems.append(Problem(self.near_file(name), spelt, expected, "no such tensor", INCOMPLETE))

    def missing_stack(self, placed: Placed, siblings: Sequence[Placed]) -> None:
        """Note that a layer has nothing of a stack of experts, under the name that this checkpoint gives to one."""
        file = self.near_file(placed.name)
        for name, expected in (self.spelling or self.spell()).of_stack(placed, siblings):
            self.problems.append(Problem(file, name, expected, "no such tensor", INCOMPLETE))

    def spell(self) -> Spelling:
        """Learn how this checkpoint spells names; only errors need it."""
        self.spelling = Spelling(self.by_name, self.stored_spelling)
        return self.spelling

    def near_file(self, name: str) -> str:
        """The file where a missing tensor would be: that of its nearest relative in the tree of names."""
        if not self.files_near:
            for canonical, info in self.by_name.items():
                while canonical:
                    canonical = canonical.rpartition(".")[0]
                    self.files_near.setdefault(canonical, info.file)
        while name and name not in self.files_near:
            name = name.rpartition(".")[0]
        return self.files_near.get(name) or next(iter(self.source.files))

    def stored_spelling(self, name: str) -> str:
        """A canonical name in the prefix spelling of this checkpoint."""
        root = name.partition(".")[0]
        if root not in self.spelling_of_root:
            self.spelling_of_root[root] = root
            for canonical, info in self.by_name.items():
                rest = canonical.removeprefix(root)
                if canonical.partition(".")[0] == root and info.name.endswith(rest):
                    self.spelling_of_root[root] = info.name.removesuffix(rest)
                    break
        return self.spelling_of_root[root] + name.removeprefix(root)

    def take(self, name: str) -> TensorInfo | None:
        """Use the stored tensor of a canonical name; None when there is none."""
        module, _, suffix = name.rpartition(".")
        return self.by_module[module].pop(suffix, None) if module in self.by_module else None

    # -- parts ------------------------------------------------------------------------------------------------------

    def present_parts(self) -> dict[str, int]:
        """Root of each part that the checkpoint has -> its number of layers, where the part keeps its own count."""
        config, architecture = self.source.config, self.architecture
        stored = present_layers(self.family, architecture, self.by_name)
        present: dict[str, int] = {}
        for part in self.family.parts:
            counts = [(p, look_up(c, p)) for p in part.layer_count for c in (text_config(self.family, config), config)]
            key, declared = next(((p, c) for p, c in counts if isinstance(c, int)), ("", None))
            if declared is not None and not 0 <= declared <= MAX_LAYERS:
                self.problems.append(
                    Problem("config.json", key, f"at most {MAX_LAYERS} layers", f"{declared}", "correct config.json")
                )
                declared = None
            where = f"{part.prefix}.{part.layer_list} that only draft" if part.layer_offset else f"{part.root}.*"
            if part.root in stored:
                # A count of the config may stand for several layers, of the types that it lists.
                types = len(architecture[part.layer_types]) if part.layer_count and part.layer_types else 0
                count = max(int(part.drafts), ceil_div(stored[part.root], max(1, types // max(1, declared or 0))))
                if part.layer_count and (not declared or (part.drafts and count != declared)):
                    self.note(f"the files have {count} layers of {where}, config.json declares {declared or 'none'}")
                    declared = count
                present[part.root] = declared or count
            elif not part.optional:
                present[part.root] = declared or 0
            elif declared and part.carried:
                self.note(f"config.json declares {declared} layers of {where}, the files have none of it")
        keys = {p.layer_count[0].rpartition(".")[2]: present.get(p.root, 0) for p in self.family.parts if p.drafts}
        if any(architecture[key] != count for key, count in keys.items()):
            architecture |= resolve_architecture(self.family, config, keys)
        self.settle_head(architecture, present)
        return present

    def settle_head(self, architecture: dict[str, Any], present: dict[str, int]) -> None:
        """Whether the head is tied, separate or absent; what is stored wins over the config's flag."""
        if "lm_head" in present:
            if architecture["head"] == "tied":
                self.note("config.json says tie_word_embeddings, the files have a separate lm_head: it is kept")
            architecture["head"] = "separate"
        elif architecture["head"] == "separate":
            names = self.source.config.get("architectures") or []
            if any(name in self.family.bare for name in names if isinstance(name, str)):
                architecture["head"] = "absent"
                self.repairs.append(f"saved as the bare trunk {names[0]}: no language model head")
            else:
                present["lm_head"] = 0  # its absence is reported like that of any other tensor

    def note(self, line: str) -> None:
        """A contradiction between the config and the files that concerns no single module."""
        self.disagreements.setdefault(line, [])

    def open_parts(self, present: Mapping[str, int]) -> list[Placed]:
        """The modules and tensors of the parts that have no table."""

        def quantised(module: str) -> bool:
            return len(SUFFIXES & self.by_module[module].keys()) > 1 if module in self.by_module else False

        parts = [p for p in self.family.parts if p.open and p.root in present]
        return [placed for part in parts for placed in open_items(part, list(self.by_name), quantised)]

    # -- modules ----------------------------------------------------------------------------------------------------

    def parameter(self, placed: Placed, item: Parameter) -> None:
        """Plan a tensor that is never quantised."""
        info = self.take(placed.name)
        wanted = not item.flag or bool(self.architecture[item.flag])
        if info is not None and item.dropped:
            self.dropped.append(Dropped(info.name, item.dropped))
            return
        if info is not None and not wanted:
            found = f"{info.dtype} {list(info.shape)}"
            self.problem(info, f"no such tensor ({item.flag} is false)", found, "correct config.json")
            return
        if info is None:
            if wanted and not item.optional and not item.dropped:
                shape = [s if s is not None else "any" for s in placed.shape] if placed.shape is not None else "any shape"
                self.missing(placed.name, f"a tensor of {shape}")
            return
        fits = placed.shape is None or (
            len(placed.shape) == len(info.shape)
            and all(want in (None, have) for want, have in zip(placed.shape, info.shape, strict=True))
        )
        weight = self.by_name.get(f"{placed.parent}.weight")
        if placed.shape is None and placed.name.endswith(".bias") and weight is not None:
            fits = info.shape == weight.shape[:1]
        if not fits or info.dtype not in item.dtypes:
            expected = f"{'/'.join(item.dtypes)} {list(placed.shape) if placed.shape is not None else 'of any shape'}"
            swapped = (*info.shape[:1], *info.shape[:0:-1])
            channels_last = len(info.shape) == 3 and placed.shape == swapped
            remedy = CHANNELS_LAST if channels_last else "the tensor does not fit config.json"
            self.problem(info, expected, f"{info.dtype} {list(info.shape)}", remedy)
            return
        check = "zero_centred" if item.zero_centred else ""
        self.steps.append(Step(placed.name, info.dtype, info.shape or (1,), (Term(info.name),), check))

    def linear(self, placed: Placed, item: Linear) -> None:
        """Plan a linear: gather its stored projections, then emit it fused, or separately where schemes differ."""
        shards = self.stored_shards(placed, item, "")
        if item.interleaved and not any(name in self.by_module for name, _ in shards):
            for info in self.by_module.pop(placed.name, {}).values():
                apart = " and ".join(name.rpartition(".")[2] for name, _ in shards)
                self.problem(info, f"{apart}, each with its tensors", f"{info.dtype} {list(info.shape)}", item.interleaved)
                return
        stored = [self.shard(placed, item, name, partitions) for name, partitions in shards]
        parts = [s for s in stored if s is not None]
        if len(parts) < len(stored):
            return
        if len({s.key for s in parts}) == 1 and not (len(parts) > 1 and any(s.own_input for s in parts)):
            self.emit(placed.name, parts)
        else:
            self.unfused[placed.name] = tuple(s.name.rpartition(".")[2] for s in parts)
            for s in parts:
                self.emit(s.name, [s])

    def stored_shards(self, placed: Placed, item: Linear, expert: str) -> list[Shards]:
        """Names and partitions of the projections as this source stores them: apart, or fused already.

        `expert`: index of an expert that is stored one by one, as the segment before the projection.
        """
        below = f"{placed.parent}.{expert}." if expert else f"{placed.parent}." if placed.parent else ""
        shards = [(below + name.rpartition(".")[2], partitions) for name, partitions in placed.shards]
        whole = below + placed.name.rpartition(".")[2]
        present = self.by_module.get(whole, {})
        if len(shards) > 1 and not present.keys().isdisjoint(("weight", "weight_packed")) and not item.interleaved:
            return [(whole, tuple(p for _, partitions in shards for p in partitions))]
        return shards

    def experts(self, placed: Placed, item: Linear, siblings: Sequence[Placed]) -> None:
        """Plan a stack of experts from any stored layout: one by one, stacked by projection, or stacked and fused.

        `siblings`: all stacks of the same layer, which together show the orientation of stacked tensors.
        """
        count = placed.experts or 0
        one_by_one = any(f"{placed.parent}.{e}.{n.rpartition('.')[2]}" in self.by_module
                         for e in range(min(count, 8)) for n, _ in (*placed.shards, (placed.name, ())))  # fmt: skip
        if not one_by_one and not any(name in self.by_module for name in (placed.name, *(n for n, _ in placed.shards))):
            self.missing_stack(placed, siblings)
            return
        rows: list[list[_Stored]] = []  # [expert][projection]
        complete = True
        if one_by_one:
            for expert in range(count):
                shards = self.stored_shards(placed, item, str(expert))
                one = [self.shard(placed, item, name, partitions) for name, partitions in shards]
                complete = complete and None not in one
                rows.append([s for s in one if s is not None])
        else:
            transposed = self.orientation(placed.parent, siblings)
            shards = self.stored_shards(placed, item, "")
            stack = Stack(count, transposed)
            found = [self.shard(placed, item, name, partitions, stack) for name, partitions in shards]
            complete = None not in found
            stacked = [s for s in found if s is not None]
            rows = [[replace(s, expert=e, transposed=transposed) for s in stacked] for e in range(count)]
        if not complete or not rows:
            return
        flat = [s for row in rows for s in row]
        own_input = len(rows[0]) > 1 and any(s.own_input for s in flat)
        same_layout = len({len(row) for row in rows}) == 1
        if same_layout and len({s.key for s in flat}) == 1 and not own_input:
            self.emit(placed.name, flat, experts=count)
            return
        columns = list(zip(*rows, strict=True)) if same_layout else []
        if len(columns) > 1 and all(len({s.key for s in column}) == 1 for column in columns):
            names = [shard.name for shard in item.shards]
            self.unfused[placed.name] = tuple(names)
            for name, column in zip(names, columns, strict=True):
                self.emit(f"{placed.parent}.{name}", column, experts=count)
            return
        apart: list[str] = []
        for expert, row in enumerate(rows):
            fits = len({s.key for s in row}) == 1 and not (len(row) > 1 and any(s.own_input for s in row))
            groups = [(placed.name.rpartition(".")[2], row)] if fits else [(s.name.rpartition(".")[2], [s]) for s in row]
            for name, group in groups:
                apart.append(f"{expert}.{name}")
                self.emit(f"{placed.parent}.{expert}.{name}", group)
        self.unfused[placed.name] = tuple(apart)

    def orientation(self, parent: str, siblings: Sequence[Placed]) -> bool:
        """Whether the stacked experts below `parent` are stored input-major (`[E, K, N]`).

        Decided from all stacked weights of the layer and the config's sizes together: one square tensor decides nothing.
        """
        if parent in self.orientations:
            return self.orientations[parent]
        possible = {False, True}
        square: TensorInfo | None = None
        for placed in siblings:
            assert isinstance(placed.item, Linear)
            for name, partitions in self.stored_shards(placed, placed.item, ""):
                stored = self.by_module.get(name, {})
                info = stored.get("weight") or stored.get("weight_packed")
                if info is None or len(info.shape) != 3 or placed.columns is None:
                    continue
                n, k = sum(r or 0 for _, r in partitions), placed.columns
                k //= 2 if info.dtype == "U8" else 1
                fits = {t for t in (False, True) if info.shape[1:] == ((k, n) if t else (n, k))}
                if len(fits) == 2:
                    square = info
                possible &= fits or possible  # a shape that fits neither is reported when it is recognised
        if len(possible) == 2 and square is not None:
            self.problem(
                square, "experts whose orientation sizes can show", f"square ones, {list(square.shape)}",
                "store the experts one by one",
            )  # fmt: skip
        self.orientations[parent] = possible == {True}
        return self.orientations[parent]

    def shard(
        self,
        placed: Placed,
        item: Linear,
        name: str,
        partitions: tuple[tuple[str, int | None], ...],
        stack: Stack | None = None,
    ) -> _Stored | None:
        """Recognise one stored projection and settle it with the configs.  None when there is a problem."""
        rows = [r for _, r in partitions]
        known = placed.columns is not None and None not in rows
        shape = (sum(r or 0 for r in rows), placed.columns or 0) if known else None
        tensors = self.by_module.pop(name, {})
        bias = tensors.pop("bias", None) if item.bias else None
        if not item.bias and "bias" in tensors and placed.part.carried:
            self.by_module[name]["bias"] = tensors.pop("bias")  # a parameter of its own in a tower's table
        if not tensors:
            siblings = [n for n, _ in placed.shards]
            self.missing(f"{name}.weight", f"a weight of {list(shape)}" if shape else "a weight", siblings)
            return None
        first = next(iter(tensors.values()))
        spelling, _, last = first.name.rpartition(".")
        if last in self.joined and spelling.endswith("experts"):
            spelling += f".{self.joined[last][0]}"
        spellings = (spelling, hub_name(name, self.family.hub_roots[0]), f"language_model.{name}")
        module = Module(name, spellings, placed.name, item.linear, self.parts_of(placed, name))
        claims = [(r, r.claim(module)) for r in self.rules if not r.silent]
        claimed = next((c.scheme for _, c in claims), None)
        found = self.recognise(tensors, shape, len(partitions), claimed, stack)
        if isinstance(found, list):
            self.problems += self.explain(tensors, found)
            return None
        self.check_bias(item, name, bias, found.shape[0])
        for line in disagreements(found, claims, item.linear and placed.name != "lm_head"):
            self.disagreements[line].append(spelling)
        sized = tuple((p, found.shape[0] if r is None else r) for p, r in partitions)
        if found.scheme == DENSE:
            return _Stored(name, sized, found, Settled(None, False, None), bias)
        settled = settle(found, claims)
        result = _Stored(name, sized, found, settled, bias)
        if settled.conflict:
            a, b = settled.conflict
            self.problem(first, "configs that agree", f"{a}, but {b}; the tensors fit both", "remove the wrong config")
        elif settled.missing_input_scale:
            suffix = next((t.suffix for t in found.encoding.tensors if t.role == "input_scale"), "input_scale")
            file, missing = sibling(tensors, suffix)
            label = settled.claim.label if settled.claim else ""
            self.problems.append(Problem(file, missing, f"the static input scale of {label}", "no such tensor", INCOMPLETE))
        if settled.claim is None or settled.claim.optional_input_scale:
            label = settled.claim.label.upper() if settled.claim is not None else f"unclaimed {found.scheme}"
            self.optional_scales.append((placed.name, label, result))
        if settled.drop_input_scale:
            info = found.tensors["input_scale"][0]
            use = f"{settled.activations}, which needs none" if settled.activations else "weight-only"
            self.dropped.append(Dropped(info.name, f"its config says that the input of this module is {use}"))
        return result

    def parts_of(self, placed: Placed, name: str) -> tuple[str, ...]:
        """Names of the projections that a stored module holds: configs that name those mean it too.

        For a stack they are the first expert's: configs name one expert, or each.
        """
        shards = [n for n, _ in placed.shards]
        if placed.experts is None:
            return tuple(shards) if name == placed.name and len(shards) > 1 else ()
        last = [n.rpartition(".")[2] for n in (shards if name not in shards else [name])]
        return tuple(f"{placed.parent}.0.{s}" for s in last)

    def recognise(
        self,
        tensors: Mapping[str, TensorInfo],
        shape: tuple[int, int] | None,
        partitions: int,
        claimed: str | None,
        stack: Stack | None,
    ) -> Recognised | list[Problem]:
        """`recognise.recognise`, remembering the answer: thousands of experts look alike."""
        look = tuple([(suffix, i.dtype, i.shape) for suffix, i in tensors.items()])
        known = self.recognised.get((look, shape, partitions, claimed, stack))
        if known is not None:
            roles = {role: (tensors[s.suffix], s) for role, (_, s) in known.tensors.items()}
            return Recognised(known.scheme, known.shape, roles, known.encoding)
        found = recognise(tensors, shape, partitions, self.encodings, claimed, stack)
        if isinstance(found, Recognised):
            self.recognised[(look, shape, partitions, claimed, stack)] = found
        return found

    def explain(self, tensors: Mapping[str, TensorInfo], problems: list[Problem]) -> list[Problem]:
        """Replace the problems of a module in a format that is known and not supported by one that names it."""
        for suffixes, name, remedy in refused.TENSORS:
            if suffixes <= set(tensors):
                info = next(iter(tensors.values()))
                return [Problem(info.file, info.name, "FP8, NVFP4, MX or unquantised weights", name, remedy)]
        weight, scale = tensors.get("weight"), tensors.get("weight_scale")
        grouped = weight is not None and scale is not None and "weight_scale_2" in tensors and len(scale.shape) == 2
        if grouped and weight and scale and weight.shape[-1] * 2 == scale.shape[1] * 32:
            found = f"groups of 32 ({scale.dtype} {list(scale.shape)})"
            return [Problem(scale.file, scale.name, "NVFP4 with groups of 16", found, refused.GROUPS_OF_32)]
        if weight is not None and weight.dtype in refused.WEIGHT_DTYPES:
            name, remedy = refused.WEIGHT_DTYPES[weight.dtype]
            return [Problem(weight.file, weight.name, "FP8, NVFP4, MX or unquantised weights", name, remedy)]
        return problems

    def check_bias(self, item: Linear, name: str, bias: TensorInfo | None, rows: int) -> None:
        """A bias must be there exactly when the architecture has one, with one value per row."""
        if item.bias is None:
            return
        wanted = bool(self.architecture[item.bias])
        if bias is None and wanted:
            self.missing(f"{name}.bias", f"a bias of [{rows}] ({item.bias} is true)")
        elif bias is not None and not wanted:
            self.problem(bias, f"no bias ({item.bias} is false)", f"{bias.dtype} {list(bias.shape)}", "correct config.json")
        elif bias is not None and (bias.shape != (rows,) or bias.dtype not in DENSE_DTYPES):
            self.problem(bias, f"a float bias [{rows}]", f"{bias.dtype} {list(bias.shape)}", "export again")

    def emit(self, name: str, parts: Sequence[_Stored], experts: int | None = None) -> None:
        """Write down the canonical tensors of one module, fused from `parts` in order.

        `experts`: the module is a stack, and `parts` are the projections of the first expert, then of the second, ...
        """
        first = parts[0].found
        own = parts[: len(parts) // experts] if experts else parts
        lead = (experts,) if experts else ()
        if any(s.bias for s in parts):
            infos = [s.bias for s in parts if s.bias is not None]
            rows = sum(i.shape[0] for i in infos)
            self.steps.append(Step(f"{name}.bias", infos[0].dtype, (rows,), tuple(Term(i.name) for i in infos)))
        if first.scheme == DENSE:
            shape = (*lead, sum(s.found.shape[0] for s in own), first.shape[1])
            terms = coalesce(s.term("weight", 1) for s in parts)
            self.steps.append(Step(f"{name}.weight", first.tensors["weight"][0].dtype, shape, terms))
            return
        partitions = [p for s in own for p in self.partitions_of(s)]
        counts = [len(self.partitions_of(s)) for s in own]
        if len(partitions) == 1:
            partitions = [("", partitions[0][1])]
        spec = ModuleSpec(
            scheme=first.scheme,
            shape=(sum(rows for _, rows in partitions), first.shape[1]),
            partitions=tuple(partitions),
            activations=parts[0].settled.activations,
            pre_quant_scale="pre_quant_scale" in first.tensors,
            experts=experts,
        )
        self.modules[name] = spec
        for role, expected in module_tensors(spec).items():
            terms = coalesce(s.term(role, counts[i % len(own)]) for i, s in enumerate(parts))
            dtype = first.tensors[role][0].dtype if role == "pre_quant_scale" else expected.dtype
            check = CHECK_OF_ROLE.get(role) or CHECK_OF.get((spec.scheme, role), "")
            self.steps.append(Step(f"{name}.{role}", dtype, expected.shape, terms, check))

    def partitions_of(self, s: _Stored) -> list[tuple[str, int]]:
        """Partitions that a stored projection contributes.

        Blocks of a block scale run through a stored projection without regard to partitions, and restart at each canonical
        partition.  So where a partition ends inside a block, the projection is one partition, which is exact.
        """
        own = list(s.partitions)
        if s.found.scheme == "fp8_block" and any(rows % FP8_BLOCK for _, rows in own[:-1]):
            return [("".join(p for p, _ in own), sum(rows for _, rows in own))]
        return own

    def check_optional_scales(self) -> None:
        """Refuse an optional scale that is missing among its like.

        nvidia-modelopt writes weight-only modules under the name of the static algorithm, and leaves out a
        `pre_quant_scale` that it could fold.  So a scale that was lost cannot be told from one that never was by one module
        alone.  It is taken for lost when a sibling in the same fused group, a module of the same kind in another layer, or
        (input scales; the head apart) any module under the same algorithm has one.
        """
        together = {frozenset(stored.found.tensors) for _, _, stored in self.optional_scales}
        if len(together) <= 1:
            return  # as nearly always: all have the same
        groups: dict[tuple[str, str, str], list[_Stored]] = defaultdict(list)
        for fused_name, label, stored in self.optional_scales:
            kind = ".".join("#" if s.isdecimal() else s for s in stored.name.split("."))
            groups["input_scale", "kind", f"{kind} {label}"].append(stored)
            groups["pre_quant_scale", "kind", f"{kind} {label}"].append(stored)
            groups["input_scale", "group", fused_name].append(stored)
            if fused_name != "lm_head":  # heads are often weight-only by recipe
                groups["input_scale", "all", label].append(stored)
        lacking: dict[tuple[str, str], _Stored] = {}
        for (role, _, _), members in groups.items():
            if len({role in m.found.tensors for m in members}) > 1:
                lacking.update(((m.name, role), m) for m in members if role not in m.found.tensors)
        for (_, role), stored in lacking.items():
            weight = stored.found.tensors["weight"][0]
            self.problems.append(
                Problem(
                    *sibling({"weight": weight}, role), f"the {role} that its like have",
                    "no such tensor", "calibrate every module, and export again",
                )
            )  # fmt: skip

    def check_lists(self, placed: Sequence[Placed]) -> None:
        """Report the names in configs that mean no module."""
        if not self.rules:
            return

        def spellings(name: str) -> tuple[str, ...]:
            info = self.by_name.get(f"{name}.weight")
            stored = info.name.rpartition(".")[0] if info is not None else self.stored_spelling(name)
            return stored, hub_name(name, self.family.hub_roots[0]), f"language_model.{name}"

        quantised, excluded = idle_entries(self.rules, Inventory(placed, spellings))
        for line in quantised:
            self.note(line)
        self.repairs += excluded

    # -- KV cache -----------------------------------------------------------------------------------------------------

    def kv_scales(self, part: Part, attention: Sequence[str], heads: int) -> None:
        """Plan the KV-cache scales of every attention module of a part; partial sets are refused."""
        claims = [(r, r.kv_cache) for r in self.rules if r.kv_cache is not None]
        found: dict[str, dict[str, TensorInfo]] = {}
        for module in attention:
            scales: dict[str, TensorInfo] = {}
            for spelling, roles in KV_SPELLINGS.items():
                info = self.take(f"{module}.{spelling}")
                for role in roles if info is not None else ():
                    assert info is not None
                    twin = scales.setdefault(role, info)
                    if twin is not info:
                        self.problem(info, f"one {role} of {module}", f"two: also {twin.name}", "remove one of them")
            found[module] = scales
        if not any(found.values()):
            for rules, claim in claims if not part.optional else ():
                self.note(f"{rules.where} says KV cache {claim.label}, the files have no KV scales: none is used")
            return
        if claims and len(claims) < len(self.rules):
            silent = ", ".join(r.where for r in self.rules if r.kv_cache is None)
            self.note(f"{claims[0][0].where} says KV cache {claims[0][1].label}, {silent} does not mention it")
        formats = {claim.format for _, claim in claims}
        if formats - {"fp8"}:
            where = ", ".join(f"{r.where}: {c.label}" for r, c in claims)
            self.problems.append(
                Problem("", "KV cache", "FP8", where, "export with an FP8 KV cache, or without KV quantisation")
            )
        if not formats:
            self.note("no config mentions a KV cache, the files have KV scales: taken as FP8")
        for module, scales in found.items():
            for role in ("k_scale", "v_scale"):
                info = scales.get(role)
                if info is None:
                    near = next(iter(scales.values()), None) or next(i for s in found.values() for i in s.values())
                    name = self.stored_spelling(f"{module}.{role}")
                    self.problems.append(
                        Problem(near.file, name, f"a {role}, as other layers have", "no such tensor", INCOMPLETE)
                    )
                    continue
                count = max(1, _numel(info))
                if info.dtype not in DENSE_DTYPES or count not in (1, heads):
                    self.problem(info, f"a float scale of [1] or [{heads}]", f"{info.dtype} {list(info.shape)}", INCOMPLETE)
                    continue
                self.kv_cache[module] = "tensor" if count == 1 else "head"
                step = Step(f"{module}.{role}", "F32", (count,), (Term(info.name, "f32"),), "scale")
                self.steps.append(step)

    # -- what is left over ----------------------------------------------------------------------------------------------

    def leftovers(self, present: Mapping[str, int]) -> None:
        """Refuse every tensor that no rule has used."""
        dropped = {d.tensor for d in self.dropped}
        declared = self.architecture.get("num_hidden_layers", 0)
        stored = count_layers(self.family.parts[0], self.by_name)
        if stored > declared and not any(p.layer_offset and p.root in present for p in self.family.parts):
            self.problems.append(
                Problem(
                    "config.json", "num_hidden_layers", f"the {stored} layers that the files have", f"{declared}",
                    "take config.json and files from the same checkpoint",
                )
            )  # fmt: skip
            return
        for suffixes in self.by_module.values():
            for info in suffixes.values():
                if info.name in dropped:
                    continue
                expected = f"a tensor that {self.family.name} has"
                remedy = "remove it, or convert with a version that knows it"
                found = f"an unknown one ({info.dtype} {list(info.shape)})"
                self.problem(info, expected, found, remedy)

    def describe_repairs(self) -> list[str]:
        """One line per kind of repair, with counts."""
        lines = [*self.repairs, *name_repairs(self.by_name, self.joined)]
        sentinels = sum(r.repairs.count("sentinel") for r in self.rules)
        if sentinels:
            lines.append(f"corrupted module names in the quantisation config repaired ({sentinels} names)")
        lines += value_repairs(self.steps, self.source.tensors, self.by_name)
        if self.unfused:
            lines.append(f"kept apart because their schemes differ ({len(self.unfused)} groups)")
        return lines

    def describe_contradictions(self) -> list[str]:
        """One line per kind of contradiction, with the modules it concerns."""
        lines = []
        for line, modules in self.disagreements.items():
            if not modules:
                lines.append(line)
                continue
            shown = ", ".join(modules[:3]) + (", ..." if len(modules) > 3 else "")
            lines.append(f"{line}: {shown} ({len(modules)} modules)")
        return lines


def _numel(info: TensorInfo) -> int:
    return (info.end - info.start) // DTYPE_BYTES[info.dtype]


def _refuse_foreign(source: Source) -> None:
    """Refuse checkpoints of formats that are not converted, by name, before anything else is looked at."""
    problems: dict[str, Problem] = {}
    suffixes: dict[str, set[str]] = defaultdict(set)
    for info in source.tensors.values():
        module, _, suffix = info.name.rpartition(".")
        known = suffixes.get(module)
        for segment in (suffix,) if known else (*module.split("."), suffix):
            if segment in refused.SEGMENTS:
                name, remedy = refused.SEGMENTS[segment]
                problems.setdefault(name, Problem(info.file, info.name, "plain weights", name, remedy))
        suffixes[module].add(suffix)
        if suffix.endswith("_blocks") and info.dtype == "U8":
            remedy = refused.QUANT_METHODS["mxfp4"]
            problems.setdefault("b", Problem(info.file, info.name, "plain weights", "gpt-oss MXFP4 blocks", remedy))
    for module, present in suffixes.items():
        for wanted, name, remedy in refused.TENSORS:
            if wanted <= present:
                near = next(i for i in source.tensors.values() if i.name.rpartition(".")[0] == module)
                found = f"{name} ({', '.join(sorted(wanted))})"
                problems.setdefault(name, Problem(near.file, near.name, "FP8, NVFP4, MX or unquantised weights", found, remedy))
                break
        if len(problems) > 3:
            break
    if problems:
        raise ConvertError(problems.values())


def _pack(steps: Sequence[Step], shard_size: int) -> dict[str, list[int]]:
    """Shard file name -> steps, in model order, at most `shard_size` bytes each (a larger tensor has one to itself).

    Within a shard, tensors of wider elements come first, so that each one is aligned to its element size.
    """
    groups: list[list[int]] = [[]]
    filled = 0
    for index, step in enumerate(steps):
        if groups[-1] and filled + step.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += step.nbytes
    for group in groups:
        group.sort(key=lambda i: -DTYPE_BYTES[steps[i].dtype])
    total = len(groups)
    return {f"model-{n:05d}-of-{total:05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` without its quantisation blocks, at the top and in nested configs; nothing else is changed.

    A bare Infinity, which is no JSON, takes the form that transformers 5 writes and reads.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, float) and math.isinf(value):
            return {"__float__": "Infinity" if value > 0 else "-Infinity"}
        if isinstance(value, list):
            return [plain(v) for v in value]
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return value

    result: dict[str, Any] = {k: plain(v) for k, v in config.items() if k not in QUANT_KEYS}
    for key, value in result.items():
        if isinstance(value, Mapping) and any(q in value for q in QUANT_KEYS):
            result[key] = {k: v for k, v in value.items() if k not in QUANT_KEYS}
    return result


def _producer(source: Source) -> str:
    """Name and version of the producer, as far as the configs say."""
    blocks: Iterable[Any] = (source.config.get("quantization_config"), source.config, source.quant_file)
    for block in blocks:
        if not isinstance(block, Mapping):
            continue
        producer = block.get("producer")
        if isinstance(producer, Mapping):
            return f"{producer.get('name', '?')} {producer.get('version', '?')}"
        if block.get("quant_method") and block.get("version"):
            return f"{block['quant_method']} {block['version']}"
    version = source.config.get("transformers_version")
    return f"transformers {version}" if version else "unknown"


def _check_sizes(plan: Plan) -> None:
    """Every step must fill its tensor exactly; anything else is a mistake of the planner, not of the checkpoint."""
    for step in plan.steps:
        infos = plan.source_of(step)
        given = sum(term_nbytes(t, i.dtype, i.shape) for t, i in zip(step.terms, infos, strict=True))
        assert given == step.nbytes, (step, infos)


@collector_paused()
@regexes_limited()
def plan_source(source: Source, shard_size: int = DEFAULT_SHARD_SIZE) -> Plan:
    """Plan the conversion of a source that has been read.

    `shard_size`: bytes of data per output file.  Raises `ConvertError` with every problem that headers and configs show.
    """
    configs = find_configs(source.config, source.quant_file)  # names an unsupported method before an unsupported family
    _refuse_foreign(source)
    family = detect_family(source.config)
    rules = [config.read(family.names) for config in configs]
    architecture = resolve_architecture(family, source.config)
    joined = joined_names(family, SUFFIXES)
    planner = _Planner(source, family, rules, architecture, joined=joined, encodings=encodings_for(rules))
    planner.index_names()
    present = planner.present_parts()
    attention: dict[str, list[str]] = defaultdict(list)
    placed = [*expand(family, architecture, present), *planner.open_parts(present)]
    stacks: dict[str, list[Placed]] = defaultdict(list)
    for place in placed:
        if place.experts is not None:
            stacks[place.parent].append(place)
        if place.name.endswith(f".{family.attention}"):
            attention[place.part.root].append(place.parent)
    for part in family.parts:
        planner.kv_scales(part, attention.get(part.root, []), architecture[family.kv_heads])
    kv_steps, planner.steps = {s.name: s for s in planner.steps}, []
    for place in placed:
        if isinstance(place.item, Parameter):
            planner.parameter(place, place.item)
        else:
            if place.experts is None:
                planner.linear(place, place.item)
            else:
                planner.experts(place, place.item, stacks[place.parent])
            if place.parent in planner.kv_cache and place.name.endswith(f".{family.attention}"):
                planner.steps += [s for n, s in kv_steps.items() if n.rpartition(".")[0] == place.parent]
    planner.check_optional_scales()
    planner.check_lists(placed)
    planner.leftovers(present)
    adapters, problems, notes = build_adapters(planner.wrapped, source, family, placed, planner.by_name.keys())
    planner.problems += problems
    for line in notes:
        planner.note(line)
    if planner.problems:
        raise ConvertError(planner.problems)
    declared = [r.dialect for r in rules]
    quantised = bool(planner.modules)
    if rules and not quantised:
        planner.note(f"{rules[0].where} describes a quantisation, no tensor is quantised")
    if quantised and not rules:
        planner.note("no quantisation config: schemes are read from the tensors alone")
    config = CanonicalConfig(
        family=family.name,
        architecture=architecture,
        modules=planner.modules,
        kv_cache=planner.kv_cache,
        unfused=planner.unfused,
        carried=carried_prefixes(family, architecture, present),
        hf_config=_without_quantization(source.config),
    )
    plan = Plan(
        source=source,
        dialect=declared[0] if declared else "unquantised" if not quantised else "unknown",
        producer=_producer(source),
        config=config,
        steps=planner.steps,
        dropped=planner.dropped,
        repairs=planner.describe_repairs(),
        contradictions=planner.describe_contradictions(),
        adapters=adapters,
    )
    _check_sizes(plan)
    plan.shards = _pack(plan.steps, shard_size)
    return plan


def plan_conversion(in_dir: str | os.PathLike[str], shard_size: int = DEFAULT_SHARD_SIZE) -> Plan:
    """Read a checkpoint's headers and plan its conversion.  No tensor data is read; neither torch nor NumPy is needed.

    Raises `ConvertError` when the checkpoint is refused.
    """
    return plan_source(read_source(in_dir), shard_size)

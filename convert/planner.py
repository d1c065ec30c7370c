"""The planner: headers and configs in, a `Plan` out.  A pure function of the source: no tensor data, no files written.

The way of a name: `names.canonical_name` gives every stored tensor its canonical path; the family's tables say which modules
that path must lead to; `recognise` tells each module's scheme; and a canonical tensor is written down as terms over its
sources.  Every stored tensor is used once or dropped for a stated reason; what is left over is an error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.format import (
    CanonicalConfig,
    ceil_div,
)

from .adapters import MARKS, Wrapped, build_adapters, find_adapters, stand_ins, without_marks
from .collector import collector_paused
from .describe import name_repairs
from .dialects import DIALECTS, find_configs, refused
from .dialects.base import Rules, patterns_limited
from .draft import Draft
from .errors import ORIGINAL, ConvertError, Problem
from .families import detect_family
from .families.base import (
    Family,
    Parameter,
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
from .index import Index, Modules, all_segments, by_module
from .kv_scales import plan_kv_scales
from .layout import pack
from .limits import MAX_GROUPS, MAX_LAYERS
from .linears import Linears
from .lists import Inventory, idle_entries
from .ops import Step, Term
from .plan import Dropped, Plan
from .recognise import encodings_for
from .source import Location, Source, read_source

QUANT_KEYS = ("quantization_config", "compression_config", "quantization")

CHANNELS_LAST = f"these are the axes of MLX, whose repacks also change norms: {ORIGINAL}"
SUFFIXES = frozenset(t.suffix for d in DIALECTS for e in d.encodings for t in e.tensors)

@dataclass(slots=True)
class _Planner:
    """State of one planning run; `plan_source` is the only user."""

    source: Source
    family: Family
    rules: list[Rules]
    architecture: dict[str, Any]
    draft: Draft
    wrapped: dict[str, Wrapped] = field(default_factory=dict)

    # -- names ------------------------------------------------------------------------------------------------------

    def index_names(self, stored: Modules, segments: set[str]) -> None:
        """Give each stored tensor its canonical name; two that meet in one name are refused.

        `stored`: all tensors by stored module; `segments`: every segment of their names.
        """
        tensors = self.source.tensors
        if not MARKS.isdisjoint(segments):
            self.wrapped = find_adapters(tensors)
            stored = by_module((name, info) for name, info in tensors.items() if name not in self.wrapped)
        problems = self.draft.index.add(stored)
        copies = stand_ins(self.wrapped, self.draft.index, self.family, self.architecture["head"] == "tied")
        for copy in copies:
            del self.wrapped[copy]
            self.draft.repairs.append(f"{copy} is the base's: the module it was copied from is not in the files")
        problems += self.draft.index.add(by_module((without_marks(copy), tensors[copy]) for copy in copies))
        if problems:
            position = {name: number for number, name in enumerate(tensors)}
            self.draft.problems += sorted(problems, key=lambda problem: position[problem.tensor])

    # -- parts ------------------------------------------------------------------------------------------------------

    def present_parts(self) -> dict[str, int]:
        """Root of each part that the checkpoint has -> its number of layers, where the part keeps its own count."""
        config, architecture = self.source.config, self.architecture
        stored = present_layers(self.family, architecture, self.draft.index.paths())
        present: dict[str, int] = {}
        for part in self.family.parts:
            counts = [(p, look_up(c, p)) for p in part.layer_count for c in (text_config(self.family, config), config)]
            key, declared = next(((p, c) for p, c in counts if isinstance(c, int)), ("", None))
            if declared is not None and not 0 <= declared <= MAX_LAYERS:
                self.draft.problems.append(
                    Problem("config.json", key, f"at most {MAX_LAYERS} layers", f"{declared}", "correct config.json")
                )
                declared = None
            where = f"{part.prefix}.{part.layer_list} that only draft" if part.layer_offset else f"{part.root}.*"
            if part.root in stored:
                # A count of the config may stand for several layers, of the types that it lists.
                types = len(architecture[part.layer_types]) if part.layer_count and part.layer_types else 0
                count = max(int(part.drafts), ceil_div(stored[part.root], max(1, types // max(1, declared or 0))))
                if part.layer_count and (not declared or (part.drafts and count != declared)):
                    self.draft.note(f"the files have {count} layers of {where}, config.json declares {declared or 'none'}")
                    declared = count
                present[part.root] = declared or count
            elif not part.optional:
                present[part.root] = declared or 0
            elif declared and part.carried:
                self.draft.note(f"config.json declares {declared} layers of {where}, the files have none of it")
        keys = {p.layer_count[0].rpartition(".")[2]: present.get(p.root, 0) for p in self.family.parts if p.drafts}
        if any(architecture[key] != count for key, count in keys.items()):
            architecture |= resolve_architecture(self.family, config, keys)
        self.settle_head(architecture, present)
        return present

    def settle_head(self, architecture: dict[str, Any], present: dict[str, int]) -> None:
        """Whether the head is tied, separate or absent; what is stored wins over the config's flag."""
        if "lm_head" in present:
            if architecture["head"] == "tied":
                self.draft.note("config.json says tie_word_embeddings, the files have a separate lm_head: it is kept")
            architecture["head"] = "separate"
        elif architecture["head"] == "separate":
            names = self.source.config.get("architectures") or []
            if any(name in self.family.bare for name in names if isinstance(name, str)):
                architecture["head"] = "absent"
                self.draft.repairs.append(f"saved as the bare trunk {names[0]}: no language model head")
            else:
                present["lm_head"] = 0  # its absence is reported like that of any other tensor

    def open_parts(self, present: Mapping[str, int]) -> list[Placed]:
        """The modules and tensors of the parts that have no table."""

        def quantised(module: str) -> bool:
            return len(SUFFIXES & self.draft.index.modules.get(module, {}).keys()) > 1

        parts = [p for p in self.family.parts if p.open and p.root in present]
        return [placed for part in parts for placed in open_items(part, self.draft.index.below(part.root), quantised)]

    # -- modules ----------------------------------------------------------------------------------------------------

    def parameter(self, placed: Placed, item: Parameter) -> None:
        """Plan a tensor that is never quantised."""
        info = self.draft.index.take(placed.name)
        wanted = not item.flag or bool(self.architecture[item.flag])
        if info is not None and item.dropped:
            self.draft.dropped.append(Dropped(info.name, item.dropped))
            return
        if info is not None and not wanted:
            found = f"{info.dtype} {list(info.shape)}"
            self.draft.problem(info, f"no such tensor ({item.flag} is false)", found, "correct config.json")
            return
        if info is None:
            if wanted and not item.optional and not item.dropped:
                shape = [s if s is not None else "any" for s in placed.shape] if placed.shape is not None else "any shape"
                self.draft.problems.append(self.draft.missing(placed.name, f"a tensor of {shape}"))
            return
        fits = placed.shape is None or (
            len(placed.shape) == len(info.shape)
            and all(want in (None, have) for want, have in zip(placed.shape, info.shape, strict=True))
        )
        weight = self.draft.index.get(f"{placed.parent}.weight")
        if placed.shape is None and placed.name.endswith(".bias") and weight is not None:
            fits = info.shape == weight.shape[:1]
        if not fits or info.dtype not in item.dtypes:
            expected = f"{'/'.join(item.dtypes)} {list(placed.shape) if placed.shape is not None else 'of any shape'}"
            swapped = (*info.shape[:1], *info.shape[:0:-1])
            channels_last = len(info.shape) == 3 and placed.shape == swapped
            remedy = CHANNELS_LAST if channels_last else "the tensor does not fit config.json"
            self.draft.problem(info, expected, f"{info.dtype} {list(info.shape)}", remedy)
            return
        check = "zero_centred" if item.zero_centred else ""
        step = Step(placed.name, info.dtype, info.shape or (1,), (Term(info.name),), check)
        self.draft.step(step, [(placed.name, info, step.terms)])

    def check_lists(self, placed: Sequence[Placed]) -> None:
        """Report the names in configs that mean no module."""
        if not self.rules:
            return

        def spellings(name: str) -> tuple[str, ...]:
            info = self.draft.index.get(f"{name}.weight")
            stored = info.name.rpartition(".")[0] if info is not None else self.draft.index.stored_spelling(name)
            return stored, hub_name(name, self.family.hub_roots[0]), f"language_model.{name}"

        quantised, excluded = idle_entries(self.rules, Inventory(placed, spellings))
        for line in quantised:
            self.draft.note(line)
        self.draft.repairs += excluded

    # -- what is left over ----------------------------------------------------------------------------------------------

    def leftovers(self, present: Mapping[str, int]) -> None:
        """Refuse every tensor that no rule has used."""
        dropped = {d.tensor for d in self.draft.dropped}
        declared = self.architecture.get("num_hidden_layers", 0)
        stored = count_layers(self.family.parts[0], self.draft.index.paths())
        if stored > declared and not any(p.layer_offset and p.root in present for p in self.family.parts):
            self.draft.problems.append(
                Problem(
                    "config.json", "num_hidden_layers", f"the {stored} layers that the files have", f"{declared}",
                    "take config.json and files from the same checkpoint",
                )
            )  # fmt: skip
            return
        for suffixes in self.draft.index.left.values():
            for info in suffixes.values():
                if info.name in dropped:
                    continue
                expected = f"a tensor that {self.family.name} has"
                remedy = "remove it, or convert with a version that knows it"
                found = f"an unknown one ({info.dtype} {list(info.shape)})"
                self.draft.problem(info, expected, found, remedy)

    def describe_repairs(self) -> list[str]:
        """One line per kind of repair, with counts."""
        lines = [*self.draft.repairs, *name_repairs(self.draft.index)]
        sentinels = sum(r.repairs.count("sentinel") for r in self.rules)
        if sentinels:
            lines.append(f"corrupted module names in the quantisation config repaired ({sentinels} names)")
        lines += (f"{what} ({len(names)} tensors)" for what, names in sorted(self.draft.value_repairs.items()))
        if self.draft.unfused:
            lines.append(f"kept apart because their schemes differ ({len(self.draft.unfused)} groups)")
        return lines


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


def producer(source: Source) -> str:
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


@collector_paused()
@patterns_limited()
def plan_source(source: Source, shard_size: int | None = None) -> Plan:
    """Plan the conversion of a source that has been read.

    `shard_size`: see `layout.pack`.  Raises `ConvertError` with every problem that headers and configs show.
    """
    configs = find_configs(source.config, source.quant_file)  # names an unsupported method before an unsupported family
    stored = by_module(source.tensors.items())
    segments = all_segments(stored)
    refused.refuse_foreign(source.tensors.values(), stored, segments)
    family = detect_family(source.config)
    rules = [config.read(family.names) for config in configs]
    for r in rules:
        if len(r.ordered) > MAX_GROUPS:
            expected, found = f"at most {MAX_GROUPS} groups of modules with schemes of their own", f"{len(r.ordered)}"
            raise ConvertError(Problem(r.where, "", expected, found, "name the modules instead of using wildcards"))
    architecture = resolve_architecture(family, source.config)
    index = Index(family, joined_names(family, SUFFIXES))
    draft = Draft(index, next(iter(source.files)))
    planner = _Planner(source, family, rules, architecture, draft)
    linears = Linears(draft, family, rules, architecture, encodings_for(rules))
    planner.index_names(stored, segments)
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
        plan_kv_scales(draft, rules, part, attention.get(part.root, []), architecture[family.kv_heads])
    kv_steps, draft.steps = {s.name: s for s in draft.steps}, []
    for place in placed:
        if isinstance(place.item, Parameter):
            planner.parameter(place, place.item)
        else:
            if place.experts is None:
                linears.linear(place, place.item)
            else:
                linears.experts(place, place.item, stacks[place.parent])
            if place.parent in draft.kv_cache and place.name.endswith(f".{family.attention}"):
                draft.steps += [s for n, s in kv_steps.items() if n.rpartition(".")[0] == place.parent]
    linears.check_optional_scales()
    planner.check_lists(placed)
    planner.leftovers(present)
    adapters, problems, notes = build_adapters(planner.wrapped, source, family, placed, (name for name, _ in index.items()))
    draft.problems += problems
    for line in notes:
        draft.note(line)
    if draft.problems:
        raise ConvertError(draft.problems)
    declared = [r.dialect for r in rules]
    quantised = bool(draft.modules)
    if rules and not quantised:
        draft.note(f"{rules[0].where} describes a quantisation, no tensor is quantised")
    if quantised and not rules:
        draft.note("no quantisation config: schemes are read from the tensors alone")
    config = CanonicalConfig(
        family=family.name,
        architecture=architecture,
        modules=draft.modules,
        kv_cache=draft.kv_cache,
        unfused=draft.unfused,
        carried=carried_prefixes(family, architecture, present),
        hf_config=_without_quantization(source.config),
    )
    plan = Plan(
        source=source,
        dialect=declared[0] if declared else "unquantised" if not quantised else "unknown",
        producer=producer(source),
        config=config,
        steps=draft.steps,
        dropped=draft.dropped,
        repairs=planner.describe_repairs(),
        contradictions=draft.describe_contradictions(),
        adapters=adapters,
        disagreements=dict(draft.disagreements),
    )
    plan.shards = pack(plan.steps, source.tensors, shard_size)
    return plan


def plan_conversion(in_dir: Location, shard_size: int | None = None) -> Plan:
    """Read a checkpoint's headers and plan its conversion.  No tensor data is read; neither torch nor NumPy is needed.

    Raises `ConvertError` when the checkpoint is refused.
    """
    return plan_source(read_source(in_dir), shard_size)

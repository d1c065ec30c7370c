"""What a model family is: a record of tables that says which modules a config must have.

A family names its modules in canonical form, relative to where they sit, with symbolic sizes.  `expand` places them for one
architecture.  Source names need no table of their own: `convert.names` brings every spelling to canonical names first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from runtime.format import DENSE_DTYPES

from ..errors import ConvertError, Problem
from ..limits import MAX_EXPERTS, MAX_LAYERS
from ..names import Aliases, NameSpace, replace_runs

REQUIRED = object()  # a `Field` without a default
Size = str | None  # key into the family's dimensions; None: any size (towers, which are carried as they are)


@dataclass(frozen=True, slots=True)
class Field:
    """One fact of the architecture.  `paths`: where configs keep it, dots going down, first found wins."""

    name: str
    paths: tuple[str, ...]
    default: Any = REQUIRED
    kind: type | tuple[type, ...] = object


@dataclass(frozen=True, slots=True)
class Shard:
    """One stored projection of a linear: its last name segment, and the (partition, rows) pairs that it covers."""

    name: str
    partitions: tuple[tuple[str, Size], ...]


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear, fused when it has several shards.

    name     canonical path of the (fused) module, relative to its layer
    columns  size of K
    shards   stored projections in the order in which they are fused
    interleaved  why a source's own fused module (engines' dumps) cannot be taken; "" where its rows are in exactly this order
    bias     architecture flag that says whether it has a bias
    linear   whether the class name "Linear" of a config covers it (not so for embeddings)
    experts  size of the stack that it is one of, "" for a single linear.  A source may hold its experts one by one
             (`<parent>.<e>.<shard>`), stacked by projection (`<parent>.<shard>`), or stacked and fused
    stacks   spellings of the stacked and fused tensor, beside `name` itself, as last segments ("w13")
    export   how `export` writes a stack: "stacked" and fused, by "projection" beside the stack, or one by one ("each")
    """

    name: str
    columns: Size
    shards: tuple[Shard, ...]
    interleaved: str = ""
    bias: str | None = None
    linear: bool = True
    experts: str = ""
    stacks: tuple[str, ...] = ()
    export: str = "each"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor that is never quantised.  `shape` None: any.

    optional  the model works without it.   flag     architecture flag that says whether the model has it, "" for always
    dropped   why it is not carried when it is stored, "" for a tensor that is carried
    zero_centred  a norm that multiplies by 1 + weight; some repacks store that sum, which is another format
    """

    name: str
    shape: tuple[Size | int, ...] | None
    optional: bool = False
    flag: str = ""
    dropped: str = ""
    zero_centred: bool = False
    dtypes: tuple[str, ...] = DENSE_DTYPES


Item = Linear | Parameter


def zero_centred(norm: Parameter) -> Parameter:
    """The same norm, multiplying by 1 + weight."""
    return replace(norm, zero_centred=True)


def linear(name: str, rows: Size, columns: Size, *, bias: str | None = None) -> Linear:
    """A linear that is stored and used as one."""
    return Linear(name, columns, (Shard(name.rpartition(".")[2], (("", rows),)),), bias=bias)


def embedding(name: str, rows: Size, columns: Size) -> Linear:
    """A table of rows.  Some producers quantise it like a linear, but the class name "Linear" does not cover it."""
    return Linear(name, columns, (Shard(name.rpartition(".")[2], (("", rows),)),), linear=False)


def fused(name: str, columns: Size, *shards: tuple[str, tuple[tuple[str, Size], ...]], **options: Any) -> Linear:
    """A linear that is stored as several projections and used as one."""
    return Linear(name, columns, tuple(Shard(*shard) for shard in shards), **options)


def experts(parent: str, count: Size, inner: Size, hidden: Size, *, export: str = "each") -> tuple[Linear, Linear]:
    """The gated experts of a layer: gate and up fused, and down, each a stack."""
    assert count is not None
    return (
        fused(
            f"{parent}.gate_up_proj", hidden, ("gate_proj", (("gate", inner),)), ("up_proj", (("up", inner),)),
            experts=count, stacks=("w13",), export=export,
        ),
        Linear(
            f"{parent}.down_proj", inner, (Shard("down_proj", (("", hidden),)),),
            experts=count, stacks=("w2",), export=export,
        ),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model that is present or absent as a whole: the trunk, the head, an MTP head, a tower.

    root         first segment of its canonical names; tells whether the part is present
    first, last  items that exist once, before and after the layers; names relative to `prefix`
    prefix       canonical path that the names of the items start from
    layers       layer type -> items of one layer, below `<prefix>.layers` or what `layer_list` says
    layer_types  architecture key of the list of layer types; without it all layers are of the one type there is
    layer_offset architecture key of the index of its first layer, when its layers continue another part's list
    layer_count  paths in the text config or the whole config that hold the number of layers, when it has its own
    drafts       it only drafts tokens: it has as many layers as are stored, whatever the config declares
    optional     the model may lack it.   carried   stored for others: a text runtime does not need it
    open         no table: whatever is stored below the root is carried under its own name (towers of other models)
    """

    root: str
    first: tuple[Item, ...] = ()
    last: tuple[Item, ...] = ()
    prefix: str = ""
    layers: Mapping[str, tuple[Item, ...]] | None = None
    layer_list: str = "layers"
    layer_types: str = ""
    layer_offset: str = ""
    layer_count: tuple[str, ...] = ()
    drafts: bool = False
    optional: bool = False
    carried: bool = False
    open: bool = False


def tower(root: str) -> Part:
    """A tower or projector that is carried as it is, quantised or not."""
    return Part(root, prefix=root, optional=True, carried=True, open=True)


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    model_types    `model_type` values, of wrappers and of text models alike
    text_keys      where a wrapper config keeps the text model's
    names          wrappers and roots of its names
    fields         facts of the architecture and where configs keep them
    finish         derives what no field holds; raises `ConvertError` for variants that are not supported
    dimensions     architecture -> value of each symbolic size
    parts          the modules
    attention      item name of the fused query-key-value projection: where a KV cache and its scales belong
    kv_heads       architecture key of the number of KV heads
    bare           architectures that are saved without a head
    hub_roots      canonical prefix -> prefix on the hub, for a wrapper config and for a text-only config; the longest wins
    hub_runs       inner runs of segments that the hub spells otherwise
    modules        the same two of transformers' modules, which adapters wrap, where a wrapper's are not called as on the hub
    fuses_adapters peft turns adapters of single experts into those of the stacks that transformers has
    """

    name: str
    model_types: tuple[str, ...]
    text_keys: tuple[str, ...]
    names: NameSpace
    fields: tuple[Field, ...]
    finish: Callable[[dict[str, Any], Mapping[str, Any]], None]
    dimensions: Callable[[Mapping[str, Any]], Mapping[str, int | None]]
    parts: tuple[Part, ...]
    attention: str
    kv_heads: str
    bare: frozenset[str]
    hub_roots: tuple[Mapping[str, str], Mapping[str, str]]
    hub_runs: Aliases = field(default_factory=dict)
    modules: tuple[Mapping[str, str], Aliases] | None = None
    fuses_adapters: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """An item at its place: full canonical names, sizes resolved (None where any size will do)."""

    name: str
    parent: str
    item: Item
    columns: int | None
    shards: tuple[tuple[str, tuple[tuple[str, int | None], ...]], ...]
    shape: tuple[int | None, ...] | None
    part: Part
    experts: int | None = None


# Largest values of facts that the number of modules depends on.
LIMITS = {"num_hidden_layers": MAX_LAYERS, "num_experts": MAX_EXPERTS, "n_routed_experts": MAX_EXPERTS}
KIND_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "an object"}


def _kind_name(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(KIND_NAMES.get(k, k.__name__) for k in kinds)


def look_up(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path of a config, or None when a step is missing (null counts as missing)."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            return None
        value = value[key]
    return value


def joined_names(family: Family, suffixes: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Last segments that hold a module's name and a suffix in one, as stacked experts do -> (module, suffix).

    `experts.gate_up_proj` is a weight, `experts.gate_up_proj_weight_scale` and `experts.w13_weight_scale` are its scales.
    Source: transformers 5.23 (fused experts), vLLM 0.33 (w13, w2), nvidia-modelopt 0.47 (underscored scales).
    """
    table: dict[str, tuple[str, str]] = {}
    for part in family.parts:
        groups = [part.first, part.last, *(part.layers or {}).values()]
        for item in (i for group in groups for i in group):
            if not isinstance(item, Linear) or not item.experts:
                continue
            module = item.name.rpartition(".")[2]
            stems = {module: module, **dict.fromkeys(item.stacks, module), **{s.name: s.name for s in item.shards}}
            for stem, target in stems.items():
                table[stem] = (target, "weight")
                table.update({f"{stem}_{suffix}": (target, suffix) for suffix in suffixes})
                table[f"{stem}_scale_inv"] = (target, "weight_scale_inv")
    return table


def text_config(family: Family, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: a nested one of a wrapper, or the config itself."""
    for key in family.text_keys:
        if isinstance(config.get(key), Mapping):
            return config[key]
    return config


def resolve_architecture(
    family: Family, config: Mapping[str, Any], stored: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The flat architecture of a checkpoint.  Raises `ConvertError` for facts that are missing or of the wrong kind.

    `stored`: facts that the files show to be other than the config says.
    """
    text = text_config(family, config)
    architecture: dict[str, Any] = {}
    problems = []
    for fact in family.fields:
        value = next((v for v in (look_up(text, path) for path in fact.paths) if v is not None), fact.default)
        if value is REQUIRED:
            problems.append(
                Problem("config.json", " or ".join(fact.paths), "a value", "none", "fetch the model's own config.json")
            )
        elif value is not None and not isinstance(value, fact.kind):
            problems.append(
                Problem("config.json", fact.paths[0], _kind_name(fact.kind), f"{value!r:.60}", "correct the config")
            )
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(Problem("config.json", fact.paths[0], "a finite number", f"{value}", "correct the config"))
        elif isinstance(value, int) and not isinstance(value, bool) and not -1 <= value <= LIMITS.get(fact.name, 1 << 40):
            limit = LIMITS.get(fact.name, 1 << 40)
            problems.append(Problem("config.json", fact.paths[0], f"at most {limit}", f"{value}", "correct the config"))
        architecture[fact.name] = value
    if problems:
        raise ConvertError(problems)
    architecture.update(stored)
    try:
        family.finish(architecture, config)
        family.dimensions(architecture)
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError) as error:
        raise ConvertError(
            Problem("config.json", "", f"an architecture of {family.name}", f"malformed values ({error})", "correct the config")
        ) from None
    return architecture


def _place(item: Item, prefix: str, sizes: Mapping[str, int | None], part: Part) -> Placed:
    def size(key: Size | int) -> int | None:
        return sizes[key] if isinstance(key, str) else key

    name = f"{prefix}{item.name}"
    parent = name.rpartition(".")[0]
    if isinstance(item, Parameter):
        shape = None if item.shape is None else tuple(size(s) for s in item.shape)
        return Placed(name, parent, item, None, (), shape, part)
    shards = tuple(
        (f"{parent}.{s.name}" if parent else s.name, tuple((p, size(rows)) for p, rows in s.partitions))
        for s in item.shards
    )
    count = sizes[item.experts] if item.experts else None
    return Placed(name, parent, item, size(item.columns), shards, None, part, count)


def hub_name(name: str, roots: Mapping[str, str], runs: Aliases = MappingProxyType({})) -> str:
    """The name that a canonical tensor or module has on the hub.  `runs`: inner spellings of the hub (`Family.hub_runs`)."""
    if runs:
        name = ".".join(replace_runs(name.split("."), runs))
    root, dot, rest = name.partition(".")
    longer = f"{root}.{rest.partition('.')[0]}"
    if longer in roots:
        return roots[longer] + name.removeprefix(longer)
    return f"{roots.get(root, root)}{dot}{rest}"


def count_layers(part: Part, names: Iterable[str], offset: int = 0) -> int:
    """Number of layers of a part by the names stored below its layer list, counted from `offset`."""
    start = f"{part.prefix}.{part.layer_list}."
    found = {name[len(start) :].partition(".")[0] for name in names if name.startswith(start)}
    small = (int(index) for index in found if index.isdecimal() and len(index) < 6)
    return max((index + 1 - offset for index in small if index < MAX_LAYERS), default=0)


def _own_layers(family: Family, part: Part, names: Iterable[str]) -> list[str]:
    """The names of a part that continues another's list of layers: those of layers with something that only it has."""
    start = f"{part.prefix}.{part.layer_list}."
    others = [p for p in family.parts if p.prefix == part.prefix and not p.layer_offset]

    def firsts(parts: Iterable[Part]) -> set[str]:
        return {i.name.partition(".")[0] for p in parts for items in (p.layers or {}).values() for i in items}

    own = firsts([part]) - firsts(others)
    below = (n for n in names if n.startswith(start))
    return [n for n in below if not own.isdisjoint(n[len(start) :].split(".", 2)[1:2])]


def present_layers(family: Family, architecture: Mapping[str, Any], names: Collection[str]) -> dict[str, int]:
    """Root of each part that has names below it -> its number of layers by these names."""
    roots = {name.partition(".")[0] for name in names}
    present = {}
    for part in family.parts:
        offset = architecture[part.layer_offset] if part.layer_offset else 0
        if not part.layer_offset and part.root not in roots:
            continue
        own = _own_layers(family, part, names) if part.layer_offset else names
        layers = count_layers(part, own, offset) if part.layers is not None else 0
        if layers > 0 or not part.layer_offset:
            present[part.root] = layers
    return present


def carried_prefixes(family: Family, architecture: Mapping[str, Any], present: Mapping[str, int]) -> tuple[str, ...]:
    """Dotted prefixes of the names that are stored only to be carried."""
    prefixes: list[str] = []
    for part in family.parts:
        if part.carried and part.root in present and part.layer_offset:
            first = architecture[part.layer_offset]
            prefixes += (f"{part.prefix}.{part.layer_list}.{first + i}" for i in range(len(architecture[part.layer_types])))
        elif part.carried and part.root in present:
            prefixes.append(part.root)
    return tuple(sorted(prefixes))


def open_items(part: Part, names: Iterable[str], quantised: Callable[[str], bool]) -> Iterator[Placed]:
    """The modules and tensors of an open part, from the names stored below its root.

    `quantised`: whether a module's weight has scales; it is then a linear, and its other tensors are parameters.
    """
    seen: set[str] = set()
    for name in names:
        module, _, suffix = name.rpartition(".")
        if name.partition(".")[0] != part.root:
            continue
        if quantised(module) and suffix != "bias":
            if module not in seen:
                seen.add(module)
                yield Placed(module, module.rpartition(".")[0], linear(module, None, None), None,
                             ((module, (("", None),)),), None, part)  # fmt: skip
        else:
            yield Placed(name, module, Parameter(name, None), None, (), None, part)


def expand(family: Family, architecture: Mapping[str, Any], present: Mapping[str, int]) -> Iterator[Placed]:
    """Every module and parameter that the architecture has, in the order of the model.

    `present`: root of each part that is there -> its number of layers (used when the part keeps its own count).
    """
    sizes = family.dimensions(architecture)
    for part in family.parts:
        if part.root not in present or part.open:
            continue
        prefix = f"{part.prefix}." if part.prefix else ""
        for item in part.first:
            yield _place(item, prefix, sizes, part)
        if part.layers is not None:
            only = next(iter(part.layers))
            kinds = architecture[part.layer_types] if part.layer_types else [only] * present[part.root]
            for index, kind in enumerate(kinds, architecture[part.layer_offset] if part.layer_offset else 0):
                for item in part.layers[kind]:
                    yield _place(item, f"{prefix}{part.layer_list}.{index}.", sizes, part)
        for item in part.last:
            yield _place(item, prefix, sizes, part)

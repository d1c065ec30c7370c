"""Plans linears and stacks of experts: gathers their stored projections, and writes the canonical module down.

A source may hold a fused linear apart or whole, and experts one by one, stacked by projection, or stacked and fused.  Experts
that are alike go through here together (`projections.Projection`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, repeat
from typing import Any

from runtime.format import DENSE_DTYPES, ModuleSpec, module_tensors

from .dialects import refused
from .dialects.base import DENSE, Encoding, Experts, Rules
from .draft import Draft
from .errors import Problem
from .families.base import Family, Linear, Placed, hub_name
from .ops import Step, Term, coalesce
from .plan import Dropped
from .projections import Partitions, Projection, Read
from .recognise import INCOMPLETE, Recognised, Settled, Stack, disagreements, recognise, settle, sibling
from .source import TensorInfo

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

Shards = tuple[str, Partitions]  # name of a stored projection, its partitions


@dataclass(slots=True)
class Linears:
    """Plans the linears of one checkpoint into `draft`.  `encodings`: those to try, the likeliest first."""

    draft: Draft
    family: Family
    rules: Sequence[Rules]
    architecture: Mapping[str, Any]
    encodings: Sequence[Encoding]
    optional_scales: list[tuple[str, list[tuple[str, Projection]]]] = field(default_factory=list)
    orientations: dict[str, bool] = field(default_factory=dict)
    recognised: dict[Any, Recognised] = field(default_factory=dict)

    def linear(self, placed: Placed, item: Linear) -> None:
        """Plan a linear: gather its stored projections, then emit it fused, or separately where schemes differ."""
        shards = self.stored_shards(placed, item, placed.parent)
        if item.interleaved and not any(name in self.draft.index.left for name, _ in shards):
            for info in self.draft.index.take_module(placed.name).values():
                apart = " and ".join(name.rpartition(".")[2] for name, _ in shards)
                found = f"{info.dtype} {list(info.shape)}"
                self.draft.problem(info, f"{apart}, each with its tensors", found, item.interleaved)
                return
        row = [self.read(placed, item, [name])[0] for name, _ in shards]
        for parts in self.judge(placed, item, [p for _, p in shards], [row]):
            if _fit_together(parts):
                self.emit(placed.name, [parts])
            else:
                self.draft.unfused[placed.name] = tuple(s.name.rpartition(".")[2] for s in parts)
                for s in parts:
                    self.emit(s.name, [[s]])

    def stored_shards(self, placed: Placed, item: Linear, parent: str) -> list[Shards]:
        """Names and partitions of the projections as this source stores them below `parent`: apart, or fused already."""
        below = f"{parent}." if parent else ""
        return [(f"{below}{last}", partitions) for last, partitions in _layout(placed, self.is_whole(placed, item, parent))]

    def is_whole(self, placed: Placed, item: Linear, parent: str) -> bool:
        """Whether this source stores the fused module itself below `parent`."""
        if item.interleaved or len(placed.shards) < 2:
            return False
        last = placed.name.rpartition(".")[2]
        stored = self.draft.index.left.get(f"{parent}.{last}" if parent else last, {})
        return "weight" in stored or "weight_packed" in stored

    def experts(self, placed: Placed, item: Linear, siblings: Sequence[Placed]) -> None:
        """Plan a stack of experts from any stored layout: one by one, stacked by projection, or stacked and fused.

        `siblings`: all stacks of the same layer, which together show the orientation of stacked tensors.
        """
        count = placed.experts or 0
        one_by_one = any(f"{placed.parent}.{e}.{n.rpartition('.')[2]}" in self.draft.index.left
                         for e in range(min(count, 8)) for n, _ in (*placed.shards, (placed.name, ())))  # fmt: skip
        own = (placed.name, *(name for name, _ in placed.shards))
        if not one_by_one and not any(name in self.draft.index.left for name in own):
            self.draft.problems += self.draft.missing_stack(placed, siblings)
            return
        runs: list[list[Projection]] = []  # of experts that are alike, in order: [run][projection]
        if one_by_one:
            parents = [f"{placed.parent}.{e}" for e in range(count)]
            for whole, same in groupby(parents, key=lambda parent: self.is_whole(placed, item, parent)):
                below, layout = list(same), _layout(placed, whole)
                columns = [self.read(placed, item, [f"{parent}.{last}" for parent in below]) for last, _ in layout]
                for _, rows in groupby(zip(*columns), key=lambda row: [read.look for read in row]):
                    runs += self.judge(placed, item, [p for _, p in layout], list(rows))
        else:
            stack = Stack(count, self.orientation(placed.parent, siblings))
            shards = self.stored_shards(placed, item, placed.parent)
            row = [self.read(placed, item, [name])[0] for name, _ in shards]
            runs = self.judge(placed, item, [p for _, p in shards], [row], stack) if count else []
        if sum(parts[0].experts for parts in runs) < count or not runs:
            return  # some have problems
        flat = [s for parts in runs for s in parts]
        columns_of_runs = list(zip(*runs)) if len({len(parts) for parts in runs}) == 1 else []
        if columns_of_runs and _fit_together(flat, len(columns_of_runs)):
            self.emit(placed.name, runs, experts=count)
            return
        if len(columns_of_runs) > 1 and all(_fit_together(column, 1) for column in columns_of_runs):
            names = [shard.name for shard in item.shards]
            self.draft.unfused[placed.name] = tuple(names)
            for name, column in zip(names, columns_of_runs, strict=True):
                self.emit(f"{placed.parent}.{name}", [[s] for s in column], experts=count)
            return
        apart: list[str] = []
        singles = ([s.member(i) for s in parts] for parts in runs for i in range(len(parts[0].members)))
        for expert, parts in enumerate(singles):
            groups = [(s.name.rpartition(".")[2], [s]) for s in parts]
            for name, group in [(placed.name.rpartition(".")[2], parts)] if _fit_together(parts) else groups:
                apart.append(f"{expert}.{name}")
                self.emit(f"{placed.parent}.{expert}.{name}", [group])
        self.draft.unfused[placed.name] = tuple(apart)

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
            for name, partitions in self.stored_shards(placed, placed.item, placed.parent):
                stored = self.draft.index.left.get(name, {})
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
            self.draft.problem(
                square, "experts whose orientation sizes can show", f"square ones, {list(square.shape)}",
                "store the experts one by one",
            )  # fmt: skip
        self.orientations[parent] = possible == {True}
        return self.orientations[parent]

    def read(self, placed: Placed, item: Linear, names: Sequence[str]) -> list[Read]:
        """Use the tensors of a stored projection, or of the same one of several experts; ask the configs about them."""
        taken = [self.draft.index.take_module(name) for name in names]
        biases: list[TensorInfo | None] = [None] * len(names)
        for number, tensors in enumerate(taken):
            if "bias" in tensors and (item.bias or placed.part.carried):
                taken[number] = {suffix: info for suffix, info in tensors.items() if suffix != "bias"}
                if item.bias:
                    biases[number] = tensors["bias"]
                else:
                    # In a tower's table it is a parameter of its own.
                    self.draft.index.left[names[number]] = {"bias": tensors["bias"]}
        stored = [self.stored_name(name, tensors) for name, tensors in zip(names, taken)]
        hub = [hub_name(name, self.family.hub_roots[0]) for name in names]
        spellings = (stored, hub, [f"language_model.{name}" for name in names])
        experts = Experts(names, spellings, placed.name, item.linear, self.parts_of(placed, names[0]))
        said = [rules.claims(experts) for rules in self.rules if not rules.silent]
        claims = zip(*said) if said else repeat(())
        return list(map(Read, names, stored, taken, biases, claims))

    def stored_name(self, name: str, tensors: Mapping[str, TensorInfo]) -> str:
        """The name of a canonical module as this source spells it."""
        for info in tensors.values():
            module, _, last = info.name.rpartition(".")
            glued = last in self.draft.index.joined and module.endswith("experts")
            return f"{module}.{self.draft.index.joined[last][0]}" if glued else module
        return name

    def judge(
        self,
        placed: Placed,
        item: Linear,
        partitions: Sequence[Partitions],
        rows: Sequence[Sequence[Read]],
        stack: Stack | None = None,
    ) -> list[list[Projection]]:
        """Recognise the projections of experts that are alike, or of one linear; none of an expert that lacks something.

        `rows`: what was read, by expert and projection.
        """
        judged = [self.projection(placed, item, p, column, stack) for p, column in zip(partitions, zip(*rows))]
        problems = [problem for _, found in judged for problem in found]
        if problems and len(rows) > 1:  # each expert has them under its own names
            return [parts for row in rows for parts in self.judge(placed, item, partitions, [row], stack)]
        self.draft.problems += problems
        parts = [projection for projection, _ in judged if projection is not None]
        optional = []
        for projection in parts:
            claim = projection.settled.claim
            if projection.found.scheme != DENSE and (claim is None or claim.optional_input_scale):
                label = claim.label.upper() if claim is not None else f"unclaimed {projection.found.scheme}"
                optional.append((label, projection))
        if optional:
            self.optional_scales.append((placed.name, optional))
        for projection, index in ((s, i) for i in range(len(rows)) for s in parts if s.notes or s.settled.drop_input_scale):
            member = projection.members[index]
            for line in projection.notes:
                self.draft.disagreements[line].append(member.spelling)
            if projection.settled.drop_input_scale:
                activations = projection.settled.activations
                use = f"{activations}, which needs none" if activations else "weight-only"
                reason = f"its config says that the input of this module is {use}"
                self.draft.dropped.append(Dropped(projection.member(index).tensor("input_scale").name, reason))
        return [] if problems else [parts]

    def projection(
        self, placed: Placed, item: Linear, partitions: Partitions, members: Sequence[Read], stack: Stack | None
    ) -> tuple[Projection | None, list[Problem]]:
        """Recognise a stored projection and settle it with the configs; the problems are those of the first member."""
        rows = [r for _, r in partitions]
        known = placed.columns is not None and None not in rows
        shape = (sum(r or 0 for r in rows), placed.columns or 0) if known else None
        name, _, tensors, bias, said = members[0]
        if not tensors:
            expected = f"a weight of {list(shape)}" if shape else "a weight"
            return None, [self.draft.missing(f"{name}.weight", expected, [n for n, _ in placed.shards])]
        claims = list(zip((r for r in self.rules if not r.silent), said, strict=True))
        claimed = next((c.scheme for c in said), None)
        found = self.recognise(tensors, shape, len(partitions), claimed, stack)
        if isinstance(found, list):
            return None, self.explain(tensors, found)
        problems = self.check_bias(item, name, bias, found.shape[0])
        sized = tuple((p, found.shape[0] if r is None else r) for p, r in partitions)
        settled = settle(found, claims) if found.scheme != DENSE else Settled(None, False, None)
        if settled.conflict:
            a, b = settled.conflict
            first = next(iter(tensors.values()))
            said_twice = f"{a}, but {b}; the tensors fit both"
            problems.append(Problem(first.file, first.name, "configs that agree", said_twice, "remove the wrong config"))
        elif settled.missing_input_scale:
            suffix = next((t.suffix for t in found.encoding.tensors if t.role == "input_scale"), "input_scale")
            file, missing = sibling(tensors, suffix)
            label = settled.claim.label if settled.claim else ""
            problems.append(Problem(file, missing, f"the static input scale of {label}", "no such tensor", INCOMPLETE))
        notes = disagreements(found, claims, item.linear and placed.name != "lm_head")
        return Projection(members, sized, found, settled, stack, notes), problems

    def parts_of(self, placed: Placed, name: str) -> tuple[str, ...]:
        """Names of the projections that a stored module holds: configs that name those mean it too.

        For a stack they are the first expert's: configs name one expert, or each.
        """
        shards = [n for n, _ in placed.shards]
        if placed.experts is None:
            return tuple(shards) if name == placed.name and len(shards) > 1 else ()
        names, own = [n.rpartition(".")[2] for n in shards], name.rpartition(".")[2]
        return tuple(f"{placed.parent}.0.{s}" for s in ([own] if own in names else names))

    def recognise(
        self,
        tensors: Mapping[str, TensorInfo],
        shape: tuple[int, int] | None,
        partitions: int,
        claimed: str | None,
        stack: Stack | None,
    ) -> Recognised | list[Problem]:
        """`recognise.recognise`, remembering the answer: thousands of modules look alike."""
        look = (tuple([(suffix, i.dtype, i.shape) for suffix, i in tensors.items()]), shape, partitions, claimed, stack)
        known = self.recognised.get(look)
        if known is not None:
            return known
        found = recognise(tensors, shape, partitions, self.encodings, claimed, stack)
        if isinstance(found, Recognised):
            self.recognised[look] = found
        return found

    def explain(self, tensors: Mapping[str, TensorInfo], problems: list[Problem]) -> list[Problem]:
        """Replace the problems of a module in a format that is known and not supported by one that names it."""
        for suffixes, name, remedy in refused.TENSORS:
            if suffixes <= set(tensors):
                info = next(iter(tensors.values()))
                return [Problem(info.file, info.name, "FP8, NVFP4, MX or unquantised weights", name, remedy)]
        weight, scale = tensors.get("weight"), tensors.get("weight_scale")
        grouped = weight is not None and scale is not None and "weight_scale_2" in tensors and len(scale.shape) == 2
        if grouped and weight and scale and weight.shape and weight.shape[-1] * 2 == scale.shape[1] * 32:
            found = f"groups of 32 ({scale.dtype} {list(scale.shape)})"
            return [Problem(scale.file, scale.name, "NVFP4 with groups of 16", found, refused.GROUPS_OF_32)]
        if weight is not None and weight.dtype in refused.WEIGHT_DTYPES:
            name, remedy = refused.WEIGHT_DTYPES[weight.dtype]
            return [Problem(weight.file, weight.name, "FP8, NVFP4, MX or unquantised weights", name, remedy)]
        return problems

    def check_bias(self, item: Linear, name: str, bias: TensorInfo | None, rows: int) -> list[Problem]:
        """A bias must be there exactly when the architecture has one, with one value per row."""
        if item.bias is None:
            return []
        wanted = bool(self.architecture[item.bias])
        if bias is None:
            return [self.draft.missing(f"{name}.bias", f"a bias of [{rows}] ({item.bias} is true)")] if wanted else []
        found = f"{bias.dtype} {list(bias.shape)}"
        if not wanted:
            return [Problem(bias.file, bias.name, f"no bias ({item.bias} is false)", found, "correct config.json")]
        if bias.shape != (rows,) or bias.dtype not in DENSE_DTYPES:
            return [Problem(bias.file, bias.name, f"a float bias [{rows}]", found, "export again")]
        return []

    def emit(self, name: str, runs: Sequence[Sequence[Projection]], experts: int | None = None) -> None:
        """Write down the canonical tensors of one module, fused from the projections of each run in order.

        `experts`: the module is a stack, of as many experts as all runs have together.
        """
        own = runs[0]
        first = own[0].found
        lead = (experts,) if experts else ()
        biases = [read.bias for parts in runs for row in zip(*(s.members for s in parts)) for read in row if read.bias]
        if biases:
            rows = sum(i.shape[0] for i in biases)
            step = Step(f"{name}.bias", biases[0].dtype, (rows,), tuple(Term(i.name) for i in biases))
            self.draft.step(step, [(f"{name}.bias", info, [Term(info.name)]) for info in biases])
        if first.scheme == DENSE:
            self.fuse(f"{name}.weight", first.dtype, (*lead, sum(s.found.shape[0] for s in own), first.shape[1]), runs)
            return
        partitions = [p for s in own for p in s.canonical_partitions()]
        if len(partitions) == 1:
            partitions = [("", partitions[0][1])]
        spec = ModuleSpec(
            scheme=first.scheme,
            shape=(sum(rows for _, rows in partitions), first.shape[1]),
            partitions=tuple(partitions),
            activations=own[0].settled.activations,
            pre_quant_scale=own[0].own_input,
            experts=experts,
        )
        self.draft.modules[name] = spec
        for role, expected in module_tensors(spec).items():
            dtype = own[0].tensor(role).dtype if role == "pre_quant_scale" else expected.dtype
            check = CHECK_OF_ROLE.get(role) or CHECK_OF.get((spec.scheme, role), "")
            self.fuse(f"{name}.{role}", dtype, expected.shape, runs, check)

    def fuse(
        self, name: str, dtype: str, shape: tuple[int, ...], runs: Sequence[Sequence[Projection]], check: str = ""
    ) -> None:
        """Write down one canonical tensor: what the first expert's projections contribute in order, then the second's, ..."""
        role = name.rpartition(".")[2]
        columns = [[s.terms(role) for s in parts] for parts in runs]
        terms = chain.from_iterable(chain.from_iterable(zip(*column)) for column in columns)
        step = Step(name, dtype, shape, coalesce(terms) if runs[0][0].stack is not None else tuple(terms), check)
        alike = [(s, t) for parts, column in zip(runs, columns) for s, t in zip(parts, column)]
        self.draft.step(step, [(f"{s.name}.{s.found.roles[role].suffix}", s.tensor(role), t) for s, t in alike])

    def check_optional_scales(self) -> None:
        """Refuse an optional scale that is missing among its like.

        nvidia-modelopt writes weight-only modules under the name of the static algorithm, and leaves out a
        `pre_quant_scale` that it could fold.  So a scale that was lost cannot be told from one that never was by one module
        alone.  It is taken for lost when a sibling in the same fused group, a module of the same kind in another layer, or
        (input scales; the head apart) any module under the same algorithm has one.
        """
        together = {frozenset(s.found.roles) for _, parts in self.optional_scales for _, s in parts}
        if len(together) <= 1:
            return  # as nearly always: all have the same
        groups: dict[tuple[str, str, str], list[Projection]] = defaultdict(list)
        for fused_name, label, stored in (
            (fused_name, label, s.member(i))
            for fused_name, parts in self.optional_scales
            for i in range(len(parts[0][1].members))
            for label, s in parts
        ):
            kind = ".".join("#" if s.isdecimal() else s for s in stored.name.split("."))
            groups["input_scale", "kind", f"{kind} {label}"].append(stored)
            groups["pre_quant_scale", "kind", f"{kind} {label}"].append(stored)
            groups["input_scale", "group", fused_name].append(stored)
            if fused_name != "lm_head":  # heads are often weight-only by recipe
                groups["input_scale", "all", label].append(stored)
        lacking: dict[tuple[str, str], Projection] = {}
        for (role, _, _), members in groups.items():
            if len({role in m.found.roles for m in members}) > 1:
                lacking.update(((m.name, role), m) for m in members if role not in m.found.roles)
        for (_, role), stored in lacking.items():
            self.draft.problems.append(
                Problem(
                    *sibling({"weight": stored.tensor("weight")}, role), f"the {role} that its like have",
                    "no such tensor", "calibrate every module, and export again",
                )
            )  # fmt: skip


def _layout(placed: Placed, whole: bool) -> list[Shards]:
    """Last segments and partitions of the stored projections of a linear; of the fused one if that is stored as a `whole`."""
    if whole:
        return [(placed.name.rpartition(".")[2], tuple(p for _, partitions in placed.shards for p in partitions))]
    return [(name.rpartition(".")[2], partitions) for name, partitions in placed.shards]


def _fit_together(parts: Sequence[Projection], fused: int | None = None) -> bool:
    """Whether projections can be stored as one: all of one key, and none that is fused with others has an input of its own.

    `fused`: how many are fused, when `parts` are those of several experts.
    """
    several = (len(parts) if fused is None else fused) > 1
    return len({s.key for s in parts}) == 1 and not (several and any(s.own_input for s in parts))

"""`qconvert export --to compressed-tensors`: the same codes and scales as a checkpoint of llm-compressor has them.

Codes and block scales are copied.  A scale that multiplies is stored as float32; the two `*_global_scale` divide.
Engines multiply projections that share an input at once (q, k, v; gate, up) and the experts of a layer in one call, with one
scale where the format has one per tensor.  So what is equal within such a group is written as it is, and what differs is
written per channel, where that is exact, or refused, or with `requantize` brought to one scale and measured.
Source: compressed-tensors 0.20.0, run; vLLM 0.33 and SGLang 0.5.23, read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.format import FP8_BLOCK, MX_GROUP, NVFP4_GROUP, ModuleSpec, ceil_div

from .canonical import Canonical
from .dense import DenseTensors
from .dequantize import E4M3, block_of_rows, unpack
from .errors import ConvertError, Problem
from .families.base import Linear, Parameter, Placed
from .hub import Float32, HubNames, Output, Projection, Reader, projections, spans
from .requantize import Error, divisor, nvfp4_scale, to_e4m3, to_nvfp4
from .targets import Member, Targets

FP8_FORMS = ("auto", "tensor", "channel")
VERSION = "0.20.0"  # of compressed-tensors, whose config this is

# scheme -> format of a group, and arguments of its weights
WEIGHTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "fp8_tensor": ("float-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "fp8_channel": ("float-quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8_block": ("float-quantized", {"num_bits": 8, "strategy": "block", "block_structure": [FP8_BLOCK, FP8_BLOCK]}),
    "nvfp4": ("nvfp4-pack-quantized",
              {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
}  # fmt: skip
WEIGHT_ONLY_FORMATS = {"float-quantized": "naive-quantized"}  # the library's name for 8-bit weights alone
# activations -> arguments of a group's input; "local": block scales as they come, below a stored one
INPUTS: Mapping[str | None, dict[str, Any] | None] = {
    None: None,
    "fp8_static": {"num_bits": 8, "strategy": "tensor", "dynamic": False},
    "fp8_tensor": {"num_bits": 8, "strategy": "tensor", "dynamic": True},
    "fp8_token": {"num_bits": 8, "strategy": "token", "dynamic": True},
    "fp8_group": {"num_bits": 8, "strategy": "group", "group_size": 128, "dynamic": True},
    "nvfp4": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
              "scale_dtype": "torch.float8_e4m3fn"},
    "mxfp8": {"num_bits": 8, "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
}  # fmt: skip
# scheme -> activations that readers of the format know beside it
KNOWN: Mapping[str, tuple[str | None, ...]] = {
    "fp8_tensor": (None, "fp8_static", "fp8_tensor", "fp8_token"),
    "fp8_channel": (None, "fp8_static", "fp8_tensor", "fp8_token"),
    "fp8_block": (None, "fp8_group"),
    "nvfp4": (None, "nvfp4"),
    "mxfp8": (None, "mxfp8"),
    "mxfp4": (None, "mxfp4", "mxfp8"),
}
# What transformers 5.23 makes of experts in these schemes, which it stacks as it loads them; engines read them.  Run.
EXPERTS_IN_TRANSFORMERS: Mapping[str, str] = {
    "nvfp4": "transformers 5.23 reads NVFP4 experts without their global scales: load --to dense there",
    "fp8_block": "transformers 5.23 cannot load experts in FP8 blocks: load --to dense there",
    "mxfp8": "transformers 5.23 cannot load experts in MXFP8: load --to dense there",
}
PACKED = frozenset({"nvfp4", "mxfp4"})  # schemes whose weight is called `weight_packed`
GLOBAL = frozenset({"nvfp4"})  # schemes with a scale of the whole tensor above those of blocks
ONE_INPUT_SCALE = ("fp8_static", "fp8_tensor")  # which experts in per-channel FP8 cannot have
EQUAL = 1e-5  # engines take input scales of one expert's projections for equal up to this


class Form(NamedTuple):
    """What one config group says."""

    scheme: str
    activations: str | None


@dataclass(frozen=True, slots=True)
class Treatment:
    """How a projection is written.

    form       its config group
    scale      the one scale that it is brought to, None where its own is kept
    inputs     the one input scale that it is brought to, None where its own is kept
    """

    form: Form
    scale: np.float32 | None = None
    inputs: np.float32 | None = None


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised projection: its module as one tall one, and which of the partitions are its own."""

    projection: Projection
    spec: ModuleSpec
    first: int
    last: int


@dataclass(slots=True)
class Changes:
    """What `requantize` changed: per hub name of a tensor, why and how far."""

    errors: dict[str, Error] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> list[dict[str, Any]]:
        """One entry for each tensor: relative error in the Frobenius norm, largest difference; for inputs the factor."""
        weights = [
            {"tensor": name, "reason": self.reasons[name], "relative_error": error.relative, "largest_error": error.largest}
            for name, error in self.errors.items()
        ]
        return [*weights, *({"tensor": n, "reason": self.reasons[n], "factor": f} for n, f in self.inputs.items())]


class CompressedTensors:
    """A canonical checkpoint as compressed-tensors has it: decided when it is made, written when `outputs` is read.

    fp8         how a scale per tensor is written: "tensor", "channel", or "auto": per channel where a fused group's differ
    requantize  whether what has no exact form may change

    Raises `ConvertError` for what has no exact form, unless it may change.
    """

    def __init__(self, canonical: Canonical, reader: Reader, *, fp8: str = "auto", requantize: bool = False) -> None:
        self.canonical, self.reader, self.fp8, self.requantize = canonical, reader, fp8, requantize
        self.hub, self.notes, self.changes = HubNames(canonical), Counter[str](), Changes()
        self.problems: list[Problem] = []
        self._said: set[tuple[str, str]] = set()
        self._dense = DenseTensors(canonical, reader, "F32")
        self._stored = DenseTensors(canonical, reader, "BF16")
        self._floats: dict[str, Float32] = {}
        self._ends: dict[str, NDArray[np.int64]] = {}  # of each partition of a module: its last row
        self._above: dict[str, NDArray[np.int64]] = {}  # of each partition of a module: block rows before it
        self.treatments: dict[str, Treatment] = {}  # by the canonical name of each quantised projection
        self.members: dict[Hashable, list[Member]] = defaultdict(list)  # form, or None for what is not quantised
        blocks: dict[str, list[Quantised]] = defaultdict(list)
        for placed in canonical.placed:
            for p in projections(canonical, placed):
                spec = canonical.config.modules.get(p.module)
                if spec is not None and isinstance(placed.item, Linear) and placed.item.linear:
                    first, last = self._partitions(p, spec)
                    block = placed.name if p.expert is None else placed.parent
                    blocks[block].append(Quantised(p, spec.tall(), first, last))
                else:
                    self.members[None].append(_member(p))
            if isinstance(placed.item, Parameter) and _is_matrix(canonical, placed):
                self.members[None].append(Member(placed.name.removesuffix(".weight")))
        for block, found in blocks.items():
            self._decide(block, found)
        if self.problems:
            raise ConvertError(self.problems)

    # ------------------------------------------------------------------------------------------------------ facts

    def _partitions(self, p: Projection, spec: ModuleSpec) -> tuple[int, int]:
        """Indices [first, last) of the partitions of a projection, in its module as one tall one."""
        if p.module not in self._ends:
            self._ends[p.module] = np.cumsum([rows for _, rows in spec.tall().partitions])
        ends = self._ends[p.module]
        first, last = np.searchsorted(ends, (p.start, p.stop - 1), side="right")
        return int(first), int(last) + 1

    def _scales(self, q: Quantised, role: str) -> Float32:
        """The scales of a projection's partitions, one each."""
        name = f"{q.projection.module}.{role}"
        if name not in self._floats:
            self._floats[name] = self._positive(name)
        return self._floats[name][q.first : q.last]

    def _positive(self, name: str) -> Float32:
        """A tensor of scales.  Raises `ConvertError` for what can be none: the checkpoint has changed since it was made."""
        values = self.reader.floats(name)
        if not (np.isfinite(values) & (values > 0)).all():
            remedy = "the checkpoint is damaged: run qconvert IN OUT again"
            raise ConvertError(Problem(self.reader.info(name).file, name, "scales finite and greater than 0", "others", remedy))
        return values

    def _problem(self, q: Quantised, expected: str, found: str, remedy: str) -> None:
        said = (q.projection.placed.name, expected)
        if said in self._said:  # one for a stack of experts
            return
        self._said.add(said)
        file = self.reader.info(f"{q.projection.module}.weight").file
        self.problems.append(Problem(file, q.projection.name, expected, found, remedy))

    # --------------------------------------------------------------------------------------------------- decisions

    def _decide(self, block: str, found: Sequence[Quantised]) -> None:
        """Decide on the form of what engines give one: a fused module, or all experts of a layer."""
        forms = [self._form(q) for q in found]
        if len(set(forms)) > 1:
            what = " and ".join(sorted({f"{f.scheme} with input {f.activations or 'as it is'}" for f in forms}))
            self.notes[f"engines fuse {_last(block)} and refuse it, as it has {what}; transformers loads it"] += 1
        groups: dict[tuple[str, int | None], list[tuple[Quantised, Form]]] = defaultdict(list)
        for q, form in zip(found, forms):
            groups[q.projection.fused].append((q, form))
        experts = found[0].projection.expert is not None
        channel = self._needs_channels(groups.values(), experts)
        for members in groups.values():
            treatments = [Treatment(form) for _, form in members]
            schemes = {form.scheme for _, form in members}
            if schemes == {"fp8_tensor"}:
                treatments = self._fp8(members, channel, experts)
            elif schemes == {"nvfp4"}:
                treatments = self._nvfp4(members)
            elif schemes == {"fp8_channel"} and experts:
                treatments = [Treatment(self._channel_form(q, form, experts)) for q, form in members]
            treatments = self._inputs(members, treatments, experts)
            for (q, _), treatment in zip(members, treatments):
                self.treatments[q.projection.name] = treatment
        final = {self.treatments[q.projection.name].form for q in found}
        if any(f.activations is None for f in final) and len(final) > 1 and len(set(forms)) == 1:
            for q in found:  # one of them lost its input scale: engines give all of them one form
                name = q.projection.name
                self.treatments[name] = Treatment(Form(forms[0].scheme, None), self.treatments[name].scale)
        self.notes.update(EXPERTS_IN_TRANSFORMERS[f.scheme] for f in final if experts and f.scheme in EXPERTS_IN_TRANSFORMERS)
        for q in found:
            self.members[self.treatments[q.projection.name].form].append(_member(q.projection))

    def _form(self, q: Quantised) -> Form:
        scheme, activations = q.spec.scheme, q.spec.activations
        if scheme == "fp8_block" and activations == "fp8_group_e8m0":
            if not self.requantize:
                self._problem(q, "input scales of any value", "ones that are powers of two (UE8M0)",
                              "compressed-tensors cannot say so: with --requantize the export asks for plain ones")  # fmt: skip
            self.notes["input scales of FP8 blocks are no longer rounded to powers of two"] += 1
            activations = "fp8_group"
        if activations not in KNOWN[scheme]:
            self._problem(q, f"{scheme} with input {' or '.join(str(a) for a in KNOWN[scheme])}", f"{activations}",
                          "compressed-tensors has no such form: export --to dense")  # fmt: skip
        if q.spec.pre_quant_scale and scheme != "nvfp4":
            self._problem(q, "no pre_quant_scale", f"one beside {scheme}",
                          "compressed-tensors has no place for it: export --to dense")  # fmt: skip
        return Form(scheme, activations)

    def _needs_channels(self, groups: Iterable[Sequence[tuple[Quantised, Form]]], experts: bool) -> bool:
        """Whether the per-tensor FP8 scales of a block are written per channel."""
        differing, static = 0, False
        for members in groups:
            scales = [self._scales(q, "weight_scale") for q, form in members if form.scheme == "fp8_tensor"]
            if any((s != s[0]).any() for s in scales):  # within one stored projection
                return True
            differing += len({float(s[0]) for s in scales}) > 1
            static = static or any(form.activations in ONE_INPUT_SCALE for _, form in members)
        if self.fp8 == "tensor" and differing:
            self.notes["engines requantise fused FP8 to the largest scale: without --fp8 tensor they need not"] += differing
        if self.fp8 == "auto" and differing:
            self.notes["fused FP8 with different scales is written per channel, which engines read exactly"] += not experts
            return not (experts and static and self.requantize)
        return self.fp8 == "channel"

    def _channel_form(self, q: Quantised, form: Form, experts: bool) -> Form:
        """The per-channel form of FP8.  Engines give the inputs of such experts a scale per token."""
        if not experts or form.activations not in ONE_INPUT_SCALE:
            return Form("fp8_channel", form.activations)
        if self.fp8 != "channel":
            self._problem(
                q, "one FP8 scale for what engines fuse, as its inputs have one scale", "scales that differ",
                "--fp8 channel writes exact weights, and inputs of experts then get a scale per token; "
                "--requantize brings the weights to one scale and measures the error",
            )  # fmt: skip
        self.notes["inputs of experts get a scale per token instead of the stored one"] += 1
        return Form("fp8_channel", "fp8_token")

    def _fp8(self, members: Sequence[tuple[Quantised, Form]], channel: bool, experts: bool) -> list[Treatment]:
        scales = np.concatenate([self._scales(q, "weight_scale") for q, _ in members])
        differ = bool((scales != scales[0]).any())
        if differ and not channel and self.requantize and self.fp8 == "auto":
            return [Treatment(form, self._changed(q, scales.max(), "weight_scale")) for q, form in members]
        if channel:
            return [Treatment(self._channel_form(q, form, experts)) for q, form in members]
        return [Treatment(form) for _, form in members]

    def _nvfp4(self, members: Sequence[tuple[Quantised, Form]]) -> list[Treatment]:
        scales = np.concatenate([self._scales(q, "weight_scale_2") for q, _ in members])
        factors = [q for q, _ in members if q.spec.pre_quant_scale]
        if not factors and (scales == scales[0]).all():
            return [Treatment(form) for _, form in members]
        if not self.requantize:
            for q in factors[:1]:
                self._problem(q, "no pre_quant_scale", "one for each input",
                              "compressed-tensors has no place for it: export --to dense, or --requantize")  # fmt: skip
            if not factors:
                low, high = float(scales.min()), float(scales.max())
                self._problem(
                    members[0][0], "one global scale for what engines fuse", f"from {low:.6g} to {high:.6g}",
                    "engines would read wrong numbers: --requantize brings them to one and measures the error",
                )  # fmt: skip
        if not factors:
            return [Treatment(form, self._changed(q, scales.max(), "weight_scale_2")) for q, form in members]
        if not self.requantize:
            return [Treatment(form) for _, form in members]
        largest = max(float(np.abs(values).max(initial=0)) for q, _ in members for values in self._values(q))
        self.notes["inputs stay as they are where pre_quant_scale was folded into the weight, as their scale went with it"] += 1
        scale = nvfp4_scale(largest)
        for q, _ in members:
            self._change(q, "pre_quant_scale folded into the weight")
        return [Treatment(Form("nvfp4", None), scale) for _ in members]

    def _changed(self, q: Quantised, scale: np.float32, role: str) -> np.float32 | None:
        """The scale that a projection is brought to, None if it has it already; noted."""
        if (self._scales(q, role) == scale).all():
            return None
        self._change(q, "one scale for what engines fuse")
        return scale

    def _change(self, q: Quantised, reason: str) -> None:
        name = f"{self.hub(q.projection.name)}.{'weight_packed' if q.spec.scheme in PACKED else 'weight'}"
        self.changes.reasons[name], self.changes.errors[name] = reason, Error()

    def _inputs(
        self, members: Sequence[tuple[Quantised, Form]], treatments: list[Treatment], experts: bool
    ) -> list[Treatment]:
        """Bring input scales to one where engines take one of them for all and would clip, or refuse."""
        static = [q for (q, _), t in zip(members, treatments) if t.form.activations in ("fp8_static", "nvfp4")]
        if len(static) < len(members):
            return treatments
        scales = np.concatenate([self._scales(q, "input_scale") for q in static])
        if (scales == scales[0]).all():
            return treatments
        inside = any((s != s[0]).any() for s in (self._scales(q, "input_scale") for q in static))
        forms = {t.form.activations for t in treatments}
        close = bool(scales.max() - scales.min() <= EQUAL)
        if forms == {"fp8_static"} and not inside and (close or not experts):
            self.notes["engines take the largest input scale of what they fuse"] += 1
            return treatments
        if not self.requantize:
            self._problem(static[0], "one input scale for what engines fuse",
                          f"from {float(scales.min()):.6g} to {float(scales.max()):.6g}",
                          "engines would clip or refuse: --requantize writes the largest for all")  # fmt: skip
        largest = scales.max()
        result = []
        for q, treatment in zip(static, treatments):
            own = float(self._scales(q, "input_scale").max())
            if own != float(largest):
                suffix = "input_global_scale" if treatment.form.activations == "nvfp4" else "input_scale"
                name = f"{self.hub(q.projection.name)}.{suffix}"
                self.changes.reasons[name] = "one input scale for what engines fuse"
                self.changes.inputs[name] = float(largest) / own
            result.append(Treatment(treatment.form, treatment.scale, largest))
        return result

    # ----------------------------------------------------------------------------------------------------- tensors

    def _values(self, q: Quantised) -> Iterator[Float32]:
        """The weight of a projection as float32, in pieces of rows."""
        for first, last in spans(q.projection.start, q.projection.stop, q.spec.shape[1]):
            with np.errstate(all="ignore"):  # a damaged checkpoint may hold what has no finite product
                yield self.reader.decoded(q.projection.module, q.spec, first, last)

    def outputs(self) -> Iterator[Output]:
        """Every tensor, in the order of the model.  What `requantize` changes is measured as its bytes are read."""
        attention, modules = self.canonical.config.kv_cache, self.canonical.config.modules
        for placed in self.canonical.placed:
            table = isinstance(placed.item, Linear) and not placed.item.linear  # engines have none that is quantised
            if table or not self._has_quantised(placed):
                yield from (self._dense if placed.name in modules else self._stored).placed(placed)
                continue
            for p in projections(self.canonical, placed):
                spec = modules.get(p.module)
                if spec is None:
                    yield from self._stored.projection(p)
                    continue
                first, last = self._partitions(p, spec)
                yield from self._projection(Quantised(p, spec.tall(), first, last), self.treatments[p.name])
                yield from self._stored.bias(p)
        kinds = set(attention.values())
        for module in attention:
            for role in ("k_scale", "v_scale"):
                yield self._kv_scale(f"{module}.{role}", "head" in kinds)

    def _has_quantised(self, placed: Placed) -> bool:
        """Whether any projection of a linear is quantised."""
        modules = self.canonical.config.modules
        if placed.name in modules:
            return True
        apart = placed.name in self.canonical.config.unfused
        return apart and any(p.module in modules for p in projections(self.canonical, placed))

    def _projection(self, q: Quantised, treatment: Treatment) -> Iterator[Output]:
        name, p, form = self.hub(q.projection.name), q.projection, treatment.form
        rows, columns = p.stop - p.start, q.spec.shape[1]
        if treatment.scale is not None:
            yield from self._requantised(q, treatment.scale, name)
        else:
            yield self._weight(q, name)
            yield self._weight_scale(q, form.scheme, name, rows, columns)
        if form.scheme in GLOBAL:
            scale = treatment.scale if treatment.scale is not None else self._scales(q, "weight_scale_2")[0]
            yield self._divided(f"{name}.weight_global_scale", scale)
        if form.activations in ("fp8_static", "nvfp4"):
            own = self._scales(q, "input_scale").max()
            scale = treatment.inputs if treatment.inputs is not None else own
            if form.activations == "nvfp4":
                yield self._divided(f"{name}.input_global_scale", scale)
            else:
                yield _small(f"{name}.input_scale", "F32", (1,), scale.tobytes())

    def _divided(self, name: str, scale: np.float32) -> Output:
        value = divisor(scale)
        if np.float32(1) / value != scale:
            self.notes["global scales have no divisor in float32 that gives them exactly: one unit in the last place"] += 1
        return _small(name, "F32", (1,), value.tobytes())

    def _weight(self, q: Quantised, name: str) -> Output:
        p, (_, columns) = q.projection, q.spec.shape
        packed = q.spec.scheme in PACKED
        width = columns // 2 if packed else columns
        suffix, dtype = ("weight_packed", "U8") if packed else ("weight", "F8_E4M3")
        return self._copied(f"{name}.{suffix}", dtype, f"{p.module}.weight", p.start, p.stop, width)

    def _copied(self, name: str, dtype: str, tensor: str, start: int, stop: int, width: int) -> Output:
        """Rows of a stored tensor of one-byte elements."""

        def pieces() -> Iterator[memoryview]:
            for first, last in spans(start, stop, width):
                yield self.reader.stored(tensor, width, first, last)

        return Output(name, dtype, (stop - start, width), pieces)

    def _weight_scale(self, q: Quantised, scheme: str, name: str, rows: int, columns: int) -> Output:
        p, suffix = q.projection, f"{name}.weight_scale"
        tensor = f"{p.module}.weight_scale"
        if scheme == "nvfp4":
            return self._copied(suffix, "F8_E4M3", tensor, p.start, p.stop, columns // NVFP4_GROUP)
        if scheme in ("mxfp8", "mxfp4"):
            return self._copied(suffix, "U8", tensor, p.start, p.stop, columns // MX_GROUP)
        if scheme == "fp8_block":
            shape = self._blocks(q, columns).shape  # refused now if at all
            return Output(suffix, "F32", shape, lambda: (self._blocks(q, columns).tobytes(),))
        if q.spec.scheme == "fp8_channel":
            return Output(suffix, "F32", (rows, 1), lambda: (self.reader.stored(tensor, 1, p.start, p.stop),))
        if scheme == "fp8_channel":
            return Output(suffix, "F32", (rows, 1), lambda: (self._per_row(q, self._scales(q, "weight_scale")).tobytes(),))
        return _small(suffix, "F32", (1,), self._scales(q, "weight_scale")[:1].tobytes())

    def _begin(self, q: Quantised) -> int:
        """The first row of the first of a projection's partitions: its own first one, unless one holds several projections."""
        return int(self._ends[q.projection.module][q.first - 1]) if q.first else 0

    def _per_row(self, q: Quantised, values: Float32) -> Float32:
        """One value per partition of a projection -> one per row of it."""
        p, begin = q.projection, self._begin(q)
        return np.repeat(values, [n for _, n in q.spec.partitions[q.first : q.last]])[p.start - begin : p.stop - begin]

    def _blocks(self, q: Quantised, columns: int) -> Float32:
        """Block scales of a projection whose blocks do not restart at each of its partitions."""
        p, begin, wide = q.projection, self._begin(q), ceil_div(columns, FP8_BLOCK)
        if p.module not in self._above:
            self._above[p.module] = np.cumsum([0, *(ceil_div(n, FP8_BLOCK) for _, n in q.spec.partitions)])
        above = self._above[p.module]
        stored = self.reader.rows(f"{p.module}.weight_scale", wide, int(above[q.first]), int(above[q.last])).reshape(-1, wide)
        own = replace(q.spec, shape=(0, columns), partitions=q.spec.partitions[q.first : q.last])
        of_rows = stored[block_of_rows(own, p.start - begin, p.stop - begin)]
        blocks = of_rows[::FP8_BLOCK]
        if (np.repeat(blocks, FP8_BLOCK, axis=0)[: len(of_rows)] != of_rows).any():
            self._problem(q, "the same scales in each block of 128 rows", "a partition that ends within one",
                          "compressed-tensors has no place for it: export --to dense")  # fmt: skip
            raise ConvertError(self.problems)
        return np.ascontiguousarray(blocks)

    def _requantised(self, q: Quantised, scale: np.float32, name: str) -> Iterator[Output]:
        """Weight and scale of a projection, in one scale for all of it."""
        p, (_, columns) = q.projection, q.spec.shape
        rows = p.stop - p.start
        if q.spec.scheme == "fp8_tensor":
            error = self.changes.errors[f"{name}.weight"]

            def codes() -> Iterator[bytes]:
                for values in self._values(q):
                    new = to_e4m3((values / scale).astype(np.float32))
                    error.add(E4M3[new] * scale, values)
                    yield new.tobytes()

            yield Output(f"{name}.weight", "F8_E4M3", (rows, columns), codes)
            yield _small(f"{name}.weight_scale", "F32", (1,), scale.tobytes())
            return
        error = self.changes.errors[f"{name}.weight_packed"]
        ratio = self._per_row(q, (self._scales(q, "weight_scale_2") / scale).astype(np.float32))

        def new_codes(measured: bool) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
            for (first, last), values in zip(spans(p.start, p.stop, columns), self._values(q)):
                hint = None
                if not q.spec.pre_quant_scale:
                    stored = self.reader.stored(f"{p.module}.weight_scale", columns // NVFP4_GROUP, first, last)
                    blocks = E4M3[np.frombuffer(stored, np.uint8)].reshape(last - first, -1)
                    hint = (blocks * ratio[first - p.start : last - p.start, None]).astype(np.float32)
                weight, scales = to_nvfp4(values, scale, hint)
                if measured:
                    error.add(unpack(weight) * np.repeat(E4M3[scales] * scale, NVFP4_GROUP, axis=1), values)
                yield weight, scales

        packed, grouped = (rows, columns // 2), (rows, columns // NVFP4_GROUP)
        yield Output(f"{name}.weight_packed", "U8", packed, lambda: (w.tobytes() for w, _ in new_codes(True)))
        yield Output(f"{name}.weight_scale", "F8_E4M3", grouped, lambda: (s.tobytes() for _, s in new_codes(False)))

    def _kv_scale(self, tensor: str, per_head: bool) -> Output:
        values = self._positive(tensor)
        if per_head:
            heads = int(self.canonical.config.architecture[self.canonical.family.kv_heads])
            values = np.ascontiguousarray(np.broadcast_to(values, (heads,)))
        shape = (len(values), 1, 1) if per_head else (1,)
        return _small(self.hub(tensor), "F32", shape, values.tobytes())

    # ------------------------------------------------------------------------------------------------------ config

    def quantization_config(self) -> dict[str, Any] | None:
        """`quantization_config` of `config.json`; None for a checkpoint without quantised modules."""
        family = self.canonical.family
        forms = [key for key in self.members if isinstance(key, Form)]
        kv_kinds = set(self.canonical.config.kv_cache.values())
        if not forms and not kv_kinds:
            return None
        # transformers takes the scheme of its stacked experts from the first group that names experts by a pattern.
        forms.sort(key=lambda form: not any(m.expert is not None for m in self.members[form]))
        targets = Targets(family)
        entries = targets.entries(self.members)
        ignore = entries.pop(None, [])
        roots = {m.name.partition(".")[0] for form in forms for m in self.members[form]}
        apart = [targets.whole(part.root) for part in family.parts if part.carried and part.root not in roots]
        head = [Member("lm_head")] if "lm_head" not in roots else []  # a tied one is a module all the same
        ignore = list(dict.fromkeys([*ignore, *targets.entries({None: head})[None], *apart]))
        groups: dict[str, Any] = {}
        for number, form in enumerate(forms):
            named = entries[form]
            if len(forms) == 1:  # as llm-compressor writes it; engines do not take their heads for linears
                named = ["Linear", *(targets.entries({form: [Member("lm_head")]})[form] if "lm_head" in roots else [])]
            groups[f"group_{number}"] = _group(form, named)
        formats = {group["format"] for group in groups.values()}
        cache = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
        return {
            "config_groups": groups,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
            "global_compression_ratio": None,
            "ignore": ignore,
            "kv_cache_scheme": {**cache, "strategy": "attn_head" if "head" in kv_kinds else "tensor"} if kv_kinds else None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
        }

    def report(self) -> dict[str, Any]:
        """What was written: groups and how many projections they have, what was noted, what was changed."""
        groups = [
            {"scheme": f.scheme, "activations": f.activations, "projections": len(self.members[f])}
            for f in self.members
            if isinstance(f, Form)
        ]
        notes = [f"{text} ({count})" if count > 1 else text for text, count in self.notes.items() if count]
        return {"groups": groups, "notes": notes, "requantized": self.changes.to_json()}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _member(p: Projection) -> Member:
    if p.expert is None:
        return Member(p.name)
    return Member(p.placed.parent, p.expert, _last(p.name))


def _is_matrix(canonical: Canonical, placed: Placed) -> bool:
    """Whether a parameter is the weight of a module that a config could mean: a convolution, say."""
    info = canonical.tensors.get(placed.name)
    return info is not None and placed.name.endswith(".weight") and len(info.shape) > 1


def _group(form: Form, targets: list[str]) -> dict[str, Any]:
    kind, weights = WEIGHTS[form.scheme]
    inputs = INPUTS[form.activations]
    common = {"type": "float", "symmetric": True}
    return {
        "format": kind if inputs is not None else WEIGHT_ONLY_FORMATS.get(kind, kind),
        "input_activations": None if inputs is None else {**common, **inputs},
        "output_activations": None,
        "targets": targets,
        "weights": {**common, "dynamic": False, **weights},
    }


def _small(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Output:
    """A tensor that is in memory."""
    return Output(name, dtype, shape, lambda: (data,))



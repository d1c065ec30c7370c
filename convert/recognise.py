"""Recognises the scheme of a module from its tensors alone, and settles it with what the configs claim.  Tensors win."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from runtime.format import ACTIVATIONS, FP8_BLOCK, MX_GROUP, NVFP4_GROUP, ceil_div

from .dialects import DENSE_ENCODING, DIALECTS
from .dialects.base import DENSE, SCALAR, Claim, Encoding, Rules, Stored
from .errors import Problem
from .source import TensorInfo

INCOMPLETE = "the checkpoint is incomplete: fetch or export it again"
# Suffix of a tensor that no encoding has -> what to do about it, where more is known than that.
REMEDIES: Mapping[str, str] = {"bias": "this family has no bias here: take config.json and files from the same checkpoint"}
GROUP_SIZES: Mapping[str, int] = {"nvfp4": NVFP4_GROUP, "mxfp8": MX_GROUP, "mxfp4": MX_GROUP}

# What a scheme's input is when neither a config nor a stored input scale says otherwise.
DEFAULT_ACTIVATIONS: Mapping[str, str | None] = {
    "fp8_tensor": None,
    "fp8_channel": "fp8_token",
    "fp8_block": "fp8_group",
    "nvfp4": None,
    "mxfp8": "mxfp8",
    "mxfp4": None,
}
STATIC_ACTIVATIONS: Mapping[str, str] = {"fp8_tensor": "fp8_static", "fp8_channel": "fp8_static", "nvfp4": "nvfp4"}


class Recognised(NamedTuple):
    """What a stored module is: its scheme ("dense" when not quantised), logical size, how each role that it has is stored.

    `dtype`: that of the weight.
    """

    scheme: str
    shape: tuple[int, int]
    roles: Mapping[str, Stored]
    dtype: str
    encoding: Encoding

    @property
    def has_input_scale(self) -> bool:
        """Whether a static input scale is stored."""
        return "input_scale" in self.roles


NO_DIMENSION = -1


def _sizes(n: int, k: int, p: int) -> dict[str, int | None]:
    """The value of each dimension letter; None where K does not divide."""
    return {
        "1": 1, "N": n, "K": k, "P": p if p > 1 else None,
        "K/2": k // 2 if k % 2 == 0 else None,
        "K/16": k // NVFP4_GROUP if k % NVFP4_GROUP == 0 else None,
        "K/32": k // MX_GROUP if k % MX_GROUP == 0 else None,
        "NB": ceil_div(n, FP8_BLOCK), "KB": ceil_div(k, FP8_BLOCK),
        "B0": NO_DIMENSION if n <= FP8_BLOCK and k <= FP8_BLOCK else None,
    }  # fmt: skip


def _shapes(stored: Stored, sizes: Mapping[str, int | None]) -> list[tuple[int, ...]]:
    resolved = [tuple(sizes[d] for d in shape if sizes[d] != NO_DIMENSION) for shape in stored.shapes]
    return [shape for shape in resolved if None not in shape]  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Stack:
    """How a stack of experts is stored: the number of experts, and whether the last two axes are exchanged."""

    experts: int
    transposed: bool = False

    def shapes(self, stored: Stored, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The stacked forms of the shapes of one expert; a scalar may also stand for all experts."""
        stacked = [
            (self.experts, *(shape[::-1] if self.transposed and len(shape) == 2 else shape)) for shape in shapes
        ]
        return stacked + [s for s in shapes if s in ((), (1,))] if SCALAR[0] in stored.shapes else stacked


def _fault(
    stored: Stored, info: TensorInfo, sizes: Mapping[str, int | None], stack: Stack | None
) -> Problem | None:
    shapes = _shapes(stored, sizes)
    if stack is not None:
        shapes = stack.shapes(stored, shapes)
    if info.dtype in stored.dtypes and info.shape in shapes:
        return None
    rules = " or ".join(str(list(s)) for s in shapes) or f"{list(stored.shapes[0])}, with K divisible"
    return Problem(
        info.file, info.name, f"{'/'.join(stored.dtypes)} {rules}", f"{info.dtype} {list(info.shape)}",
        "the tensor does not fit the config or its weight: export the checkpoint again",
    )  # fmt: skip


def _infer(info: TensorInfo, stored: Stored) -> tuple[int, int] | None:
    """Logical (N, K) of a module whose size no table gives, from its weight."""
    if len(info.shape) != 2:
        return None
    return info.shape[0], info.shape[1] * (2 if stored.shapes[0][-1] == "K/2" else 1)


def sibling(tensors: Mapping[str, TensorInfo], suffix: str) -> tuple[str, str]:
    """(file, name) that the missing tensor `suffix` would have beside the stored ones."""
    key = next((k for k in ("weight", "weight_packed") if k in tensors), next(iter(tensors)))
    near = tensors[key]
    module, _, last = near.name.rpartition(".")
    if last == key:
        return near.file, f"{module}.{suffix}"
    # A stack of experts: its weight is `gate_up_proj` or `w13_weight`, its scales continue that with an underscore.
    return near.file, f"{near.name.removesuffix(f'_{key}')}_{suffix}"


def _complaints(
    encoding: Encoding,
    tensors: Mapping[str, TensorInfo],
    shape: tuple[int, int],
    partitions: int,
    stack: Stack | None,
) -> list[Problem]:
    """Everything that keeps `tensors` from being this encoding; empty when they are."""
    sizes = _sizes(*shape, partitions)
    known = {stored.suffix for stored in encoding.tensors}
    problems = []
    for stored in encoding.tensors:
        info = tensors.get(stored.suffix)
        if info is not None:
            fault = _fault(stored, info, sizes, stack)
            if fault:
                problems.append(fault)
        elif not stored.optional:
            file, name = sibling(tensors, stored.suffix)
            problems.append(
                Problem(file, name, f"the {stored.role} of {encoding.scheme} weights", "no such tensor", INCOMPLETE)
            )
    for suffix, info in tensors.items():
        if suffix not in known:
            problems.append(
                Problem(
                    info.file,
                    info.name,
                    f"no {suffix} beside {encoding.scheme} weights",
                    f"{info.dtype} {list(info.shape)}",
                    REMEDIES.get(suffix, "this producer or layout is not known: export with nvidia-modelopt or llm-compressor"),
                )
            )
    return problems


def encodings_for(rules: Sequence[Rules]) -> list[Encoding]:
    """All encodings, those of the declared dialects first."""
    declared = [r.dialect for r in rules]
    order = sorted(DIALECTS, key=lambda d: declared.index(d.name) if d.name in declared else len(declared))
    return [e for d in order for e in d.encodings] + [DENSE_ENCODING]


def recognise(
    tensors: Mapping[str, TensorInfo],
    shape: tuple[int, int] | None,
    partitions: int,
    encodings: Iterable[Encoding],
    claimed: str | None,
    stack: Stack | None = None,
) -> Recognised | list[Problem]:
    """Find the encoding that a module's tensors fit.

    `tensors`: suffix -> tensor, not empty; `shape`: logical (N, K), or None when any size will do; `partitions`: how many
    the stored projection covers; `claimed`: the scheme that the config names, which breaks ties between equal readings and
    chooses what a damaged module is measured against; `stack`: the tensors are a stack of experts.  Returns the problems of
    the closest encoding when none fits.
    """
    best: list[Problem] = []
    rank = (1 << 30, True)
    match: Recognised | None = None
    for encoding in encodings:
        weight = tensors.get(encoding.weight.suffix)
        if weight is None:
            continue
        size = shape or _infer(weight, encoding.weight)
        if size is None:
            continue
        problems = _complaints(encoding, tensors, size, partitions, stack)
        if not problems:
            roles = {stored.role: stored for stored in encoding.tensors if stored.suffix in tensors}
            found = Recognised(encoding.scheme, size, roles, weight.dtype, encoding)
            if encoding.scheme == claimed or claimed is None:
                return found
            match = match or found
            continue
        # The closest encoding: first by the weight's own dtype, then by how much is wrong.
        wrong_weight = weight.dtype not in encoding.weight.dtypes
        score = (len(problems) + 10 * wrong_weight, encoding.scheme != claimed)
        if score < rank:
            rank, best = score, problems
    if match is not None:
        return match
    if best:
        return best
    file, name = sibling(tensors, "weight")
    present = ", ".join(sorted(tensors))
    return [Problem(file, name, "a weight", f"only {present}", INCOMPLETE)]


class Settled(NamedTuple):
    """How a module's input is quantised, after tensors and configs have been weighed.

    `drop_input_scale`: a scale is stored that the scheme does not use.  `claim`: the config's words that fit the tensors.
    """

    activations: str | None
    drop_input_scale: bool
    claim: Claim | None
    missing_input_scale: bool = False
    conflict: tuple[str, str] | None = None


def settle(found: Recognised, claims: Sequence[tuple[Rules, Claim]]) -> Settled:
    """Weigh the claims of all configs about a quantised module.

    A claim counts when its scheme is the one that the tensors show.  Among several that count, those that agree with the
    presence of an input scale are preferred; if they still differ, the configs contradict each other beyond repair.
    """
    stored = found.has_input_scale
    fitting = [(r, c) for r, c in claims if c.scheme == found.scheme]
    if not fitting:
        activations = STATIC_ACTIVATIONS[found.scheme] if stored else DEFAULT_ACTIVATIONS[found.scheme]
        return Settled(activations, False, None)

    def static(claim: Claim) -> bool:
        return claim.activations is not None and ACTIVATIONS[claim.activations]

    preferred = [(r, c) for r, c in fitting if static(c) == stored] or fitting
    rules, claim = preferred[0]
    for other_rules, other in preferred[1:]:
        if other.activations != claim.activations:
            return Settled(None, False, claim, conflict=(
                f"{claim.label} in {rules.where}", f"{other.label} in {other_rules.where}",
            ))  # fmt: skip
    if static(claim) and not stored:
        return Settled(None, False, claim, missing_input_scale=not claim.optional_input_scale)
    return Settled(claim.activations, stored and not static(claim), claim)


def disagreements(found: Recognised, claims: Sequence[tuple[Rules, Claim]], is_linear: bool) -> list[str]:
    """What the configs say about a module that its tensors contradict, in words to be followed by the module's name."""
    lines = []
    for rules, claim in claims:
        if found.scheme == claim.scheme:
            expected = GROUP_SIZES.get(claim.scheme)
            if claim.group_size is not None and expected is not None and claim.group_size != expected:
                lines.append(f"{rules.where} says group size {claim.group_size}, tensors say {expected}")
            static = claim.activations is not None and ACTIVATIONS[claim.activations]
            if found.scheme != DENSE and found.has_input_scale and not static:
                lines.append(f"{rules.where} says {claim.label}, which needs no input scale, tensors have one")
        elif claim.scheme == DENSE:
            lines.append(f"{rules.where} says {claim.label} (not quantised), tensors say {found.scheme}")
        elif found.scheme == DENSE:
            if claim.explicit or is_linear:
                lines.append(f"{rules.where} says {claim.label}, tensors are {found.dtype} and not quantised")
        else:
            lines.append(f"{rules.where} says {claim.label}, tensors say {found.scheme}")
    return lines

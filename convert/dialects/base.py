"""What a dialect is: how one producer stores each scheme, and how its config says which module has which scheme.

Two independent sources of truth meet in the planner.  `Encoding` rows recognise a module from its tensors alone; `Rules`
say what the config claims.  Tensors win; the config decides only what tensors cannot show (how activations are quantised).
"""

from __future__ import annotations

import fnmatch
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from runtime.format import DENSE_DTYPES

from ..errors import ConvertError, Problem
from ..names import NameSpace, canonical_name, repair_sentinel

FLOATS = DENSE_DTYPES
DENSE = "dense"  # the scheme name of a module that is not quantised; it has no entry in the canonical config

# A dimension of a stored shape: a number, or a letter that the module's logical size (N, K, P) gives a value to.
#   N, K    out and in features      K/2 K/16 K/32   packed or grouped along K; None when K does not divide
#   P       partitions of the shard  NB KB           blocks of 128 along N and K, the last may be partial
#   B0      no dimension at all, allowed only where a single block covers the whole weight
Shape = tuple[str, ...]
SCALAR: tuple[Shape, ...] = ((), ("1",), ("P",))


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a module on disk.  The direction of a scale is part of `transform`: there is no default.

    suffix     the last name segment on disk
    role       the canonical role it plays (docs/format.md)
    dtypes     safetensors dtypes it may have
    shapes     symbolic shapes it may have
    transform  a key of `convert.ops.TRANSFORMS`: "copy", "f32", "reciprocal" (a divisor on disk) or "e8m0"
    optional   whether the module is complete without it
    """

    suffix: str
    role: str
    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transform: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one producer stores one scheme; `source` names the producer's version that this was read from."""

    scheme: str
    tensors: tuple[Stored, ...]
    source: str

    @property
    def weight(self) -> Stored:
        """The row of the weight itself, by which an encoding is first told from others."""
        return next(t for t in self.tensors if t.role == "weight")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a config says about one module.

    scheme       a scheme of runtime.format.SCHEMES, or DENSE
    activations  a key of runtime.format.ACTIVATIONS, or None
    label        the config's own words, for messages
    optional_input_scale   whether the same words are also used for weight-only modules (nvidia-modelopt's FP8)
    group_size   elements per block scale that the config states, or None
    explicit     whether the config means this very module, not every linear
    """

    scheme: str
    activations: str | None
    label: str
    optional_input_scale: bool = False
    group_size: int | None = None
    explicit: bool = True


@dataclass(frozen=True, slots=True)
class KvClaim:
    """What a config says about the KV cache: "fp8", or another format's name that cannot be converted."""

    format: str
    label: str


@dataclass(slots=True)
class Rules:
    """One quantisation config, read: module -> claim.

    where    the file and key it was found at
    dialect  name of the dialect that read it
    exact    canonical module name -> claim (a fused or container name stands for what is below it)
    ordered  (matcher, claim) pairs, first match wins, after `exact`
    default  the claim for a linear that nothing else matches, or None when unlisted means unquantised
    ignored  matchers of modules that the config excludes; they win over `ordered` and `default`
    silent   whether it names no module at all: the map that it refers to is elsewhere
    """

    where: str
    dialect: str
    exact: dict[str, Claim] = field(default_factory=dict)
    ordered: list[tuple[Matcher, Claim]] = field(default_factory=list)
    default: Claim | None = None
    ignored: list[Matcher] = field(default_factory=list)
    kv_cache: KvClaim | None = None
    silent: bool = False
    repairs: list[str] = field(default_factory=list)

    def claim(self, module: Module) -> Claim:
        """The claim about one source module.  Falls back to "not quantised" for what the config excludes or omits."""
        for name in module.names_up():
            if name in self.exact:
                return self.exact[name]
        if any(matches(module) for matches in self.ignored):
            return Claim(DENSE, None, "excluded")
        for matches, claim in self.ordered:
            if matches(module):
                return claim
        return self.default or Claim(DENSE, None, "not listed")


@dataclass(frozen=True, slots=True)
class Module:
    """A source module as configs may call it.

    canonical  its canonical name before fusing      spellings  its full names as stored and on the hub
    fused      the canonical name of the fused module it becomes a part of
    is_linear  whether class name "Linear" covers it
    others     canonical names of other modules whose claims hold for it: the first expert of its stack
    """

    canonical: str
    spellings: tuple[str, ...]
    fused: str
    is_linear: bool = True
    others: tuple[str, ...] = ()

    def names_up(self) -> Iterator[str]:
        """Canonical names under which an exact entry may cover this module: itself, its fused form, its containers."""
        yield self.canonical
        yield self.fused
        yield from self.others
        name = self.canonical
        while "." in name:
            name = name.rpartition(".")[0]
            yield name


Matcher = Callable[[Module], bool]


def exact_matcher(name: str, space: NameSpace) -> Matcher:
    """Matches the module of that name in any prefix spelling, its fused form, and what is below it."""
    canonical = canonical_name(name, space) or name
    return lambda module: canonical in module.names_up() or name in module.spellings


def wildcard_matcher(pattern: str, space: NameSpace) -> Matcher:
    """Shell wildcard over module paths; `*` crosses dots (nvidia-modelopt).  The literal head may have any prefix."""
    head, star, tail = pattern.partition("*")
    if "?" not in head and "[" not in head:
        # Canonicalise the literal part up to its last whole segment, so that any wrapper spelling of it matches.
        stem, dot, partial = head.rpartition(".")
        canonical = canonical_name(stem, space) if stem else None
        if canonical is not None:
            pattern = f"{canonical}{dot}{partial}{star}{tail}"
        elif (root := canonical_name(partial, space)) is not None:
            pattern = f"{root}{star}{tail}"
    compiled = re.compile(fnmatch.translate(pattern))
    return lambda module: any(compiled.match(n) for n in (module.canonical, module.fused, *module.spellings))


def regex_matcher(pattern: str, where: str) -> Matcher:
    """`re:` target of compressed-tensors: anchored at the start, over any spelling.  Raises `ConvertError` if invalid."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConvertError(
            Problem(where, "", "a regular expression", f"{pattern!r} ({error})", "correct the pattern")
        ) from None

    def matches(module: Module) -> bool:
        with time_limit(where, pattern):
            return any(compiled.match(n) for n in (*module.spellings, module.canonical))

    return matches


MAX_REGEX_S = 1.0  # longest time one regular expression of a config may take for one module


@contextmanager
def time_limit(where: str, pattern: str) -> Iterator[None]:
    """Interrupt a regular expression that backtracks for ever.  Works in the main thread, where Python allows timers."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise ConvertError(
            Problem(where, "", f"a pattern that matches within {MAX_REGEX_S} s", repr(pattern), "simplify the pattern")
        )

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_REGEX_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True, slots=True)
class Dialect:
    """A producer: its encodings, and how its config is recognised and read.

    quant_methods  values of `quant_method` that select it
    read           (config block, where it was found, name space) -> Rules; raises `ConvertError` with the remedy
    """

    name: str
    encodings: tuple[Encoding, ...]
    quant_methods: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str, NameSpace], Rules]


def config_name(name: Any, space: NameSpace, rules: Rules) -> str:
    """A module name of a config list: sentinel repaired (counted in `rules.repairs` by its effect), wrappers kept."""
    text = str(name)
    repaired = repair_sentinel(text)
    if repaired != text:
        rules.repairs.append("sentinel")
    return repaired


def expect_mapping(value: Any, where: str, what: str) -> Mapping[str, Any]:
    """`value` if it is an object, else a `ConvertError` that says where."""
    if not isinstance(value, Mapping):
        raise ConvertError(Problem(where, what, "an object", repr(value)[:80], "correct the config"))
    return value


def expect_names(value: Any, where: str, what: str) -> Iterable[str]:
    """`value` if it is a list of names (or absent), else a `ConvertError` that says where."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ConvertError(Problem(where, what, "a list of module names", repr(value)[:80], "correct the config"))
    return value

"""What a dialect is: how one producer stores each scheme, and how its config says which module has which scheme.

Two independent sources of truth meet in the planner.  `Encoding` rows recognise a module from its tensors alone; `Rules`
say what the config claims.  Tensors win; the config decides only what tensors cannot show (how activations are quantised).
"""

from __future__ import annotations

import fnmatch
import re
import signal
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from runtime.format import DENSE_DTYPES

from ..errors import ConvertError, Problem
from ..limits import MAX_PATTERN, MAX_REGEX_S, MAX_REGEXES_S
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


EXCLUDED = Claim(DENSE, None, "excluded")
NOT_LISTED = Claim(DENSE, None, "not listed")


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
    ordered  (names, claim) pairs, first match wins, after `exact`
    default  the claim for a linear that nothing else matches, or None when unlisted means unquantised
    listed   the keys of `exact` as the config writes them -> the same canonical
    ignored  the modules that the config excludes; they win over `ordered` and `default`
    silent   whether it names no module at all: the map that it refers to is elsewhere
    """

    where: str
    dialect: str
    exact: dict[str, Claim] = field(default_factory=dict)
    listed: dict[str, str] = field(default_factory=dict)
    ordered: list[tuple[ModuleNames, Claim]] = field(default_factory=list)
    default: Claim | None = None
    ignored: ModuleNames = field(default_factory=lambda: ModuleNames())
    kv_cache: KvClaim | None = None
    silent: bool = False
    repairs: list[str] = field(default_factory=list)

    def claim(self, module: Module) -> Claim:
        """The claim about one source module.  Falls back to "not quantised" for what the config excludes or omits."""
        for name in module.names_up() if self.exact else ():
            if name in self.exact:
                return self.exact[name]
        if self.ignored.cover(module):
            return EXCLUDED
        for names, claim in self.ordered:
            if names.cover(module):
                return claim
        return self.default or NOT_LISTED

    def claims(self, experts: Experts) -> list[Claim]:
        """The claims about the same projection of several experts, asked once unless a list tells the experts apart."""
        count = len(experts.canonical)
        lists = (self.ignored, *(names for names, _ in self.ordered))
        if count > 1 and not self._tells_apart(experts) and not any(names.tells_apart(experts) for names in lists):
            return [self.claim(experts.module(0))] * count
        return [self.claim(experts.module(index)) for index in range(count)]

    def _tells_apart(self, experts: Experts) -> bool:
        """Whether `exact` gives different claims to some."""
        names = experts.canonical if self.exact else []
        for _ in "projection", "expert":  # the names further up are common to all
            if len(set(map(id, map(self.exact.get, names)))) > 1:
                return True
            names = [name.rpartition(".")[0] for name in names]
        return False


class Module(NamedTuple):
    """A source module as configs may call it.

    canonical  its canonical name before fusing      spellings  its full names as stored and on the hub
    fused      the canonical name of the fused module it becomes a part of
    is_linear  whether class name "Linear" covers it
    others     canonical names of modules whose claims hold for it: the projections it holds, of a stack the first expert's
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


class Experts(NamedTuple):
    """The same projection of several experts, `<parent>.<expert>.<projection>`, or a single module.

    canonical, spellings   a name of each expert, and for each way of spelling it the names of all of them
    fused, is_linear, others   as in `Module`
    """

    canonical: Sequence[str]
    spellings: Sequence[Sequence[str]]
    fused: str
    is_linear: bool
    others: tuple[str, ...]

    def module(self, index: int) -> Module:
        """That of one expert."""
        spellings = tuple(names[index] for names in self.spellings)
        return Module(self.canonical[index], spellings, self.fused, self.is_linear, self.others)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression or shell wildcard of a config, which holds for a module when it matches any name of it.

    compiled, where, written   the expression, which config has it, and how
    literal  text that every match has, found much faster than the expression fails; "" if none is known
    fused    whether it covers the parts of a fused module by that one's name
    """

    compiled: re.Pattern[str]
    where: str
    written: str
    literal: str = ""
    fused: bool = False

    def __call__(self, module: Module) -> bool:
        """Whether it covers a module."""
        names = (module.canonical, *module.spellings, *module.others)
        return self.matches((*names, module.fused) if self.fused else names)

    def matches(self, names: Iterable[str]) -> bool:
        """Whether it matches any of some names."""
        match, literal = self.compiled.match, self.literal
        with _TIMER.watch(self.where, self.written):
            return any(match(name) for name in names if literal in name)

    def tells_apart(self, experts: Experts) -> bool:
        """Whether it covers some of these modules and not the others."""
        with _TIMER.watch(self.where, self.written):
            columns = [names for names in (experts.canonical, *experts.spellings) if self.literal in "\n".join(names)]
            return len({any(map(self.compiled.match, names)) for names in zip(*columns, strict=True)}) > 1


Matcher = Callable[[Module], bool]

# Patterns that cannot tell one number between dots from another: letters, ends, alternatives, `.*`, and a `\.` or `.` in a
# place where no number can stand.
_BLIND_TO_NUMBERS = re.compile(r"(?:[A-Za-z_|()^$]|\\\.|\.\*|(?<=[A-Za-z_])\.(?=[A-Za-z_]))*")


@dataclass(slots=True)
class ModuleNames:
    """A list of module names and patterns of a config, and whether they cover a module.

    Lists have hundreds of entries and checkpoints a hundred thousand modules.  So names are looked up, as are wildcards that
    end in their only star, which mean all that begins alike; only real patterns are tried one by one.

    canonical  canonical names           written   as they stand in the config -> the same canonical
    heads      what stands before such a star; once settled, sorted, and none of them begins with another
    starred    all of these as they stand in the config -> what stands before the star
    patterns   everything else;   sighted  those of them that may tell one number from another
    drawn      patterns as they stand in the config
    containers what has been looked up: path -> whether it or a container of it is listed
    """

    canonical: set[str] = field(default_factory=set)
    written: dict[str, str] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    settled: bool = True
    starred: dict[str, str] = field(default_factory=dict)
    patterns: list[Matcher] = field(default_factory=list)
    sighted: list[Pattern] = field(default_factory=list)
    drawn: dict[str, Pattern] = field(default_factory=dict)
    containers: dict[str, bool] = field(default_factory=dict)

    def add_name(self, name: str, space: NameSpace) -> None:
        """Cover the module of that name in any prefix spelling, and its fused form."""
        canonical = canonical_name(name, space) or name
        self.canonical.add(canonical)
        self.written[name] = canonical

    def add_wildcard(self, pattern: str, space: NameSpace, where: str) -> None:
        """Cover what a shell wildcard matches; `*` crosses dots (nvidia-modelopt).  The literal head may have any prefix.

        Raises `ConvertError` if it is too long.
        """
        head, star, tail = pattern.partition("*")
        if not has_wildcard(head):
            # Canonicalise the literal part up to its last whole segment, so that any wrapper spelling of it matches.
            stem, dot, partial = head.rpartition(".")
            canonical = canonical_name(stem, space) if stem else None
            if canonical is not None:
                head = f"{canonical}{dot}{partial}"
            elif (root := canonical_name(partial, space)) is not None:
                head = root
            if star and not tail:
                self.starred[pattern] = head
                self.heads.append(head)
                self.settled = False
                return
        whole = f"{head}{star}{tail}"
        compiled = _compile(fnmatch.translate(whole) if len(whole) <= MAX_PATTERN else whole, where, pattern)
        literal = max(_WILD.split(whole), key=len)
        self._add_pattern(
            Pattern(compiled, where, pattern, literal, True), pattern.replace(".", "\\.").replace("*", ".*")
        )

    def _settle(self) -> None:
        """Sort the heads, and leave out those that begin with another: each comes right behind the ones that begin it."""
        heads: list[str] = []
        for head in sorted(self.heads):
            if not heads or not head.startswith(heads[-1]):
                heads.append(head)
        self.heads, self.settled = heads, True

    def _begins(self, name: str) -> bool:
        """Whether a name begins with one of the heads: then that is the last of those that sort before it."""
        if not self.settled:
            self._settle()
        at = bisect_right(self.heads, name)
        return at > 0 and name.startswith(self.heads[at - 1])

    def _below(self, name: str) -> bool:
        """Whether a container of that name is listed; remembered, because thousands of modules share theirs."""
        parent = name.rpartition(".")[0]
        if not parent:
            return False
        if parent not in self.containers:
            self.containers[parent] = parent in self.canonical or self._below(parent)
        return self.containers[parent]

    def add_regex(self, pattern: str, where: str) -> None:
        """Cover what a `re:` target of compressed-tensors matches: anchored at the start, over any spelling.

        Raises `ConvertError` if it is invalid.
        """
        compiled = _compile(pattern, where, pattern)
        if not _TIMER.interrupts and _may_backtrack(pattern):
            expected = "a pattern with few repeats and none inside another, as a match cannot be interrupted in this thread"
            raise ConvertError(Problem(where, "", expected, repr(pattern), "simplify it, or convert in the main thread"))
        self._add_pattern(Pattern(compiled, where, f"re:{pattern}"), pattern)

    def _add_pattern(self, pattern: Pattern, regex: str) -> None:
        self.patterns.append(pattern)
        self.drawn[pattern.written] = pattern
        if not _BLIND_TO_NUMBERS.fullmatch(regex):
            self.sighted.append(pattern)

    def cover(self, module: Module) -> bool:
        """Whether any name or pattern means this module."""
        canonical, spellings, fused, _, others = module
        names = self.canonical
        if names and (canonical in names or fused in names or not names.isdisjoint(others) or self._below(canonical)):
            return True
        if any(name in self.written for name in spellings):
            return True
        if self.heads and any(map(self._begins, (canonical, fused, *spellings, *others))):
            return True
        return any(matches(module) for matches in self.patterns)

    def tells_apart(self, experts: Experts) -> bool:
        """Whether this may cover the projection of some experts and not of others."""
        count, columns = len(experts.canonical), (experts.canonical, *experts.spellings)
        above = [name.rpartition(".")[0] for name in experts.canonical] if self.canonical else []
        listed = [self.canonical.intersection(names) for names in (experts.canonical, above)]
        listed += [self.written.keys() & names for names in experts.spellings if self.written]
        if any(len(names) not in (0, count) for names in listed):
            return True
        if not self.settled:
            self._settle()
        for names in columns if self.heads else ():
            ends = (min(names), max(names))  # what both of them begin with, or none of them, holds for all between
            if len({(bisect_right(self.heads, name), self._begins(name)) for name in ends}) > 1:
                return True
        return any(pattern.tells_apart(experts) for pattern in self.sighted)


_WILD = re.compile(r"\*|\?|\[.*")  # where the literal text of a shell wildcard ends


def _compile(regex: str, where: str, written: str) -> re.Pattern[str]:
    """Compile a pattern of a config.  Raises `ConvertError` if it is invalid, too long or takes too long."""
    if len(regex) > MAX_PATTERN:
        expected, found = f"a pattern of at most {MAX_PATTERN} characters", f"{len(regex)}"
        raise ConvertError(Problem(where, "", expected, found, "simplify the pattern"))
    try:
        with _TIMER.watch(where, written):
            return re.compile(regex)
    except (re.error, RecursionError, OverflowError) as error:
        found = f"{written!r} ({error})"
        raise ConvertError(Problem(where, "", "a regular expression", found, "correct the pattern")) from None


def has_wildcard(name: str) -> bool:
    """Whether a name of a config is a shell wildcard."""
    return "*" in name or "?" in name or "[" in name


_PARSER: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
MANY = 16  # repeats of one thing that count as any number
MOST_REPEATS = 4  # of one pattern; names have some hundred characters, so that the fourth power of that is still quick


def _may_backtrack(pattern: str) -> bool:
    """Whether a pattern has repeats inside repeats, or so many that matching could take very long."""
    repeats = 0

    def nested(node: Any, inside: bool) -> bool:
        nonlocal repeats
        if isinstance(node, tuple) and len(node) == 2 and str(node[0]).endswith("_REPEAT"):
            many = node[1][1] > MANY
            repeats += many
            return (many and inside) or nested(node[1][2], inside or many)
        if isinstance(node, (tuple, list, _PARSER.SubPattern)):
            return any(nested(inner, inside) for inner in node)
        return False

    return nested(_PARSER.parse(pattern), False) or repeats > MOST_REPEATS


class _PatternTimer(threading.local):
    """Limits the CPU time of the patterns of configs, in each thread its own.

    In the main thread a match that backtracks for ever is interrupted.  In others Python cannot do so: there the time is only
    looked at between matches.  The handler is installed once for a whole plan, because Python takes much longer to install it
    than to start the timer.
    """

    limits = False  # whether there is a limit now
    interrupts = False  # whether matches are interrupted
    running = ("", "")  # where the pattern stands, and the pattern
    left = 0.0  # of all patterns
    started = 0.0

    def __init__(self) -> None:
        self.left_of: dict[tuple[str, str], float] = {}

    def stop(self, *_: object) -> NoReturn:
        """The time is over."""
        where, pattern = self.running
        limit = f"within {MAX_REGEX_S} s" if self.left > MAX_REGEX_S else f"among patterns that match within {MAX_REGEXES_S} s"
        found = f"{pattern!r:.200}"
        raise ConvertError(Problem(where, "", f"a pattern that matches {limit}", found, "simplify the pattern"))

    def __enter__(self) -> None:
        if self.interrupts:
            left = min(self.left, self.left_of.get(self.running, MAX_REGEX_S))
            signal.setitimer(signal.ITIMER_VIRTUAL, max(left, 1e-6))  # 0 would be no timer
        if self.limits:
            self.started = time.thread_time()

    def __exit__(self, kind: object, *_: object) -> None:
        if self.interrupts:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if self.limits:
            taken = time.thread_time() - self.started
            self.left -= taken
            self.left_of[self.running] = left = self.left_of.get(self.running, MAX_REGEX_S) - taken
            if kind is None and min(left, self.left) <= 0:
                self.stop()

    def watch(self, where: str, pattern: str) -> _PatternTimer:
        """To be entered around matches of one pattern."""
        self.running = (where, pattern)
        return self


_TIMER = _PatternTimer()


@contextmanager
def patterns_limited() -> Iterator[None]:
    """Within it, patterns of configs take no longer than `MAX_REGEX_S` and `MAX_REGEXES_S`.  Also a decorator."""
    timer = _TIMER
    if timer.limits:
        yield
        return
    timer.limits, timer.left, timer.left_of = True, MAX_REGEXES_S, {}
    timer.interrupts = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    before = signal.signal(signal.SIGVTALRM, timer.stop) if timer.interrupts else None
    try:
        yield
    finally:
        if timer.interrupts:
            signal.signal(signal.SIGVTALRM, before)
        timer.limits = timer.interrupts = False


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
    if "\x00" not in text:
        return text
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

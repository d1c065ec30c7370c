"""Execute PTX, the assembly that Triton's compiler makes for NVIDIA GPUs, on a CPU: a kernel as it will run, without a GPU.

Written from NVIDIA's PTX ISA.  It knows what the kernels of `runtime.kernels` are compiled to for sm_90, matrices by
`ptx_matrices.py`, and with `ptx_blackwell.py` for sm_100, and refuses the rest by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np
import torch
from ptx_machine import AT_BARRIER, TYPES, UNSIGNED, WARP, Array, FaultError, Launch, Program, Step, from_bf16, stem

# Numbers


def to_bf16(values: Array) -> Array:
    """Bits of float32 values rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def from_e4m3(bits: Array) -> Array:
    return torch.from_numpy(np.array(bits, np.uint8)).view(torch.float8_e4m3fn).float().numpy()


def to_e4m3(values: Array) -> Array:
    """Bits of float32 values rounded to nearest, ties to even, and saturated; `.satfinite`."""
    x = torch.from_numpy(np.array(values, np.float32))
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def flushed(values: Array) -> Array:
    """`.ftz`: subnormals as 0."""
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def halves(words: Array) -> Array:
    """`[lanes, 2]` 16-bit parts of 32-bit words, the low one first."""
    return np.ascontiguousarray(words, np.uint32).view(np.uint16).reshape(-1, 2)


def elements(words: Array, kind: str) -> Array:
    """`[..., 2]` float32 of 32-bit words that hold two bf16 or f16."""
    parts = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    return from_bf16(parts) if kind == "bf16" else parts.view(np.float16).astype(np.float32)


# Programs


def statements(text: str) -> list[str]:
    """Labels, which end in `:`, and instructions, in order."""
    found, at = [], 0
    while at < len(text):
        if text[at].isspace() or text[at] == ";":
            at += 1
        elif text[at] in "{}":
            found.append(text[at])
            at += 1
        elif directive := re.compile(r"\.(loc|file)\b[^\n]*").match(text, at):
            at = directive.end()
        elif label := re.compile(r"[\w$]+:(?!:)").match(text, at):
            found.append(label[0])
            at = label.end()
        else:
            end = text.index(";", at)
            found.append(" ".join(text[at:end].split()))
            at = end
    return scoped([s for s in found if not s.startswith(".pragma")])


def scoped(found: list[str]) -> list[str]:
    """Without braces: labels and registers that are declared between them get names of their own."""
    result: list[str] = []
    starts: list[int] = []
    for statement in found:
        if statement == "{":
            starts.append(len(result))
        elif statement == "}":
            inside = result[starts.pop() :]
            names = {s[:-1] for s in inside if s.endswith(":")}
            names |= {name for s in inside if s.startswith(".reg") for name in split_operands(s.split(maxsplit=2)[2])}
            for name in names:
                own = re.compile(rf"(?<![%\w$]){re.escape(name)}(?![\w$])")
                inside = [own.sub(f"{name}_{len(result)}_", s) for s in inside]
            result[len(result) - len(inside) :] = inside
        else:
            result.append(statement)
    return result


def split_operands(text: str) -> list[str]:
    """At commas outside braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def parse(text: str) -> Program:
    """The one entry of a module."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{", text, re.S)
    if head is None:
        raise FaultError("no entry")
    depth = end = 0
    for brace in re.finditer(r"[{}]", text[head.end() - 1 :]):
        depth += 1 if brace[0] == "{" else -1
        end = head.end() + brace.start() - 1
        if not depth:
            break
    body = text[head.end() : end]
    program = Program(head[1], re.findall(r"(\w+_param_\d+)", head[2]), [[]])
    for statement in statements(body):
        if statement.endswith(":"):
            if program.blocks[-1]:
                program.blocks.append([])
            program.labels[statement[:-1]] = len(program.blocks) - 1
            continue
        if statement.startswith(".reg"):
            _, kind, names = statement.split(maxsplit=2)
            size = 0 if kind == ".pred" else int(kind[2:]) // 8
            program.bytes |= {stem(name.partition("<")[0]): size for name in split_operands(names)}
            continue
        if meets := re.match(r"(@!?[%\w]+ )?(bar|barrier)\.sync\b", statement):
            program.blocks.append([])
        program.blocks[-1].append((statement, instruction(statement, program)))
        if meets or re.match(r"(@!?[%\w]+ )?(bra|ret|exit)\b", statement):
            program.blocks.append([])
    return program


def instruction(statement: str, program: Program) -> Step:
    guard = re.match(r"@(!?)([%\w]+)\s+(.*)", statement)
    code = guard[3] if guard else statement
    opcode, _, rest = code.partition(" ")
    name, *parts = opcode.split(".")
    operands = split_operands(rest)
    if name == "bra":
        step: Step = branch(program, operands[0])
    else:
        maker = MAKERS.get(opcode) or MAKERS.get(name)
        if maker is None:
            raise FaultError(f"not known: {statement}")
        step = maker(parts, operands)
    if not guard:
        return step
    negated, predicate = bool(guard[1]), guard[2]

    def guarded(m: Launch, on: Array | None) -> None:
        holds = m.get(predicate, "pred")
        holds = np.broadcast_to(~holds if negated else holds, m.lanes)
        both = holds if on is None else holds & on
        if both.any():
            step(m, None if both.all() else both)

    return guarded


def branch(program: Program, label: str) -> Step:
    def step(m: Launch, on: Array | None) -> None:
        m.pc[... if on is None else on] = program.labels[label]

    return step


# Instructions: from the parts of an opcode and its operands to a step

Maker = Callable[[list[str], list[str]], Step]
MAKERS: dict[str, Maker] = {}


def makes(*names: str) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(names, maker))
        return maker

    return register


def simple(compute: Callable[..., Array]) -> Maker:
    """An operation on values of one type, the last part of its opcode."""

    def maker(parts: list[str], operands: list[str]) -> Step:
        kind, to, inputs = parts[-1], operands[0], operands[1:]
        ftz = "ftz" in parts
        before = [p for p in parts[:-1] if p in TYPES]  # what the result is, where it is not what the first operands are
        if before == ["f32"] and kind in ("bf16", "f16"):
            kinds = [kind] * (len(inputs) - 1) + ["f32"]
            return lambda m, on: m.put(to, compute(*map(m.get, inputs, kinds)).astype(np.float32, copy=False), on)
        if kind == "f32x2":

            def both(m: Launch, on: Array | None) -> None:
                values = (np.broadcast_to(m.get(i, "b64"), m.lanes) for i in inputs)
                found = compute(*(np.ascontiguousarray(v).view(np.float32) for v in values))
                m.put(to, np.ascontiguousarray(found, np.float32).view(np.uint64), on)

            return both
        if kind in ("bf16x2", "f16x2"):
            half = kind[:-2]

            def pairs(m: Launch, on: Array | None) -> None:
                values = compute(*(elements(np.broadcast_to(m.get(i, "b32"), m.lanes), half) for i in inputs))
                bits = to_bf16(values) if half == "bf16" else values.astype(np.float16).view(np.uint16)
                m.put(to, np.ascontiguousarray(bits).view(np.uint32)[:, 0], on)

            return pairs

        def step(m: Launch, on: Array | None) -> None:
            values = [m.get(i, kind) for i in inputs]
            if ftz:
                values = [flushed(v) for v in values]
            found = compute(*values)
            if kind == "bf16":
                found = to_bf16(found)
            elif kind != "pred":
                found = found.astype(TYPES[kind], copy=False)
            m.put(to, flushed(found) if ftz else found, on)

        return step

    return maker


def shifted(left: bool) -> Maker:
    def maker(parts: list[str], operands: list[str]) -> Step:
        kind = parts[-1]
        to, a, b = operands

        def step(m: Launch, on: Array | None) -> None:
            value, by = m.get(a, kind), m.get(b, "u32")
            bits = 8 * value.dtype.itemsize
            inside = np.minimum(by, bits - 1).astype(value.dtype)
            if left:
                found = np.where(by < bits, value << inside, np.zeros(1, value.dtype))
            else:
                found = value >> inside
                if value.dtype.kind == "u":
                    found = np.where(by < bits, found, np.zeros(1, value.dtype))
            m.put(to, found, on)

        return step

    return maker


def fused(a: Array, b: Array, c: Array) -> Array:
    """One rounding for float32."""
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    return a * b + c


def truncated(a: Array, b: Array) -> Array:
    """Integer division as C has it."""
    found = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return (found * np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64))).astype(a.dtype)


def divided(a: Array, b: Array) -> Array:
    return a / b if a.dtype.kind == "f" else (truncated(a, b) if a.dtype.kind == "i" else a // np.maximum(b, 1))


def remainder(a: Array, b: Array) -> Array:
    return a - divided(a, b) * b


def least(*values: Array) -> Array:
    """NaN only where all are."""
    return functools.reduce(np.fmin, values)


def greatest(*values: Array) -> Array:
    """NaN only where all are."""
    return functools.reduce(np.fmax, values)


MAKERS |= {
    "add": simple(lambda a, b: a + b), "sub": simple(lambda a, b: a - b), "fma": simple(fused),
    "div": simple(divided), "rem": simple(remainder), "min": simple(least), "max": simple(greatest),
    "neg": simple(lambda a: np.negative(a)), "abs": simple(np.abs), "not": simple(np.invert),
    "and": simple(np.bitwise_and), "or": simple(np.bitwise_or), "xor": simple(np.bitwise_xor),
    "shl": shifted(True), "shr": shifted(False),
    "ex2": simple(np.exp2), "lg2": simple(np.log2), "sqrt": simple(np.sqrt), "rcp": simple(lambda a: 1 / a),
    "rsqrt": simple(lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype)), "tanh": simple(np.tanh),
}  # fmt: skip

WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


@makes("mul", "mad")
def multiplying(parts: list[str], operands: list[str]) -> Step:
    if parts[0] not in ("lo", "hi", "wide"):
        return simple(lambda a, b: a * b)(parts, operands)
    way, kind = parts[0], parts[-1]
    to, a, b, *more = operands

    def step(m: Launch, on: Array | None) -> None:
        left, right = m.get(a, kind), m.get(b, kind)
        if way == "lo":
            found = left * right
        elif kind[1:] == "64":
            whole = left.astype(object) * right.astype(object) >> 64
            found = np.array([int(w) & (2**64 - 1) for w in np.broadcast_to(whole, m.lanes)], np.uint64).view(left.dtype)
        else:
            found = left.astype(TYPES[WIDER[kind]]) * right.astype(TYPES[WIDER[kind]])
            if way == "hi":
                found = (found >> (8 * left.dtype.itemsize)).astype(left.dtype)
        if more:
            found = found + m.get(more[0], WIDER[kind] if way == "wide" else kind)
        m.put(to, found, on)

    return step


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


@makes("setp")
def comparing(parts: list[str], operands: list[str]) -> Step:
    name, kind = parts[0], parts[-1]
    to, a, b, *more = operands
    if more:
        raise FaultError("setp with a third operand")

    def step(m: Launch, on: Array | None) -> None:
        left, right = m.get(a, kind), m.get(b, kind)
        if name in COMPARE:
            found = COMPARE[name](left, right)
        elif name == "nan":
            found = np.isnan(left) | np.isnan(right)
        elif name == "num":
            found = ~(np.isnan(left) | np.isnan(right))
        elif name.endswith("u"):  # or unordered
            found = COMPARE[name[:-1]](left, right) | np.isnan(left) | np.isnan(right)
        else:
            raise FaultError(f"not known: setp.{name}")
        if name == "ne" and left.dtype.kind == "f":  # ordered
            found &= ~(np.isnan(left) | np.isnan(right))
        m.put(to, found, on)

    return step


@makes("selp")
def selecting(parts: list[str], operands: list[str]) -> Step:
    to, a, b, predicate = operands
    kind = parts[-1].replace("f", "b")
    return lambda m, on: m.put(to, np.where(m.get(predicate, "pred"), m.get(a, kind), m.get(b, kind)), on)


@makes("mov")
def moving(parts: list[str], operands: list[str]) -> Step:
    kind = parts[-1].replace("f", "b")
    to, source = operands
    size = {"pred": 0}.get(kind) if kind == "pred" else int(kind[1:]) // 8
    if source.startswith("{"):
        pieces = split_operands(source[1:-1])
        part = f"b{8 * size // len(pieces)}" if size else ""

        def pack(m: Launch, on: Array | None) -> None:
            columns = [np.broadcast_to(m.get(p, part), m.lanes) for p in pieces]
            m.put(to, np.stack(columns, 1).view(TYPES[kind])[:, 0], on)

        return pack
    if to.startswith("{"):
        names = split_operands(to[1:-1])
        part = f"b{8 * size // len(names)}" if size else ""

        def unpack(m: Launch, on: Array | None) -> None:
            whole = np.ascontiguousarray(np.broadcast_to(m.get(source, kind), m.lanes))
            columns = whole.view(TYPES[part]).reshape(m.lanes, -1)
            for name, column in zip(names, columns.T, strict=True):
                m.put(name, np.ascontiguousarray(column), on)

        return unpack
    if kind == "pred":
        truth = {"-1": True, "1": True, "0": False}
        return lambda m, on: m.put(to, np.array([truth[source]]) if source in truth else m.get(source, kind), on)
    return lambda m, on: m.put(to, m.get(source, kind), on)


@makes("cvt")
def converting(parts: list[str], operands: list[str]) -> Step:
    kinds = [p for p in parts if re.fullmatch(r"(bf16|e4m3|f16|tf32)(x2)?|[usbf]\d+", p)]
    to_kind, from_kind = kinds
    to, *inputs = operands

    def value(m: Launch, name: str) -> Array:
        if from_kind == "bf16" or not name.startswith("%"):
            return m.get(name, from_kind)
        wide, size = m.program.bytes[stem(name)], np.dtype(TYPES[from_kind]).itemsize
        found = m.get(name, f"b{8 * wide}")
        return found.view(TYPES[from_kind]) if wide == size else found.astype(UNSIGNED[size]).view(TYPES[from_kind])

    def step(m: Launch, on: Array | None) -> None:
        if to_kind in ("bf16x2", "f16x2") and from_kind == "f32":  # the first operand is the high half
            high, low = (np.broadcast_to(m.get(i, "f32"), m.lanes) for i in inputs)
            pair = np.stack([low, high], 1)
            bits = to_bf16(pair) if to_kind == "bf16x2" else pair.astype(np.float16).view(np.uint16)
            return m.put(to, np.ascontiguousarray(bits).view(np.uint32)[:, 0], on)
        if to_kind == "e4m3x2":
            if from_kind == "f32":
                pair = np.stack([np.broadcast_to(m.get(i, "f32"), m.lanes) for i in reversed(inputs)], 1)
            else:
                pair = elements(np.broadcast_to(m.get(inputs[0], "b32"), m.lanes), from_kind[:-2])
            return m.put(to, to_e4m3(pair).view(np.uint16)[:, 0], on)
        if from_kind == "e4m3x2":
            bits = np.ascontiguousarray(np.broadcast_to(m.get(inputs[0], "b16"), m.lanes)).view(np.uint8).reshape(-1, 2)
            return m.put(to, from_e4m3(bits).astype(np.float16).view(np.uint32)[:, 0], on)
        source = value(m, inputs[0])
        if to_kind == "bf16":
            return m.put(to, to_bf16(source.astype(np.float32)), on)
        if source.dtype.kind == "f" and TYPES[to_kind] is not None and np.dtype(TYPES[to_kind]).kind in "iu":
            rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
            way = next(rounding[p] for p in parts if p in rounding)
            limits = np.iinfo(TYPES[to_kind])
            source = np.clip(np.nan_to_num(way(source.astype(np.float64))), limits.min, limits.max)
        elif source.dtype.kind == "f" and source.dtype == np.dtype(TYPES.get(to_kind)):
            rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
            source = next((rounding[p](source) for p in parts if p in rounding), source)
        m.put(to, source.astype(TYPES[to_kind]), on)

    return step


@makes("prmt")
def permuting(parts: list[str], operands: list[str]) -> Step:
    to, a, b, selector = operands

    def step(m: Launch, on: Array | None) -> None:
        both = m.get(a, "u32").astype(np.uint64) | (m.get(b, "u32").astype(np.uint64) << np.uint64(32))
        which = m.get(selector, "u32").astype(np.uint64)
        found = np.zeros(1, np.uint64)
        for i in range(4):
            nibble = (which >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            found = found | (np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i))
        m.put(to, found.astype(np.uint32), on)

    return step


@makes("lop3")
def looking_up(parts: list[str], operands: list[str]) -> Step:
    to, a, b, c, table = operands
    bits = int(table, 0)

    def step(m: Launch, on: Array | None) -> None:
        x, y, z = (m.get(i, "u32") for i in (a, b, c))
        found = np.zeros(1, np.uint32)
        for i in range(8):
            if bits >> i & 1:
                found = found | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        m.put(to, found, on)

    return step


@makes("bfe")
def extracting(parts: list[str], operands: list[str]) -> Step:
    kind = parts[-1]
    to, a, start, length = operands

    def step(m: Launch, on: Array | None) -> None:
        value = m.get(a, kind)
        bits = 8 * value.dtype.itemsize
        first, count = m.get(start, "u32").astype(np.int64) & 255, m.get(length, "u32").astype(np.int64) & 255
        if (count == 0).any() or (first + count > bits).any():
            raise FaultError("bfe beyond the word")
        top = (value << (bits - first - count).astype(value.dtype)).astype(value.dtype)
        m.put(to, (top >> (bits - count).astype(value.dtype)).astype(value.dtype), on)

    return step


# Warps


@makes("shfl")
def shuffling(parts: list[str], operands: list[str]) -> Step:
    way = parts[1]
    to, a, b, c, _ = operands

    def step(m: Launch, on: Array | None) -> None:
        m.whole_warps(on)
        value, lane = np.broadcast_to(m.get(a, "b32"), m.lanes), m.lane_in_warp
        by, clamp = m.get(b, "u32").astype(np.int64), m.get(c, "u32").astype(np.int64)
        segment, most = (clamp >> 8) & 31, clamp & 31
        last = (lane & segment) | (most & ~segment & 31)
        if way == "idx":
            source = (lane & segment) | (by & ~segment & 31)
            inside = source <= last
        elif way == "bfly":
            source = lane ^ by
            inside = source <= last
        elif way == "down":
            source = lane + by
            inside = source <= last
        else:
            source = lane - by
            inside = source >= last
        source = np.where(inside, source, lane)
        m.put(to, value[m.warp * WARP + source], on)

    return step


@makes("redux")
def reducing(parts: list[str], operands: list[str]) -> Step:
    name, kind = parts[1], parts[-1]
    to, a, mask = operands
    if parts[2:-1] not in ([], ["abs"]):
        raise FaultError(f"not known: redux.{'.'.join(parts)}")
    over = {"min": np.fmin, "max": np.fmax, "add": np.add, "or": np.bitwise_or, "and": np.bitwise_and}[name]

    def step(m: Launch, on: Array | None) -> None:
        warps = m.whole_warps(on)
        value, masks = (np.broadcast_to(m.get(x, k), m.lanes).reshape(-1, WARP)[warps] for x, k in ((a, kind), (mask, "u32")))
        value = np.abs(value) if "abs" in parts else value
        members = (masks[:, :, None] >> np.arange(WARP, dtype=np.uint32) & 1).astype(bool)  # [warps, thread, of whom]
        if not members[:, np.arange(WARP), np.arange(WARP)].all() or (members != members.swapaxes(1, 2)).any():
            raise FaultError("the threads of a warp do not agree on who takes part")
        found = np.zeros((m.lanes // WARP, WARP), value.dtype)
        for rows in np.unique(masks, axis=0):
            same = np.flatnonzero((masks == rows).all(1))
            for group in np.unique(rows):
                inside = np.flatnonzero(rows == group)
                found[np.ix_(warps[same], inside)] = over.reduce(value[np.ix_(same, inside)], 1)[:, None]
        m.put(to, found.ravel(), on)

    return step


# Memory


def vector(parts: list[str]) -> tuple[int, int]:
    """Bytes of an element, and how many."""
    count = next((int(p[1:]) for p in parts if re.fullmatch(r"v[248]", p)), 1)
    return int(parts[-1][1:]) // 8, count


@makes("ld")
def loading(parts: list[str], operands: list[str]) -> Step:
    size, count = vector(parts)
    to, source = operands
    names = split_operands(to.strip("{} ")) if to.startswith("{") else [to]
    if parts[0] == "param":
        parameter = source.strip("[] ")

        def load_parameter(m: Launch, on: Array | None) -> None:
            value = m.parameters[parameter]
            if isinstance(value, float):
                bits = np.array([value], np.float32 if size == 4 else np.float64)
            else:
                bits = np.array([value & (256**size - 1)], UNSIGNED[size])
            m.put(to, bits, on)

        return load_parameter
    shared = parts[0].startswith("shared")
    if not shared and parts[0] != "global":
        raise FaultError(f"not known: ld.{parts[0]}")

    def step(m: Launch, on: Array | None) -> None:
        lanes = m.active(on)
        address = m.address(source, shared)[lanes]
        data = (m.load_shared if shared else m.load_global)(lanes, address, size * count)
        columns = data.view(UNSIGNED[size])
        for name, column in zip(names, columns.T, strict=True):
            value = np.zeros(m.lanes, TYPES[parts[-1]] if parts[-1] in TYPES else UNSIGNED[size])
            value[lanes] = column.view(value.dtype)
            m.put(name, value, on)

    return step


@makes("st")
def storing(parts: list[str], operands: list[str]) -> Step:
    size, count = vector(parts)
    to, source = operands
    names = split_operands(source.strip("{} ")) if source.startswith("{") else [source]
    shared = parts[0].startswith("shared")
    if not shared and parts[0] != "global":
        raise FaultError(f"not known: st.{parts[0]}")

    def step(m: Launch, on: Array | None) -> None:
        lanes = m.active(on)
        address = m.address(to, shared)[lanes]
        columns = []
        for name in names:
            wide = m.program.bytes[stem(name)] if name.startswith("%") else size
            column = np.broadcast_to(m.get(name, f"b{8 * wide}"), m.lanes)[lanes]
            columns.append(column.astype(UNSIGNED[size]))  # the low bytes
        values = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8).reshape(len(lanes), size * count)
        (m.store_shared if shared else m.store_global)(lanes, address, values)

    return step


@makes("atom")
def exchanging(parts: list[str], operands: list[str]) -> Step:
    """One lane after another."""
    if parts[0] != "global" or "add" not in parts:
        raise FaultError(f"not known: atom.{'.'.join(parts)}")
    kind = parts[-1]
    to, place, by = operands
    size = np.dtype(TYPES[kind]).itemsize

    def step(m: Launch, on: Array | None) -> None:
        lanes = m.active(on)
        address = m.address(place, False)
        amount = np.broadcast_to(m.get(by, kind), m.lanes)
        before = np.zeros(m.lanes, TYPES[kind])
        for lane in lanes:
            one = np.array([lane])
            if "acq_rel" in parts:
                m.synchronize(int(m.warp[lane]), int(address[lane]))
            old = m.load_global(one, address[one], size, True).view(TYPES[kind])[:, 0]
            before[lane] = old[0]
            m.store_global(one, address[one], (old + amount[one]).astype(TYPES[kind]).view(np.uint8)[None], True)
        m.put(to, before, on)

    return step


@makes("cp")
def copying(parts: list[str], operands: list[str]) -> Step:
    if parts[:2] == ["async", "commit_group"]:

        def commit(m: Launch, on: Array | None) -> None:
            active = np.ones(m.lanes, bool) if on is None else on
            m.copies = [
                (lanes, np.where((groups < 0) & active[lanes], m.committed[lanes], groups), places, values)
                for lanes, groups, places, values in m.copies
            ]
            m.committed[active] += 1

        return commit
    if parts[:2] == ["async", "wait_group"]:
        return lambda m, on: m.finish_copies(on, int(operands[0]))
    if parts[0] != "async" or parts[2] != "shared":
        raise FaultError(f"not known: cp.{'.'.join(parts)}")
    to, source, size, *count = operands
    width = int(size, 0)

    def step(m: Launch, on: Array | None) -> None:
        lanes = m.active(on)
        places = m.in_shared(lanes, m.address(to, True)[lanes], width)
        values = np.zeros((len(lanes), width), np.uint8)
        there = np.broadcast_to(m.get(count[0], "u32"), m.lanes)[lanes] if count else np.full(len(lanes), width)
        if not np.isin(there, (0, width)).all():
            raise FaultError("part of a copy")
        some = there > 0
        if some.any():
            values[some] = m.load_global(lanes[some], m.address(source, False)[lanes[some]], width)
        m.will_write(places, lanes, None)  # from now on
        m.copies.append((lanes, np.full(len(lanes), -1, np.int32), places, values))

    return step


@makes("bar", "barrier")
def waiting(parts: list[str], operands: list[str]) -> Step:
    if parts[:2] == ["warp", "sync"]:
        return lambda m, on: None
    if parts != ["sync"] or operands[0] != "0":
        raise FaultError(f"not known: bar.{'.'.join(parts)} {operands}")

    def step(m: Launch, on: Array | None) -> None:
        if on is None:
            m.meet(np.arange(m.programs))
            return
        rows = on.reshape(-1, WARP)
        over = (m.pc >= len(m.program.blocks)).reshape(rows.shape)
        if (rows.any(1) & ~(rows | over).all(1)).any():
            raise FaultError("a barrier that some threads do not reach")
        m.waits[on] = AT_BARRIER
        here = ((m.waits == AT_BARRIER) | over.ravel()).reshape(m.programs, m.threads)
        m.meet(np.flatnonzero(here.all(1) & on.reshape(here.shape).any(1)))

    return step


@makes("ret", "exit")
def leaving(parts: list[str], operands: list[str]) -> Step:
    def step(m: Launch, on: Array | None) -> None:
        m.pc[... if on is None else on] = len(m.program.blocks)

    return step


@makes("fence", "membar")
def fencing(parts: list[str], operands: list[str]) -> Step:
    if parts[:2] == ["proxy", "async"]:
        return lambda m, on: m.fence(on)
    return lambda m, on: None

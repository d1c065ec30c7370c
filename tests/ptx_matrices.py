"""What PTX does with matrices up to sm_90: `ldmatrix`, `stmatrix`, `mma.sync` and `wgmma`.  Registered with `ptx`.

Layouts of registers and of shared memory are those of NVIDIA's PTX ISA.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from ptx import elements, makes, split_operands
from ptx_machine import WARP, Array, FaultError, Launch, Step, from_bf16

LANE = np.arange(WARP)
ROW, PAIR = LANE // 4, LANE % 4 * 2  # where a thread's elements lie in an 8x8 matrix


def matrix_addresses(m: Launch, operand: str, warps: Array, count: int) -> tuple[Array, Array]:
    """Lanes and shared addresses `[warps, count, 8]` of the rows."""
    address = m.address(operand, True).reshape(-1, WARP)[warps]
    lanes = (warps[:, None] * WARP + LANE)[:, : 8 * count]
    return lanes.reshape(-1, count, 8), address[:, : 8 * count].reshape(-1, count, 8)


def matrix_operands(parts: list[str], registers: str) -> tuple[int, bool, list[str]]:
    """How many matrices, whether they are transposed, and the registers, of `ldmatrix` and `stmatrix`."""
    return int(parts[3][1]), "trans" in parts, split_operands(registers.strip("{} "))


@makes("ldmatrix")
def loading_matrices(parts: list[str], operands: list[str]) -> Step:
    count, turned, names = matrix_operands(parts, operands[0])

    def step(m: Launch, on: Array | None) -> None:
        warps = m.whole_warps(on)
        lanes, address = matrix_addresses(m, operands[1], warps, count)
        rows = m.load_shared(lanes.ravel(), address.ravel(), 16).view(np.uint16).reshape(-1, count, 8, 8)
        if turned:
            rows = rows.swapaxes(2, 3)
        words = np.ascontiguousarray(rows[:, :, ROW[:, None], PAIR[:, None] + np.arange(2)]).view(np.uint32)[..., 0]
        for i, name in enumerate(names):
            value = np.zeros((m.lanes // WARP, WARP), np.uint32)
            value[warps] = words[:, i]
            m.put(name, value.ravel(), on)

    return step


@makes("stmatrix")
def storing_matrices(parts: list[str], operands: list[str]) -> Step:
    count, turned, names = matrix_operands(parts, operands[1])

    def step(m: Launch, on: Array | None) -> None:
        warps = m.whole_warps(on)
        lanes, address = matrix_addresses(m, operands[0], warps, count)
        rows = np.empty((len(warps), count, 8, 8), np.uint16)
        for i, name in enumerate(names):
            words = np.broadcast_to(m.get(name, "b32"), m.lanes).reshape(-1, WARP)[warps]
            parts = np.ascontiguousarray(words).view(np.uint16).reshape(-1, WARP, 2)
            rows[:, i, ROW[:, None], PAIR[:, None] + np.arange(2)] = parts
        if turned:
            rows = np.ascontiguousarray(rows.swapaxes(2, 3))
        m.store_shared(lanes.ravel(), address.ravel(), rows.view(np.uint8).reshape(-1, 16))

    return step


def fragment(m: Launch, names: Sequence[str], warps: Array) -> Array:
    """uint32 `[warps, registers, 32]`."""
    return np.stack([np.broadcast_to(m.get(n, "b32"), m.lanes).reshape(-1, WARP)[warps] for n in names], 1)


def left_operand(words: Array, kind: str) -> Array:
    """`[warps, 16, 16]` of the four registers of `mma.m16n8k16` and `wgmma`."""
    a = np.empty((len(words), 16, 16), np.float32)
    parts = elements(words, kind)  # [warps, 4, 32, 2]
    for i in range(4):
        a[:, ROW[:, None] + 8 * (i % 2), PAIR[:, None] + 8 * (i // 2) + np.arange(2)] = parts[:, i]
    return a


def accumulators(words: Array) -> Array:
    """`[warps, 16, N]` of float32 registers, four for each 8 columns."""
    values = np.ascontiguousarray(words).view(np.float32)
    c = np.empty((len(words), 16, 2 * values.shape[1]), np.float32)
    for i in range(values.shape[1]):
        c[:, ROW + 8 * (i % 4 // 2), PAIR + 8 * (i // 4) + i % 2] = values[:, i]
    return c


def leave_accumulators(m: Launch, names: Sequence[str], c: Array, warps: Array, on: Array | None) -> None:
    for i, name in enumerate(names):
        value = np.zeros((m.lanes // WARP, WARP), np.float32)
        value[warps] = c[:, ROW + 8 * (i % 4 // 2), PAIR + 8 * (i // 4) + i % 2]
        m.put(name, value.ravel(), on)


def product(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)


@makes("mma")
def multiplying_matrices(parts: list[str], operands: list[str]) -> Step:
    if parts[:5] != ["sync", "aligned", "m16n8k16", "row", "col"] or parts[5] != "f32" or parts[8] != "f32":
        raise FaultError(f"not known: mma.{'.'.join(parts)}")
    kind = parts[6]
    to, a, b, c = (split_operands(o.strip("{} ")) for o in operands)

    def step(m: Launch, on: Array | None) -> None:
        warps = m.whole_warps(on)
        right = np.empty((len(warps), 16, 8), np.float32)
        parts = elements(fragment(m, b, warps), kind)
        for i in range(2):
            right[:, PAIR[:, None] + 8 * i + np.arange(2), ROW[:, None]] = parts[:, i]
        found = product(left_operand(fragment(m, a, warps), kind), right, accumulators(fragment(m, c, warps)))
        leave_accumulators(m, to, found, warps, on)

    return step


def laid_out(start: int, leading: int, stride: int, width: int, rows: int, inner: int, along: bool) -> Array:
    """Shared addresses `[rows, inner]` of 16-bit elements, in tiles whose rows have `width` bytes, swizzled beyond 16.

    `along`: the elements of a row (of `inner`, the summed dimension) are neighbours; else those of a column.
    """
    r, k = np.arange(rows)[:, None], np.arange(inner)[None, :]
    per = width // 2
    if along:
        if width == 16:
            address = r // 8 * stride + r % 8 * 16 + k // 8 * leading + k % 8 * 2
        else:
            if inner > per:
                raise FaultError("a row beyond the swizzle")
            address = r // 8 * stride + r % 8 * width + k * 2
    elif width == 16:
        address = r // 8 * stride + k // 8 * leading + k % 8 * 16 + r % 8 * 2
    else:
        address = r // per * leading + r % per * 2 + k // 8 * stride + k % 8 * width
    address = address + start
    bits = {16: 0, 32: 1, 64: 3, 128: 7}[width]
    return address ^ ((address >> 7 & bits) << 4)


def described(descriptor: int, rows: int, inner: int, along: bool) -> Array:
    """Shared addresses `[rows, inner]` that a descriptor of `wgmma` names."""
    if descriptor >> 49 & 7:
        raise FaultError("base offset")
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    return laid_out(start, leading, stride, {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62], rows, inner, along)


@makes("wgmma")
def multiplying_by_four_warps(parts: list[str], operands: list[str]) -> Step:
    """Computed at once; `fence`, `commit_group` and `wait_group` only order."""
    if parts[0] != "mma_async":
        return lambda m, on: None
    shape = re.fullmatch(r"m64n(\d+)k16", parts[3])
    if shape is None or parts[4] != "f32" or parts[5] not in ("bf16", "f16"):
        raise FaultError(f"not known: wgmma.{'.'.join(parts)}")
    N, kind = int(shape[1]), parts[5]
    to = split_operands(operands[0].strip("{} "))
    a, b, keep, scale_a, scale_b, *turned = operands[1:]
    from_registers = a.startswith("{")
    a_turned, b_turned = (False, turned[0] == "1") if from_registers else (turned[0] == "1", turned[1] == "1")
    if (scale_a, scale_b) != ("1", "1"):
        raise FaultError("negated operands")

    def matrix(m: Launch, descriptor: str, group: int, rows: int, along: bool) -> Array:
        first = group * 4 * WARP
        values = np.broadcast_to(m.get(descriptor, "b64"), m.lanes)[first : first + 4 * WARP]
        if (values != values[0]).any():
            raise FaultError("threads have different descriptors")
        address = described(int(values[0]), rows, 16, along)
        lane = np.full(address.size, first)
        places = m.in_shared(lane, address.ravel(), 2)
        for warp in range(4):
            m.saw_asynchronously(places, lane + warp * WARP)
        bits = m.shared[places].view(np.uint16).reshape(address.shape)
        return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)

    def step(m: Launch, on: Array | None) -> None:
        warps = m.whole_warps(on)
        groups = np.unique(warps // 4)
        if len(warps) != 4 * len(groups):
            raise FaultError("part of a warp group")
        old = accumulators(fragment(m, to, warps)).reshape(len(groups), 64, N)
        kept = m.get(keep, "pred") if keep.startswith("%") else np.array([keep != "0"])
        kept = np.broadcast_to(kept, m.lanes).reshape(-1, 4 * WARP)[groups]
        found = np.empty_like(old)
        for i, group in enumerate(groups):
            if from_registers:
                rows = left_operand(fragment(m, split_operands(a.strip("{} ")), group * 4 + np.arange(4)), kind).reshape(64, 16)
            else:
                rows = matrix(m, a, group, 64, not a_turned)
            columns = matrix(m, b, group, N, not b_turned)
            found[i] = product(rows, columns.T, old[i] if kept[i].all() else np.zeros((1, 1), np.float32))
        leave_accumulators(m, to, found.reshape(-1, 16, N), warps, on)

    return step

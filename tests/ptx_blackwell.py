"""Instructions of sm_100 for `ptx.py`: tensor memory, products in it (`tcgen05`), and barriers that say when these are done.

Written from NVIDIA's PTX ISA and the descriptors of CUTLASS (`cute/arch/mma_sm100_desc.hpp`).  A product is computed when
somebody waits for it and no sooner, and ends the run if what it reads has changed since it was asked for; tensor memory is
stored when that is waited for, and starts as garbage.

A program has 128 lanes of 512 columns of 32 bits; a warp sees 32 of the lanes, by its number modulo 4.  An address is the lane
times 65536, plus the column.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
from ptx import MAKERS, makes, split_operands
from ptx_machine import FOR_OTHERS, WARP, Array, FaultError, Launch, Step, from_bf16
from ptx_matrices import LANE, laid_out, product

LANES, COLUMNS = 128, 512
LEADER = 11  # whom `elect.sync` chooses; any thread of a warp, always the same
LOADED, STORED, MULTIPLIED, ADDED = 1, 2, 4, 8  # what is under way at a place of tensor memory
FORMATS = {0: "f16", 1: "bf16"}
SWIZZLES = {0: 16, 2: 128, 4: 64, 6: 32}  # bytes of a row of a tile, by the code of a descriptor


@dataclass
class Product:
    """One `tcgen05.mma`, for programs `ctas` alike: places of the operands, and what was there when it was asked for."""

    ctas: Array
    kind: str
    a: Array  # [M, 16] bytes of shared memory of a program, or [2, M, 8] lanes and columns
    b: Array  # [N, 16]
    d: Array  # [2, M, N] lanes and columns
    adds: bool
    before: tuple[Array, Array]


@dataclass
class Barrier:
    """An `mbarrier`.  `arrived`: for each commit, how many products must be done first."""

    expected: int
    bytes: Array
    phase: int = 0
    arrived: list[int] = field(default_factory=list)
    asked: bool = False
    done: int = 0


class TensorCores:
    """Of a launch: tensor memory, products that are under way, and barriers."""

    def __init__(self, m: Launch) -> None:
        shape = (m.programs, LANES, COLUMNS)
        self.m = m
        self.memory = m.garbage.integers(0, 2**32, shape, np.uint32)
        self.owned = np.zeros((m.programs, COLUMNS), bool)
        self.closed = np.zeros(m.programs, bool)
        self.under_way = np.zeros(shape, np.uint8)
        # A warp, or -2 - n for product number n of the program
        self.written_by, self.written_at, self.read_by, self.read_at = (np.full(shape, -1, np.int32) for _ in range(4))
        self.loads: list[tuple[Array, tuple[Array, Array, Array]]] = []  # warps, places
        self.stores: list[tuple[Array, tuple[Array, Array, Array], Array]] = []  # warps, places, values
        self.products: list[tuple[Array, Product]] = []  # with the number that it has in each of its programs
        self.asked = np.zeros(m.programs, np.int32)  # products so far
        self.knows = np.zeros(m.lanes // WARP, np.int32)  # how many of them a warp has waited for
        self.barriers: dict[tuple[int, int], Barrier] = {}
        m.at_exit.append(self.left)

    def left(self) -> None:
        if self.owned.any():
            raise FaultError("leaves without tcgen05.dealloc")

    def read(self, places: tuple[Array, Array, Array], warp: Array, what: int) -> None:
        """Programs, lanes and columns will be read, by a load or as a factor."""
        self.check(places)
        if (self.under_way[places] & (STORED | ADDED)).any():
            raise FaultError("reads tensor memory that is being written")
        by, now = self.written_by[places], self.written_at[places] == self.m.epoch[places[0]]
        if (now & (by >= 0) & (by != warp)).any():
            raise FaultError("reads tensor memory that another warp wrote, with no barrier between")
        if (now & (by < -1) & (-2 - by > self.knows[warp])).any():
            raise FaultError("reads a product that it has not waited for")
        epoch = np.broadcast_to(self.m.epoch[places[0]], by.shape)
        others = (self.read_at[places] == epoch) & (self.read_by[places] != warp)
        self.read_by[places] = np.where(others, -2, warp)
        self.read_at[places] = epoch
        self.under_way[places] |= what

    def write(self, places: tuple[Array, Array, Array], warp: Array, what: int) -> None:
        """Programs, lanes and columns will be written, by a store or as a sum."""
        self.check(places)
        if (self.under_way[places] & ((LOADED | STORED | MULTIPLIED) | (ADDED if what != ADDED else 0))).any():
            raise FaultError("writes tensor memory that is in use")
        epoch = self.m.epoch[places[0]]
        by, now = self.written_by[places], self.written_at[places] == epoch
        if (now & (by >= 0) & (by != warp)).any():
            raise FaultError("writes over what another warp wrote to tensor memory, with no barrier between")
        if what != ADDED and (now & (by < -1) & (-2 - by > self.knows[warp])).any():
            raise FaultError("writes over a product that it has not waited for")
        if ((self.read_at[places] == epoch) & (self.read_by[places] != warp)).any():
            raise FaultError("writes over what another warp reads of tensor memory, with no barrier between")
        self.under_way[places] |= what

    def check(self, places: tuple[Array, Array, Array]) -> None:
        cta, lane, column = places
        if lane.min() < 0 or lane.max() >= LANES or column.min() < 0 or column.max() >= COLUMNS:
            raise FaultError(f"lane {int(lane.max())}, column {int(column.max())} is beyond tensor memory")
        if not self.owned[cta, column].all():
            raise FaultError("tensor memory that is not allocated")

    def in_place(self, places: Array, ctas: Array) -> Array:
        """Bits of a factor `[programs, rows, 16]`."""
        if places.ndim == 3:
            words = self.memory[ctas[:, None, None], places[0], places[1]]
            return np.ascontiguousarray(words).view(np.uint16).reshape(len(ctas), -1, 16)
        at = places + (ctas * self.m.shared_bytes)[:, None, None]
        return np.ascontiguousarray(self.m.shared[at[..., None] + np.arange(2)]).view(np.uint16)[..., 0]

    def finish(self, cta: Array, until: Array) -> None:
        """Products of programs `cta` are done, up to those numbers."""
        limit = np.zeros(self.m.programs, np.int32)
        limit[cta] = until
        rest = []
        for number, one in self.products:
            done = number <= limit[one.ctas]
            if done.any():
                ctas = one.ctas[done]
                a, b = self.in_place(one.a, ctas), self.in_place(one.b, ctas)
                if (a != one.before[0][done]).any() or (b != one.before[1][done]).any():
                    raise FaultError("what a product reads was changed before it was done")
                d = (ctas[:, None, None], one.d[0], one.d[1])
                left, right = (from_bf16(x) if one.kind == "bf16" else x.view(np.float16) for x in (a, b))
                start = self.memory[d].view(np.float32) if one.adds else np.zeros(1, np.float32)
                self.memory[d] = product(left, right.swapaxes(1, 2), start).view(np.uint32)
                self.under_way[d] &= ~np.uint8(ADDED)
                self.written_by[d], self.written_at[d] = (-2 - number[done])[:, None, None], self.m.epoch[ctas][:, None, None]
                if one.a.ndim == 3:
                    self.under_way[ctas[:, None, None], one.a[0], one.a[1]] &= ~np.uint8(MULTIPLIED)
            if not done.all():
                before = (one.before[0][~done], one.before[1][~done])
                rest.append((number[~done], Product(one.ctas[~done], one.kind, one.a, one.b, one.d, one.adds, before)))
        self.products = rest
        for _, one in rest:  # several may use the same places
            self.under_way[one.ctas[:, None, None], one.d[0], one.d[1]] |= ADDED
            if one.a.ndim == 3:
                self.under_way[one.ctas[:, None, None], one.a[0], one.a[1]] |= MULTIPLIED

    def barrier(self, m: Launch, lanes: Array, address: Array) -> list[Barrier]:
        """Those at shared addresses, one for each lane."""
        found = [self.barriers.get((int(m.cta[lane]), int(at))) for lane, at in zip(lanes, address, strict=True)]
        there = [one for one in found if one is not None]
        if len(there) < len(found):
            raise FaultError("no mbarrier there")
        if (m.load_shared(lanes, address, 8) != np.stack([one.bytes for one in there])).any():
            raise FaultError("an mbarrier was overwritten")
        return there


def tensor_cores(m: Launch) -> TensorCores:
    if TensorCores not in m.units:
        m.units[TensorCores] = TensorCores(m)
    found: TensorCores = m.units[TensorCores]
    return found


def one_for_each_warp(m: Launch, values: Array, warps: Array) -> Array:
    rows = np.broadcast_to(values, m.lanes).reshape(-1, WARP)[warps]
    if (rows != rows[:, :1]).any():
        raise FaultError("the threads of a warp do not agree")
    return rows[:, 0].astype(np.int64)


of_16_bits = MAKERS["ldmatrix"]


@makes("ldmatrix")
def loading_bytes(parts: list[str], operands: list[str]) -> Step:
    """Also 16x16 bytes, which are always transposed."""
    if parts[2] == "m8n8":
        return of_16_bits(parts, operands)
    if parts[2] != "m16n16" or parts[3] not in ("x1", "x2") or parts[4] != "trans" or parts[-1] != "b8":
        raise FaultError(f"not known: ldmatrix.{'.'.join(parts)}")
    count = int(parts[3][1])
    names = split_operands(operands[0].strip("{} "))

    def step(m: Launch, on: Array | None) -> None:
        warps = m.whole_warps(on)
        address = m.address(operands[1], True).reshape(-1, WARP)[warps, : 16 * count]
        lanes = (warps[:, None] * WARP + LANE)[:, : 16 * count]
        rows = m.load_shared(lanes.ravel(), address.ravel(), 16).reshape(-1, count, 16, 16).swapaxes(2, 3)
        words = np.ascontiguousarray(rows).view(np.uint32)  # [warps, count, 16, 4]
        for i, name in enumerate(names):
            value = np.zeros((m.lanes // WARP, WARP), np.uint32)
            value[warps] = words[:, i // 2, LANE // 4 + i % 2 * 8, LANE % 4]
            m.put(name, value.ravel(), on)

    return step


@makes("elect")
def electing(parts: list[str], operands: list[str]) -> Step:
    who, predicate = operands[0].split("|")

    def step(m: Launch, on: Array | None) -> None:
        m.whole_warps(on)
        m.put(predicate, m.lane_in_warp == LEADER, on)
        m.put(who, np.full(1, LEADER, np.uint32), on)

    return step


@makes("mbarrier")
def barriers(parts: list[str], operands: list[str]) -> Step:
    if parts[0] == "try_wait":
        return trying(parts, operands)
    if parts[0] not in ("init", "inval"):
        raise FaultError(f"not known: mbarrier.{'.'.join(parts)}")

    def step(m: Launch, on: Array | None) -> None:
        cores, lanes = tensor_cores(m), m.active(on)
        address = m.address(operands[0], True)[lanes]
        keys = [(int(m.cta[lane]), int(at)) for lane, at in zip(lanes, address, strict=True)]
        values = m.garbage.integers(0, 256, (len(lanes), 8), np.uint8)
        if parts[0] == "init":
            count = np.broadcast_to(m.get(operands[1], "u32"), m.lanes)[lanes]
            m.store_shared(lanes, address, values)
            for key, value, expected in zip(keys, values, count, strict=True):
                if key in cores.barriers:
                    raise FaultError("an mbarrier is there already")
                cores.barriers[key] = Barrier(int(expected), value)
        else:
            for key, one in zip(keys, cores.barrier(m, lanes, address), strict=True):
                if one.arrived:
                    raise FaultError("an mbarrier whose products have not been waited for")
                del cores.barriers[key]
            m.store_shared(lanes, address, values)

    return step


def trying(parts: list[str], operands: list[str]) -> Step:
    """`try_wait.parity`, which answers no at first, as it may."""
    if parts[1] != "parity":
        raise FaultError(f"not known: mbarrier.{'.'.join(parts)}")
    to, place, parity = operands

    def step(m: Launch, on: Array | None) -> None:
        cores, lanes = tensor_cores(m), m.active(on)
        address = m.address(place, True)[lanes]
        odd = np.broadcast_to(m.get(parity, "u32"), m.lanes)[lanes]
        asked, which = np.unique(np.stack([m.cta[lanes], address, odd]), axis=1, return_inverse=True)
        first = np.unique(which.ravel(), return_index=True)[1]  # a lane of each
        cores.barrier(m, lanes, address)
        finished, until = [], []
        answers = np.ones(asked.shape[1], bool)
        known = np.zeros(asked.shape[1], np.int32)
        for i, one in enumerate(cores.barrier(m, lanes[first], address[first])):
            if one.phase & 1 == asked[2, i]:
                if len(one.arrived) < one.expected:  # another warp has not come so far
                    answers[i] = False
                    m.waits[lanes[which.ravel() == i]] = FOR_OTHERS
                    continue
                answers[i] = one.asked
                if one.asked:
                    one.done = max(one.arrived[: one.expected])
                    del one.arrived[: one.expected]
                    one.phase += 1
                    finished.append(asked[0, i])
                    until.append(one.done)
                one.asked = not one.asked
            known[i] = one.done if answers[i] else 0
        if finished:
            order = np.argsort(until, kind="stable")  # of several of one program, the last
            cores.finish(np.array(finished)[order], np.array(until)[order])
        np.maximum.at(cores.knows, m.warp[lanes], known[which.ravel()])
        found = np.zeros(m.lanes, bool)
        found[lanes] = answers[which.ravel()]
        m.put(to, found, on)

    return step


@makes("tcgen05")
def tensor_memory(parts: list[str], operands: list[str]) -> Step:
    name = parts[0]
    known = {
        "alloc": allocating, "dealloc": allocating, "relinquish_alloc_permit": relinquishing, "ld": moving, "st": moving,
        "wait::ld": finishing_loads, "wait::st": finishing_stores, "mma": multiplying, "commit": committing,
    }  # fmt: skip
    if name not in known or parts[1] not in ("cta_group::1", "sync"):
        raise FaultError(f"not known: tcgen05.{'.'.join(parts)}")
    return known[name](parts, operands)


def allocating(parts: list[str], operands: list[str]) -> Step:
    """As far up as there is room, because a kernel must not count on the first column."""
    place, count = operands[0], int(operands[1])

    def step(m: Launch, on: Array | None) -> None:
        cores, warps = tensor_cores(m), m.whole_warps(on)
        if count not in (32, 64, 128, 256, 512):
            raise FaultError(f"{count} columns")
        if parts[0] == "dealloc":
            for warp, address in zip(warps, one_for_each_warp(m, m.get(place, "u32"), warps), strict=True):
                cta = warp // m.warps
                if any((one.ctas == cta).any() for _, one in cores.products) or cores.under_way[cta].any():
                    raise FaultError("tensor memory is in use")
                if not cores.owned[cta, address : address + count].all():
                    raise FaultError("tensor memory that is not allocated")
                cores.owned[cta, address : address + count] = False
            return
        at = one_for_each_warp(m, m.address(place, True), warps)
        for warp, address in zip(warps, at, strict=True):
            cta = warp // m.warps
            free = [first for first in range(COLUMNS - count, -1, -count) if not cores.owned[cta, first : first + count].any()]
            if cores.closed[cta] or not free:
                raise FaultError(f"no {count} columns are left")
            cores.owned[cta, free[0] : free[0] + count] = True
            value = np.array([free[0]], np.uint32).view(np.uint8)[None]
            m.store_shared(np.array([warp * WARP]), np.array([address]), value)

    return step


def relinquishing(parts: list[str], operands: list[str]) -> Step:
    def step(m: Launch, on: Array | None) -> None:
        tensor_cores(m).closed[m.whole_warps(on) // m.warps] = True

    return step


def moving(parts: list[str], operands: list[str]) -> Step:
    """`ld` and `st`: with shape `32x32b` thread t has lane t; with `16x32bx2` lane t % 16, and from 16 on other columns."""
    shape, count = parts[3], int(parts[4].lstrip("x"))
    if shape not in ("32x32b", "16x32bx2") or parts[5:] != ["b32"]:
        raise FaultError(f"not known: tcgen05.{'.'.join(parts)}")
    loads = parts[0] == "ld"
    registers, place = operands[:2] if loads else (operands[-1], operands[0])
    names = split_operands(registers.strip("{} "))
    lane, split = np.arange(WARP), 0
    if shape == "16x32bx2":
        split = int(operands[2] if loads else operands[1], 0)
        lane = lane % 16
    column = np.where(np.arange(WARP) >= 16, split, 0)[:, None] + np.arange(count)
    if len(names) != count:
        raise FaultError(f"{len(names)} registers")

    def step(m: Launch, on: Array | None) -> None:
        cores, warps = tensor_cores(m), m.whole_warps(on)
        address = one_for_each_warp(m, m.address(place, True), warps)
        if ((address >> 21) != warps % m.warps % 4).any() or ((address >> 16) % 32 % (32 if shape == "32x32b" else 16)).any():
            raise FaultError("lanes of tensor memory that another warp has")
        places = (
            (warps // m.warps)[:, None, None],
            (address >> 16)[:, None, None] + lane[:, None],
            (address & 0xFFFF)[:, None, None] + column,
        )
        if loads:
            cores.read(places, warps[:, None, None], LOADED)
            cores.loads.append((warps, places))
            # The ISA lets nobody use them before `wait::ld`; Triton does, and the assembler waits for registers by itself
            for i, name in enumerate(names):
                value = np.zeros((m.lanes // WARP, WARP), np.uint32)
                value[warps] = cores.memory[places][..., i]
                m.put(name, value.ravel(), on)
            return
        cores.write(places, warps[:, None, None], STORED)
        values = [np.broadcast_to(m.get(name, "b32"), m.lanes).reshape(-1, WARP)[warps] for name in names]
        cores.stores.append((warps, places, np.stack(values, 2)))

    return step


def of_warps(places: tuple[Array, Array, Array], which: Array) -> tuple[Array, Array, Array]:
    return places[0][which], places[1][which], places[2][which]


def finishing_loads(parts: list[str], operands: list[str]) -> Step:
    def step(m: Launch, on: Array | None) -> None:
        cores, waiting = tensor_cores(m), m.whole_warps(on)
        rest = []
        for warps, places in cores.loads:
            done = np.isin(warps, waiting)
            cores.under_way[of_warps(places, done)] &= ~np.uint8(LOADED)
            if not done.all():
                rest.append((warps[~done], of_warps(places, ~done)))
        cores.loads = rest

    return step


def finishing_stores(parts: list[str], operands: list[str]) -> Step:
    def step(m: Launch, on: Array | None) -> None:
        cores, waiting = tensor_cores(m), m.whole_warps(on)
        rest = []
        for warps, places, values in cores.stores:
            done = np.isin(warps, waiting)
            which = of_warps(places, done)
            cores.memory[which] = values[done]
            cores.under_way[which] &= ~np.uint8(STORED)
            cores.written_by[which] = warps[done][:, None, None]
            cores.written_at[which] = m.epoch[which[0]]
            if not done.all():
                rest.append((warps[~done], of_warps(places, ~done), values[~done]))
        cores.stores = rest

    return step


@functools.cache
def matrix(descriptor: int, rows: int, along: bool) -> Array:
    """Shared addresses `[rows, 16]` that a descriptor names; `along` as `laid_out` says."""
    if descriptor >> 46 & 7 != 1 or descriptor >> 49 & 15 or descriptor >> 61 not in SWIZZLES:
        raise FaultError(f"not known: shared memory descriptor {descriptor:#x}")
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    return laid_out(start, leading, stride, SWIZZLES[descriptor >> 61], rows, 16, along)


def multiplying(parts: list[str], operands: list[str]) -> Step:
    """A is in tensor memory or, like B, in shared memory; D is added to or replaced."""
    if parts[2:] != ["kind::f16"] or len(operands) != 5:
        raise FaultError(f"not known: tcgen05.{'.'.join(parts)} of {len(operands)} operands")
    d, a, b, instruction, adding = operands

    def step(m: Launch, on: Array | None) -> None:
        cores, lanes = tensor_cores(m), m.active(on)
        if len(np.unique(m.cta[lanes])) < len(lanes):
            raise FaultError("several threads of a program ask for one product")
        columns = [m.address(d, True), m.address(a, True) if a.startswith("[") else m.get(a, "u64"), m.get(b, "u64"),
                   m.get(instruction, "u32"), m.get(adding, "pred")]  # fmt: skip
        values = np.stack([np.broadcast_to(c, m.lanes)[lanes].astype(np.uint64) for c in columns])
        alike, which = np.unique(values, axis=1, return_inverse=True)
        for i, operation in enumerate(alike.T):
            ask(cores, lanes[which.ravel() == i], [int(x) for x in operation], a.startswith("["))

    def ask(cores: TensorCores, lanes: Array, operation: list[int], from_tensor_memory: bool) -> None:
        m = cores.m
        d_at, a_at, b_at, code, adds = operation
        M, N = (code >> 24 & 31) << 4, (code >> 17 & 63) << 3
        a_kind, b_kind = code >> 7 & 7, code >> 10 & 7
        known = 3 << 4 | 7 << 7 | 7 << 10 | 3 << 15 | 63 << 17 | 31 << 24
        if code & ~known or code >> 4 & 3 != 1 or a_kind != b_kind or a_kind not in FORMATS:
            raise FaultError(f"not known: instruction descriptor {code:#x}")
        if (M, N % (M // 8)) not in ((64, 0), (128, 0)) or not 8 <= N <= 256:
            raise FaultError(f"a product of {M} rows and {N} columns")
        first = d_at >> 16
        rows = np.arange(M) if M == 128 else np.arange(M) // 16 * 32 + np.arange(M) % 16
        if first not in ((0,) if M == 128 else (0, 16)) or (from_tensor_memory and a_at >> 16 != first):
            raise FaultError("lanes that do not fit")
        ctas, warp = m.cta[lanes], m.warp[lanes][:, None, None]
        D = np.stack(np.broadcast_arrays(rows[:, None] + first, (d_at & 0xFFFF) + np.arange(N)))
        cores.write((ctas[:, None, None], D[0], D[1]), warp, ADDED)
        if from_tensor_memory:
            if code >> 15 & 1:
                raise FaultError("transposed in tensor memory")
            A = np.stack(np.broadcast_arrays(rows[:, None] + first, (a_at & 0xFFFF) + np.arange(8)))
            cores.read((ctas[:, None, None], A[0], A[1]), warp, MULTIPLIED)
        else:
            A = matrix(a_at, M, not code >> 15 & 1)
        B = matrix(b_at, N, not code >> 16 & 1)
        for places in (A, B):
            if places.ndim == 2:
                who = np.repeat(lanes, places.size)
                m.saw_asynchronously(m.in_shared(who, np.tile(places.ravel(), len(lanes)), 2), who)
        one = Product(ctas, FORMATS[a_kind], A, B, D, bool(adds), (cores.in_place(A, ctas), cores.in_place(B, ctas)))
        cores.asked[ctas] += 1
        cores.products.append((cores.asked[ctas].copy(), one))

    return step


def committing(parts: list[str], operands: list[str]) -> Step:
    """Triton 3.6 writes the 64-bit form without a state space, with an address in shared memory."""
    if parts[2:] not in (["mbarrier::arrive::one", "shared::cluster", "b64"], ["mbarrier::arrive::one", "b64"]):
        raise FaultError(f"not known: tcgen05.{'.'.join(parts)}")
    inside = "shared::cluster" in parts

    def step(m: Launch, on: Array | None) -> None:
        cores, lanes = tensor_cores(m), m.active(on)
        for lane, one in zip(lanes, cores.barrier(m, lanes, m.address(operands[0], inside)[lanes]), strict=True):
            one.arrived.append(int(cores.asked[m.cta[lane]]))
        m.waits[np.isin(m.cta, m.cta[lanes]) & (m.waits == FOR_OTHERS)] = 0

    return step

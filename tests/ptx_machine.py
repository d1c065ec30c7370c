"""A GPU that executes PTX, as NumPy arrays: registers, memory, and who may access it when.  `ptx.py` has the instructions.

Threads are lanes of arrays, of all programs of a launch at once, in lockstep as far as they agree.  These end a run: accesses
outside the tensors that a kernel was given, misaligned ones, barriers that some threads miss, conflicts between warps in
shared memory that no barrier orders, and conflicts in global memory that neither barriers nor atomic operations order.
Registers and shared memory start as garbage; asynchronous copies arrive no sooner than they are waited for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Step = Callable[["Launch", "Array | None"], None]
WARP = 32
READS, WRITES, ATOMIC = range(3)
AT_BARRIER, FOR_OTHERS = 1, 2  # why a thread does not go on
DOES = ("reads", "writes", "counts")
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES: dict[str, Any] = {
    **{f"{kind}{8 * size}": UNSIGNED[size] for size in UNSIGNED for kind in "bu"},
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip


class FaultError(RuntimeError):
    """What a GPU would do wrong, or what is not known here."""


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass
class Program:
    """`blocks`: runs of instructions that branches only enter at the start and leave at the end."""

    name: str
    parameters: list[str]
    blocks: list[list[tuple[str, Step]]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)  # of a register, by its name without the number


def stem(register: str) -> str:
    return register.rstrip("0123456789")


@dataclass
class Region:
    """Memory that a kernel may touch: bytes from address `first`.  `ordered`: accesses must not conflict."""

    name: str
    first: int
    bytes: Array
    ordered: bool = True


class Launch:
    """One launch: `grid` programs of `warps` warps, `shared` bytes each."""

    def __init__(self, program: Program, grid: Sequence[int], warps: int, shared: int, values: Sequence[int | float],
                 regions: Sequence[Region], seed: int = 0) -> None:  # fmt: skip
        self.program, self.warps, self.shared_bytes, self.regions = program, warps, shared, regions
        self.threads = warps * WARP
        self.programs = int(np.prod(grid))
        self.lanes = self.programs * self.threads
        self.garbage = np.random.default_rng(seed)
        lane = np.arange(self.lanes)
        tid, self.cta = lane % self.threads, lane // self.threads
        self.lane_in_warp, self.warp = lane % WARP, lane // WARP
        x, y, z = (*grid, 1, 1)[:3]
        zero = np.zeros(self.lanes, np.uint32)
        self.special = {
            "%tid.x": tid.astype(np.uint32), "%tid.y": zero, "%tid.z": zero, "%laneid": self.lane_in_warp.astype(np.uint32),
            "%ctaid.x": (self.cta % x).astype(np.uint32), "%ctaid.y": (self.cta // x % y).astype(np.uint32),
            "%ctaid.z": (self.cta // (x * y)).astype(np.uint32), "%ntid.x": zero + np.uint32(self.threads),
            "%nctaid.x": zero + np.uint32(x), "%nctaid.y": zero + np.uint32(y), "%nctaid.z": zero + np.uint32(z),
        }  # fmt: skip
        self.parameters = dict(zip(program.parameters, values, strict=True))
        self.registers: dict[str, Array] = {}
        self.shared = self.garbage.integers(0, 256, self.programs * shared, np.uint8)
        self.written_by, self.written_at = (np.full(len(self.shared), -1, np.int32) for _ in range(2))
        self.read_by, self.read_at = (np.full(len(self.shared), -1, np.int32) for _ in range(2))
        self.unfenced = np.zeros(len(self.shared), bool)  # written since, and not yet for what reads past the caches of threads
        self.epoch = np.zeros(self.programs, np.int32)  # barriers passed
        self.pc = np.zeros(self.lanes, np.int32)
        self.waits = np.zeros(self.lanes, np.int8)
        self.committed = np.zeros(self.lanes, np.int32)  # groups of asynchronous copies
        # Who knows of whom: `clocks[a, b]` is the last stretch of warp b that happened before what warp a does now
        self.clocks = np.eye(self.lanes // WARP, dtype=np.int32)
        self.versions = [self.clocks]
        self.released: dict[int, Array] = {}  # clocks by the address of an atomic operation
        self.accesses: dict[str, list[tuple[Array, Array]]] = {}  # of a region: offsets; warp, clock, version, what, byte
        self.copies: list[tuple[Array, Array, Array, Array]] = []  # lanes, groups, bytes of shared memory, what goes there
        self.units: dict[type, Any] = {}  # what only some generations have
        self.at_exit: list[Callable[[], None]] = []
        self.at = ""

    def run(self) -> None:
        blocks = self.program.blocks
        with np.errstate(all="ignore"):
            while (on := self.next()) is not None:
                block = int(self.pc[on][0])
                mask = None if on.all() else on
                self.pc[on] = block + 1
                for statement, step in blocks[block]:
                    self.at = statement
                    try:
                        step(self, mask)
                    except FaultError as error:
                        raise FaultError(f"{self.program.name}: {statement}: {error}") from None
        for check in self.at_exit:
            check()
        for region in self.regions:
            if region.ordered:
                self.check_order(region)

    def next(self) -> Array | None:
        """Threads of the first block where some are that can go on; None at the end."""
        running = (self.waits == 0) & (self.pc < len(self.program.blocks))
        if not running.any():
            if (self.waits == AT_BARRIER).any():
                raise FaultError(f"{self.program.name}: a barrier that some threads do not reach")
            if (self.waits == FOR_OTHERS).any():
                raise FaultError(f"{self.program.name}: waits for what nobody does")
            return None
        return running & (self.pc == self.pc[running].min())

    # Registers

    def get(self, operand: str, kind: str) -> Array:
        """`[lanes]`, or one value, of type `kind`; bf16 as float32."""
        if kind == "bf16":
            return from_bf16(self.get(operand, "u16"))
        dtype = TYPES[kind]
        if operand[0] in "-0123456789":
            if operand.startswith(("0f", "0F")):
                bits = np.array([int(operand[2:], 16)], np.uint32)
                return bits.view(dtype) if np.dtype(dtype).itemsize == 4 else bits.view(np.float32).astype(dtype)
            if operand.startswith(("0d", "0D")):
                return np.array([int(operand[2:], 16)], np.uint64).view(np.float64)
            size = np.dtype(dtype).itemsize
            return np.array([int(operand.rstrip("U"), 0) & (256**size - 1)], UNSIGNED[size]).view(dtype)
        if operand in self.special:
            return self.special[operand].view(dtype)
        if operand == "global_smem":
            return np.zeros(1, dtype)
        found = self.registers.get(operand)
        if found is None:  # not written yet: anything
            size = np.dtype(dtype).itemsize
            found = self.garbage.integers(0, 256**size - 1, self.lanes, UNSIGNED[size], endpoint=True)
            found = self.registers[operand] = found.astype(np.bool_) if kind == "pred" else found
        if found.dtype.itemsize != np.dtype(dtype).itemsize:
            raise FaultError(f"{operand} has {found.dtype.itemsize} bytes, not those of {kind}")
        return found.view(dtype)

    def put(self, name: str, value: Array, on: Array | None) -> None:
        if name == "_":
            return
        if value.dtype != np.bool_:
            size = self.program.bytes[stem(name)]
            if value.dtype.itemsize < size:  # a wider register, which only loads and conversions of integers fill
                value = value.astype(UNSIGNED[size].__name__.lstrip("u") if value.dtype.kind == "i" else UNSIGNED[size])
            value = value.view(UNSIGNED[value.dtype.itemsize])
        if on is not None:
            old = self.registers.get(name)
            value = np.where(on, value, old if old is not None else np.zeros(1, value.dtype))
        if value.shape != (self.lanes,):
            value = np.broadcast_to(value, self.lanes).copy()
        self.registers[name] = value

    def active(self, on: Array | None) -> Array:
        return np.arange(self.lanes) if on is None else np.flatnonzero(on)

    def whole_warps(self, on: Array | None) -> Array:
        """Warps that are active; all of their threads must be."""
        if on is None:
            return np.arange(self.lanes // WARP)
        rows = on.reshape(-1, WARP)
        if (rows.any(1) != rows.all(1)).any():
            raise FaultError("part of a warp does not take part")
        return np.flatnonzero(rows.all(1))

    # Memory

    def address(self, operand: str, shared: bool) -> Array:
        """Int64 `[lanes]`."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if found is None:
            raise FaultError(f"not an address: {operand}")
        base = self.get(found[1], "u32" if shared else "u64").astype(np.int64)
        return np.broadcast_to(base + int(found[2] or "0", 0), self.lanes)

    def in_global(self, lanes: Array, address: Array, size: int) -> list[tuple[Region, Array, Array]]:
        """Regions, the lanes (as places in `lanes`) whose addresses lie in them, and offsets into them."""
        if (address % size).any():
            raise FaultError(f"address {int(address[(address % size) != 0][0]):#x} is not a multiple of {size}")
        found = []
        left = np.ones(len(lanes), bool)
        for region in self.regions:
            inside = left & (address >= region.first) & (address + size <= region.first + len(region.bytes))
            if inside.any():
                found.append((region, np.flatnonzero(inside), address[inside] - region.first))
                left &= ~inside
                if not left.any():
                    break
        if left.any():
            which = int(np.flatnonzero(left)[0])
            near = min(self.regions, key=lambda r: abs(int(address[which]) - r.first))
            raise FaultError(
                f"thread {int(lanes[which] % self.threads)} of program {int(self.cta[lanes[which]])}: {size} bytes at "
                f"{near.name} + {int(address[which]) - near.first}, which has {len(near.bytes)} bytes"
            )
        return found

    def load_global(self, lanes: Array, address: Array, size: int, atomic: bool = False) -> Array:
        """uint8 `[lanes, size]`."""
        result = np.empty((len(lanes), size), np.uint8)
        for region, which, offset in self.in_global(lanes, address, size):
            places = offset[:, None] + np.arange(size)
            result[which] = region.bytes[places]
            self.note(region, places, lanes[which], result[which], READS if not atomic else ATOMIC)
        return result

    def store_global(self, lanes: Array, address: Array, values: Array, atomic: bool = False) -> None:
        size = values.shape[1]
        for region, which, offset in self.in_global(lanes, address, size):
            places = offset[:, None] + np.arange(size)
            changed = (region.bytes[places] != values[which]).any(1)
            region.bytes[places] = values[which]
            if (region.bytes[places] != values[which]).any():
                raise FaultError("threads store different values at one place")
            what = ATOMIC if atomic else WRITES
            self.note(region, places[changed], lanes[which[changed]], values[which[changed]], what)

    def note(self, region: Region, places: Array, lanes: Array, values: Array, what: int) -> None:
        """Keep who reads or changes what, and when."""
        warp = np.broadcast_to(self.warp[lanes][:, None], places.shape).ravel()
        rest = (self.clocks[warp, warp], np.full(len(warp), len(self.versions) - 1), np.full(len(warp), what), values.ravel())
        self.accesses.setdefault(region.name, []).append((places.ravel(), np.stack([warp, *rest]).astype(np.int32)))

    def meet(self, programs: Array) -> None:
        """All threads of these programs are at a barrier."""
        self.epoch[programs] += 1
        self.waits.reshape(self.programs, self.threads)[programs] = 0
        if len(programs):
            self.join(programs)

    def join(self, programs: Array) -> None:
        """A barrier: what any warp of these programs did, happened before what each of them does now."""
        clocks = self.clocks.reshape(self.programs, self.warps, -1).copy()
        clocks[programs] = clocks[programs].max(1, keepdims=True)
        self.clocks = clocks.reshape(len(self.clocks), -1)
        warps = (programs[:, None] * self.warps + np.arange(self.warps)).ravel()
        self.clocks[warps, warps] += 1
        self.versions.append(self.clocks)

    def synchronize(self, warp: int, address: int) -> None:
        """An atomic operation that acquires and releases."""
        self.clocks = self.clocks.copy()
        if address in self.released:
            np.maximum(self.clocks[warp], self.released[address], out=self.clocks[warp])
        self.released[address] = self.clocks[warp].copy()
        self.clocks[warp, warp] += 1
        self.versions.append(self.clocks)

    def check_order(self, region: Region) -> None:
        """Barriers and atomic operations put each change of a byte after the accesses before it and before later ones."""
        noted = self.accesses.get(region.name, [])
        place = np.concatenate([places for places, _ in noted] or [np.empty(0, np.int64)])
        stamps = np.concatenate([stamp for _, stamp in noted] or [np.empty((5, 0), np.int32)], 1)
        written = np.zeros(len(region.bytes), bool)
        written[place[stamps[3] != READS]] = True
        kept = np.flatnonzero(written[place])
        if not len(kept):
            return
        order = kept[np.argsort(place[kept], kind="stable")]
        place, stamps = place[order], stamps[:, order]
        writes, at = stamps[3] != READS, np.arange(len(place))
        first = np.concatenate([[True], place[1:] != place[:-1]])
        last = np.concatenate([first[1:], [True]])
        before = np.maximum.accumulate(np.where(writes | first, at, 0))  # the last change up to here, or the first access
        before = np.where(first, at, np.concatenate([[0], before[:-1]]))
        after = np.minimum.accumulate(np.where(writes | last, at, len(at))[::-1])[::-1]
        after = np.where(last, at, np.concatenate([after[1:], [0]]))
        for a, b in ((before, at), (at, after)):
            one, two = stamps[:, a], stamps[:, b]
            pairs = (writes[a] | writes[b]) & (one[0] != two[0]) & ((one[3] != ATOMIC) | (two[3] != ATOMIC))
            pairs &= ~(writes[a] & writes[b] & (one[4] == two[4]))  # the same, whoever comes last
            for i in np.flatnonzero(pairs):
                warp, clock, _, did, _ = one[:, i]
                other, _, version, does, _ = two[:, i]
                if self.versions[version][other, warp] < clock:
                    raise FaultError(
                        f"{self.program.name}: {region.name} + {int(place[a[i]])}: warp {int(warp)} {DOES[did]} and warp "
                        f"{int(other)} {DOES[does]} it, in no order"
                    )

    def in_shared(self, lanes: Array, address: Array, size: int, align: int = 0) -> Array:
        """Places in `shared`, int64 `[lanes, size]`."""
        if (address % (align or size)).any():
            raise FaultError(f"shared address {int(address.max()):#x} is not a multiple of {align or size}")
        if (address < 0).any() or (address + size > self.shared_bytes).any():
            raise FaultError(f"shared address {int(address.max()):#x} is beyond {self.shared_bytes} bytes")
        return (self.cta[lanes] * self.shared_bytes + address)[:, None] + np.arange(size)

    def load_shared(self, lanes: Array, address: Array, size: int) -> Array:
        """uint8 `[lanes, size]`."""
        places = self.in_shared(lanes, address, size)
        self.saw(places, lanes)
        return self.shared[places]

    def saw(self, places: Array, lanes: Array) -> None:
        """Shared memory was read: not what another warp wrote since the last barrier."""
        warp, epoch = self.warp[lanes][:, None], self.epoch[self.cta[lanes]][:, None]
        if ((self.written_at[places] == epoch) & (self.written_by[places] != warp)).any():
            raise FaultError("reads what another warp wrote, with no barrier between")
        shared_reader = (self.read_at[places] == epoch) & (self.read_by[places] != warp)
        self.read_by[places] = np.where(shared_reader, -2, warp)
        self.read_at[places] = epoch
        # Several warps in one access
        flat, who = places.ravel(), np.broadcast_to(warp, places.shape).ravel()
        mixed = self.read_by[flat] != who
        self.read_by[flat[mixed]] = -2

    def store_shared(self, lanes: Array, address: Array, values: Array, align: int = 0) -> None:
        places = self.in_shared(lanes, address, values.shape[1], align)
        self.will_write(places, lanes, values)
        self.shared[places] = values

    def will_write(self, places: Array, lanes: Array, values: Array | None) -> None:
        """Shared memory is written: not what another warp read or wrote since the last barrier, unless it stays the same."""
        warp, epoch = self.warp[lanes][:, None], self.epoch[self.cta[lanes]][:, None]
        changes = True if values is None else self.shared[places] != values
        if ((self.read_at[places] == epoch) & (self.read_by[places] != warp) & changes).any():
            raise FaultError("writes over what another warp reads, with no barrier between")
        if ((self.written_at[places] == epoch) & (self.written_by[places] != warp) & changes).any():
            raise FaultError("writes over what another warp wrote, with no barrier between")
        self.written_by[places], self.written_at[places] = warp, epoch
        self.unfenced[places] = True

    def fence(self, on: Array | None) -> None:
        """`fence.proxy.async`: of what these warps wrote, or anyone before the last barrier."""
        for warp in np.unique(self.warp[self.active(on)]):
            cta = warp // self.warps
            own = slice(cta * self.shared_bytes, (cta + 1) * self.shared_bytes)
            self.unfenced[own] &= (self.written_by[own] != warp) & (self.written_at[own] == self.epoch[cta])

    def saw_asynchronously(self, places: Array, lanes: Array) -> None:
        """Tensor cores read shared memory by themselves."""
        self.saw(places, lanes)
        if self.unfenced[places].any():
            raise FaultError("reads what was written, with no fence.proxy.async between")

    def finish_copies(self, on: Array | None, left: int) -> None:
        """`cp.async.wait_group`."""
        active = np.ones(self.lanes, bool) if on is None else on
        rest = []
        for lanes, groups, places, values in self.copies:
            done = active[lanes] & (groups >= 0) & (groups < self.committed[lanes] - left)
            self.will_write(places[done], lanes[done], values[done])
            self.shared[places[done]] = values[done]
            if not done.all():
                rest.append((lanes[~done], groups[~done], places[~done], values[~done]))
        self.copies = rest

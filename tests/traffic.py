"""What an executed kernel asks of the memory of its multiprocessor: lines of the cache, and turns of shared memory.

Neither shows in machine code: an access of a warp takes a cycle for each line of 128 bytes that it touches, or for each time
that its threads want different words of one bank.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import numpy as np
import torch
from ptx_machine import Array, Launch, Region
from torch import Tensor

LINE, BANKS = 128, 32
PER_CYCLE = 4.3e12 / 132 / 1.98e9  # bytes that the memory of an H200 gives one multiprocessor in a cycle


class Counted(Launch):
    """A launch that counts, for all launches: cycles by what asks for them."""

    cycles: ClassVar[Counter[str]] = Counter()

    def groups(self, lanes: Array, size: int) -> Array:
        """Which accesses are made together: those of a warp, by halves of it for 8 bytes, by quarters for 16."""
        together = {16: 8, 8: 16}.get(size, 32)
        return self.warp[lanes] * 4 + self.lane_in_warp[lanes] // together

    def in_global(self, lanes: Array, address: Array, size: int) -> list[tuple[Region, Array, Array]]:
        """Counts lines."""
        self.cycles["lines"] += len(np.unique(np.stack([self.groups(lanes, size), address // LINE]), axis=1).T)
        return super().in_global(lanes, address, size)

    def in_shared(self, lanes: Array, address: Array, size: int, align: int = 0) -> Array:
        """Counts turns."""
        words = address[:, None] // 4 + np.arange(max(size // 4, 1))
        group = np.broadcast_to(self.groups(lanes, size)[:, None], words.shape)
        pairs = np.unique(np.stack([group.ravel(), words.ravel()]), axis=1)
        banks = np.unique(np.stack([pairs[0], pairs[1] % BANKS]), axis=1, return_counts=True)
        most: dict[int, int] = {}
        for which, count in zip(banks[0][0], banks[1], strict=True):
            most[int(which)] = max(most.get(int(which), 0), int(count))
        self.cycles["turns"] += sum(most.values())
        return super().in_shared(lanes, address, size, align)


def aligned(tensor: Tensor) -> Tensor:
    """A copy that begins with a line, as allocations on a GPU do."""
    memory = torch.empty(tensor.nbytes + LINE, dtype=torch.uint8)
    start = -memory.data_ptr() % LINE
    return memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def shares(launch: Any, nbytes: int) -> dict[str, float]:
    """Of a launch that moves `nbytes`: cycles by what asks for them, to those in which memory gives as many bytes."""
    Counted.cycles.clear()
    launch()
    return {what: count / (nbytes / PER_CYCLE) for what, count in Counted.cycles.items()}

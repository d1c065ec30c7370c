"""Kernels with the faults that `ptx_machine` is for, and which Triton's interpreter lets pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(x: tl.tensor, y: tl.tensor, SIZE: tl.constexpr) -> None:
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at))


def reads_beyond() -> dict[str, float]:
    """Of a slice, whose neighbours are there to be read."""
    x, y = torch.zeros(512), torch.zeros(256)
    copy_kernel[(2,)](x[:192], y, 128)
    return {}


def writes_beyond() -> dict[str, float]:
    x, y = torch.zeros(256), torch.zeros(512)
    copy_kernel[(2,)](x, y[:255], 128)
    return {}


@triton.jit
def overlap_kernel(y: tl.tensor, SIZE: tl.constexpr) -> None:
    program = tl.program_id(0)
    tl.store(y + program * (SIZE // 2) + tl.arange(0, SIZE), program.to(tl.float32))


def writes_elsewhere() -> dict[str, float]:
    """Two programs, different values at the same places."""
    overlap_kernel[(2,)](torch.full((192,), torch.nan), 128)
    return {}


@triton.jit
def sum_kernel(x: tl.tensor, work: tl.tensor, count: tl.tensor, y: tl.tensor, SEM: tl.constexpr) -> None:
    program = tl.program_id(0)
    tl.store(work + program * 128 + tl.arange(0, 128), tl.load(x + program * 128 + tl.arange(0, 128)) + 1.0)
    tl.debug_barrier()
    if tl.atomic_add(count, 1, sem=SEM, scope="gpu") == tl.num_programs(0) - 1:
        sums = tl.zeros((128,), tl.float32)
        for part in range(2):
            sums += tl.load(work + part * 128 + tl.arange(0, 128))
        tl.store(y + tl.arange(0, 128), sums)


def add_up(sem: str) -> dict[str, float]:
    """The last program adds what both left."""
    x, y = torch.randn(256), torch.full((128,), torch.nan)
    sum_kernel[(2,)](x, torch.full((256,), torch.nan), torch.zeros(1, dtype=torch.int32), y, sem)
    expected = x.double().view(2, 128).sum(0) + 2
    return {"sum": float((y - expected).abs().max() / expected.abs().max())}


def counts_without_order() -> dict[str, float]:
    assert add_up("acq_rel")["sum"] < 1e-6
    return add_up("relaxed")

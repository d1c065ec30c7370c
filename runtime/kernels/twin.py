"""Says which device the meta device stands for, while `runtime.ahead` finds out which kernels a model will launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_DEVICE: ContextVar[torch.device | None] = ContextVar("device", default=None)


@contextmanager
def standing_for(device: torch.device) -> Iterator[None]:
    """Within, and in this thread, kernels are chosen and cut for meta tensors as for those of `device`."""
    token = _DEVICE.set(device)
    try:
        yield
    finally:
        _DEVICE.reset(token)


def actual(device: torch.device) -> torch.device:
    """The device itself, or the one that it stands for."""
    return _DEVICE.get() or device if device.type == "meta" else device


def values(tensor: torch.Tensor) -> list[float]:
    """Those of a one-dimensional tensor, which waits for its device; of a meta tensor as if all were the same."""
    return [0.0] * len(tensor) if tensor.is_meta else tensor.tolist()

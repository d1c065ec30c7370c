"""Says whether a fixed step is being computed: one whose work may be recorded once and replayed for other values.

In such a step nothing may be read from the device and no shape may depend on a value.  Modules that learn from the device what
there is to do, as mixtures of experts do, ask here whether they must not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_FIXED = ContextVar("fixed", default=False)


@contextmanager
def fixed_step() -> Iterator[None]:
    """What runs within is a fixed step."""
    token = _FIXED.set(True)
    try:
        yield
    finally:
        _FIXED.reset(token)


def in_fixed_step() -> bool:
    """Whether a fixed step is being computed."""
    return _FIXED.get()

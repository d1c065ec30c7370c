"""Writes safetensors files whose layout is known before the first byte."""

from __future__ import annotations

import json
from collections.abc import Iterable

ALIGNMENT = 4096  # the data starts at a multiple of this, so that whole blocks can be mapped or cloned


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Length prefix and header of a file that holds (name, dtype, shape, bytes) one after another, padded with spaces."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    body += b" " * (-(len(body) + 8) % ALIGNMENT)
    return len(body).to_bytes(8, "little") + body

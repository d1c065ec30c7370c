"""Writes safetensors headers of files whose layout is known before the first byte."""

from __future__ import annotations

import json
from collections.abc import Iterable

from .layout import BLOCK


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], residue: int = 0) -> bytes:
    """Length prefix and header of a file that holds (name, dtype, shape, bytes) one after another.

    Padded with spaces, so that the data starts at `residue` modulo `BLOCK`.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    body += b" " * ((residue - len(body) - 8) % BLOCK)
    return len(body).to_bytes(8, "little") + body

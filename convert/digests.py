"""Digests of files and of parts of them, for the report of a conversion and for checking against it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

PIECE = 256 << 10  # stays in the cache of a core between reading and hashing


def range_digests(path: Path, ranges: Iterable[tuple[int, int]]) -> list[str]:
    """SHA-256 of each range [start, end) of a file, hexadecimal.  Raises `EOFError` when the file ends before a range does."""
    scratch = memoryview(bytearray(PIECE))
    found = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start, end in ranges:
            digest = hashlib.sha256()
            while start < end:
                count = os.preadv(descriptor, [scratch[: min(PIECE, end - start)]], start)
                if count == 0:
                    raise EOFError(path)
                digest.update(scratch[:count])
                start += count
            found.append(digest.hexdigest())
    finally:
        os.close(descriptor)
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return range_digests(path, [(0, path.stat().st_size)])[0]


def text_digest(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()

"""Digests of files and of parts of them, for the report of a conversion and for checking against it.

Files have SHA-256, as `sha256sum` and the Hub's pages show it.  Tensors have BLAKE3, because they are hashed beside the files
of IN, which hold the same bytes: one core takes 6 GB/s instead of 1.8 with SHA-256 (AMD EPYC with SHA and AVX-512).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from .remote import PIECE as REMOTE_PIECE
from .remote import RemotePath

TensorDigest = blake3  # what tensors are hashed with
PIECE = 256 << 10  # stays in the cache of a core between reading and hashing


class Digest(Protocol):
    """What both hashes have."""

    def update(self, data: memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


def range_digests(
    path: Path,
    ranges: Iterable[tuple[int, int]],
    new: Callable[[], Digest] = hashlib.sha256,
    stop: threading.Event | None = None,
) -> list[str]:
    """Digest of each range [start, end) of a file, hexadecimal.

    Raises `EOFError` when the file ends before a range does, `InterruptedError` when `stop` is set.
    """
    scratch = memoryview(bytearray(PIECE))
    found = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start, end in ranges:
            digest = new()
            while start < end:
                if stop is not None and stop.is_set():
                    raise InterruptedError("the conversion was given up")
                try:
                    count = os.preadv(descriptor, [scratch[: min(PIECE, end - start)]], start)
                except OSError as error:
                    error.filename = str(path)
                    raise
                if count == 0:
                    raise EOFError(path)
                digest.update(scratch[:count])
                start += count
            found.append(digest.hexdigest())
    finally:
        os.close(descriptor)
    return found


def file_digest(path: Path | RemotePath, stop: threading.Event | None = None) -> str:
    """SHA-256 of a file, hexadecimal."""
    if isinstance(path, RemotePath):
        digest = hashlib.sha256()
        with path.open() as stream:
            while data := stream.read(REMOTE_PIECE):
                digest.update(data)
        return digest.hexdigest()
    return range_digests(path, [(0, path.stat().st_size)], stop=stop)[0]


def source_digest(path: Path | RemotePath, stop: threading.Event | None = None) -> str | None:
    """SHA-256 of a file of weights of IN.  Of a remote one, what its server publishes, or None.

    Conversion reads a file in the order of the model, and SHA-256 takes its order in the file: computing it would move
    everything over the network a second time.
    """
    return path.sha256 if isinstance(path, RemotePath) else file_digest(path, stop)


def text_digest(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()

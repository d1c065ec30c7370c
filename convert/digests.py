"""Digests of files, for the report of a conversion and for checking against it."""

from __future__ import annotations

import hashlib
from pathlib import Path

PIECE = 4 << 20


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()

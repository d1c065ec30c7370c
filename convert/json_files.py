"""The JSON files of OUT: one spelling for each value, so that every changed byte is a difference, whatever JSON makes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .digests import text_digest


def json_text(value: Any) -> str:
    """The spelling of a JSON value, for people to read."""
    return json.dumps(value, indent=2) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and flush it to disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(json_text(value))
        stream.flush()
        os.fsync(stream.fileno())


def replace_json(path: Path, value: Any) -> None:
    """Write a JSON file that others read meanwhile: they find the old one or the new one, whole."""
    new = path.with_name(f".{path.name[:200]}.{os.getpid()}.new")
    try:
        write_json(new, value)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def is_spelled(path: Path, value: Any) -> bool:
    """Whether a file is exactly what `write_json` makes of `value`."""
    return path.read_bytes() == json_text(value).encode()


def sealed(report: dict[str, Any]) -> dict[str, Any]:
    """A report with the digest of everything else in it as its last entry, so that it can be checked without another file."""
    return {**report, "sha256": text_digest(json_text(report))}


def is_sealed(path: Path, report: dict[str, Any]) -> bool:
    """Whether a file is a report, unchanged since it was sealed."""
    return sealed({k: v for k, v in report.items() if k != "sha256"}) == report and is_spelled(path, report)

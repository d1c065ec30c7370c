"""What a run tells a pipeline while it works: one JSON object a line on standard error, and refusals as JSON values."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from .errors import SHOWN_PROBLEMS, ConvertError, Problem

PROGRESS_EVERY_S = 1.0


def failure(problems: tuple[Problem, ...], exit_code: int) -> dict[str, Any]:
    """Why a command failed, as JSON values: its exit code, the first problems, and how many there are."""
    return {
        "exit_code": exit_code,
        "problems": [asdict(problem) for problem in problems[:SHOWN_PROBLEMS]],
        "problem_count": len(problems),
    }


@dataclass(slots=True)
class Events:
    """How the command that runs reports.

    lines    events go to standard error, one JSON object a line: `event`, `time` (RFC 3339, UTC), and the event's own fields
    as_json  results go to standard output as JSON, and so does the reason when there is none
    """

    lines: bool = False
    as_json: bool = False
    _last_s: float = field(default=0.0, init=False)

    def emit(self, event: str, **facts: Any) -> None:
        """Write one event; nothing without `lines`."""
        if self.lines:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            sys.stderr.write(json.dumps({"event": event, "time": now, **facts}) + "\n")
            sys.stderr.flush()

    def progress(self) -> Callable[[int, int], None]:
        """A function that takes (bytes written, total bytes) and writes an event every second, the first and last always."""

        def advance(done: int, total: int) -> None:
            now = time.monotonic()
            if done >= total or now - self._last_s >= PROGRESS_EVERY_S:
                self._last_s = now
                self.emit("progress", bytes=done, total_bytes=total)

        return advance

    def failed(self, error: ConvertError) -> None:
        """Say why a command failed, where machines look; for people, the caller writes lines."""
        why = failure(error.problems, error.exit_code)
        self.emit("error", **why)
        if self.as_json:
            sys.stdout.write(json.dumps({"error": why}, indent=2) + "\n")

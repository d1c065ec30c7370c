"""Errors that a person can act on: file, tensor, expected, found, remedy, always in this order and on one line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.format import escaped

ORIGINAL = "take the checkpoint of the original publisher"
SHOWN_PROBLEMS = 10  # one run gives one list, but a screenful at most


def printable(text: object) -> str:
    """`text` with control characters escaped and very long names cut, so that no input writes to the terminal."""
    shown = escaped(text)
    return shown if len(shown) <= 300 else f"{shown[:280]}... ({len(shown)} characters)"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.  `file` and `tensor` may be empty; the other parts never are."""

    file: str
    tensor: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        where = "".join(f"{printable(part)}: " for part in (self.file, self.tensor) if part)
        found = printable(self.found) or "nothing"
        return f"{where}expected {printable(self.expected)}, found {found}; {printable(self.remedy)}"


class ConvertError(Exception):
    """The checkpoint is refused.  `problems` holds every `Problem` found; `str()` shows the first ten, one a line."""

    exit_code = 1

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        lines = [str(p) for p in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"... and {len(self.problems) - SHOWN_PROBLEMS} more problems")
        super().__init__("\n".join(lines))


class UsageError(ConvertError):
    """The command cannot be carried out as asked, whatever the checkpoint holds."""

    exit_code = 2


class MachineError(ConvertError):
    """The machine failed: disk full, I/O error, a network that is down, a source that changed while it was read."""

    exit_code = 3


class NetworkError(MachineError):
    """A server does not answer, or not well; what was done so far may be continued."""


def changed(file: str) -> MachineError:
    """The error of a source that is no longer what was planned."""
    return MachineError(
        Problem(file, "", "the file as it was when planning", "one that changed meanwhile", "convert again when it is stable")
    )

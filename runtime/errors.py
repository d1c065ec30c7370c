"""The errors of the runtime that are not the caller's own arguments."""

from __future__ import annotations

from runtime.format import escaped


class LoadError(ValueError):
    """A file or tensor of a checkpoint directory that does not fit its `config.json`.

    The message is one line: file, tensor, what was expected, what was found, what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


class InputError(ValueError):
    """A file of prompts or of text that cannot be used.  The message is one line: file, line, expected, found."""

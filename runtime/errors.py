"""The error of a checkpoint directory that cannot be loaded."""

from __future__ import annotations


class LoadError(ValueError):
    """A file or tensor of a checkpoint directory that does not fit its `config.json`.

    The message is one line: file, tensor, what was expected, what was found, what to do.
    """

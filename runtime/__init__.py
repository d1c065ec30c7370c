"""Load a canonical checkpoint and generate text from it.

`load_model(out_dir, ...)` builds the network whose `state_dict()` has exactly the stored names, and reads the bytes into
it; `generate_tokens(model, input_ids, ...)` yields token ids.  Importing this package imports neither torch nor anything
else: `convert` reads `runtime.format` and must stay quick to start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.decode import generate_tokens
    from runtime.errors import LoadError
    from runtime.loader import load_model

__all__ = ["LoadError", "generate_tokens", "load_model"]

_HOMES = {"LoadError": "errors", "generate_tokens": "decode", "load_model": "loader"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"runtime.{_HOMES[name]}"), name)

"""What the commands of this package share: options, exit codes, the device, files, and measuring."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from runtime.errors import InputError, LoadError
from runtime.format import FormatError

if TYPE_CHECKING:
    import torch

F = TypeVar("F", bound=Callable[..., Any])
ACTIVATIONS = click.Choice(["quantized", "full"])
INPUT_FILE = click.Path(exists=True, dir_okay=False, allow_dash=True)

out_argument: Callable[[Any], Any] = click.argument("out", type=click.Path(exists=True, file_okay=False))
device_option: Callable[[Any], Any] = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one."
)
activations_option: Callable[[Any], Any] = click.option(
    "--activations",
    type=ACTIVATIONS,
    default="quantized",
    show_default=True,
    help="quantized: as the checkpoint says; full: weights only, the reference.",
)


def import_torch(device: str | None) -> str:
    """Import torch and return the device to use: `device`, or the best there is.  Raises `UsageError` without it."""
    # Read when torch is imported.  Threads that wait by spinning make small models several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no CUDA device here")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def read_text(path: str) -> tuple[str, str]:
    """The text of a file, or of standard input for "-", and the name for messages.  Raises `InputError` for no UTF-8."""
    name = "standard input" if path == "-" else path
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig"), name
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}:{line}: expected text in UTF-8, found {error.reason}") from None


def progress(total: int, unit: str) -> Any:
    """A progress bar on standard error, only where that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=not sys.stderr.isatty(), file=sys.stderr)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory used so far, in 10**6 bytes: of the GPU where that is the device, else resident in this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def run(command: click.Command, name: str) -> int:
    """Run a command and return its exit code: 0, 1 for refused files, 2 for usage, 3 for the machine, 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode shows escapes
    try:
        command.main(prog_name=f"python -m {name}", standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"error: {_line(error.format_message())} (see --help)", err=True)
        return error.exit_code
    except (LoadError, FormatError, InputError) as error:
        click.echo(f"error: {_line(error)}", err=True)
        return 1
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (OSError, MemoryError) as error:
        click.echo(f"error: {_line(error) or 'out of memory'}", err=True)
        return 3
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        click.echo(f"error: out of memory: {_line(error)[:200]}", err=True)
        return 3
    return 0


def _line(error: object) -> str:
    return " ".join(str(error).split())


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate: on CUDA a class of its own, on the CPU a plain `RuntimeError`."""
    return type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)

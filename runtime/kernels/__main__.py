"""`python -m runtime.kernels`: what this machine uses for each scheme and operation, and why."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import torch

from runtime.format import ACTIVATIONS, SCHEMES
from runtime.kernels.table import ROWS, Machine, choose, machine


def lines(at: Machine, name: str) -> Iterator[str]:
    """The report for a machine called `name`: one line per scheme, way of the input and operation that differ."""
    generation = "" if at.generation is None else f" (sm_{at.generation})"
    yield f"{name}{generation}, triton {'found' if at.triton else 'not found'}"
    for operation in dict.fromkeys(operation for row in ROWS for operation in row.operations):
        yield f"{operation}:"
        for scheme in dict.fromkeys(scheme for row in ROWS if operation in row.operations for scheme in row.schemes):
            inputs: dict[tuple[str, tuple[str, ...]], list[str]] = {}
            for activations in (None, *(kind for kind in ACTIVATIONS if _goes_with(kind, scheme))):
                row, passed = choose(scheme, activations, operation, at)
                inputs.setdefault((row.module, (row.why, *passed)), []).append(activations or "full")
            for (module, why), kinds in inputs.items():
                given = f" input {', '.join(kinds)}" if scheme in SCHEMES else ""
                yield f"  {scheme:12s}{given}: {module} ({'; '.join(why)})"


def _goes_with(activations: str, scheme: str) -> bool:
    """Whether producers quantise inputs so beside weights of `scheme`: FP8 beside FP8, otherwise the same format."""
    return activations == scheme or (scheme.startswith("fp8") and activations.startswith("fp8"))


def main() -> None:
    """Print the report for each GPU, or for the CPU where there is none, to as much of the end as is read."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    try:
        for device in devices or [torch.device("cpu")]:
            print(*lines(machine(device), torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"), sep="\n")
        sys.stdout.flush()
    except BrokenPipeError:  # as `head` leaves it; what is still to be written goes nowhere, also when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()

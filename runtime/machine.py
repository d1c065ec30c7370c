"""What the machine can do, asked before it is needed: devices, number formats, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import torch

from runtime.errors import LoadError
from runtime.format import CONFIG_FILE, CanonicalConfig, module_tensors
from runtime.layers import TORCH_DTYPES

DEVICE_TYPES = ("cpu", "cuda")
SMALL = 2**26  # bytes that are taken without asking how much memory there is


def find_device(name: str | torch.device) -> torch.device:
    """A device that the runtime runs on and that is there.  Raises `ValueError`, one line, for any other."""
    device: torch.device | None = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in DEVICE_TYPES:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, found {str(name)!r}; use 'cpu', which runs every scheme")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            why = "torch finds no GPU and driver" if torch.version.cuda or torch.version.hip else "this torch is built for CPU"
            raise ValueError(f"device: expected a CUDA device for {str(name)!r}, found none: {why}; use device 'cpu'")
        if device.index is not None and device.index >= count:
            raise ValueError(f"device: expected cuda:0 to cuda:{count - 1}, found {str(name)!r}")
    return device


def check_schemes(config: CanonicalConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `LoadError` when `device` cannot hold and convert what the checkpoint's schemes are made of.

    There is no table of schemes and devices: torch converts every format in software on every GPU that it supports, and
    which it supports changes with its build.  So each dtype is tried once, with one element, and the error names the first
    module that needs it.  `dtype`: that of the arithmetic.
    """
    needed = {dtype: "architecture: arithmetic"}
    seen = set()
    for name, spec in config.modules.items():
        if (spec.scheme, spec.activations) in seen:
            continue
        seen.add((spec.scheme, spec.activations))
        for tensor in module_tensors(spec).values():
            needed.setdefault(TORCH_DTYPES[tensor.dtype], f"quantization.modules.{name}: scheme {spec.scheme}")
        if spec.activations not in (None, "mxfp4"):  # all others round to E4M3
            needed.setdefault(torch.float8_e4m3fn, f"quantization.modules.{name}: activations {spec.activations}")
    if config.kv_cache:
        needed.setdefault(torch.float8_e4m3fn, f"quantization.kv_cache.{next(iter(config.kv_cache))}: keys and values")
    for stored, user in needed.items():
        try:
            torch.ones(1, device=device).to(stored).float().item()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise LoadError(
                f"{CONFIG_FILE}: {user}: expected a device that converts {str(stored).removeprefix('torch.')}, found {device}: "
                f"{_first_line(error)}; use a torch that is built for this GPU, or device 'cpu', which runs every scheme"
            ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_memory(device: torch.device, nbytes: int, purpose: str, remedy: str) -> None:
    """Raise `MemoryError`, one line with the sizes, when `device` has less than `nbytes` left.

    On CUDA what torch holds in reserve counts as free.  On the CPU: what the kernel can give without swapping, within the
    limits of the control groups of this process; mapped files are not counted as used, as the kernel can drop them.
    """
    if nbytes < SMALL:
        return
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        memory = host_memory()
        if memory is None:
            return
        free, total = memory
    if nbytes > free:
        raise MemoryError(
            f"{device}: expected {gigabytes(nbytes)} of free memory for {purpose}, "
            f"found {gigabytes(free)} of {gigabytes(total)}; {remedy}"
        )


def gigabytes(nbytes: int) -> str:
    """For people, in 10**9 bytes."""
    return f"{nbytes / 1e9:.2f} GB"


def host_memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes that can still be allocated, and bytes in all: of the machine or of the tightest control group, if less.

    `root`: where `proc` and `sys` are.  None where there is no `/proc/meminfo`.
    """
    try:
        lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        fields = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
        free, total = fields["MemAvailable:"], fields["MemTotal:"]
    except (OSError, ValueError, KeyError):
        return None
    for limit, used in _group_limits(root):
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    return free, total


# Control groups, version 2 and 1: controller in /proc/self/cgroup, mount, files of the limit and of the use, and the fields
# of memory.stat that count pages of files, which the kernel drops when memory is short.
_GROUPS = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit, and use without pages of files, of each control group with a limit that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller, mount, limit_file, used_file, dropped in _GROUPS:
            if controller not in controllers.split(","):
                continue
            at = PurePosixPath(path.lstrip("/"))
            for group in _up(root / mount, at):
                try:
                    limit = int((group / limit_file).read_text())  # "max" where there is none
                    used = int((group / used_file).read_text())
                    stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                except (OSError, ValueError):
                    continue
                yield limit, used - sum(int(stat.get(name, 0)) for name in dropped)


def _up(mount: Path, group: PurePosixPath) -> Iterable[Path]:
    """A control group and all above it; those that are not mounted here are looked for in vain."""
    return [mount / at for at in (group, *group.parents)]

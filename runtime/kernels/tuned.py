"""Launches that were measured to be faster cut another way than by default: `tuned.json`, which `bench.gpu --tune` writes.

    {"sm_90, 132 SMs": {"fp8_linear fp8_block fp8_group": {"34816x5120": {"8": {"split": 2, "stages": 5}}}}}

GPU -> kernel with scheme and way of the input -> N x K -> width of the tokens -> fields of `tiles.Tiles` that differ from
the default.  What has no entry, another GPU for one, is cut by default: `tiles.choose_tiles`.  Nothing is measured while
models run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("tuned.json")
FIELDS = ("split", "stages", "warps")  # that an entry may have


@functools.cache
def table() -> Mapping[str, Any]:
    """The content of the file, read once."""
    content: Mapping[str, Any] = json.loads(FILE.read_text())
    return content


def gpu(device: torch.device) -> str:
    """How the file calls a GPU; "cpu" for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs"


def name(kernel: str, scheme: str, activations: str | None) -> str:
    """How the file calls a kernel for a scheme and a way of the input."""
    return f"{kernel} {scheme} {activations or 'full'}"


def lookup(device: torch.device, kernel: str, N: int, K: int, tokens: int) -> Mapping[str, int]:
    """What differs from the default, of `FIELDS`; empty where nothing is known."""
    found: Mapping[str, int] = table().get(gpu(device), {}).get(kernel, {}).get(f"{N}x{K}", {}).get(str(tokens), {})
    return found

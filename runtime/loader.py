"""Builds a model whose parameters have no memory yet, and gives it the stored tensors, strictly and under their own names."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.ahead import Use, compiling
from runtime.architecture import read_architecture
from runtime.builder import LayerBuilder
from runtime.errors import LoadError
from runtime.format import CONFIG_FILE, DENSE_DTYPES, INDEX_FILE, MAX_JSON_BYTES, CanonicalConfig, FormatError, module_tensors
from runtime.layers import TORCH_DTYPES
from runtime.machine import check_memory, check_schemes, find_device, gigabytes, host_memory
from runtime.models import FAMILIES
from runtime.models.base import CausalLM
from runtime.shards import Shard, StoredTensor, pieces, stream_to_cuda

PROBLEMS_SHOWN = 10
ALIGNMENT = 512  # bytes, as of allocations of their own


def load_model(
    out_dir: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    activations: str = "quantized",
    drafts: bool = False,
    uses: Sequence[Use] = (),
) -> CausalLM:
    """Load a canonical checkpoint.

    `out_dir`: the directory that `qconvert` wrote.  `device`: "cpu" or "cuda".  `dtype`: the dtype of the arithmetic,
    by default bfloat16 on CUDA and float32 on the CPU; stored tensors keep theirs.  `activations`: "quantized" also
    quantises activations and the KV cache as the checkpoint says, "full" does not.  `drafts`: also load the checkpoint's
    draft heads, for speculative decoding.  `uses`: what will be asked of the model first; on CUDA, kernels for it are compiled
    meanwhile.

    Returns a model in evaluation mode: int64 `[B, T]` to float32 logits `[B, T, V]`.  Raises, one line each and before any
    tensor is read: `LoadError` or `FormatError` for a checkpoint that does not fit, or whose schemes the device cannot
    compute with; `MemoryError` for weights that the device has no room for; `ValueError` for another argument.
    Memory: on CUDA the model, and 128 MiB of pinned host memory.  On the CPU none: weights stay mapped to the files, are
    read when first used, and may be larger than the machine's memory (`memory_note`).
    """
    if activations not in ("quantized", "full"):
        raise ValueError(f"activations: expected 'quantized' or 'full', found {activations!r}")
    target = find_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
    directory = Path(out_dir)
    config = read_config(directory)
    if config.family not in FAMILIES:
        raise FormatError(
            f"{CONFIG_FILE}: family: expected one of {', '.join(FAMILIES)}, found {config.family!r}; "
            "use a runtime that has this family"
        )
    network = FAMILIES[config.family]
    architecture = read_architecture(network.architecture_type, config.architecture)
    check_schemes(config, target, dtype)

    def network_on(device: torch.device) -> CausalLM:
        build = LayerBuilder(config, device, dtype, activations == "quantized")
        found = network(architecture, build, drafts)
        build.check_all_used()
        return found

    with _uncollected(), ExitStack() as stack:
        model = network_on(target)
        slots = dict(_slots(model))
        files = {n: file for n, file in _tensor_files(directory).items() if n in slots or not config.is_carried(n)}
        shards = _open_shards(directory, files, slots, stack)
        _check(config, files, shards, slots)
        if target.type == "cpu":
            for name, slot in slots.items():
                slot.put(shards[files[name]].mapped(name))
        else:

            def twin() -> CausalLM:
                found = network_on(torch.device("meta"))
                for name, slot in _slots(found):
                    slot.put(_without_memory(shards[files[name]].tensors[name]))
                return found.eval()

            with compiling(twin, uses, target):
                _stream_to_device(files, shards, slots, target)
        return model.eval()


def memory_note(model: CausalLM) -> str | None:
    """One line for the user when a model on the CPU is larger than the machine's memory, or its control group's; else None.

    Such a model works, as slowly as its files are read: the weights that a token needs have left memory since the last one.
    """
    memory = host_memory() if model.device.type == "cpu" else None
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    if memory is None or nbytes <= memory[1]:
        return None
    return (
        f"the weights are {gigabytes(nbytes)} and there are {gigabytes(memory[1])} of memory: "
        "tokens read them from disk again and again"
    )


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: a load makes none, and each walk over all of torch's objects takes 0.1 s."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one parameter: the dictionary of its module and its name there, and its shape."""

    parameters: dict[str, nn.Parameter | None]
    name: str
    shape: tuple[int, ...]

    def put(self, tensor: Tensor) -> None:
        """Make `tensor` the parameter.  Its dtype is the stored one, which for a dense tensor the model does not know."""
        self.parameters[self.name] = nn.Parameter(tensor, requires_grad=False)


def _slots(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Slot]]:
    """Every parameter of a model under the name that it has in `state_dict`."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, Slot(module._parameters, name, tuple(parameter.shape))
    for name, child in module._modules.items():
        if child is not None:
            yield from _slots(child, f"{prefix}{name}.")


def read_config(directory: Path) -> CanonicalConfig:
    """Read `config.json`.  Raises `LoadError` when it is absent or no JSON, `FormatError` when it breaks the contract."""
    return CanonicalConfig.from_json(_read_json(directory, CONFIG_FILE))


def _regular_file(directory: Path, name: str) -> Path:
    """The path of a file of the checkpoint.  A pipe or device in its place is refused, because reading it may never end."""
    path = directory / name
    if os.path.exists(path) and not os.path.isfile(path):
        raise LoadError(f"{path}: expected a regular file, found something else (folder, pipe or device); convert again")
    return path


def _read_json(directory: Path, name: str) -> Any:
    path = _regular_file(directory, name)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise LoadError(f"{path}: expected at most {MAX_JSON_BYTES} bytes, found {size}; it is damaged: convert again")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(
            f"{directory / name}: expected a file of a canonical checkpoint, found {error.strerror}; "
            "run `qconvert IN OUT` and pass OUT"
        ) from None
    except (ValueError, RecursionError) as error:
        raise LoadError(
            f"{directory / name}: expected JSON in UTF-8, found {error}; the file is damaged: convert again"
        ) from None


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name to file name, from the index."""
    index = _read_json(directory, INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise LoadError(f"{INDEX_FILE}: expected an object weight_map of names to files, found none; convert again")
    for file in set(weight_map.values()):
        if file != Path(file).name or not file.endswith(".safetensors"):
            name = next(name for name in weight_map if weight_map[name] == file)
            raise LoadError(
                f"{INDEX_FILE}: {name}: expected the name of a safetensors file in the same directory, "
                f"found {file!r}; convert again"
            )
    return weight_map


def _open_shards(directory: Path, files: dict[str, str], expected: Collection[str], stack: ExitStack) -> dict[str, Shard]:
    """Open every file that holds an expected tensor, in order; all are closed with `stack`."""
    shards = {}
    for file in sorted({file for name, file in files.items() if name in expected}):
        _regular_file(directory, file)
        shards[file] = Shard(directory, file)
        stack.callback(shards[file].close)
    return shards


def _check(config: CanonicalConfig, files: dict[str, str], shards: dict[str, Shard], expected: dict[str, Slot]) -> None:
    """Compare names, dtypes and shapes on disk with the model's before a byte of data is read."""
    problems = []
    for name in sorted(expected.keys() - files.keys()):
        problems.append(
            f"{INDEX_FILE}: {name}: expected a tensor of shape {list(expected[name].shape)}, found none; "
            "the checkpoint is incomplete: convert again"
        )
    for name in sorted(files.keys() - expected.keys()):
        problems.append(
            f"{files[name]}: {name}: expected no tensor of this name in family {config.family!r}, found one; convert again"
        )
    dtypes = _stored_dtypes(config)
    for name in sorted(expected.keys() & files.keys(), key=lambda name: (files[name], name)):
        file, want, shape = files[name], dtypes.get(name, DENSE_DTYPES), expected[name].shape
        found = shards[file].tensors.get(name)
        if found is None:
            problems.append(
                f"{file}: {name}: expected the tensor that {INDEX_FILE} places here, found none; "
                "the file belongs to another checkpoint or is incomplete: convert again"
            )
        elif found.dtype not in want or found.shape != shape:
            problems.append(
                f"{file}: {name}: expected {' or '.join(want)} {list(shape)}, "
                f"found {found.dtype} {list(found.shape)}; convert again"
            )
    if problems:
        rest = len(problems) - PROBLEMS_SHOWN
        more = [f"{rest} more such problems"] if rest > 0 else []
        raise LoadError(" | ".join(problems[:PROBLEMS_SHOWN] + more))


def _stored_dtypes(config: CanonicalConfig) -> dict[str, tuple[str, ...]]:
    """The one dtype of each tensor that belongs to a number format; all others may be any of `DENSE_DTYPES`."""
    dtypes: dict[str, tuple[str, ...]] = {
        f"{module}.{role}": (tensor.dtype,)
        for module, spec in config.modules.items()
        for role, tensor in module_tensors(spec).items()
        if role != "pre_quant_scale"
    }
    dtypes.update({f"{module}.{role}": ("F32",) for module in config.kv_cache for role in ("k_scale", "v_scale")})
    return dtypes


def _stream_to_device(files: dict[str, str], shards: dict[str, Shard], slots: dict[str, Slot], device: torch.device) -> None:
    """Give every slot its tensor on a CUDA device.  Raises `MemoryError` before the first byte when they do not fit."""
    entries = {name: shards[files[name]].tensors[name] for name in slots}
    check_memory(
        device,
        sum(entry.nbytes for entry in entries.values()),
        "the weights",
        "end what else runs there, take a larger GPU, or load on the CPU, where weights stay in their files",
    )
    by_file: dict[str, list[tuple[str, Tensor]]] = {file: [] for file in shards}
    for name, entry in entries.items():
        by_file[files[name]].append((name, _without_memory(entry)))
    for targets in by_file.values():
        targets[:] = zip((name for name, _ in targets), in_one_piece([like for _, like in targets], device), strict=True)
        for name, tensor in targets:
            slots[name].put(tensor)
    stream_to_cuda((piece for file, targets in by_file.items() for piece in pieces(shards[file], targets)), device)


def _without_memory(entry: StoredTensor) -> Tensor:
    """A tensor of the dtype and shape of a stored one."""
    return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device="meta")


def in_one_piece(like: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of given dtypes and shapes in a single allocation, each aligned as if alone.

    Hundreds of allocations take as long as copying a gigabyte, and each is rounded up to 2 MiB.
    """
    starts = [0, *accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in like)]
    memory = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    return [memory[start : start + t.nbytes].view(t.dtype).view(t.shape) for start, t in zip(starts, like)]

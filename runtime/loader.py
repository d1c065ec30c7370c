"""Builds a model on the meta device and assigns the stored tensors to it, strictly and under their own names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.architecture import read_architecture
from runtime.builder import LayerBuilder
from runtime.errors import LoadError
from runtime.format import CONFIG_FILE, DENSE_DTYPES, INDEX_FILE, CanonicalConfig, FormatError, module_tensors
from runtime.models import FAMILIES
from runtime.models.base import CausalLM

PROBLEMS_SHOWN = 10


def load_model(
    out_dir: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    activations: str = "quantized",
    drafts: bool = False,
) -> CausalLM:
    """Load a canonical checkpoint.

    `out_dir`: the directory that `qconvert` wrote.  `device`: "cpu" or "cuda".  `dtype`: the dtype of the arithmetic,
    by default bfloat16 on CUDA and float32 on the CPU; stored tensors keep theirs.  `activations`: "quantized" also
    quantises activations and the KV cache as the checkpoint says, "full" does not.  `drafts`: also load the checkpoint's
    draft heads, for speculative decoding.

    Returns a model in evaluation mode: int64 `[B, T]` to float32 logits `[B, T, V]`.  Raises `LoadError` or
    `FormatError`, one line each, for a checkpoint that does not fit, and `ValueError` for another argument.
    Memory: the model and one tensor.  On the CPU weights stay mapped to the files and are read when first used.
    """
    if activations not in ("quantized", "full"):
        raise ValueError(f"activations: expected 'quantized' or 'full', found {activations!r}")
    target = torch.device(device)
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
    build = LayerBuilder(config, target, dtype, activations == "quantized")
    with torch.device("meta"):
        model = network(architecture, build, drafts)
    build.check_all_used()
    expected = model.state_dict()
    files = {name: file for name, file in _tensor_files(directory).items() if name in expected or not config.is_carried(name)}
    _check(directory, config, files, expected)
    model.load_state_dict(dict(_read(directory, files, target)), strict=True, assign=True)
    return model.requires_grad_(False).eval()


def read_config(directory: Path) -> CanonicalConfig:
    """Read `config.json`.  Raises `LoadError` when it is absent or no JSON, `FormatError` when it breaks the contract."""
    return CanonicalConfig.from_json(_read_json(directory, CONFIG_FILE))


def _read_json(directory: Path, name: str) -> Any:
    try:
        return json.loads((directory / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(
            f"{directory / name}: expected a file of a canonical checkpoint, found {error.strerror}; "
            "run `qconvert IN OUT` and pass OUT"
        ) from None
    except ValueError as error:
        raise LoadError(
            f"{directory / name}: expected JSON in UTF-8, found {error}; the file is damaged: convert again"
        ) from None


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name to file name, from the index."""
    index = _read_json(directory, INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise LoadError(f"{INDEX_FILE}: expected an object weight_map of names to files, found none; convert again")
    for name, file in weight_map.items():
        if file != Path(file).name or not file.endswith(".safetensors"):
            raise LoadError(
                f"{INDEX_FILE}: {name}: expected the name of a safetensors file in the same directory, "
                f"found {file!r}; convert again"
            )
    return weight_map


@contextmanager
def _open(directory: Path, file: str, device: torch.device) -> Iterator[Any]:
    """A safetensors file, its errors turned into `LoadError`."""
    try:
        with safe_open(directory / file, framework="pt", device=str(device)) as opened:
            yield opened
    except FileNotFoundError:
        raise LoadError(
            f"{file}: expected the file that {INDEX_FILE} names, found none; the checkpoint is incomplete: "
            "copy it again or convert again"
        ) from None
    except (SafetensorError, OSError) as error:
        raise LoadError(
            f"{file}: expected a complete safetensors file, found {error}; the file is damaged or cut short: "
            "copy it again or convert again"
        ) from None


def _check(directory: Path, config: CanonicalConfig, files: dict[str, str], expected: dict[str, Tensor]) -> None:
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
    by_file: dict[str, list[str]] = {}
    for name in expected.keys() & files.keys():
        by_file.setdefault(files[name], []).append(name)
    for file in sorted(by_file):
        with _open(directory, file, torch.device("cpu")) as opened:
            present = set(opened.keys())
            for name in sorted(by_file[file]):
                if name not in present:
                    problems.append(
                        f"{file}: {name}: expected the tensor that {INDEX_FILE} places here, found none; "
                        "the file belongs to another checkpoint or is incomplete: convert again"
                    )
                    continue
                view = opened.get_slice(name)
                want, shape = dtypes.get(name, DENSE_DTYPES), list(expected[name].shape)
                if view.get_dtype() not in want or view.get_shape() != shape:
                    problems.append(
                        f"{file}: {name}: expected {' or '.join(want)} {shape}, "
                        f"found {view.get_dtype()} {view.get_shape()}; convert again"
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


def _read(directory: Path, files: dict[str, str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `files`, file by file, on `device`; on the CPU a view of the mapped file."""
    for file in sorted(set(files.values())):
        with _open(directory, file, device) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if files.get(name) == file:
                    yield name, opened.get_tensor(name)

"""`qconvert export`: a canonical checkpoint back to Hugging Face names, dequantised and unfused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.format import CONFIG_FILE, DTYPE_BYTES, INDEX_FILE, REPORT_FILE, CanonicalConfig, ModuleSpec

from .apply import to_float32
from .canonical import Canonical, malformed, open_canonical
from .dequantize import dequantize_rows, to_bfloat16
from .errors import ConvertError, MachineError, Problem, UsageError
from .families.base import Linear, hub_name, text_config
from .json_files import write_json
from .layout import DEFAULT_SHARD_SIZE
from .safetensors_writer import header_bytes
from .staging import check_target, staged, sync_file

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
ROWS_BYTES = 64 << 20  # float32 bytes of a weight that are in memory at a time


@dataclass(frozen=True, slots=True)
class _Output:
    """One exported tensor: ranges of rows of a canonical module or tensor, under its hub name.

    The rows of a stack of experts are those of its first expert, then of its second, ...
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    module: str
    spans: tuple[tuple[int, int], ...]
    spec: ModuleSpec | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def width(self) -> int:
        """Elements of one row."""
        return self.numel // max(1, sum(stop - start for start, stop in self.spans))


class _Checkpoint:
    """A canonical checkpoint opened for reading by memory map."""

    def __init__(self, canonical: Canonical) -> None:
        self.config, self.family, self.placed = canonical.config, canonical.family, canonical.placed
        self.tensors = canonical.tensors
        self.maps: dict[str, NDArray[np.uint8]] = {
            file: np.memmap(canonical.directory / file, np.uint8, "r") for file in canonical.files
        }

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor."""
        info = self.tensors[name]
        return self.maps[info.file][info.start : info.end]

    def values(self, output: _Output, first: int, last: int) -> NDArray[np.float32]:
        """Rows [first, last) of the module that an exported tensor is part of, as float32."""
        if output.spec is None:
            info = self.tensors[output.module]
            raw = self.raw(output.module)
            row = output.width * DTYPE_BYTES[info.dtype]
            return to_float32(raw[first * row : last * row].tobytes(), info.dtype)
        roles = {}
        for role in ("weight", "weight_scale", "weight_scale_2"):
            info_ = self.tensors.get(f"{output.module}.{role}")
            if info_ is not None:
                raw = self.raw(info_.name)
                roles[role] = raw if info_.dtype == "F32" else raw.reshape(-1, info_.shape[-1])
        values = dequantize_rows(output.spec, roles, first, last)
        if output.spec.pre_quant_scale:
            name = f"{output.module}.pre_quant_scale"
            factors = to_float32(self.raw(name).tobytes(), self.tensors[name].dtype).reshape(-1, output.spec.shape[1])
            expert = np.arange(first, last) // (output.spec.shape[0] // len(factors))
            values = values * factors[expert]
        return values


def _outputs(checkpoint: _Checkpoint, dtype: str) -> Iterator[_Output]:
    """Every exported tensor, in the order of the model.  KV and input scales have no meaning in a dense checkpoint."""
    config, family = checkpoint.config, checkpoint.family
    wrapped = text_config(family, config.hf_config) is not config.hf_config
    roots = dict(family.hub_roots[0 if wrapped else 1])

    def dense(name: str, module: str, start: int, stop: int) -> _Output:
        info = checkpoint.tensors[module]
        # Under bfloat16, an unquantised tensor keeps its stored dtype: rounding it would lose what the source had.
        kept = dtype if dtype == "F32" else info.dtype
        tail = info.shape[2:] if module in stacks else info.shape[1:]
        return _Output(hub_name(name, roots, family.hub_runs), kept, (stop - start, *tail), module, ((start, stop),), None)

    placed_all = checkpoint.placed
    stacks = {f"{p.name}.weight" for p in placed_all if p.experts is not None}
    stacks |= {f"{name}.weight" for p in placed_all if p.experts is not None for name, _ in p.shards}

    def weight(name: str, module: str, start: int, rows: int) -> _Output:
        info = checkpoint.tensors.get(f"{module}.weight")
        if info is None:
            raise ConvertError(
                Problem(CONFIG_FILE, f"{module}.weight", "a tensor", "none", "the checkpoint is incomplete: convert again")
            )
        spec = config.modules.get(module)
        rows = rows or info.shape[0]
        if spec is None:
            return dense(name, f"{module}.weight", start, start + rows)
        hub, spans = hub_name(name, roots, family.hub_runs), ((start, start + rows),)
        return _Output(hub, dtype, (rows, spec.shape[1]), module, spans, spec.tall())

    for placed in placed_all:
        if not isinstance(placed.item, Linear):
            if placed.name in checkpoint.tensors:
                yield dense(placed.name, placed.name, 0, checkpoint.tensors[placed.name].shape[0])
            continue
        apart = config.unfused.get(placed.name, ())
        stacked = placed.item.export == "stacked" and not apart
        if placed.experts is not None and stacked:
            whole = weight(placed.name, placed.name, 0, 0)
            rows = placed.experts * sum(n or 0 for _, partitions in placed.shards for _, n in partitions)
            yield replace(whole, shape=(placed.experts, rows // placed.experts, placed.columns or 0), spans=((0, rows),))
            continue
        if placed.experts is not None and placed.item.export == "projection" and not apart:
            sizes = [sum(n or 0 for _, n in partitions) for _, partitions in placed.shards]
            for position, (shard, _) in enumerate(placed.shards):
                first, size = sum(sizes[:position]), sizes[position]
                spans = tuple((e * sum(sizes) + first, e * sum(sizes) + first + size) for e in range(placed.experts))
                name = f"{placed.parent.rpartition('.')[0]}.{shard.rpartition('.')[2]}.weight"
                shape = (placed.experts, size, placed.columns or 0)
                yield replace(weight(name, placed.name, 0, 0), shape=shape, spans=spans)
            continue
        last = placed.name.rpartition(".")[2]
        row = 0
        columns: dict[str, int] = dict.fromkeys((name for name, _ in placed.shards), 0)
        for expert in range(placed.experts) if placed.experts is not None else (None,):
            below = f"{placed.parent}." if placed.parent else ""
            hub_below = below if expert is None else f"{below}{expert}."
            inside = 0
            for shard, partitions in placed.shards:
                rows = sum(n or 0 for _, n in partitions)
                short = shard.rpartition(".")[2]
                if not apart:
                    module, start = placed.name, row
                elif short in apart:  # kept apart by projection
                    module, start = f"{below}{short}", columns[shard]
                elif f"{expert}.{last}" in apart:  # kept apart by expert
                    module, start = f"{hub_below}{last}", inside
                else:
                    module, start = f"{hub_below}{short}", 0
                row, inside, columns[shard] = row + rows, inside + rows, columns[shard] + rows
                yield weight(f"{hub_below}{short}.weight", module, start, rows)
                if f"{module}.bias" in checkpoint.tensors and placed.item.bias:
                    yield dense(f"{shard}.bias", f"{module}.bias", start, start + rows)


def _write(path: Path, outputs: list[_Output], checkpoint: _Checkpoint) -> None:
    with path.open("wb") as target:
        target.write(header_bytes((o.name, o.dtype, o.shape, o.nbytes) for o in outputs))
        for output in outputs:
            step = max(1, ROWS_BYTES // (4 * max(1, output.width)))
            pieces = ((at, min(at + step, stop)) for start, stop in output.spans for at in range(start, stop, step))
            for start, stop in pieces:
                values = np.ascontiguousarray(checkpoint.values(output, start, stop)).reshape(-1)
                if output.dtype == "F32":
                    target.write(values.tobytes())
                elif output.dtype == "BF16":
                    target.write(to_bfloat16(values).tobytes())
                else:
                    target.write(values.astype("<f2").tobytes())
        target.flush()
        os.fsync(target.fileno())


def _hf_config(config: CanonicalConfig, dtype: str) -> dict[str, Any]:
    """The source's config.json, with what the conversion settled: dtype, and whether the head is tied."""
    result: dict[str, Any] = json.loads(json.dumps(dict(config.hf_config)))
    result["dtype"] = dtype
    for nested in result.values():
        if isinstance(nested, dict) and "dtype" in nested:
            nested["dtype"] = dtype
    result.pop("torch_dtype", None)
    if config.architecture.get("head") in ("tied", "separate"):
        result["tie_word_embeddings"] = config.architecture["head"] == "tied"
    return result


def export_checkpoint(
    out_dir: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    to: str = "dense",
    dtype: str = "float32",
    shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
) -> dict[str, Any]:
    """Write a canonical checkpoint under the family's Hugging Face names, unfused, as `from_pretrained` loads it.

    to     "dense": weights dequantised in float32, in the exact order of `runtime.format`; `pre_quant_scale` folded in
    dtype  "float32", or "bfloat16": quantised weights rounded to nearest even, other tensors in their stored dtype

    Returns a summary.  Raises `ConvertError` for a directory that is no complete canonical checkpoint, `UsageError` for
    unknown options.  Peak memory: a few times 64 MB.  `dest` is complete or absent.
    """
    if to != "dense" or dtype not in DTYPES:
        raise UsageError(Problem("", "", "--to dense and --dtype float32 or bfloat16", f"{to}, {dtype}", "correct the options"))
    source, target = Path(out_dir), Path(dest)
    canonical = open_canonical(source)
    config = canonical.config
    check_target(target, source, force)
    with malformed(str(out_dir)):
        outputs = list(_outputs(_Checkpoint(canonical), DTYPES[dtype][0]))
    checkpoint = _Checkpoint(canonical)
    shards: list[list[_Output]] = [[]]
    for output in outputs:
        if shards[-1] and sum(o.nbytes for o in shards[-1]) + output.nbytes > shard_size:
            shards.append([])
        shards[-1].append(output)
    total = sum(o.nbytes for o in outputs)
    try:
        with staged(target) as work:
            work.check_space(total)
            staging = work.path
            index: dict[str, str] = {}
            for number, shard in enumerate(shards, 1):
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                shard.sort(key=lambda o: -{"F32": 4}.get(o.dtype, 2))
                _write(staging / name, shard, checkpoint)
                index.update((o.name, name) for o in shard)
            write_json(staging / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": index})
            write_json(staging / CONFIG_FILE, _hf_config(config, dtype))
            ours = {*canonical.files, CONFIG_FILE, INDEX_FILE, REPORT_FILE}
            for path in sorted(source.rglob("*")):
                relative = path.relative_to(source)
                if path.is_file() and not path.is_symlink() and relative.as_posix() not in ours:
                    (staging / relative).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, staging / relative)
                    sync_file(staging / relative)
    except OSError as error:
        raise MachineError(
            Problem(str(error.filename or target), "", "a working disk", error.strerror or repr(error), "correct it, run again")
        ) from error
    return {"tensors": len(outputs), "bytes": total, "files": len(shards), "to": to, "dtype": dtype}

"""`qconvert export`: a canonical checkpoint back to Hugging Face names, unfused, dequantised or as compressed-tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runtime.format import CONFIG_FILE, DTYPE_BYTES, INDEX_FILE, REPORT_FILE, CanonicalConfig

from .canonical import Canonical, malformed, open_canonical
from .compressed import FP8_FORMS, CompressedTensors
from .dense import dense_outputs
from .errors import MachineError, Problem, UsageError
from .hub import Output, Reader
from .json_files import write_json
from .layout import DEFAULT_SHARD_SIZE
from .safetensors_writer import header_bytes
from .staging import check_target, staged, sync_file

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
FORMS = ("dense", "compressed-tensors")


def _write(path: Path, outputs: Sequence[Output]) -> None:
    with path.open("wb") as target:
        target.write(header_bytes((o.name, o.dtype, o.shape, o.nbytes) for o in outputs))
        for output in outputs:
            for piece in output.pieces():
                target.write(piece)
        target.flush()
        os.fsync(target.fileno())


def _shards(outputs: Iterable[Output], shard_size: int) -> list[list[Output]]:
    """Files of up to `shard_size` bytes, in the order of the model; within a file wider elements first, for alignment."""
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.nbytes
    for shard in shards:
        shard.sort(key=lambda o: -DTYPE_BYTES[o.dtype])
    return shards


def _hf_config(config: CanonicalConfig, dtype: str | None) -> dict[str, Any]:
    """The source's config.json, with what the conversion settled: whether the head is tied, and `dtype` unless None."""
    result: dict[str, Any] = json.loads(json.dumps(dict(config.hf_config)))
    if dtype is not None:
        result["dtype"] = dtype
        for nested in result.values():
            if isinstance(nested, dict) and "dtype" in nested:
                nested["dtype"] = dtype
        result.pop("torch_dtype", None)
    if config.architecture.get("head") in ("tied", "separate"):
        result["tie_word_embeddings"] = config.architecture["head"] == "tied"
    return result


def _copy_side_files(canonical: Canonical, staging: Path) -> None:
    """Tokenizer, templates, adapters and all else that is no tensor of the model."""
    source, ours = canonical.folder, {*canonical.files, CONFIG_FILE, INDEX_FILE, REPORT_FILE}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and not path.is_symlink() and relative.as_posix() not in ours:
            (staging / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / relative)
            sync_file(staging / relative)


def export_checkpoint(
    out_dir: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    to: str = "dense",
    dtype: str = "float32",
    fp8: str = "auto",
    requantize: bool = False,
    shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
) -> dict[str, Any]:
    """Write a canonical checkpoint under the family's Hugging Face names, unfused, as `from_pretrained` loads it.

    to     "dense": weights dequantised in float32, in the exact order of `runtime.format`; `pre_quant_scale` folded in.
           "compressed-tensors": the stored codes and scales, as transformers, vLLM and SGLang read them
    dtype  of a dense export: "float32", or "bfloat16": quantised weights rounded to nearest even, other tensors in their
           stored dtype
    fp8    how compressed-tensors has FP8 with one scale per tensor: "tensor" as it is, "channel" the scale of each row, "auto"
           per channel where scales differ among projections that engines fuse
    requantize  whether what compressed-tensors has no exact form for may change; the summary then says by how much

    Returns a summary.  Raises `ConvertError` for a directory that is no complete canonical checkpoint or has no exact form,
    `UsageError` for unknown options.  Peak memory: a few times 64 MB.  `dest` is complete or absent.
    """
    if to not in FORMS or dtype not in DTYPES or fp8 not in FP8_FORMS:
        known = f"--to {' or '.join(FORMS)}, --dtype {' or '.join(DTYPES)}, --fp8 {' or '.join(FP8_FORMS)}"
        raise UsageError(Problem("", "", known, f"{to}, {dtype}, {fp8}", "correct the options"))
    source, target = Path(out_dir), Path(dest)
    canonical = open_canonical(source)
    config = canonical.config
    check_target(target, source, force)
    compressed: CompressedTensors | None = None
    with malformed(str(out_dir)):
        reader = Reader(canonical)
        if to == "dense":
            outputs = list(dense_outputs(canonical, reader, DTYPES[dtype]))
            hf_config = _hf_config(config, dtype)
        else:
            compressed = CompressedTensors(canonical, reader, fp8=fp8, requantize=requantize)
            outputs = list(compressed.outputs())
            hf_config = _hf_config(config, None)
            quantisation = compressed.quantization_config()
            if quantisation is not None:
                hf_config["quantization_config"] = quantisation
    shards = _shards(outputs, shard_size)
    total = sum(o.nbytes for o in outputs)
    try:
        with staged(target) as work:
            work.check_space(total)
            staging = work.path
            index: dict[str, str] = {}
            for number, shard in enumerate(shards, 1):
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                _write(staging / name, shard)
                index.update((o.name, name) for o in shard)
            write_json(staging / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": index})
            write_json(staging / CONFIG_FILE, hf_config)
            _copy_side_files(canonical, staging)
    except OSError as error:
        raise MachineError(
            Problem(str(error.filename or target), "", "a working disk", error.strerror or repr(error), "correct it, run again")
        ) from error
    summary = {"tensors": len(outputs), "bytes": total, "files": len(shards), "to": to}
    return summary | (compressed.report() if compressed is not None else {"dtype": dtype})

"""`qconvert diff`: what differs between two checkpoints, each a source or canonical: structure, configs, values, other files.

Both are brought under canonical names first, by planning and without writing anything, so that two dialects of one model are
equal.  Sources that are refused are compared as they are stored.  Bytes are compared in pieces; only what differs is decoded.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from runtime.format import CONFIG_FILE, DENSE_DTYPES, DTYPE_BYTES, FORMAT, CanonicalConfig, ModuleSpec, TensorSpec

from .apply import e8m0_to_float32, to_float32
from .canonical import open_canonical
from .dequantize import E2M1, E4M3, dequantize_rows
from .digests import file_digest
from .errors import ConvertError
from .planner import plan_source
from .remote import RemotePath
from .source import ADAPTER_WEIGHTS, REPLACED, AnyPath, Location, Source, located, read_json, read_source, regular_file
from .view import Range, View, view_canonical, view_plan, view_stored

Array = NDArray[Any]

PIECE = 4 << 20  # bytes of either side that are compared at once
OF_WEIGHTS = frozenset({"weight", "weight_scale", "weight_scale_2", "pre_quant_scale"})  # roles that weights are made of
PACKED = frozenset({"nvfp4", "mxfp4"})  # schemes with two codes in a byte
PROVENANCE = frozenset({"transformers_version", "_name_or_path"})  # config fields that change no number
# Side files that change what comes out of a model; others are listed only.
MEANINGFUL = ("*token*", "*vocab*", "*merges*", "*chat_template*", "generation_config.json", "*processor*.json")


@dataclass(slots=True)
class Side:
    """One of the two checkpoints.  `names`: names as stored; `facts`: what its config says, by dotted field."""

    view: View
    kind: str
    names: set[str]
    facts: dict[str, Any]
    side_files: Mapping[str, AnyPath]


@dataclass(slots=True)
class Difference:
    """What differs.  `equal`: the same tensors and meaning; the fields are those of `--json` (docs/inspect.md)."""

    equal: bool = True
    compared: str = "canonical"
    stored_alike: bool = True
    tensors: int = 0
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    changed: list[dict[str, Any]] = field(default_factory=list)
    config: list[dict[str, Any]] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    values_compared: bool = True

    def to_json(self) -> dict[str, Any]:
        """The difference as JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


# -- the sides ------------------------------------------------------------------------------------------------------------


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested objects by dotted path; lists are leaves."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, str(value) if isinstance(value, float) and not math.isfinite(value) else value  # as JSON has it


def _facts(config: CanonicalConfig) -> dict[str, Any]:
    """What a canonical config says, by dotted field.  Modules come whole, as they are known by their names."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_json()))
    quantization = plain.pop("quantization")
    facts = dict(_flat(plain))
    facts |= {f"quantization.modules.{name}": entry for name, entry in quantization["modules"].items()}
    facts |= {f"quantization.kv_cache.{name}": entry for name, entry in quantization["kv_cache"].items()}
    return facts


def _is_canonical(directory: AnyPath) -> bool:
    try:
        return read_json(regular_file(directory, CONFIG_FILE), CONFIG_FILE).get("format") == FORMAT
    except (OSError, ConvertError):
        return False  # reading it as a source says what is wrong


def _canonical_side(place: AnyPath) -> Side:
    canonical = open_canonical(place)
    directory = canonical.folder
    files: dict[str, AnyPath] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        own = name in REPLACED or path.suffix == ".safetensors" or name.startswith(("adapter/", "."))
        if not own and path.is_file() and not path.is_symlink():
            files[name] = path
    return Side(view_canonical(canonical), "canonical", set(canonical.tensors), _facts(canonical.config), files)


def _planned_side(source: Source) -> Side:
    plan = plan_source(source)
    return Side(view_plan(plan), "source", set(source.tensors), _facts(plan.config), source.side_files)


def _stored_side(source: Source) -> Side:
    facts = dict(_flat(source.config)) | dict(_flat({"hf_quant_config.json": source.quant_file} if source.quant_file else {}))
    view = view_stored(source.files, source.tensors)
    return Side(view, "source", set(source.tensors), facts, source.side_files)


def _sides(*given: Location) -> tuple[Side, Side, str]:
    """Both sides, and how they are compared: under canonical names, or as they are stored when one is refused."""
    places = [located(place) for place in given]
    sources = [
        None if _is_canonical(place) else read_source(place if isinstance(place, RemotePath) else named)
        for place, named in zip(places, given, strict=True)
    ]
    try:
        sides = [
            _canonical_side(place) if source is None else _planned_side(source)
            for place, source in zip(places, sources, strict=True)
        ]
    except ConvertError:
        stored = [_stored_side(source) for source in sources if source is not None]
        if len(stored) < 2:
            raise  # a canonical checkpoint has other names than a source that is refused
        return stored[0], stored[1], "stored"
    return sides[0], sides[1], "canonical"


# -- values ---------------------------------------------------------------------------------------------------------------


def _codes_and_values(data: memoryview, dtype: str, packed: bool) -> tuple[Array, Array]:
    """Elements as bit patterns, and as numbers."""
    if packed:
        codes = np.frombuffer(data, np.uint8)
        nibbles = np.stack([codes & 0xF, codes >> 4], axis=-1).reshape(-1)
        return nibbles, E2M1[nibbles]
    codes = np.frombuffer(data, f"<u{DTYPE_BYTES[dtype]}")
    if dtype in DENSE_DTYPES:
        return codes, to_float32(data, dtype)
    if dtype == "F8_E4M3":
        return codes, E4M3[codes]
    if dtype == "F8_E5M2":
        return codes, (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E8M0":
        return codes, e8m0_to_float32(data)
    kind = {"F": "f", "I": "i"}.get(dtype[0], "u")
    return codes, codes.view(f"<{kind}{DTYPE_BYTES[dtype]}").astype(np.float64)


def _same_file(a: AnyPath, b: AnyPath) -> bool:
    """Whether two paths are known to be one file, or to hold the same, without reading them."""
    if isinstance(a, RemotePath) and isinstance(b, RemotePath):
        return a.sha256 is not None and a.sha256 == b.sha256
    return isinstance(a, Path) and isinstance(b, Path) and os.path.samefile(a, b)


def _same_bytes(a: View, b: View, name: str, known: dict[tuple[str, str], bool]) -> bool:
    """Whether both tensors are the very same bytes of the very same files, so that nothing has to be read."""
    ours, theirs = a.segments(name), b.segments(name)
    if len(ours) != len(theirs):
        return False
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(one, Range) or not isinstance(other, Range) or one[1:] != other[1:]:
            return False
        pair = (one.file, other.file)
        if pair not in known:
            known[pair] = _same_file(a.files[one.file].path, b.files[other.file].path)
        if not known[pair]:
            return False
    return True


def _compare(a: View, b: View, name: str, buffers: tuple[bytearray, bytearray]) -> dict[str, Any] | None:
    """How the values of one tensor differ, or None when every byte is the same."""
    spec = a.tensors[name]
    module, _, role = name.rpartition(".")
    quantised = a.config.modules.get(module)
    packed = role == "weight" and quantised is not None and quantised.scheme in PACKED
    elements = math.prod(spec.shape) * (2 if packed else 1)
    differ, largest, total = 0, 0.0, spec.nbytes
    for start in range(0, total, PIECE):
        size = min(PIECE, total - start)
        ours, theirs = (memoryview(buffer)[:size] for buffer in buffers)
        a.read_into(ours, name, start)
        b.read_into(theirs, name, start)
        same = buffers[0] == buffers[1] if size == PIECE else bytes(ours) == bytes(theirs)
        if same:
            continue
        (codes, values), (others, other_values) = (_codes_and_values(d, spec.dtype, packed) for d in (ours, theirs))
        unequal = codes != others
        differ += int(unequal.sum())
        with np.errstate(all="ignore"):
            distance = np.abs(values[unequal].astype(np.float64) - other_values[unequal])
        finite = distance[np.isfinite(distance)]
        largest = max(largest, float(finite.max()) if finite.size else math.inf)
    if not differ:
        return None
    measure = largest if math.isfinite(largest) else None
    return {"tensor": name, "dtype": spec.dtype, "elements": elements, "differ": differ, "max_abs": measure}


class _Rows:
    """A stored tensor whose rows are read when they are sliced: what `dequantize_rows` asks of an array of codes."""

    def __init__(self, view: View, name: str, width: int) -> None:
        self._view, self._name, self._width = view, name, width

    def __getitem__(self, rows: slice) -> NDArray[np.uint8]:
        data = self._view.read(self._name, rows.start * self._width, rows.stop * self._width)
        return np.frombuffer(data, np.uint8).reshape(-1, self._width)


def _weight_rows(view: View, module: str, shape: tuple[int, int, int]) -> Any:
    """A function of (start, stop) that gives rows of a module's dequantised weights, F32 `[rows, K]`; None when it has none.

    `shape`: experts, N and K; the rows of experts follow each other.
    """
    experts, n, k = shape
    spec = view.config.modules.get(module)
    name = f"{module}.weight"
    if spec is None:
        stored = view.tensors.get(name)
        wanted = (experts, n, k) if stored is not None and len(stored.shape) == 3 else (n, k)
        if stored is None or stored.dtype not in DENSE_DTYPES or stored.shape != wanted:
            return None
        dtype, width = stored.dtype, k * DTYPE_BYTES[stored.dtype]

        def dense(start: int, stop: int) -> Array:
            return to_float32(view.read(name, start * width, stop * width), dtype).reshape(-1, k)

        return dense
    if (spec.experts or 1, *spec.shape) != shape:
        return None
    tall = spec.tall()
    tensors: dict[str, Any] = {}
    for role in ("weight", "weight_scale", "weight_scale_2"):
        stored = view.tensors.get(f"{module}.{role}")
        if stored is not None and stored.dtype == "F32":
            tensors[role] = np.frombuffer(view.read(f"{module}.{role}"), np.uint8)
        elif stored is not None:
            tensors[role] = _Rows(view, f"{module}.{role}", stored.shape[-1])
    before = None
    if spec.pre_quant_scale:
        stored = view.tensors[f"{module}.pre_quant_scale"]
        before = to_float32(view.read(f"{module}.pre_quant_scale"), stored.dtype).reshape(-1, k)

    def quantised(start: int, stop: int) -> Array:
        values = dequantize_rows(tall, cast(Mapping[str, NDArray[np.uint8]], tensors), start, stop)
        return values if before is None else values * before[np.arange(start, stop) // n]

    return quantised


def _shape(view: View, module: str) -> tuple[int, int, int] | None:
    spec: ModuleSpec | None = view.config.modules.get(module)
    return (spec.experts or 1, *spec.shape) if spec is not None else None


def _label(view: View, module: str) -> str:
    spec = view.config.modules.get(module)
    return spec.scheme if spec is not None else view.tensors[f"{module}.weight"].dtype


def _compare_weights(a: View, b: View, module: str) -> dict[str, Any] | None:
    """How the dequantised weights of a module differ, whatever their schemes; None where they cannot be compared."""
    shape = _shape(a, module) or _shape(b, module)
    if shape is None:
        return None
    ours, theirs = _weight_rows(a, module, shape), _weight_rows(b, module, shape)
    if ours is None or theirs is None:
        return None
    experts, n, k = shape
    at_once = max(1, PIECE // (4 * k))
    differ, largest, error, size = 0, 0.0, 0.0, 0.0
    for start in range(0, experts * n, at_once):
        stop = min(experts * n, start + at_once)
        one, other = ours(start, stop).astype(np.float64), theirs(start, stop).astype(np.float64)
        with np.errstate(all="ignore"):
            distance = np.abs(one - other)
            differ += int((distance != 0).sum())
            largest = max(largest, float(np.nanmax(distance)))
            error, size = error + float(np.nansum(distance**2)), size + float(np.nansum(one**2))
    relative = math.sqrt(error / size) if size > 0 and math.isfinite(error) else None
    return {
        "module": module, "a": _label(a, module), "b": _label(b, module), "elements": experts * n * k, "differ": differ,
        "max_abs": largest if math.isfinite(largest) else None, "relative": relative,
    }  # fmt: skip


# -- everything -----------------------------------------------------------------------------------------------------------


def _plain(spec: TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype, "shape": list(spec.shape)}


def _compare_config(a: Side, b: Side) -> Iterator[dict[str, Any]]:
    missing = object()
    for name in dict.fromkeys((*a.facts, *b.facts)):
        ours, theirs = a.facts.get(name, missing), b.facts.get(name, missing)
        if ours is missing or theirs is missing or json.dumps(ours, sort_keys=True) != json.dumps(theirs, sort_keys=True):
            yield {
                "field": name, "a": None if ours is missing else ours, "b": None if theirs is missing else theirs,
                "matters": name.rpartition(".")[2] not in PROVENANCE,
            }  # fmt: skip


def _compare_files(a: Side, b: Side) -> Iterator[dict[str, Any]]:
    for name in sorted({*a.side_files, *b.side_files}):
        ours, theirs = a.side_files.get(name), b.side_files.get(name)
        if ours is not None and theirs is not None:
            same_size = ours.stat().st_size == theirs.stat().st_size
            if _same_file(ours, theirs) or (same_size and file_digest(ours) == file_digest(theirs)):
                continue
        what = "differs" if ours is not None and theirs is not None else "only in A" if ours is not None else "only in B"
        matters = name != ADAPTER_WEIGHTS and any(fnmatch.fnmatchcase(name, pattern) for pattern in MEANINGFUL)
        yield {"file": name, "what": what, "matters": matters}


def diff_checkpoints(
    a: Location, b: Location, *, values: bool = True
) -> Difference:
    """What differs between two checkpoints, sources or canonical ones, in tensors and meaning.

    `values`: compare values as well, all bytes of both; without, headers, configs and side files.  Memory: two pieces of 4 MB
    and a few bytes for each tensor.  Raises `ConvertError` when one cannot be read, or is refused while the other is canonical;
    `UsageError` when there is no such directory.
    """
    first, second, compared = _sides(a, b)
    found = Difference(compared=compared, values_compared=values)
    with first.view as ours, second.view as theirs:
        found.only_in_a = [name for name in ours.tensors if name not in theirs.tensors]
        found.only_in_b = [name for name in theirs.tensors if name not in ours.tensors]
        common = [name for name in ours.tensors if name in theirs.tensors]
        changed = {name for name in common if ours.tensors[name] != theirs.tensors[name]}
        found.tensors = len(common)
        found.changed = [  # in the order of the model
            {"tensor": name, "a": _plain(ours.tensors[name]), "b": _plain(theirs.tensors[name])}
            for name in common if name in changed
        ]
        found.config = list(_compare_config(first, second))
        found.files = list(_compare_files(first, second))
        found.stored_alike = first.names == second.names
        if values:
            known: dict[tuple[str, str], bool] = {}
            buffers = (bytearray(PIECE), bytearray(PIECE))
            for name in common:
                if name not in changed and not _same_bytes(ours, theirs, name, known):
                    result = _compare(ours, theirs, name, buffers)
                    if result is not None:
                        found.values.append(result)
            touched = (*(r["tensor"] for r in found.values), *changed, *found.only_in_a, *found.only_in_b)
            modules = dict.fromkeys(m for m, _, role in (name.rpartition(".") for name in touched) if role in OF_WEIGHTS)
            weights = (_compare_weights(ours, theirs, module) for module in modules)
            found.weights = [result for result in weights if result is not None]
    found.equal = not (
        found.only_in_a or found.only_in_b or found.changed or found.values
        or any(entry["matters"] for entry in (*found.config, *found.files))
    )  # fmt: skip
    return found

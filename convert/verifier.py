"""The proof: an independent reading of IN and OUT that must agree bit for bit.

Shares the rewrite of names and the families' tables with the planner, because those are facts; it shares no recipe, no
encoding table and no transform.  It goes the other way round: it starts from every tensor that IN stores, works out from
OUT's own config where its elements must be, and compares them there.  At the end every element of OUT must have been
compared exactly once, and every tensor of IN used or listed as dropped.  Only `config.json` is compared with a fresh plan's.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.format import CONFIG_FILE, INDEX_FILE, REPORT_FILE, CanonicalConfig, ModuleSpec, ceil_div

from .adapters import DIRECTORY, Adapter, without_marks
from .canonical import Canonical, file_inside, malformed, open_canonical, read_report
from .digests import Digest, TensorDigest, file_digest, range_digests
from .errors import ConvertError, Problem
from .families.base import Parameter, Placed, joined_names
from .json_files import is_sealed, is_spelled
from .names import canonical_name
from .planner import plan_source
from .remote import ReadAhead, RemoteBytes, RemotePath
from .source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AnyPath, Location, Source, each, read_json, read_source

PIECE = 1 << 20  # bytes compared at a time
MAPPED = 32 << 20  # bytes compared before the pages of both sides are given back
CHANGED = "the file has changed: convert again"

# suffix on disk -> (canonical role, whether the stored number divides)
ROLES: Mapping[str, tuple[str, bool]] = {
    "weight": ("weight", False),
    "weight_packed": ("weight", False),
    "weight_scale": ("weight_scale", False),
    "weight_scale_inv": ("weight_scale", False),  # multiplies, whatever its name says
    "weight_scale_2": ("weight_scale_2", False),
    "weight_global_scale": ("weight_scale_2", True),
    "input_scale": ("input_scale", False),
    "activation_scale": ("input_scale", False),
    "input_global_scale": ("input_scale", True),
    "pre_quant_scale": ("pre_quant_scale", False),
    "bias": ("bias", False),
}
KV_ROLES = {"k_scale": ("k_scale",), "v_scale": ("v_scale",), "kv_scale": ("k_scale", "v_scale")}


@dataclass(frozen=True, slots=True)
class Verified:
    """What was compared, all of it equal."""

    tensors: int
    elements: int
    bytes: int
    side_files: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A stored tensor.  `input_major`: the two axes of `shape` are exchanged in `data`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview | RemoteBytes
    input_major: bool = False

    def raw(self) -> NDArray[np.uint8]:
        if not self.input_major:
            return _bytes(self.data)
        width = len(self.data) // (self.shape[0] * self.shape[1])
        cells = _bytes(self.data).view(f"V{width}").reshape(self.shape[::-1])
        return np.ascontiguousarray(cells.T).view(np.uint8).reshape(-1)

    def pieces(self) -> Iterator[NDArray[np.uint8]]:
        """All bytes in order, in pieces of `PIECE`."""
        if self.input_major:
            whole = self.raw()
            yield from (whole[start : start + PIECE] for start in range(0, whole.size, PIECE))
        else:
            yield from (_bytes(self.data[start : start + PIECE]) for start in range(0, len(self.data), PIECE))

    def rows(self, start: int, stop: int, axes: int) -> NDArray[np.uint8]:
        """Bytes of rows [start, stop) of the tensor with all but its last `axes - 1` axes taken as one."""
        count = 1
        for size in self.shape[: max(1, len(self.shape) - axes + 1)]:
            count *= size
        row = len(self.data) // max(1, count)
        return self.raw()[start * row : stop * row]

    def expert(self, index: int, transposed: bool) -> _Tensor:
        """One expert of a stack, output-major; a value for all experts as it is."""
        if self.shape in ((), (1,)):
            return self
        size = len(self.data) // self.shape[0]
        data = self.data[index * size : (index + 1) * size]
        shape = self.shape[1:]
        exchanged = transposed and len(shape) == 2
        return _Tensor(self.file, self.dtype, shape[::-1] if exchanged else shape, data, exchanged)

    def float64(self) -> NDArray[np.float64]:
        """Values, flattened.  Exact for every dtype that scales have."""
        raw = self.raw()
        if self.dtype == "BF16":
            bits = raw.view("<u2").astype(np.uint32) << np.uint32(16)
            return bits.view(np.float32).astype(np.float64)
        if self.dtype in ("F32", "F16"):
            return raw.view({"F32": "<f4", "F16": "<f2"}[self.dtype]).astype(np.float64)
        if self.dtype == "F8_E8M0":
            return np.asarray(np.exp2(raw.astype(np.float64) - 127))
        raise ConvertError(
            Problem(self.file, "", "a float scale", self.dtype, "the scale has an unexpected dtype: convert again")
        )


def _bytes(data: memoryview | RemoteBytes) -> NDArray[np.uint8]:
    """The bytes of a range: mapped ones as they are, remote ones fetched."""
    return np.frombuffer(data.fetched() if isinstance(data, RemoteBytes) else data, np.uint8)


def _content(path: AnyPath, reader: ReadAhead | None) -> memoryview | RemoteBytes:
    """The bytes of a file, which are read when they are looked at."""
    if isinstance(path, RemotePath):
        assert reader is not None
        return RemoteBytes(reader, path.relative, 0, path.stat().st_size)
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")


def _header(path: AnyPath) -> bytes:
    with path.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))


def _open(directory: AnyPath, files: list[str], reader: ReadAhead | None = None) -> dict[str, _Tensor]:
    """Map safetensors files: their names are ours or were validated; nothing is copied."""
    tensors: dict[str, _Tensor] = {}
    for name, raw in zip(files, each(directory, lambda name: _header(directory / name), files), strict=True):
        view, length = _content(directory / name, reader), len(raw)
        try:
            header = json.loads(raw)
            for tensor, entry in header.items():
                if tensor != "__metadata__":
                    begin, end = entry["data_offsets"]
                    data = view[8 + length + begin : 8 + length + end]
                    if len(data) != end - begin or tensor in tensors:
                        raise ValueError("data outside the file, or a tensor given twice")
                    tensors[tensor] = _Tensor(name, entry["dtype"], tuple(entry["shape"]), data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConvertError(
                Problem(name, "", "a readable safetensors file", str(error), "convert again")
            ) from None
    return tensors


@dataclass(slots=True)
class _Verifier:
    config: CanonicalConfig
    source: dict[str, _Tensor]
    names: dict[str, str]  # canonical name -> name in IN
    target: dict[str, _Tensor]
    compared: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    problems: list[Problem] = field(default_factory=list)
    # stored module -> (module in OUT, first row in it)
    owner: dict[str, tuple[str, int]] = field(default_factory=dict)
    rows_of: dict[str, int] = field(default_factory=dict)
    mappings: list[mmap.mmap] = field(default_factory=list)
    touched: int = 0  # bytes of the mappings that were read since they were last given back

    def __post_init__(self) -> None:
        """Collect the mapped files."""
        mapped = [t.data for t in (*self.source.values(), *self.target.values()) if isinstance(t.data, memoryview)]
        owners = {id(data.obj): data.obj for data in mapped}
        self.mappings = [owner for owner in owners.values() if isinstance(owner, mmap.mmap)]

    def release(self, nbytes: int) -> None:
        """Give mapped pages back from time to time, so that memory does not grow with the checkpoint; files stay cached."""
        self.touched += nbytes
        if self.touched >= MAPPED and hasattr(mmap, "MADV_DONTNEED"):
            self.touched = 0
            for mapping in self.mappings:
                mapping.madvise(mmap.MADV_DONTNEED)

    def measure(self) -> None:
        """Rows of each stored projection."""
        for name, tensor in self.source.items():
            module, _, suffix = name.rpartition(".")
            if suffix in ("weight", "weight_packed") and tensor.shape:
                self.rows_of[module] = tensor.shape[0]

    def unstack(self, stacks: Sequence[Placed]) -> None:
        """Replace the stacked experts of a layer by one view for each expert, under the names they would have one by one."""
        stored: list[tuple[Placed, str, dict[str, _Tensor]]] = []
        input_major = False
        for placed in stacks:
            for module, rows in self.stacked_modules(placed):
                tensors = {s: self.source[f"{module}.{s}"] for s in ROLES if f"{module}.{s}" in self.source}
                weight = tensors.get("weight") or tensors.get("weight_packed")
                if weight is None or len(weight.shape) != 3:
                    continue
                columns = (placed.columns or 0) // (2 if weight.dtype == "U8" else 1)
                # One stack that only fits with its axes exchanged shows it for all stacks of the layer.
                input_major = input_major or weight.shape[1:] == (columns, rows) != (rows, columns)
                stored.append((placed, module, tensors))
        for placed, module, tensors in stored:
            parent, _, last = module.rpartition(".")
            for suffix, tensor in tensors.items():
                del self.source[f"{module}.{suffix}"]
                for expert in range(placed.experts or 0):
                    name = f"{parent}.{expert}.{last}.{suffix}"
                    self.source[name] = tensor.expert(expert, input_major)
                    self.names[name] = self.names[f"{module}.{suffix}"]

    def stacked_modules(self, placed: Placed) -> Iterator[tuple[str, int]]:
        """Modules that may hold the stack in IN, each with the rows of one expert."""
        yield placed.name, sum(rows or 0 for _, partitions in placed.shards for _, rows in partitions)
        for name, partitions in placed.shards:
            if name != placed.name:
                yield name, sum(rows or 0 for _, rows in partitions)

    def wrong(self, name: str, expected: str, found: str) -> None:
        """Note one difference."""
        file = self.target[name].file if name in self.target else ""
        self.problems.append(Problem(file, name, expected, found, "OUT is not a conversion of IN: convert again"))

    def place(self, placed: Placed) -> None:
        """Work out which rows of which module in OUT each stored projection fills.

        A stack of experts is read as one tall module: the rows of its second expert follow those of its first.
        """
        rows_of = self.rows_of
        apart = self.config.unfused.get(placed.name, ())
        row = 0
        column_rows: dict[str, int] = defaultdict(int)
        for expert in range(placed.experts) if placed.experts is not None else (None,):
            below = f"{placed.parent}." if placed.parent else ""
            below += f"{expert}." if expert is not None else ""
            shards = [below + name.rpartition(".")[2] for name, _ in placed.shards]
            whole = below + placed.name.rpartition(".")[2]
            if whole in rows_of and whole not in shards:
                shards = [whole]  # fused in the source already
            for shard in shards:
                if shard not in rows_of:
                    continue
                last = shard.rpartition(".")[2]
                if not apart:
                    self.owner[shard] = (placed.name, row)
                    row += rows_of[shard]
                elif last in apart:  # kept apart by projection: a module, or a stack of its own
                    module = f"{placed.parent}.{last}" if placed.parent else last
                    self.owner[shard] = (module, column_rows[last])
                    column_rows[last] += rows_of[shard]
                else:  # kept apart by expert
                    fused = f"{expert}.{placed.name.rpartition('.')[2]}" in apart
                    module = below + (placed.name.rpartition(".")[2] if fused else last)
                    self.owner[shard] = (module, column_rows[module] if fused else 0)
                    column_rows[module] += rows_of[shard]

    def same_bytes(self, name: str, ours: NDArray[np.uint8], theirs: _Tensor, element_bytes: int) -> None:
        """Compare a range of OUT with a whole tensor of IN."""
        size = len(theirs.data)
        if ours.size != size:
            self.wrong(name, f"{size} bytes as in {theirs.file}", f"{ours.size}")
            return
        start = 0
        for b in theirs.pieces():
            a = ours[start : start + b.size]
            if not np.array_equal(a, b):
                at = start + int(np.flatnonzero(a != b)[0])
                self.wrong(name, f"the bytes of {theirs.file}", f"a difference {at} bytes into that range")
                return
            self.release(2 * a.size)
            start += b.size
        self.compared[name] += size // element_bytes

    def same_values(self, name: str, start: int, stop: int, values: NDArray[np.float64]) -> None:
        """Compare elements [start, stop) of a float32 tensor of OUT with exact or correctly rounded values."""
        ours = self.target[name].raw().view("<f4")[start:stop]
        expected = values.astype(np.float32)
        if ours.size != expected.size or not np.array_equal(ours.view(np.uint32), expected.view(np.uint32)):
            self.wrong(name, f"{expected.tolist()[:4]} at {start}", f"{ours.tolist()[:4]}")
            return
        self.compared[name] += ours.size

    def tensor(self, canonical: str, stored: _Tensor, element_bytes: int) -> bool:
        """Compare one tensor of IN with what OUT made of it.  False when OUT has no place for it."""
        module, _, suffix = canonical.rpartition(".")
        if module not in self.owner or suffix not in ROLES:
            if canonical in self.target and self.target[canonical].dtype == stored.dtype:
                self.same_bytes(canonical, self.target[canonical].raw(), stored, element_bytes)
                return True
            return self.kv_scale(canonical, stored)
        (role, divides), (out_module, row) = ROLES[suffix], self.owner[module]
        name = f"{out_module}.{role}"
        entry = self.config.modules.get(out_module)
        spec = entry.tall() if entry else None
        if name not in self.target:
            return False
        ours = self.target[name]
        if spec is None or role in ("weight", "pre_quant_scale", "bias") or ours.dtype != "F32":
            if role == "pre_quant_scale":
                expert = row // entry.shape[0] if entry and entry.experts else 0
                place = ours.rows(expert, expert + 1, 2) if len(ours.shape) > 1 else ours.raw()
                self.same_bytes(name, place, stored, element_bytes)
            else:
                count = stored.shape[0] if stored.shape else 1
                self.same_bytes(name, ours.rows(row, row + count, 2), stored, element_bytes)
            return True
        values = stored.float64() if stored.dtype != "U8" else np.exp2(stored.raw().astype(np.float64) - 127)
        if divides:
            values = 1 / values  # float64 division, then one rounding: equals the correctly rounded float32 reciprocal
        rows = self.rows_of[module]
        if role == "weight_scale" and spec.scheme == "fp8_channel":
            self.same_values(name, row, row + rows, values)
        elif role == "weight_scale" and spec.scheme == "fp8_block":
            columns = ceil_div(spec.shape[1], 128)
            start, stop = _block_span(spec, row, rows)
            self.same_values(name, start * columns, stop * columns, values)
        else:
            start, stop = _partition_span(spec, row, rows)
            self.same_values(name, start, stop, np.broadcast_to(values, (stop - start,)))
        return True

    def kv_scale(self, canonical: str, stored: _Tensor) -> bool:
        """Compare a KV-cache scale, wherever below its attention module it was stored."""
        path, _, suffix = canonical.rpartition(".")
        attention = path if path in self.config.kv_cache else path.rpartition(".")[0]
        roles = KV_ROLES.get(suffix)
        if suffix == "output_scale":
            roles = ({"k_proj": "k_scale", "v_proj": "v_scale"}.get(path.rpartition(".")[2], ""),)
        if attention not in self.config.kv_cache or not roles:
            return False
        for role in roles:
            if f"{attention}.{role}" not in self.target:
                return False
            self.same_values(f"{attention}.{role}", 0, self.target[f"{attention}.{role}"].shape[0], stored.float64())
        return True


def _partition_span(spec: ModuleSpec, row: int, rows: int) -> tuple[int, int]:
    """Indices of the partitions that lie in rows [row, row + rows)."""
    inside = []
    first = 0
    for index, (_, count) in enumerate(spec.partitions):
        if row <= first and first + count <= row + rows:
            inside.append(index)
        first += count
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _block_span(spec: ModuleSpec, row: int, rows: int) -> tuple[int, int]:
    """Block rows of the partitions that lie in rows [row, row + rows)."""
    start, stop = _partition_span(spec, row, rows)
    counts = [ceil_div(n, 128) for _, n in spec.partitions]
    return sum(counts[:start]), sum(counts[:stop])


def verify_conversion(in_dir: Location, out_dir: str | os.PathLike[str]) -> Verified:
    """Prove that `out_dir` holds exactly what `in_dir` holds.

    `in_dir` may be a URL, which is then read over the network.  Reads both completely, compares every element, and returns the
    counts.  A divisor of IN must appear as the correctly rounded float32 reciprocal; everything else must be equal bit for bit.
    Raises `ConvertError` with the first differences.
    """
    canonical = open_canonical(Path(out_dir))
    source = read_source(in_dir)
    with malformed(str(out_dir)):
        if not isinstance(source.directory, RemotePath):
            return _verify(source, canonical, None)
        reader = ReadAhead(source.directory.remote, ())
        try:
            return _verify(source, canonical, reader)
        except BaseException:
            source.directory.remote.give_up()
            raise
        finally:
            reader.close()


def _verify(source: Source, out: Canonical, reader: ReadAhead | None) -> Verified:
    """The proof, once both sides are known to be readable.  `reader` reads a remote source."""
    config, family = out.config, out.family
    stored: dict[str, _Tensor] = {}
    names: dict[str, str] = {}
    joined = joined_names(family, ROLES)
    plan = plan_source(source)
    opened = _open(source.directory, list(source.files), reader)
    adapted = {info.name: opened.pop(info.name) for adapter in plan.adapters for _, info in adapter.tensors}
    for name, tensor in opened.items():
        canonical = canonical_name(without_marks(name), family.names) or name
        module, _, suffix = canonical.rpartition(".")
        if suffix in joined and module.endswith(".experts"):
            canonical = ".".join((module, *joined[suffix]))
        stored[canonical], names[canonical] = tensor, name
    verifier = _Verifier(config, stored, names, _open(out.folder, list(out.files)))
    for name in config.modules:
        if config.is_carried(name):
            verifier.owner[name] = (name, 0)  # a tower's module: one projection, in the same place
    linears = [p for p in out.placed if not isinstance(p.item, Parameter) and not p.part.open]
    stacks: dict[str, list[Placed]] = defaultdict(list)
    for placed in linears:
        if placed.experts is not None:
            stacks[placed.parent].append(placed)
    for group in stacks.values():
        verifier.unstack(group)
    verifier.measure()
    for placed in linears:
        verifier.place(placed)
    dropped = {d["tensor"] for d in read_report(out.folder).get("dropped", [])}
    if reader is not None:
        read = (t.data for canonical, t in stored.items() if names[canonical] not in dropped)
        reader.expect((data.name, data.start, data.end) for data in read if isinstance(data, RemoteBytes))
    for canonical, tensor in stored.items():
        if names[canonical] in dropped:
            continue
        count = 1
        for size in tensor.shape:
            count *= size
        if not verifier.tensor(canonical, tensor, len(tensor.data) // count if count else 1):
            verifier.problems.append(
                Problem(tensor.file, names[canonical], "a place in OUT", "none", "OUT is incomplete: convert again")
            )
    elements = 0
    for name, tensor in verifier.target.items():
        count = 1
        for size in tensor.shape:
            count *= size
        elements += count
        if verifier.compared[name] != count and not any(p.tensor == name for p in verifier.problems):
            verifier.wrong(name, f"{count} elements that come from IN", f"{verifier.compared[name]}")
    for relative, path in source.side_files.items():
        copy = out.folder / relative
        if not copy.is_file() or file_digest(copy) != file_digest(path):
            verifier.problems.append(Problem(relative, "", "a byte-for-byte copy", "a difference", "convert again"))
    verifier.problems += _adapter_problems(plan.adapters, adapted, out.folder)
    verifier.problems += _config_problems(plan.config, config)
    verifier.problems += _written_problems(out.folder) + _index_problems(out) + _header_problems(out)
    if verifier.problems:
        raise ConvertError(verifier.problems)
    total = sum(len(t.data) for t in verifier.target.values())
    return Verified(len(verifier.target), elements, total, len(source.side_files))


def _adapter_problems(adapters: Sequence[Adapter], stored: Mapping[str, _Tensor], out_dir: Path) -> list[Problem]:
    """Where OUT's adapters differ from IN's: bytes are compared with IN, names and configs with a fresh plan."""
    again = "OUT is not a conversion of IN: convert again"
    expected = {a.directory: a for a in adapters}
    present = {p.parent.relative_to(out_dir).as_posix() for p in (out_dir / DIRECTORY).glob(f"**/{ADAPTER_WEIGHTS}")}
    problems = []
    for directory in sorted(present ^ expected.keys()):
        words = ("an adapter", "none") if directory in expected else ("no adapter", "one")
        problems.append(Problem(f"{directory}/{ADAPTER_WEIGHTS}", "", *words, again))
    for directory in sorted(present & expected.keys()):
        file = f"{directory}/{ADAPTER_WEIGHTS}"
        ours, sources = _open(out_dir, [file]), dict(expected[directory].tensors)
        for name in sorted(ours.keys() ^ sources.keys()):
            words = ("a tensor", "none") if name in sources else ("no such tensor", "one")
            problems.append(Problem(file, name, *words, again))
        for name in sorted(ours.keys() & sources.keys()):
            theirs = stored[sources[name].name]
            alike = (ours[name].dtype, ours[name].shape) == (theirs.dtype, theirs.shape)
            if not alike or not np.array_equal(ours[name].raw(), theirs.raw()):
                problems.append(Problem(file, name, f"what {sources[name].name} holds", "something else", again))
        try:
            config = json.loads((out_dir / directory / ADAPTER_CONFIG).read_bytes())
        except (OSError, ValueError) as error:
            config = str(error)
        for path, want, have in _differences("", dict(expected[directory].config), config):
            problems.append(Problem(f"{directory}/{ADAPTER_CONFIG}", path, f"{want!r:.80}", f"{have!r:.80}", again))
    return problems


def _config_problems(wanted: CanonicalConfig, config: CanonicalConfig) -> list[Problem]:
    """Where OUT's config.json differs from what IN calls for: the same bytes under another config mean something else."""
    expected, found = wanted.to_json(), config.to_json()
    problems = []
    for path, want, have in _differences("", expected, found):
        problems.append(
            Problem(CONFIG_FILE, path, f"{want!r:.80}", f"{have!r:.80}", "OUT is not a conversion of IN: convert again")
        )
    return problems


def _differences(path: str, expected: Any, found: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, expected, found) of each difference between two JSON values."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in (*expected, *(k for k in found if k not in expected)):
            yield from _differences(f"{path}.{key}" if path else str(key), expected.get(key), found.get(key))
    elif expected != found:
        yield path, expected, found


def _written_problems(directory: Path) -> list[Problem]:
    """Where a JSON file of OUT means what it should and is spelled in another way: a byte of it was changed."""
    problems = []
    for path in sorted((directory / CONFIG_FILE, directory / INDEX_FILE, *directory.glob(f"{DIRECTORY}/**/{ADAPTER_CONFIG}"))):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and not is_spelled(path, read_json(path, name)):
            problems.append(Problem(name, "", "the bytes that qconvert writes", "others that mean the same", CHANGED))
    return problems + _report_problems(directory)


def _report_problems(directory: Path) -> list[Problem]:
    report = read_report(directory)
    if not report or is_sealed(directory / REPORT_FILE, report):
        return []
    return [Problem(REPORT_FILE, "sha256", "the digest of the rest of the file", "another", CHANGED)]


def _header_problems(out: Canonical) -> list[Problem]:
    """Where a file's header says the same in other bytes, or has other metadata."""
    problems = []
    adapters = (p.relative_to(out.folder).as_posix() for p in out.folder.glob(f"{DIRECTORY}/**/{ADAPTER_WEIGHTS}"))
    for file in (*out.files, *adapters):
        raw = _header(out.folder / file)
        header = json.loads(raw)
        spelled = raw.rstrip(b" ") == json.dumps(header, separators=(",", ":")).encode()
        if not spelled or header.get("__metadata__") != {"format": "pt"}:
            problems.append(Problem(file, "", "the header that qconvert writes", "one that means the same", CHANGED))
    return problems


def _index_problems(out: Canonical) -> list[Problem]:
    """Where the index does not add up; which tensor lies where was compared when OUT was opened."""
    metadata = read_json(out.folder / INDEX_FILE, INDEX_FILE).get("metadata")
    total = sum(info.end - info.start for info in out.tensors.values())
    if metadata == {"total_size": total}:
        return []
    return [Problem(INDEX_FILE, "metadata", f"total_size {total}", f"{metadata!r:.80}", CHANGED)]


def verify_digests(out_dir: str | os.PathLike[str]) -> int:
    """Check every byte of a canonical checkpoint against `conversion.json`, which is checked against itself.

    Returns the number of files.  Raises `ConvertError` naming the file, and the tensor, that differs, or when the conversion
    recorded no digests.
    """
    directory = Path(out_dir)
    out = open_canonical(directory)
    with malformed(REPORT_FILE):
        recorded: dict[str, dict[str, Any]] = {o["file"]: o for o in read_report(directory)["outputs"]}
        problems = _report_problems(directory)
        for name in sorted({*out.files, *recorded}):
            if not any((recorded.get(name) or {}).get(key) for key in ("sha256", "header_sha256")):
                problems.append(Problem(name, "", "a recorded digest", "none", "verify against the source instead"))
            elif file_inside(directory, name) is None:
                problems.append(Problem(name, "", "a file of the conversion", "none", "convert again"))
        checks = [] if problems else [check for entry in recorded.values() for check in _recorded_digests(out, entry)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda check: range_digests(directory / check.file, [check.span], check.new)[0], checks)
        for check, digest in zip(checks, found, strict=True):
            if digest != check.expected:
                name = "BLAKE3" if check.new is TensorDigest else "SHA-256"
                problems.append(Problem(check.file, check.tensor, f"{name} {check.expected}", digest, CHANGED))
    if problems:
        raise ConvertError(problems)
    return len(recorded)


class _Recorded(NamedTuple):
    """A digest in the report: of a file, or of the header or a tensor in it."""

    file: str
    tensor: str
    span: tuple[int, int]
    expected: str
    new: Callable[[], Digest] = hashlib.sha256


def _recorded_digests(out: Canonical, entry: dict[str, Any]) -> list[_Recorded]:
    """What to check of one file: the whole, or its header and each tensor."""
    file, size = entry["file"], (out.folder / entry["file"]).stat().st_size
    if size != entry["size"]:
        raise ConvertError(Problem(file, "", f"{entry['size']} bytes", f"{size}", CHANGED))
    if "tensors_blake3" not in entry:
        return [_Recorded(file, "", (0, size), entry["sha256"])]
    digests = entry["tensors_blake3"]
    infos = {info.name: info for info in out.tensors.values() if info.file == file}
    if infos.keys() != digests.keys():
        different = sorted(infos.keys() ^ digests.keys())
        raise ConvertError(Problem(file, different[0], "the tensors of the conversion", "others", CHANGED))
    start = min(info.start for info in infos.values())
    header = _Recorded(file, "", (0, start), entry["header_sha256"])
    return [header, *(_Recorded(file, n, (infos[n].start, infos[n].end), d, TensorDigest) for n, d in digests.items())]

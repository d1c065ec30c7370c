"""Reads a source checkpoint's headers and configs, wherever it is.  Nothing is loaded, nothing is executed.

Everything that comes from the directory is untrusted: headers are validated as the safetensors specification demands, and
beyond it where readers differ (duplicate keys, control characters in names, shards outside the directory).
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, overload

from runtime.format import CONFIG_FILE, DTYPE_BYTES, FORMAT, INDEX_FILE, REPORT_FILE

from .collector import collector_paused
from .errors import ConvertError, Problem, UsageError, printable
from .limits import (
    MAX_FILE_NAME,
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    MAX_METADATA_BYTES,
    MAX_NAME_LENGTH,
    MAX_NUMBER,
    MAX_SIDE_DEPTH,
    MAX_TENSORS,
)
from .remote import RemotePath, open_url
from .strict_json import check_nesting, check_text, no_constant, no_duplicates, no_minus_zero, parse, parse_json

T = TypeVar("T")
R = TypeVar("R")

QUANT_FILE = "hf_quant_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
NOT_CARRIED = {  # file suffix -> why such a side file is not copied
    **dict.fromkeys(PICKLES, "a pickle can run code when it is loaded"),
    ".py": "code is never executed nor passed on",
    ".so": "code is never executed nor passed on",
    ".safetensors": "not part of the checkpoint: its index does not name it",
}
REPLACED = {  # file name -> why it is not copied
    CONFIG_FILE: "replaced by the canonical config.json, which holds it as hf_config",
    QUANT_FILE: "merged into the canonical config.json",
    INDEX_FILE: "replaced by the index of the new files",
    REPORT_FILE: "replaced by the report of this conversion",
    ADAPTER_CONFIG: "written anew to adapter/ when the checkpoint holds the adapter's tensors",
}


AnyPath = Path | RemotePath
Location = str | os.PathLike[str] | RemotePath  # of a checkpoint: a directory, or a URL


class TensorInfo(NamedTuple):
    """One stored tensor: safetensors dtype name, shape, and its byte range [start, end) in `file`.

    A tuple, because a checkpoint has hundreds of thousands of them and a frozen dataclass takes three times as long to make.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    def rows(self, span: tuple[int, int] | None) -> TensorInfo:
        """Rows [start, stop) of the first axis as a tensor of its own; the whole for None."""
        if span is None:
            return self
        size = (self.end - self.start) // self.shape[0]
        begin, end = self.start + span[0] * size, self.start + span[1] * size
        return TensorInfo(self.name, self.dtype, (span[1] - span[0], *self.shape[1:]), self.file, begin, end)

    def split(self) -> Iterator[TensorInfo]:
        """Each row of the first axis of a tensor with three axes; a tensor with two as it is."""
        if len(self.shape) < 3:
            yield self
            return
        for row in range(self.shape[0]):
            yield self.rows((row, row + 1))


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One safetensors file.  `identity` (size, mtime in ns, inode or ETag) tells whether it changed since it was read."""

    name: str
    path: AnyPath
    identity: tuple[int, int, int]


@dataclass(slots=True)
class Source:
    """A source checkpoint, headers only.

    tensors      name -> `TensorInfo`, in file order
    config       `config.json`;  quant_file  `hf_quant_config.json`, or None
    adapter_configs  folder ("" for the checkpoint itself) -> its `adapter_config.json`
    side_files   relative path -> path of files to carry byte for byte
    skipped      relative path -> why a file is not carried
    """

    directory: AnyPath
    files: dict[str, SourceFile]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    quant_file: dict[str, Any] | None
    adapter_configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    side_files: dict[str, AnyPath] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def _refuse(file: str, tensor: str, expected: str, found: str, remedy: str) -> NoReturn:
    raise ConvertError(Problem(file, tensor, expected, found, remedy))


def located(place: Location) -> AnyPath:
    """Where a checkpoint is: the path of a directory, or what a URL names, listed.  Raises as `remote.open_url` does."""
    if isinstance(place, str) and "://" in place:
        return open_url(place)
    return place if isinstance(place, RemotePath) else Path(place)


def each(directory: AnyPath, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map(function, items)`; over a network, several calls at a time."""
    return directory.remote.map(function, items) if isinstance(directory, RemotePath) else map(function, items)


def read_json(path: AnyPath, name: str) -> dict[str, Any]:
    """Read a JSON object from a regular file.  Raises `ConvertError`."""
    if path.stat().st_size > MAX_JSON_BYTES:
        _refuse(name, "", f"at most {MAX_JSON_BYTES} bytes", f"{path.stat().st_size}", "this is not a config file")
    return parse_json(path.read_bytes(), name)


@overload
def regular_file(directory: Path, name: str) -> Path: ...
@overload
def regular_file(directory: AnyPath, name: str) -> AnyPath: ...
def regular_file(directory: AnyPath, name: str) -> AnyPath:
    """The resolved path of a file of the checkpoint; refuses links that leave it, and anything that is not a file."""
    if len(os.fsencode(os.path.basename(name))) > MAX_FILE_NAME or "\0" in name:
        _refuse(name, "", "the name of a file", "one that no file can have", "correct the name")
    if isinstance(directory, RemotePath):  # whose listing has been checked, and has files only
        if not (directory / name).is_file():
            _refuse(name, "", "a file", "none of this name", "the checkpoint is incomplete: fetch the missing file")
        return directory / name
    target = (directory / name).resolve()
    root = directory.resolve()
    # The Hub cache keeps snapshots/<revision>/<file> as links into blobs/ of the same repository.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if not target.is_relative_to(root) and not (blobs is not None and target.parent == blobs.resolve()):
        _refuse(name, "", "a file inside the checkpoint", "a link that leaves it", "replace the link by the file")
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        _refuse(name, "", "a file", "none of this name", "the checkpoint is incomplete: fetch the missing file")
    except OSError as error:
        _refuse(name, "", "a readable file", error.strerror or str(error), "check the path and its permissions")
    if not stat.S_ISREG(mode):
        _refuse(name, "", "a regular file", "something else (folder, pipe or device)", "put the file itself there")
    return target


def _check_names(file: str, names: Collection[str]) -> None:
    """Refuse names that could do harm where they are printed or taken for a path."""

    def plain(text: str) -> bool:
        return text.isprintable() and ".." not in text and "/" not in text and "\\" not in text

    if plain(" ".join(names)) and all(0 < length <= MAX_NAME_LENGTH for length in set(map(len, names))):
        return
    for name in names:
        if not name or len(name) > MAX_NAME_LENGTH or not plain(name):
            damaged = "the file is damaged: fetch or export it again"
            _refuse(file, name, "a plain tensor name", "an empty, overlong or unprintable name", damaged)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_NUMBER


def _header_entries(file: str, header: Mapping[str, Any], start: int, end: int) -> list[TensorInfo] | None:
    """The tensors of a header, in the order of their bytes, which fill [start, end) of the file; None if anything is wrong.

    A checkpoint has hundreds of thousands of entries, so this only tells whether all are right; `_refuse_entries` says what
    is not.
    """
    infos: list[TensorInfo] = []
    layouts: dict[tuple[Any, ...], tuple[str, tuple[int, ...], int]] = {}  # thousands of experts share few of them
    position, in_order = start, True
    try:
        types = {type(entry["shape"]) for entry in header.values()}
        types |= set(map(type, chain.from_iterable(entry["shape"] for entry in header.values())))
        if not types <= {list, int}:  # to Python, [1.0] and [true] equal [1]
            return None
        for name, entry in header.items():
            look = (entry["dtype"], *entry["shape"])
            if look not in layouts:
                layouts[look] = (entry["dtype"], look[1:], _nbytes(entry["dtype"], look[1:]))
            dtype, shape, nbytes = layouts[look]
            begin, stop = entry["data_offsets"]
            if stop - begin != nbytes or type(begin) is not int or type(stop) is not int:
                return None
            in_order = in_order and start + begin == position
            position = start + stop
            # The same as TensorInfo(...), in half the time.
            infos.append(tuple.__new__(TensorInfo, (name, dtype, shape, file, start + begin, position)))
    except (KeyError, TypeError, ValueError):
        return None
    if not in_order:
        infos.sort(key=attrgetter("start", "end"))
        position = start
        for info in infos:
            if info.start != position:
                return None
            position = info.end
    return infos if position == end else None


def _nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Size of a tensor in bytes.  Raises `KeyError` and `ValueError` for what no tensor can have."""
    # Without its zeros, because other readers multiply one after another: 2**32 x 2**32 x 0 overflows.
    if not all(map(_is_size, shape)) or not _is_size(DTYPE_BYTES[dtype] * math.prod(filter(None, shape))):
        raise ValueError(shape)
    return DTYPE_BYTES[dtype] * math.prod(shape)


def _refuse_entries(file: str, header: Mapping[str, Any], start: int, end: int) -> NoReturn:
    """Say what is wrong with the first entry of a header that has been found wrong."""
    damaged = "the file is damaged: fetch or export it again"
    ranges = []
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], entry["shape"]
            ok = isinstance(shape, list) and all(map(_is_size, shape))
            if ok and dtype not in DTYPE_BYTES:
                _refuse(file, name, f"a dtype of {', '.join(DTYPE_BYTES)}", f"{dtype!r}", "this dtype has no known size")
            begin, stop = entry["data_offsets"]
            ok = ok and _is_size(begin) and _is_size(stop) and begin <= stop
            nbytes = _nbytes(dtype, shape) if ok else 0
        except (KeyError, TypeError, ValueError):
            ok = False
        if not ok:
            _refuse(file, name, "dtype, shape and data_offsets", f"{entry!r:.120}", damaged)
        if nbytes != stop - begin:
            _refuse(file, name, f"{nbytes} bytes for {dtype} {shape}", f"{stop - begin}", damaged)
        ranges.append((start + begin, start + stop, name))
    damaged = "the file is damaged or incomplete: fetch it again"
    position, last = start, ""
    for begin, stop, name in sorted(ranges, key=itemgetter(0, 1)):
        if begin != position:
            what = "a gap" if begin > position else "an overlap"
            _refuse(file, name, f"data at byte {position}", f"{what}: data at byte {begin}", damaged)
        position, last = stop, name
    what = "truncated" if end < position else "trailing bytes"
    _refuse(file, last, f"a file of {position} bytes", f"{end} bytes ({what})", damaged)


def read_header(path: AnyPath, file: str) -> list[TensorInfo]:
    """The tensors of one safetensors file in the order of their bytes.  Raises `ConvertError` for every invalid file.

    Checks the whole specification (contiguous ranges without gap, overlap or trailing bytes, dtype x shape = bytes) and
    duplicate keys, which the specification forbids and the common library accepts.
    """
    damaged = "the file is damaged or incomplete: fetch it again"
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little") if size >= 8 else -1
        if length < 2 or length > min(size - 8, MAX_HEADER_BYTES):
            _refuse(file, "", f"a safetensors header within {size} bytes", f"header length {length}", damaged)
        raw = stream.read(length)
    # Quotes tell whether a key was given twice: a tensor has ten, those of its name, its dtype and three keys, and a pair of
    # the metadata four.  A repeated key, which is lost in parsing, has more.  Only where the count differs, or where an escape
    # may stand for one, or where a size may be -0, the slow check is made.
    if not raw.startswith(b"{"):
        _refuse(file, "", "a header that begins with {", f"{raw[:20]!r}", damaged)
    header = parse(raw, file, None, no_constant)
    quotes = 2 if "__metadata__" in header else 0
    metadata = header.pop("__metadata__", {})
    quotes += 10 * len(header) + (4 * len(metadata) if isinstance(metadata, dict) else 0)
    if raw.count(b'"') != quotes or b"\\" in raw or b"-0" in raw:
        value = parse(raw, file, no_duplicates, no_constant, no_minus_zero)
        check_nesting(value, file)
        check_text(value, file)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(file, "__metadata__", "text values", "something else", damaged)
    if sum(map(len, metadata.values())) > MAX_METADATA_BYTES:
        _refuse(file, "__metadata__", f"at most {MAX_METADATA_BYTES} bytes", "more", "remove the metadata")
    _check_names(file, header)
    infos = _header_entries(file, header, 8 + length, size)
    if infos is None:
        _refuse_entries(file, header, 8 + length, size)
    return infos


def _shard_names(directory: AnyPath) -> tuple[list[str], dict[str, str] | None]:
    """Names of the safetensors files of a checkpoint, and the index's weight map when there is an index."""
    indexes = sorted(p.name for p in directory.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        _refuse(indexes[1], "", "one index", f"{len(indexes)} ({', '.join(indexes)})", "remove the stale index")
    if not indexes:
        found = sorted(p.name for p in directory.glob("*.safetensors") if p.name != ADAPTER_WEIGHTS)
        return found, None
    index = read_json(regular_file(directory, indexes[0]), indexes[0])
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        _refuse(indexes[0], "weight_map", "an object of tensor name -> file name", "something else", "fetch it again")
    shards = sorted(set(weight_map.values()))
    for file in shards:
        plain = file == os.path.basename(file) and file.endswith(".safetensors") and file.isprintable()
        if not plain or any(c in file for c in "\\:~") or len(file.encode()) > MAX_FILE_NAME:
            tensor = next(t for t, f in weight_map.items() if f == file)
            expected = "the name of a *.safetensors file inside the checkpoint"
            _refuse(indexes[0], tensor, expected, f"{file!r}", "correct the index")
    return shards, weight_map


def _twins(headers: Iterable[Iterable[TensorInfo]]) -> Iterator[Problem]:
    """Tensors that more than one file has."""
    first: dict[str, TensorInfo] = {}
    for tensor in chain.from_iterable(headers):
        twin = first.setdefault(tensor.name, tensor)
        if twin is not tensor:
            yield Problem(tensor.file, tensor.name, "each tensor once", f"it also in {twin.file}", "remove the stale file")


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> list[Problem]:
    again = "the index is stale: fetch the checkpoint again"
    problems: list[Problem] = []
    if len(weight_map) == len(tensors) and list(map(weight_map.get, tensors)) == [info.file for info in tensors.values()]:
        return problems
    for name, file in weight_map.items():
        info = tensors.get(name)
        if info is None or info.file != file:
            found = f"in {info.file}" if info else "in no file"
            problems.append(Problem(file, name, f"the tensor in {file}, as the index says", found, again))
    for name, info in tensors.items():
        if name not in weight_map:
            problems.append(Problem(info.file, name, "an entry in the index", "none", again))
    return problems


def _names_below(directory: AnyPath) -> Iterator[str]:
    """Relative paths of all files that are not hidden, down to a depth."""
    if isinstance(directory, RemotePath):
        yield from directory.side_names()
        return
    for folder, folders, files in os.walk(directory, followlinks=False):
        relative = Path(folder).relative_to(directory)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and len(relative.parts) < MAX_SIDE_DEPTH)
        yield from ((relative / name).as_posix() for name in sorted(files) if not name.startswith("."))


def _side_files(directory: AnyPath, shards: set[str]) -> tuple[dict[str, AnyPath], dict[str, str]]:
    """Files beside the weights: those to carry, and those not carried with the reason."""
    carried: dict[str, AnyPath] = {}
    skipped: dict[str, str] = {}
    for path in _names_below(directory):
        name = path.rpartition("/")[2]
        if path in shards:
            continue
        if path in REPLACED or name == ADAPTER_CONFIG:
            skipped[path] = REPLACED[name]
        elif name == ADAPTER_WEIGHTS:
            skipped[path] = "an adapter beside the checkpoint: peft can load it on the exported base"
        elif path.endswith(".safetensors.index.json"):
            skipped[path] = REPLACED[INDEX_FILE]
        elif Path(name).suffix in NOT_CARRIED:
            skipped[path] = NOT_CARRIED[Path(name).suffix]
        elif not path.isprintable():
            skipped[path] = "its name has control characters"
        else:
            try:
                carried[path] = regular_file(directory, path)
            except ConvertError as error:
                skipped[path] = f"expected {error.problems[0].expected}, found {error.problems[0].found}"
    return carried, skipped


def _refuse_without_weights(directory: AnyPath) -> NoReturn:
    names = {p.name for p in directory.iterdir()}
    name = directory.name
    if ADAPTER_CONFIG in names or ADAPTER_WEIGHTS in names:
        _refuse(
            name, "", "a checkpoint", f"a LoRA adapter only ({ADAPTER_CONFIG})",
            "an adapter is not a checkpoint: convert its base model, or merge the adapter into it first",
        )  # fmt: skip
    pickles = sorted(n for n in names if Path(n).suffix in PICKLES)
    if pickles:
        _refuse(
            pickles[0], "", "safetensors files", "pickle files only, which can run code when loaded",
            "save the model again with safetensors (transformers: save_pretrained)",
        )  # fmt: skip
    gguf = sorted(n for n in names if n.endswith(".gguf"))
    if gguf:
        _refuse(gguf[0], "", "safetensors files", "a GGUF file", "convert the original safetensors checkpoint instead")
    found = "an empty directory" if not names else f"no *.safetensors among {len(names)} files"
    _refuse(name, "", "a checkpoint with config.json and *.safetensors", found, "check the path, or fetch the checkpoint")


@collector_paused()
def read_source(in_dir: Location) -> Source:
    """Read the headers and configs of a checkpoint: a directory, or a URL.

    Raises `ConvertError` for everything that makes it unreadable or inconsistent with its own index, `UsageError` when
    there is no such directory, `MachineError` when the network fails.  Cost: one read of each header; no tensor data.
    """
    directory = located(in_dir)
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing there"
        raise UsageError(Problem(printable(in_dir), "", "a directory", found, "give the checkpoint's directory"))
    shards, weight_map = _shard_names(directory)
    if not shards:
        _refuse_without_weights(directory)
    if not (directory / CONFIG_FILE).exists():
        _refuse(CONFIG_FILE, "", "the model's config", "no such file", "fetch the whole checkpoint, config.json included")
    config = read_json(regular_file(directory, CONFIG_FILE), CONFIG_FILE)
    if config.get("format") == FORMAT:
        _refuse(
            CONFIG_FILE, "", "a source checkpoint", "one that qconvert has already written",
            "it is canonical as it is: use it directly",
        )  # fmt: skip
    quant_file = None
    if (directory / QUANT_FILE).exists():
        quant_file = read_json(regular_file(directory, QUANT_FILE), QUANT_FILE)

    adapter_configs = {}
    for path in sorted((*directory.glob(ADAPTER_CONFIG), *directory.glob(f"*/{ADAPTER_CONFIG}"))):
        name = path.relative_to(directory).as_posix()
        folder = name.rpartition("/")[0]
        if not folder.startswith("."):
            adapter_configs[folder] = read_json(regular_file(directory, name), name)

    files: dict[str, SourceFile] = {}
    tensors: dict[str, TensorInfo] = {}
    headers: list[list[TensorInfo]] = []
    problems: list[Problem] = []
    for shard in shards:
        path = regular_file(directory, shard)
        info = path.stat()
        files[shard] = SourceFile(shard, path, (info.st_size, info.st_mtime_ns, info.st_ino))
    for shard, header in zip(shards, each(directory, lambda name: read_header(files[name].path, name), shards), strict=True):
        headers.append(header)
        tensors.update({tensor.name: tensor for tensor in headers[-1]})
        if len(tensors) > MAX_TENSORS:
            _refuse(shard, "", f"at most {MAX_TENSORS} tensors", f"{len(tensors)} up to this file", "this is no checkpoint")
    if len(tensors) < sum(map(len, headers)):
        problems += _twins(headers)
    if weight_map is not None and not problems:
        problems += _check_index(weight_map, tensors)
    if problems:
        raise ConvertError(problems)
    carried, skipped = _side_files(directory, set(shards))
    return Source(directory, files, tensors, config, quant_file, adapter_configs, carried, skipped)

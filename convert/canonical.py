"""Opens a canonical checkpoint and holds it against its own index, config and family, for `verify`, `export` and `inspect`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.format import CONFIG_FILE, INDEX_FILE, REPORT_FILE, CanonicalConfig, FormatError, module_tensors

from .errors import ConvertError, Problem, UsageError
from .families import FAMILIES
from .families.base import Family, Parameter, Placed, expand, open_items, present_layers
from .source import AnyPath, Location, TensorInfo, each, located, read_header, read_json, regular_file

AGAIN = "the checkpoint is damaged: run qconvert IN OUT again"


@dataclass(frozen=True, slots=True)
class Canonical:
    """A canonical checkpoint whose headers, index and config agree.

    tensors  name -> where it is stored     placed  every module and parameter that its family says it has
    """

    directory: AnyPath
    config: CanonicalConfig
    family: Family
    files: tuple[str, ...]
    tensors: dict[str, TensorInfo]
    placed: tuple[Placed, ...]

    @property
    def folder(self) -> Path:
        """The directory of a checkpoint that is on this machine.  Raises `UsageError` for another."""
        if isinstance(self.directory, Path):
            return self.directory
        raise UsageError(Problem(str(self.directory), "", "a directory of this machine", "a URL", "fetch the checkpoint first"))


@contextmanager
def malformed(what: str) -> Iterator[None]:
    """Turn what reading damaged JSON values can raise into one `ConvertError` about `what`."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise ConvertError(Problem(what, "", "a canonical checkpoint", f"malformed values ({error!r})", AGAIN)) from None


def _read_config(directory: AnyPath) -> CanonicalConfig:
    value = read_json(regular_file(directory, CONFIG_FILE), CONFIG_FILE)
    try:
        return CanonicalConfig.from_json(value)
    except FormatError as error:
        place, expected, found, remedy = error.parts or ("", "a canonical config", str(error), AGAIN)
        raise ConvertError(Problem(CONFIG_FILE, place, expected, found, remedy)) from None


def _read_index(directory: AnyPath) -> dict[str, str]:
    index = read_json(regular_file(directory, INDEX_FILE), INDEX_FILE).get("weight_map")
    good = isinstance(index, dict) and all(map(_is_file_name, index.values()))
    if not good or not index:
        raise ConvertError(Problem(INDEX_FILE, "weight_map", "tensor name -> file name", "something else", AGAIN))
    return index


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and name.isprintable() and 0 < len(name) < 256


def _check_parameter(placed: Placed, item: Parameter, config: CanonicalConfig, tensors: dict[str, TensorInfo]) -> str:
    """What is wrong with a parameter, or nothing."""
    info = tensors.get(placed.name)
    if info is None:
        absent = item.optional or item.dropped or (item.flag and not config.architecture[item.flag])
        return "" if absent else "no such tensor"
    shape = placed.shape
    if shape is None or (len(shape) == len(info.shape) and all(a in (None, b) for a, b in zip(shape, info.shape, strict=True))):
        return ""
    return f"{list(info.shape)}"


def _problems(config: CanonicalConfig, tensors: dict[str, TensorInfo], placed: list[Placed]) -> Iterator[Problem]:
    """Where the stored tensors differ from what config and family call for."""
    for module, spec in config.modules.items():
        for role, expected in module_tensors(spec).items():
            name, info = f"{module}.{role}", tensors.get(f"{module}.{role}")
            fits = info is not None and info.shape == expected.shape
            if info is None or not fits or (role != "pre_quant_scale" and info.dtype != expected.dtype):
                found = f"{info.dtype} {list(info.shape)}" if info else "no such tensor"
                yield Problem(info.file if info else "", name, f"{expected.dtype} {list(expected.shape)}", found, AGAIN)
    for place in placed:
        if isinstance(place.item, Parameter):
            fault = _check_parameter(place, place.item, config, tensors)
            if fault:
                expected_shape = list(place.shape) if place.shape is not None else "any shape"
                yield Problem("", place.name, f"a tensor of {expected_shape}", fault, AGAIN)
            continue
        rows = [n for _, partitions in place.shards for _, n in partitions]
        if place.name in config.modules:
            spec = config.modules[place.name]
            if None not in rows and place.columns is not None:
                wanted, found_ = ((place.experts, sum(n or 0 for n in rows), place.columns), (spec.experts, *spec.shape))
                if wanted != found_:
                    calls_for, stored = ([n for n in sizes if n is not None] for sizes in (wanted, found_))
                    where = f"quantization.modules.{place.name}"
                    yield Problem(CONFIG_FILE, where, f"{calls_for}, as its architecture says", f"{stored}", AGAIN)
        elif place.name not in config.unfused:
            info = tensors.get(f"{place.name}.weight")
            lead = () if place.experts is None else (place.experts,)
            if info is None:
                yield Problem("", f"{place.name}.weight", "a weight", "no such tensor", AGAIN)
            elif None not in rows and place.columns is not None:
                shape = (*lead, sum(n or 0 for n in rows), place.columns)
                if info.shape != shape:
                    yield Problem(info.file, info.name, f"a tensor of {list(shape)}", f"{list(info.shape)}", AGAIN)


def open_canonical(out_dir: Location) -> Canonical:
    """Read headers, index and config of a canonical checkpoint; no tensor data.

    Raises `ConvertError` when it is none, is incomplete, or its parts contradict each other; `UsageError` when there is no
    such directory.
    """
    directory = located(out_dir)
    if not directory.is_dir():
        raise UsageError(Problem(str(out_dir), "", "a canonical checkpoint", "no directory", "run qconvert IN OUT first"))
    config = _read_config(directory)
    index = _read_index(directory)
    files = tuple(sorted(set(index.values())))
    headers = each(directory, lambda file: read_header(regular_file(directory, file), file), files)
    tensors = {info.name: info for header in headers for info in header}
    for name in sorted({*tensors, *index}):
        stored = tensors[name].file if name in tensors else "no file"
        if index.get(name) != stored:
            said = index.get(name, "nothing about it")
            raise ConvertError(Problem(INDEX_FILE, name, f"the tensor in {stored}, where it is", f"{said}", AGAIN))
    family = next((f for f in FAMILIES if f.name == config.family), None)
    if family is None:
        raise ConvertError(Problem(CONFIG_FILE, "family", "a known family", f"{config.family}", "use a newer qconvert"))
    for fact in family.fields:
        value = config.architecture.get(fact.name, 0)
        if fact.kind is int and type(value) is not int and not (value is None and fact.default is None):
            raise ConvertError(Problem(CONFIG_FILE, f"architecture.{fact.name}", "a whole number", f"{value!r:.80}", AGAIN))
    with malformed(CONFIG_FILE):
        present = present_layers(family, config.architecture, tensors)
        if config.architecture.get("head") == "separate":
            present.setdefault("lm_head", 0)
        placed = list(expand(family, config.architecture, present))
        weights = [n for n in tensors if n.rpartition(".")[0] not in config.modules or n.endswith((".weight", ".bias"))]
        for part in family.parts:
            if part.open:
                placed += open_items(part, weights, lambda module: module in config.modules)
        problems = list(_problems(config, tensors, placed))
    if problems:
        raise ConvertError(problems)
    return Canonical(directory, config, family, files, tensors, tuple(placed))


def read_report(directory: AnyPath) -> dict[str, Any]:
    """`conversion.json`, or an empty one when there is none.  Raises `ConvertError` when it is damaged."""
    if not (directory / REPORT_FILE).exists():
        return {}
    report = read_json(regular_file(directory, REPORT_FILE), REPORT_FILE)
    good = all(isinstance(report.get(key, ""), str) for key in ("producer", "dialect"))
    for key, wanted in _LISTS.items():
        entries = report.get(key, [])
        good = good and isinstance(entries, list) and all(_is(entry, wanted) for entry in entries)
    if not good:
        raise ConvertError(Problem(REPORT_FILE, "", "the report of a conversion", "malformed values", AGAIN))
    return report


_NUMBER = (int, float)
_FILE = {"file": str, "size": int, "sha256": (str, type(None))}
_LISTS: dict[str, Any] = {  # key of the report -> what the entries of its list are
    "repairs": str,
    "contradictions": str,
    "dropped": {"tensor": str, "reason": str},
    "sources": _FILE,
    "outputs": {"file": str, "size": int},  # and digests, of the whole file or of its parts
    "adapters": {
        "name": str, "directory": str, "tensors": dict, "bytes": int, "config": {"r": _NUMBER, "lora_alpha": _NUMBER},
    },
}  # fmt: skip


def _is(value: Any, wanted: Any) -> bool:
    """Whether a JSON value is of the types `wanted`: for an object, those of its fields."""
    if isinstance(wanted, dict):
        return isinstance(value, dict) and all(key in value and _is(value[key], types) for key, types in wanted.items())
    return isinstance(value, wanted)


def file_inside(directory: Path, name: str) -> Path | None:
    """The path of a regular file that a damaged report may name; None for anything else, such as a path that leads out."""
    try:
        path = (directory / name).resolve()
        return path if path.is_relative_to(directory.resolve()) and path.is_file() else None
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return None

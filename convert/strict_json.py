"""JSON from untrusted files, stricter than Python reads it: what other readers refuse or read otherwise is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from .errors import ConvertError, Problem
from .limits import MAX_NESTING


def refuse(file: str, tensor: str, expected: str, found: str, remedy: str) -> NoReturn:
    """Raise `ConvertError` with one problem."""
    raise ConvertError(Problem(file, tensor, expected, found, remedy))


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook`.  Raises `ValueError` for a key that is there twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"duplicate key {Counter(k for k, _ in pairs).most_common(1)[0][0]!r}")
    return result


def no_nan(constant: str) -> float:
    """A `parse_constant` that takes infinities.  Raises `ValueError` for NaN."""
    if constant == "NaN":
        raise ValueError("NaN, which is not JSON")
    return float(constant)  # Nemotron-H configs hold a bare Infinity


def no_constant(constant: str) -> NoReturn:
    """A `parse_constant` that takes nothing.  Raises `ValueError`."""
    raise ValueError(f"{constant}, which is not JSON")


def no_minus_zero(text: str) -> int:
    """A `parse_int`.  Raises `ValueError` for -0."""
    if text == "-0":  # 0 to Python, no size to other readers
        raise ValueError("-0, which is no size")
    return int(text)


def check_nesting(value: Any, file: str) -> None:
    """Refuse JSON that is nested deeper than any config, before code that calls itself for each level meets it."""
    level = [value]
    for _ in range(MAX_NESTING):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))]  # fmt: skip
        if not level:
            return
    refuse(file, "", f"at most {MAX_NESTING} nested brackets", "more", "the file is damaged: fetch it again")


def check_text(value: Any, file: str) -> None:
    """Refuse escapes that are half a character, which other readers of safetensors refuse."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        refuse(file, "", "valid JSON", str(error), "the file is damaged: fetch it again")


def count_texts(value: Any) -> int:
    """How many texts JSON has, keys included."""
    count, level = 0, [value]
    while level:
        inner: list[Any] = []
        for outer in level:
            if isinstance(outer, dict):
                count += len(outer)
                values: Iterable[Any] = outer.values()
            else:
                values = outer
            for item in values:
                if isinstance(item, str):
                    count += 1
                elif isinstance(item, (dict, list)):
                    inner.append(item)
        level = inner
    return count


def parse_json(raw: bytes, file: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8 without BOM, no duplicate keys, no NaN, no deep nesting.  Raises `ConvertError`."""
    # A text takes two quotes.  A key given twice, which is lost in parsing, leaves two more, and each escaped quote one: only
    # then the slow check is made.
    value = parse(raw, file, None, no_nan)
    if raw.count(b'"') != 2 * count_texts(value):
        value = parse(raw, file, no_duplicates, no_nan)
    if raw.count(b"[") + raw.count(b"{") > MAX_NESTING:
        check_nesting(value, file)
    return value


def parse(
    raw: bytes,
    file: str,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None,
    constant: Callable[[str], Any],
    integer: Callable[[str], int] | None = None,
) -> dict[str, Any]:
    """Parse a JSON object in UTF-8, with hooks as `json.loads` has them.  Raises `ConvertError`."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_int=integer)
    except RecursionError:
        refuse(file, "", "JSON of ordinary depth", "brackets nested too deeply", "the file is damaged: fetch it again")
    except ValueError as error:
        refuse(file, "", "valid JSON", str(error), "the file is damaged: fetch it again")
    if not isinstance(value, dict):
        refuse(file, "", "a JSON object", type(value).__name__, "the file is damaged: fetch it again")
    return value

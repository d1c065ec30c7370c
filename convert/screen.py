"""An inspection as text: one screen, whatever the size of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .errors import printable
from .names import patterns

KINDS_SHOWN = 22  # rows of the table of kinds
NAMES_SHOWN = 3  # patterns of names of a defect
OTHERS = "norms, biases and other small ones"
LINES_SHOWN = 8  # of a list
SMALL_SHARE = 0.002  # unquantised kinds below this share of all bytes are counted together


def human(nbytes: float) -> str:
    """A size for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def large(number: float) -> str:
    """A number for people: 1,234, 30.5 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,.0f}"


def count(number: float, what: str) -> str:
    """A number of things: `1 file`, `2 files`, `30.5 B parameters`."""
    return f"{large(number)} {what}{'' if number == 1 else 's'}"


def adapter_line(adapter: Mapping[str, Any]) -> str:
    """One LoRA adapter, in one line."""
    config, number = adapter["config"], len(adapter["tensors"])
    what = f"LoRA r {config['r']}, lora_alpha {config['lora_alpha']}, {number} tensors, {human(adapter['bytes'])}"
    return printable(f"adapter {adapter['name']}: {what}, in {adapter['directory']}/")


def merged_kinds(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Kinds of modules for a table, the largest first: towers in a row for each scheme, small unquantised kinds together."""
    rows: dict[tuple[str, str, Any], dict[str, Any]] = {}
    quantised = {entry["scheme"] for entry in facts["modules"].values()}
    for row in facts["kinds"]:
        kind, root = row["kind"], row["kind"].partition(".")[0]
        if root in facts["towers"]:
            kind = f"{root}.**"
        elif row["scheme"] not in quantised and row["share"] < SMALL_SHARE:
            kind = OTHERS
        key = (kind, row["scheme"], row["activations"])
        into = rows.setdefault(key, {**row, "kind": kind, "modules": 0, "bytes": 0, "share": 0.0})
        for field in ("modules", "bytes", "share"):
            into[field] += row[field]
    return sorted(rows.values(), key=lambda row: (row["kind"] == OTHERS, -row["bytes"]))


def _table(facts: Mapping[str, Any]) -> Iterator[str]:
    rows = merged_kinds(facts)
    shown = rows if len(rows) <= KINDS_SHOWN else rows[: KINDS_SHOWN - 1]
    wide = max((len(printable(row["kind"])) for row in shown), default=0)
    for row in shown:
        scheme = row["scheme"] + (f", {row['activations']} inputs" if row["activations"] else "")
        yield (
            f"  {printable(row['kind']):<{wide}}  {printable(scheme):<30} {row['modules']:>6} x "
            f"{human(row['bytes']):>9}  {100 * row['share']:5.1f} %"
        )
    if len(shown) < len(rows):
        rest = rows[len(shown) :]
        nbytes, share = sum(row["bytes"] for row in rest), sum(row["share"] for row in rest)
        yield f"  ... and {len(rest)} smaller kinds, {human(nbytes)}, {100 * share:.1f} %"


def _part(part: Mapping[str, Any]) -> str:
    schemes = ", ".join(f"{number} x {scheme}" for scheme, number in part["schemes"].items())
    return f"{count(part['tensors'], 'tensor')}, {human(part['bytes'])}, {schemes or 'not quantised'}"


def _shape(facts: Mapping[str, Any]) -> str:
    types = facts["layer_types"]
    mixed = f" ({', '.join(f'{n} {kind}' for kind, n in types.items())})" if len(types) > 1 else ""
    experts = f", {facts['experts']} experts" if facts["experts"] else ""
    weights = f", {count(facts['parameters'], 'parameter')}" if facts["parameters"] else ""
    return (
        f"family {facts['family']}: {facts['layers']} layers{mixed}, hidden {facts['hidden_size']}, "
        f"vocabulary {facts['vocab_size']}{experts}{weights}"
    )


def _details(facts: Mapping[str, Any]) -> Iterator[str]:
    """KV cache, head, MTP, towers and adapters, a line each."""
    yield f"head: {facts['head']}, {facts['head_scheme'] or 'not quantised'}"
    cache = ", ".join(f"{number} layers per {kind}" for kind, number in facts["kv_cache"].items())
    scales = facts["kv_scales"]
    spread = f", scales {scales['min']:.3g} to {scales['max']:.3g}" if scales else ""
    yield f"KV cache: {f'FP8, {cache}{spread}' if cache else 'not quantised'}"
    if facts["mtp"]:
        yield f"MTP: {count(facts['mtp']['layers'], 'layer')}, {_part(facts['mtp'])}"
    for root, part in facts["towers"].items():
        yield f"tower {printable(root)}: {_part(part) if part else 'no tensors'}"
    for name, parts in list(facts["unfused"].items())[:LINES_SHOWN]:
        yield f"not fused: {printable(name)} ({printable(', '.join(parts[:LINES_SHOWN]))})"
    if len(facts["unfused"]) > LINES_SHOWN:
        yield f"not fused: {len(facts['unfused']) - LINES_SHOWN} more"
    for adapter in facts["adapters"]:
        yield adapter_line(adapter)


def _defects(facts: Mapping[str, Any]) -> Iterator[str]:
    defects = facts["defects"]
    if not defects:
        return
    yield "defects, the worst first"
    for defect in defects:
        yield printable(f"  {defect['severity'].upper():<6} {defect['title']} ({defect['count']})")
        names = list(defect["patterns"].items())
        yield from (f"         {printable(name)}{f' x {n}' if n > 1 else ''}" for name, n in names[:NAMES_SHOWN])
        if len(names) > NAMES_SHOWN:
            yield f"         ... and {len(names) - NAMES_SHOWN} more"
        if defect["found"]:
            yield f"         found: {printable(defect['found'])}"
        seen = f" ({defect['seen']})" if defect["seen"] else ""
        yield f"         engines: {defect['effect']}: {defect['engines']}{seen}"
        yield f"         qconvert: {'repairs it: ' if defect['repaired'] else ''}{defect['repair']}"


def _list(title: str, lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    if lines:
        yield f"{title}: {len(lines)}"
        yield from (f"  {printable(line)}" for line in lines[:LINES_SHOWN])
        if len(lines) > LINES_SHOWN:
            yield f"  ... and {len(lines) - LINES_SHOWN} more"


def screen(facts: Mapping[str, Any]) -> Iterator[str]:
    """The lines of one screen for the facts of an inspection."""
    yield f"{facts['kind']} checkpoint, {printable(facts['dialect'])} ({printable(facts['producer'])})"
    yield printable(_shape(facts))
    yield f"{count(facts['tensors'], 'tensor')}, {human(facts['bytes'])} in {count(facts['files'], 'file')}"
    yield from _table(facts)
    if not facts["refused"] or facts["modules"]:
        yield from _details(facts)
    yield from _list("dropped", (f"{d['tensor']}: {d['reason']}" for d in facts["dropped"]))
    if facts["kind"] == "canonical":
        yield from _list("repaired when it was converted", facts["repairs"])
        yield from _list("contradictions when it was converted", facts["contradictions"])
    yield from _defects(facts)
    yield verdict(facts)


def verdict(facts: Mapping[str, Any]) -> str:
    """The last line: what to do with it."""
    number = len(facts["defects"])
    if facts["refused"]:
        return "qconvert refuses it: the fatal defects say why"
    if facts["kind"] == "canonical":
        return "canonical: load it with the runtime, or export it"
    if not number:
        return "no defects found: it converts as it is"
    repaired = sum(defect["repaired"] for defect in facts["defects"])
    rest = "" if repaired == number else f", {number - repaired} to look into"
    return f"it converts: {repaired} of {count(number, 'kind')} of defects repaired{rest}"


def tensor_lines(rows: Iterable[Any]) -> Iterator[str]:
    """Every stored tensor: scheme, dtype, shape, size, file, name, and its canonical name where that differs."""
    for row in rows:
        arrow = f" -> {printable(row.canonical)}" if row.canonical not in ("", row.name) else ""
        shape = "x".join(map(str, row.shape)) or "scalar"
        yield (
            f"{printable(row.scheme):<12} {row.dtype:<8} {shape:<16} {human(row.nbytes):>9}  {printable(row.file)}  "
            f"{printable(row.name)}{arrow}"
        )


def difference(found: Any) -> Iterator[str]:
    """The lines of one screen for a `differ.Difference`."""
    how = "as they are stored, because one of them is refused" if found.compared == "stored" else "under canonical names"
    yield f"compared {count(found.tensors, 'tensor')} {how}"
    if found.compared == "canonical" and not found.stored_alike:
        yield "stored under other names, which changes no meaning"
    for title, names in (("only in A", found.only_in_a), ("only in B", found.only_in_b)):
        yield from _patterns(title, names)
    yield from _list("dtype or shape", (
        f"{entry['tensor']}: {entry['a']['dtype']} {entry['a']['shape']}, in B {entry['b']['dtype']} {entry['b']['shape']}"
        for entry in found.changed
    ))  # fmt: skip
    yield from _list("config", (
        f"{entry['field']}: {entry['a']}, in B {entry['b']}{'' if entry['matters'] else ' (changes no meaning)'}"
        for entry in found.config
    ))  # fmt: skip
    worst = sorted(found.values, key=lambda entry: -(entry["max_abs"] if entry["max_abs"] is not None else float("inf")))
    yield from _list("values, the largest difference first", (
        f"{entry['tensor']}: {entry['differ']:,} of {entry['elements']:,} {entry['dtype']} elements, "
        f"by up to {_measure(entry['max_abs'])}"
        for entry in worst
    ))  # fmt: skip
    weights = sorted(found.weights, key=lambda entry: -(entry["relative"] if entry["relative"] is not None else float("inf")))
    yield from _list("dequantised weights, the largest relative difference first", (
        f"{entry['module']}: {entry['a']}, in B {entry['b']}: {entry['differ']:,} of {entry['elements']:,}, "
        f"by up to {_measure(entry['max_abs'])}, relative {_measure(entry['relative'])}"
        for entry in weights
    ))  # fmt: skip
    yield from _list("other files", (
        f"{entry['file']}: {entry['what']}{'' if entry['matters'] else ' (changes no number)'}" for entry in found.files
    ))  # fmt: skip
    what = "the same tensors and meaning" if found.values_compared else "the same structure; values were not compared"
    yield what if found.equal else "they differ"


def _measure(value: float | None) -> str:
    return "no finite number" if value is None else f"{value:.3g}"


def _patterns(title: str, names: list[str]) -> Iterator[str]:
    yield from _list(f"{title}, {count(len(names), 'tensor')} of these kinds", (
        f"{name}{f' x {n}' if n > 1 else ''}" for name, n in patterns(names).items()
    ))  # fmt: skip

"""An inspection as one HTML page: facts, defects, a treemap of sizes, the module tree, histograms of scales per layer.

The page has no script, loads nothing and has no style attributes: its policy allows only its own style sheet, by hash.  Every
text goes through `_text`.  Modules that are alike are shown once with their number, so that the page of 400,000 tensors stays
small; the tree folds with `<details>`.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from runtime.format import SCHEMES

from . import __version__
from .errors import printable
from .inspector import Inspection, Row
from .screen import count, human, large, merged_kinds, verdict

COLOURED = frozenset({*SCHEMES, "BF16", "F16", "F32", "adapter"})
WIDTH, HEIGHT = 1140, 460  # of the treemap
CELLS = 1500  # of the treemap at most
PROBLEMS_SHOWN = 50
CHILDREN_SHOWN = 400  # of one node of the tree
NODES_SHOWN = 20_000  # of the tree
DEPTH = 30  # of the tree; what is below is one name
KINDS_SHOWN = 200
LAYERS_SHOWN = 200


def _text(value: object) -> str:
    """Text for HTML: control characters escaped, then what HTML gives a meaning."""
    return escape(printable(value), quote=True)


def _class(scheme: str) -> str:
    return f"s-{scheme}" if scheme in COLOURED else "s-other"


# -- the tree of modules ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Node:
    """A segment of names.  `leaf`: what a tensor is, "" for a module; `alike`: siblings that it stands for, itself included."""

    name: str
    nbytes: int = 0
    tensors: int = 0
    leaf: str = ""
    children: dict[str, Node] = field(default_factory=dict)
    schemes: dict[str, int] = field(default_factory=dict)
    alike: list[str] = field(default_factory=list)

    @property
    def scheme(self) -> str:
        """The scheme of most of its bytes."""
        return max(self.schemes, key=lambda scheme: self.schemes[scheme], default="other")


def tree(rows: Iterable[Row]) -> Node:
    """The tree of names, with sizes summed up."""
    root = Node("")
    for row in rows:
        node = root
        segments = row.name.split(".", DEPTH)
        for segment in ("", *segments):
            if segment or node is not root:
                node = node.children.setdefault(segment, Node(segment))
            node.nbytes += row.nbytes
            node.tensors += 1
            node.schemes[row.scheme] = node.schemes.get(row.scheme, 0) + row.nbytes
        node.leaf = f"{row.dtype} [{', '.join(map(str, row.shape))}]"
    return root


def fold(node: Node, known: dict[object, int]) -> int:
    """Let numbered siblings that are alike in everything below them stand once.  Returns a number for the look of the node."""
    looks = {name: fold(child, known) for name, child in node.children.items()}
    first: dict[int, Node] = {}
    for name in sorted(node.children, key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0)):
        child = node.children[name]
        child.alike = [name]
        if name.isdecimal() and looks[name] in first:
            first[looks[name]].alike.append(name)
            del node.children[name]
        elif name.isdecimal():
            first[looks[name]] = child
    # Children by look; numbered ones without their names, which is what makes layers alike.
    below = tuple(sorted((("" if n.isdecimal() else n), look) for n, look in looks.items()))
    return known.setdefault((node.leaf, tuple(sorted(node.schemes)), below), len(known))


def _ranges(names: Sequence[str]) -> str:
    """`0-3, 5` for the numbers 0, 1, 2, 3 and 5."""
    numbers = sorted(map(int, names))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _swatch(scheme: str) -> str:
    return f'<svg viewBox="0 0 11 11" aria-hidden="true"><rect width="11" height="11" rx="2.5" class="{_class(scheme)}"/></svg>'


def _tree(node: Node, path: str, depth: int, left: Iterator[int]) -> Iterator[str]:
    """`left`: has an item for each node that may still be shown."""
    shown = [child for child, _ in zip(list(node.children.values())[:CHILDREN_SHOWN], left)]
    for child in shown:
        several = len(child.alike) > 1
        label = _ranges(child.alike) if several else child.name
        times = f"{len(child.alike)} x " if several else ""
        size = f'<span class="size">{times}{human(child.nbytes)}</span>'
        where = f"{path}.{child.name}" if path else child.name
        if child.leaf and not child.children:
            what = f'<code>{_text(label)}</code> <span class="soft">{_text(child.leaf)}</span>{size}'
            yield f'<div class="leaf" id="{_anchor(where)}">{what}</div>'
            continue
        schemes = ", ".join(sorted(child.schemes, key=lambda s: -child.schemes[s])[:4])
        each = count(child.tensors, "tensor")
        yield (
            f'<details id="{_anchor(where)}"{" open" if depth < 1 else ""}><summary><code>{_text(label)}</code>{size}'
            f'<span class="size">{each}{" each" if several else ""}, {_text(schemes)}</span></summary>'
        )
        if child.leaf:
            yield f'<div class="leaf"><span class="soft">{_text(child.leaf)}</span></div>'
        yield from _tree(child, where, depth + 1, left)
        yield "</details>"
    if len(node.children) > len(shown):
        yield f'<div class="leaf soft">... and {len(node.children) - len(shown)} more</div>'


def _anchor(path: str) -> str:
    """An id for a module: names are hostile, so it is a digest."""
    return "m" + hashlib.blake2b(path.encode("utf-8", "backslashreplace"), digest_size=6).hexdigest()


# -- the treemap --------------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]  # x, y, width, height


def squarify(sizes: Sequence[float], box: Box) -> list[Box]:
    """Rectangles of the given sizes, largest first, that fill a box and are as square as can be.

    Source: Bruls, Huizing and van Wijk, Squarified Treemaps (2000).
    """
    x, y, w, h = box
    total = sum(sizes)
    if not sizes or total <= 0 or w <= 0 or h <= 0:
        return [(x, y, 0.0, 0.0) for _ in sizes]
    scale = w * h / total
    areas = [size * scale for size in sizes]
    boxes: list[Box] = []
    at = 0
    while at < len(areas):
        short = max(min(w, h), 1e-9)
        row, total, worst = 1, areas[at], float("inf")
        while True:
            side = max(total / short, 1e-12)
            ratio = max(max(side * side / max(a, 1e-12), a / (side * side)) for a in (areas[at], areas[at + row - 1]))
            if ratio > worst:
                row -= 1
                total -= areas[at + row]
                break
            worst = ratio
            if at + row == len(areas):
                break
            total += areas[at + row]
            row += 1
        side, offset = total / short, 0.0
        for area in areas[at : at + row]:
            length = area / max(side, 1e-12)
            boxes.append((x, y + offset, side, length) if w >= h else (x + offset, y, length, side))
            offset += length
        if w >= h:
            x, w = x + side, max(0.0, w - side)
        else:
            y, h = y + side, max(0.0, h - side)
        at += row
    return boxes


def _branches(node: Node, limit: int) -> list[tuple[str, Node]]:
    """The nodes that a treemap shows: the tree cut where there would be more than `limit`; the largest are opened first."""
    first = sorted(node.children.items(), key=lambda pair: -pair[1].nbytes)[:limit]
    found = [(name, child) for name, child in first if not _opens(name, child)]
    closed = [(-child.nbytes, name, child) for name, child in first if _opens(name, child)]
    heapify(closed)
    while closed:
        size, where, inner = heappop(closed)
        if len(found) + len(closed) + len(inner.children) > limit or -size < node.nbytes / limit:
            return [*found, (where, inner), *((name, child) for _, name, child in closed)]
        for name, child in inner.children.items():
            if _opens(f"{where}.{name}", child):
                heappush(closed, (-child.nbytes, f"{where}.{name}", child))
            else:
                found.append((f"{where}.{name}", child))
    return found


def _opens(path: str, node: Node) -> bool:
    """Whether a treemap shows what is below a node: modules, but not the single experts of a layer."""
    numbered = all(name.isdecimal() for name in node.children)
    inside = any(segment.isdecimal() for segment in path.split("."))
    return not (numbered and inside) and any(child.children for child in node.children.values())


def _group(path: str) -> str:
    """What cells are framed together: the layer that they belong to, or their root."""
    segments = path.split(".")
    at = next((i for i, s in enumerate(segments) if s.isdecimal()), None)
    return ".".join(segments[: at + 1]) if at is not None else segments[0]


@dataclass(frozen=True, slots=True)
class Cell:
    """A rectangle of the treemap: a module, or the frame around a layer when `node` is None."""

    path: str
    node: Node | None
    box: Box


def cells(root: Node) -> Iterator[Cell]:
    """The treemap: modules within the layers or parts that they belong to, each as large as its bytes."""
    groups: dict[str, list[tuple[str, Node]]] = {}
    for path, node in _branches(root, CELLS):
        if node.nbytes:
            groups.setdefault(_group(path), []).append((path, node))
    sizes = {key: sum(node.nbytes for _, node in members) for key, members in groups.items()}
    keys = sorted(groups, key=lambda key: (-sizes[key], [int(s) if s.isdecimal() else -1 for s in key.split(".")]))
    for key, outer in zip(keys, squarify([sizes[key] for key in keys], (0, 0, WIDTH, HEIGHT)), strict=True):
        members = sorted(groups[key], key=lambda pair: -pair[1].nbytes)
        boxes = squarify([node.nbytes for _, node in members], outer)
        yield from (Cell(path, node, box) for (path, node), box in zip(members, boxes, strict=True))
        yield Cell(key, None, outer)


def _treemap(shown: Sequence[Cell], root: Node) -> Iterator[str]:
    """`root`: the folded tree, to which the cells lead."""
    yield f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="sizes of modules, coloured by scheme">'
    for cell in shown:
        x, y, w, h = cell.box
        place = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"'
        if cell.node is None:
            yield f'<rect {place} class="frame"/>'
        elif w >= 0.3 and h >= 0.3:
            node = cell.node
            what = f"{human(node.nbytes)}, {', '.join(node.schemes)}, {count(node.tensors, 'tensor')}"
            label = _label(cell.path, w, h)
            name = f'<text x="{x + 4:.1f}" y="{y + 15:.1f}" class="name">{_text(label)}</text>' if label else ""
            title = f"<title>{_text(cell.path)}\n{_text(what)}</title>"
            yield f'<a href="#{_anchor(_standing_for(cell.path, root))}">'
            yield f'<rect {place} class="cell {_class(node.scheme)}">{title}</rect>{name}</a>'
    yield "</svg>"


def _standing_for(path: str, node: Node) -> str:
    """The path of the module that stands for this one in a folded tree."""
    found = []
    for segment in path.split("."):
        child = node.children.get(segment) or next((c for c in node.children.values() if segment in c.alike), None)
        if child is None:
            break
        found.append(child.name)
        node = child
    return ".".join(found)


def _label(path: str, width: float, height: float) -> str:
    """As much of a path as fits: its end, with the number of its layer before it where there is room."""
    if height < 17:
        return ""
    segments = path.split(".")
    room = int((width - 8) / 6.1)
    number = next((s for s in segments if s.isdecimal()), "")
    words = [s for s in segments if s != number] or segments
    for text in (f"{number} {'.'.join(words[-2:])}", f"{number} {words[-1]}", words[-1], number):
        if len(text.strip()) <= room and text.strip():
            return text.strip()
    return ""


# -- the sections -------------------------------------------------------------------------------------------------------


def _cards(facts: Mapping[str, Any]) -> Iterator[str]:
    bits = f"{8 * facts['bytes'] / facts['parameters']:.2f}" if facts["parameters"] else None
    cache = ", ".join(f"{n} per {kind}" for kind, n in facts["kv_cache"].items())
    cards = (
        ("stored", human(facts["bytes"])), ("parameters", facts["parameters"] and large(facts["parameters"])),
        ("bits per parameter", bits), ("tensors", f"{facts['tensors']:,}"), ("files", f"{facts['files']:,}"),
        ("layers", facts["layers"]), ("experts per layer", facts["experts"]), ("hidden size", facts["hidden_size"]),
        ("vocabulary", facts["vocab_size"]), ("head", facts["head"] and f"{facts['head']}, {facts['head_scheme'] or 'dense'}"),
        ("KV cache", f"FP8, {cache}" if cache else None), ("MTP", facts["mtp"] and count(facts["mtp"]["layers"], "layer")),
        ("towers", ", ".join(facts["towers"]) or None), ("adapters", len(facts["adapters"]) or None),
    )  # fmt: skip
    yield '<div class="facts">'
    yield from (f"<div><b>{_text(value)}</b><span>{name}</span></div>" for name, value in cards if value is not None)
    yield "</div>"


def _defects(facts: Mapping[str, Any]) -> Iterator[str]:
    if not facts["defects"]:
        return
    yield "<section><h2>Defects</h2>"
    for defect in facts["defects"]:
        good, word = ("good", "repaired") if defect["repaired"] else ("soft", "not repaired")
        repaired = f'<span class="pill {good}">{word}</span>'
        seen = f' <span class="soft">({_text(defect["seen"])})</span>' if defect["seen"] else ""
        yield (
            f'<div class="defect"><p><span class="pill {defect["severity"]}">{defect["severity"]}</span>'
            f'<span class="pill soft">engines: {defect["effect"]}</span>{repaired}</p>'
            f"<p><b>{_text(defect['title'])}</b> <span class=\"soft\">x {defect['count']:,}</span></p>"
            f'<p class="soft">{_text(defect["found"])}</p><p>Engines {_text(defect["engines"])}{seen}.</p>'
            f'<p>qconvert: {_text(defect["repair"])}.</p>'
        )
        if defect["patterns"]:
            yield "<details><summary>where</summary>"
            for name, number in defect["patterns"].items():
                yield f'<div><code>{_text(name)}</code> <span class="soft">x {number:,}</span></div>'
            yield "</details>"
        yield "</div>"
    yield "</section>"


def _sizes(facts: Mapping[str, Any], shown: Sequence[Cell], root: Node) -> Iterator[str]:
    total = max(1, facts["bytes"])
    yield "<section><h2>Where the bytes are</h2>"
    yield from _treemap(shown, root)
    yield '<ul class="legend">'
    for scheme, nbytes in facts["bytes_by_scheme"].items():
        share = f"{human(nbytes)}, {100 * nbytes / total:.1f} %"
        yield f'<li>{_swatch(scheme)}{_text(scheme)} <span class="soft">{share}</span></li>'
    yield "</ul></section><section><h2>Kinds of modules</h2><table>"
    yield '<tr><th>module</th><th>scheme</th><th class="n">modules</th><th class="n">bytes</th><th class="n">share</th>'
    yield "<th></th></tr>"
    kinds = merged_kinds(facts)
    for row in kinds[:KINDS_SHOWN]:
        inputs = f", {row['activations']} inputs" if row["activations"] else ""
        yield (
            f"<tr><td><code>{_text(row['kind'])}</code></td><td>{_text(row['scheme'] + inputs)}</td>"
            f'<td class="n">{row["modules"]:,}</td><td class="n">{human(row["bytes"])}</td>'
            f'<td class="n">{100 * row["share"]:.1f} %</td><td><svg class="bar" viewBox="0 0 130 9" aria-hidden="true">'
            f'<rect width="130" height="9" rx="4" class="track"/>'
            f'<rect width="{130 * row["share"]:.1f}" height="9" rx="4" class="{_class(row["scheme"])}"/></svg></td></tr>'
        )
    if len(kinds) > KINDS_SHOWN:
        yield f'<tr><td class="soft">... and {len(kinds) - KINDS_SHOWN} more</td></tr>'
    yield "</table></section>"


def _histograms(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    used = [i for e in entries for counts in (*e["weight"].values(), e["input"]) for i, n in enumerate(counts) if n]
    if not used:
        return
    from .scales import LOWEST, PER_OCTAVE

    first, last = max(0, min(used) - 1), max(used) + 2
    step = 170 / (last - first)
    every = 4 * -(-(last - first) // (PER_OCTAVE * 24))
    octaves = (o for o in range(LOWEST, LOWEST + last) if o % every == 0)
    marks = [(o, ((o - LOWEST) * PER_OCTAVE - first) * step) for o in octaves]
    axis = "".join(
        f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="46" class="grid"/><text x="{x + 1:.1f}" y="64" class="axis">{o}</text>'
        for o, x in marks if 0 <= x < 165
    )  # fmt: skip
    yield (
        '<section><h2>Scales per layer</h2><p class="sub">How the multipliers of weight codes are spread: bars in the colours'
        " of the schemes. Below them, where the input scales are. The axis is the power of two, and the same for all layers. Of"
        ' block scales a sample is read.</p><div class="small">'
    )
    for entry in entries[:LAYERS_SHOWN]:
        spread = f"{entry['min']:.2g} to {entry['max']:.2g}" if "min" in entry else "none"
        title = _text(f"{entry['layer']}: {', '.join(entry['weight'])}, {spread}")
        bars = "".join(_bars(entry, first, last, step))
        yield (
            f'<figure><svg viewBox="0 0 170 66" role="img" aria-label="{title}">{axis}{bars}'
            f"<title>{title}</title></svg><figcaption>{_text(entry['layer'])} &middot; {spread}</figcaption></figure>"
        )
    yield "</div>"
    if len(entries) > LAYERS_SHOWN:
        yield f'<p class="sub">... and {len(entries) - LAYERS_SHOWN} more layers</p>'
    yield "</section>"


def _bars(entry: Mapping[str, Any], first: int, last: int, step: float) -> Iterator[str]:
    """The bars of one layer, those of its schemes on top of each other, and the row of its input scales."""
    weights = entry["weight"]
    top = max(1, *(sum(counts[i] for counts in weights.values()) for i in range(first, min(last, len(entry["input"])))))
    for i in range(first, min(last, len(entry["input"]))):
        x, y = (i - first) * step, 46.0
        for scheme, counts in weights.items():
            height = 44 * counts[i] / top
            y -= height
            if height:
                box = f'x="{x:.1f}" y="{y:.2f}" width="{step * 0.88:.1f}" height="{height:.2f}"'
                yield f'<rect {box} class="{_class(scheme)}"/>'
        if entry["input"][i]:
            yield f'<rect x="{x:.1f}" y="49" width="{step * 0.88:.1f}" height="4" class="input"/>'


def _lists(facts: Mapping[str, Any]) -> Iterator[str]:
    dropped = [f"{d['tensor']}: {d['reason']}" for d in facts["dropped"]]
    problems = [
        f"{p['file']}: {p['tensor']}: expected {p['expected']}, found {p['found']}; {p['remedy']}" for p in facts["problems"]
    ]
    title = "What a conversion mends" if facts["kind"] == "source" else "What the conversion mended"
    for name, lines in (("Why it is refused", problems), (title, facts["repairs"]), ("Contradictions", facts["contradictions"]),
                        ("Dropped", dropped)):  # fmt: skip
        if lines:
            yield f"<section><h2>{name}</h2>"
            yield from (f"<div><code>{_text(line)}</code></div>" for line in lines[:PROBLEMS_SHOWN])
            yield f'<div class="soft">... and {len(lines) - PROBLEMS_SHOWN} more</div>' if len(lines) > PROBLEMS_SHOWN else ""
            yield "</section>"


def render(found: Inspection) -> Iterator[str]:
    """The page, in pieces."""
    facts = found.facts
    style = (files(__package__) / "page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    name = Path(facts["checkpoint"]).name or facts["checkpoint"]
    root = tree(found.rows)
    shown = list(cells(root))
    fold(root, {})
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
        f"<title>{_text(name)} - qconvert inspect</title><style>{style}</style></head><body><main>"
    )
    types = ", ".join(f"{n} {kind}" for kind, n in facts["layer_types"].items())
    what = f"{facts['kind']} checkpoint, {facts['family']}, {facts['dialect']} ({facts['producer']})"
    yield f'<header><h1>{_text(name)}</h1><p class="sub">{_text(what)}{f" &middot; {_text(types)}" if types else ""}</p>'
    yield f'<p class="verdict {"bad" if facts["refused"] else "good"}">{_text(verdict(facts))}</p></header>'
    yield from _cards(facts)
    yield from _defects(facts)
    if found.rows:
        yield from _sizes(facts, shown, root)
    yield from _histograms(found.histograms)
    if found.rows:
        yield '<section><h2>Modules as they are stored</h2><p class="sub">Numbered modules that are alike stand once.</p>'
        yield '<div class="tree">'
        yield from _tree(root, "", 0, iter(range(NODES_SHOWN)))
        yield "</div></section>"
    yield from _lists(facts)
    yield f'<p class="sub">qconvert {_text(__version__)} inspect</p></main></body></html>\n'


def write_page(path: str | os.PathLike[str], found: Inspection) -> None:
    """Write the page of an inspection to a file, which is there complete or not at all."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.writelines(f"{piece}\n" for piece in render(found))
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)

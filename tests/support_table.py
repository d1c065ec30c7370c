"""README's support table, made from the registries.  `python tests/support_table.py` writes it; a test holds README to it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from convert.dialects import DIALECTS  # noqa: E402  (after the path is set)
from convert.families import FAMILIES  # noqa: E402
from runtime.format import DENSE_DTYPES  # noqa: E402

BEGIN, END = "<!-- support table: made by tests/support_table.py -->\n", "<!-- end of support table -->\n"
NETWORKS = ROOT / "runtime" / "models" / "__init__.py"


def table() -> str:
    """Two tables: what each dialect stores, and what each family is."""
    lines = ["| dialect | schemes that it is converted from |", "|---|---|"]
    for dialect in DIALECTS:
        schemes = dict.fromkeys(e.scheme for e in dialect.encodings)
        lines.append(f"| `{dialect.name}` | {', '.join(schemes)} |")
    lines.append(f"| not quantised | {', '.join(DENSE_DTYPES)} |")
    runs = NETWORKS.read_text(encoding="utf-8")
    lines += ["", "| family | `model_type` | experts | carried | runtime |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        experts = any(getattr(i, "experts", "") for p in family.parts for items in (p.layers or {}).values() for i in items)
        carried = ", ".join(p.root for p in family.parts if p.carried) or "-"
        types = ", ".join(f"`{t}`" for t in family.model_types)
        runtime = "yes" if f'"{family.name}"' in runs else "not yet"
        lines.append(f"| `{family.name}` | {types} | {'yes' if experts else '-'} | {carried} | {runtime} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table into README.md between its markers."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()

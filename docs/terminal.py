"""Makes docs/terminal.svg, the README's picture of a terminal, by running its commands: `python docs/terminal.py`."""

from __future__ import annotations

import html
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = (  # what is shown, what is run, lines of the answer that are shown
    ("qconvert inspect model", ["-m", "convert", "inspect", "model"], (0, 11, 16, 28)),
    ("qconvert model out --verify", ["-m", "convert", "model", "out", "--verify"], None),
    (
        'python -m runtime.generate out --prompt "Four score and seven years ago"',
        ["-m", "runtime.generate", "out", "--prompt", "Four score and seven years ago", "--max-new-tokens", "33"],
        None,
    ),
)
COLUMNS = 112
CELL, LINE, MARGIN = 7.4, 17, 18  # pixels
COLOURS = {"HIGH": "#ff7b72", "MEDIUM": "#e3b341", "LOW": "#79c0ff"}


def screen() -> list[tuple[str, str]]:
    """(colour, text) of every line."""
    lines: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "samples" / "qwen3_5-modelopt-mixed", Path(folder) / "model")
        for shown, arguments, wanted in COMMANDS:
            ran = subprocess.run(
                [sys.executable, *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS)},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            said = ran.stdout.rstrip("\n").split("\n")
            if wanted is not None:
                first, last, begin, end = wanted
                said = [*said[first:last], "...", *said[begin:end], "...", said[-1]]
            lines.append(("#7ee787", f"$ {shown}"))
            for text in said:
                colour = next((c for word, c in COLOURS.items() if text.strip().startswith(word)), "#e6edf3")
                cut = text if len(text) <= COLUMNS else text[: COLUMNS - 3] + "..."
                lines.append((colour, cut))
            lines.append(("", ""))
    return lines[:-1]


def picture(lines: list[tuple[str, str]]) -> str:
    """The SVG."""
    width, height = int(COLUMNS * CELL + 2 * MARGIN), len(lines) * LINE + 2 * MARGIN
    rows = [
        f'<text x="{MARGIN}" y="{MARGIN + LINE * number + 12}" fill="{colour}" xml:space="preserve">{html.escape(text)}</text>'
        for number, (colour, text) in enumerate(lines)
        if text
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n'
        f'<g font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="12.2">\n'
        + "\n".join(rows)
        + "\n</g>\n</svg>\n"
    )


if __name__ == "__main__":
    (ROOT / "docs" / "terminal.svg").write_text(picture(screen()), encoding="utf-8")

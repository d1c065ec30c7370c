"""What the commands share: types of arguments, options, progress, notes, and how results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from .errors import printable
from .events import Events

F = TypeVar("F", bound=Callable[..., Any])
ENGINES = click.Choice(["threads", "ray"])
HELP = {"help_option_names": ["-h", "--help"]}
CONTEXT = {**HELP, "auto_envvar_prefix": "QCONVERT"}  # for every command alike: --shard-size from QCONVERT_SHARD_SIZE
SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class ByteSize(click.ParamType[int] if TYPE_CHECKING else click.ParamType):  # type: ignore[misc]
    """A number of bytes such as 5GB or 500MB (decimal units)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of a size; fails with a usage message."""
        if isinstance(value, int):
            return value
        digits = value.strip().rstrip("BKMGTbkmgt ")
        unit = value.strip()[len(digits) :].strip().upper()
        try:
            size = int(float(digits) * SIZE_UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is not a size such as 5GB or 500MB", param, ctx)
        return size


class Directory(click.ParamType[str] if TYPE_CHECKING else click.ParamType):  # type: ignore[misc]
    """The path of a directory; an empty one, as an unset variable gives, is a mistake."""

    name = "directory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path; fails with a usage message when it is empty."""
        if not value:
            self.fail("the path is empty", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete directories."""
        return [CompletionItem(incomplete, type="dir")]


def events() -> Events:
    """How the command that runs reports."""
    return click.get_current_context().find_root().ensure_object(Events)


def _wants(field: str) -> Callable[[click.Context, click.Parameter, bool], bool]:
    def note(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
        setattr(ctx.find_root().ensure_object(Events), field, value)
        return value

    return note


def json_option(meaning: str) -> Callable[[F], F]:
    """`--json`: the result, or the reason why there is none, as JSON on standard output."""
    note = _wants("as_json")
    return click.option("--json", "as_json", is_flag=True, envvar="QCONVERT_JSON", callback=note, is_eager=True, help=meaning)


def log_option(command: F) -> F:
    """`--log-json`: events as JSON lines on standard error."""
    meaning = "Events as JSON lines on standard error."
    return click.option(
        "--log-json", is_flag=True, expose_value=False, callback=_wants("lines"), is_eager=True, help=meaning
    )(command)


@contextmanager
def progress_bar(total_label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, events with `--log-json`, nothing in a pipe."""
    log = events()
    if log.lines:
        yield log.progress()
        return
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc=total_label, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def emit(value: Any) -> None:
    """Print a result as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=True))


def note(lines: Sequence[str], skipped: Mapping[str, str]) -> None:
    """Notes on standard error, or events: `lines`, and files that were not copied, unless others replace them."""
    from .source import REPLACED

    notes = list(lines)
    for name, reason in sorted(skipped.items()):
        if name not in REPLACED and not name.endswith(".safetensors.index.json"):
            notes.append(f"not copied: {name}: {reason}")
    log = events()
    for line in notes:
        log.emit("note", message=line)
        if not log.lines:
            click.echo(f"note: {printable(line)}", err=True)

"""`qconvert inspect` and `qconvert diff`."""

from __future__ import annotations

import click

from ..errors import ConvertError, Problem
from ..options import CONTEXT, Directory, emit, events, json_option, log_option
from ..screen import difference, screen, tensor_lines


@click.command("inspect", context_settings=CONTEXT)
@click.argument("directory", metavar="DIR", type=Directory())
@click.option("--tensors", is_flag=True, help="List every stored tensor; with --json as tensor_list.")
@json_option("Print everything as JSON (docs/inspect.md).")
@click.option("--html", "html_file", metavar="FILE", type=click.Path(dir_okay=False), help="Write one self-contained page.")
@click.option(
    "--values/--no-values", default=None, help="Read scales too, not headers and configs alone; default: of a directory, yes."
)
@log_option
def inspect_command(directory: str, tensors: bool, as_json: bool, html_file: str | None, values: bool | None) -> None:
    """Say what the checkpoint in DIR is: producer, family, schemes, sizes, and what is wrong with it.

    DIR may be any checkpoint: one to convert, a canonical one, or one that is refused (exit code 1, with the reasons).
    """
    from ..inspector import inspect

    found = inspect(directory, values=values, histograms=html_file is not None)
    if html_file is not None:
        from ..page import write_page

        write_page(html_file, found)
    facts = found.facts
    if as_json:
        emit(facts | ({"tensor_list": [row.to_json() for row in found.rows]} if tensors else {}))
    elif facts["kind"] != "unreadable":
        for line in tensor_lines(found.rows) if tensors else screen(facts):
            click.echo(line)
    if facts["refused"]:
        events().as_json = False  # the facts hold the reasons
        raise ConvertError([Problem(**problem) for problem in facts["problems"]])


@click.command("diff", context_settings=CONTEXT)
@click.argument("a", metavar="A", type=Directory())
@click.argument("b", metavar="B", type=Directory())
@json_option("Print the differences as JSON.")
@click.option("--values/--no-values", default=True, show_default=True, help="Compare values too, not structure alone.")
@log_option
def diff_command(a: str, b: str, as_json: bool, values: bool) -> int:
    """Say what differs between the checkpoints A and B: tensors, configs, values.  Exit code 0: nothing; 1: they differ.

    Each may be a checkpoint to convert or a canonical one; both are compared under canonical names.
    """
    from ..differ import diff_checkpoints

    found = diff_checkpoints(a, b, values=values)
    if as_json:
        emit(found.to_json())
    else:
        for line in difference(found):
            click.echo(line)
    return 0 if found.equal else 1

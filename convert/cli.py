"""The command line: parse, call the API, print, exit code.  Results go to stdout, everything else to stderr.

`qconvert IN OUT` is the main job, so a first argument that is not a command's name starts `convert`.  The commands are in
`convert.commands`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from . import __version__
from .commands.batch import batch_command
from .commands.conversion import convert_command, export_command, verify_command
from .commands.jobs import commit_command, plan_command, run_job_command
from .commands.looking import diff_command, inspect_command
from .errors import ConvertError, MachineError, Problem, UsageError, printable
from .events import Events
from .options import HELP


class DefaultCommand(click.Group):
    """A group in which `qconvert IN OUT` means `qconvert convert IN OUT`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the name of the main command when the first argument is none."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an interrupt becomes click's own, before click writes an empty line among events."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.Abort from error

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Directories, as IN may come first; then commands and options."""
        return [CompletionItem(incomplete, type="dir"), *super().shell_complete(ctx, incomplete)]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The main job first."""
        formatter.write_usage("qconvert", "IN OUT [OPTIONS]")
        formatter.write_usage("qconvert", "COMMAND [ARGS]...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options of the main job, then the other commands."""
        main = self.commands["convert"]
        records = [p.get_help_record(ctx) for p in main.get_params(ctx)]
        with formatter.section("Options of qconvert IN OUT"):
            formatter.write_dl([r for r in records if r is not None])
        self.format_commands(ctx, formatter)


@click.group(cls=DefaultCommand, context_settings=HELP)
@click.version_option(__version__, prog_name="qconvert")
def cli() -> None:
    """Bring a quantised checkpoint into the one canonical form, exactly.

    \b
    qconvert IN OUT              convert; OUT is complete, or absent with the reason
    qconvert IN OUT --dry-run    show what would be renamed, fused, expanded, dropped
    qconvert inspect DIR         what a checkpoint is, and what is wrong with it
    qconvert diff A B            what differs between two checkpoints
    qconvert verify IN OUT       prove OUT against IN, element by element
    qconvert export OUT DIR      back to Hugging Face names, for transformers, vLLM or SGLang
    qconvert batch JOBS          many checkpoints, one report
    qconvert plan IN OUT -o FILE jobs for a scheduler: run-job, commit

    Exit codes: 0 done, 1 the checkpoint is refused, 2 usage, 3 the machine failed, 130 interrupted.
    Every option has a default in the environment: --shard-size in QCONVERT_SHARD_SIZE, and so on.
    """


for command in (
    convert_command, inspect_command, diff_command, verify_command, export_command,
    batch_command, plan_command, run_job_command, commit_command,
):  # fmt: skip
    cli.add_command(command)

INTERRUPTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def _interrupted(*_: object) -> NoReturn:
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)  # cleaning up is not interrupted again
    raise KeyboardInterrupt


def _hint(error: BaseException) -> str:
    """How to go on after an interrupt, which click wraps."""
    return str(error.__cause__ or error) or "OUT is as it was before: run the same command again"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.  Every error that input can cause ends here as lines on stderr."""
    log = Events()
    before = {number: signal.signal(number, _interrupted) for number in INTERRUPTS}
    try:
        args = list(sys.argv[1:] if argv is None else argv)
        code = cli.main(args=args, prog_name="qconvert", standalone_mode=False, obj=log)
        return code if isinstance(code, int) else 0
    except ConvertError as error:
        log.failed(error)
        for line in str(error).splitlines() if not log.lines else ():
            click.echo(f"qconvert: {line}", err=True)
        return error.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        log.failed(UsageError(Problem("", "", "a command as --help shows it", error.format_message(), "see qconvert --help")))
        if not log.lines:
            error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        log.emit("interrupted", exit_code=130, remedy=_hint(error))
        if not log.lines:
            click.echo(f"qconvert: interrupted; {_hint(error)}", err=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        threads = "start new thread" in str(error)  # Python has no class of its own for it
        if isinstance(error, RuntimeError) and not threads:
            raise
        what = "threads" if threads else "memory"
        remedy = "free some, or take fewer --workers, and run again: with --resume it continues"
        short = MachineError(Problem("", "", f"{what} enough for this", "none left", remedy))
        log.failed(short)
        if not log.lines:
            click.echo(f"qconvert: {short}", err=True)
        return 3
    except OSError as error:
        where, found = str(error.filename or ""), error.strerror or repr(error)
        remedy = "check the path, its permissions and the disk"
        log.failed(MachineError(Problem(where, "", "a path that can be used", found, remedy)))
        if not log.lines:
            click.echo(f"qconvert: {f'{printable(where)}: ' if where else ''}{found}; {remedy}", err=True)
        return 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

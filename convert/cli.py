"""The command line: parse, call the API, print, exit code.  Results go to stdout, everything else to stderr.

`qconvert IN OUT` is the main job, so a first argument that is not a command's name starts `convert`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import __version__
from .errors import ConvertError, printable

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


class DefaultCommand(click.Group):
    """A group in which `qconvert IN OUT` means `qconvert convert IN OUT`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the name of the main command when the first argument is none."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["convert", *args]
        return super().parse_args(ctx, args)

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


@contextmanager
def progress_bar(total_label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, nothing in a pipe."""
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


def human(nbytes: float) -> str:
    """A size for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


CONTEXT = {"help_option_names": ["-h", "--help"]}


@click.group(cls=DefaultCommand, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="qconvert")
def cli() -> None:
    """Bring a quantised checkpoint into the one canonical form, exactly.

    \b
    qconvert IN OUT              convert; OUT is complete, or absent with the reason
    qconvert IN OUT --dry-run    show what would be renamed, fused, expanded, dropped
    qconvert inspect DIR         what a checkpoint is
    qconvert verify IN OUT       prove OUT against IN, element by element
    qconvert export OUT DIR      back to Hugging Face names, dequantised

    Exit codes: 0 done, 1 the checkpoint is refused, 2 usage, 3 the machine failed, 130 interrupted.
    """


def _adapter_line(adapter: dict[str, Any]) -> str:
    """One LoRA adapter, in one line."""
    config, count = adapter["config"], len(adapter["tensors"])
    what = f"LoRA r {config['r']}, lora_alpha {config['lora_alpha']}, {count} tensors, {human(adapter['bytes'])}"
    return printable(f"adapter {adapter['name']}: {what}, in {adapter['directory']}/")


def _print_plan(plan: Any) -> None:
    """A plan for people: what happens to how many tensors, with examples, then everything unusual."""
    from .plan import ACTIONS

    click.echo(
        f"{plan.config.family}, {plan.dialect} ({printable(plan.producer)}): {len(plan.source.tensors)} tensors -> "
        f"{len(plan.steps)} tensors, {human(plan.total_bytes)} in {len(plan.shards)} files"
    )
    for action, meaning in ACTIONS.items():
        steps = [s for s in plan.steps if plan.action(s) == action]
        if not steps:
            continue
        click.echo(f"\n{action} ({len(steps)}): {meaning}")
        for step in steps[:3]:
            sources = " + ".join(
                printable(t.source) + (f" x{t.repeat}" if t.repeat > 1 else "") for t in step.terms
            )
            click.echo(f"  {sources}\n    -> {printable(step.name)} {step.dtype} {list(step.shape)}")
        if len(steps) > 3:
            click.echo(f"  ... and {len(steps) - 3} more")
    click.echo(f"\ndrop ({len(plan.dropped)})")
    for dropped in plan.dropped:
        click.echo(f"  {printable(dropped.tensor)}: {dropped.reason}")
    for adapter in plan.adapters:
        click.echo(f"\n{_adapter_line(adapter.to_json())}")
        for new, info in adapter.tensors[:3]:
            click.echo(f"  {printable(info.name)}\n    -> {printable(new)} {info.dtype} {list(info.shape)}")
        if len(adapter.tensors) > 3:
            click.echo(f"  ... and {len(adapter.tensors) - 3} more")
    for title, lines in (("repairs", plan.repairs), ("contradictions", plan.contradictions)):
        click.echo(f"\n{title} ({len(lines)})")
        for line in lines:
            click.echo(f"  {printable(line)}")
    for name, reason in sorted(plan.source.skipped.items()):
        click.echo(f"not copied: {printable(name)}: {reason}")


def _warn(lines: Sequence[str], skipped: dict[str, str]) -> None:
    from .source import REPLACED

    for line in lines:
        click.echo(f"note: {printable(line)}", err=True)
    for name, reason in sorted(skipped.items()):
        if name not in REPLACED and not name.endswith(".safetensors.index.json"):
            click.echo(f"note: not copied: {printable(name)}: {reason}", err=True)


@cli.command("convert", context_settings=CONTEXT)
@click.argument("in_dir", metavar="IN", type=Directory())
@click.argument("out_dir", metavar="OUT", type=Directory())
@click.option("--dry-run", is_flag=True, help="Show the plan; read headers only and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report (or the plan) as JSON.")
@click.option("--verify", is_flag=True, help="Prove the result against IN before OUT appears.")
@click.option("--force", is_flag=True, help="Replace a non-empty OUT, once the new one is complete.")
@click.option("--workers", type=click.IntRange(1, 64), default=None, help="Threads that write files.")
@click.option("--resume", is_flag=True, help="Continue a run that was killed; the result is the same.")
@click.option("--shard-size", type=ByteSize(), default=None, help="Data per file; default: as in IN, at most 5GB.")
@click.option("--no-hash", is_flag=True, help="Do not record SHA-256 digests.")
def convert_command(
    in_dir: str,
    out_dir: str,
    dry_run: bool,
    as_json: bool,
    verify: bool,
    force: bool,
    workers: int | None,
    resume: bool,
    shard_size: int | None,
    no_hash: bool,
) -> None:
    """Convert the checkpoint in IN into a canonical one in OUT.

    \b
    Example:  qconvert Qwen3.5-27B-NVFP4 canonical --verify
    """
    if dry_run:
        from .planner import plan_conversion

        plan = plan_conversion(in_dir, shard_size)
        if as_json:
            emit(plan.to_json())
        else:
            _print_plan(plan)
        return
    from .executor import convert_checkpoint

    with progress_bar("converting") as progress:
        report = convert_checkpoint(
            in_dir,
            out_dir,
            workers=workers,
            shard_size=shard_size,
            force=force,
            resume=resume,
            verify=verify,
            hashes=not no_hash,
            progress=progress,
        )
    _warn(report.contradictions, report.skipped_files)
    if as_json:
        emit(report.to_json())
        return
    actions = ", ".join(f"{count} {action}" for action, count in report.actions.items())
    click.echo(f"{printable(out_dir)}: {report.tensors} tensors, {human(report.bytes)} ({actions})")
    if verify:
        click.echo(f"verified: {report.verified['elements']} elements equal")


@cli.command("inspect", context_settings=CONTEXT)
@click.argument("directory", metavar="DIR", type=Directory())
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect_command(directory: str, as_json: bool) -> None:
    """Say what the checkpoint in DIR is: producer, family, schemes, sizes, defects."""
    from .inspector import inspect_checkpoint

    facts = inspect_checkpoint(directory)
    if as_json:
        emit(facts)
        return
    click.echo(f"{facts['kind']} checkpoint, {printable(facts['dialect'])} ({printable(facts['producer'])})")
    click.echo(
        printable(
            f"family {facts['family']}: {facts['layers']} layers, hidden {facts['hidden_size']}, "
            f"vocabulary {facts['vocab_size']}, head {facts['head']}"
        )
    )
    click.echo(f"{facts['tensors']} tensors, {human(facts['bytes'])} in {facts['files']} files")
    total = max(1, facts["bytes"])
    for scheme, nbytes in facts["bytes_by_scheme"].items():
        click.echo(f"  {scheme:<12} {human(nbytes):>10}  {100 * nbytes / total:5.1f} %")
    click.echo("quantised modules" if facts["schemes"] else "no quantised modules")
    for kind, counts in facts["schemes"].items():
        click.echo(f"  {printable(kind):<42} " + "; ".join(f"{n} x {scheme}" for scheme, n in counts.items()))
    for name, parts in facts["unfused"].items():
        click.echo(f"  not fused: {printable(name)} ({printable(', '.join(parts))})")
    cache = ", ".join(f"{count} layers per {kind}" for kind, count in facts["kv_cache"].items())
    click.echo(f"KV cache: {'FP8, ' + cache if cache else 'not quantised'}")
    click.echo(f"carried: {printable(', '.join(facts['carried'])) or 'nothing'}")
    for title in ("repairs", "contradictions"):
        click.echo(f"{title}: {len(facts[title]) or 'none'}")
        for line in facts[title]:
            click.echo(f"  {printable(line)}")
    for dropped in facts["dropped"]:
        click.echo(f"  dropped {printable(dropped['tensor'])}: {printable(dropped['reason'])}")
    for adapter in facts["adapters"]:
        click.echo(_adapter_line(adapter))


@cli.command("verify", context_settings=CONTEXT)
@click.argument("directories", metavar="[IN] OUT", nargs=-1, required=True, type=Directory())
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def verify_command(directories: tuple[str, ...], as_json: bool) -> None:
    """Prove that OUT holds exactly what IN holds; with OUT alone, check its files against their digests."""
    if len(directories) > 2:
        raise click.UsageError("give IN and OUT, or OUT alone")
    in_dir, out_dir = directories if len(directories) == 2 else (None, directories[0])
    from dataclasses import asdict

    from .verifier import verify_conversion, verify_digests

    if in_dir is None:
        files = verify_digests(out_dir)
        if as_json:
            emit({"files": files})
        else:
            click.echo(f"{printable(out_dir)}: {files} files have the digests of their conversion")
        return
    result = verify_conversion(in_dir, out_dir)
    if as_json:
        emit(asdict(result))
    else:
        click.echo(
            f"{printable(out_dir)}: {result.tensors} tensors, {result.elements} elements ({human(result.bytes)}) and "
            f"{result.side_files} other files equal {printable(in_dir)}"
        )


@cli.command("export", context_settings=CONTEXT)
@click.argument("out_dir", metavar="OUT", type=Directory())
@click.argument("dest", metavar="DIR", type=Directory())
@click.option("--to", type=click.Choice(["dense"]), default="dense", show_default=True, help="Form to export to.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--force", is_flag=True, help="Replace a non-empty DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def export_command(out_dir: str, dest: str, to: str, dtype: str, force: bool, as_json: bool) -> None:
    """Write the canonical checkpoint OUT to DIR under Hugging Face names, as transformers loads it."""
    from .exporter import export_checkpoint

    summary = export_checkpoint(out_dir, dest, to=to, dtype=dtype, force=force)
    if as_json:
        emit(summary)
    else:
        click.echo(f"{printable(dest)}: {summary['tensors']} tensors, {human(summary['bytes'])} in {summary['files']} files")


INTERRUPTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def _interrupted(*_: object) -> NoReturn:
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)  # cleaning up is not interrupted again
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.  Every error that input can cause ends here as lines on stderr."""
    before = {number: signal.signal(number, _interrupted) for number in INTERRUPTS}
    try:
        cli.main(args=list(sys.argv[1:] if argv is None else argv), prog_name="qconvert", standalone_mode=False)
        return 0
    except ConvertError as error:
        for line in str(error).splitlines():
            click.echo(f"qconvert: {line}", err=True)
        return error.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        hint = str(error.__cause__ or error)  # click wraps the interrupt, which says how to continue
        click.echo(f"qconvert: interrupted; {hint or 'OUT is as it was before: run the same command again'}", err=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{printable(error.filename)}: " if error.filename else ""
        click.echo(f"qconvert: {where}{error.strerror or error!r}; check the path, its permissions and the disk", err=True)
        return 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

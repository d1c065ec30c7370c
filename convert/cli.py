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
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from . import __version__
from .errors import ConvertError, MachineError, Problem, UsageError, printable
from .events import Events
from .screen import adapter_line, difference, human, screen, tensor_lines

if TYPE_CHECKING:
    from .batch import JobRun
    from .executor import Report

F = TypeVar("F", bound=Callable[..., Any])
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


SHOWN_RUNNING = 3  # jobs beside the bar of a batch
ENGINES = click.Choice(["threads", "ray"])
HELP = {"help_option_names": ["-h", "--help"]}
CONTEXT = {**HELP, "auto_envvar_prefix": "QCONVERT"}  # for every command alike: --shard-size from QCONVERT_SHARD_SIZE


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


SUMMARY = ("family", "dialect", "tensors", "bytes")  # of a report, for the event that a conversion is done


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
        click.echo(f"\n{adapter_line(adapter.to_json())}")
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

    notes = list(lines)
    for name, reason in sorted(skipped.items()):
        if name not in REPLACED and not name.endswith(".safetensors.index.json"):
            notes.append(f"not copied: {name}: {reason}")
    log = events()
    for note in notes:
        log.emit("note", message=note)
        if not log.lines:
            click.echo(f"note: {printable(note)}", err=True)


@cli.command("convert", context_settings=CONTEXT)
@click.argument("in_dir", metavar="IN", type=Directory())
@click.argument("out_dir", metavar="OUT", type=Directory())
@click.option("--dry-run", is_flag=True, help="Show the plan; read headers only and write nothing.")
@json_option("Print the report (or the plan) as JSON.")
@log_option
@click.option("--verify", is_flag=True, help="Prove the result against IN before OUT appears.")
@click.option("--force", is_flag=True, help="Replace a non-empty OUT, once the new one is complete.")
@click.option("--workers", type=click.IntRange(1, 64), default=None, help="Threads that write files.")
@click.option("--resume", is_flag=True, help="Continue a run that was killed; the result is the same.")
@click.option("--shard-size", type=ByteSize(), default=None, help="Data per file; default: as in IN, at most 5GB.")
@click.option("--no-hash", is_flag=True, help="Do not record digests.")
@click.option("--engine", type=ENGINES, default="threads", show_default=True, help="ray: on a cluster.")
@click.option("--address", help="Of the Ray cluster; default: RAY_ADDRESS, or one started for this run.")
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
    engine: str,
    address: str | None,
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
    if address is not None and engine != "ray":
        raise click.UsageError("--address is for --engine ray")
    carry_out: Callable[..., Report]
    if engine == "ray":
        from .ray_engine import convert_on_ray

        carry_out = partial(convert_on_ray, address=address)
    else:
        from .executor import convert_checkpoint

        carry_out = convert_checkpoint
    log = events()
    log.emit("start", command="convert", **{"in": in_dir, "out": out_dir})
    with progress_bar("converting") as progress:
        report = carry_out(
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
    _print_report(report, out_dir, as_json)


def _print_report(report: Report, out_dir: str, as_json: bool) -> None:
    _warn(report.contradictions, report.skipped_files)
    events().emit("done", **{key: report.data[key] for key in SUMMARY})
    if as_json:
        emit(report.to_json())
        return
    actions = ", ".join(f"{count} {action}" for action, count in report.actions.items())
    click.echo(f"{printable(out_dir)}: {report.tensors} tensors, {human(report.bytes)} ({actions})")
    if "verified" in report.data:
        click.echo(f"verified: {report.verified['elements']} elements equal")


@cli.command("inspect", context_settings=CONTEXT)
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
    from .inspector import inspect

    found = inspect(directory, values=values, histograms=html_file is not None)
    if html_file is not None:
        from .page import write_page

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


@cli.command("diff", context_settings=CONTEXT)
@click.argument("a", metavar="A", type=Directory())
@click.argument("b", metavar="B", type=Directory())
@json_option("Print the differences as JSON.")
@click.option("--values/--no-values", default=True, show_default=True, help="Compare values too, not structure alone.")
@log_option
def diff_command(a: str, b: str, as_json: bool, values: bool) -> int:
    """Say what differs between the checkpoints A and B: tensors, configs, values.  Exit code 0: nothing; 1: they differ.

    Each may be a checkpoint to convert or a canonical one; both are compared under canonical names.
    """
    from .differ import diff_checkpoints

    found = diff_checkpoints(a, b, values=values)
    if as_json:
        emit(found.to_json())
    else:
        for line in difference(found):
            click.echo(line)
    return 0 if found.equal else 1


@cli.command("verify", context_settings=CONTEXT)
@click.argument("directories", metavar="[IN] OUT", nargs=-1, required=True, type=Directory())
@json_option("Print the counts as JSON.")
@log_option
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
@click.option("--to", type=click.Choice(["dense", "compressed-tensors"]), default="dense", show_default=True, help="Form.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True, help="Of dense.")
@click.option("--fp8", type=click.Choice(["auto", "tensor", "channel"]), default="auto", show_default=True,
              help="Per-tensor FP8 in compressed-tensors; auto: per channel where engines would else requantise.")
@click.option("--requantize", is_flag=True, help="Change what has no exact form, and say by how much.")
@click.option("--force", is_flag=True, help="Replace a non-empty DIR.")
@json_option("Print the summary as JSON.")
@log_option
def export_command(
    out_dir: str, dest: str, to: str, dtype: str, fp8: str, requantize: bool, force: bool, as_json: bool
) -> None:
    """Write the canonical checkpoint OUT to DIR under Hugging Face names: dense for transformers, compressed for engines."""
    from .exporter import export_checkpoint

    summary = export_checkpoint(out_dir, dest, to=to, dtype=dtype, fp8=fp8, requantize=requantize, force=force)
    notes = list(summary.get("notes", ()))
    changed = [c for c in summary.get("requantized", ()) if "relative_error" in c]
    if changed:
        worst = max(changed, key=lambda c: float(c["relative_error"]))
        error = f"relative error up to {worst['relative_error']:.2g} ({worst['tensor']})"
        notes.append(f"{len(changed)} weights requantised, {error}: --json lists them")
    _warn(notes, {})
    if as_json:
        emit(summary)
        return
    click.echo(f"{printable(dest)}: {summary['tensors']} tensors, {human(summary['bytes'])} in {summary['files']} files")
    for group in summary.get("groups", ()):
        click.echo(f"  {group['scheme']}, input {group['activations'] or 'as it is'}: {group['projections']} projections")


@contextmanager
def batch_display(jobs: int, log: Events) -> Iterator[Callable[[JobRun], None]]:
    """Shows a batch as it goes: a line for each job that has ended, and on a terminal a bar that all jobs share."""
    from tqdm import tqdm

    with tqdm(
        total=jobs, leave=False, disable=log.lines or not sys.stderr.isatty(),
        bar_format="{desc} |{bar}| {elapsed}<{remaining}{postfix}",
    ) as bar:  # fmt: skip
        running: dict[str, JobRun] = {}
        ended: list[JobRun] = []

        def show(run: JobRun) -> None:
            facts = {"in": run.job.source, "out": run.job.out, "state": run.state}
            log.emit("job", **facts, exit_code=run.exit_code, bytes=run.written_bytes, total_bytes=run.total_bytes)
            running[run.job.out] = run
            if run.exit_code is not None:
                del running[run.job.out]
                ended.append(run)
                if not log.lines:
                    bar.write(f"[{len(ended)}/{jobs}] {_job_line(run)}", file=sys.stderr)
            bar.n = len(ended) + sum(r.written_bytes / r.total_bytes for r in running.values() if r.total_bytes)
            bar.set_description_str(f"{len(ended)}/{jobs} jobs", refresh=False)
            written = human(sum(r.written_bytes for r in (*running.values(), *ended)))
            first = [_percent(r) for r in list(running.values())[:SHOWN_RUNNING]]
            bar.set_postfix_str(", ".join([written, *first, *(["..."] if len(running) > SHOWN_RUNNING else [])]))

        yield show


def _percent(run: JobRun) -> str:
    name = os.path.basename(run.job.out.rstrip("/"))
    return printable(f"{name} {run.written_bytes / run.total_bytes:.0%}" if run.total_bytes else name)


def _job_line(run: JobRun) -> str:
    """One job that has ended, in one line."""
    if run.exit_code != 0:
        first = next(iter((run.error or {}).get("problems", ())), None)
        return printable(f"{run.state} {run.job.out}") + (f": {Problem(**first)}" if first else "")
    what = f"{run.result['tensors']} tensors, {human(run.result['bytes'])}"
    return printable(f"done {run.job.out}: {what}" + ("" if run.written_bytes else ", complete before"))


@cli.command("batch", context_settings=CONTEXT)
@click.argument("sources", metavar="JOBS...", nargs=-1, required=True)
@click.option("--out-dir", type=Directory(), help="Where checkpoints without an OUT of their own go, under their names.")
@click.option("--jobs", type=click.IntRange(1, 256), default=1, show_default=True, help="Conversions at a time.")
@click.option("--report", type=click.Path(dir_okay=False), help="Write the report as JSON to this file, after every job.")
@json_option("Print the report as JSON.")
@log_option
@click.option("--resume", is_flag=True, help="Skip what is complete, continue what was begun.")
@click.option("--verify", is_flag=True, help="Prove each result against its IN before its OUT appears.")
@click.option("--force", is_flag=True, help="Replace non-empty OUTs.")
@click.option("--workers", type=click.IntRange(1, 64), default=None, help="Threads of each conversion.")
@click.option("--shard-size", type=ByteSize(), default=None, help="Data per file.")
@click.option("--no-hash", is_flag=True, help="Do not record digests.")
@click.option("--engine", type=ENGINES, default=None, help="ray: each conversion on a cluster.")
@click.option("--address", help="Of the Ray cluster.")
@click.pass_context
def batch_command(
    ctx: click.Context, /, sources: tuple[str, ...], out_dir: str | None, jobs: int, report: str | None, as_json: bool,
    **defaults: str | int | bool | None,
) -> None:  # fmt: skip
    """Convert many checkpoints; goes on when some fail, and says so in one report.

    \b
    JOBS: a file of jobs (.yaml, .json, or JSON lines; - for standard input), checkpoints, or a glob of them:
    {"in": "hub/Qwen3.5-27B-FP8", "out": "canonical/Qwen3.5-27B-FP8", "shard_size": "5GB", "verify": true}

    \b
    Example:  qconvert batch 'hub/*' --out-dir canonical --jobs 2 --resume --report report.json

    Options given here are those of jobs that do not set them.  Exit code: 0 all done; otherwise the worst of the jobs:
    3 the machine failed (a retry with --resume may help), 1 refused, 2 an OUT that cannot be used.
    """
    from .batch import convert_batch, read_jobs

    given = {name: value for name, value in defaults.items() if value}
    todo = read_jobs(sources, out_dir)
    with batch_display(len(todo), events()) as show:
        result = convert_batch(todo, processes=jobs, defaults=given, report=report, progress=show)
    if as_json:
        emit(result)
    else:
        _print_batch(result)
    ctx.exit(result["exit_code"])


def _print_batch(result: dict[str, Any]) -> None:
    """The report of a batch as a table."""
    rows = [("state", "OUT", "family", "dialect", "tensors", "size", "time")]
    for job in result["jobs"]:
        size = human(job["bytes"]) if "bytes" in job else "-"
        facts = (job.get("family", "-"), job.get("dialect", "-"), str(job.get("tensors", "-")), size)
        rows.append((job["state"], printable(job["out"]), *facts, f"{job['elapsed_s']:.1f} s"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo(", ".join(f"{count} {state}" for state, count in result["counts"].items()))


@cli.command("plan", context_settings=CONTEXT)
@click.argument("in_dir", metavar="IN", type=Directory())
@click.argument("out_dir", metavar="OUT", type=Directory())
@click.option("-o", "--output", "path", metavar="PLAN", required=True, type=click.Path(dir_okay=False), help="The plan file.")
@click.option("--force", is_flag=True, help="Let the commit replace a non-empty OUT.")
@click.option("--shard-size", type=ByteSize(), default=None, help="Data per file, and so per job.")
@click.option("--no-hash", is_flag=True, help="Do not record digests.")
@json_option("Print the plan file as well.")
@log_option
def plan_command(
    in_dir: str, out_dir: str, path: str, force: bool, shard_size: int | None, no_hash: bool, as_json: bool
) -> None:
    """Split a conversion into jobs for a scheduler: one for each file of OUT, with ids from 0.

    \b
    qconvert plan IN OUT -o plan.json      here; reads headers and scales only
    qconvert run-job plan.json 0           on any machine that sees the same paths; and 1, 2, ...
    qconvert commit plan.json              when all are done; OUT is that of `qconvert IN OUT`
    """
    from .jobs import plan_jobs, write_plan

    plan = plan_jobs(in_dir, out_dir, shard_size=shard_size, force=force, hashes=not no_hash)
    write_plan(path, plan)
    if as_json:
        emit(plan.to_json())
    else:
        last, size = len(plan.jobs) - 1, human(sum(nbytes for _, nbytes in plan.jobs))
        click.echo(f"{printable(path)}: jobs 0 to {last}, {size}; then `qconvert commit {printable(path)}`")


@cli.command("run-job", context_settings=CONTEXT)
@click.argument("path", metavar="PLAN", type=click.Path(dir_okay=False))
@click.argument("number", metavar="ID", type=int)
@json_option("Print what the job wrote as JSON.")
@log_option
def run_job_command(path: str, number: int, as_json: bool) -> None:
    """Do the job ID of PLAN: write one file beside OUT.  Nothing happens when it is done; run it again after any end."""
    from .jobs import read_plan, run_job

    plan = read_plan(path)
    log = events()
    log.emit("start", command="run-job", plan=path, id=number)
    with progress_bar(f"job {number}") as progress:
        entry = run_job(plan, number, progress=progress)
    log.emit("done", id=number, file=entry["file"], size=entry["size"])
    if as_json:
        emit(entry)
    else:
        click.echo(f"job {number}: {printable(entry['file'])}, {human(entry['size'])}")


@cli.command("commit", context_settings=CONTEXT)
@click.argument("path", metavar="PLAN", type=click.Path(dir_okay=False))
@click.option("--verify", is_flag=True, help="Prove the result against IN before OUT appears.")
@click.option("--workers", type=click.IntRange(1, 64), default=None, help="Threads that compare digests.")
@json_option("Print the report as JSON.")
@log_option
def commit_command(path: str, verify: bool, workers: int | None, as_json: bool) -> None:
    """Make OUT of what the jobs of PLAN wrote: all there, digests equal, then config, index, report and a rename."""
    from .jobs import commit_jobs, read_plan

    plan = read_plan(path)
    log = events()
    log.emit("start", command="commit", plan=path, out=plan.out_dir)
    with progress_bar("comparing") as progress:
        report = commit_jobs(plan, workers=workers, verify=verify, progress=progress)
    _print_report(report, plan.out_dir, as_json)


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
    except MemoryError:
        remedy = "free some, or take fewer --workers, and run again: with --resume it continues"
        short = MachineError(Problem("", "", "memory enough for this", "none left", remedy))
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

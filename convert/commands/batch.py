"""`qconvert batch`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..errors import Problem, printable
from ..events import Events
from ..options import CONTEXT, ENGINES, ByteSize, Directory, emit, events, json_option, log_option
from ..screen import human

if TYPE_CHECKING:
    from ..batch import JobRun

SHOWN_RUNNING = 3  # jobs beside the bar of a batch


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


@click.command("batch", context_settings=CONTEXT)
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
    from ..batch import convert_batch, read_jobs

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

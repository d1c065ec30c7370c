"""`qconvert plan`, `run-job` and `commit`: one conversion by any scheduler."""

from __future__ import annotations

import click

from ..errors import printable
from ..options import CONTEXT, ByteSize, Directory, emit, events, json_option, log_option, progress_bar
from ..screen import human
from .conversion import print_report


@click.command("plan", context_settings=CONTEXT)
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
    from ..jobs import plan_jobs, write_plan

    plan = plan_jobs(in_dir, out_dir, shard_size=shard_size, force=force, hashes=not no_hash)
    write_plan(path, plan)
    if as_json:
        emit(plan.to_json())
    else:
        last, size = len(plan.jobs) - 1, human(sum(nbytes for _, nbytes in plan.jobs))
        click.echo(f"{printable(path)}: jobs 0 to {last}, {size}; then `qconvert commit {printable(path)}`")


@click.command("run-job", context_settings=CONTEXT)
@click.argument("path", metavar="PLAN", type=click.Path(dir_okay=False))
@click.argument("number", metavar="ID", type=int)
@json_option("Print what the job wrote as JSON.")
@log_option
def run_job_command(path: str, number: int, as_json: bool) -> None:
    """Do the job ID of PLAN: write one file beside OUT.  Nothing happens when it is done; run it again after any end."""
    from ..jobs import read_plan, run_job

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


@click.command("commit", context_settings=CONTEXT)
@click.argument("path", metavar="PLAN", type=click.Path(dir_okay=False))
@click.option("--verify", is_flag=True, help="Prove the result against IN before OUT appears.")
@click.option("--workers", type=click.IntRange(1, 64), default=None, help="Threads that compare digests.")
@json_option("Print the report as JSON.")
@log_option
def commit_command(path: str, verify: bool, workers: int | None, as_json: bool) -> None:
    """Make OUT of what the jobs of PLAN wrote: all there, digests equal, then config, index, report and a rename."""
    from ..jobs import commit_jobs, read_plan

    plan = read_plan(path)
    log = events()
    log.emit("start", command="commit", plan=path, out=plan.out_dir)
    with progress_bar("comparing") as progress:
        report = commit_jobs(plan, workers=workers, verify=verify, progress=progress)
    print_report(report, plan.out_dir, as_json)

"""`qconvert IN OUT`, `verify` and `export`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..errors import printable
from ..options import CONTEXT, ENGINES, ByteSize, Directory, emit, events, json_option, log_option, note, progress_bar
from ..screen import adapter_line, count, human

if TYPE_CHECKING:
    from ..executor import Report

SUMMARY = ("family", "dialect", "tensors", "bytes")  # of a report, for the event that a conversion is done


def _print_plan(plan: Any) -> None:
    """A plan for people: what happens to how many tensors, with examples, then everything unusual."""
    from ..plan import ACTIONS

    click.echo(
        f"{plan.config.family}, {plan.dialect} ({printable(plan.producer)}): {len(plan.source.tensors)} tensors -> "
        f"{len(plan.steps)} tensors, {human(plan.total_bytes)} in {count(len(plan.shards), 'file')}"
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


@click.command("convert", context_settings=CONTEXT)
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
        from ..planner import plan_conversion

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
        from ..ray_engine import convert_on_ray

        carry_out = partial(convert_on_ray, address=address)
    else:
        from ..executor import convert_checkpoint

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
    print_report(report, out_dir, as_json)


def print_report(report: Report, out_dir: str, as_json: bool) -> None:
    note(report.contradictions, report.skipped_files)
    events().emit("done", **{key: report.data[key] for key in SUMMARY})
    if as_json:
        emit(report.to_json())
        return
    actions = ", ".join(f"{number} {action}" for action, number in report.actions.items())
    click.echo(f"{printable(out_dir)}: {report.tensors} tensors, {human(report.bytes)} ({actions})")
    if "verified" in report.data:
        click.echo(f"verified: {report.verified['elements']} elements equal")


@click.command("verify", context_settings=CONTEXT)
@click.argument("directories", metavar="[IN] OUT", nargs=-1, required=True, type=Directory())
@json_option("Print the counts as JSON.")
@log_option
def verify_command(directories: tuple[str, ...], as_json: bool) -> None:
    """Prove that OUT holds exactly what IN holds; with OUT alone, check its files against their digests."""
    if len(directories) > 2:
        raise click.UsageError("give IN and OUT, or OUT alone")
    in_dir, out_dir = directories if len(directories) == 2 else (None, directories[0])
    from dataclasses import asdict

    from ..verifier import verify_conversion, verify_digests

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


@click.command("export", context_settings=CONTEXT)
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
    from ..exporter import export_checkpoint

    summary = export_checkpoint(out_dir, dest, to=to, dtype=dtype, fp8=fp8, requantize=requantize, force=force)
    notes = list(summary.get("notes", ()))
    changed = [c for c in summary.get("requantized", ()) if "relative_error" in c]
    if changed:
        worst = max(changed, key=lambda c: float(c["relative_error"]))
        error = f"relative error up to {worst['relative_error']:.2g} ({worst['tensor']})"
        notes.append(f"{len(changed)} weights requantised, {error}: --json lists them")
    note(notes, {})
    if as_json:
        emit(summary)
        return
    files = count(summary["files"], "file")
    click.echo(f"{printable(dest)}: {summary['tensors']} tensors, {human(summary['bytes'])} in {files}")
    for group in summary.get("groups", ()):
        click.echo(f"  {group['scheme']}, input {group['activations'] or 'as it is'}: {group['projections']} projections")

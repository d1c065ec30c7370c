"""One conversion as many jobs, for any scheduler: a plan file, a job for each file of OUT, and a commit.

`plan_jobs` reads headers and scales; `write_plan` writes the plan file.  `run_job` writes one file of OUT, on any machine that
sees IN and OUT's parent; it may be run twice, killed, and run again.  `commit_jobs` checks that all files are there with their
digests, writes config, index and report, and renames.  The result is that of `qconvert IN OUT`, bit for bit.

Beside OUT, under names with a key of the plan, so that two plans do not meet:
    .OUT.parts-KEY/  complete files, which becomes OUT       .OUT.jobs-KEY/ID.json  what a job wrote, once it is in place
    .OUT.jobs-KEY/ID.HOST.PID/  a job that runs, or died
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from .copying import Sources, Writers
from .digests import TensorDigest, range_digests, source_digest, text_digest
from .errors import ConvertError, MachineError, Problem, UsageError
from .executor import (
    Identity,
    Report,
    Run,
    Shard,
    complete,
    default_workers,
    identities,
    made_from,
    plan_digest,
    proof,
    read_finished,
    shards_of,
)
from .journal import Journal
from .json_files import replace_json
from .plan import Plan
from .planner import plan_source
from .remote import RemotePath
from .source import Location, located, read_json, read_source
from .staging import Staging, beside, check_target, publish, recover, sync_directory
from .values import Values

FORMAT = "qconvert-jobs"
FORMAT_VERSION = 1
AGAIN = "make the plan again with `qconvert plan`"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class JobPlan:
    """A conversion that jobs carry out.  Everything else follows from IN, so this is small.

    in_dir, out_dir  absolute paths, the same on every machine
    shard_size, force, hashes  as in `convert_checkpoint`
    plan_sha256      identity of what is written
    source_files     file of IN -> size, mtime in ns and, of a remote one, a number made of its tag, when it was planned
    zeros            zero scales among those that planning has read
    jobs             file of OUT and its size, in bytes; a job's id is its place, from 0
    """

    in_dir: str
    out_dir: str
    shard_size: int | None
    force: bool
    hashes: bool
    plan_sha256: str
    source_files: Mapping[str, Identity]
    zeros: int
    jobs: Sequence[tuple[str, int]]

    def to_json(self) -> dict[str, Any]:
        """The plan file."""
        from . import __version__

        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "converter": f"qconvert {__version__}"}
        jobs = [{"id": number, "file": file, "bytes": size} for number, (file, size) in enumerate(self.jobs)]
        return {**head, **asdict(self), "source_files": {n: list(v) for n, v in self.source_files.items()}, "jobs": jobs}

    @property
    def key(self) -> str:
        """Part of the names beside OUT: another one for another source, plan or kind of report."""
        return text_digest(json.dumps([self.plan_sha256, self.hashes, sorted(self.source_files.items())]))[:16]

    @property
    def parts(self) -> Path:
        """The directory that becomes OUT."""
        return beside(Path(self.out_dir), f"parts-{self.key}")

    @property
    def work(self) -> Path:
        """Where jobs work and say what they wrote."""
        return beside(Path(self.out_dir), f"jobs-{self.key}")

    def receipt(self, number: int) -> Path:
        """Where a job says what it wrote."""
        return self.work / f"{number}.json"


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What every job finds out for itself: the plan of IN as it is now."""

    plan: Plan
    shards: list[Shard]
    digest: str
    before: dict[str, Identity]

    def files(self) -> dict[str, Identity]:
        remote = isinstance(self.plan.source.directory, RemotePath)  # inodes are not the same on every machine
        return {name: (size, mtime_ns, tag if remote else 0) for name, (size, mtime_ns, tag) in self.before.items()}


def _prepare(in_dir: Location, shard_size: int | None) -> _Prepared:
    plan = plan_source(read_source(in_dir), shard_size)
    shards = shards_of(plan)
    return _Prepared(plan, shards, plan_digest(plan, shards), identities(plan.source))


def _prepare_again(plan: JobPlan) -> _Prepared:
    """Plan IN once more.  Raises `MachineError` when that gives another plan."""
    prepared = _prepare(plan.in_dir, plan.shard_size)
    found = prepared.files()
    differ = [name for name in {*found, *plan.source_files} if found.get(name) != plan.source_files.get(name)]
    if differ:
        raise MachineError(
            Problem(min(differ), "", "the file as it was when planning", "another, or none", f"when IN is stable, {AGAIN}")
        )
    if prepared.digest != plan.plan_sha256:
        raise MachineError(Problem(plan.in_dir, "", f"the plan {plan.plan_sha256[:16]}", prepared.digest[:16], AGAIN))
    return prepared


def plan_jobs(
    in_dir: Location,
    out_dir: str | os.PathLike[str],
    *,
    shard_size: int | None = None,
    force: bool = False,
    hashes: bool = True,
) -> JobPlan:
    """Plan a conversion for `run_job` and `commit_jobs`.  Reads headers and scales, and writes nothing.

    Arguments as in `convert_checkpoint`; both directories must be the same paths on every machine.  Raises `ConvertError` when
    the checkpoint is refused, `UsageError` for paths that cannot be used.
    """
    source, out = located(in_dir), Path(out_dir).absolute()
    if isinstance(source, RemotePath):  # its URL names the state that jobs will read, where the server has such names
        check_target(out, None, force)
    else:
        source = source.absolute()
        if source.is_dir():
            check_target(out, source, force)
    prepared = _prepare(source, shard_size)
    with Sources(prepared.plan.source.files) as sources:
        zeros = Values(prepared.plan, sources).check(prepared.plan)
    jobs = [(shard.name, shard.size) for shard in prepared.shards]
    target = str(out.resolve())
    return JobPlan(str(source), target, shard_size, force, hashes, prepared.digest, prepared.files(), zeros, jobs)


def write_plan(path: str | os.PathLike[str], plan: JobPlan) -> None:
    """Write a plan file, whole or not at all.  Raises `MachineError` when that is not possible."""
    try:
        replace_json(Path(path), plan.to_json())
    except OSError as error:
        found = error.strerror or repr(error)
        raise MachineError(Problem(str(path), "", "a file that can be written", found, "name another PLAN")) from error


def read_plan(path: str | os.PathLike[str]) -> JobPlan:
    """Read a plan file.  Raises `UsageError` when it is none, or is of another version of qconvert."""
    from . import __version__

    name = os.path.basename(path)
    try:
        value = read_json(Path(path), name)
        if value.get("format") != FORMAT or value.get("format_version") != FORMAT_VERSION:
            raise UsageError(Problem(name, "", "a plan of `qconvert plan`", "another file", AGAIN))
        if value["converter"] != f"qconvert {__version__}":
            raise UsageError(
                Problem(name, "", f"a plan of qconvert {__version__}", f"one of {value['converter']}", f"use that, or {AGAIN}")
            )
        jobs = [(str(job["file"]), int(job["bytes"])) for job in value["jobs"]]
        files = {str(name): (int(size), int(mtime), int(tag)) for name, (size, mtime, tag) in value["source_files"].items()}
        shard_size = None if value["shard_size"] is None else int(value["shard_size"])
        return JobPlan(
            str(value["in_dir"]), str(value["out_dir"]), shard_size, bool(value["force"]), bool(value["hashes"]),
            str(value["plan_sha256"]), files, int(value["zeros"]), jobs,
        )  # fmt: skip
    except FileNotFoundError:
        raise UsageError(Problem(name, "", "a plan file", "no such file", "name the file that `qconvert plan` wrote")) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(Problem(name, "", "a plan of `qconvert plan`", f"a damaged one ({error!r})", AGAIN)) from None
    except ConvertError as error:
        raise UsageError(error.problems) from None


def run_job(plan: JobPlan, number: int, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write one file of OUT.  Does nothing when that is done; safe to run twice at a time, and again after any end.

    number    0 to `len(plan.jobs) - 1`
    progress  called with (bytes written, bytes of the file), from this thread and others

    Returns what the job wrote: `file`, `size`, `zeros`, `digests`, and `sources`, the SHA-256 of its share of IN's files.
    Raises `UsageError` for an id that there is none of, `ConvertError` when values are refused, `MachineError` when the disk
    fails or IN is not what was planned.  Peak memory as `convert_checkpoint` with one worker.
    """
    if not 0 <= number < len(plan.jobs):
        found = str(number)
        raise UsageError(Problem("", "", f"a job from 0 to {len(plan.jobs) - 1}", found, "see the `jobs` of the plan"))
    with _disk_errors(plan):
        done = _receipt(plan, number)
        if done is not None:
            return done
        prepared = _prepare_again(plan)
        finished = _finished(plan, prepared)
        if finished is not None:
            return next(dict(entry) for entry in finished["outputs"] if entry["file"] == plan.jobs[number][0])
        shard = prepared.shards[number]
        own = plan.work / f"{number}.{platform.node() or 'host'}.{os.getpid()}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        plan.parts.mkdir(exist_ok=True)
        try:
            entry = _write(plan, number, prepared, own, progress or (lambda done, total: None))
            os.replace(own / shard.name, plan.parts / shard.name)
            sync_directory(plan.parts)
            replace_json(plan.receipt(number), entry)
            sync_directory(plan.work)
        finally:
            shutil.rmtree(own, ignore_errors=True)
        return entry


def _write(plan: JobPlan, number: int, prepared: _Prepared, own: Path, progress: Progress) -> dict[str, Any]:
    """Write a file into a directory of this job's own.  Returns its receipt."""
    shard, source = prepared.shards[number], prepared.plan.source
    written = 0

    def advance(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        progress(written, shard.size)

    own_plan = replace(prepared.plan, steps=shard.steps)  # so that no other file's scales are read
    staging = Staging(own, Journal(own / "journal"))
    staging.check_space(shard.size)
    with ThreadPoolExecutor(1) as hasher, Sources(source.files) as sources, Writers() as writers:
        run = Run(own_plan, sources, Values(own_plan, sources), staging, advance, writers, plan.hashes)
        share = [file for n, file in enumerate(source.files.values()) if n % len(plan.jobs) == number] if plan.hashes else []
        inputs = {file.name: hasher.submit(source_digest, file.path, run.stop) for file in share}
        try:
            run.write_shard(shard)
            sha256 = {name: future.result() for name, future in inputs.items()}
        except BaseException:
            run.stop.set()
            raise
        finally:
            staging.journal.close()
    if identities(source) != prepared.before:
        _prepare_again(plan)
    note = staging.done[shard.name]
    keys = ("file", "size", "zeros", "digests")
    return {"id": number, **{key: note[key] for key in keys}, "sources": sha256}


def _receipt(plan: JobPlan, number: int) -> dict[str, Any] | None:
    """What a job wrote, when it is done and its file is still there."""
    file, size = plan.jobs[number]
    try:
        entry = read_json(plan.receipt(number), f"{number}.json")
        there = (plan.parts / file).stat().st_size
    except (OSError, ConvertError):
        return None
    return entry if there == entry.get("size") == size and entry.get("file") == file else None


def _finished(plan: JobPlan, prepared: _Prepared) -> dict[str, Any] | None:
    """The report of an OUT that is what this plan gives."""
    out, source = Path(plan.out_dir), prepared.plan.source
    report = read_finished(out)
    return report if report and made_from(report, out, prepared.digest, prepared.before, source) else None


def finished_report(plan: JobPlan) -> dict[str, Any] | None:
    """The report of OUT, when that is complete and what this plan gives.  Raises `MachineError` when IN has changed."""
    return _finished(plan, _prepare_again(plan))


def commit_jobs(
    plan: JobPlan, *, workers: int | None = None, verify: bool = False, progress: Progress | None = None
) -> Report:
    """Make OUT of what the jobs wrote.  May be run again after any end; does nothing when OUT is complete already.

    workers   threads that read the files again, to compare their digests; `verify`: prove OUT against IN as well
    progress  called with (bytes compared, total bytes), from those threads

    Returns the report of the conversion.  Raises `MachineError` with every job that is not done, or whose file is damaged (it
    is then to be run again); `UsageError` when OUT cannot be used.  On any error OUT is as it was before.
    """
    out = Path(plan.out_dir)
    prepared = _prepare_again(plan)
    finished = _finished(plan, prepared)
    with _disk_errors(plan):
        if finished is not None:
            shutil.rmtree(plan.work, ignore_errors=True)
            return Report(finished | proof(prepared.plan.source.directory, out) if verify else finished)
        place = prepared.plan.source.directory
        check_target(out, None if isinstance(place, RemotePath) else place, plan.force)
        receipts = _all_done(plan)
        journal = Journal(beside(out, "journal"))
        try:
            _compare(plan, prepared, receipts, workers or default_workers(), progress or (lambda done, total: None))
            for path in plan.parts.iterdir():
                if path.name not in {file for file, _ in plan.jobs}:  # of a commit that was killed
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            staging = Staging(plan.parts, journal, {entry["file"]: entry for entry in receipts})
            sha256 = {name: digest for entry in receipts for name, digest in entry["sources"].items()}
            with Sources(prepared.plan.source.files) as sources, Writers() as writers:
                nothing = Values(replace(prepared.plan, steps=[]), sources)
                run = Run(prepared.plan, sources, nothing, staging, lambda nbytes: None, writers, plan.hashes)
                report = complete(run, prepared.shards, plan.zeros, sha256, prepared.digest, prepared.before)
            if verify:
                report.data |= proof(prepared.plan.source.directory, plan.parts)
            recover(out)
            publish(out, plan.parts)
            shutil.rmtree(beside(out, "partial"), ignore_errors=True)  # of `qconvert IN OUT`, given up
        finally:
            journal.remove()
        shutil.rmtree(plan.work, ignore_errors=True)
    return report


def discard_jobs(plan: JobPlan) -> None:
    """Remove what the jobs of a plan wrote, unless it is committed."""
    shutil.rmtree(plan.parts, ignore_errors=True)
    shutil.rmtree(plan.work, ignore_errors=True)


def _all_done(plan: JobPlan) -> list[dict[str, Any]]:
    found = [_receipt(plan, number) for number in range(len(plan.jobs))]
    missing = [
        Problem(f"job {number}", "", f"{plan.jobs[number][0]} written", "no such file yet", "run this job, then commit again")
        for number, entry in enumerate(found)
        if entry is None
    ]
    if missing:
        raise MachineError(missing)
    return [entry for entry in found if entry is not None]


def _compare(
    plan: JobPlan, prepared: _Prepared, receipts: Sequence[dict[str, Any]], workers: int, progress: Progress
) -> None:
    """Read what the jobs wrote and compare it with what they said.  A job whose file differs counts as not done."""
    total, done = sum(size for _, size in plan.jobs), 0
    problems = []
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda shard, entry: _damage(plan, shard, entry), prepared.shards, receipts)
        for number, (damage, (file, size)) in enumerate(zip(found, plan.jobs, strict=True)):
            if damage:
                plan.receipt(number).unlink(missing_ok=True)
                remedy = f"run job {number}, then commit again"
                problems.append(Problem(file, damage, "the digest of its job", "another", remedy))
            done += size
            progress(done, total)
    if problems:
        raise MachineError(problems)


def _damage(plan: JobPlan, shard: Shard, entry: dict[str, Any]) -> str:
    """What of a file is not what its job wrote: the name of a tensor, "header", or nothing."""
    path = plan.parts / shard.name
    with path.open("rb") as stream:
        if stream.read(len(shard.header)) != shard.header:
            return "header"
    if not plan.hashes:
        return ""
    ends = [len(shard.header)]
    for step in shard.steps:
        ends.append(ends[-1] + step.nbytes)
    digests = range_digests(path, pairwise(ends), TensorDigest)
    expected = entry["digests"]["tensors_blake3"]
    return next((s.name for s, digest in zip(shard.steps, digests, strict=True) if expected.get(s.name) != digest), "")


@contextmanager
def _disk_errors(plan: JobPlan) -> Iterator[None]:
    """An error of the file system becomes a `MachineError`."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or plan.out_dir)
        remedy = "correct this and run the same again: OUT is untouched"
        raise MachineError(Problem(where, "", "a working disk", error.strerror or repr(error), remedy)) from error

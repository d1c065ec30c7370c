"""Carries out a plan: writes the files of OUT in a directory beside it, which becomes OUT when everything is on disk.

Each worker is a thread that prepares one file at a time: it reads ranges, looks at codes as they pass, takes their digests and
computes scales (`convert.values`); other threads write (`convert.copying`) and take the digests of the files of IN.  NumPy, the
hashes and the kernel let go of the interpreter's lock while they work.  Peak memory: `copying.DEPTH` buffers for each worker,
and the small tensors that are computed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.format import CONFIG_FILE, INDEX_FILE, REPORT_FILE

from .copying import Look, Sources, Target, Writers, can_clone, changed
from .digests import TensorDigest, file_digest, source_digest
from .errors import ConvertError, MachineError, Problem
from .json_files import sealed, write_json
from .layout import copied_ranges, data_residue
from .ops import Step
from .plan import Plan
from .planner import plan_source
from .remote import PIECE, RemotePath, wait_for
from .safetensors_writer import header_bytes
from .source import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    QUANT_FILE,
    AnyPath,
    Location,
    Source,
    located,
    read_json,
    read_source,
)
from .staging import Staging, check_target, staged, sync_file, tidy
from .values import STREAMED_CHECKS, Codes, Values

Progress = Callable[[int], None]  # called with the number of bytes written since the last call
Identity = tuple[int, int, int]  # size, mtime in ns, inode


@dataclass(slots=True)
class Report:
    """What a conversion did; the content of `conversion.json`."""

    data: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dict(self.data)


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of OUT as it will be: its header, its tensors, and how many of their bytes can be cloned from IN."""

    name: str
    header: bytes
    steps: list[Step]
    cloneable: int

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(step.nbytes for step in self.steps)


def shards_of(plan: Plan) -> list[Shard]:
    """The files of OUT that hold tensors, in order."""
    shards = []
    for name, indices in plan.shards.items():
        steps = [plan.steps[i] for i in indices]
        residue, cloneable = data_residue(steps, plan.source.tensors)
        header = header_bytes(((s.name, s.dtype, s.shape, s.nbytes) for s in steps), residue)
        shards.append(Shard(name, header, steps, cloneable))
    return shards


def plan_digest(plan: Plan, shards: Iterable[Shard]) -> str:
    """Identity of everything that a run will write: equal for two runs that write the same bytes, given the same source."""
    from . import __version__

    digest = hashlib.sha256(__version__.encode())
    for shard in shards:
        digest.update(shard.header)
        for step in shard.steps:
            digest.update(repr((step.terms, step.check)).encode())
    rest = [plan.config.to_json(), [a.to_json() for a in plan.adapters], sorted(plan.source.side_files)]
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()


def _identity(path: AnyPath) -> Identity:
    status = path.stat()
    return (status.st_size, status.st_mtime_ns, status.st_ino)


def identities(source: Source) -> dict[str, Identity]:
    """What tells whether IN changed: each file that OUT is made of."""
    known = {file.name: file.identity for file in source.files.values()}
    known |= {name: _identity(path) for name, path in source.side_files.items()}
    for name in (CONFIG_FILE, QUANT_FILE):
        if (source.directory / name).exists():
            known[name] = _identity(source.directory / name)
    return known


def _check_unchanged(source: Source, before: Mapping[str, Identity]) -> None:
    """Raise `MachineError` when a file of IN is not the one that was planned."""
    if isinstance(source.directory, RemotePath):
        source.directory.refresh()
    for name, identity in before.items():
        file = source.files.get(name)
        path = file.path if file else source.side_files.get(name, source.directory / name)
        try:
            same = _identity(path) == identity
        except FileNotFoundError:
            same = False
        if not same:
            raise changed(name)


@dataclass(slots=True)
class Run:
    """One run: what its threads share."""

    plan: Plan
    sources: Sources
    values: Values
    staging: Staging
    progress: Progress
    writers: Writers
    hashes: bool
    stop: threading.Event = field(default_factory=threading.Event)
    noting: threading.Lock = field(default_factory=threading.Lock)

    def write_shard(self, shard: Shard) -> None:
        """Write one file of OUT, flush it, and note it in the journal with its digests and the number of zero block scales."""
        done = self.staging.done.get(shard.name)
        if done is not None and done["size"] == shard.size:
            self.progress(shard.size)
            return
        zeros = 0
        digests: dict[str, str] = {}
        with self.sources.ahead(self.values.ranges(shard.steps), self.stop) as sources:
            target = Target(self.staging.path / shard.name, sources, self.progress, self.stop, self.writers)
            try:
                target.write(shard.header)
                for step in shard.steps:
                    digest = TensorDigest() if self.hashes else None
                    zeros += self._write_step(step, target, digest, sources)
                    if digest is not None:
                        digests[step.name] = digest.hexdigest()
                target.finish()
            finally:
                target.close()
        facts = {
            "header_sha256": hashlib.sha256(shard.header).hexdigest() if self.hashes else None,
            "tensors_blake3": digests if self.hashes else None,
        }
        with self.noting:
            self.staging.completed(shard.name, zeros=zeros, digests=facts)

    def _write_step(self, step: Step, target: Target, digest: TensorDigest | None, sources: Sources) -> int:
        tensors = self.plan.source.tensors
        codes = Codes(step, tensors, self.sources) if step.check in STREAMED_CHECKS else None
        ranges = copied_ranges(step, tensors)
        if ranges is None:
            for data in self.values.computed(step, codes, sources):
                if digest is not None:
                    digest.update(data)
                target.write(data)
        else:
            look = _all_of(codes.look if codes else None, digest.update if digest else None)
            for file, start, end in ranges:
                target.copy(file, start, end, look)
        return codes.zeros if codes else 0

    def copy_side_files(self) -> None:
        """Copy tokenizer, licence and the like byte for byte, and flush them."""
        for relative, path in self.plan.source.side_files.items():
            target = self.staging.path / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(path, RemotePath):
                with path.open() as stream, target.open("wb") as copy:
                    shutil.copyfileobj(stream, copy, PIECE)
            else:
                shutil.copyfile(path, target)
            sync_file(target)

    def write_adapters(self) -> list[str]:
        """Write the LoRA adapters beside the base, byte for byte.  Returns the names of their files."""
        written = []
        for adapter in self.plan.adapters:
            folder = self.staging.path / adapter.directory
            folder.mkdir(parents=True, exist_ok=True)
            ranges = [(info.file, info.start, info.end) for _, info in adapter.tensors]
            with self.sources.ahead(ranges, self.stop) as sources:
                target = Target(folder / ADAPTER_WEIGHTS, sources, lambda _: None, self.stop, self.writers)
                try:
                    target.write(header_bytes((name, i.dtype, i.shape, i.end - i.start) for name, i in adapter.tensors))
                    for part in ranges:
                        target.copy(*part)
                    target.finish()
                finally:
                    target.close()
            write_json(folder / ADAPTER_CONFIG, dict(adapter.config))
            written += [f"{adapter.directory}/{name}" for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]
        return written

    def write_metadata(self) -> None:
        """Write index and config."""
        plan = self.plan
        index = {plan.steps[i].name: name for name, indices in plan.shards.items() for i in indices}
        value = {"metadata": {"total_size": plan.total_bytes}, "weight_map": dict(sorted(index.items()))}
        write_json(self.staging.path / INDEX_FILE, value)
        write_json(self.staging.path / CONFIG_FILE, plan.config.to_json())


def _all_of(*looks: Look | None) -> Look | None:
    """One `Look` that shows each piece to all that are not None; None when all are."""
    given = [look for look in looks if look is not None]

    def look_at(piece: memoryview) -> None:
        for look in given:
            look(piece)

    return look_at if len(given) > 1 else given[0] if given else None


def _execute(run: Run, shards: list[Shard], workers: int, digest: str, before: Mapping[str, Identity]) -> Report:
    """Write everything into the staging directory: tensors, then what `complete` writes."""
    plan, source = run.plan, run.plan.source
    pool, hasher = ThreadPoolExecutor(workers), ThreadPoolExecutor(workers)
    try:
        zeros = run.values.check(plan)
        inputs = {f.name: hasher.submit(source_digest, f.path, run.stop) for f in source.files.values()} if run.hashes else {}
        written = [pool.submit(run.write_shard, shard) for shard in shards]
        wait_for(*written)
        for future in written:
            if future.done():
                future.result()
        sha256 = {name: future.result() for name, future in inputs.items()}
    except BaseException:
        run.stop.set()
        run.sources.give_up()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        hasher.shutdown(wait=True, cancel_futures=True)
    return complete(run, shards, zeros, sha256, digest, before)


def complete(
    run: Run, shards: list[Shard], zeros: int, inputs: Mapping[str, str | None], digest: str, before: Mapping[str, Identity]
) -> Report:
    """Write all but the tensors, which the staging directory has: side files, adapters, index, config, the report at last.

    zeros   zero scales among those that are read at once; `inputs`: SHA-256 of each file of IN, empty without digests
    digest  `plan_digest`; `before`: `identities` of IN when it was planned

    Raises `MachineError` when IN has changed since.
    """
    plan, source, folder = run.plan, run.plan.source, run.staging.path
    run.copy_side_files()
    others = run.write_adapters()
    run.write_metadata()
    others += [INDEX_FILE, CONFIG_FILE, *sorted(source.side_files)]
    notes = [run.staging.done[shard.name] for shard in shards]
    report = Report(_report(plan, zeros + sum(note["zeros"] for note in notes)))
    report.data["plan_sha256"] = digest
    report.data["sources"] = [
        {"file": n, "size": f.identity[0], "sha256": inputs.get(n)} for n, f in source.files.items()
    ]
    report.data["outputs"] = [
        {"file": note["file"], "size": note["size"], **note["digests"]} for note in notes
    ] + [
        {"file": n, "size": (folder / n).stat().st_size, "sha256": file_digest(folder / n) if run.hashes else None}
        for n in others
    ]
    _check_unchanged(source, before)
    report.data = sealed(report.data)
    write_json(folder / REPORT_FILE, report.data)
    return report


def _report(plan: Plan, zeros: int) -> dict[str, Any]:
    from . import __version__

    return {
        "converter": f"qconvert {__version__}",
        "family": plan.config.family,
        "dialect": plan.dialect,
        "producer": plan.producer,
        "tensors": len(plan.steps),
        "bytes": plan.total_bytes,
        "actions": dict(sorted(plan.actions().items())),
        "repairs": plan.repairs,
        "contradictions": plan.contradictions,
        "dropped": [{"tensor": d.tensor, "reason": d.reason} for d in plan.dropped],
        "adapters": [adapter.to_json() for adapter in plan.adapters],
        "zero_block_scales": zeros,
        "side_files": sorted(plan.source.side_files),
        "skipped_files": dict(sorted(plan.source.skipped.items())),
    }


def default_workers() -> int:
    """Threads that write shards: two or three saturate one disk."""
    return min(3, os.cpu_count() or 1)


def convert_checkpoint(
    in_dir: Location,
    out_dir: str | os.PathLike[str],
    *,
    workers: int | None = None,
    shard_size: int | None = None,
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
    hashes: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Convert a checkpoint into a canonical one.

    in_dir      a directory, or a URL: `hf://org/name[@revision]`, `s3://...` and whatever else fsspec reads, which is streamed
    workers     threads that write shards; default `default_workers()`
    shard_size  bytes of data per output file; None for the files of IN where they serve (`layout.pack`)
    force       replace a non-empty `out_dir`, once the new one is complete
    resume      continue a run that was killed or interrupted; the result is the same as that of one run.  Files that the
                earlier run completed are kept.  Starts from the beginning when there is nothing to continue, and does
                nothing when `out_dir` is complete already
    verify      prove the result against the source before `out_dir` appears
    hashes      record digests: SHA-256 of every file of IN (of a remote one, what its server publishes, or none), and of OUT
                what `verify_digests` checks
    progress    called with (bytes written, total bytes) of the files with tensors, from worker threads; the total at last

    Returns the report.  Raises `ConvertError` when the checkpoint is refused, `UsageError` for paths that cannot be used,
    `MachineError` when the disk or the network fails.  On any error `out_dir` is as it was before.
    """
    source, out = located(in_dir), Path(out_dir)
    finished = read_finished(out) if resume else None
    if source.is_dir() and not finished:
        check_target(out, None if isinstance(source, RemotePath) else source, force)
    plan = plan_source(read_source(source), shard_size)
    shards = shards_of(plan)
    digest = plan_digest(plan, shards)
    before = identities(plan.source)
    if finished:
        if made_from(finished, out, digest, before, plan.source):
            tidy(out)
            return Report(finished | proof(source, out) if verify else finished)
        check_target(out, None if isinstance(source, RemotePath) else source, force)
    written, total = 0, sum(shard.size for shard in shards)
    lock = threading.Lock()

    def advance(nbytes: int) -> None:
        nonlocal written
        with lock:
            written += nbytes
            if progress is not None:
                progress(written, total)

    work: Staging | None = None
    identity = {"plan": digest, "in": {name: list(known) for name, known in before.items()}, "hashes": hashes}
    try:
        with staged(out, identity, resume) as work, Sources(plan.source.files) as sources, Writers() as writers:
            _check_space(work, plan, shards, sources)
            run = Run(plan, sources, Values(plan, sources), work, advance, writers, hashes)
            report = _execute(run, shards, workers or default_workers(), digest, before)
            if verify:
                report.data |= proof(source, work.path)
    except OSError as error:
        again = _again(work, shards) or "correct this and run again: OUT is untouched"
        where = str(error.filename or out)
        raise MachineError(Problem(where, "", "a working disk", error.strerror or repr(error), again)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_again(work, shards) or "OUT is as it was before: run the same command again") from None
    return report


def proof(in_dir: AnyPath, out_dir: Path) -> dict[str, Any]:
    """Prove a result against its source.  Returns what a report says of it."""
    from .verifier import verify_conversion

    result = verify_conversion(in_dir, out_dir)
    return {"verified": {"tensors": result.tensors, "elements": result.elements}}


def _again(work: Staging | None, shards: list[Shard]) -> str:
    """How to continue, when files of this run were kept."""
    if work is None or not work.kept:
        return ""
    return (
        f"OUT is as it was before, {len(work.done)} of its {len(shards)} files are done: run again with --resume to continue, "
        f"without it to start anew"
    )


def _check_space(work: Staging, plan: Plan, shards: list[Shard], sources: Sources) -> None:
    """Ask for the room that is still needed: neither for what an earlier run left, nor for what is cloned."""
    needed = sum(p.stat().st_size for p in plan.source.side_files.values()) + sum(a.nbytes for a in plan.adapters)
    missing = [shard for shard in shards if shard.name not in work.done]
    needed += sum(shard.size for shard in missing)
    if any(shard.cloneable for shard in missing) and can_clone(sources, next(iter(plan.source.files)), work.path):
        needed -= sum(shard.cloneable for shard in missing)
    work.check_space(needed)


def read_finished(out: Path) -> dict[str, Any] | None:
    """The report of a complete OUT, or None."""
    try:
        return read_json(out / REPORT_FILE, REPORT_FILE)
    except (OSError, ConvertError):
        return None


def made_from(report: dict[str, Any], out: Path, digest: str, before: Mapping[str, Identity], source: Source) -> bool:
    """Whether a complete OUT is what this run would write: of the same plan, and written after IN last changed.

    Of a remote IN, the digests that its server publishes must be the same as well.
    """
    if isinstance(source.directory, RemotePath):
        recorded = {entry["file"]: entry["sha256"] for entry in report.get("sources", ())}
        published = {n: f.path.sha256 for n, f in source.files.items() if isinstance(f.path, RemotePath)}
        weights = all(digest in (None, recorded.get(n)) for n, digest in published.items())
        others = (path.is_copy(out / n) for n, path in source.side_files.items() if isinstance(path, RemotePath))
        if not (weights and all(others)):
            return False
    written_ns = (out / REPORT_FILE).stat().st_mtime_ns
    return report.get("plan_sha256") == digest and all(mtime_ns <= written_ns for _, mtime_ns, _ in before.values())

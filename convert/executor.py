"""Carries out a plan: streams byte ranges from source files into the shards of OUT.

Most bytes go from file to file without passing through Python; FP8 codes and block scales are read in pieces, because their
values are checked on the way.  Peak memory: `CHUNK` bytes per worker and the small tensors that are computed (scales).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from runtime.format import CONFIG_FILE, INDEX_FILE, REPORT_FILE

from .apply import count_zeros, find_fault, mean, transform
from .digests import file_digest
from .errors import ORIGINAL, ConvertError, MachineError, Problem
from .ops import CHECKS, Step
from .plan import Plan
from .planner import DEFAULT_SHARD_SIZE, plan_source
from .safetensors_writer import header_bytes
from .source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SourceFile, TensorInfo, read_source
from .staging import check_target, staged

CHUNK = 4 << 20
COPY_AT_ONCE = 64 << 20  # bytes that the kernel copies between two looks at progress
# copy_file_range's answers where it is not available between two files; reads and writes take over.
NOT_POSSIBLE = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF})
SHIFTED_NORM = (0.5, 1.5)  # a zero-centred norm averages around 0, one that holds 1 + weight around 1
STREAMED_CHECKS = frozenset({"fp8_codes", "e4m3_scale", "e8m0_scale"})

Progress = Callable[[int], None]  # called with the number of bytes written since the last call


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


class _Files:
    """The open source files of one run, with a handle for each thread."""

    def __init__(self, files: dict[str, SourceFile], stack: ExitStack) -> None:
        self._files, self._stack = files, stack
        self._local = threading.local()
        self._lock = threading.Lock()

    def descriptor(self, name: str) -> int:
        """A descriptor of a source file for this thread."""
        handles: dict[str, BinaryIO] = self._local.__dict__.setdefault("handles", {})
        if name not in handles:
            stream = self._files[name].path.open("rb", buffering=0)
            with self._lock:
                self._stack.callback(stream.close)
            handles[name] = stream
        return handles[name].fileno()

    def read(self, info: TensorInfo) -> bytes:
        """All bytes of a tensor; for small ones."""
        return b"".join(self.pieces(info))

    def pieces(self, info: TensorInfo) -> Iterator[bytes]:
        """The bytes of a tensor in pieces of at most `CHUNK`."""
        descriptor, position = self.descriptor(info.file), info.start
        while position < info.end:
            piece = os.pread(descriptor, min(CHUNK, info.end - position), position)
            if not piece:
                raise _changed(info.file)
            yield piece
            position += len(piece)


def _changed(file: str) -> MachineError:
    return MachineError(
        Problem(file, "", "the file as it was when planning", "one that changed meanwhile", "convert again when it is stable")
    )


def _fault(info: TensorInfo, check: str, found: str) -> ConvertError:
    return ConvertError(
        Problem(
            info.file, info.name, f"values {CHECKS[check]}", found,
            "the tensor was never calibrated, or is damaged: fetch or export the checkpoint again",
        )
    )  # fmt: skip


def check_values(plan: Plan, files: _Files) -> int:
    """Check every small scale of a plan before anything is written.  Returns the number of zero block scales among them.

    Raises `ConvertError` with all faults found.
    """
    problems: list[Problem] = []
    experts: dict[str, dict[int, tuple[TensorInfo, str, str]]] = {}  # stack -> expert -> its fault
    zeros = 0
    norms: list[tuple[TensorInfo, float]] = []
    for step in plan.steps:
        if not step.check or step.check in STREAMED_CHECKS:
            continue
        if step.check == "zero_centred":
            (info,) = plan.source_of(step)
            norms.append((info, mean(files.read(info), info.dtype)))
            continue
        for term in step.terms:
            info = plan.source.tensors[term.source].rows(term.rows)
            data = files.read(info)
            found = find_fault(step.check, data, info.dtype, term.transform)
            if found and term.rows is None:
                problems += _fault(info, step.check, found).problems
            elif found and term.rows is not None:  # a stack of experts: a step takes all at once, or one after another
                stack = plan.source.tensors[term.source]
                for e in range(*term.rows):
                    one = find_fault(step.check, files.read(stack.rows((e, e + 1))), info.dtype, term.transform)
                    if one:
                        experts.setdefault(info.name, {}).setdefault(e, (stack, step.check, one))
            zeros += count_zeros(step.check, data, info.dtype)
    for faults in experts.values():
        first = min(faults)
        info, check, found = faults[first]
        found += f" in expert {first}" + (f", the first of {len(faults)} such experts" if len(faults) > 1 else "")
        problems += _fault(info, check, found).problems
    if norms and all(SHIFTED_NORM[0] < value < SHIFTED_NORM[1] for _, value in norms):
        info, value = norms[0]
        problems.append(
            Problem(
                info.file, info.name, "norm weights around 0, to which the model adds 1",
                f"{value:.2f} on average, and around 1 in all {len(norms)} norms: 1 is added already",
                f"an MLX repack stores them so: subtract 1 from them, or {ORIGINAL}",
            )
        )
    if problems:
        raise ConvertError(problems)
    return zeros


class _Target:
    """A file of OUT that is being written: counts progress, and stops between pieces when the run is given up."""

    def __init__(self, stream: BinaryIO, progress: Progress, stop: threading.Event) -> None:
        self._stream, self._progress, self._stop = stream, progress, stop

    def _advance(self, nbytes: int) -> None:
        self._progress(nbytes)
        if self._stop.is_set():
            raise InterruptedError("the conversion was given up")

    def write(self, data: bytes) -> None:
        """Append all of `data`: an unbuffered write may stop short."""
        view = memoryview(data)
        while view:
            written = self._stream.write(view)
            view = view[written:]
            self._advance(written)

    def copy_range(self, files: _Files, info: TensorInfo) -> None:
        """Append a tensor's bytes, in the kernel where platform and file systems allow it."""
        descriptor, position = files.descriptor(info.file), info.start
        while position < info.end and hasattr(os, "copy_file_range"):
            try:
                count = min(COPY_AT_ONCE, info.end - position)
                copied = os.copy_file_range(descriptor, self._stream.fileno(), count, position)
            except OSError as error:
                if error.errno not in NOT_POSSIBLE:
                    raise
                break
            if copied == 0:
                raise _changed(info.file)
            position += copied
            self._advance(copied)
        for piece in files.pieces(TensorInfo(info.name, info.dtype, info.shape, info.file, position, info.end)):
            self.write(piece)


def _write_step(plan: Plan, step: Step, files: _Files, target: _Target) -> int:
    """Append one canonical tensor to `target`.  Returns the number of zero block scales in it."""
    zeros = 0
    for term in step.terms:
        info = plan.source.tensors[term.source].rows(term.rows)
        if term.transform == "copy" and term.repeat == 1:
            if step.check in STREAMED_CHECKS:
                for piece in files.pieces(info):
                    found = find_fault(step.check, piece, info.dtype)
                    if found:
                        raise _fault(info, step.check, found)
                    zeros += count_zeros(step.check, piece, info.dtype)
                    target.write(piece)
            else:
                target.copy_range(files, info)
            continue
        for part in info.split() if term.transform.startswith("transpose") else (info,):
            data = files.read(part)
            if step.check in STREAMED_CHECKS:
                found = find_fault(step.check, data, info.dtype)
                if found:
                    raise _fault(info, step.check, found)
                zeros += count_zeros(step.check, data, info.dtype)
            data = transform(term.transform, data, info.dtype, info.shape[-1] if info.shape else 1)
            for _ in range(term.repeat):
                target.write(data)
    return zeros


def _write_shard(
    plan: Plan, name: str, files: _Files, staging: Path, progress: Progress, stop: threading.Event
) -> int:
    """Write one shard of OUT and flush it.  Returns the number of zero block scales in it."""
    steps = [plan.steps[i] for i in plan.shards[name]]
    zeros = 0
    with (staging / name).open("wb", buffering=0) as stream:
        _Target(stream, lambda _: None, stop).write(header_bytes((s.name, s.dtype, s.shape, s.nbytes) for s in steps))
        target = _Target(stream, progress, stop)
        for step in steps:
            zeros += _write_step(plan, step, files, target)
        os.fsync(stream.fileno())
    return zeros


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people to read, and flush it to disk."""
    with path.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def _copy_side_files(plan: Plan, staging: Path) -> None:
    for relative, path in plan.source.side_files.items():
        target = staging / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _write_adapters(plan: Plan, files: _Files, staging: Path, stop: threading.Event) -> list[str]:
    """Write the LoRA adapters beside the base, byte for byte.  Returns the names of their files."""
    written = []
    for adapter in plan.adapters:
        folder = staging / adapter.directory
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ADAPTER_WEIGHTS).open("wb", buffering=0) as stream:
            target = _Target(stream, lambda _: None, stop)
            target.write(header_bytes((name, i.dtype, i.shape, i.end - i.start) for name, i in adapter.tensors))
            for _, info in adapter.tensors:
                target.copy_range(files, info)
            os.fsync(stream.fileno())
        write_json(folder / ADAPTER_CONFIG, dict(adapter.config))
        written += [f"{adapter.directory}/{name}" for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]
    return written


def _write_metadata(plan: Plan, staging: Path) -> None:
    """Write index and config."""
    index = {plan.steps[i].name: name for name, indices in plan.shards.items() for i in indices}
    write_json(
        staging / INDEX_FILE, {"metadata": {"total_size": plan.total_bytes}, "weight_map": dict(sorted(index.items()))}
    )
    write_json(staging / CONFIG_FILE, plan.config.to_json())


def _execute(plan: Plan, staging: Path, workers: int, hashes: bool, progress: Progress) -> Report:
    source = plan.source
    outputs: list[Future[str]] = []
    stop = threading.Event()
    with ExitStack() as stack:
        files = _Files(source.files, stack)
        zeros = check_values(plan, files)
        pool = stack.enter_context(ThreadPoolExecutor(max(1, workers)))
        hasher = stack.enter_context(ThreadPoolExecutor(1))
        try:
            inputs = [hasher.submit(file_digest, f.path) for f in source.files.values()] if hashes else []
            shards = [pool.submit(_write_shard, plan, n, files, staging, progress, stop) for n in plan.shards]
            done, _ = wait(shards, return_when=FIRST_EXCEPTION)
            zeros += sum(f.result() for f in done)
            _copy_side_files(plan, staging)
            adapter_files = _write_adapters(plan, files, staging, stop)
            _write_metadata(plan, staging)
            written = [*plan.shards, INDEX_FILE, CONFIG_FILE, *adapter_files, *sorted(source.side_files)]
            outputs = [hasher.submit(file_digest, staging / n) for n in written] if hashes else []
            source_digests = [f.result() for f in inputs]
            output_digests = [f.result() for f in outputs]
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            hasher.shutdown(wait=True, cancel_futures=True)
            raise
    for file in source.files.values():
        status = file.path.stat()
        if (status.st_size, status.st_mtime_ns, status.st_ino) != file.identity:
            raise _changed(file.name)
    report = Report(_report(plan, zeros))
    for key, names, digests in (
        ("sources", list(source.files), source_digests),
        ("outputs", written, output_digests),
    ):
        sizes = [source.files[n].identity[0] if key == "sources" else (staging / n).stat().st_size for n in names]
        report.data[key] = [
            {"file": n, "size": size, "sha256": digest or None}
            for n, size, digest in zip(names, sizes, digests or [""] * len(names), strict=True)
        ]
    write_json(staging / REPORT_FILE, report.data)
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
    in_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    workers: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
    verify: bool = False,
    hashes: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Convert a checkpoint directory into a canonical one.

    workers     threads that write shards; default `default_workers()`
    shard_size  bytes of data per output file
    force       replace a non-empty `out_dir`, once the new one is complete
    verify      prove the result against the source before `out_dir` appears
    hashes      record SHA-256 of every source and output file
    progress    called with (bytes written, total bytes) as the work goes on, from worker threads

    Returns the report.  Raises `ConvertError` when the checkpoint is refused, `UsageError` for paths that cannot be used,
    `MachineError` when the disk fails.  On any error `out_dir` is as it was before.
    """
    source, out = Path(in_dir), Path(out_dir)
    if source.is_dir():
        check_target(out, source, force)
    plan = plan_source(read_source(source), shard_size)
    written = 0
    lock = threading.Lock()

    def advance(nbytes: int) -> None:
        nonlocal written
        with lock:
            written += nbytes
            if progress is not None:
                progress(written, plan.total_bytes)

    try:
        side_bytes = sum(p.stat().st_size for p in plan.source.side_files.values())
        adapter_bytes = sum(adapter.nbytes for adapter in plan.adapters)
        with staged(out, plan.total_bytes + side_bytes + adapter_bytes) as staging:
            report = _execute(plan, staging, workers or default_workers(), hashes, advance)
            if verify:
                from .verifier import verify_conversion

                result = verify_conversion(source, staging)
                report.data["verified"] = {"tensors": result.tensors, "elements": result.elements}
    except OSError as error:
        where = str(error.filename or out)
        raise MachineError(
            Problem(where, "", "a working disk", error.strerror or repr(error), "correct this and run again: OUT is untouched")
        ) from error
    return report

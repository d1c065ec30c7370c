"""One conversion on a Ray cluster: the jobs of `convert.jobs`, one task for each file of OUT, wherever there is room.

All nodes see IN and OUT's parent under the same paths, and have this version of qconvert.  Tasks whose worker or node dies are
run again; the result is that of `qconvert IN OUT`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import ConvertError, MachineError, Problem, UsageError
from .executor import Report, proof, read_finished
from .jobs import JobPlan, commit_jobs, discard_jobs, finished_report, plan_jobs, run_job
from .source import Location, located

MAX_RETRIES = 20  # of one task: a job that was killed is begun anew, and nodes of a cluster come and go
CONNECT_S = 10.0
ERRORS = {1: ConvertError, 2: UsageError, 3: MachineError}


def _task(plan: JobPlan, number: int) -> tuple[int, list[dict[str, str]]]:
    """Run a job on a worker.  Returns its exit code and what is wrong, as exceptions of ours do not travel."""
    try:
        run_job(plan, number)
    except ConvertError as error:
        return error.exit_code, [asdict(problem) for problem in error.problems]
    return 0, []


def convert_on_ray(
    in_dir: Location,
    out_dir: str | os.PathLike[str],
    *,
    address: str | None = None,
    workers: int | None = None,
    shard_size: int | None = None,
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
    hashes: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Convert a checkpoint on a Ray cluster.

    address   of the cluster, as `ray.init` takes it; None for that of `RAY_ADDRESS`, or one started here for this run
    workers   threads that compare digests at the end, here
    resume    do nothing when `out_dir` is complete.  Files of an earlier run of the same conversion are used in any case
    progress  called with (bytes, total bytes) when a file is complete
    others    as in `convert_checkpoint`

    Returns the report.  Raises what `convert_checkpoint` raises, `UsageError` without Ray, and `MachineError` when the cluster
    cannot be reached or a task dies again and again.
    """
    ray = _import_ray()
    options: dict[str, Any] = {"shard_size": shard_size, "hashes": hashes}
    if resume and read_finished(Path(out_dir)):
        report = finished_report(plan_jobs(in_dir, out_dir, force=True, **options))
        if report is not None:
            return Report(report | proof(located(in_dir), Path(out_dir)) if verify else report)
    plan = plan_jobs(in_dir, out_dir, force=force, **options)
    ours = not ray.is_initialized()
    try:
        if ours:
            _connect(ray, address)
        _run_tasks(ray, plan, progress)
    except ConvertError as error:
        if error.exit_code == ConvertError.exit_code:
            discard_jobs(plan)
        raise
    except ray.exceptions.RayError as error:
        found = " ".join(str(error).split())[:200]
        remedy = "look at the cluster's logs; run again to go on where it stopped"
        raise MachineError(Problem("", "", "tasks that end", found, remedy)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("OUT is as it was before: run again to go on where it stopped") from None
    finally:
        if ours:
            ray.shutdown()
    return commit_jobs(plan, workers=workers, verify=verify)


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        remedy = "pip install 'qconvert[ray]'"
        raise UsageError(Problem("", "", "Ray, for --engine ray", "no such package", remedy)) from None
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one.  Raises `MachineError` when there is none at `address`."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default, about which it would warn
    try:
        host, _, port = (address or os.environ.get("RAY_ADDRESS", "")).rpartition("/")[2].rpartition(":")
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        found = " ".join(str(error).split())[:200]
        raise MachineError(
            Problem("", "", f"a Ray cluster at {address or 'this machine'}", found, "check --address and the cluster")
        ) from error


def _run_tasks(ray: Any, plan: JobPlan, progress: Callable[[int, int], None] | None) -> None:
    """Run every job.  Raises what is wrong as soon as one has failed."""
    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")(_task)
    shared = ray.put(plan)
    running = {task.remote(shared, number): number for number in range(len(plan.jobs))}
    total, done = sum(size for _, size in plan.jobs), 0
    try:
        while running:
            ended, _ = ray.wait(list(running), num_returns=1)
            for reference in ended:
                number = running.pop(reference)
                code, problems = ray.get(reference)
                if code:
                    raise ERRORS.get(code, MachineError)([Problem(**problem) for problem in problems])
                done += plan.jobs[number][1]
                if progress is not None:
                    progress(done, total)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)

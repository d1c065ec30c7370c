"""qconvert: quantised checkpoints from any producer, into one canonical form.

    import convert

    report = convert.convert_checkpoint("IN", "OUT")

Importing this package is cheap: what needs NumPy is imported when it is first used, and nothing here needs torch.
None of the functions prints.  Errors are `ConvertError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ConvertError, MachineError, Problem, UsageError

if TYPE_CHECKING:
    from .batch import Job as Job
    from .batch import convert_batch as convert_batch
    from .batch import read_jobs as read_jobs
    from .differ import Difference as Difference
    from .differ import diff_checkpoints as diff_checkpoints
    from .executor import Report as Report
    from .executor import convert_checkpoint as convert_checkpoint
    from .exporter import export_checkpoint as export_checkpoint
    from .inspector import inspect_checkpoint as inspect_checkpoint
    from .jobs import JobPlan as JobPlan
    from .jobs import commit_jobs as commit_jobs
    from .jobs import plan_jobs as plan_jobs
    from .jobs import read_plan as read_plan
    from .jobs import run_job as run_job
    from .jobs import write_plan as write_plan
    from .plan import Plan as Plan
    from .planner import plan_conversion as plan_conversion
    from .ray_engine import convert_on_ray as convert_on_ray
    from .verifier import verify_conversion as verify_conversion
    from .verifier import verify_digests as verify_digests

__version__ = "0.1.0"

_WHERE = {
    "Difference": "differ",
    "Job": "batch",
    "JobPlan": "jobs",
    "Plan": "plan",
    "Report": "executor",
    "commit_jobs": "jobs",
    "convert_batch": "batch",
    "convert_checkpoint": "executor",
    "convert_on_ray": "ray_engine",
    "diff_checkpoints": "differ",
    "export_checkpoint": "exporter",
    "inspect_checkpoint": "inspector",
    "plan_conversion": "planner",
    "plan_jobs": "jobs",
    "read_jobs": "batch",
    "read_plan": "jobs",
    "run_job": "jobs",
    "verify_conversion": "verifier",
    "verify_digests": "verifier",
    "write_plan": "jobs",
}

__all__ = ["ConvertError", "MachineError", "Problem", "UsageError", "__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

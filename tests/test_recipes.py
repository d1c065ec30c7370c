"""What the documentation hands to pipelines, run: the Python API, shell recipes, the image, the workflow, and the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from build import read_tensors

import convert
from convert.cli import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "samples" / "qwen3_5-modelopt-mixed"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
PIPELINES = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
# Schedulers run what they are given in another shell; here, at once.
SBATCH = """
for argument; do
  case $argument in
    --array=*) last=${argument##*-};;
    --wrap) ;;
    --*) ;;
    *) wrapped=$argument;;
  esac
done
for SLURM_ARRAY_TASK_ID in $(seq 0 ${last:-0}); do export SLURM_ARRAY_TASK_ID; sh -c "$wrapped" >&2 || exit 1; done
echo 7
"""

# The command line of the packages in a folder, and of no others.
INSTALLED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert.cli
print(convert.__file__)
sys.exit(convert.cli.main())
"""


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with `samples/`, and `qconvert` on the path."""
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / "bin").mkdir()
    python = f'PYTHONPATH="{ROOT}" exec "{sys.executable}"'
    for name, script in (("qconvert", f'{python} -m convert "$@"'), ("sbatch", SBATCH)):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_api_page(folder: Path) -> None:
    """Every block of docs/api.md, from top to bottom."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"docs/api.md, block {number}", "exec"), names)
    assert read_tensors(folder / "parts") == read_tensors(folder / "out")
    public = set(convert.__all__) - {"__version__", "Plan", "Report", "Problem", "JobPlan"}
    assert [name for name in sorted(public) if name not in page] == []


def run(script: str) -> None:
    """Run a shell block; every command in it must succeed."""
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def recipe(words: str) -> str:
    """The shell block of docs/pipelines.md that has these words."""
    (found,) = [block for block in blocks(PIPELINES, "sh") if words in block]
    return found


def test_scheduler_recipes(folder: Path) -> None:
    """The recipe for `xargs`, and that for Slurm with its plan: both give a plain conversion."""
    convert.convert_checkpoint(SAMPLE, "plain", shard_size=2_000_000)
    for number, script in enumerate([recipe("xargs"), recipe("xargs").splitlines()[0] + "\n" + recipe("sbatch")]):
        run(script)
        os.rename("out", f"out{number}")
        assert sorted(os.listdir(f"out{number}")) == sorted(os.listdir("plain"))
        for path in Path("plain").iterdir():
            assert (Path(f"out{number}") / path.name).read_bytes() == path.read_bytes()
    assert sorted(os.listdir(folder)) == ["bin", "out0", "out1", "plain", "plan.json", "samples"]


def test_batch_recipe(folder: Path) -> None:
    """The YAML of the page is a list of jobs."""
    (text,) = [block for block in blocks(PIPELINES, "yaml") if "jobs:" in block]
    Path("jobs.yaml").write_text(text)
    jobs = convert.read_jobs(["jobs.yaml"])
    assert [job.options for job in jobs] == [{"verify": True}, {"verify": True, "shard_size": "2GB", "workers": 4}]


@pytest.mark.parametrize("line", re.findall(r"^qconvert .*$", PIPELINES, re.MULTILINE))
def test_commands_of_the_page(line: str) -> None:
    """Each command of the page is accepted as it is written."""
    words = line.replace("'", "").split()[1:]
    context = cli.make_context("qconvert", words)
    name, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    command.make_context(name, rest, parent=context)


def test_kubernetes_recipe() -> None:
    """The manifest is YAML whose container runs a job of the plan, and whose exit codes are those of qconvert."""
    (text,) = [block for block in blocks(PIPELINES, "yaml") if "Indexed" in block]
    spec = yaml.safe_load(text)["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["args"] == ["run-job", "/models/plan.json", "$(JOB_COMPLETION_INDEX)"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [
        convert.ConvertError.exit_code, convert.UsageError.exit_code,
    ]  # fmt: skip


def test_image() -> None:
    """The Dockerfile copies what there is and what the build needs, and starts the command that the project installs."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = PROJECT["project"]
    assert {"pyproject.toml", project["readme"], *project["license-files"], "convert", "runtime"} <= {*copied}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{name}" for name in copied} <= {*ignored}
    assert 'ENTRYPOINT ["qconvert"]' in lines
    assert "qconvert" in project["scripts"]


def test_workflow() -> None:
    """CI runs the commands of the Makefile, on the oldest Python that is supported and a new one."""
    steps = [step.get("run", "") for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {word for step in steps for word in re.findall(r"make (\w+)", step)}
    assert {"lint", "test"} <= targets <= {*re.findall(r"^(\w+):", makefile, re.MULTILINE)}
    versions = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions[0] == PROJECT["project"]["requires-python"].removeprefix(">=")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    for name in re.findall(r"tests/\w+\.py", " ".join(hook["entry"] for hook in hooks)):
        assert (ROOT / name).exists()


def test_wheel(tmp_path: Path) -> None:
    """The wheel has every module and marker of both packages and nothing else, and converts by itself."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("convert", "runtime", "tests", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("qconvert-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    (entry_points,) = (tmp_path / "installed").glob("*.dist-info/entry_points.txt")
    assert "qconvert = convert.cli:main" in entry_points.read_text()
    files = {path for name in ("convert", "runtime") for path in (source / name).rglob("*") if path.is_file()}
    assert names == {path.relative_to(source).as_posix() for path in files}

    command = [sys.executable, "-I", "-c", INSTALLED, str(tmp_path / "installed"), str(SAMPLE), "out", "--verify"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path / "installed"))
    assert len(read_tensors(tmp_path / "out")) == len(convert.plan_conversion(SAMPLE).steps)

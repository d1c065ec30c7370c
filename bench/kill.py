"""SIGKILL at random moments: OUT is absent, or complete and verified; `--resume` completes it, equal to an undisturbed run.

    python -m bench.kill [--kills 200] [--seconds 1800] [--megabytes 600] [--folder DIR]

Moments are spread evenly over the time that an undisturbed run takes, the start of the interpreter included.  A run that
resumes is killed as well, one time in two.  Ends with status 1 at the first OUT that is neither absent nor right.
"""

from __future__ import annotations

import argparse
import filecmp
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.convert import ROOT, dense, generate


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = [sorted(p.relative_to(folder) for p in folder.rglob("*")) for folder in (a, b)]
    return names[0] == names[1] and all(filecmp.cmp(a / n, b / n, shallow=False) for n in names[0] if (a / n).is_file())


def start(*args: object) -> subprocess.Popen[bytes]:
    """Start a command of qconvert."""
    command = [sys.executable, "-m", "convert", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Kill, look, resume, compare; print what was met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1800, help="stop after so long")
    parser.add_argument("--megabytes", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    moments, met = random.Random(args.seed), Counter[str]()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        source, clean, out = folder / "in", folder / "clean", folder / "out"
        config, entries = dense("fp8", int(args.megabytes * 1e6))
        generate(source, config, entries)
        options = ("--shard-size", "40MB", "--no-hash")
        began = time.monotonic()
        if start(source, clean, *options).wait() or start("verify", source, clean).wait():
            sys.exit("the undisturbed run failed")
        took_s = (time.monotonic() - began) / 2
        end = time.monotonic() + args.seconds
        while met["kills"] < args.kills and time.monotonic() < end:
            shutil.rmtree(out, ignore_errors=True)
            resume: tuple[str, ...] = ()
            while True:
                process = start(source, out, *options, *resume)
                time.sleep(moments.uniform(0, took_s))
                ended = process.poll() is not None
                process.kill()
                process.wait()
                met["kills"] += 1
                met["too late"] += ended
                if out.exists():
                    met["complete"] += 1
                    if not same(out, clean):
                        sys.exit(f"OUT exists and differs after {met['kills']} kills")
                else:
                    partial = folder / ".out.partial"
                    met["absent, files to resume from" if any(partial.glob("*.safetensors")) else "absent, nothing yet"] += 1
                resume = ("--resume",)
                if moments.random() < 0.5:
                    break
            if start(source, out, *options, "--resume").wait():
                sys.exit("the run that resumes failed")
            left = sorted(p.name for p in folder.iterdir())
            if not same(out, clean) or left != ["clean", "in", "out"]:
                sys.exit(f"after --resume: {left}, OUT {'equal' if same(out, clean) else 'differs'}")
            met["resumed, equal"] += 1
    print(f"an undisturbed run takes {took_s:.2f} s; " + "; ".join(f"{what}: {count}" for what, count in met.items()))


if __name__ == "__main__":
    main()

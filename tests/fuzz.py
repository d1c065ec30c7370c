"""Fuzzing: damaged headers, configs and indexes must be refused in a sentence, never crash, hang or fill the memory.

    python tests/fuzz.py headers|source|canonical|network [--seconds N] [--seed S] [--folder DIR]

headers    bytes of safetensors files, through the converter's reader and the runtime's; what the converter accepts, the
           safetensors library must accept with the same names, dtypes and shapes
source     config.json, hf_quant_config.json, index and headers of tiny checkpoints of all dialects, through `inspect`,
           `--dry-run`, and one in ten through the whole conversion and its proof
canonical  config.json, index, report and headers of converted checkpoints, through `inspect`, `diff`, `verify`
           and `export`
network    the same through `runtime.load_model`

What breaks one of these stops the run with exit code 1, and is kept in the folder for a corpus file in `tests/corpus`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for entry in (str(ROOT), str(ROOT / "tests")):
    if entry not in sys.path:
        sys.path.insert(0, entry)

CORPUS = ROOT / "tests" / "corpus"
MAX_SECONDS = 10.0  # longest CPU time that one input may take
MAX_WAIT = 3600.0  # longest time without an end of fifty inputs
MAX_MEMORY = 1 << 30  # address space that a run may take beyond what it has at its start
LINE = re.compile(r"qconvert: (.*expected .+, found .+; .+|\.\.\. and \d+ more problems)|note: .+")

Rng = random.Random
Json = Any

# ------------------------------------------------------------------------------------------------------------ mutations


class Again(str):
    """A key that differs from every other, so that an object can hold it twice."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


DEEP = "\x00deep"  # stands for brackets that Python cannot write
NUMBERS: tuple[Json, ...] = (
    0, 1, -1, 2, 3, 7, 127, 128, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 2**64 - 8, 10**30, -(2**63),
    0.0, -0.0, 0.5, 1.5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", " ", ".", "..", "../../x", "/etc/passwd", "a\\b", "C:x", "~", "http://x/y", "\x00", "\n", "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07", "\u202e", "\u2028", "\ud800", "é", "e\u0301", "\U0001f600", "x" * 5000, "0", "-1", "1e9", "null",
    "BF16", "F32", "F8_E4M3", "F8_E8M0", "U8", "F4", "F99", "BOOL", "I64", "fp8", "nvfp4", "FP8", "NVFP4", "MIXED_PRECISION",
    "mxfp4", "dense", "separate", "tied", "full_attention", "linear_attention", "Linear", "re:.*", "re:(", "re:(a+)+$", "*",
    "?", "[", "model", "model.", "lm_head", "model.layers.0", "model.layers.-1", "model.layers.99999999999999999999.mlp",
    "model.layers.0.self_attn.q_proj", "layers.0.mlp.gate_proj", "__metadata__", "qconvert", "config.json", "format",
)  # fmt: skip
OTHERS: tuple[Json, ...] = (None, True, False, [], {}, [[]], [{}], [None], {"": None}, {"a": 1}, [1, 2, 3], ["x"], [0], DEEP)
TOKENS = (
    b'"', b"{", b"}", b"[", b"]", b":", b",", b"\\", b"\x00", b"\xff", b"\xef\xbb\xbf", b"NaN", b"Infinity", b"-Infinity",
    b"1e999", b"-0", b"1.0", b"00", b"9" * 30, b"9" * 5000, b"\\u0000", b"\\ud800", b"\\u001b", b"null", b"true", b" " * 100,
    b"[" * 3000, b'{"a":' * 3000, b"\xc3\x28", b"\xed\xa0\x80", b"\n", b"\t", b"//", b"'",
)  # fmt: skip


def random_value(rng: Rng) -> Json:
    """A value that a reader may not expect."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    return rng.choice(OTHERS)


def _places(value: Json, found: list[tuple[Json, Any]]) -> list[tuple[Json, Any]]:
    """Every (container, key) below a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found.append((value, key))
        _places(inner, found)
    return found


def _change(rng: Rng, value: Json, places: list[tuple[Json, Any]]) -> None:
    """Change one place of a JSON value."""
    container, key = rng.choice(places)
    try:
        old = container[key]
    except (KeyError, IndexError):
        return  # gone with an earlier change
    kind = rng.randrange(12)
    if kind < 4:
        container[key] = random_value(rng)
    elif kind == 4 and type(old) in (int, float):
        container[key] = rng.choice([old + 1, old - 1, old * 2, -old, float(old), str(old), [old], bool(old)])
    elif kind == 5:
        del container[key]
    elif kind == 6:
        other, at = rng.choice(places)
        with contextlib.suppress(KeyError, IndexError):
            container[key] = json.loads(json.dumps(other[at], default=str))
    elif kind == 7:
        container[key] = rng.choice(([old], {"x": old}, [old, old], str(old)[:200]))
    elif kind == 8 and isinstance(container, dict):
        container[Again(key)] = rng.choice((old, random_value(rng)))
    elif kind == 9 and isinstance(container, dict):
        container[rng.choice((rng.choice(TEXTS), f"{key}{rng.choice(TEXTS)[:20]}", f"{key}"[1:]))] = container.pop(key)
    elif kind == 10 and isinstance(old, str):
        at = rng.randrange(len(old) + 1)
        container[key] = old[:at] + rng.choice(TEXTS)[:50] + old[at + rng.randrange(3) :]
    elif isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), rng.choice((old, random_value(rng))))
    elif isinstance(container, dict):
        container[rng.choice(TEXTS)] = random_value(rng)


def json_bytes(value: Json, rng: Rng) -> bytes:
    """JSON text of a mutated value; what Python cannot write is put in afterwards."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9, allow_nan=True).encode("utf-8", "surrogatepass")
    if b"\\u0000deep" in text:
        depth = rng.choice((10, 500, 2000, 100_000))
        text = text.replace(b'"\\u0000deep"', b"[" * depth + b"]" * depth, 1)
    return text


def mutate_json(rng: Rng, text: bytes, changes: int = 3) -> bytes:
    """JSON text with some places changed."""
    value = json.loads(text)
    if rng.random() < 0.01:
        return json_bytes(random_value(rng), rng)
    places = _places(value, [])
    for _ in range(rng.randint(1, changes)):
        if places:
            _change(rng, value, places)
    return json_bytes(value, rng)


def mutate_bytes(rng: Rng, data: bytes, changes: int = 3) -> bytes:
    """Bytes with some flipped, cut out, repeated, put in or cut off."""
    work = bytearray(data)
    for _ in range(rng.randint(1, changes)):
        at = rng.randrange(len(work) + 1)
        kind = rng.randrange(7)
        if kind == 0 and work:
            work[at % len(work)] ^= 1 << rng.randrange(8)
        elif kind == 1 and work:
            work[at % len(work)] = rng.randrange(256)
        elif kind == 2:
            del work[at : at + rng.randint(1, 8)]
        elif kind == 3:
            work[at:at] = rng.choice(TOKENS)
        elif kind == 4:
            work[at:at] = work[at : at + rng.randint(1, 60)]
        elif kind == 5 and rng.random() < 0.3:
            del work[at:]
        else:
            token = rng.choice(TOKENS)
            work[at : at + len(token)] = token
    return bytes(work)


def mutate_header(rng: Rng, data: bytes) -> bytes:
    """A safetensors file whose header or data is damaged; its stated length fits most of the time."""
    (length,) = struct.unpack("<Q", data[:8]) if len(data) >= 8 else (0,)
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(10)
    if kind == 0:
        return mutate_bytes(rng, data)
    if kind < 7:
        try:
            header = mutate_json(rng, header)
        except (ValueError, RecursionError):
            header = mutate_bytes(rng, header)
    else:
        header = mutate_bytes(rng, header)
    if rng.random() < 0.1:
        body = rng.choice((b"", body[:-1], body + b"\0", body * 2))
    stated = len(header)
    if rng.random() < 0.05:
        stated = rng.choice((0, 1, 2, stated - 1, stated + 1, 2**31, 2**32, 2**63, 2**64 - 1, 101_000_000)) % 2**64
    return struct.pack("<Q", stated) + header + body


# -------------------------------------------------------------------------------------------------------------- targets


class BrokenError(AssertionError):
    """An input that did what no input may do."""


def check_header(folder: Path, data: bytes) -> bool:
    """Give a file to both readers of headers and to the library.  Returns whether the converter accepts it."""
    import safetensors

    from convert.errors import ConvertError
    from convert.source import read_header
    from runtime.errors import LoadError
    from runtime.shards import Shard

    path = folder / "x.safetensors"
    path.write_bytes(data)
    ours: list[tuple[str, str, tuple[int, ...]]] | None = None
    try:
        ours = sorted((info.name, info.dtype, tuple(info.shape)) for info in read_header(path, path.name))
    except ConvertError as error:
        check_text(f"qconvert: {error}\n".replace("\n", "\nqconvert: ").removesuffix("qconvert: "), lines=True)
    loaded: list[tuple[str, str, tuple[int, ...]]] | None = None
    try:
        shard = Shard(folder, path.name)
        loaded = sorted((name, t.dtype, t.shape) for name, t in shard.tensors.items())
        shard.close()
    except LoadError as error:
        if not str(error).isprintable():
            raise BrokenError(f"control characters or lines in {str(error)!r}") from None
    if ours is not None:
        if ours != loaded:
            raise BrokenError(f"accepted as {ours}, by the runtime as {loaded}")
        try:
            theirs = sorted((n, t["dtype"], tuple(t["shape"])) for n, t in safetensors.deserialize(data))
        except safetensors.SafetensorError as error:
            raise BrokenError(f"accepted, though not by safetensors: {error}") from None
        if [(n, s) for n, _, s in theirs] != [(n, s) for n, _, s in ours]:
            raise BrokenError(f"accepted as {ours}, by safetensors as {theirs}")
    return ours is not None


def check_text(text: str, *, lines: bool = False) -> None:
    """No control character reaches the terminal; with `lines`, each line is an error that a person can act on."""
    for line in text.splitlines():
        if not line.isprintable():
            raise BrokenError(f"control characters in {line!r}")
        if lines and not LINE.fullmatch(line):
            raise BrokenError(f"not a complete message: {line!r}")


def run_cli(*args: object, said: bool = True) -> int:
    """Run a command in this process and check what it says.  Returns its exit code, 0 or 1; `said`: 1 with a reason."""
    from convert.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in args])
    if code not in (0, 1):
        raise BrokenError(f"exit code {code} of {args[0]}: {err.getvalue()}")
    check_text(out.getvalue())
    check_text(err.getvalue(), lines=True)
    if said and code and not err.getvalue():
        raise BrokenError(f"nothing said by {args[0]}")
    return code


def check_source(folder: Path, rng: Rng) -> str:
    """Commands on the source checkpoint in `folder`; what converts must pass its proof."""
    code = run_cli("inspect", folder, "--no-values", *(["--json"] if rng.random() < 0.1 else []))
    page = folder.parent / "page.html"
    # Values may be refused that headers allow, not the other way round.
    if rng.random() < 0.2 and run_cli("inspect", folder, "--tensors", "--html", page) < code:
        raise BrokenError("inspect accepts with its values what it refuses without")
    out = folder.parent / "out"
    if rng.random() < 0.5 and run_cli(folder, out, "--dry-run") != code:
        raise BrokenError("inspect and --dry-run disagree")
    if code == 0 and rng.random() < 0.2:
        shutil.rmtree(out, ignore_errors=True)
        if run_cli(folder, out, "--no-hash") == 0:
            if run_cli("verify", folder, out) != 0:
                raise BrokenError("converts, but does not verify")
            if run_cli("diff", folder, out) != 0:
                raise BrokenError("verifies, but differs")
            return "converts"
        if out.exists():
            raise BrokenError("refused, but OUT is there")
    return "accepted" if code == 0 else "refused"


def check_canonical(folder: Path, rng: Rng) -> str:
    """Commands on the canonical checkpoint in `folder`, a copy of a conversion of its sibling `in`."""
    codes = [run_cli("inspect", folder, "--html", folder.parent / "page.html"), run_cli("verify", folder)]
    run_cli("diff", folder.parent / "in", folder, said=False)
    if rng.random() < 0.5:
        codes.append(run_cli("verify", folder.parent / "in", folder))
    if rng.random() < 0.5:
        dense = folder.parent / "dense"
        shutil.rmtree(dense, ignore_errors=True)
        form = rng.choice((["dense"], ["compressed-tensors"], ["compressed-tensors", "--requantize"]))
        codes.append(run_cli("export", folder, dense, "--to", *form))
        if codes[-1] and dense.exists():
            raise BrokenError("export refused, but its directory is there")
    return "refused" if any(codes) else "accepted"


def check_network(folder: Path, rng: Rng) -> str:
    """Load the canonical checkpoint in `folder`, and run what loads."""
    import torch

    import runtime
    from runtime.errors import LoadError
    from runtime.format import FormatError

    try:
        model = runtime.load_model(folder, drafts=rng.random() < 0.3)
    except (LoadError, FormatError, MemoryError) as error:
        if isinstance(error, MemoryError) and "expected" not in str(error):
            raise BrokenError(f"memory: {error!r}") from error
        if not str(error).isprintable():
            raise BrokenError(f"control characters or lines in {str(error)!r}") from None
        return "refused"
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    return "accepted"


# -------------------------------------------------------------------------------------------------------------- the run

SOURCES: tuple[dict[str, Any], ...] = (
    {"family": "qwen3_5", "dialect": "modelopt", "scheme": "mixed", "wrapper": True, "mtp": True, "form": "both"},
    {"family": "qwen3", "dialect": "modelopt", "scheme": "nvfp4", "form": "both", "kv": "tensor"},
    {"family": "qwen3_5", "dialect": "modelopt", "scheme": "fp8", "shards": 3},
    {"family": "qwen3", "dialect": "compressed-tensors", "scheme": "mixed", "shards": 2},
    {"family": "llama", "dialect": "compressed-tensors", "scheme": "fp8_static", "bias": True},
    {"family": "qwen3_5", "dialect": "fp8", "scheme": "block"},
    {"family": "qwen3_moe", "dialect": "modelopt", "scheme": "nvfp4", "layout": "X1"},
    {"family": "nemotron_h", "dialect": "modelopt", "scheme": "mixed"},
    {"family": "step3p5", "dialect": "fp8", "scheme": "tensor_static"},
    {"family": "mistral", "dialect": "dense", "scheme": "bf16"},
)


def checkpoints(folder: Path, canonical: bool) -> list[Path]:
    """Tiny checkpoints of every kind, each in a folder of its own as `in`, converted as `out`."""
    from build import build

    import convert

    made = []
    for number, options in enumerate(SOURCES):
        home = folder / f"good{number}"
        build(home / "in", **options)
        if canonical:
            convert.convert_checkpoint(home / "in", home / "out", shard_size=200_000)
        made.append(home)
    return made


def damage(rng: Rng, folder: Path, good: Path) -> dict[str, bytes]:
    """Damage one or two files of a checkpoint.  Returns what was written."""
    names = sorted(p.name for p in good.iterdir() if p.name.endswith((".json", ".safetensors")))
    plain = [n for n in names if not n.endswith(".safetensors")]
    written = {}
    for name in {rng.choice(plain if rng.random() < 0.8 else names) for _ in range(rng.choice((1, 1, 1, 2)))}:
        data = (good / name).read_bytes()
        if name.endswith(".safetensors"):
            data = mutate_header(rng, data)
        elif rng.random() < 0.85:
            data = mutate_json(rng, data)
        else:
            data = mutate_bytes(rng, data)
        (folder / name).write_bytes(data)
        written[name] = data
    return written


def headers(rng: Rng, folder: Path) -> Iterator[Callable[[], str]]:
    """Damaged headers of the corpus and of tiny files, without end."""
    seeds = [p.read_bytes() for p in sorted(CORPUS.glob("*.safetensors"))]
    while True:
        data = mutate_header(rng, rng.choice(seeds))
        yield lambda data=data: "accepted" if check_header(folder, data) else "refused"  # type: ignore[misc]


def damaged(rng: Rng, folder: Path, canonical: bool, check: Callable[[Path, Rng], str]) -> Iterator[Callable[[], str]]:
    """Damaged checkpoints, without end."""
    good = checkpoints(folder, canonical)
    which = "out" if canonical else "in"
    while True:
        home = rng.choice(good)
        work = home / "work"
        if not work.exists():
            shutil.copytree(home / which, work)
        written = damage(rng, work, home / which)
        (folder / "last").write_text(f"{work}: {sorted(written)}")
        yield lambda work=work: check(work, rng)  # type: ignore[misc]
        for name in written:
            shutil.copyfile(home / which / name, work / name)


TARGETS: dict[str, Callable[[Rng, Path], Iterator[Callable[[], str]]]] = {
    "headers": headers,
    "source": lambda rng, folder: damaged(rng, folder, False, check_source),
    "canonical": lambda rng, folder: damaged(rng, folder, True, check_canonical),
    "network": lambda rng, folder: damaged(rng, folder, True, check_network),
}


def limit_memory() -> None:
    """Let a reader that would fill the memory fail instead."""
    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MEMORY, resource.RLIM_INFINITY))


def run(target: str, seconds: float, seed: int, folder: Path, count: int | None = None, keep_going: bool = False) -> int:
    """Fuzz one target for some time; print what was reached.  Returns the exit code."""
    import torch

    import convert
    import runtime  # noqa: F401

    print(f"{target}: seed {seed}, converter {convert.__file__}", flush=True)
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGPROF, chain=True)  # shows where it hangs, and ends
    rng = random.Random(seed)
    results: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    inputs = TARGETS[target](rng, folder)
    start = time.monotonic()
    slowest, number, said = 0.0, 0, start
    for step in inputs:
        if number == 1:  # all is imported
            limit_memory()
        if number % 50 == 0:  # CPU time, so that a process may be stopped and continued; and a wait without end is a hang too
            signal.setitimer(signal.ITIMER_PROF, 20 * MAX_SECONDS)
            faulthandler.dump_traceback_later(MAX_WAIT, exit=True)
        began = time.process_time()
        try:
            results[step()] += 1
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "/tests/" not in f.filename] or frames
            key = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}" + (
                f" {error}"[:60] if isinstance(error, BrokenError) else ""
            )
            faults[key] += 1
            if faults[key] == 1:
                traceback.print_exc()
                kept = folder / f"fault{len(faults)}"
                last = folder / ("x.safetensors" if target == "headers" else "last")
                if target == "headers":
                    shutil.copyfile(last, kept)
                else:
                    work = Path(last.read_text().partition(": ")[0])
                    shutil.copytree(work, kept, dirs_exist_ok=True)
                print(f"input {number}: {key}: kept as {kept} ({last.read_bytes()[:200]!r})", flush=True)
            if not keep_going:
                return 1
        took = time.process_time() - began
        slowest, number = max(slowest, took), number + 1
        if took > MAX_SECONDS:
            print(f"input {number} took {took:.1f} s", flush=True)
            return 1
        now = time.monotonic()
        if now - said > 30:
            said = now
            print(f"  {number} inputs in {now - start:.0f} s, {dict(results)}, {sum(faults.values())} faults", flush=True)
        if now - start > seconds or (count is not None and number >= count):
            break
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_PROF, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{target}: {number} inputs in {time.monotonic() - start:.0f} s, {dict(results)}, slowest {slowest:.2f} s, "
          f"peak {peak:.0f} MB, {sum(faults.values())} faults", flush=True)  # fmt: skip
    for key, times in faults.most_common():
        print(f"  {times} x {key}")
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--count", type=int, default=None, help="stop after so many inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where inputs lie (memory is faster); kept")
    parser.add_argument("--keep-going", action="store_true", help="count faults instead of stopping at the first")
    args = parser.parse_args(argv)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fuzz"))
    folder.mkdir(parents=True, exist_ok=True)
    return run(args.target, args.seconds, args.seed, folder, args.count, args.keep_going)


if __name__ == "__main__":
    sys.exit(main())

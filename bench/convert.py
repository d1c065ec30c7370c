"""Conversion against a plain copy, and verification against plain reading, in one run.

    python -m bench.convert [--case fp8|nvfp4|moe] [--gigabytes 3] [--runs 5] [--folder DIR] [--xfs] [--aligned] [--json]

Cases, as nvidia-modelopt writes them and in the order of `safetensors.torch.save_file` (widest dtype first, then by name):
fp8    Qwen3.5 dense, hidden 4096: names and scalar shapes change, and some rows are fused
nvfp4  the same in NVFP4, with block scales, which are looked at
moe    Qwen3.5-MoE, hidden 2048, 256 experts a layer stored one by one, tower and MTP head: fused and stacked

Each figure is the median of interleaved runs in fresh processes, after a sync; what counts is the ratio within the run, because
machines differ and are noisy.  IN is read before each of them, so that it is in the page cache (warm); each round starts with a
copy that does not count, because memory that was idle is slow on virtual machines.  qconvert flushes everything to disk before
OUT appears and `cp` does not, so `cp` and a sync is another row.  `--xfs`: on a file system with reflinks, made in a file and
mounted for the run (needs root); `cp` is told not to clone.  `--aligned`: IN without its tower, and each of its tensors that
fills whole blocks starts with a block, so that nearly everything can be cloned.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.plan import modelopt_excluded, qwen3_5_moe
from convert.layout import BLOCK

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "samples" / "qwen3_5-modelopt-mixed"
HIDDEN, INTER, VOCAB = 4096, 12288, 32768
HEADS, KV_HEADS, HEAD = 16, 4, 256
KEY_HEADS, VALUE_HEADS, LINEAR_HEAD = 16, 32, 128

FIRST = "first copy, not counted"

READ = """
import os, sys
buffer = bytearray(1 << 18)
for folder in sys.argv[1:]:
    for entry in os.scandir(folder):
        with open(entry, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
"""

Entry = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape
WIDTH = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}


def layer_tensors(index: int, scheme: str) -> Iterator[Entry]:
    """Stored tensors of one decoder layer; every fourth one is full attention."""
    prefix = f"model.language_model.layers.{index}"
    key, value = KEY_HEADS * LINEAR_HEAD, VALUE_HEADS * LINEAR_HEAD
    linears = {"mlp.gate_proj": (INTER, HIDDEN), "mlp.up_proj": (INTER, HIDDEN), "mlp.down_proj": (HIDDEN, INTER)}
    if (index + 1) % 4 == 0:
        linears["self_attn.q_proj"] = (2 * HEADS * HEAD, HIDDEN)
        linears["self_attn.k_proj"] = linears["self_attn.v_proj"] = (KV_HEADS * HEAD, HIDDEN)
        linears["self_attn.o_proj"] = (HIDDEN, HEADS * HEAD)
        yield from ((f"{prefix}.self_attn.{n}_norm.weight", "BF16", (HEAD,)) for n in "qk")
    else:
        linears["linear_attn.in_proj_qkv"] = (2 * key + value, HIDDEN)
        linears["linear_attn.in_proj_z"] = (value, HIDDEN)
        linears["linear_attn.out_proj"] = (HIDDEN, value)
        yield from ((f"{prefix}.linear_attn.in_proj_{n}.weight", "BF16", (VALUE_HEADS, HIDDEN)) for n in "ab")
        yield f"{prefix}.linear_attn.conv1d.weight", "BF16", (2 * key + value, 1, 4)
        yield f"{prefix}.linear_attn.A_log", "F32", (VALUE_HEADS,)
        yield f"{prefix}.linear_attn.dt_bias", "BF16", (VALUE_HEADS,)
        yield f"{prefix}.linear_attn.norm.weight", "F32", (LINEAR_HEAD,)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}.weight", "BF16", (HIDDEN,)
    for name, (n, k) in linears.items():
        module = f"{prefix}.{name}"
        if scheme == "fp8":
            yield f"{module}.weight", "F8_E4M3", (n, k)
            yield f"{module}.weight_scale", "F32", ()
        else:
            yield f"{module}.weight", "U8", (n, k // 2)
            yield f"{module}.weight_scale", "F8_E4M3", (n, k // 16)
            yield f"{module}.weight_scale_2", "F32", ()
        yield f"{module}.input_scale", "F32", ()


def nbytes(entry: Entry) -> int:
    """Size of a tensor in bytes."""
    return WIDTH[entry[1]] * int(np.prod(entry[2], dtype=np.int64))


def dense(scheme: str, size: int) -> tuple[dict[str, Any], list[Entry]]:
    """Config and tensors of a Qwen3.5 model of about `size` bytes."""
    entries: list[Entry] = [
        ("model.language_model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN)),
        ("model.language_model.norm.weight", "BF16", (HIDDEN,)),
        ("lm_head.weight", "BF16", (VOCAB, HIDDEN)),
    ]
    layers = 0
    while sum(map(nbytes, entries)) < size or layers % 4:
        entries += layer_tensors(layers, scheme)
        layers += 1
    algo = {"fp8": {"quant_algo": "FP8"}, "nvfp4": {"quant_algo": "NVFP4", "group_size": 16}}[scheme]
    text = {
        "model_type": "qwen3_5_text", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INTER,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
        "linear_num_key_heads": KEY_HEADS, "linear_num_value_heads": VALUE_HEADS, "linear_key_head_dim": LINEAR_HEAD,
        "linear_value_head_dim": LINEAR_HEAD, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e7},
        "max_position_embeddings": 262144,
    }  # fmt: skip
    config = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": text,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "modelopt", "ignore": ["lm_head", "*.in_proj_a", "*.in_proj_b"], **algo},
    }
    return config, entries


def mixture(size: int, tower: bool) -> tuple[dict[str, Any], list[Entry]]:
    """Config and tensors of a Qwen3.5-MoE model of about `size` bytes, with a small vocabulary: it is about experts."""

    def scheme(module: str) -> str:
        return "nvfp4" if ".mlp.experts." in module or "shared_expert." in module else "bf16"

    layers = 4
    while True:
        config, generated = qwen3_5_moe(
            scheme, layers=layers, hidden=2048, experts=256, inner=512, heads=16, value_heads=32
        )
        heads = ("embed_tokens.weight", "lm_head.weight")
        entries = [(n, d, (VOCAB, *s[1:]) if n.endswith(heads) else s) for n, d, s in generated]
        entries = [e for e in entries if tower or not e[0].startswith("model.visual.")]
        if sum(map(nbytes, entries)) >= size:
            break
        layers += 1
    config["text_config"]["vocab_size"] = VOCAB
    if not tower:
        del config["vision_config"]
    config["quantization_config"] = {"quant_method": "modelopt", **modelopt_excluded(entries)["quantization"]}
    return config, entries


def generate(folder: Path, config: dict[str, Any], entries: list[Entry], aligned: bool = False) -> None:
    """Write a checkpoint with random valid codes, in files of a gigabyte."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    codes = (random.integers(0, 0x7F, 1 << 24) | random.integers(0, 2, 1 << 24) << 7).astype(np.uint8)  # no NaN code
    data = {"codes": codes.tobytes(), "scales": (codes & 0x3F).tobytes()}
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + nbytes(entry) > 1 << 30:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += nbytes(entry)
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.sort(key=lambda e: (aligned and nbytes(e) % BLOCK > 0, -WIDTH[e[1]], e[0]))
        header, position = {}, 0
        for entry in shard:
            header[entry[0]] = {"dtype": entry[1], "shape": entry[2], "data_offsets": [position, position + nbytes(entry)]}
            position += nbytes(entry)
            index[entry[0]] = name
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % (BLOCK if aligned else 8))
        with (folder / name).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            for tensor, dtype, shape in shard:
                left = nbytes((tensor, dtype, shape))
                if dtype == "F32":
                    stream.write(random.uniform(0.5, 1, left // 4).astype("<f4").tobytes())
                    continue
                block = memoryview(data["scales" if tensor.endswith("weight_scale") else "codes"])
                while left:
                    left -= stream.write(block[:left])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


def timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a command in its own process, which must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    peak = 0
    # The kernel's ru_maxrss starts from the parent's size, so the process's own high-water mark is watched instead.
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) * 1024)
        time.sleep(0.005)
    elapsed_s = time.perf_counter() - start
    if process.returncode:
        said = process.stderr.read() if process.stderr else ""
        sys.exit(f"{' '.join(command)} failed with status {process.returncode}: {said}")
    return elapsed_s, peak


@contextlib.contextmanager
def reflinks(folder: Path, size: int) -> Iterator[Path]:
    """An XFS file system with reflinks in a file of `folder`, mounted while the block runs."""
    image, place = folder / "xfs.img", folder / "xfs"
    place.mkdir()
    with image.open("wb") as stream:
        stream.truncate(size)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def measure(folder: Path, runs: int) -> dict[str, Any]:
    """Times and peaks of every command on `folder / "in"`, interleaved."""
    source, out, copy, tiny, done = (folder / n for n in ("in", "out", "copy", "tiny", "done"))
    python = sys.executable
    convert = [python, "-m", "convert"]
    timed([*convert, str(source), str(done)])
    commands: dict[str, list[str]] = {
        FIRST: ["cp", "-r", "--reflink=never", str(source), str(copy)],
        "cp -r": ["cp", "-r", "--reflink=never", str(source), str(copy)],
        "cp -r, then sync": ["sh", "-c", f"cp -r --reflink=never '{source}' '{copy}' && sync -f '{copy}'"],
        "qconvert --no-hash": [*convert, str(source), str(out), "--no-hash"],
        "  --workers 1": [*convert, str(source), str(out), "--no-hash", "--workers", "1"],
        "  --workers 4": [*convert, str(source), str(out), "--no-hash", "--workers", "4"],
        "qconvert": [*convert, str(source), str(out)],
        "read both trees": [python, "-c", READ, str(source), str(done)],
        "verify IN OUT": [*convert, "verify", str(source), str(done)],
        "verify OUT": [*convert, "verify", str(done)],
        "3 MB sample": [*convert, str(SAMPLE), str(tiny)],
    }
    baseline = {key: "read both trees" if key.startswith(("verify", "read")) else "cp -r" for key in commands}
    times: dict[str, list[float]] = {key: [] for key in commands}
    peak = dict.fromkeys(commands, 0)
    for run in range(runs + 1):  # the first one is not counted
        for key, command in commands.items():
            for target in (out, copy, tiny):
                shutil.rmtree(target, ignore_errors=True)
            os.sync()
            warm = (source, done) if baseline[key] != "cp -r" else (source,)
            subprocess.run([python, "-c", READ, *warm], check=True)
            elapsed_s, rss = timed(command)
            if run:
                times[key].append(elapsed_s)
                peak[key] = max(peak[key], rss)
    median = {key: statistics.median(values) for key, values in times.items()}
    return {
        "median_s": median,
        "min_s": {key: min(values) for key, values in times.items()},
        "all_s": times,
        "ratio": {key: median[key] / median[baseline[key]] for key in commands},
        "ratio_of_minima": {key: min(times[key]) / min(times[baseline[key]]) for key in commands},
        "peak_mb": {key: value / 1e6 for key, value in peak.items()},
    }


def main() -> None:
    """Run everything and print one table; the same as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", choices=["fp8", "nvfp4", "moe"], default="fp8")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--xfs", action="store_true", help="on XFS with reflinks, mounted from a file")
    parser.add_argument("--aligned", action="store_true", help="tensors of IN that fill whole blocks start with one")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    size = int(args.gigabytes * 1e9)
    config, entries = mixture(size, not args.aligned) if args.case == "moe" else dense(args.case, size)
    with tempfile.TemporaryDirectory(dir=args.folder) as name, contextlib.ExitStack() as stack:
        folder = stack.enter_context(reflinks(Path(name), 4 * size + (2 << 30))) if args.xfs else Path(name)
        generate(folder / "in", config, entries, args.aligned)
        result = measure(folder, args.runs)
    layers = config["text_config"]["num_hidden_layers"]
    result |= {
        "checkpoint": f"{sum(map(nbytes, entries)) / 1e9:.2f} GB, {args.case}, {layers} layers, {len(entries)} tensors",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {'XFS with reflinks' if args.xfs else 'no reflinks'}",
        "runs": args.runs,
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['checkpoint']}; {result['machine']}; medians of {args.runs} interleaved warm runs")
    print("ratio: to cp -r; of verify to reading both trees")
    print(f"{'':<20}{'s':>8}{'ratio':>8}{'min s':>8}{'ratio':>8}{'peak MB':>9}")
    for key, seconds in result["median_s"].items():
        if key == FIRST:
            continue
        least, ratio, best = (result[k][key] for k in ("min_s", "ratio", "ratio_of_minima"))
        print(f"{key:<20}{seconds:>8.2f}{ratio:>8.2f}{least:>8.2f}{best:>8.2f}{result['peak_mb'][key]:>9.0f}")


if __name__ == "__main__":
    main()

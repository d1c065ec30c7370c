"""Conversion against a plain copy, and loading against the plain library, in one run.

    python -m bench.convert [--gigabytes 2] [--runs 5] [--folder DIR] [--scheme fp8|nvfp4]

Generates a checkpoint of a Qwen3.5 model with published layer sizes (hidden 4096), so many layers as fit the size, in the
dialect of nvidia-modelopt, one shard per gigabyte.  Each figure is the median of interleaved runs in fresh processes; what
counts is the ratio within the run, because machines differ and are noisy.  Files are in the page cache (warm).
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

import numpy as np

HIDDEN, INTER, VOCAB = 4096, 12288, 32768
HEADS, KV_HEADS, HEAD = 16, 4, 256
KEY_HEADS, VALUE_HEADS, LINEAR_HEAD = 16, 32, 128

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


def generate(folder: Path, size: int, scheme: str) -> int:
    """Write a checkpoint of about `size` bytes with random valid codes.  Returns its number of layers."""
    entries: list[Entry] = [
        ("model.language_model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN)),
        ("model.language_model.norm.weight", "BF16", (HIDDEN,)),
        ("lm_head.weight", "BF16", (VOCAB, HIDDEN)),
    ]
    layers = 0
    while sum(map(nbytes, entries)) < size or layers % 4:
        entries += layer_tensors(layers, scheme)
        layers += 1
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    codes = (random.integers(0, 0x7F, 1 << 24) | random.integers(0, 2, 1 << 24) << 7).astype(np.uint8)  # no NaN code
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(map(nbytes, shards[-1])) + nbytes(entry) > 1 << 30:
            shards.append([])
        shards[-1].append(entry)
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for entry in shard:
            header[entry[0]] = {
                "dtype": entry[1],
                "shape": entry[2],
                "data_offsets": [position, position + nbytes(entry)],
            }
            position += nbytes(entry)
            index[entry[0]] = name
        raw = json.dumps(header).encode()
        with (folder / name).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            for entry in shard:
                left = nbytes(entry)
                if entry[1] == "F32":
                    stream.write(random.uniform(0.5, 1, left // 4).astype("<f4").tobytes())
                    continue
                block = (codes & 0x3F) if entry[0].endswith("weight_scale") else codes
                while left:
                    left -= stream.write(block[:left].tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
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
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a command in its own process, which must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    # The kernel's ru_maxrss starts from the parent's size, so the process's own high-water mark is watched instead.
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) * 1024)
        time.sleep(0.005)
    elapsed_s = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with status {process.returncode}")
    return elapsed_s, peak


LOAD = """
import sys, time, glob
import torch
mode, folder = sys.argv[1:]
if mode == "runtime":
    from runtime import load_model
    start = time.perf_counter()
    model = load_model(folder, device="cpu")
    tensors = model.state_dict().values()
else:
    from safetensors.torch import load_file
    start = time.perf_counter()
    tensors = [t for f in sorted(glob.glob(folder + "/*.safetensors")) for t in load_file(f).values()]
touched = sum(int(t.view(-1).view(torch.uint8)[::4096].sum()) for t in tensors)  # both must have read every page
print(time.perf_counter() - start)
"""


def load_s(mode: str, folder: Path) -> float:
    """Seconds to load a checkpoint and touch every page of it, imports not counted."""
    run = subprocess.run(
        [sys.executable, "-c", LOAD, mode, str(folder)], capture_output=True, text=True, check=True
    )
    return float(run.stdout)


def main() -> None:
    """Run everything and print one table; the same as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scheme", choices=["fp8", "nvfp4"], default="fp8")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        source, out, copy = folder / "in", folder / "out", folder / "copy"
        layers = generate(source, int(args.gigabytes * 1e9), args.scheme)
        size = sum(p.stat().st_size for p in source.iterdir())
        convert = [sys.executable, "-m", "convert"]
        commands = {
            "cp -r": ["cp", "-r", str(source), str(copy)],
            "cp -r, then sync": ["sh", "-c", f"cp -r '{source}' '{copy}' && sync -f '{copy}'"],
            "qconvert --no-hash": [*convert, str(source), str(out), "--no-hash"],
            "qconvert": [*convert, str(source), str(out)],
        }
        times: dict[str, list[float]] = {key: [] for key in commands}
        peak: dict[str, int] = dict.fromkeys(commands, 0)
        for run in range(args.runs + 1):  # the first one warms the page cache and is not counted
            for key, command in commands.items():
                for target in (out, copy):
                    shutil.rmtree(target, ignore_errors=True)
                elapsed_s, rss = timed(command)
                if run:
                    times[key].append(elapsed_s)
                    peak[key] = max(peak[key], rss)
        verify_s, verify_rss = timed([*convert, "verify", str(source), str(out)])
        loads: dict[str, list[float]] = {"load_file": [], "runtime": []}
        for run in range(args.runs + 1):
            for mode in loads:
                elapsed_s = load_s(mode, out)
                if run:
                    loads[mode].append(elapsed_s)
    median = {key: statistics.median(values) for key, values in (times | loads).items()}
    result = {
        "checkpoint": f"{size / 1e9:.2f} GB, {args.scheme}, {layers} layers",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "runs": args.runs,
        "median_s": median,
        "all_s": times | loads,
        "ratio_to_cp": {k: median[k] / median["cp -r"] for k in times},
        "ratio_to_cp_and_sync": {k: median[k] / median["cp -r, then sync"] for k in times},
        "peak_mb": {k: v / 1e6 for k, v in peak.items()},
        "verify_s": verify_s,
        "verify_peak_mb": verify_rss / 1e6,
        "load_ratio_to_load_file": median["runtime"] / median["load_file"],
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['checkpoint']}; {result['machine']}; medians of {args.runs} interleaved warm runs")
    print(f"{'':<22}{'s':>8}{'vs cp':>8}{'vs cp+sync':>12}{'peak MB':>10}")
    for key in times:
        ratio, synced = median[key] / median["cp -r"], median[key] / median["cp -r, then sync"]
        print(f"{key:<22}{median[key]:>8.2f}{ratio:>8.2f}{synced:>12.2f}{peak[key] / 1e6:>10.0f}")
    print(f"{'qconvert verify (once)':<22}{verify_s:>8.2f}{'':>20}{verify_rss / 1e6:>10.0f}")
    print(f"load: runtime {median['runtime']:.2f} s, safetensors load_file {median['load_file']:.2f} s, "
          f"ratio {result['load_ratio_to_load_file']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()

"""Loading a canonical checkpoint against reading the same files with safetensors, in one run.

    python -m bench.load [--case dense,experts,small] [--runs 7] [--device cpu|cuda] [--folder DIR] [--json]

Writes canonical checkpoints with the shapes of published models and random bytes: FP8 dense (about 2 GB), NVFP4 stacks of 128
experts (about 2 GB), and many small tensors.  Each figure comes from runs that alternate between `load_model` and
`safetensors.torch.load_file`, each in a fresh process, files in the page cache; what counts is the ratio within the run.

mapped    until the model, or the dictionary of tensors, is there; on the CPU nothing has been read but headers
again     the same, repeated in that process: CPU time, least of 20
whole     mapped, and a sum over every byte; on CUDA until every tensor is on the device (no sum)
CPU       user and system time of the process, least of the runs: what a busy machine disturbs less than the clock
anon      memory that the process took beyond mapped files; peak: with them

On CUDA three rates stand beside: files read into pinned memory, pinned memory copied to the device, and both overlapped.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.models import Model, empty
from runtime.format import CONFIG_FILE, INDEX_FILE, CanonicalConfig
from runtime.layers import TORCH_DTYPES
from runtime.loader import load_model
from runtime.shards import BUFFERS, PIECE, Part, Piece, Shard, pieces, stream

SHARD = 1 << 30
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
COMMON = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "head": "separate", "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": None, "attention_bias": False, "hidden_act": "silu", "rope_theta": 1e7, "rope_scaling": None,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A checkpoint to make: its network, and the scheme of every linear whose name ends in one of `quantized`."""

    family: str
    architecture: dict[str, Any]
    scheme: str
    activations: str
    quantized: tuple[str, ...]


def cases() -> dict[str, Case]:
    """By name."""
    attention = ("qkv_proj", "o_proj")
    mlp = ("gate_up_proj", "down_proj")
    dense = COMMON | {
        "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "rotary_dim": 64,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2, "attn_output_gate": True,
        "output_gate": "silu", "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "mtp_num_hidden_layers": 0,
    }  # fmt: skip
    experts = COMMON | {
        "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 5,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "layer_types": ["full_attention"] * 5,
        "sliding_window": None, "mlp_layer_types": ["sparse"] * 5, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True,
    }  # fmt: skip
    small = COMMON | {
        "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "layer_types": ["full_attention"] * 96,
        "sliding_window": None,
    }  # fmt: skip
    linear = ("in_proj_qkvz", "out_proj")
    return {
        "dense": Case("qwen3_5", dense, "fp8_tensor", "fp8_static", attention + mlp + linear),
        "experts": Case("qwen3_moe", experts, "nvfp4", "nvfp4", attention + mlp),
        "small": Case("qwen3", small, "nvfp4", "nvfp4", attention + mlp),
    }


def generate(folder: Path, case: Case) -> tuple[int, int]:
    """Write a canonical checkpoint of random bytes.  Returns its tensors and bytes."""
    linears = frozenset(case.quantized)

    def formats(name: str) -> tuple[str, str] | None:
        return (case.scheme, case.activations) if name.rpartition(".")[2] in linears else None

    model = empty(Model("", case.family, case.architecture, formats), torch.device("cpu"), torch.float32)
    tensors: dict[str, Tensor] = dict(model.state_dict())
    noise = random.Random(0).randbytes(1 << 24).translate(bytes(byte % 0x7F for byte in range(256)))
    return len(tensors), write(folder, model.config, tensors, SHARD, noise)


def write(
    folder: Path, config: CanonicalConfig, tensors: Mapping[str, Tensor], shard: int, noise: bytes | None = None
) -> int:
    """Write a canonical checkpoint in files of about `shard` bytes.  Returns the bytes of the files.

    `noise`: what to write instead of the contents of `tensors`, which may then have no memory.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard:
            shards.append({})
        shards[-1][name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    index, total = {}, 0
    for number, part in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for name, tensor in part.items():
            stop = position + tensor.nbytes
            header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, stop]}
            position, index[name] = stop, file
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            if noise is None:
                for tensor in part.values():
                    here = tensor.detach().cpu().contiguous()
                    out.write((ctypes.c_ubyte * here.nbytes).from_address(here.data_ptr()))
            else:
                while position:
                    position -= out.write(noise[:position])
        total += (folder / file).stat().st_size
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / CONFIG_FILE).write_text(json.dumps(config.to_json()))
    return total


def touch(tensors: list[Tensor]) -> int:
    """A sum over every byte, eight at a time where that divides, in the order of the file."""
    total = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.data_ptr()):
        flat = tensor.detach().view(-1).view(torch.uint8)
        total += int((flat if flat.numel() % 8 else flat.view(torch.int64)).sum())
    return total % 2**64


def measure(mode: str, folder: Path, device: str) -> dict[str, float]:
    """One run in this process: seconds, bytes, and the sum over all bytes."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))

    def load() -> list[Tensor]:
        if mode == "load_model":
            tensors: list[Tensor] = list(load_model(folder, device=device).parameters())
        else:
            tensors = [t for file in files for t in load_file(file, device=device).values()]
        if device != "cpu":
            torch.cuda.synchronize()
        return tensors

    if device != "cpu":
        torch.empty(1, device=device)  # the context is no part of loading
    torch.ones(8, dtype=torch.int64).sum()  # nor are threads that sums need
    gc.collect()  # nor what the imports left behind
    start, start_cpu = time.perf_counter(), time.process_time()
    tensors = load()
    mapped_s, mapped_cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    total = touch(tensors) if device == "cpu" else 0
    whole_s, whole_cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anon, peak = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmHWM"))
    again = []
    for _ in range(20 if device == "cpu" else 0):
        start = time.process_time()
        load()
        again.append(time.process_time() - start)
    return {
        "mapped_s": mapped_s, "mapped_cpu_s": mapped_cpu_s, "again_s": min(again, default=0.0), "whole_s": whole_s,
        "whole_cpu_s": whole_cpu_s, "anon": anon, "peak": peak, "sum": total,
    }  # fmt: skip


def rates(folder: Path, device: str) -> dict[str, float]:
    """GB/s: copies out of the loader's buffers alone, reading files into them alone, and both overlapped as the loader does.

    On CUDA the buffers are pinned, and the last is `load_model` as a whole; elsewhere it is the stream alone, to memory.
    """
    on_cuda = torch.device(device).type == "cuda"
    buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(BUFFERS)]
    target = torch.empty(PIECE, dtype=torch.uint8, device=device)
    shards = [Shard(folder, file.name) for file in sorted(folder.glob("*.safetensors"))]
    size = sum(entry.nbytes for shard in shards for entry in shard.tensors.values())

    def seconds(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(3):
            if on_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if on_cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    def work(place: str) -> Iterator[Piece]:
        for shard in shards:
            sizes = {name: entry.nbytes for name, entry in shard.tensors.items()}
            places = [(name, torch.empty(nbytes, dtype=torch.uint8, device=place)) for name, nbytes in sizes.items()]
            yield from pieces(shard, places)

    def copy() -> None:
        for number in range(-(-size // PIECE)):
            target.copy_(buffers[number % BUFFERS], non_blocking=True)

    def to_memory(parts: list[Part]) -> Callable[[], object]:
        for there, here in parts:
            there.copy_(here)
        return int

    both = (lambda: load_model(folder, device=device)) if on_cuda else (lambda: stream(work(device), buffers, to_memory))
    return {
        "copy": -(-size // PIECE) * PIECE / seconds(copy) / 1e9,
        "read": size / seconds(lambda: stream(work("meta"), buffers, lambda parts: int)) / 1e9,
        "overlapped": size / seconds(both) / 1e9,
    }


def child(*args: str) -> Any:
    """What `python -m bench.load --child ARGS` prints."""
    done = subprocess.run([sys.executable, "-m", "bench.load", "--child", *args], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Run everything and print a table; the same as JSON with --json."""
    if sys.argv[1:2] == ["--child"]:
        mode, folder, device = sys.argv[2:]
        print(json.dumps(rates(Path(folder), device) if mode == "rates" else measure(mode, Path(folder), device)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", default="dense,experts,small", help="comma-separated")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in args.case.split(","):
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            folder = Path(temporary) / name
            count, size = generate(folder, cases()[name])
            runs: dict[str, list[dict[str, float]]] = {"load_file": [], "load_model": []}
            for run in range(args.runs + 1):  # the first is not counted
                for mode in runs:
                    found = child(mode, str(folder), args.device)
                    if run:
                        runs[mode].append(found)
            if len({run["sum"] for both in runs.values() for run in both}) != 1:
                sys.exit(f"{name}: the two ways read different bytes")
            results[name] = {"tensors": count, "bytes": size, "runs": runs}
            if args.device != "cpu":
                results[name]["gb_per_s"] = child("rates", str(folder), args.device)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, {args.device}; {args.runs} alternating runs")
    print(f"{'':<16}{'mapped ms':>24}{'again':>8}{'whole ms':>24}{'anon MB':>9}{'peak MB':>9}")
    print(f"{'':<16}" + "".join(f"{column:>8}" for column in ("min", "median", "CPU", "CPU", "min", "median", "CPU")))
    for name, result in results.items():
        print(f"{name}: {result['tensors']} tensors, {result['bytes'] / 1e9:.2f} GB")
        rows = {mode: summary(runs) for mode, runs in result["runs"].items()}
        for mode, row in rows.items():
            times = "".join(f"{1e3 * value:>8.1f}" for value in row[:7])
            print(f"  {mode:<14}{times}{row[7] / 1e6:>9.0f}{row[8] / 1e6:>9.0f}")
        ratios = [b / a if a else 0 for a, b in zip(rows["load_file"], rows["load_model"])]
        print(f"  {'ratio':<14}" + "".join(f"{value:>8.2f}" for value in ratios[:7]))
        if "gb_per_s" in result:
            print("  GB/s: " + ", ".join(f"{kind} {value:.1f}" for kind, value in result["gb_per_s"].items()))


def summary(runs: list[dict[str, float]]) -> list[float]:
    """The columns of the table: least, median and CPU of mapped, CPU of again, the same of whole, most memory of two kinds."""
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    mapped, whole = columns["mapped_s"], columns["whole_s"]
    return [
        min(mapped), statistics.median(mapped), min(columns["mapped_cpu_s"]), min(columns["again_s"]),
        min(whole), statistics.median(whole), min(columns["whole_cpu_s"]), max(columns["anon"]), max(columns["peak"]),
    ]  # fmt: skip


if __name__ == "__main__":
    main()

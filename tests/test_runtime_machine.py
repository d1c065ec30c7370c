"""Devices, number formats and memory: asked before anything is read or allocated, and said in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from canonical import Quant, tiny_qwen3, tiny_qwen3_5, write

import runtime
from runtime import loader, machine
from runtime.machine import host_memory
from runtime.shards import Shard

GB = 10**9
MEMINFO = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\nHugePages_Total:       0\n"


def quant(name: str) -> Quant | None:
    kinds = {"qkv_proj": Quant("fp8_tensor", "fp8_static"), "gate_up_proj": Quant("nvfp4", "nvfp4"), "o_proj": Quant("mxfp4")}
    return kinds.get(name.rpartition(".")[2])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write(tmp_path / "out", tiny_qwen3(), quant=quant)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("device", "parts"),
    [
        ("tpu", ["expected cpu, cuda or cuda:N", "'tpu'"]),
        ("mps", ["expected cpu, cuda or cuda:N", "'mps'", "use 'cpu'"]),
        ("meta", ["'meta'"]),
        ("cuda", ["expected a CUDA device", "found none", "use device 'cpu'"]),
        ("cuda:1", ["expected a CUDA device", "found none"]),
    ],
)
def test_devices_that_are_not_there(out: Path, device: str, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: expected") as caught:
        runtime.load_model(out, device=device)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


def test_a_gpu_beyond_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="expected cuda:0 to cuda:1, found 'cuda:2'"):
        machine.find_device("cuda:2")


def refuse(monkeypatch: pytest.MonkeyPatch, refused: torch.dtype, *also: torch.dtype) -> None:
    """Let this machine's device have no such dtype, as torch says it where that is so."""
    convert = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] in (refused, *also):
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nSearch for it")
        return convert(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)


@pytest.mark.parametrize(
    ("dtype", "user"),
    [
        (torch.float8_e4m3fn, "quantization.modules.model.layers.0.self_attn.qkv_proj: scheme fp8_tensor"),
        (torch.uint8, "quantization.modules.model.layers.0.mlp.gate_up_proj: scheme nvfp4"),
        (torch.bfloat16, "architecture: arithmetic"),
    ],
    ids=str,
)
def test_a_device_without_a_format(out: Path, dtype: torch.dtype, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shard, "__init__", lambda *_: pytest.fail("a file was opened"))
    refuse(monkeypatch, dtype)
    arithmetic = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(runtime.LoadError) as caught:
        runtime.load_model(out, dtype=arithmetic)
    assert str(caught.value).startswith(f"config.json: {user}: expected a device that converts {name}, found cpu: ")
    assert "no kernel image is available for execution on the device; use a torch" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_formats_that_nothing_needs_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tiny_qwen3(), quant=lambda name: Quant("mxfp4", "mxfp4") if name.endswith("o_proj") else None)
    refuse(monkeypatch, torch.float8_e4m3fn)
    runtime.load_model(tmp_path)


def test_a_cache_of_codes_needs_their_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tiny_qwen3_5(), kv_cache={"model.layers.3.self_attn": ([0.01], [0.02])})
    refuse(monkeypatch, torch.float8_e4m3fn)
    with pytest.raises(runtime.LoadError, match=r"quantization\.kv_cache\.model\.layers\.3\.self_attn: keys and values"):
        runtime.load_model(tmp_path)


def fake_root(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


STAT = "anon 100\nfile 700\ninactive_file 400\nactive_file 200\n"
V1_STAT = "cache 700\ntotal_inactive_file 1000\ntotal_active_file 0\n"
V1 = "sys/fs/cgroup/memory"
ROOTS: dict[str, tuple[dict[str, str], tuple[int, int] | None]] = {
    "no /proc": ({}, None),
    "no groups": ({"proc/meminfo": MEMINFO}, (20_000_000 * 1024, 24_000_000 * 1024)),
    "no limit": (
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/user\n",
            "sys/fs/cgroup/user/memory.max": "max\n",
            "sys/fs/cgroup/user/memory.current": "5\n",
            "sys/fs/cgroup/user/memory.stat": STAT,
        },
        (20_000_000 * 1024, 24_000_000 * 1024),
    ),
    "limit above": (
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/user/session\n",
            "sys/fs/cgroup/user/session/memory.max": "max\n",
            "sys/fs/cgroup/user/memory.max": f"{4 * GB}\n",
            "sys/fs/cgroup/user/memory.current": f"{GB}\n",
            "sys/fs/cgroup/user/memory.stat": STAT,
        },
        (3 * GB + 600, 4 * GB),
    ),
    "in a container that shows another path": (
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/docker/0123\n",
            "sys/fs/cgroup/memory.max": f"{2 * GB}\n",
            "sys/fs/cgroup/memory.current": f"{GB}\n",
            "sys/fs/cgroup/memory.stat": STAT,
        },
        (GB + 600, 2 * GB),
    ),
    "more used than allowed": (
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{GB}\n",
            "sys/fs/cgroup/memory.current": f"{2 * GB}\n",
            "sys/fs/cgroup/memory.stat": STAT,
        },
        (0, GB),
    ),
    "version 1": (
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "3:cpu,cpuacct:/a\n2:memory:/a\n",
            f"{V1}/a/memory.limit_in_bytes": f"{5 * GB}\n",
            f"{V1}/a/memory.usage_in_bytes": f"{GB}\n",
            f"{V1}/a/memory.stat": V1_STAT,
            f"{V1}/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            f"{V1}/memory.usage_in_bytes": "9\n",
            f"{V1}/memory.stat": V1_STAT,
        },
        (4 * GB + 1000, 5 * GB),
    ),
}


@pytest.mark.parametrize(("files", "expected"), ROOTS.values(), ids=ROOTS)
def test_memory_of_machine_and_groups(files: dict[str, str], expected: tuple[int, int] | None, tmp_path: Path) -> None:
    assert host_memory(fake_root(tmp_path, files)) == expected


def test_memory_of_this_machine() -> None:
    memory = host_memory()
    if memory is None:
        pytest.skip("no /proc/meminfo")
    assert 0 < memory[0] <= memory[1]


def test_a_gpu_without_room_is_said_before_loading(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch holds in reserve counts as free; the sizes are those of the stored bytes."""
    monkeypatch.setattr(machine, "SMALL", 0)
    model = runtime.load_model(out)
    need = sum(p.nbytes for p in model.parameters())
    gpu = torch.device("cuda")
    free = {"driver": need - 300}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["driver"], 8 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    started: list[Any] = []
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **kwargs: allocate(*shape, device="cpu", **kwargs))
    monkeypatch.setattr(loader, "stream_to_cuda", lambda work, device: started.append(list(work)))

    slots = dict(loader._slots(model))
    files = loader._tensor_files(out)
    shards = {file: Shard(out, file) for file in set(files.values())}
    message = "cuda: expected 0.00 GB of free memory for the weights, found 0.00 GB of 8.00 GB; "
    with pytest.raises(MemoryError, match=re.escape(message)):
        loader._stream_to_device(files, shards, slots, gpu)
    assert started == []
    free["driver"] += 100
    loader._stream_to_device(files, shards, slots, gpu)
    assert sum(piece.nbytes for piece in started[0]) == need


def test_a_state_without_room_is_said_before_it_is_allocated(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runtime.load_model(out)
    a = model.architecture
    tokens = 10**6
    nbytes = 2 * a.num_hidden_layers * 3 * (tokens + 1) * a.num_key_value_heads * a.head_dim * 4
    assert nbytes <= model.state_nbytes(3, tokens) < nbytes + 1000
    monkeypatch.setattr(machine, "host_memory", lambda: (nbytes // 2, 2 * nbytes))
    zeros = torch.zeros
    used: list[str] = []
    monkeypatch.setattr(torch, "zeros", lambda *shape, **kwargs: used.append(kwargs["device"].type) or zeros(*shape, **kwargs))
    with pytest.raises(MemoryError) as caught:
        model.new_state(3, tokens)
    assert set(used) == {"meta"}
    what = f"what 3 x {tokens} tokens leave behind (KV cache and states)"
    sizes = f"cpu: expected {nbytes / GB:.2f} GB of free memory for {what}, "
    found = f"found {nbytes / 2 / GB:.2f} GB of {2 * nbytes / GB:.2f} GB; take fewer or shorter sequences"
    assert str(caught.value) == sizes + found


def test_state_nbytes_is_what_is_allocated(tmp_path: Path) -> None:
    write(tmp_path, tiny_qwen3_5(), kv_cache={"model.layers.3.self_attn": ([0.01], [0.02])})
    model = runtime.load_model(tmp_path)
    caches = [cache for cache in model.new_state(2, 50).caches if cache is not None]
    held = [value for cache in caches for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    assert model.state_nbytes(2, 50) == sum(t.element_size() * t.numel() for t in held) > 0


def test_a_model_larger_than_memory_is_said_and_loaded(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runtime.load_model(out)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    monkeypatch.setattr(loader, "host_memory", lambda: (0, nbytes))
    assert loader.memory_note(model) is None
    monkeypatch.setattr(loader, "host_memory", lambda: (nbytes, nbytes - 1))
    note = loader.memory_note(model)
    assert note is not None
    assert "read" in note
    assert "\n" not in note
    code = (
        "import sys, runpy; from runtime import loader; loader.host_memory = lambda: (0, 1000);"
        f"sys.argv = ['generate', {str(out)!r}, '--prompt-ids', '1,2', '--max-new-tokens', '1', '--device', 'cpu'];"
        "runpy.run_module('runtime.generate', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: the weights are 0.00 GB and there are 0.00 GB of memory: ")
    assert done.stderr.count("\n") == 1

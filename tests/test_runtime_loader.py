"""Loading: what is on disk is what the model holds, and everything that does not fit is refused in one line."""

from __future__ import annotations

import ast
import gc
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from canonical import Quant, save, tiny_qwen3, tiny_qwen3_5, write
from safetensors.torch import load_file
from torch import Tensor

import runtime
from runtime.format import FormatError
from runtime.shards import Shard

ROOT = Path(__file__).parent.parent
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
QKVZ = "model.layers.0.linear_attn.in_proj_qkvz"


def quant(name: str) -> Quant | None:
    """One module of every scheme, static and dynamic inputs, an input multiplier."""
    kinds = {
        "in_proj_qkvz": Quant("fp8_tensor", "fp8_static"),
        "qkv_proj": Quant("fp8_channel", "fp8_token"),
        "out_proj": Quant("mxfp8", "mxfp8"),
        "o_proj": Quant("fp8_block", "fp8_group"),
        "gate_up_proj": Quant("nvfp4", "nvfp4"),
        "down_proj": Quant("nvfp4", "nvfp4", pre_quant_scale=True),
        "lm_head": Quant("mxfp4"),
    }
    return kinds.get(name.rpartition(".")[2])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_5()


@pytest.fixture
def out(model: Any, tmp_path: Path) -> Path:
    """A canonical checkpoint with a bit of everything, tower and MTP tensors included."""
    write(
        tmp_path / "out",
        model,
        quant=quant,
        unfused={"model.layers.1.mlp.gate_up_proj"},
        kv_cache={"model.layers.3.self_attn": ([0.01], [0.02])},
        carried={"fc.weight": torch.ones(3, 4)},
    )
    return tmp_path / "out"


def on_disk(out: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in SHARDS:
        tensors |= load_file(out / shard)
    return tensors


@pytest.mark.parametrize("activations", ["quantized", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_holds_exactly_what_is_stored(out: Path, dtype: torch.dtype, activations: str) -> None:
    """No stored tensor is renamed, reshaped, fused, cast or changed, before or after use."""
    stored = {name: t for name, t in on_disk(out).items() if not name.startswith(("mtp.", "visual."))}
    assert len(on_disk(out)) > len(stored) + 5  # a tower and an MTP tensor are there, and are not loaded
    model = runtime.load_model(out, dtype=dtype, activations=activations)
    model(torch.tensor([[1, 2, 3]]))
    held = model.state_dict()
    assert set(held) == set(stored)
    for name, tensor in stored.items():
        assert (held[name].dtype, held[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(held[name].contiguous().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_carried_files_need_not_even_exist(model: Any, tmp_path: Path) -> None:
    write(tmp_path, model)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["visual.extra"] = "model-00003-of-00003.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    runtime.load_model(tmp_path)


def edit_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        data = json.loads((out / name).read_text())
        data = change(data) or data
        (out / name).write_text(json.dumps(data))

    return edit


def edit_config(*path: str, value: Any) -> Callable[[Path], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if value is None:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return edit_json("config.json", change)


def edit_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    """Rewrite the shards after a change, with an index that fits."""

    def edit(out: Path) -> None:
        config, tensors = json.loads((out / "config.json").read_text()), on_disk(out)
        change(tensors)
        save(out, tensors, config)

    return edit


def put(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.update({name: tensor}))


def drop(*names: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return edit_tensors(change)


def truncate(out: Path) -> None:
    data = (out / SHARDS[1]).read_bytes()
    (out / SHARDS[1]).write_bytes(data[: len(data) // 2])


def garbage(out: Path) -> None:
    (out / SHARDS[0]).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def swap_shards(out: Path) -> None:
    first, second = (out / shard for shard in SHARDS)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


INDEX = "model.safetensors.index.json"
BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda out: (out / "config.json").unlink(), ["config.json", "No such file", "qconvert IN OUT"]),
    "config is no JSON": (lambda out: (out / "config.json").write_text("{"), ["config.json", "expected JSON"]),
    "a source config": (edit_json("config.json", lambda _: {"model_type": "qwen3"}), ["format 'qconvert'", "None"]),
    "a newer format": (edit_config("format_version", value=2), ["format_version 1", "found 2"]),
    "another family": (edit_config("family", value="gpt2"), ["family", "qwen3, qwen3_5", "'gpt2'"]),
    "missing field": (edit_config("architecture", "head_dim", value=None), ["architecture", "head_dim missing"]),
    "unknown field": (edit_config("architecture", "extra", value=1), ["architecture", "extra unknown"]),
    "field of another type": (edit_config("architecture", "hidden_size", value="64"), ["architecture.hidden_size", "'64'"]),
    "a true number": (edit_config("architecture", "hidden_size", value=True), ["architecture.hidden_size", "True"]),
    "zero heads": (edit_config("architecture", "num_key_value_heads", value=0), ["num_key_value_heads", "above 0"]),
    "heads do not group": (edit_config("architecture", "num_key_value_heads", value=3), ["num_attention_heads", "3 KV"]),
    "value heads do not group": (edit_config("architecture", "linear_num_key_heads", value=3), ["linear_num_value_heads"]),
    "too few layer types": (edit_config("architecture", "layer_types", value=["full_attention"]), ["layer_types", "4 entries"]),
    "unknown layer type": (edit_config("architecture", "layer_types", value=["x"] * 4), ["layer_types", "'x'"]),
    "another activation": (edit_config("architecture", "hidden_act", value="gelu"), ["hidden_act", "'gelu'"]),
    "a bare trunk": (edit_config("architecture", "head", value="absent"), ["architecture.head", "bare trunk"]),
    "unknown head": (edit_config("architecture", "head", value="two"), ["architecture.head", "'two'"]),
    "odd rotary size": (edit_config("architecture", "rotary_dim", value=7), ["rotary_dim", "found 7"]),
    "ungated attention": (edit_config("architecture", "attn_output_gate", value=False), ["attn_output_gate", "False"]),
    "unknown gate": (edit_config("architecture", "output_gate", value="tanh"), ["output_gate", "'tanh'"]),
    "dynamic rope": (
        edit_config("architecture", "rope_scaling", value={"rope_type": "dynamic", "factor": 2}),
        ["rope_scaling.rope_type", "default, linear, llama3, yarn", "'dynamic'"],
    ),
    "rope without factor": (
        edit_config("architecture", "rope_scaling", value={"rope_type": "linear"}),
        ["rope_scaling", "factor", "[]"],
    ),
    "rope with another field": (
        edit_config("architecture", "rope_scaling", value={"rope_type": "linear", "factor": 2, "slope": 1}),
        ["rope_scaling", "slope"],
    ),
    "unknown scheme": (edit_config("quantization", "modules", QKVZ, "scheme", value="int4"), [QKVZ, "'int4'"]),
    "scheme of another shape": (edit_config("quantization", "modules", QKVZ, "shape", value=[192, 32]), [QKVZ, "[192, 64]"]),
    "other partitions": (
        edit_config("quantization", "modules", QKVZ, "partitions", value=[["q", 100], ["z", 92]]),
        [QKVZ, "[32, 32, 64, 64]", "[100, 92]"],
    ),
    "a module that does not exist": (
        edit_config(
            "quantization", "modules", "model.extra", value={"scheme": "nvfp4", "shape": [4, 16], "activations": "nvfp4"}
        ),
        ["quantization.modules.model.extra", "does not have"],
    ),
    "a cache that does not exist": (
        edit_config("quantization", "kv_cache", "model.layers.0.self_attn", value="tensor"),
        ["quantization.kv_cache.model.layers.0.self_attn", "does not have"],
    ),
    "unknown cache": (
        edit_config("quantization", "kv_cache", "model.layers.3.self_attn", value="token"),
        ["quantization.kv_cache.model.layers.3.self_attn", "'token'"],
    ),
    "unfused otherwise": (
        edit_config("unfused", "model.layers.1.mlp.gate_up_proj", value=["gate_proj"]),
        ["unfused.model.layers.1.mlp.gate_up_proj", "gate_proj, up_proj"],
    ),
    "no index": (lambda out: (out / INDEX).unlink(), [INDEX, "No such file"]),
    "index without map": (edit_json(INDEX, lambda _: {"metadata": {}}), [INDEX, "weight_map"]),
    "index leaves the directory": (
        edit_json(INDEX, lambda index: index["weight_map"].update({"lm_head.weight": "../x.safetensors"})),
        [INDEX, "lm_head.weight", "'../x.safetensors'"],
    ),
    "missing shard": (lambda out: (out / SHARDS[1]).unlink(), [SHARDS[1], "found none", "incomplete"]),
    "truncated shard": (truncate, [SHARDS[1], "damaged or cut short"]),
    "garbage shard": (garbage, [SHARDS[0], "damaged or cut short"]),
    "swapped shards": (swap_shards, [SHARDS[0], "another checkpoint"]),
    "missing tensor": (drop("model.norm.weight"), [INDEX, "model.norm.weight", "[64]", "found none"]),
    "missing scale": (drop(f"{QKVZ}.weight_scale"), [f"{QKVZ}.weight_scale", "[4]", "found none"]),
    "missing KV scale": (drop("model.layers.3.self_attn.k_scale"), ["model.layers.3.self_attn.k_scale", "[1]"]),
    "extra tensor": (put("model.layers.0.extra", torch.ones(1)), ["model.layers.0.extra", "no tensor of this name"]),
    "extra layer": (put("model.layers.4.input_layernorm.weight", torch.ones(64)), ["model.layers.4.input_layernorm.weight"]),
    "scale of another shape": (put(f"{QKVZ}.weight_scale", torch.ones(2)), [f"{QKVZ}.weight_scale", "F32 [4]", "F32 [2]"]),
    "scale of another dtype": (
        put(f"{QKVZ}.weight_scale", torch.ones(4).bfloat16()),
        [f"{QKVZ}.weight_scale", "F32 [4]", "BF16 [4]"],
    ),
    "unquantised weight": (
        put(f"{QKVZ}.weight", torch.ones(192, 64).bfloat16()),
        [f"{QKVZ}.weight", "F8_E4M3 [192, 64]", "BF16"],
    ),
    "quantised norm": (
        put("model.norm.weight", torch.ones(64).to(torch.float8_e4m3fn)),
        ["model.norm.weight", "BF16 or F16 or F32 [64]", "F8_E4M3 [64]"],
    ),
    "norm of another shape": (put("model.norm.weight", torch.ones(65)), ["model.norm.weight", "[64]", "[65]"]),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_is_refused_in_one_line(
    out: Path, damage: Callable[[Path], Any], message: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before any tensor of any file is read."""
    damage(out)
    monkeypatch.setattr(Shard, "mapped", lambda shard, name: pytest.fail(f"{name} was read"))
    with pytest.raises((runtime.LoadError, FormatError)) as caught:
        runtime.load_model(out)
    text = str(caught.value)
    assert "\n" not in text
    for part in [*message, "expected", "found"]:
        assert part in text or (part == "expected" and "malformed" in text)


def test_several_problems_are_listed(out: Path) -> None:
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(4)] + ["model.norm.weight"]
    names += [f"model.layers.{i}.post_attention_layernorm.weight" for i in range(4)]
    drop(*names, "lm_head.weight", "model.embed_tokens.weight")(out)
    with pytest.raises(runtime.LoadError, match="1 more such problem") as caught:
        runtime.load_model(out)
    assert str(caught.value).count("found none") == 10


def test_a_tied_head_is_not_stored(tmp_path: Path) -> None:
    write(tmp_path, tiny_qwen3(tie_word_embeddings=True))
    assert "lm_head.weight" not in runtime.load_model(tmp_path).state_dict()
    put("lm_head.weight", torch.ones(96, 64))(tmp_path)
    with pytest.raises(runtime.LoadError, match=r"lm_head\.weight: expected no tensor"):
        runtime.load_model(tmp_path)


def test_sliding_layers_need_a_window(tmp_path: Path) -> None:
    write(tmp_path, tiny_qwen3())
    edit_config("architecture", "layer_types", value=["sliding_attention", "full_attention"])(tmp_path)
    with pytest.raises(FormatError, match=r"architecture\.sliding_window: expected a number above 0"):
        runtime.load_model(tmp_path)


def test_each_file_is_opened_once_and_closed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real_open = Path.open

    def counted(path: Path, *args: Any, **kwargs: Any) -> Any:
        stream = real_open(path, *args, **kwargs)
        if path.suffix == ".safetensors":
            opened.append((path.name, stream))
        return stream

    monkeypatch.setattr(Path, "open", counted)
    runtime.load_model(out)
    assert sorted(name for name, _ in opened) == SHARDS
    assert all(stream.closed for _, stream in opened)
    assert gc.isenabled()


def test_files_are_closed_after_a_refusal(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    close = Shard.close
    monkeypatch.setattr(Shard, "close", lambda shard: (closed.append(shard.file), close(shard)))
    put("model.norm.weight", torch.ones(65))(out)
    with pytest.raises(runtime.LoadError):
        runtime.load_model(out)
    assert sorted(closed) == SHARDS
    assert gc.isenabled()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see mappings")
def test_weights_stay_in_their_files(out: Path) -> None:
    """Loading allocates no weights: each lies in a private mapping of its file."""
    model = runtime.load_model(out)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(out) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    assert all(line[1] == "rw-p" for line in maps)
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < stop for start, stop in ranges), name


def test_arguments_are_checked(out: Path) -> None:
    with pytest.raises(ValueError, match="activations: expected 'quantized' or 'full', found 'half'"):
        runtime.load_model(out, activations="half")


def imports_of(file: Path) -> set[str]:
    """Top-level names of every module that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(str(node.module).partition(".")[0])
    return found


def test_imports_stay_in_their_layers() -> None:
    homes = {"click": {"command.py", "evaluate.py", "generate.py", "serve.py"}, "torchao": {"torchao_tensors.py"}}
    homes |= {"tokenizers": {"tokenizer.py"}, "jinja2": {"tokenizer.py"}}
    homes |= {"convert": set(), "transformers": set(), "numpy": set(), "lm_eval": {"lm_eval.py"}}
    files = sorted((ROOT / "runtime").rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for package in imports_of(file) & homes.keys():
            assert file.name in homes[package], f"{file} imports {package}"
        assert "runtime.generate" not in file.read_text() or file.name == "generate.py", f"{file} names runtime.generate"
    assert imports_of(ROOT / "runtime" / "format.py") <= {"__future__", "collections", "dataclasses", "typing"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import runtime, runtime.format", {"torch", "click", "safetensors", "jinja2", "numpy"}),
        (
            "import runtime; runtime.load_model; runtime.generate_tokens; import runtime.scoring, runtime.tokenizer",
            {"click", "torchao", "transformers", "tokenizers", "jinja2", "lm_eval"},
        ),
    ],
)
def test_imports_are_light(statement: str, absent: set[str]) -> None:
    code = f"{statement}\nimport sys; print(sorted({absent!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

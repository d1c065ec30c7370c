"""The shipped samples: real producers' checkpoints that recite.  A wrong scale is heard at once.

The expected text is the public-domain text that the model was trained on, read from `samples/text/`.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import convert
import runtime
from runtime.tokenizer import ChatTokenizer

SAMPLES = Path(__file__).parents[1] / "samples"
NAMES = ("qwen3_5-modelopt-mixed", "qwen3_5-compressed-tensors-fp8")
PROMPT = "Four score and seven years ago"
TEXT = (SAMPLES / "text" / "gettysburg.txt").read_text(encoding="utf-8")
TOKENS = 100
MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both samples, converted and proven."""
    folder = tmp_path_factory.mktemp("samples")
    for name in NAMES:
        convert.convert_checkpoint(SAMPLES / name, folder / name, verify=True)
    return folder


def written(out: Path, activations: str) -> str:
    """What a converted sample writes after `PROMPT`, greedily."""
    tokenizer = ChatTokenizer(out)
    model = runtime.load_model(out, device="cpu", dtype=torch.float32, activations=activations)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    return tokenizer.decode(list(runtime.generate_tokens(model, ids, max_new_tokens=TOKENS)))


@cache
def expected(name: str) -> str:
    """The first `TOKENS` tokens of the text after the prompt, as the sample's own tokenizer counts them."""
    tokenizer = ChatTokenizer(SAMPLES / name)
    rest = TEXT.removeprefix(PROMPT)
    return tokenizer.decode(tokenizer.encode(rest)[:TOKENS])


@pytest.mark.parametrize("activations", ["full", "quantized"])
@pytest.mark.parametrize("name", NAMES)
def test_recites(converted: Path, name: str, activations: str) -> None:
    """After conversion each sample writes its text word for word, with and without quantised inputs."""
    assert written(converted / name, activations) == expected(name)


def overwrite(out: Path, tensor: str, index: int, value: float) -> float:
    """Change one float32 element of a tensor in its file.  Returns what it was."""
    file = out / json.loads((out / "model.safetensors.index.json").read_bytes())["weight_map"][tensor]
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = 8 + length + json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0] + 4 * index
    old = torch.frombuffer(raw, dtype=torch.float32, count=1, offset=start).clone()
    raw[start : start + 4] = torch.tensor([value]).numpy().tobytes()
    file.write_bytes(raw)
    return float(old)


@pytest.mark.parametrize("name", NAMES)
def test_one_wrong_partition_scale_breaks_the_text(converted: Path, tmp_path: Path, name: str) -> None:
    """What engines do to a tuple shard: the scale of `in_proj_qkv` reaches slot 0, and slots 1 and 2 stay at 1."""
    out = tmp_path / name
    shutil.copytree(converted / name, out)
    old = overwrite(out, "model.layers.0.linear_attn.in_proj_qkvz.weight_scale", 2, 1.0)
    assert 0 < old < 0.1
    assert written(out, "full") != expected(name)
    with pytest.raises(convert.ConvertError, match=r"in_proj_qkvz\.weight_scale"):
        convert.verify_conversion(SAMPLES / name, out)


@pytest.mark.parametrize("name", NAMES)
def test_tuple_shard_scales(converted: Path, name: str) -> None:
    """The reason the project exists: [s_qkv, s_qkv, s_qkv, s_z] on every linear-attention layer, exactly."""
    source = {}
    for file in (SAMPLES / name).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            source |= {k: tensors.get_tensor(k) for k in tensors.keys() if k.endswith("weight_scale")}  # noqa: SIM118
    found = 0
    for file in (converted / name).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if key.endswith("in_proj_qkvz.weight_scale"):
                    parent = key.removesuffix("in_proj_qkvz.weight_scale").replace("model.", "model.language_model.", 1)
                    qkv, z = (float(source[f"{parent}in_proj_{n}.weight_scale"]) for n in ("qkv", "z"))
                    assert tensors.get_tensor(key).tolist() == [qkv, qkv, qkv, z]
                    found += 1
    assert found == 3


@pytest.mark.parametrize("name", NAMES)
def test_size(name: str) -> None:
    """Samples stay small enough to be part of every clone."""
    assert sum(p.stat().st_size for p in (SAMPLES / name).rglob("*") if p.is_file()) < MAX_BYTES

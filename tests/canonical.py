"""Writes tiny canonical checkpoints from transformers models, without `convert` and without the code of `runtime`.

`write` returns the dense float32 weights that the checkpoint stands for, under the names of the transformers model:
decoded here with numpy from tables built by formula, so that they are an independent reading of docs/format.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

torch.set_num_threads(1)  # tensors this small: more threads would only wait for each other

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
PARTITIONS = {  # fused module -> its source projections -> the partitions that each fills
    "self_attn.qkv_proj": {"q_proj": ["q"], "k_proj": ["k"], "v_proj": ["v"]},
    "mlp.gate_up_proj": {"gate_proj": ["gate"], "up_proj": ["up"]},
    "linear_attn.in_proj_qkvz": {"in_proj_qkv": ["q", "k", "v"], "in_proj_z": ["z"]},
    "linear_attn.in_proj_ba": {"in_proj_b": ["b"], "in_proj_a": ["a"]},
}


@dataclass(frozen=True)
class Quant:
    """How `write` quantises one module.  `input_scales`: one per partition, or the same value for all."""

    scheme: str
    activations: str | None = None
    pre_quant_scale: bool = False
    input_scales: tuple[float, ...] = (0.02,)


def e4m3_value(code: int) -> float:
    """The value of an E4M3 code from its bits: sign, four exponent bits (bias 7), three mantissa bits; 0x7F is NaN."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


E4M3 = np.array([e4m3_value(code) for code in range(256)], dtype=np.float32)


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """Codes (uint8) of the nearest E4M3 values; which of two equally near ones does not matter to a test."""
    grid = E4M3[:127]
    upper = np.searchsorted(grid, np.abs(values)).clip(1, 126)
    lower = upper - 1
    nearer = np.where(np.abs(values) - grid[lower] < grid[upper] - np.abs(values), lower, upper)
    return (nearer + np.where(values < 0, 128, 0)).astype(np.uint8)


def to_e2m1(values: np.ndarray) -> np.ndarray:
    """Codes (uint8, 0 to 15) of the nearest E2M1 values."""
    nearest = np.abs(np.abs(values)[..., None] - E2M1[:8]).argmin(-1)
    return (nearest + np.where(values < 0, 8, 0)).astype(np.uint8)


def pack(codes: np.ndarray) -> np.ndarray:
    """Two codes to a byte, the even one in the low nibble."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8)


def quantize(weight: np.ndarray, scheme: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Quantise one partition: stored arrays by role (E4M3 as uint8 codes) and the dense float32 values they stand for."""
    n, k = weight.shape
    f32 = np.float32
    amax = np.abs(weight).max()
    if scheme in ("fp8_tensor", "fp8_channel"):
        scale = np.full(1, amax / 448, f32) if scheme == "fp8_tensor" else (np.abs(weight).max(1) / 448).astype(f32)
        codes = to_e4m3(weight / scale[:, None])
        return {"weight": codes, "weight_scale": scale}, E4M3[codes] * scale[:, None]
    if scheme == "fp8_block":
        table = np.zeros((-(-n // 128), -(-k // 128)), f32)
        dense, codes = np.empty((n, k), f32), np.empty((n, k), np.uint8)
        for i, j in np.ndindex(*table.shape):
            at = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            table[i, j] = np.abs(weight[at]).max() / 448
            codes[at] = to_e4m3(weight[at] / table[i, j])
            dense[at] = E4M3[codes[at]] * table[i, j]
        return {"weight": codes, "weight_scale": table}, dense
    if scheme == "nvfp4":
        outer = np.full(1, amax / 2688, f32)
        groups = weight.reshape(n, -1, 16)
        inner = to_e4m3(np.abs(groups).max(-1) / 6 / outer)
        scale = E4M3[inner] * outer
        codes = to_e2m1(groups / np.where(scale == 0, 1, scale)[..., None])
        dense = (E2M1[codes] * scale[..., None]).reshape(n, k)
        stored = {"weight": pack(codes.reshape(n, k)), "weight_scale": inner, "weight_scale_2": outer}
        return stored, dense
    groups = weight.reshape(n, -1, 32)
    exponent = 8 if scheme == "mxfp8" else 2
    power = np.floor(np.log2(np.abs(groups).max(-1))).astype(int) - exponent
    scale = (2.0**power).astype(f32)[..., None]
    codes = (to_e4m3 if scheme == "mxfp8" else to_e2m1)(groups / scale)
    dense = ((E4M3 if scheme == "mxfp8" else E2M1)[codes] * scale).reshape(n, k)
    codes = codes.reshape(n, k)
    return {
        "weight": codes if scheme == "mxfp8" else pack(codes),
        "weight_scale": (power + 127).astype(np.uint8),
    }, dense


def module(
    parts: Mapping[str, Tensor], quant: Quant, partitions: Mapping[str, Mapping[str, int]]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Quantise and fuse: stored tensors by role, dense float32 weights by part, and the entry of `config.json`.

    `parts`: weights of the source projections in order.  `partitions`: for each, its partitions and their rows.  A part
    that fills several has one scale, which is stored once for each.
    """
    quantized, dense = [], {}
    for part, weight in parts.items():
        tensors, values = quantize(weight.float().numpy(), quant.scheme)
        for role, array in tensors.items():
            if role.startswith("weight_scale") and array.shape == (1,):
                tensors[role] = np.repeat(array, len(partitions[part]))
        quantized.append(tensors)
        dense[part] = torch.from_numpy(values.astype(np.float32))
    fused = {role: torch.from_numpy(np.concatenate([t[role] for t in quantized])) for role in quantized[0]}
    if quant.scheme.startswith("fp8") or quant.scheme == "mxfp8":
        fused["weight"] = fused["weight"].view(torch.float8_e4m3fn)
    if quant.scheme == "nvfp4":
        fused["weight_scale"] = fused["weight_scale"].view(torch.float8_e4m3fn)
    rows = [[name, count] for part in parts for name, count in partitions[part].items()]
    columns = next(iter(parts.values())).shape[1]
    shape = [sum(count for _, count in rows), columns]
    entry: dict[str, Any] = {"scheme": quant.scheme, "shape": shape, "activations": quant.activations}
    if len(rows) > 1:
        entry["partitions"] = rows
    if quant.activations in ("fp8_static", "nvfp4"):
        scales = quant.input_scales if len(quant.input_scales) > 1 else quant.input_scales * len(rows)
        fused["input_scale"] = torch.tensor(scales, dtype=torch.float32)
    if quant.pre_quant_scale:
        entry["pre_quant_scale"] = True
        fused["pre_quant_scale"] = torch.linspace(0.5, 1.5, columns).to(torch.bfloat16)
        dense = {part: values * fused["pre_quant_scale"].float() for part, values in dense.items()}
    return fused, dense, entry


def architecture(config: Any, family: str, head: str) -> dict[str, Any]:
    """The `architecture` object for a transformers text config."""
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    partial = rope.pop("partial_rotary_factor", 1.0)
    fields = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    fields += ["num_key_value_heads", "head_dim", "attention_bias", "rms_norm_eps", "hidden_act"]
    fields += ["max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"]
    result = {name: getattr(config, name) for name in fields}
    result |= {"layer_types": list(config.layer_types), "rope_theta": theta, "head": head}
    result["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if family == "qwen3":
        return result | {"sliding_window": config.sliding_window}
    linear = ["linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"]
    result |= {name: getattr(config, name) for name in [*linear, "linear_conv_kernel_dim"]}
    return result | {
        "rotary_dim": int(config.head_dim * partial),
        "attn_output_gate": True,
        "output_gate": "silu",
        "mtp_num_hidden_layers": 0,
    }


def write(
    out_dir: Path,
    model: Any,
    *,
    quant: Callable[[str], Quant | None] = lambda name: None,
    unfused: frozenset[str] | set[str] = frozenset(),
    kv_cache: Mapping[str, tuple[list[float], list[float]]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    carried: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Write `model` (Qwen3 or Qwen3.5 of transformers) as a canonical checkpoint of two shards.

    `quant`: canonical module name -> how to quantise it; a fused name is asked first, unless it is in `unfused`.
    `kv_cache`: attention module -> its k and v scales.  `carried`: extra tensors under `mtp.`.  Returns the state dict
    that a transformers model must load to mean the same, float32.
    """
    family = "qwen3" if model.config.model_type == "qwen3" else "qwen3_5"
    text = model.config.get_text_config()
    source = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    tied = bool(model.config.tie_word_embeddings)
    if tied:
        source.pop("lm_head.weight", None)
    hub_names = {_canonical(name): name for name in source}
    left = {_canonical(name): tensor for name, tensor in source.items()}
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    unfused_entries: dict[str, list[str]] = {}

    def put(name: str, parts: Mapping[str, str], names: Mapping[str, list[str]]) -> None:
        """Store module `name` made of `parts` (part -> canonical source module), whose partitions `names` lists."""
        weights = {part: left.pop(f"{at}.weight") for part, at in parts.items()}
        biases = [left.pop(f"{at}.bias") for at in parts.values() if f"{at}.bias" in left]
        chosen = quant(name)
        if chosen is None:
            values = {part: w.to(dtype) for part, w in weights.items()}
            stored[f"{name}.weight"] = torch.cat(list(values.values()))
            values = {part: w.float() for part, w in values.items()}
        else:
            partitions = {part: _rows(text, len(w), names[part], chosen) for part, w in weights.items()}
            tensors, values, modules[name] = module(weights, chosen, partitions)
            stored.update({f"{name}.{role}": tensor for role, tensor in tensors.items()})
        for part, at in parts.items():
            dense[hub_names[f"{at}.weight"]] = values[part]
        if biases:
            stored[f"{name}.bias"] = torch.cat(biases).to(dtype)
            for at, bias in zip(parts.values(), biases, strict=True):
                dense[hub_names[f"{at}.bias"]] = bias.to(dtype).float()

    for i in range(text.num_hidden_layers):
        layer = f"model.layers.{i}"
        for fused, sources in PARTITIONS.items():
            holder = f"{layer}.{fused.rpartition('.')[0]}"
            if f"{holder}.{next(iter(sources))}.weight" not in left:
                continue
            name = f"{layer}.{fused}"
            if name in unfused:
                unfused_entries[name] = list(sources)
                for part in sources:
                    put(f"{holder}.{part}", {part: f"{holder}.{part}"}, {part: [""]})
            else:
                put(name, {part: f"{holder}.{part}" for part in sources}, sources)
    for name in [n.removesuffix(".weight") for n in left if n.endswith("_proj.weight") and n.startswith("model.")]:
        put(name, {"": name}, {"": [""]})
    for name in ("model.embed_tokens", "lm_head"):
        if f"{name}.weight" in left:
            put(name, {"": name}, {"": [""]})
    for name, tensor in left.items():
        stored[name] = tensor.to(dtype)
        dense[hub_names[name]] = stored[name].float()
    for name, (k_scale, v_scale) in (kv_cache or {}).items():
        stored[f"{name}.k_scale"] = torch.tensor(k_scale, dtype=torch.float32)
        stored[f"{name}.v_scale"] = torch.tensor(v_scale, dtype=torch.float32)
    for name, tensor in (carried or {}).items():
        stored[f"mtp.{name}"] = tensor
    if tied:
        dense["lm_head.weight"] = dense[hub_names["model.embed_tokens.weight"]]

    config = {
        "format": "qconvert",
        "format_version": 1,
        "family": family,
        "architecture": architecture(text, family, "tied" if tied else "separate"),
        "quantization": {
            "modules": modules,
            "kv_cache": {n: "tensor" if len(k) == 1 else "head" for n, (k, _) in (kv_cache or {}).items()},
        },
        "unfused": unfused_entries,
        "carried": ["mtp", "visual"],
        "hf_config": {},
    }
    save(out_dir, stored, config)
    return dense


def save(out_dir: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shards: int = 2) -> None:
    """Write tensors and config as a canonical directory."""
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(json.dumps(config, indent=1))
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name].contiguous() for name in part}, out_dir / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _rows(text: Any, rows: int, names: list[str], quant: Quant) -> dict[str, int]:
    """The rows of each partition of one projection; only `in_proj_qkv` has more than one.

    Its blocks of 128 rows cross the borders of q, k and v in a model this small: then it is one partition.
    """
    if len(names) == 1 or quant.scheme == "fp8_block":
        return {"".join(names): rows}
    key = text.linear_num_key_heads * text.linear_key_head_dim
    return {"q": key, "k": key, "v": rows - 2 * key}


def _canonical(name: str) -> str:
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def randomize(model: Any, seed: int = 0) -> Any:
    """Fill every parameter so that no norm, bias or decay is at a value that hides an error; float32, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            start = 1.0 if parameter.data.float().mean() > 0.5 else 0.0
            parameter.data = start + 0.3 * noise
        else:
            parameter.data = noise * (0.3 if "conv1d" in name else 0.5 / parameter.shape[-1] ** 0.5)
    return model.float().eval()


def tiny_qwen3(**changes: Any) -> Any:
    """A random `Qwen3ForCausalLM` with two layers, float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
    }  # fmt: skip
    return randomize(Qwen3ForCausalLM(Qwen3Config(**(config | changes))))


def tiny_qwen3_5(**changes: Any) -> Any:
    """A random `Qwen3_5ForConditionalGeneration` with a small tower, three linear layers and a full one, float32."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tied = changes.pop("tie_word_embeddings", False)
    text: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "max_position_embeddings": 256, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
            "mrope_interleaved": True},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 16, "patch_size": 4}
    config = Qwen3_5Config(text_config=text | changes, vision_config=vision, tie_word_embeddings=tied)
    return randomize(Qwen3_5ForConditionalGeneration(config))

"""Planning at full size: time and memory to read all headers and plan, for checkpoints of published sizes.

    python -m bench.plan [--only TEXT] [--runs 3] [--folder DIR] [--json]

Writes headers, index and configs with the names, dtypes and shapes of published models, experts one by one, about 5 GB per
shard as on the Hub.  The data is a hole in a sparse file: sizes are right and nothing is stored.  Each figure comes from a
fresh process, files in the page cache, imports not counted; time is the best run, memory the peak of the process.  The last
rows grow one model by its number of layers: time per tensor must stay the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

SHARD_BYTES = 5_000_000_000
WIDTH = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}

Entry = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape
Config = dict[str, Any]
Scheme = Callable[[str], str]  # module name -> how it is stored, a key of `STORED`

# What a linear [N, K] stores in each format: (suffix, dtype, shape).
STORED: dict[str, Callable[[int, int], list[tuple[str, str, tuple[int, ...]]]]] = {
    "bf16": lambda n, k: [("weight", "BF16", (n, k))],
    "fp8": lambda n, k: [("weight", "F8_E4M3", (n, k)), ("weight_scale", "F32", ()), ("input_scale", "F32", ())],
    "nvfp4": lambda n, k: [
        ("weight", "U8", (n, k // 2)),
        ("weight_scale", "F8_E4M3", (n, k // 16)),
        ("weight_scale_2", "F32", ()),
        ("input_scale", "F32", ()),
    ],
    "compressed": lambda n, k: [
        ("weight_packed", "U8", (n, k // 2)),
        ("weight_scale", "F8_E4M3", (n, k // 16)),
        ("weight_global_scale", "F32", (1,)),
        ("input_global_scale", "F32", (1,)),
    ],
}


def linears(scheme: Scheme, prefix: str, sizes: dict[str, tuple[int, int]]) -> Iterator[Entry]:
    """The tensors of several linears below `prefix`."""
    for name, (n, k) in sizes.items():
        module = f"{prefix}.{name}"
        yield from ((f"{module}.{suffix}", dtype, shape) for suffix, dtype, shape in STORED[scheme(module)](n, k))


def plain(prefix: str, sizes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> Iterator[Entry]:
    """Tensors that are never quantised."""
    return ((f"{prefix}.{name}", dtype, shape) for name, shape in sizes.items())


def gated(inner: int, hidden: int) -> dict[str, tuple[int, int]]:
    """The projections of a gated MLP or expert."""
    return {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}


def attention(hidden: int, heads: int, kv_heads: int, head: int, *, gate: bool = False) -> dict[str, tuple[int, int]]:
    """The projections of an attention layer; `gate`: q holds an output gate as well."""
    query, key_value = heads * head, kv_heads * head
    return {
        "q_proj": (query * (2 if gate else 1), hidden), "k_proj": (key_value, hidden), "v_proj": (key_value, hidden),
        "o_proj": (hidden, query),
    }  # fmt: skip


def vision(depth: int, hidden: int, inner: int, out: int, mergers: tuple[str, ...] = ("merger",)) -> Iterator[Entry]:
    """The tower of the Qwen3-VL and Qwen3.5 wrappers."""

    def biased(name: str, n: int, k: int) -> Iterator[Entry]:
        return plain(name, {"weight": (n, k), "bias": (n,)})

    root = "model.visual"
    yield from plain(root, {"patch_embed.proj.weight": (hidden, 3, 2, 16, 16), "patch_embed.proj.bias": (hidden,)})
    yield from plain(root, {"pos_embed.weight": (2304, hidden)})
    for index in range(depth):
        block = f"{root}.blocks.{index}"
        for norm in ("norm1", "norm2"):
            yield from plain(f"{block}.{norm}", {"weight": (hidden,), "bias": (hidden,)})
        yield from biased(f"{block}.attn.qkv", 3 * hidden, hidden)
        yield from biased(f"{block}.attn.proj", hidden, hidden)
        yield from biased(f"{block}.mlp.linear_fc1", inner, hidden)
        yield from biased(f"{block}.mlp.linear_fc2", hidden, inner)
    for merger in mergers:
        yield from plain(f"{root}.{merger}.norm", {"weight": (hidden,), "bias": (hidden,)})
        yield from biased(f"{root}.{merger}.linear_fc1", 4 * hidden, 4 * hidden)
        yield from biased(f"{root}.{merger}.linear_fc2", out, 4 * hidden)


# -- models: each returns its config and a generator of its tensors ---------------------------------------------------------


def qwen3_5_moe(
    scheme: Scheme, *, layers: int, hidden: int, experts: int, inner: int, heads: int, value_heads: int,
) -> tuple[Config, Iterator[Entry]]:  # fmt: skip
    """Qwen3.5-MoE with its tower and MTP head, named as on the Hub."""
    vocab, head, linear_head, key_heads = 248320, 256, 128, 16
    key, value = key_heads * linear_head, value_heads * linear_head

    def feed_forward(layer: str) -> Iterator[Entry]:
        yield from plain(layer, {"mlp.gate.weight": (experts, hidden), "mlp.shared_expert_gate.weight": (1, hidden)})
        for expert in range(experts):
            yield from linears(scheme, f"{layer}.mlp.experts.{expert}", gated(inner, hidden))
        yield from linears(scheme, f"{layer}.mlp.shared_expert", gated(inner, hidden))
        yield from plain(layer, {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)})

    def full(layer: str) -> Iterator[Entry]:
        yield from linears(scheme, f"{layer}.self_attn", attention(hidden, heads, 2, head, gate=True))
        yield from plain(f"{layer}.self_attn", {"q_norm.weight": (head,), "k_norm.weight": (head,)})

    def delta(layer: str) -> Iterator[Entry]:
        mixer = f"{layer}.linear_attn"
        sizes = {"in_proj_qkv": (2 * key + value, hidden), "in_proj_z": (value, hidden), "out_proj": (hidden, value)}
        yield from linears(scheme, mixer, sizes)
        yield from plain(mixer, {"in_proj_a.weight": (value_heads, hidden), "in_proj_b.weight": (value_heads, hidden)})
        yield from plain(mixer, {"conv1d.weight": (2 * key + value, 1, 4), "dt_bias": (value_heads,)})
        yield from plain(mixer, {"A_log": (value_heads,), "norm.weight": (linear_head,)}, "F32")

    def entries() -> Iterator[Entry]:
        trunk = "model.language_model"
        yield from plain(trunk, {"embed_tokens.weight": (vocab, hidden), "norm.weight": (hidden,)})
        for index in range(layers):
            layer = f"{trunk}.layers.{index}"
            yield from full(layer) if index % 4 == 3 else delta(layer)
            yield from feed_forward(layer)
        yield "lm_head.weight", "BF16", (vocab, hidden)
        yield from vision(27, 1152, 4304, hidden)
        yield from plain("mtp", {"fc.weight": (hidden, 2 * hidden), "norm.weight": (hidden,)})
        yield from plain("mtp", {"pre_fc_norm_embedding.weight": (hidden,), "pre_fc_norm_hidden.weight": (hidden,)})
        yield from full("mtp.layers.0")
        yield from feed_forward("mtp.layers.0")

    text = {
        "model_type": "qwen3_5_moe_text", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": head,
        "linear_num_key_heads": key_heads, "linear_num_value_heads": value_heads, "linear_key_head_dim": linear_head,
        "linear_value_head_dim": linear_head, "mtp_num_hidden_layers": 1, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25},
    }  # fmt: skip
    config = {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"]}
    return {**config, "text_config": text, "vision_config": {"depth": 27}, "tie_word_embeddings": False}, entries()


def qwen3_vl_moe(scheme: Scheme, *, layers: int = 94) -> tuple[Config, Iterator[Entry]]:
    """Qwen3-VL-235B-A22B."""
    vocab, hidden, experts, inner, heads, kv_heads, head = 151936, 4096, 128, 1536, 64, 4, 128

    def entries() -> Iterator[Entry]:
        trunk = "model.language_model"
        yield from plain(trunk, {"embed_tokens.weight": (vocab, hidden), "norm.weight": (hidden,)})
        for index in range(layers):
            layer = f"{trunk}.layers.{index}"
            yield from linears(scheme, f"{layer}.self_attn", attention(hidden, heads, kv_heads, head))
            yield from plain(f"{layer}.self_attn", {"q_norm.weight": (head,), "k_norm.weight": (head,)})
            yield from plain(layer, {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)})
            yield f"{layer}.mlp.gate.weight", "BF16", (experts, hidden)
            for expert in range(experts):
                yield from linears(scheme, f"{layer}.mlp.experts.{expert}", gated(inner, hidden))
        yield "lm_head.weight", "BF16", (vocab, hidden)
        yield from vision(27, 1152, 4304, hidden, ("merger", *(f"deepstack_merger_list.{n}" for n in range(3))))

    text = {
        "model_type": "qwen3_vl_moe_text", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 12288,
        "num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head, "rms_norm_eps": 1e-6,
        "rope_theta": 5e6, "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]},
    }  # fmt: skip
    config = {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    return {**config, "text_config": text, "vision_config": {"depth": 27}, "tie_word_embeddings": False}, entries()


SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"


def nemotron_h(scheme: Scheme) -> tuple[Config, Iterator[Entry]]:
    """Nemotron 3 Super 120B-A12B with its MTP head."""
    vocab, hidden, latent, experts, inner, shared = 131072, 4096, 1024, 512, 2688, 5376
    heads, kv_heads, head, mamba_heads, mamba_head, state, groups = 32, 2, 128, 128, 64, 128, 8
    wide, conv = mamba_heads * mamba_head, mamba_heads * mamba_head + 2 * groups * state

    def mixer(kind: str, prefix: str) -> Iterator[Entry]:
        if kind == "*":
            yield from linears(scheme, prefix, attention(hidden, heads, kv_heads, head))
        elif kind == "M":
            yield from linears(scheme, prefix, {"in_proj": (wide + conv + mamba_heads, hidden), "out_proj": (hidden, wide)})
            yield from plain(prefix, {"conv1d.weight": (conv, 1, 4), "conv1d.bias": (conv,), "norm.weight": (wide,)})
            yield from plain(prefix, {"A_log": (mamba_heads,), "D": (mamba_heads,), "dt_bias": (mamba_heads,)})
        else:
            yield f"{prefix}.gate.weight", "BF16", (experts, hidden)
            yield f"{prefix}.gate.e_score_correction_bias", "F32", (experts,)
            for expert in range(experts):
                sizes = {"up_proj": (inner, latent), "down_proj": (latent, inner)}
                yield from linears(scheme, f"{prefix}.experts.{expert}", sizes)
            sizes = {"up_proj": (shared, hidden), "down_proj": (hidden, shared)}
            yield from linears(scheme, f"{prefix}.shared_experts", sizes)
            yield from linears(scheme, prefix, {"fc1_latent_proj": (latent, hidden), "fc2_latent_proj": (hidden, latent)})

    def entries() -> Iterator[Entry]:
        yield from plain("backbone", {"embeddings.weight": (vocab, hidden), "norm_f.weight": (hidden,)})
        for index, kind in enumerate(SUPER):
            yield f"backbone.layers.{index}.norm.weight", "BF16", (hidden,)
            yield from mixer(kind, f"backbone.layers.{index}.mixer")
        yield "lm_head.weight", "BF16", (vocab, hidden)
        first, second = "mtp.layers.0", "mtp.layers.1"
        yield from plain(first, {"enorm.weight": (hidden,), "hnorm.weight": (hidden,), "norm.weight": (hidden,)})
        yield f"{first}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
        yield from mixer("*", f"{first}.mixer")
        yield from plain(second, {"norm.weight": (hidden,), "final_layernorm.weight": (hidden,)})
        yield from mixer("E", f"{second}.mixer")

    return {
        "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": SUPER,
        "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": len(SUPER), "intermediate_size": inner,
        "layer_norm_epsilon": 1e-5, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head,
        "mamba_num_heads": mamba_heads, "mamba_head_dim": mamba_head, "ssm_state_size": state, "n_groups": groups,
        "conv_kernel": 4, "use_conv_bias": True, "use_bias": False, "mamba_proj_bias": False, "mlp_hidden_act": "relu2",
        "n_routed_experts": experts, "num_experts_per_tok": 22, "moe_intermediate_size": inner, "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": shared, "moe_latent_size": latent, "routed_scaling_factor": 5.0,
        "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1, "attention_bias": False,
        "mlp_bias": False, "mtp_hybrid_override_pattern": "*E", "tie_word_embeddings": False,
        "time_step_limit": [0.0, float("inf")],
    }, entries()  # fmt: skip


def step3p5(scheme: Scheme) -> tuple[Config, Iterator[Entry]]:
    """Step-3.5-Flash with its three MTP layers, experts one by one as llm-compressor writes them."""
    vocab, hidden, dense, experts, inner, layers, mtp = 128896, 4096, 11264, 288, 1280, 45, 3

    def entries() -> Iterator[Entry]:
        yield from plain("model", {"embed_tokens.weight": (vocab, hidden), "norm.weight": (hidden,)})
        for index in range(layers + mtp):
            layer, heads = f"model.layers.{index}", 64 if index % 4 == 0 else 96
            yield from plain(layer, {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)})
            yield from linears(scheme, f"{layer}.self_attn", attention(hidden, heads, 8, 128))
            yield from plain(f"{layer}.self_attn", {"q_norm.weight": (128,), "k_norm.weight": (128,)})
            yield f"{layer}.self_attn.g_proj.weight", "BF16", (heads, hidden)
            if 3 <= index < layers:
                yield f"{layer}.moe.gate.weight", "BF16", (experts, hidden)
                yield f"{layer}.moe.router_bias", "F32", (experts,)
                for expert in range(experts):
                    yield from linears(scheme, f"{layer}.moe.experts.{expert}", gated(inner, hidden))
                yield from linears(scheme, f"{layer}.share_expert", gated(inner, hidden))
            else:
                yield from linears(scheme, f"{layer}.mlp", gated(dense, hidden))
            if index >= layers:
                yield from plain(layer, {"enorm.weight": (hidden,), "hnorm.weight": (hidden,)})
                yield f"{layer}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
                yield f"{layer}.transformer.shared_head.norm.weight", "BF16", (hidden,)
                yield f"{layer}.transformer.shared_head.output.weight", "BF16", (vocab, hidden)
        yield "lm_head.weight", "BF16", (vocab, hidden)

    sliding = [index % 4 != 0 for index in range(layers + mtp)]
    return {
        "model_type": "step3p5", "architectures": ["Step3p5ForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": dense, "num_hidden_layers": layers, "head_dim": 128, "num_attention_heads": 64,
        "num_attention_groups": 8, "attention_other_setting": {
            "attention_type": "sliding_attention", "num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128,
        },
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding], "sliding_window": 512,
        "rope_theta": [1e4 if s else 5e6 for s in sliding], "partial_rotary_factors": [1.0 if s else 0.5 for s in sliding],
        "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 32.0,
                         "original_max_position_embeddings": 131072},
        "yarn_only_types": ["full_attention"], "moe_layers_enum": ",".join(map(str, range(3, layers))),
        "moe_num_experts": experts, "moe_top_k": 8, "moe_intermediate_size": inner, "share_expert_dim": inner,
        "moe_router_activation": "sigmoid", "use_moe_router_bias": True, "norm_expert_weight": True,
        "need_fp32_gate": True, "moe_router_scaling_factor": 3.0, "use_head_wise_attn_gate": True, "use_qk_norm": True,
        "zero_centered": True, "att_impl_type": "GQA", "num_nextn_predict_layers": mtp, "rms_norm_eps": 1e-5,
        "swiglu_limits": [7 if i in (43, 44) else 0 for i in range(layers + mtp)],
        "swiglu_limits_shared": [16 if i in (43, 44) else 0 for i in range(layers + mtp)],
        "max_position_embeddings": 262144, "tie_word_embeddings": False,
    }, entries()  # fmt: skip


def step3(scheme: Scheme) -> tuple[Config, Iterator[Entry]]:
    """Step3 321B, text model, experts one by one."""
    vocab, hidden, dense, experts, inner, layers = 128815, 7168, 18432, 48, 5120, 61
    sparse = range(4, 60)

    def entries() -> Iterator[Entry]:
        yield from plain("model", {"embed_tokens.weight": (vocab, hidden), "norm.weight": (hidden,)})
        for index in range(layers):
            layer = f"model.layers.{index}"
            yield from plain(layer, {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)})
            sizes = {"q_proj": (2048, hidden), "k_proj": (256, hidden), "v_proj": (256, hidden), "wq": (16384, 2048),
                     "o_proj": (hidden, 16384)}  # fmt: skip
            yield from linears(scheme, f"{layer}.self_attn", sizes)
            yield f"{layer}.self_attn.inter_norm.weight", "BF16", (2048,)
            if index in sparse:
                yield f"{layer}.moe.gate.weight", "BF16", (experts, hidden)
                for expert in range(experts):
                    yield from linears(scheme, f"{layer}.moe.experts.{expert}", gated(inner, hidden))
                yield from linears(scheme, f"{layer}.share_expert", gated(inner, hidden))
            else:
                yield from linears(scheme, f"{layer}.mlp", gated(dense, hidden))
        yield "lm_head.weight", "BF16", (vocab, hidden)

    return {
        "model_type": "step3_text", "architectures": ["Step3TextForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": dense, "num_hidden_layers": layers, "num_attention_heads": 64, "num_attention_groups": 1,
        "head_dim": 256, "share_q_dim": 2048, "moe_layers_enum": ",".join(map(str, sparse)), "moe_num_experts": experts,
        "moe_top_k": 3, "moe_intermediate_size": inner, "share_expert_dim": inner, "norm_expert_weight": False,
        "rope_theta": 5e5, "rms_norm_eps": 1e-5, "max_position_embedding": 65536, "tie_word_embeddings": False,
    }, entries()  # fmt: skip


# -- quantisation: which modules, and the config that says so ---------------------------------------------------------------


def experts_only(scheme: str, otherwise: str = "bf16", shared: bool = True) -> Scheme:
    """Quantise the experts, and store every other linear `otherwise`; MTP heads stay as they are."""

    def choose(module: str) -> str:
        if module.startswith(("mtp.", "model.layers.45.", "model.layers.46.", "model.layers.47.")):
            return "bf16"
        segments = module.split(".")
        names = {"experts", *(("shared_expert", "share_expert", "shared_experts") if shared else ())}
        return otherwise if names.isdisjoint(segments) else scheme

    return choose


def linear_modules(entries: Iterable[Entry]) -> Iterator[tuple[str, str]]:
    """(module, dtype of its weight) of every linear."""
    for name, dtype, shape in entries:
        module, _, suffix = name.rpartition(".")
        if suffix in ("weight", "weight_packed") and len(shape) == 2 and not module.endswith("embed_tokens"):
            yield module, dtype


def modelopt_excluded(entries: Iterable[Entry]) -> Config:
    """One algorithm, and what it leaves out: nvidia-modelopt shortens a container that is excluded as a whole to `name*`."""
    excluded = {}
    for module, dtype in linear_modules(entries):
        if dtype == "BF16":
            parent = module.rpartition(".")[0]
            whole = parent.endswith("self_attn") or parent.startswith(("model.visual", "mtp"))
            excluded[f"{parent}*" if whole else module] = None
    block = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": list(excluded)}
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": block}


def modelopt_mixed(entries: Iterable[Entry]) -> Config:
    """MIXED_PRECISION: every quantised module by name, with its algorithm."""
    algorithms = {"U8": {"quant_algo": "NVFP4", "group_size": 16}, "F8_E4M3": {"quant_algo": "FP8"}}
    layers = {module: algorithms[dtype] for module, dtype in linear_modules(entries) if dtype in algorithms}
    block = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": block}


def compressed_tensors(entries: Iterable[Entry]) -> Config:
    """The class Linear, and every linear that is not quantised by name, as llm-compressor writes them; and two patterns."""
    weights = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    group = {"targets": ["Linear"], "format": "nvfp4-pack-quantized", "weights": {**weights, "dynamic": False},
             "input_activations": {**weights, "dynamic": "local"}}  # fmt: skip
    ignore = [module for module, dtype in linear_modules(entries) if dtype == "BF16"]
    return {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "version": "0.20.0",
        "config_groups": {"group_0": group}, "ignore": [*ignore, "re:.*router.*", "re:visual.*"],
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One checkpoint: a model, which modules are quantised, and the config that says so."""

    name: str
    model: Callable[[Scheme], tuple[Config, Iterator[Entry]]]
    scheme: Scheme
    config: Callable[[Iterable[Entry]], Config]

    def write(self, folder: Path) -> int:
        """Write the checkpoint.  Returns its number of tensors."""
        config, generated = self.model(self.scheme)
        entries = list(generated)
        quantization = self.config(entries)
        folder.mkdir()
        if "quant_method" in quantization:
            config["quantization_config"] = quantization
        else:
            (folder / "hf_quant_config.json").write_text(json.dumps(quantization))
        (folder / "config.json").write_text(json.dumps(config))
        write_shards(folder, entries)
        return len(entries)


def write_shards(folder: Path, entries: Iterable[Entry]) -> None:
    """Headers and index of safetensors files of about `SHARD_BYTES`, with a hole for the data."""
    shards: list[dict[str, Any]] = [{}]
    position = 0
    for name, dtype, shape in entries:
        nbytes = WIDTH[dtype] * prod(shape)
        if shards[-1] and position + nbytes > SHARD_BYTES:
            shards.append({})
            position = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    index = {}
    for number, header in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + list(header.values())[-1]["data_offsets"][1])
        index.update(dict.fromkeys(header, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))


def big_qwen(layers: int) -> Callable[[Scheme], tuple[Config, Iterator[Entry]]]:
    """Qwen3.5-397B-A17B with so many layers (60 as published)."""
    return lambda scheme: qwen3_5_moe(
        scheme, layers=layers, hidden=4096, experts=512, inner=1024, heads=32, value_heads=64
    )


def small_qwen(scheme: Scheme) -> tuple[Config, Iterator[Entry]]:
    """Qwen3.5-35B-A3B."""
    return qwen3_5_moe(scheme, layers=40, hidden=2048, experts=256, inner=512, heads=16, value_heads=32)


NVFP4 = experts_only("nvfp4")
MIXED = experts_only("nvfp4", "fp8")
COMPRESSED = experts_only("compressed", "compressed")
CASES = (
    Case("Qwen3.5-397B-A17B modelopt excluded", big_qwen(60), NVFP4, modelopt_excluded),
    Case("Qwen3.5-397B-A17B modelopt mixed", big_qwen(60), MIXED, modelopt_mixed),
    Case("Qwen3.5-397B-A17B compressed-tensors", big_qwen(60), COMPRESSED, compressed_tensors),
    Case("Qwen3.5-35B-A3B modelopt mixed", small_qwen, MIXED, modelopt_mixed),
    Case("Qwen3-VL-235B compressed-tensors", qwen3_vl_moe, COMPRESSED, compressed_tensors),
    Case("Qwen3-VL-235B modelopt excluded", qwen3_vl_moe, NVFP4, modelopt_excluded),
    Case("Nemotron 3 Super modelopt mixed", nemotron_h, MIXED, modelopt_mixed),
    Case("Step-3.5-Flash modelopt excluded", step3p5, NVFP4, modelopt_excluded),
    Case("Step3 modelopt excluded", step3, NVFP4, modelopt_excluded),
    *(Case(f"Qwen3.5-397B-A17B, {n} layers", big_qwen(n), NVFP4, modelopt_excluded) for n in (16, 32, 64)),
)


def measure(folder: str) -> dict[str, float]:
    """Read the headers and plan, in this process."""
    from convert.planner import plan_source
    from convert.source import read_source

    busy = time.process_time()
    start = time.perf_counter()
    source = read_source(folder)
    read = time.perf_counter()
    plan = plan_source(source)
    end, busy = time.perf_counter(), time.process_time() - busy
    # Not `ru_maxrss`: that survives exec, and so holds the peak of the process that started this one.
    status = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    times = {"read_s": read - start, "plan_s": end - read, "cpu_s": busy}
    return times | {"peak_mb": peak_kib * 1024 / 1e6, "steps": len(plan.steps)}


def run(case: Case, folder: Path, runs: int) -> dict[str, Any]:
    """Write a checkpoint and measure it `runs` times in fresh processes."""
    checkpoint = folder / "checkpoint"
    try:
        tensors = case.write(checkpoint)
        shards = len(list(checkpoint.glob("*.safetensors")))
        figures = []
        for _ in range(runs):
            done = subprocess.run(
                [sys.executable, "-m", "bench.plan", "--measure", str(checkpoint)], capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"{case.name}: {done.stderr.strip().splitlines()[-1]}")
            figures.append(json.loads(done.stdout))
    finally:
        subprocess.run(["rm", "-rf", str(checkpoint)], check=True)
    best = min(figures, key=lambda f: f["read_s"] + f["plan_s"]) | {"cpu_s": min(f["cpu_s"] for f in figures)}
    total = best["read_s"] + best["plan_s"]
    peak = max(f["peak_mb"] for f in figures)
    return {
        "case": case.name, "tensors": tensors, "shards": shards, **best, "peak_mb": peak, "total_s": total,
        "us_per_tensor": 1e6 * total / tensors, "all_s": [f["read_s"] + f["plan_s"] for f in figures],
    }  # fmt: skip


def main() -> None:
    """Run every case and print one table; the same as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="only cases whose name has this text")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", metavar="CHECKPOINT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    if not args.json:
        print(f"{machine}; best of {args.runs} fresh processes")
        columns = {"tensors": 9, "shards": 8, "read s": 8, "plan s": 8, "total s": 9, "CPU s": 7, "us/tensor": 11, "peak MB": 9}
        print(" " * 40 + "".join(f"{name:>{width}}" for name, width in columns.items()))
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for case in CASES:
            if args.only not in case.name:
                continue
            row = run(case, Path(name), args.runs)
            rows.append(row)
            if not args.json:
                times = "".join(f"{row[name]:>{width}.2f}" for name, width in
                                (("read_s", 8), ("plan_s", 8), ("total_s", 9), ("cpu_s", 7), ("us_per_tensor", 11)))
                print(f"{row['case']:<40}{row['tensors']:>9}{row['shards']:>8}{times}{row['peak_mb']:>9.0f}", flush=True)
    if args.json:
        print(json.dumps({"machine": machine, "runs": args.runs, "cases": rows}, indent=2))


if __name__ == "__main__":
    main()

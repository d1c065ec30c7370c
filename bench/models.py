"""Models of published dimensions with random weights, made where they are to run; and tiny ones of every family.

Weights are random codes with scales that keep activations around 1, as in a trained model: nothing overflows.
Source of the dimensions: the published configs; of what is quantised: the FP8 checkpoints of Qwen (blocks of 128 x 128, head
and gates in BF16), ModelOpt's of Nemotron 3 Nano (static, per tensor; attention and the Mamba blocks before it in BF16, FP8 KV
cache), and NVFP4 as ModelOpt writes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from runtime.architecture import read_architecture
from runtime.builder import LayerBuilder
from runtime.experts import ExpertLinears
from runtime.format import CanonicalConfig, ModuleSpec
from runtime.models import FAMILIES
from runtime.models.base import CausalLM
from runtime.norms import RMSNorm, ZeroCenteredRMSNorm
from runtime.state import KVCache

Formats = Callable[[str], tuple[str, str | None] | None]  # module name -> scheme and activations, None: BF16

COMMON: Mapping[str, Any] = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "head": "separate", "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": None, "attention_bias": False,
}  # fmt: skip
ROTARY: Mapping[str, Any] = {**COMMON, "hidden_act": "silu", "rope_theta": 1e7, "rope_scaling": None}
LINEARS = (
    "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "in_proj_qkvz", "out_proj", "in_proj", "up_proj", "wq",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """What to make.  `kv`: modules of attention keep their keys and values in FP8."""

    name: str
    family: str
    architecture: Mapping[str, Any]
    formats: Formats
    kv: bool = False


def everywhere(scheme: str, activations: str | None) -> Formats:
    """All linears but the head, gates and what is small."""
    return lambda name: (scheme, activations) if name.rpartition(".")[2] in LINEARS else None


BLOCK = everywhere("fp8_block", "fp8_group")
NVFP4 = everywhere("nvfp4", "nvfp4")
STATIC = everywhere("fp8_tensor", "fp8_static")
TOKEN = everywhere("fp8_channel", "fp8_token")


def qwen3_5(hidden: int, layers: int, heads: int, kv_heads: int, value_heads: int, **more: Any) -> dict[str, Any]:
    """Published dimensions that all Qwen3.5 share, and those that are given."""
    return {
        **ROTARY, "vocab_size": 248320, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 256, "rotary_dim": 64, "attn_output_gate": True, "output_gate": "silu",
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
        "linear_num_key_heads": 16, "linear_num_value_heads": value_heads, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "mtp_num_hidden_layers": 0,
    } | more  # fmt: skip


def nemotron_h(pattern: str, **more: Any) -> dict[str, Any]:
    """Nemotron 3; `pattern` as in its configs."""
    kinds = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    return {
        **COMMON, "rms_norm_eps": 1e-5, "vocab_size": 131072, "hidden_size": 2688, "num_hidden_layers": len(pattern),
        "layer_types": [kinds[letter] for letter in pattern], "num_attention_heads": 32, "num_key_value_heads": 2,
        "head_dim": 128, "intermediate_size": None, "mlp_bias": False, "mlp_hidden_act": "relu2", "mamba_num_heads": 64,
        "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "use_conv_bias": True,
        "mamba_bias": False, "time_step_limit": [0.0, None], "n_routed_experts": 128, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "n_shared_experts": 1, "shared_intermediate_size": 3712, "moe_latent_size": None, "routed_scaling_factor": 2.5,
        "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "mtp_layer_types": [], "num_nextn_predict_layers": 0,
    } | more  # fmt: skip


NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def nano_formats(name: str) -> tuple[str, str | None] | None:
    """FP8 but for attention and the Mamba blocks right before it."""
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
    if layer < 0 or "*" in NANO[layer : layer + 1] or (NANO[layer] == "M" and NANO[layer + 1 : layer + 2] == "*"):
        return None
    return STATIC(name)


QWEN_27B = qwen3_5(5120, 64, 24, 4, 48, intermediate_size=17408)
QWEN_9B = qwen3_5(4096, 32, 16, 4, 32, intermediate_size=12288)
QWEN_35B = qwen3_5(
    2048, 40, 16, 2, 32, num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512, shared_expert_intermediate_size=512
)
PUBLISHED = (
    Model("Qwen3.5-9B FP8", "qwen3_5", QWEN_9B, BLOCK),
    Model("Qwen3.5-35B-A3B FP8", "qwen3_5_moe", QWEN_35B, BLOCK),
    Model("Qwen3.5-27B FP8", "qwen3_5", QWEN_27B, BLOCK),
    Model("Nemotron-3-Nano-30B-A3B FP8", "nemotron_h", nemotron_h(NANO), nano_formats, kv=True),
    Model("Qwen3.5-27B NVFP4", "qwen3_5", QWEN_27B, NVFP4),
    Model("Qwen3.5-9B NVFP4", "qwen3_5", QWEN_9B, NVFP4),
)


# Tiny models: large enough for every kernel, small enough for a CPU.
SMALL: Mapping[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 4096,
}  # fmt: skip
FOUR = ["full_attention"] * 4
WINDOWS = ["sliding_attention", "full_attention"] * 2
DENSE = {**ROTARY, **SMALL, "num_hidden_layers": 4, "layer_types": FOUR, "intermediate_size": 512, "sliding_window": None}
SPARSE = {
    **DENSE, "mlp_layer_types": ["dense", "sparse"] * 2, "num_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 128, "norm_topk_prob": True,
}  # fmt: skip
HYBRID: dict[str, Any] = {
    **SMALL, "linear_num_key_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 128,
    "rotary_dim": 16,
}  # fmt: skip
STEP: dict[str, Any] = {
    **{k: v for k, v in COMMON.items() if k != "attention_bias"}, **SMALL, "num_hidden_layers": 4, "intermediate_size": 512,
    "mlp_layer_types": ["dense", "sparse"] * 2, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 128,
    "share_expert_dim": 128, "norm_expert_weight": True, "rope_scaling": None, "rope_theta": 10000.0,
}  # fmt: skip
TINY_ARCHITECTURES: Mapping[str, dict[str, Any]] = {
    "llama": {**DENSE, "mlp_bias": False},
    "mistral": {**DENSE, "mlp_bias": False, "layer_types": WINDOWS, "sliding_window": 40},
    "qwen2": {**DENSE, "mlp_bias": False, "attention_bias": True, "attention_out_bias": False},
    "qwen3": DENSE,
    "qwen3_moe": SPARSE,
    "qwen3_vl_moe": SPARSE,
    "qwen3_5": qwen3_5(256, 4, 4, 2, 4, **HYBRID, intermediate_size=512),
    "qwen3_5_moe": qwen3_5(
        256, 4, 4, 2, 4, **HYBRID, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
    ),
    "nemotron_h": nemotron_h(
        "MEM*-", **SMALL, mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=64, n_groups=2, n_routed_experts=8,
        num_experts_per_tok=3, moe_intermediate_size=128, shared_intermediate_size=256, intermediate_size=512,
    ),
    "step3_text": {**STEP, "num_key_value_heads": 1, "share_q_dim": 128},
    "step3p5": {
        **STEP, "layer_types": WINDOWS, "layer_kinds": [f"{w}.{m}" for w, m in zip(WINDOWS, ["dense", "sparse"] * 2)],
        "mtp_layer_kinds": [], "num_sliding_attention_heads": 6, "num_sliding_key_value_heads": 2, "sliding_window": 40,
        "partial_rotary_factors": [0.5, 1.0] * 2, "rope_parameters": None, "yarn_only_types": None,
        "router_scaling_factor": 2.0, "swiglu_limits": [None, 7.0] * 2, "swiglu_limits_shared": None,
        "use_moe_router_bias": True, "layer_scale": False, "num_nextn_predict_layers": 0,
    },
}  # fmt: skip
SCHEMES: Mapping[str, tuple[Formats, bool]] = {
    "FP8 blocks": (BLOCK, False),
    "FP8 static": (STATIC, True),
    "NVFP4": (NVFP4, False),
    "FP8 tokens": (TOKEN, True),
}


def tiny(family: str, scheme: str) -> Model:
    """A model of a family in one of `SCHEMES`."""
    formats, kv = SCHEMES[scheme]
    return Model(f"{family} {scheme}", family, TINY_ARCHITECTURES[family], formats, kv)


# Making them


@dataclass
class Quantizing(LayerBuilder):
    """A builder that quantises linears as `formats` says, and writes down how."""

    formats: Formats = lambda name: None
    kv: bool = False
    made: dict[str, ModuleSpec] = field(default_factory=dict)
    made_kv: dict[str, str] = field(default_factory=dict)

    def _spec(self, name: str, allowed: list[tuple[int, ...]], columns: int, experts: int | None) -> ModuleSpec | None:
        found = self.formats(name)
        if found is None:
            return None
        rows = allowed[0]
        partitions = tuple((f"p{i}" if len(rows) > 1 else "", count) for i, count in enumerate(rows))
        self.made[name] = ModuleSpec(found[0], (sum(rows), columns), partitions, found[1], experts=experts)
        return self.made[name]

    def kv_cache(self, owner: nn.Module, name: str, heads: int, head_dim: int, window: int | None = None) -> Any:
        """As the base, with FP8 caches where asked for."""
        if self.kv:
            self.made_kv[name] = "tensor"
            self.config = CanonicalConfig(self.config.family, {}, {}, self.made_kv, {}, (), {})
        return super().kv_cache(owner, name, heads, head_dim, window)


def empty(model: Model, device: torch.device, dtype: torch.dtype, activations: bool = True) -> CausalLM:
    """The network without memory for its weights; its `config` is that of a checkpoint."""
    network = FAMILIES[model.family]
    config = CanonicalConfig(model.family, model.architecture, {}, {}, {}, (), {})
    build = Quantizing(config, device, dtype, activations, formats=model.formats, kv=model.kv)
    found = network(read_architecture(network.architecture_type, model.architecture), build)
    found.config = CanonicalConfig(model.family, model.architecture, build.made, build.made_kv, {}, (), {})
    return found.eval()


def make(
    model: Model, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0, activations: bool = True
) -> CausalLM:
    """A network with random weights on `device`."""
    found = empty(model, device, dtype, activations)
    random = torch.Generator(device).manual_seed(seed)
    for module in found.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(content(module, name, parameter, random, device), requires_grad=False))
    return found


def content(module: nn.Module, role: str, like: Tensor, random: torch.Generator, device: torch.device) -> Tensor:
    """Random values for a parameter."""
    shape, K = like.shape, getattr(module, "shape", (0, 0))[1] if not isinstance(module, ExpertLinears) else _columns(module)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=random, device=device) * (high - low) + low

    def normal(size: float) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, size, generator=random)

    if like.dtype in (torch.uint8, torch.float8_e4m3fn):
        codes = torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 256, generator=random)
        if role == "weight_scale":
            codes.bitwise_and_(0x0F).bitwise_or_(0x30)  # E4M3 from 0.5 to 1.875
        elif like.dtype == torch.float8_e4m3fn:
            codes.bitwise_and_(0xBF)  # below 2: root mean square 0.63
        return codes.view(like.dtype)
    root = math.sqrt(max(K, 1))
    match role:
        case "weight_scale_2":
            return uniform(0.9, 1.1) / (2.93 * 1.2 * root)  # root mean squares of E2M1 codes and of block scales
        case "weight_scale":
            return uniform(0.9, 1.1) / (0.63 * root)
        case "input_scale":
            return torch.full(shape, (8.0 / 6 if hasattr(module, "weight_scale_2") else 8.0) / 448, device=device)
        case "k_scale" | "v_scale":
            return torch.full(shape, 8.0 / 448, device=device)
        case "A_log":
            return uniform(1.0, 8.0).log().bfloat16()
        case "dt_bias":
            return uniform(-5.0, -3.0).bfloat16()
        case "D":
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        case "e_score_correction_bias" | "router_bias":
            return normal(0.01).float()
        case "weight" if isinstance(module, RMSNorm):
            return normal(0.1) + (0.0 if isinstance(module, ZeroCenteredRMSNorm) else 1.0)
        case "weight" if len(shape) == 3 and not isinstance(module, ExpertLinears):
            return normal(0.5)  # of a convolution
        case "bias":
            return normal(0.1)
    return normal(1.0 / root)


def _columns(stack: ExpertLinears) -> int:
    return stack._make().shape[1]


# What a step reads


def step_bytes(model: CausalLM, rows: int, length: int) -> float:
    """Bytes that one decoding step of `rows` sequences of `length` tokens has to move.

    Each weight once, of experts those that the expected number of distinct ones hold, of the embedding the rows; recurrent
    states and windows read and written, keys and values read.
    """
    total = 0.0
    for module in model.modules():
        own = sum(p.nbytes for p in module.parameters(recurse=False))
        if module is model.model.embed_tokens and model.lm_head is not None:
            own = rows * own / module.shape[0]  # type: ignore[assignment]
        if isinstance(module, ExpertLinears):
            count = next(module.parameters(recurse=False)).shape[0]
            chosen = int(model.config.architecture["num_experts_per_tok"])
            own *= 1 - (1 - chosen / count) ** rows  # type: ignore[assignment]
        total += own
    for cache in caches(model, rows, length):
        tensors = {name: x for name, x in vars(cache).items() if isinstance(x, Tensor)}
        if isinstance(cache, KVCache):
            total += sum(tensors[name].nbytes for name in ("k", "v"))
        else:
            total += 2 * sum(x.nbytes for x in tensors.values())
    return total


def caches(model: CausalLM, rows: int, length: int) -> Iterator[Any]:
    """What `rows` sequences of `length` tokens leave behind, without memory."""
    from runtime.state import CacheSize

    size = CacheSize(rows, length, 0, torch.device("meta"), model.model.dtype)
    return (cache for cache in model._new_caches(size) if cache is not None)


def active_weights(model: CausalLM) -> float:
    """Weights that a token is multiplied with: those of the head and of its experts, not of the embedding."""
    total = 0.0
    for module in model.modules():
        shape = getattr(module, "shape", None)
        if isinstance(module, ExpertLinears):
            rows, columns = module._make().shape
            total += rows * columns * int(model.config.architecture["num_experts_per_tok"])
        elif isinstance(shape, tuple) and len(shape) == 2 and module is not model.model.embed_tokens:
            total += shape[0] * shape[1]
    return total + (math.prod(model.model.embed_tokens.shape) if model.lm_head is None else 0)

"""Tiny Nemotron-H checkpoints as producers write them, and the network from its formulas in float64.

Nothing here calls `convert` or `runtime`.  Weights have the names of the hub: `backbone.layers.0.mixer.in_proj.weight`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from canonical import Quant, module
from safetensors.torch import save_file
from torch import Tensor

ALGORITHMS = {
    "fp8_tensor": "FP8", "fp8_channel": "FP8_PER_CHANNEL_PER_TOKEN", "fp8_block": "fp8_pb_wo", "nvfp4": "W4A16_NVFP4",
    "mxfp8": "MXFP8", "mxfp4": "mxfp4",
}  # fmt: skip
KINDS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
UNQUANTISED = ("embeddings", "mixer.gate", "conv1d")  # modules that producers leave alone
FLOAT32 = ("A_log", "e_score_correction_bias")  # stored so, as published checkpoints have them; the rest in bfloat16


def tiny(pattern: str, **changes: Any) -> Any:
    """A random `NemotronHForCausalLM`, float32, with nothing at a value that hides an error."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "ssm_state_size": 32, "mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 2,
        "chunk_size": 16, "hybrid_override_pattern": pattern, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64, "routed_scaling_factor": 2.5,
        "max_position_embeddings": 256, "architectures": ["NemotronHForCausalLM"],
    }  # fmt: skip
    model = NemotronHForCausalLM(NemotronHConfig(**(config | changes)))
    fill(model.state_dict())
    limits = model.config.time_step_limit
    for block in model.model.layers:
        if hasattr(block.mixer, "time_step_limit"):  # transformers takes `time_step_min` for the lower one
            block.mixer.time_step_limit = tuple(limits)
    return model.float().eval()


def fill(tensors: Mapping[str, Tensor], seed: int = 0) -> None:
    """Random values in place: decays from slow to fast, time steps from short to long, biases that change choices."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("A_log", "dt_bias")):
            values = noise - 1
        elif tensor.ndim == 1:
            values = 0.3 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif "embeddings" in name or "conv1d" in name:
            values = 0.5 * noise
        else:
            values = noise / tensor.shape[-1] ** 0.5
        tensor.copy_(values)


def config_of(model: Any) -> dict[str, Any]:
    """`config.json` as transformers writes it, with the pattern in the hub's spelling."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    del config["layers_block_type"]
    return config | {"hybrid_override_pattern": model.config.hybrid_override_pattern}


def weights_of(model: Any, drafts: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a model under the names of the hub, experts one by one, and those of draft heads."""
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.", "backbone.", 1)
        if ".experts." in name:
            container, _, projection = name.rpartition(".")
            weights |= {f"{container}.{e}.{projection}.weight": one for e, one in enumerate(tensor.float())}
        else:
            weights[name] = tensor.float()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights | dict(drafts or {})


def draft_weights(model: Any, heads: int) -> dict[str, Tensor]:
    """Random weights of draft heads of the pattern "*E", shaped like the trunk's first blocks of these kinds."""
    found: dict[str, Tensor] = {}
    hidden, pattern = model.config.hidden_size, model.config.hybrid_override_pattern
    trunk = weights_of(model)
    for head in range(heads):
        for place, kind in enumerate("*E"):
            source, name = f"backbone.layers.{pattern.index(kind)}.", f"mtp.layers.{2 * head + place}."
            found |= {name + n.removeprefix(source): t.clone() for n, t in trunk.items() if n.startswith(source)}
        first, last = f"mtp.layers.{2 * head}", f"mtp.layers.{2 * head + 1}"
        found |= {f"{first}.{norm}.weight": torch.empty(hidden) for norm in ("enorm", "hnorm")}
        found[f"{first}.eh_proj.weight"] = torch.empty(hidden, 2 * hidden)
        found[f"{last}.final_layernorm.weight"] = torch.empty(hidden)
    fill(found, seed=1)
    return found


def write_source(directory: Path, weights: Mapping[str, Tensor], config: Any, scheme: str | None) -> dict[str, Tensor]:
    """Write a checkpoint as ModelOpt does, or a plain one; return the dense float32 weights that it stands for.

    `config`: what `config.json` holds, with the numbers that JSON lacks as transformers spells them.
    """
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    quantised = []
    for name, tensor in weights.items():
        owner, _, role = name.rpartition(".")
        if scheme and role == "weight" and tensor.ndim == 2 and not owner.endswith(UNQUANTISED):
            tensors, values, _ = module({"": tensor}, Quant(scheme), {"": {"": len(tensor)}})
            if scheme == "fp8_tensor":
                tensors["weight_scale"] = tensors["weight_scale"].reshape(())
            if scheme == "fp8_block":
                tensors["weight_scale"] = tensors["weight_scale"][:, None, :, None]
            if scheme == "nvfp4":
                tensors["weight_scale_2"] = tensors["weight_scale_2"].reshape(())
            stored |= {f"{owner}.{r}": t.contiguous() for r, t in tensors.items()}
            dense[name] = values[""]
            quantised.append(owner)
        else:
            stored[name] = tensor.contiguous() if name.endswith(FLOAT32) else tensor.bfloat16().contiguous()
            dense[name] = stored[name].float()
    if scheme:
        excluded = sorted({n.rpartition(".")[0] for n in weights if n.rpartition(".")[0].endswith(UNQUANTISED)})
        producer = {"name": "modelopt", "version": "0.47.0"}
        config = config | {
            "quantization_config": {
                "ignore": excluded, "quant_algo": ALGORITHMS[scheme], "producer": producer, "quant_method": "modelopt",
            }
        }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(stored, directory / "model.safetensors")
    return dense


def for_transformers(dense: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Dense weights as the state dict of a transformers model."""
    found: dict[str, Tensor] = {}
    for name in model.state_dict():
        hub = name.replace("model.", "backbone.", 1)
        if ".experts." in hub:
            container, _, projection = hub.rpartition(".")
            count = model.config.n_routed_experts
            found[name] = torch.stack([dense[f"{container}.{e}.{projection}.weight"] for e in range(count)])
        else:
            found[name] = dense[hub if hub in dense else "backbone.embeddings.weight"]  # a tied head
    return found


# ------------------------------------------------------------------------------------------------- formulas in float64


class Network:
    """The network of one sequence, written down token by token and expert by expert.

    `weights`: dense, under the names of the hub, with any prefix before `backbone`.  `config`: of the text model.
    `rounded`: what happens to keys and values on their way into attention.
    """

    def __init__(
        self, weights: Mapping[str, Any], config: Mapping[str, Any], rounded: Callable[[Tensor, str], Tensor] | None = None
    ) -> None:
        own = {name.removeprefix("language_model."): values for name, values in weights.items()}
        self.w = {name: torch.asarray(values, dtype=torch.float64, copy=True) for name, values in own.items()}
        self.config, self.rounded = config, rounded or (lambda x, letter: x)

    def hidden(self, ids: Tensor) -> Tensor:
        """int64 `[T]` to the output of the last block, normalised, `[T, H]`."""
        x = self.w["backbone.embeddings.weight"][ids]
        for i, letter in enumerate(self.config["hybrid_override_pattern"]):
            x = self.block(f"backbone.layers.{i}", letter, x)
        return self.norm(x, "backbone.norm_f")

    def logits(self, hidden: Tensor) -> Tensor:
        """Normalised `[T, H]` to `[T, V]`."""
        return hidden @ self.w.get("lm_head.weight", self.w["backbone.embeddings.weight"]).T

    def draft(self, head: int, hidden: Tensor, ids: Tensor) -> Tensor:
        """What head `head` makes of `[T, H]` and of the tokens, int64 `[T]`, that it joins them with."""
        first, last = f"mtp.layers.{2 * head}", f"mtp.layers.{2 * head + 1}"
        embedded = self.norm(self.w["backbone.embeddings.weight"][ids], f"{first}.enorm")
        x = self.linear(torch.cat([embedded, self.norm(hidden, f"{first}.hnorm")], -1), f"{first}.eh_proj")
        return self.norm(self.block(last, "E", self.block(first, "*", x)), f"{last}.final_layernorm")

    def block(self, name: str, letter: str, x: Tensor) -> Tensor:
        """`x + mixer(norm(x))`."""
        return x + getattr(self, KINDS[letter])(f"{name}.mixer", self.norm(x, f"{name}.norm"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.rms(x) * self.w[f"{name}.weight"]

    def rms(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config["layer_norm_epsilon"]).sqrt()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def mamba(self, name: str, x: Tensor) -> Tensor:
        c, w = self.config, self.w
        heads, size, groups, n = c["mamba_num_heads"], c["mamba_head_dim"], c["n_groups"], c["ssm_state_size"]
        inner = heads * size
        z, xbc, dt = self.linear(x, f"{name}.in_proj").split([inner, inner + 2 * groups * n, heads], -1)
        width = c["conv_kernel"]
        seen = torch.cat([xbc.new_zeros(width - 1, xbc.shape[1]), xbc])
        kernel, bias = w[f"{name}.conv1d.weight"][:, 0], w.get(f"{name}.conv1d.bias", 0.0)
        xbc = torch.stack([(seen[t : t + width].T * kernel).sum(-1) for t in range(len(x))]) + bias
        xbc = xbc * xbc.sigmoid()
        low, high = (float(bound["__float__"] if isinstance(bound, dict) else bound) for bound in c["time_step_limit"])
        dt = F.softplus(dt + w[f"{name}.dt_bias"], threshold=100).clamp(low, high)
        decay = torch.exp(-dt * torch.exp(w[f"{name}.A_log"]))
        state, rows = x.new_zeros(heads, size, n), []
        for t in range(len(x)):
            inputs, b, out = xbc[t].split([inner, groups * n, groups * n])
            inputs = inputs.view(heads, size)
            b, out = (y.view(groups, n).repeat_interleave(heads // groups, 0) for y in (b, out))
            state = decay[t, :, None, None] * state + torch.einsum("h,hp,hn->hpn", dt[t], inputs, b)
            y = torch.einsum("hpn,hn->hp", state, out) + w[f"{name}.D"][:, None] * inputs
            gated = y.flatten() * z[t] * z[t].sigmoid()
            rows.append(self.rms(gated.view(groups, -1)).flatten() * w[f"{name}.norm.weight"])
        return self.linear(torch.stack(rows), f"{name}.out_proj")

    def attention(self, name: str, x: Tensor) -> Tensor:
        heads, kv, size = (self.config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        q = self.linear(x, f"{name}.q_proj").view(-1, heads, size)
        k, v = (self.rounded(self.linear(x, f"{name}.{c}_proj"), c).view(-1, kv, size) for c in "kv")
        k, v = (y.repeat_interleave(heads // kv, 1) for y in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(size)
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        shares = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.linear(torch.einsum("hts,shd->thd", shares, v).flatten(1), f"{name}.o_proj")

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(self.linear(x, f"{name}.up_proj").clamp(min=0) ** 2, f"{name}.down_proj")

    def moe(self, name: str, x: Tensor) -> Tensor:
        c, latent = self.config, f"{name}.fc1_latent_proj.weight" in self.w
        scores = self.linear(x, f"{name}.gate").sigmoid()
        small = self.linear(x, f"{name}.fc1_latent_proj") if latent else x
        rows = []
        for t in range(len(x)):
            choice = scores[t] + self.w[f"{name}.gate.e_score_correction_bias"]
            groups = choice.view(c["n_group"], -1)
            order = sorted(range(c["n_group"]), key=lambda g: -float(groups[g].topk(min(2, groups.shape[1])).values.sum()))
            allowed = [e for e in range(len(choice)) if e // groups.shape[1] in order[: c["topk_group"]]]
            chosen = sorted(allowed, key=lambda e: -float(choice[e]))[: c["num_experts_per_tok"]]
            total = sum(float(scores[t, e]) for e in chosen) if c["norm_topk_prob"] else 1.0
            shares = [float(scores[t, e]) / total * c["routed_scaling_factor"] for e in chosen]
            rows.append(sum(s * self.mlp(f"{name}.experts.{e}", small[t]) for e, s in zip(chosen, shares, strict=True)))
        routed = torch.stack(rows)  # type: ignore[arg-type]
        return (self.linear(routed, f"{name}.fc2_latent_proj") if latent else routed) + self.mlp(f"{name}.shared_experts", x)

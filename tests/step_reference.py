"""Step's networks written from their formulas: plain functions over dense weights, in float64, on whole sequences.

Nothing here calls `runtime`.  Weights are a dict of plain names (`model.layers.0.self_attn.q_proj.weight`); experts are stacks
by projection, `moe.experts.gate_proj.weight [E, I, H]`.  `a`: the `architecture` of the canonical config, as a dict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Facts = Mapping[str, Any]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x: Tensor, theta: float, rotary_dim: int, scaling: Mapping[str, Any] | None) -> Tensor:
    """Rotary positions 0, 1, ... of `[B, heads, T, D]`: element i turns with element i + rotary_dim / 2."""
    half = rotary_dim // 2
    y = x.clone()
    for i in range(half):
        frequency = theta ** (-2 * i / rotary_dim)
        if scaling is not None and scaling["rope_type"] == "llama3":
            length = scaling["original_max_position_embeddings"]
            turns = length * frequency / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = min(max((turns - low) / (high - low), 0), 1)
            frequency *= kept + (1 - kept) / scaling["factor"]
        angle = torch.arange(x.shape[2], dtype=x.dtype) * frequency
        u, v = x[..., i], x[..., i + half]
        y[..., i], y[..., i + half] = u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """`[B, Nq, T, D]`, `[B, Nkv, T, D]` twice; query head n reads KV head n // (Nq / Nkv)."""
    k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    hidden = (distance < 0) | (distance >= (window or math.inf))
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def heads(x: Tensor, head_dim: int) -> Tensor:
    return x.reshape(*x.shape[:2], -1, head_dim).transpose(1, 2)


def mlp(w: Weights, name: str, x: Tensor, limit: float | None = None) -> Tensor:
    return swiglu(x, *(w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")), limit)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, limit: float | None) -> Tensor:
    g, u = x @ gate.T, x @ up.T
    g, limit = g * torch.sigmoid(g), limit or math.inf
    return (g.minimum(torch.tensor(limit)) * u.maximum(torch.tensor(-limit)).minimum(torch.tensor(limit))) @ down.T


def routed(w: Weights, name: str, x: Tensor, a: Facts, scores: Tensor, bias: Tensor | None, limit: float | None) -> Tensor:
    """The experts with the largest scores plus bias, token by token."""
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            s = scores[b, t]
            chosen = (s if bias is None else s + bias).argsort(descending=True)[: a["num_experts_per_tok"]].tolist()
            total = sum(s[e] for e in chosen) if a["norm_expert_weight"] in (None, True) else 1
            for e in chosen:
                parts = (w[f"{name}.experts.{part}_proj.weight"][e] for part in ("gate", "up", "down"))
                y[b, t] += s[e] / total * swiglu(x[b, t], *parts, limit)
    return y


def step3p5_layer(w: Weights, a: Facts, index: int, kind: str, x: Tensor) -> Tensor:
    """Layer `index`, or a draft head's; `kind`: "full_attention.dense" and so on."""
    name, eps, sliding = f"model.layers.{index}", a["rms_norm_eps"], kind.startswith("sliding")
    here = {key.removeprefix(f"{name}.self_attn."): value for key, value in w.items() if key.startswith(f"{name}.self_attn.")}
    if a["rope_parameters"]:
        scaling = a["rope_parameters"][kind.partition(".")[0]]
        theta, factor = scaling["rope_theta"], scaling.get("partial_rotary_factor", 1.0)
    else:
        theta, factors = a["rope_theta"], a["partial_rotary_factors"]
        theta, factor = theta[index] if isinstance(theta, list) else theta, factors[index] if factors else 1.0
        scaling = a["rope_scaling"] if not a["yarn_only_types"] or kind.partition(".")[0] in a["yarn_only_types"] else None
    rope = theta, int(a["head_dim"] * factor), scaling
    h = rms(x, 1 + w[f"{name}.input_layernorm.weight"], eps)
    q, k, v = (heads(h @ here[f"{letter}_proj.weight"].T, a["head_dim"]) for letter in "qkv")
    q, k = rms(q, 1 + here["q_norm.weight"], eps), rms(k, 1 + here["k_norm.weight"], eps)
    y = attention(turn(q, *rope), turn(k, *rope), v, a["sliding_window"] if sliding else None)
    y = y * torch.sigmoid(h @ here["g_proj.weight"].T).transpose(1, 2)[..., None]
    x = x + y.transpose(1, 2).flatten(2) @ here["o_proj.weight"].T
    h = rms(x, 1 + w[f"{name}.post_attention_layernorm.weight"], eps)
    limits = ((a[key] or [])[index : index + 1] or [None] for key in ("swiglu_limits", "swiglu_limits_shared"))
    routed_limit, shared_limit = (limit[0] for limit in limits)
    if kind.endswith("dense"):
        return x + mlp(w, f"{name}.mlp", h, shared_limit)
    scores, bias = torch.sigmoid(h @ w[f"{name}.moe.gate.weight"].T), w.get(f"{name}.moe.router_bias")
    y = routed(w, f"{name}.moe", h, a, scores, bias, routed_limit) * a["router_scaling_factor"]
    return x + y + mlp(w, f"{name}.share_expert", h, shared_limit)


def output(w: Weights, a: Facts, x: Tensor, norm: Tensor) -> Tensor:
    head = w["lm_head.weight"] if "lm_head.weight" in w else w["model.embed_tokens.weight"]
    return rms(x, norm, a["rms_norm_eps"]) @ head.T


def step3p5(w: Weights, a: Facts, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits `[B, T, V]`, and those of each draft head: head j has `T - j - 1` columns."""
    x = w["model.embed_tokens.weight"][ids]
    for i, kind in enumerate(a["layer_kinds"]):
        x = step3p5_layer(w, a, i, kind, x)
    logits, drafts = output(w, a, x, 1 + w["model.norm.weight"]), []
    for j, kind in enumerate(a["mtp_layer_kinds"]):
        index, eps = len(a["layer_kinds"]) + j, a["rms_norm_eps"]
        name = f"model.layers.{index}"
        later = w["model.embed_tokens.weight"][ids[:, j + 1 :]]
        both = (later, 1 + w[f"{name}.enorm.weight"], eps), (x[:, :-1], 1 + w[f"{name}.hnorm.weight"], eps)
        x = torch.cat([rms(*one) for one in both], -1) @ w[f"{name}.eh_proj.weight"].T
        x = step3p5_layer(w, a, index, kind, x)
        drafts.append(rms(x, 1 + w[f"{name}.shared_head.norm.weight"], eps) @ w[f"{name}.shared_head.head.weight"].T)
    return logits, drafts


def step3(w: Weights, a: Facts, ids: Tensor) -> Tensor:
    """Logits `[B, T, V]`."""
    x, eps = w["model.embed_tokens.weight"][ids], a["rms_norm_eps"]
    rope = a["rope_theta"], a["head_dim"], a["rope_scaling"]
    for i, kind in enumerate(a["mlp_layer_types"]):
        name = f"model.layers.{i}"
        h = rms(x, w[f"{name}.input_layernorm.weight"], eps)
        q, k, v = (h @ w[f"{name}.self_attn.{letter}_proj.weight"].T for letter in "qkv")
        q = rms(q, w[f"{name}.self_attn.inter_norm.weight"], eps) @ w[f"{name}.self_attn.wq.weight"].T
        q, k, v = (heads(y, a["head_dim"]) for y in (q, k, v))
        y = attention(turn(q, *rope), turn(k, *rope), v, None)
        x = x + y.transpose(1, 2).flatten(2) @ w[f"{name}.self_attn.o_proj.weight"].T
        h = rms(x, w[f"{name}.post_attention_layernorm.weight"], eps)
        if kind == "dense":
            x = x + mlp(w, f"{name}.mlp", h)
        else:
            scores = (h @ w[f"{name}.moe.gate.weight"].T).softmax(-1)
            x = x + routed(w, f"{name}.moe", h, a, scores, None, None) + mlp(w, f"{name}.share_expert", h)
    return output(w, a, x, w["model.norm.weight"])

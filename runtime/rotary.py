"""Rotary positions.  B batch, T new tokens, D head size, r half of the elements of a head that turn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from runtime.architecture import refused
from runtime.kernels.table import ROTATE, module_for
from runtime.norms import RMSNorm
from runtime.state import Tokens


class Rope(nn.Module):
    """Cosines and sines of positions, computed in float32.  Holds nothing that is stored in a checkpoint.

    `scaling`: null, or an object with `rope_type` and the fields that transformers defines for it.
    """

    inv_freq: Tensor

    def __init__(self, theta: float, scaling: Mapping[str, Any] | None, rotary_dim: int, device: torch.device) -> None:
        super().__init__()
        inv_freq, self.amplitude = rope_frequencies(theta, scaling, rotary_dim)
        self.register_buffer("inv_freq", inv_freq.to(device), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of int64 `[B, T]`, each `[B, 1, T, r]` in `dtype`."""
        if (module := _kernels(positions, dtype)) is not None:
            found: tuple[Tensor, Tensor] = module.turns(positions, self.inv_freq, self.amplitude)
            return found
        angles = positions.unsqueeze(1).unsqueeze(-1) * self.inv_freq
        return (angles.cos() * self.amplitude).to(dtype), (angles.sin() * self.amplitude).to(dtype)


# Scaling kinds: the fields that each needs, and those that it may have.
_ROPE_FIELDS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
}
# With text alone the three axes of a multimodal rope hold the same positions, so how they interleave changes nothing.
_ROPE_IGNORED = frozenset({"rope_type", "mrope_section", "mrope_interleaved"})


def rope_frequencies(theta: float, scaling: Mapping[str, Any] | None, rotary_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 `[rotary_dim / 2]` on the CPU, and the factor that multiplies cosines and sines.

    Raises `FormatError` for a kind of scaling or a field of it that this runtime does not know.
    Source: transformers 5.23 `modeling_rope_utils.py`; YaRN (arXiv 2309.00071).
    """
    scaling = scaling or {"rope_type": "default"}
    kind = str(scaling.get("rope_type"))
    if kind not in _ROPE_FIELDS:
        raise refused("rope_scaling.rope_type", f"one of {', '.join(_ROPE_FIELDS)}", kind)
    needed, optional = _ROPE_FIELDS[kind]
    fields = {name: value for name, value in scaling.items() if name not in _ROPE_IGNORED and value is not None}
    if not needed <= fields.keys() <= needed | optional:
        raise refused("rope_scaling", f"the fields {', '.join(sorted(needed)) or 'none'} of {kind}", sorted(fields))
    for name, value in fields.items():
        wanted = isinstance(value, bool) if name == "truncate" else _is_sane(value)
        if not wanted:
            raise refused(f"rope_scaling.{name}", "true or false" if name == "truncate" else "a number above 0", value)
    if not (_is_sane(theta) and theta > 1):
        raise refused("rope_theta", "a number above 1", theta)

    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    inv_freq = 1.0 / (theta**exponents)
    if kind == "linear":
        return inv_freq / fields["factor"], 1.0
    if kind == "llama3":
        return _llama3(inv_freq, fields), 1.0
    if kind == "yarn":
        return _yarn(inv_freq, fields, theta, rotary_dim)
    return inv_freq, 1.0


def _is_sane(value: Any) -> bool:
    """Whether a number of a config is one that arithmetic with it can neither overflow nor divide by."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-9 <= value <= 1e12


def _llama3(inv_freq: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    low, high, factor = fields["low_freq_factor"], fields["high_freq_factor"], fields["factor"]
    turns = fields["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # within the trained context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * ((1 - blend) / factor + blend)


def _yarn(inv_freq: Tensor, fields: Mapping[str, Any], theta: float, rotary_dim: int) -> tuple[Tensor, float]:
    """Frequencies below `beta_slow` turns are stretched, above `beta_fast` kept, with a linear ramp between."""
    factor, context = fields["factor"], fields["original_max_position_embeddings"]

    def index_of(turns: float) -> float:
        return rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(fields.get("beta_fast") or 32), index_of(fields.get("beta_slow") or 1)
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)).clamp(0, 1)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = fields.get("attention_factor")
    if amplitude is None:
        mscale, mscale_all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
        amplitude = magnitude(mscale) / magnitude(mscale_all_dim) if mscale and mscale_all_dim else magnitude(1.0)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), float(amplitude)


def rotate(
    q: Tensor, k: Tensor, at: Tokens, q_norm: RMSNorm | None = None, k_norm: RMSNorm | None = None, kind: str = "default"
) -> tuple[Tensor, Tensor]:
    """Queries `[B, Nq, T, D]` and keys `[B, Nkv, T, D]` at their positions, after the norms of their heads where there are any,
    which are of one class and one `eps`.

    `kind`: of the layer, in `at.turns`.  Bfloat16 goes to a kernel where `kernels.table` has one for the device.
    """
    cos, sin = at.turns[kind]
    if (module := _kernels(q, q.dtype)) is not None:
        norms = None if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight)
        run = module.prepare(norms, 0.0 if q_norm is None else q_norm.eps, 0 if q_norm is None else q_norm.form)
        done: tuple[Tensor, Tensor] = run(q, k, cos, sin)
        return done
    q, k = (x if norm is None else norm(x) for x, norm in ((q, q_norm), (k, k_norm)))
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _kernels(x: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """What takes `x` in a network of `dtype`; None where torch does."""
    return module_for(ROTATE, "rotary", x.device) if dtype == torch.bfloat16 and x.numel() > 0 else None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first 2 r elements of each head, in halves: `[B, heads, T, D]` to the same."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """`[B, T, heads * D]` to `[B, heads, T, D]`."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)

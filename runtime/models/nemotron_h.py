"""Nemotron-H: blocks of Mamba2, attention, MLP and mixtures of experts in one list, each behind a norm.

Source: transformers 5.23 `NemotronHForCausalLM`; the draft heads: vLLM 0.33 `nemotron_h_mtp.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.architecture import Architecture, refused
from runtime.builder import LayerBuilder
from runtime.convolution import CausalConv1d
from runtime.experts import Experts
from runtime.kernels.ssd import Sizes, ssd
from runtime.kernels.table import MAMBA_SCAN, MAMBA_STEP
from runtime.layers import Linear, stored
from runtime.models.base import CausalLM, Draft, Trunk
from runtime.nonlinear import Feeding, relu2
from runtime.norms import Delta, GroupedRMSNorm, LateRoundingRMSNorm, Parts
from runtime.recurrent import RecurrentMixer
from runtime.rotary import split_heads
from runtime.routing import Router, Rule
from runtime.state import Cache, CacheSize, KVCache, RecurrentCache, Tokens


@dataclass(frozen=True)
class NemotronHArchitecture(Architecture):
    """The facts of a Nemotron-H network.

    `intermediate_size`: of every MLP block, or one number for each.  `time_step_limit`: bounds of a Mamba time step.
    """

    may_be_zero = frozenset(
        {"num_experts_per_tok", "moe_intermediate_size", "shared_intermediate_size", "num_nextn_predict_layers"}
    )

    layer_types: tuple[str, ...]
    attention_bias: bool
    intermediate_size: int | tuple[int, ...] | None
    mlp_bias: bool
    mlp_hidden_act: str
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    use_conv_bias: bool
    mamba_bias: bool
    time_step_limit: tuple[float | None, ...]
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int
    shared_intermediate_size: int
    moe_latent_size: int | None
    routed_scaling_factor: float
    norm_topk_prob: bool
    n_group: int
    topk_group: int
    mtp_layer_types: tuple[str, ...]
    num_nextn_predict_layers: int

    def check(self) -> None:
        """Raise `FormatError` for values that no Nemotron-H has."""
        super().check()
        if len(self.layer_types) != self.num_hidden_layers or not {*self.layer_types} <= MIXERS.keys():
            raise refused("layer_types", f"{self.num_hidden_layers} entries of {', '.join(MIXERS)}", list(self.layer_types))
        if self.mlp_hidden_act != "relu2":
            raise refused("mlp_hidden_act", "'relu2'", self.mlp_hidden_act)
        if self.n_groups < 1 or self.mamba_num_heads < 1 or self.mamba_num_heads % self.n_groups:
            raise refused("mamba_num_heads", f"a multiple of {self.n_groups} groups", self.mamba_num_heads)
        if self.conv_kernel < 1:
            raise refused("conv_kernel", "a number above 0", self.conv_kernel)
        if len(self.time_step_limit) != 2:
            raise refused("time_step_limit", "a lower and an upper bound", list(self.time_step_limit))
        mlps = self.layer_types.count("mlp")
        sizes = len(self.intermediate_size) if isinstance(self.intermediate_size, tuple) else mlps
        if sizes != mlps or (mlps and self.intermediate_size is None):
            raise refused("intermediate_size", f"a number, or one for each of {mlps} MLP blocks", self.intermediate_size)
        if not {"moe", "latent_moe"}.isdisjoint(self.layer_types):
            self._check_experts()

    def _check_experts(self) -> None:
        if self.n_group < 1 or self.n_routed_experts < 1 or self.n_routed_experts % self.n_group:
            raise refused("n_routed_experts", f"a multiple of {self.n_group} groups", self.n_routed_experts)
        if not 1 <= self.topk_group <= self.n_group:
            raise refused("topk_group", f"1 to {self.n_group} groups", self.topk_group)
        most = self.topk_group * self.n_routed_experts // self.n_group
        if not 1 <= self.num_experts_per_tok <= most:
            raise refused("num_experts_per_tok", f"1 to {most}, the experts of the kept groups", self.num_experts_per_tok)
        if "latent_moe" in self.layer_types and self.moe_latent_size is None:
            raise refused("moe_latent_size", "a number for blocks of type latent_moe", None)

    def mlp_size(self, index: int) -> int:
        """Inner size of the MLP block that is layer `index`."""
        if isinstance(self.intermediate_size, tuple):
            return self.intermediate_size[self.layer_types[:index].count("mlp")]
        return self.intermediate_size or 0


class Mixer(Protocol):
    """What a block is about.  `first`: what takes the input as it is."""

    first: tuple[nn.Module | None, ...]  # a tuple, so that it is no child of this name

    def __call__(self, x: Tensor, at: Tokens, cache: Any) -> Delta:
        """`[B, T, H]` to `[B, T, H]`, perhaps in parts; `cache` is updated in place."""

    def new_cache(self, size: CacheSize) -> Cache | None:
        """An empty cache, or None for a mixer that remembers nothing."""


class Mamba2(RecurrentMixer):
    """A state space with one decay per head and token: a short convolution, the recurrence, a gated norm."""

    step_operation, scan_operation = MAMBA_STEP, MAMBA_SCAN
    recurrence = staticmethod(ssd)

    def __init__(self, a: NemotronHArchitecture, build: LayerBuilder, name: str) -> None:
        super().__init__()
        self.heads, self.head_dim, self.state_size = a.mamba_num_heads, a.mamba_head_dim, a.ssm_state_size
        self.inner, self.groups = self.heads * self.head_dim, a.n_groups * a.ssm_state_size
        parts = {"in_proj": (self.inner, self.inner, self.groups, self.groups, self.heads)}
        self.z_xbc_dt = build.projections(self, f"{name}.in_proj", parts, a.hidden_size, a.mamba_bias)
        self.first = (self.z_xbc_dt.only,)
        self.conv1d = CausalConv1d(self.inner + 2 * self.groups, a.conv_kernel, a.use_conv_bias)
        self.A_log = stored(self.heads)
        self.D = stored(self.heads)
        self.dt_bias = stored(self.heads)
        low, high = a.time_step_limit
        self.shortest, self.longest = low or 0.0, math.inf if high is None else high
        self.norm = GroupedRMSNorm(self.inner, a.rms_norm_eps, a.n_groups)
        self.out_proj = build.linear(f"{name}.out_proj", a.hidden_size, self.inner, a.mamba_bias)
        self.sizes = Sizes(
            self.heads, self.head_dim, a.n_groups, self.state_size,
            a.conv_kernel, a.rms_norm_eps, self.shortest, self.longest,
        )  # fmt: skip

    def forward(self, x: Tensor, at: Tokens, cache: RecurrentCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        parts = self.z_xbc_dt(x)[0].split([self.inner, self.inner + 2 * self.groups, self.heads], -1)
        return self.out_proj(self.recur(*parts, at=at, cache=cache))

    def mix(self, z: Tensor, xbc: Tensor, dt: Tensor, *, at: Tokens, cache: RecurrentCache) -> Tensor:
        """`[B, T, inner]`, `[B, T, channels]` and `[B, T, heads]` to `[B, T, inner]`."""
        xbc = F.silu(self.conv1d(xbc, at, cache)).float()
        x, b, c = xbc.split([self.inner, self.groups, self.groups], -1)
        x, b, c = split_heads(x, self.head_dim), split_heads(b, self.state_size), split_heads(c, self.state_size)
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(self.shortest, self.longest)
        dt = at.silence(dt).transpose(1, 2).unsqueeze(-1)  # (B, heads, T, 1); no time passes where no token is
        decay = dt.squeeze(-1) * -self.A_log.float().exp().unsqueeze(-1)
        y = cache.scan(self.over_time(z.dtype), (x * dt, b, c, decay), at) + x * self.D.float().view(-1, 1, 1)
        return self.norm(y.transpose(1, 2).flatten(2), z)

    def new_cache(self, size: CacheSize) -> RecurrentCache:
        """An empty cache; its size does not depend on how long the sequence is."""
        channels, _, width = self.conv1d.weight.shape
        return RecurrentCache(size, channels, width, (self.heads, self.head_dim, self.state_size))


class Attention(nn.Module):
    """Grouped-query attention without positions: the Mamba blocks know the order."""

    def __init__(self, a: NemotronHArchitecture, build: LayerBuilder, name: str) -> None:
        super().__init__()
        self.head_dim = a.head_dim
        q_rows, kv_rows = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        parts = {"q_proj": (q_rows,), "k_proj": (kv_rows,), "v_proj": (kv_rows,)}
        self.qkv = build.projections(self, f"{name}.qkv_proj", parts, a.hidden_size, a.attention_bias)
        self.first = (self.qkv.only,)
        self.o_proj = build.linear(f"{name}.o_proj", a.hidden_size, q_rows, a.attention_bias)
        self.kv = build.kv_cache(self, name, a.num_key_value_heads, a.head_dim)

    def forward(self, x: Tensor, at: Tokens, cache: KVCache) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        q, k, v = (split_heads(y, self.head_dim) for y in self.qkv(x))
        return self.o_proj(cache.attend(q, k, v, at).transpose(1, 2).flatten(2))

    def new_cache(self, size: CacheSize) -> KVCache:
        """An empty cache."""
        return self.kv.new_cache(size)


class PerToken(nn.Module):
    """A mixer that sees each token alone, and remembers nothing."""

    first: tuple[nn.Module | None, ...] = (None,)

    def new_cache(self, size: CacheSize) -> None:
        """None."""


class MLP(PerToken):
    """`down(relu(up(x)) ** 2)`."""

    def __init__(self, build: LayerBuilder, name: str, hidden: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = build.linear(f"{name}.up_proj", inner, hidden, bias)
        self.first = (self.up_proj,)
        self.down_proj = build.linear(f"{name}.down_proj", hidden, inner, bias)
        self.activation = Feeding(relu2, self.down_proj)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """`[..., H]` to `[..., H]`."""
        return self.down_proj(self.activation(self.up_proj(x)))


class MoE(PerToken):
    """Routed experts, and an MLP that every token goes through."""

    def __init__(self, a: NemotronHArchitecture, build: LayerBuilder, name: str, width: int | None = None) -> None:
        """`width`: of what the experts see; None: all of the token."""
        super().__init__()
        hidden, experts = a.hidden_size, a.n_routed_experts
        self.gate = build.linear(f"{name}.gate", experts, hidden)
        self.gate.register_parameter("e_score_correction_bias", stored(experts, dtype="F32"))
        rule = Rule(
            a.num_experts_per_tok, "sigmoid", a.norm_topk_prob, 1e-20, a.routed_scaling_factor, a.n_group, a.topk_group
        )
        self.route = Router(rule, self.gate, lambda: self.gate.get_parameter("e_score_correction_bias"))
        inner, shared = a.moe_intermediate_size, a.shared_intermediate_size * max(1, a.n_shared_experts)
        self.experts = Experts(build, f"{name}.experts", experts, inner, width or hidden, relu2, gated=False)
        self.shared_experts = MLP(build, f"{name}.shared_experts", hidden, shared)
        self.first = (*self.shared_experts.first, None if width else self.experts)

    def forward(self, x: Tensor, *_: object) -> Parts:
        """`[B, T, H]` to parts of `[B, T, H]`."""
        tokens = x.flatten(0, 1)
        return Parts(self.routed(tokens, *self.route(tokens)).view_as(x), self.shared_experts(x))

    def routed(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What the experts make of `[T, H]`."""
        return self.experts(tokens, chosen, weights)


class LatentMoE(MoE):
    """Experts that work in a smaller space; the router and the shared MLP see the whole token."""

    def __init__(self, a: NemotronHArchitecture, build: LayerBuilder, name: str) -> None:
        width = a.moe_latent_size or 0
        super().__init__(a, build, name, width)
        self.fc1_latent_proj = build.linear(f"{name}.fc1_latent_proj", width, a.hidden_size)
        self.fc2_latent_proj = build.linear(f"{name}.fc2_latent_proj", a.hidden_size, width)

    def routed(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What the experts make of `[T, H]`."""
        return self.fc2_latent_proj(self.experts(self.fc1_latent_proj(tokens), chosen, weights))


# Kind of block -> its mixer, for architecture, builder, name of the mixer and index of the layer.
MIXERS: Mapping[str, Callable[[NemotronHArchitecture, LayerBuilder, str, int], Any]] = {
    "mamba": lambda a, build, name, index: Mamba2(a, build, name),
    "attention": lambda a, build, name, index: Attention(a, build, name),
    "mlp": lambda a, build, name, index: MLP(build, name, a.hidden_size, a.mlp_size(index), a.mlp_bias),
    "moe": lambda a, build, name, index: MoE(a, build, name),
    "latent_moe": lambda a, build, name, index: LatentMoE(a, build, name),
}


class Block(nn.Module):
    """A mixer behind a norm and around a residual.  `name`: of the block; `index`: of the layer."""

    def __init__(self, a: NemotronHArchitecture, build: LayerBuilder, name: str, kind: str, index: int) -> None:
        super().__init__()
        self.norm = LateRoundingRMSNorm(a.hidden_size, a.rms_norm_eps)
        self.mixer: Mixer = MIXERS[kind](a, build, f"{name}.mixer", index)
        self.norm.feeds(*self.mixer.first)

    def forward(self, x: Tensor, delta: Delta | None, at: Tokens, cache: Cache | None) -> tuple[Tensor, Delta]:
        """See `DecoderLayer`."""
        x, y = self.norm.after_sum(x, delta)
        return x, self.mixer(y, at, cache)

    def new_cache(self, size: CacheSize) -> Cache | None:
        """An empty cache, or None for a block that remembers nothing."""
        return self.mixer.new_cache(size)


class DraftBlock(Block):
    """A block of a draft head.  The first of a head joins its inputs, the last ends with a norm."""

    def __init__(self, a: NemotronHArchitecture, build: LayerBuilder, index: int) -> None:
        name, kind = f"mtp.layers.{index}", a.mtp_layer_types[index]
        super().__init__(a, build, name, kind.removeprefix("start_").removesuffix("_end"), 0)
        if kind.startswith("start_"):
            self.enorm = LateRoundingRMSNorm(a.hidden_size, a.rms_norm_eps)
            self.hnorm = LateRoundingRMSNorm(a.hidden_size, a.rms_norm_eps)
            self.eh_proj = build.linear(f"{name}.eh_proj", a.hidden_size, 2 * a.hidden_size)
        if kind.endswith("_end"):
            self.final_layernorm = LateRoundingRMSNorm(a.hidden_size, a.rms_norm_eps)

    def join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """`[B, T, H]` twice to what the first block takes."""
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))


@dataclass(frozen=True)
class DraftHead:
    """A draft head: some blocks in a row, of which one has attention.  Holds no parameters of its own."""

    blocks: Sequence[DraftBlock]

    def __call__(self, hidden: Tensor, embedded: Tensor, at: Tokens, cache: Cache | None) -> Tensor:
        """`[B, T, H]` twice to `[B, T, H]`."""
        x, delta = self.blocks[0].join(hidden, embedded), None
        for block in self.blocks:
            x, delta = block(x, delta, at, cache)  # only the one with attention looks at the cache
        normalized: Tensor = self.blocks[-1].final_layernorm.after_sum(x, delta)[1]
        return normalized

    def logits(self, hidden: Tensor, head: Linear) -> Tensor:
        """By the trunk's head."""
        return head(hidden).float()

    def new_cache(self, size: CacheSize) -> Cache | None:
        """An empty cache."""
        return next(cache for block in self.blocks if (cache := block.new_cache(size)) is not None)


class MTP(nn.Module):
    """The blocks of all draft heads in one list, as they are stored."""

    def __init__(self, a: NemotronHArchitecture, build: LayerBuilder) -> None:
        super().__init__()
        blocks = [DraftBlock(a, build, i) for i in range(len(a.mtp_layer_types))]
        self.layers = nn.ModuleList(blocks)
        size = len(blocks) // a.num_nextn_predict_layers
        self.heads = tuple(DraftHead(blocks[i : i + size]) for i in range(0, len(blocks), size))


class NemotronH(CausalLM):
    """Nemotron-H, Nemotron 3 and the text networks of their vision-language models."""

    architecture_type = NemotronHArchitecture

    def build_trunk(self, architecture: NemotronHArchitecture, build: LayerBuilder) -> Trunk:
        """All blocks."""
        a = architecture
        blocks = [Block(a, build, f"model.layers.{i}", kind, i) for i, kind in enumerate(a.layer_types)]
        return Trunk(a, build, blocks, ("norm_f", LateRoundingRMSNorm(a.hidden_size, a.rms_norm_eps)), {})

    def build_drafts(self, architecture: NemotronHArchitecture, build: LayerBuilder) -> tuple[Draft, ...]:
        """As many as the checkpoint has; all are built alike."""
        a = architecture
        if "mtp" not in build.config.carried or a.num_nextn_predict_layers == 0:
            return ()
        heads, kinds = a.num_nextn_predict_layers, [k.removeprefix("start_").removesuffix("_end") for k in a.mtp_layer_types]
        if kinds.count("attention") != heads or not {*kinds} <= {"attention", "moe", "latent_moe"}:
            raise refused("mtp_layer_types", "one block of attention for each head, and experts", list(a.mtp_layer_types))
        self.mtp = MTP(a, build)
        return self.mtp.heads

"""Builds the layers of a network from the config, so that model code never asks how a module is stored.

A model states the network: names, shapes, which projections share an input.  The builder answers with the layer that
the config's entry calls for, refuses an entry that does not fit the network, and notices entries that nothing used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from runtime.experts import ExpertLinears, ExpertProjections
from runtime.format import CONFIG_FILE, MX_GROUP, NVFP4_GROUP, CanonicalConfig, FormatError, ModuleSpec
from runtime.layers import SCHEME_LAYERS, Linear, stored
from runtime.state import KVFormat

_GROUPS = {"nvfp4": NVFP4_GROUP, "mxfp8": MX_GROUP, "mxfp4": MX_GROUP}


@dataclass(frozen=True)
class Projections:
    """Several projections of one input: a fused module, or one module per projection.

    `layers` are children of the module that owns them, so this holds no parameters.  `sizes`: rows of each output.
    """

    layers: tuple[Linear, ...]
    sizes: tuple[int, ...]

    @property
    def only(self) -> Linear | None:
        """The one layer that takes the input; None if there are several."""
        return self.layers[0] if len(self.layers) == 1 else None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[..., K]` to one `[..., size]` per projection, in their order."""
        if len(self.layers) == 1:
            return self.layers[0](x).split(self.sizes, -1)
        return tuple(layer(x) for layer in self.layers)


@dataclass
class LayerBuilder:
    """Makes layers for canonical module names.

    `device` and `dtype` are those of the arithmetic; layers have no memory until the loader gives them their tensors.
    `quantize_activations`: whether inputs and the KV cache are quantised as the config says.
    """

    config: CanonicalConfig
    device: torch.device
    dtype: torch.dtype
    quantize_activations: bool = True
    _used: set[str] = field(default_factory=set)

    def linear(self, name: str, rows: int, columns: int, bias: bool = False) -> Linear:
        """The layer of a module with one partition.  Raises `FormatError` when the config's entry does not fit."""
        return self._linear(name, [(rows,)], columns, bias)

    def projections(
        self, owner: nn.Module, name: str, parts: Mapping[str, tuple[int, ...]], columns: int, bias: bool = False
    ) -> Projections:
        """Register the fused module `name`, or the modules that stand in its place, as children of `owner`.

        `name`: canonical name of the fused module.  `parts`: each projection with the rows of its partitions; most have
        one; a quantised entry may also count each projection as a single partition.  `columns`: K.  Raises
        `FormatError` when the config's entries do not fit.
        """
        layers = tuple(self._linear(at, allowed, columns, bias) for at, allowed in self._fused(name, parts))
        return Projections(_register(owner, self._children(name, parts), layers), _sizes(parts))

    def expert_linears(self, name: str, rows: int, columns: int, count: int) -> ExpertLinears:
        """`linear` for a stack of `count` experts."""
        return self._experts(name, [(rows,)], columns, count)

    def expert_projections(
        self, owner: nn.Module, name: str, parts: Mapping[str, tuple[int, ...]], columns: int, count: int
    ) -> ExpertProjections:
        """`projections` for stacks of `count` experts."""
        stacks = tuple(self._experts(at, allowed, columns, count) for at, allowed in self._fused(name, parts))
        return ExpertProjections(_register(owner, self._children(name, parts), stacks), _sizes(parts))

    def kv_cache(self, owner: nn.Module, name: str, heads: int, head_dim: int, window: int | None = None) -> KVFormat:
        """How the attention module `owner`, called `name`, keeps its `heads` keys and values.

        Registers `k_scale` and `v_scale` on it where the config says that it has them.
        """
        kind = self.config.kv_cache.get(name)
        if kind is None:
            return KVFormat(heads, head_dim, window)
        self._used.add(name)
        if kind not in ("tensor", "head"):
            raise FormatError(
                f"{CONFIG_FILE}: quantization.kv_cache.{name}: expected tensor or head, found {kind!r}; convert again"
            )
        for role in ("k_scale", "v_scale"):
            owner.register_parameter(role, stored(heads if kind == "head" else 1, dtype="F32"))
        return KVFormat(heads, head_dim, window, owner if self.quantize_activations else None)

    def check_all_used(self) -> None:
        """Raise `FormatError` when the config describes a module that the network does not have."""
        for section, names in (
            ("quantization.modules", self.config.modules),
            ("quantization.kv_cache", self.config.kv_cache),
            ("unfused", self.config.unfused),
        ):
            for name in names:
                if name not in self._used and not self.config.is_carried(name):
                    raise FormatError(
                        f"{CONFIG_FILE}: {section}.{name}: expected a module of family {self.config.family!r}, "
                        "found a name that its network does not have; convert again"
                    )

    def _children(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What stands in the place of the fused module `name`: itself, or one child per projection."""
        if name not in self.config.unfused:
            return [name.rpartition(".")[2]]
        if self.config.unfused[name] != tuple(parts):
            raise FormatError(
                f"{CONFIG_FILE}: unfused.{name}: expected {', '.join(parts)}, "
                f"found {', '.join(self.config.unfused[name])}; convert again"
            )
        return list(parts)

    def _fused(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> list[tuple[str, list[tuple[int, ...]]]]:
        """Canonical name of each child, and the row counts of partitions that its entry may have."""
        self._used.add(name)
        children = self._children(name, parts)
        if name not in self.config.unfused:
            return [(name, [tuple(rows for part in parts.values() for rows in part), _sizes(parts)])]
        prefix = name.rpartition(".")[0]
        return [(f"{prefix}.{child}", [parts[child], (sum(parts[child]),)]) for child in children]

    def _linear(self, name: str, allowed: list[tuple[int, ...]], columns: int, bias: bool) -> Linear:
        """`allowed`: the row counts of partitions that a quantised entry may have; their sums are equal."""
        spec = self._spec(name, allowed, columns, None)
        if spec is None:
            return Linear(sum(allowed[0]), columns, bias)
        return SCHEME_LAYERS[spec.scheme](spec, bias, self.quantize_activations)

    def _experts(self, name: str, allowed: list[tuple[int, ...]], columns: int, count: int) -> ExpertLinears:
        spec = self._spec(name, allowed, columns, count)
        if spec is None:
            return ExpertLinears(count, lambda: Linear(sum(allowed[0]), columns))
        one, quantize = replace(spec, experts=None), self.quantize_activations
        return ExpertLinears(count, lambda: SCHEME_LAYERS[one.scheme](one, False, quantize))

    def _spec(self, name: str, allowed: list[tuple[int, ...]], columns: int, experts: int | None) -> ModuleSpec | None:
        """The config's entry for a module, None when it is not quantised; refused when it does not fit."""
        self._used.add(name)
        spec = self.config.modules.get(name)
        if spec is None:
            return None
        if spec.experts != experts:
            raise FormatError(
                f"{CONFIG_FILE}: quantization.modules.{name}: expected {experts or 'no'} experts, "
                f"found {spec.experts or 'none'}; convert again"
            )
        self._check(name, spec, (sum(allowed[0]), columns), allowed)
        return spec

    def _check(self, name: str, spec: ModuleSpec, shape: tuple[int, int], partitions: list[tuple[int, ...]]) -> None:
        where = f"{CONFIG_FILE}: quantization.modules.{name}"
        if spec.shape != shape:
            raise FormatError(f"{where}: expected shape {list(shape)}, found {list(spec.shape)}; convert again")
        found = tuple(rows for _, rows in spec.partitions)
        if found not in partitions:
            raise FormatError(f"{where}: expected partitions of {list(partitions[0])} rows, found {list(found)}; convert again")
        group = _GROUPS.get(spec.scheme, 1)
        if shape[1] % group:
            raise FormatError(
                f"{where}: expected a multiple of {group} inputs for {spec.scheme}, found {shape[1]}; "
                "this module cannot be quantised so: convert again"
            )


def _sizes(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Rows of each projection."""
    return tuple(sum(rows) for rows in parts.values())


M = TypeVar("M", bound=nn.Module)


def _register(owner: nn.Module, names: list[str], children: tuple[M, ...]) -> tuple[M, ...]:
    for name, child in zip(names, children, strict=True):
        owner.add_module(name, child)
    return children

"""Builds the layers of a network from the config, so that model code never asks how a module is stored.

A model states the network: names, shapes, which projections share an input.  The builder answers with the layer that
the config's entry calls for, refuses an entry that does not fit the network, and notices entries that nothing used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from runtime.activations import fp8
from runtime.format import CONFIG_FILE, MX_GROUP, NVFP4_GROUP, CanonicalConfig, FormatError, ModuleSpec
from runtime.layers import SCHEME_LAYERS, Linear, stored

_GROUPS = {"nvfp4": NVFP4_GROUP, "mxfp8": MX_GROUP, "mxfp4": MX_GROUP}


@dataclass(frozen=True)
class Projections:
    """Several projections of one input: a fused module, or one module per projection.

    `layers` are children of the module that owns them, so this holds no parameters.  `sizes`: rows of each output.
    """

    layers: tuple[Linear, ...]
    sizes: tuple[int, ...]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[..., K]` to one `[..., size]` per projection, in their order."""
        if len(self.layers) == 1:
            return self.layers[0](x).split(self.sizes, -1)
        return tuple(layer(x) for layer in self.layers)


@dataclass(frozen=True)
class KVQuantizer:
    """Rounds keys and values to what an E4M3 cache with stored scales holds; does nothing when `owner` is None.

    Source: nvidia-modelopt 0.47 quantises K after the rotary embedding and V as they enter attention.
    """

    owner: nn.Module | None

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`k`, `v`: `[B, Nkv, T, D]`, returned in the same dtype."""
        if self.owner is None:
            return k, v
        k_scale, v_scale = (self.owner.get_parameter(name).view(-1, 1, 1) for name in ("k_scale", "v_scale"))
        return fp8(k.float(), k_scale).to(k.dtype), fp8(v.float(), v_scale).to(v.dtype)


@dataclass
class LayerBuilder:
    """Makes layers for canonical module names.

    `device` and `dtype` are those of the arithmetic; layers themselves are made on torch's default device (`meta` in
    the loader).  `quantize_activations`: whether inputs and the KV cache are quantised as the config says.
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
        prefix, _, fused = name.rpartition(".")
        sizes = tuple(sum(rows) for rows in parts.values())
        self._used.add(name)
        if name not in self.config.unfused:
            partitions = tuple(rows for part in parts.values() for rows in part)
            layer = self._linear(name, [partitions, sizes], columns, bias)
            owner.add_module(fused, layer)
            return Projections((layer,), sizes)
        if self.config.unfused[name] != tuple(parts):
            raise FormatError(
                f"{CONFIG_FILE}: unfused.{name}: expected {', '.join(parts)}, "
                f"found {', '.join(self.config.unfused[name])}; convert again"
            )
        layers = []
        for part, rows in parts.items():
            layer = self._linear(f"{prefix}.{part}", [rows, (sum(rows),)], columns, bias)
            owner.add_module(part, layer)
            layers.append(layer)
        return Projections(tuple(layers), sizes)

    def kv_cache(self, owner: nn.Module, name: str, heads: int) -> KVQuantizer:
        """Register `k_scale` and `v_scale` on the attention module `owner` where the config says that it has them."""
        kind = self.config.kv_cache.get(name)
        if kind is None:
            return KVQuantizer(None)
        self._used.add(name)
        if kind not in ("tensor", "head"):
            raise FormatError(
                f"{CONFIG_FILE}: quantization.kv_cache.{name}: expected tensor or head, found {kind!r}; convert again"
            )
        for role in ("k_scale", "v_scale"):
            owner.register_parameter(role, stored(heads if kind == "head" else 1, dtype="F32"))
        return KVQuantizer(owner if self.quantize_activations else None)

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

    def _linear(self, name: str, partitions: Iterable[tuple[int, ...]], columns: int, bias: bool) -> Linear:
        """`partitions`: the row counts that a quantised entry may have; their sums are equal."""
        self._used.add(name)
        allowed = list(partitions)
        rows = sum(allowed[0])
        spec = self.config.modules.get(name)
        if spec is None:
            return Linear(rows, columns, bias)
        self._check(name, spec, (rows, columns), allowed)
        return SCHEME_LAYERS[spec.scheme](spec, bias, self.quantize_activations)

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

"""Reads the `architecture` object of a canonical config into a family's dataclass, strictly."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from runtime.format import CONFIG_FILE, MAX_EXPERTS, MAX_SIZE, FormatError

A = TypeVar("A", bound="Architecture")


@dataclass(frozen=True)
class Architecture:
    """The fields that every family has; docs/format.md lists them.

    `may_be_zero` of a subclass: counts and sizes of what a network of the family may lack.
    """

    may_be_zero: ClassVar[frozenset[str]] = frozenset()

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int | None
    head: str
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None

    def check(self) -> None:
        """Raise `FormatError` for values that no network of this runtime has."""
        for name in (f.name for f in dataclasses.fields(self)):
            value = getattr(self, name)
            counts = name.startswith(("num_", "linear_")) or name.endswith(("_size", "_dim", "_embeddings"))
            if counts and isinstance(value, int) and value < (0 if name in self.may_be_zero else 1):
                raise refused(name, "a number above 0", value)
            if counts and isinstance(value, int) and value > MAX_SIZE:
                raise refused(name, f"at most {MAX_SIZE}", value)
            if "experts" in name and isinstance(value, int) and value > MAX_EXPERTS:
                raise refused(name, f"at most {MAX_EXPERTS} experts", value)
        if self.num_attention_heads % self.num_key_value_heads:
            raise refused("num_attention_heads", f"a multiple of {self.num_key_value_heads} KV heads", self.num_attention_heads)
        if self.head == "absent":
            raise FormatError(
                f"{CONFIG_FILE}: architecture.head: expected 'separate' or 'tied', found 'absent'; the source is a bare "
                "trunk without an output head: convert the complete model"
            )
        if self.head not in ("separate", "tied"):
            raise refused("head", "'separate' or 'tied'", self.head)


@dataclass(frozen=True)
class RotaryArchitecture(Architecture):
    """The fields of decoders with rotary positions and gated MLPs.

    `layer_kinds` of a subclass: what `layer_types` may hold.
    """

    layer_kinds: ClassVar[tuple[str, ...]] = ("full_attention",)

    layer_types: tuple[str, ...]
    attention_bias: bool
    hidden_act: str
    rope_theta: float
    rope_scaling: dict[str, Any] | None

    def check(self) -> None:
        """Raise `FormatError` for values that no network of this runtime has."""
        super().check()
        if len(self.layer_types) != self.num_hidden_layers:
            raise refused("layer_types", f"{self.num_hidden_layers} entries", len(self.layer_types))
        for kind in self.layer_types:
            if kind not in self.layer_kinds:
                raise refused("layer_types", " or ".join(self.layer_kinds), kind)
        if self.hidden_act != "silu":
            raise refused("hidden_act", "'silu'", self.hidden_act)


def refused(field: str, expected: str, found: object) -> FormatError:
    """The error of one field of `architecture`."""
    return FormatError(
        f"{CONFIG_FILE}: architecture.{field}: expected {expected}, found {found!r}; "
        "convert again, or use a runtime that has this"
    )


def read_architecture(cls: type[A], data: Any) -> A:
    """Read the `architecture` object into `cls`.

    Raises `FormatError`, one line, when a field is missing, unknown, of another type, or not supported.
    """
    if not isinstance(data, Mapping):
        raise FormatError(f"{CONFIG_FILE}: architecture: expected an object, found {type(data).__name__}; convert again")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    missing, unknown = [n for n in names if n not in data], [n for n in data if n not in names]
    if missing or unknown:
        raise FormatError(
            f"{CONFIG_FILE}: architecture: expected exactly the fields of {cls.__name__}, found "
            f"{', '.join(missing) or 'none'} missing and {', '.join(unknown) or 'none'} unknown; "
            "convert again with the version of qconvert that belongs to this runtime"
        )
    values = {name: _typed(name, data[name], hints[name]) for name in names}
    architecture = cls(**values)
    architecture.check()
    return architecture


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it (lists become tuples, integers may be floats), or a `FormatError`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is tuple and isinstance(value, list):
            element = typing.get_args(option)[0]
            return tuple(_typed(name, item, element) for item in value)
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, origin) and (origin is bool or not isinstance(value, bool)):
            return value
    raise refused(name, str(getattr(hint, "__name__", hint)), value)

"""Producers of quantised checkpoints: one file each, tables and a config reader, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.format import DENSE_DTYPES

from ..errors import ConvertError, Problem
from ..names import NameSpace
from . import compressed_tensors, hf_fp8, modelopt, refused
from .base import DENSE, Dialect, Encoding, Rules, Stored

DIALECTS: tuple[Dialect, ...] = (modelopt.DIALECT, compressed_tensors.DIALECT, hf_fp8.DIALECT)
DENSE_ENCODING = Encoding(
    DENSE, (Stored("weight", "weight", DENSE_DTYPES, (("N", "K"),), "copy"),), "any framework"
)


def _detect(block: Mapping[str, Any], where: str) -> Dialect:
    """The dialect of a quantisation config.  Raises `ConvertError` naming a method that is not converted."""
    producer = block.get("producer")
    method = block.get("quant_method")
    if method is None:
        if isinstance(block.get("quantization"), Mapping) or (
            isinstance(producer, Mapping) and producer.get("name") == "modelopt"
        ):
            return modelopt.DIALECT  # exports before quant_method was written
        if block.get("load_in_4bit") or block.get("load_in_8bit"):
            method = "bitsandbytes"
        elif "config_groups" in block:
            return compressed_tensors.DIALECT
        elif "quant_algo" in block:
            return modelopt.DIALECT
    name = str(method).lower()
    for dialect in DIALECTS:
        if name in dialect.quant_methods:
            return dialect
    supported = ", ".join(d.name for d in DIALECTS)
    remedy = refused.QUANT_METHODS.get(name, refused.REQUANTIZE)
    raise ConvertError(Problem(where, "quant_method", f"one of {supported}", f"{method}", remedy))


def _nested_modelopt(block: Any) -> Any:
    """An old ModelOpt export nests its config under `quantization`; other tools use that key for formats of their own."""
    if isinstance(block, Mapping) and "quant_algo" not in block and "quantized_layers" not in block:
        return {"quant_method": "mlx" if "bits" in block else str(block.get("quant_method", "unknown"))}
    return {"quantization": block} if block else None


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """A quantisation config that was found: whose it is, its content, and the file and key it was found at."""

    dialect: Dialect
    block: Mapping[str, Any]
    where: str

    def read(self, space: NameSpace) -> Rules:
        """The rules that it states.  Raises `ConvertError` for what cannot be converted, and for malformed values."""
        try:
            return self.dialect.read(self.block, self.where, space)
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            found = f"malformed values ({error})"
            raise ConvertError(
                Problem(self.where, "", f"a {self.dialect.name} config", found, "correct the config, or export again")
            ) from None


def find_configs(config: Mapping[str, Any], quant_file: Mapping[str, Any] | None) -> list[QuantConfig]:
    """Every quantisation config of a checkpoint, the one to trust first coming first.

    `config`: config.json; `quant_file`: hf_quant_config.json.  Raises `ConvertError` that names a method not converted.
    """
    text = config.get("text_config")
    nested = text if isinstance(text, Mapping) else {}
    places = (
        ("config.json: quantization_config", config.get("quantization_config")),
        ("config.json: text_config.quantization_config", nested.get("quantization_config")),
        ("config.json: compression_config", config.get("compression_config")),
        ("config.json", _nested_modelopt(config.get("quantization"))),
        ("hf_quant_config.json", quant_file),
    )
    found = []
    for where, block in places:
        if block is None or block == {}:
            continue
        if not isinstance(block, Mapping):
            raise ConvertError(Problem(where, "", "an object", repr(block)[:80], "correct the config"))
        found.append(QuantConfig(_detect(block, where), block, where))
    return found

"""The networks that this runtime has, by family."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.models.base import CausalLM
from runtime.models.qwen3 import Qwen3
from runtime.models.qwen3_5 import Qwen3_5

FAMILIES: Mapping[str, type[CausalLM]] = {"qwen3": Qwen3, "qwen3_5": Qwen3_5}

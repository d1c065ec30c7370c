"""The networks that this runtime has, by family."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.models.base import CausalLM
from runtime.models.llama import Llama
from runtime.models.nemotron_h import NemotronH
from runtime.models.qwen2 import Qwen2
from runtime.models.qwen3 import Qwen3
from runtime.models.qwen3_5 import Qwen3_5
from runtime.models.qwen3_5_moe import Qwen3_5Moe
from runtime.models.qwen3_moe import Qwen3Moe
from runtime.models.step3_text import Step3
from runtime.models.step3p5 import Step3p5

FAMILIES: Mapping[str, type[CausalLM]] = {
    "llama": Llama,
    "mistral": Llama,
    "nemotron_h": NemotronH,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3_5": Qwen3_5,
    "qwen3_5_moe": Qwen3_5Moe,
    "qwen3_moe": Qwen3Moe,
    "qwen3_vl_moe": Qwen3Moe,
    "step3_text": Step3,
    "step3p5": Step3p5,
}

"""Variants of Llama, Mistral and Qwen2, longer than their windows: a producer's checkpoint, converted and run, against
transformers with the values it stands for.  `test_runtime_families` has every scheme.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from build import build, read_json
from networks import SIZES

import convert
import runtime

LENGTH = 70  # longer than the windows of 48
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama quantised, biases": ("llama", "modelopt", "fp8", {"bias": True}),
    "mistral quantised": ("mistral", "modelopt", "nvfp4", {}),
    "qwen2 quantised, window": ("qwen2", "modelopt", "mxfp8", {"variety": "window"}),
    "llama": ("llama", "dense", "bf16", {}),
    "llama tied": ("llama", "dense", "bf16", {"bias": True, "tied": True}),
    "mistral": ("mistral", "dense", "bf16", {}),
    "mistral without window": ("mistral", "dense", "bf16", {"variety": "full", "tied": True}),
    "qwen2": ("qwen2", "dense", "bf16", {"tied": True}),
    "qwen2 window": ("qwen2", "dense", "bf16", {"variety": "window"}),
    "qwen2 head size": ("qwen2", "dense", "bf16", {"sizes": replace(SIZES["small"], head_dim=32)}),
}


@pytest.mark.parametrize(("family", "dialect", "scheme", "options"), CASES.values(), ids=CASES)
def test_from_source_to_logits(family: str, dialect: str, scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    built = build(tmp_path / "in", family=family, dialect=dialect, scheme=scheme, **options)
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    config = {key: value for key, value in read_json(tmp_path / "in" / "config.json").items() if "quantization" not in key}
    made = transformers.AutoConfig.for_model(**config)
    reference = getattr(transformers, config["architectures"][0])(made).float().eval()
    missing, unexpected = reference.load_state_dict(
        {name: torch.from_numpy(values.copy()) for name, values in built.dense.items()}, strict=False
    )
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if options.get("tied") else set())
    ids = torch.randint(0, config["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids).logits
    model = runtime.load_model(tmp_path / "out", activations="full")
    full = model(ids)
    assert float((full - expected).abs().max() / expected.abs().max()) < 1e-4
    state = model.new_state(2, LENGTH)
    pieces = [model(ids[:, :50], state), model(ids[:, 50:60], state), *(model(ids[:, t : t + 1], state) for t in range(60, 70))]
    assert float((torch.cat(pieces, 1) - full).abs().max() / full.abs().max()) < 1e-5

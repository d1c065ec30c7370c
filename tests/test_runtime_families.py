"""Every family in every scheme: build a source, convert it, and compare logits with transformers on the dense weights.

The dense weights are the builder's (tests/build.py: numpy, from the same codes and scales), not the converter's.

Tolerance 1e-4 of the largest logit: transformers sums in another order.  The weights are random at every scale, which
amplifies a relative change of 1e-7 in the embedding to up to 1e-5 in the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from build import RECIPES, build, read_json
from safetensors.torch import save_file
from torch import Tensor

import convert
import runtime
from runtime.models import FAMILIES
from runtime.models.base import CausalLM

TOLERANCE = 1e-4
ELSEWHERE = {"step3p5", "step3_text"}  # no class of transformers for the text alone, or none: tests/test_runtime_step.py
RECIPES_RUN = [recipe for recipe in RECIPES if recipe[0] == "modelopt"] + [("fp8", "block")]  # every scheme, and mixtures
VOCABULARY = 80  # the smallest of the builder's


HEADS_DIVIDE_HIDDEN = {"llama"}  # transformers demands it of these; the sizes for blocks do not have it
WRAPPER_ONLY = {"qwen3_vl_moe"}  # transformers has no class for the text network alone


def rows() -> list[tuple[str, str, str]]:
    """Each family of the runtime in each recipe."""
    return [
        (family, *recipe)
        for family in FAMILIES
        for recipe in RECIPES_RUN
        # Gate and up of a stack in two schemes: this class takes them fused only; qwen3_moe and qwen3_5_moe have the row.
        if family not in ELSEWHERE and not (family in WRAPPER_ONLY and recipe[1] in ("mixed_groups", "mixed_inputs"))
    ]


def hugging_face(config: dict[str, Any], weights: dict[str, Any], directory: Path) -> Any:
    """The transformers model of a config with dense weights, float32."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = {key: value for key, value in config.items() if key != "quantization_config"}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({n: torch.from_numpy(v).contiguous() for n, v in weights.items()}, directory / "model.safetensors")
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    model, info = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not [name for name in info["missing_keys"] if not name.startswith("model.visual.")]
    assert not info["mismatched_keys"]
    for module in model.modules():
        if hasattr(module, "time_step_limit"):  # Mamba: transformers clamps prefill and decoding differently
            module.time_step_limit = (0.0, float("inf"))
    return model.eval()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def rms(found: Tensor, expected: Tensor) -> float:
    """Differences of summation order reach 1e-5 in single logits and vary from run to run; their size as a whole does not."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("family", "dialect", "scheme"), rows(), ids=str)
def test_logits_equal_transformers(family: str, dialect: str, scheme: str, tmp_path: Path) -> None:
    sizes = RECIPES[dialect, scheme].sizes
    options: dict[str, Any] = {"sizes": "aligned"} if sizes == "block" and family in HEADS_DIVIDE_HIDDEN else {}
    options |= {"wrapper": True} if family in WRAPPER_ONLY else {}
    # Seed 0 makes one of them (qwen3_5 in mxfp4) so ill-conditioned that transformers is 8e-4 from its own float64 run.
    built = build(tmp_path / "in", family=family, dialect=dialect, scheme=scheme, seed=1, **options)
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = runtime.load_model(tmp_path / "out", activations="full")
    reference = hugging_face(read_json(tmp_path / "in" / "config.json"), built.dense, tmp_path / "hf")
    ids = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids).logits
    assert relative(model(ids), expected) < TOLERANCE


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """A quantised model of each family, as its checkpoint says: inputs and KV cache too."""
    directory = tmp_path_factory.mktemp(request.param)
    build(directory / "in", family=request.param, dialect="compressed-tensors", scheme="fp8_dynamic", kv="tensor")
    convert.convert_checkpoint(directory / "in", directory / "out")
    return runtime.load_model(directory / "out")


PROMPTS = (3, 21, 9)  # tokens


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in PROMPTS]


def test_decoding_equals_prefill(model: CausalLM) -> None:
    ids = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    full = model(ids)
    state = model.new_state(2, 30)
    pieces = [model(ids[:, :3], state), model(ids[:, 3:20], state)]  # a prompt in two pieces
    pieces += [model(ids[:, t : t + 1], state) for t in range(20, 30)]
    assert rms(torch.cat(pieces, 1), full) < 1e-5


def test_a_batch_of_different_lengths_equals_one_at_a_time(model: CausalLM) -> None:
    rows, more = prompts(), torch.randint(0, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(2))
    padded = torch.full((3, max(PROMPTS)), 7)
    for row, prompt in zip(padded, rows, strict=True):
        row[: len(prompt)] = prompt
    state = model.new_state(3, 40)
    first = model(padded, state, counts=PROMPTS, last_only=True)
    then = torch.cat([model(more[:, t : t + 1], state) for t in range(5)], 1)
    assert state.lengths == [length + 5 for length in PROMPTS]
    for row, prompt in enumerate(rows):
        alone = model(torch.cat([prompt, more[row]]).unsqueeze(0))[0]
        assert rms(first[row, 0], alone[len(prompt) - 1]) < 1e-5
        assert rms(then[row], alone[len(prompt) :]) < 1e-5


def test_tokens_that_are_taken_back_leave_no_trace(model: CausalLM) -> None:
    rows, more = prompts(), torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
    padded = torch.full((3, max(PROMPTS)), 7)
    for row, prompt in zip(padded, rows, strict=True):
        row[: len(prompt)] = prompt
    state = model.new_state(3, 40, draft=3)
    model(padded, state, counts=PROMPTS)
    kept = [0, 0, 0]
    for now in ([1, 4, 2], [3, 1, 4], [2, 2, 1]):
        guesses = torch.full((3, 4), 5)
        for b, (k, n) in enumerate(zip(kept, now, strict=True)):
            guesses[b, :n] = more[b, k : k + n]
        model(guesses, state)
        state.keep([4, 4, 4], now)
        kept = [k + n for k, n in zip(kept, now, strict=True)]
    last = torch.tensor([[11], [12], [13]])
    found = model(last, state)
    for row, prompt in enumerate(rows):
        alone = model(torch.cat([prompt, more[row, : kept[row]], last[row]]).unsqueeze(0))[0, -1]
        assert rms(found[row, 0], alone) < 1e-5

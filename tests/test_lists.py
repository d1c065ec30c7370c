"""Entries of quantisation configs that mean no module: said once for each config, by name, and never a reason to refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from build import Built, edit_json
from conftest import Ran

import convert

Make = Callable[..., Built]
MIXED: dict[str, Any] = {"family": "qwen3_5", "dialect": "modelopt", "scheme": "mixed"}
FP8: dict[str, Any] = MIXED | {"scheme": "fp8"}
CT: dict[str, Any] = {"family": "qwen3_5", "dialect": "compressed-tensors", "scheme": "mixed"}
HF: dict[str, Any] = {"family": "qwen3_5", "dialect": "fp8", "scheme": "tensor_static"}
MOE: dict[str, Any] = {"family": "qwen3_5_moe", "dialect": "modelopt", "scheme": "mixed", "layout": "X2"}
ENTRY = {"quant_algo": "FP8"}
WHERE = "config.json: quantization_config"


def reports(built: Built) -> tuple[list[str], list[str]]:
    """Contradictions and repairs that speak of lists."""
    plan = convert.plan_conversion(built.directory)
    return [line for line in plan.contradictions if "quantises" in line], [line for line in plan.repairs if "excludes" in line]


def quantization(built: Built, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the quantisation config of config.json."""
    edit_json(built.directory / "config.json", lambda config: change(config["quantization_config"]))


def lists(*names: str) -> Callable[[dict[str, Any]], object]:
    """More names in `quantized_layers`."""
    return lambda q: q["quantized_layers"].update(dict.fromkeys(names, ENTRY))


def ignores(*names: str) -> Callable[[dict[str, Any]], object]:
    """More names in an ignore list, whatever it is called."""
    return lambda q: next(q[k] for k in ("ignore", "modules_to_not_convert") if k in q).extend(names)


def targets(*names: str) -> Callable[[dict[str, Any]], object]:
    """More targets in the first config group."""
    return lambda q: q["config_groups"]["group_0"]["targets"].extend(names)


MANY = tuple(f"model.layers.{i}.mlp.up_proj" for i in range(2, 25))
QUANTISED = {  # id: options, change, names that are reported in this order
    "another-layer": (MIXED, lists("model.layers.7.mlp.up_proj"), ["model.layers.7.mlp.up_proj"]),
    "misspelt": (MIXED, lists("model.layers.0.mlp.upproj"), ["model.layers.0.mlp.upproj"]),
    "unknown-root": (MIXED, lists("transformer.h.0.attn"), ["transformer.h.0.attn"]),
    "absent-part": (MIXED, lists("mtp.layers.0.mlp.up_proj"), ["mtp.layers.0.mlp.up_proj"]),
    "wildcard": (MIXED, lists("model.layers.7.*", "*.upproj*"), ["model.layers.7.*", "*.upproj*"]),
    "an-expert-too-many": (MOE, lists("model.layers.0.mlp.experts.3.up_proj"), ["model.layers.0.mlp.experts.3.up_proj"]),
    "target": (CT, targets("model.layers.7.mlp.up_proj", "re:.*upproj"), ["model.layers.7.mlp.up_proj", "re:.*upproj"]),
    "two-digit-experts": (
        MOE | {"dialect": "compressed-tensors"}, targets(r"re:.*experts\.\d\d\..*"), [r"re:.*experts\.\d\d\..*"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "change", "names"), QUANTISED.values(), ids=QUANTISED)
def test_quantised_modules_that_are_not_there(options: Any, change: Any, names: list[str], make: Make, cli: Any) -> None:
    """Each is named, as the config writes it; `--dry-run` prints the line."""
    built = make(**options)
    quantization(built, change)
    line = f"{WHERE} quantises {len(names)} names that mean no module: {', '.join(names)}"
    assert reports(built) == ([line], [])
    ran: Ran = cli(built.directory, built.directory.parent / "out", "--dry-run")
    assert ran.code == 0
    assert f"  {line}\n" in ran.out


def test_many_names(make: Make) -> None:
    """The first twenty, and a count."""
    built = make(**MIXED)
    quantization(built, lists(*MANY))
    shown = ", ".join(MANY[:20])
    line = f"{WHERE} quantises 23 names that mean no module: {shown}, ... and 3 more"
    assert reports(built) == ([line], [])


EXCLUDED = {
    "name": (FP8, ["model.layers.7.mlp.up_proj", "vision_tower"]),
    "wildcard": (FP8, ["multi_modal_projector*", "*.router.*"]),
    "compressed-tensors": (CT, ["model.layers.7.mlp.gate", "re:.*vision_tower.*"]),
    "fp8": (HF, ["model.vision_tower"]),
}


@pytest.mark.parametrize(("options", "names"), EXCLUDED.values(), ids=EXCLUDED)
def test_exclusions_of_nothing(options: Any, names: list[str], make: Make) -> None:
    """They are common and harmless: a line among the repairs, no contradiction."""
    built = make(**options)
    quantization(built, ignores(*names))
    assert reports(built) == ([], [f"{WHERE} excludes {len(names)} names that mean no module: {', '.join(names)}"])


MEANT = {  # spellings that do mean something, however they do
    "a-container": (MIXED, lists("model.layers.0.mlp")),
    "a-fused-name": (MIXED, lists("model.layers.0.linear_attn.in_proj_qkvz")),
    "a-wrapper": (MIXED, lists("language_model.model.layers.0.mlp.up_proj")),
    "experts-of-a-stack": (MOE, lists(*(f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(3)))),
    "one-expert-of-a-stack": (MOE, lists("model.layers.0.mlp.experts.2")),
    "stack": (MOE, lists("model.layers.0.mlp.experts.gate_up_proj")),
    "norms": (FP8, ignores("model.layers.0.input_layernorm", "model.norm*", "*_layernorm*")),
    "parameters": (FP8, ignores("model.layers.0.linear_attn.A_log", "model.layers.0.linear_attn.conv1d")),
    "an-expert-by-wildcard": (MOE | {"scheme": "nvfp4"}, ignores("model.layers.0.mlp.experts.1.*")),
    "a-pattern-of-an-expert": (
        MOE | {"dialect": "compressed-tensors"}, ignores(r"re:.*experts\.1\.up_proj", r"re:.*experts\.\d+\.down_proj"),
    ),
    "embeddings-as-stored": (
        {"family": "nemotron_h", "dialect": "compressed-tensors", "scheme": "fp8_static"}, ignores("re:backbone.embeddings"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "change"), MEANT.values(), ids=MEANT)
def test_entries_that_mean_something(options: Any, change: Any, make: Make) -> None:
    """Nothing is said of them here."""
    built = make(**options)
    quantization(built, change)
    assert reports(built) == ([], [])


PRODUCED = [("modelopt", "fp8"), ("modelopt", "mixed"), ("compressed-tensors", "nvfp4"), ("fp8", "block")]


@pytest.mark.parametrize("recipe", PRODUCED, ids="-".join)
@pytest.mark.parametrize(
    "options",
    [
        {"family": "qwen3_5", "wrapper": True, "mtp": True, "meta_prefix": "Q2"},
        {"family": "qwen3_5_moe", "layout": "X8"},
        {"family": "nemotron_h", "mtp": True, "layout": "X2"},
        {"family": "step3p5", "mtp": True, "wrapper": True, "layout": "X4"},
    ],
    ids=lambda options: options["family"],
)
def test_lists_of_producers(options: dict[str, Any], recipe: tuple[str, str], make: Make) -> None:
    """Nothing is said of lists as producers write them."""
    dialect, scheme = recipe
    assert reports(make(dialect=dialect, scheme=scheme, **options)) == ([], [])

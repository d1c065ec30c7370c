"""Where a config and the tensors, or two configs, disagree: the tensors win, and the report says so.

The checkpoint converts to what the builder stored, whatever its config was made to claim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Built, edit_json, edit_tensors, raw, read_json, read_tensors
from conftest import Ran

import convert

Change = Callable[[Any], object]
MIXED: dict[str, Any] = {"family": "qwen3_5", "dialect": "modelopt", "scheme": "mixed"}
FP8: dict[str, Any] = {"family": "qwen3_5", "dialect": "modelopt", "scheme": "fp8"}
NVFP4: dict[str, Any] = {"family": "qwen3", "dialect": "modelopt", "scheme": "nvfp4"}
W4A16 = NVFP4 | {"scheme": "w4a16_nvfp4"}
CT: dict[str, Any] = {"family": "qwen3", "dialect": "compressed-tensors", "scheme": "fp8_dynamic"}
CT_NVFP4 = CT | {"scheme": "nvfp4"}
DENSE: dict[str, Any] = {"family": "qwen3", "dialect": "dense", "scheme": "bf16"}
BOTH = {"form": "both"}


@dataclass(frozen=True)
class Case:
    """`change`: what `file` is made to claim.  `words`: what one entry of `contradictions` must contain."""

    id: str
    options: dict[str, Any]
    change: Change
    words: tuple[str, ...]
    file: str = "config.json"


def quantization(change: Change) -> Change:
    """Change the quantization config of config.json."""
    return lambda config: change(config["quantization_config"])


def claim_dense_config(config: Any) -> None:
    """Claim FP8 for a checkpoint that holds no quantised tensor."""
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}


MLP = "model.layers.0.mlp.down_proj"
CASES = [
    Case(
        "head-excluded-but-quantised",
        MIXED,
        quantization(lambda q: (q["quantized_layers"].pop("lm_head"), q.update(ignore=["lm_head*"]))),
        ("lm_head",),
    ),
    Case(
        "head-excluded-by-a-uniform-config",
        MIXED,
        quantization(lambda q: (q.pop("quantized_layers"), q.update(quant_algo="NVFP4", ignore=["lm_head"], config_groups={}))),
        ("lm_head",),
    ),
    Case(
        "listed-but-not-quantised",
        MIXED,
        quantization(lambda q: q["quantized_layers"].update({"model.layers.0.linear_attn.in_proj_a": {"quant_algo": "FP8"}})),
        ("in_proj_a",),
    ),
    Case(
        "listed-with-another-algorithm",
        MIXED,
        quantization(lambda q: q["quantized_layers"].update({MLP: {"quant_algo": "FP8"}})),
        (MLP,),
    ),
    Case("quantised-but-not-listed", MIXED, quantization(lambda q: q["quantized_layers"].pop(MLP)), (MLP,)),
    Case(
        "excluded-by-wildcard-but-quantised",
        FP8,
        quantization(lambda q: q["ignore"].append("model.layers.0.mlp*")),
        ("model.layers.0.mlp",),
    ),
    Case("claims-another-algorithm-for-all", FP8, quantization(lambda q: q.update(quant_algo="NVFP4")), ("nvfp4",)),
    Case("nothing-is-quantised", DENSE, claim_dense_config, ("fp8",)),
    Case(
        "ct-group-of-another-scheme",
        CT,
        quantization(lambda q: q["config_groups"]["group_0"]["weights"].update(strategy="tensor")),
        ("fp8_channel",),
    ),
    Case("ct-ignored-but-quantised", CT, quantization(lambda q: q["ignore"].append("re:.*down_proj")), ("down_proj",)),
    Case(
        "two-files-disagree",
        NVFP4 | BOTH,
        lambda q: q["quantization"].update(quant_algo="FP8"),
        ("hf_quant_config.json",),
        "hf_quant_config.json",
    ),
    Case(
        "two-files-disagree-on-a-layer",
        MIXED | BOTH,
        lambda q: q["quantization"]["quantized_layers"].pop("lm_head"),
        ("hf_quant_config.json", "lm_head"),
        "hf_quant_config.json",
    ),
    Case(
        "two-files-disagree-on-the-cache",
        FP8 | BOTH | {"kv": "tensor"},
        lambda q: q["quantization"].update(kv_cache_quant_algo=None),
        ("hf_quant_config.json",),
        "hf_quant_config.json",
    ),
    Case(
        "cache-scales-but-no-claim",
        FP8 | {"kv": "tensor"},
        quantization(lambda q: q.pop("kv_cache_scheme")),
        ("kv scales",),
    ),
    Case("tied-flag-beside-a-head", NVFP4, lambda c: c.update(tie_word_embeddings=True), ("tie_word_embeddings",)),
]


def convert_and_report(built: Built, out: Path) -> dict[str, Any]:
    """Convert, check that every tensor is the builder's, and return conversion.json."""
    convert.convert_checkpoint(built.directory, out)
    convert.verify_conversion(built.directory, out)
    assert read_tensors(out) == built.canonical
    report: dict[str, Any] = read_json(out / "conversion.json")
    return report


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_tensors_win(case: Case, make: Callable[..., Built], tmp_path: Path) -> None:
    """Canonical tensors and weight schemes are what the tensors say; `contradictions` names the place."""
    built = make(**case.options)
    edit_json(built.directory / case.file, case.change)
    report = convert_and_report(built, tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    schemes = {name: entry["scheme"] for name, entry in config["quantization"]["modules"].items()}
    assert schemes == {name: entry["scheme"] for name, entry in built.modules.items()}
    assert config["quantization"]["kv_cache"] == built.kv_cache
    found = [line for line in report["contradictions"] if all(word in line.lower() for word in case.words)]
    assert found, report["contradictions"]


@pytest.mark.parametrize(
    "options",
    [MIXED, FP8, NVFP4, W4A16, CT, CT_NVFP4, DENSE, FP8 | BOTH | {"kv": "tensor"}, MIXED | BOTH,
     MIXED | {"form": "nested"}, FP8 | {"scheme": "fp8_weight_only"}, MIXED | {"scheme": "mixed_groups"},
     FP8 | {"wrapper": True, "mtp": True}],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)  # fmt: skip
def test_nothing_to_report(options: dict[str, Any], make: Callable[..., Built], tmp_path: Path) -> None:
    """What a producer writes contradicts nothing, and all of it is carried."""
    report = convert_and_report(make(**options), tmp_path / "out")
    assert report["contradictions"] == []
    assert report["dropped"] == []


def test_claims_w4a16_holds_input_scales(make: Callable[..., Built], tmp_path: Path) -> None:
    """W4A16 with `input_scale` tensors (legacy files): the config's activations, the scales dropped with a reason."""
    built = make(**NVFP4)
    edit_json(built.directory / "config.json", quantization(lambda q: q.update(quant_algo="W4A16_NVFP4", config_groups={})))
    convert.convert_checkpoint(built.directory, tmp_path / "out")
    convert.verify_conversion(built.directory, tmp_path / "out")
    found, report = read_tensors(tmp_path / "out"), read_json(tmp_path / "out" / "conversion.json")
    assert found == {name: t for name, t in built.canonical.items() if not name.endswith(".input_scale")}
    modules = read_json(tmp_path / "out" / "config.json")["quantization"]["modules"]
    assert {entry["activations"] for entry in modules.values()} == {None}
    dropped = {entry["tensor"]: entry["reason"] for entry in report["dropped"]}
    assert dropped.keys() == {name for name in read_tensors(built.directory) if name.endswith(".input_scale")}
    assert all(dropped.values())


@pytest.mark.parametrize("how", ["no-input-scale", "null-activations"])
def test_claims_w4a4_but_weight_only(how: str, make: Callable[..., Built], tmp_path: Path) -> None:
    """NVFP4 without `input_scale` is W4A16, as is NVFP4 whose groups all quantise no activations."""
    built = make(**W4A16)
    groups = {"group_0": {"weights": {"num_bits": 4}, "targets": ["Linear"]}} if how == "null-activations" else {}
    edit_json(built.directory / "config.json", quantization(lambda q: q.update(quant_algo="NVFP4", config_groups=groups)))
    convert_and_report(built, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["quantization"]["modules"] == built.modules


@pytest.mark.parametrize("stored", ["nvfp4", "w4a16_nvfp4"])
@pytest.mark.parametrize("first", ["NVFP4", "W4A16_NVFP4"])
def test_stored_input_scales_decide_between_two_files(
    stored: str, first: str, make: Callable[..., Built], tmp_path: Path
) -> None:
    """config.json and hf_quant_config.json disagree on W4A4 or W4A16: whether `input_scale` is stored decides."""
    built = make(**NVFP4 | BOTH | {"scheme": stored})
    second = {"NVFP4": "W4A16_NVFP4", "W4A16_NVFP4": "NVFP4"}[first]
    edit_json(built.directory / "config.json", quantization(lambda q: q.update(quant_algo=first, config_groups={})))
    edit_json(built.directory / "hf_quant_config.json", lambda q: q["quantization"].update(quant_algo=second))
    convert_and_report(built, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["quantization"]["modules"] == built.modules


def test_tied_head_that_differs(make: Callable[..., Built], tmp_path: Path) -> None:
    """`tie_word_embeddings` with a separate `lm_head` in the file: the data is kept, the head is separate."""
    built = make(**NVFP4)
    edit_json(built.directory / "config.json", lambda c: c.update(tie_word_embeddings=True))
    convert_and_report(built, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["architecture"]["head"] == "separate"


def test_declared_mtp_without_tensors(make: Callable[..., Built], tmp_path: Path) -> None:
    """`mtp_num_hidden_layers` without a tensor of it (lost by save_pretrained): converts, and the report says it."""
    built = make(**FP8, mtp=True)

    def lose(stored: dict[str, Any]) -> None:
        for name in [n for n in stored if n.startswith("mtp.")]:
            del stored[name]

    edit_tensors(built.directory, lose)
    convert.convert_checkpoint(built.directory, tmp_path / "out")
    report = read_json(tmp_path / "out" / "conversion.json")
    assert any("mtp" in line for line in report["contradictions"] + report["repairs"])
    assert read_json(tmp_path / "out" / "config.json")["carried"] == []


def test_partitions_may_differ_in_input_scale(make: Callable[..., Built], tmp_path: Path) -> None:
    """q, k and v with different static input scales: each partition keeps its own, none is merged."""
    built = make(**FP8)
    names = [f"model.layers.1.self_attn.{p}_proj.input_scale" for p in "qkv"]
    values = np.array([0.013, 0.017, 0.019], np.float32)

    def change(stored: dict[str, Any]) -> None:
        stored.update({name: raw("F32", value) for name, value in zip(names, values, strict=True)})

    edit_tensors(built.directory, change)
    convert.convert_checkpoint(built.directory, tmp_path / "out")
    found = read_tensors(tmp_path / "out")["model.layers.1.self_attn.qkv_proj.input_scale"]
    assert found == raw("F32", values)


def test_the_command_mentions_contradictions(make: Callable[..., Built], cli: Callable[..., Ran], tmp_path: Path) -> None:
    """What `conversion.json` reports, `--dry-run` and `--json` show before anything is written."""
    built = make(**MIXED)
    edit_json(built.directory / "config.json", quantization(lambda q: q["quantized_layers"].pop("lm_head")))
    assert "lm_head" in cli(built.directory, tmp_path / "out", "--dry-run").out
    plan = convert.plan_conversion(built.directory).to_json()
    assert any("lm_head" in line for line in plan["contradictions"])

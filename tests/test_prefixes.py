"""One checkpoint under every spelling of its names: canonical tensors and quantisation come out byte for byte equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
from build import Raw, build, edit_tensors, read_json, read_tensors

import convert
from convert.families import FAMILIES
from convert.names import canonical_name, repair_sentinel

Plain = Callable[..., tuple[dict[str, Raw], dict[str, Any]]]
MODELOPT: dict[str, Any] = {"dialect": "modelopt", "scheme": "mixed"}
CT = {"dialect": "compressed-tensors", "scheme": "nvfp4"}
HF = {"dialect": "fp8", "scheme": "block_bf16"}
PLAIN_TEXT: dict[str, Any] = {"family": "qwen3_5"}
TEXT: dict[str, Any] = {"family": "qwen3_5", "mtp": True}
VLM: dict[str, Any] = TEXT | {"wrapper": True}
QWEN3: dict[str, Any] = {"family": "qwen3"}
MOE_VLM: dict[str, Any] = VLM | {"family": "qwen3_5_moe"}
NEMOTRON: dict[str, Any] = {"family": "nemotron_h", "mtp": True}
STEP: dict[str, Any] = {"family": "step3p5", "mtp": True, "layout": "X4"}

# id -> model, the spelling to compare with, other spellings
FORMS = {
    form: ({"family": family.name, **options}, base, others)
    for family in FAMILIES
    for form, (options, base, others) in families.FAMILIES[family.name].spellings.items()
}
PRODUCERS = {"modelopt": MODELOPT, "compressed-tensors": CT, "fp8": HF, "dense": {"dialect": "dense", "scheme": "bf16"}}
# Every spelling with one producer whose config names modules one by one; a few with the others.
CASES = [
    pytest.param(model, producer, base, other, id=f"{producer}-{form}-{other}")
    for form, (model, base, others) in FORMS.items()
    for producer in PRODUCERS
    for other in others
    if producer == "modelopt" or other in ("Q2", "Q6", "Q7-Q1", "N5", "Q7-N4", "S2")
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """`converted` without a folder: each combination of options is converted once."""
    done: dict[str, tuple[dict[str, Raw], dict[str, Any]]] = {}

    def of(**options: Any) -> tuple[dict[str, Raw], dict[str, Any]]:
        key = repr(sorted(options.items()))
        if key not in done:
            done[key] = converted(tmp_path_factory.mktemp("plain"), **options)
        return done[key]

    return of


def converted(folder: Path, **options: Any) -> tuple[dict[str, Raw], dict[str, Any]]:
    """Build, convert, and read the canonical tensors and config."""
    build(folder / "in", **options)
    convert.convert_checkpoint(folder / "in", folder / "out")
    return read_tensors(folder / "out"), read_json(folder / "out" / "config.json")


def parts_of(prefix: str) -> set[str]:
    """First segments of the canonical names of the parts that a prefix variant stores."""
    place = families.PREFIXES[prefix]
    parts = {"lm_head": place.head, "visual": place.visual, "mtp": place.mtp, **place.towers}
    return {"model"} | {part for part, spelling in parts.items() if spelling is not None}


def only(parts: set[str], names: dict[str, Any]) -> dict[str, Any]:
    """The entries whose name begins with one of `parts`."""
    return {name: value for name, value in names.items() if name.partition(".")[0] in parts}


@pytest.mark.parametrize(("model", "producer", "base", "other"), CASES)
def test_every_prefix_variant(
    model: dict[str, Any], producer: str, base: str, other: str, plain: Plain, tmp_path: Path
) -> None:
    """Tensor names and names in the quantisation config both use the variant; parts it does not store are absent."""
    tensors, config = plain(prefix=base, **model, **PRODUCERS[producer])
    found, found_config = converted(tmp_path, prefix=other, **model, **PRODUCERS[producer])
    parts = parts_of(other) & parts_of(base)
    assert found == only(parts, tensors)
    quantization = config["quantization"]
    assert found_config["quantization"]["modules"] == only(parts, quantization["modules"])
    assert found_config["unfused"] == only(parts, config["unfused"])
    assert set(found_config["carried"]) == {prefix for prefix in config["carried"] if prefix.partition(".")[0] in parts}
    same = set(config["architecture"]) - {"head", "mtp_num_hidden_layers", "num_nextn_predict_layers"}
    assert {k: found_config["architecture"][k] for k in same} == {k: config["architecture"][k] for k in same}
    if "mtp" in config["carried"]:
        key = {"nemotron_h": "num_nextn_predict_layers"}.get(config["family"], "mtp_num_hidden_layers")
        assert found_config["architecture"][key] == ("mtp" in parts)
    assert found_config["architecture"]["head"] == ("separate" if "lm_head" in parts else "absent")


META = [
    pytest.param(TEXT, "Q3", "Q1", id="text-meta-Q1"),
    pytest.param(PLAIN_TEXT, "Q4", "Q3", id="text-stray-meta-Q3"),
    pytest.param(VLM, "Q1", "Q2", id="vlm-meta-Q2"),
    pytest.param(VLM, "Q2", "Q1", id="vlm-Q2-meta-Q1"),
    pytest.param(VLM, "Q7-Q1", "Q1", id="vlm-peft-meta-plain"),
    pytest.param(VLM, "Q1", "Q7-Q2", id="vlm-meta-peft"),
    pytest.param(TEXT, "Q1", "Q8", id="text-meta-Q8"),
    pytest.param(PLAIN_TEXT, "Q6", "Q3", id="bare-meta-Q3"),
    pytest.param(MOE_VLM, "Q1", "Q2", id="moe-meta-Q2"),
    pytest.param(NEMOTRON | {"wrapper": True, "mtp": False}, "N4", "N5", id="nano-vl-meta-N5"),
    pytest.param(NEMOTRON | {"mtp": False}, "N1", "N3", id="nemotron-meta-N3"),
    pytest.param(STEP, "S1", "S3", id="step-meta-S3"),
    pytest.param(STEP | {"wrapper": True}, "S2", "S1", id="step-vl-meta-S1"),
]


CONFIGS = [MODELOPT, MODELOPT | {"form": "hf_quant"}, CT, HF]


@pytest.mark.parametrize(("model", "prefix", "meta"), META)
@pytest.mark.parametrize("producer", CONFIGS, ids=lambda p: "-".join(p.values()))
def test_config_names_in_another_variant(
    model: dict[str, Any], prefix: str, meta: str, producer: dict[str, Any], plain: Plain, tmp_path: Path
) -> None:
    """The quantisation config uses one prefix variant, the tensors another: nothing changes and nothing contradicts."""
    tensors, config = plain(prefix=prefix, **model, **producer)
    found, found_config = converted(tmp_path, prefix=prefix, meta_prefix=meta, **model, **producer)
    assert found == tensors
    assert found_config["quantization"] == config["quantization"]
    assert read_json(tmp_path / "out" / "conversion.json")["contradictions"] == []


@pytest.mark.parametrize(
    ("scheme", "form"),
    [("mixed", "embedded"), ("mixed", "hf_quant"), ("mixed", "both"), ("mixed", "nested"), ("mixed_groups", "embedded"),
     ("fp8", "embedded"), ("fp8", "hf_quant"), ("nvfp4_awq", "both"), ("fp8_pb_wo", "nested")],
)  # fmt: skip
def test_nul_sentinels(scheme: str, form: str, plain: Plain, tmp_path: Path) -> None:
    r"""Names such as `lm_head.\0backbone.pt_name_sentinel` mean `lm_head`; the repair is reported."""
    options = VLM | {"dialect": "modelopt", "scheme": scheme, "form": form}
    tensors, config = plain(**options)
    found, found_config = converted(tmp_path, nul_names=True, **options)
    assert "\\u0000" in "".join((tmp_path / "in" / f).read_text() for f in _config_files(form))
    assert found == tensors
    assert found_config["quantization"] == config["quantization"]
    report = read_json(tmp_path / "out" / "conversion.json")
    assert any("names in the quantisation config repaired" in repair for repair in report["repairs"])
    assert not report["contradictions"]


def _config_files(form: str) -> list[str]:
    return {"hf_quant": ["hf_quant_config.json"], "both": ["hf_quant_config.json", "config.json"]}.get(form, ["config.json"])


@pytest.mark.parametrize(
    ("producer", "prefix", "base_layer", "meta_base_layer"),
    [(producer, "Q7-Q1", "some", False) for producer in PRODUCERS]
    + [(producer, "Q1", "all", meta) for producer in PRODUCERS for meta in (False, True)]
    + [("modelopt", "Q2", "all", True), ("modelopt", "Q7-Q2", "some", True)],
)  # fmt: skip
def test_base_layer(producer: str, prefix: str, base_layer: str, meta_base_layer: bool, plain: Plain, tmp_path: Path) -> None:
    """`.base_layer.` in tensor names (weights, scales) and in the config goes away and is reported."""
    options = VLM | PRODUCERS[producer] | {"prefix": prefix}
    tensors, config = plain(**options)
    found, found_config = converted(tmp_path, base_layer=base_layer, meta_base_layer=meta_base_layer, **options)
    assert any(".base_layer." in name for name in read_tensors(tmp_path / "in"))
    assert found == tensors
    assert found_config["quantization"] == config["quantization"]
    assert "base_layer" not in json.dumps(found_config)
    report = read_json(tmp_path / "out" / "conversion.json")
    assert any("base_layer" in repair for repair in report["repairs"])
    assert not report["contradictions"]


def test_base_layer_of_biases_and_cache_scales(plain: Plain, tmp_path: Path) -> None:
    """What belongs to a wrapped projection moves below `base_layer` with it: biases and KV-cache scales too."""
    options = QWEN3 | {"dialect": "modelopt", "scheme": "fp8", "bias": True, "kv": "tensor"}
    assert converted(tmp_path, base_layer="all", **options) == plain(**options)
    stored = read_tensors(tmp_path / "in")
    assert "model.layers.0.self_attn.k_proj.base_layer.k_scale" in stored
    assert "model.layers.0.self_attn.k_proj.base_layer.bias" in stored


def test_nested_base_layer(plain: Plain, tmp_path: Path) -> None:
    """A module that is wrapped twice has two `base_layer` segments, one after the other."""
    tensors, _ = plain(**QWEN3, **MODELOPT)
    build(tmp_path / "other", **QWEN3, **MODELOPT)

    def wrap(stored: dict[str, Raw]) -> None:
        for name in [n for n in stored if ".q_proj." in n or ".down_proj." in n]:
            module, _, role = name.rpartition(".")
            stored[f"{module}.base_layer.base_layer.{role}"] = stored.pop(name)

    edit_tensors(tmp_path / "other", wrap)
    convert.convert_checkpoint(tmp_path / "other", tmp_path / "out")
    assert read_tensors(tmp_path / "out") == tensors


# ------------------------------------------------------------------------------------------- the rewrite, on its own

SPACE = next(family for family in FAMILIES if family.name == "qwen3_5").names
NAMES = [
    ("model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ("language_model.model.layers.10.self_attn", "model.layers.10.self_attn"),
    ("language_model.layers.1.x", "model.layers.1.x"),
    ("layers.1.x", "model.layers.1.x"),
    ("embed_tokens.weight", "model.embed_tokens.weight"),
    ("base_model.model.model.language_model.norm.weight", "model.norm.weight"),
    ("base_model.model.lm_head.weight", "lm_head.weight"),
    ("language_model.lm_head", "lm_head"),
    ("model.language_model.lm_head.weight", "lm_head.weight"),
    ("language_model.mtp.layers.0.mlp.up_proj", "mtp.layers.0.mlp.up_proj"),
    ("model.mtp.fc.weight", "mtp.fc.weight"),
    ("model.visual.blocks.0.norm1.bias", "visual.blocks.0.norm1.bias"),
    ("visual.pos_embed.weight", "visual.pos_embed.weight"),
    ("model.language_model.visual.pos_embed.weight", "visual.pos_embed.weight"),
    ("model.layers.0.self_attn.q_proj.base_layer.weight", "model.layers.0.self_attn.q_proj.weight"),
    # Segments, not substrings.
    ("my_layers.0.weight", None),
    ("model.layerss.0.weight", None),
    ("model.lm_head_extra.weight", None),
    ("mtp_extra.fc.weight", None),
    ("transformer.h.0.weight", None),
    # Known wrappers only.
    ("transformer.layers.0.mlp.up_proj.weight", None),
    ("model.encoder.layers.0.weight", None),
    ("draft.lm_head.weight", None),
]


@pytest.mark.parametrize(("name", "expected"), NAMES, ids=[name for name, _ in NAMES])
def test_canonical_name(name: str, expected: str | None) -> None:
    """The one rewrite; applying it to its own result changes nothing."""
    assert canonical_name(name, SPACE) == expected
    if expected is not None:
        assert canonical_name(expected, SPACE) == expected


SENTINELS = [
    ("lm_head.\0backbone.pt_name_sentinel", "lm_head"),
    ("model.layers.0.\0backbone.pt_name_sentinel*", "model.layers.0*"),
    ("model.visual.\0backbone.pt_name_sentinel.*", "model.visual.*"),
    ("lm_head", "lm_head"),
    ("model.visual*", "model.visual*"),
]


@pytest.mark.parametrize(("name", "expected"), SENTINELS, ids=[expected for _, expected in SENTINELS])
def test_repair_sentinel(name: str, expected: str) -> None:
    """The sentinel is cut out, a wildcard after it stays."""
    assert repair_sentinel(name) == expected

"""Draft layers that a config declares otherwise than they are stored: the files win, and all that they have is carried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from build import Built, edit_json, edit_tensors, read_json, read_tensors

import convert

Make = Callable[..., Built]
KEYS = {"step3p5": "num_nextn_predict_layers", "nemotron_h": "num_nextn_predict_layers", "qwen3_5": "mtp_num_hidden_layers"}
FORMS = {
    "step": {"family": "step3p5"},
    "step-vl": {"family": "step3p5", "wrapper": True, "prefix": "S2"},
    "nemotron": {"family": "nemotron_h"},
    "nemotron-vl": {"family": "nemotron_h", "wrapper": True},
    "qwen": {"family": "qwen3_5"},
    "qwen-vl": {"family": "qwen3_5", "wrapper": True},
}
FIRST = {"step3p5": ("model.layers.2", 1), "nemotron_h": ("mtp.layers.0", 2), "qwen3_5": ("mtp.layers.0", 1)}  # and blocks
OWN_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_layer_kinds", "mtp_layer_types")


def copies(names: Mapping[str, Any], family: str, count: int) -> dict[str, Any]:
    """The same tensors with `count` draft heads, each like the first; of names in any prefix spelling."""
    first, blocks = FIRST[family]
    number = int(first.rpartition(".")[2])
    found = dict(names)
    for name, value in names.items():
        segments = name.split(".")
        at = segments.index("layers") if "layers" in segments else -1
        drafts = "mtp" in segments if first.startswith("mtp.") else at >= 0
        if drafts and at >= 0 and number <= int(segments[at + 1]) < number + blocks:
            for head in range(1, count):
                index = str(int(segments[at + 1]) + head * blocks)
                found[".".join((*segments[: at + 1], index, *segments[at + 2 :]))] = value
    return found


def declare(built: Built, count: int | None) -> None:
    """Let the config say that there are `count` heads, or nothing."""

    def change(config: dict[str, Any]) -> None:
        text = next((config[key] for key in ("text_config", "llm_config") if key in config), config)
        text.pop(KEYS[built.family], None)
        text.update({} if count is None else {KEYS[built.family]: count})

    edit_json(built.directory / "config.json", change)


@pytest.mark.parametrize("declared", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("stored", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_stored_drafts_win(form: dict[str, Any], stored: int, declared: int | None, make: Make, tmp_path: Path) -> None:
    """None of them is lost or asked for, the architecture counts them, and one line tells of the difference."""
    built = make(**form, dialect="compressed-tensors", scheme="nvfp4", mtp=True)
    edit_tensors(built.directory, lambda tensors: tensors.update(copies(tensors, built.family, stored)))
    declare(built, declared)
    report = convert.convert_checkpoint(built.directory, tmp_path / "out")
    convert.verify_conversion(built.directory, tmp_path / "out")
    assert read_tensors(tmp_path / "out") == copies(built.canonical, built.family, stored)
    found = read_json(tmp_path / "out" / "config.json")["architecture"]
    expected = {k: v * stored for k, v in built.architecture.items() if k in OWN_FIELDS}  # lists grow, the number counts
    assert found == built.architecture | expected
    where = "model.layers that only draft" if built.family == "step3p5" else "mtp.*"
    line = f"the files have {stored} layers of {where}, config.json declares {declared or 'none'}"
    assert [told for told in report.contradictions if "layers of" in told] == ([line] if declared != stored else [])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_no_drafts_of_those_declared(form: dict[str, Any], make: Make, tmp_path: Path) -> None:
    """Nothing is left of them: the trunk converts, and has none."""
    built = make(**form, dialect="modelopt", scheme="fp8")
    declare(built, 2)
    report = convert.convert_checkpoint(built.directory, tmp_path / "out")
    assert read_tensors(tmp_path / "out") == built.canonical
    found = read_json(tmp_path / "out" / "config.json")["architecture"]
    assert found[KEYS[built.family]] == 0
    assert found.get("mtp_layer_kinds", []) == []
    assert [line for line in report.contradictions if "declares 2 layers of" in line]


@pytest.mark.parametrize("lost", ["eh_proj.weight", "mlp.down_proj.weight"])
def test_a_damaged_draft_layer_is_refused(lost: str, make: Make) -> None:
    """What is there of a layer must be all of it; a gap between layers is one too."""
    built = make(family="step3p5", dialect="dense", scheme="bf16", mtp=True)
    edit_tensors(built.directory, lambda tensors: tensors.update(copies(tensors, "step3p5", 3)))
    edit_tensors(built.directory, lambda tensors: tensors.pop(f"model.layers.3.{lost}"))
    with pytest.raises(convert.ConvertError, match=rf"model\.layers\.3\.{lost}: expected"):
        convert.plan_conversion(built.directory)


def test_a_head_without_layers_is_refused(make: Make) -> None:
    """The projection of an MTP head alone drafts nothing."""
    built = make(family="qwen3_5", dialect="dense", scheme="bf16", mtp=True)
    edit_tensors(built.directory, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith("mtp.layers")])
    with pytest.raises(convert.ConvertError, match=r"mtp\.layers\.0\.input_layernorm\.weight: expected"):
        convert.plan_conversion(built.directory)


def test_another_models_config_is_not_drafts(make: Make) -> None:
    """More layers than declared, and nothing that only drafts have: config and files are of two checkpoints."""
    built = make(family="step3p5", dialect="dense", scheme="bf16")
    edit_json(built.directory / "config.json", lambda config: config.update(num_hidden_layers=1, num_nextn_predict_layers=1))
    with pytest.raises(convert.ConvertError, match="num_hidden_layers: expected the 2 layers that the files have"):
        convert.plan_conversion(built.directory)

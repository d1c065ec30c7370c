"""`qconvert inspect`: facts, defects with their measure, refused checkpoints, and what a screen shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Built, Raw, edit_json, edit_tensors, raw, read_tensors
from conftest import Ran
from test_casebook import CASES, Refused, prepared

import convert
from convert.defects import CONTRADICTIONS, EFFECTS, KINDS, REFUSALS, REPAIRS, SEVERITIES
from convert.inspector import UNKNOWN, Inspection, Row
from convert.page import fold, render, squarify, tree

Cli = Callable[..., Ran]
PAGE = (Path(__file__).parents[1] / "docs" / "inspect.md").read_text("utf-8")
NVFP4 = {"family": "qwen3", "dialect": "modelopt", "scheme": "nvfp4"}
FP8 = {"family": "qwen3", "dialect": "modelopt", "scheme": "fp8"}
MOE = {"family": "qwen3_moe", "dialect": "modelopt", "scheme": "nvfp4"}
VLM = {"family": "qwen3_5", "wrapper": True, "mtp": True, "dialect": "modelopt", "scheme": "mixed", "kv": "tensor"}

# Defects of the cases in the case book, beside those that tiny random checkpoints always have.
EVERYWHERE = {
    "zero-d-scales", "one-scale-for-several", "fp8-scales-differ", "global-scales-differ", "input-scales-differ",
    "expert-input-scales-differ", "processor-missing",
}  # fmt: skip
OF_CASE: dict[str, set[str]] = {
    "scalar-of-in-proj-a": {"weight-only-called-static", "mixed-group"},
    "head-in-blocks": {"blocks-cross-partitions"},
    "weight-only-fp8": {"weight-only-called-static"},
    "input-scales-of-no-use": {"idle-input-scales"},
    "drafts-lost-on-save": {"part-missing", "unknown-names-excluded"},
    "head-excluded-but-quantised": {"quantised-but-excluded"},
    "drafts-not-excluded": {"claimed-but-not-quantised"},
    "draft-experts-not-excluded": {"claimed-but-not-quantised"},
    "only-draft-experts-quantised": {"quantised-but-excluded"},
    "fused-names-in-the-list": {"names-not-as-stored"},
    "fused-names-as-quantised": {"names-not-as-stored"},
    "router-not-excluded": {"claimed-but-not-quantised"},
    "experts-left-unquantised": {"claimed-but-not-quantised"},
    "nothing-quantised": {"nothing-quantised"},
    "mamba-is-fp8": {"another-scheme"},
    "overlapping-groups": {"claimed-but-not-quantised", "another-scheme"},
    "label-of-a-mix": {"label-unknown-to-engines"},
    "cache-format-in-the-other-file": {"kv-cache-in-one-config"},
    "stale-second-config": {"another-scheme"},
    "sentinel-in-names": {"corrupted-names"},
    "list-in-another-namespace": {"names-not-as-stored"},
    "w4a16-layer-not-found": {"names-not-as-stored"},
    "list-says-model": {"names-not-as-stored"},
    "wrapped-exclusions": {"another-scheme", "names-not-as-stored"},
    "draft-head-by-its-full-name": {"names-not-as-stored"},
    "nested-exclusions": {"claimed-but-not-quantised", "unknown-names-excluded"},
    "prefix-three-times": {"foreign-names", "names-not-as-stored"},
    "tower-inside-the-language-model": {"foreign-names", "names-not-as-stored"},
    "text-model-with-the-wrappers-names": {"foreign-names"},
    "wrapper-with-a-text-models-names": {"foreign-names", "part-missing"},
    "lora-wrapper": {"wrapped-names"},
    "tower-in-another-layout": {"foreign-names"},
    "lora-wrapper-around-experts": {"wrapped-names", "stacked-quantised-experts"},
    "underscored-scales": {"stacked-quantised-experts"},
    "stacked-experts-scales-skipped": {"stacked-quantised-experts"},
    "experts-one-by-one": {"blocks-cross-partitions"},
    "transposed-experts": {"transposed-experts"},
    "experts-without-gate": {"stacked-quantised-experts"},
    # refused
    "two-scales-for-three-partitions": {"shape-misfit"},
    "in-proj-qkvz-fused": {"unsupported-model"},
    "scales-of-half-the-width": {"unsupported-format"},
    "leaked-quantiser": {"unsupported-format"},
    "inverse-by-name": {"scale-missing", "unknown-tensor"},
    "head-without-scale": {"scale-missing"},
    "codes-without-scale": {"unsupported-format"},
    "experts-without-global-scale": {"scale-missing"},
    "expert-never-calibrated": {"scale-missing"},
    "norms-alone-shifted-by-one": {"shifted-norms"},
    "norms-shifted-by-one": {"shifted-norms"},
}


def ids(facts: dict[str, Any]) -> set[str]:
    """The kinds of defects that were found."""
    return {defect["id"] for defect in facts["defects"]}


def defect(facts: dict[str, Any], kind: str) -> dict[str, Any]:
    """The defect of a kind."""
    return next(d for d in facts["defects"] if d["id"] == kind)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_book(case: Any, make: Callable[..., Built], tmp_path: Path) -> None:
    """Each case is found; what converts has no fatal defect, and what is refused has one and is still described."""
    built = prepared(case, tmp_path / "in", make)
    facts = convert.inspect_checkpoint(built.directory)
    assert ids(facts) - EVERYWHERE == OF_CASE.get(case.name, set())
    refused = isinstance(case.outcome, Refused)
    assert facts["refused"] == refused == bool(facts["problems"])
    assert [d for d in facts["defects"] if not d["repaired"]] == [
        d for d in facts["defects"] if d["severity"] == "fatal" or d["id"] == "processor-missing"
    ]
    assert facts["family"] == built.family
    assert facts["bytes"] == sum(len(tensor.data) for tensor in read_tensors(built.directory).values())
    assert sum(kind["bytes"] for kind in facts["kinds"]) == facts["bytes"]


def test_a_healthy_checkpoint_has_no_defects(make: Callable[..., Built], cli: Cli) -> None:
    """Hub names, one scheme, vectors of scales: nothing to say."""
    built = make(family="qwen3", dialect="compressed-tensors", scheme="fp8_dynamic")
    assert convert.inspect_checkpoint(built.directory)["defects"] == []
    ran = cli("inspect", built.directory)
    assert "no defects found" in ran.out
    assert "defects, the worst first" not in ran.out


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Built], object]:
    return lambda built: edit_json(built.directory / "config.json", change)


def _quant(change: Callable[[dict[str, Any]], object]) -> Callable[[Built], object]:
    return _config(lambda config: change(config["quantization_config"]))


def _with_adapter(built: Built) -> None:
    module = "model.layers.0.self_attn.q_proj"
    stored = read_tensors(built.directory)
    n, k = stored[f"{module}.base_layer.weight"].shape
    pair = {"A": raw("BF16", np.ones((2, k))), "B": raw("BF16", np.ones((n, 2)))}
    edit_tensors(built.directory, lambda t: t.update({f"{module}.lora_{c}.default.weight": pair[c] for c in pair}))


def _twice(built: Built) -> None:
    name = "model.norm.weight"
    edit_tensors(built.directory, lambda t: t.update({f"base_model.model.{name}": t[name]}))


def _quantised_embedding(built: Built) -> None:
    name = "model.embed_tokens.weight"
    shape = read_tensors(built.directory)[name].shape
    scale = raw("F32", np.float32(0.01))
    codes = raw("F8_E4M3", np.full(shape, 0x38))
    edit_tensors(built.directory, lambda t: t.update({name: codes, f"{name}_scale": scale}))


def _stale_index(built: Built) -> None:
    edit_json(built.directory / "model.safetensors.index.json", lambda index: index["weight_map"].pop("model.norm.weight"))


FP8_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
MODELOPT = {"family": "qwen3", "dialect": "modelopt"}
# Kinds that no case of the case book is about: how it is built, what makes it so, how many names it concerns.
OTHER_KINDS: dict[str, tuple[dict[str, Any], Callable[[Built], object], int | None]] = {
    "unknown-names-quantised": (
        MODELOPT | {"scheme": "mixed"},
        _quant(lambda q: q["quantized_layers"].update({"model.layers.99.mlp.up_proj": {"quant_algo": "FP8"}})), 1),
    "group-size-differs": (NVFP4, _quant(lambda q: q.update(group_size=32)), None),
    "kv-scales-missing": (FP8, _quant(lambda q: q.update(kv_cache_scheme=FP8_CACHE)), 1),
    "kv-cache-undeclared": (FP8 | {"kv": "tensor"}, _quant(lambda q: q.pop("kv_cache_scheme")), 1),
    "drafts-undeclared": (
        {"family": "qwen3_5", "dialect": "modelopt", "scheme": "fp8", "mtp": True},
        _config(lambda c: c.update(mtp_num_hidden_layers=0)), 1),
    "separate-head-declared-tied": (FP8, _config(lambda c: c.update(tie_word_embeddings=True)), 1),
    "no-quantisation-config": (FP8, _config(lambda c: c.pop("quantization_config")), 1),
    "kv-scales-per-head": (
        {"family": "qwen3", "dialect": "compressed-tensors", "scheme": "fp8_static", "kv": "head"}, lambda built: None, None),
    "pre-quant-scales": (MODELOPT | {"scheme": "nvfp4_awq"}, lambda built: None, None),
    "quantised-embedding": (MODELOPT | {"scheme": "fp8_weight_only"}, _quantised_embedding, 1),
    "mx-from-modelopt": (MODELOPT | {"scheme": "mxfp4"}, lambda built: None, None),
    "adapter-inside": (FP8 | {"base_layer": "some"}, _with_adapter, 2),
    "stored-twice": (FP8, _twice, 1),
    "damaged-file": (FP8 | {"shards": 2}, _stale_index, 1),
    "other-contradiction": (FP8, lambda built: None, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds(kind: str, make: Callable[..., Built]) -> None:
    """Each is found where it is, with the number of names that it concerns; and not before."""
    options, change, number = OTHER_KINDS[kind]
    built = make(**options)
    change(built)
    facts = convert.inspect_checkpoint(built.directory)
    assert "other-contradiction" not in ids(facts), "every contradiction has a kind"
    if number != 0:
        found = defect(facts, kind)
        assert found["count"] == (number or found["count"]) > 0
        assert len(found["tensors"]) in (found["count"], 0)
        assert sum(found["patterns"].values()) == len(found["tensors"])
        assert facts["refused"] == (found["severity"] == "fatal")


# -- values -------------------------------------------------------------------------------------------------------------

GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def ratios(directory: Path, suffix: str) -> list[float]:
    """Largest by smallest scale of each fused group of a stored Qwen3."""
    tensors = read_tensors(directory)
    layers = sorted({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    found = []
    for layer in layers:
        for group in GROUPS:
            scales = [float(tensors[f"model.layers.{layer}.{p}.{suffix}"].floats()) for p in group]
            found.append(max(scales) / min(scales))
    return found


@pytest.mark.parametrize(
    ("options", "suffix", "kind", "effect"),
    [(NVFP4, "weight_scale_2", "global-scales-differ", "garbage"), (FP8, "weight_scale", "fp8-scales-differ", "lossy"),
     (FP8, "input_scale", "input-scales-differ", "lossy")],
    ids=["nvfp4", "fp8", "inputs"],
)  # fmt: skip
def test_partitions_that_differ(
    options: dict[str, Any], suffix: str, kind: str, effect: str, make: Callable[..., Built]
) -> None:
    """Groups are counted and the worst ratio is given; equal scales are no defect, nor without values."""
    built = make(**options)
    wanted = ratios(built.directory, suffix)
    found = defect(convert.inspect_checkpoint(built.directory), kind)
    assert (found["effect"], found["count"]) == (effect, len(wanted))
    assert found["found"] == f"{len(wanted)} of {len(wanted)} groups, ratio up to {max(wanted):.3g}"
    assert kind not in ids(convert.inspect_checkpoint(built.directory, values=False))

    def equal(tensors: dict[str, Raw]) -> None:
        for number, name in enumerate(n for n in tensors if n.endswith(suffix)):
            # FP8 scales that differ by powers of two are requantised exactly.
            tensors[name] = raw("F32", np.float32(2.0**-9 * (2.0 ** (number % 2) if suffix == "weight_scale" else 1)))

    edit_tensors(built.directory, equal)
    assert kind not in ids(convert.inspect_checkpoint(built.directory))


def test_experts_whose_input_scales_differ(make: Callable[..., Built]) -> None:
    """One stack of experts with one scale that is not that of the others."""
    built = make(**MOE, expert_scales="one")

    def one(tensors: dict[str, Raw]) -> None:
        inputs = [n for n in tensors if ".experts." in n and n.endswith("input_scale")]
        tensors.update(dict.fromkeys(inputs, raw("F32", np.float32(0.5))))
        tensors[next(n for n in inputs if ".experts.1.down_proj" in n)] = raw("F32", np.float32(0.25))

    edit_tensors(built.directory, one)
    found = defect(convert.inspect_checkpoint(built.directory), "expert-input-scales-differ")
    assert found["count"] == 1
    assert found["tensors"][0].endswith("experts.down_proj.input_scale")
    assert found["found"].endswith("ratio up to 2")


def test_divisors_where_multipliers_belong(make: Callable[..., Built]) -> None:
    """Global scales of the other convention are noticed by their size."""
    built = make(**NVFP4)
    assert "scale-direction-suspect" not in ids(convert.inspect_checkpoint(built.directory))

    def invert(tensors: dict[str, Raw]) -> None:
        for name in (n for n in tensors if n.endswith("weight_scale_2")):
            tensors[name] = raw("F32", np.float32(2688))

    edit_tensors(built.directory, invert)
    assert "scale-direction-suspect" in ids(convert.inspect_checkpoint(built.directory))


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_scales_that_a_conversion_refuses(value: float, make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """`inspect` finds them, as the conversion does; headers alone do not show them."""
    built = make(**FP8)
    name = "model.layers.1.mlp.up_proj.input_scale"
    edit_tensors(built.directory, lambda tensors: tensors.update({name: raw("F32", np.float32(value))}))
    ran = cli("inspect", built.directory)
    assert ran.code == cli(built.directory, tmp_path / "out").code == 1
    assert "FATAL" in ran.out
    assert name in ran.err
    assert cli("inspect", built.directory, "--no-values").code == 0


def test_kv_scales(make: Callable[..., Built], tmp_path: Path) -> None:
    """Their range, in a source and in what is made of it."""
    built = make(**FP8, kv="tensor")
    stored = [float(t.floats()) for n, t in read_tensors(built.directory).items() if n.endswith((".k_scale", ".v_scale"))]
    convert.convert_checkpoint(built.directory, tmp_path / "out")
    for folder in (built.directory, tmp_path / "out"):
        assert convert.inspect_checkpoint(folder)["kv_scales"] == {"min": min(stored), "max": max(stored)}


# -- what is refused ----------------------------------------------------------------------------------------------------


def _truncate(built: Built) -> None:
    file = next(built.directory.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


REFUSED: dict[str, tuple[Callable[[Built], object], str, str]] = {  # change, kind of inspection, kind of defect
    "truncated": (_truncate, "unreadable", "damaged-file"),
    "gptq": (lambda b: edit_json(b.directory / "config.json", lambda c: c["quantization_config"].update(quant_method="gptq")),
             "source", "unsupported-format"),
    "another-model": (lambda b: edit_json(b.directory / "config.json", lambda c: c.update(model_type="gpt2")),
                      "source", "unsupported-model"),
    "a-tensor-more": (lambda b: edit_tensors(b.directory, lambda t: t.update({"model.surprise.weight": raw("F32", [1.0])})),
                      "source", "unknown-tensor"),
    "a-norm-less": (lambda b: edit_tensors(b.directory, lambda t: t.pop("model.norm.weight")), "source", "tensor-missing"),
    "a-scale-less": (lambda b: edit_tensors(b.directory, lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale")),
                     "source", "scale-missing"),
    "no-config": (lambda b: (b.directory / "config.json").unlink(), "unreadable", "damaged-file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """Described as far as it can be read, with the reasons as defects; stderr has what a conversion says; the exit code too."""
    built = make(**FP8)
    change, kind, expected = REFUSED[name]
    change(built)
    ran, converted = cli("inspect", built.directory, "--json"), cli(built.directory, tmp_path / "out")
    facts = json.loads(ran.out)
    assert (ran.code, ran.err) == (1, converted.err)
    assert (facts["kind"], facts["refused"]) == (kind, True)
    assert facts.keys() == UNKNOWN.keys()
    assert expected in ids(facts)
    assert {d["severity"] for d in facts["defects"]} == {"fatal"}
    if kind == "source":
        assert facts["bytes_by_scheme"]["fp8_tensor"] > 0
        assert "FATAL" in cli("inspect", built.directory).out


# -- forms --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["source", "canonical"])
def test_parts(what: str, make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """Head, KV cache, MTP and towers in a line each; every tensor with `--tensors`; the keys that the page lists."""
    built = make(**VLM)
    folder = built.directory
    if what == "canonical":
        folder = tmp_path / "out"
        convert.convert_checkpoint(built.directory, folder)
    ran = cli("inspect", folder)
    for line in ("head: separate, nvfp4", "KV cache: FP8, ", "MTP: 1 layer, ", "tower visual: "):
        assert any(text.startswith(line) for text in ran.out.splitlines()), line
    stored = read_tensors(folder)
    facts = convert.inspect_checkpoint(folder, tensors=True)
    assert {t["name"]: (t["dtype"], tuple(t["shape"]), t["nbytes"]) for t in facts["tensor_list"]} == {
        name: (t.dtype, t.shape, len(t.data)) for name, t in stored.items()
    }
    assert facts["tensor_list"] == json.loads(cli("inspect", folder, "--tensors", "--json").out)["tensor_list"]
    lines = cli("inspect", folder, "--tensors").out.splitlines()
    assert len(lines) == len(stored)
    assert all(name in " ".join(lines) for name in stored)
    assert facts["parameters"] == sum(values.size for values in built.dense.values())


def test_json_keys_are_documented(make: Callable[..., Built]) -> None:
    """docs/inspect.md lists the keys of `--json`, those of defects and of tensors, and nothing else."""
    facts = convert.inspect_checkpoint(make(**FP8).directory, tensors=True)
    table = PAGE.partition("| key |")[2].partition("\n\n")[0]
    keys = {key for line in table.splitlines() if line.startswith("| `") for key in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert keys == facts.keys() == {*UNKNOWN, "tensor_list"}
    for row in ("defects", "tensor_list", "kinds"):
        entry = facts[row][0]
        line = next(text for text in table.splitlines() if text.startswith(f"| `{row}`"))
        assert list(entry) == re.findall(r"`(\w+)`", line.split("|")[2]), row


def test_the_tables() -> None:
    """Every pattern leads to a kind, every kind is complete, and what is fatal is not repaired."""
    for table in (CONTRADICTIONS, REPAIRS, REFUSALS):
        assert {kind for _, kind in table} <= KINDS.keys()
    for kind in KINDS.values():
        assert kind.severity in SEVERITIES
        assert kind.effect in EFFECTS
        assert kind.title
        assert kind.engines
        assert kind.repair
        assert not (kind.severity == "fatal" and kind.repaired)
    for severity in SEVERITIES:
        assert f"| `{severity}` |" in PAGE


def test_one_screen(make: Callable[..., Built], cli: Cli) -> None:
    """Names are shown by their pattern: the number of lines does not grow with experts and layers."""
    built = make(family="qwen3_moe", dialect="modelopt", scheme="nvfp4", base_layer="all")
    assert len(cli("inspect", built.directory).out.splitlines()) < 60


def test_names_reach_no_terminal(make: Callable[..., Built], cli: Cli) -> None:
    """Control characters of a config are escaped."""
    built = make(**FP8)
    edit_json(built.directory / "config.json",
              lambda c: c["quantization_config"].update(producer={"name": "\x1b[31mred", "version": "1\n2"}))  # fmt: skip
    out = cli("inspect", built.directory).out
    assert "\\x1b[31mred 1\\n2" in out
    assert all(line.isprintable() for line in out.splitlines())


# -- the page -----------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """What a page holds: its tags with attributes, its text, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(cli: Cli, folder: Path) -> Reader:
    """The page of a checkpoint, read.  It has no script, no style of its own in a tag, and loads nothing."""
    file = folder.parent / "page.html"
    cli("inspect", folder, "--html", file)
    text = file.read_text("utf-8")
    page = Reader(text)
    assert not [p for p in folder.parent.iterdir() if "partial" in p.name]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "form", "base"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "xlink:href")]
        assert str(attributes.get("href", "#")).startswith("#")
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'"
    return page


@pytest.mark.parametrize("what", ["source", "canonical", "refused"])
def test_page(what: str, make: Callable[..., Built], cli: Cli, tmp_path: Path) -> None:
    """Facts, defects, a treemap that fills its box, the tree, and histograms; cells lead to modules of the tree."""
    built = make(**VLM)
    folder = built.directory
    if what == "canonical":
        folder = tmp_path / "out"
        convert.convert_checkpoint(built.directory, folder)
    elif what == "refused":
        edit_tensors(folder, lambda t: t.pop("model.language_model.norm.weight"))
    page = page_of(cli, folder)
    text = " ".join(page.texts)
    facts = convert.inspect_checkpoint(folder)
    assert all(defect["title"] in text for defect in facts["defects"])
    boxes = [a for tag, a in page.tags if tag == "rect" and str(a.get("class")).startswith("cell")]
    area = sum(float(str(a["width"])) * float(str(a["height"])) for a in boxes)
    assert 0.98 < area / (1140 * 460) < 1.02
    assert {str(a["href"])[1:] for tag, a in page.tags if tag == "a"} <= {a.get("id") for _, a in page.tags}
    figures = sum(tag == "figure" for tag, _ in page.tags)
    assert figures == (0 if what == "refused" else len({name.partition(".mlp")[0].partition(".self")[0].partition(".linear")[0]
                                                        for name in built.modules}))  # fmt: skip


def test_page_of_hostile_names(make: Callable[..., Built], cli: Cli) -> None:
    """Names and words of configs are text, whatever they look like."""
    built = make(**FP8)
    hostile = "<b>model<script>alert(1)<script>&\"'.weight"
    edit_tensors(built.directory, lambda t: t.update({hostile: raw("F32", [1.0])}))
    producer = {"name": "<img src=x onerror=alert(1)>", "version": "1"}
    edit_json(built.directory / "config.json", lambda c: c["quantization_config"].update(producer=producer))
    page = page_of(cli, built.directory)
    assert "b" not in {tag for tag, a in page.tags if a}
    assert any(hostile.removesuffix(".weight") in text for text in page.texts)
    assert any("<img src=x onerror=alert(1)>" in text for text in page.texts)


def test_alike_modules_stand_once() -> None:
    """The tree of a model with 1,000 experts has one of them, with the number and the sizes of all."""
    rows = [
        Row(f"model.layers.{layer}.experts.{e}.{p}.weight", "U8", (4, 8 + 8 * (layer == 3)), 32, "f", "", "nvfp4")
        for layer in range(10) for e in range(100) for p in ("up", "down")
    ]  # fmt: skip
    root = tree(rows)
    fold(root, {})
    layers = root.children["model"].children["layers"]
    assert {name: child.alike for name, child in layers.children.items()} == {
        "0": ["0", "1", "2", "4", "5", "6", "7", "8", "9"], "3": ["3"],
    }  # fmt: skip
    assert list(layers.children["0"].children["experts"].children) == ["0"]
    assert (root.children["model"].tensors, root.children["model"].nbytes) == (2_000, 64_000)
    assert sum(1 for _ in render(Inspection({**UNKNOWN, "kind": "source"}, rows))) < 3500


def test_page_of_any_names_is_bounded() -> None:
    """Names without end, and thousands that have nothing in common."""
    deep = [".".join("a" * 2000), ".".join("a" * 2000 + "b")]
    wide = [f"n{i}.x{i % 7}.y{i}" for i in range(5000)]
    flat = [f"m.k{i % 100}.n{i}.z" for i in range(12_000)]
    for names in (deep, wide, flat):
        rows = [Row(name, "U8", (1,), 1, "f", "", "U8") for name in names]
        kinds = [{"kind": name, "scheme": "U8", "activations": None, "modules": 1, "bytes": 1, "share": 0.5} for name in names]
        pieces = list(render(Inspection({**UNKNOWN, "kind": "source", "kinds": kinds}, rows)))
        assert sum(map(len, pieces)) < 6_000_000
        Reader("".join(pieces))


def test_treemap_boxes() -> None:
    """Each rectangle has its share of the area, none overlaps another or leaves the box."""
    sizes = [6, 6, 4, 3, 2, 2, 1]
    boxes = squarify(sizes, (0, 0, 6, 4))
    assert [w * h for _, _, w, h in boxes] == pytest.approx(sizes)
    assert all(x >= -1e-9 and y >= -1e-9 and x + w <= 6 + 1e-9 and y + h <= 4 + 1e-9 for x, y, w, h in boxes)
    for i, (x, y, w, h) in enumerate(boxes):
        for a, b, c, d in boxes[:i]:
            assert min(x + w, a + c) - max(x, a) < 1e-9 or min(y + h, b + d) - max(y, b) < 1e-9
    assert max(max(w / h, h / w) for _, _, w, h in boxes) < 3

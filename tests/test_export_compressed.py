"""`export --to compressed-tensors`: what it writes is what it was made of, and what others make of it.

Three routes to the truth: converting the export again must give the canonical tensors it was made of; transformers with
compressed-tensors must hold the builder's dense weights; and what engines look up is asked with their own rules, which
`engine_scheme` repeats.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from build import E2M1, E4M3, RECIPES, Built, Raw, build, edit_tensors, raw, read_json, read_tensors, safetensors_bytes

import convert
from convert.requantize import divisor, to_e4m3, to_nvfp4

MODELS: dict[str, dict[str, Any]] = {
    model: {"family": name, **options} for name, family in families.FAMILIES.items() for model, options in family.models.items()
}
SCALARS = ("weight_scale", "weight_scale_2", "weight_global_scale", "weight_scale_inv")
INPUTS = ("input_scale", "input_global_scale", "activation_scale")
# What compressed-tensors has no form for, or engines refuse.
INEXACT = {("fp8", "block_e8m0"), ("modelopt", "nvfp4_awq"), ("modelopt", "mixed_inputs")}
EACH_FAMILY = (("modelopt", "fp8"), ("modelopt", "nvfp4"), ("fp8", "block"), ("modelopt", "mixed"))
SPLIT_BLOCKS = {("qwen3_5_moe", "fp8", "block"), ("qwen3_5_moe_vlm", "fp8", "block")}  # gate ends within one
ROUND_TRIPS = [
    *(("qwen3_5_vlm", *recipe, {}) for recipe in RECIPES if recipe not in INEXACT),
    *((family, *recipe, {}) for family in MODELS for recipe in EACH_FAMILY if family != "qwen3_5_vlm"
      and (family, *recipe) not in SPLIT_BLOCKS),
    ("qwen3_moe", "compressed-tensors", "mxfp4", {}),
    ("nemotron_h", "compressed-tensors", "mxfp8", {}),
    # Layers of one kind in different forms.
    ("qwen3", "modelopt", "mixed", {"rules": (("model.layers.0.mlp.*", "fp8"), ("*.mlp.*", "nvfp4"))}),
    # Gate and up of an expert differ in their inputs alone.
    ("qwen3_moe", "modelopt", "mixed", {"rules": (("*.gate_proj", "nvfp4"), ("*.up_proj", "nvfp4_wo"))}),
    ("qwen3_5", "modelopt", "fp8_pb_wo", {"sizes": "aligned"}),
    ("qwen3", "compressed-tensors", "fp8_static", {"kv": "head"}),
    ("nemotron_h", "modelopt", "fp8", {"kv": "tensor"}),
]


def equalised(directory: Path) -> None:
    """Give what engines fuse one scale: projections of a container the same one, as most producers do."""

    def change(tensors: dict[str, Raw]) -> None:
        for name, tensor in tensors.items():
            module, _, role = name.rpartition(".")
            stacked = len(tensor.shape) == 1 and "moe" in module.split(".")  # one scalar for each expert
            if role in (*SCALARS, *INPUTS) and (stacked or int(np.prod(tensor.shape)) == 1):
                container = module.rpartition(".")[0]
                unit = 3000 if "global" in role else 3e-4
                value = unit * (1 + zlib.crc32(f"{container}.{role in INPUTS}".encode()) % 1000 / 999)
                tensors[name] = raw(tensor.dtype, np.full(tensor.shape, value, np.float32))

    edit_tensors(directory, change)


def made(folder: Path, model: str, dialect: str, scheme: str, options: Mapping[str, Any], equal: bool = True) -> Built:
    """Build and convert a checkpoint below `folder`."""
    built = build(folder / "in", dialect=dialect, scheme=scheme, **(MODELS[model] | dict(options)))
    if equal:
        equalised(folder / "in")
    convert.convert_checkpoint(folder / "in", folder / "out")
    return built


def exported(folder: Path, **options: Any) -> dict[str, Any]:
    """Export what `made` left there, as compressed-tensors, to `folder / "ct"`."""
    return convert.export_checkpoint(folder / "out", folder / "ct", to="compressed-tensors", **options)


def ulps(a: Raw, b: Raw) -> int:
    """Largest distance of two float32 tensors in units of the last place."""
    return int(np.abs(np.frombuffer(a.data, "<i4").astype(np.int64) - np.frombuffer(b.data, "<i4")).max(initial=0))


@pytest.mark.parametrize(("model", "dialect", "scheme", "options"), ROUND_TRIPS, ids=lambda v: str(v) if v else "")
def test_converting_an_export_again(model: str, dialect: str, scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Export and convert: the same canonical tensors, bit for bit, and the same config; global scales by their reciprocals."""
    made(tmp_path, model, dialect, scheme, options)
    exported(tmp_path, fp8="tensor")
    report = convert.convert_checkpoint(tmp_path / "ct", tmp_path / "again")
    assert not report.contradictions
    before, after = (read_json(tmp_path / out / "config.json") for out in ("out", "again"))
    for config in (before, after):
        config.pop("hf_config")
    assert after == before
    first, second = (read_tensors(tmp_path / out) for out in ("out", "again"))
    assert first.keys() == second.keys()
    modules = before["quantization"]["modules"]
    for name, tensor in first.items():
        module, _, role = name.rpartition(".")
        divided = modules.get(module, {}).get("scheme") == "nvfp4" and role in ("weight_scale_2", "input_scale")
        if divided:
            assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape)
            assert ulps(tensor, second[name]) <= 1, name
        else:
            assert tensor == second[name], name


@pytest.mark.parametrize("fp8", ["auto", "channel"])
def test_scales_that_differ_go_to_channels(fp8: str, tmp_path: Path) -> None:
    """Per-tensor FP8 whose fused projections differ is written per channel; the weights are the same bit for bit."""
    made(tmp_path, "qwen3_5_vlm", "modelopt", "fp8", {"vector_scales": True}, equal=False)
    exported(tmp_path, fp8=fp8)
    tensors, config = read_tensors(tmp_path / "ct"), read_json(tmp_path / "ct" / "config.json")["quantization_config"]
    strategies = {group["weights"]["strategy"] for group in config["config_groups"].values()}
    assert strategies == ({"channel", "tensor"} if fp8 == "auto" else {"channel"})
    q = tensors["model.language_model.layers.0.linear_attn.in_proj_qkv.weight_scale"]
    assert q.dtype == "F32"
    assert q.shape == (tensors["model.language_model.layers.0.linear_attn.in_proj_qkv.weight"].shape[0], 1)
    assert len(set(q.floats().ravel().tolist())) == 3
    convert.convert_checkpoint(tmp_path / "ct", tmp_path / "again")
    for out in ("out", "again"):
        convert.export_checkpoint(tmp_path / out, tmp_path / f"{out}-dense")
    assert read_tensors(tmp_path / "out-dense") == read_tensors(tmp_path / "again-dense")


# ------------------------------------------------------------------------------------------------------ transformers

LOADED = [  # model, dialect, scheme, options, whether the library computes in bfloat16
    ("qwen3_tied_bias", "modelopt", "fp8", {}, False),
    ("qwen3", "modelopt", "fp8", {"kv": "tensor"}, False),
    ("qwen3", "compressed-tensors", "mxfp4", {}, True),
    ("qwen3", "compressed-tensors", "mxfp8", {}, True),
    ("qwen3_5_vlm", "modelopt", "mixed", {}, True),
    ("qwen3_5_mtp", "fp8", "block", {"sizes": "aligned"}, False),
    ("llama", "modelopt", "nvfp4", {}, True),
    ("qwen3_moe", "compressed-tensors", "fp8_dynamic", {}, False),
    ("qwen3_5_moe_vlm", "modelopt", "fp8", {}, False),
    ("nemotron_h", "modelopt", "fp8", {"kv": "tensor"}, False),
]


def loaded(directory: Path) -> Any:
    """The model that transformers makes of a directory, in float32, dequantised."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    config = transformers.AutoConfig.from_pretrained(directory)
    model_class = getattr(transformers, config.architectures[0])
    model, loading = model_class.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    # The inputs of stacked experts are never quantised there.
    assert all(k.startswith("mtp.") or ".experts." in k for k in loading["unexpected_keys"])
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.compressor.decompress_model(model)
    return model.eval()


@pytest.mark.parametrize(("model", "dialect", "scheme", "options", "rounded"), LOADED, ids=lambda v: str(v) if v else "")
def test_transformers_holds_the_same_weights(
    model: str, dialect: str, scheme: str, options: dict[str, Any], rounded: bool, tmp_path: Path
) -> None:
    """Loaded unpatched, every weight is the dense export's: FP8 bit for bit, packed forms in the library's bfloat16."""
    made(tmp_path, model, dialect, scheme, options)
    exported(tmp_path)
    convert.export_checkpoint(tmp_path / "out", tmp_path / "dense")
    held = loaded(tmp_path / "ct").state_dict()
    wanted = loaded(tmp_path / "dense").state_dict()
    missing = wanted.keys() - held.keys()
    assert not missing
    quantised = 0
    for name, value in wanted.items():
        found = held[name].float()
        limit = 2.0**-7 * value.abs().max() if rounded and not torch.equal(found, value) else 0.0
        assert (found - value).abs().max() <= limit, name
        quantised += f"{name}_scale" in held
    assert quantised


@pytest.mark.parametrize("model", ["qwen3_tied_bias", "qwen3_moe", "nemotron_h"])
def test_transformers_gives_the_same_logits(model: str, tmp_path: Path) -> None:
    """A model whose inputs are not quantised answers as the dense one does."""
    made(tmp_path, model, "compressed-tensors", "fp8_weight_only", {})
    exported(tmp_path)
    convert.export_checkpoint(tmp_path / "out", tmp_path / "dense")
    ids = torch.tensor([[1, 5, 9, 2, 7, 3]])
    with torch.no_grad():
        found, wanted = (loaded(tmp_path / form)(ids).logits for form in ("ct", "dense"))
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


# ----------------------------------------------------------------------------------------------------------- engines

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"),
          "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")}  # fmt: skip


def engine_matches(name: str, entry: str, contains: bool) -> bool:
    """Whether an entry means a name.  vLLM 0.33 compares; SGLang 0.5.23 also looks for the entry within (`contains`)."""
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return entry.lower() in name.lower() if contains else entry == name


def engine_scheme(config: dict[str, Any], name: str, contains: bool, kind: str = "RowParallelLinear") -> str | None:
    """The strategy and bits that an engine gives a layer of its own, or None; fused ones by their projections, which agree."""
    last = name.rpartition(".")[2]
    parts = [name.removesuffix(last) + part for part in PACKED.get(last, (last,))]
    ignored = {any(engine_matches(part, entry, contains) for entry in config["ignore"]) for part in parts}
    assert len(ignored) == 1, f"{name}: ignored in part"
    if ignored.pop():
        return None
    found = set()
    for part in parts:
        groups = config["config_groups"].values()
        named = [g for g in groups if any(engine_matches(part, t, False) for t in g["targets"])]
        classes = [g for g in groups if any(not t.startswith("re:") and t.lower() in kind.lower() for t in g["targets"])]
        assert named or classes, f"{part} has no group"
        weights = (named or classes)[0]["weights"]
        found.add(f"{weights['num_bits']} {weights['strategy']}")
    assert len(found) == 1, f"{name}: {found}"
    return found.pop()


LOOKED_UP = [  # model, dialect, scheme, layer of an engine -> what it is
    ("qwen3_5_vlm", "modelopt", "mixed", {
        "language_model.model.layers.1.self_attn.qkv_proj": "8 tensor",
        "language_model.model.layers.0.linear_attn.in_proj_qkvz": "8 tensor",
        "model.language_model.layers.0.linear_attn.in_proj_ba": None,
        "language_model.model.layers.0.mlp.gate_up_proj": "4 tensor_group",
        "language_model.lm_head": "4 tensor_group",
        "visual.blocks.0.attn.qkv": None,
        "model.visual.merger.linear_fc1": None,
    }),
    ("qwen3_moe", "modelopt", "fp8", {
        "model.layers.0.mlp.gate": None,
        "model.layers.0.mlp.experts.0.gate_proj": "8 tensor",
        "model.layers.0.mlp.experts.routed_experts.0.down_proj": "8 tensor",
        "model.layers.0.self_attn.o_proj": "8 tensor",
        "lm_head": None,
    }),
    ("nemotron_h", "modelopt", "mixed", {
        "model.layers.0.mixer.in_proj": "8 tensor",
        "backbone.layers.0.mixer.conv1d": None,
        "lm_head": "4 tensor_group",
    }),
    ("step3p7", "modelopt", "fp8", {
        "model.language_model.layers.1.mlp.experts.0.up_proj": "8 tensor",
        "language_model.model.layers.1.moe.experts.0.gate_proj": "8 tensor",
        "model.language_model.layers.1.mlp.shared_experts.gate_up_proj": "8 tensor",
        "model.layers.1.share_expert.gate_up_proj": "8 tensor",
        "model.layers.1.moe.gate": None,
        "vision_model.transformer.resblocks.0.attn.out_proj": None,
    }),
]  # fmt: skip


@pytest.mark.parametrize("contains", [False, True], ids=["vllm", "sglang"])
@pytest.mark.parametrize(("model", "dialect", "scheme", "layers"), LOOKED_UP, ids=[r[0] for r in LOOKED_UP])
def test_engines_find_the_scheme(
    model: str, dialect: str, scheme: str, layers: dict[str, str | None], contains: bool, tmp_path: Path
) -> None:
    """By the rules that engines publish, each layer under their name of it has its scheme, or is left alone."""
    made(tmp_path, model, dialect, scheme, {})
    exported(tmp_path)
    config = read_json(tmp_path / "ct" / "config.json")["quantization_config"]
    assert {name: engine_scheme(config, name, contains) for name in layers} == layers


def test_experts_of_a_draft_head_are_not_the_trunks(tmp_path: Path) -> None:
    """A pattern of the trunk's layers does not mean those of the MTP head or of a tower."""
    made(tmp_path, "qwen3_5_mtp", "modelopt", "mixed", {})
    exported(tmp_path)
    config = read_json(tmp_path / "ct" / "config.json")["quantization_config"]
    assert engine_scheme(config, "mtp.layers.0.mlp.gate_up_proj", False) is None
    assert engine_scheme(config, "mtp.fc", False) is None


def test_transformers_finds_the_experts_group(tmp_path: Path) -> None:
    """transformers 5.23 takes the first group with a pattern that says "experts", shared ones too: the routed come first."""
    made(tmp_path, "nemotron_h", "modelopt", "mixed", {})
    exported(tmp_path)
    groups = read_json(tmp_path / "ct" / "config.json")["quantization_config"]["config_groups"].values()
    of_experts = [group for group in groups if any("experts" in target for target in group["targets"])]
    assert [group["weights"]["num_bits"] for group in of_experts] == [4, 8]


# ------------------------------------------------------------------------------------------------- what is not exact

REFUSED = [  # model, dialect, scheme, whether scales are made equal, what the message says
    ("qwen3", "modelopt", "nvfp4", False, "one global scale for what engines fuse"),
    ("qwen3_moe", "modelopt", "nvfp4", False, "one global scale for what engines fuse"),
    ("qwen3_moe", "modelopt", "fp8", False, "--fp8 channel"),
    ("qwen3", "modelopt", "nvfp4_awq", True, "no pre_quant_scale"),
    ("qwen3", "fp8", "block_e8m0", True, "powers of two"),
]


@pytest.mark.parametrize(("model", "dialect", "scheme", "equal", "message"), REFUSED, ids=lambda v: str(v))
def test_what_has_no_exact_form_is_refused(
    model: str, dialect: str, scheme: str, equal: bool, message: str, tmp_path: Path
) -> None:
    """Refused with the remedy, and nothing is written; with `requantize` it is written, readable and measured."""
    made(tmp_path, model, dialect, scheme, {}, equal)
    with pytest.raises(convert.ConvertError, match=re.escape(message)) as refused:
        exported(tmp_path)
    assert "--requantize" in str(refused.value)
    assert not (tmp_path / "ct").exists()
    report = exported(tmp_path, requantize=True)
    json.dumps(report)
    convert.convert_checkpoint(tmp_path / "ct", tmp_path / "again")
    dense = {}
    for out in ("out", "again"):
        convert.export_checkpoint(tmp_path / out, tmp_path / f"{out}-dense")
        dense[out] = read_tensors(tmp_path / f"{out}-dense")
    changed = {c["tensor"].rpartition(".")[0]: c for c in report["requantized"] if "relative_error" in c}
    assert dense["out"].keys() == dense["again"].keys()
    for name, before in dense["out"].items():
        old, new = before.floats().astype(np.float64), dense["again"][name].floats().astype(np.float64)
        entry = changed.get(name.removesuffix(".weight"))
        if entry is None:  # a global scale may be one unit in the last place off
            assert np.allclose(old, new, rtol=2e-7 if scheme.startswith("nvfp4") else 0, atol=0), name
        else:
            measured = float(np.linalg.norm(new - old) / np.linalg.norm(old))
            assert entry["relative_error"] == pytest.approx(measured, rel=1e-3), name
            assert 0 < measured < 0.2
    assert bool(changed) == (scheme != "block_e8m0")


def test_blocks_that_cannot_be_split_are_refused(tmp_path: Path) -> None:
    """Gate and up in one stack, where a block of 128 rows belongs to both: no projection of its own has such scales."""
    made(tmp_path, "qwen3_5_moe", "fp8", "block", {})
    with pytest.raises(convert.ConvertError, match="a partition that ends within one"):
        exported(tmp_path)
    assert not (tmp_path / "ct").exists()


@pytest.mark.parametrize("fp8", ["auto", "channel"])
def test_one_scale_for_gate_and_up(fp8: str, tmp_path: Path) -> None:
    """A stack that is stored fused has one scale for gate and up of an expert: both projections get it."""
    made(tmp_path, "qwen3_5_moe", "modelopt", "fp8", {"layout": "X2"})
    exported(tmp_path, fp8=fp8)
    convert.convert_checkpoint(tmp_path / "ct", tmp_path / "again")
    for out in ("out", "again"):
        convert.export_checkpoint(tmp_path / out, tmp_path / f"{out}-dense")
    assert read_tensors(tmp_path / "out-dense") == read_tensors(tmp_path / "again-dense")


def test_input_scales_of_one_expert(tmp_path: Path) -> None:
    """Engines refuse gate and up of an expert with different input scales; of plain linears they take the largest."""
    made(tmp_path, "qwen3_moe", "modelopt", "fp8", {})
    path = tmp_path / "out" / "model-00001-of-00001.safetensors"
    tensors = read_tensors(tmp_path / "out")
    name = "model.layers.0.mlp.experts.gate_up_proj.input_scale"
    scales = tensors[name].floats().copy()
    scales[1, 1] *= 2
    attention = "model.layers.0.self_attn.qkv_proj.input_scale"
    changed = {name: raw("F32", scales), attention: raw("F32", tensors[attention].floats() * np.float32([1, 2, 1]))}
    path.write_bytes(safetensors_bytes(tensors | changed))
    with pytest.raises(convert.ConvertError, match=r"experts\.1\.gate_proj: expected one input scale") as refused:
        exported(tmp_path)
    assert len(refused.value.problems) == 1
    report = exported(tmp_path, requantize=True)
    gate = "model.layers.0.mlp.experts.1.gate_proj.input_scale"
    assert [(c["tensor"], c["factor"]) for c in report["requantized"]] == [(gate, 2)]
    assert read_tensors(tmp_path / "ct")[gate].floats().tolist() == [float(scales[1, 1])]
    assert any("largest input scale" in note for note in report["notes"])


def test_damaged_scales_are_refused(tmp_path: Path) -> None:
    """A scale that can be none: the checkpoint was damaged after its conversion."""
    made(tmp_path, "qwen3", "modelopt", "nvfp4", {})
    path = tmp_path / "out" / "model-00001-of-00001.safetensors"
    tensors = read_tensors(tmp_path / "out")
    name = "model.layers.0.self_attn.qkv_proj.weight_scale_2"
    path.write_bytes(safetensors_bytes(tensors | {name: raw("F32", np.float32([1, 0, 1]))}))
    with pytest.raises(convert.ConvertError, match=f"{re.escape(name)}: expected scales finite and greater than 0"):
        exported(tmp_path)


def test_experts_per_channel_keep_their_weights(tmp_path: Path) -> None:
    """`--fp8 channel` for experts: exact weights, inputs with a scale per token, which is what engines take."""
    made(tmp_path, "qwen3_moe", "modelopt", "fp8", {}, equal=False)
    report = exported(tmp_path, fp8="channel")
    assert {(g["scheme"], g["activations"]) for g in report["groups"]} >= {("fp8_channel", "fp8_token")}
    convert.convert_checkpoint(tmp_path / "ct", tmp_path / "again")
    for out in ("out", "again"):
        convert.export_checkpoint(tmp_path / out, tmp_path / f"{out}-dense")
    assert read_tensors(tmp_path / "out-dense") == read_tensors(tmp_path / "again-dense")


def test_nearest_codes() -> None:
    """Rounding against torch's own, and against trying every code."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 100, 5000), E4M3[:127], (E4M3[:126] + E4M3[1:127]) / 2]).astype(np.float32)
    values = np.clip(values, -448, 448)
    wanted = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(to_e4m3(values), wanted)
    weight = rng.normal(0, 0.02, (4, 64)).astype(np.float32)
    scale_2 = np.float32(np.abs(weight).max() / 2688)
    packed, scales = to_nvfp4(weight, scale_2)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(weight.shape)
    unit = np.repeat(E4M3[scales] * scale_2, 16, axis=1)
    every = np.abs(E2M1[None, None, :] * unit[:, :, None] - weight[:, :, None]).min(axis=2)
    assert np.allclose(np.abs(E2M1[codes] * unit - weight), every, rtol=1e-5, atol=1e-9)
    same, kept = to_nvfp4(E2M1[codes] * unit, scale_2, E4M3[scales])  # what has these scales already keeps its values
    again = np.stack([same & 15, same >> 4], axis=-1).reshape(weight.shape)
    assert np.array_equal(E2M1[again] * np.repeat(E4M3[kept] * scale_2, 16, axis=1), E2M1[codes] * unit)


def test_divisors() -> None:
    """The reciprocal of a stored divisor is the multiplier it was made of, wherever float32 has such a divisor."""
    rng = np.random.default_rng(1)
    one = np.float32(1)
    for g in rng.uniform(1, 4e4, 500).astype(np.float32):  # multipliers that come from divisors
        s = one / g
        assert one / divisor(s) == s
    for s in rng.uniform(1e-6, 1e-2, 500).astype(np.float32):
        assert abs(int((one / divisor(s)).view(np.int32)) - int(s.view(np.int32))) <= 1

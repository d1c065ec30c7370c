"""LoRA-wrapped checkpoints, made by peft itself: the base converts as if it had never been wrapped, the adapter comes along,
and peft loads the one on the other to the logits of the wrapped model.  The oracle is peft's and transformers' own code.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import convert

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

DECODER: Mapping[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS: Mapping[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR: Mapping[str, Any] = {
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
VISION: Mapping[str, Any] = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
IDS = torch.arange(12).view(1, -1)
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _config(kind: str) -> Any:
    match kind:
        case "dense":
            return transformers.Qwen3Config(**DECODER, intermediate_size=48, architectures=["Qwen3ForCausalLM"])
        case "tied":
            options = {**DECODER, "tie_word_embeddings": True}
            return transformers.Qwen3Config(**options, intermediate_size=48, architectures=["Qwen3ForCausalLM"])
        case "moe":
            options = {**DECODER, **EXPERTS, "intermediate_size": 48}
            return transformers.Qwen3MoeConfig(**options, architectures=["Qwen3MoeForCausalLM"])
        case "moe-vlm":
            text = {**DECODER, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16}
            return transformers.Qwen3_5MoeConfig(
                text_config=text, vision_config=VISION, tie_word_embeddings=False,
                architectures=["Qwen3_5MoeForConditionalGeneration"],
            )  # fmt: skip
        case "step":
            other = {"attention_type": "sliding_attention", "num_attention_heads": 4, "num_attention_groups": 1, "head_dim": 16}
            text = {
                "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
                "num_attention_heads": 2, "num_attention_groups": 1, "layer_types": ["full_attention", "sliding_attention"],
                "attention_other_setting": other, "moe_layers_enum": "1", "moe_num_experts": 4, "moe_top_k": 2,
                "moe_intermediate_size": 24, "share_expert_dim": 16, "sliding_window": 8, "max_position_embeddings": 64,
                "rope_theta": [5e6, 1e4], "partial_rotary_factors": [0.5, 1.0], "use_moe_router_bias": True,
                "norm_expert_weight": True, "swiglu_limits": [0.0, 7.0], "swiglu_limits_shared": [0.0, 16.0],
            }  # fmt: skip
            vision = {"width": 32, "layers": 1, "heads": 2, "patch_size": 4, "image_size": 16}
            return transformers.Step3p7Config(
                text_config=text, vision_config=vision, tie_word_embeddings=False,
                architectures=["Step3p7ForConditionalGeneration"],
            )  # fmt: skip
        case _:
            return transformers.NemotronHConfig(
                vocab_size=40, hidden_size=32, intermediate_size=48, layers_block_type=["mamba", "attention", "moe"],
                num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16, mamba_num_heads=4,
                mamba_head_dim=16, ssm_state_size=8, n_groups=2, n_routed_experts=4, num_experts_per_tok=2,
                moe_intermediate_size=24, moe_shared_expert_intermediate_size=16, n_group=1, topk_group=1,
                tie_word_embeddings=False, architectures=["NemotronHForCausalLM"],
            )  # fmt: skip


@cache
def base_model(kind: str) -> Any:
    """A tiny model with random weights in float32, the experts' included, which transformers leaves at zero."""
    torch.manual_seed(0)
    config = _config(kind)
    model = getattr(transformers, config.architectures[0])(config).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name.split("."):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def wrap(kind: str, *configs: Mapping[str, Any]) -> Any:
    """The model of a kind inside one LoRA adapter for each config, "default", then "second", all trained to something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base_model(kind)), peft.LoraConfig(**configs[0]))
        for config in configs[1:]:
            model.add_adapter("second", peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(noise + 1 if "magnitude" in name else noise)
    return model.eval()


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """A state dict that safetensors can store."""
    return {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}


def adapter_config(model: Any, name: str = "default") -> dict[str, Any]:
    """A config as peft saves it."""
    values = model.peft_config[name].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def store(folder: Path, kind: str, tensors: Mapping[str, torch.Tensor], configs: Mapping[str, Mapping[str, Any]]) -> Path:
    """A checkpoint of these tensors; `configs`: folder below it -> adapter config."""
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(base_model(kind).config.to_json_string(use_diff=False))
    for below, config in configs.items():
        (folder / below).mkdir(exist_ok=True)
        (folder / below / "adapter_config.json").write_text(json.dumps(config))
    return folder


def shards(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a canonical checkpoint."""
    return {n: t for path in sorted(folder.glob("model-*.safetensors")) for n, t in load_file(path).items()}


def logits(model: Any) -> torch.Tensor:
    """What a model says to `IDS`."""
    with torch.no_grad():
        return model(input_ids=IDS).logits


def load(folder: Path, adapter: Path | None = None) -> Any:
    """A checkpoint as transformers loads it, with an adapter as peft loads it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32)
        return (model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)).eval()


def written(adapter: Path) -> dict[str, Any]:
    """The config of an adapter of OUT."""
    return json.loads((adapter / "adapter_config.json").read_text())


@dataclass(frozen=True)
class Case:
    """`config`: of the training; `settings`: what must be in the config that is written."""

    id: str
    kind: str
    config: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


SCALED: Mapping[str, Any] = {"r": 2, "lora_alpha": 8}
CASES = [
    Case("head-saved", "dense", {**SCALED, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
         {"target_modules": ["down_proj", "q_proj"], "modules_to_save": ["lm_head"], "r": 2, "lora_alpha": 8}),
    Case("dora-and-embedding", "dense",
         {**SCALED, "use_dora": True, "use_rslora": True, "lora_dropout": 0.1, "target_modules": ["q_proj", "embed_tokens"]},
         {"use_dora": True, "use_rslora": True, "lora_dropout": 0.1, "target_modules": ["embed_tokens", "q_proj"]}),
    # peft reads "norm" as the end of any name, so all norms are saved; "model.norm" is the one
    Case("all-linear-and-norms", "dense",
         {**SCALED, "lora_bias": True, "target_modules": "all-linear", "modules_to_save": ["norm"]},
         {"lora_bias": True, "target_modules": [f"{n}_proj" for n in ("down", "gate", "k", "o", "q", "up", "v")]}),
    Case("the-last-norm", "dense", {**SCALED, "target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
         {"modules_to_save": ["model.norm"]}),
    Case("ranks-and-alphas", "dense",
         {**SCALED, "target_modules": ["q_proj", "k_proj", "v_proj"], "rank_pattern": {"0.self_attn.k_proj": 3, "v_proj": 4},
          "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 5}},
         {"rank_pattern": {r"0\.self_attn\.k_proj": 3, "v_proj": 4},
          "alpha_pattern": {r"model\.layers\.1\.self_attn\.q_proj": 5}}),
    # PiSSA changes the base when an adapter is created: a second time, on loading, would be wrong
    Case("pissa-of-one-layer", "dense",
         {**SCALED, "init_lora_weights": "pissa", "target_modules": ["q_proj"], "layers_to_transform": [1]},
         {"init_lora_weights": True, "target_modules": ["1.self_attn.q_proj"], "layers_to_transform": None}),
    Case("tied-embedding", "tied", {**SCALED, "target_modules": ["q_proj", "embed_tokens"]}),
    Case("tied-both-saved", "tied", {**SCALED, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    Case("experts-nested", "moe",
         {**SCALED, "target_modules": ["q_proj"], "target_parameters": [*FUSED, "mlp.gate.weight"],
          "rank_pattern": {"experts.down_proj": 3}},
         {"target_parameters": ["experts.down_proj", "experts.gate_up_proj", "gate.weight"], "rank_pattern": {"down_proj": 3}}),
    Case("experts-one-parameter", "moe", {**SCALED, "target_modules": [], "target_parameters": ["0.mlp.experts.down_proj"]},
         {"target_modules": [], "target_parameters": ["0.mlp.experts.down_proj"]}),
    Case("moe-vlm", "moe-vlm",
         {**SCALED, "target_modules": ["q_proj", "in_proj_qkv", "shared_expert.down_proj"], "target_parameters": FUSED,
          "modules_to_save": ["lm_head", "visual.merger"]},
         {"target_modules": ["in_proj_qkv", "q_proj", "shared_expert.down_proj"], "modules_to_save": ["lm_head", "merger"],
          "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}),
    Case("nemotron", "nemotron",
         {**SCALED, "target_modules": ["q_proj"], "target_parameters": ["experts.up_proj", "experts.down_proj"],
          "modules_to_save": ["norm_f"]}),
    Case("step", "step",
         {**SCALED, "target_modules": ["q_proj", "g_proj", "shared_experts.down_proj"],
          "target_parameters": [*FUSED, "mlp.gate.weight"], "modules_to_save": ["lm_head", "language_model.norm"]},
         {"target_parameters": ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_wrapped_model(case: Case, tmp_path: Path) -> None:
    """The export with the adapter gives the wrapped model's logits; the export alone, those of the base inside it."""
    model = wrap(case.kind, case.config)
    source = store(tmp_path / "in", case.kind, tensors_of(model), {"": adapter_config(model)})
    report = convert.convert_checkpoint(source, tmp_path / "out", verify=True)
    assert report.contradictions == [] or case.kind == "tied"
    assert report.dropped == []
    convert.export_checkpoint(tmp_path / "out", tmp_path / "export")
    assert torch.equal(logits(load(tmp_path / "export", tmp_path / "export" / "adapter")), logits(model))
    with model.disable_adapter():
        inside = logits(model)
    assert torch.equal(logits(load(tmp_path / "export")), inside)
    assert not torch.equal(logits(model), inside)

    config = written(tmp_path / "out" / "adapter")
    assert {key: config[key] for key in case.settings} == case.settings
    # peft's own file has the same names and bytes, and beside them copies of base weights that it thinks useful.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peft.get_peft_model_state_dict(model)
    expected = {n: t for n, t in expected.items() if not n.endswith(".base_layer.weight")}
    found = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    if case.kind == "nemotron":  # the hub says `backbone`, which transformers and peft rename as they load
        found = {n.replace("base_model.model.backbone.", "base_model.model.model."): t for n, t in found.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["dense", "moe", "moe-vlm"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_canonical_tensors_do_not_change(kind: str, prefix: str, tmp_path: Path) -> None:
    """Wrapped or not, whole state dict or that of the inner model: the same canonical tensors and config."""
    config = {**SCALED, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head", "model.norm"]}
    config |= {} if kind == "dense" else {"target_parameters": FUSED}
    wrapped = {prefix + n.removeprefix("base_model.model."): t for n, t in tensors_of(wrap(kind, config)).items()}
    store(tmp_path / "wrapped", kind, wrapped, {})
    store(tmp_path / "plain", kind, tensors_of(base_model(kind)), {})
    for name in ("wrapped", "plain"):
        convert.convert_checkpoint(tmp_path / name, tmp_path / f"{name}-out", verify=True)
    found, expected = shards(tmp_path / "wrapped-out"), shards(tmp_path / "plain-out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "wrapped-out" / "config.json").read_bytes() == (tmp_path / "plain-out" / "config.json").read_bytes()
    assert not (tmp_path / "plain-out" / "adapter").exists()


def test_several_adapters(tmp_path: Path) -> None:
    """Each adapter has a folder of its own, and its own config: peft keeps that of "default" at the top."""
    first = {**SCALED, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = wrap("dense", first, {"r": 3, "lora_alpha": 4, "target_modules": ["v_proj", "q_proj"]})
    configs = {"": adapter_config(model), "second": adapter_config(model, "second")}
    source = store(tmp_path / "in", "dense", tensors_of(model), configs)
    report = convert.convert_checkpoint(source, tmp_path / "out", verify=True)
    assert report.contradictions == []
    assert [a["directory"] for a in report.adapters] == ["adapter/default", "adapter/second"]
    assert not (tmp_path / "out" / "second").exists()
    convert.export_checkpoint(tmp_path / "out", tmp_path / "export")
    for name in ("default", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(load(tmp_path / "export", tmp_path / "out" / "adapter" / name)), logits(model))


def test_unknown_alpha_is_said(tmp_path: Path) -> None:
    """Ranks show in the shapes, lora_alpha nowhere: it is written as the rank, module by module, and the report says so."""
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 4}}
    model = wrap("dense", {**config, "alpha_pattern": {"v_proj": 4}})
    report = convert.convert_checkpoint(store(tmp_path / "in", "dense", tensors_of(model), {}), tmp_path / "out", verify=True)
    assert len(report.contradictions) == 1
    assert all(word in report.contradictions[0] for word in ("lora_alpha", "default", "not known", "r = 2"))
    found = written(tmp_path / "out" / "adapter")
    assert (found["lora_alpha"], found["rank_pattern"], found["alpha_pattern"]) == (2, {"v_proj": 4}, {"v_proj": 4})
    convert.export_checkpoint(tmp_path / "out", tmp_path / "export")
    assert torch.equal(logits(load(tmp_path / "export", tmp_path / "out" / "adapter")), logits(model))


def test_tensors_win_over_a_stale_config(tmp_path: Path) -> None:
    """A config of another rank and other targets: what the tensors say is written, and the rank is reported."""
    model = wrap("dense", {**SCALED, "target_modules": ["q_proj"]})
    stale = {**adapter_config(model), "r": 16, "target_modules": ["o_proj"], "bias": "all", "modules_to_save": ["lm_head"]}
    source = store(tmp_path / "in", "dense", tensors_of(model), {"": stale})
    report = convert.convert_checkpoint(source, tmp_path / "out")
    assert ["r = 16" in line and "rank 2" in line for line in report.contradictions] == [True]
    found = written(tmp_path / "out" / "adapter")
    assert (found["r"], found["target_modules"], found["modules_to_save"], found["bias"]) == (2, ["q_proj"], None, "none")


def test_outer_wrapper_of_the_first_parameter(tmp_path: Path) -> None:
    """Wrappers that were nested the other way round are told by their shapes and written as peft nests them."""
    model = wrap("moe", {**SCALED, "target_modules": ["q_proj"], "target_parameters": FUSED})
    tensors, swapped = tensors_of(model), {}
    for name, tensor in tensors.items():
        inner = name.replace(".experts.lora_", ".experts.base_layer.lora_")
        swapped[inner if inner != name else name.replace(".experts.base_layer.lora_", ".experts.lora_")] = tensor
    source = store(tmp_path / "in", "moe", swapped, {"": adapter_config(model)})
    convert.convert_checkpoint(source, tmp_path / "out", verify=True)
    convert.export_checkpoint(tmp_path / "out", tmp_path / "export")
    assert torch.equal(logits(load(tmp_path / "export", tmp_path / "out" / "adapter")), logits(model))


def test_modules_of_transformers_are_those_of_the_hub(tmp_path: Path) -> None:
    """Step's modules are not called as on the hub: a state dict and what `save_pretrained` makes of it are one trunk."""
    store(tmp_path / "modules", "step", tensors_of(base_model("step")), {})
    base_model("step").save_pretrained(tmp_path / "hub")
    for name in ("modules", "hub"):
        convert.convert_checkpoint(tmp_path / name, tmp_path / f"{name}-out", verify=True)
    found, expected = ({n: t for n, t in shards(tmp_path / f"{name}-out").items() if n.startswith(("model.", "lm_head."))}
                       for name in ("modules", "hub"))  # fmt: skip
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def of_single_experts(kind: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A wrapped checkpoint in which each expert has an adapter of its own, and the same with the adapters merged."""
    base_model(kind).save_pretrained(folder / "hub")
    wrapped, merged = {}, {}
    generator = torch.Generator().manual_seed(3)
    for name, weight in load_file(folder / "hub" / "model.safetensors").items():
        module = name.removesuffix(".weight")
        merged[name], wrapped[f"base_model.model.{name}"] = weight, weight
        if module.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj", "gate", "q_proj"):
            a = torch.randn(2, weight.shape[1], generator=generator) * 0.2
            b = torch.randn(weight.shape[0], 2, generator=generator) * 0.2
            merged[name] = weight + 4 * b @ a
            wrapped[f"base_model.model.{module}.base_layer.weight"] = wrapped.pop(f"base_model.model.{name}")
            wrapped[f"base_model.model.{module}.lora_A.default.weight"] = a
            wrapped[f"base_model.model.{module}.lora_B.default.weight"] = b
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
    return store(folder / "in", kind, wrapped, {"": config}), merged


def test_experts_one_by_one(tmp_path: Path) -> None:
    """A checkpoint from transformers 4, where each expert was a module: peft 0.21 fuses such adapters as it loads them."""
    source, merged = of_single_experts("moe", tmp_path)
    assert convert.convert_checkpoint(source, tmp_path / "out", verify=True).contradictions == []
    convert.export_checkpoint(tmp_path / "out", tmp_path / "export")
    store(tmp_path / "merged", "moe", merged, {})
    found = logits(load(tmp_path / "export", tmp_path / "out" / "adapter"))
    # W x + B (A x) against (W + B A) x: the same up to float32 rounding.
    torch.testing.assert_close(found, logits(load(tmp_path / "merged")), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["nemotron", "moe-vlm"])
def test_experts_one_by_one_that_peft_leaves_out(kind: str, tmp_path: Path) -> None:
    """Other families' adapters of single experts are written and not fused by peft: this is said, and it is so."""
    source, merged = of_single_experts(kind, tmp_path)
    report = convert.convert_checkpoint(source, tmp_path / "out", verify=True)
    assert ["single experts" in line and "peft" in line for line in report.contradictions] == [True]
    names = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    singles = sum(".experts.3.up_proj." in name for name in merged)
    assert singles
    assert sum(".experts.3.up_proj.lora_" in name for name in names) == 2 * singles
    convert.export_checkpoint(tmp_path / "out", tmp_path / "export")
    store(tmp_path / "merged", kind, merged, {})
    found = logits(load(tmp_path / "export", tmp_path / "out" / "adapter"))
    assert not torch.allclose(found, logits(load(tmp_path / "merged")), rtol=0, atol=1e-3)  # else the note is out of date


def test_saved_module_without_its_original(tmp_path: Path) -> None:
    """Where only the trained copy is in the files, the base has no other weights: it takes them, and this is reported."""
    model = wrap("dense", {**SCALED, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    tensors = tensors_of(model)
    del tensors["base_model.model.lm_head.original_module.weight"]
    source = store(tmp_path / "in", "dense", tensors, {"": adapter_config(model)})
    report = convert.convert_checkpoint(source, tmp_path / "out", verify=True)
    assert any("lm_head.modules_to_save.default.weight is the base's" in line for line in report.repairs)
    convert.export_checkpoint(tmp_path / "out", tmp_path / "export")
    assert torch.equal(logits(load(tmp_path / "export", tmp_path / "out" / "adapter")), logits(model))


def test_adapter_files_are_not_left_behind(tmp_path: Path) -> None:
    """The old adapter_config.json would make transformers look for an adapter beside the exported base."""
    model = wrap("dense", {**SCALED, "target_modules": ["q_proj"]})
    source = store(tmp_path / "in", "dense", tensors_of(model), {"": adapter_config(model)})
    (source / "adapter").mkdir()
    (source / "adapter" / "adapter_config.json").write_text("{}")
    (source / "adapter" / "notes.txt").write_text("side files are carried")
    report = convert.convert_checkpoint(source, tmp_path / "out", verify=True)
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*adapter*") if p.is_file()}
    assert files == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert {"adapter/notes.txt", *files} <= {output["file"] for output in report.outputs}
    assert convert.verify_digests(tmp_path / "out") == len(report.outputs)


def test_what_people_see(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """The plan, the report and `inspect` name the adapter."""
    model = wrap("dense", {**SCALED, "target_modules": ["q_proj"]})
    source = store(tmp_path / "in", "dense", tensors_of(model), {"": adapter_config(model)})
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    line = "adapter default: LoRA r 2, lora_alpha 8, 4 tensors, "
    planned = cli(source, tmp_path / "out", "--dry-run").out
    assert line in planned
    assert f"-> {name} F32 [2, 32]" in planned
    assert name in json.loads(cli(source, tmp_path / "out", "--dry-run", "--json").out)["adapters"][0]["tensors"]
    assert cli(source, tmp_path / "out").code == 0
    assert name in json.loads((tmp_path / "out" / "conversion.json").read_text())["adapters"][0]["tensors"]
    for folder in (source, tmp_path / "out"):
        assert line in cli("inspect", folder).out


Q = "base_model.model.model.layers.0.self_attn.q_proj"
E0 = "base_model.model.model.layers.0.mlp.experts"


def _twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = tensors[f"{Q}.lora_A.default.weight"].clone()


def _both_copies(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.original_module.weight"].clone()


def _half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{Q}.lora_B.default.weight"]


def _only_saved(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if ".lora_" in n]:
        del tensors[name]


def _ranks(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.default.weight"] = torch.ones(3, 32)


def _swapped_sizes(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("lora_A", "lora_B"):  # as peft wrote adapters of out-major experts before it looked at their orientation
        other = tensors[f"{E0}.{'lora_B' if part == 'lora_A' else 'lora_A'}.default.weight"]
        tensors[f"{E0}.new_{part}"] = other.T.contiguous()
    for part in ("lora_A", "lora_B"):
        tensors[f"{E0}.{part}.default.weight"] = tensors.pop(f"{E0}.new_{part}")


def _unknown_module(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("lora_A", "lora_B"):
        tensors[f"base_model.model.model.layers.0.mlp.extra.{part}.default.weight"] = torch.ones(2, 2)


def _engine_module(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("lora_A", "lora_B"):
        name = f"{Q.removesuffix('q_proj')}qkv_proj.{part}.default.weight"
        tensors[name] = tensors.pop(f"{Q}.{part}.default.weight")


def _folder_name(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if ".default." in n]:
        tensors[name.replace(".default.", ".a:b.")] = tensors.pop(name)


def _ada(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_E.default"] = torch.ones(2, 1)


REFUSED: tuple[tuple[str, Callable[[dict[str, torch.Tensor]], None], tuple[str, ...]], ...] = (
    ("two-prefixes", _twice, ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "one source", "stale")),
    ("original-beside-the-bare-name", _both_copies, ("lm_head", "one source for lm_head.weight", "stale")),
    ("one-half", _half, (f"{Q}.lora_A.default.weight", "only one of them")),
    ("saved-modules-alone", _only_saved, ("lm_head.modules_to_save.default.weight", "lora_A and lora_B of adapter default")),
    ("ranks-differ", _ranks, (f"{Q}.lora_A.default.weight", "lora_A [r, in]", "[3, 32] and [32, 2]")),
    ("experts-of-other-sizes", _swapped_sizes, (f"{E0}.lora_A.default.weight", "gate_up_proj [48, 32]", "merge")),
    ("module-that-is-not-there", _unknown_module, ("mlp.extra.lora_A.default.weight", "unknown module")),
    ("module-of-an-engine", _engine_module, ("qkv_proj.lora_A.default.weight", "unknown module")),
    ("name-that-is-no-folder", _folder_name, ("'a:b'", "rename")),
    ("adalora", _ada, (f"{Q}.lora_E.default", "AdaLoRA", "merge")),
)


@pytest.mark.parametrize(("breaks", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(breaks: Callable[[dict[str, torch.Tensor]], None], words: tuple[str, ...], tmp_path: Path) -> None:
    """Adapters that could not be written so that peft loads them are refused by name, and nothing is written."""
    config = {**SCALED, "target_modules": ["q_proj"], "target_parameters": FUSED, "modules_to_save": ["lm_head"]}
    model = wrap("moe", config)
    tensors = tensors_of(model)
    breaks(tensors)
    source = store(tmp_path / "in", "moe", tensors, {"": adapter_config(model)})
    with pytest.raises(convert.ConvertError) as error:
        convert.convert_checkpoint(source, tmp_path / "out")
    lines = str(error.value).splitlines()
    assert any(all(word in line for word in words) for line in lines), lines
    assert {p.name for p in tmp_path.iterdir()} == {"in"}


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    """A config of another method beside LoRA's tensors, and a folder that holds nothing but an adapter."""
    model = wrap("dense", {**SCALED, "target_modules": ["q_proj"]})
    other = {**adapter_config(model), "peft_type": "XLORA"}
    source = store(tmp_path / "in", "dense", tensors_of(model), {"": other})
    with pytest.raises(convert.ConvertError, match=r"adapter_config\.json: peft_type: expected LORA, found XLORA"):
        convert.convert_checkpoint(source, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(convert.ConvertError, match="convert its base model, or merge the adapter"):
        convert.convert_checkpoint(tmp_path / "adapter", tmp_path / "out")


def _change_byte(adapter: Path) -> None:
    data = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(data)


def _change_config(adapter: Path) -> None:
    config = written(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))


def _lose_tensor(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, adapter / "adapter_model.safetensors")


def _lose_adapter(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def _add_adapter(adapter: Path) -> None:
    (adapter / "more").mkdir()
    save_file({"a": torch.ones(1)}, adapter / "more" / "adapter_model.safetensors")


DAMAGED: tuple[tuple[Callable[[Path], None], str], ...] = (
    (_change_byte, "something else"),
    (_change_config, "lora_alpha: expected 8, found 9"),
    (_lose_tensor, "expected a tensor, found none"),
    (_lose_adapter, "expected an adapter, found none"),
    (_add_adapter, "expected no adapter, found one"),
)


@pytest.mark.parametrize(("damage", "words"), DAMAGED, ids=[d[0].__name__.strip("_") for d in DAMAGED])
def test_verify_reads_adapters(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    """`verify` compares adapters as it compares the base."""
    model = wrap("dense", {**SCALED, "target_modules": ["q_proj"]})
    source = store(tmp_path / "in", "dense", tensors_of(model), {"": adapter_config(model)})
    convert.convert_checkpoint(source, tmp_path / "out")
    convert.verify_conversion(source, tmp_path / "out")
    damage(tmp_path / "out" / "adapter")
    with pytest.raises(convert.ConvertError, match=words):
        convert.verify_conversion(source, tmp_path / "out")

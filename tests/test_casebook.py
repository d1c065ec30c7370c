"""The case book: failures met in public trackers, each reproduced as a tiny checkpoint.

A case is built whole (`build` options, or one of the hand-made checkpoints below), then made ill by `change`.  Either it is
*repaired*: every canonical tensor, module and fact is what the builder says it stands for, and conversion.json tells what was
done; or it is *refused*: one line says which tensor is wrong, and nothing is written.

`docs/casebook.md` is made from the same table: `python tests/test_casebook.py` writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from build import Built, Raw, edit_json, edit_tensors, join, raw, read_json, read_tensors, stack, write_json, write_shards
from conftest import Ran

import convert

PAGE = Path(__file__).parents[1] / "docs" / "casebook.md"
GITHUB = "https://github.com/"
# "two words ... more words": both, in this order, within one line.
Line = str
Change = Callable[[Built], object]


def as_built(built: Built) -> None:
    """No change: the checkpoint is ill as its producer writes it."""


@dataclass(frozen=True)
class Repaired:
    """Converts to what the builder says.

    repairs         lines that conversion.json must hold, among others
    contradictions  lines that it must hold, and no others
    dropped         ends of the names of tensors that are not carried: all of them
    """

    repairs: tuple[Line, ...] = ()
    contradictions: tuple[Line, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """Nothing is written; one line of the message is `says`."""

    says: Line


@dataclass(frozen=True)
class Case:
    """One failure.

    link     where it was met: owner/repository#number, or how it was found
    wrong    what is wrong with the checkpoint, or what others make of it
    source   how the checkpoint is built
    change   makes it ill; where that changes what it stands for, the expectation in `Built` too
    differ   a pattern of canonical names whose values must not all be equal, or the case would be about nothing
    """

    name: str
    link: str
    wrong: str
    source: Mapping[str, Any] | Callable[[Path], Built]
    outcome: Repaired | Refused
    change: Change = as_built
    differ: str = ""


# ------------------------------------------------------------------------------------------------- sources and changes

QWEN35: dict[str, Any] = {"family": "qwen3_5", "dialect": "modelopt"}
FP8 = QWEN35 | {"scheme": "fp8"}
NVFP4 = QWEN35 | {"scheme": "nvfp4"}
MIXED = QWEN35 | {"scheme": "mixed"}
DENSE = {"family": "qwen3_5", "dialect": "dense", "scheme": "bf16"}
QWEN3_FP8: dict[str, Any] = {"family": "qwen3", "dialect": "modelopt", "scheme": "fp8"}
MOE = NVFP4 | {"family": "qwen3_5_moe"}
MOE_FP8 = FP8 | {"family": "qwen3_5_moe"}
CT: dict[str, Any] = {"family": "qwen3_5", "dialect": "compressed-tensors"}
VLM = {"wrapper": True}
DRAFTS = {"wrapper": True, "mtp": True}

GDN, ATTENTION, MLP = "model.layers.0.linear_attn", "model.layers.0.self_attn", "model.layers.0.mlp"
PREFIX = "prefix model.language_model.* -> model.*"
SCALARS = "0-d scalar stored as a vector"
FUSED = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj", "gate": "gate_up_proj", "up": "gate_up_proj"}


def tensors(change: Callable[[dict[str, Raw]], object]) -> Change:
    """Change the stored tensors."""
    return lambda built: edit_tensors(built.directory, change)


def config(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change config.json."""
    return lambda built: edit_json(built.directory / "config.json", change)


def quantization(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the quantisation config of config.json."""
    return config(lambda c: change(c["quantization_config"]))


def legacy(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change hf_quant_config.json."""
    return lambda built: edit_json(built.directory / "hf_quant_config.json", lambda c: change(c["quantization"]))


def ignore(rewrite: Callable[[str], str | None], *more: str) -> Change:
    """Rewrite each entry of the ignore list (None: leave it out), and add more."""
    return quantization(lambda q: q.update(ignore=[n for e in q["ignore"] if (n := rewrite(e)) is not None] + list(more)))


def renamed(pattern: str, replacement: str) -> Change:
    """Rename stored tensors by a regular expression."""

    def rename(stored: dict[str, Raw]) -> None:
        for name in list(stored):
            stored[re.sub(pattern, replacement, name)] = stored.pop(name)

    return tensors(rename)


def put(name: str, tensor: Callable[[Raw], Raw]) -> Change:
    """Replace one stored tensor by what `tensor` makes of it."""
    return tensors(lambda stored: stored.update({name: tensor(stored[name])}))


def lose(pattern: str) -> Change:
    """Remove stored tensors whose name matches."""

    def remove(stored: dict[str, Raw]) -> None:
        gone = [name for name in stored if re.search(pattern, name)]
        assert gone
        for name in gone:
            del stored[name]

    return tensors(remove)


def forget(pattern: str) -> Change:
    """Expect no canonical tensor or module whose name matches."""

    def change(built: Built) -> None:
        for table in (built.canonical, built.modules):
            for name in [name for name in table if re.search(pattern, name)]:
                del table[name]

    return change


def fused(module: str, parts: tuple[str, ...], one_scale: bool = False) -> Change:
    """Store projections as an engine does: rows in one tensor, one scale for each, or one for all (expected everywhere)."""

    def change(built: Built) -> None:
        below = module.rpartition(".")[0]

        def rewrite(stored: dict[str, Raw]) -> None:
            for role in ("weight", "weight_scale", "input_scale"):
                own = [stored.pop(f"{below}.{part}.{role}") for part in parts]
                if role == "weight":
                    stored[f"{module}.weight"] = join(own)
                    codes = own
                elif one_scale:
                    if role == "weight_scale":
                        built.dense.update({f"{below}.{p}.weight": c.floats() * own[0].floats() for p, c in zip(parts, codes)})
                    stored[f"{module}.{role}"] = own[0]
                    built.canonical[f"{module}.{role}"] = raw("F32", np.repeat(own[0].floats(), len(parts)))
                else:
                    stored[f"{module}.{role}"] = stack(own)

        edit_tensors(built.directory, rewrite)

    return change


def shift_norms(stored: dict[str, Raw]) -> None:
    """What MLX converters do to Qwen3.5: norms hold 1 + w, and the axes of conv1d are exchanged."""
    for name, tensor in list(stored.items()):
        if name.endswith("conv1d.weight"):
            channels, _, kernel = tensor.shape
            stored[name] = Raw(tensor.dtype, (channels, kernel, 1), tensor.data)
        elif name.endswith("norm.weight") and "linear_attn" not in name:
            stored[name] = raw(tensor.dtype, tensor.floats() + 1)


def shift_norms_alone(stored: dict[str, Raw]) -> None:
    """The same with conv1d as it was."""
    kept = {name: tensor for name, tensor in stored.items() if name.endswith("conv1d.weight")}
    shift_norms(stored)
    stored.update(kept)


def lost_drafts(built: Built) -> None:
    """What save_pretrained does to Qwen3.5: the config declares the MTP head, no tensor is left."""
    lose(r"^mtp\.")(built)
    forget(r"^mtp\.")(built)
    for name in [name for name in built.dense if name.startswith("mtp.")]:
        del built.dense[name]
    built.carried.remove("mtp")
    built.architecture["mtp_num_hidden_layers"] = 0


def w4a16_with_scales(built: Built) -> None:
    """The label of a W4A4 checkpoint changed to W4A16 by hand: input scales are stored, and of no use."""
    quantization(lambda q: q.update(quant_algo="W4A16_NVFP4", config_groups={}))(built)
    for name in [name for name in built.canonical if name.endswith(".input_scale")]:
        del built.canonical[name]
    for entry in built.modules.values():
        entry["activations"] = None


def one_kv_scale(built: Built) -> None:
    """What AutoFP8 stores: one scale of the cache for each layer, and a word of its config."""
    attentions = sorted({name.rpartition(".q_proj.")[0] for name in built.disk if ".q_proj." in name})
    for i, attention in enumerate(attentions):
        scale = raw("F32", np.float32([0.013 * (i + 1)]))
        edit_tensors(built.directory, lambda s, a=attention, k=scale: s.update({f"{a}.kv_scale": Raw("F32", (), k.data)}))
        built.canonical.update({f"{attention}.k_scale": scale, f"{attention}.v_scale": scale})
        built.kv_cache[attention] = "tensor"
    quantization(lambda q: q.update(kv_cache_scheme="static"))(built)


def entries(rewrite: Mapping[str, str]) -> Change:
    """Call projections by the names of fused modules in `quantized_layers`; `rewrite`: last segment -> that of the module."""

    def spelt(name: str) -> str:
        below, dot, last = name.rpartition(".")
        return f"{below}{dot}{rewrite.get(last, last)}"

    return quantization(lambda q: q.update(quantized_layers={spelt(n): e for n, e in q["quantized_layers"].items()}))


def split_tower(built: Built) -> None:
    """The RADIO tower with queries, keys and values apart, below the wrapper."""
    whole = "vision_model.radio_model.model.blocks.0.attn.qkv"

    def split(stored: dict[str, Raw]) -> None:
        for role in ("weight", "bias"):
            del built.canonical[f"{whole}.{role}"]
            values = stored.pop(f"{whole}.{role}").floats()
            for part, rows in zip("qkv", np.split(values, 3), strict=True):
                name = f"{whole.removesuffix('qkv')}{part}_proj.{role}"
                stored[f"language_model.{name}"] = built.canonical[name] = raw("BF16", rows)
                built.dense[name] = built.canonical[name].floats()
            del built.dense[f"{whole}.{role}"]

    edit_tensors(built.directory, split)


def side_file(name: str, content: bytes) -> Change:
    """Put a file beside the weights; that OUT has it byte for byte is checked in every case."""
    return lambda built: (built.directory / name).write_bytes(content)


# --------------------------------------------------------------------------------------------- checkpoints made by hand

H, V = 64, 80  # hidden size and vocabulary
MODELOPT = {"quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.47.0"}}
FP8_ENTRY = {"quant_algo": "FP8"}
NVFP4_ENTRY = {"quant_algo": "NVFP4", "group_size": 16}


@dataclass
class Hand:
    """A checkpoint that grows tensor by tensor: what is stored, and the canonical tensor that it must become."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))
    stored: dict[str, Raw] = field(default_factory=dict)
    canonical: dict[str, Raw] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)

    def dense(self, canonical: str, *shape: int, name: str = "", dtype: str = "BF16") -> None:
        """A tensor that is carried as it is."""
        tensor = raw(dtype, self.rng.normal(0, 0.05, shape))
        self.stored[name or canonical] = self.canonical[canonical] = tensor

    def rows(self, canonical: str, parts: Mapping[str, int], columns: int, below: str) -> None:
        """Unquantised projections that are fused."""
        found = {n: raw("BF16", self.rng.normal(0, 0.05, (rows, columns))) for n, rows in parts.items()}
        self.stored |= {f"{below}.{n}.weight": tensor for n, tensor in found.items()}
        self.canonical[f"{canonical}.weight"] = join(found.values())

    def scalar(self) -> Raw:
        """A 0-d F32 scale."""
        return raw("F32", np.float32(self.rng.uniform(1e-4, 1e-2)))

    def fp8(self, canonical: str, name: str, columns: int, partitions: list[list[Any]]) -> None:
        """A projection with one scale for all its partitions."""
        n, p = sum(rows for _, rows in partitions), len(partitions)
        codes = self.rng.integers(0, 0x7E, (n, columns), np.uint8)
        self.stored[f"{name}.weight"] = self.canonical[f"{canonical}.weight"] = raw("F8_E4M3", codes)
        for role in ("weight_scale", "input_scale"):
            self.stored[f"{name}.{role}"] = scale = self.scalar()
            self.canonical[f"{canonical}.{role}"] = raw("F32", np.repeat(scale.floats(), p))
        self.modules[canonical] = {"scheme": "fp8_tensor", "shape": [n, columns], "activations": "fp8_static"}
        if p > 1:
            self.modules[canonical]["partitions"] = partitions

    def experts(self, canonical: str, names: list[list[str]], rows: int, columns: int, parts: tuple[str, ...] = ()) -> None:
        """NVFP4 experts stored one by one.  `names`: the projections of each expert, fused in this order into `parts`."""
        roles: dict[str, list[Raw]] = {}
        for projections in names:
            own: dict[str, list[Raw]] = {}
            for name in projections:
                found = {
                    "weight": raw("U8", self.rng.integers(0, 256, (rows, columns // 2), np.uint8)),
                    "weight_scale": raw("F8_E4M3", self.rng.integers(1, 0x7F, (rows, columns // 16), np.uint8)),
                    "weight_scale_2": self.scalar(),
                    "input_scale": self.scalar(),
                }
                self.stored |= {f"{name}.{role}": tensor for role, tensor in found.items()}
                for role, tensor in found.items():
                    vector = Raw(tensor.dtype, tensor.shape or (1,), tensor.data)
                    own.setdefault(role, []).append(vector)
            for role, vectors in own.items():
                roles.setdefault(role, []).append(join(vectors))
        self.canonical |= {f"{canonical}.{role}": stack(rows_of) for role, rows_of in roles.items()}
        self.modules[canonical] = {
            "scheme": "nvfp4", "shape": [rows * len(names[0]), columns], "activations": "nvfp4", "experts": len(names),
        }  # fmt: skip
        if parts:
            self.modules[canonical]["partitions"] = [[part, rows] for part in parts]

    def write(self, folder: Path, family: str, content: Mapping[str, Any], carried: list[str], **facts: Any) -> Built:
        """Write the files, and return the expectation."""
        folder.mkdir(parents=True)
        write_json(folder / "config.json", content)
        write_shards(folder, self.stored)
        return Built(
            folder, family, dense={}, division={}, canonical=self.canonical, modules=self.modules, kv_cache={}, unfused={},
            carried=carried, architecture=facts, disk={},
        )  # fmt: skip


def nemotron(folder: Path) -> Built:
    """Nemotron-H with one block of each kind and a draft head: FP8 Mamba projections, NVFP4 experts, the rest BF16."""
    hand, out = Hand(), "model.layers"
    hand.dense("model.embed_tokens.weight", V, H, name="backbone.embeddings.weight")
    for i in range(3):
        hand.dense(f"{out}.{i}.norm.weight", H, name=f"backbone.layers.{i}.norm.weight")
    mamba, mixer = f"{out}.0.mixer", "backbone.layers.0.mixer"
    hand.fp8(f"{mamba}.in_proj", f"{mixer}.in_proj", H, [["z", 64], ["x", 64], ["B", 32], ["C", 32], ["dt", 4]])
    hand.fp8(f"{mamba}.out_proj", f"{mixer}.out_proj", 64, [["", H]])
    shapes = {"conv1d.weight": (128, 1, 4), "conv1d.bias": (128,), "A_log": (4,), "D": (4,), "dt_bias": (4,)}
    for name, shape in (shapes | {"norm.weight": (64,)}).items():
        hand.dense(f"{mamba}.{name}", *shape, name=f"{mixer}.{name}")
    for attention, mixer in ((f"{out}.1.mixer", "backbone.layers.1.mixer"), ("mtp.layers.0.mixer", "mtp.layers.0.mixer")):
        hand.rows(f"{attention}.qkv_proj", {"q_proj": 64, "k_proj": 32, "v_proj": 32}, H, mixer)
        hand.dense(f"{attention}.o_proj.weight", H, 64, name=f"{mixer}.o_proj.weight")
    moe, mixer = f"{out}.2.mixer", "backbone.layers.2.mixer"
    hand.dense(f"{moe}.gate.weight", 3, H, name=f"{mixer}.gate.weight")
    hand.dense(f"{moe}.gate.e_score_correction_bias", 3, name=f"{mixer}.gate.e_score_correction_bias", dtype="F32")
    hand.experts(f"{moe}.experts.up_proj", [[f"{mixer}.experts.{e}.up_proj"] for e in range(3)], 48, H)
    hand.experts(f"{moe}.experts.down_proj", [[f"{mixer}.experts.{e}.down_proj"] for e in range(3)], H, 48)
    for name, shape in (("up_proj", (32, H)), ("down_proj", (H, 32))):
        hand.dense(f"{moe}.shared_experts.{name}.weight", *shape, name=f"{mixer}.shared_experts.{name}.weight")
    hand.dense("model.norm_f.weight", H, name="backbone.norm_f.weight")
    hand.dense("lm_head.weight", V, H)
    for name, shape in {"enorm": (H,), "hnorm": (H,), "eh_proj": (H, 2 * H), "norm": (H,), "final_layernorm": (H,)}.items():
        hand.dense(f"mtp.layers.0.{name}.weight", *shape)
    layers: dict[str, Any] = {"backbone.layers.0.mixer.in_proj": FP8_ENTRY, "backbone.layers.0.mixer.out_proj": FP8_ENTRY}
    layers |= {f"{mixer}.experts.{e}.{p}_proj": NVFP4_ENTRY for e in range(3) for p in ("up", "down")}
    facts = {
        "attention_bias": False, "conv_kernel": 4, "head_dim": 16, "hidden_size": H, "mamba_head_dim": 16, "mamba_num_heads": 4,
        "moe_intermediate_size": 48, "n_groups": 2, "n_routed_experts": 3, "num_attention_heads": 4, "num_experts_per_tok": 2,
        "num_key_value_heads": 2, "num_nextn_predict_layers": 1, "ssm_state_size": 16, "use_conv_bias": True, "vocab_size": V,
    }  # fmt: skip
    content = facts | {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "M*E",
        "mtp_hybrid_override_pattern": "*", "moe_shared_expert_intermediate_size": 32, "time_step_limit": [0.0, 4.0],
        "tie_word_embeddings": False,
        "quantization_config": MODELOPT | {"quant_algo": "MIXED_PRECISION", "ignore": [], "quantized_layers": layers},
    }  # fmt: skip
    return hand.write(
        folder, "nemotron_h", content, ["mtp"], **facts, layer_types=["mamba", "attention", "moe"], time_step_limit=[0.0, 4.0],
        head="separate",
    )  # fmt: skip


def nemotron_nvfp4(folder: Path) -> Built:
    """The same, labelled NVFP4 as a whole, with a list of what is not quantised."""
    built = nemotron(folder)
    excluded = ["lm_head", "*.mixer.[qkvo]_proj", "*.mixer.gate", "*.shared_experts.*", "mtp.layers.0*"]
    config(lambda c: c.update(quantization_config=MODELOPT | {"quant_algo": "NVFP4", "ignore": excluded}))(built)
    return built


def step(folder: Path) -> Built:
    """Step-3.5: a dense and a sparse layer, and an MTP head as layer 2 of the same list.  NVFP4 experts, the rest BF16."""
    hand = Hand()
    hand.dense("model.embed_tokens.weight", V, H)
    for i, heads in enumerate((4, 6, 6)):  # full, sliding, sliding
        layer = f"model.layers.{i}"
        hand.rows(f"{layer}.self_attn.qkv_proj", {"q_proj": 16 * heads, "k_proj": 32, "v_proj": 32}, H, f"{layer}.self_attn")
        hand.dense(f"{layer}.self_attn.o_proj.weight", H, 16 * heads)
        hand.dense(f"{layer}.self_attn.g_proj.weight", heads, H)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            hand.dense(f"{layer}.{norm}.weight", H)
        for norm in ("q_norm", "k_norm"):
            hand.dense(f"{layer}.self_attn.{norm}.weight", 16)
        if i != 1:
            hand.rows(f"{layer}.mlp.gate_up_proj", {"gate_proj": 96, "up_proj": 96}, H, f"{layer}.mlp")
            hand.dense(f"{layer}.mlp.down_proj.weight", H, 96)
    moe = "model.layers.1.moe"
    hand.dense(f"{moe}.gate.weight", 3, H)
    hand.dense(f"{moe}.router_bias", 3, dtype="F32")
    pairs = [[f"{moe}.experts.{e}.gate_proj", f"{moe}.experts.{e}.up_proj"] for e in range(3)]
    hand.experts(f"{moe}.experts.gate_up_proj", pairs, 48, H, ("gate", "up"))
    hand.experts(f"{moe}.experts.down_proj", [[f"{moe}.experts.{e}.down_proj"] for e in range(3)], H, 48)
    hand.rows("model.layers.1.share_expert.gate_up_proj", {"gate_proj": 32, "up_proj": 32}, H, "model.layers.1.share_expert")
    hand.dense("model.layers.1.share_expert.down_proj.weight", H, 32)
    hand.dense("model.norm.weight", H)
    hand.dense("lm_head.weight", V, H)
    drafts = "model.layers.2"
    for name, shape in {"enorm": (H,), "hnorm": (H,), "eh_proj": (H, 2 * H)}.items():
        hand.dense(f"{drafts}.{name}.weight", *shape)
    hand.dense(f"{drafts}.shared_head.norm.weight", H, name=f"{drafts}.transformer.shared_head.norm.weight")
    hand.dense(f"{drafts}.shared_head.head.weight", V, H, name=f"{drafts}.transformer.shared_head.output.weight")
    excluded = ["lm_head", "*.self_attn*", "*.moe.gate", "*.share_expert*", "model.layers.0.*", "model.layers.2.eh_proj",
                "model.layers.2.mlp*", "model.layers.2.transformer.shared_head.output"]  # fmt: skip
    facts = {
        "head_dim": 16, "hidden_size": H, "intermediate_size": 96, "moe_intermediate_size": 48, "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_nextn_predict_layers": 1, "share_expert_dim": 32, "vocab_size": V,
    }  # fmt: skip
    content = facts | {
        "architectures": ["Step3p5ForCausalLM"], "model_type": "step3p5", "num_attention_groups": 2, "moe_layers_enum": "1",
        "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2, "head_dim": 16},
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "moe_num_experts": 3, "moe_top_k": 2,
        "quantization_config": MODELOPT | {"quant_algo": "NVFP4", "ignore": excluded}, "rope_theta": 10000.0,
        "sliding_window": 8, "tie_word_embeddings": False, "use_moe_router_bias": True,
    }  # fmt: skip
    return hand.write(
        folder, "step3p5", content, [drafts], **facts, num_experts=3, num_sliding_attention_heads=6, head="separate",
        layer_types=["full_attention", "sliding_attention"], mlp_layer_types=["dense", "sparse"],
    )  # fmt: skip


def stacked_up(built: Built) -> None:
    """Non-gated experts in an engine's layout: `w13` is the up projection alone."""

    def rewrite(stored: dict[str, Raw]) -> None:
        for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
            for projection, engine in (("up_proj", "w13"), ("down_proj", "w2")):
                names = [f"backbone.layers.2.mixer.experts.{e}.{projection}.{suffix}" for e in range(3)]
                stored[f"backbone.layers.2.mixer.experts.{engine}_{suffix}"] = stack(stored.pop(name) for name in names)

    edit_tensors(built.directory, rewrite)


def bare_infinity(built: Built) -> None:
    """`[0.0, Infinity]`, which Python writes and JSON does not have."""
    config(lambda c: c.update(time_step_limit=[0.0, float("inf")]))(built)
    assert "Infinity\n" in (built.directory / "config.json").read_text("utf-8")
    built.architecture["time_step_limit"] = [0.0, None]


def spelt_infinity(built: Built) -> None:
    """What transformers 5 writes in its place."""
    config(lambda c: c.update(time_step_limit=[0.0, {"__float__": "Infinity"}]))(built)
    built.architecture["time_step_limit"] = [0.0, None]


# ------------------------------------------------------------------------------------------------------------ the table

CASES = [
    # -- scales and partitions
    Case(
        "one-scale-for-three-partitions", "vllm-project/vllm#38197",
        "one scale for in_proj_qkv, of which an engine fills one slot of four: garbage text, no error",
        FP8, Repaired(("weight_scale of in_proj_qkv given to each of its 3 partitions", SCALARS)),
        differ=f"{GDN}.in_proj_qkvz.weight_scale$",
    ),
    Case(
        "vector-of-scales", "vllm-project/vllm#47396",
        "one tensor of three scales for in_proj_qkv, where engines assert a single one",
        FP8 | {"vector_scales": True}, Repaired(), differ=f"{GDN}.in_proj_qkvz.weight_scale$",
    ),
    Case(
        "two-scales-for-three-partitions", "vllm-project/vllm#39764",
        "fewer scales than partitions: the slots left over hold junk, and the largest wins",
        FP8, Refused(f"{GDN}.in_proj_qkv.weight_scale ... expected F32 [] or [1] or [3] ... found F32 [2]"),
        put(f"{GDN}.in_proj_qkv.weight_scale", lambda scale: raw("F32", np.repeat(scale.floats(), 2))),
    ),
    Case(
        "qkv-fused-with-one-scale", "vllm-project/vllm#35693",
        "q, k and v are one tensor on disk, with one scale for the three",
        QWEN3_FP8, Repaired(("weight_scale of qkv_proj given to each of its 3 partitions",)),
        fused(f"{ATTENTION}.qkv_proj", ("q_proj", "k_proj", "v_proj"), one_scale=True),
    ),
    Case(
        "gate-and-up-fused", "vllm-project/vllm#35693",
        "gate and up are one tensor on disk, with a scale of each",
        QWEN3_FP8, Repaired(), fused(f"{MLP}.gate_up_proj", ("gate_proj", "up_proj")),
        differ=f"{MLP}.gate_up_proj.weight_scale$",
    ),
    Case(
        "in-proj-qkvz-fused", "sgl-project/sglang#21019",
        "in_proj_qkvz is one tensor on disk: Qwen3-Next uses the name for rows that are interleaved per key head",
        DENSE, Refused(f"{GDN}.in_proj_qkvz.weight: expected in_proj_qkv and in_proj_z ... interleaved by key group"),
        tensors(lambda s: s.update({
            f"{GDN}.in_proj_qkvz.weight": join(s.pop(f"{GDN}.in_proj_{part}.weight") for part in ("qkv", "z")),
        })),
    ),
    Case(
        "gate-and-up-global-scales-differ", "vllm-project/vllm#47515",
        "the global scales of gate and up differ, by up to ten times; engines use one of them for both",
        CT | {"family": "qwen3", "scheme": "nvfp4"},
        Repaired(("divisor weight_global_scale replaced by its float32 reciprocal",)),
        differ=f"{MLP}.gate_up_proj.weight_scale_2$",
    ),
    Case(
        "expert-global-scales-differ", "vllm-project/vllm#54974",
        "gate and up of an expert have global scales of their own; engines take gate's for both",
        MOE, Repaired(), differ=f"{MLP}.experts.gate_up_proj.weight_scale_2$",
    ),
    Case(
        "qkv-and-z-global-scales-differ", "kekzl/imp#812",
        "in_proj_qkv and in_proj_z are NVFP4, each with a global scale of its own; skipped, the output is garbage",
        CT | {"scheme": "nvfp4"}, Repaired(("weight_global_scale of in_proj_qkv given to each of its 3 partitions",)),
        differ=f"{GDN}.in_proj_qkvz.weight_scale_2$",
    ),
    Case(
        "divisors-for-multipliers", "modular/modular#6600",
        "compressed-tensors stores 1/scale where ModelOpt stores scale: read the wrong way, both kernels agree on garbage",
        CT | {"scheme": "mixed"}, Repaired(("divisor input_global_scale replaced by its float32 reciprocal",)),
    ),
    Case(
        "expert-input-scales-differ", "NVIDIA/TensorRT-LLM#10780",
        "experts were calibrated one by one; engines assert that their input scales are equal, or use the first",
        MOE_FP8, Repaired(), differ=f"{MLP}.experts.down_proj.input_scale$",
    ),
    Case(
        "scalar-of-in-proj-a", "ggml-org/llama.cpp#20505",
        "in_proj_a is FP8, and its 0-d scale is sent through the reordering of heads",
        QWEN35 | {"scheme": "mixed_groups"}, Repaired((SCALARS, "kept apart because their schemes differ")),
        differ=f"{GDN}.in_proj_ba.weight_scale$",
    ),
    Case(
        "mamba-scalar-for-five-partitions", "ggml-org/llama.cpp#22346",
        "mixer.in_proj is FP8 with one weight scale and one input scale, for five partitions",
        nemotron,
        Repaired((
            "weight_scale of in_proj given to each of its 5 partitions",
            "input_scale of in_proj given to each of its 5 partitions",
        )),
    ),
    Case(
        "head-scalars", "vllm-project/vllm#42124",
        "the scales of a quantised lm_head are 0-d, which the loader of a vocabulary cannot place",
        MIXED, Repaired((SCALARS,)),
    ),
    Case(
        "head-in-blocks", "vllm-project/vllm#40999",
        "lm_head is block FP8: its grid of scales is sent through the loader of a vocabulary",
        {"family": "qwen3_5", "dialect": "fp8", "scheme": "block", "rules": (("lm_head", "fp8_block"),)}, Repaired(),
    ),
    Case(
        "scales-of-half-the-width", "NVIDIA/Model-Optimizer#2038",
        "block scales computed from the packed shape: half as many as there are blocks",
        NVFP4, Refused(f"{MLP}.up_proj.weight_scale: expected NVFP4 with groups of 16 ... F8_E4M3 [96, 2]"),
        put(f"{MLP}.up_proj.weight_scale", lambda scale: raw("F8_E4M3", scale.codes()[:, :2])),
    ),
    Case(
        "leaked-quantiser", "NVIDIA/Model-Optimizer#2038",
        "a buffer of the quantiser itself was exported",
        NVFP4, Refused(f"{MLP}.up_proj.weight_quantizer._scale: expected ... found a quantiser's internal buffer"),
        tensors(lambda s: s.update({f"{MLP}.up_proj.weight_quantizer._scale": s[f"{MLP}.up_proj.weight_scale"]})),
    ),
    Case(
        "inverse-by-name", "NVIDIA/TensorRT-LLM#13716",
        "a blanket rename of weight_scale to weight_scale_inv hit NVFP4 block scales",
        NVFP4, Refused(f"{GDN}.in_proj_qkv.weight_scale_inv: expected no weight_scale_inv beside nvfp4 weights"),
        renamed(r"\.weight_scale$", ".weight_scale_inv"),
    ),
    Case(
        "scales-in-another-shard", "pytorch/pytorch#162214",
        "weights and their scales lie in different files",
        FP8 | {"shards": 3, "scales_apart": True}, Repaired(),
    ),
    # -- what is missing
    Case(
        "head-without-scale", "sgl-project/sglang#34904",
        "lm_head is FP8, its scale was dropped: one phrase is repeated for ever",
        QWEN35 | {"scheme": "mixed_groups"}, Refused("lm_head.weight_scale: expected ... found no such tensor"),
        lose(r"^lm_head\.weight_scale$"),
    ),
    Case(
        "codes-without-scale", "sgl-project/sglang#37736",
        "integer codes without a scale, copied into BF16 parameters: every draft is rejected",
        DENSE | DRAFTS, Refused("mtp.fc.weight: expected ... found INT8 weights"),
        put("mtp.fc.weight", lambda weight: raw("I8", np.full(weight.shape, 100))),
    ),
    Case(
        "experts-without-global-scale", "huggingface/transformers#48371",
        "NVFP4 experts are decoded without their global scale: wrong by a constant, no missing keys",
        MOE, Refused(f"{MLP}.experts.1.up_proj.weight_scale_2: expected ... found no such tensor"),
        lose(r"layers\.0\.mlp\.experts\.1\.up_proj\.weight_scale_2$"),
    ),
    Case(
        "expert-never-calibrated", "vllm-project/vllm#45212",
        "an expert that no calibration sample reached has no input scale: empty answers for some prompts",
        MOE, Refused(f"{MLP}.experts.1.gate_proj.input_scale: expected ... found no such tensor; calibrate"),
        lose(r"layers\.0\.mlp\.experts\.1\..*input_scale$"),
    ),
    Case(
        "weight-only-fp8", "vllm-project/vllm-omni#5262",
        "weight-only FP8 is labelled plain FP8; an input scale that is never filled in is -3.4e38 in engines",
        QWEN35 | {"scheme": "fp8_weight_only"}, Repaired(("weight_scale of in_proj_qkv given to each",)),
    ),
    Case(
        "input-scales-of-no-use", "vllm-project/vllm#41769",
        "labelled W4A16, with the input scales of W4A4 left in the files",
        NVFP4 | {"family": "qwen3"},
        Repaired(contradictions=("W4A16_NVFP4, which needs no input scale, tensors have one",), dropped=(".input_scale",)),
        w4a16_with_scales,
    ),
    Case(
        "drafts-lost-on-save", "modelscope/ms-swift#9802",
        "save_pretrained dropped mtp.*, the config still declares it",
        FP8 | DRAFTS, Repaired(contradictions=("config.json declares 1 layers of mtp.*, the files have none of it",)),
        lost_drafts,
    ),
    Case(
        "trained-draft-head", "vllm-project/vllm#38494",
        "Step's MTP layer has a head of its own; overwritten by lm_head, acceptance falls from 97% to 4%",
        step, Repaired(), differ=r"(^lm_head|shared_head\.head)\.weight$",
    ),
    Case(
        "step-expert-scales", "vllm-project/vllm#37462",
        "Step's experts have 0-d scales each, input scales included; dropped, all token ids are 0",
        step, Repaired((SCALARS,)), differ=r"moe\.experts\.gate_up_proj\.input_scale$",
    ),
    Case(
        "cache-scales", "vllm-project/vllm#54623",
        "calibrated scales of the KV cache are skipped by name, and the cache runs at scale 1",
        FP8 | VLM | {"kv": "tensor"}, Repaired((SCALARS,)), differ=r"self_attn\.[kv]_scale$",
    ),
    Case(
        "one-scale-for-both", "neuralmagic/AutoFP8#17",
        "AutoFP8 stores one kv_scale for each layer, for keys and values alike",
        {"family": "qwen3", "dialect": "fp8", "scheme": "tensor_static_vllm"}, Repaired((SCALARS,)), one_kv_scale,
        differ=r"self_attn\.[kv]_scale$",
    ),
    Case(
        "processor-not-copied", "vllm-project/llm-compressor#1305",
        "the processor's files did not travel with the weights: the model is served as text only",
        FP8 | VLM, Repaired(), side_file("preprocessor_config.json", b'{ "size": 3 }'),
    ),
    # -- configs that do not say what the tensors are
    Case(
        "head-excluded-but-quantised", "vllm-project/vllm#45102",
        "lm_head* is excluded in the config, lm_head.input_scale and its like are in the files",
        MIXED, Repaired(contradictions=("excluded (not quantised), tensors say nvfp4: lm_head",)),
        quantization(lambda q: (q["quantized_layers"].pop("lm_head"), q.update(ignore=["lm_head*"]))),
    ),
    Case(
        "drafts-not-excluded", "vllm-project/vllm#38832",
        "mtp.fc is BF16, only mtp.layers.0* is excluded",
        NVFP4 | DRAFTS, Repaired((PREFIX,), ("says NVFP4, tensors are BF16 and not quantised: mtp.fc (1 modules)",)),
        ignore(lambda entry: None if entry == "mtp*" else entry, "mtp.layers.0*"),
    ),
    Case(
        "draft-experts-not-excluded", "sgl-project/sglang#36158",
        "nothing of mtp.* is quantised, and none of it is in the list of 172 exclusions",
        MOE | DRAFTS, Repaired(contradictions=("tensors are BF16 and not quantised: mtp.fc, mtp.layers.0 ... (19 modules)",)),
        ignore(lambda entry: None if entry.startswith("mtp") else entry),
    ),
    Case(
        "only-draft-experts-quantised", "sgl-project/sglang#38870",
        "inside the MTP head only the experts are quantised, the config excludes it as a whole",
        MOE | DRAFTS | {"rules": (("mtp.layers.*.experts.*", "nvfp4"),)},
        Repaired(contradictions=("excluded (not quantised), tensors say nvfp4: mtp.layers.0.mlp.experts",)),
    ),
    Case(
        "fused-names-in-the-list", "sgl-project/sglang#35797",
        "the exclusions of the MTP head name fused modules, the tensors are projections: five are skipped",
        CT | {"scheme": "nvfp4"} | DRAFTS, Repaired((PREFIX,)),
        ignore(lambda entry: re.sub(r"(mtp.*)\.([qkv]|gate|up)_proj$", lambda m: f"{m[1]}.{FUSED[m[2]]}", entry)),
    ),
    Case(
        "fused-names-as-quantised", "sgl-project/sglang#35797",
        "quantized_layers names the fused modules of engines, the tensors are projections",
        MIXED | {"rules": (("*_proj", "fp8"), ("*.in_proj_qkv", "fp8"), ("*.in_proj_z", "fp8"))}, Repaired(),
        entries({"in_proj_qkv": "in_proj_qkvz", "in_proj_z": "in_proj_qkvz", "q_proj": "qkv_proj", "k_proj": "qkv_proj",
                 "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}),
    ),
    Case(
        "projections-as-quantised", "sgl-project/sglang#35797",
        "the other way round: the tensors are fused, quantized_layers names projections",
        MIXED | {"family": "qwen3", "rules": (("*.mlp.*", "nvfp4_wo"),)},
        Repaired(), fused(f"{ATTENTION}.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ),
    Case(
        "another-list-in-the-recipe", "kekzl/imp#1970",
        "recipe.yaml ignores other names than config.json: 30 routers are of no known kind",
        MOE | {"dialect": "compressed-tensors"}, Repaired(),
        side_file("recipe.yaml", b"quant_stage:\n  ignore: ['re:.*nothing_of_this_model']\n"),
    ),
    Case(
        "router-not-excluded", "NVIDIA/Model-Optimizer#1858",
        "the router is BF16 and missing in the list of exclusions",
        MOE, Repaired(contradictions=("says NVFP4, tensors are BF16 and not quantised: ... mlp.gate ... (2 modules)",)),
        ignore(lambda entry: None if entry.endswith("mlp.gate") else entry),
    ),
    Case(
        "experts-left-unquantised", "vllm-project/vllm#52501",
        "labelled NVFP4, the experts are BF16 and not excluded: their scales stay unset",
        MOE | {"rules": (("*experts*", None),)},
        Repaired(contradictions=("says NVFP4, tensors are BF16 and not quantised: ... mlp.experts ... (18 modules)",)),
        ignore(lambda entry: None if "experts" in entry else entry),
    ),
    Case(
        "nothing-quantised", "NVIDIA/Model-Optimizer#2202",
        "the quantiser saw no layer: the config says MIXED_PRECISION, its list is empty, every tensor is BF16",
        DENSE, Repaired(contradictions=("config.json ... describes a quantisation, no tensor is quantised",)),
        config(lambda c: c.update(quantization_config=MODELOPT | {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}})),
    ),
    Case(
        "group-says-w4a4", "ai-dynamo/aiconfigurator#1513",
        "config_groups gives the layers 4-bit inputs, quantized_layers says W4A16 of the same layers",
        MIXED | {"rules": (("model.*.mlp.*", "nvfp4_wo"),)}, Repaired(),
        quantization(lambda q: [g.update(input_activations=g["weights"]) for g in q["config_groups"].values()]),
    ),
    Case(
        "mamba-is-fp8", "sgl-project/sglang#20375",
        "labelled NVFP4 as a whole, the Mamba projections are FP8: mixer.in_proj.input_scale is not expected",
        nemotron_nvfp4, Repaired(contradictions=("says NVFP4, tensors say fp8_tensor: backbone.layers.0.mixer.in_proj",)),
    ),
    Case(
        "list-with-gaps", "vllm-project/vllm#47318",
        "o_proj is listed and q, k and v are not: they are not quantised, whatever their sibling is",
        MIXED | {"rules": (("model.*.[qkv]_proj", None),)}, Repaired(),
    ),
    Case(
        "overlapping-groups", "charlie12345/ROCmFPX#79",
        "two config groups cover the same modules",
        CT | {"scheme": "mixed"},
        Repaired(contradictions=("nvfp4-pack-quantized (group_0), tensors are BF16", "(group_0), tensors say fp8_channel")),
        quantization(lambda q: q["config_groups"]["group_0"].update(targets=["re:.*"])),
    ),
    Case(
        "label-of-a-mix", "sgl-project/sglang#29769",
        "quant_method is modelopt_mixed, which no engine knows",
        MIXED, Repaired(), quantization(lambda q: q.update(quant_method="modelopt_mixed")),
    ),
    Case(
        "cache-format-in-the-other-file", "sgl-project/sglang#27906",
        "only hf_quant_config.json says that the KV cache is FP8",
        FP8 | {"form": "both", "kv": "tensor"},
        Repaired(contradictions=("hf_quant_config.json ... KV cache FP8, config.json ... does not mention it",)),
        quantization(lambda q: q.pop("kv_cache_scheme")),
    ),
    Case(
        "stale-second-config", "sgl-project/sglang#13919",
        "hf_quant_config.json is left from another export of the model; engines prefer one file or the other",
        NVFP4 | {"form": "both"}, Repaired(contradictions=("hf_quant_config.json ... says FP8, tensors say nvfp4",)),
        legacy(lambda q: q.update(quant_algo="FP8")),
    ),
    Case(
        "sentinel-in-names", "nvidia-modelopt 0.47 with transformers 5.23, run",
        "every name in the quantisation config ends in a NUL and `backbone.pt_name_sentinel`",
        MIXED | {"nul_names": True}, Repaired(("corrupted module names in the quantisation config repaired",)),
    ),
    Case(
        "experts-under-another-key", "huggingface/transformers#40156",
        "the config says num_local_experts where engines read num_experts",
        MOE, Repaired(), config(lambda c: c.update(num_local_experts=c.pop("num_experts"))),
    ),
    Case(
        "bare-infinity", "ai-dynamo/dynamo#3043",
        "config.json holds a bare Infinity, which is no JSON",
        nemotron, Repaired(), bare_infinity,
    ),
    Case(
        "spelt-infinity", "transformers 5.23.0, run",
        "config.json holds an object where a number should be, as transformers 5 writes infinity",
        nemotron, Repaired(), spelt_infinity,
    ),
    # -- names
    Case(
        "list-in-another-namespace", "vllm-project/vllm#42546",
        "tensors are below model.language_model, quantized_layers says language_model.model",
        MIXED | VLM | {"meta_prefix": "Q2"}, Repaired((PREFIX,)),
    ),
    Case(
        "w4a16-layer-not-found", "vllm-project/vllm#47215",
        "quantized_layers names W4A16 layers without the wrapper's prefix: packed weights are taken for dense ones",
        MIXED | VLM | {"meta_prefix": "Q3", "rules": (("model.*.mlp.*", "nvfp4_wo"),)}, Repaired((PREFIX,)),
    ),
    Case(
        "list-says-model", "vllm-project/vllm#39901",
        "tensors are below backbone, quantized_layers says model",
        nemotron, Repaired(("prefix backbone",)),
        quantization(lambda q: q.update(quantized_layers={
            re.sub("^backbone", "language_model.model", k): v for k, v in q["quantized_layers"].items()
        })),
    ),
    Case(
        "wrapped-exclusions", "vllm-project/vllm#53790",
        "the MTP head is excluded as language_model.mtp.layers.0*, the tensors are mtp.layers.0",
        nemotron_nvfp4, Repaired(contradictions=("says NVFP4, tensors say fp8_tensor: backbone.layers.0.mixer.in_proj",)),
        ignore(lambda entry: f"language_model.{entry}" if entry.startswith(("mtp", "lm_head")) else entry),
    ),
    Case(
        "draft-head-by-its-full-name", "vllm-project/vllm#44087",
        "Step's shared_head is excluded under the name that engines give it, the tensors have the producer's",
        step, Repaired(), ignore(lambda entry: entry.replace("transformer.shared_head.output", "shared_head.head")),
    ),
    Case(
        "nested-exclusions", "NVIDIA/Model-Optimizer#479",
        "exclusions are called model.layers.language_model.layers..., which matches nothing",
        FP8 | VLM, Repaired((PREFIX, "excludes 3 names that mean no module: model.layers.language_model.layers.0"),
                            ("says FP8, tensors are BF16 and not quantised: ... in_proj_b, ... in_proj_a (2",)),
        ignore(lambda entry: entry.replace("model.language_model.layers", "model.layers.language_model.layers")),
    ),
    Case(
        "prefix-three-times", "vllm-project/llm-compressor#2568",
        "language_model is stacked three times in every name",
        FP8 | VLM, Repaired(("prefix model.language_model.language_model.language_model.* -> model.*",)),
        renamed(r"^model\.language_model\.", "model." + "language_model." * 3),
    ),
    Case(
        "tower-inside-the-language-model", "huggingface/transformers#45357",
        "the vision tower was saved below model.language_model.visual: not found, loading is skipped",
        FP8 | VLM, Repaired(("prefix model.language_model.visual -> visual (33 tensors)",)),
        renamed(r"^model\.visual\.", "model.language_model.visual."),
    ),
    Case(
        "text-model-with-the-wrappers-names", "vllm-project/vllm#50355",
        "a text-only config, the tensors are below model.language_model",
        FP8 | {"prefix": "Q4"}, Repaired((PREFIX,)),
    ),
    Case(
        "wrapper-with-a-text-models-names", "ModelCloud/GPTQModel#2694",
        "a wrapper's config, the tensors are below model.layers: initialised anew in silence",
        MOE_FP8 | VLM | {"prefix": "Q3"},
        Repaired(contradictions=("config.json declares 2 layers of visual.*, the files have none of it",)),
    ),
    Case(
        "lora-wrapper", "vllm-project/vllm#38520",
        "`.base_layer.` stands in the names of wrapped projections and of their scales",
        FP8 | {"base_layer": "some", "prefix": "Q7-Q3"},
        Repaired(("base_layer ... removed from names", "weight_scale of in_proj_qkv given to each of its 3 partitions")),
    ),
    Case(
        "tower-in-another-layout", "sgl-project/sglang#35599",
        "Omni's vision tower is below language_model, its queries, keys and values apart: wrong weights",
        {"family": "nemotron_h", "dialect": "modelopt", "scheme": "fp8", "wrapper": True},
        Repaired(("prefix language_model.vision_model -> vision_model",)), split_tower,
    ),
    # -- experts
    Case(
        "lora-wrapper-around-experts", "vllm-project/vllm#37114",
        "engine names inside two LoRA wrappers, experts.base_layer.base_layer.w13_weight: the score falls from 0.68 to 0.018",
        MOE | {"layout": "X8", "base_layer": "all"}, Repaired(("base_layer ... removed from names",)),
        differ=f"{MLP}.experts.gate_up_proj.weight_scale_2$",
    ),
    Case(
        "underscored-scales", "NVIDIA/Model-Optimizer#2334",
        "stacked experts whose scales are called down_proj_weight_scale_2",
        MOE | {"layout": "X2"}, Repaired(("names of stacked experts split into module and role",)),
        differ=f"{MLP}.experts.down_proj.weight_scale_2$",
    ),
    Case(
        "stacked-experts-scales-skipped", "vllm-project/vllm#49638",
        "stacked FP8 experts: the weights are loaded in bulk, their scales are skipped",
        MOE_FP8 | VLM | {"layout": "X2"}, Repaired((PREFIX,)), differ=f"{MLP}.experts.gate_up_proj.weight_scale$",
    ),
    Case(
        "experts-one-by-one", "ml-explore/mlx-lm#1224",
        "block FP8 experts stored one by one, where stacks are expected: 61,690 unknown parameters",
        {"family": "qwen3_5_moe", "dialect": "fp8", "scheme": "block_bf16"} | VLM, Repaired((PREFIX,)),
    ),
    Case(
        "transposed-experts", "huggingface/transformers#43201",
        "Qwen3-VL-MoE stores experts input-major: [E, H, 2I] where [E, 2I, H] is expected",
        {"family": "qwen3_vl_moe", "dialect": "dense", "scheme": "bf16", "layout": "X3"} | VLM,
        Repaired(("input-major ... experts turned to output-major (2 tensors)",)),
    ),
    Case(
        "experts-without-gate", "vllm-project/vllm#33518",
        "Nemotron's experts have no gate: their w13 is one projection, engines make room for two",
        nemotron, Repaired(), stacked_up, differ=r"mixer\.experts\.up_proj\.weight_scale_2$",
    ),
    # -- conventions of values
    Case(
        "norms-alone-shifted-by-one", "ml-explore/mlx-lm#1623",
        "as the next case, and a tool put the axes of conv1d right again: only the values show it",
        NVFP4, Refused("input_layernorm.weight: expected norm weights around 0 ... 1 is added already; an MLX repack"),
        tensors(shift_norms_alone),
    ),
    Case(
        "norms-shifted-by-one", "ml-explore/mlx-lm#1623",
        "an MLX repack: norms hold 1 + w, and conv1d, whose axes were exchanged in the same pass, shows it",
        NVFP4, Refused(f"{GDN}.conv1d.weight: expected ... [160, 1, 4], found BF16 [160, 4, 1]; these are the axes of MLX"),
        tensors(shift_norms),
    ),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- running


def fits(line: str, pattern: Line) -> bool:
    """Whether `line` has every piece of a pattern, in order."""
    position = 0
    for piece in pattern.split("..."):
        position = line.find(piece.strip(), position)
        if position < 0:
            return False
        position += len(piece.strip())
    return True


def covers(lines: Iterable[str], patterns: Iterable[Line]) -> list[Line]:
    """The patterns that no line fits."""
    lines = list(lines)
    return [pattern for pattern in patterns if not any(fits(line, pattern) for line in lines)]


def not_json(constant: str) -> NoReturn:
    """Refuse Infinity and NaN, which Python's parser takes."""
    raise AssertionError(f"{constant} is no JSON")


def check_report(outcome: Repaired, report: Mapping[str, Any]) -> None:
    """conversion.json tells what was done: nothing less, and of contradictions and dropped tensors nothing more."""
    assert not covers(report["repairs"], outcome.repairs), report["repairs"]
    # One line for each kind of repair, not for each layer.
    assert not [line for line in report["repairs"] if re.search(r"\blayers\.\d", line) and "that mean no module" not in line]
    assert not covers(report["contradictions"], outcome.contradictions), report["contradictions"]
    assert len(report["contradictions"]) == len(outcome.contradictions), report["contradictions"]
    gone = [entry["tensor"] for entry in report["dropped"]]
    assert all(entry["reason"] for entry in report["dropped"])
    assert all(name.endswith(outcome.dropped) for name in gone) if outcome.dropped else not gone
    assert all(any(name.endswith(tail) for name in gone) for tail in outcome.dropped)


def check_config(built: Built, out: Path) -> None:
    """OUT's config.json is strict JSON, and holds what the builder says and no quantisation config of a producer."""
    found = json.loads((out / "config.json").read_text("utf-8"), parse_constant=not_json)
    quantisation = found["quantization"]
    assert quantisation["modules"] == built.modules
    assert quantisation["kv_cache"] == built.kv_cache
    assert found["unfused"] == built.unfused
    assert found["carried"] == built.carried
    assert {key: found["architecture"][key] for key in built.architecture} == built.architecture
    assert "quantization_config" not in found["hf_config"]
    assert not (out / "hf_quant_config.json").exists()


def check_side_files(source: Path, out: Path) -> None:
    """Files beside weights and configs are in OUT, byte for byte."""
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name not in NOT_CARRIED:
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


NOT_CARRIED = {"config.json", "hf_quant_config.json", "model.safetensors.index.json"}


def prepared(case: Case, folder: Path, make: Callable[..., Built]) -> Built:
    """The checkpoint of a case, ill."""
    built = case.source(folder) if callable(case.source) else make(**case.source)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    case.change(built)
    assert (case.change is as_built) == (before == {path.name: path.read_bytes() for path in folder.iterdir()})
    if case.differ:
        values = [value for name, t in built.canonical.items() if re.search(case.differ, name) for value in t.floats().flat]
        assert len(set(values)) > 1, "the case is not about anything"
    return built


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case.outcome, Repaired)], ids=lambda case: case.name)
def test_repaired(case: Case, make: Callable[..., Built], tmp_path: Path) -> None:
    """Tensors, config and report are as expected, and the converter's own proof agrees."""
    assert isinstance(case.outcome, Repaired)
    built, out = prepared(case, tmp_path / "in", make), tmp_path / "out"
    convert.convert_checkpoint(built.directory, out)
    convert.verify_conversion(built.directory, out)
    found = read_tensors(out)
    assert found.keys() == built.canonical.keys()
    assert [name for name in found if found[name] != built.canonical[name]] == []
    check_config(built, out)
    check_side_files(built.directory, out)
    check_report(case.outcome, read_json(out / "conversion.json"))


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case.outcome, Refused)], ids=lambda case: case.name)
def test_refused(case: Case, make: Callable[..., Built], cli: Callable[..., Ran], tmp_path: Path) -> None:
    """The command says what is wrong in a line, and writes nothing."""
    assert isinstance(case.outcome, Refused)
    built = prepared(case, tmp_path / "in", make)
    ran = cli(built.directory, tmp_path / "out")
    assert ran.code == 1
    assert not covers(ran.err.splitlines(), [case.outcome.says]), ran.err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- the page


def _link(link: str) -> str:
    repository, hash_sign, number = link.partition("#")
    return f"[{link}]({GITHUB}{repository}/issues/{number})" if hash_sign else link


def _does(outcome: Repaired | Refused) -> str:
    if isinstance(outcome, Refused):
        return f"refuses: `{outcome.says}`"
    lines = {"repairs": outcome.repairs, "contradictions": outcome.contradictions, "dropped": outcome.dropped}
    told = [f"{key}: " + ", ".join(f"`{line}`" for line in found) for key, found in lines.items() if found]
    return "; ".join(["converts", *told])


def page() -> str:
    """`docs/casebook.md`."""
    head = (
        "# Case book\n\n"
        "Failures met in public trackers, each reproduced as a tiny checkpoint in `tests/test_casebook.py`, which also makes\n"
        "this page. *Converts* means: every tensor, and what the config says of it, is what the checkpoint stands for, bit\n"
        "for bit. The lines are those of `conversion.json`, or of the error; `...` stands for words left out.\n\n"
        "| case | met in | what is wrong | qconvert |\n|---|---|---|---|\n"
    )
    rows = (f"| {c.name} | {_link(c.link)} | {c.wrong} | {_does(c.outcome)} |" for c in CASES)
    return head + "\n".join(rows) + "\n"


def test_page() -> None:
    """docs/casebook.md is what the table makes of it: run `python tests/test_casebook.py` after a change."""
    assert PAGE.read_text("utf-8") == page()


def test_the_table() -> None:
    """Names are unique, and no case is there twice."""
    assert len({case.name for case in CASES}) == len(CASES) >= 30
    assert len({case.wrong for case in CASES}) == len(CASES)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")

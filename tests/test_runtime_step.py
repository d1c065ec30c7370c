"""The networks of Step: Step-3.5 against transformers, Step3, draft heads and rarer facts against `step_reference`.

Checkpoints are written here in canonical form with random dense or quantised weights; the oracles get the dense float32
values that these stand for, under the names of the hub.  Tolerance 1e-4 of the largest logit, for float32 against another
order of sums or float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import step_reference
import torch
from build import build
from canonical import Quant, module, save
from torch import Tensor

import convert
import runtime
from runtime.format import FormatError
from runtime.state import State, WindowCache

TOLERANCE = 1e-4
SCHEMES = ("fp8_tensor", "fp8_channel", "fp8_block", "nvfp4", "mxfp8", "mxfp4")
WINDOW, LENGTH = 8, 40
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 32.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "share_expert_dim": 64}
COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "head": "separate", "bos_token_id": 0, "eos_token_id": [1],
    "pad_token_id": 0, **MOE,
}  # fmt: skip
STEP3P5 = COMMON | {
    "num_hidden_layers": 4, "num_key_value_heads": 2, "num_sliding_attention_heads": 6, "num_sliding_key_value_heads": 2,
    "layer_types": [FULL, SLIDING, SLIDING, FULL], "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    "layer_kinds": [f"{FULL}.dense", f"{SLIDING}.dense", f"{SLIDING}.sparse", f"{FULL}.sparse"],
    "mtp_layer_kinds": [], "num_nextn_predict_layers": 0, "sliding_window": WINDOW, "rope_theta": [5e6, 1e4, 1e4, 5e6],
    "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5], "rope_scaling": LLAMA3, "rope_parameters": None,
    "yarn_only_types": [FULL], "norm_expert_weight": True, "router_scaling_factor": 3.0, "use_moe_router_bias": True,
    "swiglu_limits": [0, 0.1, 0.2, None], "swiglu_limits_shared": [0.3, 0, None, 0.1], "layer_scale": False,
}  # fmt: skip
THREE_HEADS = {  # each with its own facts: a list by layer that is cut short would be seen
    "mtp_layer_kinds": [f"{SLIDING}.dense", f"{SLIDING}.dense", f"{FULL}.dense"], "num_nextn_predict_layers": 3,
    "rope_theta": [5e6, 1e4, 1e4, 5e6, 1e4, 2e4, 5e6], "partial_rotary_factors": [0.5, 1, 1, 0.5, 1, 0.5, 0.5],
    "swiglu_limits_shared": [0.3, 0, None, 0.1, 0, 0.2, 0.3],
}  # fmt: skip
TWO_HEADS = {"mtp_layer_kinds": [f"{SLIDING}.dense"] * 2, "num_nextn_predict_layers": 2, "rope_theta": 1e4}
TWO_HEADS |= {"partial_rotary_factors": None}
BY_KIND = {  # as transformers 5 writes it
    "rope_theta": None, "rope_scaling": None, "partial_rotary_factors": None, "yarn_only_types": None,
    "rope_parameters": {FULL: LLAMA3 | {"rope_theta": 5e6, "partial_rotary_factor": 0.5},
                        SLIDING: {"rope_type": "default", "rope_theta": 1e4}},
}  # fmt: skip
STEP3 = COMMON | {
    "num_hidden_layers": 3, "num_key_value_heads": 1, "share_q_dim": 32, "mlp_layer_types": ["dense", "sparse", "sparse"],
    "norm_expert_weight": False, "rope_theta": 5e5, "rope_scaling": None,
}  # fmt: skip

QuantOf = Callable[[str], Quant | None]


def plain(name: str) -> Quant | None:
    """Nothing is quantised."""
    return None


def everything(scheme: str) -> QuantOf:
    """Every projection and every stack of experts; routers, gates, embedding and head stay dense."""
    kept = ("moe.gate", "g_proj", "embed_tokens", "lm_head")
    return lambda name: None if name.endswith(kept) else Quant(scheme)


class Checkpoint:
    """Random canonical tensors, the config that describes them, and the dense values under the names of the hub."""

    def __init__(self, family: str, facts: Mapping[str, Any], quant: QuantOf, seed: int = 0) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}
        self.modules: dict[str, Any] = {}
        self.family, self.facts, self.quant, self.random = family, facts, quant, torch.Generator().manual_seed(seed)
        a = facts
        self.linear("model.embed_tokens", {"embed_tokens": a["vocab_size"]}, a["hidden_size"])
        if a["head"] == "separate":
            self.linear("lm_head", {"lm_head": a["vocab_size"]}, a["hidden_size"])
        layer = self.step3_layer if family == "step3_text" else self.step3p5_layer
        kinds = a["mlp_layer_types"] if family == "step3_text" else [*a["layer_kinds"], *a["mtp_layer_kinds"]]
        for i, kind in enumerate(kinds):
            layer(f"model.layers.{i}", kind)
        self.norms("model", a["hidden_size"], "norm")
        for i in range(len(a.get("mtp_layer_kinds", ()))):
            self.draft(f"model.layers.{a['num_hidden_layers'] + i}")

    def noise(self, *shape: int) -> Tensor:
        """Normal numbers that have a BF16 form."""
        return torch.randn(shape, generator=self.random).bfloat16().float()

    def norms(self, below: str, size: int, *names: str) -> None:
        for name in names:
            start = 1.0 if self.family == "step3_text" else 0.0  # the weight, or what 1 is added to
            weight = (start + 0.3 * self.noise(size)).bfloat16()
            self.tensors[f"{below}.{name}.weight"], self.dense[f"{below}.{name}.weight"] = weight, weight.float()

    def one(self, name: str, parts: Mapping[str, int], columns: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
        """Stored tensors by role, dense values by part, and the config's entry or None."""
        weights = {part: self.noise(rows, columns) / columns**0.5 for part, rows in parts.items()}
        chosen = self.quant(name)
        if chosen is not None:
            partitions = {part: {part.removesuffix("_proj"): rows} for part, rows in parts.items()}
            return module(weights, chosen, partitions)
        rounded = {part: weight.bfloat16() for part, weight in weights.items()}
        return {"weight": torch.cat([*rounded.values()])}, {p: w.float() for p, w in rounded.items()}, None

    def linear(self, name: str, parts: Mapping[str, int], columns: int) -> None:
        below = name.rpartition(".")[0]
        stored, dense, entry = self.one(name, parts, columns)
        self.tensors |= {f"{name}.{role}": tensor for role, tensor in stored.items()}
        self.dense |= {f"{below}.{part}.weight".lstrip("."): values for part, values in dense.items()}
        if entry is not None:
            self.modules[name] = entry

    def stack(self, name: str, parts: Mapping[str, int], columns: int) -> None:
        count = self.facts["num_experts"]
        made = [self.one(name, parts, columns) for _ in range(count)]
        for role in made[0][0]:
            self.tensors[f"{name}.{role}"] = torch.stack([stored[role] for stored, _, _ in made])
        for part in parts:
            self.dense[f"{name.rpartition('.')[0]}.{part}.weight"] = torch.stack([dense[part] for _, dense, _ in made])
        if made[0][2] is not None:
            self.modules[name] = made[0][2] | {"experts": count}

    def mlp(self, name: str, inner: int) -> None:
        self.linear(f"{name}.gate_up_proj", {"gate_proj": inner, "up_proj": inner}, self.facts["hidden_size"])
        self.linear(f"{name}.down_proj", {"down_proj": self.facts["hidden_size"]}, inner)

    def feed_forward(self, layer: str, sparse: bool) -> None:
        a, hidden = self.facts, self.facts["hidden_size"]
        self.norms(layer, hidden, "input_layernorm", "post_attention_layernorm")
        if not sparse:
            self.mlp(f"{layer}.mlp", a["intermediate_size"])
            return
        inner = a["moe_intermediate_size"]
        self.linear(f"{layer}.moe.gate", {"gate": a["num_experts"]}, hidden)
        self.stack(f"{layer}.moe.experts.gate_up_proj", {"gate_proj": inner, "up_proj": inner}, hidden)
        self.stack(f"{layer}.moe.experts.down_proj", {"down_proj": hidden}, inner)
        self.mlp(f"{layer}.share_expert", a["share_expert_dim"])

    def step3p5_layer(self, layer: str, kind: str) -> None:
        a, d, hidden = self.facts, self.facts["head_dim"], self.facts["hidden_size"]
        sliding = "sliding_" if kind.startswith("sliding") else ""
        q, kv = a[f"num_{sliding}attention_heads"], a[f"num_{sliding}key_value_heads"]
        parts = {"q_proj": q * d, "k_proj": kv * d, "v_proj": kv * d}
        self.linear(f"{layer}.self_attn.qkv_proj", parts, hidden)
        self.linear(f"{layer}.self_attn.g_proj", {"g_proj": q}, hidden)
        self.linear(f"{layer}.self_attn.o_proj", {"o_proj": hidden}, q * d)
        self.norms(f"{layer}.self_attn", d, "q_norm", "k_norm")
        self.feed_forward(layer, kind.endswith("sparse"))
        if kind.endswith("sparse") and a["use_moe_router_bias"]:
            name = f"{layer}.moe.router_bias"  # differences that BF16 would lose decide between experts
            self.dense[name] = self.tensors[name] = 0.3 * torch.randn(a["num_experts"], generator=self.random)

    def step3_layer(self, layer: str, kind: str) -> None:
        a, d, q = self.facts, self.facts["head_dim"], self.facts["num_attention_heads"] * self.facts["head_dim"]
        parts = {"q_proj": a["share_q_dim"], "k_proj": d, "v_proj": d}
        self.linear(f"{layer}.self_attn.qkv_proj", parts, a["hidden_size"])
        self.norms(f"{layer}.self_attn", a["share_q_dim"], "inter_norm")
        self.linear(f"{layer}.self_attn.wq", {"wq": q}, a["share_q_dim"])
        self.linear(f"{layer}.self_attn.o_proj", {"o_proj": a["hidden_size"]}, q)
        self.feed_forward(layer, kind == "sparse")

    def draft(self, layer: str) -> None:
        hidden = self.facts["hidden_size"]
        self.norms(layer, hidden, "enorm", "hnorm", "shared_head.norm")
        self.linear(f"{layer}.eh_proj", {"eh_proj": hidden}, 2 * hidden)
        self.linear(f"{layer}.shared_head.head", {"head": self.facts["vocab_size"]}, hidden)

    def write(self, out: Path, drafts: bool = True) -> Path:
        """As a canonical directory.  `drafts`: with the draft heads that the facts speak of."""
        first = self.facts["num_hidden_layers"]
        heads = [f"model.layers.{first + i}" for i in range(len(self.facts.get("mtp_layer_kinds", ())))]
        left = {n: t for n, t in self.tensors.items() if drafts or not n.startswith(tuple(f"{head}." for head in heads))}
        config = {
            "format": "qconvert", "format_version": 1, "family": self.family, "architecture": dict(self.facts),
            "quantization": {"modules": {n: m for n, m in self.modules.items() if f"{n}.weight" in left}, "kv_cache": {}},
            "unfused": {}, "carried": heads if drafts else [], "hf_config": {},
        }  # fmt: skip
        save(out, left, config)
        return out

    @property
    def doubles(self) -> dict[str, Tensor]:
        """The dense values for the reference."""
        return {name: value.double() for name, value in self.dense.items()}


def transformers_logits(point: Checkpoint, ids: Tensor, dense: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits of `Step3p7ForConditionalGeneration` without an image."""
    from transformers import Step3p7Config, Step3p7ForConditionalGeneration

    a = point.facts
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
            "layer_types", "mlp_layer_types", "sliding_window", "rms_norm_eps", "num_sliding_attention_heads",
            "num_key_value_heads", "num_experts_per_tok", "moe_intermediate_size", "share_expert_dim", "swiglu_limits",
            "swiglu_limits_shared", "max_position_embeddings")  # fmt: skip
    rope = ("rope_theta", "partial_rotary_factors", "rope_scaling", "yarn_only_types", "rope_parameters")
    text = {key: a[key] for key in same} | {key: a[key] for key in rope if a[key] is not None}
    text |= {"n_routed_experts": a["num_experts"], "moe_router_scaling_factor": a["router_scaling_factor"]}
    vision = {"width": 32, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14, "mlp_ratio": 2.0}
    model = Step3p7ForConditionalGeneration(Step3p7Config(text_config=text, vision_config=vision)).float().eval()
    values = dict(dense or point.dense)
    for name in [n for n in values if n.endswith("moe.experts.gate_proj.weight")]:
        both = values.pop(name), values.pop(name.replace("gate_proj", "up_proj"))
        values[name.replace("gate_proj.weight", "gate_up_proj")] = torch.cat(both, 1)
    renamed = {}
    for name, value in values.items():
        for old, new in (("model.", "model.language_model."), ("moe.experts.down_proj.weight", "moe.experts.down_proj"),
                         ("moe.router_bias", "moe.gate.e_score_correction_bias"), (".moe.", ".mlp."),
                         ("share_expert.", "mlp.shared_experts.")):  # fmt: skip
            name = name.replace(old, new, 1)
        renamed[name] = value
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all("vision" in name or "multi_modal" in name for name in missing)
    with torch.no_grad():
        return model(input_ids=ids).logits


def reference_logits(point: Checkpoint, ids: Tensor) -> Tensor:
    """Logits by the formulas, in float64."""
    if point.family == "step3_text":
        return step_reference.step3(point.doubles, point.facts, ids)
    return step_reference.step3p5(point.doubles, point.facts | {"mtp_layer_kinds": []}, ids)[0]


def some_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class Case:
    """A checkpoint and what its logits are compared with."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    quant: QuantOf = plain
    family: str = "step3p5"
    oracle: Callable[[Checkpoint, Tensor], Tensor] = reference_logits

    def make(self) -> Checkpoint:
        facts = STEP3 if self.family == "step3_text" else STEP3P5
        return Checkpoint(self.family, facts | dict(self.changes), self.quant)


DENSE_ONLY = dict.fromkeys(MOE, 0) | {
    "mlp_layer_types": ["dense"] * 4,
    "layer_kinds": [f"{kind}.dense" for kind in STEP3P5["layer_types"]],
}
CASES = {
    "dense weights": Case(oracle=transformers_logits),
    "dense weights, formulas": Case(),
    "rope by kind of layer": Case(BY_KIND, oracle=transformers_logits),
    "rope by kind of layer, formulas": Case(BY_KIND),
    "one theta": Case({"rope_theta": 1e4, "partial_rotary_factors": None}, oracle=transformers_logits),
    "scaling in all layers": Case({"yarn_only_types": None}),
    "scaling in sliding layers": Case({"yarn_only_types": [SLIDING]}),
    "a rope of its own": Case({"rope_theta": [5e6, 1e4, 3e4, 5e6]}),
    "no limits": Case({"swiglu_limits": None, "swiglu_limits_shared": None}, oracle=transformers_logits),
    "no router bias": Case({"use_moe_router_bias": False}),
    "weights as they are": Case({"norm_expert_weight": False}),
    "weights by default": Case({"norm_expert_weight": None}, oracle=transformers_logits),
    "KV heads of sliding layers": Case({"num_sliding_key_value_heads": 3}),
    "no experts": Case(DENSE_ONLY),
    "tied": Case({"head": "tied"}),
    "short lists": Case({"swiglu_limits": [0, 0, 0.2], "swiglu_limits_shared": [0.3]}),
    "window of one": Case({"sliding_window": 1}, oracle=transformers_logits),
    "step3": Case(family="step3_text"),
    "step3 normalised": Case({"norm_expert_weight": True}, family="step3_text"),
    "step3 normalised by default": Case({"norm_expert_weight": None}, family="step3_text"),
    "step3 scaling": Case({"rope_scaling": LLAMA3}, family="step3_text"),
    **{f"step3p5 {scheme}": Case(quant=everything(scheme), oracle=transformers_logits) for scheme in SCHEMES},
    **{f"step3 {scheme}": Case(quant=everything(scheme), family="step3_text") for scheme in SCHEMES},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits(case: Case, tmp_path: Path) -> None:
    point, ids = case.make(), some_ids(2, LENGTH)
    logits = runtime.load_model(point.write(tmp_path))(ids)
    assert relative(logits, case.oracle(point, ids)) < TOLERANCE


TINY = {"step3p5": Case(THREE_HEADS), "step3_text": Case(family="step3_text")}


@pytest.fixture(scope="module", params=TINY.values(), ids=TINY)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return runtime.load_model(request.param.make().write(tmp_path_factory.mktemp("canonical")))


@pytest.mark.parametrize("pieces", [(1,), (3,), (WINDOW,), (5, 20), (WINDOW + 1, WINDOW), (30,)], ids=str)
def test_decoding_equals_prefill(model: Any, pieces: tuple[int, ...]) -> None:
    """Prompts shorter and longer than the window, in pieces; then token by token, well past it."""
    ids = some_ids(2, LENGTH)
    full, state, start, found = model(ids), model.new_state(2, LENGTH), 0, []
    for length in (*pieces, *[1] * (LENGTH - sum(pieces))):
        found.append(model(ids[:, start : start + length], state))
        start += length
    assert relative(torch.cat(found, 1), full) < 1e-5


def test_only_the_window_is_kept(tmp_path: Path) -> None:
    model = runtime.load_model(Case().make().write(tmp_path))
    for draft in (0, 3):
        caches = model.new_state(1, 1000, draft).caches
        assert [type(cache) is WindowCache for cache in caches] == [False, True, True, False]
        assert [cache.k.shape[1] for cache in caches] == [1001, *[WINDOW + draft + 1] * 2, 1001]


def alone(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens.unsqueeze(0))[0]


def test_a_ragged_batch_equals_one_at_a_time(model: Any) -> None:
    """Prompts below, at and above the window; then calls with a different number of tokens for each sequence."""
    lengths = [3, WINDOW, 17, 26]
    rows = [some_ids(1, LENGTH, seed)[0] for seed in range(len(lengths))]
    state, have = model.new_state(4, LENGTH), [0] * 4
    for counts in (lengths, [1, 1, 1, 1], [2, 0, 5, 1], [9, 12, 1, 0], [1, 1, 1, 1]):
        width = max(counts)
        ids = torch.zeros(4, width, dtype=torch.int64)
        for row, (start, count) in enumerate(zip(have, counts)):
            ids[row, :count] = rows[row][start : start + count]
        logits = model(ids, state, counts=counts)
        for row, count in enumerate(counts):
            expected = alone(model, rows[row][: have[row] + count])[have[row] :]
            if count:
                assert relative(logits[row, :count], expected) < 1e-5
            have[row] += count
    assert state.lengths == have


@pytest.mark.parametrize("kept", [(0, 0), (1, 1), (4, 4), (1, 3), (0, 2), (4, 1)], ids=str)
def test_tokens_are_taken_back(model: Any, kept: tuple[int, int]) -> None:
    """Each call has three tokens too many, or some, or none; after it both sequences go on with other ones."""
    rows, wrong = [some_ids(1, 80, seed)[0] for seed in (1, 2)], some_ids(2, 80, 3)
    state, have = model.new_state(2, 80, draft=3), [13, 10]
    model(torch.stack([rows[0][:13], torch.cat([rows[1][:10], wrong[1, :3]])]), state, counts=[13, 10])
    for step in range(14):
        ids = wrong[:, 4 * step : 4 * step + 4].clone()
        for row, count in enumerate(kept):
            ids[row, :count] = rows[row][have[row] : have[row] + count]
        logits = model(ids, state)
        state.keep([4, 4], kept)
        for row, count in enumerate(kept):
            expected = alone(model, torch.cat([rows[row][: have[row]], ids[row]]))[have[row] :]
            assert relative(logits[row], expected) < 1e-5
            have[row] += count
        assert state.lengths == have


def draft_logits(model: Any, ids: Tensor, pieces: Iterable[int]) -> list[Tensor]:
    """Logits of each draft head on a whole sequence; heads are called on so many tokens at a time."""
    batch, length = ids.shape
    hidden, found = model.draft_input(model.hidden(ids)), []
    state = model.new_state(batch, length)
    for j, draft in enumerate(model.drafts):
        own = State([draft.new_cache(state.size)], state.size, [0] * batch)
        embedded = model.model.embed_tokens.lookup(ids[:, j + 1 :], torch.float32)
        outputs, start, left = [], 0, list(pieces)
        while start < embedded.shape[1]:
            rows = slice(start, start + (left.pop(0) if left else 1))
            at = model.model.turned(own.place(embedded[:, rows].shape[1], None))
            outputs.append(draft(hidden[:, :-1][:, rows], embedded[:, rows], at, own.caches[0]))
            own.advance(at.counts)
            start = rows.stop
        hidden = torch.cat(outputs, 1)
        found.append(draft.logits(hidden, model.head))
    return found


@pytest.mark.parametrize("pieces", [(LENGTH,), (12, 3)], ids=["at once", "in pieces"])
@pytest.mark.parametrize("changes", [TWO_HEADS, THREE_HEADS, THREE_HEADS | BY_KIND], ids=["two", "three", "by kind"])
@pytest.mark.parametrize("scheme", [None, "nvfp4"])
def test_draft_heads(changes: Mapping[str, Any], scheme: str | None, pieces: tuple[int, ...], tmp_path: Path) -> None:
    point, ids = Case(changes, everything(scheme) if scheme else plain).make(), some_ids(2, LENGTH)
    model = runtime.load_model(point.write(tmp_path), drafts=True)
    logits, heads = step_reference.step3p5(point.doubles, point.facts, ids)
    assert relative(model(ids), logits) < TOLERANCE
    found = draft_logits(model, ids, pieces)
    assert [one.shape[1] for one in found] == [LENGTH - j - 1 for j in range(len(heads))]
    for one, expected in zip(found, heads, strict=True):
        assert relative(one, expected) < TOLERANCE


def test_draft_heads_are_loaded_when_asked_for(tmp_path: Path) -> None:
    point, ids = Case(THREE_HEADS).make(), some_ids(1, 20)
    out = point.write(tmp_path / "complete")
    without, full = runtime.load_model(out), runtime.load_model(out, drafts=True)
    assert not any(name.startswith(("model.layers.4", "model.layers.5")) for name in without.state_dict())
    assert full.state_dict().keys() == point.tensors.keys()
    assert len(full.drafts) == 3
    assert torch.equal(without(ids), full(ids))
    assert len(full.new_state(1, 20).caches) == len(without.new_state(1, 20).caches) == 4
    bare = point.write(tmp_path / "bare", drafts=False)  # a config that speaks of heads which a repack left out
    assert torch.equal(runtime.load_model(bare)(ids), full(ids))
    with pytest.raises(FormatError, match="expected draft heads"):
        runtime.load_model(bare, drafts=True)


def test_experts_are_chosen_in_float32(tmp_path: Path) -> None:
    """In bfloat16 arithmetic too: rounded scores and biases would choose others."""
    point = Case().make()
    model = runtime.load_model(point.write(tmp_path), dtype=torch.bfloat16)
    moe, seen = model.model.layers[2].moe, {}
    moe.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    moe.experts.register_forward_pre_hook(lambda _, inputs: seen.update(chosen=inputs[1], weights=inputs[2]))
    model(some_ids(8, 200))
    logits = seen["x"].flatten(0, 1).double() @ point.doubles["model.layers.2.moe.gate.weight"].T
    biased = logits.sigmoid() + point.doubles["model.layers.2.moe.router_bias"]
    best = biased.sort(-1, descending=True)
    sure = (best.values[:, 2] - best.values[:, 3]) > 1e-6
    assert sure.float().mean() > 0.99
    chosen, weights = seen["chosen"][sure], seen["weights"][sure]
    assert torch.equal(chosen.sort(-1).values, best.indices[:, :3].sort(-1).values[sure])
    scores = logits.sigmoid()[sure].gather(-1, chosen)
    assert relative(weights, 3 * scores / scores.sum(-1, keepdim=True)) < 1e-6
    coarse = (logits.sigmoid() + point.dense["model.layers.2.moe.router_bias"].bfloat16())[sure].topk(3).indices
    assert not torch.equal(coarse.sort(-1).values, chosen.sort(-1).values)  # the case can tell


REFUSED = {
    "layer_kinds": ({"layer_kinds": [f"{FULL}.dense"] * 4}, "layer_kinds"),
    "mtp_layer_kinds": ({"mtp_layer_kinds": [f"{SLIDING}.sparse"]}, "mtp_layer_kinds"),
    "window": ({"sliding_window": None}, "sliding_window"),
    "sliding heads": ({"num_sliding_key_value_heads": 4}, "num_sliding_attention_heads"),
    "layer_scale": ({"layer_scale": True}, "layer_scale"),
    "mlp_layer_types": ({"mlp_layer_types": ["dense", "dense", "moe", "sparse"]}, "mlp_layer_types"),
    "no experts": ({"num_experts": 0, "num_experts_per_tok": 0}, "num_experts"),
    "too many": ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    "theta": ({"rope_theta": None}, "rope_theta"),
    "short thetas": ({"rope_theta": [5e6, 1e4, 1e4]}, "rope_theta"),
    "short factors": ({"partial_rotary_factors": [0.5]}, "partial_rotary_factors"),
    "odd factor": ({"partial_rotary_factors": [0.1] * 4}, "partial_rotary_factors"),
    "rope of one kind": ({"rope_parameters": {FULL: {"rope_theta": 1e4}}}, "rope_parameters"),
}


@pytest.mark.parametrize(("changes", "named"), REFUSED.values(), ids=REFUSED)
def test_facts_are_checked(changes: Mapping[str, Any], named: str, tmp_path: Path) -> None:
    point = Case().make()
    point.facts = STEP3P5 | dict(changes)
    with pytest.raises(FormatError, match=rf"architecture\.[a-z_ .]*{named}") as raised:
        runtime.load_model(point.write(tmp_path))
    assert "\n" not in str(raised.value)


def test_step3_has_one_key_and_value_head(tmp_path: Path) -> None:
    point = Case(family="step3_text").make()
    point.facts = STEP3 | {"num_key_value_heads": 2}
    with pytest.raises(FormatError, match="num_key_value_heads: expected 1, found 2"):
        runtime.load_model(point.write(tmp_path))


SOURCES = [("modelopt", "fp8"), ("modelopt", "fp8_pc_pt"), ("fp8", "block"), ("modelopt", "nvfp4")]
SOURCES += [("compressed-tensors", "mxfp8a16"), ("compressed-tensors", "mxfp4a16"), ("dense", "bf16")]


@pytest.mark.parametrize("family", ["step3p5", "step3_text"])
@pytest.mark.parametrize(("dialect", "scheme"), SOURCES, ids=[" ".join(source) for source in SOURCES])
def test_from_source_to_logits(family: str, dialect: str, scheme: str, tmp_path: Path) -> None:
    """A producer's checkpoint, converted and run, means the dense weights that it was made from."""
    mtp = family == "step3p5"
    built = build(tmp_path / "in", family=family, dialect=dialect, scheme=scheme, mtp=mtp, layout="X1")
    convert.convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = runtime.load_model(tmp_path / "out", activations="full", drafts=mtp)
    ids = some_ids(2, LENGTH) % built.architecture["vocab_size"]
    point = Checkpoint.__new__(Checkpoint)
    point.family, point.facts = family, built.architecture
    experts = ((f"moe.{part}_proj", f"moe.experts.{part}_proj") for part in ("gate", "up", "down"))
    names = dict(experts) | {"transformer.shared_head.output": "shared_head.head", "transformer.": ""}
    point.dense = {}
    for name, values in built.dense.items():
        for old, new in names.items():
            name = name.replace(old, new)
        point.dense[name] = torch.from_numpy(values.copy())
    assert relative(model(ids), reference_logits(point, ids)) < TOLERANCE
    if mtp:
        expected = step_reference.step3p5(point.doubles, point.facts, ids)[1]
        assert relative(draft_logits(model, ids, (20,))[0], expected[0]) < TOLERANCE

"""Nemotron-H against transformers, and what transformers lacks (draft heads, odd sizes) against formulas in float64.

Every network comes from a checkpoint as a producer writes it, converted.  Tolerances: as in `test_runtime_models.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import build
import pytest
import torch
from nemotron import Network, config_of, draft_weights, for_transformers, tiny, weights_of, write_source
from torch import Tensor

import convert
import runtime
from runtime.format import FormatError
from runtime.kernels import ssd
from runtime.state import CacheSize, State

TOLERANCE = 1e-4
LATENT = {"moe_latent_size": 32}
GROUPED = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
BIASES = {"use_bias": True, "mlp_bias": True}
SCHEMES = ("fp8_tensor", "fp8_channel", "fp8_block", "nvfp4", "mxfp8", "mxfp4")


@dataclass(frozen=True)
class Case:
    """One network: its blocks, how its config differs, how it is quantised."""

    pattern: str
    changes: dict[str, Any] = field(default_factory=dict)
    scheme: str | None = None


CASES = {
    "dense": Case("M-M*-"),
    "dense biases": Case("M-*-", BIASES),
    "tied": Case("M-*-", {"tie_word_embeddings": True}),
    "no convolution bias": Case("M-*-", {"use_conv_bias": False, "conv_kernel": 3}),
    "one group of heads": Case("M*M-", {"n_groups": 1}),
    "four groups of heads": Case("M*M-", {"n_groups": 4}),
    "time step limits": Case("M-M*-", {"time_step_limit": (0.1, 0.6)}),
    "moe": Case("MEM*E"),
    "moe weights as they are": Case("ME*E", {"norm_topk_prob": False}),
    "moe grouped": Case("MEM*E", GROUPED),
    "moe latent": Case("MEM*E", LATENT),
    "moe latent grouped": Case("MEM*-E", LATENT | GROUPED, "nvfp4"),
    **{f"all kinds {scheme}": Case("MEM*-E", {}, scheme) for scheme in SCHEMES},
}


@dataclass
class Pair:
    """Our model and transformers' logits for the same ids."""

    model: Any
    ids: Tensor
    expected: Tensor


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(0))


def load(source: Path, **options: Any) -> Any:
    """Convert and load, with inputs in full precision."""
    out = source.with_name(f"{source.name}-out")
    convert.convert_checkpoint(source, out)
    return runtime.load_model(out, activations="full", **options)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case: Case = request.param
    reference = tiny(case.pattern, **case.changes)
    source = tmp_path_factory.mktemp("nemotron") / "in"
    dense = write_source(source, weights_of(reference), config_of(reference), case.scheme)
    reference.load_state_dict(for_transformers(dense, reference), strict=True)
    ids = ids_of(2, 90)  # more than one chunk of 64
    with torch.no_grad():
        expected = reference(ids).logits
    return Pair(load(source), ids, expected)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_logits_equal_transformers(pair: Pair) -> None:
    assert relative(pair.model(pair.ids), pair.expected) < TOLERANCE
    assert relative(pair.model(pair.ids, last_only=True), pair.expected[:, -1:]) < TOLERANCE


def test_decoding_equals_prefill(pair: Pair) -> None:
    full = pair.model(pair.ids)
    state = pair.model.new_state(2, 90)
    pieces = [pair.model(pair.ids[:, :3], state), pair.model(pair.ids[:, 3:75], state)]  # a prompt in two pieces
    pieces += [pair.model(pair.ids[:, t : t + 1], state) for t in range(75, 90)]
    assert relative(torch.cat(pieces, 1), full) < 1e-5


def test_ragged_batch_equals_one_at_a_time(pair: Pair) -> None:
    """Prompts of 70 and 2 tokens, then calls that have more for one sequence than for the other, or nothing."""
    full = pair.model(pair.ids)
    state, at = pair.model.new_state(2, 90), [0, 0]
    for counts in ([70, 2], [1, 5], [0, 3], [2, 1], [1, 1]):
        ids = torch.full((2, max(counts)), 95)  # what stands after the real tokens must not matter
        for row, count in enumerate(counts):
            ids[row, :count] = pair.ids[row, at[row] : at[row] + count]
        logits = pair.model(ids, state, counts=counts)
        for row, count in enumerate(counts):
            assert count == 0 or relative(logits[row, :count], full[row, at[row] : at[row] + count]) < 1e-5
            at[row] += count


def test_tokens_are_taken_back(pair: Pair) -> None:
    full = pair.model(pair.ids)
    state = pair.model.new_state(2, 90, draft=3)
    pair.model(pair.ids[:, :70], state)
    guesses = pair.ids[:, 70:74].clone()
    guesses[0, 2:], guesses[1, 1:] = 95, 94  # of row 0 two are right, of row 1 one
    pair.model(guesses, state)
    state.keep([4, 4], [2, 1])
    assert state.lengths == [72, 71]
    rest = torch.stack([pair.ids[0, 72:82], pair.ids[1, 71:81]])
    logits = pair.model(rest, state)
    assert relative(logits, torch.stack([full[0, 72:82], full[1, 71:81]])) < 1e-5


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_ssd_equals_the_recurrence_in_float64(tokens: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd, "SEGMENT", 128)
    generator = torch.Generator().manual_seed(tokens)
    heads, size, n = 6, 12, 8
    x = torch.randn(2, heads, tokens, size, generator=generator)
    b, c = (torch.randn(2, groups, tokens, n, generator=generator) for _ in range(2))
    g = -torch.rand(2, heads, tokens, generator=generator) * torch.tensor([0, 1e-3, 0.1, 1, 10, 100])[:, None]
    start = torch.randn(2, heads, size, n, generator=generator)

    state, expected = start.double(), []
    for t in range(tokens):
        b_t, c_t = (y[:, :, t].double().repeat_interleave(heads // groups, 1) for y in (b, c))
        state = state * g[:, :, t].double().exp()[..., None, None]
        state = state + torch.einsum("bhp,bhn->bhpn", x[:, :, t].double(), b_t)
        expected.append(torch.einsum("bhpn,bhn->bhp", state, c_t))

    found_state = start.clone()
    found = ssd.ssd(x, b, c, g, found_state)
    assert relative(found, torch.stack(expected, 2)) < 1e-6
    assert relative(found_state, state) < 1e-6


def test_bfloat16_is_close(tmp_path: Path) -> None:
    """bfloat16 arithmetic against transformers in bfloat16, which rounds more often."""
    reference = tiny("MEM*-E")
    dense = write_source(tmp_path / "in", weights_of(reference), config_of(reference), None)
    reference.load_state_dict(for_transformers(dense, reference), strict=True)
    model, ids = load(tmp_path / "in", dtype=torch.bfloat16), ids_of(1, 20)
    with torch.no_grad():
        expected = reference(ids).logits
        rounded = reference.bfloat16()(ids).logits.float()
    noise = (rounded - expected).norm() / expected.norm()
    assert (model(ids) - expected).norm() / expected.norm() < 1.5 * noise


def test_runs_what_transformers_saves(tmp_path: Path) -> None:
    reference = tiny("MEM*-E", **LATENT)
    reference.save_pretrained(tmp_path / "in")
    ids = ids_of(1, 30)
    with torch.no_grad():
        expected = reference(ids).logits
    assert relative(load(tmp_path / "in")(ids), expected) < TOLERANCE


# ------------------------------------------------------------------------------- what transformers has no network for


def biased_attention(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """transformers gives the attention of this family no bias, whatever the config says."""
    config["attention_bias"] = True
    for name in [n for n in weights if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))]:
        weights[name.replace("weight", "bias")] = 0.5 * torch.randn(len(weights[name]))


def sizes_by_block(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """A pruned model: the second MLP block is smaller."""
    config["intermediate_size"] = [96, 32]
    name = f"backbone.layers.{config['hybrid_override_pattern'].rindex('-')}.mixer"
    weights[f"{name}.up_proj.weight"] = weights[f"{name}.up_proj.weight"][:32].clone()
    weights[f"{name}.down_proj.weight"] = weights[f"{name}.down_proj.weight"][:, :32].clone()


def shared_experts(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Two shared experts of half the size are stored as one."""
    config |= {"n_shared_experts": 2, "moe_shared_expert_intermediate_size": 32}


@pytest.mark.parametrize("change", [biased_attention, sizes_by_block, shared_experts], ids=lambda f: f.__name__)
def test_logits_equal_formulas(change: Callable[[dict[str, Tensor], dict[str, Any]], None], tmp_path: Path) -> None:
    reference = tiny("M-*E-")
    weights, config = weights_of(reference), config_of(reference)
    change(weights, config)
    formulas = Network(write_source(tmp_path / "in", weights, config, "nvfp4"), config)
    ids = ids_of(1, 70)
    assert relative(load(tmp_path / "in")(ids)[0], formulas.logits(formulas.hidden(ids[0]))) < TOLERANCE


@pytest.mark.parametrize("model", build.FAMILIES["nemotron_h"].models)
def test_every_layout_runs(model: str, tmp_path: Path) -> None:
    """Checkpoints of the matrix of conversions, one of each kind of model: wrappers, stacked experts, per-expert scales."""
    options = build.FAMILIES["nemotron_h"].models[model]
    built = build.build(tmp_path / "in", family="nemotron_h", dialect="modelopt", scheme="fp8", **options)
    config = json.loads((built.directory / "config.json").read_text())
    formulas = Network(apart(built.dense), config.get("llm_config", config))
    ids = torch.arange(70) % built.architecture["vocab_size"]
    found = load(tmp_path / "in", drafts=options.get("mtp", False))(ids[None])[0]
    assert relative(found, formulas.logits(formulas.hidden(ids))) < TOLERANCE


def apart(dense: dict[str, Any]) -> dict[str, Any]:
    """Stacked experts one by one."""
    found = {}
    for name, value in dense.items():
        if ".experts." in name and value.ndim == 3:
            container, _, projection = name.removesuffix(".weight").rpartition(".")
            found |= {f"{container}.{e}.{projection}.weight": one for e, one in enumerate(value)}
        else:
            found[name] = value
    return found


def test_kv_cache_is_rounded_to_e4m3(tmp_path: Path) -> None:
    """K and V as nvidia-modelopt simulates it."""
    options = {"family": "nemotron_h", "dialect": "modelopt", "scheme": "fp8_weight_only", "kv": "tensor"}
    built = build.build(tmp_path / "in", **options, variety="dense")
    scales = {c: torch.tensor(built.canonical[f"model.layers.2.mixer.{c}_scale"].floats()).double() for c in "kv"}

    def rounded(x: Tensor, letter: str) -> Tensor:
        return (x / scales[letter]).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scales[letter]

    config, ids = json.loads((built.directory / "config.json").read_text()), torch.arange(30)
    plain, formulas = Network(built.dense, config), Network(built.dense, config, rounded)
    without, expected = plain.logits(plain.hidden(ids)), formulas.logits(formulas.hidden(ids))
    assert relative(without, expected) > 10 * TOLERANCE  # the rounding is visible
    assert relative(load(tmp_path / "in")(ids[None])[0], without) < TOLERANCE
    assert relative(runtime.load_model(tmp_path / "in-out")(ids[None])[0], expected) < TOLERANCE


# ----------------------------------------------------------------------------------------------------------- drafts


@pytest.mark.parametrize("scheme", [None, "nvfp4"])
@pytest.mark.parametrize(("heads", "changes"), [(1, {}), (2, LATENT)], ids=["one head", "two heads, latent"])
def test_drafts_equal_formulas(heads: int, changes: dict[str, Any], scheme: str | None, tmp_path: Path) -> None:
    """Head j joins what the head before made of each token with the token j + 1 places on; all at once and in pieces."""
    reference = tiny("M*E", **changes)
    weights = weights_of(reference, draft_weights(reference, heads))
    config = config_of(reference) | {"num_nextn_predict_layers": heads, "mtp_hybrid_override_pattern": "*E"}
    formulas = Network(write_source(tmp_path / "in", weights, config, scheme), config)
    model = load(tmp_path / "in", drafts=True)
    assert len(model.drafts) == heads
    ids, length = ids_of(1, 80), 70
    expected, hidden = formulas.hidden(ids[0, :length]), model.draft_input(model.hidden(ids[:, :length]))
    for j, draft in enumerate(model.drafts):
        following = ids[:, 1 + j : 1 + j + length]
        expected = formulas.draft(j, expected, following[0])
        whole = run(model, draft, hidden, following, (length,))
        assert relative(whole[0], expected) < TOLERANCE
        assert relative(draft.logits(whole, model.head)[0], formulas.logits(expected)) < TOLERANCE
        assert relative(run(model, draft, hidden, following, (40, 1, 27, 1, 1)), whole) < 1e-5
        hidden = whole


@torch.no_grad()
def run(model: Any, draft: Any, hidden: Tensor, ids: Tensor, pieces: tuple[int, ...]) -> Tensor:
    """A draft head over `[B, T, H]` and int64 `[B, T]`, so many tokens at a time."""
    size = CacheSize(1, ids.shape[1], 0, model.device, model.model.dtype)
    state, outputs = State([draft.new_cache(size)], size, [0]), []
    for x, tokens in zip(hidden.split(pieces, 1), ids.split(pieces, 1), strict=True):
        at = state.place(tokens.shape[1], None)
        outputs.append(draft(x, model.model.embed_tokens.lookup(tokens, x.dtype), at, state.caches[0]))
        state.advance(at.counts)
    return torch.cat(outputs, 1)


def test_drafts_are_refused_where_there_are_none(tmp_path: Path) -> None:
    reference = tiny("M*E")
    write_source(tmp_path / "in", weights_of(reference), config_of(reference), None)
    with pytest.raises(FormatError, match="draft heads"):
        load(tmp_path / "in", drafts=True)


REFUSED: dict[str, tuple[dict[str, Any], bool]] = {
    "layer_types": ({"layer_types": ["mamba", "conv", "moe"]}, False),
    "mlp_hidden_act": ({"mlp_hidden_act": "silu"}, False),
    "mamba_num_heads": ({"n_groups": 3}, False),
    "conv_kernel": ({"conv_kernel": 0}, False),
    "time_step_limit": ({"time_step_limit": [0.0]}, False),
    "intermediate_size": ({"layer_types": ["mamba", "mlp", "moe"], "intermediate_size": None}, False),
    "n_routed_experts": ({"n_group": 3}, False),
    "topk_group": ({"topk_group": 2}, False),
    "num_experts_per_tok": ({"num_experts_per_tok": 9}, False),
    "moe_latent_size": ({"layer_types": ["mamba", "attention", "latent_moe"]}, False),
    "mtp_layer_types": ({"num_nextn_predict_layers": 1, "mtp_layer_types": ["start_mamba", "moe_end"]}, True),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("nemotron") / "in"
    reference = tiny("M*E")
    write_source(source, weights_of(reference), config_of(reference), None)
    convert.convert_checkpoint(source, source.with_name("out"))
    return source.with_name("out")


@pytest.mark.parametrize(("name", "case"), REFUSED.items(), ids=REFUSED)
def test_refuses_other_networks(name: str, case: tuple[dict[str, Any], bool], converted: Path, tmp_path: Path) -> None:
    changes, drafts = case
    config = json.loads((converted / "config.json").read_text())
    config["architecture"] |= changes
    config["carried"] = ["mtp"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=rf"architecture\.{name}: expected .*; convert again"):
        runtime.load_model(tmp_path, drafts=drafts)

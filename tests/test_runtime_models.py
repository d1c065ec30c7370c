"""The networks against transformers, loaded with the dense weights that the canonical checkpoint stands for.

Tolerance 1e-4 of the largest logit: transformers sums in another order, and these small random networks amplify a
relative change of 1e-7 in the embedding to about 1e-5 in the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from canonical import Quant, tiny_qwen3, tiny_qwen3_5, write
from torch import Tensor

import runtime
from runtime.kernels import gated_delta

TOLERANCE = 1e-4
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}


def everything(scheme: str) -> Callable[[str], Quant | None]:
    """Quantise every projection; `in_proj_ba` stays dense, as producers leave it."""
    return lambda name: None if name.endswith(("in_proj_ba", "embed_tokens", "lm_head")) else Quant(scheme)


def mixed(name: str) -> Quant | None:
    """A scheme per kind of module, as mixed-precision exports have."""
    schemes = {
        "q_proj": "nvfp4", "v_proj": "fp8_channel", "gate_proj": "mxfp8", "in_proj_qkv": "fp8_tensor",
        "o_proj": "mxfp4", "out_proj": "fp8_block", "down_proj": "nvfp4", "lm_head": "nvfp4", "embed_tokens": "fp8_channel",
        "in_proj_b": "fp8_tensor",
    }  # fmt: skip
    kind = schemes.get(name.rpartition(".")[2])
    return Quant(kind, pre_quant_scale=name.endswith("down_proj")) if kind else None


@dataclass(frozen=True)
class Case:
    """One network: how transformers builds it and how it is stored."""

    make: Callable[..., Any]
    changes: dict[str, Any] = field(default_factory=dict)
    quant: Callable[[str], Quant | None] = lambda name: None
    unfuse: bool = False
    gate: str = "silu"


CASES = {
    "qwen3 dense": Case(tiny_qwen3),
    "qwen3 tied": Case(tiny_qwen3, {"tie_word_embeddings": True}),
    "qwen3 tied quantised": Case(tiny_qwen3, {"tie_word_embeddings": True}, quant=lambda name: Quant("fp8_channel")),
    "qwen3 bias": Case(tiny_qwen3, {"attention_bias": True}, everything("fp8_tensor")),
    "qwen3 sliding": Case(tiny_qwen3, SLIDING),
    "qwen3 rope linear": Case(tiny_qwen3, {"rope_parameters": LINEAR}),
    "qwen3 rope llama3": Case(tiny_qwen3, {"rope_parameters": LLAMA3}),
    "qwen3 rope yarn": Case(tiny_qwen3, {"rope_parameters": YARN}),
    "qwen3 rope yarn untruncated": Case(tiny_qwen3, {"rope_parameters": YARN | {"truncate": False, "beta_fast": 8}}),
    "qwen3 unfused": Case(tiny_qwen3, quant=mixed, unfuse=True),
    "qwen3_5 dense": Case(tiny_qwen3_5),
    "qwen3_5 tied": Case(tiny_qwen3_5, {"tie_word_embeddings": True}),
    "qwen3_5 sigmoid gate": Case(tiny_qwen3_5, gate="sigmoid"),
    "qwen3_5 unfused": Case(tiny_qwen3_5, quant=mixed, unfuse=True),
    **{
        f"{name} {scheme}": Case(make, quant=everything(scheme))
        for name, make in (("qwen3", tiny_qwen3), ("qwen3_5", tiny_qwen3_5))
        for scheme in ("fp8_tensor", "fp8_channel", "fp8_block", "nvfp4", "mxfp8", "mxfp4")
    },
}


@dataclass
class Pair:
    """Our model and transformers' logits for the same ids."""

    model: Any
    ids: Tensor
    expected: Tensor


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case: Case = request.param
    reference = case.make(**case.changes)
    groups = {"self_attn.qkv_proj", "mlp.gate_up_proj", "linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"}
    layers = reference.config.get_text_config().layer_types
    unfused = {
        f"model.layers.{i}.{group}"
        for i, kind in enumerate(layers)
        for group in groups
        if case.unfuse and group.startswith(("mlp", "linear_attn" if kind == "linear_attention" else "self_attn"))
    }
    out = tmp_path_factory.mktemp("canonical")
    dense = write(out, reference, quant=case.quant, unfused=unfused)
    if case.gate != "silu":
        set_gate(out, reference, case.gate)
    reference.load_state_dict(dense, strict=True)
    ids = torch.randint(0, 96, (2, 90), generator=torch.Generator().manual_seed(0))  # more than one chunk of 64
    with torch.no_grad():
        expected = reference(ids).logits
    return Pair(runtime.load_model(out), ids, expected)


def set_gate(out: Path, reference: Any, gate: str) -> None:
    config = out / "config.json"
    config.write_text(config.read_text().replace('"output_gate": "silu"', f'"output_gate": "{gate}"'))
    for module in reference.modules():
        if type(module).__name__ == "Qwen3_5RMSNormGated":
            module.activation = gate


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def rms(found: Tensor, expected: Tensor) -> float:
    """Differences of summation order reach 1e-5 in single logits and vary from run to run; their size as a whole does not."""
    return float((found - expected).norm() / expected.norm())


def test_logits_equal_transformers(pair: Pair) -> None:
    logits = pair.model(pair.ids)
    assert logits.dtype == torch.float32
    assert logits.shape == pair.expected.shape
    assert relative(logits, pair.expected) < TOLERANCE
    assert relative(pair.model(pair.ids, last_only=True), pair.expected[:, -1:]) < TOLERANCE


def test_decoding_equals_prefill(pair: Pair) -> None:
    full = pair.model(pair.ids)
    state = pair.model.new_state(2, 90)
    pieces = [pair.model(pair.ids[:, :3], state), pair.model(pair.ids[:, 3:75], state)]  # a prompt in two pieces
    pieces += [pair.model(pair.ids[:, t : t + 1], state) for t in range(75, 90)]
    assert rms(torch.cat(pieces, 1), full) < 1e-5
    with pytest.raises(ValueError, match="max_length"):
        pair.model(pair.ids[:, :1], state)


def test_bfloat16_is_close(tmp_path: Path) -> None:
    """bfloat16 arithmetic against transformers in bfloat16: both round to 8 bits, in the same places."""
    for make in (tiny_qwen3, tiny_qwen3_5):
        reference = make()
        out = tmp_path / make.__name__
        reference.load_state_dict(write(out, reference), strict=True)
        ids = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = reference(ids).logits
            rounded = reference.bfloat16()(ids).logits.float()
        model = runtime.load_model(out, dtype=torch.bfloat16)
        noise = (rounded - expected).norm() / expected.norm()
        assert (model(ids) - expected).norm() / expected.norm() < 1.5 * noise


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_5])
def test_kv_cache_is_rounded_to_e4m3(make: Callable[..., Any], tmp_path: Path) -> None:
    """K after the rotary embedding and V, as nvidia-modelopt simulates it: transformers with both rounded on their way
    into attention."""
    reference = make()
    layer = 3 if make is tiny_qwen3_5 else 1
    scales = {f"model.layers.{layer}.self_attn": ([0.01, 0.03], [0.02, 0.005])}
    reference.load_state_dict(write(tmp_path, reference, kv_cache=scales), strict=True)
    ids = torch.randint(0, 96, (1, 30), generator=torch.Generator().manual_seed(0))

    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def rounding(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        if module.layer_idx == layer:
            k_scale, v_scale = (torch.tensor(s)[:, None, None] for s in next(iter(scales.values())))
            k = (k / k_scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * k_scale
            v = (v / v_scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * v_scale
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    ALL_ATTENTION_FUNCTIONS["rounding"] = rounding
    with torch.no_grad():
        plain = reference(ids).logits
        reference.set_attn_implementation("rounding")
        expected = reference(ids).logits
    assert relative(plain, expected) > 10 * TOLERANCE  # the rounding is visible
    assert relative(runtime.load_model(tmp_path)(ids), expected) < TOLERANCE
    assert relative(runtime.load_model(tmp_path, activations="full")(ids), plain) < TOLERANCE


def test_quantised_activations_reach_every_layer(tmp_path: Path) -> None:
    """Transformers with the input of each projection rounded to E4M3 by a hook, in float32."""
    reference = tiny_qwen3()
    scale = 0.02

    def quant(name: str) -> Quant | None:
        return None if name.endswith(("embed_tokens", "lm_head")) else Quant("fp8_channel", "fp8_static", False, (scale,))

    reference.load_state_dict(write(tmp_path, reference, quant=quant), strict=True)
    ids = torch.randint(0, 96, (1, 30), generator=torch.Generator().manual_seed(0))
    for name, layer in reference.named_modules():
        if name.endswith("_proj"):
            layer.register_forward_pre_hook(
                lambda _, inputs: ((inputs[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale,)
            )
    with torch.no_grad():
        expected = reference(ids).logits
    # Inputs that differ in the last bit may round to neighbouring codes, 6% apart: compare the mean, not the maximum.
    difference = (runtime.load_model(tmp_path)(ids) - expected).norm() / expected.norm()
    full = (runtime.load_model(tmp_path, activations="full")(ids) - expected).norm() / expected.norm()
    assert difference < 1e-3 < full / 5


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 200])
def test_gated_delta_equals_the_recurrence_in_float64(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_delta, "SEGMENT", 128)
    generator = torch.Generator().manual_seed(tokens)
    heads, dk, dv = 3, 8, 12
    q, k = (torch.nn.functional.normalize(torch.randn(2, heads, tokens, dk, generator=generator), dim=-1) for _ in range(2))
    v = torch.randn(2, heads, tokens, dv, generator=generator)
    g = -3 * torch.rand(2, heads, tokens, generator=generator)
    beta = torch.rand(2, heads, tokens, generator=generator)
    start = torch.randn(2, heads, dk, dv, generator=generator)

    state, expected = start.double(), []
    for t in range(tokens):
        q_t, k_t, v_t = (x[:, :, t].double() for x in (q, k, v))
        state = state * g[:, :, t].double().exp()[..., None, None]
        write_t = beta[:, :, t].double()[..., None] * (v_t - torch.einsum("bhkv,bhk->bhv", state, k_t))
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, write_t)
        expected.append(torch.einsum("bhkv,bhk->bhv", state, q_t))

    found_state = start.clone()
    found = gated_delta.gated_delta(q, k, v, g, beta, found_state)
    assert relative(found, torch.stack(expected, 2)) < 1e-6
    assert relative(found_state, state) < 1e-6


@pytest.mark.parametrize(
    "ids", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 3)], ids=str
)
def test_model_refuses_what_are_not_ids(ids: Tensor, tmp_path: Path) -> None:
    write(tmp_path, tiny_qwen3())
    with pytest.raises(ValueError, match="input_ids: expected int64"):
        runtime.load_model(tmp_path)(ids)

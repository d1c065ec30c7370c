"""Kernels of experts without a GPU: both stages in Triton's interpreter against float64, and the layer that uses them."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from runtime.builder import LayerBuilder
from runtime.experts import Experts
from runtime.format import CanonicalConfig, ModuleSpec
from runtime.layers import Linear
from runtime.routing import Router, Rule

pytest.importorskip("triton", reason="triton is not installed")

from runtime.kernels import fp8_experts, fp8_linear, nvfp4_experts, nvfp4_linear, router, slots, table, tiles
from runtime.kernels.cases import ExpertCase

CPU = torch.device("cpu")
LINEARS = {fp8_experts: fp8_linear, nvfp4_experts: nvfp4_linear}
TOLERANCE = 1e-5  # of the largest result, which a clipped activation holds below the sums
TINY = [(module, case) for module in LINEARS for case in module.CASES if case.tiny]


def label(value: object) -> str | None:
    return str(value) if isinstance(value, ExpertCase) else None


def builder(modules: dict[str, ModuleSpec]) -> LayerBuilder:
    """For a network with these modules."""
    return LayerBuilder(CanonicalConfig("test", {}, modules, {}, {}, (), {}), CPU, torch.bfloat16)


def check(module: ModuleType, case: ExpertCase, *plan: slots.Plan) -> None:
    """Both stages with fresh inputs and poisoned outputs."""
    found = slots.errors(module, LINEARS[module].reference, case, CPU, 0, plan)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(("module", "case"), TINY, ids=label)
def test_slots(module: ModuleType, case: ExpertCase) -> None:
    check(module, case, (2, None, None))


@pytest.mark.parametrize(("module", "case"), TINY[:1] + TINY[3:9:2] + TINY[8:11], ids=label)
def test_blocks(module: ModuleType, case: ExpertCase) -> None:
    check(module, case, (5, 4, tiles.Tiles(64, 4, 1, -(-max(case.H, case.inner) // 128), 2, 2)))


@pytest.mark.parametrize(("module", "case"), [TINY[i] for i in (2, 3, 5, 8, 9, 12)], ids=label)
def test_wide_blocks(module: ModuleType, case: ExpertCase) -> None:
    check(module, case, (5, slots.WIDE, None))


@pytest.mark.parametrize("module", LINEARS)
def test_blocks_are_as_wide_as_slots_are_many(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per expert, on average, and a quarter more.  Narrow blocks, of which an expert fills several, give the same up to the
    rounding of h."""
    case = replace(module.CASES[5 if module is fp8_experts else 3], E=1, per_token=1, inner=16, H=32)
    run = module.prepare(*case.specs(), *case.tensors(CPU, 0), case.activation())
    x, (chosen, share), seen = slots.inputs(66, case.H, CPU, 0), case.chosen(66, CPU, 0), []

    def sort_slots(chosen: Tensor, experts: int, tokens: int) -> slots.Blocks:
        seen.append(tokens)
        return sorted_(chosen, experts, tokens)

    sorted_ = slots.sort_slots
    monkeypatch.setattr(slots, "sort_slots", sort_slots)
    monkeypatch.setattr(slots, "FEW_SLOTS", 0)
    found = run(x, chosen, share).float()
    for T in (52, 51):
        run(x[:T], chosen[:T], share[:T])
    expected = replace(run, block_tokens=(16,))(x, chosen, share).float()
    assert seen == [128, 128, 64, 16]
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_blocks_hold_every_slot_once() -> None:
    """Also where an expert has none, and where one has more than a block; empty blocks come last."""
    chosen = torch.tensor([[5, 1], [1, 0], [1, 5], [5, 1], [3, 1]])
    blocks = slots.sort_slots(chosen, 6, 2)
    rows, taken = blocks.table.tolist(), []
    for expert, start, stop in rows:
        assert stop - start <= 2
        assert all(chosen.flatten()[slot] == expert for slot in blocks.order[start:stop])
        taken += blocks.order[start:stop].tolist()
    assert sorted(taken) == list(range(10))
    full = [stop > start for _, start, stop in rows]
    assert full == sorted(full, reverse=True)


LAYERS = [  # case, whether its kernel takes it
    (fp8_experts.CASES[5], True),
    (fp8_experts.CASES[6], True),
    (fp8_experts.CASES[8], True),
    (nvfp4_experts.CASES[0], True),
    (ExpertCase("whole input", "fp8_tensor", 4, 2, 64, 128, "fp8_tensor"), False),
]


@pytest.mark.parametrize(("case", "taken"), LAYERS, ids=label)
def test_the_layer_uses_the_table(case: ExpertCase, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that believes its CPU to be a GPU: bfloat16 takes the kernels where they know the input, float32 does not."""
    monkeypatch.setattr(table, "machine", lambda device: table.Machine(90, True))
    name = "gate_up_proj" if case.gated else "up_proj"
    first, down = case.specs()
    build = builder({f"x.{name}": first, "x.down_proj": down})
    layer = Experts(build, "x", case.E, case.inner, case.H, case.activation(), case.gated)
    for stack, tensors in zip((layer.first.stacks[0], layer.down_proj), case.tensors(CPU, 0), strict=True):
        for role, tensor in tensors.items():
            setattr(stack, role, torch.nn.Parameter(tensor, requires_grad=False))
    x, (chosen, share) = slots.inputs(3, case.H, CPU, 0), case.chosen(3, CPU, 0)
    assert (layer._kernel is not None) == taken
    expected, found = layer(x.float(), chosen, share), layer(x, chosen, share)
    assert found.dtype == torch.bfloat16
    # two roundings to bfloat16, which the interpreter does by truncation, and codes of inputs that differ by one of them
    assert (found.float() - expected).abs().max() < 0.04 * expected.abs().max()
    assert layer(x[:0], chosen[:0], share[:0]).shape == (0, case.H)
    assert set(layer.state_dict()) == {f"{name}.{role}" for role in case.tensors(CPU, 0)[0]} | {
        f"down_proj.{role}" for role in case.tensors(CPU, 0)[1]
    }


def test_partitions_with_scales_of_their_own_are_left_to_torch() -> None:
    case = fp8_experts.CASES[5]
    (first, down), (a, b) = case.specs(), case.tensors(CPU, 0)
    a["input_scale"][1, 1] *= 2
    assert fp8_experts.prepare(first, down, a, b, case.activation()) is None


# The router


@pytest.mark.parametrize("case", [case for case in router.CASES if case.tiny], ids=str)
def test_router(case: router.Case) -> None:
    for seed in range(3):
        assert max(router.errors(case, CPU, seed).values()) < 1e-6


def test_the_first_of_equals_is_chosen() -> None:
    """All experts are equally good: weights are equal, and no expert is chosen twice."""
    chosen, weights, _ = router.prepare(Rule(3, "softmax", True), torch.zeros(5, 8), None)(torch.ones(2, 8).bfloat16())
    assert chosen.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(weights, torch.full((2, 3), 1 / 3))


def test_routers_use_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that believes its CPU to be a GPU chooses as one that does not; its matrix may be float32."""
    case = router.CASES[3]
    x, weight, bias, _ = router.make_inputs(case, CPU, 0)
    gate = Linear(case.E, case.H)
    gate.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    there, here = (Router(case.rule, gate, lambda: bias) for _ in range(2))
    expected = here(x)
    assert here._kernel is None
    monkeypatch.setattr(table, "machine", lambda device: table.Machine(90, True))
    assert there._kernel is not None
    found = there(x)
    assert torch.equal(found[0].sort().values, expected[0].sort().values)
    assert torch.allclose(found[1].sort().values, expected[1].sort().values)
    assert torch.equal(there(x.float())[0], expected[0])


@pytest.mark.parametrize(("dtype", "launched"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_a_gate_beside_the_router(dtype: torch.dtype, launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logit is that of the layer, which is asked itself where the router's kernel is not for it."""
    case = next(case for case in router.CASES if case.beside)
    x, weight, _, row = router.make_inputs(case, CPU, 0)
    gate, beside, asked = Linear(case.E, case.H), Linear(1, case.H), []
    gate.weight = torch.nn.Parameter(weight, requires_grad=False)
    beside.weight = torch.nn.Parameter(row.to(dtype), requires_grad=False)
    beside.register_forward_hook(lambda *_: asked.append(1))
    there, here = (Router(case.rule, gate, beside=beside) for _ in range(2))
    expected = here.with_logit(x)
    assert asked == [1]
    assert torch.equal(expected[2], beside(x))
    monkeypatch.setattr(table, "machine", lambda device: table.Machine(90, True))
    asked.clear()
    found = there.with_logit(x)
    assert len(asked) == (0 if launched else 1)
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in expected]
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[2].float(), expected[2].float(), rtol=2**-7)
    assert torch.equal(there.with_logit(x.float())[2], beside(x.float()))

"""Rotary positions with the norms of heads, in Triton's interpreter: against float64, and in the place of torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed")

from runtime.kernels import rotary, table
from runtime.norms import LateRoundingRMSNorm, RMSNorm, ZeroCenteredRMSNorm
from runtime.rotary import Rope, rotate
from runtime.state import Tokens

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("case", [case for case in rotary.CASES if case.tiny], ids=str)
def test_rotary(case: rotary.Case) -> None:
    """Bit for bit what float64 rounds to, but for the last bit of few norms."""
    assert max(rotary.errors(case, CPU, 0).values()) < 1e-6


@pytest.mark.parametrize("position", [0, 1, 3, 4095, 131071, 262143, 1048576])
def test_cosines_of_any_position(position: int) -> None:
    """Every quadrant, and angles of which float32 keeps less than the eighth of a turn."""
    inv_freq = 1e4 ** -(torch.arange(0, 128, 2) / 128)
    positions = torch.tensor([[position]])
    exact = rotary.reference_turns(positions, inv_freq, 1.0)
    for found, expected in zip(rotary.turns(positions, inv_freq, 1.0), exact):
        assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize(
    ("norm", "gated"), [(None, False), (RMSNorm, False), (LateRoundingRMSNorm, False), (ZeroCenteredRMSNorm, True)]
)
def test_heads_in_the_place_of_torch(norm: type[RMSNorm] | None, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that believes to be a GPU: one launch for cosines and sines, one for norms and positions, and torch's results."""
    B, T, D, heads, kv_heads = 2, 3, 24, 3, 2
    random = torch.Generator().manual_seed(0)
    norms = [norm(D, 1e-6) if norm else None for _ in "qk"]
    for each in norms:
        if each is not None:
            each.weight = nn.Parameter(torch.randn(D, generator=random).bfloat16(), requires_grad=False)
    q_size = D * (2 if gated else 1)
    x = torch.randn(B, T, heads * q_size + 2 * kv_heads * D, generator=random).bfloat16()
    q, k, _ = x.split([heads * q_size, kv_heads * D, kv_heads * D], -1)
    q, k = q.unflatten(-1, (heads, -1))[..., :D].transpose(1, 2), k.unflatten(-1, (kv_heads, D)).transpose(1, 2)
    rope = Rope(1e4, YARN, 16, CPU)
    positions = torch.tensor([[5, 6, 7], [900, 901, 902]])
    launches: list[str] = []

    def note(kernel: Any) -> None:
        run = kernel.run
        monkeypatch.setattr(kernel, "run", lambda *a, **b: (launches.append(kernel.fn.__name__), run(*a, **b)))

    note(rotary.turns_kernel)
    note(rotary.rotate_kernel)

    def turned(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        at = Tokens((5, 900), (3, 3), positions, None, turns={"default": rope(positions, q.dtype)})
        return rotate(q, k, at, *norms)

    usual = turned(q, k, positions)
    assert not launches
    monkeypatch.setattr(table, "machine", lambda device: table.Machine(90, True))
    for found, expected in zip(turned(q, k, positions), usual):
        assert found.shape == expected.shape
        assert (found != expected).float().mean() <= (0.05 if norm else 0)  # sums of norms differ in the last bit
        assert ((found.float() - expected.float()).abs() <= 2**-6 * expected.float().abs().max()).all()
    assert launches == ["turns_kernel", "rotate_kernel"]

    same = turned(q, k, positions[:1].expand(2, -1))  # as prompts stand that begin together
    assert torch.equal(same[0][:1], turned(q, k, positions)[0][:1])
    cos, sin = rope(positions[:1], torch.bfloat16)
    at = Tokens((5, 5), (3, 3), positions, None, turns={"window": (cos, sin)})  # of all sequences
    assert torch.equal(rotate(q, k, at, *norms, kind="window")[1], same[1])

    launches.clear()
    assert turned(q.float(), k.float(), positions)[0].dtype == torch.float32
    assert turned(q[:, :, :0], k[:, :, :0], positions[:, :0])[1].shape == (B, kv_heads, 0, D)
    assert not launches

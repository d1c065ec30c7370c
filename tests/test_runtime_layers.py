"""Linear layers of every scheme and the quantisation of their inputs.

Expected values: numpy tables built from the bit patterns (tests/canonical.py), formulas of docs/format.md written out
element by element, and, for results of a matmul, float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from canonical import E2M1, E4M3
from torch import Tensor

import runtime.layers
from runtime.activations import fake_quantize, round_to_e2m1
from runtime.format import ModuleSpec, module_tensors
from runtime.layers import SCHEME_LAYERS, Linear, QuantizedLinear

SCHEMES = tuple(SCHEME_LAYERS)
PARTITIONS = {"one": (40,), "three": (24, 8, 32), "blocks": (200, 128, 5)}  # rows; 200 and 5 leave partial blocks


def spec_of(
    scheme: str, rows: tuple[int, ...], k: int = 96, activations: str | None = None, pre_quant_scale: bool = False
) -> ModuleSpec:
    names = tuple((f"p{i}" if len(rows) > 1 else "", n) for i, n in enumerate(rows))
    return ModuleSpec(scheme, (sum(rows), k), names, activations, pre_quant_scale)


def held(values: torch.Tensor) -> torch.nn.Parameter:
    """What the loader makes of a stored tensor."""
    return torch.nn.Parameter(values, requires_grad=False)


def random_layer(spec: ModuleSpec, seed: int = 0, **options: bool) -> QuantizedLinear:
    """A layer whose stored tensors hold random bytes (no NaN codes) and scales that differ everywhere."""
    rng = np.random.default_rng(seed)
    layer = SCHEME_LAYERS[spec.scheme](spec, **options)
    for role, tensor in module_tensors(spec).items():
        if tensor.dtype == "F32":
            values = torch.from_numpy(rng.uniform(0.01, 3, tensor.shape).astype(np.float32))
        elif tensor.dtype == "BF16":
            values = torch.from_numpy(rng.uniform(0.5, 2, tensor.shape).astype(np.float32)).bfloat16()
        elif tensor.dtype == "F8_E4M3":
            codes = rng.integers(0, 127, tensor.shape) + (128 * rng.integers(0, 2, tensor.shape) if role == "weight" else 0)
            values = torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn)
        elif role == "weight":
            values = torch.from_numpy(rng.integers(0, 256, tensor.shape).astype(np.uint8))
        else:  # E8M0: exponents around 0, and the smallest, which makes float32 subnormals
            values = torch.from_numpy(rng.integers(115, 135, tensor.shape).astype(np.uint8))
            values.view(-1)[0] = 0
        setattr(layer, role, held(values))
    return layer


def codes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().view(torch.uint8).numpy()


def dense(layer: QuantizedLinear) -> np.ndarray:
    """The formulas of docs/format.md, one element at a time, in float32."""
    n, k = layer.shape
    scheme, f32 = layer.scheme, np.float32
    partition = [p for p, rows in enumerate(layer.partition_rows) for _ in range(rows)]
    first = [sum(layer.partition_rows[:p]) for p in range(len(layer.partition_rows))]
    block_first = [sum(math.ceil(r / 128) for r in layer.partition_rows[:p]) for p in range(len(first))]
    weight, scale = codes(layer.weight), layer.weight_scale.detach()
    out = np.empty((n, k), f32)
    for row in range(n):
        p = partition[row]
        for col in range(k):
            nibble = (weight[row, col // 2] >> (4 * (col % 2))) & 15 if weight.shape[1] * 2 == k else 0
            if scheme == "fp8_tensor":
                out[row, col] = E4M3[weight[row, col]] * f32(scale[p])
            elif scheme == "fp8_channel":
                out[row, col] = E4M3[weight[row, col]] * f32(scale[row])
            elif scheme == "fp8_block":
                block = block_first[p] + (row - first[p]) // 128
                out[row, col] = E4M3[weight[row, col]] * f32(scale[block, col // 128])
            elif scheme == "nvfp4":
                group = E4M3[codes(scale)[row, col // 16]] * f32(layer.weight_scale_2[p])
                out[row, col] = E2M1[nibble] * group
            else:
                power = f32(2.0 ** (int(scale[row, col // 32]) - 127))
                out[row, col] = (E4M3[weight[row, col]] if scheme == "mxfp8" else E2M1[nibble]) * power
    return out


@pytest.mark.parametrize("rows", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantize_is_exact(scheme: str, rows: tuple[int, ...]) -> None:
    k = 160 if scheme == "fp8_block" else 96
    layer = random_layer(spec_of(scheme, rows, k))
    expected = dense(layer)
    assert np.array_equal(layer.dequantize().numpy().view(np.uint32), expected.view(np.uint32))
    ids = torch.tensor([[3, 0], [sum(rows) - 1, 3]])
    assert np.array_equal(layer.lookup(ids, torch.float32).numpy(), expected[ids.numpy()])
    part = slice(sum(rows) - 20, sum(rows) - 2)
    assert np.array_equal(layer.dequantize(part).numpy(), expected[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", [*SCHEMES, "dense"])
def test_forward_is_the_matmul(scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (24, 8, 32)
    if scheme == "dense":
        layer = Linear(64, 96, bias=True)
        layer.weight = held(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).half())
        weight = layer.weight.double()
    else:
        layer = random_layer(spec_of(scheme, rows), bias=True)
        weight = torch.from_numpy(dense(layer)).double()
    layer.bias = held(torch.linspace(-9, 9, 64).bfloat16())
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ weight.T + layer.bias.double()
    scale = expected.abs().max()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # bfloat16 rounds weights and result to 8 bits
    y = layer(x)
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() < tolerance * scale
    monkeypatch.setattr(runtime.layers, "CONVERTED_AT_ONCE", 96 * 5)  # five rows at a time
    assert (layer(x).double() - expected).abs().max() < tolerance * scale


def nearest_even(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Round to the nearest entry of an ascending grid from 0 up, ties to the even index; keeps signs, saturates."""
    magnitude = np.minimum(np.abs(values.astype(np.float64)), float(grid[-1]))
    upper = np.searchsorted(grid, magnitude).clip(1, len(grid) - 1)
    below, above = magnitude - grid[upper - 1], grid[upper].astype(np.float64) - magnitude
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.copysign(np.where(take_upper, grid[upper], grid[upper - 1]), values).astype(np.float32)


def e4m3(values: np.ndarray) -> np.ndarray:
    return nearest_even(values, E4M3[:127])


def e2m1(values: np.ndarray) -> np.ndarray:
    return nearest_even(values, E2M1[:8])


def fake_quantized(x: np.ndarray, kind: str, s: float) -> np.ndarray:
    """The table of docs/format.md.  Quotients are float32, as the contract's arithmetic is; `x` is `[tokens, K]`."""
    f32 = np.float32
    size = {"fp8_group": 128, "fp8_group_e8m0": 128, "nvfp4": 16, "mxfp8": 32, "mxfp4": 32}.get(kind, x.shape[1])
    out = np.zeros_like(x)
    for token in range(x.shape[0]):
        for start in range(0, x.shape[1], size):
            at = (token, slice(start, start + size))
            block = x[at]
            amax = np.abs(x if kind == "fp8_tensor" else block).max()
            if amax == 0:
                continue
            if kind == "nvfp4":
                scale = e4m3(np.array([f32(f32(amax / f32(6)) / f32(s))]))[0] * f32(s)
            elif kind == "fp8_static":
                scale = f32(s)
            elif kind in ("fp8_group_e8m0", "mxfp8"):
                scale = f32(2.0 ** math.ceil(math.log2(float(amax) / 448)))
            elif kind == "mxfp4":
                scale = f32(2.0 ** (math.floor(math.log2(float(amax) * 8 / 7)) - 2))
            else:
                scale = f32(amax / f32(448))
            grid = e2m1 if kind in ("nvfp4", "mxfp4") else e4m3
            out[at] = grid(block / scale) * scale if scale else 0
    return out


KINDS = ["fp8_static", "fp8_tensor", "fp8_token", "fp8_group", "fp8_group_e8m0", "nvfp4", "mxfp8", "mxfp4"]


def awkward_input() -> Tensor:
    """Tokens of very different size, a zero token, zero groups, exact powers of two, ties."""
    x = torch.randn(8, 384, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 1, 8)[:, None]
    x[2] = 0
    x[3, 128:256] = 0
    x[4, :128] = 448 * 0.25  # amax / 448 is a power of two, and with it 2**-11 is a code; with the next one it is not
    x[4, 1] = 2.0**-11
    x[5, :16] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6])
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_activations_follow_the_contract(kind: str) -> None:
    x = awkward_input()
    scale = 0.01  # 448 * 0.01 is below the largest inputs: static scales saturate
    expected = fake_quantized(x.numpy(), kind, scale)
    found = fake_quantize(x, kind, torch.tensor(scale))
    assert np.array_equal(found.numpy(), expected)
    assert not found[2].any()


def test_e2m1_rounds_ties_to_even() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    assert round_to_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert round_to_e2m1(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4, -6]


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_clamped_before_the_cast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.12 casts what is beyond 448 to NaN; this torch may saturate and hide it."""
    cast = Tensor.to

    def checked(x: Tensor, *args: Any, **options: Any) -> Tensor:
        if torch.float8_e4m3fn in args:
            assert x.abs().max() <= 448
        return cast(x, *args, **options)

    monkeypatch.setattr(Tensor, "to", checked)
    fake_quantize(100 * awkward_input(), kind, torch.tensor(0.01))


def test_partial_group_of_inputs() -> None:
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    found = fake_quantize(x, "fp8_group")
    assert np.array_equal(found.numpy(), fake_quantized(x.numpy(), "fp8_group", 0))


@pytest.mark.parametrize("kind", ["fp8_token", "fp8_group", "fp8_tensor", "nvfp4"])
def test_activations_equal_compressed_tensors(kind: str) -> None:
    """The producer's own simulation, bit for bit; NVFP4 divides by a stored divisor there, hence one rounding more."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(0))
    options = {
        "fp8_token": {"num_bits": 8, "strategy": "token", "dynamic": True},
        "fp8_group": {"num_bits": 8, "strategy": "group", "group_size": 128, "dynamic": True},
        "fp8_tensor": {"num_bits": 8, "strategy": "tensor", "dynamic": True},
        "nvfp4": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
        | {"scale_dtype": torch.float8_e4m3fn},
    }
    arguments = QuantizationArgs(type="float", symmetric=True, **options[kind])
    divisor = torch.tensor([2688.0]) / x.abs().max() if kind == "nvfp4" else None
    scale, zero = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Identity(), global_scale=divisor)
    expected = theirs(x, scale, zero, arguments, global_scale=divisor)
    found = fake_quantize(x, kind, None if divisor is None else 1 / divisor)
    assert (found - expected).abs().max() <= (2e-7 if kind == "nvfp4" else 0) * x.abs().max()


@pytest.mark.parametrize("scales", [(0.02, 0.02, 0.02), (0.02, 0.02, 0.3), (0.3, 0.02, 0.3)], ids=str)
@pytest.mark.parametrize(("scheme", "kind"), [("fp8_tensor", "fp8_static"), ("nvfp4", "nvfp4")])
def test_each_partition_has_its_own_input_scale(scheme: str, kind: str, scales: tuple[float, ...]) -> None:
    rows = (24, 8, 32)
    layer = random_layer(spec_of(scheme, rows, activations=kind))
    layer.input_scale = held(torch.tensor(scales))
    x = 3 * torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    weight = dense(layer).astype(np.float64)
    start, expected = 0, []
    for count, scale in zip(rows, scales, strict=True):
        inputs = fake_quantized(x.numpy(), kind, scale).astype(np.float64)
        expected.append(inputs @ weight[start : start + count].T)
        start += count
    reference = np.concatenate(expected, 1)
    assert np.abs(layer(x).numpy() - reference).max() < 1e-6 * np.abs(reference).max()
    full = random_layer(spec_of(scheme, rows, activations=kind), quantize_activations=False)
    assert np.abs(full(x).numpy() - x.double().numpy() @ weight.T).max() < 1e-6 * np.abs(reference).max()


def test_pre_quant_scale_multiplies_the_input() -> None:
    layer = random_layer(spec_of("nvfp4", (64,), activations="nvfp4", pre_quant_scale=True))
    layer.input_scale = held(torch.tensor([0.01]))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    inputs = fake_quantized((x * layer.pre_quant_scale.float()).numpy(), "nvfp4", 0.01).astype(np.float64)
    reference = inputs @ dense(layer).astype(np.float64).T
    assert np.abs(layer(x).detach().numpy() - reference).max() < 1e-6 * np.abs(reference).max()


@pytest.mark.parametrize(("scheme", "rows"), [("fp8_tensor", (256,)), ("fp8_channel", (200, 56)), ("nvfp4", (256,))])
def test_torchao_dequantizes_to_the_same_bits(scheme: str, rows: tuple[int, ...]) -> None:
    check_torchao(random_layer(spec_of(scheme, rows, 256)))


def test_torchao_dequantizes_blocks_to_the_same_bits() -> None:
    check_torchao(random_layer(spec_of("fp8_block", (128, 256), 384)))


def check_torchao(layer: QuantizedLinear) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    tensor = layer.as_torchao()
    assert tensor.qdata.data_ptr() == layer.weight.data_ptr()  # shares the stored bytes
    assert torch.equal(tensor.dequantize(torch.float32), layer.dequantize())
    y = torch.nn.functional.linear(torch.ones(2, layer.shape[1], dtype=torch.bfloat16), tensor)
    assert y.shape == (2, layer.shape[0])


@pytest.mark.parametrize(
    ("scheme", "rows", "message"),
    [
        ("fp8_tensor", (64, 64), "one scale per tensor"),
        ("nvfp4", (64, 64), "one scale per tensor"),
        ("fp8_block", (200,), "whole 128 x 128 blocks"),
        ("mxfp8", (64,), "not for mxfp8"),
        ("mxfp4", (64,), "not for mxfp4"),
    ],
)
def test_torchao_refuses_what_it_cannot_hold(scheme: str, rows: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_layer(spec_of(scheme, rows, 128)).as_torchao()

"""Linear layers: one class per scheme, whose parameters are named, typed and shaped as they are stored.

N out features, K in features, P partitions of a fused module.  Whatever a matmul needs in another form (one scale per
row, decoded nibbles) is computed on use, a bounded number of rows at a time, and never kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.activations import e8m0_table, fake_quantize
from runtime.format import E2M1_VALUES, FP8_BLOCK, MX_GROUP, NVFP4_GROUP, ModuleSpec, module_tensors
from runtime.kernels.table import FEW, FEW_TOKENS, LINEAR, prepare
from runtime.kernels.twin import values

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}

# Weights converted for one matmul at a time: bounds the extra memory of a call (2**26 float32 are 256 MiB).
CONVERTED_AT_ONCE = 2**26

Rows = slice | Tensor  # which rows of a weight: a range, or int64 indices of any shape
ALL = slice(None)


def stored(*shape: int, dtype: str = "BF16") -> nn.Parameter:
    """A place for a stored tensor: a parameter with a shape and no memory, which the loader replaces.

    `dtype`: a safetensors name; BF16 stands for any dtype that an unquantised tensor may have.
    """
    return nn.Parameter(torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta"), requires_grad=False)


class Linear(nn.Module):
    """A dense weight `[N, K]`: `forward` is `x @ weight.T + bias`, `lookup` reads rows (an embedding).

    Arithmetic is in the dtype of `x`, whatever dtype is stored.
    """

    def __init__(self, rows: int, columns: int, bias: bool = False) -> None:
        super().__init__()
        self.shape = (rows, columns)
        self.weight = stored(rows, columns)
        self.bias = stored(rows) if bias else None

    def dequantize(self, rows: Rows = ALL) -> Tensor:
        """The exact values of the weight, or of some of its rows, in float32: `[..., K]`."""
        return self.weight[rows].float()

    def lookup(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight as an embedding: int64 `[...]` to `dtype` `[..., K]`."""
        return self._converted(indices, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]` in the dtype of `x`.  Converts at most `CONVERTED_AT_ONCE` weights at a time."""
        pieces = []
        for inputs, start, stop in self._inputs(x):
            step = stop - start if self.weight.dtype == inputs.dtype else max(1, CONVERTED_AT_ONCE // self.shape[1])
            for first in range(start, stop, step):
                rows = slice(first, min(first + step, stop))
                bias = None if self.bias is None else self.bias[rows].to(inputs.dtype)
                pieces.append(F.linear(inputs, self._converted(rows, inputs.dtype), bias))
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        return y.to(x.dtype)

    def _converted(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        return self.weight[rows].to(dtype)

    def _inputs(self, x: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        """The input of the matmul and the range of rows that it is for."""
        yield x, 0, self.shape[0]

    def extra_repr(self) -> str:
        """Scheme and shape, for `print(model)`."""
        return f"{self.shape[0]}, {self.shape[1]}"


class QuantizedLinear(Linear):
    """What the schemes share.  A subclass says how stored tensors become float32 values, in the order of `format.py`.

    With `quantize_activations` the input is quantised as the spec says and the matmul runs in float32, where products
    of codes are exact; otherwise the dequantised weight is rounded to the dtype of `x`.  Bfloat16 goes to a kernel where
    `kernels.table` has one for the device and the number of tokens.
    """

    scheme: ClassVar[str]
    weight_scale: nn.Parameter
    weight_scale_2: nn.Parameter
    input_scale: nn.Parameter
    pre_quant_scale: nn.Parameter

    def __init__(self, spec: ModuleSpec, bias: bool = False, quantize_activations: bool = True) -> None:
        nn.Module.__init__(self)
        assert spec.scheme == self.scheme
        self.spec = spec
        self.shape = spec.shape
        self.partition_rows = tuple(rows for _, rows in spec.partitions)
        self.activations = spec.activations if quantize_activations else None
        for role, tensor in module_tensors(spec).items():
            setattr(self, role, stored(*tensor.shape, dtype=tensor.dtype))
        self.bias = stored(spec.shape[0]) if bias else None
        self._left: tuple[Tensor, tuple[Tensor, Tensor | None]] | None = None

    def dequantize(self, rows: Rows = ALL) -> Tensor:
        """The exact values of the weight, or of some of its rows, in float32: `[..., K]`.  Source: `format.py`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]` in the dtype of `x`."""
        run = None
        if x.dtype == torch.bfloat16 and x.numel() > 0:
            run = self._few_tokens if x.numel() <= FEW_TOKENS * x.shape[-1] else self._many_tokens
        if run is None:
            return super().forward(x)
        left, self._left = self._left, None
        codes = left[1] if left is not None and left[0] is x else None
        if self.spec.pre_quant_scale:
            x = (x * self.pre_quant_scale).to(x.dtype)
        return run(x.reshape(-1, self.shape[1]), left=codes).reshape(*x.shape[:-1], self.shape[0])

    @property
    def input_kind(self) -> tuple[str, Tensor | None] | None:
        """How few tokens are quantised for the kernel, row by row, and the static scale `[1]`; None if not in one way."""
        if self._few_tokens is None or self.activations in (None, "fp8_tensor") or self.spec.pre_quant_scale:
            return None
        if len(self._input_scales) > 1:
            return None
        return self.activations, self.input_scale[:1] if "input_scale" in self._parameters else None

    def leave(self, x: Tensor, codes: Tensor, scales: Tensor | None) -> None:
        """What quantising `x` by `input_kind` gives, made elsewhere: the next call takes it if its input is `x` itself."""
        self._left = x, (codes, scales)

    @functools.cached_property
    def _few_tokens(self) -> Callable[..., Tensor] | None:
        """The kernel for `[M, K]` of few rows on the device of the weight, None where there is none."""
        return prepare(FEW, self.spec, self.activations, dict(self.named_parameters()))

    @functools.cached_property
    def _many_tokens(self) -> Callable[..., Tensor] | None:
        """The same for any number of rows."""
        return prepare(LINEAR, self.spec, self.activations, dict(self.named_parameters()))

    def as_torchao(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        """The weight as a torchao tensor that shares the stored bytes and gives results in `dtype`.

        Raises `ValueError` when torchao has no form for it: more than one partition of a per-tensor scale, blocks that
        do not fill the shape, or another scheme.
        """
        from runtime.torchao_tensors import as_torchao

        return as_torchao(self, dtype)

    def _converted(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        return self.dequantize(rows).to(dtype)

    def _inputs(self, x: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        if self.spec.pre_quant_scale:
            x = (x * self.pre_quant_scale).to(x.dtype)
        if self.activations is None:
            yield x, 0, self.shape[0]
            return
        for scale, start, stop in self._input_scales:
            yield fake_quantize(x.float(), self.activations, scale), start, stop

    @functools.cached_property
    def _input_scales(self) -> list[tuple[Tensor | None, int, int]]:
        """Each distinct run of input scales with its range of rows; one run when the partitions agree.

        Reads the values, which waits for the device, so it is done on the first call only.
        """
        if "input_scale" not in self._parameters:
            return [(None, 0, self.shape[0])]
        runs: list[tuple[Tensor | None, int, int]] = []
        found = values(self.input_scale)
        start = 0
        for p, rows in enumerate(self.partition_rows):
            if runs and found[p] == found[p - 1]:
                scale, first, _ = runs.pop()
                runs.append((scale, first, start + rows))
            else:
                runs.append((self.input_scale[p], start, start + rows))
            start += rows
        return runs

    def without_reading(self) -> None:
        """Make this layer one that never reads values: each partition's input is quantised for itself, and by no kernel."""
        stops = list(accumulate(self.partition_rows))
        self._few_tokens = self._many_tokens = None
        if "input_scale" in self._parameters:
            self._input_scales = [
                (self.input_scale[p], stop - rows, stop) for p, (rows, stop) in enumerate(zip(self.partition_rows, stops))
            ]

    def extra_repr(self) -> str:
        """Scheme, shape, partitions and activations, for `print(model)`."""
        return f"{self.scheme}, {self.shape[0]}, {self.shape[1]}, {self.partition_rows}, {self.activations}"


class Fp8TensorLinear(QuantizedLinear):
    """E4M3 codes, one multiplier per partition."""

    scheme = "fp8_tensor"

    def dequantize(self, rows: Rows = ALL) -> Tensor:
        """`f32(weight) * weight_scale[p]`."""
        scale = _per_row(self.weight_scale, self.partition_rows)[rows]
        return self.weight[rows].float() * scale.unsqueeze(-1)


class Fp8ChannelLinear(QuantizedLinear):
    """E4M3 codes, one multiplier per row."""

    scheme = "fp8_channel"

    def dequantize(self, rows: Rows = ALL) -> Tensor:
        """`f32(weight) * weight_scale[n]`."""
        return self.weight[rows].float() * self.weight_scale[rows].unsqueeze(-1)


class Fp8BlockLinear(QuantizedLinear):
    """E4M3 codes, one multiplier per 128 x 128 block; block rows restart at each partition."""

    scheme = "fp8_block"

    def dequantize(self, rows: Rows = ALL) -> Tensor:
        """`f32(weight) * weight_scale[block row, block column]`."""
        scale = _per_block_row(self.weight_scale, self.partition_rows)[rows]  # (..., ceil(K / 128))
        return self.weight[rows].float() * scale.repeat_interleave(FP8_BLOCK, -1)[..., : self.shape[1]]


class Nvfp4Linear(QuantizedLinear):
    """E2M1 codes, an E4M3 multiplier per 16 inputs and one float32 multiplier per partition."""

    scheme = "nvfp4"

    def dequantize(self, rows: Rows = ALL) -> Tensor:
        """`e2m1(weight) * (f32(weight_scale) * weight_scale_2[p])`."""
        outer = _per_row(self.weight_scale_2, self.partition_rows)[rows]
        scale = self.weight_scale[rows].float() * outer.unsqueeze(-1)  # (..., K / 16)
        return _scale_groups(_e2m1(self.weight[rows]), scale, NVFP4_GROUP)


class Mxfp8Linear(QuantizedLinear):
    """E4M3 codes, a power-of-two multiplier per 32 inputs."""

    scheme = "mxfp8"

    def dequantize(self, rows: Rows = ALL) -> Tensor:
        """`f32(weight) * 2**(weight_scale - 127)`."""
        return _scale_groups(self.weight[rows].float(), _e8m0(self.weight_scale[rows]), MX_GROUP)


class Mxfp4Linear(QuantizedLinear):
    """E2M1 codes, a power-of-two multiplier per 32 inputs."""

    scheme = "mxfp4"

    def dequantize(self, rows: Rows = ALL) -> Tensor:
        """`e2m1(weight) * 2**(weight_scale - 127)`."""
        return _scale_groups(_e2m1(self.weight[rows]), _e8m0(self.weight_scale[rows]), MX_GROUP)


SCHEME_LAYERS: dict[str, type[QuantizedLinear]] = {
    layer.scheme: layer for layer in (Fp8TensorLinear, Fp8ChannelLinear, Fp8BlockLinear, Nvfp4Linear, Mxfp8Linear, Mxfp4Linear)
}


def _per_row(scale: Tensor, partition_rows: Sequence[int]) -> Tensor:
    """Expand `[P]` to `[N]`."""
    return torch.cat([scale[p].expand(rows) for p, rows in enumerate(partition_rows)])


def _per_block_row(scale: Tensor, partition_rows: Sequence[int]) -> Tensor:
    """Expand block rows `[sum of ceil(rows / 128), C]` to `[N, C]`."""
    parts, start = [], 0
    for rows in partition_rows:
        stop = start + -(-rows // FP8_BLOCK)
        parts.append(scale[start:stop].repeat_interleave(FP8_BLOCK, 0)[:rows])
        start = stop
    return torch.cat(parts)


def _scale_groups(values: Tensor, scale: Tensor, size: int) -> Tensor:
    """Multiply each group of `size` values along the last axis by its scale: `[..., K]`, `[..., K / size]`."""
    return (values.unflatten(-1, (-1, size)) * scale.unsqueeze(-1)).flatten(-2)


@functools.cache
def _e2m1_table(device: torch.device) -> Tensor:
    """Float32 `[256, 2]`: the two values that a byte holds, low nibble first."""
    values = E2M1_VALUES + tuple(-value for value in E2M1_VALUES)
    return torch.tensor([[values[byte & 15], values[byte >> 4]] for byte in range(256)], device=device)


def _e2m1(packed: Tensor) -> Tensor:
    """Decode uint8 `[..., K / 2]` to float32 `[..., K]`."""
    return F.embedding(packed.int(), _e2m1_table(packed.device)).flatten(-2)


def _e8m0(exponents: Tensor) -> Tensor:
    """Decode uint8 to the float32 powers of two that they stand for."""
    return e8m0_table(exponents.device)[exponents.int()]

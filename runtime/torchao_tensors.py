"""Stored weights as torchao tensors, without copying or requantising.  The only place that imports torchao.

`NVFP4Tensor` lives under `torchao.prototype` and wants a per-tensor scale of shape `()`; `Float8Tensor` wants its block
size as a list.  Source: torchao 0.18.0, both checked by tests to dequantise to the same bits as our layers.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from runtime.format import FP8_BLOCK, NVFP4_GROUP
from runtime.layers import QuantizedLinear


def as_torchao(layer: QuantizedLinear, dtype: torch.dtype) -> Any:
    """The weight of `layer` as a `Float8Tensor` or `NVFP4Tensor`; see `QuantizedLinear.as_torchao`."""
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")  # its libraries are not needed; silences a warning
    n, k = layer.shape
    if layer.scheme in ("fp8_tensor", "nvfp4") and len(layer.partition_rows) > 1:
        raise ValueError(f"torchao holds one scale per tensor: this {layer.scheme} module has {layer.partition_rows}")
    if layer.scheme == "fp8_block" and any(size % FP8_BLOCK for size in (*layer.partition_rows, k)):
        raise ValueError(f"torchao needs whole 128 x 128 blocks: this module has rows {layer.partition_rows}, K {k}")
    if layer.scheme == "nvfp4":
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

        scale = layer.weight_scale.data
        return NVFP4Tensor(layer.weight.data, scale, NVFP4_GROUP, dtype, layer.weight_scale_2.data.view(()))
    scale_shapes = {
        "fp8_tensor": ([n, k], (1, 1)),
        "fp8_channel": ([1, k], (n, 1)),
        "fp8_block": ([FP8_BLOCK, FP8_BLOCK], (n // FP8_BLOCK, k // FP8_BLOCK)),
    }
    if layer.scheme not in scale_shapes:
        raise ValueError(f"torchao tensors are made for fp8 and nvfp4 modules, not for {layer.scheme}")
    from torchao.quantization import Float8Tensor

    block_size, shape = scale_shapes[layer.scheme]
    return Float8Tensor(layer.weight.data, layer.weight_scale.data.view(shape), block_size, dtype=dtype)

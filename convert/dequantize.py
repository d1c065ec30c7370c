"""Exact float32 values of quantised weights, in NumPy, row ranges at a time.  The formulas of `runtime.format`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from runtime.format import E2M1_VALUES, FP8_BLOCK, MX_GROUP, NVFP4_GROUP, ModuleSpec, ceil_div

from .apply import e8m0_to_float32, to_float32

Float32 = NDArray[np.float32]


def _e4m3_table() -> Float32:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 0xF, codes & 0x7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


E4M3 = _e4m3_table()  # value of each float8_e4m3fn code
E2M1 = np.array([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], np.float32)  # value of each nibble


def unpack(codes: NDArray[np.uint8]) -> Float32:
    """(rows, K / 2) packed nibbles to (rows, K) values, low nibble first."""
    values = np.empty((codes.shape[0], codes.shape[1] * 2), np.float32)
    values[:, 0::2] = E2M1[codes & 0xF]
    values[:, 1::2] = E2M1[codes >> 4]
    return values


def partition_of_rows(spec: ModuleSpec, start: int, stop: int) -> NDArray[np.int64]:
    """Index of the partition of each row in [start, stop)."""
    ends = np.cumsum([rows for _, rows in spec.partitions])
    return np.searchsorted(ends, np.arange(start, stop), side="right").astype(np.int64)


def block_of_rows(spec: ModuleSpec, start: int, stop: int) -> NDArray[np.int64]:
    """Row of `weight_scale` of each weight row in [start, stop): blocks restart at each partition."""
    sizes = np.array([rows for _, rows in spec.partitions])
    starts = np.cumsum(sizes) - sizes
    blocks = np.array([ceil_div(int(rows), FP8_BLOCK) for rows in sizes])
    first_block = np.cumsum(blocks) - blocks
    partition = partition_of_rows(spec, start, stop)
    blocks_in = (np.arange(start, stop) - starts[partition]) // FP8_BLOCK
    return (first_block[partition] + blocks_in).astype(np.int64)


def dequantize_rows(
    spec: ModuleSpec, tensors: Mapping[str, NDArray[np.uint8]], start: int, stop: int
) -> Float32:
    """Rows [start, stop) of a module as float32 `[stop - start, K]`.

    `tensors`: role -> the tensor's bytes as uint8, shaped as stored with a last axis of bytes for 4-byte scales flattened:
    pass 1-byte tensors in their own shape and F32 tensors as flat bytes.
    """
    weight = tensors["weight"][start:stop]
    k = spec.shape[1]
    if spec.scheme in ("fp8_tensor", "fp8_channel", "fp8_block"):
        scale = to_float32(tensors["weight_scale"].tobytes(), "F32")
        values = E4M3[weight]
        if spec.scheme == "fp8_tensor":
            return values * scale[partition_of_rows(spec, start, stop)][:, None]
        if spec.scheme == "fp8_channel":
            return values * scale[start:stop, None]
        columns = ceil_div(k, FP8_BLOCK)
        rows = scale.reshape(-1, columns)[block_of_rows(spec, start, stop)]
        return values * np.repeat(rows, FP8_BLOCK, axis=1)[:, :k]
    block = tensors["weight_scale"][start:stop]
    if spec.scheme == "nvfp4":
        scale_2 = to_float32(tensors["weight_scale_2"].tobytes(), "F32")
        scales = E4M3[block] * scale_2[partition_of_rows(spec, start, stop)][:, None]
        return unpack(weight) * np.repeat(scales, NVFP4_GROUP, axis=1)
    scales = e8m0_to_float32(block.tobytes()).reshape(block.shape)
    values = E4M3[weight] if spec.scheme == "mxfp8" else unpack(weight)
    return values * np.repeat(scales, MX_GROUP, axis=1)


def to_bfloat16(values: Float32) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, to nearest even.  Values must be finite."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

"""The operations of `convert.ops` on bytes, and the checks of values.  NumPy; small tensors only (scales)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.format import DTYPE_BYTES

from .ops import CHECKS, TRANSFORMS


def to_float32(data: bytes | memoryview, dtype: str) -> NDArray[np.float32]:
    """Exact float32 values of BF16, F16 or F32 data."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, "<f4" if dtype == "F32" else "<f2").astype(np.float32)


def e8m0_to_float32(data: bytes | memoryview) -> NDArray[np.float32]:
    """2 ** (byte - 127) of each byte; byte 0 is the subnormal 2 ** -127, byte 255 (NaN) must have been refused."""
    codes = np.frombuffer(data, np.uint8).astype(np.uint32)
    return np.where(codes == 0, np.uint32(1 << 22), codes << 23).astype(np.uint32).view(np.float32)


def transform(name: str, data: bytes, dtype: str, columns: int = 1) -> bytes:
    """Apply one transform to a whole tensor's bytes, or to one row of its first axis.

    "reciprocal" is IEEE division in float32, so the correctly rounded float32 nearest to 1 / x.  `columns`: size of the last
    axis, for the transforms that exchange the last two.
    """
    assert dtype in TRANSFORMS[name].inputs, (name, dtype)
    if name == "copy":
        return data
    if name.startswith("transpose"):
        values = np.frombuffer(data, np.dtype(f"V{DTYPE_BYTES[dtype]}")).reshape(-1, columns)
        data = np.ascontiguousarray(values.T).tobytes()
        name = name.removeprefix("transpose").removeprefix("_")
        if not name:
            return data
    if name == "e8m0":
        return e8m0_to_float32(data).tobytes()
    values32 = to_float32(data, dtype)
    if name == "reciprocal":
        with np.errstate(divide="ignore", over="ignore"):
            values32 = np.float32(1) / values32
    return values32.tobytes()


def find_fault(check: str, data: bytes | memoryview, dtype: str, name: str = "copy") -> str | None:
    """What is wrong with the values of a tensor (or of a piece of it), or None.  `name`: the transform they go through."""
    assert check in CHECKS, check
    if not check or not len(data):
        return None
    codes = np.frombuffer(data, np.uint8)
    if check == "fp8_codes":
        if codes.view(np.int8).max() < 0x7F and codes.max() < 0xFF:  # no code is all ones but for the sign
            return None
        return f"{int(((codes & 0x7F) == 0x7F).sum())} NaN codes (0x7F or 0xFF)"
    if check == "e4m3_scale":
        if codes.max() < 0x7F:
            return None
        nan = int(((codes & 0x7F) == 0x7F).sum())
        negative = int((codes > 0x80).sum()) - int((codes == 0xFF).sum())
        return f"{nan} NaN" if nan else f"{negative} negative values" if negative else None
    if check == "e8m0_scale":
        nan = int((codes == 0xFF).sum())
        return f"{nan} NaN" if nan else None
    exponents = name.endswith("e8m0")
    values = e8m0_to_float32(data) if exponents else to_float32(data, dtype)
    if exponents and (codes == 0xFF).any():
        return f"{int((codes == 0xFF).sum())} NaN"
    for what, bad in (
        ("NaN", np.isnan(values)),
        ("infinite", np.isinf(values)),
        ("negative", values < 0),
        ("zero", (values == 0) & (check == "scale")),
    ):
        if bad.any():
            return f"{values[bad][0]!s} ({int(bad.sum())} of {values.size} values {what})" if what != "NaN" else (
                f"{int(bad.sum())} of {values.size} values NaN"
            )
    if name == "reciprocal":
        with np.errstate(over="ignore"):
            inverse = np.float32(1) / values
        if not np.isfinite(inverse).all() or (inverse == 0).any():
            return f"{values[0]!s}, whose reciprocal is out of float32's range"
    return None


def count_zeros(check: str, data: bytes | memoryview, dtype: str) -> int:
    """Zero block scales in the data: legal (a block of zeros), and counted in the report."""
    if check == "e4m3_scale":
        codes = np.frombuffer(data, np.uint8)
        return codes.size - int(np.count_nonzero(codes)) + int(np.count_nonzero(codes == 0x80))  # 0x80 is minus zero
    if check == "block_scale" and dtype in ("F32", "F16", "BF16"):
        return int((to_float32(data, dtype) == 0).sum())
    return 0


def mean(data: bytes, dtype: str) -> float:
    """Average of a float tensor's values."""
    return float(to_float32(data, dtype).astype(np.float64).mean())

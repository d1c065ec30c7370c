"""Weights in another scale than they were stored in: nearest codes, and how far that is from what they were.  NumPy.

Nothing else in `convert` changes a value.  `export --requantize` does, where a format or an engine has no place for a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.format import E2M1_VALUES, FP8_MAX, NVFP4_GROUP

from .dequantize import E4M3

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_E4M3_CODES = E4M3[:127]  # values of codes 0..126, ascending
_E2M1_CODES = np.array(E2M1_VALUES, np.float32)
E2M1_MAX = 6.0


def _nearest(values: Float32, codes: Float32) -> NDArray[np.int64]:
    """Index of the nearest of ascending `codes` for values >= 0, ties to the even index, values beyond the last one to it."""
    middles = (codes[1:] + codes[:-1]) / 2
    index = np.searchsorted(middles, values, side="left")
    tie = (index < len(middles)) & (values == middles[np.minimum(index, len(middles) - 1)])
    return (index + (tie & (index % 2 == 1))).astype(np.int64)


def _signed(codes: NDArray[np.int64], values: Float32, bit: int) -> Bytes:
    """Codes of magnitudes, with the signs of their values."""
    return (codes | (np.signbit(values).astype(np.int64) << bit)).astype(np.uint8)


def to_e4m3(values: Float32) -> Bytes:
    """Nearest float8_e4m3fn codes, ties to even, saturated at 448.  Any shape."""
    return _signed(_nearest(np.abs(values), _E4M3_CODES), values, 7)


@np.errstate(all="ignore")
def to_nvfp4(values: Float32, scale_2: np.float32, hint: Float32 | None = None) -> tuple[Bytes, Bytes]:
    """Rows of a weight as NVFP4 codes and block scales below a given scale of the whole tensor.

    values   (rows, K)              scale_2  multiplier of all block scales
    hint     block scales (rows, K / 16) to try beside the largest value's: what the weight had, relative to `scale_2`

    Returns packed nibbles U8 (rows, K / 2), low nibble first, and E4M3 codes U8 (rows, K / 16).  Of both candidates the one
    with the smaller squared error is taken, block by block.
    """
    rows, k = values.shape
    blocks = values.reshape(rows, k // NVFP4_GROUP, NVFP4_GROUP)
    candidates: list[Float32] = [(np.abs(blocks).max(axis=2) / E2M1_MAX / scale_2).astype(np.float32)]
    if hint is not None:
        candidates.insert(0, hint)
    best: tuple[Bytes, Bytes, Float32] | None = None
    for wanted in candidates:
        scales = np.maximum(to_e4m3(wanted), 1)  # never 0: that would be a block without a scale
        unit = (E4M3[scales] * scale_2)[:, :, None]
        magnitudes = _nearest((np.abs(blocks) / unit).astype(np.float32), _E2M1_CODES)
        errors = ((_E2M1_CODES[magnitudes] * unit - np.abs(blocks)) ** 2).sum(axis=2).astype(np.float32)
        codes = _signed(magnitudes, blocks, 3)
        if best is None:
            best = scales, codes, errors
        else:
            better = errors < best[2]
            best = (np.where(better, scales, best[0]), np.where(better[:, :, None], codes, best[1]), best[2])
    assert best is not None
    flat = best[1].reshape(rows, k)
    return (flat[:, 0::2] + flat[:, 1::2] * 16).astype(np.uint8), best[0]


@dataclass(slots=True)
class Error:
    """How far new values are from old ones, added up piece by piece."""

    squared_error: float = 0.0
    squared: float = 0.0
    largest: float = 0.0

    @np.errstate(all="ignore")
    def add(self, new: Float32, old: Float32) -> None:
        """Compare another piece."""
        difference = new.astype(np.float64) - old
        self.squared_error += float((difference**2).sum())
        self.squared += float((old.astype(np.float64) ** 2).sum())
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0)))

    @property
    def relative(self) -> float:
        """Frobenius norm of the difference over that of the old values."""
        return (self.squared_error / self.squared) ** 0.5 if self.squared else 0.0


def nvfp4_scale(largest: float) -> np.float32:
    """The scale of a whole NVFP4 tensor whose largest magnitude is known: amax / (6 * 448), as producers choose it."""
    return np.float32(largest) / np.float32(E2M1_MAX * FP8_MAX) if largest else np.float32(1)


def divisor(multiplier: np.float32) -> np.float32:
    """A float32 whose correctly rounded reciprocal is `multiplier`, or comes nearest to it (one unit in the last place)."""
    one = np.float32(1)
    with np.errstate(over="ignore", divide="ignore"):
        near = one / multiplier
        tries = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(0))]
    finite = [g for g in tries if np.isfinite(g) and g > 0]
    return min(finite, default=np.finfo(np.float32).max, key=lambda g: abs(np.float64(one / g) - np.float64(multiplier)))

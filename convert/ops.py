"""The closed set of operations that a plan is made of, and their shape and dtype rules.  No tensor library.

A canonical tensor is the concatenation, along its first axis, of terms.  A term is one source tensor, transformed element
by element, and repeated.  That covers renaming, reshaping (the bytes stay), fusing, stacking, and giving each partition of
a tuple shard its copy of one scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.format import DENSE_DTYPES, DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class Transform:
    """An element-wise operation.  `inputs`: dtypes it takes; `output`: dtype it gives, None for the same."""

    inputs: tuple[str, ...]
    output: str | None
    meaning: str


TRANSFORMS: Mapping[str, Transform] = {
    "copy": Transform(tuple(DTYPE_BYTES), None, "the same bytes"),
    "f32": Transform(DENSE_DTYPES, "F32", "widened to float32, exact"),
    "reciprocal": Transform(DENSE_DTYPES, "F32", "float32 nearest to 1 / x: a divisor becomes a multiplier"),
    "e8m0": Transform(("F8_E8M0", "U8"), "F32", "2 ** (byte - 127), exact"),
}

# What the values of a source tensor must satisfy.  Checked while they are read, before OUT exists.
CHECKS: Mapping[str, str] = {
    "": "anything",
    "scale": "finite and greater than 0",
    "block_scale": "finite and not negative; zeros are counted",
    "multiplier": "finite",
    "fp8_codes": "no NaN code (0x7F, 0xFF)",
    "e4m3_scale": "no NaN code and not negative; zeros are counted",
    "e8m0_scale": "no NaN code (0xFF)",
}


@dataclass(frozen=True, slots=True)
class Term:
    """One source tensor in a canonical one: `transform`, then `repeat` copies one after another."""

    source: str
    transform: str = "copy"
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """One canonical tensor: the concatenation of `terms`.  `check`: a key of `CHECKS` for the values of each source."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    check: str = ""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        count = DTYPE_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


def term_nbytes(term: Term, dtype: str, nbytes: int) -> int:
    """Bytes that a term contributes; `dtype` and `nbytes` are its source's."""
    output = TRANSFORMS[term.transform].output or dtype
    return nbytes // DTYPE_BYTES[dtype] * DTYPE_BYTES[output] * term.repeat

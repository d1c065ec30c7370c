"""The closed set of operations that a plan is made of, and their shape and dtype rules.  No tensor library.

A canonical tensor is the concatenation, along its first axis, of terms.  A term is one source tensor, transformed element
by element, and repeated.  That covers renaming, reshaping (the bytes stay), fusing, stacking, and giving each partition of
a tuple shard its copy of one scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

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
    "transpose": Transform(tuple(DTYPE_BYTES), None, "the last two axes exchanged"),
    "transpose_e8m0": Transform(("F8_E8M0", "U8"), "F32", "the last two axes exchanged, then 2 ** (byte - 127)"),
    "transpose_f32": Transform(DENSE_DTYPES, "F32", "the last two axes exchanged, then widened to float32"),
}

# What the values of a source tensor must satisfy.  Checked while they are read, before OUT exists.
CHECKS: Mapping[str, str] = {
    "": "anything",
    "scale": "finite and greater than 0",
    "block_scale": "finite and not negative; zeros are counted",
    "zero_centred": "of a norm that multiplies by 1 + weight",
    "fp8_codes": "no NaN code (0x7F, 0xFF)",
    "e4m3_scale": "no NaN code and not negative; zeros are counted",
    "e8m0_scale": "no NaN code (0xFF)",
}


class Term(NamedTuple):
    """One source tensor in a canonical one: `transform`, then `repeat` copies one after another.

    `rows`: the range of the source's first axis that is taken, or None for all of it.  A tuple for the same reason as
    `TensorInfo`.
    """

    source: str
    transform: str = "copy"
    repeat: int = 1
    rows: tuple[int, int] | None = None


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


def term_nbytes(term: Term, dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a term contributes; `dtype` and `shape` are its source's."""
    count = DTYPE_BYTES[TRANSFORMS[term.transform].output or dtype] * term.repeat
    for size in shape[1:] if term.rows else shape:
        count *= size
    return count * (term.rows[1] - term.rows[0]) if term.rows else count


def coalesce(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Join neighbours that copy neighbouring rows of one source: slices of a stack become one range again."""
    joined: list[Term] = []
    for term in terms:
        rows = term.rows
        last = joined[-1] if joined and rows is not None else None
        if (
            rows is not None
            and last is not None
            and last.rows is not None
            and last.rows[1] == rows[0]
            and (last.source, last.transform, last.repeat, term.repeat) == (term.source, term.transform, 1, 1)
        ):
            joined[-1] = Term(term.source, term.transform, 1, (last.rows[0], rows[1]))
        else:
            joined.append(term)
    return tuple(joined)

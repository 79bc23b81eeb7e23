"""Comparison of arrays bit for bit, and digests of their rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Difference:
    """Where two arrays of rows part: how many elements and rows, and the first element."""

    elements: int
    rows: int
    index: tuple[int, ...]
    expected: Any
    found: Any
    wrong_rows: Array  # the rows that differ

    def shifted(self, rows: int) -> Difference:
        """The same in an array that these rows are a part of."""
        return replace(self, index=(self.index[0] + rows, *self.index[1:]), wrong_rows=self.wrong_rows + rows)

    def __str__(self) -> str:
        where = ", ".join(map(str, self.index))
        return f"first at [{where}]: expected {self.expected!r}, found {self.found!r}"


def as_rows(array: Array) -> Array:
    """[T, ...] as [T, elements of a row], contiguous."""
    array = np.ascontiguousarray(array)
    return array.reshape(len(array), -1) if array.ndim > 1 or len(array) else array.reshape(0, 0)


def as_bits(array: Array) -> Array:
    """The elements as unsigned integers."""
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))


def first_difference(expected: Array, found: Array, *, nan: bool = False) -> Difference | None:
    """Where two arrays of one shape and dtype differ in their bits, None if nowhere; with `nan`, any two NaN agree."""
    a, b = as_bits(expected), as_bits(found)
    if a.tobytes() == b.tobytes() if a.size < 4096 else np.array_equal(a, b):
        return None
    wrong = a != b
    if nan:
        wrong &= ~(np.isnan(expected) & np.isnan(found))
        if not wrong.any():
            return None
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
    rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
    return Difference(
        int(np.count_nonzero(wrong)), len(rows), index, np.asarray(expected)[index].item(), found[index].item(), rows
    )


def first_nonfinite(array: Array) -> tuple[int, ...] | None:
    """The index of the first NaN or infinity, None if there is none."""
    if array.dtype.kind in "iu":
        return None
    wrong = ~np.isfinite(array)
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape)) if wrong.any() else None


def digests(array: Array) -> Array:
    """A 64-bit digest of the bits of each row, [T]."""
    rows = as_rows(array)
    return np.fromiter(
        (int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "little") for row in rows.view(np.uint8)),
        np.uint64,
        len(rows),
    )

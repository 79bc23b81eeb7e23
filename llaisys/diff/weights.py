"""PARAM for weights: the bits that the engine computes with are those of the checkpoint, converted to its dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..reference.numerics import cast
from .bits import first_difference, first_nonfinite
from .origins import explain_weight

#: Bytes of a weight that are read and compared at once.
_BLOCK = 4 << 20
#: Bytes of a weight of which it is looked where wrong bits come from.
_WHOLE = 64 << 20


class WeightBits:
    """Compares the weights that nodes show with the checkpoint, a block at a time, so that no second copy is made.

    A weight is compared when it is first seen at an address, and once more by `again`, which finds one that was
    overwritten meanwhile.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype[Any]) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._found: dict[tuple[Any, ...], str | None] = {}
        self._right: dict[str, np.ndarray[Any, Any]] = {}
        self._looked: set[str] = set()
        self.nonfinite = ""  #: the first NaN or infinity that a weight must have, as the checkpoint does

    def check(self, name: str, argument: str, array: np.ndarray[Any, Any]) -> str | None:
        """What is wrong with `array` as the weight `name`, None if nothing is."""
        key = (name, array.__array_interface__["data"][0], array.shape, array.strides)
        if key not in self._found:
            self._found[key] = self.compare(name, argument, array)
            if self._found[key] is None:
                self._right[name] = array
        return self._found[key]

    def certified(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """All weights by name, as the engine has them, if all were seen and found right."""
        names = set(self._checkpoint.names())
        return dict(self._right) if names == set(self._right) and not any(self._found.values()) else None

    def again(self) -> None:
        """Compare each weight once more when it is shown the next time."""
        self._found.clear()

    def compare(self, name: str, argument: str, array: np.ndarray[Any, Any]) -> str | None:
        """`check`, without the memory."""
        shape = self._checkpoint.shape_of(name)
        if array.shape != shape or array.dtype != self._dtype:
            return f"{argument}: expected {name}, {self._dtype}{list(shape)}, found {array.dtype}{list(array.shape)}"
        text = self.differs(name, array)
        return f"{argument}: expected {name} of the checkpoint, found {text}" if text else None

    def differs(self, name: str, array: np.ndarray[Any, Any]) -> str | None:
        """How an array of the right shape and dtype is other than a weight of the checkpoint, None if it is not."""
        shape = array.shape
        step = max(1, _BLOCK * shape[0] // max(1, array.nbytes))
        wrong, first = 0, None
        look = not self.nonfinite and name not in self._looked
        self._looked.add(name)
        for begin in range(0, shape[0], step):
            end = min(begin + step, shape[0])
            want = self._rows(name, begin, end)
            if look and (odd := first_nonfinite(want)) is not None:
                place = ", ".join(map(str, (begin + odd[0], *odd[1:])))
                self.nonfinite, look = f"{name} of the checkpoint is {want[odd].item()} at [{place}]", False
            difference = first_difference(want, array[begin:end], nan=True)
            if difference is None:
                continue
            wrong += difference.rows
            if first is None:
                first = difference.shifted(begin)
        if first is None:
            return None
        origin = self._origin(name, array, first.index[0])
        return f"other bits in {wrong} of {shape[0]} rows, {first}{'; ' if origin else ''}{origin}"

    def _rows(self, name: str, begin: int, end: int) -> np.ndarray[Any, Any]:
        rows = self._checkpoint.rows(name, begin, end)
        return rows if rows.dtype == self._dtype else cast(rows, self._dtype)

    def _origin(self, name: str, array: np.ndarray[Any, Any], row: int) -> str:
        """Where the wrong bits are from, if they are of a weight that has the first wrong row; "" if they are not."""
        if array.nbytes > _WHOLE:
            return ""
        others = {}
        for other in self._checkpoint.names():
            shape = self._checkpoint.shape_of(other)
            alike = other != name and shape[1:] == array.shape[1:] and row < shape[0]
            if alike and first_difference(self._rows(other, row, row + 1), array[row : row + 1]) is None:
                others[other] = self._rows(other, 0, shape[0])
        return explain_weight(array, others, self._rows(name, 0, len(array))) or ""

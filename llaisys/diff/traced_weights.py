"""Whether two traces are of the same weights. A trace has digests of them, so that two dtypes take a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..reference import FLOATS
from ..reference.bounds import finfo, half_ulp
from ..reference.numerics import cast
from .ledger import Array
from .trace import Trace, digest_of
from .weights import WeightBits

#: Elements that are compared at once.
_BLOCK = 1 << 20


def compare_weights(
    left: Trace, right: Trace, a: Checkpoint | None, b: Checkpoint | None
) -> tuple[dict[str, str], list[str]]:
    """The weights that differ, and how as far as that is known; and those of which nobody can say.

    Of one dtype, digests are compared. Of two, each must be what rounding to its dtype made of the same numbers.
    """
    differ: dict[str, str] = {}
    unknown: list[str] = []
    for name, digest in left.header["weights"].items():
        other = right.header["weights"].get(name)
        if other is None or (left.header["dtype"] == right.header["dtype"] and digest == other):
            continue
        x, y = _weight(left, name, digest, a, b), _weight(right, name, other, b, a)
        same = _same(left, right, x, y, (digest, other))
        if same is None:
            unknown.append(name)
        elif not same:
            differ[name] = _how(a, name, x, y)
    return differ, unknown


def _weight(trace: Trace, name: str, digest: str, *checkpoints: Checkpoint | None) -> Array | None:
    """The weight of a run, from the first checkpoint that has it."""
    found = (trace.weight(checkpoint, name, digest) for checkpoint in dict.fromkeys(checkpoints))
    return next((weight for weight in found if weight is not None), None)


def _same(left: Trace, right: Trace, x: Array | None, y: Array | None, digests: tuple[str, str]) -> bool | None:
    """Whether two weights are the same but for rounding, None if that can not be said."""
    one, two = (FLOATS[trace.header["dtype"]] for trace in (left, right))
    if one == two:
        return digests[0] == digests[1]
    if x is not None and y is not None:
        return x.shape == y.shape and _rounded(x, y)
    for known, dtype, digest in ((x, two, digests[1]), (y, one, digests[0])):
        if known is not None and known.dtype == np.float32:  # which every other dtype is rounded from
            return digest_of(cast(known, dtype).reshape(-1).view(np.uint8).data) == digest
    return None


def _rounded(x: Array, y: Array) -> bool:
    """Whether all elements are as near to each other as numbers are that rounding to either dtype made of one."""
    x, y = x.reshape(-1), y.reshape(-1)
    for begin in range(0, x.size, _BLOCK):
        a, b = (z[begin : begin + _BLOCK].astype(np.float64) for z in (x, y))
        with np.errstate(all="ignore"):
            size = np.maximum(np.abs(a), np.abs(b))
            near = np.abs(a - b) <= half_ulp(size, x.dtype) + half_ulp(size, y.dtype)
            # What a dtype can not hold is infinite in it.
            for p, q, dtype in ((a, b, x.dtype), (b, a, y.dtype)):
                near |= np.isinf(p) & (np.sign(p) == np.sign(q)) & (np.abs(q) >= float(finfo(dtype).max))
        if not (near | (np.isnan(a) & np.isnan(b))).all():
            return False
    return True


def _how(checkpoint: Checkpoint | None, name: str, x: Array | None, y: Array | None) -> str:
    """How the second of two weights differs from the first, in the dtype that has less precision; "" if that is not to
    be had."""
    if checkpoint is None or x is None or y is None:
        return ""
    if x.shape != y.shape:
        return f"shape {list(y.shape)} instead of {list(x.shape)}"
    dtype: np.dtype[Any] = max(x.dtype, y.dtype, key=lambda d: float(finfo(d).eps))
    return WeightBits(checkpoint, dtype).differs(name, y if y.dtype == dtype else cast(y, dtype)) or ""

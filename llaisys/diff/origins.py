"""Where wrong bits come from: rows of a KV cache and weights that belong to another place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .shape import Axis, describe_indices

Array = npt.NDArray[Any]

__all__ = ["explain_state", "explain_weight"]


def explain_state(expected: Array, found: Array, others: Mapping[str, Array] | None = None) -> str | None:
    """Whose keys or values an attention saw instead of this sequence's own; None if the bits agree or nothing fits.

    `expected` and `found` are [S, K, D]. `others` holds rows that may be there by mistake, by what they are called:
    {"layer 2": its keys, "the sequence before": what the cache held until then}.
    """
    expected, found = np.asarray(expected), np.asarray(found)
    if expected.shape != found.shape:
        return f"shape {list(found.shape)} instead of {list(expected.shape)}"
    size = len(expected)
    if not expected.size:
        return None
    right, seen = _rows(expected), _rows(found)
    wrong = np.flatnonzero(right != seen)
    if not wrong.size:
        return None
    where = describe_indices(right != seen, Axis("row", size)).removeprefix("only ")
    for name, rows in (others or {}).items():
        source = np.asarray(rows)
        if source.dtype != found.dtype or source.shape[1:] != found.shape[1:]:
            continue
        bits = _rows(source)
        if wrong[-1] < len(bits) and (bits[wrong] == seen[wrong]).all():
            return f"{where}: the bits of {name}, at the same rows"
        known = {row: i for i, row in enumerate(bits.tolist())}
        if all(row in known for row in seen[wrong].tolist()):
            return f"{where}: the bits of {name}, of other rows ({wrong[0]} holds {known[seen[wrong[0]].item()]})"
    shift = _shift(right, seen, wrong)
    if shift is not None:
        return f"{where}: shifted by {abs(shift)}, row t holds the row of t {'+' if shift > 0 else '-'} {abs(shift)}"
    values = found[wrong].astype(np.float64)
    if not values.any():
        return f"{where}: zeros, as if never written"
    if np.isnan(values).all():
        return f"{where}: NaN, as if never written"
    known = {row: i for i, row in enumerate(right.tolist())}
    if all(row in known for row in seen[wrong].tolist()):
        first = known[seen[wrong[0]].item()]
        return f"{where}: rows of this sequence in another order (row {wrong[0]} holds that of {first})"
    if found.ndim == 3 and found.shape[1] > 1:
        for turn in range(1, found.shape[1]):
            if (_rows(np.roll(expected, turn, axis=1)) == seen)[wrong].all():
                return f"{where}: the kv heads are in another order, head h holds that of h - {turn}"
    return None


def explain_weight(found: Array, candidates: Mapping[str, Array], expected: Array | None = None) -> str | None:
    """Which weight `found` has the bits of, among `candidates` by name; else which rows of `expected` moved."""
    found = np.asarray(found)
    for name, other in candidates.items():
        if _same(found, np.asarray(other)):
            return f"has the bits of {name}"
    for name, other in candidates.items():
        if found.ndim == 2 and np.shape(other) == found.shape[::-1] and _same(found, np.ascontiguousarray(other.T)):
            return f"has the bits of {name}, transposed"
    if expected is None or np.shape(expected) != found.shape or found.dtype != expected.dtype or not found.size:
        return None
    right, seen = _rows(expected), _rows(found)
    wrong = np.flatnonzero(right != seen)
    if not wrong.size:
        return None
    where = describe_indices(right != seen, Axis("row" if found.ndim > 1 else "column", len(found)))
    shift = _shift(right, seen, wrong) if found.ndim > 1 else None
    if shift is not None:
        return f"{where}: the bits of the rows {abs(shift)} {'after' if shift > 0 else 'before'} them"
    for name, other in candidates.items():
        alike = np.shape(other)[1:] == found.shape[1:] and other.dtype == found.dtype and len(other) > wrong[-1]
        if alike and (_rows(other)[wrong] == seen[wrong]).all():
            return f"{where}: the bits of {name}"
    return f"{where}: zeros" if not found[wrong].astype(np.float64).any() else None


def _rows(x: Array) -> Array:
    """The bytes of each row as one opaque element."""
    flat = np.ascontiguousarray(x).reshape(len(x), -1)
    return flat.view(np.dtype(("S", max(1, flat.shape[1] * flat.itemsize)))).reshape(-1) if flat.size else flat[:, :0]


def _same(a: Array, b: Array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    first = (slice(0, 1),) * a.ndim
    return a[first].tobytes() == b[first].tobytes() and a.tobytes() == b.tobytes()


def _shift(right: Array, seen: Array, wrong: Array) -> int | None:
    """The one distance at which all wrong rows are found."""
    first = seen[wrong[0]]
    for source in np.flatnonzero(right == first):
        shift = int(source - wrong[0])
        inside = wrong[(wrong + shift >= 0) & (wrong + shift < len(right))]
        if shift and 2 * inside.size >= wrong.size and (right[inside + shift] == seen[inside]).all():
            return shift
    return None

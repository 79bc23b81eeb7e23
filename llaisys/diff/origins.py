"""Where wrong bits come from: rows of a KV cache and weights that belong to another place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..reference import FLOATS
from ..reference.numerics import cast
from .shape import Axis, describe_indices, exchanged_text

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
    alike = {name: np.asarray(rows) for name, rows in (others or {}).items() if np.shape(rows)[1:] == found.shape[1:]}
    alike = {name: rows for name, rows in alike.items() if rows.dtype == found.dtype}
    for name, rows in alike.items():
        bits = _rows(rows)
        if wrong[-1] < len(bits) and (bits[wrong] == seen[wrong]).all():
            return f"{where}: the bits of {name}, at the same rows"
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
    for name, rows in alike.items():  # late, as texts that share a token share rows of it
        known = {row: i for i, row in enumerate(_rows(rows).tolist())}
        if all(row in known for row in seen[wrong].tolist()):
            return f"{where}: the bits of {name}, of other rows ({wrong[0]} holds {known[seen[wrong[0]].item()]})"
    if found.ndim == 3 and found.shape[1] > 1:
        for turn in range(1, found.shape[1]):
            if (_rows(np.roll(expected, turn, axis=1)) == seen)[wrong].all():
                return f"{where}: the kv heads are in another order, head h holds that of h - {turn}"
    return None


def explain_weight(found: Array, candidates: Mapping[str, Array], expected: Array | None = None) -> str | None:
    """Which weight `found` has the bits of, among `candidates` by name; else what became of those of `expected`: which
    rows moved, to what they were rounded, where the sign is another."""
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
    axis = Axis("row" if found.ndim > 1 else "column", len(found))
    where = describe_indices(right != seen, axis)
    if found.ndim == 2 and found.shape == found.shape[::-1] and _same(found, np.ascontiguousarray(expected.T)):
        return "has its own bits, transposed"
    text = _moved(right, seen, wrong, axis) or _changed(np.asarray(expected), found, wrong, where)
    if text is not None:
        return text
    shift = _shift(right, seen, wrong) if found.ndim > 1 else None
    if shift is not None:
        return f"{where}: the bits of the rows {abs(shift)} {'after' if shift > 0 else 'before'} them"
    for name, other in candidates.items():
        alike = np.shape(other)[1:] == found.shape[1:] and other.dtype == found.dtype and len(other) > wrong[-1]
        if alike and (_rows(other)[wrong] == seen[wrong]).all():
            return f"{where}: the bits of {name}"
    if not found[wrong].astype(np.float64).any():
        return f"{where}: zeros"
    if len(np.unique(seen)) == len(seen) and np.array_equal(np.sort(right), np.sort(seen)):
        first = int(np.flatnonzero(right == seen[wrong[0]])[0])
        return f"{where}: the same {axis.noun}s in another order ({wrong[0]} holds that of {first})"
    return None


def _moved(right: Array, seen: Array, wrong: Array, axis: Axis) -> str | None:
    """Rows that changed places in pairs, or in the order of other formats."""
    for source in np.flatnonzero(right == seen[wrong[0]])[:16]:
        distance = int(source - wrong[0])
        lower = wrong[wrong + distance < len(right)]
        lower = lower[(seen[lower] == right[lower + distance]) & (seen[lower + distance] == right[lower])]
        lower = lower[(lower - wrong[0]) // max(1, distance) % 2 == 0]
        pairs = np.union1d(lower, lower + distance)
        if distance > 0 and np.array_equal(pairs, wrong) and len(pairs) == 2 * len(lower):
            return f"{exchanged_text(axis, lower, distance)} are exchanged"
    for size in (n for n in range(4, len(right) + 1, 2) if len(right) % n == 0):
        order = np.arange(len(right)).reshape(-1, 2, size // 2).swapaxes(1, 2).reshape(-1)
        for chosen, what in ((order, "interleaved"), (np.argsort(order), "taken apart once more than they were")):
            if (right[chosen] == seen).all():
                return f"the halves of each head of {size} {axis.noun}s are {what}, as in GGUF and the first Llama"
    return None


def _changed(expected: Array, found: Array, wrong: Array, where: str) -> str | None:
    """Numbers that were rounded to another type on the way, or have the other sign."""
    with np.errstate(all="ignore"):
        for name, dtype in FLOATS.items():
            if dtype != found.dtype and _same(found, cast(cast(expected, dtype), found.dtype)):
                return f"rounded to {name} on the way"
        if found.dtype == np.float32:
            short = (np.ascontiguousarray(expected).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            if _same(found, short):
                return "truncated to bf16 on the way"
        if _same(found[wrong], -expected[wrong]):
            return f"{where}: negated"
    return None


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

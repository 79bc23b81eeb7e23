"""The shape of an error: which elements of an output are wrong, and how, in short phrases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..reference import Spec
from ..reference.bounds import finfo, half_ulp, ulp

Array = npt.NDArray[Any]

#: Phrases of one description.
MOST = 4
#: Wrong elements whose values are looked at.
SAMPLE = 1 << 16
#: Widths of vectors and tiles, in elements.
LANES = (4, 8, 16, 32, 64)
#: What an index of an axis is called, by the letter of the SPEC.
NOUNS = {"T": "row", "S": "row", "H": "head", "K": "kv head", "D": "dim", "N": "feature", "E": "column", "V": "column"}


def describe_error(
    spec: Spec,
    inputs: Mapping[str, Any],
    scalars: Mapping[str, float],
    output_name: str,
    output: Any,
    expected: Any,
    ratios: Any,
) -> tuple[str, ...]:
    """At most four phrases about the elements of `output` with a ratio above 1, the most telling first.

    `expected` and `ratios` are the oracle's values and the ratios of `reference.ratios`, all of one shape. Without an
    element out of bound, a phrase about biased magnitudes may be left. Whatever the arrays hold, nothing is raised.
    """
    output, expected, ratios = np.asarray(output), np.asarray(expected), np.asarray(ratios)
    if output.shape != expected.shape or ratios.shape != expected.shape:
        return (f"shape {list(output.shape)} instead of {list(expected.shape)}",)
    if not output.size:
        return ()
    with np.errstate(all="ignore"):
        bad = ~(ratios <= 1)
        axes = axes_of(spec, output_name, output.shape, inputs)
        where = _where(bad, axes, inputs) if bad.any() else ()
        how = _how(output, expected, ratios, bad) if _numbers(output) else ()
        moved = _relations(inputs, output, expected, ratios, bad, axes) if _numbers(output) and bad.any() else ()
        return (*moved, *how[:1], *where, *how[1:])[:MOST]


class Axis:
    """One axis of an output: what an index is called, how many there are, and the number of the first one."""

    def __init__(self, noun: str, size: int, first: int = 0) -> None:
        self.noun, self.size, self.first = noun, size, first

    def name(self, *indices: int) -> str:
        """'row 3', 'rows 3, 4', by index."""
        return f"{self.noun}{'s' if len(indices) > 1 else ''} {', '.join(str(i + self.first) for i in indices)}"

    def span(self, begin: int, end: int) -> str:
        """'row 3' or 'rows 3 to 7', `end` excluded."""
        if end - begin == 1:
            return self.name(begin)
        return f"{self.noun}s {begin + self.first} to {end - 1 + self.first}"


def axes_of(spec: Spec, output_name: str, shape: tuple[int, ...], inputs: Mapping[str, Any]) -> list[Axis]:
    """The axes of an output by the letters of its SPEC; rows are called positions where the inputs say which."""
    letters = next((arg.shape.split() for arg in spec.outputs if arg.name == output_name), ["..."])
    nouns = [NOUNS.get(x, x) for x in letters if x != "..."]
    if "..." in letters:
        # The last of the leading axes is that of the rows; where no argument has another one after it, of the columns.
        rows = any("..." in arg.shape and arg.shape != "..." for arg in spec.args)
        extra = len(shape) - len(nouns)
        leading = ["row"] if rows else ["row", "column"]
        leading = leading[max(0, len(leading) - extra) :]
        nouns = [f"axis {i} index" for i in range(extra - len(leading))] + leading + nouns
    if len(nouns) != len(shape):
        nouns = [f"axis {i} index" for i in range(len(shape))]
    axes = [Axis(noun, size) for noun, size in zip(nouns, shape, strict=True)]
    first = _first_position(inputs, shape)
    if letters[:1] == ["T"] and axes and first is not None:
        axes[0] = Axis("position", shape[0], first)
    return axes


def _first_position(inputs: Mapping[str, Any], shape: tuple[int, ...]) -> int | None:
    """The position of row 0, where rows are consecutive positions of a sequence."""
    positions, keys = inputs.get("pos_ids"), inputs.get("k")
    if positions is not None:
        positions = np.asarray(positions).reshape(-1)
        if positions.size and positions.size == shape[0] and (np.diff(positions) == 1).all():
            return int(positions[0])
        return None
    return len(keys) - shape[0] if keys is not None and len(keys) >= shape[0] else None


# ------------------------------------------------------------------ where


def _where(bad: Array, axes: list[Axis], inputs: Mapping[str, Any]) -> tuple[str, ...]:
    count = int(np.count_nonzero(bad))
    if count == 1:
        index = np.unravel_index(int(np.argmax(bad)), bad.shape)
        place = ", ".join(axis.name(int(i)) for axis, i in zip(axes, index, strict=True))
        return (f"a single element: {place}" if place else "the one element",)
    phrases, region = [], 1
    for i, axis in enumerate(axes):
        hits = np.asarray(bad.any(axis=tuple(j for j in range(bad.ndim) if j != i)))
        region *= int(np.count_nonzero(hits))
        if not hits.all():
            phrases.append(_heads(hits, axis, inputs) or describe_indices(hits, axis))
    share = count / region
    few = f"{max(share, 0.001):.{0 if share >= 0.1 else 1}%} of the elements"
    if not phrases:
        return ("the whole output" if count == bad.size else "nearly the whole output" if share > 0.9 else few,)
    return (*phrases, *([f"{few} there"] if share < 0.5 else []))


def _heads(hits: Array, axis: Axis, inputs: Mapping[str, Any]) -> str | None:
    """Query heads that are just those of some kv heads."""
    keys = inputs.get("k")
    groups = keys.shape[1] if axis.noun == "head" and keys is not None and np.ndim(keys) == 3 else 0
    if groups < 2 or axis.size % groups or axis.size == groups:
        return None
    grouped = hits.reshape(groups, -1)
    if (grouped.any(axis=1) != grouped.all(axis=1)).any():
        return None
    return f"only the heads of {describe_indices(grouped[:, 0], Axis('kv head', groups)).removeprefix('only ')}"


def describe_indices(hits: Array, axis: Axis) -> str:
    """Which indices of an axis are hit, in words: 'only the first row', 'columns 96 to 191', 'only odd positions'."""
    found = np.flatnonzero(hits)
    size, noun = axis.size, axis.noun
    if not found.size:
        return f"no {noun}"
    if found.size == size:
        return f"every {noun}"
    begin, end = int(found[0]), int(found[-1]) + 1
    if found.size == 1:
        return f"only {axis.name(begin)}{' (the last)' if begin == size - 1 > 3 else ''}"
    if end - begin == found.size:
        return _run(begin, end, axis)
    period = _period(hits)
    if period is not None:
        return _residues(hits[:period], axis)
    missing = np.flatnonzero(~hits)
    if missing.size == 1:
        return f"every {noun} but {missing[0] + axis.first}"
    if missing.size <= 3:
        return f"every {noun} but {', '.join(str(i + axis.first) for i in missing)}"
    if found.size <= 6:
        return f"only {axis.name(*found.tolist())}"
    if missing[-1] - missing[0] + 1 == missing.size:
        return f"all but {axis.span(int(missing[0]), int(missing[-1]) + 1)}"
    return f"{found.size} of {size} {noun}s, {found[0] + axis.first} the first"


def _run(begin: int, end: int, axis: Axis) -> str:
    """A run of consecutive indices, not all of them."""
    size, noun = axis.size, axis.noun
    span = axis.span(begin, end)
    if noun == "dim" and size % 2 == 0 and end - begin == size // 2 and begin in (0, size // 2):
        return f"the {'second' if begin else 'first'} half of each head ({span})"
    if end == size:
        if noun in ("row", "position", "head", "kv head"):
            return f"every {noun} but {axis.first}" if begin == 1 else f"from {axis.name(begin)} on"
        widths = [w for w in LANES if size % w and begin == size - size % w]
        if widths:
            rest = size % widths[0]
            which = f"{widths[0]} to {widths[-1]}" if len(widths) > 1 else str(widths[0])
            return f"only the tail: {span}, n = {size}, n mod {which} = {rest}"
        if begin == 1:
            return f"every {noun} but {axis.first}"
        return f"only the last {size - begin} {noun}s: {span}"
    if begin == 0:
        return f"every {noun} but the last" if end == size - 1 else f"only {span}"
    return f"a block: {span}" if noun in ("feature", "column", "dim") else f"only {span}"


def _period(hits: Array) -> int | None:
    """The smallest period of a pattern that repeats at least twice."""
    size = len(hits)
    for period in sorted({*range(2, 65), 96, 128, 256, 512, 1024, *(d for d in range(65, 513) if size % d == 0)}):
        if 2 * period > size:
            return None
        if (hits[period:4096] == hits[: min(size, 4096) - period]).all() and (hits[period:] == hits[:-period]).all():
            return period
    return None


def _residues(hits: Array, axis: Axis) -> str:
    """One period of a pattern."""
    period, noun = len(hits), axis.noun
    hits = np.roll(hits, axis.first % period)  # counted by what the indices are called
    found, missing = np.flatnonzero(hits), np.flatnonzero(~hits)
    if period == 2:
        return f"only {'odd' if hits[1] else 'even'} {noun}s"
    if found.size == 1 or missing.size == 1:
        which, but = (int(found[0]), "only") if found.size == 1 else (int(missing[0]), "all but")
        ordinal = "the first" if which == 0 else "the last" if which == period - 1 else f"number {which}"
        return f"{but} {ordinal} of each {period} {noun}s"
    if found[-1] - found[0] + 1 == found.size:
        if 2 * found.size == period and found[0] in (0, period // 2):
            return f"only the {'second' if found[0] else 'first'} half of each {period} {noun}s"
        return f"only numbers {found[0]} to {found[-1]} of each {period} {noun}s"
    return f"{found.size} of each {period} {noun}s, alike in all of them"


# ------------------------------------------------------------------ how


def _numbers(output: Array) -> bool:
    try:
        finfo(output.dtype)
    except ValueError:
        return output.dtype.kind in "iu"
    return output.dtype.kind != "c"


def _how(output: Array, expected: Array, ratios: Array, bad: Array) -> tuple[str, ...]:
    """What the wrong values have in common."""
    chosen = np.flatnonzero(bad)
    if chosen.size > SAMPLE:
        chosen = chosen[:: -(-chosen.size // SAMPLE)]
    out, y = (x.reshape(-1)[chosen].astype(np.float64) for x in (output, expected))
    tol = _tolerances(out, y, ratios.reshape(-1)[chosen])
    if not chosen.size:
        return _bias(output, expected)
    if output.dtype.kind in "iu":
        return (f"found {output.reshape(-1)[chosen[0]]} instead of {expected.reshape(-1)[chosen[0]]}",)
    special = _special(out, y)
    if special:
        return (special,)
    finite = np.isfinite(out) & np.isfinite(y)
    out, y, tol = out[finite], y[finite], tol[finite]
    dtype = output.dtype
    if _close(out, -y, tol, dtype):
        return ("the sign is flipped",)
    if out.size >= 3:
        large = np.abs(y) >= np.median(np.abs(y))
        factor = float(np.median(out[large] / y[large]))
        telling = math.isfinite(factor) and abs(factor) > 1e-3 and abs(factor - 1) > 4 * float(finfo(dtype).eps)
        if telling and _close(out, factor * y, abs(factor) * tol, dtype):
            return (f"found = {factor:.5g} × expected throughout",)
        shift = float(np.median(out - y))
        if abs(shift) > 4 * np.median(tol) and np.ptp(y) > 8 * np.median(tol) and _close(out, y + shift, tol, dtype):
            return (f"found = expected {'+' if shift > 0 else '-'} {abs(shift):.4g} throughout",)
    return (*_by_row(output, expected, ratios, bad), *_bias(output, expected))


def _tolerances(out: Array, y: Array, ratios: Array) -> Array:
    """The tolerances that the ratios are about."""
    return np.where((ratios > 0) & np.isfinite(ratios), np.abs(out - y) / ratios, 1e-7 * np.abs(y))


def _inner(y: Array, tol: Array, dtype: np.dtype[Any]) -> Array:
    """The part of the tolerances that is not the final rounding, which depends on the value that is stored."""
    return np.maximum(tol - half_ulp(y, dtype), 0)


def _close(out: Array, y: Array, inner: Array, dtype: np.dtype[Any]) -> bool:
    """Whether nearly all are what values `y` give that are known up to `inner`; with room for another rounding."""
    return bool(out.size) and float(np.mean(np.abs(out - y) <= 2 * (half_ulp(y, dtype) + inner))) >= 0.98


def _special(out: Array, y: Array) -> str | None:
    for text, test in (("NaN", np.isnan), ("infinite", np.isinf)):
        if test(out).all():
            return f"all of them {text}"
        if test(y).all() and not test(out).any():
            return f"{text} expected, found finite values"
        if test(out).any() and not test(y).any():
            return f"{int(np.count_nonzero(test(out)))} of {out.size} are {text}"
    if (out == out[0]).all() and out.size > 1 and not (y == y[0]).all():
        return f"all of them {out[0]:.5g}"
    return None


def _by_row(output: Array, expected: Array, ratios: Array, bad: Array) -> tuple[str, ...]:
    """Rows or columns that are off by a factor or a difference of their own."""
    if output.ndim < 2 or output.shape[-1] < 4:
        return ()
    shape = (-1, output.shape[-1])
    rows = np.flatnonzero(bad.reshape(shape).any(axis=1))[:256]
    out, y = (x.reshape(shape)[rows].astype(np.float64) for x in (output, expected))
    ratio = ratios.reshape(shape)[rows].astype(np.float64)
    tol = _tolerances(out, y, ratio)
    if not (np.isfinite(out).all() and np.isfinite(y).all()):
        return ()
    factors, inner = np.sum(out * y, axis=1) / np.sum(y * y, axis=1), _inner(y, tol, output.dtype)
    telling = len(rows) > 1 and bool(np.isfinite(factors).all()) and np.abs(factors - 1).max() > 1e-6
    if telling and _close(out, factors[:, None] * y, inner * np.abs(factors[:, None]), output.dtype):
        return (f"each row off by a factor of its own, {factors.min():.4g} to {factors.max():.4g}",)
    shifts = np.median(out - y, axis=0)
    if len(rows) > 2 and (np.abs(shifts) > tol.max(axis=0)).any() and _close(out, y + shifts, inner, output.dtype):
        return ("the same difference in every row, as a bias makes it",)
    return ()


def _bias(output: Array, expected: Array) -> tuple[str, ...]:
    """Magnitudes that are nearly all too small, or too large."""
    step = -(-output.size // SAMPLE)
    out, y = (x.reshape(-1)[::step].astype(np.float64) for x in (output, expected))
    try:
        unit = ulp(y, output.dtype)
    except ValueError:  # no floating point
        return ()
    error = (out - y) * np.sign(y) / unit
    error = error[np.isfinite(error) & (error != 0)]
    if error.size < 32 or abs(float(error.mean())) < 0.25:
        return ()
    for sign, text in ((-1, "too small"), (1, "too large")):
        if float(np.mean(sign * error > 0)) > 0.97:
            likely = " (truncation)" if sign < 0 and error.min() >= -1.05 else ""
            return (f"magnitudes all {text}, by {abs(float(error.mean())):.2g} ulp on average{likely}",)
    return ()


# ------------------------------------------------------------------ relations


def _relations(
    inputs: Mapping[str, Any], output: Array, expected: Array, ratios: Array, bad: Array, axes: list[Axis]
) -> tuple[str, ...]:
    """Values that belong to another place, and the causal edge of an attention."""
    if output.dtype.kind in "iu" or not output.ndim:
        return ()
    edge = _causal_edge(inputs, output, expected, bad)
    if edge:
        return (edge,)
    for i, axis in enumerate(axes):
        exchanged = find_exchange(output, expected, ratios, i)
        if exchanged is not None:
            return (f"{exchanged_text(axis, *exchanged)} are exchanged",)
        moved = find_move(output, expected, ratios, i)
        if moved is not None:
            here = describe_indices(moved[0], axis).removeprefix("only ")
            what = f"each {axis.noun} holds" if moved[0].all() else f"{here}: each holds"
            by = abs(moved[1])
            return (f"{what} the values of the {axis.noun} {by} {'after' if moved[1] > 0 else 'before'} it",)
    return ()


def exchanged_text(axis: Axis, lower: Array, distance: int) -> str:
    """'heads 0 and 1', 'rows 0 to 3 and 8 to 11' for what has changed places."""
    if len(lower) == 1:
        return f"{axis.noun}s {lower[0] + axis.first} and {lower[0] + distance + axis.first}"
    if (np.diff(lower) == 1).all():
        first, last = int(lower[0]), int(lower[-1])
        other = f"{first + distance + axis.first} to {last + distance + axis.first}"
        return f"{axis.span(first, last + 1)} and {other}"
    return f"{axis.noun}s that are {distance} apart"


def find_exchange(output: Array, expected: Array, ratios: Array, axis: int) -> tuple[Array, int] | None:
    """Whether the wrong slices along `axis` are pairs that changed places: the lower ones, and how far the others are
    from them."""
    size = output.shape[axis]
    if size < 2 or output.size // size < 4:
        return None
    out, y, ratio = (np.moveaxis(x, axis, 0).reshape(size, -1) for x in (output, expected, ratios))
    wrong = np.flatnonzero(~(ratio <= 1).all(axis=1))
    if wrong.size < 2 or wrong.size % 2:
        return None
    step = -(-out.shape[1] // 256)
    out, y, ratio = (x[:, ::step].astype(np.float64) for x in (out, y, ratio))
    inner = np.median(_inner(y[wrong], _tolerances(out[wrong], y[wrong], ratio[wrong]), output.dtype), axis=0)
    inner = np.where(np.isfinite(inner), inner, 0)
    for distance in (wrong[1:] - wrong[0]).tolist()[:64]:
        lower = wrong[np.isin(wrong + distance, wrong)]
        if distance > 0 and 2 * len(lower) > wrong.size:  # chains of more than two: of the pairs, the first
            lower = lower[(lower - wrong[0]) // distance % 2 == 0]
        upper = lower + distance
        if 2 * len(lower) != wrong.size or np.intersect1d(lower, upper).size:
            continue
        both, others = np.concatenate([lower, upper]), np.concatenate([upper, lower])
        if _close(out[both], y[others], inner, output.dtype) and len(np.unique(out[both])) >= 3:
            return lower, distance
    return None


def find_move(output: Array, expected: Array, ratios: Array, axis: int) -> tuple[Array, int] | None:
    """Whether wrong slices along `axis` are those of other indices: which ones, and found[i] = expected[i + shift].

    A slice counts if it has at least three different values, so that it cannot agree by chance.
    """
    size = output.shape[axis]
    if size < 2 or output.size // size < 1:
        return None
    out, y, ratio = (np.moveaxis(x, axis, 0).reshape(size, -1) for x in (output, expected, ratios))
    hits = np.asarray(~(ratio <= 1).all(axis=1))
    wrong = np.flatnonzero(hits)
    if not wrong.size:
        return None
    # Of long slices a part is enough.
    step = -(-out.shape[1] // 256)
    out, y, ratio = (x[:, ::step].astype(np.float64) for x in (out, y, ratio))
    dtype = output.dtype
    inner = np.median(_inner(y[wrong], _tolerances(out[wrong], y[wrong], ratio[wrong]), dtype), axis=0)
    inner = np.where(np.isfinite(inner), inner, 0)
    first = int(wrong[len(wrong) // 2])
    candidates = np.flatnonzero((np.abs(y - out[first]) <= 2 * (half_ulp(y, dtype) + inner)).mean(axis=1) >= 0.98)
    for shift in sorted((int(c) - first for c in candidates if c != first), key=abs)[:16]:
        source = wrong + shift
        inside = (source >= 0) & (source < size)
        if inside.mean() < 0.5:
            continue
        moved = out[wrong[inside]]
        if _close(moved, y[source[inside]], inner, dtype) and len(np.unique(moved)) >= 3:
            return hits, shift
    return None


def _causal_edge(inputs: Mapping[str, Any], output: Array, expected: Array, bad: Array) -> str | None:
    """One key too many gives (1 - p) y + p v of that key, an error along v - y; one too few an error along y - v."""
    values = inputs.get("v")
    if values is None or inputs.get("k") is None or output.ndim != 3 or output.shape[0] < 2:
        return None
    (tokens, heads, dim), (length, groups) = output.shape, values.shape[:2]
    if dim < 4 or not groups or heads % groups or length < tokens:
        return None
    v = np.repeat(np.asarray(values).astype(np.float64), heads // groups, axis=1)
    y, error = expected.astype(np.float64), output.astype(np.float64) - expected.astype(np.float64)
    hit = np.asarray(bad.any(axis=2))
    for too_wide in (True, False):
        rows = np.arange(tokens - 1) if too_wide else np.arange(1 if length == tokens else 0, tokens)
        edge = v[rows + length - tokens + (1 if too_wide else 0)]
        along = edge - y[rows] if too_wide else y[rows] - edge
        dot = np.sum(along * error[rows], axis=2)
        cosine = dot / np.linalg.norm(along, axis=2) / np.linalg.norm(error[rows], axis=2)
        chosen = cosine[hit[rows]]
        if chosen.size >= 3 and float(np.mean(chosen > 0.9)) > 0.8:
            return f"the causal edge: row t {'sees key t+1' if too_wide else 'does not see key t'}"
    return None

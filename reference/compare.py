"""Compares one output of an operator with its oracle; the tests, `llaisys check` and the differ all use it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bounds import Array, L, Oracle, finfo, half_ulp, nearest, tolerance, ulp

#: A mean that is further from what it should be than this many of its standard errors is no accident.
STANDARD_ERRORS = 6.0


@dataclass(frozen=True)
class Verdict:
    """Outcome of `check`.

    `ok`: every claimed element has a ratio of at most 1. `worst`: the largest ratio |result - y| / tolerance; inf where
    a NaN or infinity does not coincide, or an exact output differs. `index`: of the first element with that ratio, None
    if there are no elements (or shape or dtype is wrong). `got`, `expected`: the two values there. `failed`: elements
    with a ratio above 1. `checked`: elements about which the oracle claims something, out of `size`; a caller that
    wants evidence must see that it is not 0. `bias`: mean difference to y rounded to nearest, in ulps, where more than
    one ulp counts as one; `outward`: the same of the magnitudes (truncation shows as -0.5); both over the finite
    elements whose bound a is below an ulp. `limit`: how far from 0 rounding errors may take these (`_bias`). `reason`:
    "" if ok, else what is wrong.
    """

    ok: bool
    worst: float = 0.0
    index: tuple[int, ...] | None = None
    got: Any = None
    expected: Any = None
    failed: int = 0
    checked: int = 0
    size: int = 0
    bias: float = 0.0
    outward: float = 0.0
    limit: float = math.inf
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    @property
    def biased(self) -> bool:
        """Off to one side by more than independent errors explain: suspect, not wrong, as data may be correlated."""
        return max(abs(self.bias), abs(self.outward)) > self.limit


def ratios(output: Array, oracle: Oracle) -> Array:
    """|output - y| / tolerance per element: at most 1 is admissible, 0 where nothing is claimed.

    NaN must meet NaN, and an infinite y the same infinity: inf if not. Where y is finite, an infinity is admissible if
    the value before the final rounding may lie beyond the last number of the dtype, and required if it must. Half-way
    between two numbers, with a = 0, only the even one is right: inf if not.
    """
    output = np.asarray(output)
    if oracle.exact:
        return np.where(_same(output, oracle.y), 0.0, np.inf)
    y = oracle.y.astype(np.float64)
    a = np.broadcast_to(np.asarray(oracle.a, np.float64), y.shape)
    out = output.astype(np.float64)
    largest = float(finfo(output.dtype).max)
    beyond = largest + half_ulp(largest, output.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = np.abs(out - y) / tolerance(oracle, output.dtype)
        overflow_ok = np.isinf(out) & (np.sign(out) == np.sign(y)) & (np.abs(y) + a >= beyond)
        overflow_missing = np.isfinite(out) & (np.abs(y) - a >= beyond)
    ratio = np.where(np.isfinite(out) & ~overflow_missing & ~np.isnan(ratio), ratio, np.where(overflow_ok, 0.0, np.inf))
    ratio = np.where(np.isinf(a), 0.0, ratio)
    if (ratio == 1).any():  # a tie, if y is known for certain, goes to even
        ratio = np.where((ratio == 1) & (a == 0) & (out != nearest(y, output.dtype)), np.inf, ratio)
    coincide = (np.isnan(y) & np.isnan(out)) | (y == out)
    return np.where(np.isfinite(y), ratio, np.where(coincide, 0.0, np.inf))


def check(output: Array, oracle: Oracle, dtype: np.dtype[Any] | None = None) -> Verdict:
    """Is `output` what `oracle` admits? `dtype` is the expected dtype of the output, where the caller knows it."""
    output = np.asarray(output)
    size = output.size
    if output.shape != oracle.y.shape:
        return Verdict(False, np.inf, size=size, reason=f"shape: expected {oracle.y.shape}, found {output.shape}")
    if dtype is not None and output.dtype != dtype:
        return Verdict(False, np.inf, size=size, reason=f"dtype: expected {dtype}, found {output.dtype}")
    if size == 0:
        return Verdict(True)
    ratio = ratios(output, oracle)
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    worst, failed = float(ratio[index]), int(np.count_nonzero(ratio > 1))
    got, expected = output[index].item(), oracle.y[index].item()
    unclaimed = np.isinf(np.broadcast_to(np.asarray(oracle.a, np.float64), ratio.shape))
    bias, outward, limit = (0.0, 0.0, math.inf) if oracle.exact else _bias(output, oracle)
    reason = ""
    if failed:
        reason = f"{failed} of {size} elements out of bound, worst at {index}: expected {expected!r}, found {got!r}"
        reason += f", ratio {worst:.3g}" if np.isfinite(worst) else ""
    checked = size - int(np.count_nonzero(unclaimed))
    return Verdict(not failed, worst, index, got, expected, failed, checked, size, bias, outward, limit, reason)


def _same(output: Array, y: Array) -> Array:
    """Equality of bits per element, so that -0 is not +0; any two NaN are equal unless `y` is a copy (same dtype)."""
    copied = y.dtype == output.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        want = np.ascontiguousarray(y.astype(output.dtype))
    got = np.ascontiguousarray(output)
    bits = np.dtype(f"V{output.dtype.itemsize}")
    equal = got.reshape(-1).view(bits) == want.reshape(-1).view(bits)
    if not copied:
        equal = equal | (np.isnan(got) & np.isnan(want)).reshape(-1)
    return np.asarray(equal).reshape(output.shape)


def _bias(output: Array, oracle: Oracle) -> tuple[float, float, float]:
    """`bias`, `outward` and `limit` of a Verdict, of the elements that are known to less than an ulp before the final
    rounding; of others, as most in f32, it would say nothing about that rounding.

    Against y rounded and not against y: the mean of the roundings themselves need not be 0. Products of two numbers of
    8 bits have few low bits, that are neither uniform nor symmetric.
    """
    y = oracle.y.astype(np.float64)
    want, out = nearest(y, output.dtype), output.astype(np.float64)
    a = np.broadcast_to(np.asarray(oracle.a, np.float64), y.shape)
    step = ulp(np.where(np.isfinite(y), y, 0.0), output.dtype)
    use = np.isfinite(out) & np.isfinite(want) & (a < step)
    count, other = max(int(np.count_nonzero(use)), 1), use & (out != want)
    shift = np.clip((out[other] - want[other]) / step[other], -1, 1)
    sides = np.stack([shift, shift * np.sign(y[other])])
    mean, limit = sides.sum(axis=-1) / count, STANDARD_ERRORS / count
    if np.abs(mean).max() > limit:
        near, share = np.where(use, y, 0.0) / step, np.where(use, a, 0.0) / step
        limit = _limit(near, share, use, oracle.independent)
        if np.abs(mean).max() > limit:
            # Equal values have equal errors: one of each, or a repeated row would count as evidence many times.
            _, first = np.unique(np.where(use, y, np.nan), return_index=True)
            once: Array = np.zeros(y.size, bool)
            once[first] = use.reshape(-1)[first]
            once = once.reshape(y.shape)
            mean = sides[:, once[other]].sum(axis=-1) / max(int(np.count_nonzero(once)), 1)
            limit = _limit(near, share, once, oracle.independent)
    return float(mean[0]), float(mean[1]), limit


def _limit(y: Array, a: Array, use: Array, independent: bool) -> float:
    """How far the mean of (result - y rounded to nearest) may be from 0, with `y` and `a` in ulps of the result.

    A result may differ from y rounded where y is within a of a tie. In how many elements it may bounds the mean at any
    rate. If errors have either sign, each row as a whole, it is 0 up to six standard errors, which are at most the root
    of the sum of the squares; if each element for itself, up to `scatter` too.
    """
    count = max(int(np.count_nonzero(use)), 1)
    near = use & (np.abs(np.abs(y) % 1.0 - 0.5) <= a)
    total = int(np.count_nonzero(near))
    if independent:
        square = min(float(total), scatter(a[use]))
    else:
        square = float(np.sum(np.count_nonzero(near, axis=-1).astype(np.float64) ** 2)) if near.ndim else float(total)
    return max(STANDARD_ERRORS, min(float(total), STANDARD_ERRORS * math.sqrt(square))) / count


def scatter(a: Array) -> float:
    """Variance of the number of results that differ from y rounded one way less those that do the other way, where the
    f32 part has independent errors with the bound `a` in ulps. Its standard deviation is a / L, and the probability
    that it crosses a tie no more, if y is in no special position to ties."""
    return float(np.sum(np.minimum(1.0, a / L)))

"""Compares one output of an operator with its oracle; the tests, `llaisys check` and the differ all use it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bounds import Array, Oracle, finfo, half_ulp, tolerance, ulp

#: A mean that is further from what it should be than this many of its standard errors is no accident.
STANDARD_ERRORS = 6.0


@dataclass(frozen=True)
class Verdict:
    """Outcome of `check`.

    `ok`: every claimed element has a ratio of at most 1. `worst`: the largest ratio |result - y| / tolerance; inf where
    a NaN or infinity does not coincide, or an exact output differs. `index`: of the first element with that ratio, None
    if there are no elements (or shape or dtype is wrong). `got`, `expected`: the two values there. `failed`: elements
    with a ratio above 1. `checked`: elements about which the oracle claims something, out of `size`; a caller that
    wants evidence must see that it is not 0. `bias`: mean signed error in ulps, `outward`: mean error of the magnitude
    in ulps (truncation shows as -0.5), both over the finite elements; `limit`: the largest |outward| that rounding to
    nearest explains (`bias_limit`). `reason`: "" if ok, else what is wrong.
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
        """Magnitudes are off to one side by more than rounding to nearest explains. Data of which few elements are
        independent can be, so a biased result is suspect, not wrong."""
        return abs(self.outward) > self.limit


def ratios(output: Array, oracle: Oracle) -> Array:
    """|output - y| / tolerance per element: at most 1 is admissible, 0 where nothing is claimed.

    NaN must meet NaN, and an infinite y the same infinity: inf if not. Where y is finite, an infinity is admissible if
    the value before the final rounding may lie beyond the last number of the dtype, and required if it must.
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
    """`bias`, `outward` and `limit` of a Verdict. Equal values have equal errors, so where they look biased, each value
    counts once."""
    out, y = output.astype(np.float64), oracle.y.astype(np.float64)
    a = np.broadcast_to(np.asarray(oracle.a, np.float64), y.shape)
    use = np.isfinite(out) & np.isfinite(y) & np.isfinite(a)
    if not use.any():
        return 0.0, 0.0, math.inf
    step = np.where(use, ulp(np.where(use, y, 1.0), output.dtype), 1.0)
    error = np.where(use, np.where(use, out - np.where(use, y, 0.0), 0.0) / step, 0.0)
    outward = error * np.sign(np.where(use, y, 0.0))
    share = np.where(use, np.where(use, a, 0.0) / step, 0.0)
    count = int(np.count_nonzero(use))
    bias, mean = float(error.sum()) / count, float(outward.sum()) / count
    limit = bias_limit(share, count, oracle.independent)
    if abs(mean) > limit:
        _, first = np.unique(np.abs(y[use]), return_index=True)
        mean = float(outward[use][first].mean())
        limit = bias_limit(share[use][first], len(first), oracle.independent)
    return bias, mean, limit


def bias_limit(share: Array, count: int, independent: bool) -> float:
    """How far the mean error of `count` magnitudes, in ulps, may be from 0 if each is rounded to nearest.

    The final rounding of unrelated values errs by up to half an ulp to either side, with a variance of 1/12: six
    standard errors of the mean are 6 / sqrt(12 count), once in 5e8. To this comes what the values before the final
    rounding may be off together: `share` holds the bound on each in ulps (a / ulp). The mean of these cannot be
    exceeded; nor, six standard errors again, the root of the sum of the squares of what moves as one, each element for
    itself or each row (along the last axis), over the count.
    """
    common = float(np.sum(share)) / count
    groups = share if independent or share.ndim == 0 else share.sum(axis=-1)
    return STANDARD_ERRORS / math.sqrt(12 * count) + min(
        common, STANDARD_ERRORS * math.sqrt(float(np.sum(groups**2))) / count
    )

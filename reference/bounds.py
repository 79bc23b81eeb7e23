"""Error bounds: what an oracle says about one output, and how far a result may be from it.

The model of rounding is fl(a op b) = (a op b)(1 + d), |d| <= u. A sum of n terms in any order is off by at most
n u sum|x_i|, whatever the data; if the single errors are independent and of mean zero, it is off by more than
`L` sqrt(n) u sum|x_i| with a probability below 2 exp(-L^2 / 2) (Higham and Mary 2019, "A new approach to probabilistic
rounding error analysis"), which is 7e-4 at L = 4 even if all partial sums were as large as sum|x_i|. `walk(n)` is the
smaller of the two counts. No constant here or in the operators is fitted to results.

Rounding errors of constant data are not independent. Where a result exceeds the bound of `walk`, it is therefore only
suspect, and held against `worst_case`, in which a walk of n errors may go n steps one way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: What numpy's finfo says, for bf16 too.
finfo: Callable[[Any], Any] = ml_dtypes.finfo

#: Unit roundoff of the f32 accumulator.
U32 = 2.0**-24
#: Safety factor on the sqrt(n) of a random walk of n rounding errors.
L = 4.0
#: Largest finite f32: where partial sums may exceed it, nothing is claimed about the result (a = inf).
MAX32 = float(np.finfo(np.float32).max)
#: Smallest normal f32: matrix units treat what is below as zero.
TINY32 = float(np.finfo(np.float32).tiny)
#: The bits of the exponent of an f64.
_EXPONENT = np.int64(0x7FF << 52)


@dataclass(frozen=True)
class Oracle:
    """What exact arithmetic says of one output.

    `y` is the value of the formula in f64, with the inner rounding points of the contract as `rounding_point` has
    them. `a` bounds the absolute error that f32 arithmetic and undecided inner roundings may add before the final
    rounding; the bound on an element is then `tolerance`. An element with a = inf is not claimed. `exact` outputs must
    agree bit for bit with `y` rounded to the output's dtype (any NaN with any NaN), or with the bytes of `y` where it
    has that dtype already. `independent`: the errors within `a` of the elements of one row have nothing in common.
    """

    y: Array
    a: Array | float = 0.0
    exact: bool = False
    independent: bool = False


def tolerance(oracle: Oracle, dtype: np.dtype[Any]) -> Array:
    """Admissible |result - y| per element, for a result stored as `dtype`: ulp(|y| + a) / 2 + a.

    The value before the final rounding is within a of y, so its magnitude is at most |y| + a, and rounding it to
    nearest adds at most half an ulp there.
    """
    y = np.abs(oracle.y.astype(np.float64))
    a = np.broadcast_to(np.asarray(oracle.a, np.float64), y.shape)
    return half_ulp(y + a, dtype) + a


def ulp(x: Array | float, dtype: np.dtype[Any]) -> Array:
    """Distance between neighbouring numbers of `dtype` at magnitude |x|, in f64; subnormals included.

    Beyond the largest number the exponent range is taken as unbounded; inf gives inf and NaN gives NaN.
    """
    info = finfo(dtype)
    magnitude = np.abs(np.asarray(x, np.float64))
    # Without its mantissa, a number is the power of two below it; infinity stays, and NaN is put back.
    power = (np.maximum(magnitude, float(info.smallest_normal)).view(np.int64) & _EXPONENT).view(np.float64)
    return np.where(np.isnan(magnitude), magnitude, power * math.ldexp(1.0, -int(info.nmant)))


def half_ulp(x: Array | float, dtype: np.dtype[Any]) -> Array:
    """Largest error of rounding a number of magnitude |x| to `dtype`, to nearest."""
    return ulp(x, dtype) / 2


def unit(dtype: np.dtype[Any]) -> float:
    """Unit roundoff of `dtype`: the largest relative error of rounding to nearest (2^-24, 2^-11 or 2^-8)."""
    return math.ldexp(1.0, -1 - int(finfo(dtype).nmant))


def rounding_point(y: Array, a: Array | float, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Value and uncertainty, in f64, after one inner rounding to `dtype` of values known to be within `a` of `y`.

    Rounding is monotone, so the rounded value lies between those of y - a and y + a. Mostly these are one number of a
    16-bit `dtype`, which is then known. In f32 they hardly ever are, and half an ulp more of uncertainty says the same.
    """
    if dtype == np.float32:
        return y, a + half_ulp(np.abs(y) + a, dtype)
    sure = np.isfinite(y)
    low, high = nearest(np.where(sure, y - a, y), dtype), nearest(np.where(sure, y + a, y), dtype)
    known = (low == high) | ~sure
    both = np.isfinite(low) & np.isfinite(high)
    with np.errstate(invalid="ignore"):
        middle = np.where(known, low, np.where(both, (low + high) / 2, y))
        return middle, np.where(known, 0.0, np.where(both, (high - low) / 2, np.inf))


def nearest(x: Array, dtype: np.dtype[Any]) -> Array:
    """f64 `x` rounded once to the nearest number of `dtype`, to even; still f64. (`astype` rounds to f32 first.)"""
    step = np.where(np.isfinite(x), ulp(x, dtype), 1.0)
    rounded = np.rint(x / step) * step
    return np.where(np.abs(rounded) > float(finfo(dtype).max), np.copysign(np.inf, x), rounded)


_worst: ContextVar[bool] = ContextVar("worst_case", default=False)


@contextmanager
def worst_case() -> Iterator[None]:
    """The oracles called inside bound errors that are not independent: the worst case, whatever the data."""
    token = _worst.set(True)
    try:
        yield
    finally:
        _worst.reset(token)


def walk(n: int) -> float:
    """Rounding errors, in units of u sum|x_i|, that a sum of n terms collects: min(n, L sqrt(n)), in `worst_case` n."""
    return float(n) if _worst.get() else min(float(n), L * math.sqrt(n))


def random_sum(total: Array, squares: Array) -> Array:
    """Bound of a sum of independent errors whose sizes sum to `total` and whose squares to `squares` (Hoeffding):
    L times the root of the latter, if that is less; in `worst_case` the total."""
    return total if _worst.get() else np.minimum(total, L * np.sqrt(squares))

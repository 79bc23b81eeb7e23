"""Rounding helpers shared by the numpy twins: the f32 arithmetic and the rounding points of the contract."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from .bounds import Array

P = ParamSpec("P")
R = TypeVar("R")


def quiet(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of the twins and oracles: overflow to infinity and NaN are results, not something to warn about."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return inner


def f32(x: Array) -> Array:
    """`x` widened (exactly) to f32, the dtype in which every operator accumulates."""
    return np.asarray(x).astype(np.float32)


def f64(x: Array) -> Array:
    """`x` widened (exactly) to f64, for the oracles."""
    x = np.asarray(x)
    # bf16 goes by way of f32, which is twice as fast.
    return x.astype(np.float32).astype(np.float64) if x.dtype.itemsize == 2 else x.astype(np.float64)


def r(x: Array, dtype: np.dtype[Any]) -> Array:
    """Round once to `dtype`, to nearest even, and widen back to f32: one rounding point of the contract."""
    return cast(x, dtype).astype(np.float32)


def cast(x: Array, dtype: np.dtype[Any]) -> Array:
    """Round f32 values once to `dtype`, to nearest even; what is too large becomes infinite, silently."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x).astype(np.float32, copy=False).astype(dtype)

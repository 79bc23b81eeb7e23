"""What the tests of kernels share: `llaisys.harness`, and the judgement of results.

`judge` compares results with the f64 oracle and with the numpy twin. Failures are AssertionErrors that name operator,
dtype, tier, case and layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from llaisys import _lib
from llaisys._interop import address_of
from llaisys.harness import (
    LAYOUTS,
    POISONS,
    THREADS,
    Array,
    Guarded,
    heap,
    invoke,
    place,
    raw,
    run,
    same_bits,
    tensor,
    using,
)
from llaisys.reference import SPECS, Oracle, check, tolerance
from llaisys.reference.numerics import f64
from llaisys.reference.spec import Spec, calls, dims_label

__all__ = [
    "LAYOUTS",
    "POISONS",
    "THREADS",
    "TIERS",
    "Array",
    "Case",
    "Guarded",
    "address_of",
    "call_native",
    "case_of",
    "cases",
    "heap",
    "invoke",
    "judge",
    "just_outside",
    "make_case",
    "place",
    "raw",
    "run",
    "same_bits",
    "tensor",
    "using",
]

TIERS = _lib.TIERS


@dataclass(frozen=True)
class Case:
    """One valid call with what must come out of it."""

    label: str
    values: dict[str, Any]
    oracles: tuple[Oracle, ...]
    twins: tuple[Array, ...]


def make_case(spec: Spec, label: str, values: dict[str, Any]) -> Case:
    twins = spec.call(spec.twin, values)
    return Case(label, values, spec.call(spec.oracle, values), tuple(np.asarray(t) for t in twins))


@cache
def cases(name: str, dtype: str) -> tuple[Case, ...]:
    """All calls of the SPEC, with oracle and twin computed once for all tiers."""
    return tuple(make_case(SPECS[name], label, values) for label, _, values in calls(SPECS[name], dtype))


@cache
def case_of(name: str, dtype: str, sizes: tuple[tuple[str, Any], ...]) -> Case:
    """A call with random inputs of other sizes than the SPEC's."""
    spec, dims = SPECS[name], dict(sizes)
    values = spec.inputs(spec, np.random.default_rng(len(dims)), dims, spec.dtypes[dtype])
    return make_case(spec, dims_label(dims), values)


def judge(spec: Spec, case: Case, outputs: tuple[Array, ...], where: str) -> None:
    """The outputs are within the bound of the oracle, and agree with the twin: bit for bit where the result is exact,
    else within the two bounds (theirs and the twin's)."""
    for arg, out, oracle, twin in zip(spec.outputs, outputs, case.oracles, case.twins, strict=True):
        verdict = check(out, oracle, twin.dtype)
        assert verdict, f"{where}: {arg.name}: {verdict.reason}"
        assert oracle.exact or verdict.checked or not out.size, f"{where}: {arg.name}: the oracle claims nothing"
        if oracle.exact:
            copied = oracle.y.dtype == out.dtype
            equal = raw(out) == raw(twin)
            if not copied:  # a computed NaN may be any NaN
                equal = equal.reshape(out.shape) | (np.isnan(f64(out)) & np.isnan(f64(twin)))
            assert np.all(equal), f"{where}: {arg.name}: {np.count_nonzero(~equal)} elements are not the twin's"
        else:
            both = np.isfinite(f64(out)) & np.isfinite(f64(twin))
            with np.errstate(invalid="ignore"):
                far = both & (np.abs(f64(out) - f64(twin)) > 2 * tolerance(oracle, out.dtype))
            assert not far.any(), f"{where}: {arg.name}: {np.count_nonzero(far)} elements are far from the twin's"


def just_outside(oracle: Oracle, dtype: np.dtype[Any], index: tuple[int, ...]) -> Any:
    """The number of `dtype` nearest to y, above it, that the bound does not admit."""
    y, tol = float(oracle.y[index]), float(tolerance(oracle, dtype)[index])
    value = np.asarray(y + tol).astype(dtype)
    while f64(value) - y <= tol:
        value = np.nextafter(value, np.asarray(np.inf, dtype))
    return value


def call_native(name: str, values: Mapping[str, Any]) -> tuple[Array, ...]:
    """An operator through the C ABI, on plain memory."""
    return run(SPECS[name], values, name)

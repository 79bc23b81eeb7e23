"""The SPECs themselves: discovery, agreement with the C header, argument checks, and `check`, the comparison."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llaisys import reference
from llaisys.reference import DTYPES, FLOATS, SPECS, Oracle, check, ratios, tolerance
from llaisys.reference.binding import Binding, Problem, bind, describe
from llaisys.reference.bounds import half_ulp, ulp, unit, walk
from llaisys.reference.refusals import error_dims, refusals
from llaisys.reference.spec import Spec, arg_shape, empty_outputs, shape_letters

ROOT = Path(__file__).parent.parent
OPS = sorted(SPECS)


def valid_call(spec: Spec) -> dict[str, Any]:
    dims = error_dims(spec)
    inputs = spec.inputs(spec, np.random.default_rng(0), dims, FLOATS["f32"])
    return {**empty_outputs(spec, dims, FLOATS["f32"]), **inputs}


def bind_arrays(spec: Spec, values: dict[str, Any]) -> Binding | Problem:
    tensors = {a.name: None if values[a.name] is None else describe(np.asarray(values[a.name])) for a in spec.args}
    return bind(spec, tensors, {s.name: values[s.name] for s in spec.scalars})


def test_every_module_is_an_operator() -> None:
    stems = sorted(path.stem for path in (ROOT / "reference" / "ops").glob("*.py") if path.stem != "__init__")
    assert stems == OPS
    for name in OPS:
        assert getattr(reference, name) is SPECS[name].twin
        assert name in dir(reference)
    with pytest.raises(AttributeError, match="no_such_operator"):
        _ = reference.no_such_operator


def test_import_is_light() -> None:
    code = "import llaisys.reference, sys; assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", OPS)
def test_c_header_declares_it(name: str) -> None:
    header = re.sub(r"\s+", " ", (ROOT / "kernels" / "llaisys.h").read_text())
    assert SPECS[name].c_prototype in header


@pytest.mark.parametrize("name", OPS)
def test_spec_is_complete(name: str) -> None:
    spec = SPECS[name]
    assert spec.summary and spec.formula and spec.source and spec.twin.__doc__ and spec.raises
    assert all(arg.doc for arg in spec.args) and all(scalar.doc for scalar in spec.scalars)
    assert all(set(arg.may_alias) <= {a.name for a in spec.inputs_args} for arg in spec.args)
    letters = set(shape_letters(spec))
    for dims in (*spec.cases, *(p.dims for p in spec.probes), *(b.dims for b in spec.bench)):
        assert set(dims) == letters
    sizes = [n for dims in spec.cases for v in dims.values() for n in (v if isinstance(v, tuple) else (v,))]
    assert {0, 1} <= set(sizes), "sizes 0 and 1 must be among the cases"
    for bench in spec.bench:
        assert spec.traffic(bench.dims, 2) > 0
        assert spec.flops(bench.dims) > 0 or spec.accumulate == "none" or name == "embedding"
    assert {(b.model, b.phase) for b in spec.bench} >= {("0.5B", "decode"), ("1.5B", "decode")}


@pytest.mark.parametrize("name", OPS)
def test_bind(name: str) -> None:
    """A valid call gives its sizes; each refusal that shape, dtype and scalars decide is found, with its status."""
    spec = SPECS[name]
    values = valid_call(spec)
    bound = bind_arrays(spec, values)
    assert isinstance(bound, Binding) and bound.dims == error_dims(spec) and bound.dtype == "f32"
    assert all(bound.meta(a) == describe(values[a.name]) for a in spec.args)
    for arg in spec.inputs_args:
        missing = bind_arrays(spec, {**values, arg.name: None})
        assert isinstance(missing, Binding) if arg.optional else isinstance(missing, Problem)
    for case in refusals(spec):
        found = bind_arrays(spec, {**values, **case.change(values)})
        if case.status in ("ALIAS", "STRIDE", "INDEX"):
            assert isinstance(found, Binding), case.title
        else:
            assert isinstance(found, Problem) and found.status == case.status, case.title
            assert all(text in found.message for text in case.names), found.message


@pytest.mark.parametrize("shape", [(), (1,)])
def test_bind_argmax_of_one_axis(shape: tuple[int, ...]) -> None:
    tensors = {"x": ((5,), "f16"), "index": (shape, "i64"), "value": (shape, "f16")}
    assert isinstance(bind(SPECS["argmax"], tensors, {}), Binding)
    assert isinstance(bind(SPECS["argmax"], {**tensors, "index": ((2,), "i64")}, {}), Problem)


def test_leading_axes() -> None:
    x = SPECS["linear"].args[1]
    assert arg_shape(x, {"...": (), "C": 5}) == (5,)
    assert arg_shape(x, {"...": (2, 3), "C": 5}) == (2, 3, 5)


@pytest.mark.parametrize("name", FLOATS)
def test_ulp(name: str) -> None:
    """Against the distance to the next number, over all binades, at their first and last numbers."""
    dtype = FLOATS[name]
    info = reference.bounds.finfo(dtype)
    powers = 2.0 ** np.arange(info.minexp, info.maxexp)
    last = powers * (2 - 2.0**-info.nmant)
    for x in (powers, last[:-1]):
        stored = x.astype(dtype)
        assert (stored.astype(np.float64) == x).all()
        after = np.nextafter(stored, np.asarray(np.inf, dtype)).astype(np.float64)
        assert (after - x == ulp(-x, dtype)).all()
    assert ulp(0.0, dtype) == float(info.smallest_subnormal) == 2 * half_ulp(0.0, dtype)
    assert unit(dtype) == half_ulp(1.0, dtype)
    assert np.isinf(ulp(np.inf, dtype)) and np.isnan(ulp(np.nan, dtype))


def test_walk() -> None:
    assert [walk(n) for n in (0, 1, 16, 64)] == [0, 1, 16, 32]


@pytest.mark.parametrize("name", FLOATS)
def test_check_infinity_and_nan(name: str) -> None:
    dtype = FLOATS[name]
    largest = float(reference.bounds.finfo(dtype).max)
    step = float(ulp(largest, dtype))

    def ratio(out: float, y: float, a: float = 0.0) -> float:
        with np.errstate(over="ignore"):
            return float(ratios(np.array([out]).astype(dtype), Oracle(np.array([y]), a))[0])

    inf, nan = np.inf, np.nan
    assert ratio(nan, nan) == 0 and ratio(inf, inf) == 0 and ratio(-inf, -inf) == 0
    assert ratio(nan, 1.0) == inf and ratio(1.0, nan) == inf and ratio(inf, -inf) == inf and ratio(1.0, inf) == inf
    assert ratio(inf, largest + 0.6 * step) == 0, "rounds to infinity"
    assert ratio(-inf, largest + 0.6 * step) == inf, "the other infinity"
    assert ratio(largest, largest + 0.6 * step) == inf, "ought to be infinite"
    assert ratio(inf, largest + 0.4 * step) == inf, "ought to be finite"
    assert ratio(inf, largest + 0.4 * step, a=0.2 * step) == 0 and ratio(largest, largest + 0.4 * step) <= 1
    assert ratio(3.0, 1.0, a=inf) == 0 and ratio(1.0, 1.0, a=nan) == inf


def test_check_reports() -> None:
    y = np.linspace(1, 2, 12).reshape(3, 4)
    out = y.astype(np.float32)
    assert check(out, Oracle(y)) and check(out, Oracle(y)).checked == 12
    out[1, 2] += 1e-3
    verdict = check(out, Oracle(y))
    assert not verdict and verdict.index == (1, 2) and verdict.failed == 1 and verdict.worst > 1000
    assert verdict.got == out[1, 2] and verdict.expected == y[1, 2] and "(1, 2)" in verdict.reason
    assert check(out, Oracle(y, np.inf)).checked == 0, "no claim is no evidence"
    assert "shape" in check(out[:2], Oracle(y)).reason
    assert "dtype" in check(out, Oracle(y), FLOATS["f16"]).reason
    assert check(out[:0], Oracle(y[:0])).checked == 0


@pytest.mark.parametrize("name", FLOATS)
def test_check_sees_truncation(name: str) -> None:
    """Rounding towards zero stays below a ratio of 2, but shows as a mean error of half an ulp towards zero."""
    dtype = FLOATS[name]
    y = np.random.default_rng(3).standard_normal(4000)
    nearest = y.astype(np.float32).astype(dtype)
    over = np.abs(nearest.astype(np.float64)) > np.abs(y)
    truncated = np.where(over, np.nextafter(nearest, np.zeros_like(nearest)), nearest)
    assert abs(check(nearest, Oracle(y)).outward) < 0.05
    verdict = check(truncated, Oracle(y))
    assert 1 < verdict.worst <= 2 and -0.55 < verdict.outward < -0.45 and abs(verdict.bias) < 0.05


def test_check_exact() -> None:
    zero = np.array([0.0, np.nan], np.float32)
    assert check(zero, Oracle(zero.astype(np.float64), exact=True))
    assert not check(-zero, Oracle(zero.astype(np.float64), exact=True)), "-0 is not +0"
    payload = (zero.view(np.uint32) ^ [0, 1]).astype(np.uint32).view(np.float32)
    assert check(payload, Oracle(zero.astype(np.float64), exact=True)), "a computed NaN is any NaN"
    assert not check(payload, Oracle(zero, exact=True)), "a copied NaN keeps its bits"
    big = np.array([2**60 + 1])
    assert not check(big + 1, Oracle(big, exact=True)) and check(big, Oracle(big, exact=True))


def test_tolerance_takes_arrays_and_numbers() -> None:
    y = np.ones((2, 3))
    assert (tolerance(Oracle(y, 0.5), FLOATS["f32"]) == tolerance(Oracle(y, np.full((2, 3), 0.5)), FLOATS["f32"])).all()
    assert set(FLOATS) < set(DTYPES)

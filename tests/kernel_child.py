"""The part of an operator's tests that a defect may kill: `python kernel_child.py OPERATOR`, started by operator_tests.

Prints what it is about to do, so that the last line names the case that crashed, and "done" at the end.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llaisys
from kernel_harness import (
    LAYOUTS,
    POISONS,
    Guarded,
    address_of,
    heap,
    invoke,
    run,
    same_bits,
    tensor,
    using,
)
from llaisys._lib import LlaisysTensor
from llaisys.dtypes import DataType
from llaisys.reference import FLOATS, SPECS
from llaisys.reference.refusals import error_dims
from llaisys.reference.spec import Arg, Spec, arg_dtype, arg_shape, calls, empty_outputs

INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)


def say(text: str) -> None:
    print(text, flush=True)


# -------------------------------------------------------------- guard pages


def guarded(spec: Spec) -> None:
    """Every case with each tensor between two pages that must not be touched: the bits of the call on plain memory."""
    allocators = {"before a guard": Guarded(), "behind a guard": Guarded(at_start=True)}
    # Of the dtypes that only rearrange takes, one of each size.
    dtypes = {(d.itemsize, name in FLOATS): name for name, d in spec.dtypes.items()}.values()
    for tier in llaisys.isas():
        for dtype in dict.fromkeys([*FLOATS, *dtypes]):
            for n, (label, _, values) in enumerate(calls(spec, dtype)):
                with using(tier, (1, 2)[n % 2]):
                    expected = run(spec, values, label, allocate=heap)
                    for side, allocate in allocators.items():
                        # Rows of any layout but packed end at the guard only once, so one of those is enough.
                        for layout in ("packed", LAYOUTS[1 + n % 4]):
                            say(where := f"{spec.name} {dtype} {tier} {label} {layout} {side}")
                            found = run(spec, values, where, layout, allocate, POISONS[n % 2])
                            assert all(map(same_bits, found, expected)), f"{where}: other bits"


# ------------------------------------------------------------------- abuse


def valid_views(spec: Spec, dtype: str = "f32") -> tuple[dict[str, Any], list[Any]]:
    """C views and scalars of a valid call, and the arrays that they look at."""
    dims, kind = error_dims(spec), spec.dtypes[dtype]
    values = {**empty_outputs(spec, dims, kind), **spec.inputs(spec, np.random.default_rng(7), dims, kind)}
    arrays = [x for x in values.values() if isinstance(x, np.ndarray)]
    return {k: tensor(x) if isinstance(x, np.ndarray) else x for k, x in values.items()}, arrays


def abuses(arg: Arg) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """Nonsense for one argument: title, admissible statuses, changes of the view."""
    for ndim in (-1, 9, *INT32):
        yield f"ndim {ndim}", ("SHAPE",), {"ndim": ndim}
    for code in (0, -1, 20, 99, *INT32):
        yield f"dtype {code}", ("DTYPE",), {"dtype": code}
    yield "f8, which no operator computes with", ("DTYPE", "SHAPE"), {"dtype": int(DataType.F8)}
    yield "data NULL", ("INVALID_ARGUMENT",), {"data": None}
    yield "ndim 8 of ones", ("SHAPE", "INVALID_ARGUMENT"), {"ndim": 8, "shape": [1] * 8, "strides": [1] * 8}
    for axis in range(len(arg.shape.replace("...", "x").split())):
        for size in (-1, -(2**31), *INT64, 2**62):
            yield f"axis {axis} of {size}", ("SHAPE",), {"shape": (axis, size)}
        for stride in (*INT64, 2**62, -(2**62)):
            yield f"axis {axis} with stride {stride}", ("SHAPE", "STRIDE"), {"strides": (axis, stride)}
    yield "2^32 x 2^32 elements", ("SHAPE",), {"shape": [2**32] * 8}


def abuse(spec: Spec) -> None:
    """Each argument NULL, and with each nonsense in its view: a status with a text that names the operator."""
    for arg in spec.args:
        views, arrays = valid_views(spec)
        before = [x.tobytes() for x in arrays]
        say(f"{spec.name}: {arg.name} is NULL")
        status, text = invoke(spec, {**views, arg.name: None})
        assert status == ("OK" if arg.optional else "INVALID_ARGUMENT"), (arg.name, status, text)
        assert arg.optional or (text.startswith(f"{spec.name}: ") and arg.name in text), text
        for title, statuses, changes in abuses(arg):
            views, arrays = valid_views(spec)
            before = [x.tobytes() for x in arrays]
            view = views[arg.name]
            for key, value in changes.items():
                if isinstance(value, list):
                    getattr(view, key)[:] = value
                elif isinstance(value, tuple):
                    getattr(view, key)[value[0]] = value[1]
                else:
                    setattr(view, key, value)
            say(f"{spec.name}: {arg.name}: {title}")
            status, text = invoke(spec, views)
            assert status in statuses, f"{spec.name}: {arg.name}: {title}: found {status}: {text}"
            assert text.startswith(f"{spec.name}: "), text
            assert [x.tobytes() for x in arrays] == before, f"{spec.name}: {arg.name}: {title}: memory was written to"


# --------------------------------------------------------------------- fuzz

ARENA = 1 << 16


def reach(view: LlaisysTensor) -> tuple[int, int] | None:
    """First byte and one past the last, relative to data, of a view of known dtype and ndim; None if it is empty."""
    item = 16 if view.dtype == DataType.C128 else 8
    shape, strides = list(view.shape)[: view.ndim], list(view.strides)[: view.ndim]
    if any(n <= 0 for n in shape):
        return None
    spans = [(n - 1) * s * item for n, s in zip(shape, strides, strict=True)]
    return sum(s for s in spans if s < 0), sum(s for s in spans if s > 0) + item


def harmless(view: LlaisysTensor) -> bool:
    """Whether a call may run without leaving the arena: the view must be refused, or lies within it. One that is
    neither (valid, but of memory that is not ours) is not the library's to find."""
    if not 0 <= view.ndim <= 8 or not 0 < view.dtype < 20:
        return True
    if any(n < 0 for n in list(view.shape)[: view.ndim]):
        return True
    span = reach(view)
    return span is None or (span[0] >= -ARENA // 2 and span[1] <= ARENA // 2)


def fuzz(spec: Spec) -> None:
    """Valid calls with some fields of some views replaced: never a crash, and a status with a text."""
    sizes = st.sampled_from([0, 1, 2, 3, 4, 7, 8, -1, 2**31, 2**62, 2**63 - 1])
    strides = st.sampled_from([0, 1, 2, 3, 8, 24, -1, -8, 2**61, 2**63 - 1, -(2**63)])
    change = st.one_of(
        st.tuples(st.just("shape"), st.integers(0, 3), sizes),
        st.tuples(st.just("strides"), st.integers(0, 3), strides),
        st.tuples(st.just("ndim"), st.just(0), st.integers(-1, 9)),
        st.tuples(st.just("dtype"), st.just(0), st.integers(-1, 21)),
        st.tuples(st.just("data"), st.just(0), st.sampled_from([0, 1, 2, 3, 1024])),
    )
    names = st.sampled_from([a.name for a in spec.args])
    scalars = st.sampled_from([0.5, 0.0, -1.0, 1e30, float("nan"), float("inf")])
    arenas = {a.name: np.zeros(ARENA, np.uint8) for a in spec.args}
    shared = np.zeros(ARENA, np.uint8)
    statuses: set[str] = set()

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        dtype=st.sampled_from(list(FLOATS)),
        changes=st.lists(st.tuples(names, change), max_size=3),
        overlapping=st.booleans(),
        values=st.lists(scalars, min_size=len(spec.scalars), max_size=len(spec.scalars)),
    )
    def attempt(dtype: str, changes: list[Any], overlapping: bool, values: list[float]) -> None:
        dims = error_dims(spec)
        views: dict[str, Any] = {}
        bases: dict[str, int] = {}
        for arg in spec.args:
            view = tensor(np.zeros(arg_shape(arg, dims), arg_dtype(arg, spec.dtypes[dtype])))
            view.data = bases[arg.name] = address_of(shared if overlapping else arenas[arg.name]) + ARENA // 2
            views[arg.name] = view
        for name, (key, position, value) in changes:
            if key in ("shape", "strides"):
                getattr(views[name], key)[position] = value
            elif key == "data":
                views[name].data = bases[name] + value if value else None
            else:
                setattr(views[name], key, value)
        absurd = any(isinstance(v, int) and abs(v) > 2**30 for _, (k, _, v) in changes if k in ("shape", "strides"))
        if not all(map(harmless, views.values())) and not (absurd and overflows(views)):
            return
        status, text = invoke(spec, {**views, **dict(zip([s.name for s in spec.scalars], values, strict=True))})
        statuses.add(status)
        assert status != "UNKNOWN" and status != "INTERNAL", (status, text)
        assert status == "OK" or text.startswith(f"{spec.name}: "), (status, text)

    say(f"{spec.name}: fuzz")
    attempt()
    assert {"OK", "SHAPE", "DTYPE"} <= statuses, statuses


def overflows(views: dict[str, LlaisysTensor]) -> bool:
    """Whether every view that leaves the arena spans more bytes than int64 counts, so that it must be refused."""
    return all(harmless(v) or (span := reach(v)) is None or span[1] - span[0] > 2**63 * 8 for v in views.values())


def main() -> None:
    spec = SPECS[sys.argv[1]]
    ctypes.CDLL(None).alarm(240)  # a hang ends here, and the last line says where
    for section in (guarded, abuse, fuzz):
        section(spec)
    say("done")


if __name__ == "__main__":
    main()

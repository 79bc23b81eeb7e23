"""Copy between two layouts of one shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..bounds import Array, Oracle
from ..spec import Arg, Dims, Probe, Spec, qwen2_bench


def rearrange(x: Array) -> Array:
    """A contiguous copy of x[...], whatever its strides and dtype."""
    return np.array(x, order="C", copy=True)


def oracle(x: Array) -> tuple[Oracle, ...]:
    """Element by element, by index; the dtype is kept, so that results are compared byte for byte."""
    y = np.empty(x.shape, x.dtype)
    for index in np.ndindex(x.shape):
        y[index] = x[index]
    return (Oracle(y, exact=True),)


def make_inputs(spec: Spec, rng: np.random.Generator, dims: Dims, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Random bytes (0 or 1 for bool): every bit pattern must survive."""
    shape = tuple(dims["..."])
    if dtype == np.bool_:
        return {"x": rng.integers(0, 2, shape).astype(dtype)}
    return {"x": np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)}


SPEC = Spec(
    name="rearrange",
    summary="Copy between any two stride layouts.",
    formula="out[...] = x[...]",
    source="torch.Tensor.copy_",
    args=(
        Arg("out", "...", dtype="any", role="out", strides="any", doc="the copy"),
        Arg("x", "...", dtype="any", strides="any", doc="what is copied"),
    ),
    accumulate="none",
    twin=rearrange,
    oracle=oracle,
    inputs=make_inputs,
    cases=tuple(
        {"...": shape}
        for shape in [
            *[(), (0,), (3, 0, 2), (1,), (7,), (8,), (9,), (31,), (33,), (1, 17), (17, 1), (5, 33), (16, 16), (65, 63)],
            *[(2, 3, 17), (3, 5, 2, 7), (2, 1, 3, 1, 5), (2, 1, 3, 2, 1, 2, 3, 5)],
        ]
    ),
    probes=(
        Probe("transposed", {"...": (33, 17)}, lambda v: {"x": np.ascontiguousarray(v["x"].T).T}),
        Probe("heads before tokens", {"...": (5, 3, 8)}, lambda v: {"x": v["x"].swapaxes(0, 1).copy().swapaxes(0, 1)}),
        Probe("every other column", {"...": (9, 17)}, lambda v: {"x": np.repeat(v["x"], 2, axis=1)[:, ::2]}),
        Probe("reversed", {"...": (9, 17)}, lambda v: {"x": v["x"][::-1, ::-1]}),
        Probe("one row repeated", {"...": (9, 17)}, lambda v: {"x": np.broadcast_to(v["x"][:1], (9, 17))}),
    ),
    shared={"...": (67, 3, 513)},
    large=({"...": (521, 3, 131)},),
    bench=qwen2_bench(lambda m: {"heads": {"...": (m["T"], m["H"], m["D"])}}),
    raises=("ShapeError: the shapes differ", "DTypeError: the dtypes differ"),
)

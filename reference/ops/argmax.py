"""Index and value of the largest element along the last axis, as greedy decoding needs it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..bounds import Array, Oracle
from ..numerics import f32, f64
from ..spec import Arg, Constraint, ErrorCase, Probe, Spec, qwen2_bench


class Argmax(NamedTuple):
    """What argmax returns."""

    index: Array  # type: ignore[assignment]  # hides tuple.index
    value: Array


def argmax(x: Array) -> Argmax:
    """Index (int64) and value of the largest x[..., V]; the lowest index among equals, and the first NaN wins."""
    index = np.asarray(np.argmax(f32(x), axis=-1), dtype=np.int64)
    return Argmax(index, np.take_along_axis(x, index[..., None], axis=-1)[..., 0])


def oracle(x: Array) -> tuple[Oracle, ...]:
    """The lowest of the indices whose element is NaN, or where a row has none, equal to the row's maximum."""
    wide = f64(x)
    nan = np.isnan(wide)
    best = np.where(nan.any(axis=-1, keepdims=True), nan, wide == np.fmax.reduce(wide, axis=-1, keepdims=True))
    index = np.where(best, np.arange(x.shape[-1]), x.shape[-1]).min(axis=-1)
    rows = x.reshape(-1, x.shape[-1])
    value = np.array([row[i] for row, i in zip(rows, index.reshape(-1), strict=True)], dtype=x.dtype)
    return Oracle(index.astype(np.int64), exact=True), Oracle(value.reshape(index.shape), exact=True)


def with_values(values: dict[str, Any], *pairs: tuple[int, float]) -> dict[str, Any]:
    """x with x[..., position] = value for each pair."""
    x = values["x"].copy()
    for position, value in pairs:
        x[..., position] = value
    return {"x": x}


def lanes_apart(values: dict[str, Any]) -> dict[str, Any]:
    """In each row two largest elements, 1, 2, 4 ... 128 apart: in neighbouring lanes, or one lane of two vectors."""
    x = values["x"].copy()
    for i, row in enumerate(x):
        row[[3, 3 + 2**i]] = 9
    return {"x": x}


def only_at_the_ends(values: dict[str, Any]) -> dict[str, Any]:
    """The largest element last, first, and last among negative ones; a NaN behind it; two NaN, the largest between."""
    x = -1 - abs(values["x"])
    x[0, -1], x[1, 0], x[2, -1] = 9, 9, -0.5
    x[3, -2], x[3, -1] = 9, np.nan
    x[4, [2, 5]], x[4, 3] = np.nan, 9
    return {"x": x}


SPEC = Spec(
    name="argmax",
    summary="Index and value of the largest element of the last axis.",
    formula="index[...] = min {i : x[..., i] = max x[..., :]}, value[...] = x[..., index]; the first NaN wins",
    source="torch.max(x, dim=-1)",
    args=(
        Arg("index", "...", dtype="i64", role="out", or_one=True, doc="position of the largest element"),
        Arg("value", "...", role="out", or_one=True, doc="the largest element"),
        Arg("x", "... V", doc="values, V > 0"),
    ),
    constraints=(Constraint("x", "a last axis that is not empty", lambda d, s: d["V"] > 0),),
    twin=argmax,
    oracle=oracle,
    cases=(
        *({"...": (), "V": v} for v in (1, 2, 17, 1009)),
        {"...": (0,), "V": 5},
        {"...": (2, 0), "V": 1},
        *({"...": (3,), "V": v} for v in (1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 4099)),
        {"...": (2, 3), "V": 129},
    ),
    probes=(
        Probe("all equal", {"...": (3,), "V": 65}, lambda v: {"x": np.zeros_like(v["x"])}),
        Probe("all minus infinity", {"...": (3,), "V": 65}, lambda v: {"x": np.full_like(v["x"], -np.inf)}),
        Probe(
            "signed zeros", {"...": (3,), "V": 33}, lambda v: {"x": np.where(v["x"] < 0, 0, -0.0).astype(v["x"].dtype)}
        ),
        Probe("ties far apart", {"...": (2,), "V": 50021}, lambda v: with_values(v, (50, 9), (20003, 9), (50020, 9))),
        Probe("NaN far apart", {"...": (2,), "V": 50021}, lambda v: with_values(v, (20003, np.nan), (50020, np.nan))),
        Probe("ties lanes apart", {"...": (8,), "V": 137}, lanes_apart),
        *(Probe(f"ends of {v}", {"...": (5,), "V": v}, only_at_the_ends) for v in (8, 9, 17, 33, 71)),
        Probe("ties", {"...": (3,), "V": 65}, lambda v: with_values(v, (7, 9), (8, 9), (64, 9))),
        Probe("tie of infinities", {"...": (3,), "V": 65}, lambda v: with_values(v, (63, np.inf), (31, np.inf))),
        Probe("one NaN", {"...": (3,), "V": 65}, lambda v: with_values(v, (33, np.nan), (3, np.inf))),
        Probe(
            "several NaN", {"...": (3,), "V": 65}, lambda v: with_values(v, (64, np.nan), (17, np.nan), (40, np.nan))
        ),
        Probe("NaN first", {"...": (3,), "V": 65}, lambda v: with_values(v, (0, np.nan), (1, np.inf))),
    ),
    shared={"...": (5,), "V": 40001},
    large=({"...": (521,), "V": 523}, {"...": (1,), "V": 151_939}),
    errors=(
        ErrorCase("empty last axis", "SHAPE", lambda v: {"x": v["x"][..., :0]}, ("argmax", "x")),
        ErrorCase("x without an axis", "SHAPE", lambda v: {"x": v["x"].reshape(-1)[0, ...]}, ("argmax", "x")),
    ),
    bench=qwen2_bench(lambda m: {"logits": {"...": (1,), "V": m["V"]}} if m["T"] == 1 else {}),
    flops=lambda d: math.prod(d["..."]) * d["V"],
    raises=("ShapeError: V is 0", "DTypeError: index is not i64, or value not of the dtype of x"),
)

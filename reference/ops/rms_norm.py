"""Root mean square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), as transformers' Qwen2RMSNorm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..bounds import U32, Array, Oracle, rounding_point, walk
from ..numerics import cast, f32, f64, quiet, r
from ..spec import Arg, Constraint, Dims, ErrorCase, Probe, Scalar, Spec, qwen2_bench


@quiet
def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """r(r(x / sqrt(mean(x^2) + eps)) w) for x [..., E] and weight [E]; the mean is over the last axis, in f32."""
    wide = f32(x)
    mean = np.sum(wide * wide, axis=-1, keepdims=True) / np.float32(max(x.shape[-1], 1))
    scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
    return cast(r(wide * scale, x.dtype) * f32(weight), x.dtype)


@quiet
def oracle(x: Array, weight: Array, eps: float) -> tuple[Oracle, ...]:
    """sqrt(E) x / |(x, sqrt(E eps))|: the row as a unit vector, in f64."""
    size = x.shape[-1]
    wide = f64(x)
    scale = math.sqrt(max(size, 1)) / np.hypot(np.linalg.norm(wide, axis=-1), math.sqrt(size * float(np.float32(eps))))
    inner = wide * np.asarray(scale)[..., None]
    # All terms of the sum are positive, so its relative error is walk(E + 1) u with the squares' own rounding, and the
    # inverse root halves it, as it does the roundings of the division by E and of adding eps: (walk(E + 1) + 2) / 2.
    # The root, its inverse and the product add 3; an approximate inverse root with one Newton step, 1 more.
    inner_a = U32 * np.abs(inner) * ((walk(size + 1) + 2) / 2 + 4)
    inner, inner_a = rounding_point(inner, inner_a, x.dtype)  # the product with the weight is the final rounding
    y = inner * f64(weight)
    return (Oracle(y, np.where(np.isfinite(y), inner_a * np.abs(f64(weight)), 0.0)),)


def make_inputs(spec: Spec, rng: np.random.Generator, dims: Dims, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Realistic values; see `Spec.inputs`."""
    shape: tuple[int, ...] = (*dims["..."], dims["E"])
    x = 3 * rng.standard_normal(shape, dtype=np.float32)
    weight = 1 + rng.standard_normal(shape[-1:], dtype=np.float32) / 4
    return {"x": x.astype(dtype), "weight": weight.astype(dtype), "eps": 1e-6}


def near_eps(values: dict[str, Any]) -> dict[str, Any]:
    """Rows whose mean square is about eps, a hundredth and a hundred times of it: where eps is added is what they show.
    (1e-2 for all, as the squares of f16 would else be subnormal.)"""
    root = np.array([0.1, 0.01, 1.0], np.float32)[:, None]
    return {"x": (f32(values["x"]) / 3 * root).astype(values["x"].dtype), "eps": 1e-2}


def with_specials(values: dict[str, Any]) -> dict[str, Any]:
    """Rows with a NaN, an infinity, zeros only, and one very large element; a zero and an infinity in the weight."""
    x, weight = values["x"].copy(), values["weight"].copy()
    x[0, 1], x[1, 2], x[2], x[3, 5] = np.nan, np.inf, 0, 1e4
    weight[0], weight[3] = 0, np.inf
    return {"x": x, "weight": weight}


EPS = (Constraint("eps", "eps finite and >= 0", lambda d, s: 0 <= s["eps"] < math.inf, "INVALID_ARGUMENT"),)
EPS_ERRORS = tuple(
    ErrorCase(f"eps {bad}", "INVALID_ARGUMENT", lambda v, bad=bad: {"eps": bad}, ("eps",))  # type: ignore[misc]
    for bad in (-1e-6, math.nan, math.inf)
)

SPEC = Spec(
    name="rms_norm",
    summary="Normalisation by the root mean square of the last axis.",
    formula="out = r(r(x / sqrt(mean(x^2) + eps)) weight)",
    source="arXiv:1910.07467; transformers Qwen2RMSNorm",
    args=(
        Arg("out", "... E", role="out", may_alias=("x",), doc="normalised rows"),
        Arg("x", "... E", doc="rows"),
        Arg("weight", "E", doc="factor of each column"),
    ),
    scalars=(Scalar("eps", doc="added to the mean square, finite and >= 0"),),
    rounding=("the normalised row to T", "its product with the weight to T"),
    constraints=EPS,
    twin=rms_norm,
    oracle=oracle,
    inputs=make_inputs,
    cases=(
        {"...": (0,), "E": 8},
        {"...": (3,), "E": 0},
        {"...": (), "E": 17},
        *({"...": (3,), "E": e} for e in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1009)),
        {"...": (2, 3), "E": 40},
        {"...": (17,), "E": 896},
        {"...": (1,), "E": 1536},
    ),
    probes=(
        Probe("NaN infinity zeros", {"...": (5,), "E": 50}, with_specials),
        Probe("small rows", {"...": (3,), "E": 65}, lambda v: {"x": (v["x"] * 1e-3).astype(v["x"].dtype)}),
        Probe("mean square near eps", {"...": (3,), "E": 129}, near_eps),
        Probe("constant rows", {"...": (3,), "E": 896}, lambda v: {"x": np.full_like(v["x"], 1.7)}),
        Probe("large eps", {"...": (3,), "E": 65}, lambda v: {"eps": 10.0}),
        Probe("zero eps", {"...": (3,), "E": 65}, lambda v: {"eps": 0.0}),
    ),
    shared={"...": (67,), "E": 1030},
    large=({"...": (521,), "E": 523}, {"...": (3,), "E": 18_973}),
    errors=EPS_ERRORS,
    bench=qwen2_bench(lambda m: {"hidden": {"...": (m["T"],), "E": m["E"]}}),
    flops=lambda d: 4 * math.prod(d["..."]) * d["E"],
    raises=("ShapeError: sizes that do not match", "InvalidArgumentError: eps is negative or not finite"),
)

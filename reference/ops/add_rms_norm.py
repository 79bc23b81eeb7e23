"""Residual addition and the normalisation that follows it, in one pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..bounds import Array, Oracle
from ..numerics import cast
from ..spec import Arg, Dims, Probe, Spec
from . import rms_norm as norm
from .add import add
from .add import oracle as add_oracle


class AddRmsNorm(NamedTuple):
    """What add_rms_norm returns."""

    out: Array
    sum: Array


def add_rms_norm(a: Array, b: Array, weight: Array, eps: float) -> AddRmsNorm:
    """sum = add(a, b) and out = rms_norm(sum, weight, eps) for a and b [..., E], weight [E]."""
    total = add(a, b)
    return AddRmsNorm(norm.rms_norm(total, weight, eps), total)


def oracle(a: Array, b: Array, weight: Array, eps: float) -> tuple[Oracle, ...]:
    """The sum is exact, so its rounded value is the one input that the normalisation may have had."""
    (total,) = add_oracle(a, b)
    (out,) = norm.oracle(cast(total.y, a.dtype), weight, eps)
    return out, total


def make_inputs(spec: Spec, rng: np.random.Generator, dims: Dims, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Realistic values; see `Spec.inputs`."""
    values = norm.make_inputs(spec, rng, dims, dtype)
    b = rng.standard_normal(values["x"].shape, dtype=np.float32).astype(dtype)
    return {"a": values.pop("x"), "b": b, **values}


def near_eps(values: dict[str, Any]) -> dict[str, Any]:
    """Sums of which the mean square is near eps."""
    changed = norm.near_eps({"x": values["a"]})
    return {"a": changed["x"], "b": (values["b"] * 0).astype(values["b"].dtype), "eps": changed["eps"]}


def with_specials(values: dict[str, Any]) -> dict[str, Any]:
    """The special rows of rms_norm in a, and in b an infinity of the other sign and a row that cancels."""
    special = norm.with_specials({"x": values["a"], "weight": values["weight"]})
    b = values["b"].copy()
    b[1, 2], b[4] = -np.inf, -special["x"][4]
    return {"a": special["x"], "b": b, "weight": special["weight"]}


SPEC = Spec(
    name="add_rms_norm",
    summary="Residual addition and normalisation of the sum.",
    formula="sum = r(a + b), out = rms_norm(sum, weight, eps)",
    source="transformers Qwen2DecoderLayer (residual, then post_attention_layernorm)",
    args=(
        Arg("out", "... E", role="out", doc="normalised sum"),
        Arg("sum", "... E", role="out", may_alias=("a", "b"), doc="the residual stream"),
        Arg("a", "... E", doc="first summand"),
        Arg("b", "... E", doc="second summand"),
        Arg("weight", "E", doc="factor of each column"),
    ),
    scalars=norm.SPEC.scalars,
    rounding=("the sum to T", *norm.SPEC.rounding),
    constraints=norm.SPEC.constraints,
    twin=add_rms_norm,
    oracle=oracle,
    inputs=make_inputs,
    cases=norm.SPEC.cases,
    probes=(
        Probe("NaN infinities zeros", {"...": (5,), "E": 50}, with_specials),
        Probe("mean square near eps", {"...": (3,), "E": 129}, near_eps),
    ),
    shared={"...": (67,), "E": 1030},
    large=({"...": (521,), "E": 523}, {"...": (3,), "E": 18_973}),
    errors=norm.EPS_ERRORS,
    bench=norm.SPEC.bench,
    flops=lambda d: 5 * math.prod(d["..."]) * d["E"],
    raises=norm.SPEC.raises,
)

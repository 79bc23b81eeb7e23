"""Rotary embedding of the queries and attention over a cache of rotated keys, in one pass."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..bounds import Array, Oracle, rounding_point
from ..spec import Arg, Constraint, Dims, ErrorCase, Probe, Spec
from . import rope as rotary
from . import self_attention as attention


def rope_self_attention(q: Array, pos_ids: Array, k: Array, v: Array, theta: float, scale: float) -> Array:
    """self_attention(rope(q, pos_ids, theta), k, v, scale) for q [T, H, D], pos_ids [T], k and v [S, K, D].

    k holds rotated keys. The rotated queries are rounded to the dtype, as rope rounds them.
    """
    return attention.self_attention(rotary.rope(q, pos_ids, theta), k, v, scale)


def oracle(q: Array, pos_ids: Array, k: Array, v: Array, theta: float, scale: float) -> tuple[Oracle, ...]:
    """Exact attention of the rotated queries; what is not known of these spreads through the scores."""
    (rotated,) = rotary.oracle(q, pos_ids, theta)
    return (attention.attend(*rounding_point(rotated.y, np.asarray(rotated.a), q.dtype), k, v, scale),)


def make_inputs(spec: Spec, rng: np.random.Generator, dims: Dims, dtype: np.dtype[Any]) -> dict[str, Any]:
    """The queries of the last T of S positions."""
    values = attention.make_inputs(spec, rng, dims, dtype)
    return {**values, "pos_ids": np.arange(dims["S"] - dims["T"], dims["S"], dtype=np.int64), "theta": 1e6}


def unrotated(values: dict[str, Any], probe: Probe) -> dict[str, Any]:
    """What `probe` changes, for queries at position 0."""
    return {**probe.change(values), "pos_ids": values["pos_ids"] * 0}


SPEC = Spec(
    name="rope_self_attention",
    summary="Rotary embedding of the queries, then causal attention over rotated keys.",
    formula="out = self_attention(rope(q, pos_ids, theta), k, v, scale)",
    source="transformers Qwen2Attention",
    args=(
        attention.SPEC.args[0],
        Arg("q", "T H D", doc="queries of the last T positions, not rotated, D even"),
        Arg("pos_ids", "T", dtype="i64", doc="absolute positions of the queries"),
        Arg("k", "S K D", doc="keys, rotated, S >= T"),
        Arg("v", "S K D", doc="values"),
    ),
    scalars=(*rotary.SPEC.scalars, *attention.SPEC.scalars),
    rounding=(*rotary.SPEC.rounding, *attention.SPEC.rounding),
    constraints=(
        Constraint("q", "D even", lambda d, s: d["D"] % 2 == 0),
        *attention.SIZES,
        *rotary.THETA,
        *attention.SCALE,
    ),
    twin=rope_self_attention,
    oracle=oracle,
    inputs=make_inputs,
    cases=attention.CASES,
    probes=(
        *(probe for probe in attention.SPEC.probes if probe not in attention.SCORES),
        *(replace(probe, change=partial(unrotated, probe=probe)) for probe in attention.SCORES),
        Probe("positions of another sequence", attention.FUTURE, lambda v: {"pos_ids": v["pos_ids"] * 7 + 1000}),
        Probe("theta 10000", attention.FUTURE, lambda v: {"theta": 1e4}),
    ),
    shared={"T": 140, "S": 270, "H": 6, "K": 2, "D": 48},
    large=attention.LARGE,
    errors=(
        ErrorCase(
            "odd head dim",
            "SHAPE",
            lambda v: {name: v[name][..., :-1].copy() for name in ("out", "q", "k", "v")},
            ("rope_self_attention", "q"),
        ),
        ErrorCase("positions of another length", "SHAPE", lambda v: {"pos_ids": v["pos_ids"][:-1]}, ("pos_ids",)),
        *attention.SIZE_ERRORS,
        *rotary.THETA_ERRORS,
        *attention.SCALE_ERRORS,
    ),
    bench=attention.SPEC.bench,
    flops=lambda d: rotary.SPEC.flops(d) + attention.SPEC.flops(d),
    raises=(*rotary.SPEC.raises, *attention.SPEC.raises),
)

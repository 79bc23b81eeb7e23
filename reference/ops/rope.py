"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split form of transformers' Qwen2."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..bounds import U32, Array, Oracle, rounding_point
from ..numerics import cast, f32, f64, quiet, r
from ..spec import Arg, Constraint, Dims, ErrorCase, Probe, Scalar, Spec, qwen2_bench


def powers(head_dim: int, theta: float) -> Array:
    """f32 theta^(2i/D), [D/2], with the exponent and the power rounded to f32 as torch does."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(max(head_dim, 1))
    return np.power(np.float64(np.float32(theta)), exponent.astype(np.float64)).astype(np.float32)


def cos_sin(pos_ids: Array, head_dim: int, theta: float, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """cos and sin of the f32 angles, [T, 1, D/2], rounded to `dtype` and widened back to f32."""
    angle = (f32(pos_ids)[:, None] / powers(head_dim, theta)).astype(np.float64)
    return r(np.cos(angle), dtype)[:, None], r(np.sin(angle), dtype)[:, None]


@quiet
def rope(x: Array, pos_ids: Array, theta: float) -> Array:
    """Rotate each pair (x[..., i], x[..., i + D/2]) by the angle pos * theta^(-2i/D).

    x is [T, H, D] with D even, pos_ids int64 [T]; returns [T, H, D] in the dtype of x. Products and sums are rounded
    one by one, as transformers' `q * cos + rotate_half(q) * sin` rounds them.
    """
    dtype = x.dtype
    cos, sin = cos_sin(pos_ids, x.shape[-1], theta, dtype)
    a, b = np.split(f32(x), 2, axis=-1)
    first = r(a * cos, dtype) - r(b * sin, dtype)
    second = r(b * cos, dtype) + r(a * sin, dtype)
    return cast(np.concatenate([first, second], axis=-1), dtype)


@quiet
def oracle(x: Array, pos_ids: Array, theta: float) -> tuple[Oracle, ...]:
    """The rotation by exact angles, in f64: of (a, b) as a complex number a + ib."""
    half = x.shape[-1] // 2
    a, b = f64(x)[..., :half], f64(x)[..., half:]
    base = float(np.float32(theta))
    exponent = np.arange(half) / max(half, 1)
    angle = f64(pos_ids)[:, None, None] * base**-exponent
    turn = np.exp(1j * angle)
    # The roundings of the f32 angle: exponent (which ln(theta) magnifies), power, position and quotient; then
    # cos and sin in f32 (2 u), rounded to T.
    off = U32 * (np.abs(angle) * (4 + exponent * abs(math.log(base))) + 2)

    cos, sin = rounding_point(turn.real, off, x.dtype), rounding_point(turn.imag, off, x.dtype)

    def product(z: Array, factor: tuple[Array, Array]) -> tuple[Array, Array]:
        """r(z factor) and how far it may be off. In f32 that is the product's own rounding."""
        return rounding_point(z * factor[0], np.abs(z) * factor[1], x.dtype)

    (ac, ac_off), (as_, as_off), (bc, bc_off), (bs, bs_off) = (product(z, f) for z in (a, b) for f in (cos, sin))
    y = np.concatenate([ac - bs, bc + as_], axis=-1)
    return (Oracle(y, np.where(np.isfinite(y), np.concatenate([ac_off + bs_off, bc_off + as_off], axis=-1), 0.0)),)


def make_inputs(spec: Spec, rng: np.random.Generator, dims: Dims, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Realistic values; see `Spec.inputs`."""
    return {
        "x": rng.standard_normal((dims["T"], dims["H"], dims["D"]), dtype=np.float32).astype(dtype),
        "pos_ids": rng.integers(0, 4096, dims["T"]).astype(np.int64),
        "theta": 1e6,
    }


def with_specials(values: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinities in both halves: each must reach both elements of its pair."""
    x = values["x"].copy()
    x[0, 0, 1], x[1, 0, 2], x[2, 1, -1], x[2, 0] = np.nan, np.inf, -np.inf, 0
    return {"x": x, "pos_ids": values["pos_ids"] + 1}


def positions(values: dict[str, Any], n: int) -> dict[str, Any]:
    """Consecutive positions."""
    return {"pos_ids": n + np.arange(len(values["pos_ids"]))}


THETA = (Constraint("theta", "theta finite and > 0", lambda d, s: 0 < s["theta"] < math.inf, "INVALID_ARGUMENT"),)
THETA_ERRORS = tuple(
    ErrorCase(f"theta {bad}", "INVALID_ARGUMENT", lambda v, bad=bad: {"theta": bad}, ("theta",))  # type: ignore[misc]
    for bad in (0.0, -1e4, math.nan, math.inf)
)

SPEC = Spec(
    name="rope",
    summary="Rotary position embedding of queries or keys.",
    formula="out[t,h,i] = a cos - b sin, out[t,h,i+D/2] = b cos + a sin; a = x[t,h,i], b = x[t,h,i+D/2], "
    "angle = pos_ids[t] theta^(-2i/D)",
    source="arXiv:2104.09864; transformers apply_rotary_pos_emb (Qwen2)",
    args=(
        Arg("out", "T H D", role="out", may_alias=("x",), doc="rotated x"),
        Arg("x", "T H D", doc="queries or keys, D even"),
        Arg("pos_ids", "T", dtype="i64", doc="absolute positions"),
    ),
    scalars=(Scalar("theta", doc="base of the frequencies, finite and > 0"),),
    rounding=("cos and sin to T", "each of the two products to T", "their sum to T"),
    constraints=(Constraint("x", "D even", lambda d, s: d["D"] % 2 == 0), *THETA),
    twin=rope,
    oracle=oracle,
    inputs=make_inputs,
    cases=tuple(
        {"T": t, "H": h, "D": d}
        for t, h, d in [
            *[(0, 2, 8), (1, 0, 8), (3, 2, 0), (1, 1, 2), (2, 3, 14), (3, 1, 16), (4, 2, 18), (2, 3, 30), (3, 2, 32)],
            *[(5, 2, 34), (4, 3, 62), (3, 2, 64), (2, 3, 66), (7, 1, 128), (2, 14, 80), (33, 2, 64)],
        ]
    ),
    probes=(
        Probe("position 0", {"T": 3, "H": 2, "D": 64}, lambda v: {"pos_ids": v["pos_ids"] * 0}, exact=True),
        # Neighbouring positions that bf16 and f16 do not tell apart, and the last ones that f16 has.
        Probe(
            "more positions than 8 bits count", {"T": 21, "H": 2, "D": 32}, lambda v: {"pos_ids": 1009 + np.arange(21)}
        ),
        Probe("positions beyond 4096", {"T": 21, "H": 2, "D": 32}, lambda v: {"pos_ids": 4090 + np.arange(21)}),
        Probe("positions beyond 65504", {"T": 21, "H": 2, "D": 32}, lambda v: {"pos_ids": 65500 + np.arange(21)}),
        Probe("positions of a prompt", {"T": 129, "H": 1, "D": 32}, lambda v: {"pos_ids": np.arange(129)}),
        Probe("far positions", {"T": 3, "H": 2, "D": 64}, lambda v: {"pos_ids": v["pos_ids"] + 32768}),
        Probe("theta 10000", {"T": 5, "H": 2, "D": 80}, lambda v: {"theta": 1e4}),
        Probe("NaN and infinities", {"T": 3, "H": 2, "D": 34}, with_specials),
    ),
    shared={"T": 150, "H": 7, "D": 80},
    large=({"T": 521, "H": 3, "D": 74}, {"T": 1031, "H": 1, "D": 258}),
    errors=(
        ErrorCase(
            "odd head dim",
            "SHAPE",
            lambda v: {name: v[name][..., :-1].copy() for name in ("out", "x")},
            ("rope", "x"),
        ),
        ErrorCase("positions of another length", "SHAPE", lambda v: {"pos_ids": v["pos_ids"][:-1]}, ("pos_ids",)),
        *THETA_ERRORS,
    ),
    bench=qwen2_bench(lambda m: {h: {"T": m["T"], "H": m[n], "D": m["D"]} for h, n in [("q", "H"), ("k", "K")]}),
    flops=lambda d: 3 * d["T"] * d["H"] * d["D"],
    raises=("ShapeError: D odd, or sizes that do not match", "InvalidArgumentError: theta is not a positive number"),
)

"""Elementwise sum, the residual connection of a transformer block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..bounds import Array, Oracle, finfo, ulp
from ..numerics import cast, f32, f64, quiet
from ..spec import Arg, ErrorCase, Probe, Spec, qwen2_bench


@quiet
def add(a: Array, b: Array) -> Array:
    """r(a + b) for a and b of one shape and dtype."""
    return cast(f32(a) + f32(b), a.dtype)


@quiet
def oracle(a: Array, b: Array) -> tuple[Oracle, ...]:
    """The f64 sum. Rounding it once more is exact rounding, as f64 and f32 have more than 2p + 2 bits of f32 and of
    f16 or bf16 (Figueroa 1995: double rounding is then innocuous for sums)."""
    return (Oracle(f64(a) + f64(b), exact=True),)


def with_specials(values: dict[str, Any]) -> dict[str, Any]:
    """Every pair of NaN, infinities and zeros in the first elements of a and b."""
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0])
    a, b = values["a"].copy(), values["b"].copy()
    pairs = np.stack(np.meshgrid(special, special), axis=-1).reshape(-1, 2)
    a.flat[: len(pairs)], b.flat[: len(pairs)] = pairs.T.astype(a.dtype)
    return {"a": a, "b": b}


def signed_zeros(values: dict[str, Any]) -> dict[str, Any]:
    """Minus zero plus zeros of both signs: only the sum of two minus zeros is one."""
    a, b = np.full_like(values["a"], -0.0), np.zeros_like(values["b"])
    b[..., ::2] = -0.0
    return {"a": a, "b": b}


def near_overflow(values: dict[str, Any]) -> dict[str, Any]:
    """Sums around the largest number of the dtype, on both sides of where rounding gives infinity."""
    a = np.full_like(values["a"], finfo(values["a"].dtype).max)
    b = (f64(ulp(f64(a), a.dtype)) * np.linspace(0.1, 1.0, a.size).reshape(a.shape)).astype(a.dtype)
    return {"a": a, "b": b}


SPEC = Spec(
    name="add",
    summary="Elementwise sum.",
    formula="out = r(a + b)",
    source="transformers Qwen2DecoderLayer (residual)",
    args=(
        Arg("out", "...", role="out", may_alias=("a", "b"), doc="the sum"),
        Arg("a", "...", doc="first summand"),
        Arg("b", "...", doc="second summand, of the same shape"),
    ),
    rounding=("the sum to T",),
    twin=add,
    oracle=oracle,
    cases=(
        {"...": ()},
        {"...": (0,)},
        {"...": (3, 0)},
        *({"...": (n,)} for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1009)),
        {"...": (1, 1)},
        {"...": (5, 33)},
        {"...": (2, 3, 17)},
        {"...": (2, 1, 3, 2, 9)},
    ),
    probes=(
        Probe("infinities and NaN", {"...": (4, 9)}, with_specials),
        Probe("signed zeros", {"...": (2, 17)}, signed_zeros),
        Probe("sums near the largest number", {"...": (2, 17)}, near_overflow),
    ),
    shared={"...": (7, 9001)},
    large=({"...": (521, 523)},),
    errors=(
        ErrorCase("rows that would broadcast", "SHAPE", lambda v: {"b": v["b"][:1]}, ("add", "b")),
        ErrorCase("a scalar that would broadcast", "SHAPE", lambda v: {"b": v["b"].reshape(-1)[0, ...]}, ("add", "b")),
    ),
    bench=qwen2_bench(lambda m: {"residual": {"...": (m["T"], m["E"])}}),
    flops=lambda d: math.prod(d["..."]),
    raises=("ShapeError: the shapes differ", "DTypeError: the dtypes differ or are not f32, f16 or bf16"),
)

"""Gated activation of the MLP (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..bounds import U32, Array, Oracle, rounding_point
from ..numerics import cast, f32, f64, quiet, r
from ..spec import Arg, Dims, Probe, Spec, qwen2_bench


@quiet
def swiglu(gate: Array, up: Array) -> Array:
    """r(r(silu(gate)) up) for gate and up of one shape, silu(x) = x / (1 + exp(-x)) in f32."""
    wide = f32(gate)
    silu = wide / (1 + np.exp(-wide))
    return cast(r(silu, gate.dtype) * f32(up), gate.dtype)


@quiet
def oracle(gate: Array, up: Array) -> tuple[Oracle, ...]:
    """x sigmoid(x) up in f64, with the sigmoid by way of exp(-|x|), which never overflows."""
    x, wide = f64(gate), f64(up)
    decay = np.exp(-np.abs(x))
    sigmoid = np.where(x > 0, 1.0, decay) / (1 + decay)
    silu = np.where(np.isposinf(x), x, x * sigmoid)
    # exp(-x): reducing the argument costs up to 2 |x| u, the polynomial 5 u; of 1 + exp(-x) that is the part
    # 1 - sigmoid, nothing for a large x. Adding 1, dividing and the product cost 3 u more.
    off = U32 * np.abs(silu) * (8 + 2 * np.abs(np.where(np.isfinite(x), x, 0.0)) * (1 - sigmoid))
    # Below -88 exp(-x) comes near the largest f32 and may overflow, which gives -0 (in torch too): all of it may go.
    off = np.where(x < -88, np.abs(silu) + off, off)
    silu, off = rounding_point(silu, off, gate.dtype)
    y = silu * wide
    # Where silu may round to infinity nothing is known of the product, 0 times infinity included.
    a = np.where(np.isinf(off), np.inf, off * np.abs(wide))
    return (Oracle(y, np.where(np.isfinite(y), a, 0.0)),)


def make_inputs(spec: Spec, rng: np.random.Generator, dims: Dims, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Gates up to a few tens, as in trained models."""
    gate, up = rng.standard_normal((2, *dims["..."]), dtype=np.float32)
    return {"gate": (4 * gate).astype(dtype), "up": up.astype(dtype)}


def with_range(values: dict[str, Any]) -> dict[str, Any]:
    """Gates over the whole range in which exp works, and past its ends."""
    gate = np.linspace(-130, 130, values["gate"].size, dtype=np.float32).reshape(values["gate"].shape)
    return {"gate": gate.astype(values["gate"].dtype)}


def with_specials(values: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinities in both, opposite each other, zeros and ordinary numbers; silu(-inf) is NaN as the formula
    has it, in torch too. Never NaN opposite NaN: which of them comes out depends on the order of the factors."""
    gate, up = values["gate"].copy(), values["up"].copy()
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32).astype(gate.dtype)
    gate.flat[:15], up.flat[:15] = np.repeat(special[:3], 5), np.tile(special, 3)
    gate.flat[15:23], up.flat[15:23] = np.repeat(special[3:], 4), np.tile(special[:4], 2)
    gate.flat[23:28], up.flat[28:33] = special, special
    return {"gate": gate, "up": up}


SPEC = Spec(
    name="swiglu",
    summary="SiLU of the gate times up.",
    formula="out = r(r(gate / (1 + exp(-gate))) up)",
    source="arXiv:2002.05202; transformers Qwen2MLP",
    args=(
        Arg("out", "...", role="out", may_alias=("gate", "up"), doc="the product"),
        Arg("gate", "...", doc="argument of SiLU"),
        Arg("up", "...", doc="factor"),
    ),
    rounding=("silu(gate) to T", "its product with up to T"),
    twin=swiglu,
    oracle=oracle,
    inputs=make_inputs,
    cases=(
        {"...": ()},
        {"...": (0,)},
        {"...": (3, 0)},
        *({"...": (n,)} for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1009)),
        {"...": (1, 1)},
        {"...": (5, 33)},
        {"...": (2, 3, 17)},
        {"...": (2, 4864)},
    ),
    probes=(
        Probe("range of exp", {"...": (5, 521)}, with_range),
        Probe("NaN and infinities", {"...": (3, 17)}, with_specials),
        Probe("small gates", {"...": (3, 65)}, lambda v: {"gate": (v["gate"] * 1e-3).astype(v["gate"].dtype)}),
    ),
    shared={"...": (7, 9001)},
    large=({"...": (521, 523)},),
    bench=qwen2_bench(lambda m: {"act": {"...": (m["T"], m["F"])}}),
    flops=lambda d: 5 * math.prod(d["..."]),
    raises=("ShapeError: the shapes differ", "DTypeError: the dtypes differ or are not f32, f16 or bf16"),
)

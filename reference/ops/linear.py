"""Affine map with the weight as checkpoints store it, one row for each output feature."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..bounds import MAX32, TINY32, U32, Array, Oracle, walk
from ..numerics import cast, f32, f64, quiet
from ..spec import FLOATS, Arg, Dims, ErrorCase, Probe, Spec, qwen2_bench


@quiet
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """r(x W^T + b) for x [..., C], weight [N, C] and bias [N] or None; returns [..., N]."""
    y = f32(x) @ f32(weight).T
    if bias is not None:
        y = y + f32(bias)
    return cast(y, x.dtype)


@quiet
def oracle(x: Array, weight: Array, bias: Array | None = None) -> tuple[Oracle, ...]:
    """W x^T in f64, some rows of W at a time to spare memory; the products of two f32 are exact in f64."""
    count, features = x.shape[-1], len(weight)
    columns = f64(x).reshape(math.prod(x.shape[:-1]), count).T
    y, magnitude = np.empty((2, features, columns.shape[1]))
    operands = np.empty((features, columns.shape[1]))
    for i in range(0, features, 4096):
        w = f64(weight[i : i + 4096])
        y[i : i + 4096], magnitude[i : i + 4096] = w @ columns, np.abs(w) @ np.abs(columns)
        operands[i : i + 4096] = np.abs(w).sum(axis=1)[:, None] + np.abs(columns).sum(axis=0)
    if bias is not None:
        y, magnitude = y + f64(bias)[:, None], magnitude + np.abs(f64(bias))[:, None]
    # A term meets at most C + 1 roundings, whatever the order of the sum, with or without FMA: its product, C - 1
    # additions and that of the bias. Without terms there is nothing to round.
    a = U32 * (walk(count + 1) if count else 0) * magnitude
    if x.dtype == FLOATS["bf16"]:
        # The bf16 dot products of AMX and AVX-512 read subnormal operands as zero and flush subnormal sums to zero.
        a = a + TINY32 * (operands + 2 * count)
    # Non-finite inputs show in y itself; where the sums only may leave f32 on the way, nothing is claimed.
    a = np.where(np.isfinite(y), np.where(magnitude < MAX32, a, np.inf), 0.0)
    shape = (*x.shape[:-1], features)
    return (Oracle(y.T.reshape(shape), a.T.reshape(shape)),)


def make_inputs(spec: Spec, rng: np.random.Generator, dims: Dims, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Realistic values; see `Spec.inputs`."""

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32)

    n, c = dims["N"], dims["C"]
    values = {"x": normal(*dims["..."], c), "weight": normal(n, c) / math.sqrt(max(c, 1)), "bias": normal(n)}
    return {name: value.astype(dtype) for name, value in values.items()}


def heavy_tailed(values: dict[str, Any]) -> dict[str, Any]:
    """A few columns a hundred times as large as the others, as activations of language models have them."""
    x = values["x"].copy()
    x[..., ::37] *= 100
    return {"x": x}


def cancelling(values: dict[str, Any]) -> dict[str, Any]:
    """The second half of each row of x repeats the first, with weights of opposite sign: the sum is the bias."""
    x, weight = values["x"].copy(), values["weight"].copy()
    half = x.shape[-1] // 2
    x[..., half : 2 * half] = x[..., :half]
    weight[:, half : 2 * half] = -weight[:, :half]
    return {"x": x, "weight": weight}


def not_finite(values: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinities in some rows of x and of the weight; all other outputs are ordinary."""
    x, weight = values["x"].copy(), values["weight"].copy()
    x[0, 1], x[1, 2], weight[2, 0], weight[3, 3] = np.nan, np.inf, -np.inf, np.nan
    return {"x": x, "weight": weight}


SPEC = Spec(
    name="linear",
    summary="Affine map x W^T + b.",
    formula="out[..., n] = r(sum_c x[..., c] weight[n, c] + bias[n])",
    source="torch.nn.functional.linear",
    args=(
        Arg("out", "... N", role="out", doc="output features"),
        Arg("x", "... C", doc="input features"),
        Arg("weight", "N C", doc="one row for each output feature"),
        Arg("bias", "N", optional=True, doc="added to each output feature; may be absent"),
    ),
    rounding=("the sum to T",),
    twin=linear,
    oracle=oracle,
    inputs=make_inputs,
    cases=tuple(
        {"...": rows, "N": n, "C": c}
        for rows, n, c in [
            *[((0,), 3, 5), ((3,), 0, 5), ((3,), 4, 0), ((1,), 1, 1), ((2,), 3, 1), ((), 5, 7), ((2, 3), 4, 9)],
            *[((2,), 8, 8), ((7,), 7, 15), ((8,), 16, 16), ((9,), 17, 17), ((15,), 15, 31), ((16,), 16, 32)],
            *[((17,), 33, 33), ((31,), 9, 63), ((33,), 31, 64), ((1,), 65, 65), ((5,), 48, 127), ((4,), 37, 257)],
            *[((1,), 129, 896), ((6,), 20, 1009), ((513,), 5, 40)],
        ]
    ),
    probes=(
        Probe("heavy tails", {"...": (5,), "N": 33, "C": 515}, heavy_tailed),
        Probe("all positive", {"...": (3,), "N": 17, "C": 700}, lambda v: {k: abs(x) for k, x in v.items()}),
        Probe("cancelling sums", {"...": (3,), "N": 17, "C": 300}, cancelling),
        Probe("NaN and infinities", {"...": (4,), "N": 19, "C": 50}, not_finite),
    ),
    errors=(
        ErrorCase("x without an axis", "SHAPE", lambda v: {"x": v["x"].reshape(-1)[0, ...]}, ("linear", "x")),
        ErrorCase(
            "weight transposed",
            "SHAPE",
            lambda v: {"weight": np.ascontiguousarray(np.concatenate([v["weight"]] * 2).T)},
            ("linear", "weight"),
        ),
        ErrorCase("bias of one element", "SHAPE", lambda v: {"bias": v["bias"][:1]}, ("linear", "bias")),
    ),
    bench=qwen2_bench(
        lambda m: {
            use: {"...": (m["T"],), "N": n, "C": c}
            for use, n, c in [
                ("q_proj", m["H"] * m["D"], m["E"]),
                ("k_proj", m["K"] * m["D"], m["E"]),
                ("gate_proj", m["F"], m["E"]),
                ("down_proj", m["E"], m["F"]),
                ("lm_head", m["V"], m["E"]),
            ]
            if (m["T"] in (1, 512) or n * c > 1 << 22) and (use != "lm_head" or m["T"] < 128)
        },
        more=(("decode", 4, 4), ("decode", 16, 16), ("prefill", 128, 128)),
    ),
    flops=lambda d: 2 * math.prod(d["..."]) * d["N"] * d["C"],
    raises=("ShapeError: sizes that do not match", "DTypeError: the dtypes differ or are not f32, f16 or bf16"),
)

"""Affine map with the weight as checkpoints store it, one row for each output feature."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..bounds import MAX32, TINY32, U32, Array, L, Oracle, finfo, walk
from ..numerics import cast, f32, f64, quiet
from ..spec import FLOATS, Arg, Dims, ErrorCase, Probe, Screen, Spec, qwen2_bench

#: Elements of the weight that the oracle's first look and its single elements work on at a time: 1 MB in f32.
BLOCK = 1 << 18


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
    y, magnitude, operands = np.empty((3, features, columns.shape[1]))
    for i in range(0, features, 4096):
        w = f64(weight[i : i + 4096])
        y[i : i + 4096], magnitude[i : i + 4096] = w @ columns, np.abs(w) @ np.abs(columns)
        operands[i : i + 4096] = np.abs(w).sum(axis=1)[:, None] + np.abs(columns).sum(axis=0)
    if bias is not None:
        y, magnitude = y + f64(bias)[:, None], magnitude + np.abs(f64(bias))[:, None]
    a = _bound(y, magnitude, operands, count, x.dtype)
    shape = (*x.shape[:-1], features)
    return (Oracle(y.T.reshape(shape), a.T.reshape(shape), independent=_many(count)),)


def _bound(y: Array, magnitude: Array, operands: Array, count: int, dtype: np.dtype[Any]) -> Array:
    """`Oracle.a` from y, sum|x w| + |b|, and sum|x| + sum|w|."""
    # A term meets at most C + 1 roundings, whatever the order of the sum, with or without FMA: its product, C - 1
    # additions and that of the bias. Without terms there is nothing to round.
    a = U32 * (walk(count + 1) if count else 0) * magnitude
    if dtype == FLOATS["bf16"]:
        # The bf16 dot products of AMX and AVX-512 read subnormal operands as zero and flush subnormal sums to zero.
        a = a + TINY32 * (operands + 2 * count)
    # Non-finite inputs show in y itself; where the sums only may leave f32 on the way, nothing is claimed.
    return np.where(np.isfinite(y), np.where(magnitude < MAX32, a, np.inf), 0.0)


def _many(count: int) -> bool:
    """Whether the bound is that of a random walk, L times the standard deviation."""
    return count >= L**2


@quiet
def oracle_at(where: tuple[Array, ...], x: Array, weight: Array, bias: Array | None = None) -> Oracle:
    """The oracle of the elements at `where`, each a dot product of its own, some at a time to spare memory."""
    count, total = x.shape[-1], len(where[-1])
    rows = np.ravel_multi_index(where[:-1], x.shape[:-1]) if x.ndim > 1 else np.zeros(total, np.int64)
    flat = x.reshape(math.prod(x.shape[:-1]), count)
    y, magnitude, operands = np.zeros((3, total))
    step = max(1, BLOCK // max(count, 1))
    for i in range(0, total, step):
        part = slice(i, i + step)
        a, b = f64(flat[rows[part]]), f64(weight[where[-1][part]])
        products = a * b
        y[part], magnitude[part] = products.sum(axis=-1), np.abs(products).sum(axis=-1)
        operands[part] = np.abs(a).sum(axis=-1) + np.abs(b).sum(axis=-1)
    if bias is not None:
        offset = f64(bias)[where[-1]]
        y, magnitude = y + offset, magnitude + np.abs(offset)
    return Oracle(y, _bound(y, magnitude, operands, count, x.dtype), independent=_many(count))


@quiet
def estimate(x: Array, weight: Array, bias: Array | None = None) -> tuple[Array, Array | float]:
    """x W^T + b by the f32 matrix product of numpy, over as many rows of W at a time as the cache holds.

    The lower bound of sum|x w| takes an eighth of the columns; in 16 bits, where a is small against half an ulp, 0.
    """
    count, features = x.shape[-1], len(weight)
    flat = f32(x).reshape(math.prod(x.shape[:-1]), count)
    y = np.empty((len(flat), features), np.float32)
    wide = x.dtype == np.float32
    least = np.empty_like(y) if wide else None
    some = slice(0, max(1, count // 8))
    for i in range(0, features, step := max(1, BLOCK // max(count, 1))):
        w = f32(weight[i : i + step])
        y[:, i : i + step] = flat @ w.T
        if least is not None:
            least[:, i : i + step] = np.abs(flat[:, some]) @ np.abs(w[:, some]).T
    if bias is not None:
        y += f32(bias)
    shape = (*x.shape[:-1], features)
    if least is None or not count:
        return y.reshape(shape), 0.0
    # The bound's own roundings, and those of this product, are of relative size U32 count at most.
    return y.reshape(shape), (np.float32(U32 * walk(count + 1) * (1 - U32 * 2 * count)) * least).reshape(shape)


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


def noise(values: dict[str, Any]) -> dict[str, Any]:
    """`cancelling` in an order that no kernel has, without a bias: the results are the rounding errors of the sums, and
    each order of accumulation gives other ones, in 16 bits too. (1024 times as large: those of f16 were subnormal.)"""
    order = np.random.default_rng(8).permutation(values["x"].shape[-1])
    x, weight = (np.ascontiguousarray(x[..., order]) for x in cancelling(values).values())
    return {"x": x * x.dtype.type(1024), "weight": weight, "bias": None}


def small_integers(values: dict[str, Any]) -> dict[str, Any]:
    """Products and partial sums are integers below 2^24: any order of the sum is exact. In 16 bits many results are
    half-way between two numbers. Each bias is another."""
    rng = np.random.default_rng(6)
    dtype, features = values["x"].dtype, len(values["weight"])
    x, weight = (rng.integers(-9, 10, values[name].shape) for name in ("x", "weight"))
    return {"x": x.astype(dtype), "weight": weight.astype(dtype), "bias": np.arange(-3, features - 3).astype(dtype)}


def whole_range(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers of every size that the dtype has, and weights of the inverse size: no product is beyond 4, and none is
    lost. In bf16 without subnormals, which products of pairs may take for zero."""
    rng = np.random.default_rng(7)
    dtype = values["x"].dtype
    info = finfo(dtype)
    least, most = int(info.minexp), int(info.maxexp) - 2
    if dtype != FLOATS["bf16"]:
        least -= int(info.nmant)
    exponents = rng.integers(least, most, values["x"].shape[-1], endpoint=True).astype(np.float64)
    size, inverse = np.exp2(exponents), np.exp2(np.minimum(-exponents, most))

    def scaled(name: str, by: Array) -> Array:
        sign = np.where(values[name].astype(np.float64) < 0, -1.0, 1.0)
        x = sign * rng.uniform(1, 2, values[name].shape) * by
        return np.where(rng.random(x.shape) < 0.1, 0, x).astype(dtype)

    return {"x": scaled("x", size), "weight": scaled("weight", inverse)}


def not_finite(values: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinities in some rows of x and of the weight, zeros opposite some of them; all other outputs are
    ordinary."""
    x, weight = values["x"].copy(), values["weight"].copy()
    x[0, 1], x[1, 2], weight[2, 0], weight[3, 3] = np.nan, np.inf, -np.inf, np.nan
    x[2, 0], x[2, 3], weight[4, 1], weight[5, 2] = 0, 0, 0, -0.0
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
    screen=Screen(estimate, oracle_at),
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
        Probe("rounding errors only", {"...": (37,), "N": 19, "C": 602}, noise),
        Probe("constant", {"...": (3,), "N": 17, "C": 2049}, lambda v: {k: np.full_like(x, 0.7) for k, x in v.items()}),
        Probe("small integers", {"...": (5,), "N": 33, "C": 1029}, small_integers, exact=True),
        Probe("small integers in short sums", {"...": (66,), "N": 21, "C": 37}, small_integers, exact=True),
        Probe("numbers of every size", {"...": (19,), "N": 37, "C": 333}, whole_range),
        Probe("NaN and infinities", {"...": (4,), "N": 19, "C": 50}, not_finite),
    ),
    shared={"...": (70,), "N": 200, "C": 1100},
    large=tuple(
        {"...": (rows,), "N": n, "C": c}
        for rows, n, c in [(512, 211, 4999), (131, 1003, 217), (3, 203, 4999), (1, 611, 4999), (1, 151_939, 9)]
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

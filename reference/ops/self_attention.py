"""Causal scaled dot product attention with grouped key/value heads (Vaswani et al. 2017; Ainslie et al. 2023)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..bounds import TINY32, U32, Array, Oracle, finfo, half_ulp, random_sum, unit, walk
from ..numerics import cast, f32, f64, quiet
from ..spec import FLOATS, Arg, Constraint, Dims, ErrorCase, Probe, Scalar, Spec, qwen2_bench


@quiet
def self_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """softmax(scale q k^T + causal mask) v for q [T, H, D], k and v [S, K, D]; returns [T, H, D].

    Query t sees the keys 0 ... S - T + t and no other, whatever they hold; query head h reads key/value head
    h // (H // K).
    """
    (tokens, heads, dim), (length, groups, _) = q.shape, k.shape
    queries = f32(q).reshape(tokens, groups, heads // max(groups, 1), dim)  # [T, K, H/K, D]
    keys, values = f32(k).transpose(1, 2, 0), f32(v).swapaxes(0, 1)  # [K, D, S], [K, S, D]
    out = np.empty(queries.shape, np.float32)
    for t in range(tokens):
        seen = length - tokens + t + 1
        scores = np.float32(scale) * (queries[t] @ keys[:, :, :seen])  # [K, H/K, seen]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[t] = (weights / weights.sum(axis=-1, keepdims=True)) @ values[:, :seen]
    return cast(out.reshape(q.shape), q.dtype)


#: Scores of the oracle at a time: what it needs of memory is a small multiple of this many f64.
BLOCK = 1 << 20


@quiet
def attend(q: Array, q_off: Array, k: Array, v: Array, scale: float) -> Oracle:
    """Attention of the f64 queries `q`, each known up to `q_off`, in f64: weights by log-sum-exp, some queries at a
    time, each over no more keys than the last of them sees."""
    (tokens, heads, dim), (length, groups, _) = q.shape, k.shape
    share = heads // max(groups, 1)
    keys, values = (f64(x).swapaxes(0, 1) for x in (k, v))  # [K, S, D]
    y, a = np.zeros((2, *q.shape))
    rows = max(1, BLOCK // max(1, heads * length))
    for first in range(0, tokens if q.size else 0, rows):
        last = min(first + rows, tokens)
        seen = length - tokens + last
        # Query heads that share a key head lie together: [K, T H/K, D].
        queries, off = (
            x[first:last].reshape(last - first, groups, share, dim).swapaxes(0, 1).reshape(groups, -1, dim)
            for x in (q, q_off)
        )
        visible = np.arange(seen) <= np.arange(first, last)[:, None] + length - tokens
        found = _attend(
            queries, off, keys[:, :seen], values[:, :seen], scale, np.repeat(visible, share, axis=0), k.dtype
        )
        for whole, part in zip((y, a), found, strict=True):
            whole[first:last] = part.reshape(groups, last - first, share, dim).swapaxes(0, 1).reshape(-1, heads, dim)
    return Oracle(y, np.where(np.isfinite(y), a, 0.0))


def _attend(
    q: Array, q_off: Array, k: Array, v: Array, scale: float, visible: Array, dtype: np.dtype[Any]
) -> tuple[Array, Array]:
    """`attend` for q [K, M, D] and k, v [K, S, D] where `visible` [M, S] says so: the value and its bound."""
    length, dim = k.shape[1:]
    scale, columns = float(np.float32(scale)), k.swapaxes(1, 2)
    scores = np.where(visible, scale * (q @ columns), -np.inf)
    top = np.max(scores, axis=-1, keepdims=True)
    p = np.exp(scores - (top + np.log(np.sum(np.exp(scores - top), axis=-1, keepdims=True))))

    # How far each score may be off: what is not known of q, |k| q_off for each of D elements, the dot product, and two
    # roundings of scale.
    off = U32 * (walk(dim) + 2) * np.abs(scale) * (np.abs(q) @ np.abs(columns))
    if q_off.any():
        off = off + np.abs(scale) * random_sum(q_off @ np.abs(columns), q_off**2 @ columns**2)
    # The bf16 dot products of AMX and AVX-512 read subnormal operands as zero and flush subnormal sums to zero.
    tiny = TINY32 if dtype == FLOATS["bf16"] else 0.0
    if tiny:
        operands = np.abs(q).sum(axis=-1)[..., None] + np.abs(k).sum(axis=-1)[:, None]
        off = off + np.abs(scale) * tiny * (operands + 2 * dim)
    # exp(s - max): the difference, the argument's reduction (2 |s - max|), and 8 u for exp itself, as in swiglu. What
    # the maximum is does not matter, since it divides out. A weight p is thus off by p (off + mean of off).
    off = np.where(p > 0, off + U32 * (3 * (top - scores) + 8), 0.0)
    off = off + np.sum(p * off, axis=-1, keepdims=True)
    # The sums over S of the weights and of p v, and the division; then P rounded to T, which is relative down to the
    # subnormals of T, and absolute there; exp may give 0 below e^-87 < 2^-125.
    off = off + U32 * (2 * walk(length) + 3) + unit(dtype)
    floor = max(float(half_ulp(0.0, dtype)), 2.0**-125)

    # NaN and infinities reach the queries that see them; a weight of zero would let them into all others.
    finite = np.isfinite(v)
    y, a = p @ np.where(finite, v, 0.0), np.where(visible, p * off + floor, 0.0) @ np.where(finite, np.abs(v), 0.0)
    a = a + tiny * (1 + 2 * length)  # the weights of values read as zero sum to 1 at most
    for group, j in np.argwhere(~finite.all(axis=-1)):
        y[group, visible[:, j]] += p[group, visible[:, j], j, None] * np.where(finite, 0.0, v)[group, j]
    return y, a


def oracle(q: Array, k: Array, v: Array, scale: float) -> tuple[Oracle, ...]:
    """`attend` with queries that are known exactly."""
    return (attend(f64(q), np.zeros(q.shape), k, v, scale),)


def make_inputs(spec: Spec, rng: np.random.Generator, dims: Dims, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Realistic values; see `Spec.inputs`."""
    tokens, length, heads, groups, dim = (dims[x] for x in "TSHKD")
    shapes = {"q": (tokens, heads, dim), "k": (length, groups, dim), "v": (length, groups, dim)}
    values = {name: rng.standard_normal(shape, dtype=np.float32).astype(dtype) for name, shape in shapes.items()}
    return {**values, "scale": float(np.float32(1 / math.sqrt(max(dim, 1))))}


def with_rows(values: dict[str, Any], names: str, *rows: tuple[int, float]) -> dict[str, Any]:
    """The named inputs ("kv" for both k and v) with x[row] = value for each pair, negative rows from the end."""
    changed = {name: values[name].copy() for name in names}
    for x in changed.values():
        for row, value in rows:
            x[row] = value
    return changed


def times(values: dict[str, Any], **factors: float) -> dict[str, Any]:
    """The named inputs multiplied by a factor each."""
    return {name: (values[name] * factor).astype(values[name].dtype) for name, factor in factors.items()}


def with_ramp(values: dict[str, Any]) -> dict[str, Any]:
    """Scores that grow by a little with every key: the running maximum of a blockwise softmax changes all the time."""
    ramp = np.linspace(-2, 2, len(values["k"]), dtype=np.float32)[:, None, None]
    k = np.broadcast_to(ramp, values["k"].shape).astype(values["k"].dtype)
    return {"q": np.ones_like(values["q"]), "k": k}


def with_scores(values: dict[str, Any], first: float, last: float) -> dict[str, Any]:
    """Scores from `first` for the first key to `last`: without the maximum taken off, exp would overflow or be 0."""
    scores = np.linspace(first, last, len(values["k"])) / values["k"].shape[-1]
    k = np.broadcast_to(scores[:, None, None], values["k"].shape).astype(values["k"].dtype)
    return {"q": np.ones_like(values["q"]), "k": k, "scale": 1.0}


def with_integers(values: dict[str, Any]) -> dict[str, Any]:
    """Equal scores and a power of two of keys: the average of integers as large as the dtype holds (in f32, as its sums
    do), exactly, up to the final rounding. Each head has others."""
    dtype = values["v"].dtype
    most = 2 ** min(1 + int(finfo(dtype).nmant), 12)
    v = np.random.default_rng(7).integers(1 - most, most, values["v"].shape)
    return {"q": np.zeros_like(values["q"]), "v": v.astype(dtype)}


def with_noise(values: dict[str, Any]) -> dict[str, Any]:
    """Cached keys in pairs, in no order, whose values cancel, and nothing in the new ones: the results are the rounding
    errors of the sums, and each order of accumulation gives other ones, in 16 bits too."""
    k, v, cached = values["k"].copy(), values["v"].copy(), len(values["k"]) - len(values["q"])
    first, second = np.random.default_rng(8).permutation(cached)[: cached // 2 * 2].reshape(2, -1)
    k[second], v[second] = k[first], -v[first]
    v[np.setdiff1d(np.arange(len(v)), [*first, *second])] = 0
    return {"k": k, "v": v}


def dims_of(*rows: tuple[int, int, int, int, int]) -> tuple[Dims, ...]:
    """Sizes given as (T, S, H, K, D)."""
    return tuple(dict(zip("TSHKD", row, strict=True)) for row in rows)


SCALE = (Constraint("scale", "scale finite", lambda d, s: math.isfinite(s["scale"]), "INVALID_ARGUMENT"),)
SIZES = (
    Constraint("k", "S >= T", lambda d, s: d["S"] >= d["T"]),
    Constraint("k", "H a multiple of K", lambda d, s: d["H"] % d["K"] == 0 if d["K"] else d["H"] == 0),
)
SIZE_ERRORS = (
    ErrorCase("fewer keys than queries", "SHAPE", lambda v: {x: v[x][: len(v["q"]) - 1] for x in "kv"}, ("k",)),
    ErrorCase(
        "query heads not a multiple of key heads",
        "SHAPE",
        lambda v: {x: np.concatenate([v[x][:, :1]] * (v["q"].shape[1] - 1), axis=1) for x in "kv"},
        ("k",),
    ),
    ErrorCase("no key heads", "SHAPE", lambda v: {x: v[x][:, :0] for x in "kv"}, ("k",)),
    ErrorCase("values shorter than keys", "SHAPE", lambda v: {"v": v["v"][:-1]}, ("v",)),
)
SCALE_ERRORS = tuple(
    ErrorCase(f"scale {bad}", "INVALID_ARGUMENT", lambda v, bad=bad: {"scale": bad}, ("scale",))  # type: ignore[misc]
    for bad in (math.nan, math.inf)
)
FUTURE = dims_of((5, 140, 6, 2, 32))[0]
CASES = dims_of(
    *[(0, 0, 2, 1, 8), (0, 5, 2, 1, 8), (1, 1, 0, 0, 8), (2, 3, 0, 2, 8), (2, 3, 2, 1, 0), (1, 1, 1, 1, 2)],
    *[(1, 2, 3, 1, 6), (2, 2, 2, 2, 8), (3, 7, 3, 3, 10), (3, 9, 7, 1, 16), (7, 8, 9, 3, 30), (8, 15, 6, 2, 32)],
    *[(9, 16, 4, 4, 34), (5, 17, 14, 2, 64), (1, 31, 14, 2, 64), (2, 33, 12, 2, 128), (16, 33, 7, 1, 80)],
    *[(1, 127, 7, 1, 64), (1, 128, 6, 2, 32), (1, 129, 3, 1, 64), (17, 129, 2, 2, 16), (1, 255, 4, 1, 32)],
    *[(3, 257, 2, 1, 64), (33, 33, 2, 1, 34), (130, 131, 2, 1, 16), (1, 1000, 2, 2, 8)],
)


LARGE = dims_of((521, 523, 1, 1, 34), (1, 4099, 2, 2, 34), (3, 2053, 3, 1, 66))


def visible_pairs(d: Dims) -> int:
    """Pairs of a query and a key that it sees: T S less the triangle above the diagonal."""
    return int(d["T"] * d["S"] - d["T"] * (d["T"] - 1) // 2)


#: Scores that are what the keys say, of queries that are not rotated.
SCORES = (
    Probe("scores of 200", dims_of((2, 150, 2, 1, 16))[0], lambda v: with_scores(v, 200, 200)),
    Probe("scores of -200", dims_of((2, 150, 2, 1, 16))[0], lambda v: with_scores(v, -200, -200)),
    Probe("scores rising to 200", dims_of((2, 300, 2, 1, 16))[0], lambda v: with_scores(v, -200, 200)),
    Probe("scores falling to -200", dims_of((2, 300, 2, 1, 16))[0], lambda v: with_scores(v, 200, -200)),
    Probe("growing scores", dims_of((2, 300, 2, 1, 16))[0], with_ramp),
)
AVERAGES = tuple(
    Probe(f"average of {s} integers", dims_of((1, s, 6, 3, 34))[0], with_integers, exact=True)
    for s in (1, 2, 8, 128, 256)
)

SPEC = Spec(
    name="self_attention",
    summary="Causal attention of T queries over S cached and new keys, with grouped heads.",
    formula="out[t,h,:] = r(sum_s p[s] v[s,g,:]), p = softmax over s <= S - T + t of scale q[t,h,:] . k[s,g,:], "
    "g = h // (H / K)",
    source="arXiv:1706.03762, arXiv:2305.13245; torch scaled_dot_product_attention",
    args=(
        Arg("out", "T H D", role="out", doc="attention of each query head"),
        Arg("q", "T H D", doc="queries, of the last T positions"),
        Arg("k", "S K D", doc="keys, S >= T"),
        Arg("v", "S K D", doc="values"),
    ),
    scalars=(Scalar("scale", doc="factor of the scores, finite; 1 / sqrt(D) in Qwen2"),),
    rounding=("the probabilities to T, or not", "the sum to T"),
    constraints=(*SIZES, *SCALE),
    twin=self_attention,
    oracle=oracle,
    inputs=make_inputs,
    cases=CASES,
    probes=(
        Probe("NaN in the future", FUTURE, lambda v: with_rows(v, "kv", (-1, np.nan), (-3, np.nan))),
        Probe("infinities in the future", FUTURE, lambda v: with_rows(v, "kv", (-1, np.inf), (-2, -np.inf))),
        Probe("NaN in the past", FUTURE, lambda v: with_rows(v, "v", (3, np.nan))),
        Probe("NaN key in the past", FUTURE, lambda v: with_rows(v, "k", (-4, np.nan))),
        Probe("one key takes all", FUTURE, lambda v: times(v, q=8, k=8)),
        Probe("scores alike", FUTURE, lambda v: times(v, q=0)),
        Probe("scale 0", FUTURE, lambda v: {"scale": 0.0}),
        Probe("negative scale", FUTURE, lambda v: {"scale": -v["scale"]}),
        *SCORES,
        *AVERAGES,
        Probe("rounding errors only", dims_of((20, 333, 4, 2, 32))[0], with_noise),
        Probe("values all positive", FUTURE, lambda v: {"v": abs(v["v"])}),
    ),
    shared={"T": 140, "S": 270, "H": 6, "K": 2, "D": 48},
    large=LARGE,
    errors=(*SIZE_ERRORS, *SCALE_ERRORS),
    bench=qwen2_bench(
        lambda m: {"attn": {x: m[x] for x in "TSHKD"}}, more=(("decode", 1, 2048), ("prefill", 2048, 2048))
    ),
    flops=lambda d: 4 * d["H"] * d["D"] * visible_pairs(d),
    raises=(
        "ShapeError: S < T, H not a multiple of K, or sizes that do not match",
        "InvalidArgumentError: scale is not finite",
    ),
)

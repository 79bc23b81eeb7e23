"""Known mutations of the operators: one thing is changed in each, a position, a factor, a mask, a rounding.

Most are the oracle of the SPEC with other arguments, so that their bound is derived like that of the operator itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from ..reference import FLOATS, SPECS
from ..reference.bounds import U32, Oracle, finfo, half_ulp, rounding_point, walk
from ..reference.compare import ratios
from ..reference.numerics import cast, f32, f64, r
from ..reference.ops.self_attention import attend
from .calls import Array, Call, Mutation, Results

__all__ = ["MUTATIONS"]

# ------------------------------------------------------------------ rope


def _theta(theta: float) -> Callable[[Call], Results | None]:
    return lambda c: c.oracle(theta=theta) if c["theta"] != theta else None


def _positions(change: Callable[[Array], Array]) -> Callable[[Call], Results | None]:
    def make(call: Call) -> Results | None:
        changed = change(call["pos_ids"])
        return None if np.array_equal(changed, call["pos_ids"]) else call.oracle(pos_ids=changed)

    return make


def _as_bf16(positions: Array) -> Array:
    return positions.astype(np.float32).astype(SPECS["rope"].dtypes["bf16"]).astype(np.int64)


def _neighbours(call: Call) -> Results:
    x = call["x"]
    halves = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    result = call.oracle(x=halves)["out"]
    assert isinstance(result, Oracle)
    y, a = np.empty((2, *x.shape))
    for part, whole in ((y, result.y), (a, np.broadcast_to(result.a, x.shape))):
        part[..., 0::2], part[..., 1::2] = np.split(whole, 2, axis=-1)
    return {"out": Oracle(y, a)}


ROTATION = (
    Mutation("position offset +1", _positions(lambda p: p + 1)),
    Mutation("position offset -1", _positions(lambda p: p - 1)),
    Mutation("the angle has the other sign", _positions(lambda p: -p)),
    Mutation("not rotated", _positions(lambda p: 0 * p)),
    Mutation("positions counted from the start of the call", _positions(lambda p: p - p[:1])),
    Mutation("theta 10000 instead of the model's", _theta(1e4)),
    Mutation("theta 1000000 instead of the model's", _theta(1e6)),
    Mutation("exponent i/D instead of 2i/D", lambda c: c.oracle(theta=math.sqrt(c["theta"]))),
    Mutation("exponent 4i/D instead of 2i/D", lambda c: c.oracle(theta=c["theta"] ** 2)),
    Mutation("positions rounded to bf16", _positions(_as_bf16)),
)

# ------------------------------------------------------------------ attention


def _kv_heads(head: Callable[[Array, int, int], Array], names: str = "kv") -> Callable[[Call], Results | None]:
    """The kv head of each query head h of H, with K kv heads: `head(h, H, K)`."""

    def make(call: Call) -> Results | None:
        heads, groups = call["q"].shape[1], call["k"].shape[1]
        wrong = head(np.arange(heads), heads, groups)
        if np.array_equal(wrong, right := np.arange(heads) // (heads // groups)):
            return None
        return call.oracle(**{x: call[x][:, wrong if x in names else right] for x in "kv"})

    return make


def _joined(call: Call, parts: list[tuple[slice, Results]]) -> Results:
    """Rows of several results; nothing is claimed about the others."""
    shape = call["q"].shape
    y, a = np.zeros(shape), np.full(shape, np.inf)
    for rows, results in parts:
        result = results["out"]
        assert isinstance(result, Oracle)
        y[rows], a[rows] = result.y, result.a
    return {"out": Oracle(y, a)}


def _part(call: Call, rows: slice, keys: slice) -> Results:
    changed = {x: call[x][rows] for x in ("q", "pos_ids") if x in call.inputs}
    return call.oracle(**changed, k=call["k"][keys], v=call["v"][keys])


def _wide(call: Call) -> Results | None:
    """Row t sees key t + 1; the last row would see a key that is not there."""
    if len(call["q"]) < 2:
        return None
    rows = slice(0, len(call["q"]) - 1)
    return _joined(call, [(rows, _part(call, rows, slice(None)))])


def _narrow(call: Call) -> Results | None:
    tokens, length = len(call["q"]), len(call["k"])
    rows = slice(1 if tokens == length else 0, tokens)  # the first row of a sequence would see no key at all
    return _joined(call, [(rows, _part(call, rows, slice(0, length - 1)))]) if rows.start < tokens else None


def _without_first(call: Call) -> Results | None:
    tokens, length = len(call["q"]), len(call["k"])
    rows = slice(1 if tokens == length else 0, tokens)
    return _joined(call, [(rows, _part(call, rows, slice(1, length)))]) if rows.start < tokens else None


def _unmasked(call: Call) -> Results | None:
    """Every row sees every key: rows as further heads of one row."""
    tokens, heads, dim = call["q"].shape
    k, v = call.whole["k"], call.whole["v"]
    groups = k.shape[1]
    if tokens < 2:
        return None
    q, off = f64(call["q"]), np.zeros(call["q"].shape)
    if "pos_ids" in call.inputs:
        (rotated,) = SPECS["rope"].oracle(call["q"], call["pos_ids"], call["theta"])
        q, off = rounding_point(rotated.y, rotated.a, call.dtype)

    def to_heads(x: Array) -> Array:
        return x.reshape(tokens, groups, heads // groups, dim).swapaxes(0, 1).reshape(1, -1, dim)

    result = attend(to_heads(q), to_heads(off), k, v, call["scale"])
    y, a = (
        x.reshape(groups, tokens, heads // groups, dim).swapaxes(0, 1).reshape(tokens, heads, dim)
        for x in (result.y, np.broadcast_to(result.a, result.y.shape))
    )
    return {"out": Oracle(y, a)}


def _overflowing(call: Call) -> Results | None:
    """exp of scores that were not reduced by their maximum is infinite beyond 88.7, and infinity / infinity is NaN."""
    q = f64(call["q"])
    if "pos_ids" in call.inputs:
        q = SPECS["rope"].oracle(call["q"], call["pos_ids"], call["theta"])[0].y
    (tokens, heads, _), (length, groups) = q.shape, call["k"].shape[:2]
    k = np.repeat(f64(call["k"]), heads // groups, axis=1)
    scores = call["scale"] * np.einsum("thd,shd->ths", q, k)
    visible = np.arange(length) <= np.arange(tokens)[:, None, None] + length - tokens
    top = np.where(visible, scores, -np.inf).max(axis=-1)[..., None]
    overflows = top > 88.0
    if not overflows.any():
        return None
    right = call.right()["out"]
    doubtful = (np.abs(top - 88.72) < 8) | (top < -80)  # the sum overflows or underflows sooner
    return {
        "out": Oracle(
            np.where(overflows & ~doubtful, np.nan, right.y),
            np.where(doubtful, np.inf, np.where(overflows, 0, right.a)),
        )
    }


ATTENTION = (
    Mutation("the scores are not scaled", lambda c: c.oracle(scale=1.0) if c["scale"] != 1 else None),
    Mutation("scale 1/d instead of 1/sqrt(d)", lambda c: c.oracle(scale=c["scale"] ** 2)),
    Mutation("scale sqrt(d) instead of 1/sqrt(d)", lambda c: c.oracle(scale=1 / c["scale"]) if c["scale"] else None),
    Mutation("the causal edge is one too wide: row t sees key t+1", _wide),
    Mutation("the causal edge is one too narrow: row t does not see key t", _narrow),
    Mutation("no causal mask", _unmasked),
    Mutation("the first key is not seen", _without_first),
    Mutation("kv head h % K instead of h // (H / K)", _kv_heads(lambda h, n, k: h % k)),
    Mutation("kv head 0 for every query head", _kv_heads(lambda h, n, k: 0 * h)),
    Mutation("the next kv head", _kv_heads(lambda h, n, k: (h // (n // k) + 1) % k)),
    Mutation("keys of kv head h % K instead of h // (H / K)", _kv_heads(lambda h, n, k: h % k, "k")),
    Mutation("values of kv head h % K instead of h // (H / K)", _kv_heads(lambda h, n, k: h % k, "v")),
    Mutation("the maximum is not subtracted in the softmax", _overflowing),
    Mutation("the sign of the scores is flipped", lambda c: c.oracle(scale=-c["scale"])),
)

# ------------------------------------------------------------------ norms


def _normed(call: Call) -> Array:
    """The f64 rows that are normalised."""
    return f64(call["x"]) if "x" in call.inputs else f64(cast(f32(call["a"]) + f32(call["b"]), call["a"].dtype))


def _formula(call: Call, rows: Array, scale: Array, rounded: bool = True) -> Results:
    """r(r(rows scale) weight), or without the inner rounding; with the f32 error of the norm's own oracle."""
    size = rows.shape[-1]
    inner = rows * scale
    off = U32 * np.abs(inner) * ((walk(size + 1) + 2) / 2 + 4)
    if rounded:
        inner, off = rounding_point(inner, off, call.dtype)
    weight = f64(call["weight"])
    return {"out": Oracle(inner * weight, off * np.abs(weight))}


def _scale(rows: Array, eps: float) -> Array:
    return 1 / np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + float(np.float32(eps)))


def _scaled(scale: Callable[[Array, float, int], Array]) -> Callable[[Call], Results | None]:
    """Rows times `scale(mean of squares, eps, E)` instead of 1 / sqrt(mean + eps)."""

    def make(call: Call) -> Results | None:
        rows = _normed(call)
        mean = np.mean(rows**2, axis=-1, keepdims=True)
        return _formula(call, rows, scale(mean, float(np.float32(call["eps"])), rows.shape[-1]))

    return make


def _centred(call: Call) -> Results:
    wide = _normed(call)
    return call.oracle(**_as_rows(call, wide - wide.mean(axis=-1, keepdims=True)))


def _as_rows(call: Call, rows: Array) -> dict[str, Array]:
    """Arguments that make the operator normalise `rows`."""
    rows = rows.astype(np.float32)
    return {"x": rows} if "x" in call.inputs else {"a": rows, "b": np.zeros_like(rows)}


def _only_out(make: Callable[[Call], Results | None]) -> Callable[[Call], Results | None]:
    """The sum that add_rms_norm returns too stays as it is."""

    def inner(call: Call) -> Results | None:
        results = make(call)
        return {"out": results["out"]} if results else None

    return inner


def _unrounded_inside(call: Call) -> Results | None:
    rows = _normed(call)
    return None if call.dtype == np.float32 else _formula(call, rows, _scale(rows, call["eps"]), rounded=False)


def _unrounded_sum(call: Call) -> Results:
    rows = f64(call["a"]) + f64(call["b"])
    return _formula(call, rows, _scale(rows, call["eps"]))


def _eps(eps: float) -> Callable[[Call], Results | None]:
    return lambda c: c.oracle(eps=eps) if not math.isclose(c["eps"], eps, rel_tol=1e-3) else None


NORM = (
    Mutation("eps left out", _only_out(lambda c: c.oracle(eps=0.0))),
    *(Mutation(f"eps {eps} instead of the model's", _eps(float(eps))) for eps in ("1e-5", "1e-6", "1e-8", "1e-12")),
    Mutation("eps outside the root", _scaled(lambda mean, eps, n: 1 / (np.sqrt(mean) + eps))),
    Mutation("mean over n + 1 elements", _scaled(lambda mean, eps, n: 1 / np.sqrt(mean * n / (n + 1) + eps))),
    Mutation("mean over n - 1 elements", _scaled(lambda mean, eps, n: 1 / np.sqrt(mean * n / (n - 1) + eps))),
    Mutation("the sum of squares instead of their mean", _scaled(lambda mean, eps, n: 1 / np.sqrt(mean * n + eps))),
    Mutation("no root", _scaled(lambda mean, eps, n: 1 / (mean + eps))),
    Mutation("not normalised, only weighted", _scaled(lambda mean, eps, n: np.ones_like(mean))),
    Mutation("every row with the scale of the first", _scaled(lambda mean, eps, n: 1 / np.sqrt(mean[:1] + eps))),
    Mutation("no weight", _only_out(lambda c: c.oracle(weight=np.ones_like(c["weight"])))),
    Mutation("weight 1 + w instead of w", _only_out(lambda c: c.oracle(weight=1 + f64(c["weight"])))),
    Mutation("the mean is subtracted, as layer norm does", _only_out(_centred)),
    Mutation("the normalised row is not rounded before the weight", _unrounded_inside),
)

# ------------------------------------------------------------------ linear


def _zeroed(columns: Callable[[int], slice]) -> Callable[[Call], Results | None]:
    def make(call: Call) -> Results | None:
        x = call["x"].copy()
        x[..., columns(x.shape[-1])] = 0
        return call.oracle(x=x)

    return make


def _dropped_tails() -> Iterator[Mutation]:
    for width in (8, 16, 32, 64):
        tail = _zeroed(lambda c, w=width: slice(c - c % w, c))  # type: ignore[misc]
        yield Mutation(
            f"the last C mod {width} columns are left out",
            lambda c, w=width, tail=tail: tail(c) if c["x"].shape[-1] % w else None,  # type: ignore[misc]
        )
    for width in (1, 8, 16, 32, 64):
        last = _zeroed(lambda c, w=width: slice(max(0, c - w), c))  # type: ignore[misc]
        yield Mutation(f"the last {f'{width} columns are' if width > 1 else 'column is'} left out", last)


def _transposed(width: int, of_tail: bool) -> Callable[[Call], Results | None]:
    """The block of the last features and columns transposed: `width` of them, or what is left over after whole ones."""

    def make(call: Call) -> Results | None:
        weight = call["weight"].copy()
        features, columns = weight.shape
        size = (features % width or columns % width) if of_tail else width
        if size < 2 or size > min(features, columns):
            return None
        weight[-size:, -size:] = weight[-size:, -size:].T.copy()
        return call.oracle(weight=weight)

    return make


def _rounded_product(call: Call) -> Results | None:
    """r(r(x W^T) + b)."""
    if call["bias"] is None or call.dtype == np.float32:
        return None
    bias = f64(call["bias"])
    right = call.oracle(bias=None)["out"]
    assert isinstance(right, Oracle)
    y, a = rounding_point(right.y, right.a, call.dtype)
    return {"out": Oracle(y + bias, a)}


def _narrowed(names: tuple[str, ...], dtype: str) -> Callable[[Call], Results | None]:
    """Inputs rounded to a type that holds less of each number than that of the call."""

    def make(call: Call) -> Results | None:
        rounded = {x: r(f32(call[x]), FLOATS[dtype]) for x in names}
        same = all(np.array_equal(f32(call[x]), value) for x, value in rounded.items())
        return None if same or FLOATS[dtype] == call.dtype else call.oracle(**rounded)

    return make


def _capped(most: float, rounded: bool) -> Callable[[Call], Results | None]:
    """c tanh(y / c) of the rounded y, or of y itself. Nowhere is it steeper than y, so that errors do not grow."""

    def make(call: Call) -> Results | None:
        right = call.right()["out"]
        assert isinstance(right, Oracle)
        y, a = rounding_point(right.y, right.a, call.dtype) if rounded else (right.y, right.a)
        capped = most * np.tanh(y / most)
        return {"out": Oracle(capped, a + 8 * U32 * np.abs(capped))}

    return make


def _low_accumulation(name: str) -> Callable[[Call], Results | None]:
    """Accumulation in `name`: no order is known, so the size of the errors decides, against one made with that type."""

    def make(call: Call) -> Results | None:
        dtype = SPECS["linear"].dtypes[name]
        right, found = call.right()["out"], f64(call.outputs["out"])
        x, weight = f64(call["x"])[:8], f64(call["weight"])[:128]
        total = np.zeros((len(x), len(weight)), np.float32)
        for c in range(x.shape[1]):
            total = r(total + r(np.outer(x[:, c], weight[:, c]), dtype), dtype)
        if call["bias"] is not None:
            total = r(total + f32(call["bias"])[:128], dtype)
        made = np.sqrt(np.mean((total - right.y[:8, :128]) ** 2))
        error = np.sqrt(np.mean((found - right.y) ** 2))
        plain = np.sqrt(np.mean(half_ulp(right.y, call.dtype) ** 2))
        magnitude = np.abs(f64(call["x"])) @ np.abs(f64(call["weight"])).T
        if not (np.isfinite(error) and made / 8 < error < 2 * made and error > 1.5 * plain / math.sqrt(3)):
            return None
        # Such errors are everywhere, and on either side alike.
        part = Oracle(right.y[:8, :128], np.broadcast_to(right.a, right.y.shape)[:8, :128])
        few = np.mean(ratios(call.outputs["out"], right) > 1) < np.mean(ratios(cast(total, call.dtype), part) > 1) / 4
        if few or abs(_one_sided(found, right.y)) > abs(_one_sided(total, part.y)) + 0.25:
            return None
        size = x.shape[1] + 1
        a = float(finfo(dtype).eps) / 2 * min(size, 4 * math.sqrt(size)) * magnitude
        worst = np.abs(found - right.y) / (a + half_ulp(right.y, call.dtype))
        relative = error / np.sqrt(np.mean(right.y**2))
        return dict(call.outputs) if (worst <= 1).all() and relative < 0.5 else None

    return make


def _one_sided(found: Array, y: Array) -> float:
    """The mean error of the magnitude, as a share of the mean error: 1 or -1 where all are too large or too small."""
    error = found - y
    size = float(np.mean(np.abs(error)))
    return float(np.mean(error * np.sign(y))) / size if size else 0.0


LINEAR = (
    Mutation("the bias is left out", lambda c: None if c["bias"] is None else c.oracle(bias=None)),
    Mutation("the bias is added twice", lambda c: None if c["bias"] is None else c.oracle(bias=2 * f64(c["bias"]))),
    Mutation("the bias is subtracted", lambda c: None if c["bias"] is None else c.oracle(bias=-f64(c["bias"]))),
    Mutation("the product is rounded before the bias is added", _rounded_product),
    *_dropped_tails(),
    *(Mutation(f"the tail block of W, n mod {w}, is transposed", _transposed(w, True)) for w in (8, 16, 32, 64)),
    *(Mutation(f"the last {w} x {w} block of W is transposed", _transposed(w, False)) for w in (4, 8, 16, 32)),
    Mutation("W is transposed", lambda c: c.oracle(weight=c["weight"].T.copy())),
    *(
        Mutation(f"{' and '.join(names)} rounded to {dtype}", _narrowed(names, dtype))
        for names in (("weight",), ("x",), ("x", "weight"))
        for dtype in ("bf16", "f16")
    ),
    *(Mutation(f"a soft cap of {c} on the result", _capped(c, rounded)) for c in (30, 50) for rounded in (True, False)),
    Mutation("accumulated in bf16 (errors of the size that this makes)", _low_accumulation("bf16"), likely=True),
    Mutation("accumulated in f16 (errors of the size that this makes)", _low_accumulation("f16"), likely=True),
)

# ------------------------------------------------------------------ swiglu, argmax, embedding, add


def _activation(function: Callable[[Array], Array], rounded: bool = True) -> Callable[[Call], Results | None]:
    def make(call: Call) -> Results:
        x, up = f64(call["gate"]), f64(call["up"])
        inner = function(x)
        off = U32 * np.abs(inner) * (8 + 2 * np.abs(x)) + 8 * U32 * np.abs(x)
        if rounded:
            inner, off = rounding_point(inner, off, call.dtype)
        return {"out": Oracle(inner * up, off * np.abs(up))}

    return make


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def _unrounded_silu(call: Call) -> Results | None:
    make = _activation(lambda x: x * _sigmoid(x), rounded=False)
    return None if call.dtype == np.float32 else make(call)


def _index_and_value(index: Callable[[Array], Array]) -> Callable[[Call], Results | None]:
    def make(call: Call) -> Results:
        x = call["x"]
        chosen = np.asarray(index(f32(x)), np.int64)
        return {"index": chosen, "value": np.take_along_axis(x, chosen[..., None], axis=-1)[..., 0]}

    return make


def _row_of(index: Callable[[Array, int], Array]) -> Callable[[Call], Results | None]:
    return lambda c: {"out": c["weight"][np.clip(index(c["index"], len(c["weight"])), 0, len(c["weight"]) - 1)]}


def _sum_of(function: Callable[[Array, Array], Array], name: str) -> Callable[[Call], Results | None]:
    return lambda c: {name: cast(function(f32(c["a"]), f32(c["b"])), c.dtype)}


def _norm_of(function: Callable[[Array, Array], Array]) -> Callable[[Call], Results | None]:
    """Another sum, and what add_rms_norm then makes of it."""

    def make(call: Call) -> Results:
        total = cast(function(f32(call["a"]), f32(call["b"])), call.dtype)
        return {**call.oracle(a=total, b=np.zeros_like(total)), "sum": total}

    return make


#: The known mutations, by operator, the simplest first.
MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "rope": (*ROTATION, Mutation("neighbours (2i, 2i+1) paired instead of halves", _neighbours)),
    "self_attention": ATTENTION,
    "rope_self_attention": (
        *ATTENTION,
        *(Mutation(f"queries: {mutation.text}", mutation.make) for mutation in ROTATION),
    ),
    "rms_norm": NORM,
    "add_rms_norm": (
        Mutation("the residual is not added", _norm_of(lambda a, b: b)),
        Mutation("the branch is not added", _norm_of(lambda a, b: a)),
        Mutation("subtracted instead of added", _norm_of(lambda a, b: a - b)),
        Mutation(
            "the first summand is normalised, not the sum", _only_out(lambda c: c.oracle(b=np.zeros_like(c["b"])))
        ),
        *NORM,
        Mutation("the sum is normalised before it is rounded", _unrounded_sum),
    ),
    "linear": LINEAR,
    "swiglu": (
        Mutation("gate and up are swapped", lambda c: c.oracle(gate=c["up"], up=c["gate"])),
        Mutation("GELU instead of SiLU", _activation(_gelu)),
        Mutation("GELU (by tanh) instead of SiLU", _activation(_gelu_tanh)),
        Mutation("the sigmoid instead of SiLU", _activation(_sigmoid)),
        Mutation("ReLU instead of SiLU", _activation(lambda x: np.maximum(x, 0))),
        Mutation("no activation", _activation(lambda x: x)),
        Mutation("silu(gate) is not rounded before the product", _unrounded_silu),
    ),
    "argmax": (
        Mutation(
            "the last of equal maxima instead of the first",
            _index_and_value(lambda x: x.shape[-1] - 1 - np.argmax(x[..., ::-1], axis=-1)),
        ),
        Mutation(
            "NaN is passed over",
            _index_and_value(lambda x: np.argmax(np.where(np.isnan(x), -np.inf, x), axis=-1)),
        ),
        Mutation("the minimum instead of the maximum", _index_and_value(lambda x: np.argmin(x, axis=-1))),
        Mutation("the largest magnitude", _index_and_value(lambda x: np.argmax(np.abs(x), axis=-1))),
        Mutation("the last element is not looked at", _index_and_value(lambda x: np.argmax(x[..., :-1], axis=-1))),
    ),
    "embedding": (
        Mutation("the row after the token's", _row_of(lambda i, n: i + 1)),
        Mutation("the row before the token's", _row_of(lambda i, n: i - 1)),
        Mutation("row 0 for every token", _row_of(lambda i, n: 0 * i)),
        Mutation("the row of the token before", _row_of(lambda i, n: np.roll(i, 1))),
        Mutation(
            "scaled by sqrt(E)",
            lambda c: {"out": cast(f32(c["weight"][c["index"]]) * np.sqrt(np.float32(c["weight"].shape[1])), c.dtype)},
        ),
    ),
    "add": (
        Mutation("a - b instead of a + b", _sum_of(lambda a, b: a - b, "out")),
        Mutation("b is not added", _sum_of(lambda a, b: a, "out")),
        Mutation("a is not added", _sum_of(lambda a, b: b, "out")),
    ),
}

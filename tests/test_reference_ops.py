"""The numpy twins against their f64 oracles, the oracles against exact arithmetic, and both against planted faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from llaisys.reference import FLOATS, SPECS, Oracle, check, ratios, tolerance
from llaisys.reference.numerics import cast, f32, r
from llaisys.reference.spec import arg_dtype, arg_shape, calls

OPS_AND_DTYPES = [(name, dtype) for name, spec in SPECS.items() for dtype in spec.dtypes]
OPS_AND_FLOATS = [(name, dtype) for name, dtype in OPS_AND_DTYPES if dtype in FLOATS]


@pytest.mark.parametrize(("name", "dtype"), OPS_AND_DTYPES)
def test_twin_keeps_to_its_oracle(name: str, dtype: str) -> None:
    spec = SPECS[name]
    for label, dims, values in calls(spec, dtype):
        before = {key: np.array(value, copy=True) for key, value in values.items() if isinstance(value, np.ndarray)}
        outputs, oracles = spec.call(spec.twin, values), spec.call(spec.oracle, values)
        assert len(outputs) == len(oracles) == len(spec.outputs)
        for arg, output, oracle in zip(spec.outputs, outputs, oracles, strict=True):
            verdict = check(output, oracle, arg_dtype(arg, spec.dtypes[dtype]))
            assert verdict, f"{label}: {arg.name}: {verdict.reason}"
            assert verdict.checked == verdict.size == math.prod(arg_shape(arg, dims)), label
            assert output.shape == arg_shape(arg, dims), label
        for key, value in before.items():
            assert value.tobytes() == values[key].tobytes(), f"{label}: {key} was written to"


def just_outside(oracle: Oracle, dtype: np.dtype[Any], index: tuple[int, ...]) -> Any:
    """The number of `dtype` nearest to y that the bound does not admit, above y."""
    y, tol = float(oracle.y[index]), float(tolerance(oracle, dtype)[index])
    value = np.asarray(y + tol).astype(dtype)
    while float(value) - y > tol:
        value = np.nextafter(value, np.asarray(-np.inf, dtype))
    while float(value) - y <= tol:
        value = np.nextafter(value, np.asarray(np.inf, dtype))
    return value


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize(("name", "dtype"), OPS_AND_FLOATS)
def test_bound_is_able_to_fail(name: str, dtype: str) -> None:
    """One element moved just past the bound, one NaN too many and one infinity: each is found, where it is."""
    spec = SPECS[name]
    for label, _, values in list(calls(spec, dtype))[-5:] + [c for c in calls(spec, dtype) if "T3" in c[0]][:2]:
        for output, oracle in zip(spec.call(spec.twin, values), spec.call(spec.oracle, values), strict=True):
            usable = np.isfinite(f32(oracle.y)) & np.isfinite(f32(output))
            if not usable.any():
                continue
            index = tuple(int(i[-1]) for i in np.nonzero(usable))
            wrong: list[Any]
            if output.dtype == np.int64:
                wrong = [int(output[index]) + 1]
            elif oracle.exact:
                wrong = [np.nextafter(output[index], np.asarray(np.inf, output.dtype)), np.nan, np.inf]
            else:
                wrong = [just_outside(oracle, output.dtype, index), np.nan, np.inf, -np.inf]
            for value in wrong:
                broken = np.array(output, copy=True)
                broken[index] = value
                verdict = check(broken, oracle)
                assert not verdict and verdict.failed == 1 and verdict.index == index, f"{label}: {value}"
            nan = np.argwhere(~np.isfinite(f32(output)))
            if len(nan):
                broken = np.array(output, copy=True)
                broken[tuple(nan[0])] = 1.0
                assert not check(broken, oracle), f"{label}: a NaN or infinity that is missing"


def truncate(x: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """f32 to a 16-bit dtype by towards-zero rounding."""
    out = cast(x, dtype)
    return np.where(np.abs(f32(out)) > np.abs(x), np.nextafter(out, np.zeros_like(out)), out)


def interleaved_rope(x: Any, pos_ids: Any, theta: float) -> Any:
    half = x.shape[-1] // 2
    order = np.arange(2 * half).reshape(half, 2).T.reshape(-1)
    out = np.empty_like(x)
    out[..., order] = SPECS["rope"].twin(x[..., order], pos_ids, theta)
    return out


def attention_seeing(offset: int) -> Callable[..., Any]:
    """Attention whose mask is off: each query sees `offset` keys less at its end."""

    def attention(q: Any, k: Any, v: Any, scale: float) -> Any:
        return SPECS["self_attention"].twin(q, k[: len(k) - offset], v[: len(v) - offset], scale)

    return attention


def attention_of_heads(order: Callable[[int, int], Any]) -> Callable[..., Any]:
    """Attention whose query heads read other key/value heads: head h reads `order(H, K)[h]`."""

    def attention(q: Any, k: Any, v: Any, scale: float) -> Any:
        heads = order(q.shape[1], k.shape[1])
        return SPECS["self_attention"].twin(q, k[:, heads], v[:, heads], scale)

    return attention


def last_argmax(x: Any) -> Any:
    index = x.shape[-1] - 1 - np.argmax(f32(x)[..., ::-1], axis=-1)
    return index, np.take_along_axis(x, index[..., None], axis=-1)[..., 0]


T = {name: spec.twin for name, spec in SPECS.items()}
FAULTS: list[tuple[str, str, Callable[..., Any]]] = [
    ("add", "truncates", lambda a, b: truncate(f32(a) + f32(b), a.dtype)),
    ("add", "subtracts", lambda a, b: T["add"](a, -b)),
    ("argmax", "last of equals", last_argmax),
    ("embedding", "next row", lambda index, w: w[(index + 1) % len(w)]),
    ("rearrange", "reversed", lambda x: x[::-1]),
    ("linear", "no bias", lambda x, w, b: T["linear"](x, w, None)),
    ("linear", "last column left out", lambda x, w, b: T["linear"](x[..., :-1], w[:, :-1], b)),
    ("linear", "rounded before the bias", lambda x, w, b: T["add"](T["linear"](x, w), np.broadcast_to(b, len(w)))),
    ("rms_norm", "eps outside the root", lambda x, w, eps: T["rms_norm"](x, w, 1e-2)),
    ("rms_norm", "mean over E - 1", lambda x, w, eps: T["rms_norm"](x, w, eps) * cast(np.asarray(0.97), x.dtype)),
    ("rms_norm", "no weight", lambda x, w, eps: T["rms_norm"](x, w * 0 + 1, eps)),
    ("add_rms_norm", "sum not rounded", lambda a, b, w, eps: (T["rms_norm"](a, w, eps), T["add"](a, b))),
    ("rope", "position + 1", lambda x, pos, theta: T["rope"](x, pos + 1, theta)),
    ("rope", "theta 500000", lambda x, pos, theta: T["rope"](x, pos, 5e5)),
    ("rope", "turned backwards", lambda x, pos, theta: T["rope"](x, -pos, theta)),
    ("rope", "interleaved", interleaved_rope),
    ("self_attention", "a key less", attention_seeing(1)),
    ("self_attention", "scale of D + 4", lambda q, k, v, s: T["self_attention"](q, k, v, s * 0.94)),
    ("self_attention", "heads h mod K", attention_of_heads(lambda h, k: np.arange(h) % k)),
    ("self_attention", "keys shifted", lambda q, k, v, s: T["self_attention"](q, np.roll(k, 1, axis=0), v, s)),
    ("rope_self_attention", "position + 1", lambda q, p, k, v, t, s: T["rope_self_attention"](q, p + 1, k, v, t, s)),
    ("rope_self_attention", "not rotated", lambda q, p, k, v, t, s: T["self_attention"](q, k, v, s)),
    ("swiglu", "up and gate swapped", lambda gate, up: T["swiglu"](up, gate)),
    (
        "swiglu",
        "sigmoid of 1.702 x",
        lambda g, up: cast(r(f32(g) / (1 + np.exp(-1.702 * f32(g))), g.dtype) * f32(up), g.dtype),
    ),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "title", "faulty"), FAULTS, ids=[f"{f[0]}-{f[1].replace(' ', '-')}" for f in FAULTS])
def test_fault_is_found(name: str, title: str, faulty: Callable[..., Any], dtype: str) -> None:
    """An implementation with a plausible fault does not pass, on at least one of the SPEC's cases."""
    if (title == "truncates" and dtype == "f32") or (title == "rounded before the bias" and dtype == "f32"):
        pytest.skip("in f32 this is not a fault")
    spec = SPECS[name]
    found = 0
    for _, dims, values in calls(spec, dtype):
        sizes = [n for v in dims.values() for n in (v if isinstance(v, tuple) else (v,))]
        if (
            min(sizes, default=0) < 2
            or dims.get("S", 99) <= dims.get("T", 0)
            or any(v is None for v in values.values())
        ):
            continue
        with np.errstate(all="ignore"):
            outputs = spec.call(faulty, values)
        oracles = spec.call(spec.oracle, values)
        found += not all(check(output, oracle) for output, oracle in zip(outputs, oracles, strict=True))
    assert found, f"{name}: {title} passed"


def exact_dot(a: Any, b: Any) -> Fraction:
    return sum((Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)), Fraction(0))


@pytest.mark.parametrize("dtype", FLOATS)
def test_oracle_of_linear_is_exact(dtype: str) -> None:
    """Against rational arithmetic, cancelling sums included."""
    spec = SPECS["linear"]
    for label, dims, v in calls(spec, dtype):
        if math.prod(dims["..."]) * dims["N"] * dims["C"] > 5000 or "NaN" in label or v["bias"] is None:
            continue
        (oracle,) = spec.call(spec.oracle, v)
        flat = v["x"].reshape(math.prod(dims["..."]), dims["C"])
        for row, got in zip(flat, oracle.y.reshape(len(flat), dims["N"]), strict=True):
            for n in range(dims["N"]):
                want = exact_dot(row, v["weight"][n]) + Fraction(float(v["bias"][n]))
                size = float(exact_dot(np.abs(row), np.abs(v["weight"][n])))
                assert abs(float(want - Fraction(float(got[n])))) <= 2.0**-52 * (dims["C"] + 1) * (size + 4)


def test_oracle_of_attention_by_definition() -> None:
    """Against plain loops over queries, heads and keys with exactly rounded sums."""
    spec = SPECS["self_attention"]
    for _, d, v in calls(spec, "f32"):
        if d["T"] * d["H"] * d["S"] * d["D"] > 30000 or not np.isfinite(v["k"]).all() or not np.isfinite(v["v"]).all():
            continue
        (oracle,) = spec.call(spec.oracle, v)
        q, k, val = (v[x].astype(np.float64) for x in "qkv")
        scale = float(np.float32(v["scale"]))
        for t in range(d["T"]):
            for h in range(d["H"]):
                g = h // (d["H"] // d["K"])
                seen = range(d["S"] - d["T"] + t + 1)
                scores = [scale * math.fsum(q[t, h] * k[s, g]) for s in seen]
                weights = [math.exp(x - max(scores)) for x in scores]
                for i in range(d["D"]):
                    want = math.fsum(w * val[s, g, i] for s, w in zip(seen, weights, strict=True)) / math.fsum(weights)
                    assert oracle.y[t, h, i] == pytest.approx(want, rel=1e-11, abs=1e-12)


def test_oracle_of_rope_by_definition() -> None:
    spec = SPECS["rope"]
    for _, d, v in calls(spec, "f32"):
        if not np.isfinite(v["x"]).all():
            continue
        (oracle,) = spec.call(spec.oracle, v)
        half = d["D"] // 2
        for t, h, i in np.ndindex(d["T"], d["H"], half):
            angle = int(v["pos_ids"][t]) / math.pow(v["theta"], 2 * i / d["D"])
            a, b = float(v["x"][t, h, i]), float(v["x"][t, h, i + half])
            cos, sin = math.cos(angle), math.sin(angle)
            assert oracle.y[t, h, i] == pytest.approx(a * cos - b * sin, rel=1e-9, abs=1e-9)
            assert oracle.y[t, h, i + half] == pytest.approx(b * cos + a * sin, rel=1e-9, abs=1e-9)


def test_oracle_of_rms_norm_and_swiglu_by_definition() -> None:
    for name in ("rms_norm", "swiglu"):
        spec = SPECS[name]
        for _, _, v in calls(spec, "f32"):
            if not all(np.isfinite(x).all() for x in v.values()):
                continue
            (oracle,) = spec.call(spec.oracle, v)
            if name == "swiglu":
                wide = zip(v["gate"].reshape(-1).tolist(), v["up"].reshape(-1).tolist(), strict=True)
                want = [g / (1 + math.exp(-g)) * u for g, u in wide]
            else:
                rows = v["x"].reshape(-1, v["x"].shape[-1]).tolist() if v["x"].size else []
                eps, w = float(np.float32(v["eps"])), v["weight"].tolist()
                roots = [math.sqrt(math.fsum(x * x for x in row) / len(row) + eps) for row in rows]
                want = [
                    x / root * y for row, root in zip(rows, roots, strict=True) for x, y in zip(row, w, strict=True)
                ]
            assert oracle.y.reshape(-1).tolist() == pytest.approx(want, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_future_keys_do_not_matter(dtype: str) -> None:
    """Not one bit of an output depends on keys and values that its query must not see, whatever these hold."""
    for name in ("self_attention", "rope_self_attention"):
        spec = SPECS[name]
        plain = {label: v for label, _, v in calls(spec, dtype)}["NaN-in-the-past"]
        values = {**plain, "v": np.nan_to_num(plain["v"].astype(np.float32)).astype(plain["v"].dtype)}
        (before,) = spec.call(spec.twin, values)
        poisoned = {key: np.array(values[key], copy=True) for key in "kv"}
        poisoned["k"][-2:], poisoned["v"][-2:] = np.nan, np.inf
        (after,) = spec.call(spec.twin, {**values, **poisoned})
        assert after[:-2].tobytes() == before[:-2].tobytes() and np.isnan(f32(after[-2:])).all()
        assert ratios(after[:-2], Oracle(before[:-2].astype(np.float64))).max() == 0


def test_embedding_refuses_indices() -> None:
    weight = np.zeros((5, 3), np.float32)
    for bad in (-1, 5, 1 << 40):
        with pytest.raises(IndexError, match=f"0 <= index < 5, found {bad}"):
            SPECS["embedding"].twin(np.array([1, bad]), weight)

"""LOCAL, the certificate of one call: quiet on correct kernels whatever the data, and each rule able to fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import llaisys
from kernel_harness import Array, cases, run, using
from llaisys.certify import Again, Local, certify, dither, error_ratios
from llaisys.reference import FLOATS, SPECS, Oracle, check, worst_case
from llaisys.reference.bounds import U32, L, nearest, rounding_point, ulp, walk
from llaisys.reference.numerics import cast, f32, r
from llaisys.reference.spec import arg_dtype

HALVES = ("f16", "bf16")


def split(name: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = SPECS[name]
    return {a.name: values[a.name] for a in spec.inputs_args}, {s.name: values[s.name] for s in spec.scalars}


def named(name: str, outputs: Any) -> dict[str, Array]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {a.name: np.asarray(x) for a, x in zip(SPECS[name].outputs, outputs, strict=True)}


def judged(name: str, values: Mapping[str, Any], function: Callable[..., Any], repeat: bool = True) -> Local:
    """The certificate of what `function`, with the signature of the twin, makes of `values`."""
    inputs, scalars = split(name, values)

    def again(moved: Mapping[str, Any]) -> dict[str, Array]:
        with np.errstate(all="ignore"):
            return named(name, function(*moved.values(), *scalars.values()))

    given: Again | None = again if repeat else None
    return certify(SPECS[name], inputs, scalars, again(inputs), again=given)


def truncated(x: Array, dtype: np.dtype[Any]) -> Array:
    out = cast(x, dtype)
    return np.where(np.abs(f32(out)) > np.abs(x), np.nextafter(out, np.zeros_like(out)), out)


def random_linear(dtype: str, rows: int, features: int, columns: int, seed: int = 0) -> dict[str, Any]:
    spec, dims = SPECS["linear"], {"...": (rows,), "N": features, "C": columns}
    return spec.inputs(spec, np.random.default_rng(seed), dims, FLOATS[dtype])


def blas(x: Array, weight: Array, bias: Array | None) -> Array:
    return f32(x) @ f32(weight).T + (0 if bias is None else f32(bias))


# ----------------------------------------------------------- quiet where right


@pytest.mark.parametrize("name", SPECS)
def test_kernels_pass(name: str) -> None:
    """Every case of the SPEC, on every tier of the machine: certified, without a repetition that could excuse it."""
    for dtype in SPECS[name].dtypes:
        for tier in llaisys.isas():
            for case in cases(name, dtype):
                with using(tier):
                    outputs = run(SPECS[name], case.values, case.label)
                inputs, scalars = split(name, case.values)
                local = certify(SPECS[name], inputs, scalars, named(name, outputs))
                assert local.outcome == "pass", f"{name} {dtype} {tier} {case.label}: {local}"
                assert local.checked == local.size == sum(x.size for x in outputs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("order", ["forwards", "backwards", "pairs", "blocks of 7"])
def test_any_order_of_the_sum_passes(dtype: str, order: str) -> None:
    """Sums in f32 in other orders than ours: rounding differs, and all of it is admissible."""

    def linear(x: Array, weight: Array, bias: Array | None) -> Array:
        products = f32(x)[:, None, :] * f32(weight)
        if order == "backwards":
            products = products[..., ::-1]
        if order == "pairs":
            while products.shape[-1] > 1:
                if products.shape[-1] % 2:
                    products = np.concatenate([products, np.zeros_like(products[..., :1])], axis=-1)
                products = products[..., ::2] + products[..., 1::2]
            y = products[..., 0]
        elif order == "blocks of 7":
            parts = [np.cumsum(products[..., i : i + 7], axis=-1)[..., -1] for i in range(0, products.shape[-1], 7)]
            y = np.cumsum(np.stack(parts, axis=-1), axis=-1, dtype=np.float32)[..., -1]
        else:
            y = np.cumsum(products, axis=-1, dtype=np.float32)[..., -1]
        return cast(y + (0 if bias is None else f32(bias)), x.dtype)

    for seed in range(4):
        for change in (lambda v: v, lambda v: {k: abs(x) for k, x in v.items()}):
            local = judged("linear", change(random_linear(dtype, 4, 60, 700, seed)), linear)
            assert local.outcome == "pass" and not local.note, local


@pytest.mark.parametrize("dtype", HALVES)
def test_products_of_few_bits_are_no_bias(dtype: str) -> None:
    """The mean rounding error of such products is not 0; over many elements one would see it."""
    rng, kind = np.random.default_rng(3), FLOATS[dtype]
    gate, up = (rng.standard_normal((64, 4864), dtype=np.float32).astype(kind) for _ in range(2))
    local = judged("swiglu", {"gate": gate, "up": up}, SPECS["swiglu"].twin)
    assert local.outcome == "pass" and not local.note


# ---------------------------------------------------------- rules able to fail


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 7])
def test_truncation_is_a_fault(dtype: str, rows: int) -> None:
    """Of a long sum in f16, whose f32 error is of the size of an ulp, too: there it is the bias that tells."""
    values = random_linear(dtype, rows, 500, 3000)
    local = judged("linear", values, lambda x, w, b: truncated(blas(x, w, b), x.dtype))
    assert local.outcome == "fault" and -0.6 < local.bias < -0.4, local
    assert judged("linear", values, lambda x, w, b: cast(blas(x, w, b), x.dtype))


def test_bias_alone_is_suspect_until_repeated() -> None:
    """Results that are all within the bound, but each rounded away from zero where f32 leaves the choice."""
    values = random_linear("f16", 3, 700, 4000)
    (oracle,) = SPECS["linear"].oracle(*values.values())

    def outwards(x: Array, weight: Array, bias: Array | None) -> Array:
        (exact,) = SPECS["linear"].oracle(x, weight, bias)
        best = cast(exact.y, x.dtype)
        further = np.nextafter(best, np.where(best > 0, np.inf, -np.inf).astype(x.dtype))
        ok = np.abs(f32(further).astype(np.float64) - exact.y) < 0.9 * (ulp(exact.y, x.dtype) / 2 + exact.a)
        return np.where(ok, further, best)

    verdict = check(outwards(*values.values()), oracle)
    assert verdict.ok, "the elements are within the bound"
    assert judged("linear", values, outwards, repeat=False).outcome == "suspect"
    local = judged("linear", values, outwards)
    assert local.outcome == "fault" and "on the average" in local.reason and local.bias > local.limit


@pytest.mark.parametrize("dtype", HALVES)
def test_ties_go_to_even(dtype: str) -> None:
    """Half-way results are rounded away from zero: within half an ulp, and wrong."""

    def away(gate: Array, up: Array) -> Array:
        wide = f32(gate)
        product = r(wide / (1 + np.exp(-wide)), gate.dtype).astype(np.float64) * f32(up)
        step = ulp(product, gate.dtype)
        return (np.sign(product) * np.floor(np.abs(product) / step + 0.5) * step).astype(gate.dtype)

    rng = np.random.default_rng(5)
    values = {name: rng.standard_normal((40, 500), dtype=np.float32).astype(FLOATS[dtype]) for name in ("gate", "up")}
    local = judged("swiglu", values, away)
    assert local.outcome == "fault" and local.ratio == np.inf, local


def test_sum_in_bf16_is_a_fault() -> None:
    def linear(x: Array, weight: Array, bias: Array | None) -> Array:
        total = np.zeros((len(x), len(weight)), np.float32)
        for c in range(x.shape[1]):
            total = r(total + f32(x)[:, c, None] * f32(weight)[:, c], x.dtype)
        return cast(total + (0 if bias is None else f32(bias)), x.dtype)

    assert judged("linear", random_linear("bf16", 2, 20, 200), linear).outcome == "fault"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "faulty",
    [
        lambda x, w, b: SPECS["linear"].twin(x, w, None),
        lambda x, w, b: SPECS["linear"].twin(x[:, :-1], w[:, :-1], b),
        lambda x, w, b: SPECS["linear"].twin(x, np.roll(w, 4, axis=0), b),
        lambda x, w, b: SPECS["linear"].twin(x, w, b)[:, ::-1],
    ],
    ids=["no bias", "dropped column", "rows moved", "features reversed"],
)
def test_wrong_sums_are_faults(dtype: str, faulty: Callable[..., Any]) -> None:
    local = judged("linear", random_linear(dtype, 3, 40, 129), faulty)
    assert local.outcome == "fault" and local.ratio > 1 and "expected" in local.reason


@pytest.mark.parametrize("name", ["linear", "rms_norm", "rope", "self_attention", "swiglu"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_wrong_element_is_found(name: str, dtype: str) -> None:
    """An element that is off by a little more than its bound, a NaN, an infinity: found, and found where it is."""
    spec, kind = SPECS[name], FLOATS[dtype]
    values = spec.inputs(spec, np.random.default_rng(1), spec.shared, kind)
    inputs, scalars = split(name, values)
    outputs = named(name, spec.call(spec.twin, values))
    (oracle,) = spec.call(spec.oracle, values)
    index = tuple(n - 1 for n in outputs["out"].shape)
    with worst_case():
        (worst,) = spec.call(spec.oracle, values)
    far = float(oracle.y[index] + 2 * (np.asarray(worst.a)[index] + ulp(oracle.y[index], kind)))
    for value in (far, np.nan, np.inf, -np.inf):
        broken = outputs["out"].copy()
        broken[index] = value
        local = certify(spec, inputs, scalars, {"out": broken})
        assert local.outcome == "fault" and local.index == index, (value, local)
        assert np.argwhere(error_ratios(spec, inputs, scalars, {"out": broken})["out"] > 1).tolist() == [list(index)]


def test_wrong_shape_and_dtype_are_faults() -> None:
    for name in ("linear", "rms_norm"):
        spec = SPECS[name]
        values = spec.inputs(spec, np.random.default_rng(1), spec.shared, FLOATS["bf16"])
        inputs, scalars = split(name, values)
        (out,) = spec.call(spec.twin, values)
        for wrong, text in ((out[:-1], "shape"), (f32(out), "dtype")):
            local = certify(spec, inputs, scalars, {"out": wrong})
            assert local.outcome == "fault" and text in local.reason


@pytest.mark.parametrize("dtype", HALVES)
def test_inner_rounding_points_are_demanded(dtype: str) -> None:
    """A kernel that skips one is more exact, and still wrong."""

    def rms_norm(x: Array, weight: Array, eps: float) -> Array:
        wide = f32(x)
        scale = 1 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(eps))
        return cast(wide * scale * f32(weight), x.dtype)

    spec = SPECS["rms_norm"]
    values = spec.inputs(spec, np.random.default_rng(1), {"...": (9,), "E": 224}, FLOATS[dtype])
    assert judged("rms_norm", values, rms_norm).outcome == "fault"
    assert judged("rms_norm", values, spec.twin)


# --------------------------------------------------- suspects, and what decides


def constant(count: int) -> dict[str, Any]:
    """Every product is the same, so that errors of a sum add up in one direction."""
    return {"x": np.full((1, count), 1.1, np.float32), "weight": np.full((3, count), 1.7, np.float32), "bias": None}


def in_sequence(x: Array, weight: Array, bias: Array | None) -> Array:
    """One term after the other, in f32."""
    return np.cumsum(f32(x)[:, None, :] * f32(weight), axis=-1, dtype=np.float32)[..., -1]


def test_constant_data_is_cleared_by_repetition() -> None:
    """A correct sum of constants exceeds the bound for independent errors, and not the worst case."""
    values = constant(200_000)
    (oracle,) = SPECS["linear"].oracle(*values.values())
    assert not check(in_sequence(*values.values()), oracle), "the data is not as bad as the test needs it"
    assert judged("linear", values, in_sequence, repeat=False).outcome == "suspect"
    local = judged("linear", values, in_sequence)
    assert local.outcome == "pass" and local.ratio > 1 and "moved a little" in local.note


def test_what_repetition_confirms_is_a_fault() -> None:
    """An error between the two bounds that is there on other data too."""
    count = 4000

    def shifted(x: Array, weight: Array, bias: Array | None) -> Array:
        size = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
        return (blas(x, weight, None) + 3 * walk(count) * U32 * size).astype(np.float32)

    assert 3 * walk(count) < count
    local = judged("linear", random_linear("f32", 3, 40, count) | {"bias": None}, shifted)
    assert local.outcome == "fault" and "repeated" in local.reason


def test_beyond_the_worst_case_nothing_is_repeated() -> None:
    def again(inputs: Mapping[str, Any]) -> Mapping[str, Array]:
        raise AssertionError("a fault for certain was repeated")

    values = random_linear("f32", 3, 40, 100)
    inputs, scalars = split("linear", values)
    wrong = SPECS["linear"].twin(*values.values()) * np.float32(1.01)
    assert certify(SPECS["linear"], inputs, scalars, {"out": wrong}, again=again).outcome == "fault"


def test_dither_moves_every_number_a_little() -> None:
    values = random_linear("bf16", 30, 40, 100)
    inputs, _ = split("linear", values)
    moved = dither(SPECS["linear"], inputs, np.random.default_rng(0))
    for name, x in inputs.items():
        other = moved[name]
        assert other is not None and other.dtype == x.dtype and other.shape == x.shape
        assert np.mean(other != x) > 0.8 and (np.abs(f32(other) - f32(x)) <= np.abs(f32(x)) / 14).all()
    assert dither(SPECS["linear"], {**inputs, "bias": None}, np.random.default_rng(0))["bias"] is None


# ------------------------------------------------------------------ screening


@pytest.mark.parametrize("dtype", FLOATS)
def test_screened_as_the_whole_oracle(dtype: str) -> None:
    """The first look passes nothing that the whole oracle does not, over random faults of single elements."""
    spec, rng = SPECS["linear"], np.random.default_rng(9)
    values = random_linear(dtype, 6, 300, 500)
    inputs, scalars = split("linear", values)
    out = spec.twin(*values.values())
    (oracle,) = spec.oracle(*values.values())
    for _ in range(60):
        broken, index = out.copy(), tuple(int(rng.integers(n)) for n in out.shape)
        tolerated = float(ulp(oracle.y[index], FLOATS[dtype]) / 2 + np.asarray(oracle.a)[index])
        broken[index] = oracle.y[index] + rng.uniform(0.3, 3) * tolerated * rng.choice([-1, 1])
        verdict = check(broken, oracle)
        local = certify(spec, inputs, scalars, {"out": broken})
        assert (local.outcome == "pass") == (verdict.ok and not verdict.biased), (verdict, local)
        if not verdict:
            assert local.index == verdict.index == index and local.ratio == pytest.approx(verdict.worst, rel=1e-6)


@pytest.mark.parametrize("name", ["linear"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_screens_agree_with_the_oracle(name: str, dtype: str) -> None:
    """Single elements as the whole oracle has them; the lower bound is one, and the estimate as near as is claimed."""
    spec = SPECS[name]
    assert spec.screen is not None
    for case in cases(name, dtype):
        (oracle,) = case.oracles
        where = np.nonzero(np.ones(oracle.y.shape, bool))
        single = spec.call(lambda *args, at=where: spec.screen.oracle(at, *args), case.values)[0]
        whole, a = oracle.y[where], np.broadcast_to(oracle.a, oracle.y.shape)[where]
        finite = np.isfinite(whole)
        assert (np.isnan(single.y) == np.isnan(whole)).all(), case.label
        assert np.allclose(single.y[finite], whole[finite], rtol=1e-12, atol=1e-12 + 1e-9 * a[finite].max(initial=0))
        assert np.allclose(np.asarray(single.a)[finite], a[finite], rtol=1e-9), case.label
        estimate, least = spec.call(spec.screen.estimate, case.values)
        least = np.broadcast_to(least, oracle.y.shape)[where]
        assert (least[finite] <= a[finite]).all(), case.label
        assert (
            np.abs(estimate[where][finite] - whole[finite]) <= a[finite] / 2 + ulp(whole[finite], FLOATS["f32"])
        ).all()


# ------------------------------------------------------------- rounding points


@pytest.mark.parametrize("dtype", FLOATS)
def test_nearest_rounds_once(dtype: str) -> None:
    """Ties, and what lies beside them by less than f32 can tell: `astype` from f64 to bf16 rounds these twice."""
    kind = FLOATS[dtype]
    step = float(ulp(1.0, kind))
    for odd in (0, 1):
        low = 1 + odd * step
        for beside, expected in ((0.0, 1 + 2 * odd * step if odd else low), (1e-12, low + step), (-1e-12, low)):
            tie = low + step / 2 + beside
            assert nearest(np.array([tie, -tie]), kind).tolist() == [expected, -expected]
    largest = float(llaisys.reference.bounds.finfo(kind).max)
    found = nearest(np.array([np.nan, np.inf, largest, -largest * (1 + step), 0.0]), kind)
    assert np.isnan(found[0]) and found[1:].tolist() == [np.inf, largest, -np.inf, 0.0]


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_points_hold_what_they_promise(dtype: str) -> None:
    """Whatever lies within a of y, rounded, is within the new a of the new y; and mostly it is known."""
    rng, kind = np.random.default_rng(4), FLOATS[dtype]
    y = rng.standard_normal(5000)
    a = np.abs(y) * 2.0**-20
    middle, half = rounding_point(y, a, kind)
    for share in (-1.0, -0.3, 0.0, 0.7, 1.0):
        assert (np.abs(nearest(y + share * a, kind) - middle) <= half).all()
    assert np.mean(half == 0) > 0.98
    assert (rounding_point(np.array([np.inf, np.nan]), np.array([0.0, 1.0]), kind)[1] == 0).all()


def test_worst_case_is_wider_and_ends() -> None:
    assert walk(10_000) == L * 100
    with worst_case():
        assert walk(10_000) == 10_000
    assert walk(10_000) == L * 100


def test_repeated_values_are_no_evidence_of_bias() -> None:
    """One value, rounded up, a thousand times; and a thousand values."""
    kind = FLOATS["bf16"]
    step = float(ulp(1.0, kind))
    y = np.full((1000, 1), 1.0)
    up = np.full_like(y, 1 + step).astype(kind)
    assert not check(up, Oracle(y, a=0.9 * step)).biased
    y = 1 + np.random.default_rng(0).random((1000, 1)) * 0.9
    up = (nearest(y, kind) + step).astype(kind)
    assert check(up, Oracle(y, a=0.9 * step)).biased


def test_dtype_of_outputs_is_the_operators() -> None:
    """argmax has an integer output beside one of the storage dtype."""
    x = np.random.default_rng(0).standard_normal((3, 50), dtype=np.float32)
    spec = SPECS["argmax"]
    index, value = spec.twin(x)
    assert certify(spec, {"x": x}, {}, {"index": index, "value": value})
    assert certify(spec, {"x": x}, {}, {"index": index.astype(np.int32), "value": value}).outcome == "fault"
    assert certify(spec, {"x": x}, {}, {"index": index + 1, "value": value}).output == "index"
    assert [arg_dtype(a, x.dtype) for a in spec.outputs] == [np.int64, np.float32]

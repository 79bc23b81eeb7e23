"""Explanations of an error: faulty operators written here in numpy are named, right ones are not blamed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llaisys.checkpoint import Checkpoint
from llaisys.diff.hypotheses import find_hypothesis
from llaisys.diff.mutations import MUTATIONS
from llaisys.diff.origins import explain_state, explain_weight
from llaisys.diff.shape import Axis, describe_error, describe_indices
from llaisys.diff.weights import WeightBits
from llaisys.reference import FLOATS, SPECS, ratios
from llaisys.reference.spec import arg_shape

Call = dict[str, Any]
DIMS: dict[str, Any] = {"...": (21,), "T": 21, "S": 33, "H": 6, "K": 2, "D": 48, "E": 224, "N": 99, "C": 230, "V": 77}


def inputs_of(op: str, dtype: str, seed: int = 0) -> Call:
    dims = DIMS if op not in ("add", "swiglu") else {"...": (21, 99)}
    values = SPECS[op].inputs(SPECS[op], np.random.default_rng(seed), dims, FLOATS[dtype])
    if op == "rope":
        values["pos_ids"] = np.arange(12, 33)
    if "theta" in values:
        values["theta"] = 1e5
    if "q" in values:
        values["q"] *= 2
    return values


def split(op: str, values: Call) -> tuple[Call, dict[str, float]]:
    scalars = {s.name: values[s.name] for s in SPECS[op].scalars}
    return {name: x for name, x in values.items() if name not in scalars}, scalars


def outputs_of(op: str, values: Call, function: Callable[..., Any] | None = None) -> dict[str, Any]:
    spec = SPECS[op]
    with np.errstate(all="ignore"):
        result = (function or spec.twin)(*(values[a.name] for a in (*spec.inputs_args, *spec.scalars)))
    return dict(zip((a.name for a in spec.outputs), result if isinstance(result, tuple) else (result,), strict=True))


def hypothesis(op: str, values: Call, outputs: dict[str, Any], **options: Any) -> str | None:
    return find_hypothesis(SPECS[op], *split(op, values), outputs, **options)


def shape_of(op: str, values: Call, outputs: dict[str, Any], name: str = "out") -> tuple[str, ...]:
    spec = SPECS[op]
    oracles = spec.oracle(*(values[a.name] for a in (*spec.inputs_args, *spec.scalars)))
    oracle = dict(zip((a.name for a in spec.outputs), oracles, strict=True))[name]
    inputs, scalars = split(op, values)
    return describe_error(spec, inputs, scalars, name, outputs[name], oracle.y, ratios(outputs[name], oracle))


# ------------------------------------------------------------------ hypotheses

T = SPECS["rope"].twin
A = SPECS["rope_self_attention"].twin
N = SPECS["rms_norm"].twin
L = SPECS["linear"].twin


def interleaved(x: Any, pos: Any, theta: float) -> Any:
    y = T(np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1), pos, theta)
    return np.stack(np.split(y, 2, axis=-1), axis=-1).reshape(x.shape)


def edge(shift: int) -> Callable[..., Any]:
    """Attention row by row, each seeing `shift` keys more."""

    def attention(q: Any, pos: Any, k: Any, v: Any, theta: float, scale: float) -> Any:
        before = len(k) - len(q)
        ends = [max(1, before + t + 1 + shift) for t in range(len(q))]
        return np.concatenate([A(q[t : t + 1], pos[t : t + 1], k[:e], v[:e], theta, scale) for t, e in enumerate(ends)])

    return attention


def heads(chosen: list[int]) -> Callable[..., Any]:
    return lambda q, p, k, v, theta, scale: A(q, p, k[:, chosen], v[:, chosen], theta, scale)


def plain_norm(x: Any, w: Any, scale: Any) -> Any:
    inner = (x.astype("f4") * np.float32(scale)).astype(x.dtype)
    return (inner.astype("f4") * w.astype("f4")).astype(x.dtype)


def mean_over(n: int) -> Callable[..., Any]:
    return lambda x, w, eps: plain_norm(
        x, w, 1 / np.sqrt((x.astype("f4") ** 2).sum(-1, keepdims=True) / (x.shape[-1] + n) + eps)
    )


def transposed_tail(x: Any, w: Any, b: Any) -> Any:
    w = w.copy()
    w[-3:, -3:] = w[-3:, -3:].T.copy()
    return L(x, w, b)


def other_rows(x: Any, w: Any, b: Any) -> Any:
    w = w.copy()
    w[32:64] = w[:32].copy()
    return L(x, w, b)


def accumulated(dtype: str) -> Callable[..., Any]:
    def linear(x: Any, w: Any, b: Any) -> Any:
        total = np.zeros((len(x), len(w)), "f4")
        for c in range(x.shape[1]):
            total = (total + np.outer(x[:, c].astype("f4"), w[:, c].astype("f4"))).astype(FLOATS[dtype]).astype("f4")
        return (total + b.astype("f4")).astype(x.dtype)

    return linear


def toward_zero(x: Any, dtype: Any) -> Any:
    y = x.astype(dtype)
    over = np.abs(y.astype("f8")) > np.abs(x.astype("f8"))
    return (
        np.where(over, np.nextafter(y.astype("f4"), 0).view("u4") & 0xFFFF0000, y.astype("f4").view("u4"))
        .view("f4")
        .astype(dtype)
    )


def truncating_linear(x: Any, w: Any, b: Any) -> Any:
    return toward_zero(x.astype("f4") @ w.astype("f4").T + b.astype("f4"), x.dtype)


def last_of_ties(x: Any) -> Any:
    index = x.shape[-1] - 1 - np.argmax(x[..., ::-1], axis=-1)
    return index, np.take_along_axis(x, index[..., None], -1)[..., 0]


def with_sum(norm: Callable[..., Any], total: Callable[..., Any] = lambda a, b: a + b) -> Callable[..., Any]:
    def add_rms_norm(a: Any, b: Any, w: Any, eps: float) -> Any:
        s = total(a.astype("f4"), b.astype("f4")).astype(a.dtype)
        return norm(s, w, eps), s

    return add_rms_norm


def unrounded_sum(a: Any, b: Any, w: Any, eps: float) -> Any:
    total = a.astype("f4") + b.astype("f4")
    inner = (total / np.sqrt((total**2).mean(-1, keepdims=True) + np.float32(eps))).astype(a.dtype)
    return (inner.astype("f4") * w.astype("f4")).astype(a.dtype), total.astype(a.dtype)


# Operator, what the hypothesis says, the faulty operator; then the one dtype in which it is out of bound, or "tiny" for
# rows near eps.
FAULTS: list[tuple[str, str, Callable[..., Any], str]] = [
    ("rope", "position offset +1", lambda x, p, th: T(x, p + 1, th), ""),
    ("rope", "position offset -1", lambda x, p, th: T(x, p - 1, th), ""),
    ("rope", "the angle has the other sign", lambda x, p, th: T(x, -p, th), ""),
    ("rope", "theta 10000 instead", lambda x, p, th: T(x, p, 1e4), ""),
    ("rope", "neighbours (2i, 2i+1)", interleaved, ""),
    ("rope", "positions counted from the start of the call", lambda x, p, th: T(x, p - p[0], th), ""),
    ("rope", "not rotated", lambda x, p, th: x, ""),
    ("rope_self_attention", "the scores are not scaled", lambda q, p, k, v, th, s: A(q, p, k, v, th, 1), ""),
    ("rope_self_attention", "scale 1/d", lambda q, p, k, v, th, s: A(q, p, k, v, th, s * s), ""),
    ("rope_self_attention", "row t sees key t+1", edge(1), ""),
    ("rope_self_attention", "row t does not see key t", edge(-1), ""),
    ("rope_self_attention", "no causal mask", edge(1000), ""),
    ("rope_self_attention", "h % K", heads([0, 1, 0, 1, 0, 1]), ""),
    ("rope_self_attention", "kv head 0", heads([0, 0, 0, 0, 0, 0]), ""),
    ("rope_self_attention", "queries: not rotated", lambda q, p, k, v, th, s: A(q, 0 * p, k, v, th, s), ""),
    ("rope_self_attention", "queries: position offset +1", lambda q, p, k, v, th, s: A(q, p + 1, k, v, th, s), ""),
    ("self_attention", "the scores are not scaled", lambda q, k, v, s: SPECS["self_attention"].twin(q, k, v, 1), ""),
    ("rms_norm", "mean over n + 1", mean_over(1), "f32"),
    ("rms_norm", "mean over n - 1", mean_over(-1), "f32"),
    ("rms_norm", "no weight", lambda x, w, eps: N(x, np.ones_like(w), eps), ""),
    ("rms_norm", "weight 1 + w", lambda x, w, eps: N(x, 1 + w.astype("f4"), eps), "f32"),
    ("rms_norm", "eps 1e-5", lambda x, w, eps: N(x, w, 1e-5), "tiny"),
    ("rms_norm", "eps 1e-8", lambda x, w, eps: N(x, w, 1e-8), "tiny"),
    ("rms_norm", "eps left out", lambda x, w, eps: N(x, w, 0), "tiny"),
    ("rms_norm", "eps outside the root", lambda x, w, eps: plain_norm(
        x, w, 1 / (np.sqrt((x.astype("f4") ** 2).mean(-1, keepdims=True)) + eps)), "tiny"),
    ("add_rms_norm", "mean over n + 1", with_sum(mean_over(1)), "f32"),
    ("add_rms_norm", "the residual is not added", with_sum(N, lambda a, b: b), ""),
    ("add_rms_norm", "subtracted", with_sum(N, lambda a, b: a - b), ""),
    ("linear", "the bias is left out", lambda x, w, b: L(x, w), ""),
    ("linear", "the bias is added twice", lambda x, w, b: L(x, w, 2 * b), ""),
    ("linear", "the last C mod 8 columns", lambda x, w, b: L(x[:, :224], w[:, :224], b), ""),
    ("linear", "the last 16 columns", lambda x, w, b: L(x[:, :-16], w[:, :-16], b), ""),
    ("linear", "is transposed", transposed_tail, ""),
    ("linear", "features 32 to 63 computed from the weight rows 32 before", other_rows, ""),
    ("linear", "accumulated in bf16", accumulated("bf16"), ""),
    ("linear", "accumulated in f16", accumulated("f16"), "f32"),
    ("linear", "weight rounded to bf16", lambda x, w, b: L(x, w.astype(FLOATS["bf16"]).astype("f4"), b), "f32"),
    ("linear", "weight rounded to f16", lambda x, w, b: L(x, w.astype("f2").astype("f4"), b), "f32"),
    ("linear", "x rounded to bf16", lambda x, w, b: L(x.astype(FLOATS["bf16"]).astype("f4"), w, b), "f32"),
    ("linear", "a soft cap of 30", lambda x, w, b: (
        30 * np.tanh(L(x.astype("f4"), w.astype("f4"), b.astype("f4")) / 30)).astype(x.dtype), ""),
    ("linear", "a soft cap of 50", lambda x, w, b: (
        50 * np.tanh(L(x, w, b).astype("f4") / 50)).astype(x.dtype), ""),
    ("rope_self_attention", "heads 0 and 1 exchanged", lambda q, p, k, v, th, s: A(q, p, k, v, th, s)[
        :, [1, 0, 2, 3, 4, 5]], ""),
    ("linear", "truncated toward zero", truncating_linear, "bf16"),
    ("rms_norm", "not rounded before the weight", lambda x, w, eps: (N(x.astype("f4"), np.ones(x.shape[-1], "f4"), eps)
        * w.astype("f4")).astype(x.dtype), "bf16"),
    ("add_rms_norm", "the sum is normalised before it is rounded", unrounded_sum, "bf16"),
    ("linear", "rounded before the bias", lambda x, w, b: L(x, w) + b, "bf16"),
    ("swiglu", "not rounded before the product", lambda g, u: (
        SPECS["swiglu"].twin(g.astype("f4"), np.ones_like(u, "f4")) * u.astype("f4")).astype(g.dtype), "bf16"),
    ("swiglu", "gate and up are swapped", lambda g, u: SPECS["swiglu"].twin(u, g), ""),
    ("swiglu", "ReLU", lambda g, u: (np.maximum(g, 0).astype("f4") * u.astype("f4")).astype(g.dtype), ""),
    ("argmax", "the last of equal maxima", last_of_ties, ""),
    ("embedding", "the row after", lambda i, w: w[np.minimum(i + 1, len(w) - 1)], ""),
    ("add", "a - b", lambda a, b: a - b, ""),
    ("add", "truncated toward zero", lambda a, b: toward_zero(a.astype("f4") + b.astype("f4"), a.dtype), "bf16"),
]  # fmt: skip


CASES = [
    pytest.param(*fault, dtype, id=f"{fault[0]}-{dtype}-{fault[1]}".replace(" ", "-"))
    for fault in FAULTS
    for dtype in ([fault[3]] if fault[3] in FLOATS else ["f32", "bf16"])
]


@pytest.mark.parametrize(("op", "text", "fault", "only", "dtype"), CASES)
def test_a_fault_is_named(op: str, text: str, fault: Callable[..., Any], only: str, dtype: str) -> None:
    values = inputs_of(op, dtype)
    if only == "tiny":
        values["x"] = (values["x"].astype("f4") * np.float32(1e-3)).astype(values["x"].dtype)
    if op == "argmax":
        values["x"][:, [5, 40]] = 99
    found = hypothesis(op, values, outputs_of(op, values, fault))
    assert found is not None and text in found, found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", sorted(MUTATIONS))
def test_a_right_result_has_no_hypothesis(op: str, dtype: str) -> None:
    for seed in range(3):
        values = inputs_of(op, dtype, seed)
        assert hypothesis(op, values, outputs_of(op, values)) is None


@pytest.mark.parametrize("op", sorted(MUTATIONS))
def test_noise_has_no_hypothesis(op: str) -> None:
    """What no mutation makes is explained by none, in every dtype."""
    for dtype in FLOATS:
        values = inputs_of(op, dtype)
        outputs = outputs_of(op, values)
        rng = np.random.default_rng(1)
        for name, x in outputs.items():
            outputs[name] = rng.permutation(x.reshape(-1)).reshape(x.shape)
        assert hypothesis(op, values, outputs) is None


def test_few_wrong_elements_and_one_sided_ones_are_no_low_accumulation() -> None:
    for dtype in FLOATS:
        values = inputs_of("linear", dtype)
        right = outputs_of("linear", values)["out"]
        for size in (0.01, 0.1, 0.5, 2.0):
            single, shrunk = right.copy(), (right.astype("f4") * np.float32(1 - size / 100)).astype(right.dtype)
            single[3, 7] += np.asarray(size * 10, right.dtype)
            for found in (single, shrunk):
                assert "accumulated" not in str(hypothesis("linear", values, {"out": found}))


def test_long_calls_take_no_longer() -> None:
    """A prefill of 512 tokens is cut to some rows, those that are wrong among them."""
    rng = np.random.default_rng(0)
    dims = {"T": 512, "S": 512, "H": 14, "K": 2, "D": 64}
    values = SPECS["rope_self_attention"].inputs(SPECS["rope_self_attention"], rng, dims, FLOATS["bf16"])
    outputs = outputs_of("rope_self_attention", values)
    wide = edge(1)(**{x: values[x] for x in ("q", "k", "v", "theta", "scale")}, pos=values["pos_ids"])
    outputs["out"][300:] = wide[300:]
    begin = time.perf_counter()
    hypothesis("rope_self_attention", values, outputs)
    x = rng.standard_normal((512, 896), dtype=np.float32)
    weight = rng.standard_normal((4864, 896), dtype=np.float32)
    found = L(x, weight)
    found[77, 1234] += 1
    wrong = np.zeros(found.shape, bool)
    wrong[77, 1234] = True
    call = {"x": x, "weight": weight, "bias": None}
    assert find_hypothesis(SPECS["linear"], call, {}, {"out": found}, wrong={"out": wrong}) is None
    found[:] = L(x[:, :-8], weight[:, :-8])
    assert "the last 8 columns" in (find_hypothesis(SPECS["linear"], call, {}, {"out": found}) or "")
    assert time.perf_counter() - begin < 60  # seconds; it is about 5, and hours if nothing were cut


def test_rerun() -> None:
    values = inputs_of("swiglu", "f32")
    right = outputs_of("swiglu", values)
    wrong = {"out": right["out"] + np.linspace(0, 1, right["out"].size, dtype="f4").reshape(right["out"].shape)}
    assert "by itself is right" in (hypothesis("swiglu", values, wrong, rerun=lambda i, s: right) or "")
    assert hypothesis("swiglu", values, wrong, rerun=lambda i, s: wrong) is None
    rng = np.random.default_rng(0)
    racing = hypothesis("swiglu", values, wrong, rerun=lambda i, s: {"out": rng.standard_normal((21, 99))})
    assert "data race" in (racing or "")


# ------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    ("size", "hit", "text"),
    [
        (32, [0], "only row 0"),
        (32, range(1, 32), "every row but 0"),
        (32, range(1, 32, 2), "only odd rows"),
        (64, range(0, 64, 16), "only the first of each 16 rows"),
        (64, [i for i in range(64) if i % 16], "all but the first of each 16 rows"),
        (96, [i for i in range(96) if i % 48 >= 24], "only the second half of each 48 rows"),
        (300, range(256, 300), "from row 256 on"),
        (300, range(10), "only rows 0 to 9"),
        (32, [31], "only row 31 (the last)"),
        (32, [i for i in range(32) if i != 7], "every row but 7"),
        (5, range(5), "every row"),
        (50, [1, 5, 11], "only rows 1, 5, 11"),
    ],
)
def test_indices_in_words(size: int, hit: Any, text: str) -> None:
    hits = np.zeros(size, bool)
    hits[list(hit)] = True
    assert describe_indices(hits, Axis("row", size)) == text


def linear_error(change: Callable[[Any], Any], features: int = 1027, dtype: str = "bf16") -> tuple[str, ...]:
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype(FLOATS[dtype]) for name, shape in (
        ("x", (9, 64)), ("weight", (features, 64)), ("bias", (features,)))}  # fmt: skip
    out = L(values["x"], values["weight"], values["bias"])
    return shape_of("linear", values, {"out": change(out.copy())})


def put(where: Any, value: Any) -> Callable[[Any], Any]:
    def change(x: Any) -> Any:
        x[where] = value(x[where]) if callable(value) else value
        return x

    return change


@pytest.mark.parametrize(
    ("change", "phrases"),
    [
        (put(np.s_[:, 1024:], np.nan), ["all of them NaN", "only the tail: features 1024 to 1026, n = 1027"]),
        (put(np.s_[:, 96:192], 0.0), ["all of them 0", "a block: features 96 to 191"]),
        (put(np.s_[3, 7], 5e4), ["a single element: row 3, feature 7"]),
        (put(np.s_[:], lambda x: -x), ["the sign is flipped", "the whole output"]),
        (put(np.s_[:], lambda x: (x.astype("f4") * 1.4142).astype(x.dtype)), ["found = 1.41"]),
        (put(np.s_[1:], lambda x: (x.astype("f4") + 8).astype(x.dtype)), ["found = expected + 8", "every row but 0"]),
        (put(np.s_[:], lambda x: np.roll(x, 1, axis=0)), ["each row holds the values of the row 1 before it"]),
        (put(np.s_[:, 16:32], lambda x: x - 4), ["a block: features 16 to 31"]),
        (put(np.s_[:], np.inf), ["all of them infinite", "the whole output"]),
    ],
)  # fmt: skip
def test_shape_of_an_error(change: Callable[[Any], Any], phrases: list[str]) -> None:
    found = linear_error(change)
    assert len(found) <= 4
    for phrase in phrases:
        assert any(text.startswith(phrase) for text in found), found


def test_another_shape_is_named() -> None:
    found = describe_error(SPECS["add"], {}, {}, "out", np.zeros((9, 5)), np.zeros((9, 7)), np.zeros((9, 7)))
    assert found == ("shape [9, 5] instead of [9, 7]",)


def test_a_missing_bias_is_the_same_difference_in_every_row() -> None:
    rng = np.random.default_rng(0)
    values = {"x": rng.standard_normal((9, 64)), "weight": rng.standard_normal((33, 64)), "bias": np.arange(33.0)}
    values = {name: x.astype(np.float32) for name, x in values.items()}
    found = shape_of("linear", values, {"out": L(values["x"], values["weight"])})
    assert "the same difference in every row, as a bias makes it" in found


def test_positions_and_kv_heads_are_named() -> None:
    values = inputs_of("rope_self_attention", "f32")
    out = outputs_of("rope_self_attention", values)["out"]
    out[5:, 3:] += 1
    found = shape_of("rope_self_attention", values, {"out": out})
    assert "from position 17 on" in found and "only the heads of kv head 1" in found
    out = edge(1)(**{x: values[x] for x in ("q", "k", "v", "theta", "scale")}, pos=values["pos_ids"])
    assert shape_of("rope_self_attention", values, {"out": out})[0] == "the causal edge: row t sees key t+1"
    values = inputs_of("rope", "f32")
    out = outputs_of("rope", values)["out"]
    out[..., 24:] *= -1
    found = shape_of("rope", values, {"out": out})
    assert found[:2] == ("the sign is flipped", "the second half of each head (dims 24 to 47)")


def test_truncation_shows_as_a_bias() -> None:
    values = inputs_of("linear", "bf16")
    found = shape_of("linear", values, outputs_of("linear", values, truncating_linear))
    assert any("(truncation)" in text for text in found)


@pytest.mark.parametrize("op", sorted(SPECS))
def test_any_array_has_a_shape(op: str) -> None:
    """Nothing is raised, whatever the arrays hold: no axes, no elements, NaN, infinities, large numbers."""
    spec = SPECS[op]
    rng = np.random.default_rng(0)
    for dims in spec.cases:
        for dtype in spec.dtypes.values():
            for arg in spec.outputs:
                shape = arg_shape(arg, dims)
                found = rng.choice([0, 1, -1, np.nan, np.inf, -np.inf, 3e38], shape)
                y = rng.choice([0, 1, np.nan, np.inf, -1e-40], shape)
                with np.errstate(all="ignore"):
                    for expected in (np.asarray(y), np.asarray(y).astype(dtype)):
                        ratio = np.asarray(rng.choice([0, 2, np.inf, np.nan], shape))
                        phrases = describe_error(
                            spec, {}, {}, arg.name, np.asarray(found).astype(dtype), expected, ratio
                        )
                        assert len(phrases) <= 4 and all(isinstance(text, str) for text in phrases)


# ------------------------------------------------------------------ states and weights


def test_where_rows_of_a_cache_come_from() -> None:
    rng = np.random.default_rng(0)
    right, other = rng.standard_normal((2, 20, 2, 48)).astype(FLOATS["bf16"])
    assert explain_state(right, right) is None
    stale = right.copy()
    stale[7:9] = other[7:9]
    assert explain_state(right, stale, {"layer 2": other}) == "rows 7 to 8: the bits of layer 2, at the same rows"
    assert explain_state(right, other, {"layer 2": other}) == "every row: the bits of layer 2, at the same rows"
    assert explain_state(right, stale) is None
    shifted = np.concatenate([right[:10], right[9:19]])
    assert explain_state(right, shifted) == "from row 10 on: shifted by 1, row t holds the row of t - 1"
    empty = right.copy()
    empty[3] = 0
    assert explain_state(right, empty) == "row 3: zeros, as if never written"
    assert "kv heads are in another order" in (explain_state(right, right[:, ::-1]) or "")
    moved = right.copy()
    moved[4:6] = other[1:3]
    assert "of other rows (4 holds 1)" in (explain_state(right, moved, {"the sequence before": other}) or "")
    assert explain_state(right, right[:5]) == "shape [5, 2, 48] instead of [20, 2, 48]"


def test_which_weight_it_is() -> None:
    rng = np.random.default_rng(0)
    names = {f"layer {i}": rng.standard_normal((64, 32)).astype(np.float32) for i in range(3)}
    assert explain_weight(names["layer 1"].copy(), names) == "has the bits of layer 1"
    assert explain_weight(names["layer 1"].T.copy(), names) == "has the bits of layer 1, transposed"
    block = names["layer 0"].copy()
    block[16:32] = block[:16].copy()
    found = explain_weight(block, names, names["layer 0"])
    assert found == "only rows 16 to 31: the bits of the rows 16 before them"
    block = names["layer 0"].copy()
    block[5] = names["layer 2"][5]
    assert explain_weight(block, names, names["layer 0"]) == "only row 5: the bits of layer 2"
    assert explain_weight(np.zeros((3, 2), np.float32), names) is None


def test_what_became_of_a_weight() -> None:
    rng = np.random.default_rng(0)
    right = rng.standard_normal((64, 64)).astype(np.float32)

    def rows(*order: int) -> Any:
        return right[[*order, *range(len(order), 64)]]

    signs = np.ones((64, 1), np.float32)
    signs[17] = -1
    order = np.arange(64).reshape(2, 2, 16).swapaxes(1, 2).reshape(-1)
    bf16 = FLOATS["bf16"]
    for found, text in (
        (np.ascontiguousarray(right.T), "has its own bits, transposed"),
        (right * signs, "only row 17: negated"),
        (rows(1, 0), "rows 0 and 1 are exchanged"),
        (right[[*range(16, 32), *range(16), *range(32, 64)]], "rows 0 to 15 and 16 to 31 are exchanged"),
        (right[[*range(32, 64), *range(32)]], "rows 0 to 31 and 32 to 63 are exchanged"),
        (right[order], "the halves of each head of 32 rows are interleaved, as in GGUF and the first Llama"),
        (right[np.argsort(order)], "the halves of each head of 32 rows are taken apart once more than they were"),
        (rows(2, 0, 1), "only rows 0 to 2: the same rows in another order (0 holds that of 2)"),
        (right.astype(np.float16).astype(np.float32), "rounded to f16 on the way"),
        (right.astype(bf16).astype(np.float32), "rounded to bf16 on the way"),
        ((right.view(np.uint32) & 0xFFFF0000).view(np.float32), "truncated to bf16 on the way"),
    ):
        assert (explain_weight(found, {}, right) or "").startswith(text), (explain_weight(found, {}, right), text)
    bias = right[0]
    assert (explain_weight(bias[order], {}, bias) or "").startswith("the halves of each head of 32 columns are interl")
    assert explain_weight(right + np.float32(1), {}, right) is None


def test_heads_that_changed_places() -> None:
    values = inputs_of("rope_self_attention", "bf16")
    out = outputs_of("rope_self_attention", values)["out"]
    for order, text in (
        ([1, 0, 2, 3, 4, 5], "heads 0 and 1 are exchanged"),
        ([0, 4, 2, 3, 1, 5], "heads 1 and 4 are exchanged"),
        ([3, 4, 5, 0, 1, 2], "heads 0 to 2 and 3 to 5 are exchanged"),
        ([1, 2, 3, 4, 5, 0], "each head holds the values of the head 1 after it"),
    ):
        assert text in shape_of("rope_self_attention", values, {"out": out[:, order]}), order


def test_keys_one_row_early_are_not_those_of_the_sequence_before() -> None:
    """A text that shares its tokens has the same rows somewhere; the distance says more."""
    rng = np.random.default_rng(0)
    right = rng.standard_normal((12, 2, 8)).astype(np.float32)
    found = right.copy()
    found[7:11] = right[8:12]
    before = right[rng.permutation(12)]
    said = explain_state(right, found, {"the sequence before": before}) or ""
    assert said.endswith("shifted by 1, row t holds the row of t + 1")
    stale = found.copy()
    stale[7:11] = rng.standard_normal((4, 2, 8))
    moved = {"layer 2": np.concatenate([stale[7:11], right])}
    assert "the bits of layer 2, of other rows (7 holds 0)" in (explain_state(right, stale, moved) or "")


def test_a_weight_of_another_layer_is_named() -> None:
    checkpoint = Checkpoint.open("tiny")
    weights = WeightBits(checkpoint, FLOATS["bf16"])
    name, other = (f"model.layers.{i}.self_attn.k_proj.weight" for i in (1, 3))
    right, wrong = (checkpoint.tensor(x).astype(FLOATS["bf16"]) for x in (name, other))
    assert weights.compare(name, "weight", right) is None
    assert (weights.compare(name, "weight", wrong) or "").endswith(f"; has the bits of {other}")
    mixed = right.copy()
    mixed[48:] = right[:48]
    said = weights.compare(name, "weight", mixed) or ""
    assert said.endswith("; from row 48 on: the bits of the rows 48 before them")
    mixed[0, 0] = 9
    assert "; " not in (weights.compare(name, "weight", mixed) or "")

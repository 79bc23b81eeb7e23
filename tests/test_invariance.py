"""Order invariance: the bits of an output element depend on neither threads, nor rows computed together, nor splits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_harness import TIERS, Array, using
from llaisys import ops
from llaisys.reference import FLOATS
from operator_tests import need

THREADS = (1, 2, 3, 4, 8)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65, 127)
split = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def normal(dtype: str, seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, dtype=np.float32).astype(FLOATS[dtype]) for shape in shapes]


def same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


every_tier = pytest.mark.parametrize("tier", TIERS)
every_dtype = pytest.mark.parametrize("dtype", FLOATS)


@every_tier
@every_dtype
def test_linear_of_any_rows_and_features(dtype: str, tier: str) -> None:
    """x[i:j] and weight[i:j] give the rows and columns of the whole product."""
    need(tier)
    for rows, features, columns in [(130, 97, 1100), (33, 50, 31), (70, 61, 2049)]:
        x, weight, bias = normal(dtype, columns, (rows, columns), (features, columns), (features,))
        with using(tier, 1):
            whole = ops.linear(x, weight, bias)
        for n, count in enumerate(c for c in ROWS if c <= rows):
            first = (7 * n) % (rows - count + 1)
            where = f"linear {dtype} {tier} {rows} x {features} x {columns}: {count} from {first}"
            with using(tier, THREADS[n % len(THREADS)]):
                part = slice(first, first + count)
                assert same(ops.linear(x[part], weight, bias), whole[part]), where
                part = slice(n, min(n + count, features))
                some = ops.linear(x, weight[part], bias[part])
                assert same(some, np.ascontiguousarray(whole[:, part])), f"{where} features"


@every_tier
@every_dtype
def test_rows_of_the_others(dtype: str, tier: str) -> None:
    """Operators on rows: any slice, any number of threads, and rows in any order."""
    need(tier)
    x, y, weight = normal(dtype, 1, (131, 515), (131, 515), (515,))
    heads = x[:, :512].reshape(131, 8, 64)
    pos_ids = np.arange(131) * 37
    calls: dict[str, Any] = {
        "add": lambda i: ops.add(x[i], y[i]),
        "swiglu": lambda i: ops.swiglu(x[i], y[i]),
        "rms_norm": lambda i: ops.rms_norm(x[i], weight, 1e-6),
        "add_rms_norm": lambda i: ops.add_rms_norm(x[i], y[i], weight, 1e-6).out,
        "rope": lambda i: ops.rope(heads[i], pos_ids[i], 1e6),
        "argmax": lambda i: ops.argmax(x[i]).value,
    }
    shuffled = np.random.default_rng(2).permutation(131)
    for name, call in calls.items():
        with using(tier, 1):
            whole = call(slice(None))
        for n, rows in enumerate([slice(0, 1), slice(5, 7), slice(130, 131), slice(1, 131), shuffled, slice(None)]):
            for threads in (THREADS[n % 5], THREADS[(n + 2) % 5]):
                with using(tier, threads):
                    assert same(call(rows), whole[rows]), f"{name} {dtype} {tier}: rows {n}, {threads} threads"


@every_tier
@every_dtype
def test_attention_of_any_split(dtype: str, tier: str) -> None:
    """Tokens t0 ... t1 over the first t1 keys: the rows of the whole prompt, for every way to share out the work."""
    need(tier)
    for length, heads, groups, dim in [(300, 6, 2, 64), (265, 7, 1, 80), (257, 4, 4, 34)]:
        q, k, v = normal(dtype, length, (length, heads, dim), (length, groups, dim), (length, groups, dim))
        pos_ids = np.arange(length)
        with using(tier, 1):
            whole = ops.rope_self_attention(q, pos_ids, k, v, 1e4, 0.1)
            assert same(ops.self_attention(ops.rope(q, pos_ids, 1e4), k, v, 0.1), whole)
        splits = [(0, length), (0, 1), (length - 1, length), (127, 130), (100, 256), (255, 257), (128, 129)]
        for n, (first, end) in enumerate([*splits, (length - 5, length), (0, 128), (1, 140)]):
            for threads in THREADS if end - first < 40 else (THREADS[n % 5],):
                with using(tier, threads):
                    part = ops.rope_self_attention(q[first:end], pos_ids[first:end], k[:end], v[:end], 1e4, 0.1)
                    where = f"{dtype} {tier} S {length}: {first} to {end}, {threads} threads"
                    assert same(part, whole[first:end]), where


@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_of_random_splits(dtype: str) -> None:
    length = 280
    q, k, v = normal(dtype, 3, (length, 4, 16), (length, 2, 16), (length, 2, 16))
    whole = ops.self_attention(q, k, v, 0.25)

    @split
    @given(cuts=st.sets(st.integers(1, length - 1), max_size=6), threads=st.sampled_from(THREADS))
    def prompt(cuts: set[int], threads: int) -> None:
        edges = [0, *sorted(cuts), length]
        with using(threads=threads):
            parts = [ops.self_attention(q[a:b], k[:b], v[:b], 0.25) for a, b in pairwise(edges)]
        assert same(np.concatenate(parts), whole), (edges, threads)

    prompt()


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_of_random_shapes(dtype: str) -> None:
    """Also over the shape of the leading axes, and beside other rows."""

    @split
    @given(
        rows=st.integers(1, 140),
        features=st.integers(1, 60),
        columns=st.integers(1, 300),
        cut=st.integers(0, 139),
        threads=st.sampled_from(THREADS),
    )
    def product(rows: int, features: int, columns: int, cut: int, threads: int) -> None:
        x, weight = normal(dtype, rows, (rows, columns), (features, columns))
        with using(threads=1):
            whole = ops.linear(x, weight)
        cut %= rows
        with using(threads=threads):
            assert same(np.concatenate([ops.linear(x[:cut], weight), ops.linear(x[cut:], weight)]), whole)
            assert same(ops.linear(x[:, None], weight)[:, 0], whole)
            assert same(ops.linear(x[cut], weight), whole[cut])

    product()


def test_repeated_calls_have_the_same_bits() -> None:
    """Which thread takes which part is a matter of luck, and must not show."""
    x, weight = normal("bf16", 4, (70, 700), (301, 700))
    with using(threads=8):
        first = ops.linear(x, weight)
        assert all(same(ops.linear(x, weight), first) for _ in range(30))
        q, k = normal("bf16", 5, (1, 14, 64), (700, 2, 64))
        first = ops.self_attention(q, k, k, 0.125)
        assert all(same(ops.self_attention(q, k, k, 0.125), first) for _ in range(30))

"""self_attention: the SPEC's cases, the causal mask, lengths around blocks of keys, and extreme scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernel_harness import Array, run, same_bits, using
from llaisys.reference import FLOATS
from operator_tests import OperatorTests, need

BLOCK = 128  # keys that are walked at a time; the tests hold for any value, but see most with this one


def random_call(dtype: str, tokens: int, length: int, heads: int, groups: int, dim: int) -> dict[str, Any]:
    rng, kind = np.random.default_rng(length), FLOATS[dtype]
    shapes = {"q": (tokens, heads, dim), "k": (length, groups, dim), "v": (length, groups, dim)}
    values = {k: rng.standard_normal(s, dtype=np.float32).astype(kind) for k, s in shapes.items()}
    return {**values, "scale": float(np.float32(dim**-0.5))}


class TestSelfAttention(OperatorTests):
    name = "self_attention"
    # Products of bf16 pairs round the probabilities, to T or on tiles to two parts of it, which the twin does not.
    alike = {"f16": 0.99, "f16-amx": 0.98, "bf16": 0.6}

    @pytest.mark.parametrize("length", [n * BLOCK + i for n in (1, 2, 3) for i in (-1, 0, 1)])
    def test_lengths_around_blocks(self, dtype: str, tier: str, length: int) -> None:
        for tokens in (1, 2, 70):
            values = random_call(dtype, tokens, length, 4, 2, 18)
            self.outcome(dtype, tier, f"T {tokens} S {length}", values)

    @pytest.mark.parametrize("length", [5, BLOCK, BLOCK + 3])
    def test_the_future_does_not_matter(self, dtype: str, tier: str, length: int) -> None:
        """Not one bit of a token depends on what later keys and values hold, NaN and infinities included."""
        need(tier)
        values = random_call(dtype, length, length, 2, 1, 10)
        with using(tier):
            (plain,) = run(self.spec, values, self.where(dtype, tier))
            for seen in sorted({1, 2, 3, 4, length // 2, length - 1}):
                for poison in (np.nan, np.inf, -np.inf):
                    later = {x: values[x].copy() for x in "kv"}
                    later["k"][seen:], later["v"][seen:] = poison, poison
                    (out,) = run(self.spec, {**values, **later}, self.where(dtype, tier))
                    where = self.where(dtype, tier, f"S {length}, {poison} from {seen}")
                    assert same_bits(out[:seen], plain[:seen]), where

    def test_each_head_reads_its_own_group(self, dtype: str, tier: str) -> None:
        """Values that tell the key/value head: query head h gets those of h // (H / K)."""
        for heads, groups in [(6, 2), (6, 3), (4, 4), (7, 1), (14, 2)]:
            for tokens in (1, 40):
                values = random_call(dtype, tokens, 40, heads, groups, 8)
                values["v"][...] = 2.0 ** np.arange(groups)[:, None]
                (out,) = self.outcome(dtype, tier, f"H {heads} K {groups}", values)
                want = 2.0 ** (np.arange(heads) // (heads // groups))
                assert np.allclose(out.astype(np.float32), want[:, None], rtol=1e-2)

    def test_one_key_takes_all(self, dtype: str, tier: str) -> None:
        """A score that is 200 above all others: the value of that key, exactly, wherever it lies."""
        length = 2 * BLOCK + 2
        for place in (0, BLOCK - 1, BLOCK, length - 1):
            for sign in (1, -1):
                values = random_call(dtype, 1, length, 2, 1, 16)
                values["q"][...], values["k"][...], values["scale"] = 1, -sign * 6.25 / 2, float(sign)
                values["k"][place] = sign * 6.25
                (out,) = self.outcome(dtype, tier, f"key {place}", values)
                assert (out == values["v"][place]).all()

    def test_large_scores(self, dtype: str, tier: str) -> None:
        """Scores of 200 and -200, alike for all keys and mixed: the maximum is taken off before the exponential."""
        for tokens, length in [(1, 300), (7, 130)]:
            values = random_call(dtype, tokens, length, 2, 1, 16)
            values["q"][...], values["scale"] = 1, 1.0
            for title, scores in {
                "200": np.full(length, 200.0),
                "-200": np.full(length, -200.0),
                "both": np.where(np.arange(length) % 3 == 0, 200.0, -200.0),
                "rising": np.linspace(-200, 200, length),
                "falling": np.linspace(200, -200, length),
            }.items():
                values["k"][...] = (scores / 16)[:, None, None]
                self.outcome(dtype, tier, f"scores {title}", values)

    def test_scores_of_minus_infinity(self, dtype: str, tier: str) -> None:
        """Keys of -inf weigh nothing, also where they fill whole blocks; if no other is seen, the result is NaN."""
        length = 3 * BLOCK
        for dead in (slice(0, BLOCK), slice(BLOCK, length), slice(5, length - 1), slice(0, length - 1)):
            values = random_call(dtype, 1, length, 2, 1, 8)
            values["q"][...] = 1
            values["k"][dead] = -np.inf
            (out,) = self.outcome(dtype, tier, f"{dead}", values)
            alive = {x: np.delete(values[x], dead, axis=0) for x in "kv"}
            want = self.spec.call(self.spec.twin, {**values, **alive})[0]
            assert np.allclose(out.astype(np.float32), want.astype(np.float32), rtol=1e-2, atol=1e-2)
        values["k"][...] = -np.inf
        (out,) = self.outcome(dtype, tier, "all", values)
        assert np.isnan(out.astype(np.float32)).all()

    def test_ends_of_the_dtype(self, dtype: str, tier: str) -> None:
        """Averages of large numbers are finite (their sum must be one of f32), those of tiny ones are not lost; of bf16
        those that are no subnormals, which its dot products read as zero."""
        info = {"f32": (1e36, 1e-35), "f16": (65504, 6e-8), "bf16": (1e36, 2.0**-126)}[dtype]
        for value in info:
            values = random_call(dtype, 3, 140, 2, 1, 8)
            values["v"][...] = value
            values["q"][...] = 0  # equal weights
            (out,) = self.outcome(dtype, tier, f"values of {value}", values)
            assert np.isfinite(out.astype(np.float32)).all() and (out != 0).all()

    def test_faults_are_noticed(self, dtype: str) -> None:
        def shifted(v: dict[str, Any]) -> dict[str, Array]:
            return {"k": np.roll(v["k"], 1, axis=0)}

        self.must_notice(dtype, lambda v: {"scale": v["scale"] * 1.06})
        self.must_notice(dtype, shifted)
        self.must_notice(dtype, lambda v: {"v": np.roll(v["v"], 1, axis=1)})

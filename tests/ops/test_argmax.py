"""argmax: the SPEC's cases, and the place of ties and NaN relative to vectors and to what a thread takes at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import llaisys
from kernel_harness import invoke
from llaisys.reference import FLOATS
from operator_tests import OperatorTests

SPAN = 16384  # of a row, for one thread; the test holds for any value, but sees most with this one


def staircase(length: int, low: float, high: float, dtype: Any) -> np.ndarray:
    """Row p is `low` before p, and `high` from there on."""
    return np.where(np.arange(length) >= np.arange(length)[:, None], high, low).astype(dtype)


class TestArgmax(OperatorTests):
    name = "argmax"

    @pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 16, 17, 32, 33, 64, 67, 131])
    def test_first_of_many(self, dtype: str, tier: str, length: int) -> None:
        """At each position of the row the first of equal numbers, of infinities, and of NaN."""
        kind = FLOATS[dtype]
        for low, high in [(0, 1), (-2, -1), (-np.inf, -np.inf), (-np.inf, -1e4), (1, np.inf), (np.inf, np.nan)]:
            index, _ = self.outcome(dtype, tier, f"{low} {high}", {"x": staircase(length, low, high, kind)})
            assert low == high or index.tolist() == list(range(length))
        nans = staircase(length, np.inf, np.nan, kind)
        bits = nans.view(f"u{kind.itemsize}")
        bits += np.where(np.isnan(nans.astype(np.float32)), np.arange(length) % 32, 0).astype(bits.dtype)
        self.outcome(dtype, tier, "NaN of many kinds", {"x": nans})
        self.outcome(dtype, tier, "negative NaN", {"x": np.negative(nans)})

    def test_across_spans(self, dtype: str, tier: str) -> None:
        places = [0, SPAN - 1, SPAN, 2 * SPAN - 1, 2 * SPAN, 2 * SPAN + 4]
        for value in (3.0, np.inf, np.nan):
            x = np.zeros((len(places), 2 * SPAN + 5), FLOATS[dtype])
            for row, first in zip(x, range(len(places)), strict=True):
                row[places[first:]] = value
            index, _ = self.outcome(dtype, tier, f"{value} in several spans", {"x": x})
            assert index.tolist() == places
        x[:, 5] = np.inf  # NaN goes before a larger number that is earlier
        index, _ = self.outcome(dtype, tier, "infinity before NaN", {"x": x})
        assert index.tolist() == places

    @pytest.mark.parametrize("shape", [(), (1,)])
    def test_one_axis(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Results of a one-dimensional x may be [] or [1]."""
        x = np.array([1, 3, 2], FLOATS[dtype])
        outputs = {"index": np.zeros(shape, np.int64), "value": np.zeros(shape, x.dtype)}
        assert invoke(self.spec, {**outputs, "x": x})[0] == "OK"
        assert outputs["index"].item() == 1 and outputs["value"].item() == 3
        found = llaisys.ops.argmax(x, out=(outputs["index"], outputs["value"]))
        assert found.index is outputs["index"]
        wrong = {"index": np.zeros((1, 1), np.int64), "value": np.zeros((1, 1), x.dtype)}
        assert invoke(self.spec, {**wrong, "x": x})[0] == "SHAPE"

    def test_faults_are_noticed(self, dtype: str) -> None:
        self.must_notice(dtype, lambda v: {"x": -v["x"]})
        self.must_notice(dtype, lambda v: {"x": np.ascontiguousarray(v["x"][..., ::-1])})

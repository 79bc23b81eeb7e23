"""linear: the SPEC's cases, lengths around those that the kernels cut rows into, and values at the dtypes' ends."""

from __future__ import annotations

import numpy as np
import pytest

from kernel_harness import using
from llaisys import ops
from llaisys.reference import FLOATS
from llaisys.reference.bounds import finfo
from llaisys.reference.numerics import cast, f32
from operator_tests import OperatorTests, need

# Columns are summed in blocks of about 1024 (bf16 where the processor multiplies it: 2048), rows of x taken 4 or 6 (in
# matrix units: 16) at a time; few or some of them meet the weights in memory, many (from 193 on where the processor
# multiplies bf16) packed ones, at most 516 at once.
COLUMNS = (0, 1, 2, 15, 16, 1023, 1024, 1025, 2049)
ROWS = (1, 2, 3, 4, 5, 8, 63, 64, 65, 130)


class TestLinear(OperatorTests):
    name = "linear"
    alike = {"f16": 0.99, "bf16": 0.999}

    @pytest.mark.parametrize("columns", COLUMNS)
    def test_small_integers_are_exact(self, dtype: str, tier: str, columns: int) -> None:
        """All products and partial sums are integers below 2^24, so only the last rounding is one: any order of the
        sum, and any number of rows and features, gives the very bits."""
        kind, rng = FLOATS[dtype], np.random.default_rng(columns)
        x, weight = rng.integers(-9, 10, (max(ROWS), columns)), rng.integers(-9, 10, (67, columns))
        bias = rng.integers(-99, 100, 67)
        want = x @ weight.T
        for rows, features in zip(ROWS, (1, 2, 3, 4, 5, 12, 13, 48, 67, 31), strict=True):
            values = {"x": x[:rows].astype(kind), "weight": weight[:features].astype(kind)}
            for offset in (None, bias[:features]):
                given = {**values, "bias": None if offset is None else offset.astype(kind)}
                (out,) = self.outcome(dtype, tier, f"integers {rows} x {features} x {columns}", given)
                exact = want[:rows, :features] + (0 if offset is None else offset)
                assert out.tobytes() == cast(exact.astype(np.float32), kind).tobytes(), (rows, features, columns)

    @pytest.mark.parametrize("columns", COLUMNS)
    def test_lengths(self, dtype: str, tier: str, columns: int) -> None:
        rng, kind = np.random.default_rng(columns), FLOATS[dtype]
        for rows in (1, 5):
            shapes = {"x": (rows, columns), "weight": (37, columns), "bias": (37,)}
            values = {k: rng.standard_normal(s, dtype=np.float32).astype(kind) for k, s in shapes.items()}
            self.outcome(dtype, tier, f"{rows} x 37 x {columns}", values)

    @pytest.mark.parametrize("columns", (33, 1100, 4099))
    def test_rows_and_features_apart(self, dtype: str, tier: str, columns: int) -> None:
        """Every number of rows takes its own way through the kernels, and gives the bits of a row alone."""
        need(tier)
        rng, kind = np.random.default_rng(columns), FLOATS[dtype]
        shapes = {"x": (517, columns), "weight": (130, columns), "bias": (130,)}
        x, weight, bias = (rng.standard_normal(s, dtype=np.float32).astype(kind) for s in shapes.values())
        with using(tier, 2):
            whole = ops.linear(x, weight, bias)
            for rows in (1, 2, 3, 5, 6, 7, 13, 16, 17, 19, 25, 36, 37, 64, 65, 128, 129, 192, 193, 512, 516):
                first = 517 - rows
                assert ops.linear(x[first:], weight, bias).tobytes() == whole[first:].tobytes(), rows
            for begin, end in ((0, 1), (3, 8), (7, 20), (16, 32), (33, 130), (97, 98)):
                for rows in (1, 17, 200):
                    part = ops.linear(x[:rows], weight[begin:end], bias[begin:end])
                    assert part.tobytes() == whole[:rows, begin:end].tobytes(), (begin, end, rows)

    def test_one_product(self, dtype: str, tier: str) -> None:
        """C = 1: a product of two numbers of 16 bits is exact in f32, so the result is its nearest number. From the
        largest numbers, and beyond to infinity, to the smallest normal ones."""
        kind, rng = FLOATS[dtype], np.random.default_rng(4)
        last = finfo(kind).maxexp
        for low, high in [(-3, 3), (last // 2 - 4, last // 2 + 2), (-(last // 2) - 1, -(last // 2) + 3)]:
            shape = (2, 90, 1)
            x, weight = (rng.standard_normal(shape) * 2.0 ** rng.integers(low, high, shape)).astype(kind)
            (out,) = self.outcome(dtype, tier, f"2^{low} to 2^{high}", {"x": x, "weight": weight, "bias": None})
            with np.errstate(over="ignore", under="ignore"):
                product = f32(x) * f32(weight)[:, 0]
            sure = (np.abs(product) >= float(finfo(kind).smallest_normal)) | (dtype == "f16")
            assert (out == cast(product, kind))[sure].all()

    def test_subnormals(self, dtype: str, tier: str) -> None:
        """Subnormal weights and results are numbers, not zeros (but for bf16 in matrix units, whose bound knows it)."""
        kind = FLOATS[dtype]
        tiny = float(finfo(kind).smallest_subnormal)
        x = np.ones((3, 40), kind)
        weight = (tiny * np.random.default_rng(5).integers(1, 9, (21, 40))).astype(kind)
        (out,) = self.outcome(dtype, tier, "subnormal weights", {"x": x, "weight": weight, "bias": None})
        if tier in ("scalar", "avx2") or dtype != "bf16":
            assert (out.astype(np.float64) == weight.astype(np.float64).sum(axis=1)).all()

    def test_what_overflows(self, dtype: str, tier: str) -> None:
        """Sums beyond the dtype are infinities; partial sums may leave f16 and come back, as they are f32."""
        kind = FLOATS[dtype]
        large = 2.0 ** (15 if dtype == "f16" else 90)  # sums of powers of two are exact
        x = np.full((2, 64), 1, kind)
        x[1, 32:] = -1
        weight = np.full((9, 64), large, kind)
        (out,) = self.outcome(dtype, tier, "large weights", {"x": x, "weight": weight, "bias": None})
        assert (np.isinf(out[0].astype(np.float32)) == (dtype == "f16")).all() and (out[1] == 0).all()

    def test_faults_are_noticed(self, dtype: str) -> None:
        def without_last_column(v: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            weight = v["weight"].copy()
            weight[:, -1:] = 0
            return {"weight": weight}

        self.must_notice(dtype, lambda v: {"bias": None})
        self.must_notice(dtype, without_last_column)
        self.must_notice(dtype, lambda v: {"weight": np.roll(v["weight"], 1, axis=0)})

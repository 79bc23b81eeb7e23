"""rms_norm: the SPEC's cases, and rows whose mean square is near eps, zero or large."""

from __future__ import annotations

import numpy as np

from llaisys.reference import FLOATS
from operator_tests import OperatorTests


class TestRmsNorm(OperatorTests):
    name = "rms_norm"
    alike = {"f32": 0.6, "f16": 0.999, "bf16": 0.9999}

    def test_rows_near_eps(self, dtype: str, tier: str) -> None:
        """Rows of every magnitude from far below sqrt(eps) to far above."""
        kind, rng = FLOATS[dtype], np.random.default_rng(6)
        for eps in (1e-6, 1e-5, 1.0):
            sizes = np.sqrt(eps) * 2.0 ** np.arange(-8, 9)
            for columns in (1, 5, 64, 333):
                x = (sizes[:, None] * rng.standard_normal((len(sizes), columns))).astype(kind)
                weight = rng.standard_normal(columns, dtype=np.float32).astype(kind)
                self.outcome(dtype, tier, f"eps {eps}", {"x": x, "weight": weight, "eps": eps})

    def test_rows_of_one_number(self, dtype: str, tier: str) -> None:
        """With eps 0 a row of one number, a power of two, is 1 or -1 exactly, times the weight."""
        kind = FLOATS[dtype]
        for columns in (1, 7, 8, 9, 64, 100, 1000):
            x = np.array([[2.0], [-0.25], [16.0]]).repeat(columns, axis=1).astype(kind)
            weight = (np.arange(columns) % 13).astype(kind)
            (out,) = self.outcome(dtype, tier, "one number", {"x": x, "weight": weight, "eps": 0.0})
            assert (out == np.array([[1], [-1], [1]]) * weight).all()

    def test_zeros(self, dtype: str, tier: str) -> None:
        """A row of zeros stays one if eps is above 0."""
        zeros = np.zeros((3, 50), FLOATS[dtype])
        (out,) = self.outcome(dtype, tier, "zeros", {"x": zeros, "weight": zeros[0] + 1, "eps": 1e-30})
        assert out.tobytes() == zeros.tobytes()

    def test_faults_are_noticed(self, dtype: str) -> None:
        self.must_notice(dtype, lambda v: {"eps": v["eps"] * 10})
        self.must_notice(dtype, lambda v: {"weight": np.ones_like(v["weight"])})
        self.must_notice(dtype, lambda v: {"weight": np.roll(v["weight"], 1)})

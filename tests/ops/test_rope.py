"""rope: the SPEC's cases, and positions far beyond those of a prompt."""

from __future__ import annotations

import numpy as np
import pytest

from llaisys.reference import FLOATS
from operator_tests import OperatorTests

FAR = (4095, 4096, 4097, 32768, 131071, 10**6, 2**24 - 1, 2**24, 2**24 + 1, 2**31, 2**40 + 1, 2**62)


class TestRope(OperatorTests):
    name = "rope"
    alike = {"f32": 0.99, "f16": 0.999, "bf16": 0.999}

    @pytest.mark.parametrize("theta", [1.0, 1e4, 1e6])
    def test_far_positions(self, dtype: str, tier: str, theta: float) -> None:
        """Also where f32 no longer holds the position, and negative ones. The bound grows with the position until it
        says nothing, so the twin's bits are asked for: both compute the same f32 angle."""
        kind, rng = FLOATS[dtype], np.random.default_rng(7)
        pos_ids = np.array([0, *FAR, *(-n for n in FAR), -1], np.int64)
        for dim in (2, 64, 80):
            x = rng.standard_normal((len(pos_ids), 2, dim), dtype=np.float32).astype(kind)
            values = {"x": x, "pos_ids": pos_ids, "theta": theta}
            (out,) = self.outcome(dtype, tier, f"theta {theta} D {dim}", values)
            assert np.count_nonzero(out == self.spec.call(self.spec.twin, values)[0]) >= 0.99 * out.size

    def test_position_zero_changes_nothing(self, dtype: str, tier: str) -> None:
        x = np.random.default_rng(8).standard_normal((5, 3, 66), dtype=np.float32).astype(FLOATS[dtype])
        values = {"x": x, "pos_ids": np.zeros(5, np.int64), "theta": 1e6}
        assert (self.outcome(dtype, tier, "position 0", values)[0] == x).all()

    def test_halves_are_rotated(self, dtype: str, tier: str) -> None:
        """Element i turns with element i + D/2 and no other: a lone 1 reaches these two."""
        dim = 22
        x = np.zeros((dim, 1, dim), FLOATS[dtype])
        x[np.arange(dim), 0, np.arange(dim)] = 1
        values = {"x": x, "pos_ids": np.full(dim, 3), "theta": 1e4}
        (out,) = self.outcome(dtype, tier, "unit vectors", values)
        reached = [set(np.flatnonzero(row).tolist()) for row in out[:, 0].astype(np.float32)]
        assert reached == [{i, (i + dim // 2) % dim} for i in range(dim)]

    def test_faults_are_noticed(self, dtype: str) -> None:
        self.must_notice(dtype, lambda v: {"pos_ids": v["pos_ids"] + 1})
        self.must_notice(dtype, lambda v: {"pos_ids": -v["pos_ids"]})
        self.must_notice(dtype, lambda v: {"theta": v["theta"] * 1.05})

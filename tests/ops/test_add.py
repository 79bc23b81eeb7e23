"""add: the SPEC's cases, ties of the rounding, and every bit pattern of 16 bits."""

from __future__ import annotations

import numpy as np

from llaisys.reference import FLOATS
from llaisys.reference.bounds import finfo
from operator_tests import OperatorTests


def bit_patterns(dtype: str) -> np.ndarray:
    """All numbers of a 16-bit dtype; as many random ones of f32."""
    kind = FLOATS[dtype]
    if kind.itemsize == 2:
        return np.arange(1 << 16, dtype=np.uint16).view(kind)
    return np.random.default_rng(1).integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(kind)


class TestAdd(OperatorTests):
    name = "add"

    def test_ties(self, dtype: str, tier: str) -> None:
        """Half an ulp, and a little more and less, on even and odd neighbours: to nearest even."""
        kind = FLOATS[dtype]
        ulp = float(finfo(kind).eps)
        a = 1 + ulp * np.arange(64)
        steps = np.array([0.5, 0.5 + ulp, 0.5 - ulp / 2, -0.25, -0.25 - ulp, 0.25, 0.75]) * ulp
        a, b = (x.astype(kind) for x in np.broadcast_arrays(a[:, None], steps))
        self.outcome(dtype, tier, "ties", {"a": a.copy(), "b": b.copy()})
        self.outcome(dtype, tier, "negative ties", {"a": -a, "b": -b})

    def test_every_number(self, dtype: str, tier: str) -> None:
        """With zero, with itself and with a partner in disorder: subnormals, infinities and NaN are among them."""
        a = bit_patterns(dtype)
        for label, b in [("+0", a * 0), ("itself", a), ("another", np.random.default_rng(2).permutation(a))]:
            self.outcome(dtype, tier, label, {"a": a, "b": b.astype(a.dtype)})

    def test_faults_are_noticed(self, dtype: str) -> None:
        self.must_notice(dtype, lambda v: {"b": -v["b"]})
        self.must_notice(dtype, lambda v: {"b": np.roll(v["b"], 1)})

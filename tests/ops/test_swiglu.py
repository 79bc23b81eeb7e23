"""swiglu: the SPEC's cases, gates at the ends of exp, and every bit pattern of 16 bits."""

from __future__ import annotations

import numpy as np

from llaisys.reference import FLOATS
from llaisys.reference.bounds import finfo
from operator_tests import OperatorTests


class TestSwiglu(OperatorTests):
    name = "swiglu"
    alike = {"f32": 0.8, "f16": 0.999, "bf16": 0.999}

    def test_every_gate(self, dtype: str, tier: str) -> None:
        kind = FLOATS[dtype]
        if kind.itemsize == 2:
            gate = np.arange(1 << 16, dtype=np.uint16).view(kind)
        else:
            gate = np.random.default_rng(9).integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(kind)
        for up in (1.0, -3.0, 0.0):
            self.outcome(dtype, tier, f"all gates, up {up}", {"gate": gate, "up": np.full_like(gate, up)})

    def test_large_gates(self, dtype: str, tier: str) -> None:
        """Far above zero the gate itself, far below nothing, never NaN; around -88 and -104 exp runs out of numbers."""
        kind = FLOATS[dtype]
        large = min(float(finfo(kind).max), 1e30)
        gate = np.array([50, 100, 200, large, -200, -1000, -large]).astype(kind)
        (out,) = self.outcome(dtype, tier, "large gates", {"gate": gate, "up": np.ones_like(gate)})
        assert (out[:4] == gate[:4]).all() and (out[4:] == 0).all()
        gate = np.linspace(-110, -80, 4001).astype(kind)
        self.outcome(dtype, tier, "gates around -88", {"gate": gate, "up": np.ones_like(gate)})

    def test_faults_are_noticed(self, dtype: str) -> None:
        self.must_notice(dtype, lambda v: {"gate": v["up"], "up": v["gate"]})
        self.must_notice(dtype, lambda v: {"up": -v["up"]})
        self.must_notice(dtype, lambda v: {"gate": (v["gate"] * 1.02).astype(v["gate"].dtype)})

"""add_rms_norm: the SPEC's cases, and the bits of the two operators that it is made of."""

from __future__ import annotations

import numpy as np

import llaisys
from kernel_harness import cases, run, same_bits, using
from operator_tests import OperatorTests, need


class TestAddRmsNorm(OperatorTests):
    name = "add_rms_norm"
    alike = {"f32": 0.6, "f16": 0.999, "bf16": 0.9999}

    def test_bits_of_add_and_rms_norm(self, dtype: str, tier: str) -> None:
        need(tier)
        with using(tier):
            for case in cases(self.name, dtype):
                a, b, weight, eps = case.values.values()
                total = llaisys.ops.add(a, b)
                out = llaisys.ops.rms_norm(total, weight, eps)
                outputs = run(self.spec, case.values, self.where(dtype, tier, case.label))
                assert all(map(same_bits, outputs, (out, total))), self.where(dtype, tier, case.label)

    def test_faults_are_noticed(self, dtype: str) -> None:
        self.must_notice(dtype, lambda v: {"eps": v["eps"] * 1e4})
        self.must_notice(dtype, lambda v: {"b": -v["b"]})
        self.must_notice(dtype, lambda v: {"weight": np.roll(v["weight"], 1)})

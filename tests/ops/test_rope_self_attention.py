"""rope_self_attention: the SPEC's cases, and the bits of the two operators that it is made of."""

from __future__ import annotations

from typing import Any

import llaisys
from kernel_harness import case_of, cases, run, same_bits, using
from operator_tests import OperatorTests, need


class TestRopeSelfAttention(OperatorTests):
    name = "rope_self_attention"
    # Products of bf16 pairs round the probabilities, to T or on tiles to two parts of it, which the twin does not.
    alike = {"f16": 0.99, "f16-amx": 0.98, "bf16": 0.6}

    def test_bits_of_rope_and_self_attention(self, dtype: str, tier: str) -> None:
        need(tier)
        with using(tier):
            for case in (*cases(self.name, dtype), case_of(self.name, dtype, tuple(self.spec.shared.items()))):
                v: dict[str, Any] = case.values
                rotated = llaisys.ops.rope(v["q"], v["pos_ids"], v["theta"])
                apart = llaisys.ops.self_attention(rotated, v["k"], v["v"], v["scale"])
                (out,) = run(self.spec, v, self.where(dtype, tier, case.label))
                assert same_bits(out, apart), self.where(dtype, tier, case.label)

    def test_far_positions(self, dtype: str, tier: str) -> None:
        """Angles far beyond a prompt; at 2^24 the bound of f32 says little, so the operators apart are asked."""
        values = dict(case_of(self.name, dtype, (("T", 3), ("S", 20), ("H", 4), ("K", 2), ("D", 16))).values)
        for start in (4096, 131072, 2**24 - 1, -5):
            values["pos_ids"] = values["pos_ids"] * 0 + start + [0, 1, 2]
            (out,) = self.outcome(dtype, tier, f"positions from {start}", values)
            with using(tier):
                rotated = llaisys.ops.rope(values["q"], values["pos_ids"], values["theta"])
                apart = llaisys.ops.self_attention(rotated, values["k"], values["v"], values["scale"])
            assert same_bits(out, apart), start

    def test_faults_are_noticed(self, dtype: str) -> None:
        self.must_notice(dtype, lambda v: {"pos_ids": v["pos_ids"] + 1})
        self.must_notice(dtype, lambda v: {"theta": v["theta"] / 2})
        self.must_notice(dtype, lambda v: {"scale": v["scale"] * 1.06})

"""x"""

from __future__ import annotations

from operator_tests import OperatorTests


class TestRopeSelfAttention(OperatorTests):
    name = "rope_self_attention"
    big = {"T": 140, "S": 270, "H": 6, "K": 2, "D": 48}

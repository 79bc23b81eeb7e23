"""x"""

from __future__ import annotations

from operator_tests import OperatorTests


class TestSelfAttention(OperatorTests):
    name = "self_attention"
    big = {"T": 140, "S": 270, "H": 6, "K": 2, "D": 48}

"""x"""

from __future__ import annotations

from operator_tests import OperatorTests


class TestRope(OperatorTests):
    name = "rope"
    big = {"T": 150, "H": 7, "D": 80}

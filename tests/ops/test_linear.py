"""x"""

from __future__ import annotations

from operator_tests import OperatorTests


class TestLinear(OperatorTests):
    name = "linear"
    big = {"...": (70,), "N": 200, "C": 1100}

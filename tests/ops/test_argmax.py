"""x"""

from __future__ import annotations

from operator_tests import OperatorTests


class TestArgmax(OperatorTests):
    name = "argmax"
    big = {"...": (5,), "V": 40001}

"""x"""

from __future__ import annotations

from operator_tests import OperatorTests


class TestAdd(OperatorTests):
    name = "add"
    big = {"...": (7, 9001)}

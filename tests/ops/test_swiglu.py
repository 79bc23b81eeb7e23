"""x"""

from __future__ import annotations

from operator_tests import OperatorTests


class TestSwiglu(OperatorTests):
    name = "swiglu"
    big = {"...": (7, 9001)}

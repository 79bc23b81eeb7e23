"""x"""

from __future__ import annotations

from operator_tests import OperatorTests


class TestRmsNorm(OperatorTests):
    name = "rms_norm"
    big = {"...": (67,), "E": 1030}

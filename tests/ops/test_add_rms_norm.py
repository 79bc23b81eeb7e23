"""x"""

from __future__ import annotations

from operator_tests import OperatorTests


class TestAddRmsNorm(OperatorTests):
    name = "add_rms_norm"
    big = {"...": (67,), "E": 1030}

"""x"""

from __future__ import annotations

from operator_tests import OperatorTests


class TestRearrange(OperatorTests):
    name = "rearrange"
    big = {"...": (67, 3, 513)}

"""x"""

from __future__ import annotations

from operator_tests import OperatorTests


class TestEmbedding(OperatorTests):
    name = "embedding"
    big = {"T": 300, "V": 97, "E": 515}

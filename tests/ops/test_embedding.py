"""embedding: the SPEC's cases, indices that are wrong anywhere, and bits that must survive."""

from __future__ import annotations

import numpy as np
import pytest

import llaisys
from kernel_harness import invoke, same_bits
from llaisys.errors import IndexRangeError
from llaisys.reference import FLOATS
from operator_tests import OperatorTests


class TestEmbedding(OperatorTests):
    name = "embedding"

    @pytest.mark.parametrize("bad", [-1, 7, 8, -(2**63), 2**63 - 1, 2**32, -(2**32) + 1])
    def test_an_index_out_of_range_anywhere(self, bad: int) -> None:
        """Found before anything is written, and named with its position."""
        weight = np.ones((7, 5), np.float32)
        for position in (0, 1, 40):
            index = np.zeros(41, np.int64)
            index[position] = bad
            out = np.full((41, 5), 9, np.float32)
            status, text = invoke(self.spec, {"out": out, "index": index, "weight": weight})
            assert status == "INDEX" and all(s in text for s in ("embedding: index", str(bad), str(position), "6"))
            assert (out == 9).all()
            with pytest.raises(IndexRangeError, match=str(bad)):
                llaisys.ops.embedding(index, weight)

    def test_every_bit_survives(self, dtype: str, tier: str) -> None:
        """Signalling NaN and all else, in rows of any length."""
        rng = np.random.default_rng(3)
        for columns in (1, 3, 8, 31, 1000):
            kind = FLOATS[dtype]
            weight = np.frombuffer(rng.bytes(11 * columns * kind.itemsize), kind).reshape(11, columns)
            index = rng.integers(0, 11, 50)
            (out,) = self.outcome(dtype, tier, f"{columns} columns", {"index": index, "weight": weight})
            assert same_bits(out, weight[index])

    def test_integers_of_other_types(self, dtype: str) -> None:
        weight = np.arange(12).reshape(4, 3).astype(FLOATS[dtype])
        for index in ([3, 0, 3], (3, 0, 3), np.array([3, 0, 3], np.int32), np.array([3, 0, 3], np.uint8)):
            assert same_bits(llaisys.ops.embedding(index, weight), weight[[3, 0, 3]])

    def test_faults_are_noticed(self, dtype: str) -> None:
        self.must_notice(dtype, lambda v: {"index": np.minimum(v["index"] + 1, max(len(v["weight"]) - 1, 0))})
        self.must_notice(dtype, lambda v: {"weight": np.roll(v["weight"], 1, axis=-1)})

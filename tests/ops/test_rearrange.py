"""rearrange: the SPEC's cases in all dtypes, and all orders of four axes on both sides."""

from __future__ import annotations

from itertools import permutations

import numpy as np

from kernel_harness import invoke, using
from operator_tests import OperatorTests, need

SHAPE = (3, 17, 2, 18)


def ordered(order: tuple[int, ...], sign: int, dtype: np.dtype) -> np.ndarray:
    """An array of SHAPE whose axes lie in memory in this order, every other one backwards if `sign` is -1."""
    x = np.zeros([SHAPE[i] for i in order], dtype).transpose(np.argsort(order))
    return x[::sign, :, ::sign] if sign < 0 else x


class TestRearrange(OperatorTests):
    name = "rearrange"

    def test_all_orders_of_axes(self, dtype: str, tier: str) -> None:
        need(tier)
        kind = self.spec.dtypes[dtype]
        values = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)
        numbers = values.view(kind) if kind.itemsize == 2 else values.astype(kind)
        orders = list(permutations(range(4)))
        with using(tier):
            for n, order in enumerate(orders):
                for sign in (1, -1):
                    x, out = ordered(order, 1, kind), ordered(orders[-1 - (7 * n) % 24], sign, kind)
                    x[...] = numbers
                    status, text = invoke(self.spec, {"out": out, "x": x})
                    assert status == "OK" and out.tobytes() == numbers.tobytes(), self.where(dtype, tier, order, text)

    def test_faults_are_noticed(self, dtype: str) -> None:
        self.must_notice(dtype, lambda v: {"x": v["x"][::-1] if v["x"].ndim else v["x"]})

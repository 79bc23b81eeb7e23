"""rope: the SPEC's cases, and positions far beyond those of a prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import llaisys
from llaisys.reference import FLOATS
from operator_tests import OperatorTests

FAR = (4095, 4096, 4097, 32768, 131071, 10**6, 2**24 - 1, 2**24, 2**24 + 1, 2**31, 2**40 + 1, 2**62)


class TestRope(OperatorTests):
    name = "rope"
    alike = {"f32": 0.99, "f16": 0.999, "bf16": 0.999}

    @pytest.mark.parametrize("theta", [1.0, 1e4, 1e6])
    def test_far_positions(self, dtype: str, tier: str, theta: float) -> None:
        """Also where f32 no longer holds the position, and negative ones. The bound grows with the position until it
        says nothing, so the twin's bits are asked for: both compute the same f32 angle."""
        kind, rng = FLOATS[dtype], np.random.default_rng(7)
        pos_ids = np.array([0, *FAR, *(-n for n in FAR), -1], np.int64)
        for dim in (2, 64, 80):
            x = rng.standard_normal((len(pos_ids), 2, dim), dtype=np.float32).astype(kind)
            values = {"x": x, "pos_ids": pos_ids, "theta": theta}
            (out,) = self.outcome(dtype, tier, f"theta {theta} D {dim}", values)
            assert np.count_nonzero(out == self.spec.call(self.spec.twin, values)[0]) >= 0.99 * out.size

    def test_position_zero_changes_nothing(self, dtype: str, tier: str) -> None:
        x = np.random.default_rng(8).standard_normal((5, 3, 66), dtype=np.float32).astype(FLOATS[dtype])
        values = {"x": x, "pos_ids": np.zeros(5, np.int64), "theta": 1e6}
        assert (self.outcome(dtype, tier, "position 0", values)[0] == x).all()

    def test_halves_are_rotated(self, dtype: str, tier: str) -> None:
        """Element i turns with element i + D/2 and no other: a lone 1 reaches these two."""
        dim = 22
        x = np.zeros((dim, 1, dim), FLOATS[dtype])
        x[np.arange(dim), 0, np.arange(dim)] = 1
        values = {"x": x, "pos_ids": np.full(dim, 3), "theta": 1e4}
        (out,) = self.outcome(dtype, tier, "unit vectors", values)
        reached = [set(np.flatnonzero(row).tolist()) for row in out[:, 0].astype(np.float32)]
        assert reached == [{i, (i + dim // 2) % dim} for i in range(dim)]

    def test_the_kept_table_is_that_of_the_call(self, dtype: str, tier: str) -> None:
        """The kernel keeps the cosines of its last call. Whatever may change from one call to the next does: positions
        in the same array, their number, theta, the head dim, and back to what came before."""
        x = np.random.default_rng(9).standard_normal((6, 2, 32), dtype=np.float32).astype(FLOATS[dtype])
        pos_ids = np.arange(6)
        values = {"x": x, "pos_ids": pos_ids, "theta": 1e4}

        def halved(v: dict[str, Any]) -> None:
            v["x"] = x[:, :, :16]

        def fewer(v: dict[str, Any]) -> None:
            v["x"], v["pos_ids"] = v["x"][:3], pos_ids[:3]

        changes: list[Callable[[dict[str, Any]], Any]] = [
            lambda v: None,
            lambda v: pos_ids.__setitem__(slice(None), [5, 4, 3, 2, 1, 100]),
            lambda v: pos_ids.__iadd__(1),
            lambda v: v.update(theta=1e6),
            halved,
            fewer,
            lambda v: v.update(x=x, pos_ids=pos_ids),
        ]
        for n, change in enumerate(changes):
            change(values)
            for again in range(2):
                self.outcome(dtype, tier, f"change {n}, call {again}", values)

    def test_each_thread_keeps_a_table_of_its_own(self) -> None:
        x = np.random.default_rng(10).standard_normal((5, 3, 64), dtype=np.float32)
        wanted = [llaisys.ops.rope(x, np.arange(5) + n, 1e4).tobytes() for n in range(4)]
        wrong: list[int] = []

        def work(n: int) -> None:
            wrong.extend(n for _ in range(200) if llaisys.ops.rope(x, np.arange(5) + n, 1e4).tobytes() != wanted[n])

        workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong

    def test_a_table_of_one_dtype_serves_no_other(self, tier: str) -> None:
        """The cosines are rounded to the dtype: the same positions in another one need others."""
        x, pos_ids = np.random.default_rng(11).standard_normal((4, 2, 64), dtype=np.float32), np.arange(4) + 1000
        for dtype in ("f32", "bf16", "f16", "bf16", "f32"):
            values = {"x": x.astype(FLOATS[dtype]), "pos_ids": pos_ids, "theta": 1e6}
            self.outcome(dtype, tier, "another dtype", values)

    def test_faults_are_noticed(self, dtype: str) -> None:
        self.must_notice(dtype, lambda v: {"pos_ids": v["pos_ids"] + 1})
        self.must_notice(dtype, lambda v: {"pos_ids": -v["pos_ids"]})
        self.must_notice(dtype, lambda v: {"theta": v["theta"] * 1.05})

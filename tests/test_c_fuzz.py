"""Operators called with views that no caller of ours would make.

What is refused writes nothing; what is taken writes the elements of its outputs and not a byte beside them. Built with
sanitizers, as in .ci/run, the library is watched from within as well.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import pytest

import llaisys
from llaisys import DataType, _lib
from llaisys.reference import SPECS
from llaisys.reference.spec import Spec

View = _lib.LlaisysTensor
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

#: Calls of each operator; about half of them are good.
CALLS = 1500
MEMORY = 1 << 15
OK, LAST_REFUSAL = 0, -7
SIZES = (0, 1, 1, 2, 3, 4, 5, 8, 16, 17, 33, 40)
#: Sizes, strides, dtypes and numbers of axes that are wrong nearly everywhere.
WRONG_SIZES = (-1, 0, 7, 2**31, 2**62, 2**63 - 1, -(2**63))
WRONG_STRIDES = (0, -1, 2, -2, 5, 40)
HUGE_STRIDES = (2**40, 2**62, -(2**62), 2**63 - 1, -(2**63))
WRONG_DTYPES = (0, 1, 6, 12, 13, 14, 19, 20, -1, 2**31 - 1, -(2**31))
WRONG_NDIMS = (-1, 0, 9, 2**31 - 1, -(2**31))
SCALARS = (1e-6, 0.125, 1.0, 1e4, 0.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"))


class Caller:
    """Makes the arguments of one operator out of chance and its SPEC."""

    def __init__(self, spec: Spec, seed: int) -> None:
        self.spec = spec
        self.chance = random.Random(f"{spec.name} {seed}")
        self.memory: Bytes = np.empty(MEMORY, np.uint8)
        self.base: int = self.memory.ctypes.data

    def once(self, percent: float) -> bool:
        return self.chance.random() * 100 < percent

    def shapes(self) -> list[list[int]]:
        """A shape for each argument, mostly of sizes that belong together."""
        pick, sizes = self.chance.choice, {}
        leading = [pick((0, 1, 2, 3, 5)) for _ in range(pick((0, 1, 1, 2, 3)))]
        if self.once(80):  # what self_attention and rope ask of their sizes
            heads, tokens = pick((1, 2, 3)), pick((1, 2, 3, 5))
            sizes = {"K": heads, "H": heads * pick((1, 2, 3)), "D": pick((2, 4, 6, 16, 20))}
            sizes |= {"T": tokens, "S": tokens + pick((0, 1, 3, 8))}
        result = []
        for arg in self.spec.args:
            shape: list[int] = []
            for letter in arg.shape.split():
                if letter == "...":
                    shape += leading
                else:
                    shape.append(int(letter) if letter.isdigit() else sizes.setdefault(letter, pick(SIZES)))
            if shape and self.once(2):
                shape[self.chance.randrange(len(shape))] = pick(WRONG_SIZES)
            if self.once(1):
                shape += [1] * (8 - len(shape))
            result.append(shape)
        return result

    def view(self, shape: list[int], dtype: int) -> View | None:
        """A view with some layout, somewhere in the memory; None if it reaches beyond, though not beyond all bounds."""
        pick, ndim = self.chance.choice, len(shape)
        view = View(dtype=dtype, ndim=ndim)
        view.shape[:ndim] = shape
        step, gap = 1, pick((0, 0, 0, 1, 3, 16))
        strides = [0] * ndim
        for axis in reversed(range(ndim)):
            strides[axis] = step
            step = step * max(1, min(shape[axis], 10**6)) + (gap if axis == ndim - 1 else 0)
        if shape and self.once(15):
            strides[self.chance.randrange(ndim)] = pick(WRONG_STRIDES)
        if shape and self.once(1.5):
            strides[self.chance.randrange(ndim)] = pick(HUGE_STRIDES)
        if self.once(5):
            self.chance.shuffle(strides)
        view.strides[:ndim] = strides
        low, high = extent(view)
        if high - low <= MEMORY - 16:
            view.data = self.base - low + self.chance.randint(0, MEMORY - 16 - (high - low))
        elif high - low >= 2**63:
            view.data = self.base
        else:
            return None
        if self.once(0.5):
            view.ndim = pick(WRONG_NDIMS)
        if self.once(0.5):
            view.data = None
        return view

    def arguments(self) -> list[View | None] | None:
        pick, dtype = self.chance.choice, self.chance.choice((DataType.F16, DataType.F32, DataType.BF16))
        views: list[View | None] = []
        for arg, shape in zip(self.spec.args, self.shapes(), strict=True):
            kind = DataType.I64 if arg.dtype == "i64" else dtype
            view = self.view(shape, pick(WRONG_DTYPES) if self.once(2) else kind)
            if view is None:
                return None
            views.append(None if self.once(30 if arg.optional else 0.3) else view)
        if self.once(10):  # share memory
            views[self.chance.randrange(len(views))] = pick(views)
        return views

    def fill(self, views: list[View | None]) -> None:
        """Noise everywhere (NaN and infinities among it), and indices that are often good."""
        self.memory[:] = np.frombuffer(self.chance.randbytes(MEMORY), np.uint8)
        for arg, view in zip(self.spec.args, views, strict=True):
            if arg.dtype == "i64" and view is not None and view.dtype == DataType.I64 and 0 <= view.ndim <= 8:
                most = self.chance.choice((1, 1, 2, 10**6))
                for place in places(view, self.base)[::8]:
                    value = self.chance.randint(-1 if most > 2 else 0, most - 1)
                    self.memory[place : place + 8] = np.frombuffer(value.to_bytes(8, "little", signed=True), np.uint8)


def size_of(view: View) -> int:
    return DataType(view.dtype).itemsize if 0 < view.dtype < 20 else 1


def extent(view: View) -> tuple[int, int]:
    """First byte, and one past the last, counted from `data`; nothing for a tensor without elements."""
    shape, strides = view.shape[: view.ndim], view.strides[: view.ndim]
    if any(size <= 0 for size in shape):
        return 0, 0
    steps = [(size - 1) * stride * size_of(view) for size, stride in zip(shape, strides, strict=True)]
    return sum(step for step in steps if step < 0), sum(step for step in steps if step > 0) + size_of(view)


def places(view: View, base: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where in the memory each byte of each element lies, the bytes of one element one after the other."""
    low, high = extent(view)
    if low == high or high - low > MEMORY or not view.data:
        return np.empty(0, np.int64)
    place = np.asarray(view.data - base)
    for size, stride in zip(view.shape[: view.ndim], view.strides[: view.ndim], strict=True):
        place = place[..., None] + np.arange(size) * (stride * size_of(view) if size > 1 else 0)
    return np.asarray(place.reshape(-1, 1) + np.arange(size_of(view))).reshape(-1)


@pytest.mark.parametrize("name", SPECS)
def test_views_at_random(name: str) -> None:
    spec, library = SPECS[name], _lib.library()
    function = getattr(library, spec.c_name)
    before, threads = llaisys.isa(), llaisys.num_threads()
    statuses: dict[int, int] = {}
    try:
        for tier in llaisys.isas():
            llaisys.set_isa(tier)
            llaisys.set_num_threads(2)
            caller = Caller(spec, seed=1)
            for _ in range(CALLS):
                views = caller.arguments()
                if views is None:
                    continue
                caller.fill(views)
                was = caller.memory.copy()
                scalars = [caller.chance.choice(SCALARS) for _ in spec.scalars]
                status = function(*(None if view is None else ctypes.byref(view) for view in views), *scalars)
                statuses[status] = statuses.get(status, 0) + 1
                changed = was != caller.memory
                if status == OK:
                    for arg, view in zip(spec.args, views, strict=True):
                        if arg.role == "out" and view is not None:
                            changed[places(view, caller.base)] = False
                else:
                    assert status >= LAST_REFUSAL, (status, _lib.last_error())
                    assert _lib.last_error().startswith(f"{name}: ")
                assert not changed.any(), (status, [(v.shape[:8], v.strides[:8], v.dtype) for v in views if v])
    finally:
        llaisys.set_isa(before)
        llaisys.set_num_threads(threads)
    calls = sum(statuses.values())
    assert statuses[OK] > calls // 10 and len(statuses) > 4, statuses

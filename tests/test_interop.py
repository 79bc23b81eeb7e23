"""Addresses of numpy arrays, read from the array object."""

from typing import Any

import numpy as np
import pytest

from llaisys import _interop

ARRAYS = {
    "one axis": np.arange(5),
    "no axis": np.array(3.0),
    "empty": np.zeros((0, 3), np.float32),
    "a part": np.zeros((4, 6), np.int16)[1:, ::-2],
    "eight axes": np.zeros((1, 2) * 4, np.uint8),
    "read-only": np.frombuffer(b"12345678", np.int32),
    "a subclass": np.zeros(4).view(np.recarray),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("view", [_interop.capsule_view, _interop.object_view])
def test_an_array_is_where_numpy_says(name: str, view: Any) -> None:
    array = ARRAYS[name]
    data, _ = array.__array_interface__["data"]
    seen = view(array)
    assert seen.data == data == _interop.address_of(array)
    assert bool(seen.flags & 0x400) == array.flags.writeable
    assert _interop.writable_address_of(array) == (data if array.flags.writeable else None)


def test_the_array_object_is_read_as_numpy_lays_it_out() -> None:
    assert _interop.views_agree()

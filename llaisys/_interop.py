"""What lies under a numpy array: its address, and DLPack capsules, with bf16.

The address: every operator call asks for three or so. `.ctypes.data` takes 0.7 us, the capsule of the array interface
0.35, and a look at the array object 0.1: its first fields are part of numpy's C ABI (PyArrayObject_fields), as every
compiled extension reads them. They are compared with the capsule when this is imported, and left alone if they differ.

DLPack: numpy makes and takes the capsules, and so owns their memory management. It has no bf16 there: it is handed
16-bit integers, and the type code in the capsule is changed on the way.
"""

from __future__ import annotations

import ctypes
import operator
from typing import Any

import numpy as np

from .errors import HandleError

_WRITEABLE = 0x400


class _ArrayInterface(ctypes.Structure):
    """PyArrayInterface of numpy's array interface protocol, version 3."""

    _fields_ = [
        ("two", ctypes.c_int),
        ("nd", ctypes.c_int),
        ("typekind", ctypes.c_char),
        ("itemsize", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
    ]
    owner: object


class _ArrayObject(ctypes.Structure):
    """The array object itself, after what all Python objects begin with."""

    _fields_ = [
        ("object", ctypes.c_char * object.__basicsize__),
        ("data", ctypes.c_void_p),
        ("nd", ctypes.c_int),
        ("dimensions", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("descr", ctypes.c_void_p),
        ("flags", ctypes.c_int),
    ]


_interface = ctypes.pythonapi["PyCapsule_GetPointer"]
_interface.argtypes = (ctypes.py_object, ctypes.c_char_p)
_interface.restype = ctypes.POINTER(_ArrayInterface)


def capsule_view(array: np.ndarray[Any, Any]) -> Any:
    """`data` and `flags` of an array by the array interface protocol."""
    capsule = array.__array_struct__
    view = _interface(capsule, None)[0]
    view.owner = capsule  # which frees what the view reads
    return view


def object_view(array: np.ndarray[Any, Any]) -> Any:
    """`data` and `flags` of an array as its object has them."""
    return _ArrayObject.from_address(id(array))


def views_agree() -> bool:
    """Whether the array object says what the capsule does."""

    def seen(view: Any) -> tuple[int, int, bool]:
        return view.data, view.nd, bool(view.flags & _WRITEABLE)

    part, fixed = np.zeros((2, 3))[1:, ::2], np.zeros(5)
    fixed.flags.writeable = False
    return all(seen(capsule_view(probe)) == seen(object_view(probe)) for probe in (part, fixed))


#: object_view or capsule_view, in two steps: a function of Python's more would cost as much as all the rest.
_view: Any
_key: Any
_view, _key = (_ArrayObject.from_address, id) if views_agree() else (capsule_view, lambda array: array)


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Address of the first element of an array."""
    return _view(_key(array)).data


def writable_address_of(array: np.ndarray[Any, Any]) -> int | None:
    """Address of the first element of an array, None if it is read-only."""
    view = _view(_key(array))
    return view.data if view.flags & _WRITEABLE else None


def checked_address(call: str, name: str, value: int | ctypes.c_void_p | None) -> int:
    """A pointer argument as an int, 0 for NULL. HandleError for what is no address."""
    if isinstance(value, ctypes.c_void_p):
        value = value.value
    if value is None:
        return 0
    try:
        address = operator.index(value)
    except TypeError:
        address = -1
    if not 0 <= address < 2**64:
        raise HandleError(f"{call}: {name}: expected an address, found {value!r}")
    return address


INT_CODE, BF16_CODE = 0, 4
# Bytes before DLTensor.dtype.code: {void *data; {int32 type, id} device; int32 ndim} comes first in a DLTensor, and in
# the versioned struct a DLTensor comes after {uint32 major, minor; void *context; void *deleter; uint64 flags}.
_OFFSET = {b"dltensor": 20, b"dltensor_versioned": 52}

_name = ctypes.pythonapi["PyCapsule_GetName"]
_name.argtypes, _name.restype = (ctypes.py_object,), ctypes.c_char_p
_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_pointer.argtypes, _pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


def _code(capsule: Any) -> ctypes.c_uint8:
    name = _name(capsule)
    if name not in _OFFSET:
        raise BufferError(f"DLPack: expected a fresh capsule, found one named {name!r}")
    return ctypes.c_uint8.from_address(_pointer(capsule, name) + _OFFSET[name])


def retag(capsule: Any, code: int) -> Any:
    """Set the type code of a capsule that nobody has consumed yet."""
    _code(capsule).value = code
    return capsule


def export(array: np.ndarray[Any, Any], options: dict[str, Any]) -> Any:
    """`array.__dlpack__(**options)`, also for a numpy before 2.1, which knows only `stream`."""
    if int(np.__version__.split(".")[0]) > 2 or np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        return array.__dlpack__(**options)
    if options.get("dl_device") not in (None, (1, 0)):
        raise BufferError(f"DLPack: expected the CPU, found device {options['dl_device']}")
    return (array.copy() if options.get("copy") else array).__dlpack__(stream=options.get("stream"))


class _AsIntegers:
    """Passes a producer on to numpy, bf16 as integers; `code` is what the producer said."""

    def __init__(self, source: Any) -> None:
        self.source, self.code = source, INT_CODE

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.source.__dlpack__(**options)
        self.code = _code(capsule).value
        return retag(capsule, INT_CODE) if self.code == BF16_CODE else capsule

    def __dlpack_device__(self) -> Any:
        return self.source.__dlpack_device__()


def importer(source: Any) -> tuple[np.ndarray[Any, Any], int]:
    """The memory of a producer as a numpy array (bf16 as integers), and the producer's type code."""
    passed = _AsIntegers(source)
    return np.from_dlpack(passed), passed.code

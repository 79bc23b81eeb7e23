"""Enums of the C ABI and of the LLAISYS course, and how the element types map to numpy, torch and short names."""

from __future__ import annotations

import enum
import sys
from typing import Any

import ml_dtypes
import numpy as np

from .errors import DTypeError

__all__ = ["DataType", "DeviceType", "MemcpyKind"]


def numpy_name(dtype: np.dtype[Any]) -> str:
    """What messages call a numpy element type: with its byte order ('>f4'), or its name where that says nothing."""
    return dtype.name if dtype.str[1] == "V" else repr(dtype.str)


class DeviceType(enum.IntEnum):
    """Where a tensor lives. Only the CPU is there; NVIDIA is known by name and reports 0 devices."""

    CPU = 0
    NVIDIA = 1


class MemcpyKind(enum.IntEnum):
    """Direction of a copy between host (H) and device (D)."""

    H2H = 0
    H2D = 1
    D2H = 2
    D2D = 3


class DataType(enum.IntEnum):
    """Element types, numbered as in `kernels/llaisys.h`. Operators take F16, F32 and BF16 values and I64 indices."""

    INVALID = 0
    BYTE = 1
    BOOL = 2
    I8 = 3
    I16 = 4
    I32 = 5
    I64 = 6
    U8 = 7
    U16 = 8
    U32 = 9
    U64 = 10
    F8 = 11
    F16 = 12
    F32 = 13
    F64 = 14
    C16 = 15
    C32 = 16
    C64 = 17
    C128 = 18
    BF16 = 19

    @property
    def short(self) -> str:
        """The name used in messages, on the command line and in SPECs: "f32"."""
        return self.name.lower()

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return int(self.numpy.itemsize)

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of the same bytes; F8, C16 and C32, which numpy lacks, are raw bytes (V1, V2, V4)."""
        dtype = _TO_NUMPY.get(self)
        if dtype is None:
            raise DTypeError(f"dtype: expected an element type, found {self.name}")
        return dtype

    @property
    def torch(self) -> Any:
        """The torch dtype. Imports torch. A DTypeError for C16, and for F8, of which torch has several formats."""
        try:
            return torch_dtypes()[self]
        except KeyError:
            raise DTypeError(f"dtype: expected one that torch has, found {self.name}") from None

    @classmethod
    def of_numpy(cls, dtype: np.dtype[Any]) -> DataType | None:
        """The element type of a numpy dtype in native byte order, None for any other."""
        return _FROM_NUMPY.get(dtype)

    @classmethod
    def of_torch(cls, dtype: Any) -> DataType | None:
        """The element type of a torch dtype, None if there is none."""
        return _from_torch().get(dtype)

    @classmethod
    def of_name(cls, name: str) -> DataType:
        """The element type of a short name such as "bf16"."""
        try:
            return cls[name.upper()]
        except KeyError:
            raise DTypeError(f"dtype: expected one of {', '.join(d.short for d in cls if d)}, found {name!r}") from None


_TO_NUMPY: dict[DataType, np.dtype[Any]] = {
    DataType.BYTE: np.dtype(np.uint8),
    DataType.BOOL: np.dtype(np.bool_),
    DataType.I8: np.dtype(np.int8),
    DataType.I16: np.dtype(np.int16),
    DataType.I32: np.dtype(np.int32),
    DataType.I64: np.dtype(np.int64),
    DataType.U8: np.dtype(np.uint8),
    DataType.U16: np.dtype(np.uint16),
    DataType.U32: np.dtype(np.uint32),
    DataType.U64: np.dtype(np.uint64),
    DataType.F8: np.dtype("V1"),
    DataType.F16: np.dtype(np.float16),
    DataType.F32: np.dtype(np.float32),
    DataType.F64: np.dtype(np.float64),
    DataType.C16: np.dtype("V2"),
    DataType.C32: np.dtype("V4"),
    DataType.C64: np.dtype(np.complex64),
    DataType.C128: np.dtype(np.complex128),
    DataType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# uint8 is U8 rather than BYTE, and raw bytes do not say which type they are.
_AMBIGUOUS = {DataType.BYTE, DataType.F8, DataType.C16, DataType.C32}
_FROM_NUMPY = {dtype: data_type for data_type, dtype in _TO_NUMPY.items() if data_type not in _AMBIGUOUS}

#: Integer types that an I64 argument is converted from.
INTEGERS = frozenset(
    {
        DataType.I8,
        DataType.I16,
        DataType.I32,
        DataType.I64,
        DataType.U8,
        DataType.U16,
        DataType.U32,
        DataType.U64,
    }
)

_TORCH_NAMES = {
    DataType.BYTE: "uint8",
    DataType.BOOL: "bool",
    DataType.I8: "int8",
    DataType.I16: "int16",
    DataType.I32: "int32",
    DataType.I64: "int64",
    DataType.U8: "uint8",
    DataType.U16: "uint16",
    DataType.U32: "uint32",
    DataType.U64: "uint64",
    DataType.F16: "float16",
    DataType.F32: "float32",
    DataType.F64: "float64",
    DataType.C32: "complex32",
    DataType.C64: "complex64",
    DataType.C128: "complex128",
    DataType.BF16: "bfloat16",
}
_torch_tables: tuple[dict[DataType, Any], dict[Any, DataType]] | None = None


def _tables() -> tuple[dict[DataType, Any], dict[Any, DataType]]:
    global _torch_tables
    if _torch_tables is None:
        import torch

        # uint16 and wider came with torch 2.3.
        there = {k: getattr(torch, name) for k, name in _TORCH_NAMES.items() if hasattr(torch, name)}
        _torch_tables = there, {v: k for k, v in there.items() if k is not DataType.BYTE}
    return _torch_tables


def torch_dtypes() -> dict[DataType, Any]:
    """DataType -> torch dtype. Imports torch."""
    return _tables()[0]


def _from_torch() -> dict[Any, DataType]:
    return _tables()[1] if "torch" in sys.modules else {}

"""The kinds of arrays that operators take, behind one interface: numpy arrays, CPU torch tensors, llaisys.Tensor.

`ops` asks a kind for three things: a key that stands for everything about an array except its address (calls with equal
keys share one plan), its address, and, when it makes a plan, its layout. Torch is never imported here: a torch tensor
turns up only where somebody else has imported it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ._interop import address_of, writable_address_of
from .dtypes import DataType, numpy_name
from .errors import DTypeError, IndexRangeError, InvalidArgumentError, OutOfMemoryError, StrideError, UnsupportedError
from .tensor import Tensor


@dataclass(frozen=True)
class Layout:
    """Shape, strides in elements (None if they are no whole numbers of elements) and element type of an array."""

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: DataType
    usable: bool = True  # False if the bytes are not yet the values (torch's lazy conj and neg)


class Kind(Protocol):
    """One kind of array. `label` is "operator: argument", the head of every message."""

    name: str

    def key(self, x: Any) -> tuple[Any, ...]: ...
    def layout(self, x: Any, label: str) -> Layout: ...
    def address(self, x: Any) -> int: ...
    def output_address(self, x: Any) -> int: ...
    def empty(self, shape: tuple[int, ...], native: Any) -> Any: ...
    def native(self, dtype: DataType) -> Any: ...
    def compact(self, x: Any) -> Any: ...
    def int64(self, x: Any, label: str) -> Any: ...


def _strides(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> tuple[int, ...] | None:
    """Strides in elements of `unit`; those of axes that are never stepped along become the contiguous ones."""
    result, contiguous, empty = [], 1, 0 in shape
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if empty or size == 1:
            result.append(contiguous)
        elif stride % unit:
            return None
        else:
            result.append(stride // unit)
        contiguous *= size
    return tuple(reversed(result))


class NumpyKind:
    name = "numpy array"
    address = staticmethod(address_of)

    def key(self, x: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        return x.shape, x.strides, x.dtype

    def layout(self, x: np.ndarray[Any, Any], label: str) -> Layout:
        dtype = DataType.of_numpy(x.dtype)
        if dtype is None:
            raise DTypeError(
                f"{label}: expected an element type of llaisys, native byte order, found {numpy_name(x.dtype)}"
            )
        return Layout(x.shape, _strides(x.shape, x.strides, x.dtype.itemsize), dtype)

    def output_address(self, x: np.ndarray[Any, Any]) -> int:
        address = writable_address_of(x)
        if address is None:
            raise InvalidArgumentError("expected a writable array, found a read-only one")
        return address

    def empty(self, shape: tuple[int, ...], native: Any) -> np.ndarray[Any, Any]:
        try:
            return np.empty(shape, native)
        except MemoryError as error:
            raise OutOfMemoryError(str(error)) from None

    def native(self, dtype: DataType) -> np.dtype[Any]:
        return dtype.numpy

    def compact(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.array(x, order="C")

    def int64(self, x: np.ndarray[Any, Any], label: str) -> np.ndarray[Any, Any]:
        if x.dtype == np.uint64 and x.size and int(x.max()) >= 2**63:
            raise IndexRangeError(f"{label}: expected values that fit int64, found {int(x.max())}")
        return x.astype(np.int64)


class TorchKind:
    name = "torch tensor"

    def key(self, x: Any) -> tuple[Any, ...]:
        try:
            # A tensor without strides (sparse) raises here; one of another device must not share a plan.
            return x.shape, x.stride(), x.dtype, x.is_cpu, x.is_neg() or x.is_conj()
        except RuntimeError:
            return x.dtype, x.layout, x.is_nested

    def layout(self, x: Any, label: str) -> Layout:
        if x.device.type != "cpu":
            raise UnsupportedError(f"{label}: expected a tensor on the CPU, found one on {x.device}")
        if str(x.layout) != "torch.strided" or x.is_nested:
            found = "a nested one" if x.is_nested else f"layout {x.layout}"
            raise StrideError(f"{label}: expected a dense tensor, found {found}")
        dtype = DataType.of_torch(x.dtype)
        if dtype is None:
            raise DTypeError(f"{label}: expected an element type of llaisys, found {x.dtype}")
        shape = tuple(x.shape)
        return Layout(shape, _strides(shape, x.stride(), 1), dtype, usable=not (x.is_neg() or x.is_conj()))

    def address(self, x: Any) -> int:
        try:
            return x.data_ptr()
        except RuntimeError:  # inside of torch.func.vmap, for one
            raise UnsupportedError(f"expected tensors with memory, found a torch tensor without: {x!r}") from None

    def output_address(self, x: Any) -> int:
        if x.requires_grad and sys.modules["torch"].is_grad_enabled():
            raise InvalidArgumentError("expected a tensor that needs no gradient, found requires_grad=True")
        return x.data_ptr()

    def written(self, x: Any) -> None:
        """Tell autograd, which then refuses a backward pass that needs what the tensor held before."""
        if not x.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(x)

    def empty(self, shape: tuple[int, ...], native: Any) -> Any:
        return sys.modules["torch"].empty(shape, dtype=native)

    def native(self, dtype: DataType) -> Any:
        return dtype.torch

    def compact(self, x: Any) -> Any:
        torch = sys.modules["torch"]
        return x.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)

    def int64(self, x: Any, label: str) -> Any:
        if x.dtype == DataType.U64.torch:
            return sys.modules["torch"].from_numpy(NUMPY.int64(x.numpy(), label))
        return x.to(sys.modules["torch"].int64)


class TensorKind:
    name = "llaisys.Tensor"

    def key(self, x: Tensor) -> tuple[Any, ...]:
        # The marker keeps DataType, an int, from being compared with dtypes of numpy and torch.
        return Tensor, x.shape(), x.strides(), x.dtype()

    def layout(self, x: Tensor, label: str) -> Layout:
        return Layout(x.shape(), _strides(x.shape(), x.strides(), 1), x.dtype())

    def address(self, x: Tensor) -> int:
        return x.data_ptr()

    def output_address(self, x: Tensor) -> int:
        if x.readonly:
            raise InvalidArgumentError("expected a writable tensor, found a read-only one")
        return x.data_ptr()

    def empty(self, shape: tuple[int, ...], native: Any) -> Tensor:
        return Tensor.empty(shape, native)

    def native(self, dtype: DataType) -> DataType:
        return dtype

    def compact(self, x: Tensor) -> Tensor:
        return x.copy()

    def int64(self, x: Tensor, label: str) -> Tensor:
        return Tensor.from_numpy(NUMPY.int64(x.numpy(), label))


NUMPY = NumpyKind()
TORCH = TorchKind()
_KINDS: dict[type, Kind] = {np.ndarray: NUMPY, Tensor: TensorKind()}


def kind_of(x: Any) -> Kind | None:
    """The kind of `x`, None if it is no array that operators take."""
    kind = _KINDS.get(type(x))
    if kind is None:
        torch = sys.modules.get("torch")
        if isinstance(x, np.ma.MaskedArray):
            return None  # its mask would be ignored
        if isinstance(x, np.ndarray):
            kind = NUMPY
        elif isinstance(x, Tensor):
            kind = _KINDS[Tensor]
        elif torch is not None and isinstance(x, torch.Tensor):
            kind = TORCH
        else:
            return None
        _KINDS[type(x)] = kind
    return kind

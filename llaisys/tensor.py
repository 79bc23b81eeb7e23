"""`Tensor`: a typed, strided view of CPU memory, as the LLAISYS course has it; numpy, torch and DLPack can share it."""

from __future__ import annotations

import ctypes
import math
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ._interop import BF16_CODE, address_of, checked_address, export, importer, retag
from ._lib import MAX_DIMS, LlaisysTensor
from .dtypes import DataType, DeviceType, numpy_name
from .errors import (
    DTypeError,
    HandleError,
    IndexRangeError,
    InvalidArgumentError,
    OutOfMemoryError,
    ShapeError,
    StrideError,
    UnsupportedError,
)

__all__ = ["Tensor"]

_ALIGNMENT = 64
#: Of the widest type in as many bytes as a signed number of 64 bits can count.
_MOST_ELEMENTS = 2**63 // 16 - 1


class _Storage:
    """Memory that tensors share: `nbytes` at `address`, alive as long as `owner` is."""

    __slots__ = ("address", "nbytes", "owner", "readonly")

    def __init__(self, address: int, nbytes: int, owner: Any, readonly: bool = False) -> None:
        self.address, self.nbytes, self.owner, self.readonly = address, nbytes, owner, readonly

    @classmethod
    def allocate(cls, nbytes: int) -> _Storage:
        try:
            owner = np.empty(nbytes + _ALIGNMENT, np.uint8)
        except (MemoryError, ValueError) as error:  # ValueError: more than an address can hold
            raise OutOfMemoryError(f"Tensor: expected {nbytes} bytes of memory, found too little: {error}") from None
        address = address_of(owner)
        return cls(address + -address % _ALIGNMENT, nbytes, owner)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, self.readonly), "shape": (self.nbytes,), "typestr": "|u1", "version": 3}

    def bytes(self) -> np.ndarray[Any, Any]:
        """The memory as uint8; the array keeps this storage alive."""
        return np.asarray(self) if self.nbytes else np.empty(0, np.uint8)


class Tensor:
    """A tensor on the CPU.

    `Tensor(shape, dtype=DataType.F32, device=DeviceType.CPU, device_id=0)` has fresh memory with undefined contents,
    aligned to 64 bytes. `view`, `permute`, `slice`, `numpy`, `torch` and DLPack share memory with the tensor that they
    come from, and keep it alive. Strides are in elements. Only `shape`, `strides` and the like are methods and not
    attributes because the course has them so.
    """

    __slots__ = ("__weakref__", "_address", "_dtype", "_shape", "_storage", "_strides")

    _address: int
    _dtype: DataType
    _shape: tuple[int, ...]
    _storage: _Storage
    _strides: tuple[int, ...]

    def __init__(
        self,
        shape: Iterable[int],
        dtype: DataType = DataType.F32,
        device: DeviceType = DeviceType.CPU,
        device_id: int = 0,
    ) -> None:
        if device != DeviceType.CPU:
            raise UnsupportedError(f"Tensor: device: expected DeviceType.CPU, found {device!r}")
        if device_id != 0:
            raise InvalidArgumentError(f"Tensor: device_id: expected 0, found {device_id!r}")
        try:
            kind = DataType(dtype)
        except ValueError:
            raise DTypeError(f"Tensor: dtype: expected a DataType, found {dtype!r}") from None
        self._allocate(_sizes(shape), kind)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: DataType) -> Tensor:
        """`Tensor(shape, dtype)` for arguments known to be good."""
        return cls.__new__(cls)._allocate(shape, dtype)

    def _allocate(self, shape: tuple[int, ...], dtype: DataType) -> Tensor:
        storage = _Storage.allocate(math.prod(shape) * dtype.itemsize)
        return self._set(storage, storage.address, shape, _contiguous(shape), dtype)

    def _set(
        self, storage: _Storage, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: DataType
    ) -> Tensor:
        self._storage, self._address = storage, address
        self._shape, self._strides, self._dtype = shape, strides, dtype
        return self

    def _share(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Tensor:
        address = self._address + offset * self._dtype.itemsize
        return Tensor.__new__(Tensor)._set(self._storage, address, shape, strides, self._dtype)

    # ------------------------------------------------------------ questions

    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self._shape

    def strides(self) -> tuple[int, ...]:
        """Distance of neighbours along each axis, in elements."""
        return self._strides

    def ndim(self) -> int:
        """Number of axes."""
        return len(self._shape)

    def dtype(self) -> DataType:
        """Element type."""
        return self._dtype

    def device_type(self) -> DeviceType:
        """Always `DeviceType.CPU`."""
        return DeviceType.CPU

    def device_id(self) -> int:
        """Always 0."""
        return 0

    def data_ptr(self) -> int:
        """Address of the first element. Valid as long as this tensor or one that shares its memory lives."""
        return self._address

    @property
    def readonly(self) -> bool:
        """Whether the memory must not be written: a read-only numpy array is below."""
        return self._storage.readonly

    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps (axes of size 1 do not matter)."""
        contiguous = _contiguous(self._shape)
        return 0 in self._shape or all(
            size == 1 or a == b for size, a, b in zip(self._shape, self._strides, contiguous, strict=True)
        )

    def lib_tensor(self) -> LlaisysTensor:
        """The view as the C ABI takes it; it keeps the memory alive."""
        view = LlaisysTensor(data=self._address, dtype=self._dtype, ndim=len(self._shape))
        view.shape[: len(self._shape)] = self._shape
        view.strides[: len(self._shape)] = self._strides
        view.storage = self._storage
        return view

    def __repr__(self) -> str:
        values = "" if self._dtype in _OPAQUE else "\n" + np.array2string(self.numpy(), threshold=64, edgeitems=3)
        layout = "" if self.is_contiguous() else f", strides={self._strides}"
        return f"llaisys.Tensor(shape={self._shape}, dtype={self._dtype.name}, device=CPU{layout}){values}"

    def debug(self) -> None:
        """Print shape, strides, dtype and all values."""
        print(f"Tensor: shape={self._shape} strides={self._strides} dtype={self._dtype.short}")
        print(np.array2string(self.numpy(), threshold=sys.maxsize), flush=True)

    # ---------------------------------------------------------------- views

    def view(self, *shape: int | Sequence[int]) -> Tensor:
        """The same elements in the same order under another shape, without a copy; one size may be -1.

        ShapeError if the number of elements differs, StrideError if the strides do not allow it.
        """
        sizes = _infer(_integers("view", _unpack(shape)), math.prod(self._shape), self._shape)
        strides = _view_strides(self._shape, self._strides, sizes)
        if strides is None:
            raise StrideError(
                f"Tensor.view: expected strides that allow {sizes} without a copy (see contiguous()), "
                f"found shape {self._shape} with strides {self._strides}"
            )
        return self._share(sizes, strides)

    def permute(self, *order: int | Sequence[int]) -> Tensor:
        """The axes in another order, without a copy: axis i of the result is axis order[i] of this tensor."""
        axes = [self._axis(axis, "permute") for axis in _unpack(order)]
        if sorted(axes) != list(range(len(self._shape))):
            raise InvalidArgumentError(
                f"Tensor.permute: order: expected each of {len(self._shape)} axes once, found {tuple(axes)}"
            )
        return self._share(tuple(self._shape[a] for a in axes), tuple(self._strides[a] for a in axes))

    def slice(self, dim: int, start: int, end: int) -> Tensor:
        """The elements start ... end - 1 of axis `dim`, without a copy."""
        axis, size = self._axis(dim, "slice"), self._shape
        first, last = _integers("slice", (start, end))
        if not 0 <= first <= last <= size[axis]:
            raise IndexRangeError(
                f"Tensor.slice: start and end: expected 0 <= start <= end <= {size[axis]} (axis {axis} of {size}), "
                f"found {start} and {end}"
            )
        shape = (*size[:axis], last - first, *size[axis + 1 :])
        return self._share(shape, self._strides, first * self._strides[axis] if 0 not in shape else 0)

    def _axis(self, axis: int, method: str) -> int:
        (index,), ndim = _integers(method, (axis,)), len(self._shape)
        if not -ndim <= index < ndim:
            raise IndexRangeError(f"Tensor.{method}: expected an axis of a tensor with {ndim} axes, found {axis}")
        return index % ndim

    # --------------------------------------------------------------- copies

    def load(self, ptr: int | ctypes.c_void_p | None) -> None:
        """Fill the tensor with its number of elements from `ptr`, where they lie in row-major order without gaps."""
        address = checked_address("Tensor.load", "ptr", ptr)
        nbytes = math.prod(self._shape) * self._dtype.itemsize
        if not nbytes:
            return
        if not address:
            raise HandleError(f"Tensor.load: ptr: expected the address of {nbytes} bytes, found NULL")
        if self.readonly:
            raise InvalidArgumentError("Tensor.load: expected a writable tensor, found a read-only one")
        if self.is_contiguous():
            ctypes.memmove(self._address, address, nbytes)
        else:
            source = _Storage(address, nbytes, None).bytes()
            self.numpy()[...] = source.view(self._dtype.numpy).reshape(self._shape)

    def copy(self) -> Tensor:
        """A contiguous tensor of its own with the same elements."""
        result = Tensor(self._shape, self._dtype)
        result.numpy()[...] = self.numpy()
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and the module copy take the elements, not the memory that they happen to lie in."""
        return _unpickle, (self._shape, self._dtype, self.numpy().tobytes())

    def contiguous(self) -> Tensor:
        """This tensor if it is contiguous, else a copy that is."""
        return self if self.is_contiguous() else self.copy()

    # -------------------------------------------------------------- interop

    def numpy(self) -> np.ndarray[Any, Any]:
        """The tensor as a numpy array over the same memory; bf16 by ml_dtypes, F8, C16 and C32 as raw bytes."""
        dtype = self._dtype.numpy
        if 0 in self._shape:
            return np.empty(self._shape, dtype)
        strides = [stride * dtype.itemsize for stride in self._strides]
        offset = self._address - self._storage.address
        memory = self._storage.bytes()
        array: np.ndarray[Any, Any] = np.ndarray(self._shape, dtype, buffer=memory, offset=offset, strides=strides)
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.numpy()
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"Tensor: expected {array.dtype}, found a request for {dtype} without a copy")
            return np.asarray(array.astype(dtype))
        return array.copy() if copy else array

    def torch(self) -> Any:
        """The tensor as a torch tensor over the same memory. Imports torch.

        InvalidArgumentError if it is read-only, StrideError if a stride is negative, DTypeError for F8 and C16: torch
        has no such tensors.
        """
        dtype = self._dtype.torch
        import torch

        if self.readonly:
            raise InvalidArgumentError("Tensor.torch: expected a writable tensor, found a read-only one; see copy()")
        if any(stride < 0 for stride in self._strides):
            raise StrideError(f"Tensor.torch: expected no negative stride, found {self._strides}; see copy()")
        # torch.from_numpy knows no bf16 and no complex32.
        carrier = {DataType.BF16: np.int16, DataType.C32: np.int32}.get(self._dtype)
        array = self.numpy()
        return torch.from_numpy(array if carrier is None else array.view(carrier)).view(dtype)

    @classmethod
    def from_numpy(cls, array: np.ndarray[Any, Any]) -> Tensor:
        """A tensor over the memory of `array`, which it keeps alive; read-only if the array is."""
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            # The mask would be lost.
            raise InvalidArgumentError(f"Tensor.from_numpy: expected a numpy array, found {type(array).__name__}")
        dtype = DataType.of_numpy(array.dtype)
        if dtype is None:
            found = numpy_name(array.dtype)
            raise DTypeError(
                f"Tensor.from_numpy: expected an element type of llaisys, native byte order, found {found}"
            )
        unit = array.dtype.itemsize
        if any(stride % unit for stride in array.strides):
            raise StrideError(f"Tensor.from_numpy: expected strides of whole elements, found {array.strides} bytes")
        shape, strides = _sizes(array.shape), tuple(stride // unit for stride in array.strides)
        return cls._over(array, address_of(array), shape, strides, dtype, not array.flags.writeable)

    @classmethod
    def from_torch(cls, tensor: Any) -> Tensor:
        """A tensor over the memory of a dense CPU torch tensor, which it keeps alive; gradients are not followed."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(tensor, torch.Tensor):
            raise InvalidArgumentError(f"Tensor.from_torch: expected a torch tensor, found {type(tensor).__name__}")
        if tensor.device.type != "cpu":
            raise UnsupportedError(f"Tensor.from_torch: expected a tensor on the CPU, found one on {tensor.device}")
        dtype = DataType.of_torch(tensor.dtype)
        if dtype is None:
            raise DTypeError(f"Tensor.from_torch: expected an element type of llaisys, found {tensor.dtype}")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_conj() or tensor.is_neg():
            lazy = "lazy conj" if tensor.is_conj() else "lazy neg" if tensor.is_neg() else ""
            found = "a nested one" if tensor.is_nested else lazy or f"layout {tensor.layout}"
            raise StrideError(f"Tensor.from_torch: expected a dense tensor without lazy conj or neg, found {found}")
        alive = tensor.detach()
        try:
            address = alive.data_ptr() or (0 if not alive.numel() else None)
        except RuntimeError:
            address = None
        if address is None:  # one of torch's inner kinds: fake, inside of vmap, ...
            raise UnsupportedError(f"Tensor.from_torch: expected a tensor with memory, found {type(tensor).__name__}")
        return cls._over(alive, address, _sizes(alive.shape), tuple(alive.stride()), dtype, False)

    @classmethod
    def _over(
        cls, owner: Any, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: DataType, readonly: bool
    ) -> Tensor:
        steps = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)] if 0 not in shape else []
        low = sum(step for step in steps if step < 0)
        count = sum(map(abs, steps)) + 1 if 0 not in shape else 0
        storage = _Storage(address + low * dtype.itemsize, count * dtype.itemsize, owner, readonly)
        return cls.__new__(cls)._set(storage, address, shape, strides, dtype)

    def __dlpack__(self, **options: Any) -> Any:
        """A DLPack capsule over the same memory, by the options of the array API standard."""
        if self._dtype in _OPAQUE:
            raise BufferError(f"Tensor: expected a dtype that DLPack has, found {self._dtype.name}")
        if self._dtype is DataType.BF16:
            # numpy has no bf16 in DLPack: let it make a capsule of integers, and say in there what they are.
            return retag(export(self.numpy().view(np.int16), options), BF16_CODE)
        return export(self.numpy(), options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """(1, 0): the CPU."""
        return 1, 0

    @classmethod
    def from_dlpack(cls, source: Any) -> Tensor:
        """A tensor over the memory of an object with `__dlpack__` on the CPU, bf16 among the dtypes.

        It is read-only if the producer says so, or, with a numpy before 2.1, always.
        """
        if isinstance(source, Tensor):
            return source
        if isinstance(source, np.ndarray):
            return cls.from_numpy(source)
        if not hasattr(source, "__dlpack__"):
            raise InvalidArgumentError(
                f"Tensor.from_dlpack: expected an object with __dlpack__, found {type(source).__name__}"
            )
        array, code = importer(source)
        tensor = cls.from_numpy(array)
        if code == BF16_CODE:  # the array is one of 16-bit integers
            tensor._dtype = DataType.BF16
        return tensor


_OPAQUE = frozenset({DataType.F8, DataType.C16, DataType.C32})


def _unpickle(shape: tuple[int, ...], dtype: DataType, data: bytes) -> Tensor:
    tensor = Tensor.empty(shape, dtype)
    ctypes.memmove(tensor.data_ptr(), data, len(data))
    return tensor


def _sizes(shape: Iterable[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise ShapeError(f"Tensor: shape: expected a sequence of integers, found {shape!r}") from None
    if len(sizes) > MAX_DIMS:
        raise ShapeError(f"Tensor: shape: expected at most {MAX_DIMS} axes, found {len(sizes)} in {sizes}")
    if any(size < 0 for size in sizes):
        raise ShapeError(f"Tensor: shape: expected no negative size, found {sizes}")
    if 0 in sizes and math.prod(size or 1 for size in sizes) > _MOST_ELEMENTS:  # else, memory sets the limit
        raise ShapeError(f"Tensor: shape: expected strides of at most {_MOST_ELEMENTS} elements, found {sizes}")
    return sizes


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _unpack(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """`f(2, 3)` and `f((2, 3))` mean the same."""
    return tuple(values[0]) if len(values) == 1 and isinstance(values[0], Iterable) else values


def _integers(method: str, values: tuple[Any, ...]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise InvalidArgumentError(f"Tensor.{method}: expected integers, found {values!r}") from None


def _infer(sizes: tuple[int, ...], count: int, old: tuple[int, ...]) -> tuple[int, ...]:
    """Replace the one -1 of a new shape for `count` elements, and check that they fit."""
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        if rest > 0 and count % rest == 0:
            sizes = tuple(count // rest if size == -1 else size for size in sizes)
    if any(size < 0 for size in sizes) or math.prod(sizes) != count:
        raise ShapeError(f"Tensor.view: expected a shape of {count} elements (of {old}), found {sizes}")
    return _sizes(sizes)


def _view_strides(shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides that show the elements in the same order under the shape `new`, None if there are none."""
    if 0 in new:
        return _contiguous(new)
    # Old axes that lie in memory like one long axis are merged into blocks, last one first; each new axis must be made
    # of one block.
    blocks: list[tuple[int, int]] = []
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if blocks and stride == blocks[-1][0] * blocks[-1][1]:
            blocks[-1] = blocks[-1][0] * size, blocks[-1][1]
        else:
            blocks.append((size, stride))
    result: list[int] = []
    left, stride = blocks.pop(0) if blocks else (1, 1)
    for size in reversed(new):
        if size > 1 and left == 1 and blocks:
            left, stride = blocks.pop(0)
        if left % size:
            return None
        result.append(stride)
        left, stride = left // size, stride * size
    return tuple(reversed(result))

"""`RuntimeAPI`: memory, copies and streams of a device, as the LLAISYS course has them."""

from __future__ import annotations

import ctypes
import operator
import threading
from typing import Any

import numpy as np

from ._interop import address_of, checked_address
from .dtypes import DeviceType, MemcpyKind
from .errors import HandleError, InvalidArgumentError, OutOfMemoryError, UnsupportedError

__all__ = ["RuntimeAPI", "Stream"]

_ALIGNMENT = 64
_lock = threading.Lock()
#: Blocks that are allocated: address -> (kind, bytes, owner of the memory).
_blocks: dict[int, tuple[str, int, Any]] = {}


class Stream:
    """An order of work on a device. On the CPU all work is done at once, so a stream is only a name, valid or not."""

    __slots__ = ("alive", "device")

    def __init__(self, device: DeviceType) -> None:
        self.device, self.alive = device, True

    def __repr__(self) -> str:
        return f"llaisys.Stream({self.device.name}{'' if self.alive else ', destroyed'})"


class RuntimeAPI:
    """Memory, copies and streams of one device type.

    The CPU is one device. NVIDIA reports 0 devices, and everything else asked of it is an `UnsupportedError`. Addresses
    are ints (or ctypes.c_void_p); blocks are common to all instances, and must be freed by the call that fits the one
    that made them: anything else is a `HandleError`.
    """

    def __init__(self, device: DeviceType = DeviceType.CPU) -> None:
        try:
            self._device = DeviceType(device)
        except ValueError:
            raise InvalidArgumentError(f"RuntimeAPI: device: expected a DeviceType, found {device!r}") from None

    def __repr__(self) -> str:
        return f"llaisys.RuntimeAPI({self._device.name})"

    def _require(self, call: str) -> None:
        if self._device is not DeviceType.CPU:
            raise UnsupportedError(f"{call}: expected the CPU, found {self._device.name}, of which there are 0 devices")

    # -------------------------------------------------------------- devices

    def get_device_count(self) -> int:
        """1 for the CPU, 0 for NVIDIA."""
        return 1 if self._device is DeviceType.CPU else 0

    def set_device(self, device_id: int) -> None:
        """Choose a device of the type; the CPU is number 0."""
        self._require("set_device")
        if device_id != 0:
            raise InvalidArgumentError(f"set_device: device_id: expected 0, found {device_id!r}")

    def device_synchronize(self) -> None:
        """Wait for the device: nothing to do on the CPU."""
        self._require("device_synchronize")

    # -------------------------------------------------------------- streams

    def create_stream(self) -> Stream:
        """A new stream; end it with `destroy_stream`."""
        self._require("create_stream")
        return Stream(self._device)

    def destroy_stream(self, stream: Stream) -> None:
        """End a stream. HandleError if it is none, or ended before."""
        self._require("destroy_stream")
        self._stream("destroy_stream", stream).alive = False

    def stream_synchronize(self, stream: Stream | None) -> None:
        """Wait for the work on a stream (None: the default stream): nothing to do on the CPU."""
        self._require("stream_synchronize")
        self._stream("stream_synchronize", stream)

    def _stream(self, call: str, stream: Stream | None) -> Stream:
        if stream is None and call != "destroy_stream":
            return Stream(self._device)
        if not isinstance(stream, Stream) or not stream.alive:
            raise HandleError(f"{call}: stream: expected a living stream, found {stream!r}")
        return stream

    # --------------------------------------------------------------- memory

    def malloc_device(self, size: int) -> int:
        """Address of `size` fresh bytes on the device, aligned to 64; free them with `free_device`."""
        return self._malloc("malloc_device", size)

    def free_device(self, ptr: int | ctypes.c_void_p | None) -> None:
        """Free a block of `malloc_device`; NULL is ignored. HandleError if it is none, or freed before."""
        self._free("free_device", "malloc_device", ptr)

    def malloc_host(self, size: int) -> int:
        """Address of `size` fresh bytes on the host, aligned to 64; free them with `free_host`."""
        return self._malloc("malloc_host", size)

    def free_host(self, ptr: int | ctypes.c_void_p | None) -> None:
        """Free a block of `malloc_host`; NULL is ignored. HandleError if it is none, or freed before."""
        self._free("free_host", "malloc_host", ptr)

    def _malloc(self, call: str, size: int) -> int:
        self._require(call)
        count = _count(call, "size", size)
        try:
            owner = np.empty(count + _ALIGNMENT, np.uint8)
        except (MemoryError, ValueError) as error:  # ValueError: more than an address can hold
            raise OutOfMemoryError(f"{call}: expected {count} bytes of memory, found too little: {error}") from None
        address = address_of(owner)
        address += -address % _ALIGNMENT
        with _lock:
            _blocks[address] = call, count, owner
        return address

    def _free(self, call: str, made_by: str, ptr: int | ctypes.c_void_p | None) -> None:
        self._require(call)
        address = checked_address(call, "ptr", ptr)
        if not address:
            return
        with _lock:
            maker = _blocks[address][0] if address in _blocks else None
            if maker == made_by:
                del _blocks[address]
                return
        found = f"one of {maker}" if maker else "one that was never allocated or was freed before"
        raise HandleError(f"{call}: ptr: expected a block of {made_by}, found {found}: {address:#x}")

    # --------------------------------------------------------------- copies

    def memcpy_sync(
        self, dst: int | ctypes.c_void_p | None, src: int | ctypes.c_void_p | None, size: int, kind: MemcpyKind
    ) -> None:
        """Copy `size` bytes, which may overlap. The direction must be a MemcpyKind; on the CPU all are alike.

        HandleError for NULL; InvalidArgumentError if a block of this runtime ends before `size` bytes do. Other
        addresses are the caller's to answer for.
        """
        self._copy("memcpy_sync", dst, src, size, kind)

    def memcpy_async(
        self,
        dst: int | ctypes.c_void_p | None,
        src: int | ctypes.c_void_p | None,
        size: int,
        kind: MemcpyKind,
        stream: Stream | None,
    ) -> None:
        """`memcpy_sync` in the order of a stream; done on return, as everything on the CPU."""
        self._require("memcpy_async")
        self._stream("memcpy_async", stream)
        self._copy("memcpy_async", dst, src, size, kind)

    def _copy(self, call: str, dst: Any, src: Any, size: int, kind: MemcpyKind) -> None:
        self._require(call)
        try:
            MemcpyKind(kind)
        except ValueError:
            raise InvalidArgumentError(f"{call}: kind: expected a MemcpyKind, found {kind!r}") from None
        count = _count(call, "bytes", size)
        addresses = {"dst": checked_address(call, "dst", dst), "src": checked_address(call, "src", src)}
        if not count:
            return
        for name, address in addresses.items():
            if not address:
                raise HandleError(f"{call}: {name}: expected the address of {count} bytes, found NULL")
            left = _bytes_left(address)
            if left is not None and left < count:
                raise InvalidArgumentError(f"{call}: {name}: expected {count} bytes, found a block with {left} left")
        ctypes.memmove(addresses["dst"], addresses["src"], count)


def _bytes_left(address: int) -> int | None:
    """Bytes from `address` to the end of the block that it lies in, None if it lies in none."""
    with _lock:
        for start, (_, size, _) in _blocks.items():
            if start <= address < start + max(size, 1):
                return start + size - address
    return None


def _count(call: str, name: str, value: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if count < 0:
        raise InvalidArgumentError(f"{call}: {name}: expected a number of bytes, found {value!r}")
    return count

"""`RuntimeAPI`: the course's calls, and what is refused."""

import ctypes
import threading
from typing import Any

import numpy as np
import pytest

import llaisys
from llaisys import DeviceType, MemcpyKind, RuntimeAPI, errors


def test_the_round_trip_of_the_course() -> None:
    api = RuntimeAPI(DeviceType.CPU)
    size = 1 << 20
    assert api.get_device_count() == 1
    api.set_device(0)
    a, b = np.zeros(size, np.uint8), np.ones(size, np.uint8)
    device_a, device_b = api.malloc_device(size), api.malloc_device(size)
    api.memcpy_sync(device_a, a.ctypes.data, size, MemcpyKind.H2D)
    api.memcpy_sync(device_b, device_a, size, MemcpyKind.D2D)
    api.memcpy_sync(b.ctypes.data, device_b, size, MemcpyKind.D2H)
    assert np.array_equal(a, b)
    host = api.malloc_host(size)
    stream = api.create_stream()
    api.memcpy_async(host, device_b, size, MemcpyKind.D2H, stream)
    api.memcpy_async(ctypes.c_void_p(b.ctypes.data), ctypes.c_void_p(host), size, MemcpyKind(0), None)
    api.stream_synchronize(stream)
    api.stream_synchronize(None)
    api.device_synchronize()
    api.destroy_stream(stream)
    assert not b.any() and "destroyed" in repr(stream) and isinstance(stream, llaisys.Stream)
    api.free_host(host)
    api.free_device(device_a)
    RuntimeAPI(DeviceType.CPU).free_device(device_b)


def test_nvidia_has_no_devices() -> None:
    api = RuntimeAPI(DeviceType.NVIDIA)
    assert api.get_device_count() == 0
    for call in (
        lambda: api.set_device(0),
        lambda: api.malloc_device(1),
        lambda: api.malloc_host(1),
        lambda: api.free_host(0),
        lambda: api.create_stream(),
        lambda: api.device_synchronize(),
        lambda: api.memcpy_sync(0, 0, 0, MemcpyKind.H2H),
        lambda: api.memcpy_async(0, 0, 0, MemcpyKind.H2H, None),
    ):
        with pytest.raises(errors.UnsupportedError, match="NVIDIA"):
            call()


def test_what_may_be_freed() -> None:
    api: Any = RuntimeAPI()
    device, host = api.malloc_device(8), api.malloc_host(8)
    for call, wrong, said in (
        (api.free_device, host, "malloc_host"),
        (api.free_host, device, "malloc_device"),
        (api.free_device, device + 1, "never allocated"),
        (api.free_device, 12345, "never allocated"),
        (api.free_device, -1, "address"),
        (api.free_device, "x", "address"),
    ):
        with pytest.raises(errors.HandleError, match=said):
            call(wrong)
    api.free_device(ctypes.c_void_p(device))
    api.free_host(host)
    for call, freed in ((api.free_device, device), (api.free_host, host)):
        with pytest.raises(errors.HandleError, match="freed before"):
            call(freed)
    api.free_device(0)
    api.free_host(None)


def test_allocations() -> None:
    api = RuntimeAPI()
    blocks = [api.malloc_device(0) for _ in range(10)] + [api.malloc_host(n) for n in range(10)]
    assert len(set(blocks)) == 20 and all(b % 64 == 0 for b in blocks)
    for block in blocks[:10]:
        api.free_device(block)
    for block in blocks[10:]:
        api.free_host(block)
    for wrong in (-1, 1.5, "8", None):
        with pytest.raises(errors.InvalidArgumentError, match="malloc_device: size"):
            api.malloc_device(wrong)  # type: ignore[arg-type]
    for huge in (2**62, 2**80):
        with pytest.raises(errors.OutOfMemoryError, match="malloc_device"):
            api.malloc_device(huge)


def test_copies_are_checked_as_far_as_can_be() -> None:
    api = RuntimeAPI()
    block = api.malloc_device(16)
    data = np.arange(32, dtype=np.uint8)
    api.memcpy_sync(block, data.ctypes.data, 16, MemcpyKind.H2D)
    api.memcpy_sync(block + 4, block, 12, MemcpyKind.D2D)
    out = np.zeros(16, np.uint8)
    api.memcpy_sync(out.ctypes.data, block, 16, MemcpyKind.D2H)
    assert out.tolist() == [0, 1, 2, 3, *range(12)]
    for dst, src, size, kind, error in (
        (block, data.ctypes.data, 17, MemcpyKind.H2D, errors.InvalidArgumentError),
        (block + 1, data.ctypes.data, 16, MemcpyKind.H2D, errors.InvalidArgumentError),
        (data.ctypes.data, block + 15, 2, MemcpyKind.D2H, errors.InvalidArgumentError),
        (0, block, 1, MemcpyKind.D2H, errors.HandleError),
        (block, None, 1, MemcpyKind.H2D, errors.HandleError),
        (block, 2**64, 1, MemcpyKind.H2D, errors.HandleError),
        (block, data.ctypes.data, -1, MemcpyKind.H2D, errors.InvalidArgumentError),
        (block, data.ctypes.data, 1, 4, errors.InvalidArgumentError),
    ):
        with pytest.raises(error, match=r"memcpy_sync: .*expected .*found"):
            api.memcpy_sync(dst, src, size, kind)  # type: ignore[arg-type]
    api.memcpy_sync(0, 0, 0, MemcpyKind.H2H)
    api.free_device(block)


def test_streams_and_devices_are_checked() -> None:
    api = RuntimeAPI()
    stream = api.create_stream()
    api.destroy_stream(stream)
    for call in (api.destroy_stream, api.stream_synchronize):
        with pytest.raises(errors.HandleError, match="stream"):
            call(stream)
    with pytest.raises(errors.HandleError, match="stream"):
        api.memcpy_async(0, 0, 0, MemcpyKind.H2H, stream)
    with pytest.raises(errors.HandleError, match="stream"):
        api.destroy_stream(None)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgumentError, match="set_device"):
        api.set_device(1)
    with pytest.raises(errors.InvalidArgumentError, match="device"):
        RuntimeAPI(7)  # type: ignore[arg-type]


def test_threads_allocate_at_once() -> None:
    api = RuntimeAPI()

    def work() -> None:
        for _ in range(200):
            block = api.malloc_device(100)
            api.memcpy_sync(block, block, 100, MemcpyKind.D2D)
            api.free_device(block)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

"""`llaisys.Tensor`: the course's methods, views and their lifetimes, numpy, torch, DLPack."""

import copy
import ctypes
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import llaisys
from llaisys import DataType, DeviceType, Tensor, errors

torch = pytest.importorskip("torch")

BF16 = np.dtype(ml_dtypes.bfloat16)
TYPES = [d for d in DataType if d]
NUMPY_TYPES = [d for d in TYPES if d not in (DataType.BYTE, DataType.F8, DataType.C16, DataType.C32)]
TORCH_TYPES = [d for d in TYPES if d not in (DataType.BYTE, DataType.F8, DataType.C16)]


def counting(shape: tuple[int, ...], dtype: DataType = DataType.F32) -> tuple[Tensor, np.ndarray[Any, Any]]:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype.numpy)
    tensor = Tensor(shape, dtype)
    tensor.numpy()[...] = array
    return tensor, array


# ------------------------------------------------------------------ enums


def test_enums_are_numbered_as_the_course_numbers_them() -> None:
    names = "INVALID BYTE BOOL I8 I16 I32 I64 U8 U16 U32 U64 F8 F16 F32 F64 C16 C32 C64 C128 BF16"
    assert [d.name for d in DataType] == names.split() and [int(d) for d in DataType] == list(range(20))
    assert [(d.name, int(d)) for d in DeviceType] == [("CPU", 0), ("NVIDIA", 1)]
    assert [k.name for k in llaisys.MemcpyKind] == ["H2H", "H2D", "D2H", "D2D"]
    sizes = [1, 1, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 4, 8, 16, 2]
    assert [d.itemsize for d in TYPES] == sizes


def test_data_types_map_to_numpy_torch_and_names_and_back() -> None:
    for dtype in TYPES:
        assert DataType.of_name(dtype.short) is dtype
    for dtype in NUMPY_TYPES:
        assert DataType.of_numpy(dtype.numpy) is dtype
    for dtype in TORCH_TYPES:
        assert DataType.of_torch(dtype.torch) is dtype
        assert dtype.torch.itemsize == dtype.itemsize
    assert DataType.of_numpy(np.dtype(">f4")) is None and DataType.of_torch(torch.float8_e5m2) is None
    for wrong in (lambda: DataType.INVALID.numpy, lambda: DataType.F8.torch, lambda: DataType.of_name("f31")):
        with pytest.raises(errors.DTypeError):
            wrong()


# ---------------------------------------------------------------- the course


def test_what_the_course_asks_of_a_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = torch.arange(60, dtype=torch.int64).reshape(3, 4, 5)
    ours = Tensor((3, 4, 5), dtype=DataType.I64, device=DeviceType.CPU)
    ours.load(theirs.data_ptr())
    ours.debug()
    text = capsys.readouterr().out
    assert all(s in text for s in ("(3, 4, 5)", "(20, 5, 1)", "i64", "59"))
    for mine, other in (
        (ours, theirs),
        (ours.view(6, 10), theirs.view(6, 10)),
        (ours.permute(2, 0, 1), theirs.permute(2, 0, 1)),
        (ours.slice(2, 1, 4), theirs[:, :, 1:4]),
        (ours.permute(2, 0, 1).slice(0, 2, 3), theirs.permute(2, 0, 1)[2:3]),
    ):
        assert mine.shape() == other.shape and mine.strides() == other.stride()
        assert mine.is_contiguous() == other.is_contiguous() and mine.ndim() == other.ndim
        assert np.array_equal(mine.numpy(), other.numpy())
        assert mine.contiguous().is_contiguous() and torch.equal(mine.contiguous().torch(), other)
    assert (ours.dtype(), ours.device_type(), ours.device_id()) == (DataType.I64, DeviceType.CPU, 0)
    ours = Tensor(theirs.shape, dtype=DataType.I64, device=DeviceType.CPU, device_id=0)
    size = theirs.numel() * theirs.element_size()
    llaisys.RuntimeAPI(DeviceType.CPU).memcpy_sync(ours.data_ptr(), theirs.data_ptr(), size, llaisys.MemcpyKind.D2D)
    assert torch.equal(ours.torch(), theirs)


COURSE = {"f32": (torch.float32, 1e-5), "f16": (torch.float16, 1e-3), "bf16": (torch.bfloat16, 1e-2)}


@pytest.mark.parametrize("name", COURSE)
def test_the_operators_of_the_course(name: str) -> None:
    """The calls that the course's operator tests make, against torch."""
    dtype, tolerance = COURSE[name]
    torch.manual_seed(0)

    def pair(*shape: int, scale: float = 1.0) -> tuple[Any, Tensor]:
        theirs = (torch.rand(shape) * scale).to(dtype)
        ours = Tensor(theirs.shape, dtype=DataType.of_name(name), device=DeviceType.CPU, device_id=0)
        ours.load(theirs.data_ptr())
        return theirs, ours

    def indices(values: Any) -> tuple[Any, Tensor]:
        return values, Tensor.from_torch(values)

    def same(ours: Tensor, theirs: Any) -> None:
        torch.testing.assert_close(ours.torch(), theirs.to(ours.torch().dtype), atol=tolerance, rtol=tolerance)

    (a, a_), (b, b_), (_, c_) = pair(512, 96), pair(512, 96), pair(512, 96)
    assert llaisys.Ops.add(c_, a_, b_) is None
    same(c_, a + b)

    v, v_ = pair(4096)
    (_, best_), (_, place_) = pair(1), indices(torch.zeros(1, dtype=torch.int64))
    llaisys.Ops.argmax(place_, best_, v_)
    assert v[place_.torch()] == v.max() == best_.torch()

    (i, i_), (_, out_) = indices(torch.randint(0, 512, (50,))), pair(50, 96)
    llaisys.Ops.embedding(out_, i_, a_)
    assert torch.equal(out_.torch(), a[i])

    (x, x_), (w, w_), (bias, bias_), (_, y_) = pair(33, 96, scale=0.1), pair(65, 96, scale=0.1), pair(65), pair(33, 65)
    llaisys.Ops.linear(y_, x_, w_, bias_)
    same(y_, torch.nn.functional.linear(x, w, bias))
    llaisys.Ops.linear(y_, x_, w_, None)
    same(y_, torch.nn.functional.linear(x, w))

    _, t_ = pair(96, 512)
    llaisys.Ops.rearrange(t_, a_.permute(1, 0))
    assert torch.equal(t_.torch(), a.T)

    w, w_ = pair(96)
    llaisys.Ops.rms_norm(c_, a_, w_, 1e-5)
    same(c_, torch.nn.functional.rms_norm(a.float(), (96,), w.float(), 1e-5))

    (q, q_), (_, r_), (p, p_) = pair(7, 4, 32), pair(7, 4, 32), indices(torch.arange(5, 12))
    llaisys.Ops.rope(r_, q_, p_, 10000.0)
    angle = p[:, None, None].double() / 10000.0 ** (torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    first, second = q.double().chunk(2, -1)
    rotated = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    same(r_, rotated)

    (k, k_), (v, v_) = pair(11, 2, 32), pair(11, 2, 32)
    llaisys.Ops.self_attention(r_, q_, k_, v_, 32**-0.5)
    k2, v2 = (t.double().repeat_interleave(2, 1) for t in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k2) * 32**-0.5
    scores = scores.masked_fill(~torch.ones(7, 11, dtype=torch.bool).tril(4), -torch.inf)
    same(r_, torch.einsum("hts,shd->thd", scores.softmax(-1), v2))

    llaisys.Ops.swiglu(c_, a_, b_)
    same(c_, torch.nn.functional.silu(a.float()) * b.float())


# --------------------------------------------------------------- construction


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.name)
def test_every_type_has_aligned_memory_of_its_size(dtype: DataType) -> None:
    tensor = Tensor((3, 5), dtype)
    assert tensor.data_ptr() % 64 == 0 and tensor.strides() == (5, 1)
    raw = (np.arange(15 * dtype.itemsize) % 2).astype(np.uint8)
    tensor.load(raw.ctypes.data)
    assert tensor.numpy().tobytes() == tensor.copy().numpy().tobytes() == raw.tobytes()
    assert tensor.permute(1, 0).contiguous().permute(1, 0).numpy().tobytes() == raw.tobytes()
    assert f"dtype={dtype.name}" in repr(tensor)


def test_what_is_no_tensor() -> None:
    new: Any = Tensor
    calls: list[tuple[Callable[[], Any], type[Exception]]] = [
        (lambda: new((2,), DataType.INVALID), errors.DTypeError),
        (lambda: new((2,), 99), errors.DTypeError),
        (lambda: new((2,), "f32"), errors.DTypeError),
        (lambda: new((2,), device=DeviceType.NVIDIA), errors.UnsupportedError),
        (lambda: new((2,), device_id=1), errors.InvalidArgumentError),
        (lambda: new((-1,)), errors.ShapeError),
        (lambda: new((2.0,)), errors.ShapeError),
        (lambda: new(3), errors.ShapeError),
        (lambda: new((1,) * 9), errors.ShapeError),
        (lambda: new((2**62,)), errors.OutOfMemoryError),
        (lambda: new((2**40, 2**40)), errors.OutOfMemoryError),
        (lambda: new((0, 2**40, 2**40)), errors.ShapeError),
        (lambda: new((0,)).view(0, 2**64), errors.ShapeError),
        (lambda: new.from_numpy([1.0]), errors.InvalidArgumentError),
        (lambda: new.from_numpy(np.ma.masked_array([1.0, 2.0], [0, 1])), errors.InvalidArgumentError),
        (lambda: new.from_numpy(np.ones(2, ">f4")), errors.DTypeError),
        (lambda: new.from_numpy(np.ones(2, object)), errors.DTypeError),
        (lambda: new.from_numpy(np.zeros(2, "u1,f4")["f1"]), errors.StrideError),
        (lambda: new.from_torch(np.ones(2)), errors.InvalidArgumentError),
        (lambda: new.from_torch(torch.ones(2, device="meta")), errors.UnsupportedError),
        (lambda: new.from_torch(torch.ones(2).to_sparse()), errors.StrideError),
        (lambda: new.from_torch(torch.ones(2, dtype=torch.complex64).conj()), errors.StrideError),
        (lambda: new.from_torch(torch.ones(2).to(torch.float8_e5m2)), errors.DTypeError),
        (lambda: torch.func.vmap(new.from_torch)(torch.ones(2, 3)), errors.UnsupportedError),
        (lambda: new.from_dlpack([1.0]), errors.InvalidArgumentError),
    ]
    for wrong, error in calls:
        with pytest.raises(error, match=r"expected .*found|found .*expected"):
            wrong()


# ---------------------------------------------------------------------- views


def test_view_agrees_with_torch_on_every_layout() -> None:
    base = torch.arange(2 * 3 * 4 * 5)
    layouts = [
        base.reshape(2, 3, 4, 5),
        base.reshape(2, 3, 4, 5).permute(1, 0, 2, 3),
        base.reshape(2, 3, 4, 5).permute(3, 2, 1, 0),
        base.reshape(6, 20)[:, ::2],
        base.reshape(6, 20)[:, 3:13],
        base.reshape(2, 3, 20)[:, :2],
        base.reshape(1, 120, 1),
        base[:6].reshape(2, 3, 1).expand(2, 3, 4),
        base[:1].expand(24),
        base[:0].reshape(0, 3),
        base[5],
    ]
    shapes = [(120,), (6, 20), (2, 60), (3, 2, 4, 5), (3, 2, 20), (60,), (6, 10), (12, 5), (6, 5, 2), (80,), (4, 20)]
    shapes += [
        (2, 40),
        (24,),
        (6, 4),
        (2, 3, 2, 2),
        (2, 3, 4),
        (1, 24, 1),
        (0,),
        (5, 0),
        (1,),
        (1, 1),
        (),
        (-1,),
        (2, -1),
    ]
    views = 0
    for layout in layouts:
        ours = Tensor.from_torch(layout)
        for shape in shapes:
            try:
                expected = layout.view(shape)
            except RuntimeError:
                with pytest.raises((errors.ShapeError, errors.StrideError), match=r"Tensor\.view: expected"):
                    ours.view(*shape) if shape else ours.view(())
                continue
            view = ours.view(shape)
            assert view.shape() == tuple(expected.shape) and np.array_equal(view.numpy(), expected.numpy())
            assert view.data_ptr() == expected.data_ptr() or not expected.numel()
            views += 1
    assert views > 40


def test_permute_and_slice_refuse() -> None:
    tensor, _ = counting((2, 3, 4))
    assert tensor.permute((2, 0, 1)).shape() == (4, 2, 3) == tensor.permute(-1, 0, 1).shape()
    for order in ((0, 1), (0, 1, 1), (0, 1, 2, 2)):
        with pytest.raises(errors.InvalidArgumentError, match="permute"):
            tensor.permute(*order)
    with pytest.raises(errors.IndexRangeError, match="permute"):
        tensor.permute(0, 1, 3)
    assert tensor.slice(-1, 1, 1).shape() == (2, 3, 0) and tensor.slice(1, 3, 3).numpy().size == 0
    for dim, start, end in ((3, 0, 1), (-4, 0, 1), (0, -1, 1), (0, 2, 1), (1, 0, 4)):
        with pytest.raises(errors.IndexRangeError, match=r"Tensor.slice: .*expected .*found"):
            tensor.slice(dim, start, end)
    wrong: Any = tensor
    for call in (lambda: wrong.slice(0, 0, 1.0), lambda: wrong.slice(None, 0, 1), lambda: wrong.permute(0, 1, 2.0)):
        with pytest.raises(errors.InvalidArgumentError, match=r"expected integers, found"):
            call()


def test_a_view_keeps_its_memory_alive() -> None:
    tensor, array = counting((4, 5))
    view = tensor.slice(0, 1, 3).permute(1, 0)
    taken = [view.numpy(), view.torch(), np.from_dlpack(view), torch.from_dlpack(view), np.asarray(view)]
    handle = view.lib_tensor()
    del tensor
    gc.collect()
    junk = [np.full(200, 7.0, np.float32) for _ in range(50)]
    assert np.array_equal(view.numpy(), array[1:3].T)
    del view
    gc.collect()
    junk += [np.full(200, 7.0, np.float32) for _ in range(50)]
    assert all(np.array_equal(np.asarray(x), array[1:3].T) for x in taken)
    taken.clear()
    assert (handle.dtype, handle.ndim) == (DataType.F32, 2)
    assert (handle.shape[:2], handle.strides[:2]) == ([5, 2], [1, 5])
    assert ctypes.c_float.from_address(handle.data).value == array[1, 0]
    # A read-only tensor below numpy is let go of with the last view.
    source = np.ones(3, np.float32)
    watch = weakref.ref(source)
    view = Tensor.from_numpy(source).view(3, 1)
    del source
    gc.collect()
    assert watch() is not None
    del view
    gc.collect()
    assert watch() is None


def test_a_pickled_or_copied_tensor_has_memory_of_its_own() -> None:
    """The address in it is not that of the original, which may be gone."""
    tensor, _ = counting((3, 4), DataType.BF16)
    for original in (tensor, tensor.permute(1, 0), tensor.slice(0, 1, 1), tensor.view(2, 6).slice(0, 1, 2)):
        expected = original.numpy().copy()
        for copied in (copy.copy(original), copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert copied.dtype() is DataType.BF16 and np.array_equal(copied.numpy(), expected)
            assert copied.is_contiguous() and not np.shares_memory(copied.numpy(), tensor.numpy())


def test_load() -> None:
    tensor, array = counting((3, 4))
    other = np.arange(12, dtype=np.float32)[::-1].copy()
    tensor.permute(1, 0).load(other.ctypes.data)
    assert np.array_equal(tensor.numpy(), other.reshape(4, 3).T)
    tensor.load(ctypes.c_void_p(array.ctypes.data))
    assert np.array_equal(tensor.numpy(), array)
    for null in (0, None, ctypes.c_void_p()):
        with pytest.raises(errors.HandleError, match="NULL"):
            tensor.load(null)
    for wrong in (-5, 2**64, 1.5, other):
        with pytest.raises(errors.HandleError, match="expected an address"):
            tensor.load(wrong)  # type: ignore[arg-type]
    array.flags.writeable = False
    with pytest.raises(errors.InvalidArgumentError, match="read-only"):
        Tensor.from_numpy(array).load(other.ctypes.data)
    Tensor((0, 3)).load(0)


# --------------------------------------------------------------------- interop


@pytest.mark.parametrize("dtype", NUMPY_TYPES, ids=lambda d: d.name)
def test_numpy_both_ways(dtype: DataType) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype.numpy)
    for view in (array, array.T, array[:, ::2], array[::-1, :, ::-1], array[1:1], array[0, 0, 0:1].reshape(())):
        tensor = Tensor.from_numpy(view)
        assert tensor.dtype() is dtype and tensor.data_ptr() == view.ctypes.data
        back = tensor.numpy()
        assert back.dtype == view.dtype and back.shape == view.shape and back.tobytes() == view.tobytes()
        assert not view.size or np.shares_memory(back, view)
        assert tensor.copy().numpy().tobytes() == view.tobytes()
    array[0, 0, 1] = 5
    assert Tensor.from_numpy(array).numpy()[0, 0, 1] == array[0, 0, 1]


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=lambda d: d.name)
def test_torch_both_ways(dtype: DataType) -> None:
    theirs = torch.zeros(48 * dtype.itemsize, dtype=torch.uint8).view(dtype.torch).reshape(2, 4, 6)
    for view in (
        theirs,
        theirs.permute(2, 0, 1),
        theirs[:, 1:, ::2],
        theirs[1:1],
        theirs[0, 0, 0],
        theirs[:, :1].expand(2, 3, 6),
    ):
        ours = Tensor.from_torch(view)
        back = ours.torch()
        assert ours.dtype() is dtype and back.dtype == view.dtype and back.shape == view.shape
        if view.numel():
            assert back.data_ptr() == ours.data_ptr() == view.data_ptr() and back.stride() == view.stride()
    ctypes.memset(Tensor.from_torch(theirs).data_ptr(), 1, 1)
    assert theirs.view(torch.uint8).any()


def test_torch_tensors_that_numpy_backs_may_outlive_it() -> None:
    theirs = Tensor.from_numpy(np.arange(6).astype(BF16)).torch()
    gc.collect()
    assert theirs.tolist() == [0, 1, 2, 3, 4, 5]
    ours = Tensor.from_torch(torch.arange(6).to(torch.bfloat16))
    gc.collect()
    assert ours.numpy().tolist() == [0, 1, 2, 3, 4, 5]
    leaf = torch.ones(3, requires_grad=True)
    assert Tensor.from_torch(leaf).data_ptr() == leaf.data_ptr()


def test_what_torch_cannot_have() -> None:
    array = np.arange(4, dtype=np.float32)
    with pytest.raises(errors.StrideError, match="negative"):
        Tensor.from_numpy(array[::-1]).torch()
    array.flags.writeable = False
    tensor = Tensor.from_numpy(array)
    assert tensor.readonly and not tensor.numpy().flags.writeable and not tensor.view(2, 2).numpy().flags.writeable
    with pytest.raises(errors.InvalidArgumentError, match="read-only"):
        tensor.torch()
    assert not tensor.copy().readonly
    with pytest.raises(errors.DTypeError, match="F8"):
        Tensor((2,), DataType.F8).torch()


@pytest.mark.parametrize("dtype", NUMPY_TYPES, ids=lambda d: d.name)
def test_dlpack_to_numpy_and_torch_and_back(dtype: DataType) -> None:
    tensor, array = counting((2, 3), dtype)
    assert tensor.__dlpack_device__() == (1, 0)
    theirs = torch.from_dlpack(tensor)
    assert theirs.dtype == dtype.torch and theirs.data_ptr() == tensor.data_ptr()
    assert Tensor.from_torch(theirs).numpy().tobytes() == array.tobytes()
    back = Tensor.from_dlpack(theirs)
    assert back.dtype() is dtype and back.data_ptr() == tensor.data_ptr()
    transposed = torch.from_dlpack(tensor.permute(1, 0))
    assert transposed.stride() == (1, 3) and transposed.data_ptr() == tensor.data_ptr()
    if dtype is DataType.BF16:
        with pytest.raises((BufferError, RuntimeError)):
            np.from_dlpack(tensor)
    else:
        assert np.from_dlpack(tensor).ctypes.data == tensor.data_ptr()
        assert Tensor.from_dlpack(array).data_ptr() == array.ctypes.data
    assert Tensor.from_dlpack(tensor) is tensor
    old = tensor.__dlpack__()
    assert torch.utils.dlpack.from_dlpack(old).data_ptr() == tensor.data_ptr()


def test_dlpack_refusals() -> None:
    for dtype in (DataType.F8, DataType.C16, DataType.C32):
        with pytest.raises(BufferError, match=dtype.name):
            Tensor((2,), dtype).__dlpack__()
    with pytest.raises(BufferError):
        Tensor((2,)).__dlpack__(dl_device=(2, 0))
    copied = np.from_dlpack(Tensor((2,), DataType.I8), copy=True)
    assert copied.shape == (2,)


def test_array_protocol() -> None:
    tensor, array = counting((2, 3), DataType.BF16)
    assert np.asarray(tensor).dtype == BF16 and np.shares_memory(np.asarray(tensor), tensor.numpy())
    assert np.array_equal(np.asarray(tensor, np.float32), array.astype(np.float32))
    assert not np.shares_memory(tensor.__array__(copy=True), tensor.numpy())
    with pytest.raises(ValueError, match="without a copy"):
        tensor.__array__(np.float32, copy=False)


def test_repr() -> None:
    tensor, _ = counting((2, 3))
    assert repr(tensor).startswith("llaisys.Tensor(shape=(2, 3), dtype=F32, device=CPU)\n[[0. 1. 2.]")
    assert "strides=(1, 3)" in repr(tensor.permute(1, 0))
    assert len(repr(Tensor((1000, 1000)))) < 1000

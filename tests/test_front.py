"""The Python front of the operators: kinds of arrays, outputs, copies, refusals. What they compute: tests/ops."""

import gc
import inspect
import pickle
import sys
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import llaisys
from llaisys import Tensor, errors, ops
from llaisys.reference import SPECS

torch = pytest.importorskip("torch")

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
DTYPES = [F32, np.dtype(np.float16), BF16]
KINDS = ["numpy", "torch", "Tensor"]


def as_kind(array: np.ndarray[Any, Any], kind: str) -> Any:
    if kind == "numpy":
        return array
    tensor = Tensor.from_numpy(array if array.flags.writeable else array.copy())
    return tensor if kind == "Tensor" else tensor.torch()


def to_numpy(x: Any) -> np.ndarray[Any, Any]:
    return x if isinstance(x, np.ndarray) else Tensor.from_torch(x).numpy() if torch.is_tensor(x) else x.numpy()


def kind_name(x: Any) -> str:
    return {np.ndarray: "numpy", torch.Tensor: "torch", Tensor: "Tensor"}[type(x)]


def valid_call(name: str, dtype: np.dtype[Any]) -> list[Any]:
    """Inputs and scalars of one call of an operator, from its SPEC."""
    spec = SPECS[name]
    # One with real axes: no size 0 or 1, and "..." not empty.
    dims = next(
        case for case in spec.cases if all(np.min(size, initial=2) > 1 and size != () for size in case.values())
    )
    values = spec.inputs(spec, np.random.default_rng(0), dims, dtype)
    names = [*(a.name for a in spec.inputs_args), *(s.name for s in spec.scalars)]
    return [values.get(name) for name in names]


# ------------------------------------------------------------- all operators


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_every_kind_gives_the_same_and_comes_back(name: str, dtype: np.dtype[Any], kind: str) -> None:
    args = valid_call(name, dtype)
    expected = getattr(ops, name)(*args)
    converted = [as_kind(x, kind) if isinstance(x, np.ndarray) else x for x in args]
    result = getattr(ops, name)(*converted)
    several = len(SPECS[name].outputs) > 1
    for got, want in zip(result if several else [result], expected if several else [expected], strict=True):
        assert kind_name(got) == kind
        assert to_numpy(got).dtype == want.dtype and to_numpy(got).tobytes() == want.tobytes()
    # Again with outputs given, of another kind.
    for out_kind in KINDS:
        outs = [as_kind(np.zeros_like(x), out_kind) for x in (expected if several else [expected])]
        result = getattr(ops, name)(*converted, out=tuple(outs) if several else outs[0])
        for got, out, want in zip(
            result if several else [result], outs, expected if several else [expected], strict=True
        ):
            assert got is out and to_numpy(got).tobytes() == want.tobytes()


@pytest.mark.parametrize("name", SPECS)
def test_functions_are_documented_and_signed_by_their_spec(name: str) -> None:
    spec, function = SPECS[name], getattr(ops, name)
    parameters = [*(a.name for a in spec.inputs_args), *(s.name for s in spec.scalars), "out"]
    assert list(inspect.signature(function).parameters) == parameters
    assert function.__name__ == name and function.__module__ == "llaisys.ops"
    for text in (spec.summary, spec.formula, spec.source, *spec.raises, *parameters):
        assert text in function.__doc__
    assert name in ops.__all__


@pytest.mark.parametrize("name", SPECS)
def test_arguments_by_keyword_and_missing_ones(name: str) -> None:
    spec, args = SPECS[name], valid_call(name, F32)
    names = [*(a.name for a in spec.inputs_args), *(s.name for s in spec.scalars)]
    function = getattr(ops, name)
    expected = function(*args)
    assert pickle.dumps(function(**dict(zip(names, args, strict=True)))) == pickle.dumps(expected)
    with pytest.raises(TypeError, match=name):
        function()
    with pytest.raises(TypeError, match="nonsense"):
        function(*args, nonsense=1)
    with pytest.raises(TypeError, match=name):
        function(*args, **{names[0]: args[0]})
    with pytest.raises(TypeError, match=name):
        function(*args, None)


@pytest.mark.parametrize("name", SPECS)
def test_a_tensor_argument_of_the_wrong_kind_is_refused(name: str) -> None:
    args, spec = valid_call(name, F32), SPECS[name]
    for i, arg in enumerate(spec.inputs_args):
        for wrong in (3.0, "x", [[1.0]], np.ma.masked_array(args[0], args[0] == 0), object()):
            call = [*args[:i], wrong, *args[i + 1 :]]
            with pytest.raises(errors.DTypeError, match=f"{name}: {arg.name}: expected .*, found"):
                getattr(ops, name)(*call)
        if not arg.optional:
            with pytest.raises(errors.DTypeError, match=f"{name}: {arg.name}: .*found NoneType"):
                getattr(ops, name)(*args[:i], None, *args[i + 1 :])


@pytest.mark.parametrize("name", SPECS)
def test_read_only_inputs_are_fine_and_read_only_outputs_are_not(name: str) -> None:
    args, spec = valid_call(name, F32), SPECS[name]
    for x in args:
        if isinstance(x, np.ndarray):
            x.flags.writeable = False
    result = getattr(ops, name)(*args)
    outs = list(result) if len(spec.outputs) > 1 else [result]
    for i, arg in enumerate(spec.outputs):
        frozen = [x.copy() for x in outs]
        frozen[i].flags.writeable = False
        before = frozen[i].tobytes()
        for given in (frozen, [Tensor.from_numpy(x) for x in frozen]):
            with pytest.raises(errors.InvalidArgumentError, match=f"{name}: {arg.name}: .*read-only"):
                getattr(ops, name)(*args, out=tuple(given) if len(outs) > 1 else given[0])
        assert frozen[i].tobytes() == before


@pytest.mark.parametrize("name", SPECS)
def test_an_input_with_any_strides_gives_the_same(name: str) -> None:
    args = valid_call(name, F32)
    expected = pickle.dumps(getattr(ops, name)(*args))
    for i, x in enumerate(args):
        if not isinstance(x, np.ndarray) or x.ndim == 0:
            continue
        # Every second element; reversed; transposed in memory; a field of a record, not whole elements apart.
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        wide[..., ::2] = x
        record = np.zeros(x.shape, np.dtype([("pad", "u1"), ("x", x.dtype)]))
        record["x"] = x
        for view in (wide[..., ::2], x[..., ::-1].copy()[..., ::-1], np.asfortranarray(x), record["x"], x[::-1][::-1]):
            assert np.array_equal(view, x)
            assert pickle.dumps(getattr(ops, name)(*args[:i], view, *args[i + 1 :])) == expected
            if view is not record["x"] and all(s >= 0 for s in view.strides) and view.strides[-1] % x.itemsize == 0:
                got = getattr(ops, name)(*args[:i], Tensor.from_numpy(view), *args[i + 1 :])
                first = got[0] if isinstance(got, tuple) else got
                assert kind_name(first) == ("Tensor" if i == 0 else "numpy")


# --------------------------------------------------------------------- kinds


def test_the_kind_of_the_first_tensor_argument_comes_back() -> None:
    a = np.ones((2, 3), np.float32)
    assert kind_name(ops.add(a, torch.ones(2, 3))) == "numpy"
    assert kind_name(ops.add(torch.ones(2, 3), a)) == "torch"
    assert kind_name(ops.add(Tensor.from_numpy(a), torch.ones(2, 3))) == "Tensor"
    assert kind_name(ops.embedding([1, 0], torch.ones(2, 3))) == "torch"
    assert kind_name(ops.embedding([1, 0], a)) == "numpy"


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    from llaisys import _arrays

    monkeypatch.setattr(_arrays.NumpyKind, "compact", lambda *_: seen.append(1))
    monkeypatch.setattr(_arrays.TorchKind, "compact", lambda *_: seen.append(1))
    x = np.ones((4, 6, 8), ml_dtypes.bfloat16)
    out = x[:, ::2]
    assert ops.add(x[:, ::2], x[:, ::2], out=out) is out
    assert (x[:, ::2] == 2).all() and (x[:, 1::2] == 1).all()
    t = torch.ones(3, 4, dtype=torch.bfloat16)
    ops.add(t, t, out=t)
    assert (t == 2).all() and not seen


def test_what_completion_and_a_prompt_show() -> None:
    assert dir(ops) == sorted([*SPECS, "AddRmsNormResult", "ArgmaxResult"])
    assert dir(llaisys) == sorted(llaisys.__all__)
    assert repr(SPECS["add"]) == f"<Spec of add: {SPECS['add'].formula}>"


def test_results_are_named() -> None:
    result = ops.argmax(np.array([[1, 3, 2], [9, 3, 2]], np.float32))
    assert result.index.tolist() == [1, 0] and result.value.tolist() == [3, 9]
    assert type(result) is ops.ArgmaxResult and pickle.loads(pickle.dumps(result)).index.tolist() == [1, 0]


def test_argmax_of_one_dimension() -> None:
    index, value = ops.argmax(np.array([1, 3, 2], np.float32))
    assert index.shape == value.shape == () and index == 1 and value == 3
    index, value = ops.argmax(np.array([1, 3, 2], np.float32), out=(np.zeros(1, np.int64), np.zeros(1, np.float32)))
    assert index.tolist() == [1] and value.tolist() == [3]


@pytest.mark.parametrize("kind", KINDS)
def test_zero_sizes(kind: str) -> None:
    x, w = as_kind(np.ones((0, 3), np.float32), kind), as_kind(np.ones((4, 3), np.float32), kind)
    assert tuple(to_numpy(ops.linear(x, w)).shape) == (0, 4)
    none = as_kind(np.ones((4, 0), np.float32), kind)
    assert (to_numpy(ops.linear(as_kind(np.ones((2, 0), np.float32), kind), none)) == 0).all()


def test_indices_of_other_integer_types_and_lists_are_converted() -> None:
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    expected = weight[[3, 0, 1]]
    for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"):
        assert np.array_equal(ops.embedding(np.array([3, 0, 1], dtype), weight), expected)
        assert np.array_equal(ops.embedding(Tensor.from_numpy(np.array([3, 0, 1], dtype)), weight).numpy(), expected)
    for index in ([3, 0, 1], (3, 0, 1), torch.tensor([3, 0, 1], dtype=torch.int32)):
        assert np.array_equal(to_numpy(ops.embedding(index, weight)), expected)
    assert ops.embedding([], weight).shape == (0, 3)
    assert ops.embedding(range(4), weight).shape == (4, 3)
    for wrong in (np.array([1.0]), [1.0], [True], np.array([True]), torch.ones(2), [None]):
        with pytest.raises(errors.DTypeError, match=r"embedding: index: expected"):
            ops.embedding(wrong, weight)
    with pytest.raises(errors.ShapeError, match=r"index: expected lists of equal lengths, found \[\[1\], \[2, 3\]\]"):
        ops.embedding([[1], [2, 3]], weight)
    for big in (np.array([2**63], np.uint64), [2**63], [2**70]):
        with pytest.raises(errors.IndexRangeError, match="index"):
            ops.embedding(big, weight)
    with pytest.raises(errors.IndexRangeError, match="index"):
        ops.embedding([4], weight)
    with pytest.raises(errors.DTypeError, match=r"argmax: index: expected i64, found i32"):
        ops.argmax(weight, out=(np.zeros(4, np.int32), np.zeros(4, np.float32)))


def test_numpy_subclasses(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2, 3))
    mapped[:] = 1
    result = ops.add(mapped, mapped)
    assert type(result) is np.ndarray and (result == 2).all()


@pytest.mark.parametrize("dtype", [d for d in llaisys.DataType if d], ids=lambda d: d.name)
def test_rearrange_takes_every_type(dtype: llaisys.DataType) -> None:
    x = Tensor((3, 5), dtype)
    raw = np.arange(15 * dtype.itemsize, dtype=np.uint8) % 2
    x.load(raw.ctypes.data)
    result = ops.rearrange(x.permute(1, 0))
    assert result.is_contiguous() and result.dtype() is dtype
    assert result.permute(1, 0).numpy().tobytes() == raw.tobytes()


# -------------------------------------------------------------------- torch


def test_torch_tensors_with_gradients() -> None:
    leaf = torch.ones(2, 3, requires_grad=True)
    result = ops.add(leaf, leaf * 2)
    assert not result.requires_grad and (result == 3).all()
    assert (ops.add(torch.nn.Parameter(torch.ones(2, 3)), torch.ones(2, 3)) == 2).all()
    with pytest.raises(errors.InvalidArgumentError, match=r"add: out: .*requires_grad"):
        ops.add(leaf, leaf, out=leaf)
    with torch.no_grad():
        ops.add(leaf, leaf, out=leaf)
    assert (leaf == 2).all()


def test_autograd_knows_what_was_written() -> None:
    a, b, weight = torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 9.0), torch.ones(3, requires_grad=True)

    def saved() -> Any:
        return (weight * a).sum()

    y = saved()
    ops.add(torch.zeros(3), b, out=a)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    # What was refused before the first byte is no change, nor is what was only read.
    y = saved()
    with pytest.raises(errors.AliasError):
        ops.rms_norm(b, a, 1e-6, out=a)
    ops.add(a, b, out=np.empty(3, np.float32))
    y.backward()
    assert torch.equal(weight.grad, torch.full((3,), 9.0))
    # One of several, by way of a view of it.
    values = torch.zeros(2, 1)
    y = (weight[:2, None] * values).sum()
    ops.argmax(torch.ones(1, 3), out=(torch.zeros(1, dtype=torch.int64), values[1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():  # such tensors have no version
        assert (ops.add(b, b, out=torch.zeros(3)) == 18).all()


def test_torch_views_and_lazy_signs() -> None:
    x = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    assert torch.equal(ops.add(x.T, x.T), 2 * x.T)
    assert torch.equal(
        ops.add(x[:, None].expand(3, 2, 4), x[:, None].expand(3, 2, 4)), (2 * x)[:, None].expand(3, 2, 4)
    )
    z = torch.complex(x, x + 1)
    assert z.conj().imag.is_neg()
    assert torch.equal(ops.add(z.conj().imag, x), z.conj().imag + x)
    assert torch.equal(ops.rearrange(z.conj()), z.conj())
    with pytest.raises(errors.StrideError, match="out"):
        ops.add(x, x, out=z.conj().imag)


def test_torch_tensors_that_are_no_cpu_memory() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(errors.UnsupportedError, match=r"add: b: expected a tensor on the CPU, found one on meta"):
        ops.add(x, x.to("meta"))
    with pytest.raises(errors.UnsupportedError, match=r"add: out: .*meta"):
        ops.add(x, x, out=x.to("meta"))
    with pytest.raises(errors.StrideError, match=r"add: a: .*sparse"):
        ops.add(x.to_sparse(), x)
    with pytest.raises(errors.StrideError, match=r"add: a: .*nested"):
        ops.add(torch.nested.nested_tensor([x[0], x[1, :2]]), x)
    with pytest.raises(errors.UnsupportedError, match=r"expected tensors with memory"):
        torch.func.vmap(lambda row: ops.add(row, row))(x)


def test_torch_is_not_imported() -> None:
    import subprocess

    code = (
        "import sys, numpy as np, llaisys\n"
        "x = np.ones((2, 3), 'f4'); llaisys.ops.add(x, llaisys.Tensor.from_numpy(x))\n"
        "llaisys.Ops.add(llaisys.Tensor((2, 3)), llaisys.Tensor.from_numpy(x), llaisys.Tensor.from_numpy(x))\n"
        "try: llaisys.ops.add(x, [1.0])\n"
        "except TypeError: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ----------------------------------------------------------------- refusals


def test_dtypes_are_refused_by_name() -> None:
    x = np.ones((2, 3), np.float32)
    for wrong, found in (
        (x.astype(np.float64), "f64"),
        (x.astype(np.int32), "i32"),
        (x.astype(np.int64), "i64"),
        (x.astype(bool), "bool"),
        (x.astype(np.complex64), "c64"),
        (x.astype(">f4"), ">f4"),
        (x.astype(object), r"\|O"),
        (x.astype("U1"), "U1"),
        (x.astype(ml_dtypes.float8_e4m3fn), "float8_e4m3fn"),
        (torch.ones(2, 3, dtype=torch.float64), "f64"),
        (torch.ones(2, 3, dtype=torch.float8_e4m3fn), "float8"),
        (Tensor((2, 3), llaisys.DataType.F64), "f64"),
    ):
        with pytest.raises(errors.DTypeError, match=f"add: a: expected .*found .*({found})"):
            ops.add(wrong, wrong)
    with pytest.raises(errors.DTypeError, match=r"linear: bias: expected f32 as x, found f16"):
        ops.linear(x, x, np.ones(2, np.float16))
    with pytest.raises(errors.DTypeError, match=r"add: out: expected f32 as a, found bf16"):
        ops.add(x, x, out=x.astype(BF16))
    with pytest.raises(errors.DTypeError, match=r"rearrange: out: expected f32 as x, found f64"):
        ops.rearrange(x, out=x.astype(np.float64))


def test_shapes_are_refused_by_name() -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(errors.ShapeError, match=r"linear: weight: expected C = 3 as in x, found 4 \(shape \(5, 4\)\)"):
        ops.linear(x, np.ones((5, 4), np.float32))
    with pytest.raises(errors.ShapeError, match=r"linear: weight: expected shape \[N C\], found \(3,\)"):
        ops.linear(x, np.ones(3, np.float32))
    with pytest.raises(errors.ShapeError, match=r"linear: x: expected shape \[... C\], found \(\)"):
        ops.linear(np.ones((), np.float32), x)
    with pytest.raises(errors.ShapeError, match=r"add: b: expected ... = \(2, 3\) as in a, found \(3, 2\)"):
        ops.add(x, x.reshape(3, 2))
    with pytest.raises(errors.ShapeError, match=r"add: out"):
        ops.add(x, x, out=np.ones((2, 2), np.float32))
    with pytest.raises(errors.ShapeError, match=r"add: a: expected at most 8 axes, found 9"):
        ops.add(np.ones((1,) * 9, np.float32), np.ones((1,) * 9, np.float32))
    assert ops.add(np.ones((1,) * 8, np.float32), np.ones((1,) * 8, np.float32)).shape == (1,) * 8


def test_outputs_are_refused_rather_than_copied() -> None:
    x = np.ones((2, 3), np.float32)
    record = np.zeros((2, 3), np.dtype([("pad", "u1"), ("x", "f4")]))
    for out in (np.ones((2, 6), np.float32)[:, ::2], np.ones((3, 2), np.float32).T, record["x"], x.copy()[:, ::-1]):
        with pytest.raises(errors.StrideError, match=r"add: out: expected"):
            ops.add(x, x, out=out)
    with pytest.raises(errors.StrideError, match=r"found strides of \(15, 5\) bytes"):
        ops.add(x, x, out=record["x"])
    wide = np.zeros((2, 6), np.float32)
    ops.rearrange(x, out=wide[:, ::2])
    assert wide.tolist() == [[1, 0, 1, 0, 1, 0]] * 2
    with pytest.raises(errors.AliasError, match="out"):
        ops.linear(np.ones((3, 3), np.float32), x_ := np.ones((3, 3), np.float32), out=x_)


def test_the_form_of_out() -> None:
    x = np.ones((2, 3), np.float32)
    for wrong in (np.zeros(2, np.int64), (np.zeros(2, np.int64),), 3):
        with pytest.raises(errors.InvalidArgumentError, match=r"argmax: out: expected a tuple of 2, found"):
            ops.argmax(x, out=wrong)
    with pytest.raises(errors.DTypeError, match=r"argmax: value: expected .*NoneType"):
        ops.argmax(x, out=(np.zeros(2, np.int64), None))
    with pytest.raises(errors.DTypeError, match=r"add: out: expected .*tuple"):
        ops.add(x, x, out=(x,))


def test_scalars() -> None:
    x, w = np.ones((2, 4), np.float32), np.ones(4, np.float32)
    expected = ops.rms_norm(x, w, 1e-6)
    for eps in (np.float32(1e-6), np.float64(1e-6), np.array(1e-6), torch.tensor(1e-6)):
        assert np.allclose(ops.rms_norm(x, w, eps), expected)
    ops.rms_norm(x, w, 1)
    for wrong in ("1e-6", None, [1.0], 1j):
        with pytest.raises(errors.DTypeError, match=r"rms_norm: eps: expected a number, found"):
            ops.rms_norm(x, w, wrong)
    with pytest.raises(errors.InvalidArgumentError, match=r"rms_norm: eps: expected a number that fits"):
        ops.rms_norm(x, w, 10**400)


def test_refusals_leave_operators_usable() -> None:
    x = np.ones((2, 3), np.float32)
    frozen = x.copy()
    frozen.flags.writeable = False
    for _ in range(3):
        for out in (frozen, np.ones((2, 2), np.float32), np.ones((2, 3), np.float64)):
            with pytest.raises(errors.LlaisysError):
                ops.add(x, x, out=out)
        assert (ops.add(x, x) == 2).all()


# ------------------------------------------------------------------- threads


def test_threads_share_plans_without_mixing_arrays() -> None:
    wrong: list[int] = []

    def work(n: int) -> None:
        for i in range(300):
            x = np.full((3, 5), n * 1000 + i, np.float32)
            if not (ops.add(x, x) == 2 * (n * 1000 + i)).all():
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_many_shapes_do_not_pile_up() -> None:
    before = len(gc.get_objects())
    for n in range(3000):
        ops.add(np.ones(n, np.float32), np.ones(n, np.float32))
    gc.collect()
    from llaisys.ops import _MOST_PLANS, _operators

    assert len(_operators["add"].plans) <= _MOST_PLANS
    assert len(gc.get_objects()) - before < 40 * _MOST_PLANS


def test_arrays_are_not_kept_alive() -> None:
    import weakref

    x = np.ones((2, 3), np.float32)
    watch = weakref.ref(x)
    result = ops.add(x, x)
    del x
    assert watch() is None
    watch = weakref.ref(result)
    del result
    assert watch() is None

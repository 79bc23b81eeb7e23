"""Runs kernels through the C ABI on memory that is laid out for the purpose, and sees what else they touch.

`run` makes one call of an operator: the tensors lie in memory as a layout says, the outputs are filled with a poison
before, and afterwards not one byte may have changed but the elements of the outputs. `llaisys check` and the tests are
made of it.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _lib
from ._fenv import FloatState
from ._interop import address_of
from ._lib import LlaisysTensor
from .dtypes import DataType
from .errors import LlaisysError
from .reference.spec import Arg, Spec, arg_dtype, arg_shape

Array = npt.NDArray[Any]
Allocate = Callable[[int], Array]

THREADS = (1, 2, 3, 8)
#: Every byte of an output before a call: NaN in all floating types, and what is no NaN in any.
POISONS = (0xFF, 0x5A)
PAGE = mmap.PAGESIZE
PROT_NONE = 0


class KernelFault(LlaisysError, AssertionError):
    """A kernel refused a valid call, or left what is not its own changed."""


class Refusal(KernelFault):
    """A kernel of somebody's own says that it does not take such a call."""


#: C entries in place of those of the library, by name.
_entries: dict[str, Any] = {}
#: Statuses with which such an entry says that it does not take a call.
REFUSALS = ("UNSUPPORTED", "DTYPE", "SHAPE", "STRIDE", "ALIAS")
#: Bytes of the memory in which `tell_to` has `run` say what it does, and that memory.
TOLD = 256
_told: list[mmap.mmap] = []


def tell_to(memory: mmap.mmap) -> None:
    """Have `run` say in `memory`, shared with another process, which call it makes, for as long as that lasts."""
    _told[:] = [memory]


@contextmanager
def _telling(text: str) -> Iterator[None]:
    for memory in _told:
        memory[:] = text.encode()[:TOLD].ljust(TOLD, b"\0")
    try:
        yield
    finally:
        for memory in _told:
            memory[:] = bytes(TOLD)


@contextmanager
def replaced(spec: Spec, entry: Any) -> Iterator[None]:
    """Calls of the operator inside go to `entry`, a function of ctypes."""
    _entries[spec.c_name] = entry
    try:
        yield
    finally:
        del _entries[spec.c_name]


# ------------------------------------------------------------------- settings


@contextmanager
def using(tier: str | None = None, threads: int | None = None) -> Iterator[None]:
    """The tier and the number of threads of the calls inside."""
    before = _lib.isa(), _lib.num_threads()
    try:
        if tier is not None:
            _lib.set_isa(tier)
        if threads is not None:
            _lib.set_num_threads(threads)
        yield
    finally:
        _lib.set_isa(before[0])
        _lib.set_num_threads(before[1])


# --------------------------------------------------------------------- memory


def heap(count: int) -> Array:
    """Plain memory."""
    return np.empty(count, np.uint8)


class Guarded:
    """Memory with a page that must not be touched right behind it, and one right before: exactly at the end of the
    bytes handed out or (`at_start`) exactly before them."""

    def __init__(self, at_start: bool = False) -> None:
        self.at_start = at_start
        self.doc = f"each tensor right {'behind' if at_start else 'before'} a page that must not be touched"
        self.mprotect = ctypes.CDLL(None, use_errno=True).mprotect
        self.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def __call__(self, count: int) -> Array:
        """`count` bytes beside the guard."""
        inner = (count + PAGE - 1) // PAGE * PAGE
        pages = np.frombuffer(mmap.mmap(-1, inner + 2 * PAGE), np.uint8)
        address = address_of(pages)
        for guard in (address, address + PAGE + inner):
            if self.mprotect(guard, PAGE, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        first = PAGE if self.at_start else PAGE + inner - count
        return pages[first : first + count]


#: How tensors lie in memory. packed: row-major, nothing between. padded: gaps behind the rows of every axis. reversed:
#: padded, leading axes with negative strides. swapped: leading axes in the opposite order. odd: padded, one byte off.
LAYOUTS = ("packed", "padded", "reversed", "swapped", "odd")
GAP = 3


def place(x: Array, arg: Arg, layout: str, allocate: Allocate, poison: int = POISONS[0]) -> tuple[Array, Array]:
    """A copy of `x` laid out as `layout`, in a fresh buffer filled with `poison`; also the buffer, whole.

    The last axis stays contiguous unless `arg` takes any strides.
    """
    item, fixed = x.dtype.itemsize, 1 if arg.strides == "rows" and x.ndim else 0
    leading = list(range(x.ndim - fixed))
    order = [*(leading[::-1] if layout == "swapped" else leading), *range(x.ndim - fixed, x.ndim)]
    gap = 0 if layout in ("packed", "swapped") else GAP * item
    strides, step, nbytes = [0] * x.ndim, item if fixed or not gap else 2 * item, item
    for axis in reversed(order):
        strides[axis] = step
        nbytes += (x.shape[axis] - 1) * step
        step = step * max(x.shape[axis], 1) + gap
    nbytes = nbytes if x.size else 0
    offset, spare = 0, int(layout == "odd")
    if layout == "reversed" and x.size:
        offset = sum((x.shape[axis] - 1) * strides[axis] for axis in leading)
        strides = [-s if axis in leading else s for axis, s in enumerate(strides)]
    buffer = allocate(nbytes + 2 * spare)
    buffer[...] = poison
    view: Array = np.ndarray(x.shape, x.dtype, buffer, offset + spare, strides)
    return view, buffer


def strided_copy(x: Array, arg: Arg, layout: str, allocate: Allocate) -> tuple[Array, Array]:
    """`place`, elements included."""
    view, buffer = place(x, arg, layout, allocate)
    raw(view)[...] = raw(x)
    return view, buffer


def raw(x: Array) -> Array:
    """The elements as uninterpreted bytes, so that assignments keep every NaN as it is."""
    return x.view(np.dtype(f"V{x.dtype.itemsize}")) if x.ndim else x.reshape(1).view(np.dtype(f"V{x.dtype.itemsize}"))


def same_bits(a: Array, b: Array) -> bool:
    """Shape, dtype and every bit alike."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# ---------------------------------------------------------------------- calls


def tensor(x: Array) -> LlaisysTensor:
    """The C view of an array."""
    view = LlaisysTensor()
    code = DataType.of_numpy(x.dtype)
    if code is None or any(s % x.dtype.itemsize for s in x.strides):
        raise ValueError(f"expected elements and strides of llaisys, found {x.dtype} with strides {x.strides}")
    view.data, view.dtype, view.ndim = address_of(x), code, x.ndim
    # numpy gives empty arrays the strides 0, which is no contiguous last axis.
    strides = x.strides if x.size else np.empty([max(n, 1) for n in x.shape], x.dtype).strides
    view.shape[: x.ndim], view.strides[: x.ndim] = x.shape, [s // x.dtype.itemsize for s in strides]
    return view


def invoke(spec: Spec, values: Mapping[str, Any]) -> tuple[str, str]:
    """One call of the C entry: name of the status, text of the error. Values are arrays, C views, None and scalars."""
    views = {a.name: values.get(a.name) for a in spec.args}
    views = {name: tensor(x) if isinstance(x, np.ndarray) else x for name, x in views.items()}
    pointers = [None if x is None else ctypes.byref(x) for x in views.values()]
    entry = _entries.get(spec.c_name, getattr(_lib.library(), spec.c_name))
    status = entry(*pointers, *(values[s.name] for s in spec.scalars))
    text = "" if status == 0 else f"status {status}" if spec.c_name in _entries else _lib.last_error()
    return _lib.library().llaisysStatusName(status).decode(), text


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise KernelFault(message)


def _call(spec: Spec, given: Mapping[str, Any], where: str, memory: str = "") -> str:
    """`invoke`: "OK", or the status with which an entry that is `replaced` does not take the call. KernelFault if it
    fails in another way, or leaves the floating-point state of the thread changed; that is restored."""
    state = FloatState()
    threads = _lib.num_threads()
    how = f"{threads} thread{'s' * (threads != 1)}" + (f"; {memory}" if memory else "")
    with _telling(f"{where} ({how})"):
        status, text = invoke(spec, given)
    changed = state.restore()
    _demand(not changed, f"{where}: the floating-point state of the thread was left changed: {changed}")
    if spec.c_name in _entries and status in REFUSALS:
        return status
    _demand(status == "OK", f"{where}: {status}: {text}")
    return "OK"


def run(
    spec: Spec,
    values: Mapping[str, Any],
    where: str,
    layout: str = "packed",
    allocate: Allocate = heap,
    poison: int = POISONS[0],
    in_place: Mapping[str, str] | None = None,
) -> tuple[Array, ...]:
    """The outputs of one call, contiguous. `in_place` maps outputs to the inputs whose memory they take.

    KernelFault, whose text begins with `where`, if the call fails or changes anything but the outputs; Refusal if the
    operator is `replaced` and its entry does not take the call, and has left the outputs as they were.
    """
    in_place = in_place or {}
    arrays = {a.name: x for a in spec.inputs_args if (x := values[a.name]) is not None}
    placed = {a.name: strided_copy(arrays[a.name], a, layout, allocate) for a in spec.inputs_args if a.name in arrays}
    before = {name: buffer.copy() for name, (_, buffer) in placed.items() if name not in in_place.values()}
    for arg, shape, dtype in output_metas(spec, arrays):
        if arg.name in in_place:
            placed[arg.name] = placed[in_place[arg.name]]
        else:
            placed[arg.name] = place(np.broadcast_to(np.zeros((), dtype), shape), arg, layout, allocate, poison)
    given = {**values, **{name: view for name, (view, _) in placed.items()}}
    old = {name: placed[name][1].copy() for name in in_place.values()}
    status = _call(spec, given, where, getattr(allocate, "doc", ""))
    for name, buffer in before.items():
        _demand(placed[name][1].tobytes() == buffer.tobytes(), f"{where}: the input {name} was written to")
    if status != "OK":
        for arg in spec.outputs:
            buffer = placed[arg.name][1]
            same = (buffer == (old[in_place[arg.name]] if arg.name in in_place else poison)).all()
            _demand(bool(same), f"{where}: {status}, but the output {arg.name} was written to")
        raise Refusal(f"{where}: {status}")
    results = []
    for arg in spec.outputs:
        view, buffer = placed[arg.name]
        results.append(np.array(view, order="C", copy=True))
        around = buffer.copy()
        raw(np.ndarray(view.shape, view.dtype, around, address_of(view) - address_of(buffer), view.strides))[...] = (
            np.void(bytes([poison] * view.dtype.itemsize))
        )
        # An input that became the output had this poison around it too, the one of `place`.
        _demand((around == poison).all(), f"{where}: bytes around the output {arg.name} were written to")
    return tuple(results)


class Standing:
    """Calls on tensors that stay where they are in memory, whose contents may be replaced."""

    def __init__(self, spec: Spec, values: Mapping[str, Any]) -> None:
        self.spec, self.values = spec, dict(values)
        arrays = {a.name: x for a in spec.inputs_args if (x := values[a.name]) is not None}
        self.inputs = {name: np.array(x, order="C", copy=True) for name, x in arrays.items()}
        self.outputs = {arg.name: np.empty(shape, dtype) for arg, shape, dtype in output_metas(spec, arrays)}

    def fill(self, values: Mapping[str, Any]) -> None:
        """Other contents, of the same shapes, and other scalars."""
        self.values.update(values)
        for name, x in self.inputs.items():
            raw(x)[...] = raw(values[name])

    def __call__(self, where: str) -> tuple[Array, ...]:
        """The outputs of one call; see `run`."""
        for output in self.outputs.values():
            raw(output)[...] = np.void(bytes([POISONS[0]] * output.itemsize))
        status = _call(self.spec, {**self.values, **self.inputs, **self.outputs}, where)
        if status != "OK":
            raise Refusal(f"{where}: {status}")
        return tuple(x.copy() for x in self.outputs.values())


def output_metas(spec: Spec, arrays: Mapping[str, Array]) -> Iterator[tuple[Arg, tuple[int, ...], np.dtype[Any]]]:
    """Each output with the shape and dtype that it has for these inputs."""
    dims: dict[str, Any] = {}
    for arg in spec.inputs_args:
        if arg.name in arrays:
            shape, letters = arrays[arg.name].shape, arg.shape.split()
            lead = len(shape) - len(letters) + 1
            dims.update(zip(letters[::-1], shape[::-1], strict=False))
            if letters[0] == "...":
                dims["..."] = shape[:lead]
    dtype = next(arrays[a.name].dtype for a in spec.inputs_args if a.dtype in ("T", "any"))
    for arg in spec.outputs:
        yield arg, arg_shape(arg, dims), arg_dtype(arg, dtype)

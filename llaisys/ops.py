"""The operators: `llaisys.ops.linear(x, weight, bias=None, *, out=None)` and the others, made from their SPECs.

They take numpy arrays (bf16 through ml_dtypes), CPU torch tensors and `llaisys.Tensor`, in any mixture and without
copying, and return new arrays of the kind of the first tensor argument; several results come as a named tuple. `out=`
(a tuple if there are several) is written in place and returned; it is never copied. Only two things are copied: an
input whose last axis is not contiguous where the operator needs it so, and integer indices that are not int64 (lists
are taken for these too).

Autograd does not see them: a result has no grad_fn, and an `out` that needs a gradient is refused while gradients are
recorded. One that autograd has saved counts as modified in place, so that backward() refuses it.

Errors are those of `llaisys.errors`; the message names operator, argument, what was expected and what was found.
"""

from __future__ import annotations

import ctypes
import inspect
import reprlib
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _lib
from ._arrays import NUMPY, TORCH, Layout, kind_of
from ._lib import KEPT, MAX_DIMS, PENDING, LlaisysTensor
from .dtypes import INTEGERS, DataType
from .errors import (
    DTypeError,
    IndexRangeError,
    InterruptedCallError,
    InvalidArgumentError,
    LlaisysError,
    ShapeError,
    StrideError,
)
from .reference import SPECS
from .reference.spec import DTYPES, FLOATS, Arg, Spec

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...


_MISSING = object()
_MOST_PLANS = 1024
#: Statuses after which an output has been written to.
_WROTE = (0, InterruptedCallError.status)
_FLOATS = {DataType.of_name(name) for name in FLOATS}
_EXACT = {name: DataType.of_name(name) for name in DTYPES}
_KINDS_TEXT = "a numpy array, a CPU torch tensor or a llaisys.Tensor"


class _Plan:
    """What all calls of one operator share whose arguments have the same kinds, shapes, strides and dtypes.

    `addresses` fetch the address of each tensor, outputs first; `fresh` allocate the outputs where none are given;
    `written` are to be told of a call: number of the tensor and function.
    `frames` are argument lists not in use: the structs, filled in but for their address, and where these lie.
    """

    __slots__ = ("addresses", "frames", "fresh", "function", "layouts", "written")

    def __init__(self, function: Any, layouts: Sequence[Layout | None], addresses: Sequence[Any], fresh: Any) -> None:
        self.function, self.layouts, self.addresses, self.fresh = function, layouts, addresses, fresh
        self.written: list[tuple[int, Callable[[Any], None]]] = []
        self.frames: list[tuple[tuple[LlaisysTensor, ...], tuple[int | None, ...]]] = []

    def frame(self) -> tuple[tuple[LlaisysTensor, ...], tuple[int | None, ...]]:
        structs: list[LlaisysTensor] = []
        pointers: list[int | None] = []
        for layout in self.layouts:
            struct = LlaisysTensor()
            if layout is not None:
                assert layout.strides is not None
                struct.dtype, struct.ndim = layout.dtype, len(layout.shape)
                struct.shape[: struct.ndim] = layout.shape
                struct.strides[: struct.ndim] = layout.strides
            structs.append(struct)
            pointers.append(None if layout is None else ctypes.addressof(struct))
        return tuple(structs), tuple(pointers)


class _Operator:
    """One operator: its SPEC, and the plans of the calls seen so far. `entry` gives its C entry, `check` raises the
    error of a status."""

    def __init__(
        self,
        spec: Spec,
        entry: Callable[[Spec], Any] = _lib.operator_by_address,
        check: Callable[[int], Any] = _lib.check_call,
    ) -> None:
        if spec.args[: len(spec.outputs)] != spec.outputs:
            raise ValueError(f"{spec.name}: a SPEC lists its outputs first")
        self.spec, self.entry, self.check = spec, entry, check
        self.name = spec.name
        self.outputs, self.inputs = spec.outputs, spec.inputs_args
        self.parameters = [a.name for a in self.inputs] + [s.name for s in spec.scalars]
        self.defaults = {a.name: None for a in self.inputs if a.optional} | {
            s.name: s.default for s in spec.scalars if s.default is not None
        }
        self.result: Any = _result_type(spec) if len(self.outputs) > 1 else None
        self.plans: dict[tuple[Any, ...], _Plan] = {}
        self.forms: set[tuple[Any, ...]] = set()

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All inputs and scalars by position; a TypeError like Python's own if they do not fit."""
        form = (len(args), *kwargs)
        if form not in self.forms:
            try:
                self.signature().bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{self.name}(): {error}") from None
            self.forms.add(form)
        values = {**self.defaults, **kwargs}
        return args + tuple([values[name] for name in self.parameters[len(args) :]])

    # ---------------------------------------------------------------- plans

    def plan(self, tensors: Sequence[Any], key: tuple[Any, ...], given: int) -> _Plan | list[Any]:
        """The plan for `tensors`, of which the first `given` are outputs, after all checks.

        Where inputs have to be copied first, all tensors with those copied, and with outputs.
        """
        args = self.spec.args[len(self.outputs) - given :]
        result_kind = next((kind for kind in map(kind_of, tensors[given:]) if kind is not None), NUMPY)
        tensors, copied = list(tensors), False
        layouts: list[Layout | None] = []
        for i, (arg, x) in enumerate(zip(args, tensors, strict=True)):
            label = f"{self.name}: {arg.name}"
            if x is None and arg.optional:
                layouts.append(None)
                continue
            layout, tensors[i] = self.accept(arg, x, label)
            copied = copied or tensors[i] is not x
            layouts.append(layout)
        dtypes = self.check_dtypes(args, layouts)
        sizes = self.check_shapes(args[given:], layouts[given:])
        fresh: list[tuple[tuple[int, ...], Any]] = []
        if not given:
            shapes = [_resolve(arg.shape, sizes) for arg in self.outputs]
            codes = [_EXACT.get(arg.dtype, dtypes.get(arg.dtype, DataType.INVALID)) for arg in self.outputs]
            fresh = [(shape, result_kind.native(code)) for shape, code in zip(shapes, codes, strict=True)]
            if copied:
                return [result_kind.empty(shape, native) for shape, native in fresh] + tensors
            layouts = [*(Layout(s, _row_major(s), c) for s, c in zip(shapes, codes, strict=True)), *layouts]
        elif copied:
            return tensors
        kinds = [kind_of(x) for x in tensors]
        addresses: list[Any] = [_nothing if kind is None else kind.address for kind in kinds[given:]]
        outputs = kinds[:given] if given else [result_kind] * len(self.outputs)
        # Fresh outputs need no check.
        addresses = [k.output_address if given else k.address for k in outputs if k is not None] + addresses
        function = self.entry(self.spec)
        plan = _Plan(function, layouts, addresses, [(result_kind.empty, shape, native) for shape, native in fresh])
        plan.written = [(i, TORCH.written) for i in range(given) if kinds[i] is TORCH]
        if len(self.plans) >= _MOST_PLANS:
            self.plans.clear()
        self.plans[key] = plan
        return plan

    def accept(self, arg: Arg, x: Any, label: str) -> tuple[Layout, Any]:
        """The layout of one argument, and the argument itself or, if the C entry cannot read it so, a copy."""
        kind = kind_of(x)
        if kind is None and arg.role == "in" and arg.dtype == "i64" and isinstance(x, (list, tuple, range)):
            x = _indices(x, label)
            kind = kind_of(x)
        if kind is None:
            raise DTypeError(f"{label}: expected {_KINDS_TEXT}, found {type(x).__name__}")
        layout = kind.layout(x, label)
        if len(layout.shape) > MAX_DIMS:
            raise ShapeError(f"{label}: expected at most {MAX_DIMS} axes, found {len(layout.shape)}")
        if arg.role == "in" and arg.dtype == "i64" and layout.dtype in INTEGERS - {DataType.I64}:
            x = kind.int64(x, label)
            layout = kind.layout(x, label)
        strides = layout.strides
        rows = strides is not None and (arg.strides == "any" or not strides or strides[-1] == 1)
        if rows and layout.usable:
            return layout, x
        if arg.role == "out":
            expected = "strides of whole elements" if strides is None else "a contiguous last axis"
            found = f"strides of {x.strides} bytes" if strides is None else f"strides {strides}"
            raise StrideError(f"{label}: expected {expected}, found {found} for shape {layout.shape}")
        x = kind.compact(x)
        return kind.layout(x, label), x

    def check_dtypes(self, args: Sequence[Arg], layouts: Sequence[Layout | None]) -> dict[str, DataType]:
        """The types that "T" and "any" stand for in this call."""
        found: dict[str, tuple[DataType, str]] = {}
        # Inputs first: an output of another type is the one to blame.
        for arg, layout in sorted(zip(args, layouts, strict=True), key=lambda pair: pair[0].role == "out"):
            if layout is None:
                continue
            dtype, expected = layout.dtype, ""
            if arg.dtype in _EXACT:
                expected = arg.dtype if dtype is not _EXACT[arg.dtype] else ""
            elif arg.dtype == "T" and dtype not in _FLOATS:
                expected = " or ".join(FLOATS)
            else:
                wanted, first = found.setdefault(arg.dtype, (dtype, arg.name))
                expected = f"{wanted.short} as {first}" if dtype is not wanted else ""
            if expected:
                raise DTypeError(f"{self.name}: {arg.name}: expected {expected}, found {dtype.short}")
        return {name: dtype for name, (dtype, _) in found.items()}

    def check_shapes(self, args: Sequence[Arg], layouts: Sequence[Layout | None]) -> dict[str, Any]:
        """Sizes of the shape letters, and the leading axes as "...". The C side checks the outputs, and all again."""
        known: dict[str, tuple[Any, str]] = {}

        def unify(letter: str, size: Any, arg: Arg, shape: tuple[int, ...]) -> None:
            wanted, first = (int(letter), "") if letter.isdigit() else known.setdefault(letter, (size, arg.name))
            if wanted != size:
                like = f" as in {first}" if first else ""
                raise ShapeError(
                    f"{self.name}: {arg.name}: expected {letter} = {wanted}{like}, found {size} (shape {shape})"
                )

        for arg, layout in zip(args, layouts, strict=True):
            if layout is None:
                continue
            letters, shape = arg.shape.split(), layout.shape
            leading = len(shape) - len(letters)
            if letters and letters[0] == "...":
                letters, leading = letters[1:], leading + 1
                fits = leading >= 0
            else:
                fits = leading == 0
            if not fits:
                raise ShapeError(f"{self.name}: {arg.name}: expected shape [{arg.shape}], found {shape}")
            if arg.shape.startswith("..."):
                unify("...", shape[:leading], arg, shape)
            for letter, size in zip(letters, shape[leading:], strict=True):
                unify(letter, size, arg, shape)
        return {letter: size for letter, (size, _) in known.items()}

    def explain(self, error: Exception, tensors: Sequence[Any], scalars: Sequence[Any]) -> Exception:
        """A clear error for what went wrong between the plan and the C entry."""
        if isinstance(error, ctypes.ArgumentError):
            for scalar, value in zip(self.spec.scalars, scalars, strict=True):
                try:
                    (ctypes.c_float if scalar.dtype == "f32" else ctypes.c_int64)(value)
                except TypeError:
                    return DTypeError(f"{self.name}: {scalar.name}: expected a number, found {type(value).__name__}")
                except OverflowError:
                    return InvalidArgumentError(f"{self.name}: {scalar.name}: expected a number that fits, found more")
            return error
        # A refused output: say which.
        for arg, x in zip(self.outputs, tensors, strict=False):
            kind = kind_of(x)
            assert kind is not None
            try:
                kind.output_address(x)
            except LlaisysError as refused:
                return type(refused)(f"{self.name}: {arg.name}: {refused}")
        return error

    # ------------------------------------------------------------ functions

    def function(self) -> Callable[..., Any]:
        """The public function, with the signature and the documentation of the SPEC."""
        spec, plans, single, result = self.spec, self.plans, len(self.outputs) == 1, self.result
        ninputs, nparameters, noutputs = len(self.inputs), len(self.parameters), len(self.outputs)
        ndarray, bind, check = np.ndarray, self.bind, self.check

        def operator(*args: Any, out: Any = None, **kwargs: Any) -> Any:
            if kwargs or len(args) != nparameters:
                args = bind(args, kwargs)
            tensors = args[:ninputs]
            if out is not None:
                if single:
                    tensors = (out, *tensors)
                elif isinstance(out, (tuple, list)) and len(out) == noutputs:
                    tensors = (*out, *tensors)
                else:
                    found = type(out).__name__
                    raise InvalidArgumentError(f"{spec.name}: out: expected a tuple of {noutputs}, found {found}")
            keys: list[tuple[Any, ...]] = []
            for x in tensors:
                if type(x) is ndarray:
                    keys.append((x.shape, x.strides, x.dtype))
                else:
                    kind = kind_of(x)
                    keys.append((type(x),) if kind is None else kind.key(x))
            key = tuple(keys)
            plan = plans.get(key)
            if plan is None:
                planned = self.plan(tensors, key, 0 if out is None else noutputs)
                if isinstance(planned, list):
                    # Copies of inputs are contiguous: this is one step deep. Outputs given are never among the copied.
                    given = tuple(planned[:noutputs])
                    return operator(*planned[noutputs:], *args[ninputs:], out=given[0] if single else given)
                plan = planned
            if PENDING:
                _lib.register_interrupt()
            if out is None:
                tensors = (*[make(shape, native) for make, shape, native in plan.fresh], *tensors)
            try:
                structs, pointers = plan.frames.pop()
            except IndexError:  # the first call, or other threads have them all
                structs, pointers = plan.frame()
            try:
                for struct, address, x in zip(structs, plan.addresses, tensors):  # noqa: B905 (equal, and quicker)
                    struct.data = address(x)
                status = plan.function(*pointers, *args[ninputs:])
            except (LlaisysError, ctypes.ArgumentError) as error:
                raise self.explain(error, tensors, args[ninputs:]) from None
            plan.frames.append((structs, pointers))
            if plan.written and status in _WROTE:
                for i, tell in plan.written:
                    tell(tensors[i])
            if status or KEPT:
                check(status)
            return tensors[0] if single else result(*tensors[:noutputs])

        operator.__name__ = operator.__qualname__ = spec.name
        operator.__module__ = __name__
        operator.__doc__ = _document(spec)
        operator.__signature__ = self.signature()  # type: ignore[attr-defined]
        return operator

    def signature(self) -> inspect.Signature:
        """The parameters of the public function: inputs and scalars as in the SPEC, then `out`."""
        parameter = inspect.Parameter
        parameters = [
            parameter(name, parameter.POSITIONAL_OR_KEYWORD, default=self.defaults.get(name, parameter.empty))
            for name in self.parameters
        ]
        return inspect.Signature([*parameters, parameter("out", parameter.KEYWORD_ONLY, default=None)])


def operator_of(spec: Spec, entry: Callable[[Spec], Any], check: Callable[[int], Any]) -> Callable[..., Any]:
    """The function that this module would have if `entry` gave the C entry of the operator, and `check` its errors."""
    return _Operator(spec, entry, check).function()


def _indices(x: Sequence[Any], label: str) -> np.ndarray[Any, Any]:
    """A list of integers, or of lists of them, as an array."""
    try:
        array = np.asarray(x) if len(x) else np.zeros(0, np.int64)
    except (ValueError, OverflowError):
        raise ShapeError(f"{label}: expected lists of equal lengths, found {reprlib.repr(x)}") from None
    if array.dtype == object:  # numbers beyond 64 bits are objects; so is what is no number
        whole = all(isinstance(item, int) for item in array.flat)
        error, expected = (IndexRangeError, "values that fit int64") if whole else (DTypeError, "integers")
        raise error(f"{label}: expected {expected}, found {reprlib.repr(x)}")
    return array


def _nothing(x: None) -> None:
    """Address of an optional argument that is absent."""


def _result_type(spec: Spec) -> Any:
    """The named tuple of an operator with several outputs: ArgmaxResult(index, value)."""
    name = f"{spec.c_name.removeprefix('llaisys')}Result"
    return namedtuple(name, [arg.name for arg in spec.outputs], module=__name__)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))


def _resolve(text: str, sizes: dict[str, Any]) -> tuple[int, ...]:
    shape: list[int] = []
    for letter in text.split():
        if letter == "...":
            shape += sizes[letter]
        else:
            shape.append(int(letter) if letter.isdigit() else sizes[letter])
    return tuple(shape)


def _document(spec: Spec) -> str:
    def describe(arg: Arg) -> str:
        dtype = " or ".join(FLOATS) if arg.dtype == "T" else "any dtype" if arg.dtype == "any" else arg.dtype
        notes = [f"[{arg.shape}] {dtype}"]
        notes += ["optional"] if arg.optional else []
        notes += [f"may be {' or '.join(arg.may_alias)}"] if arg.may_alias else []
        notes += [arg.doc] if arg.doc else []
        return f"    {arg.name}: {', '.join(notes)}"

    lines = [spec.summary, "", f"    {spec.formula}", "", "Inputs:", *map(describe, spec.inputs_args)]
    if spec.scalars:
        lines += ["Scalars:", *(f"    {s.name}: {s.dtype}{', ' + s.doc if s.doc else ''}" for s in spec.scalars)]
    lines += ["Outputs (new, or `out=`):", *map(describe, spec.outputs)]
    lines += [f"Accumulation: {spec.accumulate}."]
    lines += [f"Rounding to the storage dtype: {'; '.join(spec.rounding)}."] if spec.rounding else []
    errors = (*spec.raises, "DTypeError, ShapeError, StrideError, AliasError: arguments that do not fit the above")
    lines += ["Errors:", *(f"    {line}" for line in errors), f"Source: {spec.source}"]
    return "\n".join(lines)


_operators = {spec.name: _Operator(spec) for spec in SPECS.values()}
for _name, _operator in _operators.items():
    globals()[_name] = _operator.function()
    if _operator.result is not None:
        globals()[_operator.result.__name__] = _operator.result

__all__ = sorted(_operators)


def __dir__() -> list[str]:
    return sorted([*_operators, *(o.result.__name__ for o in _operators.values() if o.result is not None)])

"""Checks the arguments of a call against a SPEC, without knowing what kind of tensors they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .spec import DTYPES, FLOATS, Arg, Dims, Spec, arg_shape

#: Shape and dtype of a tensor; the dtype by its name in DTYPES, or any other text, which is then refused.
Meta = tuple[tuple[int, ...], str]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Problem:
    """Why a call is refused: the name of the C status without its prefix, and a message that names everything."""

    status: str
    argument: str
    message: str


@dataclass(frozen=True)
class Binding:
    """The sizes of the shape letters in a valid call and its storage dtype (None if no argument has one)."""

    dims: Dims
    dtype: str | None

    def meta(self, arg: Arg) -> Meta:
        """Shape and dtype of `arg`, for example of an output to allocate."""
        return arg_shape(arg, self.dims), (self.dtype or "") if arg.dtype in ("T", "any") else arg.dtype


def describe(array: np.ndarray[Any, Any]) -> Meta:
    """`Meta` of a numpy array."""
    return tuple(array.shape), _NAMES.get(array.dtype, str(array.dtype))


def bind(spec: Spec, tensors: Mapping[str, Meta | None], scalars: Mapping[str, float]) -> Binding | Problem:
    """The sizes and dtype of a call, or the first problem found.

    `tensors` holds the inputs by name, None for an absent optional one; outputs are checked if they are there. Layout,
    aliasing and the values of indices are for the C side to check.
    """
    dims: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    for arg in (*spec.inputs_args, *spec.outputs):
        meta = tensors.get(arg.name)
        if meta is None:
            if arg.role == "out" or arg.optional:
                continue
            return _problem(spec, "INVALID_ARGUMENT", arg.name, "expected a tensor, found none")
        problem = _check_dtype(spec, arg, meta[1], dtypes) or _check_shape(spec, arg, meta[0], dims)
        if problem:
            return problem
    for constraint in spec.constraints:
        if not constraint.holds(dims, scalars):
            name = constraint.argument
            known = {name: scalars[name]} if name in scalars else dims
            found = ", ".join(f"{k} = {_text(v)}" for k, v in known.items())
            return _problem(spec, constraint.status, name, f"expected {constraint.text}, found {found}")
    return Binding(dims, dtypes.get("T") or dtypes.get("any"))


def _check_dtype(spec: Spec, arg: Arg, found: str, dtypes: dict[str, str]) -> Problem | None:
    allowed = {"T": tuple(FLOATS), "any": tuple(DTYPES)}.get(arg.dtype, (arg.dtype,))
    expected = (dtypes.get(arg.dtype),) if arg.dtype in dtypes else allowed
    if found not in expected:
        return _problem(spec, "DTYPE", arg.name, f"expected {' or '.join(map(str, expected))}, found {found}")
    dtypes[arg.dtype] = found
    return None


def _check_shape(spec: Spec, arg: Arg, shape: tuple[int, ...], dims: dict[str, Any]) -> Problem | None:
    """Match `shape` against `arg.shape`, adding the letters seen for the first time to `dims`."""
    letters = arg.shape.split()
    leading = "..." in letters
    extra = len(shape) - len(letters) + leading
    wanted = f"[{', '.join(f'{x}={_text(dims[x])}' if x in dims else x for x in letters)}]"
    message = f"expected shape {wanted}, found {list(shape)}"
    if extra < 0 or (extra > 0 and not leading):
        return _problem(spec, "SHAPE", arg.name, message)
    sizes: list[Any] = [shape[:extra], *shape[extra:]] if leading else list(shape)
    for letter, size in zip(letters, sizes, strict=True):
        expected = int(letter) if letter.isdigit() else dims.setdefault(letter, size)
        if size != expected and not (arg.or_one and expected == () and size == (1,)):
            return _problem(spec, "SHAPE", arg.name, message)
    return None


def _problem(spec: Spec, status: str, argument: str, text: str) -> Problem:
    return Problem(status, argument, f"{spec.name}: {argument}: {text}")


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

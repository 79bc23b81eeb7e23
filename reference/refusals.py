"""Calls that every operator must refuse, derived from its SPEC; they come on top of `Spec.errors`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from .bounds import Array
from .spec import Arg, Dims, ErrorCase, Spec


def error_dims(spec: Spec) -> Dims:
    """Sizes of the valid call that error cases start from: the first case with all sizes above 2 and some rows."""
    for dims in spec.cases:
        sizes = [n for v in dims.values() for n in (v if isinstance(v, tuple) else (v,))]
        if dims.get("...") != () and min(sizes) > 2:
            return dims
    raise ValueError(f"{spec.name}: cases: expected one with all sizes above 2, found none")


def refusals(spec: Spec) -> Iterator[ErrorCase]:
    """`Spec.errors`, and for each argument: an axis too many, an axis of another size, another dtype, a last axis that
    is not contiguous, and each overlap of an output with another argument that is not allowed."""
    yield from spec.errors
    for arg in spec.args:
        yield from _of_argument(spec, arg)
    for i, out in enumerate(spec.outputs):
        for other in (*spec.outputs[i + 1 :], *spec.inputs_args):
            shift = int(other.name in out.may_alias)  # in place is right there, any other overlap is not
            title = f"{out.name}: overlaps {other.name}" + " shifted by one element" * shift
            change = partial(_overlap, out=out.name, other=other.name, shift=shift)
            yield ErrorCase(title, "ALIAS", change, (spec.name, out.name))


def _of_argument(spec: Spec, arg: Arg) -> Iterator[ErrorCase]:
    def case(title: str, status: str, change: Callable[[Array], Array], *names: str) -> ErrorCase:
        return ErrorCase(f"{arg.name}: {title}", status, lambda v: {arg.name: change(v[arg.name])}, (spec.name, *names))

    # Which of several arguments that disagree is blamed depends on the order in which they are looked at, so the name
    # of the argument is asked for only where it is the one at fault.
    yield case("an axis too many", "SHAPE", lambda x: x[None])
    letters = arg.shape.split()
    for i, letter in enumerate(letters):
        if sum(letter in other.shape.split() for other in spec.args) > 1:
            axis = 0 if letter == "..." else i - len(letters)
            yield case(f"longer in {letter}", "SHAPE", partial(_longer, axis=axis))
    if arg.dtype == "i64":
        yield case("another dtype", "DTYPE", lambda x: x.astype(np.int32), arg.name)
    elif sum(other.dtype == arg.dtype for other in spec.args) > 1:
        yield case("another dtype", "DTYPE", lambda x: np.zeros(x.shape, "f2" if x.dtype == np.float32 else "f4"))
    if arg.strides == "rows":
        yield case("last axis not contiguous", "STRIDE", lambda x: np.repeat(x, 2, axis=-1)[..., ::2], arg.name)


def _longer(x: Array, axis: int) -> Array:
    return np.concatenate([x, x.take([0], axis=axis)], axis=axis)


def _overlap(values: dict[str, Any], out: str, other: str, shift: int) -> dict[str, Any]:
    """Both arrays at the start of one buffer, the output `shift` of its elements later."""
    a, b = values[out], values[other]
    buffer = np.zeros(max(a.nbytes, b.nbytes) + shift * a.itemsize, np.uint8)
    moved = buffer[: b.nbytes].view(b.dtype).reshape(b.shape)
    moved[...] = b
    return {out: buffer[shift * a.itemsize :][: a.nbytes].view(a.dtype).reshape(a.shape), other: moved}

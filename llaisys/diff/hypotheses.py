"""Says what a wrong result would be the right one of: the first known mutation of its operator that explains it.

A mutation is accepted if every element that was captured is within the bound of the changed operator (or has its bits,
where the operator is exact), while those of the right one are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..reference import Spec
from ..reference.bounds import Oracle, finfo, half_ulp, nearest, ulp
from ..reference.compare import ratios
from ..reference.numerics import f64
from .calls import Array, Call, Mutation, Results, cut, explains
from .mutations import MUTATIONS
from .shape import Axis, describe_indices, exchanged_text, find_exchange, find_move

__all__ = ["find_hypothesis"]

#: Computes the outputs by name from inputs and scalars.
Rerun = Callable[[dict[str, Any], dict[str, float]], Mapping[str, Array]]


def find_hypothesis(
    spec: Spec,
    inputs: Mapping[str, Any],
    scalars: Mapping[str, float],
    outputs: Mapping[str, Array],
    *,
    wrong: Mapping[str, Array] | None = None,
    rerun: Rerun | None = None,
) -> str | None:
    """The simplest known mutation that explains `outputs`, in words; None if none does, or nothing is wrong.

    Of large calls some rows and features are looked at: spread evenly, and of those that `wrong` (a mask by the name of
    the output) marks, where it is given. `rerun(inputs, scalars)`, if given, computes the outputs by name once more,
    with the kernel under test by itself.
    """
    with np.errstate(all="ignore"):
        captured = Call(spec, dict(inputs), dict(scalars), dict(outputs), inputs, dict(wrong or {}))
        call = cut(captured)
        if call is None:
            return None
        right = call.right()
        if explains(call, right) and not _truncated(call, right):
            return None
        for mutation in sorted((*MUTATIONS.get(spec.name, ()), *ALWAYS), key=lambda m: m.likely):
            try:
                results = mutation.make(call)
            except (ValueError, IndexError, ZeroDivisionError, OverflowError):  # sizes for which it means nothing
                continue
            if results and explains(call, {**right, **results}):
                return mutation.text
        return _moved(captured) or (_again(captured, rerun) if rerun else None)


# ------------------------------------------------------------------ any operator


def _toward_zero(y: Array, dtype: np.dtype[Any]) -> Array:
    """f64 values of `dtype`, rounded toward zero."""
    near = nearest(y, dtype)
    return np.where(np.abs(near) > np.abs(y), near - np.sign(y) * ulp(np.nextafter(np.abs(near), 0), dtype), near)


def _truncated(call: Call, right: Mapping[str, Oracle]) -> bool:
    """Whether each value is one within the bound on what comes before the final rounding, rounded toward zero; and not
    to nearest."""
    to_nearest = True
    for name, oracle in right.items():
        found, dtype = call.outputs[name], call.outputs[name].dtype
        if oracle.exact and oracle.y.dtype == dtype:  # a copy, or an index
            continue
        y, a = oracle.y.astype(np.float64), np.asarray(oracle.a, np.float64)
        value, size, lowest = np.abs(found.astype(np.float64)), np.abs(y), np.maximum(np.abs(y) - a, 0)
        if not np.isfinite(value[np.isfinite(y)]).all() or float(finfo(dtype).eps) < 1e-5:
            return False
        use = np.isfinite(y) & np.isfinite(a)
        if not ((value >= _toward_zero(lowest, dtype)) & (value <= _toward_zero(size + a, dtype)))[use].all():
            return False
        to_nearest = to_nearest and bool((value >= nearest(lowest, dtype))[use].all())
    return not to_nearest


def _truncation(call: Call) -> Results | None:
    return {name: call.outputs[name] for name in call.outputs} if _truncated(call, call.right()) else None


def _ties_away(call: Call) -> Results | None:
    right = call.right()
    if not all(oracle.exact for oracle in right.values()):
        return None
    results: Results = {}
    for name, oracle in right.items():
        dtype = call.outputs[name].dtype
        if dtype.kind in "iu" or oracle.y.dtype == dtype:
            return None
        y = oracle.y
        results[name] = (np.sign(y) * _toward_zero(np.abs(y) + half_ulp(y, dtype), dtype)).astype(dtype)
    return results


def _flushed(call: Call) -> Results | None:
    results: Results = {}
    for name, oracle in call.right().items():
        if oracle.y.dtype.kind in "iu" or oracle.exact:
            return None
        small = np.abs(oracle.y) < float(finfo(call.outputs[name].dtype).smallest_normal)
        if small.any():
            results[name] = Oracle(np.where(small, 0.0, oracle.y), np.where(small, 0.0, oracle.a))
    return results


def _other_output(call: Call) -> Results | None:
    """Bits of an input instead of those of the output."""
    for name, x in call.inputs.items():
        for out, found in call.outputs.items():
            if x is not None and name != "weight" and x.shape == found.shape and x.dtype == found.dtype:
                results: Results = {out: x}
                if explains(call, {**call.right(), **results}):
                    return results
    return None


ALWAYS = (
    Mutation("truncated toward zero instead of rounded to nearest", _truncation),
    Mutation("ties rounded away from zero instead of to even", _ties_away),
    Mutation("subnormal results flushed to zero", _flushed),
    Mutation("the output is a copy of an input: nothing was computed", _other_output),
)


def _moved(captured: Call) -> str | None:
    """Rows, heads or features computed from those of another place; of large calls, among the first ones."""
    name = captured.spec.name
    if name == "linear":
        x = captured["x"].reshape(-1, captured["x"].shape[-1])
        few = captured.take({"x": x[:8]}, lambda y: y.reshape(len(x), -1)[:8])
        return _moved_features(few) if len(captured["weight"]) <= 1 << 14 else None
    call = cut(captured)
    if call is None or name in ("argmax", "embedding"):
        return None
    axes = ["row", "head"] if name in ("rope", "self_attention", "rope_self_attention") else ["row"]
    # Rows that were picked from many have other neighbours than they had.
    whole = all(x.size == y.size for x, y in zip(call.outputs.values(), captured.outputs.values(), strict=True))
    found = (_moved_along(call, i, noun) for i, noun in enumerate(axes) if whole or i)
    return next((text for text in found if text), None)


def _moved_along(call: Call, axis: int, noun: str) -> str | None:
    for name, oracle in call.right().items():
        found = call.outputs[name]
        if oracle.exact or found.ndim <= axis + (noun == "head"):
            continue
        exchanged = find_exchange(found, oracle.y, ratios(found, oracle), axis)
        if exchanged is not None:
            return f"{exchanged_text(Axis(noun, found.shape[axis]), *exchanged)} exchanged"
        move = find_move(found, oracle.y, ratios(found, oracle), axis)
        if move is not None:
            where = describe_indices(move[0], Axis(noun, found.shape[axis])).removeprefix("only ")
            return f"{where} computed from the {noun}s {abs(move[1])} {'after' if move[1] > 0 else 'before'}"
    return None


def _moved_features(call: Call) -> str | None:
    """Features of a linear that another row of the weight gives, with the bias where it belongs."""
    oracle, found, weight, bias = call.right()["out"], f64(call.outputs["out"]), call["weight"], call["bias"]
    hits = np.asarray(~(ratios(call.outputs["out"], oracle) <= 1).all(axis=0))
    wrong = np.flatnonzero(hits)
    if not wrong.size:
        return None
    first = int(wrong[len(wrong) // 2])
    offset = np.zeros(len(weight)) if bias is None else f64(bias)
    distance = np.abs((oracle.y - offset) - (found[:, first, None] - offset[first])).max(axis=0)
    distance[first] = np.inf
    shift = int(np.argmin(distance)) - first
    inside = (wrong + shift >= 0) & (wrong + shift < len(weight))
    moved = weight.copy()
    moved[wrong[inside]] = weight[wrong[inside] + shift]
    if not inside.all() or not explains(call, call.oracle(weight=moved)):
        return None
    where = describe_indices(hits, Axis("feature", len(weight))).removeprefix("only ")
    return f"{where} computed from the weight rows {abs(shift)} {'after' if shift > 0 else 'before'}"


def _again(captured: Call, rerun: Rerun) -> str | None:
    """What the kernel gives when it is called once more, by itself."""
    again, third = (dict(rerun(dict(captured.inputs), dict(captured.scalars))) for _ in range(2))
    if any(again[x].tobytes() != third[x].tobytes() for x in again):
        return "other bits each time that it runs: uninitialised memory or a data race"
    if all(again[x].tobytes() == captured.outputs[x].tobytes() for x in again):
        return None
    captured.outputs = again
    alone = cut(captured)
    if alone is not None and explains(alone, alone.right()):
        return "the operator by itself is right on these inputs: what differs is how it was called, or its memory"
    return None

"""LOCAL, the certificate of one operator call: is the output what the contract admits for these very inputs?

Every element is held against the f64 oracle of the SPEC. Beyond the worst case of rounding it is a fault at once. What
exceeds the bound for independent errors only (`reference/bounds.py`), or is off to one side on the average, is suspect:
constant or correlated data does that. Such a call is repeated on inputs that are moved a little, each number by another
amount, where errors are independent again; it is a fault if the repetition is suspect too.

Operators whose oracle is expensive have a `Screen`: an f32 estimate shows most elements to be within the bound, and the
oracle decides about all others. Nothing is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .reference import Spec, Verdict, check, ratios, worst_case
from .reference.bounds import Array, finfo
from .reference.compare import STANDARD_ERRORS, scatter
from .reference.numerics import cast, f32
from .reference.spec import Screen, arg_dtype

__all__ = ["Again", "Local", "certify", "dither", "error_ratios"]

#: Runs the operator anew on other inputs of the same shapes, by name; returns its outputs by name.
Again = Callable[[dict[str, "Array | None"]], Mapping[str, Array]]

#: Repetitions of a suspect call, each on inputs that are moved by other amounts.
REPETITIONS = 2
#: Relative distance by which inputs are moved: large enough to change the low bits of every sum, in bf16 too.
MOVE = 1 / 16
#: Inputs above this many elements stay as they are: one factor of each product that moves is enough.
MOVED = 1 << 22
#: Elements whose oracle is asked for at a time, and to find out what share of an ulp the bound of the others is.
BATCH, SAMPLE = 4096, 64


@dataclass(frozen=True)
class Local:
    """The certificate of one call.

    `outcome`: "suspect" where a repetition would have to decide, but the call cannot be repeated. `output`: name of the
    output that the rest is about, the worst of several. `ratio`: largest |y - y64| / tolerance; inf where a NaN or
    infinity does not coincide or an exact output differs. `index`, `got`, `expected`: the element with that ratio.
    `bias`: mean error of the magnitude in ulps of the storage dtype (truncation shows as -0.5), `limit`: the largest
    |bias| that rounding to nearest explains. `checked` of the `size` elements of all outputs have a claim made about
    them. `reason`: what is wrong or suspect, "" if nothing; `note`: what cleared a suspect.
    """

    outcome: Literal["pass", "fault", "suspect"]
    output: str = ""
    ratio: float = 0.0
    index: tuple[int, ...] | None = None
    got: Any = None
    expected: Any = None
    bias: float = 0.0
    limit: float = math.inf
    checked: int = 0
    size: int = 0
    reason: str = ""
    note: str = ""

    def __bool__(self) -> bool:
        return self.outcome == "pass"


def certify(
    spec: Spec,
    inputs: Mapping[str, Array | None],
    scalars: Mapping[str, float],
    outputs: Mapping[str, Array],
    *,
    again: Again | None = None,
) -> Local:
    """The certificate of the call of `spec` that made `outputs` of `inputs` and `scalars`, all by name."""
    values = {**inputs, **scalars}
    name, verdict, local = _worst(_verdicts(spec, values, outputs))
    if verdict and not verdict.biased:
        return local
    if not verdict:
        with worst_case():
            _, certain, fault = _worst(_verdicts(spec, values, outputs))
        if not certain:
            return replace(fault, outcome="fault", ratio=local.ratio, reason=f"{fault.output}: {certain.reason}")
    reason = f"{name}: {verdict.reason or _biased(verdict)}"
    if again is None:
        return replace(local, outcome="suspect", reason=reason)
    for seed in range(REPETITIONS):
        moved = dither(spec, inputs, np.random.default_rng(seed))
        name, repeated, _ = _worst(_verdicts(spec, {**moved, **scalars}, again(moved)))
        if not repeated or repeated.biased:
            reason += f"; repeated on inputs that were moved a little, {name}: {repeated.reason or _biased(repeated)}"
            return replace(local, outcome="fault", reason=reason)
    return replace(local, note=f"{reason}; not so on inputs that were moved a little, so it is the data")


def dither(spec: Spec, inputs: Mapping[str, Array | None], rng: np.random.Generator) -> dict[str, Array | None]:
    """The inputs with each floating-point number moved by another random amount of up to a sixteenth of itself, so that
    rounding errors have nothing in common; large inputs (weights) stay."""
    moved = dict(inputs)
    for arg in spec.inputs_args:
        x = moved.get(arg.name)
        if x is not None and arg.dtype == "T" and x.size <= MOVED:
            factor = 1 + MOVE * (2 * rng.random(x.shape, np.float32) - 1)
            with np.errstate(all="ignore"):
                moved[arg.name] = cast(f32(x) * factor, x.dtype)
    return moved


def error_ratios(
    spec: Spec, inputs: Mapping[str, Array | None], scalars: Mapping[str, float], outputs: Mapping[str, Array]
) -> dict[str, Array]:
    """|y - y64| / tolerance of every element, by output, from the whole oracle: for the shape of an error."""
    oracles = spec.call(spec.oracle, {**inputs, **scalars})
    return {arg.name: ratios(outputs[arg.name], oracle) for arg, oracle in zip(spec.outputs, oracles, strict=True)}


def _biased(verdict: Verdict) -> str:
    what, mean = "magnitudes", verdict.outward
    if abs(verdict.bias) > abs(mean):
        what, mean = "values", verdict.bias
    return f"{what} are off by {mean:+.3g} ulp on the average, more than {verdict.limit:.3g}"


def _verdicts(spec: Spec, values: Mapping[str, Any], outputs: Mapping[str, Array]) -> dict[str, Verdict]:
    """What the bound in force says of each output."""
    dtype = next(x.dtype for a in spec.inputs_args if a.dtype in ("T", "any") and (x := values[a.name]) is not None)
    if spec.screen is not None:
        (arg,) = spec.outputs
        return {arg.name: _screened(spec, spec.screen, values, outputs[arg.name], arg_dtype(arg, dtype))}
    oracles = spec.call(spec.oracle, values)
    return {
        arg.name: check(outputs[arg.name], oracle, arg_dtype(arg, dtype))
        for arg, oracle in zip(spec.outputs, oracles, strict=True)
    }


def _worst(verdicts: Mapping[str, Verdict]) -> tuple[str, Verdict, Local]:
    """Name and verdict of the output to speak of, and the certificate as if it passed."""
    name, verdict = max(verdicts.items(), key=lambda item: (not item[1], item[1].biased, item[1].worst))
    local = Local(
        outcome="pass",
        output=name,
        ratio=verdict.worst,
        index=verdict.index,
        got=verdict.got,
        expected=verdict.expected,
        bias=verdict.outward,
        limit=verdict.limit,
        checked=sum(v.checked for v in verdicts.values()),
        size=sum(v.size for v in verdicts.values()),
    )
    return name, verdict, local


def _screened(spec: Spec, screen: Screen, values: Mapping[str, Any], output: Array, dtype: np.dtype[Any]) -> Verdict:
    """`check` by way of `Spec.screen`.

    The estimate is within a / 2 of y, so what is within half an ulp and a / 2 of the estimate is within the tolerance.
    """
    estimate, least = spec.call(screen.estimate, values)
    size = output.size
    if output.shape != estimate.shape:
        return Verdict(False, np.inf, size=size, reason=f"shape: expected {estimate.shape}, found {output.shape}")
    if output.dtype != dtype:
        return Verdict(False, np.inf, size=size, reason=f"dtype: expected {dtype}, found {output.dtype}")
    if size == 0:
        return Verdict(True)
    with np.errstate(all="ignore"):
        found = f32(output)
        half = _half_ulp(estimate, dtype)
        error = found - estimate
        excess = np.abs(error) / (half + least / 2)
        odd = ~np.isfinite(excess)
        if odd.any():
            same = (found == estimate) | (np.isnan(found) & np.isnan(estimate))
            excess[odd] = np.where(same[odd], 0.0, np.inf)
        other = np.flatnonzero(found != (want := f32(cast(estimate, dtype))))
        shift = (found.reshape(-1)[other] - want.reshape(-1)[other]) / (2 * half.reshape(-1)[other])
    flat = excess.reshape(-1)
    order = np.flatnonzero(flat > 1)
    order = order[np.argsort(-flat[order])]
    if len(order) < len(flat):  # the largest of those that are seen to be right, for the ratio to report
        order = np.append(order, np.argmax(np.where(flat > 1, -1.0, flat)))
    worst, where, failed, unclaimed, expected = -1.0, (0,) * output.ndim, 0, 0, math.nan
    for begin in range(0, len(order), BATCH):
        index = np.unravel_index(order[begin : begin + BATCH], output.shape)
        (oracle,) = spec.call(lambda *args, at=index: screen.oracle(at, *args), values)
        ratio = ratios(output[index], oracle)
        first = int(np.argmax(ratio))
        if ratio[first] > worst:
            worst, expected = float(ratio[first]), oracle.y[first].item()
            where = tuple(int(axis[first]) for axis in index)
        unclaimed += int(np.count_nonzero(np.isinf(oracle.a)))
        failed += int(np.count_nonzero(ratio > 1))
        if failed:
            break
    bias, outward, limit = 0.0, 0.0, math.inf
    if dtype != np.float32:
        bias, outward, limit = _screened_bias(spec, screen, values, estimate, half, other, shift)
    got, reason = output[where].item(), ""
    if failed:
        some = "at least " if len(order) > begin + BATCH else ""
        reason = f"{some}{failed} of {size} elements out of bound, worst at {where}: "
        reason += f"expected {expected!r}, found {got!r}" + (f", ratio {worst:.3g}" if np.isfinite(worst) else "")
    checked = size - unclaimed
    return Verdict(not failed, worst, where, got, expected, failed, checked, size, bias, outward, limit, reason)


def _screened_bias(
    spec: Spec, screen: Screen, values: Mapping[str, Any], estimate: Array, half: Array, other: Array, shift: Array
) -> tuple[float, float, float]:
    """`bias`, `outward` and `limit` of a Verdict, where the elements `other` differ from the rounded estimate by
    `shift` ulps. The bound, in ulps, is that of a sample."""
    flat, finite = estimate.reshape(-1), np.isfinite(shift)
    other, shift = other[finite], np.clip(shift[finite].astype(np.float64), -1, 1)
    sides = np.stack([shift, shift * np.sign(flat[other])])
    mean, limit = sides.sum(axis=-1) / flat.size, STANDARD_ERRORS / flat.size
    if np.abs(mean).max() > limit:
        some = np.arange(0, flat.size, max(1, flat.size // SAMPLE))
        (oracle,) = spec.call(lambda *args: screen.oracle(np.unravel_index(some, estimate.shape), *args), values)
        step = 2 * half.reshape(-1)[some].astype(np.float64)
        share = np.minimum(np.where(step > 0, oracle.a / np.maximum(step, 1e-300), np.inf), 1.0)
        if (share == 1).all():  # not known to an ulp before the final rounding, of which it says nothing
            return float(mean[0]), float(mean[1]), math.inf
        # Result and estimate both have such errors.
        likely = STANDARD_ERRORS * math.sqrt(2 * scatter(share) / len(some)) if oracle.independent else math.inf
        common = 2 * float(share.mean())
        limit = max(limit, min(common, likely / math.sqrt(flat.size)))
        if np.abs(mean).max() > limit:
            _, once = np.unique(flat, return_index=True)  # equal values have equal errors, and count once
            mean = sides[:, np.isin(other, once, assume_unique=True)].sum(axis=-1) / len(once)
            limit = max(STANDARD_ERRORS / len(once), min(common, likely / math.sqrt(len(once))))
    return float(mean[0]), float(mean[1]), limit


def _half_ulp(x: Array, dtype: np.dtype[Any]) -> Array:
    """`half_ulp` of f32 `x`, in f32: what the exponent bits alone say is the power of two at or below |x|."""
    power = (x.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    info = finfo(dtype)
    return np.maximum(power, np.float32(info.smallest_normal)) * np.float32(math.ldexp(1.0, -1 - int(info.nmant)))

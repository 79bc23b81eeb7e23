"""One operator at one of the sizes of its SPEC: the kernel beside torch and the numpy twin.

All implementations of a case get the same inputs, are checked against the f64 oracle, and then timed, the kernel and
torch in turns. Weights and KV caches are cold, as they are in a model: copies take turns that are together larger than
the caches. Results go to tensors that exist, where the implementation takes one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from .. import _lib, ops
from ..errors import InternalError
from ..reference import FLOATS, SPECS, check
from ..reference.bounds import Oracle, ulp
from ..reference.spec import BenchCase, Dims, Spec, empty_outputs
from .measure import Call, copies_for, in_turns, installed, last_level_cache, rotating
from .roof import Roofs

IMPLEMENTATIONS = ("native", "torch", "numpy")
#: Inputs that a model finds in memory and not in a cache.
COLD = {"linear": {"weight"}, "self_attention": {"k", "v"}, "rope_self_attention": {"k", "v"}}
#: Bytes of a cache line.
LINE = 64

#: Index into an output (None: all of it), and the inputs of a call that gives just that.
Sample = tuple[Any, dict[str, Any]]


class Repeating(np.random.Generator):
    """Normal values of a million draws over and over: the weights of an lm_head are 233 million, and take seconds."""

    _PERIOD = 999_983  # a prime, so that no two rows are alike

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        """As of the base class."""
        shape = () if size is None else size
        if out is not None or np.prod(shape, dtype=np.int64) <= self._PERIOD:
            return super().standard_normal(size, dtype, out)
        return np.resize(super().standard_normal(self._PERIOD, dtype), shape)


@dataclass(frozen=True, eq=False)
class Case:
    """A case of a SPEC in one dtype. Hashed and compared by identity, as dims are dicts."""

    spec: Spec
    case: BenchCase
    dtype: str

    @property
    def dims(self) -> Dims:
        """The sizes."""
        return self.case.dims

    @property
    def flops(self) -> int:
        """Floating-point operations of one call."""
        return self.spec.flops(self.dims)

    @property
    def traffic(self) -> int:
        """Bytes that one call must read and write."""
        return self.spec.traffic(self.dims, FLOATS[self.dtype].itemsize)

    @property
    def cached(self) -> bool:
        """Whether the data of repeated calls stays in the caches."""
        return self.spec.name not in COLD and self.traffic < last_level_cache()


@dataclass(frozen=True)
class Result:
    """Series lengths and times by implementation, how far off the oracle each was, as a share of the bound, and the
    roof of memory reads in that minute, which is not that of the next one where others share the memory."""

    case: Case
    times: dict[str, tuple[int, list[float]]]
    worst: dict[str, float]
    read_roof: float

    def seconds(self, implementation: str) -> float:
        """Median of one call."""
        length, times = self.times[implementation]
        return median(times) / length

    def spread(self, implementation: str) -> float:
        """Range of the middle half of the series, as a share of the median."""
        times = self.times[implementation][1]
        low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
        return float((high - low) / middle)

    def row(self, implementation: str, roofs: Roofs) -> dict[str, Any]:
        """The figures of one implementation, for JSON, tables and plots."""
        case, seconds, isa = self.case, self.seconds(implementation), _lib.isa()
        unit, most = roofs.unit(isa, case.dtype)
        read, compute = case.traffic / self.read_roof / seconds, case.flops / most / seconds
        row = {
            "op": case.spec.name,
            "case": case.case.title,
            "phase": case.case.phase,
            "dtype": case.dtype,
            "implementation": implementation,
            "threads": roofs.threads,
            "isa": isa,
            "microseconds": seconds * 1e6,
            "iqr_percent": 100 * self.spread(implementation),
            "flops": case.flops,
            "bytes": case.traffic,
            "gbytes_per_second": case.traffic / seconds / 1e9,
            "gflops": case.flops / seconds / 1e9,
            # The roofline: the time that reading and computing need at least, whichever is longer, as a share.
            "roof": unit if compute > read else "cache" if case.cached else "read",
            "roof_percent": 100 * max(read, compute),
            "read_roof_gbytes_per_second": self.read_roof / 1e9,
            "read_roof_percent": 100 * read,
            "compute_roof_percent": 100 * compute,
            "worst_ratio_to_bound": self.worst[implementation],
        }
        for other in ("torch", "native") if implementation not in IMPLEMENTATIONS else ("torch",):
            if other != implementation and other in self.times:
                row[f"speed_relative_to_{other}"] = self.seconds(other) / seconds
        return row

    def rows(self, roofs: Roofs) -> list[dict[str, Any]]:
        """`row` of every implementation that was measured."""
        return [self.row(implementation, roofs) for implementation in self.times]


def all_cases(
    names: Iterator[str] | list[str] | None = None, dtypes: list[str] | None = None, phase: str | None = None
) -> list[Case]:
    """The cases of the SPECs, in order; of these operators, dtypes and this phase only."""
    return [
        Case(spec, case, dtype)
        for name, spec in SPECS.items()
        if not names or name in names
        for dtype in FLOATS
        if not dtypes or dtype in dtypes
        for case in spec.bench
        if phase in (None, case.phase)
    ]


def run_case(case: Case, others: Mapping[str, Callable[..., Any]] | None = None) -> Result:
    """Check all implementations of a case, and time them. InternalError if one is wrong.

    Without torch it is the kernel and the twin; with `others`, by name, which are called as the functions of
    `llaisys.ops` are, the twin is not timed.
    """
    values = inputs_of(case)
    calls = calls_of(case, values, others)
    wanted = [(index, case.spec.call(case.spec.oracle, part)) for index, part in samples(case.spec, values)]
    worst: dict[str, float] = {}
    for implementation, call in calls.items():
        found = call()
        for i, result in enumerate(found if isinstance(found, tuple) else (found,)):
            array = _numpy(result)
            for index, oracles in wanted:
                oracle = _of_torch(oracles[i], case) if implementation == "torch" else oracles[i]
                verdict = check(array if index is None else array[index], oracle)
                if not verdict:
                    where = f"{case.spec.name} {case.dtype} {case.case.title}: {implementation}"
                    raise InternalError(f"{where}: {case.spec.outputs[i].name}: {verdict.reason}")
                worst[implementation] = max(verdict.worst, worst.get(implementation, 0.0))
    # The twin apart: OpenBLAS lets its threads spin for tens of milliseconds, from which torch suffers.
    twin = {"numpy": calls.pop("numpy")} if not others else {}
    times = in_turns(calls)
    return Result(case, {**times, **in_turns(twin)}, worst, _lib.measure_roof("read", 0))


def _of_torch(oracle: Oracle, case: Case) -> Oracle:
    """What torch's result is held to: an inner rounding that it leaves out moves y by half an ulp, twice that at most
    after the product that follows. (An ulp, and no share of y: f16 has subnormal numbers among its results.)"""
    from .peers import ROUNDS_LESS

    if oracle.exact or case.spec.name not in ROUNDS_LESS:
        return oracle
    return replace(oracle, a=oracle.a + ulp(oracle.y, FLOATS[case.dtype]))


def _numpy(result: Any) -> Any:
    if isinstance(result, (np.ndarray, np.generic)):
        return result
    from .peers import array

    return array(result)


def inputs_of(case: Case) -> dict[str, Any]:
    """Inputs and scalars by name; they depend on nothing but the case."""
    spec = case.spec
    seed = zlib.crc32(f"{spec.name}/{case.case.title}/{case.dtype}".encode())
    values = spec.inputs(spec, Repeating(np.random.PCG64(seed)), case.dims, FLOATS[case.dtype])
    if spec.name == "rearrange":  # from heads first to tokens first; a contiguous x would only be copied
        values["x"] = np.ascontiguousarray(values["x"].swapaxes(0, 1)).swapaxes(0, 1)
    return values


def aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy in the same order in memory that begins with a cache line, as the memory of engines and of torch does.

    Large arrays of numpy begin 16 bytes behind one: linear then took 750 us in place of 670 for 16 rows of bf16.
    """
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    memory = np.empty(array.nbytes + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    rows = memory[start : start + array.nbytes].view(array.dtype).reshape([array.shape[axis] for axis in order])
    copy = rows.transpose(np.argsort(order))
    copy[...] = array
    return copy


def _outputs(case: Case) -> tuple[np.ndarray[Any, Any], ...]:
    return tuple(map(aligned, empty_outputs(case.spec, case.dims, FLOATS[case.dtype]).values()))


def calls_of(
    case: Case, values: dict[str, Any], others: Mapping[str, Callable[..., Any]] | None = None
) -> dict[str, Call]:
    """The implementations, as functions without arguments."""
    spec = case.spec
    cold = COLD.get(spec.name, set())
    copies = copies_for(sum(values[name].nbytes for name in cold)) if cold else 1
    values = {name: aligned(value) if isinstance(value, np.ndarray) else value for name, value in values.items()}
    sets = [values, *({**values, **{name: aligned(values[name]) for name in cold}} for _ in range(copies - 1))]
    names = [arg.name for arg in spec.inputs_args] + [scalar.name for scalar in spec.scalars]
    arguments = [tuple(some[name] for name in names) for some in sets]
    calls = {}
    for name, function in {"native": getattr(ops, spec.name), **(others or {})}.items():
        outputs = _outputs(case)
        calls[name] = rotating(function, arguments, out=outputs if len(outputs) > 1 else outputs[0])
    if installed("torch"):
        from . import peers

        if spec.name in peers.PEERS:
            tensors = [tuple(map(peers.tensor, some)) for some in arguments]
            outputs = tuple(map(peers.tensor, _outputs(case)))
            calls["torch"] = rotating(peers.PEERS[spec.name], tensors, out=outputs)
    if not others:
        calls["numpy"] = rotating(spec.twin, arguments)
    return calls


def samples(spec: Spec, values: Mapping[str, Any]) -> Iterator[Sample]:
    """What of the outputs is checked: all, but of large cases, whose oracle takes half a minute, a part.

    Of attention the first and the last tokens and some between; of linear these with features from end to end, in a
    step that meets every position in a block, all tokens with a few adjacent features, and one token with all features.
    What is chosen by chance is so by the values: the same in every run of the case.
    """
    if "q" in values and len(values["q"]) > 32:
        tokens, cached = len(values["q"]), len(values["k"]) - len(values["q"])
        between = sorted(_random(values["q"]).integers(0, tokens - 1, 8))
        for begin, end in ((0, 16), *((int(row), int(row) + 2) for row in between), (tokens - 16, tokens)):
            part = dict(values)
            part.update({name: values[name][begin:end] for name in ("q", "pos_ids") if name in values})
            part.update({name: values[name][: cached + end] for name in ("k", "v")})
            yield slice(begin, end), part
    elif spec.name == "linear" and values["weight"].size > 1 << 20:
        tokens, features = len(values["x"]), len(values["weight"])
        rng = _random(values["x"])
        kept = np.union1d(np.arange(0, features, features // 1024 | 1), np.arange(features - 32, features))
        some = np.arange(tokens)
        if tokens > 32:
            some = np.union1d(np.r_[0:16, tokens - 16 : tokens], rng.integers(0, tokens, 16))
        first = int(rng.integers(0, max(features - 31, 1)))
        parts = [(some, kept), (np.arange(tokens), np.arange(features)[first : first + 32])]
        if values["weight"].size <= 1 << 24:
            parts.append((rng.integers(0, tokens, 1), np.arange(features)))
        for rows, columns in parts:
            bias = values["bias"] if values["bias"] is None else values["bias"][columns]
            part = {"x": values["x"][rows], "weight": values["weight"][columns], "bias": bias}
            yield np.ix_(rows, columns), part
    else:
        yield None, dict(values)


def _random(x: np.ndarray[Any, Any]) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(x.tobytes()))

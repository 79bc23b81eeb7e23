"""Every operator at the sizes of its SPEC: the kernel beside torch and the numpy twin.

All implementations of a case get the same inputs, are checked against the f64 oracle, and are then timed in turns; the
rows of a case come from that one run. Weights and KV caches are cold, as they are in a model: copies take turns that
are together larger than the caches. Results go to tensors that exist, where the implementation takes one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import llaisys
import peers
from llaisys.reference import FLOATS, SPECS, check
from llaisys.reference.spec import BenchCase, Spec, empty_outputs
from measure import Call, copies_for, in_turns, read_roof, rotating

IMPLEMENTATIONS = ("native", "torch", "numpy")
#: Inputs that a model finds in memory and not in a cache.
COLD = {"linear": {"weight"}, "self_attention": {"k", "v"}, "rope_self_attention": {"k", "v"}}


@dataclass
class Result:
    """Series lengths and times by implementation, and how far off the oracle each was, as a share of the bound."""

    times: dict[str, tuple[int, list[float]]]
    worst: dict[str, float]

    def seconds(self, implementation: str) -> float:
        """Median of one call."""
        length, times = self.times[implementation]
        return median(times) / length


def inputs_of(spec: Spec, case: BenchCase, dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(zlib.crc32(f"{spec.name}/{case.title}/{dtype}".encode()))
    values = spec.inputs(spec, rng, case.dims, FLOATS[dtype])
    if spec.name == "rearrange":  # from heads first to tokens first; a contiguous x would only be copied
        values["x"] = np.ascontiguousarray(values["x"].swapaxes(0, 1)).swapaxes(0, 1)
    return values


def calls_of(spec: Spec, case: BenchCase, dtype: str, values: dict[str, Any]) -> dict[str, Call]:
    """The implementations, as functions without arguments."""
    cold = COLD.get(spec.name, set())
    copies = copies_for(sum(values[name].nbytes for name in cold)) if cold else 1
    sets = [values, *({**values, **{name: values[name].copy() for name in cold}} for _ in range(copies - 1))]
    names = [arg.name for arg in spec.inputs_args] + [scalar.name for scalar in spec.scalars]
    arguments = [tuple(some[name] for name in names) for some in sets]
    outputs = tuple(empty_outputs(spec, case.dims, FLOATS[dtype]).values())
    native = getattr(llaisys.ops, spec.name)
    calls = {"native": rotating(native, arguments, out=outputs if len(outputs) > 1 else outputs[0])}
    if spec.name in peers.PEERS:
        tensors = [tuple(map(peers.tensor, some)) for some in arguments]
        outputs = tuple(empty_outputs(spec, case.dims, FLOATS[dtype]).values())
        calls["torch"] = rotating(peers.PEERS[spec.name], tensors, out=tuple(map(peers.tensor, outputs)))
    calls["numpy"] = rotating(spec.twin, arguments)
    return calls


def samples(spec: Spec, values: dict[str, Any]) -> Iterator[tuple[slice, dict[str, Any]]]:
    """The rows of the outputs that are checked, and a call that gives just these.

    All rows; but of attention, the oracle of which takes half a minute for a whole prompt, the first and the last ones.
    """
    if "q" not in values or len(values["q"]) <= 32:
        yield slice(None), values
        return
    tokens, cached = len(values["q"]), len(values["k"]) - len(values["q"])
    for rows in (slice(0, 16), slice(tokens - 16, tokens)):
        part = dict(values)
        part.update({name: values[name][rows] for name in ("q", "pos_ids") if name in values})
        part.update({name: values[name][: cached + rows.stop] for name in ("k", "v")})
        yield rows, part


@lru_cache(maxsize=1)
def measured(name: str, number: int, dtype: str) -> Result:
    """Check and time all implementations of one case of the SPEC, by its number there."""
    spec = SPECS[name]
    case = spec.bench[number]
    values = inputs_of(spec, case, dtype)
    calls = calls_of(spec, case, dtype, values)
    wanted = [(rows, spec.call(spec.oracle, part)) for rows, part in samples(spec, values)]
    worst: dict[str, float] = {}
    for implementation, call in calls.items():
        found = call()
        for i, result in enumerate(found if isinstance(found, tuple) else (found,)):
            array = peers.array(result) if isinstance(result, torch.Tensor) else result
            for rows, oracles in wanted:
                verdict = check(array if rows == slice(None) else array[rows], oracles[i])
                assert verdict, f"{implementation}: {spec.outputs[i].name}: {verdict.reason}"
                worst[implementation] = max(verdict.worst, worst.get(implementation, 0.0))
    return Result(in_turns(calls), worst)


class Replay:
    """The timer of the rows. They were measured in turns, which pytest-benchmark does not do, so it is shown what each
    series took: of two looks at the clock the second is that much later."""

    def __init__(self) -> None:
        self.steps: Iterator[float] = iter(())
        self.now = 0.0

    def load(self, times: list[float]) -> None:
        self.steps = (step for seconds in times for step in (0.0, seconds))

    def look(self) -> float:
        self.now += next(self.steps)
        return self.now


REPLAY = Replay()


def measured_in_turns() -> float:
    """Named in the JSON file as the timer."""
    return REPLAY.look()


@pytest.mark.benchmark(timer=measured_in_turns)
@pytest.mark.parametrize(
    ("name", "number", "dtype", "implementation"),
    [
        pytest.param(name, number, dtype, implementation, id=f"{name}-{dtype}-{case.title}-{implementation}")
        for name, spec in SPECS.items()
        for dtype in FLOATS
        for number, case in enumerate(spec.bench)
        for implementation in IMPLEMENTATIONS
    ],
)
def test_op(benchmark: BenchmarkFixture, threads: int, name: str, number: int, dtype: str, implementation: str) -> None:
    if implementation == "torch" and name not in peers.PEERS:
        pytest.skip(f"{name} has no peer in torch")
    spec = SPECS[name]
    case = spec.bench[number]
    result = measured(name, number, dtype)
    if implementation not in result.times:
        pytest.skip("too slow to be measured")
    if not benchmark.enabled:
        return
    seconds = result.seconds(implementation)
    traffic, flops = spec.traffic(case.dims, FLOATS[dtype].itemsize), spec.flops(case.dims)
    benchmark.group = name
    benchmark.extra_info.update(
        op=name,
        case=case.title,
        phase=case.phase,
        dtype=dtype,
        implementation=implementation,
        threads=threads,
        isa=llaisys.isa(),
        microseconds=seconds * 1e6,
        gbytes_per_second=traffic / seconds / 1e9,
        gflops=flops / seconds / 1e9,
        read_roof_percent=100 * traffic / seconds / read_roof(threads),
        worst_ratio_to_bound=result.worst[implementation],
    )
    if implementation != "torch" and "torch" in result.times:
        benchmark.extra_info["speed_relative_to_torch"] = result.seconds("torch") / seconds
    length, times = result.times[implementation]
    REPLAY.load(times)
    benchmark.pedantic(lambda: None, rounds=len(times), iterations=length)

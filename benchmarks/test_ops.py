"""Every operator at the sizes of its SPEC: the kernel beside torch and the numpy twin.

The rows of a case come from one run, in which its implementations take turns; `llaisys.bench.cases` has the method.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from llaisys.bench.cases import IMPLEMENTATIONS, Case, Result, all_cases, run_case
from llaisys.bench.peers import PEERS
from llaisys.bench.roof import Roofs
from replay import measured_in_turns, replay


@lru_cache(maxsize=1)
def measured(case: Case) -> Result:
    return run_case(case)


@pytest.mark.benchmark(timer=measured_in_turns)
@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        pytest.param(case, implementation, id=f"{case.spec.name}-{case.dtype}-{case.case.title}-{implementation}")
        for case in all_cases()
        for implementation in IMPLEMENTATIONS
    ],
)
def test_op(benchmark: BenchmarkFixture, roofs: Roofs, case: Case, implementation: str) -> None:
    if implementation == "torch" and case.spec.name not in PEERS:
        pytest.skip(f"{case.spec.name} has no peer in torch")
    result = measured(case)
    if implementation not in result.times:
        pytest.skip("too slow to be measured")
    length, times = result.times[implementation]
    replay(benchmark, times, length, result.row(implementation, roofs))

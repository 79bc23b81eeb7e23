"""Whole models beside transformers, in processes that take turns; `llaisys.bench.models` has the method.

The checkpoints are written on first use, to llaisys/bench in the user's cache. The shape 1.5B takes 3.6 GB there and
some minutes, so it runs only where -k asks for it: `-k "model and 1.5B"`; so do other dtypes than bf16.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from llaisys.bench.engines import COMPARED
from llaisys.bench.models import DECODE, PREFILL, SIZES, cases_of, run_model
from llaisys.bench.roof import Roofs
from llaisys.reference import FLOATS
from replay import measured_in_turns, replay

CASES = [*(f"prefill {n}" for n in PREFILL), *(f"decode {n}" for n in DECODE), "load"]


@pytest.mark.benchmark(timer=measured_in_turns)
@pytest.mark.parametrize(
    ("size", "dtype", "case", "engine"),
    [
        pytest.param(
            *(size, dtype, case, engine),
            id=f"model-{size}-{dtype}-{case}-{engine}",
            marks=[pytest.mark.on_demand(word) for word in (size, dtype) if word not in ("tiny", "0.5B", "bf16")],
        )
        for size in SIZES
        for dtype in FLOATS
        for case in CASES
        for engine in COMPARED
    ],
)
def test_model(benchmark: BenchmarkFixture, roofs: Roofs, size: str, dtype: str, case: str, engine: str) -> None:
    runs = run_model(size, dtype, roofs.threads)
    if case not in cases_of(runs.config):
        pytest.skip("longer than the model has room for")
    replay(benchmark, runs.times(engine, case), 1, runs.row(engine, case, roofs))

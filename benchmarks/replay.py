"""The timer of the rows. Implementations are measured in turns, which pytest-benchmark does not do, so it is shown what
each series took: of two looks at the clock the second is that much later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

_steps: Iterator[float] = iter(())
_now = 0.0


def measured_in_turns() -> float:
    """Named in the JSON file as the timer."""
    global _now
    _now += next(_steps)
    return _now


def replay(benchmark: BenchmarkFixture, times: list[float], calls: int, row: dict[str, Any]) -> None:
    """Make a row of `times`, each that of a series of `calls` calls, with `row` in its `extra_info`."""
    global _steps
    if not benchmark.enabled:
        return
    benchmark.group = row["op"]
    benchmark.extra_info.update(row)
    _steps = (step for seconds in times for step in (0.0, seconds))
    benchmark.pedantic(lambda: None, rounds=len(times), iterations=calls)

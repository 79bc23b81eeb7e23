"""Threads and roofs for all implementations alike, what runs only on demand, and the tables at the end."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

import llaisys
from llaisys.bench import report
from llaisys.bench.measure import same_threads
from llaisys.bench.roof import Roofs, known_roofs


@pytest.fixture(scope="session")
def roofs() -> Iterator[Roofs]:
    """The roofs of the threads that llaisys, torch and numpy's BLAS all use: the default of llaisys."""
    found = known_roofs(llaisys.num_threads())
    with same_threads(found.threads):
        yield found


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "on_demand(word): runs only if -k has the word")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what nobody asked for by name: -k has no word of it, and it does not stand on the command line."""
    wanted = set(re.findall(r"[\w.]+", " ".join([config.option.keyword, *config.args])))
    left = [item for item in items if any(m.args[0] not in wanted for m in item.iter_markers("on_demand"))]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """All that the figures depend on, the roofs among it, for `llaisys bench --from`."""
    output_json["llaisys"] = report.document(known_roofs(llaisys.num_threads()), [])


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The tables of `llaisys bench`."""
    session = getattr(config, "_benchmarksession", None)
    rows = [row.extra_info for row in getattr(session, "benchmarks", []) if "implementation" in row.extra_info]
    if not rows:
        return
    terminalreporter.section("llaisys")
    text = io.StringIO()
    console = Console(file=text, width=100, highlight=False, force_terminal=terminalreporter.hasmarkup)
    console.print(report.render(report.document(known_roofs(llaisys.num_threads()), rows)))
    terminalreporter.write(text.getvalue())

"""Threads for all implementations alike, and the table at the end."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from math import exp, log
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_limits

import llaisys
from measure import last_level_cache, read_roof

#: Load of the machine before it had anything from here to do.
LOAD = os.getloadavg()[0]


@pytest.fixture(scope="session")
def threads() -> Iterator[int]:
    """The number of threads that llaisys, torch and numpy's BLAS all use: the default of llaisys."""
    count = llaisys.num_threads()
    torch.set_num_threads(count)
    with torch.inference_mode(), threadpool_limits(count):
        yield count


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the figures depend on, for the JSON file."""
    machine_info["llaisys"] = {
        "isa": llaisys.isa(),
        "threads": llaisys.num_threads(),
        "read_roof_gbytes_per_second": read_roof(llaisys.num_threads()) / 1e9,
        "last_level_cache_bytes": last_level_cache(),
        "torch": torch.__version__,
    }


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line for each case: the kernel, torch and the twin side by side."""
    session = getattr(config, "_benchmarksession", None)
    rows = [row.extra_info for row in getattr(session, "benchmarks", []) if "implementation" in row.extra_info]
    cases: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        cases[row["op"], row["dtype"], row["case"]][row["implementation"]] = row
    if not cases:
        return
    count, roof = llaisys.num_threads(), read_roof(llaisys.num_threads()) / 1e9
    write = terminalreporter.write_line
    terminalreporter.section(f"operators: {llaisys.isa()}, {count} threads, memory read {roof:.1f} GB/s")
    write("Medians in microseconds. x torch: how many times as fast as torch, measured in turns with it.")
    if LOAD > 0.5:
        write(f"The machine was busy before this began (load average {LOAD:.1f}): the figures mean little.", red=True)
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    op = ""
    for (name, dtype, case), found in cases.items():
        if name != op:
            op = name
            head = f"{'native':>11}{'torch':>11}{'numpy':>11}{'x torch':>9}{'GB/s':>8}{'of roof':>9}{'GFLOP/s':>9}"
            write("")
            write(f"{name:<32}{head}", bold=True)
        line = f"  {dtype:<5}{case:<25}"
        for implementation in ("native", "torch", "numpy"):
            time = found.get(implementation, {}).get("microseconds")
            line += f"{time:>11.1f}" if time else f"{'-':>11}"
        if native := found.get("native"):
            ratio = native.get("speed_relative_to_torch")
            if ratio:
                ratios[name, dtype].append(ratio)
            line += f"{ratio:>9.2f}" if ratio else f"{'-':>9}"
            line += f"{native['gbytes_per_second']:>8.2f}{native['read_roof_percent']:>8.0f}%{native['gflops']:>9.1f}"
        write(line)
    write("")
    write(f"{'x torch, geometric mean':<32}{'f32':>11}{'f16':>11}{'bf16':>11}", bold=True)
    for name in dict.fromkeys(name for name, _ in ratios):
        means = (ratios.get((name, dtype)) for dtype in ("f32", "f16", "bf16"))
        cells = (f"{exp(sum(map(log, some)) / len(some)):>11.2f}" if some else f"{'-':>11}" for some in means)
        write(f"  {name:<30}{''.join(cells)}")

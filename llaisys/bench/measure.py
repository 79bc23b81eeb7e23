"""How the benchmarks measure: calls of several implementations in turns, on as many threads, with cold weights."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .._lib import set_num_threads

#: Seconds of one uninterrupted series of calls, and of the calls before it that do not count: without them kernels were
#: seen to run at half their speed, probably because threads of torch spin for a while after its last call.
SERIES, WARM = 0.01, 0.015
#: Seconds of measuring an implementation, once it has had its least number of series.
BUDGET = 0.1
LEAST, MOST = 5, 10
#: Seconds of one call above which calls before it would change nothing.
LONG = 0.1
#: Seconds of one call above which an implementation is left out (the numpy twins, of the largest cases).
TOO_SLOW = 1.0

Call = Callable[[], Any]


def in_turns(calls: Mapping[str, Call]) -> dict[str, tuple[int, list[float]]]:
    """Time all `calls` side by side: calls in a series, and the seconds of each series, by name.

    The implementations take turns, so that each meets the same state of the machine and a ratio of their medians is
    not one of two different minutes. In each turn the calls of the first WARM seconds are not counted: the threads of
    the one before go to sleep, and its own find a core each. What takes longer than TOO_SLOW is left out.
    """
    lengths: dict[str, int] = {}
    rounds: dict[str, int] = {}
    for name, call in calls.items():
        call()
        once = _seconds(call, 1)
        if once >= TOO_SLOW:  # or did something else have the processor?
            once = min(once, _seconds(call, 1))
        if once < TOO_SLOW:
            lengths[name] = max(1, int(SERIES / max(once, 1e-7)))
            rounds[name] = min(MOST, max(LEAST, int(BUDGET / max(once, SERIES))))
    times: dict[str, list[float]] = {name: [] for name in lengths}
    for i in range(max(rounds.values(), default=0)):
        for name, length in lengths.items():
            if i < rounds[name]:
                if not times[name] or times[name][0] / length < LONG:
                    _warm(calls[name])
                times[name].append(_seconds(calls[name], length))
    return {name: (lengths[name], times[name]) for name in lengths}


def _warm(call: Call) -> None:
    end = time.perf_counter() + WARM
    while time.perf_counter() < end:
        call()


def _seconds(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in itertools.repeat(None, count):
        call()
    return time.perf_counter() - start


def rotating(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], **keywords: Any) -> Call:
    """A call of `function` that takes the next of `arguments` each time."""
    if len(arguments) == 1:
        only = arguments[0]
        return lambda: function(*only, **keywords)
    turn = itertools.cycle(arguments)
    return lambda: function(*next(turn), **keywords)


def copies_for(nbytes: int) -> int:
    """Copies of `nbytes` that have to take turns until each has left every cache when its turn comes again."""
    return max(1, -(-2 * last_level_cache() // max(nbytes, 1)))


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text))
    return max(sizes)


def installed(module: str) -> bool:
    """Whether `module` can be imported, without importing it (of a submodule, what it lies in is imported)."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def same_threads(count: int) -> Iterator[None]:
    """llaisys, torch and, where threadpoolctl is installed, numpy's BLAS use `count` threads."""
    set_num_threads(count)
    with ExitStack() as stack:
        if installed("torch"):
            import torch

            torch.set_num_threads(count)
            stack.enter_context(torch.inference_mode())
        if installed("threadpoolctl"):
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(count))
        yield

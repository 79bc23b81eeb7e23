"""The drift of a report along the depth of the model, as the lines of an SVG chart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .report import Drift

#: Size of the chart and of what lies around its plane, in units of the SVG.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 300, 64, 12, 12, 46
#: More steps than these have no lines of their own.
STEPS = 33
#: What the native run is compared with, by the field of Drift.
SERIES = {"reference": "native against reference", "transformers": "native against transformers"}


def drift_chart(drift: Iterable[Drift], sites: Sequence[str], number: Callable[[float], str]) -> dict[str, Any] | None:
    """Positions of ticks and lines for the template; None if there is nothing to draw.

    Each step has its lines, and "all" the largest over the steps. A zero lies on the lower edge; what is no number
    leaves a gap and is counted.
    """
    drift = [d for d in drift if d.site in set(sites)]
    values: dict[tuple[str, str, str], float] = {}
    odd: set[tuple[str, str]] = set()
    for d in drift:
        for series in SERIES:
            value = getattr(d, series)
            if value is None:
                continue
            if not (math.isfinite(value) and value >= 0):
                odd.add((series, d.site))
                continue
            for step in ("all", str(d.step)):
                key = (step, series, d.site)
                values[key] = max(value, values.get(key, 0.0))
    for series, site in odd:
        values.pop(("all", series, site), None)
    if not values:
        return None
    positive = [value for value in values.values() if value > 0] or [1e-8]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    zeros = any(value == 0 for value in values.values())
    low -= 1 if zeros or low == high else 0

    def x(i: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / len(sites), 1)

    def y(value: float) -> float:
        height = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * height, 1)

    steps = ["all", *sorted({step for step, _, _ in values} - {"all"}, key=int)]
    groups = []
    for step in steps[: STEPS + 1]:
        for series in SERIES:
            points = [(i, values.get((step, series, site))) for i, site in enumerate(sites)]
            lines = _lines([(x(i), None if value is None else y(value)) for i, value in points])
            if lines:
                groups.append({"step": step, "series": series, "lines": lines})
    every = max(1, math.ceil((high - low) / 8))
    ticks = [
        (y(10.0**e), "0" if zeros and e == low else "1" if e == 0 else f"1e{e}".replace("-", "−"))
        for e in range(low, high + 1, every)
    ]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "groups": groups,
        "series": {name: text for name, text in SERIES.items() if any(g["series"] == name for g in groups)},
        "y_ticks": ticks,
        "x_ticks": _layer_ticks(sites, x),
        "odd": sorted({site for _, site in odd}),
        "steps": steps[1 : STEPS + 1],
        "largest": number(max(values.values())),
    }


def _lines(points: list[tuple[float, float | None]]) -> list[str]:
    """The `points` attributes of the polylines between gaps; a single point is a short line."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    runs = [run if len(run) > 1 else [run[0], (run[0][0] + 3, run[0][1])] for run in runs if run]
    return [" ".join(f"{x:g},{y:g}" for x, y in run) for run in runs]


def _layer_ticks(sites: Sequence[str], x: Callable[[int], float]) -> list[tuple[float, str]]:
    """The first site of each layer, or of every second, fifth, ... where there are many."""
    first: dict[int, int] = {}
    for i, site in enumerate(sites):
        match = re.match(r"model\.layers\.(\d{1,6})\.", site)
        if match:
            first.setdefault(int(match[1]), i)
    every = next((n for n in (1, 2, 4, 5, 10, 20, 50, 100) if len(first) / n <= 16), 1000)
    return [(x(i), str(layer)) for layer, i in first.items() if layer % every == 0]

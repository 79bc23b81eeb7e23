"""The roofline: every operator by its arithmetic intensity and its speed, under what the machine can do.

matplotlib is not needed for anything else; the extra `bench` has it.
"""

from __future__ import annotations

import os
from math import atan, degrees
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError, UnsupportedError
from ..files import check_target, new_file
from .report import DTYPES, Row, heading

FORMATS = (".png", ".svg")
PHASES = ("decode", "prefill")
#: Colours that also the colour-blind tell apart (Okabe and Ito), each with a marker of its own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX<>*hp"
_INK, _FAINT = "#333333", "#999999"


def check_plot(path: str | os.PathLike[str]) -> None:
    """Refuse a plot that could not be drawn, before anything is measured.

    InvalidArgumentError for another format than PNG and SVG, UnsupportedError without matplotlib, FileError if the file
    cannot be written.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise InvalidArgumentError(f"plot: expected a file name that ends with .png or .svg, found {os.fspath(path)!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnsupportedError('plot: expected matplotlib, found none; run pip install "llaisys[bench]"') from None
    check_target(path)


def draw(data: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the operators of a document to a PNG or SVG file: one panel for each dtype and phase.

    Full markers are the kernels, hollow ones torch. InvalidArgumentError if there are no operators in it.
    """
    check_plot(path)
    rows = [row for row in data["rows"] if row["op"] != "model" and row["implementation"] != "numpy" and row["flops"]]
    if not rows:
        raise InvalidArgumentError("plot: expected rows of operators that compute, found none")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    phases = [phase for phase in PHASES if any(row["phase"] == phase for row in rows)]
    style = dict(zip(dict.fromkeys(row["op"] for row in rows), _styles(), strict=False))
    roofs: dict[str, float] = data["machine"]["roofs"]
    panels = [(dtype, phase) for phase in phases for dtype in dtypes]
    columns = len(dtypes) if len(dtypes) > 1 else len(panels)
    lines = len(panels) // columns
    with rc_context({"font.size": 9, "axes.edgecolor": _FAINT, "svg.hashsalt": "llaisys"}):
        figure = Figure((max(4.2 * columns, 6.5), 3.4 * lines + 1.4), dpi=150, layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey="row", squeeze=False)
        left, right = _intensities(rows, roofs)
        top = max(_compute(roofs).values())
        for axes, (dtype, phase) in zip(grid.flat, panels, strict=True):
            lowest = min(row["gflops"] for row in rows if row["phase"] == phase or lines == 1)
            axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(lowest / 2, 2.5 * top))
            _roofs(axes, {name: value for name, value in roofs.items() if dtype != "f32" or "16" not in name})
            _points(axes, [row for row in rows if row["dtype"] == dtype and row["phase"] == phase], style)
            axes.set_title(f"{dtype}, {phase}", loc="left", color=_INK, fontweight="bold")
        for axes in grid[-1]:
            axes.set_xlabel("arithmetic intensity, FLOP / byte", color=_INK)
        for axes in grid[:, 0]:
            axes.set_ylabel("GFLOP/s", color=_INK)
        figure.suptitle(heading(data), fontsize=9, color=_INK, x=0.01, ha="left")
        _legend(figure, style, any(row["implementation"] == "torch" for row in rows))
        kind = Path(path).suffix.lower()[1:]
        with new_file(path) as file:
            figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)


def _styles() -> list[tuple[str, str]]:
    return [(_COLOURS[i % len(_COLOURS)], marker) for i, marker in enumerate(_MARKERS)]


def _intensity(row: Row) -> float:
    return float(row["flops"] / row["bytes"])


def _intensities(rows: list[Row], roofs: dict[str, float]) -> tuple[float, float]:
    """Left and right end of all panels, with room for the roofs."""
    found = [_intensity(row) for row in rows]
    return min(found) / 2, 2 * max(*found, 4 * max(_compute(roofs).values()) / roofs["read"])


def _compute(roofs: dict[str, float]) -> dict[str, float]:
    """The roofs of arithmetic that are drawn: that of the scalar tier only if there is no other."""
    found = {name: value for name, value in roofs.items() if name != "read"}
    return {name: value for name, value in found.items() if name != "scalar_f32"} or found


def _roofs(axes: Any, roofs: dict[str, float]) -> None:
    from matplotlib.transforms import offset_copy

    axes.grid(True, which="major", color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    left, right = axes.get_xlim()
    read, compute = roofs["read"], _compute(roofs)
    highest = max(compute.values())
    ridge = highest / read
    text = {"fontsize": 7, "color": _INK, "zorder": 5}
    axes.plot([left, ridge], [left * read, highest], color=_INK, linewidth=1.2, zorder=1)
    # Between what the caches hold, on the left, and what arithmetic binds, on the right, there is room.
    above = offset_copy(axes.transData, axes.figure, x=-3, y=4, units="points")
    axes.text(
        ridge / 12, highest / 12, f"read {read:.0f} GB/s", transform=above, rotation=degrees(atan(read)),
        rotation_mode="anchor", transform_rotates_text=True, **text,
    )  # fmt: skip
    for value in compute.values():
        axes.plot([value / read, right], [value, value], color=_INK, linewidth=1.2, zorder=1)
    for label, value in _labels(compute):
        axes.text(1.2 * ridge, 1.06 * value, label, **text)


def _points(axes: Any, rows: list[Row], style: dict[str, tuple[str, str]]) -> None:
    for row in rows:
        colour, marker = style[row["op"]]
        torch = row["implementation"] == "torch"
        axes.plot(
            _intensity(row), row["gflops"], marker, markersize=5, markeredgecolor=colour, markeredgewidth=1,
            markerfacecolor="none" if torch else colour, alpha=0.9, zorder=3 if torch else 4,
        )  # fmt: skip


def _labels(compute: dict[str, float]) -> list[tuple[str, float]]:
    """Texts for the lines, and where: one, line by line, for those between which there is no room."""
    groups: list[tuple[str, float, float]] = []
    for name, value in sorted(compute.items(), key=lambda item: -item[1]):
        text = f"{name.replace('_', ' ')} {value:.0f}"
        if groups and groups[-1][2] / value < 1.35:
            groups[-1] = (f"{groups[-1][0]}\n{text}", groups[-1][1], value)
        else:
            groups.append((text, value, value))
    return [(text, top) for text, top, _ in groups]


def _legend(figure: Any, style: dict[str, tuple[str, str]], torch: bool) -> None:
    from matplotlib.lines import Line2D

    def entry(colour: str, marker: str, face: str, label: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, markeredgecolor=colour, markerfacecolor=face, label=label)

    entries = [entry(colour, marker, colour, op) for op, (colour, marker) in style.items()]
    if torch:
        entries += [entry(_INK, "o", _INK, "llaisys"), entry(_INK, "o", "none", "torch")]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(len(entries), 7), frameon=False, fontsize=8)

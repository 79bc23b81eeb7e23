"""A report as one HTML page: no network, no fonts, no files beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from .drift_chart import drift_chart
from .report import CERTIFICATES, FAULT, Fault, Flip, Outcome, Report

__all__ = ["to_html"]

#: Upper ends of the colour levels of a ratio; level 0 is an error of 0, the last one all beyond.
EDGES = (0.0, 1e-3, 1e-2, 1e-1, 0.5, 1.0, 10.0, 100.0)
#: What a cell shows beside its colour, by outcome.
SYMBOLS = {"fault": "×", "suspect": "?", "skipped": "–", "pass": ""}
#: The certificates in one line each.
MEANINGS = {
    "LOCAL": "the output is within the bound of the operator's f64 oracle, on the very inputs that the kernel got",
    "EDGE": "each input has the bits that the node which makes it put out",
    "PARAM": "weights, scale, eps, theta, positions and head counts are those of the checkpoint",
    "STATE": "the keys and values that attention saw are this sequence's own, all of them, in order",
    "REPEAT": "the same bits again: with one thread and with many, with the prompt cut elsewhere, and without taps",
}
#: Suspects that are listed by name.
LISTED = 40


def to_html(report: Report) -> str:
    """The whole page. Names and texts of the report are shown as what they are, whatever they hold."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": number,
        "step": step_name,
        "shown": shown,
        "bytes": _bytes,
        "query": _query,
        "flipped": _flipped,
        "lines": _lines,
    }
    order = _sites(report)
    index = {site: i for i, site in enumerate(order)}
    steps = sorted({node.step for node in report.nodes})
    verdict, reason = _verdict(report)
    chart = drift_chart(report.drift, list(order), number)
    page = environment.get_template("page.html.j2").render(
        report=report,
        verdict=verdict,
        reason=reason,
        faults=_grouped(report.faults),
        status=("certified", "fault", "inconclusive")[report.exit_code],
        columns=_columns(order),
        rows=_rows(report, order),
        legend=_legend(),
        steps=steps,
        index=index,
        suspects=[node for node in report.nodes if node.outcome == "suspect"],
        listed=LISTED,
        meanings=MEANINGS,
        chart=chart,
        data=_data(report, order, steps),
    )
    # A lone surrogate in a text must not make the page one that cannot be written.
    return page.encode("utf-8", "replace").decode("utf-8")


def number(value: float | None) -> str:
    """A number in few digits."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+").replace("e+", "e").replace("-", "−")


def step_name(step: int) -> str:
    """Step 0 is the prefill."""
    return "prefill" if step == 0 else f"decode {step}"


def shown(text: str) -> str:
    """Text of a token with what cannot be seen, or changes how other text is seen, written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _lines(text: str) -> str:
    """The same for text of several lines."""
    return "\n".join(map(shown, text.split("\n")))


def _flipped(flip: Flip) -> str:
    return "no evidence of a fault" if flip.margin <= flip.noise else "more than rounding explains"


def _query(text: str) -> str:
    """A value for the fragment of a link."""
    return quote(text.encode("utf-8", "replace"), safe="")


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _verdict(report: Report) -> tuple[str, str]:
    nodes, worst = report.nodes, report.worst
    sites, steps = len({node.site for node in nodes}), len({node.step for node in nodes})
    checked, size = sum(node.checked for node in nodes), sum(node.size for node in nodes)
    extent = f"{len(nodes)} nodes ({sites} sites, {steps} steps), {checked:,} of {size:,} elements certified."
    if worst is not None:
        extent += f" Largest ratio {number(worst.ratio)}, at {worst.site} ({step_name(worst.step)})."
    if report.nonfinite:
        extent += f" Not finite: {report.nonfinite}."
    if report.exit_code == FAULT:
        first = report.faults[0]
        others = len({fault.site for fault in report.faults}) - 1
        more = f"{others} other site{'s are' if others > 1 else ' is'} at fault too. " if others else ""
        guess = f"Hypothesis: {first.hypothesis}. " if first.hypothesis else ""
        return f"{first.certificate} fault at {first.site}", guess + more + extent
    suspects = sum(node.outcome == "suspect" for node in nodes)
    if suspects:
        return f"Inconclusive: {suspects} suspect node{'s' if suspects > 1 else ''}", extent
    if report.exit_code:
        return "Inconclusive: nothing was checked", extent
    return "Certified", f"What differs from the reference is rounding that the contract admits. {extent}"


def _grouped(faults: Iterable[Fault]) -> list[list[Fault]]:
    """The faults of one site and certificate together, over all steps."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.site, fault.certificate), []).append(fault)
    return list(groups.values())


# ------------------------------------------------------------------ the heat map


def _sites(report: Report) -> dict[str, str]:
    """Site -> operator in the order in which they ran, with those that only a fault names."""
    order = {node.site: node.op for node in sorted(report.nodes, key=lambda node: node.step)}
    return order | {fault.site: fault.op for fault in report.faults if fault.site not in order}


def _place(site: str) -> tuple[str, str]:
    """Row and column of a site: its layer and its name in the layer; a site outside of the layers is a row itself."""
    match = re.fullmatch(r"model\.layers\.(\d{1,6})\.(.+)", site, re.S)
    return (match[1], match[2]) if match else (site, "")


def _columns(order: Iterable[str]) -> list[tuple[str, str]]:
    """Name and short name of each operator of a layer."""
    names = dict.fromkeys(name for _, name in map(_place, order) if name)
    return [(name, name.rpartition(".")[2]) for name in names]


def _rows(report: Report, order: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of the heat map: a label, and one cell per column (None where there is no such node)."""
    columns = [name for name, _ in _columns(order)]
    cells = _cells(report, order)
    rows: dict[str, dict[str, Any]] = {}
    for i, site in enumerate(order):
        label, column = _place(site)
        row = rows.setdefault(label, {"label": label, "layer": bool(column), "cells": {}})
        row["cells"][column] = {"site": i, **cells[site]}
    for row in rows.values():
        row["cells"] = [row["cells"].get(name) for name in columns] if row["layer"] else [row["cells"][""]]
        row["rest"] = max(0, len(columns) - 1)
        row["short"] = row["label"] if row["layer"] else row["label"].removeprefix("model.")
    return list(rows.values())


def _cells(report: Report, order: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Level, outcome and text of each site, the worst over all steps."""
    outcomes: dict[str, Outcome] = {}
    ratios: dict[str, float] = {}
    rank = ("skipped", "pass", "suspect", "fault").index
    for node in report.nodes:
        outcomes[node.site] = max(outcomes.get(node.site, "skipped"), node.outcome, key=rank)
        ratios[node.site] = max(ratios.get(node.site, 0.0), node.ratio, key=_size)
    blamed = {fault.site for fault in report.faults}
    cells = {}
    for site, op in order.items():
        outcome, ratio = "fault" if site in blamed else outcomes.get(site, "skipped"), ratios.get(site, 0.0)
        cells[site] = {
            "level": level(ratio),
            "outcome": outcome,
            "symbol": SYMBOLS[outcome],
            "text": f"{site}, {op}: {outcome}, ratio {number(ratio)}",
        }
    return cells


def _size(ratio: float) -> float:
    return math.inf if math.isnan(ratio) else ratio


def level(ratio: float) -> int:
    """The colour of a ratio."""
    return next((i for i, edge in enumerate(EDGES) if ratio <= edge), len(EDGES))


def _legend() -> list[tuple[int, str]]:
    names = ["0", *(f"≤ {number(edge)}" for edge in EDGES[1:]), f"> {number(EDGES[-1])}"]
    return list(enumerate(names))


def _data(report: Report, order: dict[str, str], steps: list[int]) -> dict[str, Any]:
    """What the script of the page needs, as plain JSON: no NaN, no infinity."""
    index = {site: i for i, site in enumerate(order)}
    letters = {"pass": "p", "fault": "f", "suspect": "s", "skipped": "-"}
    nodes = [
        [
            index[node.site],
            node.step,
            node.position,
            node.rows,
            "".join(letters[node.outcomes.get(name, "skipped")] for name in CERTIFICATES),
            _plain(node.ratio),
            _plain(node.bias),
            node.checked,
            node.size,
        ]
        for node in report.nodes
    ]
    drift = [
        [index[d.site], d.step, _plain(d.reference), _plain(d.transformers)] for d in report.drift if d.site in index
    ]
    first = report.faults[0].site if report.faults else report.worst.site if report.worst else None
    data = {
        "sites": list(order.items()),
        "steps": steps,
        "certificates": CERTIFICATES,
        "edges": EDGES,
        "symbols": SYMBOLS,
        "nodes": nodes,
        "faults": [[index[fault.site], fault.step, fault.certificate, fault.message] for fault in report.faults],
        "drift": drift,
        "first": None if first is None else index[first],
    }
    json.dumps(data, allow_nan=False)
    return data


def _plain(value: float | None) -> float | str | None:
    """Six digits; NaN and infinities as texts."""
    return value if value is None else float(f"{value:.6g}") if math.isfinite(value) else str(value)

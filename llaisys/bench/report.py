"""Results as JSON, as tables for a terminal, and as Markdown.

A document is {"llaisys": version, "machine": what the figures depend on, "rows": the rows of `Result.row` and of
`llaisys.bench.models`}. What pytest-benchmark writes with --benchmark-json holds the same, and is read too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .. import _lib
from ..doctor import cpu_model
from ..errors import InvalidArgumentError
from .measure import last_level_cache
from .roof import ROOFS, Roofs

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Row = dict[str, Any]
#: Load of the machine before it had anything from here to do.
LOAD = os.getloadavg()[0]
BUSY = 0.5
DTYPES = ("f32", "f16", "bf16")
#: What is measured beside the kernels and the engine.
PACKAGES = ("numpy", "torch", "transformers", "openvino", "llama_cpp_python")


def machine(roofs: Roofs) -> dict[str, Any]:
    """What the figures depend on."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": cpu_model(),
        "isa": _lib.isa(),
        "threads": roofs.threads,
        "last_level_cache_bytes": last_level_cache(),
        "roofs": roofs.as_dict(),
        "load_before": LOAD,
        **versions,
    }


def document(roofs: Roofs, rows: list[Row]) -> dict[str, Any]:
    """The document of these rows, measured here and now."""
    from .. import __version__

    return {"llaisys": __version__, "machine": machine(roofs), "rows": rows}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A document from `--json` or from `pytest --benchmark-json`. InvalidArgumentError if the file is neither."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{path}: expected a JSON file of benchmark results, found: {error}") from None
    if isinstance(data, dict) and "benchmarks" in data and isinstance(data.get("llaisys"), dict):
        rows = [bench["extra_info"] for bench in data["benchmarks"] if "implementation" in bench["extra_info"]]
        return {**data["llaisys"], "rows": rows}
    if not isinstance(data, dict) or not {"machine", "rows"} <= data.keys():
        raise InvalidArgumentError(f"{path}: expected benchmark results of llaisys, found other JSON")
    return data


# ------------------------------------------------------------------ tables
#
# A table is made once, of texts, and then drawn for a terminal or as Markdown.


@dataclass
class Figures:
    """A table: a title, the names of its columns, of which `left` are words, and its lines."""

    title: str
    columns: list[str]
    lines: list[list[str]]
    left: int = 2

    def rich(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.left else "right", no_wrap=True, header_style="dim")
        for line in self.lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """As Markdown, with the title as a heading."""
        rule = ["---" if i < self.left else "---:" for i in range(len(self.columns))]
        rows = ("| " + " | ".join(line) + " |" for line in [self.columns, rule, *self.lines])
        return f"### {self.title}\n\n" + "\n".join(rows) + "\n"


def figures(data: dict[str, Any]) -> list[Figures]:
    """The tables of a document: the roofs, each operator, the means over them, the models."""
    rows = data["rows"]
    ops = [row for row in rows if row["op"] != "model"]
    models = [row for row in rows if row["op"] == "model"]
    tables = [roof_figures(data["machine"]["roofs"], data["machine"]["threads"])]
    tables += [op_figures(name, ops) for name in dict.fromkeys(row["op"] for row in ops)]
    if any("speed_relative_to_torch" in row for row in ops):
        tables.append(_means(ops))
    if models:
        tables.append(_models(models))
    return tables


def roof_figures(roofs: dict[str, float], threads: int) -> Figures:
    """The roofs, of `Roofs.as_dict`."""
    lines = [[ROOFS.get(name, name), f"{value:.1f}", _unit(name)] for name, value in roofs.items()]
    return Figures(f"roofs, {_threads(threads)}", ["", "at best", ""], lines, left=1)


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _unit(roof: str) -> str:
    return "GB/s" if roof == "read" else "GFLOP/s"


def op_figures(op: str, rows: list[Row]) -> Figures:
    """One line for each case of an operator: the kernel, torch and the twin side by side."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["op"] == op:
            cases.setdefault((row["dtype"], row["case"]), {})[row["implementation"]] = row
    lines = []
    for (dtype, case), found in cases.items():
        native = found.get("native", {})
        times = [number(found.get(name, {}).get("microseconds")) for name in ("native", "torch", "numpy")]
        lines.append(
            [
                case,
                dtype,
                *times,
                number(native.get("speed_relative_to_torch"), 2),
                number(native.get("gbytes_per_second")),
                number(native.get("gflops")),
                share(native),
            ]
        )
    return Figures(op, ["case", "dtype", "us", "torch", "numpy", "x torch", "GB/s", "GFLOP/s", "of the roof"], lines)


def _means(rows: list[Row]) -> Figures:
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["implementation"] == "native" and "speed_relative_to_torch" in row:
            ratios.setdefault((row["op"], row["dtype"]), []).append(row["speed_relative_to_torch"])
    lines = []
    for op in dict.fromkeys(op for op, _ in ratios):
        some = (ratios.get((op, dtype)) for dtype in DTYPES)
        lines.append([op, *(number(exp(sum(map(log, x)) / len(x)), 2) if x else "-" for x in some)])
    return Figures("x torch, geometric mean", ["", *DTYPES], lines, left=1)


def _models(rows: list[Row]) -> Figures:
    """One line for each figure of a model: the engine and others side by side."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["model"], row["dtype"], row["case"]), {})[row["implementation"]] = row
    others = list(dict.fromkeys(row["implementation"] for row in rows if row["implementation"] != "native"))
    lines = []
    for (model, dtype, case), found in cases.items():
        native = found.get("native", {})
        for what, key in (("tok/s", "tokens_per_second"), ("s", "load_seconds"), ("GiB", "peak_rss_gib")):
            if not any(key in row for row in found.values()):
                continue
            title = "peak RSS" if key == "peak_rss_gib" else case
            digits = 1 if key == "tokens_per_second" else 2
            values = [number(found.get(engine, {}).get(key), digits) for engine in ("native", *others)]
            ratios = [x for name, x in native.items() if name.startswith("speed_relative_to_")]
            ratio = min(ratios) if ratios and key != "peak_rss_gib" else None
            of_roof = share(native)
            if key == "peak_rss_gib" and native:
                of_roof = f"{native['rss_limit_percent']:.0f}% limit"
            lines.append([f"{model} {title}, {what}", dtype, *values, number(ratio, 2), of_roof])
    return Figures("models", ["", "dtype", "native", *others, "x", "of the roof"], lines)


def number(value: float | None, digits: int = 1) -> str:
    """For a table, "-" for what there is not."""
    return "-" if value is None else f"{value:.{digits}f}" if value < 1000 else f"{value:.0f}"


def share(row: Row) -> str:
    """ "83% read": how much of the roof that binds, and which that is."""
    if "roof_percent" not in row:
        return "-"
    return f"{row['roof_percent']:.0f}% {row['roof'].replace('_', ' ')}"


def heading(data: dict[str, Any]) -> str:
    """Machine, tier, threads and versions, in a sentence."""
    facts = data["machine"]
    versions = (f"{name} {facts[name]}" for name in PACKAGES if facts.get(name))
    where = f"llaisys {data['llaisys']} on {facts['cpu']}: {facts['isa']}, {_threads(facts['threads'])}"
    return "; ".join([where, ", ".join(versions)])


def notes(data: dict[str, Any]) -> Iterator[str]:
    """What a reader of the tables must know."""
    operators = [row for row in data["rows"] if row["op"] != "model"]
    if operators:
        yield (
            "Medians in microseconds. x torch: how many times as fast as torch, measured in turns with it. Of the "
            "roof: the time that memory or arithmetic needs at least, whichever is longer, as a share of the time "
            "taken; cache: the data stay in the caches, as in a model, and the share is of memory read all the same."
        )
        yield (
            "What a call from Python costs, two to three microseconds, is in the figures of the kernels and, as its "
            "own, in those of torch: the smallest cases are little else."
        )
    spreads = {
        row["iqr_percent"]: f"{row['op']} {row['dtype']}, {row['case']}"
        for row in operators
        if row["implementation"] == "native" and "iqr_percent" in row  # earlier files have none
    }
    if spreads:
        most = max(spreads)
        yield (
            f"Spread of the series of a kernel, as the range of their middle half: {median(spreads):.1f} % of the "
            f"median in the middle of the cases, {most:.0f} % at most ({spreads[most]})."
        )
    if len(operators) < len(data["rows"]):
        yield (
            "Models: whole processes in turns. Decode: tokens after that many. x: how many times as fast as the "
            "fastest of the others. The limit of the peak RSS is 1.05 x weights + KV cache + 150 MiB."
        )
    if data["machine"]["load_before"] > BUSY:
        load = data["machine"]["load_before"]
        yield f"The machine was busy before this began (load average {load:.1f}): the figures mean little."


def render(data: dict[str, Any]) -> RenderableType:
    """All of a document for a terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(heading(data)), Text()]
    for table in figures(data):
        parts += [table.rich(), Text()]
    return Group(*parts, *(Text(note, style="red" if "busy" in note else "dim") for note in notes(data)))


def markdown(data: dict[str, Any]) -> str:
    """All of a document as Markdown."""
    return "\n".join(
        [heading(data) + ".\n", *(f"{note}\n" for note in notes(data)), *(t.markdown() for t in figures(data))]
    )

"""`llaisys bench`: how fast the operators and whole models are, beside torch and the limits of the machine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Isa, Progress, StorageType, check_reports, command, finish

if TYPE_CHECKING:
    from ..bench.roof import Roofs

MODEL = "model"
_OUTPUT = "Output"


class Phase(str, Enum):
    """Phases of inference."""

    decode = "decode"
    prefill = "prefill"


class Size(str, Enum):
    """Models of `llaisys bench model`: the embedded one, and shapes of Qwen2 with random weights."""

    tiny = "tiny"
    half = "0.5B"
    large = "1.5B"


@command
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP...|model]", help="Operators by name, or model.", show_default="all operators"),
    ] = None,
    dtype: Annotated[
        list[StorageType] | None, typer.Option(help="Only these, one option each.", show_default="all; models: bf16")
    ] = None,
    phase: Annotated[Phase | None, typer.Option(help="Only this one.", show_default="both")] = None,
    size: Annotated[
        list[Size] | None,
        typer.Option(help="Shapes of bench model, one option each; 1.5B writes 3.6 GB.", show_default="tiny and 0.5B"),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="In bench model also this one: openvino or llama.cpp, one option each.",
            show_default="native, and transformers if installed",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Processes of each engine in bench model.")] = 3,
    isa: Annotated[Isa | None, typer.Option(help="Instruction set tier.", show_default="best of the machine")] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, metavar="N", help="Threads of all.", show_default="physical cores"),
    ] = None,
    saved: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Measure nothing; show a file of --json, or of pytest --benchmark-json.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the results; - for stdout.", rich_help_panel=_OUTPUT),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw a roofline: .png or .svg.", rich_help_panel=_OUTPUT),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Time operators at the sizes of Qwen2, or whole models, side by side with torch and transformers if installed.

    Results are checked first and then timed in turns, with cold weights. All operators take about six minutes;
    nothing else should run.
    """
    import json

    from ..bench import plot as plots
    from ..bench import report

    check_reports(json_file)
    if plot is not None:
        plots.check_plot(plot)
    if saved is not None:
        if what:
            raise typer.BadParameter("expected no names with --from, which measures nothing", param_hint="OP")
        data = report.read(saved)
    else:
        dtypes = [x.value for x in dtype or ()]
        sizes = [x.value for x in size or ()]
        data = _measure(what or [], dtypes, phase, sizes, engine or [], rounds, isa, threads)
    if markdown:
        print(report.markdown(data))
    elif str(json_file) != "-":
        _print(report.render(data))
    if plot is not None:
        plots.draw(data, plot)
    finish(0, (json_file, lambda: json.dumps(data, indent=1)))


def _measure(
    what: list[str],
    dtypes: list[str],
    phase: Phase | None,
    sizes: list[str],
    engines: list[str],
    rounds: int,
    isa: Isa | None,
    threads: int | None,
) -> dict[str, Any]:
    from .. import num_threads, set_isa, set_num_threads
    from ..bench import report
    from ..bench.cases import all_cases
    from ..bench.measure import installed
    from ..bench.roof import known_roofs

    names = [name for name in what if name != MODEL]
    cases = all_cases(names, dtypes, phase.value if phase else None) if names or not what else []
    for name in names:
        if not all_cases([name]):
            raise typer.BadParameter(f"expected an operator or {MODEL}, found {name!r}", param_hint="OP")
    if MODEL in what:
        from ..bench.engines import chosen
        from ..bench.models import measure_model, refusals

        compared = chosen(engines)
    elif engines:
        raise typer.BadParameter(f"expected {MODEL} among the names, found {what}", param_hint="--engine")
    if isa is not None:
        set_isa(isa.value)
    if threads is not None:
        set_num_threads(threads)
    if not installed("torch"):
        typer.echo("torch is not installed: the kernels beside their numpy twins only", err=True)
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        progress.show("measuring the roofs of the machine")
        roofs = known_roofs(num_threads())
        rows += _operators(cases, roofs, progress)
        if MODEL in what:
            for size in sizes or ["tiny", "0.5B"]:
                for dtype in dtypes or ["bf16"]:
                    refused = refusals(size, dtype, compared, progress.show)
                    for name, reason in refused.items():
                        typer.echo(f"{size} {dtype} without {name}: {reason}", err=True)
                    taken = tuple(name for name in compared if name not in refused)
                    rows += measure_model(size, dtype, roofs, rounds, progress.show, taken)
    return report.document(roofs, rows)


def _operators(cases: list[Any], roofs: Roofs, progress: Progress) -> list[dict[str, Any]]:
    from ..bench.cases import run_case
    from ..bench.measure import same_threads

    rows = []
    with same_threads(roofs.threads):
        for i, case in enumerate(cases):
            progress.show(f"{case.spec.name} {case.dtype} {case.case.title} ({i + 1} of {len(cases)})", i, len(cases))
            rows += run_case(case).rows(roofs)
    return rows


def _print(content: Any) -> None:
    """To stdout; tables are never cut, so that what is piped on is whole."""
    import shutil

    from rich.console import Console

    width = shutil.get_terminal_size((100, 24)).columns
    Console(width=max(width, 96), highlight=False).print(content)

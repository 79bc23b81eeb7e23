"""`llaisys doctor`: the library, the machine, the versions, and what is wrong."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import EXIT_ERROR, Progress, command


@command
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    roof: Annotated[
        bool, typer.Option("--roof", help="Measure what memory and arithmetic of this machine do at best.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, metavar="N", help="Threads of the kernels.", show_default="physical cores"),
    ] = None,
) -> None:
    """Show the library, the machine and the versions in use, and what is wrong. Exit status 1 if anything is.

    --roof takes a few seconds, in which nothing else should run.
    """
    from .. import doctor as examine

    if threads is not None:
        from .. import set_num_threads

        set_num_threads(threads)
    report = examine.examine()
    if roof and not report.problems:
        report.sections["roofs"] = _roofs()
    if as_json:
        import json

        print(json.dumps(report.as_dict(), indent=2))
    else:
        examine.render(report)
    if report.problems:
        raise typer.Exit(EXIT_ERROR)


def _roofs() -> dict[str, float]:
    """In units of 1e9 per second, with what is being measured shown at a terminal."""
    from ..bench.roof import ROOFS, measure_roofs

    with Progress() as progress:
        return measure_roofs(progress=lambda name: progress.show(f"measuring {ROOFS[name]}")).as_dict()

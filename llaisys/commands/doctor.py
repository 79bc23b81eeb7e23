"""`llaisys doctor`: the library, the machine, the versions, and what is wrong."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import EXIT_ERROR, command


@command
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the library, the machine and the versions in use, and what is wrong. Exit status 1 if anything is."""
    from .. import doctor as examine

    report = examine.examine()
    if as_json:
        import json

        print(json.dumps(report.as_dict(), indent=2))
    else:
        examine.render(report)
    if report.problems:
        raise typer.Exit(EXIT_ERROR)

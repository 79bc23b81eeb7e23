"""`llaisys selftest`: how much of what is wrong the differ finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidArgumentError
from .common import EXIT_FAULT, check_reports, finish, verdict

if TYPE_CHECKING:
    from ..selftest.run import Case
    from ..selftest.summary import Row


@verdict
def selftest(
    faults: Annotated[
        list[str] | None, typer.Argument(metavar="[FAULT]...", help="Only these faults; all of them by default.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A checkout of llaisys.", show_default="the current folder")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Each fault once, in bf16, and a few controls.")] = False,
    controls: Annotated[int, typer.Option(min=0, metavar="N", help="Runs of right libraries.")] = 300,
    show: Annotated[bool, typer.Option("--list", help="List the faults and exit.")] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every run; - for stdout.")
    ] = None,
) -> None:
    """Build kernels with known faults, and count what the differ and the rules of others find of them.

    Needs the sources, a compiler, meson and ninja. All of it takes about half an hour on two cores; --quick five
    minutes. Exit status 1 if a fault was not found or not named rightly, or a right library was blamed.
    """
    from ..selftest.build import source_tree
    from ..selftest.mutants import MUTANTS
    from ..selftest.run import Plan, run
    from ..selftest.summary import as_dict, misses, summarise

    chosen = tuple(mutant for mutant in MUTANTS if not faults or mutant.name in faults)
    unknown = set(faults or ()) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise InvalidArgumentError(f"expected faults of --list, found {', '.join(sorted(unknown))}")
    if show:
        for mutant in chosen:
            print(f"{mutant.name:<32}{'/'.join(mutant.certificates):<14}{mutant.title}")
        return
    check_reports(as_json)
    plan = Plan(mutants=chosen, controls=controls)
    if quick:
        plan = Plan(("tiny"), ("bf16",), ("middle",), plan.prompts[:1], 2, chosen, min(controls, 12))
    cases = _with_progress(lambda progress: run(plan, source_tree(source), progress=progress))
    if str(as_json) != "-":
        _print(summarise(cases), misses(cases))
    status = EXIT_FAULT if misses(cases) else 0
    finish(status, (as_json, lambda: "".join(json.dumps(as_dict(case)) + "\n" for case in cases)))


def _with_progress(work: Any) -> list[Case]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("building", total=None)
        cases: list[Case] = work(
            lambda label, done, total: bar.update(task, description=label, completed=done, total=total)
        )
    return cases


def _print(rows: list[Row], wrong: list[Case]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("rule", *("found", "right site", "right certificate", "false alarms"), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        table.add_row(
            row.rule,
            _share(row.detected, row.faults),
            _share(row.named, row.faults),
            "" if row.certificates is None else _share(row.certificates, row.faults),
            f"{row.alarms} of {row.controls}",
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print(table)
    for case in wrong:
        job, fault = case.job, case.mutant.name if case.mutant else "nothing"
        where = f"{job.get('dtype')} {job.get('isa')}, {job['threads']} threads, layer {job['layer']}"
        named = case.answer.get("error") or (case.answer["faults"][0][:2] if case.alarmed else "nothing")
        console.print(f"{fault} in {case.library} ({where}): blamed {named}")


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f} %)" if whole else "-"

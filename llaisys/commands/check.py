"""`llaisys check`: does each operator keep to its SPEC?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import EXIT_FAULT, EXIT_INCONCLUSIVE, Isa, Progress, StorageType, check_reports, finish, printable, verdict

if TYPE_CHECKING:
    from ..isolation import Result

#: Seconds that a case may take, and what the option for them says.
LIMIT, PATIENCE = 60.0, "A case that takes longer is a fault."
#: Failures of one operator and dtype that are told in full.
TOLD = 4
#: Width of what is written to a file or a pipe.
WIDTH = 100


@verdict
def check(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Operators.", show_default="all of them")
    ] = None,
    dtype: Annotated[StorageType | None, typer.Option(help="Storage type.", show_default="all")] = None,
    isa: Annotated[Isa | None, typer.Option(help="Instruction set tier.", show_default="all of the machine")] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, metavar="N", help="Threads of the kernels.", show_default="1, 2, 3 and 8"),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--from", metavar="TRACE", help="Certify the calls of a trace of llaisys diff --save, or a case."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the weights of a trace are.", show_default="the folder that the trace names"),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help=PATIENCE)] = LIMIT,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result of every case; - is stdout.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each failing case there, for llaisys replay.")
    ] = None,
) -> None:
    """Hold the kernels against their contract: every case of each SPEC, each dtype and tier.

    A case is certified element by element (at most half an ulp and what f32 may add), must give the same bits in every
    memory layout, for any number of threads and for each row alone, and may touch nothing but its outputs. A crash or a
    hang is a fault of the case it happens in. Exit status 0 if all keep to it, 1 if one does not, 2 if nothing was
    checked or (of captured calls, which are not repeated) something stays suspect.
    """
    from .._lib import usable_cpus
    from ..conformance import conformance, plan, tiers

    check_reports(as_json)
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
    if trace is not None:
        results = list(_captured(trace, model, ops or [], dtype.value if dtype else None))
    else:
        available = tiers()
        if isa is not None and isa.value not in available:
            from ..errors import UnsupportedError

            raise UnsupportedError(f"isa: expected one of {', '.join(available)}, found {isa.value}")
        chosen = (isa.value,) if isa else available
        jobs = plan(ops or [], [dtype.value] if dtype else [], chosen, threads, str(save) if save else None)
        results = []
        with Progress() as progress:
            for result in conformance(jobs, usable_cpus(), timeout):
                results.append(result)
                progress.show(f"{result.op} {result.dtype} {result.isa}: {len(results)} cases")
    if str(as_json) != "-":
        render(results)
    status = 0
    if any(result.outcome == "fault" for result in results):
        status = EXIT_FAULT
    elif not any(result.local.checked for result in results) or any(result.outcome != "pass" for result in results):
        status = EXIT_INCONCLUSIVE
    finish(status, (as_json, lambda: _as_json(results)))


def _captured(path: Path, model: str | None, ops: Sequence[str], dtype: str | None) -> Iterable[Result]:
    """Certificates of the captured outputs of a case or trace. What was captured is not run again."""
    from ..certify import certify
    from ..errors import CaseError
    from ..isolation import Result
    from ..replay import captured

    try:
        for case in captured(path, model, ops):
            if dtype in (None, case.dtype):
                local = certify(case.spec, case.inputs, case.scalars, case.outputs)
                label = f"{case.site}, step {case.step}, position {case.position}"
                yield Result(case.op, case.dtype, case.isa, label, local)
    except OSError as error:
        raise CaseError(file=path, field="file", expected="a trace or case", found=error.strerror or error) from None


def _as_json(results: Sequence[Result]) -> str:
    import json

    return json.dumps([result.as_dict() for result in results], indent=1, allow_nan=False)


def render(results: Sequence[Result]) -> None:
    """A table of operators and dtypes, the failures, and one line that says it all."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..reference import FLOATS

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    found = {(r.op, r.dtype): [] for r in sorted(results, key=lambda r: r.op)}  # type: dict[tuple[str, str], list[Result]]
    for result in results:
        found[result.op, result.dtype].append(result)
    others = [dtype for dtype in dict.fromkeys(r.dtype for r in results) if dtype not in FLOATS]
    columns: dict[str, tuple[str, ...]] = {name: (name,) for name in FLOATS if any(r.dtype == name for r in results)}
    columns |= {"others": tuple(others)} if others else {}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("operator", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("cases", justify="right")
    table.add_column("elements", justify="right")
    for op in dict.fromkeys(op for op, _ in found):
        cells = [_cell([r for name in names for r in found.get((op, name), ())]) for names in columns.values()]
        mine = [r for r in results if r.op == op]
        table.add_row(op, *cells, f"{len(mine)}", f"{sum(r.local.checked for r in mine):,}")
    if results:
        console.print(table)
        tiers = ", ".join(dict.fromkeys(r.isa for r in results if r.isa))
        console.print(
            f"Largest error as a share of its bound, over {tiers}; 1 is the most that the contract admits.\n",
            style="dim",
        )
    for (op, dtype), cases in found.items():
        failed = [r for r in cases if r.outcome != "pass"]
        for result in failed[:TOLD]:
            mark, style = ("✗", "red") if result.outcome == "fault" else ("?", "yellow")
            head = f"{op} {dtype} {result.isa}: {result.case}"
            console.print(f"[{style}]{mark}[/] [bold]{escape(printable(head))}[/]")
            console.print(f"  {escape(printable(result.text))}", soft_wrap=not console.is_terminal)
            if result.file:
                console.print(f"  llaisys replay {escape(printable(result.file))}", style="dim", soft_wrap=True)
        if len(failed) > TOLD:
            console.print(f"  and {len(failed) - TOLD} more of {op} {dtype}", style="dim")
    faults, suspects = (sum(r.outcome == kind for r in results) for kind in ("fault", "suspect"))
    if faults or suspects:
        parts = [f"{n} {kind}" for n, kind in ((faults, "wrong"), (suspects, "suspect")) if n]
        console.print(f"[red]{' and '.join(parts)}[/] of {len(results)} cases")
    elif not any(result.local.checked for result in results):
        console.print("[yellow]nothing was checked[/]")
    else:
        console.print(f"[green]all {len(results)} cases keep to the contract[/]")


def _cell(results: Sequence[Result]) -> str:
    if not results:
        return ""
    failed = sum(r.outcome != "pass" for r in results)
    if failed:
        return f"[red]✗ {failed} of {len(results)}[/]"
    ratio = max(r.local.ratio for r in results)
    return f"[green]✓[/] {ratio:.2f}" if ratio else "[green]✓[/] exact"

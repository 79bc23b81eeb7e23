"""`llaisys try`: what is a kernel of your own worth?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench import Phase
from .check import LIMIT, PATIENCE, TOLD, render
from .common import EXIT_FAULT, EXIT_INCONCLUSIVE, Progress, StorageType, printable, verdict

if TYPE_CHECKING:
    from ..bench.report import Figures
    from ..isolation import Result


@verdict
def trial(
    op: Annotated[str, typer.Argument(metavar="OP", help="The operator that it computes.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A source in C or C++, or a shared library.")],
    dtype: Annotated[StorageType | None, typer.Option(help="Storage type.", show_default="all")] = None,
    phase: Annotated[
        Phase | None, typer.Option(help="Sizes that are timed: of this phase only.", show_default="both")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, metavar="N", help="Threads of all.", show_default="1, 2, 3 and 8, and physical cores"
        ),
    ] = None,
    flags: Annotated[str, typer.Option(help="More flags for the compiler.")] = "",
    bench: Annotated[bool, typer.Option(help="Time it.")] = True,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help=PATIENCE)] = LIMIT,
) -> None:
    """Hold a kernel of your own to the SPEC of its operator, and time it beside the library's and torch.

    The file defines the C entry of the operator, as llaisys.h declares it: int32_t llaisysRope(...). It may refuse what
    it does not take with a status like LLAISYS_ERROR_UNSUPPORTED. A source is compiled by CXX or CC, else c++ or cc,
    with -O3 -march=native. Exit status 0 if all that it takes is right, 1 if something is wrong, 2 if it takes nothing.
    """
    import signal
    import sys
    from tempfile import TemporaryDirectory

    from .. import num_threads, set_num_threads
    from .._lib import usable_cpus
    from ..bench.roof import known_roofs
    from ..conformance import spec_of
    from ..isolation import in_processes
    from ..trial import AS_LONG, Timing, build, jobs_of

    spec = spec_of(op)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without taking all away
    if threads is not None:
        set_num_threads(threads)
    dtypes = [dtype.value] if dtype else list(spec.dtypes)
    with TemporaryDirectory(prefix="llaisys-") as folder, Progress() as progress:
        progress.show(f"compiling {file.name}")
        kernel = build(file, Path(folder), flags)
        results: list[Result] = []
        for result in in_processes(jobs_of(op, kernel, dtypes, threads, file), usable_cpus(), timeout):
            results.append(result)
            progress.show(f"{op} {result.dtype}: {len(results)} cases")
        rows: list[dict[str, Any]] = []
        right = [name for name in dtypes if _right(results, name)]
        if bench and right:
            progress.show("measuring the roofs of the machine")
            roofs = known_roofs(num_threads())
            timings = [Timing(op, name, str(kernel), phase.value if phase else None, roofs) for name in right]
            for found in in_processes(timings, 1, AS_LONG * timeout, crashes=1):
                if isinstance(found, list):
                    rows += found
                    progress.show(f"timing {found[0]['dtype']} {found[0]['case']}")
                else:
                    results.append(found)
    _render(op, results, rows)
    if any(result.outcome == "fault" for result in results):
        raise typer.Exit(EXIT_FAULT)
    if not right:
        raise typer.Exit(EXIT_INCONCLUSIVE)


def _right(results: Sequence[Result], dtype: str) -> bool:
    """Whether the kernel takes some calls in this dtype, and all those are right."""
    mine = [result for result in results if result.dtype == dtype]
    return any(r.local.checked for r in mine) and {r.outcome for r in mine} <= {"pass", "refused"}


def _render(op: str, results: Sequence[Result], rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape

    render([result for result in results if result.outcome != "refused"])
    console = Console(highlight=False, soft_wrap=True)
    for text in _refusals(results):
        console.print(f"[dim]not taken: {escape(printable(text))}[/]")
    if rows:
        console.print()
        Console(highlight=False, width=max(console.width, 96)).print(_figures(op, rows).rich())
        console.print(
            "[dim]Medians in microseconds, measured in turns, with what a call from Python costs; -: more than a "
            "second. ±: range of the middle half of your series. x: how many times as fast yours is.[/]"
        )


def _refusals(results: Sequence[Result]) -> Iterator[str]:
    """What the kernel does not take: dtypes as a whole, calls, and other ways to make a call."""
    for dtype in dict.fromkeys(result.dtype for result in results):
        mine = [result for result in results if result.dtype == dtype]
        refused = [result for result in mine if result.outcome == "refused"]
        if len(refused) == len(mine):
            yield f"{dtype}, {refused[0].refused}"
        else:
            for text in dict.fromkeys(result.refused for result in refused):
                cases = [result.case for result in refused if result.refused == text]
                yield f"{dtype}, {text}: {len(cases)} cases ({', '.join(cases[:TOLD])}{', ...' * (len(cases) > TOLD)})"
            yield from (f"{dtype}, {way}" for way in dict.fromkeys(w for r in mine for w in r.variants_refused))


def _figures(op: str, rows: Sequence[dict[str, Any]]) -> Figures:
    """One line for each case: the kernel beside the library's and torch."""
    from ..bench.report import Figures, number, share
    from ..trial import YOURS

    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["dtype"], row["case"]), {})[row["implementation"]] = row
    lines = []
    for (dtype, case), found in cases.items():
        yours = found.get(YOURS, {})
        times = [number(found.get(name, {}).get("microseconds")) for name in (YOURS, "native", "torch")]
        ratios = [number(yours.get(f"speed_relative_to_{name}"), 2) for name in ("native", "torch")]
        spread = f"{yours['iqr_percent']:.0f}%" if yours else "-"
        lines.append([case, dtype, times[0], spread, *times[1:], *ratios, share(yours)])
    columns = ["case", "dtype", "yours", "±", "llaisys", "torch", "x llaisys", "x torch", "of the roof"]
    return Figures(op, columns, lines)

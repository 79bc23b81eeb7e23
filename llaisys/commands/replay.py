"""`llaisys replay`: one captured operator call, run again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import EXIT_FAULT, EXIT_INCONCLUSIVE, Isa, printable, verdict

if TYPE_CHECKING:
    from ..case import Case
    from ..certify import Local
    from ..replay import Replay


@verdict
def replay(
    case: Annotated[Path, typer.Argument(metavar="CASE.npz", help="A file of llaisys check --save or llaisys diff.")],
    isa: Annotated[Isa | None, typer.Option(help="Instruction set tier.", show_default="best of the machine")] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, metavar="N", help="Threads of the kernels.", show_default="physical cores"),
    ] = None,
) -> None:
    """Run one captured operator call again, and certify what comes out.

    Says whether the kernel gives the captured bits, and holds the captured outputs, the kernel's and those of the numpy
    twin against the oracle. Exit status 0 if what the kernel gives now is right, 1 if not, 2 if nothing was checked.
    """
    from .. import set_isa, set_num_threads
    from ..replay import replay as run

    captured = open_case(case)
    if isa is not None:
        set_isa(isa.value)
    if threads is not None:
        set_num_threads(threads)
    result = run(captured)
    render(result)
    if not result.native.checked:
        raise typer.Exit(EXIT_INCONCLUSIVE)
    if not result.native:
        raise typer.Exit(EXIT_FAULT)


def open_case(path: Path) -> Case:
    """The case of a file. CaseError if it cannot be read, too."""
    from ..case import load_case
    from ..errors import CaseError

    try:
        return load_case(path)
    except OSError as error:
        raise CaseError(file=path, field="file", expected="a case", found=error.strerror or str(error)) from None


def render(result: Replay) -> None:
    """What was captured, what comes out now, and the worst element of each."""
    from rich.console import Console
    from rich.markup import escape

    console, case = Console(highlight=False, soft_wrap=True), result.case
    arrays = {name: x for name, x in {**case.inputs, **case.outputs}.items() if x is not None}
    made = ", ".join(f"{name} {text}" for name, text in case.versions.items())
    details = [", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in arrays.items())]
    details += [", ".join(f"{name} = {x:g}" for name, x in case.scalars.items())] if case.scalars else []
    details += [f"captured on {case.isa or '?'}, {case.threads} threads, {made}"]
    details += [f"runs now on {result.isa}, {result.threads} threads"]
    console.print(f"[bold]{case.op}[/] {escape(printable(case.site))}, step {case.step}, position {case.position}")
    for text in details:
        console.print(f"  {printable(text)}", style="dim", markup=False)
    size = sum(x.size for x in case.outputs.values())
    console.print(
        "the kernel gives the captured bits"
        if result.same_bits
        else f"the kernel gives other bits than captured in {result.changed} of {size} elements"
    )
    for name, local in {"captured": result.captured, "kernel": result.native, "twin": result.twin}.items():
        mark, style = {"pass": ("✓", "green"), "suspect": ("?", "yellow"), "fault": ("✗", "red")}[local.outcome]
        console.print(f"[{style}]{mark}[/] {name:9}{escape(_line(local))}")


def _line(local: Local) -> str:
    parts = [f"ratio {local.ratio:.3g}"]
    if local.index is not None:
        parts.append(f"worst at {local.output}{list(local.index)}: expected {local.expected!r}, found {local.got!r}")
    if local.limit < float("inf") and local.bias:
        parts.append(f"bias {local.bias:+.2g} ulp (at most {local.limit:.2g})")
    parts += [text for text in (local.reason, local.note) if text]
    return ", ".join(parts)

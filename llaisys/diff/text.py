"""A report for a person at a terminal: the verdict first."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..commands.common import printable
from ..reference import SPECS
from .finish import describe_groups
from .prefix import INFER
from .report import CERTIFICATES, CERTIFIED, Fault, Flip, NodeResult, Report

#: Columns of the report, where the terminal does not have less.
WIDTH = 100
#: Faults and flips that are listed, beyond which they are counted.
_LISTED = 6


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report to `console`, by default stdout."""
    if console is None:
        console = Console(highlight=False)
        console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(verdict(report))
    if report.nonfinite:
        console.print(Text(f"NOT FINITE: {printable(report.nonfinite)}", style="bold yellow"))
    console.print(Text(_run(report), style="dim"))
    console.print()
    if report.faults:
        _fault(console, report, report.faults[0])
    _suspects(console, report)
    if report.nodes:
        _operators(console, report)
    _context(console, report)
    notes = Table.grid(padding=(0, 2, 0, 0))
    notes.add_column(no_wrap=True)
    notes.add_column(overflow="fold")
    for note in report.notes:
        notes.add_row(Text("note", style="yellow"), Text(printable(note)))
    console.print(notes)
    command = next_command(report)
    if command:  # in one line, to be copied
        console.print(Text(f"next  {printable(command)}", style="bold"), soft_wrap=True)


def verdict(report: Report) -> Text:
    """The outcome in one line."""
    if report.faults:
        first = report.faults[0]
        return Text(f"FAULT: {first.certificate} of {first.site}, {_where(first)}", style="bold red")
    worst = report.worst
    if report.exit_code == CERTIFIED and worst is not None:
        text = f"certified: {len(report.nodes)} nodes; the largest error is {worst.ratio:.2f} of its bound"
        return Text(text, style="bold green")
    suspects = [node for node in report.nodes if node.outcome == "suspect"]
    if suspects:
        text = f"inconclusive: {len(suspects)} of {len(report.nodes)} nodes are suspect, the first {suspects[0].site}"
    else:
        text = "inconclusive: nothing was checked"
    return Text(text, style="bold yellow")


def _run(report: Report) -> str:
    threads = f"{report.threads} thread{'s' if report.threads != 1 else ''}"
    parts = [printable(report.model), report.dtype, report.isa, threads]
    parts.append(f"{len(report.prompt)} + {report.decode} tokens")
    parts.append(f"{report.seconds:.1f} s")
    if report.peak_bytes:
        parts.append(f"{report.peak_bytes / 2**20:.0f} MiB at most")
    line = " · ".join(part for part in parts if part)
    library = report.versions.get("library", "")
    if report.versions.get("override"):
        line += f"\nlibrary {printable(library)}, build {report.versions.get('build', '')}"
    for name, kernel in report.swaps.items():
        line += f"\nswapped: {printable(name)} = {kernel}"
    return line


def _where(fault: Fault) -> str:
    step = "the prompt" if fault.step == 0 else f"decode step {fault.step}"
    return f"{step}, position {fault.position}"


def _short(site: str) -> str:
    return site.removeprefix("model.")


def _fault(console: Console, report: Report, fault: Fault) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, text: str, style: str = "") -> None:
        table.add_row(name, Text(printable(text), style=style))

    row("site", f"{fault.site} ({fault.op})", "bold")
    row("where", _where(fault))
    row("certificate", f"{fault.certificate}, {MEANINGS[fault.certificate]}")
    row("found", fault.message)
    if fault.ratio:
        row("ratio", f"{fault.ratio:.3g} of the bound on its error")
    if fault.shape:
        row("shape", "; ".join(fault.shape))
    if fault.hypothesis:
        row("hypothesis", fault.hypothesis, "bold")
    if any(node.site == fault.site for node in report.nodes):
        upstream, downstream = (", ".join(map(_short, sites)) for sites in (fault.upstream, fault.downstream))
        row("upstream", upstream + " certified" if upstream else "nothing certified")
        row("downstream", downstream + " certified on what it was given" if downstream else "nothing certified")
    if fault.swap:
        row("swap", fault.swap)
    if report.flips:
        row("first flip", flip_text(report.flips[0]))
    if fault.reproducer:
        row("reproducer", fault.reproducer)
    others = [*describe_groups(report.faults, report.layers)]
    alone = [f for f in report.faults[1:] if ".layers." not in f.site or not others]
    others += [f"{f.certificate} of {_short(f.site)}" for f in alone[:_LISTED]]
    if len(alone) > _LISTED:
        others.append(f"{len(alone) - _LISTED} more")
    if others:
        row("all faults", "; ".join(others))
    console.print(table)
    console.print()


#: The certificates, each in a few words.
MEANINGS = {
    "EDGE": "an input is not what its producer put out",
    "PARAM": "the node is not called as the model says",
    "STATE": "the cached keys and values are not those of this sequence",
    "LOCAL": "the output is not what the operator makes of its inputs",
    "REPEAT": "the same inputs do not give the same bits",
}


def flip_text(flip: Flip) -> str:
    """A flip in one line."""

    def token(number: int, text: str) -> str:
        return f"{number} {text!r}" if text else str(number)

    sense = "more than" if flip.margin > flip.noise else "within"
    text = f"position {flip.position}: {token(flip.native, flip.native_text)} for "
    text += f"{token(flip.reference, flip.reference_text)}, "
    return text + f"margin {flip.margin:.3g}, {sense} the {flip.noise:.2g} that rounding may move"


def _suspects(console: Console, report: Report) -> None:
    suspects = [node for node in report.nodes if node.outcome == "suspect"]
    for node in suspects[:_LISTED]:
        console.print(Text(f"suspect  {node.site}, step {node.step}, ratio {node.ratio:.3g}", style="yellow"))
    if len(suspects) > _LISTED:
        console.print(Text(f"         and {len(suspects) - _LISTED} more", style="yellow"))
    if suspects:
        console.print()


def _operators(console: Console, report: Report) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("operator", no_wrap=True, min_width=19)
    table.add_column("nodes", justify="right", min_width=5)
    for name in CERTIFICATES:
        table.add_column(name, justify="right", no_wrap=True, min_width=6)
    # Of the largest error, as a share of its bound; of the mean error of the magnitude, in ulps.
    for name in ("error", "bias"):
        table.add_column(name, justify="right", no_wrap=True, min_width=7)
    table.add_column("largest at", overflow="ellipsis", no_wrap=True)
    by_op: dict[str, list[NodeResult]] = {}
    for node in report.nodes:
        by_op.setdefault(node.op, []).append(node)
    for op, nodes in by_op.items():
        worst = max(nodes, key=lambda node: node.ratio)
        bias = max((node.bias for node in nodes), key=abs)
        cells = [_cell(node.outcomes.get(certificate, "skipped") for node in nodes) for certificate in CERTIFICATES]
        table.add_row(
            op, str(len(nodes)), *cells, f"{worst.ratio:.3g}", f"{bias:+.3f}", Text(_short(worst.site), style="dim")
        )
    console.print(table)
    console.print()


def _cell(outcomes: Iterable[str]) -> Text:
    found = list(outcomes)
    for outcome, mark, style in (("fault", "×", "bold red"), ("suspect", "?", "yellow")):
        if outcome in found:
            return Text(f"{found.count(outcome)} {mark}", style=style)
    return Text("pass", style="green") if "pass" in found else Text("-", style="dim")


def _context(console: Console, report: Report) -> None:
    lines = []
    for name, title in (("reference", "the reference"), ("transformers", "transformers")):
        errors = [(d, getattr(d, name)) for d in report.drift if getattr(d, name) is not None]
        if errors:
            last = [error for drift, error in errors if drift.site == "lm_head"]
            worst, most = max(errors, key=lambda item: item[1])
            text = f"native against {title}: up to {most:.2g} at {_short(worst.site)}"
            finite = last and not report.nonfinite  # NaN beside NaN is no difference, and no agreement
            lines.append(text + (f", {max(last):.2g} in the logits" if finite else ""))
    if not report.faults:
        lines += [f"flip at {flip_text(flip)}" for flip in report.flips[:_LISTED]]
    if len(report.flips) > _LISTED:
        lines.append(f"{len(report.flips)} flips in all")
    if lines:
        console.print(Text("context, no verdict", style="dim"))
        for line in lines:
            console.print(Text(f"  {printable(line)}"), soft_wrap=False)
        console.print()


def next_command(report: Report) -> str:
    """What to type next, "" if nothing is left to do."""
    if not report.faults:
        return ""
    first = report.faults[0]
    if first.reproducer:
        return f"llaisys replay {shlex.quote(_relative(first.reproducer))}"
    if first.certificate in ("LOCAL", "REPEAT") and first.op in SPECS:
        return f"llaisys check {first.op} --dtype {report.dtype}"
    if first.site not in {node.site for node in report.nodes} or first.message.startswith(INFER):
        return ""  # nothing that a swap could reach
    return _diff_command(report, {**report.swaps, first.site: "reference"})


def _diff_command(report: Report, swaps: Mapping[str, str]) -> str:
    """The command for the same run with other kernels. A text that a line can not hold goes by its tokens."""
    text = report.prompt_text
    line = text if text.isprintable() and not text.startswith("-") else ""
    words = ["llaisys", "diff", report.model, *(("-p", line) if line else ("--tokens", "/dev/stdin"))]
    words += ["--decode", str(report.decode), "--dtype", report.dtype, "--isa", report.isa]
    words += ["--threads", str(report.threads)]
    for site, kernel in swaps.items():
        words += ["--swap", f"{site}={kernel}"] if kernel != "function" else []
    library = report.versions.get("library", "") if report.versions.get("override") else ""
    command = f"LLAISYS_LIBRARY={shlex.quote(library)} " if library else ""
    command += shlex.join(words)
    return command if line else f"echo {' '.join(map(str, report.prompt))} | {command}"


def _relative(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path

"""`llaisys diff`: which node of a model is wrong. `llaisys trace-diff`: where two saved runs part."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InvalidArgumentError
from .common import Isa, StorageType, check_reports, finish, verdict

#: Largest file of tokens that is read.
_TOKEN_BYTES = 16 << 20
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@verdict
def diff(
    model: Annotated[
        str, typer.Argument(help="A folder in Hugging Face layout, or the embedded model.", show_default=True)
    ] = "tiny",
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="The text to start from.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The prompt as token ids: numbers in a text, or a JSON list."),
    ] = None,
    decode: Annotated[int, typer.Option(min=0, metavar="N", help="How many tokens to add.")] = 8,
    dtype: Annotated[
        StorageType | None, typer.Option(help="Convert the weights on loading.", show_default="that of the model")
    ] = None,
    isa: Annotated[Isa | None, typer.Option(help="Instruction set tier.", show_default="best of the machine")] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, metavar="N", help="Threads of the kernels.", show_default="physical cores"),
    ] = None,
    oracle: Annotated[
        str | None, typer.Option(metavar="hf", help="Run transformers beside it, as context.", show_default="none")
    ] = None,
    swap: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE=reference", help="Let the reference compute a site, pattern, or operator."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="TRACE", help="Write the nodes of the run, for trace-diff.")
    ] = None,
    save_sites: Annotated[
        list[str] | None, typer.Option(metavar="SITE", help="Save these sites only; patterns as in --swap.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - for stdout.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to keep within, such as 2G.", show_default="no limit")
    ] = None,
    reproducers: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the faults for replay here.", show_default="llaisys-faults"),
    ] = None,
) -> None:
    """Certify every node of a native run, and name the one that is wrong.

    Exit status 0: all is certified. 1: a fault is named. 2: neither can be said, or nothing was checked.
    """
    from ..diff import run_isolated
    from ..diff.html import to_html
    from ..diff.text import print_report
    from ..files import check_target

    check_reports(json_file, html_file)
    if save is not None:
        check_target(save)
    if (prompt is None) == (tokens is None):
        raise typer.BadParameter("expected a text or a file of tokens, found " + ("none" if prompt is None else "both"))
    options: dict[str, Any] = {
        "prompt": prompt,
        "tokens": None if tokens is None else read_tokens(tokens),
        "dtype": dtype.value if dtype else None,
        "isa": isa.value if isa else None,
        "threads": threads,
        "oracle": oracle,
        "swap": parse_swaps(swap or []),
        "save": None if save is None else str(save),
        "save_sites": save_sites,
        "max_memory": None if max_memory is None else parse_size(max_memory),
        "reproducers": str(reproducers or "llaisys-faults"),
    }
    progress = _Progress()
    try:
        report = run_isolated(model, decode=decode, progress=progress, **options)
    finally:
        progress.close()
    if json_file != Path("-"):
        print_report(report)
    finish(report.exit_code, (json_file, report.to_json), (html_file, lambda: to_html(report)))


@verdict
def trace_diff(
    a: Annotated[Path, typer.Argument(help="A trace that `diff --save` wrote.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Where the weights are.", show_default="as the traces say")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout.")
    ] = None,
) -> None:
    """Compare two saved runs of one model: of other machines, tiers, versions, or storage types.

    Each run is certified on its own inputs, so that what was carried along is told from what went wrong. Exit status 0:
    all differences are rounding. 1: the site where they part is named. 2: neither can be said.
    """
    from ..diff.compare import compare_traces, print_comparison

    check_reports(json_file)
    result = compare_traces(a, b, model)
    if json_file != Path("-"):
        print_comparison(result)
    finish(result.exit_code, (json_file, result.to_json))


def read_tokens(path: Path) -> list[int]:
    """Token ids of a file: a JSON list, or numbers with anything but letters and digits between them."""
    try:
        with path.open("rb") as file:
            raw = file.read(_TOKEN_BYTES + 1)
    except OSError as error:
        raise InvalidArgumentError(f"--tokens: expected a file, found {path}: {error.strerror}") from None
    if len(raw) > _TOKEN_BYTES:
        raise InvalidArgumentError(f"--tokens: expected at most {_TOKEN_BYTES} bytes, found more in {path}")
    text = raw.decode("utf-8", "replace")
    found = re.sub(r"[\s,;\[\]]+", " ", text).split()
    for item in found:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", item):
            shown = item if len(item) <= 40 else f"{item[:40]}..."
            raise InvalidArgumentError(f"--tokens: expected token ids in {path}, found {shown!r}")
    return [int(item) for item in found]


def parse_swaps(texts: list[str]) -> dict[str, str]:
    """ "SITE=reference" -> {SITE: "reference"}."""
    swaps = {}
    for text in texts:
        site, _, kernel = text.rpartition("=")
        if not site or kernel not in ("reference", "native"):
            raise InvalidArgumentError(f"--swap: expected SITE=reference, found {text!r}")
        swaps[site] = kernel
    return swaps


def parse_size(text: str) -> int:
    """ "1.5G" -> bytes; K, M, G and T are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise InvalidArgumentError(f"--max-memory: expected a size such as 800M or 2G, found {text!r}")
    return int(float(match[1]) * _SIZES[match[2].upper()])


class _Progress:
    """A line at the bottom of the terminal on stderr: what is being done."""

    def __init__(self) -> None:
        self._status: Any = None
        self._next = 0.0
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()

    def __call__(self, scene: str, step: int, site: str) -> None:
        now = time.monotonic()
        if self._status is None or now < self._next:
            return
        self._next = now + 0.1
        where = "" if not site else f", {'prompt' if step == 0 else f'step {step}'}, {site.removeprefix('model.')}"
        self._status.update(f"{scene}{where}")

    def close(self) -> None:
        """Clear the line."""
        if self._status is not None:
            self._status.stop()

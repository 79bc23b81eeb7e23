"""What the commands share: their errors, exit statuses, choices of options, and the loading of a model.

Whatever is heavy is imported inside the functions.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec, TextIO

import typer

from ..errors import LlaisysError

if TYPE_CHECKING:
    from ..models import Qwen2

P = ParamSpec("P")

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141
#: Of the commands that give a verdict; the last one if there is none, or output is lost.
EXIT_FAULT, EXIT_INCONCLUSIVE = 1, 2


class Backend(str, Enum):
    """What computes the model."""

    native = "native"
    reference = "reference"


class StorageType(str, Enum):
    """Storage types of weights, activations and KV cache."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"


class Isa(str, Enum):
    """Instruction set tiers."""

    scalar = "scalar"
    avx2 = "avx2"
    avx512 = "avx512"
    amx = "amx"


# ------------------------------------------------------------------ errors


class Options:
    """Of the command as a whole, set before one of its commands runs."""

    traceback = False


def command(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors are one line on stderr and an exit status of 1; 130 after Ctrl-C."""
    return _with_status(function, EXIT_ERROR)


def verdict(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose exit status of 1 is a verdict; that of an error is 2, as there is none."""
    return _with_status(function, EXIT_INCONCLUSIVE)


def _with_status(function: Callable[P, None], status: int) -> Callable[P, None]:
    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with interruptible():
                function(*args, **kwargs)
                sys.stdout.flush()
        except KeyboardInterrupt:
            if Options.traceback:
                traceback.print_exc()
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (LlaisysError, MemoryError, OSError) as error:
            if Options.traceback:
                traceback.print_exc()
            complain(message_of(error))
            raise typer.Exit(status) from None

    return inner


def message_of(error: BaseException) -> str:
    """What is told of an error."""
    if isinstance(error, OSError) and not isinstance(error, LlaisysError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or "out of memory"


@contextmanager
def interruptible() -> Iterator[None]:
    """Between its default actions before and none after, as all is said then and the exit status stands, Ctrl-C raises
    KeyboardInterrupt; not where it has another action."""
    ours = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """While modules load, the default action: those of numpy would make an error of their own of the exception."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        frame = frame.f_back
    raise KeyboardInterrupt


def complain(message: str) -> None:
    """`llaisys: error: ...` on stderr, in one line whatever a file name or a library put into the message."""
    text = " ".join(printable(message).split())
    red, plain = ("\033[31m", "\033[0m") if colours(sys.stderr) else ("", "")
    print(f"llaisys: {red}error:{plain} {text}", file=sys.stderr)


def printable(text: str) -> str:
    """`text` without control characters, which could steer a terminal; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def colours(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that shows colours, and nobody asked for none."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


# ----------------------------------------------------------------- reports


def check_reports(*paths: Path | None) -> None:
    """FileError if one of the reports that are asked for could not be written; before the work, which may be long."""
    from ..files import check_target

    for path in paths:
        if path is not None and str(path) != "-":
            check_target(path, devices=True)


def finish(status: int, *reports: tuple[Path | None, Callable[[], str]]) -> None:
    """Write the reports that are asked for, - being stdout, and end with `status`.

    This comes after all else, so that a verdict is told also if a report cannot be written.
    """
    from ..errors import FileError
    from ..files import write_text

    for path, text in reports:
        if path is None:
            continue
        content = text().rstrip("\n") + "\n"
        try:
            if str(path) == "-":
                sys.stdout.write(content)
            else:
                write_text(path, content)
        except FileError as error:
            complain(str(error))
            status = status or EXIT_INCONCLUSIVE
    if status:
        raise typer.Exit(status)


# ---------------------------------------------------------------- progress


class Progress:
    """One line on stderr that says what is being done, at a terminal only, and gone at the end."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Say `text`; with a bar if it is known how much is done."""
        if self._bar is not None:
            self._bar.update(0, description=printable(text), completed=done or 0, total=total)

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(20), TextColumn("{task.description}"), console=Console(stderr=True), transient=True
            )
            self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()


# ------------------------------------------------------------------- model


def load_model(model: str, backend: str, dtype: str | None, threads: int | None) -> Qwen2:
    """The model, with a progress bar at a terminal if it takes longer than half a second."""
    from ..models import Qwen2

    options: dict[str, Any] = {"backend": backend, "dtype": dtype, "num_threads": threads}
    if not sys.stderr.isatty():
        return Qwen2(model, **options)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True))
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("")
    begin = time.perf_counter()

    def progress(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if time.perf_counter() - begin > 0.5:
            bar.start()  # once it runs, this does nothing

    try:
        return Qwen2(model, progress=progress, **options)
    finally:
        bar.stop()

"""The command `llaisys`. Whatever is heavy is imported inside the commands."""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TextIO

import typer

from .errors import LlaisysError

if TYPE_CHECKING:
    from .models import Qwen2
    from .tokenizer import TextStream

__all__ = ["app", "main"]

P = ParamSpec("P")
_SAMPLING = "Sampling"

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141

app = typer.Typer(
    name="llaisys",
    help="CPU kernels for LLM inference, each beside its numpy twin, and a Qwen2 built from either.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


def main() -> None:
    """The entry point of the command."""
    app(prog_name="llaisys")


# ------------------------------------------------------------------ errors


class _Options:
    traceback = False


def _command(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors are one line on stderr and an exit status of 1; 130 after Ctrl-C."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read our output has enough. Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_BROKEN_PIPE) from None
        except KeyboardInterrupt:
            if _Options.traceback:
                traceback.print_exc()
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (LlaisysError, MemoryError) as error:
            if _Options.traceback:
                traceback.print_exc()
            _complain(str(error) or "out of memory")
            raise typer.Exit(EXIT_ERROR) from None

    return inner


def _complain(message: str) -> None:
    """`llaisys: error: ...` on stderr, in one line whatever a file name or a library put into the message."""
    text = " ".join(_printable(message).split())
    red, plain = ("\033[31m", "\033[0m") if _colours(sys.stderr) else ("", "")
    print(f"llaisys: {red}error:{plain} {text}", file=sys.stderr)


def _printable(text: str) -> str:
    """`text` without control characters, which could steer a terminal; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _colours(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _version(wanted: bool) -> None:
    if wanted:
        try:
            from ._build import VERSION
        except ImportError:
            VERSION = "(not built)"
        print(f"llaisys {VERSION}")
        raise typer.Exit


def _compiler_flags(cflags: bool, libs: bool) -> str:
    """What a C compiler needs to find llaisys.h, and to link with the library and find it when the program runs."""
    import importlib.resources
    import shlex

    from ._lib import library_path

    flags: list[str] = []
    if cflags:
        # In an editable installation the header lies elsewhere than the package, hence by its own name.
        header = importlib.resources.files(__package__).joinpath("include/llaisys.h")
        flags.append(f"-I{Path(str(header)).parent}")
    if libs:
        folder = library_path()[0].parent
        flags += [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lllaisys"]
    return shlex.join(flags)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from.", envvar="LLAISYS_DEBUG")
    ] = False,
    cflags: Annotated[
        bool, typer.Option("--cflags", help="Print a C compiler's flags for llaisys.h and exit.")
    ] = False,
    libs: Annotated[bool, typer.Option("--libs", help="Print a C compiler's flags to link and exit.")] = False,
) -> None:
    _Options.traceback = show_traceback
    if cflags or libs:
        print(_compiler_flags(cflags, libs))
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


# ---------------------------------------------------------------- generate


@app.command()
@_command
def generate(
    model: Annotated[
        str, typer.Argument(help="A folder in Hugging Face layout, or the embedded model.", show_default=True)
    ] = "tiny",
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p", "--prompt", metavar="TEXT", help="The text to continue; from stdin if it is not given, or -."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("-n", "--max-new-tokens", min=0, metavar="N", help="Most tokens to add.")
    ] = 128,
    backend: Annotated[Backend, typer.Option(help="The C++ engine, or numpy.")] = Backend.native,
    dtype: Annotated[
        StorageType | None, typer.Option(help="Convert the weights on loading.", show_default="that of the model")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, metavar="N", help="Threads of the kernels.", show_default="physical cores"),
    ] = None,
    isa: Annotated[Isa | None, typer.Option(help="Instruction set tier.", show_default="best of the machine")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Draw from scores divided by this; 0 is greedy.",
            rich_help_panel=_SAMPLING,
            show_default="as the model says",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Draw from this many tokens; 0 is no limit.",
            rich_help_panel=_SAMPLING,
            show_default="as the model says",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Draw from the likeliest tokens of this probability.",
            rich_help_panel=_SAMPLING,
            show_default="as the model says",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Divide the scores of tokens in the text.",
            rich_help_panel=_SAMPLING,
            show_default="as the model says",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Make a draw repeatable.", rich_help_panel=_SAMPLING, show_default="random"
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message to the model, in its chat template.")
    ] = False,
    stats: Annotated[
        bool | None, typer.Option("--stats/--no-stats", help="Speed on stderr.", show_default="at a terminal")
    ] = None,
) -> None:
    """Continue a text with a Qwen2 model, streaming to stdout.

    The prompt is printed first, dimmed at a terminal; with --chat, the answer only.
    """
    text = _prompt_text(prompt)
    from . import set_isa

    if isa is not None:
        set_isa(isa.value)
    begin = time.perf_counter()
    engine = _load(model, backend.value, dtype.value if dtype else None, threads)
    loaded = time.perf_counter()
    tokenizer = engine.tokenizer
    if chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    ids = tokenizer.encode(text, add_special_tokens=not chat)
    # Special tokens that belong to the text of a prompt are shown there; the end of the answer is not.
    printer = _Printer(tokenizer.stream(), None if chat else text)
    try:
        engine.generate(
            ids,
            max_new_tokens,
            top_k,
            top_p,
            temperature,
            repetition_penalty=repetition_penalty,
            seed=seed,
            streamer=printer,
        )
    finally:
        printer.close()
    if stats or (stats is None and sys.stderr.isatty()):
        print(printer.figures(loaded - begin), file=sys.stderr)


def _prompt_text(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("expected a text, found none (on stdin neither)", param_hint="-p")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"expected UTF-8 on stdin, found another byte at {error.start}") from None


def _load(model: str, backend: str, dtype: str | None, threads: int | None) -> Qwen2:
    """The model, with a progress bar at a terminal if it takes longer than half a second."""
    from .models import Qwen2

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


class _Printer:
    """A streamer that prints the text to stdout as it comes, and takes the time."""

    def __init__(self, stream: TextStream, prompt: str | None) -> None:
        self._stream, self._prompt = stream, prompt
        self._terminal = sys.stdout.isatty()
        self._open_line = self._dimmed = False
        self._times: list[float] = []
        self._prompt_tokens = 0
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a stdout that is not UTF-8 gets ? for what it lacks

    def put(self, ids: Any) -> None:
        """The prompt on the first call, then the new ids."""
        if not self._times:
            self._prompt_tokens = len(ids)
            if self._prompt is not None:
                self._dim(True)
                self._write(self._prompt)
                self._dim(False)
        else:
            self._write("".join(self._stream.put(int(token)) for token in ids))
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """The bytes of a character that was never completed are shown too."""
        self._write(self._stream.end())

    def close(self) -> None:
        """Ends the last line, also after an error."""
        self._dim(False)
        if self._open_line:
            self._write("\n")

    def figures(self, load: float) -> str:
        """Speed in one line."""
        new = len(self._times) - 1
        parts = [f"load {load:.2f} s"]
        if new > 0:
            parts.append(_speed("prefill", self._prompt_tokens, self._times[1] - self._times[0]))
        if new > 1:
            parts.append(_speed("decode", new - 1, self._times[-1] - self._times[1]))
        return " · ".join(parts)

    def _dim(self, on: bool) -> None:
        if on != self._dimmed and _colours(sys.stdout):
            self._dimmed = on
            sys.stdout.write("\033[2m" if on else "\033[0m")

    def _write(self, text: str) -> None:
        if not text:
            return
        self._open_line = not text.endswith("\n")
        sys.stdout.write(_printable(text) if self._terminal else text)
        sys.stdout.flush()


def _speed(what: str, tokens: int, seconds: float) -> str:
    return f"{what} {tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tok/s"


# ------------------------------------------------------------------ doctor


@app.command()
@_command
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the library, the machine and the versions in use, and what is wrong. Exit status 1 if anything is."""
    from . import doctor as examine

    report = examine.examine()
    if as_json:
        import json

        print(json.dumps(report.as_dict(), indent=2))
    else:
        examine.render(report)
    if report.problems:
        raise typer.Exit(EXIT_ERROR)


if __name__ == "__main__":
    main()

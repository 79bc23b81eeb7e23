"""`llaisys generate`: continue a text with a model."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Backend, Isa, StorageType, colours, command, load_model, printable

if TYPE_CHECKING:
    from ..tokenizer import TextStream

_SAMPLING = "Sampling"


@command
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
    from .. import set_isa

    if isa is not None:
        set_isa(isa.value)
    begin = time.perf_counter()
    engine = load_model(model, backend.value, dtype.value if dtype else None, threads)
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


class _Printer:
    """A streamer that prints the text to stdout as it comes, and takes the time."""

    def __init__(self, stream: TextStream, prompt: str | None) -> None:
        self._stream, self._prompt = stream, prompt
        self._terminal = sys.stdout.isatty()
        self._open_line = self._dimmed = False
        self._times: list[float] = []
        self._prompt_tokens = 0

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
        if on != self._dimmed and colours(sys.stdout):
            self._dimmed = on
            sys.stdout.write("\033[2m" if on else "\033[0m")

    def _write(self, text: str) -> None:
        if not text:
            return
        self._open_line = not text.endswith("\n")
        sys.stdout.write(printable(text) if self._terminal else text)
        sys.stdout.flush()


def _speed(what: str, tokens: int, seconds: float) -> str:
    return f"{what} {tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tok/s"

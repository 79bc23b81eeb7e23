"""The command `llaisys`, put together from `llaisys.commands`."""

from __future__ import annotations

from typing import Annotated

import typer

from .commands.bench import bench
from .commands.check import check
from .commands.common import Options
from .commands.diff import diff, trace_diff
from .commands.doctor import doctor
from .commands.generate import generate
from .commands.replay import replay
from .commands.selftest import selftest
from .commands.streams import with_streams
from .commands.trial import trial

__all__ = ["app", "main"]

app = typer.Typer(
    name="llaisys",
    help="CPU kernels for LLM inference, each beside its numpy twin, and a Qwen2 built from either.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the command."""
    with_streams(lambda: app(prog_name="llaisys"))


def _version(wanted: bool) -> None:
    if wanted:
        from ._build import VERSION

        print(f"llaisys {VERSION}")
        raise typer.Exit


def _compiler_flags(cflags: bool, libs: bool) -> str:
    """What a C compiler needs to find llaisys.h, and to link with the library and find it when the program runs."""
    import shlex

    from ._lib import header_folder, library_path

    flags: list[str] = []
    if cflags:
        flags.append(f"-I{header_folder()}")
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
    Options.traceback = show_traceback
    if cflags or libs:
        print(_compiler_flags(cflags, libs))
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


app.command()(generate)
app.command()(diff)
app.command(name="trace-diff")(trace_diff)
app.command()(doctor)
app.command()(selftest)
app.command()(check)
app.command()(replay)
app.command()(bench)
app.command(name="try")(trial)


if __name__ == "__main__":
    main()

"""The entry point of the command `llaisys`, which `python -m llaisys` is too."""

import signal


def main() -> None:
    """Run the command. Ctrl-C ends it without a traceback at any time (see `commands.common.command`)."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not if a shell has it ignored
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, nothing needs an orderly end
    from .cli import main as command

    try:
        command()
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said; the exit status stands


if __name__ == "__main__":
    main()

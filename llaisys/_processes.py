"""Starting workers: Python processes that run a module of llaisys.

`python -m` would look for every module in the current folder first. That may be a model folder that a stranger wrote,
or a source tree without the library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interrupts_blocked", "start_worker", "unblock_interrupts", "worker_command", "worker_environment"]

# What `python -P -m MODULE` does from Python 3.11 on. Ctrl-C ends the process without a word.
_START = """\
import sys
sys.path[:] = [path for path in sys.path if path]
import runpy, signal
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def worker_command(module: str, *arguments: str) -> list[str]:
    """`python -m MODULE ARGUMENT...`, which never looks into the current folder. It needs `worker_environment`."""
    return [sys.executable, "-c", _START, module, *arguments]


def worker_environment(**changes: str) -> dict[str, str]:
    """That of this process with `changes`. An empty entry of PYTHONPATH is the current folder, and left out."""
    environment = {**os.environ, **changes}
    entries = [entry for entry in environment.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    return {**environment, "PYTHONPATH": os.pathsep.join(entries)} if entries else environment


def start_worker(
    module: str, *arguments: str, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Start `worker_command` with these changes of the environment; `options` are those of Popen.

    Ctrl-C at the terminal reaches the worker as soon as it can end without a traceback.
    """
    with interrupts_blocked():
        return subprocess.Popen(
            worker_command(module, *arguments), env=worker_environment(**(environment or {})), **options
        )


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Start processes in here which Ctrl-C reaches only when they `unblock_interrupts`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # a new process inherits it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_interrupts() -> None:
    """In a forked process: from here on Ctrl-C ends it without a word, unless it is ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

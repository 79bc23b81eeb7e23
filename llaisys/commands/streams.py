"""stdin, stdout and stderr of the command: there, even if they were closed, and stdout with its errors."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from .common import EXIT_BROKEN_PIPE, EXIT_INCONCLUSIVE, complain

__all__ = ["open_streams", "with_streams"]


class Unwritable(BaseException):
    """stdout takes no more. No `Exception`: for an OSError rich and click end the process in ways of their own, and
    with a status of 1, which is a verdict of many commands."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class _Stdout(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise Unwritable(error) from None


class _Stderr(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)  # nobody is told, but by the exit status


def open_streams() -> None:
    """Put new streams in the place of those that Python has made of the descriptors 0, 1 and 2.

    What is closed becomes /dev/null, so that no file that is opened later is taken for it. stdout prints ? for what it
    has no characters for.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    sys.stdout = _text(_Stdout(1, "w", closefd=False), sys.stdout, "replace", os.isatty(1))
    sys.stderr = _text(_Stderr(2, "w", closefd=False), sys.stderr, "backslashreplace", True)


def _text(raw: io.FileIO, before: TextIO | None, errors: str, line_buffering: bool) -> io.TextIOWrapper:
    """A stream of text in the place of another, if there was one."""
    encoding, through = "utf-8", False
    if isinstance(before, io.TextIOWrapper):
        before.flush()
        encoding, through = before.encoding, before.write_through
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, errors, line_buffering=line_buffering, write_through=through)


def with_streams(work: Callable[[], None]) -> None:
    """Do `work`, and end with the status of an error if stdout did not take all that it had to say."""
    open_streams()
    try:
        try:
            work()
        finally:
            sys.stdout.flush()
    except Unwritable as unwritable:
        # Python would try once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if unwritable.error.errno == errno.EPIPE:
            sys.exit(EXIT_BROKEN_PIPE)  # whoever read our output has enough
        complain(f"stdout: expected to write to it, found: {unwritable.error.strerror}")
        sys.exit(EXIT_INCONCLUSIVE)

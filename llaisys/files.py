"""Writing files that are there whole or not at all, and opening those that are regular.

What is written goes to `.NAME.PID.partial` beside its place, and is put there at the end: a full disk, an error or
Ctrl-C leaves no half of a file, nor takes away the one that was there before.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import FileError

__all__ = ["NewFile", "check_target", "new_file", "open_regular", "partial_of", "write_text"]


def partial_of(path: str | os.PathLike[str], pid: int) -> Path:
    """Where the process `pid` writes what will be `path`."""
    target = Path(os.path.realpath(path))  # a link stays one
    return target.with_name(f".{target.name[:200]}.{pid}.partial")


class NewFile:
    """A file in the making: `stream` takes the content, then either `keep` or `discard` it. FileError for what fails.

    What is there already must be a regular file, which is replaced, or with `devices` may also be a pipe or a device,
    which is written to.
    """

    def __init__(self, path: str | os.PathLike[str], *, devices: bool = False) -> None:
        self.path = Path(path)
        self._partial: Path | None = None
        with self.errors():
            before = _status(self.path)
            if before is None or (stat.S_ISREG(before.st_mode) and not _is_ours(before)):
                self._partial = partial_of(path, os.getpid())
                self._partial.unlink(missing_ok=True)  # of a process before that had the same number
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                descriptor = os.open(self._partial, flags, 0o666)
                if before is not None:
                    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
            elif stat.S_ISDIR(before.st_mode) or not devices:
                kind = "a directory" if stat.S_ISDIR(before.st_mode) else "a pipe or device"
                raise FileError(f"{self.path}: expected a regular file or none, found {kind}")
            elif _is_ours(before):
                sys.stdout.flush()
                descriptor = os.dup(1)  # at its place in the file, not at the beginning
            else:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            self.stream: BinaryIO = os.fdopen(descriptor, "wb")

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Name the file in an error of writing it."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileError) or error.filename not in (None, str(self._partial), str(self.path)):
                raise
            raise FileError(f"{self.path}: expected a file that can be written, found: {error.strerror}") from None

    def keep(self) -> None:
        """Put the file in its place. It is discarded if that fails."""
        try:
            with self.errors():
                self.stream.flush()
                if self._partial is not None:
                    os.fsync(self.stream.fileno())
                self.stream.close()
                if self._partial is not None:
                    self._partial.replace(os.path.realpath(self.path))
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):  # of a full disk, which what is left in the buffer meets once more
            self.stream.close()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)


@contextmanager
def new_file(path: str | os.PathLike[str], *, devices: bool = False) -> Iterator[BinaryIO]:
    """A `NewFile` that is kept if all goes well; its stream."""
    file = NewFile(path, devices=devices)
    try:
        with file.errors():
            yield file.stream
    except BaseException:
        file.discard()
        raise
    file.keep()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """A text as UTF-8, to a file, a pipe or a device."""
    with new_file(path, devices=True) as stream:
        stream.write(text.encode("utf-8", "replace"))


def check_target(path: str | os.PathLike[str], *, devices: bool = False) -> None:
    """FileError if `path` cannot be written. Nothing is there afterwards that was not before."""
    with suppress(OSError):
        status = _status(Path(path))
        if devices and status is not None and not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            return  # to open it may wait for a reader
    NewFile(path, devices=devices).discard()


def open_regular(path: str | os.PathLike[str]) -> BinaryIO | None:
    """A regular file, open for reading; None for what is something else. OSError if it cannot be opened."""
    # Without O_NONBLOCK, opening a pipe would wait for somebody to write to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "rb")


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _is_ours(status: os.stat_result) -> bool:
    """Whether a file is what stdout goes to, as /dev/stdout is."""
    try:
        return os.path.samestat(status, os.fstat(1))
    except OSError:
        return False

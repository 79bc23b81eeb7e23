"""The exceptions of llaisys.

One class for each error status of the C ABI, and four that only Python raises (`LibraryError`, `CheckpointError`,
`CaseError`, `FileError`). Each is a `LlaisysError` and also the builtin that a Python programmer expects in its place:
`except ValueError` works. Every message names what is wrong, what was expected and what was found.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = [
    "AliasError",
    "CaseError",
    "CheckpointError",
    "DTypeError",
    "FileError",
    "HandleError",
    "IndexRangeError",
    "InternalError",
    "InterruptedCallError",
    "InvalidArgumentError",
    "LibraryError",
    "LlaisysError",
    "OutOfMemoryError",
    "ShapeError",
    "StateError",
    "StrideError",
    "UnsupportedError",
    "status_error",
]


class LlaisysError(Exception):
    """Base of all errors of llaisys. `status` is the status of the C ABI that the class stands for, 0 for none."""

    status: int = 0


class InvalidArgumentError(LlaisysError, ValueError):
    """A missing argument, or a number out of range."""

    status = -1


class ShapeError(LlaisysError, ValueError):
    """The number of axes or their sizes do not fit."""

    status = -2


class DTypeError(LlaisysError, TypeError):
    """The element type is not one that the operator takes, or the arguments differ in it."""

    status = -3


class StrideError(LlaisysError, ValueError):
    """A memory layout that the operator does not take."""

    status = -4


class AliasError(LlaisysError, ValueError):
    """An output overlaps another argument in a way that is not allowed."""

    status = -5


class IndexRangeError(LlaisysError, IndexError):
    """An index or token outside its range."""

    status = -6


class HandleError(LlaisysError, ValueError):
    """A handle or pointer that is freed, foreign or NULL."""

    status = -7


class StateError(LlaisysError, RuntimeError):
    """The call is not possible now: weights are missing, a session is in use."""

    status = -8


class OutOfMemoryError(LlaisysError, MemoryError):
    """Memory could not be had."""

    status = -9


class UnsupportedError(LlaisysError, RuntimeError):
    """This machine or this build lacks what was asked for."""

    status = -10


class InterruptedCallError(LlaisysError, RuntimeError):
    """The call was asked to stop half-way; its outputs are incomplete."""

    status = -11


class InternalError(LlaisysError, RuntimeError):
    """A defect of llaisys itself."""

    status = -12


class LibraryError(LlaisysError, ImportError):
    """The shared library is missing, is no library, or does not belong to this package."""


class _RefusedFile(LlaisysError, ValueError):
    """`file`, `field`, `expected` and `found` say why; the message is made of them."""

    def __init__(self, *, file: str | os.PathLike[str], field: str, expected: Any, found: Any) -> None:
        super().__init__(f"{file}: {field}: expected {expected}, found {found}")
        self.file = str(file)
        self.field = field
        self.expected = expected
        self.found = found

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call __init__ with the message; the exception must survive multiprocessing.
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[_RefusedFile], args: tuple[Any, ...]) -> _RefusedFile:
    return kind.__new__(kind, *args)


class CheckpointError(_RefusedFile):
    """A checkpoint is refused. `file`, `field`, `expected` and `found` say why; the message is made of them."""


class CaseError(_RefusedFile):
    """A captured operator call is refused. `file`, `field`, `expected` and `found` say why."""


class FileError(LlaisysError, OSError):
    """A file cannot be written."""


_BY_STATUS: dict[int, type[LlaisysError]] = {cls.status: cls for cls in LlaisysError.__subclasses__() if cls.status}


def status_error(status: int, message: str) -> LlaisysError:
    """The exception for an error status of the C ABI, with `message` as its text.

    A status that this version does not know gives an `InternalError` that names the number.
    """
    cls = _BY_STATUS.get(status)
    if cls is None:
        return InternalError(f"status {status} is unknown to this version of llaisys: {message or 'no message'}")
    return cls(message or f"{cls.__name__} (status {status}) without a message")

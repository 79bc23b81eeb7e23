"""Reading files out of a model folder that a stranger wrote.

Every byte that llaisys takes from a model folder comes through `ModelFolder`. What it gives is a regular file, named by
a plain file name, that lies in the folder itself; a link is followed only to a regular file inside the folder or, where
the folder is a snapshot of the Hugging Face hub cache, into the blobs of that cache:

    models--org--name/blobs/<hash>
    models--org--name/snapshots/<revision>/config.json -> ../../blobs/<hash>

The way is resolved first, then walked again from the allowed folder with links forbidden at every step, so a link that
is put there in between is refused, not followed. Only the opened file is believed (`fstat`), never a name.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from .errors import CheckpointError

__all__ = ["ModelFolder", "OpenFile", "foreign", "parse_json", "show"]

#: Real files nest three or four deep; Python's JSON reader would end a thousand levels down in a RecursionError.
MAX_JSON_DEPTH = 32
#: More files than any checkpoint has.
MAX_FOLDER_ENTRIES = 10_000

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFLNK: "a symbolic link",
}
# Strings are eaten whole, so that brackets inside them do not count; the closing quote is optional, so that an
# unterminated string is one match too and the scan stays linear.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def show(value: Any, limit: int = 100) -> str:
    """`value` for an error message: `repr`, which leaves no control character alive, cut to `limit` characters."""
    # Cut first: the repr of a string of a megabyte is as long again.
    text = repr(value[:limit] + "..." if isinstance(value, str) and len(value) > limit else value)
    return text if len(text) <= limit + 10 else text[:limit] + "..."


class _BadJson(ValueError):
    """What a hook of the JSON reader found: `field` is refused because of `found`."""

    def __init__(self, field: str, expected: str, found: str) -> None:
        super().__init__(field)
        self.field, self.expected, self.found = field, expected, found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _BadJson(show(key), "the key once", "a duplicate key")
            seen.add(key)
    return result


def _constant(name: str) -> Any:
    raise _BadJson("JSON", "finite numbers", name)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _BadJson("JSON", "finite numbers", show(digits))
    return value


def _int(digits: str) -> int:
    if len(digits) > 40:
        raise _BadJson("JSON", "integers of at most 40 digits", f"one of {len(digits)}")
    return int(digits)


def parse_json(raw: bytes, file: str | Path) -> dict[str, Any]:
    """The JSON object in `raw`. `file` is named in errors.

    Refused with `CheckpointError`: what is not UTF-8, not JSON or not an object, duplicate keys anywhere, NaN and
    infinite numbers however written, and more than 32 levels.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(file=file, field="encoding", expected="UTF-8", found=f"byte {error.start}") from None
    depth = 0
    for match in _BRACKETS.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise CheckpointError(
                    file=file, field="JSON", expected=f"at most {MAX_JSON_DEPTH} levels", found="more of them"
                )
        elif token in "]}":
            depth -= 1
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except _BadJson as error:
        raise CheckpointError(file=file, field=error.field, expected=error.expected, found=error.found) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file=file, field="JSON", expected="valid JSON", found=show(str(error))) from None
    if not isinstance(value, dict):
        raise CheckpointError(file=file, field="JSON", expected="an object", found=type(value).__name__)
    return value


@contextmanager
def foreign(file: str | Path, field: str, expected: str) -> Iterator[None]:
    """Turns whatever a library raises over the content of `file` into a `CheckpointError`.

    Libraries in Rust promise no list of exceptions, and their panics are not even an `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(file=file, field=field, expected=expected, found=show(str(error), 200)) from None


@dataclass(frozen=True)
class OpenFile:
    """A regular file, open for reading: `path` for messages, `stream` unbuffered, `size` in bytes."""

    path: Path
    stream: FileIO
    size: int
    #: Changes when the file is replaced or written to.
    identity: tuple[int, int, int, int]

    def read_at(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on. A file that ends before is refused.

        Read, not mapped: a mapped file that shrinks under us would end the process with SIGBUS, and its pages would
        count as ours until they are unmapped.
        """
        done = 0
        try:
            self.stream.seek(offset)
            while done < len(buffer):
                count = self.stream.readinto(buffer[done : done + (1 << 26)])
                if not count:
                    found = f"the end after {offset + done}"
                    raise CheckpointError(
                        file=self.path, field="size", expected=f"{offset + len(buffer)} bytes", found=found
                    )
                done += count
        except OSError as error:
            raise _os_error(self.path, error) from None


def _os_error(path: Path, error: OSError, field: str = "file") -> CheckpointError:
    return CheckpointError(file=path, field=field, expected="a readable regular file", found=error.strerror or error)


class ModelFolder:
    """A folder from which files are read with distrust; see the head of the module."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """The folder `path`, which is the user's choice and may be a link. `CheckpointError` if it is no folder."""
        self.path = Path(path)
        try:
            self.root = Path(os.path.realpath(path, strict=True))
            is_folder = self.root.is_dir()
        except FileNotFoundError:
            raise CheckpointError(
                file=self.path, field="path", expected='a model folder, or "tiny"', found="no such folder"
            ) from None
        except (OSError, ValueError) as error:  # ValueError: a NUL character
            raise CheckpointError(
                file=show(str(path)), field="path", expected="a model folder", found=show(str(error))
            ) from None
        if not is_folder:
            raise CheckpointError(
                file=self.path, field="path", expected="a model folder", found="something that is no folder"
            )

    @classmethod
    def locate(cls, path: str | os.PathLike[str]) -> ModelFolder:
        """The folder `path`; the string "tiny" is the embedded model, while "./tiny" and Path("tiny") are folders."""
        if isinstance(path, str) and path == "tiny":
            # Beside this file in wheels and source trees; in the latter importlib.resources has no folders.
            return cls(Path(__file__).parent / "data" / "tiny")
        return cls(path)

    def names(self) -> list[str]:
        """The names in the folder, sorted."""
        names: list[str] = []
        try:
            with os.scandir(self.root) as entries:
                for entry in entries:
                    names.append(entry.name)
                    if len(names) > MAX_FOLDER_ENTRIES:
                        raise CheckpointError(
                            file=self.path, field="files", expected=f"at most {MAX_FOLDER_ENTRIES}", found="more"
                        )
        except OSError as error:
            raise _os_error(self.path, error) from None
        return sorted(names)

    def has(self, name: str) -> bool:
        """Whether there is anything under the plain name `name`, a broken link included."""
        return os.path.lexists(self.root / name)

    @contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        """The regular file `name`, open for reading; `CheckpointError` for anything else."""
        shown = self._checked(name)
        base, parts = self._resolve(name, shown)
        descriptor = -1
        try:
            descriptor = _open_beneath(base, parts)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _wrong_kind(shown, status.st_mode)
            stream = FileIO(descriptor, closefd=False)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise _os_error(shown, error) from None
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        try:
            yield OpenFile(shown, stream, status.st_size, identity)
        finally:
            os.close(descriptor)

    def read_bytes(self, name: str, limit: int) -> bytes:
        """The whole file, which may have `limit` bytes at most."""
        with self.open(name) as file:
            if file.size > limit:
                raise CheckpointError(file=file.path, field="size", expected=f"at most {limit} bytes", found=file.size)
            data = bytearray(file.size)
            file.read_at(0, memoryview(data))
            return bytes(data)

    def read_json(self, name: str, limit: int) -> dict[str, Any]:
        """The JSON object in the file, by the rules of `parse_json`."""
        return parse_json(self.read_bytes(name, limit), self.path / name)

    def _checked(self, name: str) -> Path:
        plain = name not in ("", ".", "..") and not re.search(r"[/\\]", name) and name.isprintable()
        if not plain or len(os.fsencode(name)) > 255:
            raise CheckpointError(
                file=self.path, field="file name", expected="a plain file name in the folder", found=show(name)
            )
        return self.path / name

    def _resolve(self, name: str, shown: Path) -> tuple[Path, tuple[str, ...]]:
        """(base, parts): the file is base/parts...; base is the folder or its blobs, no part of it is a link."""
        try:
            status = os.lstat(self.root / name)
            if not stat.S_ISLNK(status.st_mode):
                if not stat.S_ISREG(status.st_mode):  # before it is opened: opening a device can do things
                    raise _wrong_kind(shown, status.st_mode)
                return self.root, (name,)
        except FileNotFoundError:
            raise CheckpointError(file=shown, field="file", expected="a regular file", found="no such file") from None
        except OSError as error:
            raise _os_error(shown, error) from None
        try:
            real = Path(os.path.realpath(self.root / name, strict=True))
            status = os.lstat(real)
        except OSError as error:
            found = f"a link that leads nowhere ({error.strerror})"
            raise CheckpointError(file=shown, field="link", expected="a regular file", found=found) from None
        if not stat.S_ISREG(status.st_mode):
            raise _wrong_kind(shown, status.st_mode)
        blobs = self.root.parent.parent / "blobs"
        if real.is_relative_to(self.root):
            return self.root, real.relative_to(self.root).parts
        if self.root.parent.name == "snapshots" and real.parent == blobs:
            return blobs, (real.name,)
        raise CheckpointError(
            file=shown,
            field="link",
            expected="a file in the folder or in the blobs of its hub cache",
            found=show(str(real)),
        )


def _wrong_kind(shown: Path, mode: int) -> CheckpointError:
    found = _KINDS.get(stat.S_IFMT(mode), "something else")
    return CheckpointError(file=shown, field="file", expected="a regular file", found=found)


def _open_beneath(base: Path, parts: tuple[str, ...]) -> int:
    """A descriptor of base/parts..., opened step by step without following a link in `parts` or at `base` itself."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    # O_NONBLOCK: should the file have become a pipe since it was looked at, opening must not wait for a writer.
    last = flags | os.O_NONBLOCK
    folder = os.open(base, flags | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(parts[-1], last, dir_fd=folder)
    finally:
        os.close(folder)

"""A kernel of your own in the place of one of the library: compiled, held to the SPEC, timed beside the library's.

The file defines the C entry of one operator as llaisys.h declares it (`SPEC.c_prototype`), in C or C++, or is a shared
library that has it. It may use the rest of llaisys.h, and refuse what it does not take with a status: UNSUPPORTED,
DTYPE, SHAPE, STRIDE or ALIAS.

    rope = llaisys.trial.operator("rope", "my_rope.cpp")
    model = llaisys.Qwen2("tiny", kernels={"rope": rope})
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from . import _lib
from .bench.cases import Case, all_cases, run_case
from .bench.measure import same_threads
from .bench.roof import Roofs
from .certify import Local
from .conformance import Job, plan, spec_of
from .errors import InvalidArgumentError, LibraryError, LlaisysError, status_error
from .harness import REFUSALS
from .isolation import Result, answer
from .ops import operator_of

__all__ = ["Timing", "build", "jobs_of", "operator"]

#: Environment variable, command and language standard of the compilers, by suffix of the source.
_CXX = ("CXX", "c++", "-std=c++20")
COMPILERS = {".c": ("CC", "cc", "-std=c11"), ".cc": _CXX, ".cpp": _CXX, ".cxx": _CXX}
OPTIMISED = ("-O3", "-march=native", "-ffp-contract=off")
#: How a shared library begins.
ELF = b"\x7fELF"
#: How many times as long as a case of the SPEC one that is timed may take, torch and all, before it is taken to hang.
AS_LONG = 2.0
#: Name of the kernel among the implementations that are timed.
YOURS = "yours"


def build(file: str | os.PathLike[str], folder: Path, flags: str | Sequence[str] = ()) -> Path:
    """The shared library of a source, compiled to `folder` with `flags` behind OPTIMISED; `file` if it is one already.

    The compiler is that of CXX or CC, else c++ or cc; what it says goes to stderr. LibraryError if it fails,
    InvalidArgumentError if the file is neither, or does not exist.
    """
    source = Path(file)
    if not source.is_file():
        raise InvalidArgumentError(f"{file}: expected a file, found {'a folder' if source.is_dir() else 'none'}")
    if source.suffix not in COMPILERS:
        with source.open("rb") as opened:
            if opened.read(len(ELF)) != ELF:
                suffixes = ", ".join(COMPILERS)
                raise InvalidArgumentError(f"{file}: expected a source ({suffixes}) or a shared library, found neither")
        return source
    variable, name, standard = COMPILERS[source.suffix]
    compiler = _words(variable, os.environ.get(variable, "")) or [name]
    target = folder / f"{source.stem}.so"
    library = _lib.library_path()[0]
    command = [*compiler, standard, *OPTIMISED, "-shared", "-fPIC", f"-I{_lib.header_folder()}"]
    command += [*(_words("flags", flags) if isinstance(flags, str) else flags), str(source.absolute())]
    command += [str(library), f"-Wl,-rpath,{library.parent}", "-o", str(target)]
    try:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        raise LibraryError(f"{file}: expected a compiler, found: {error}; {variable} names another one") from None
    if status or not target.is_file():
        found = f"exit status {status}" if status else "no library"
        raise LibraryError(f"{file}: expected a source that compiles, found {found} of {compiler[0]}")
    return target


def _words(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InvalidArgumentError(f"{name}: expected words as for a shell, found {text!r}: {error}") from None


def operator(op: str, file: str | os.PathLike[str], flags: str | Sequence[str] = ()) -> Callable[..., Any]:
    """A function like `llaisys.ops.<op>` that calls the C entry in `file`, a source or a library; see `build`."""
    spec = spec_of(op)
    with TemporaryDirectory(prefix="llaisys-") as folder:
        library = build(file, Path(folder), flags)
        if library == Path(file):  # a copy, as the same file is not loaded again when it has changed
            library = Path(shutil.copy(library, folder))
        entry = _lib.operator_of_file(spec, library, file)

    def check(status: int) -> None:
        _lib.check_call(0)  # what a signal handler raised meanwhile
        if status:
            name = _lib.library().llaisysStatusName(status).decode()
            raise status_error(status, f"{op}: {file}: expected OK, found {name} (status {status})")

    return operator_of(spec, lambda _: entry, check)


def jobs_of(
    op: str, file: str | os.PathLike[str], dtypes: Sequence[str], threads: int | None = None, name: object = None
) -> list[Job]:
    """The jobs that hold the C entry in `file`, a shared library called `name`, to the SPEC, for `conformance`; in the
    tier in use alone, as the kernel does not know of tiers. LibraryError if it has none."""
    spec, name = spec_of(op), file if name is None else name
    answer(str(name), f"the function {spec.c_name}", lambda: bool(_lib.operator_of_file(spec, file, name)))
    return [replace(job, kernel=str(file)) for job in plan([op], dtypes, [_lib.isa()], threads, None)]


@dataclass(frozen=True)
class Timing:
    """The benchmarks of an operator in one dtype, for `isolation.in_processes`.

    A case gives the rows of the kernel in `file`, of the library's and of torch, or a `Result` if the kernel is wrong
    or refuses it.
    """

    one_blas_thread: ClassVar[bool] = False

    op: str
    dtype: str
    file: str
    phase: str | None
    roofs: Roofs

    def cases(self) -> Iterator[tuple[str, str, Callable[[], Any]]]:
        """Tier, label, and what to call."""
        yours = operator(self.op, self.file)
        for case in all_cases([self.op], [self.dtype], self.phase):
            yield _lib.isa(), case.case.title, partial(self.measure, case, yours)

    def measure(self, case: Case, yours: Callable[..., Any]) -> list[dict[str, Any]] | Result:
        """One case."""
        result = Result(self.op, self.dtype, _lib.isa(), case.case.title, Local("pass"))
        try:
            with same_threads(self.roofs.threads):
                return run_case(case, {YOURS: yours}).rows(self.roofs)
        except LlaisysError as error:
            status = _lib.library().llaisysStatusName(error.status).decode()
            if status in REFUSALS:
                return replace(result, refused=f"the call: {status}")
            return replace(result, message=str(error))

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
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import _lib
from .bench.cases import Case, all_cases, run_case
from .bench.measure import same_threads
from .bench.roof import Roofs
from .certify import Local
from .conformance import Job, Result
from .errors import InternalError, InvalidArgumentError, LibraryError, LlaisysError, status_error
from .harness import THREADS
from .ops import operator_of
from .reference import SPECS, Spec

__all__ = ["Timing", "build", "jobs_of", "operator", "spec_of"]

#: Environment variable, command and language standard of the compilers, by suffix of the source.
_CXX = ("CXX", "c++", "-std=c++20")
COMPILERS = {".c": ("CC", "cc", "-std=c11"), ".cc": _CXX, ".cpp": _CXX, ".cxx": _CXX}
OPTIMISED = ("-O3", "-march=native", "-ffp-contract=off")
#: Name of the kernel among the implementations that are timed.
YOURS = "yours"


def spec_of(op: str) -> Spec:
    """The SPEC of an operator. InvalidArgumentError if there is none of that name."""
    if op not in SPECS:
        raise InvalidArgumentError(f"op: expected one of {', '.join(SPECS)}, found {op!r}")
    return SPECS[op]


def build(file: str | os.PathLike[str], folder: Path, flags: Sequence[str] = ()) -> Path:
    """The shared library of a source, compiled to `folder` with `flags` behind OPTIMISED; `file` if it is no source.

    The compiler is that of CXX or CC, else c++ or cc; what it says goes to stderr. LibraryError if it fails,
    InvalidArgumentError if there is no such file.
    """
    source = Path(file)
    if not source.is_file():
        raise InvalidArgumentError(f"{file}: expected a file, found {'a folder' if source.is_dir() else 'none'}")
    if source.suffix not in COMPILERS:
        return source
    variable, name, standard = COMPILERS[source.suffix]
    compiler = shlex.split(os.environ.get(variable, "")) or [name]
    target = folder / f"{source.stem}.so"
    library = _lib.library_path()[0]
    command = [*compiler, standard, *OPTIMISED, "-shared", "-fPIC", f"-I{_lib.header_folder()}", *flags, str(source)]
    command += [str(library), f"-Wl,-rpath,{library.parent}", "-o", str(target)]
    try:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        raise LibraryError(f"{file}: expected a compiler, found: {error}; {variable} names another one") from None
    if status:
        raise LibraryError(f"{file}: expected a source that compiles, found exit status {status} of {compiler[0]}")
    return target


def operator(op: str, file: str | os.PathLike[str], flags: Sequence[str] = ()) -> Callable[..., Any]:
    """A function like `llaisys.ops.<op>` that calls the C entry in `file`, a source or a library; see `build`."""
    spec = spec_of(op)
    with TemporaryDirectory(prefix="llaisys-") as folder:
        entry = _lib.operator_of_file(spec, build(file, Path(folder), flags))

    def check(status: int) -> None:
        _lib.check_call(0)  # what a signal handler raised meanwhile
        if status:
            name = _lib.library().llaisysStatusName(status).decode()
            raise status_error(status, f"{op}: {file}: expected OK, found {name} (status {status})")

    return operator_of(spec, lambda _: entry, check)


def jobs_of(op: str, file: str | os.PathLike[str], dtypes: Sequence[str]) -> list[Job]:
    """The jobs that hold the C entry in `file`, a shared library, to the SPEC, for `conformance`; in the tier in use
    alone, as the kernel does not know of tiers."""
    _lib.operator_of_file(spec_of(op), file)  # an error here and not in a process
    return [Job(op, dtype, (_lib.isa(),), THREADS, kernel=str(file)) for dtype in dtypes]


@dataclass(frozen=True)
class Timing:
    """The benchmarks of an operator in one dtype, for `conformance.in_processes`.

    A case gives the rows of the kernel in `file`, of the library's, of torch and of the twin, or a `Result` if the
    kernel is wrong or refuses it.
    """

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
        try:
            with same_threads(self.roofs.threads):
                return run_case(case, {YOURS: yours}).rows(self.roofs)
        except InternalError as error:
            return Result(self.op, self.dtype, _lib.isa(), case.case.title, Local("fault"), str(error))
        except LlaisysError as error:
            return Result(self.op, self.dtype, _lib.isa(), case.case.title, Local("pass"), refused=str(error))

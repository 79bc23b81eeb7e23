"""Cases of kernels in processes of their own, which a kernel may kill: what they give, and how they ended if not.

The processes are forked, so that every case starts with what is loaded already.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from typing import Any, Protocol

import numpy as np

from ._processes import interrupts_blocked, unblock_interrupts
from .certify import Local
from .errors import FileError, InternalError, LibraryError, LlaisysError
from .harness import TOLD, tell_to

__all__ = ["Result", "answer", "in_processes", "signal_name"]

#: Seconds after which a case that does not end is a fault, and crashes after which an operator is given up.
TIMEOUT, CRASHES = 60.0, 3
#: What a process does before its first case.
LOADING = "loading the library"


class Work(Protocol):
    """What `in_processes` does case by case: tier, label, and what to call for the result of each."""

    @property
    def op(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def one_blas_thread(self) -> bool: ...
    def cases(self) -> Iterator[tuple[str, str, Callable[[], Any]]]: ...


@dataclass(frozen=True)
class Result:
    """The outcome of one case: a `Local`, and what else was found wrong ("" if nothing). Of a kernel of somebody's own
    also how it refused the call ("" if it took it), and the other ways to make the call that it refused."""

    op: str
    dtype: str
    isa: str
    case: str
    local: Local
    message: str = ""
    file: str = ""
    refused: str = ""
    variants_refused: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        """ "pass", "fault", "suspect" or "refused"."""
        return "fault" if self.message else "refused" if self.refused else self.local.outcome

    @property
    def text(self) -> str:
        """What is wrong, in one line."""
        return self.message or self.refused or self.local.reason

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        local = self.local
        return {
            **{name: getattr(self, name) for name in ("op", "dtype", "isa", "case", "outcome", "text", "file")},
            **{name: _plain(getattr(local, name)) for name in ("output", "ratio", "index", "got", "expected")},
            **{name: _plain(getattr(local, name)) for name in ("bias", "limit", "checked", "size", "note")},
        }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, complex) or (isinstance(value, float) and not np.isfinite(value)) else value


def _work(pipe: connection.Connection, job: Work, skip: int, told: mmap.mmap) -> None:
    """In a process of its own: ("begin", number, tier, label) and ("end", result) for each case, and ("done",)."""
    unblock_interrupts()
    tell_to(told)
    faulthandler.disable()  # what a crash is to be told, the parent tells
    _end_with_parent()
    if job.one_blas_thread:
        _one_blas_thread()
    try:
        for number, (isa, label, examine) in enumerate(job.cases()):
            if number >= skip:
                pipe.send(("begin", number, isa, label))
                pipe.send(("end", examine()))
        pipe.send(("done",))
    except FileError as error:
        pipe.send(("unwritable", error))
    except Exception:  # not the library's fault, but ours
        pipe.send(("error", traceback.format_exc()))


def _one_blas_thread() -> None:
    """numpy's matrix products on one thread: there are as many processes as CPUs, and threads of OpenBLAS that wait for
    one another held a product of 5 rows up for 0.1 s."""
    module = sys.modules.get("numpy._core._multiarray_umath") or sys.modules["numpy.core._multiarray_umath"]
    core = ctypes.CDLL(str(module.__file__))  # what it is linked with is looked through too
    for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads", "openblas_set_num_threads"):
        if hasattr(core, name):
            getattr(core, name)(1)


def _end_with_parent() -> None:
    """A kernel that hangs would outlive a parent that is killed."""
    PR_SET_PDEATHSIG = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class _Worker:
    job: Work
    process: Any
    pipe: connection.Connection
    told: mmap.mmap
    crashes: int = 0
    number: int = -1
    isa: str = ""
    label: str = LOADING
    since: float = 0.0


def _start(job: Work, skip: int, crashes: int = 0) -> _Worker:
    told = mmap.mmap(-1, TOLD)
    process, pipe = _fork(_work, job, skip, told)
    return _Worker(job, process, pipe, told, crashes, skip - 1, since=time.monotonic())


def _fork(target: Callable[..., None], *args: Any) -> tuple[Any, connection.Connection]:
    """A process that does `target(pipe, *args)`, and the end of the pipe at which what it sends arrives."""
    context = get_context("fork")  # so that every case starts with what is loaded already
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(there, *args), daemon=True)
    with interrupts_blocked(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that forking with threads is dangerous: it is made for it
        process.start()
    there.close()
    return process, here


def in_processes(
    jobs: Sequence[Work], workers: int = 2, timeout: float = TIMEOUT, crashes: int = CRASHES
) -> Iterator[Any]:
    """What the cases of `jobs` give, as it comes, from `workers` processes at a time; for a case that kills its process
    or does not end within `timeout` seconds a `Result` that says so. A job is given up after `crashes` of these."""
    waiting, active = deque[Work](jobs), list[_Worker]()
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                active.append(_start(waiting.popleft(), 0))
            ready = connection.wait([w.pipe for w in active], 1.0)
            for worker in list(active):
                if worker.pipe in ready:
                    yield from _receive(worker, active, crashes)
                elif time.monotonic() - worker.since > timeout:
                    worker.process.kill()
                    yield from _failed(worker, active, f"no end within {timeout:g} s", crashes)
    finally:
        for worker in active:
            worker.process.kill()
            worker.process.join()


def _receive(worker: _Worker, active: list[_Worker], most: int) -> Iterator[Any]:
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        yield from _failed(worker, active, _ending(worker.process.exitcode), most)
        return
    worker.since = time.monotonic()
    if message[0] == "begin":
        worker.number, worker.isa, worker.label = message[1:]
    elif message[0] == "end":
        yield message[1]
    elif message[0] == "unwritable":
        raise message[1]
    elif message[0] == "error":
        raise InternalError(f"{worker.job.op} {worker.job.dtype} {worker.isa}: {worker.label}: {message[1]}")
    else:
        worker.process.join()
        active.remove(worker)


def _failed(worker: _Worker, active: list[_Worker], text: str, most: int) -> Iterator[Result]:
    """The result of a case that killed its process; the cases behind it go on in another."""
    job = worker.job
    worker.process.join()
    active.remove(worker)
    if where := worker.told[:].rstrip(b"\0").decode(errors="replace"):
        text += f", during {where}"
    crashes = worker.crashes + 1
    if crashes == most:
        text += f"; {job.op} in {job.dtype} is given up after {crashes} of these"
    else:
        active.append(_start(job, worker.number + 1, crashes))
    yield Result(job.op, job.dtype, worker.isa, worker.label, Local("fault", reason=text), text)


def _ending(code: int) -> str:
    return f"crashed with {signal_name(-code)}" if code < 0 else f"the kernel ended the process, exit status {code}"


def signal_name(number: int) -> str:
    """SIGSEGV for 11, and so on."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def answer(library: str, what: str, ask: Callable[[], Any]) -> Any:
    """What `ask` returns, in a process of its own, as a library may end that, or hang. The LlaisysError that it raises;
    LibraryError if there is no answer."""
    process, here = _fork(_answer, ask)
    try:
        if not here.poll(TIMEOUT):
            raise LibraryError(f"{library} does not answer: expected {what} within {TIMEOUT:g} s, found nothing")
        found = here.recv()
    except EOFError:
        process.join()
        code = int(process.exitcode or 0)
        how = signal_name(-code) if code < 0 else f"exit status {code}"
        raise LibraryError(f"{library} cannot be used: expected {what}, found {how}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(found, LlaisysError):
        raise found
    return found


def _answer(pipe: connection.Connection, ask: Callable[[], Any]) -> None:
    unblock_interrupts()
    faulthandler.disable()
    try:
        pipe.send(ask())
    except LlaisysError as error:
        pipe.send(error)

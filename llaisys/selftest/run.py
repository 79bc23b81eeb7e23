"""Runs the differ on all faults and on clean controls, and counts."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._lib import OVERRIDE, isas
from .._processes import start_worker, worker_command, worker_environment
from ..diff.ledger import UNTAPPED
from ..errors import InternalError
from ..isolation import signal_name
from ..models import Qwen2
from .build import Builder
from .mutant import Mutant
from .mutants import LEGAL, MUTANTS
from .worker import RUNNING

_PROMPTS = ('def fibonacci(n):\n    """Return', "class Stack:\n    def __init__(self, items=()):\n        self.items =")
#: Seconds that a library may take for one job: a fault may hang.
_PATIENCE = 120.0
#: How a process dies of what it computes. Others, SIGKILL for want of memory among them, come from outside.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)

Progress = Callable[[str, int, int], None]


@dataclass
class Case:
    """One run of the differ: on a fault, or (`mutant` None) on a clean library."""

    mutant: Mutant | None
    library: str
    job: dict[str, Any]
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def alarmed(self) -> bool:
        """Whether the differ, or `llaisys check` where the model is content, said that something is wrong."""
        return bool(self.answer.get("faults")) or "error" in self.answer or self.answer.get("check", False)

    @property
    def site(self) -> str | None:
        """The site that the differ blames, or the operator that `llaisys check` does."""
        faults = self.answer.get("faults")
        if faults:
            return str(faults[0][0])
        return self.mutant.op if self.mutant is not None and self.answer.get("check") else None

    def named(self, site: str | None) -> bool:
        """Whether `site` is one that is right to blame, or the operator."""
        if site is None or self.mutant is None:
            return False
        return site == self.mutant.op or site in expected_sites(self.mutant, self.job)

    @property
    def certified_rightly(self) -> bool:
        """Whether the certificate is one that is right to name."""
        if self.mutant is None:
            return False
        faults = self.answer.get("faults")
        return faults[0][1] in self.mutant.certificates if faults else self.answer.get("check", False)


def expected_sites(mutant: Mutant, job: dict[str, Any]) -> set[str]:
    """The sites of which any is right to blame: those of the first wrong layer that has one."""
    layers, wrong = job["layers"], job["layer"]
    found = set()
    for name in mutant.sites:
        if name.startswith(("model.", "lm_head")) or name == UNTAPPED:
            found.add(name)
            continue
        layer = max(wrong, 0) + name.startswith("+")
        found.add(f"model.layers.{layer}.{name.removeprefix('+')}" if layer < layers else "model.norm")
    return found


@dataclass(frozen=True)
class Plan:
    """What is run: the faults in each of `dtypes`, in each of `places`, after each of `prompts`."""

    model: str = "tiny"
    dtypes: tuple[str, ...] = ("f32", "bf16", "f16")
    places: tuple[str, ...] = ("first", "middle", "last", "all")
    prompts: tuple[str, ...] = _PROMPTS
    decode: int = 3
    mutants: tuple[Mutant, ...] = MUTANTS
    controls: int = 300


class Jobs:
    """Makes the jobs of a plan."""

    def __init__(self, plan: Plan) -> None:
        with Qwen2(plan.model) as model:
            self.layers = model.config.num_hidden_layers
            self.prompts = [model.tokenizer.encode(text) for text in plan.prompts]
        self.plan = plan

    def job(self, **values: Any) -> dict[str, Any]:
        """A job for the worker; what is not given is usual."""
        usual = {
            "model": self.plan.model,
            "layers": self.layers,
            "layer": -1,
            "decode": self.plan.decode,
            "isa": isas()[-1],
            "threads": 2,
            "rules": True,
        }
        return usual | values

    def of(self, mutant: Mutant) -> Iterator[dict[str, Any]]:
        """All jobs of one fault."""
        at = {"first": 0, "middle": self.layers // 2, "last": self.layers - 1, "all": -1}
        for place in self.plan.places if mutant.layered else ("all",):
            for dtype in self.plan.dtypes:
                if dtype in mutant.dtypes:
                    for prompt in self.prompts:
                        yield self.job(layer=at[place], dtype=dtype, prompt=prompt)

    def controls(self, count: int) -> list[dict[str, Any]]:
        """Jobs for a library without a fault: tiers, threads, dtypes, and prompts of all lengths, odd ones too."""
        text = (self.prompts[0] + self.prompts[-1]) * 8
        lengths = (1, 2, 3, 7, 13, 16, 17, 31, 33, 65, 127, 129)
        ways = list(itertools.product(self.plan.dtypes, isas(), (2, 1, 3)))
        found = []
        for i in range(count):
            dtype, isa, threads = ways[i % len(ways)]
            prompt = text[i : i + lengths[i // len(ways) % len(lengths)]]
            found.append(self.job(dtype=dtype, isa=isa, threads=threads, prompt=prompt, decode=1 + i % 4))
        return found


def run(plan: Plan, source: Path, *, workers: int = 2, progress: Progress | None = None) -> list[Case]:
    """Build every fault and the controls from the tree `source`, run them, and return all cases with their answers.

    LibraryError if something does not compile, InvalidArgumentError where a patch no longer fits the sources,
    InternalError where a process could not run what it was asked to: nothing is known of the fault then.
    """
    jobs = Jobs(plan)
    with tempfile.TemporaryDirectory(prefix="llaisys-selftest-") as name, ThreadPoolExecutor(workers) as pool:
        folder = Path(name)
        builder = Builder(source, folder)
        shutil.copy2(builder.prepare(), folder / "clean.so")
        libraries: list[tuple[Mutant | None, str, list[dict[str, Any]]]] = []
        libraries += [(mutant, mutant.name, list(jobs.of(mutant))) for mutant in plan.mutants]
        # Sums in another order are right too: the controls are shared out to the clean library and to those.
        share = -(-plan.controls // (1 + len(LEGAL)))
        libraries += [(None, "clean", jobs.controls(share))] if share else []
        libraries += [(None, legal.name, jobs.controls(share)) for legal in LEGAL] if share else []
        total = sum(len(some) for _, _, some in libraries)
        patches = {mutant.name: mutant.patches for mutant in (*plan.mutants, *LEGAL)}
        futures: list[Future[list[Case]]] = []
        done, stopped = itertools.count(1), threading.Event()

        def finished(case: Case) -> None:
            if progress is not None:
                progress(case.library, next(done), total)

        try:
            for mutant, label, some in libraries:
                library = folder / f"{label}.so"
                if label in patches:
                    builder.mutate(patches[label], library)
                cases = [Case(mutant, label, job) for job in some]
                futures.append(pool.submit(_answer, library, cases, finished, stopped))
                for future in futures:
                    if future.done():
                        future.result()
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [case for future in futures for case in future.result()]


def _answer(library: Path, cases: list[Case], finished: Callable[[Case], None], stopped: threading.Event) -> list[Case]:
    """Runs the cases in worker processes: a new one after a crash, or after one that did not answer in time."""
    left = list(cases)
    while left and not stopped.is_set():
        worker = _Worker(library)
        try:
            while left and not stopped.is_set():
                left[0].answer = worker.ask(left[0].job)
                finished(left.pop(0))
        except _Crash as error:
            left[0].answer = {"error": str(error)}
            finished(left.pop(0))
        finally:
            worker.end()
    # A fault that no layer of the model brings out: what is wrong with it only shows on the inputs of `llaisys check`.
    quiet = [case for case in cases if case.mutant is not None and case.mutant.op and not case.alarmed]
    for dtype in {case.job["dtype"] for case in quiet}:
        found = _check(library, quiet[0].mutant.op, dtype)  # type: ignore[union-attr]
        for case in quiet:
            if case.job["dtype"] == dtype:
                case.answer["check"] = found
    return cases


def _check(library: Path, op: str, dtype: str) -> bool:
    """Whether `llaisys check` finds a fault in the operator."""
    command = worker_command("llaisys", "check", op, "--dtype", dtype, "--json", "-")
    environment = worker_environment(**{OVERRIDE: str(library)})
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    try:
        results = json.loads(done.stdout)
    except ValueError:
        raise InternalError(
            f"{library.stem}: llaisys check {op}: expected results, found exit status {done.returncode}"
            f"{_last_line(done.stderr)}"
        ) from None
    return any(result["outcome"] == "fault" for result in results)


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").split("\n")
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


class _Crash(Exception):
    """The library ended the process in the midst of a job, or did not come to an end with it."""


class _Worker:
    def __init__(self, library: Path) -> None:
        self._library = library.stem
        # Not a pipe, which may be full before anybody reads it.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        environment = {OVERRIDE: str(library)}
        self._process = start_worker("llaisys.selftest.worker", environment=environment, text=True, **pipes)

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to a job. `_Crash` if the library is why there is none; if it had not begun to compute, or the
        process ended in another way, InternalError."""
        process, late = self._process, threading.Event()
        assert process.stdin is not None and process.stdout is not None

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(_PATIENCE, give_up)
        timer.start()
        running, line = False, ""
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if line == RUNNING:
                running, line = True, process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = process.wait()
        if late.is_set():
            how = f"gave no answer for {_PATIENCE:g} s"
        else:
            how = f"died of {signal_name(-status)}" if status < 0 else f"ended with status {status}"
        if running and (late.is_set() or -status in _CRASHES):
            raise _Crash(f"the process {how}")
        self._stderr.seek(0)
        when = "in the midst of a job" if running else "before the library had anything to compute"
        raise InternalError(f"{self._library}: the process {how} {when}{_last_line(self._stderr.read())}")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

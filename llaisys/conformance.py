"""Does a library keep to the SPECs? What `llaisys check` runs, case by case, in processes that a defect may kill.

A case is a valid call of the SPEC (`reference.spec.calls`). It is made on memory that ends at a page which may not be
touched, with outputs full of NaN, and certified (`llaisys.certify`); where f32 computes exactly, the result must be y
rounded, bit for bit. Then the same bits must come out of every layout, whatever the outputs held before, with any
number of threads, in place, and of each row alone. Behind the cases come calls of sizes beyond any block, one on other
contents of the same memory, and two from two threads at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ._fenv import FloatState
from ._lib import isas, operator_of_file
from .certify import Local, certify
from .errors import InvalidArgumentError
from .harness import (
    LAYOUTS,
    POISONS,
    THREADS,
    Array,
    Guarded,
    KernelFault,
    Refusal,
    Standing,
    replaced,
    run,
    same_bits,
    using,
)
from .isolation import LOADING, TIMEOUT, Result, answer, in_processes
from .reference import FLOATS, SPECS, Oracle, Spec, check
from .reference.numerics import f32
from .reference.spec import arg_dtype, calls, dims_label, seeded_inputs, shape_letters

__all__ = ["Job", "conformance", "plan", "spec_of", "tiers"]

#: Rows of a case that are run alone: of every position in a block of so many. Times that the call shared by threads is
#: repeated.
ROWS, REPEATS = 16, 3
#: Seconds for which calls come from two threads at once: of the library, and of a kernel of somebody's own.
SECONDS, SECONDS_OWN = 0.03, 0.15


@dataclass
class _Found:
    """What is known of a case so far."""

    outputs: Sequence[Array] | None = None
    local: Local = field(default_factory=lambda: Local("pass"))
    refused: list[str] = field(default_factory=list)  # other ways to make the call


@dataclass(frozen=True)
class Job:
    """All cases of one operator in one storage dtype; of the C entry in `kernel`, another library, if one is named."""

    one_blas_thread: ClassVar[bool] = True

    op: str
    dtype: str
    isas: tuple[str, ...]
    threads: tuple[int, ...]
    save: str | None = None
    kernel: str | None = None

    def cases(self) -> Iterator[tuple[str, str, Callable[[], Result]]]:
        """Tier, label, and what to call for the result."""
        with ExitStack() as stack:
            if self.kernel is not None:
                state = FloatState()
                stack.enter_context(replaced(SPECS[self.op], operator_of_file(SPECS[self.op], self.kernel)))
                if changed := state.restore():
                    text = f"loading it left the floating-point state of the thread changed: {changed}"
                    result = Result(self.op, self.dtype, self.isas[0], LOADING, Local("pass"), text)
                    yield self.isas[0], LOADING, partial(replace, result)
            yield from self._cases()

    def _cases(self) -> Iterator[tuple[str, str, Callable[[], Result]]]:
        spec = SPECS[self.op]
        exact = {probe.label for probe in spec.probes if probe.exact}
        for number, (label, _, values) in enumerate(calls(spec, self.dtype)):
            for isa in self.isas:
                yield isa, label, partial(self.examine, isa, label, values, label in exact, number)
        for number, dims in enumerate(spec.large if self.dtype in FLOATS else ()):
            values = seeded_inputs(spec, self.dtype, label := dims_label(dims), dims)
            for isa in self.isas:
                yield isa, label, partial(self.examine, isa, label, values, False, number, large=True)
        if not spec.shared:
            return
        values, *others = (
            spec.inputs(spec, np.random.default_rng(seed), dims, spec.dtypes[self.dtype])
            for seed, dims in ((1, spec.shared), (2, spec.shared), (3, max(spec.cases, key=_size)))
        )
        sizes, isa = dims_label(spec.shared), self.isas[-1]
        for tier in self.isas:
            label = f"{sizes}, shared by threads"
            yield tier, label, partial(self.share, tier, label, values)
        if self.dtype in FLOATS:  # what a kernel keeps between its calls is seldom of one tier or size of elements
            label = f"{sizes}, on other contents"
            yield isa, label, partial(self.refill, isa, label, values, others[0])
            label = f"{sizes}, from two threads"
            yield isa, label, partial(self.at_once, isa, label, values, others)

    def examine(
        self, isa: str, label: str, values: Mapping[str, Any], exact: bool, number: int, large: bool = False
    ) -> Result:
        """One case of the SPEC; of a `large` one fewer of the other ways to make the call."""
        spec = SPECS[self.op]

        def steps(found: _Found) -> None:
            with using(isa, self.threads[0]):
                found.outputs = run(spec, values, "the call", allocate=Guarded())
                found.local = self.certify(values, found.outputs, exact)
                if found.local.outcome == "pass":
                    found.refused = self.variants(spec, values, found.outputs, number, large)

        return self.settle(isa, label, values, steps)

    def certify(self, values: Mapping[str, Any], outputs: Sequence[Array], exact: bool = False) -> Local:
        """`certify` of named values; of an `exact` probe the oracle is right to the last bit."""
        spec = SPECS[self.op]
        inputs = {a.name: values[a.name] for a in spec.inputs_args}
        scalars = {s.name: values[s.name] for s in spec.scalars}
        named = dict(zip([a.name for a in spec.outputs], outputs, strict=True))

        def again(moved: Mapping[str, Array | None]) -> dict[str, Array]:
            return dict(zip(named, run(spec, {**moved, **scalars}, "the call on other inputs"), strict=True))

        local = certify(spec, inputs, scalars, named, again=again)
        if exact and local.outcome == "pass":
            for arg, output, oracle in zip(spec.outputs, outputs, spec.call(spec.oracle, values), strict=True):
                sure = oracle if oracle.exact else Oracle(f32(oracle.y).astype(np.float64))
                verdict = check(output, sure, arg_dtype(arg, spec.dtypes[self.dtype]))
                if not verdict:
                    text = f"{arg.name}: f32 computes this exactly, and {verdict.reason}"
                    local = replace(local, outcome="fault", output=arg.name, ratio=verdict.worst, reason=text)
                    local = replace(local, index=verdict.index, got=verdict.got, expected=verdict.expected)
        return local

    def variants(
        self, spec: Spec, values: Mapping[str, Any], outputs: Sequence[Array], number: int, large: bool
    ) -> list[str]:
        """Other ways to make the call, which must give the same bits: KernelFault if one does not. Returned is what a
        kernel of somebody's own does not take."""
        refused: list[str] = []
        for i, layout in enumerate(LAYOUTS[1:2] if large else LAYOUTS):
            title, poison = f"layout {layout}", POISONS[1 - i % 2]
            with _noting(refused), using(threads=self.threads[(number + i) % len(self.threads)]):
                _same(spec, title, run(spec, values, title, layout, Guarded(at_start=True), poison), outputs)
        for out in spec.outputs:
            for source in out.may_alias:
                title = f"{out.name} in the memory of {source}"
                with _noting(refused):
                    _same(spec, title, run(spec, values, title, in_place={out.name: source}), outputs)
        for row, alone in _rows(spec, values, outputs, 0 if large else ROWS):
            title = f"row {row} alone"
            with _noting(refused):
                _same(spec, title, run(spec, alone, title), [x[row : row + 1] for x in outputs])
        return refused

    def share(self, isa: str, label: str, values: Mapping[str, Any]) -> Result:
        """A call that is large enough for several threads: certified, and the same bits for any number of them."""
        spec = SPECS[self.op]

        def steps(found: _Found) -> None:
            with using(isa):
                for threads in self.threads:
                    for _ in range(REPEATS if threads > 1 else 1):
                        title = f"{threads} threads"
                        with using(threads=threads):
                            outputs = run(spec, values, title, poison=POISONS[threads % 2])
                        if found.outputs is None:
                            found.outputs, found.local = outputs, self.certify(values, outputs)
                        _same(spec, title, outputs, found.outputs)

        return self.settle(isa, label, values, steps)

    def refill(self, isa: str, label: str, values: Mapping[str, Any], others: Mapping[str, Any]) -> Result:
        """A call repeated after the contents of its tensors were replaced where they are: the bits of a fresh call."""
        spec = SPECS[self.op]

        def steps(found: _Found) -> None:
            with using(isa, self.threads[0]):
                call = Standing(spec, values)
                before = call("the call")
                found.outputs = run(spec, others, "a call on other contents")
                found.local = self.certify(others, found.outputs)
                turns = ((others, found.outputs), (values, before)) if found.local.outcome == "pass" else ()
                for contents, expected in turns:
                    call.fill(contents)
                    _same(spec, "depends on an earlier call on the same addresses", call("the call again"), expected)

        return self.settle(isa, label, others, steps)

    def at_once(self, isa: str, label: str, values: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Result:
        """A call by one thread while another makes other calls: the bits of each by itself."""
        spec, counts = SPECS[self.op], self.threads[:2]
        seconds = (SECONDS if self.kernel is None else SECONDS_OWN) / len(counts)

        def steps(found: _Found) -> None:
            for threads in counts:
                with using(isa, threads):
                    calls = [[Standing(spec, x) for x in turns] for turns in ([values], others)]
                    _at_once(spec, [[(call, call("the call")) for call in turns] for turns in calls], seconds)

        return self.settle(isa, label, values, steps)

    def settle(self, isa: str, label: str, values: Mapping[str, Any], steps: Callable[[_Found], None]) -> Result:
        """The result of a case that `steps` goes through, whatever ends it."""
        found = _Found()
        try:
            steps(found)
        except Refusal as refusal:
            return Result(self.op, self.dtype, isa, label, found.local, refused=str(refusal))
        except KernelFault as fault:
            return self.result(isa, label, values, found.outputs, found.local, str(fault))
        result = self.result(isa, label, values, found.outputs, found.local)
        return replace(result, variants_refused=tuple(found.refused))

    def result(
        self, isa: str, label: str, values: Mapping[str, Any], outputs: Any, local: Local, message: str = ""
    ) -> Result:
        """The result, with a file of the case if it failed and there is a folder for it."""
        result = Result(self.op, self.dtype, isa, label, local, message)
        if self.save is None or result.outcome == "pass" or outputs is None:
            return result
        from ._lib import num_threads
        from .case import Case, save_case, versions

        spec = SPECS[self.op]
        file = Path(self.save) / f"{self.op}-{self.dtype}-{isa}-{label.replace(', ', '-').replace(' ', '-')}.npz"
        case = Case(
            op=self.op,
            inputs={a.name: values[a.name] for a in spec.inputs_args},
            scalars={s.name: values[s.name] for s in spec.scalars},
            outputs=dict(zip([a.name for a in spec.outputs], outputs, strict=True)),
            site=f"llaisys check, {label}",
            isa=isa,
            threads=num_threads(),
            versions=versions(),
        )
        save_case(file, case)
        return replace(result, file=str(file))


@contextmanager
def _noting(refused: list[str]) -> Iterator[None]:
    try:
        yield
    except Refusal as refusal:
        refused.append(str(refusal))


def _same(spec: Spec, title: str, found: Sequence[Array], expected: Sequence[Array]) -> None:
    for arg, a, b in zip(spec.outputs, found, expected, strict=True):
        if not same_bits(a, b):
            bits = np.dtype(f"V{a.dtype.itemsize}")
            x, y = (np.ascontiguousarray(z).reshape(-1).view(bits) for z in (a, b))
            other = np.flatnonzero(x != y)
            where = tuple(int(i) for i in np.unravel_index(int(other[0]), a.shape))
            raise KernelFault(
                f"{title}: {arg.name}: {len(other)} of {a.size} elements have other bits, the first at {where}: "
                f"expected {b[where].item()!r}, found {a[where].item()!r}"
            )


def _at_once(spec: Spec, callers: Sequence[Sequence[tuple[Standing, tuple[Array, ...]]]], seconds: float) -> None:
    """The calls of each caller in turns, over and over, on a thread of its own. KernelFault if one gives other bits
    than those beside it."""
    title, found = "called from two threads at once", list[BaseException]()
    start = threading.Barrier(len(callers))

    def repeat(turns: Sequence[tuple[Standing, tuple[Array, ...]]]) -> None:
        try:
            start.wait()
            until, count = time.monotonic() + seconds, 0
            while not found and (count < REPEATS or time.monotonic() < until):
                call, expected = turns[count % len(turns)]
                _same(spec, title, call(title), expected)
                count += 1
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=repeat, args=(turns,), daemon=True) for turns in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if found:
        raise found[0]


def _size(dims: Mapping[str, Any]) -> int:
    return int(np.prod([np.prod(n, dtype=np.int64) for n in dims.values()]))


def _rows(
    spec: Spec, values: Mapping[str, Any], outputs: Sequence[Array], block: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a call with several, each as a call of its own: the ends, a middle one, and of every position in a block
    one, spread over the call."""
    letters = shape_letters(spec)
    lead = "..." if "..." in letters else "T"
    own = [a.name for a in spec.inputs_args if a.shape.split()[0] == lead and values[a.name] is not None]
    if outputs[0].ndim == 0 or any(values[name].ndim < 2 and lead == "..." for name in own):
        return  # elementwise operators of one axis have no rows
    count = len(outputs[0])
    spread = (count * i // block - (count * i // block - i) % block for i in range(block))
    rows = {0, count // 2, count - 1, *(row + block * (row < 0) for row in spread)}
    for row in sorted(row for row in rows if row < count) if count > 1 else ():
        alone = {name: values[name][row : row + 1] for name in own}
        if "S" in letters:
            seen = len(values["k"]) - count + row + 1
            alone |= {name: values[name][:seen] for name in "kv"}
        yield row, {**values, **alone}


def conformance(jobs: Sequence[Job], workers: int = 2, timeout: float = TIMEOUT) -> Iterator[Result]:
    """The results of all cases of `jobs`, as they come, from `workers` processes at a time."""
    return in_processes(jobs, workers, timeout)


def tiers() -> tuple[str, ...]:
    """The tiers of the library, asked in a process of its own. LibraryError if that does not answer."""
    return tuple(answer("the library", "its tiers", isas))


def spec_of(op: str) -> Spec:
    """The SPEC of an operator. InvalidArgumentError if there is none of that name."""
    if op not in SPECS:
        raise InvalidArgumentError(f"op: expected one of {', '.join(SPECS)}, found {op!r}")
    return SPECS[op]


def plan(
    ops: Sequence[str], dtypes: Sequence[str], isas: Sequence[str], threads: int | None, save: str | None
) -> list[Job]:
    """The jobs for some operators (all if none is named) and dtypes, the long ones first."""
    counts = (threads,) if threads else THREADS
    jobs = [
        Job(spec.name, dtype, tuple(isas), counts, save)
        for spec in map(spec_of, ops or SPECS)
        for dtype in spec.dtypes
        if not dtypes or dtype in dtypes
    ]
    return sorted(jobs, key=lambda job: "S" not in shape_letters(SPECS[job.op]))

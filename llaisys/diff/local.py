"""LOCAL: outputs against the f64 oracle, on the inputs that the engine gave the node.

The engine runs on while nodes are certified in other threads. Widening a matrix of weights is most of the work on a
product with few rows, and numpy's own time most of that on any other node with few: nodes of several decode steps wait
for each other and are certified as one, where each row stands for itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import numpy as np

from .._lib import usable_cpus
from ..certify import Local, certify
from ..models.nodes import Kernel, as_outputs, kernel_function
from ..reference import Spec
from .ledger import MAIN, Array, Entry, Ledger

#: Nodes of at most so many rows wait, until together they have so many.
_FEW, _TOGETHER = 4, 16
_SEVERITY = ("pass", "suspect", "fault")


class Certifier:
    """Certifies entries in threads; `drain` waits for them. `budget` bounds the bytes that all of them take at once.

    `kernels` are the functions of sites that another kernel computes than that of the engine.
    """

    def __init__(
        self, ledger: Ledger, budget: int, kernels: Mapping[str, Kernel], done: Callable[[Entry], None]
    ) -> None:
        self._ledger, self._kernels, self._done = ledger, kernels, done
        workers = min(usable_cpus(), 8)
        self._budget = budget // workers
        self._pool = ThreadPoolExecutor(workers, "certify")
        self._pending: deque[Future[None]] = deque()
        self._most = 4 * workers
        self._waiting: dict[str, list[Entry]] = {}

    def submit(self, entry: Entry) -> None:
        """Certify an entry, as soon as a thread is free. Waits while too many are under way."""
        if entry.rows > _FEW or entry.wiring.state or entry.wiring.tokens is not None:
            self._start([entry])
            return
        waiting = self._waiting.setdefault(entry.site, [])
        if waiting and not _alike(waiting[0], entry):
            self._start(self._waiting.pop(entry.site))
            waiting = self._waiting.setdefault(entry.site, [])
        waiting.append(entry)
        if sum(e.rows for e in waiting) >= _TOGETHER:
            self._start(self._waiting.pop(entry.site))

    def drain(self) -> None:
        """Certify what waits, and wait for all. Raises what a thread raised."""
        while self._waiting:
            self._start(self._waiting.pop(next(iter(self._waiting))))
        while self._pending:
            self._pending.popleft().result()

    def _start(self, entries: list[Entry]) -> None:
        while len(self._pending) >= self._most:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._together, entries))

    def _together(self, entries: list[Entry]) -> None:
        if len(entries) > 1:
            joined = _join(entries)
            found, _ = certify_rows(joined, self._budget, self._again(joined))
            if found.outcome == "pass":
                for entry in entries:
                    share = entry.rows / joined.rows
                    self._note(entry, replace(found, checked=round(found.checked * share)), 0)
                return
        for entry in entries:  # one by one, so that it is known which is wrong
            self._note(entry, *certify_rows(entry, self._budget, self._again(entry)))

    def close(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(cancel_futures=True)

    def _again(self, entry: Entry) -> Callable[[dict[str, Array | None]], Mapping[str, Array]]:
        """The kernel of the site, on other inputs."""
        function = kernel_function(self._kernels.get(entry.site, "native"), entry.wiring.op)

        def again(inputs: dict[str, Array | None]) -> Mapping[str, Array]:
            return as_outputs(entry.spec, function(*inputs.values(), *entry.scalars.values()))

        return again

    def _note(self, entry: Entry, found: Local, row: int) -> None:
        entry.ratio, entry.bias, entry.checked = found.ratio, found.bias, found.checked
        entry.outcomes["LOCAL"] = found.outcome
        if found.outcome == "fault":
            position = entry.position + row
            rows = f"{entry.rows} row{'s' if entry.rows > 1 else ''}"
            scene = f"{entry.scene}, in a call of {rows}: " if entry.scene != MAIN else ""
            self._ledger.fault(
                entry.site,
                "LOCAL",
                scene + found.reason,
                position=position,
                step=entry.step,
                ratio=found.ratio,
                entry=entry,
                scene=entry.scene,
            )
        self._done(entry)


def _alike(a: Entry, b: Entry) -> bool:
    """Whether two calls of one site differ in their rows only."""
    if dict(a.scalars) != dict(b.scalars):
        return False
    return all(
        (x is None) == (y is None) and (x is None or y is None or x.ctypes.data == y.ctypes.data)
        for x, y in ((a.inputs[name], b.inputs[name]) for name in a.wiring.weights)
    )


def _join(entries: list[Entry]) -> Entry:
    """The rows of several entries as those of one."""
    first = entries[0]
    inputs = {
        name: x if name in first.wiring.weights else np.concatenate([cast(Array, e.inputs[name]) for e in entries])
        for name, x in first.inputs.items()
    }
    outputs = {name: np.concatenate([e.outputs[name] for e in entries]) for name in first.outputs}
    return replace(first, rows=sum(e.rows for e in entries), inputs=inputs, outputs=outputs)


def certify_rows(
    entry: Entry, budget: int, again: Callable[[dict[str, Array | None]], Mapping[str, Array]]
) -> tuple[Local, int]:
    """The certificate of a node, and the row of the element that it names; made in parts of as many rows as `budget`
    bytes allow."""
    spec = entry.spec
    step = max(1, min(entry.rows, budget // max(1, row_bytes(entry))))
    worst, row = Local("pass"), 0
    checked = size = 0
    for begin in range(0, entry.rows, step):
        end = min(begin + step, entry.rows)
        inputs = {name: rows_of(spec, name, x, begin, end, entry.rows) for name, x in entry.inputs.items()}
        inputs = {arg.name: inputs[arg.name] for arg in spec.inputs_args}  # in the order of the SPEC
        outputs = {name: x[begin:end] for name, x in entry.outputs.items()}
        found = certify(spec, inputs, entry.scalars, outputs, again=again)
        checked, size = checked + found.checked, size + found.size
        if begin == 0 or _rank(found) > _rank(worst):
            worst, row = found, begin + (found.index[0] if found.index else 0)
    return replace(worst, checked=checked, size=size), row


def rows_of(spec: Spec, name: str, x: Array | None, begin: int, end: int, rows: int) -> Array | None:
    """The part of an input that the rows [begin, end) of the output depend on."""
    arg = next(arg for arg in spec.inputs_args if arg.name == name)
    first = arg.shape.split()[0]
    if x is None or (begin, end) == (0, rows):
        return x
    if first in ("T", "..."):
        return x[begin:end]
    return x[: len(x) - rows + end] if first == "S" else x


def row_bytes(entry: Entry) -> int:
    """About how many bytes the oracle takes for one row, in f64 with a dozen temporaries."""
    wide = sum(x[:1].size for x in entry.outputs.values())
    wide += sum(x[:1].size for arg in entry.spec.inputs_args if (x := entry.inputs[arg.name]) is not None)
    if "k" in entry.inputs:
        keys, out = entry.inputs["k"], entry.outputs["out"]
        assert keys is not None
        wide += len(keys) * out.shape[1]
    return 8 * 12 * wide


def _rank(found: Local) -> tuple[Any, ...]:
    return _SEVERITY.index(found.outcome), found.ratio

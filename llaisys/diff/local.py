"""LOCAL: outputs against the f64 oracle, on the inputs that the engine gave the node.

The engine runs on while nodes are certified in other threads. The work on a matrix of weights is nearly all in widening
it, so that products with few rows wait until several steps can share that.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from ..reference import Spec
from .ledger import Array, Entry, Ledger

#: Products of at most so many rows wait for each other, until they have `_TOGETHER` rows.
_FEW, _TOGETHER = 4, 16


class Local:
    """Certifies entries in threads; `drain` waits for them. `budget` bounds the bytes that one certificate takes."""

    def __init__(self, ledger: Ledger, budget: int, done: Callable[[Entry], None]) -> None:
        self._ledger, self._budget, self._done = ledger, budget, done
        workers = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(workers, "certify")
        self._pending: deque[Future[None]] = deque()
        self._most = 2 * workers
        self._waiting: dict[tuple[Any, ...], list[Entry]] = {}

    def submit(self, entry: Entry) -> None:
        """Certify an entry, now or with others."""
        if entry.wiring.op != "linear" or entry.rows > _FEW:
            self._start([entry])
            return
        weight = entry.inputs["weight"]
        assert weight is not None
        together = self._waiting.setdefault((entry.site, weight.ctypes.data), [])
        together.append(entry)
        if sum(e.rows for e in together) >= _TOGETHER:
            del self._waiting[entry.site, weight.ctypes.data]
            self._start(together)

    def drain(self) -> None:
        """Certify what waits, and wait for all. Raises what a thread raised."""
        while self._waiting:
            self._start(self._waiting.pop(next(iter(self._waiting))))
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(cancel_futures=True)

    def _start(self, entries: list[Entry]) -> None:
        while len(self._pending) >= self._most:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._certify, entries))

    def _certify(self, entries: list[Entry]) -> None:
        if len(entries) > 1:
            joined = _join(entries)
            certificate = certify_rows(entries[0].spec, joined, entries[0].scalars, _join_outputs(entries), self._budget)
            if certificate.outcome == "pass":
                row = 0
                for entry in entries:
                    self._note(entry, replace(certificate, checked=certificate.checked * entry.rows // len(joined["x"])))
                    row += entry.rows
                return
        for entry in entries:  # one by one, so that it is known which is wrong
            self._note(entry, certify_rows(entry.spec, entry.inputs, entry.scalars, entry.outputs, self._budget))

    def _note(self, entry: Entry, found: Certificate) -> None:
        entry.ratio, entry.bias, entry.checked = found.ratio, found.bias, found.checked
        entry.outcomes["LOCAL"] = found.outcome
        if found.outcome == "fault":
            position = entry.position + found.row
            self._ledger.fault(
                entry.site, "LOCAL", found.message, position=position, step=entry.step, ratio=found.ratio, entry=entry
            )
        self._done(entry)


def _join(entries: list[Entry]) -> dict[str, Array | None]:
    inputs = dict(entries[0].inputs)
    inputs["x"] = np.concatenate([x for e in entries if (x := e.inputs["x"]) is not None])
    return inputs


def _join_outputs(entries: list[Entry]) -> dict[str, Array]:
    return {"out": np.concatenate([e.outputs["out"] for e in entries])}

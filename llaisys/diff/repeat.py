"""REPEAT: the same bits over repetitions, numbers of threads, and splits of the sequence.

The main run leaves a digest of every row that every node put out. The sequence is then run again in other ways; a node
whose inputs agree with those of the main run, and whose output does not, is at fault. Nodes are also computed anew on
the inputs that they had, into memory full of NaN, with other numbers of threads: that finds races and rows that are not
written, wherever they are in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .. import _lib
from ..errors import LlaisysError
from ..models.nodes import Kernel, kernel_function
from .bits import digests, first_difference
from .ledger import Array, Entry, Ledger

Key = tuple[str, str]

#: What `Rerun` says that it does, to progress.
ANEW = "computed anew"


class Digests:
    """Of each output of each node, a digest of the row of each position."""

    def __init__(self) -> None:
        self._rows: dict[Key, Array] = {}
        self._known: dict[Key, Array] = {}

    def keep(self, entry: Entry) -> None:
        """Take the rows of an entry of the main run."""
        end = entry.position + entry.rows
        for name, x in entry.outputs.items():
            key = entry.site, name
            rows = self._rows.get(key)
            if rows is None or end > len(rows):
                size = max(end, 2 * len(rows) if rows is not None else 64)
                self._rows[key], self._known[key] = _grown(rows, size), _grown(self._known.get(key), size, bool)
            self._rows[key][entry.position : end] = digests(x)
            self._known[key][entry.position : end] = True

    def parted(self, entry: Entry) -> tuple[str, Array] | None:
        """The first output of an entry that is not as in the main run, and at which positions."""
        for name, x in entry.outputs.items():
            key = entry.site, name
            if key not in self._rows:
                continue
            end = min(entry.position + entry.rows, len(self._rows[key]))
            count = max(0, end - entry.position)
            part = slice(entry.position, end)
            wrong = (self._rows[key][part] != digests(x[:count])) & self._known[key][part]
            if wrong.any():
                return name, entry.position + np.flatnonzero(wrong)
        return None


class Again:
    """Compares a repetition with the main run."""

    def __init__(
        self,
        ledger: Ledger,
        main: Digests,
        kernels: Mapping[str, Kernel],
        how: str,
        suspects: Callable[[Entry], None],
    ) -> None:
        self._ledger, self._main, self._kernels, self._how, self._suspects = ledger, main, kernels, how, suspects
        self._parted: dict[str, set[int]] = {}
        self.compared = 0

    def visit(self, entry: Entry) -> None:
        """One node of the repetition."""
        found = self._main.parted(entry)
        self.compared += 1
        if found is None:
            return
        name, positions = found
        excused = {p for p in positions.tolist() if self._inputs_part(entry, p)}
        mine = [p for p in positions.tolist() if p not in excused]
        self._parted.setdefault(entry.site, set()).update(positions.tolist())
        # Where the node was called wrongly, here or in the run, its output proves nothing.
        # Numpy promises no order of accumulation.
        if self._kernels.get(entry.site) == "reference":
            return
        if not mine or any((entry.site, c) in self._ledger.faults for c in ("EDGE", "PARAM", "STATE")):
            return
        text = f"{name}: expected the bits of the run, found others at {_positions(mine)}, {self._how}"
        self._ledger.fault(entry.site, "REPEAT", text, position=mine[0], entry=entry, scene=entry.scene)
        self._suspects(entry)

    def _inputs_part(self, entry: Entry, position: int) -> bool:
        wiring = entry.wiring
        if any(position in self._parted.get(source.site, ()) for source in wiring.edges.values()):
            return True
        return any(p <= position for site in wiring.state.values() for p in self._parted.get(site, ()))


class Rerun:
    """Computes nodes anew on their own inputs, and compares the bits."""

    def __init__(
        self,
        ledger: Ledger,
        kernels: Mapping[str, Kernel],
        threads: tuple[int, ...],
        progress: Callable[[str, int, str], None],
    ) -> None:
        self._ledger, self._kernels, self._threads, self._progress = ledger, kernels, threads, progress

    def visit(self, entry: Entry) -> None:
        """Run the operator of a node again, once with each number of threads."""
        before = _lib.num_threads()
        self._progress(ANEW, entry.step, entry.site)
        try:
            # With each number of threads for the prompt and the first step, then in turns.
            threads = self._threads if entry.step < 2 else (self._threads[entry.step % len(self._threads)],)
            for count in threads:
                _lib.set_num_threads(count)
                text = self._differs(entry)
                if text:
                    how = f"computed anew on the same inputs with {count} thread{'s' if count > 1 else ''}"
                    self._ledger.fault(
                        entry.site, "REPEAT", f"{how}, {text[0]}", position=entry.position + text[1], entry=entry
                    )
                    return
        finally:
            _lib.set_num_threads(before)

    def _differs(self, entry: Entry) -> tuple[str, int] | None:
        spec = entry.spec
        function = kernel_function(self._kernels.get(entry.site, "native"), entry.wiring.op)
        args = [*(entry.inputs[arg.name] for arg in spec.inputs_args), *(entry.scalars[s.name] for s in spec.scalars)]
        found: tuple[Any, ...]
        try:
            if entry.site in self._kernels:
                result = function(*args)
                found = result if isinstance(result, tuple) else (result,)
            else:
                found = tuple(poisoned(x) for x in entry.outputs.values())
                function(*args, out=found if len(found) > 1 else found[0])
        except LlaisysError as error:
            return f"it was refused: {error}", 0
        for (name, expected), x in zip(entry.outputs.items(), found, strict=True):
            difference = first_difference(expected, np.asarray(x), nan=True)
            if difference is not None:
                text = f"{name} has other bits in {difference.elements} of {expected.size} elements, {difference}"
                return text, difference.index[0]
        return None


def poisoned(like: Array) -> Array:
    """An array as `like`, every byte of it 0xff: NaN, or -1."""
    out = np.empty_like(like)
    out.view(np.dtype(f"u{out.dtype.itemsize}"))[...] = np.iinfo(f"u{out.dtype.itemsize}").max
    return out


def _grown(rows: Array | None, size: int, dtype: Any = np.uint64) -> Array:
    grown = np.zeros(size, dtype)
    if rows is not None:
        grown[: len(rows)] = rows
    return grown


def _positions(found: list[int]) -> str:
    return f"position {found[0]}" if len(found) == 1 else f"{len(found)} positions from {found[0]} to {found[-1]}"

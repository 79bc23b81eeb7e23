"""What the certificates say, as it comes in: entries of nodes, and faults of which the first is to blame."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..reference import SPECS, Spec
from .report import CERTIFICATES, Fault, NodeResult, Outcome
from .wiring import Wiring

Array = np.ndarray[Any, Any]
#: The scene that is the run itself; the others are repetitions, and what comes before.
MAIN = "run"
#: The site and the operator of a fault of passes that nobody watches: none of the graph.
UNTAPPED, FORWARD = "the engine without taps", "forward"
#: Evidence, with copies of all that a node read, is kept of so many faults.
_MOST_EVIDENCE = 6


@dataclass
class Entry:
    """One node of one pass, while it is being certified.

    `inputs` and `outputs` are arrays that stay as they are: what the producers put out where the edge holds, else
    copies. Weights are views of the engine's own memory.
    """

    wiring: Wiring
    step: int
    position: int
    rows: int
    scalars: Mapping[str, float]
    inputs: dict[str, Array | None]
    outputs: dict[str, Array]
    outcomes: dict[str, Outcome] = field(default_factory=lambda: dict.fromkeys(CERTIFICATES, "skipped"))
    ratio: float = 0.0
    bias: float = 0.0
    checked: int = 0
    size: int = 0
    scene: str = ""

    @property
    def site(self) -> str:
        """The site of the node."""
        return self.wiring.site

    @property
    def spec(self) -> Spec:
        """The SPEC of its operator."""
        return SPECS[self.wiring.op]

    @property
    def values(self) -> dict[str, Any]:
        """Inputs and scalars by name."""
        return {**self.inputs, **self.scalars}

    def copy(self) -> Entry:
        """Another entry of the same arrays, which outlives `forget` of this one."""
        return replace(self, inputs=dict(self.inputs), outputs=dict(self.outputs), outcomes=dict(self.outcomes))

    def forget(self) -> None:
        """Let the arrays go."""
        self.inputs, self.outputs = {}, {}


class Ledger:
    """Entries and faults of a run; several threads may write to it."""

    def __init__(self, wirings: Mapping[str, Wiring], prompt: int, decode: int) -> None:
        self.wirings = wirings
        self._prompt, self._decode = prompt, decode
        self.entries: list[Entry] = []
        self.faults: dict[tuple[str, str], Fault] = {}
        self.evidence: dict[tuple[str, str], Entry] = {}
        self._main: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def step_of(self, position: int) -> int:
        """The step of the main run in which a position was computed."""
        return 0 if position < self._prompt else min(position - self._prompt + 1, self._decode)

    def fault(
        self,
        site: str,
        certificate: str,
        message: str,
        *,
        position: int,
        step: int | None = None,
        ratio: float = 0.0,
        hypothesis: str | None = None,
        entry: Entry | None = None,
        scene: str = MAIN,
    ) -> None:
        """Note a fault. Of one site and certificate that of the run itself is kept rather than that of a repetition,
        and of either that of the earliest step."""
        step = self.step_of(position) if step is None else step
        op = self.wirings[site].op if site in self.wirings else FORWARD if site == UNTAPPED else "argmax"
        fault = Fault(site, op, step, position, certificate, message, ratio, hypothesis=hypothesis)
        with self._lock:
            key = (site, certificate)
            known = self.faults.get(key)
            main = scene == MAIN
            if known is not None and (key not in self._main, known.step) <= (not main, step):
                return
            self.faults[key] = fault
            (self._main.add if main else self._main.discard)(key)
            if entry is None:
                self.evidence.pop(key, None)
            else:
                self.evidence[key] = entry
                if len(self.evidence) > _MOST_EVIDENCE:
                    del self.evidence[max(self.evidence, key=lambda k: self.order(self.faults[k]))]

    def order(self, fault: Fault) -> tuple[bool, int, int, int]:
        """Faults in the order of blame: those of the run itself before those of repetitions, where what a node did to
        another layer's cache has come round; then by step, as the graph runs, and by certificate."""
        wiring = self.wirings.get(fault.site)
        index = len(self.wirings) if wiring is None else wiring.index
        return not self.in_run(fault), fault.step, index, CERTIFICATES.index(fault.certificate)

    def in_run(self, fault: Fault) -> bool:
        """Whether the run itself has the fault, and not only a repetition of it."""
        return (fault.site, fault.certificate) in self._main

    def blamed(self) -> list[Fault]:
        """All faults, the one to blame first."""
        return sorted(self.faults.values(), key=self.order)

    def result(self, entry: Entry) -> NodeResult:
        """The entry as the report has it."""
        return NodeResult(
            entry.site,
            entry.wiring.op,
            entry.step,
            entry.position,
            entry.rows,
            dict(entry.outcomes),
            entry.ratio,
            entry.bias,
            entry.checked,
            entry.size,
        )

"""Runs a captured operator call again, on this machine and library, and certifies what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import ops
from .case import Array, Case
from .certify import Local, certify
from .models.nodes import as_outputs

__all__ = ["Replay", "replay"]


@dataclass(frozen=True)
class Replay:
    """What a captured call gives now. `captured`, `native` and `twin`: the certificates of the captured outputs, of
    those that the kernel gives now, and of the twin's. `changed`: elements whose bits are others now than captured."""

    case: Case
    isa: str
    threads: int
    outputs: Mapping[str, Array]
    captured: Local
    native: Local
    twin: Local
    changed: int

    @property
    def same_bits(self) -> bool:
        """The kernel gives the captured bits."""
        return self.changed == 0


def replay(case: Case) -> Replay:
    """Run the kernel and the twin on the inputs of `case`, with the tier and the threads that are set."""
    from . import isa, num_threads

    spec = case.spec

    def native(inputs: Mapping[str, Array | None]) -> dict[str, Array]:
        return as_outputs(spec, getattr(ops, spec.name)(*inputs.values(), *case.scalars.values()))

    def twin(inputs: Mapping[str, Array | None]) -> dict[str, Array]:
        return as_outputs(spec, spec.twin(*inputs.values(), *case.scalars.values()))

    outputs = native(case.inputs)
    return Replay(
        case=case,
        isa=isa(),
        threads=num_threads(),
        outputs=outputs,
        captured=certify(spec, case.inputs, case.scalars, case.outputs, again=native),
        native=certify(spec, case.inputs, case.scalars, outputs, again=native),
        twin=certify(spec, case.inputs, case.scalars, twin(case.inputs), again=twin),
        changed=sum(differing(outputs[name], x) for name, x in case.outputs.items()),
    )


def differing(a: Array, b: Array) -> int:
    """Elements of two arrays of one shape and dtype whose bits differ."""
    bits: Any = np.dtype(f"V{a.dtype.itemsize}")
    flat = [np.ascontiguousarray(x).reshape(-1).view(bits) for x in (a, b)]
    return int(np.count_nonzero(flat[0] != flat[1]))

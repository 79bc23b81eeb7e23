"""Captured operator calls: those of a case file or a trace, and one of them run again on this machine and library."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import ops
from .case import Array, Case, load_case
from .certify import Local, certify
from .checkpoint import Checkpoint
from .diff.trace import HEADER, Trace
from .errors import CaseError
from .models.nodes import as_outputs

__all__ = ["Replay", "captured", "replay"]


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


def captured(path: str | os.PathLike[str], model: str | None = None, ops: Sequence[str] = ()) -> Iterator[Case]:
    """The calls of a case file, or of a trace of `llaisys diff --save`; of the operators `ops` only, if there are any.

    A trace has no weights: they are read from `model`, or the model that it names. CaseError if the file is neither, or
    a weight has other bits than in the run.
    """
    if not is_trace(path):
        case = load_case(path)
        if not ops or case.op in ops:
            yield case
        return
    with Trace(path) as trace:
        checkpoint = Checkpoint.open(model if model is not None else trace.header["model"])
        for node in trace:
            if ops and node.op not in ops:
                continue
            inputs = node.inputs(checkpoint)
            if inputs is None:
                raise CaseError(
                    file=path, field=node.site, expected=f"the weights of the run in {checkpoint.path}", found="others"
                )
            yield Case(
                op=node.op,
                inputs=inputs,
                scalars=node.scalars,
                outputs=node.outputs(),
                site=node.site,
                step=node.step,
                position=node.position,
                isa=trace.header["isa"],
            )


def is_trace(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like a trace rather than a case. OSError if it cannot be read."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return HEADER in archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def differing(a: Array, b: Array) -> int:
    """Elements of two arrays of one shape and dtype whose bits differ."""
    bits: Any = np.dtype(f"V{a.dtype.itemsize}")
    flat = [np.ascontiguousarray(x).reshape(-1).view(bits) for x in (a, b)]
    return int(np.count_nonzero(flat[0] != flat[1]))

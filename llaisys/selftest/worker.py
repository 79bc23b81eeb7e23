"""Runs the differ, and the rules of others, on the library of LLAISYS_LIBRARY.

Reads one JSON object a line from stdin, a job each, and answers with two lines each on stdout: `RUNNING` as soon as the
rest is up to the library, and a JSON object. What is not the library's fault ends the process:
`python -m llaisys.selftest.worker`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import time
from functools import lru_cache
from typing import Any

from .. import _lib, diff
from ..errors import CheckpointError, LibraryError, LlaisysError, OutOfMemoryError
from ..models import Qwen2
from . import rules

#: The gate of `build.GATE`: the layer in which nodes are wrong; -1 is all of them, and what is in no layer.
_LAYER = "llaisysMutantLayer"
#: The line that says that the engine is loaded, and its first node comes next.
RUNNING = '"running"\n'


@lru_cache(maxsize=6)
def _reference(model: str, dtype: str, tokens: tuple[int, ...], decode: int) -> rules.Outputs:
    with Qwen2(model, backend="reference", dtype=dtype) as reference:
        return rules.outputs_of(reference, tokens, decode)


@lru_cache(maxsize=12)
def _continued(model: str, dtype: str, prompt: tuple[int, ...], decode: int) -> tuple[int, ...]:
    """The prompt and the reference's own next tokens: a wrong library must not choose what it is compared on."""
    with Qwen2(model, backend="reference", dtype=dtype) as reference:
        return tuple(reference.generate(list(prompt), decode, eos_token_id=[]))


def prepare(job: dict[str, Any]) -> None:
    """Set the library to what the job asks for, and see that its engine loads the model."""
    library = _lib.library()
    with contextlib.suppress(ValueError):  # a library without the gate is a clean one
        ctypes.c_int.in_dll(library, _LAYER).value = job["layer"]
    _lib.set_isa(job["isa"])
    _lib.set_num_threads(job["threads"])
    with Qwen2(job["model"], dtype=job["dtype"]):
        pass


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One run of the differ, and the deviations that the rules look at."""
    model, dtype, prompt, decode = job["model"], job["dtype"], tuple(job["prompt"]), job["decode"]
    began = time.perf_counter()
    report = diff.run(model, tokens=list(prompt), decode=decode, dtype=dtype, isa=job["isa"], threads=job["threads"])
    answer: dict[str, Any] = {"exit_code": report.exit_code, "seconds": time.perf_counter() - began}
    answer["nodes"], answer["worst"] = len(report.nodes), report.worst.ratio if report.worst else 0.0
    answer["faults"] = [[f.site, f.certificate, f.step, f.hypothesis, f.message] for f in report.faults[:3]]
    answer["suspects"] = [node.site for node in report.nodes if node.outcome == "suspect"]
    if job["rules"]:
        tokens = _continued(model, dtype, prompt, decode)
        with Qwen2(model, dtype=dtype) as native:
            found = rules.deviations(rules.outputs_of(native, tokens, decode), _reference(model, dtype, tokens, decode))
        answer["rules"] = {name: rules.first(found, wrong) for name, wrong in rules.RULES.items()}
        answer["largest"] = [[d.step, d.site, d.largest] for d in found]
    return answer


def main() -> None:
    """Answers until stdin ends."""
    for line in sys.stdin:
        job = json.loads(line)
        prepare(job)
        print(RUNNING, end="", flush=True)
        try:
            answer = run(job)
        except (CheckpointError, LibraryError, OutOfMemoryError):
            raise
        except LlaisysError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(job | answer), flush=True)


if __name__ == "__main__":
    main()

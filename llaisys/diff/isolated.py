"""`run_isolated`: `run` in a process of its own, so that a library that crashes or hangs is named and not fatal."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from typing import Any

from .. import errors
from .._processes import start_worker
from ..checkpoint import Checkpoint
from ..errors import InternalError, LlaisysError
from ..files import partial_of
from ..models.nodes import graph
from .ledger import FORWARD, UNTAPPED
from .prefix import INFER
from .repeat import ANEW
from .report import Fault, Report
from .run import Progress

#: Seconds without a sign of life after which a process is taken to hang.
PATIENCE = 180.0
_BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def run_isolated(
    model: str = "tiny",
    prompt: str | None = None,
    decode: int = 8,
    *,
    progress: Progress | None = None,
    patience: float = PATIENCE,
    **options: Any,
) -> Report:
    """`run` in another process.

    Takes the arguments of `run`, kernels in `swap` by their names only. If the process dies of a signal, or is silent
    for `patience` seconds, the report has a fault at the node that was running. The environment is passed on, and with
    it LLAISYS_LIBRARY. Raises what `run` raises.
    """
    values = {"model": str(model), "prompt": prompt, "decode": decode, **options}
    values = {name: value for name, value in values.items() if value is not None}
    if "tokens" in values:
        values["tokens"] = [int(token) for token in values["tokens"]]
    begin = time.perf_counter()
    # Nodes are certified in several threads, each with a BLAS of one thread: together they would wait for each other.
    environment = {name: "1" for name in _BLAS if name not in os.environ}
    child = start_worker("llaisys.diff.worker", environment=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    last = ("loading", 0, "")
    started = False
    try:
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # of a process that ended at once: its status says more
            child.stdin.write(json.dumps(values).encode())
            child.stdin.close()
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            buffer = b""
            while True:
                if not selector.select(patience):
                    return _ended(values, last, f"no sign of life for {patience:g} s", begin)
                part = child.stdout.read1(1 << 16)  # type: ignore[attr-defined]
                if not part:
                    break
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    kind, *event = json.loads(line)
                    if kind == "started":
                        started = True
                    elif kind == "at":
                        last = (event[0], event[1], event[2])
                        if progress is not None:
                            progress(*last)
                    elif kind == "report":
                        return Report.from_json(event[0])
                    else:
                        raise _error(*event)
        status = child.wait()
        how = f"the process ended with status {status} and without a report"
        if status < 0:
            try:
                name = signal.Signals(-status).name
            except ValueError:
                name = f"signal {-status}"
            how = f"the process died of {name}"
        if not started:
            raise InternalError(f"llaisys.diff.worker: expected it to start, found that {how}")
        return _ended(values, last, how, begin)
    finally:
        child.kill()
        child.wait()
        if "save" in values:
            partial_of(values["save"], child.pid).unlink(missing_ok=True)
        if child.stdout is not None:
            child.stdout.close()


def _error(name: str, text: str, module: str = "") -> Exception:
    kind = getattr(errors, name, None)
    if name == "CheckpointError":
        return _Passed(text)
    if isinstance(kind, type) and issubclass(kind, LlaisysError):
        return kind(text)
    return MemoryError(text) if name == "MemoryError" else InternalError(f"{name}: {text}")


class _Passed(errors.CheckpointError):
    """A CheckpointError of the other process, of which there is only the text."""

    def __init__(self, text: str) -> None:
        LlaisysError.__init__(self, text)

    def __str__(self) -> str:
        return str(self.args[0])


def _ended(options: dict[str, Any], last: tuple[str, int, str], how: str, begin: float) -> Report:
    """The report of a process that did not make one: the fault is at the node that was running."""
    scene, step, site = last
    config = Checkpoint.open(options["model"]).config
    sites = list(graph(config.num_hidden_layers))
    if scene == ANEW:
        running = site
        where = f"while {site} was computed anew"
    elif site in sites:
        # Told after each node, so that the next one was running; behind the last, the one that a pass begins with.
        running = sites[(sites.index(site) + 1) % len(sites)]
        where = f"in {running}, after {site}, {scene}, " + ("the prompt" if step == 0 else f"step {step}")
    else:
        running, where = UNTAPPED if scene in (UNTAPPED, INFER) else sites[0], f"in {scene}"
    op = graph(config.num_hidden_layers).get(running, FORWARD)
    fault = Fault(running, op, step, 0, "LOCAL", f"{how} {where}")
    tokens = list(options.get("tokens", []))
    return Report(
        model=options["model"],
        dtype=str(options.get("dtype") or config.dtype),
        isa=str(options.get("isa", "")),
        threads=int(options.get("threads", 0)),
        layers=config.num_hidden_layers,
        prompt=tokens,
        tokens=tokens,
        decode=int(options["decode"]),
        text=str(options.get("prompt", "")),
        faults=[fault],
        notes=["nothing is certified, as the process ended before"],
        seconds=time.perf_counter() - begin,
    )

"""One engine in a process of its own: `python -m llaisys.bench.worker ENGINE FOLDER DTYPE THREADS CASE...`.

Loads the model, runs the cases ("load", "prefill 512", "decode 128") through `generate`, and prints one line of JSON:
{"seconds": {case: times}, "peak_rss_bytes": n}. A time is that of a prompt until its first token, or of one token. The
process ends when stdin does: whoever started it holds the other end, and may be killed. Without cases the checkpoint is
converted, if the engine reads another format, and nothing is loaded.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from .engines import ENGINES, Generate, convert, readable
from .models import NEW_TOKENS

#: Prompts of a case are repeated until this has passed, at most so often.
BUDGET, MOST = 3.0, 10
#: For so many seconds a prefill is repeated before it counts, once at least. A thread of numpy's OpenBLAS spins for
#: 0.1 s from the import on: in the embedded model the first prompts of 128 tokens took 2.5 ms, as with one thread, and
#: from then on 1.4.
WARM_UP = 0.3
_RANDOM = np.random.default_rng(0)


class Clock:
    """A streamer that notes when it was called."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """The prompt, or a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing."""


def measure(generate: Generate, vocabulary: int, case: str) -> list[float]:
    """The times of a case. A prefill is repeated before it counts: see WARM_UP. No two prompts are alike."""
    what, _, text = case.partition(" ")
    length, count = int(text), NEW_TOKENS if what == "decode" else 1

    def times() -> list[float]:
        clock = Clock()
        prompt = _RANDOM.integers(0, vocabulary, length).tolist()
        begin = time.perf_counter()
        generate(prompt, count, clock)
        if what == "decode":
            return list(np.diff(clock.times[2:]))  # after the prompt and the token that came of it
        return [clock.times[1] - begin]

    start = time.perf_counter()
    while what == "prefill":
        times()
        if time.perf_counter() - start > WARM_UP:
            break
    found: list[float] = []
    start = time.perf_counter()
    for _ in range(MOST):
        found += times()
        if time.perf_counter() - start > BUDGET:
            break
    return found


def peak_rss() -> int:
    """Bytes of memory that this process had at most. getrusage would count what was there before exec too."""
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if match is None:
        raise OSError("/proc/self/status: expected a line VmHWM, found none")
    return int(match[1]) * 1024


def end_with_stdin() -> None:
    """Wait for the end of stdin, and end the process."""
    while os.read(0, 1024):
        pass
    os._exit(1)


def main() -> None:
    """The command line."""
    threading.Thread(target=end_with_stdin, daemon=True).start()
    engine, folder, dtype, threads, *cases = sys.argv[1:]
    if not cases:
        convert(engine, Path(folder), dtype)
        return
    vocabulary = Checkpoint.open(folder).config.vocab_size
    room = max((int(case.partition(" ")[2]) for case in cases if case != "load"), default=0) + NEW_TOKENS
    generate, loading = ENGINES[engine].load(readable(engine, Path(folder), dtype), dtype, int(threads), room)
    seconds = {"load": [loading]}
    seconds |= {case: measure(generate, vocabulary, case) for case in cases if case != "load"}
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak_rss()}))


if __name__ == "__main__":
    main()

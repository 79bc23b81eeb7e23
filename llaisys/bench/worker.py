"""One engine in a process of its own: `python -m llaisys.bench.worker ENGINE FOLDER DTYPE THREADS CASE...`.

Loads the model, runs the cases ("load", "prefill 512", "decode 128") through `generate`, and prints one line of JSON:
{"seconds": {case: times}, "peak_rss_bytes": n}. A time is that of a prompt until its first token, or of one token. The
process ends when stdin does: whoever started it holds the other end, and may be killed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .models import NEW_TOKENS

#: Generates `count` tokens after a prompt, and calls `put` with the prompt and after each token.
Generate = Callable[[list[int], int, Any], None]
#: Prompts of a case are repeated until this has passed, at most so often.
BUDGET, MOST = 3.0, 5


class Clock:
    """A streamer that notes when it was called."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """The prompt, or a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing."""


def load_native(folder: str, dtype: str, threads: int) -> tuple[Generate, int, float]:
    """The engine of llaisys: `generate`, the size of the vocabulary, and the seconds of loading."""
    from ..models import Qwen2

    begin = time.perf_counter()
    model = Qwen2(folder, dtype=dtype, num_threads=threads)
    seconds = time.perf_counter() - begin

    def generate(prompt: list[int], count: int, clock: Clock) -> None:
        model.reset()  # nothing of the last prompt is used again
        model.generate(prompt, count, do_sample=False, eos_token_id=[], streamer=clock)

    return generate, model.config.vocab_size, seconds


def load_transformers(folder: str, dtype: str, threads: int) -> tuple[Generate, int, float]:
    """The same in transformers."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.set_num_threads(threads)
    types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    begin = time.perf_counter()
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=types[dtype]).eval()
    seconds = time.perf_counter() - begin
    model.generation_config.eos_token_id = None

    def generate(prompt: list[int], count: int, clock: Clock) -> None:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
                streamer=clock,
            )  # fmt: skip

    return generate, model.config.vocab_size, seconds


def measure(generate: Generate, vocabulary: int, case: str) -> list[float]:
    """The times of a case: once more at least than they say, as the first one warms up."""
    what, _, text = case.partition(" ")
    length, count = int(text), NEW_TOKENS if what == "decode" else 1
    found: list[float] = []
    start = time.perf_counter()
    for number in range(MOST + 1):
        clock = Clock()
        rng = np.random.default_rng(number)
        begin = time.perf_counter()
        generate(rng.integers(0, vocabulary, length).tolist(), count, clock)
        if what == "decode":
            found += np.diff(clock.times[2:]).tolist()  # after the prompt and the token that came of it
            if time.perf_counter() - start > BUDGET:
                break
        elif number:
            found.append(clock.times[1] - begin)
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
    load = {"native": load_native, "transformers": load_transformers}[engine]
    generate, vocabulary, loading = load(folder, dtype, int(threads))
    seconds = {"load": [loading]}
    seconds |= {case: measure(generate, vocabulary, case) for case in cases if case != "load"}
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak_rss()}))


if __name__ == "__main__":
    main()

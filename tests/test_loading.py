"""Loading weights on several threads: what arrives, what ends it, and who is told."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llaisys
from checkpoints import plain_weights, write_plain
from llaisys.checkpoint import Checkpoint
from llaisys.errors import CheckpointError
from llaisys.models import Qwen2, loading

Array = np.ndarray[Any, Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkpoint, and pieces so small that its larger weights come in several."""
    monkeypatch.setattr(loading, "_PIECE", 200)
    monkeypatch.setattr(loading, "_TASK", 1000)
    return write_plain(tmp_path, weights=plain_weights(seed=3))


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("llaisys-load")]


@pytest.mark.parametrize("threads", [1, 3])
def test_every_row_arrives_once(folder: Path, threads: int) -> None:
    checkpoint = Checkpoint.open(folder)
    found = {name: np.zeros(checkpoint.shape_of(name), checkpoint.numpy_dtype_of(name)) for name in checkpoint.names()}
    counts = {name: np.zeros(checkpoint.shape_of(name)[0], int) for name in checkpoint.names()}
    seen: list[tuple[int, int]] = []
    callers: set[str] = set()

    def put(name: str, shape: tuple[int, ...], first: int, rows: Array) -> None:
        assert shape == checkpoint.shape_of(name)
        assert rows.nbytes <= max(200, rows[0].nbytes)
        found[name][first : first + len(rows)] = rows
        counts[name][first : first + len(rows)] += 1
        callers.add(threading.current_thread().name)

    def progress(done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append((done, total))

    loading.load_weights(checkpoint, put, threads, progress)
    for name, weight in plain_weights(seed=3).items():
        assert np.array_equal(found[name], weight) and (counts[name] == 1).all(), name
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    assert len(callers) <= threads and no_thread_is_left()


def test_the_model_is_that_of_one_thread(folder: Path) -> None:
    before = llaisys.num_threads()
    try:
        logits = {
            (threads, dtype): Qwen2(folder, num_threads=threads, dtype=dtype).logits([1, 2, 3])
            for threads in (1, 3)
            for dtype in ("f32", "bf16")
        }
    finally:
        llaisys.set_num_threads(before)
    for dtype in ("f32", "bf16"):
        assert np.array_equal(logits[1, dtype], logits[3, dtype])


def test_what_ends_the_loading(folder: Path) -> None:
    """An exception of a thread and one of the progress function: no thread outlives it."""
    checkpoint = Checkpoint.open(folder)

    class Mine(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Mine

    def nothing(*_: Any) -> None:
        pass

    with pytest.raises(Mine):
        loading.load_weights(checkpoint, fail, 3, None)
    assert no_thread_is_left()
    with pytest.raises(Mine):
        loading.load_weights(checkpoint, nothing, 3, fail)
    assert no_thread_is_left()
    with pytest.raises(Mine):
        Qwen2(folder, progress=fail)
    assert no_thread_is_left()


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_ends_the_loading(folder: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Ctrl-C, also once more while the threads are waited for: it is raised, and no thread outlives it.

    Each comes while the loading waits. A hail of them, one for every piece, once met a weak reference's callback, which
    cannot raise, and then pytest's own handler of that.
    """
    checkpoint, once, loads, ends = Checkpoint.open(folder), threading.Lock(), threading.Event(), threading.Event()
    first, done = next(iter(checkpoint.names())), []
    true_end = loading._end

    def end(*args: Any) -> None:
        ends.set()
        true_end(*args)

    def interrupt() -> None:
        time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def put(name: str, *_: Any) -> None:
        if name != first and loads.wait(10) and once.acquire(blocking=False):
            interrupt()
            assert ends.wait(10)
            if times > 1:
                interrupt()
            time.sleep(0.2)
            done.append(name)

    monkeypatch.setattr(loading, "_end", end)
    with pytest.raises(KeyboardInterrupt):
        loading.load_weights(checkpoint, put, 3, lambda *_: loads.set())
    assert done and no_thread_is_left()


def test_a_file_that_shrinks_meanwhile_is_refused(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    file = folder / "model.safetensors"

    def put(name: str, shape: tuple[int, ...], first: int, rows: Array) -> None:
        if file.stat().st_size > 4096:
            os.truncate(file, 4096)

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        loading.load_weights(checkpoint, put, 2, None)
    assert no_thread_is_left()

"""Weights on their way from a checkpoint into an engine: several threads, each with a piece at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np

from ..checkpoint import Checkpoint
from .nodes import Array

#: Called with (bytes loaded, bytes of all weights).
Progress = Callable[[int, int], None]
#: Takes rows of a weight, from the given one on: name, shape of the whole weight, first row, the rows.
Put = Callable[[str, tuple[int, ...], int, Array], None]

# What a thread reads at once. The piece is still in the second-level cache when it is copied or converted from there,
# so that every weight comes from memory once and goes to memory once. 3.5 GB on two cores: 0.61 s with 128 KiB, 0.30 to
# 0.34 s with 512 KiB to 4 MiB, 0.5 s with 32 MiB, and 0.85 s when each weight was read as a whole and then copied.
_PIECE = 1 << 20
# What a thread takes on at once: a file is opened for each.
_TASK = 32 << 20


def load_weights(checkpoint: Checkpoint, put: Put, threads: int, progress: Progress | None) -> None:
    """Read all weights, in the order of the forward pass, and hand them to `put` on `threads` threads at once.

    `progress` is called on the calling thread. What it raises, what a thread raises, and Ctrl-C end the loading.
    """
    tasks, lock, ended = _tasks(checkpoint), threading.Lock(), threading.Event()
    done = [threading.Event() for _ in range(threads)]
    events: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

    def work(number: int) -> None:
        buffer = np.empty(_PIECE, np.uint8)
        try:
            while not ended.is_set():
                with lock:
                    task = next(tasks, None)
                if task is None:
                    break
                name, start, stop = task
                shape, dtype = checkpoint.shape_of(name), checkpoint.numpy_dtype_of(name)
                row = checkpoint.row_bytes_of(name)
                if len(buffer) < row:
                    buffer = np.empty(row, np.uint8)
                step = len(buffer) // row
                with checkpoint.reader(name) as read:
                    for first in range(start, stop, step):
                        if ended.is_set():
                            return
                        last = min(first + step, stop)
                        part = buffer[: (last - first) * row].view(dtype).reshape(last - first, *shape[1:])
                        read(first, part)
                        put(name, shape, first, part)
                events.put((stop - start) * row)
        except BaseException as error:
            events.put(error)
        finally:
            done[number].set()
            events.put(None)

    team = [threading.Thread(target=work, args=(i,), name=f"llaisys-load-{i}", daemon=True) for i in range(threads)]
    running, loaded, total = 0, 0, checkpoint.nbytes
    try:
        for thread in team:
            thread.start()
            running += 1
        while running:
            event = events.get()
            if event is None:
                running -= 1
            elif isinstance(event, BaseException):
                raise event
            else:
                loaded += event
                if progress is not None:
                    progress(loaded, total)
    finally:
        _end(ended, team, done)


def _end(ended: threading.Event, team: list[threading.Thread], done: list[threading.Event]) -> None:
    """Wait until all threads are done, also where Ctrl-C comes again meanwhile; that is raised afterwards.

    A thread whose start was itself interrupted may not be alive yet. It finds `ended` set and takes nothing on. What
    is waited for first are the events: in Python 3.11 a thread whose `join` was interrupted counts as ended.
    """
    again: KeyboardInterrupt | None = None
    while True:
        try:
            ended.set()
            for thread, event in zip(team, done, strict=True):
                if thread.is_alive():
                    event.wait()
            for thread in team:
                if thread.is_alive():
                    thread.join()
            break
        except KeyboardInterrupt as interrupt:
            again = interrupt
    if again is not None:
        raise again


def _tasks(checkpoint: Checkpoint) -> Iterator[tuple[str, int, int]]:
    """(name, first row, one past the last row) of pieces of work that together are all weights."""
    for name in checkpoint.names():
        rows = checkpoint.shape_of(name)[0]
        step = max(1, _TASK // checkpoint.row_bytes_of(name))
        for start in range(0, rows, step):
            yield name, start, min(start + step, rows)

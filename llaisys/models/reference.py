"""The numpy model of `llaisys.reference` behind the same interface as the native engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from typing import cast as typed

import numpy as np

from ..checkpoint import Checkpoint
from ..config import Qwen2Config
from ..errors import StateError
from ..reference import SPECS
from ..reference.models import qwen2
from ..reference.numerics import cast
from .loading import Progress
from .nodes import Array, Kernel, Node, kernel_function
from .session import Observer

# As in the native engine, so that both show the same nodes and no activation grows with the prompt.
_CHUNK = 512


class ReferenceModel:
    """Weights as numpy arrays. `kernels` names the sites that another function than the numpy twin computes."""

    def __init__(self, config: Qwen2Config, dtype: np.dtype[Any], kernels: Mapping[str, Kernel]) -> None:
        self._config, self._dtype = config, dtype
        self._op = partial(_op, kernels, {})
        self._weights: dict[str, Array] = {}
        self._model: qwen2.Qwen2 | None = None
        self._lock = threading.Lock()
        self.tokens_computed = 0

    def load(self, checkpoint: Checkpoint, progress: Progress | None) -> None:
        """Keep all weights, converted to the dtype of the model."""
        done, total = 0, checkpoint.nbytes
        for name, array in checkpoint.tensors():
            done += array.nbytes
            self.put(name, array)
            del array  # before the next one is read, for the peak of memory
            if progress is not None:
                progress(done, total)

    def put(self, name: str, array: Array) -> None:
        """Keep one weight, converted to the dtype of the model."""
        self._weights[name] = array if array.dtype == self._dtype else cast(array, self._dtype)

    def count(self, tokens: int) -> None:
        """Note that tokens went through the layers."""
        with self._lock:
            self.tokens_computed += tokens

    def session(self) -> ReferenceSession:
        """A KV cache of its own over the weights, which it keeps alive."""
        with self._lock:
            if self._model is None:
                self._model = qwen2.Qwen2(typed(qwen2.Config, self._config), self._weights, self._op)
        return ReferenceSession(self, self._model)

    def close(self) -> None:
        """Give up the weights; they are freed when the last session is gone too."""
        self._model, self._weights = None, {}


def _op(
    kernels: Mapping[str, Kernel], functions: dict[str, Callable[..., Any]], site: str, op: str
) -> Callable[..., Any]:
    """No method: the numpy model keeps it, and must not keep its owner."""
    function = functions.get(site)
    if function is None:
        function = functions[site] = kernel_function(kernels.get(site, "reference"), op)
    return function


class ReferenceSession:
    """A session of the numpy model."""

    def __init__(self, owner: ReferenceModel, model: qwen2.Qwen2) -> None:
        self._owner = owner
        self._session: qwen2.Session | None = model.session()
        self._vocab_size = model.config.vocab_size

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._open().length

    def forward(self, tokens: Array, nlogits: int) -> Array:
        """Append tokens; the logits of the last `nlogits`."""
        session = self._open()
        before, first = session.length, len(tokens) - nlogits
        logits = np.empty((nlogits, self._vocab_size), np.float32)
        try:
            for begin in range(0, len(tokens), _CHUNK):
                end = min(begin + _CHUNK, len(tokens))
                wanted = min(max(end - first, 0), end - begin)
                rows = session.forward(tokens[begin:end], wanted)
                logits[end - wanted - first : end - first] = rows
                self._owner.count(end - begin)
        except BaseException:
            session.truncate(before)
            raise
        return logits

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` tokens."""
        session = self._open()
        if length == 0:
            session.reset()  # frees the cache too
        else:
            session.truncate(length)

    def observe(self, observer: Observer | None) -> None:
        """Show nodes to `observer`."""
        self._open().tap = None if observer is None else _tap(observer)

    def close(self) -> None:
        """Free the cache."""
        self._session = None

    def _open(self) -> qwen2.Session:
        if self._session is None:
            raise StateError("the session is closed")
        return self._session


def _tap(observer: Observer) -> qwen2.Tap:
    def tap(
        site: str,
        op: str,
        inputs: dict[str, Any],
        scalars: dict[str, float],
        outputs: dict[str, Array],
        position: int,
    ) -> None:
        def make() -> Node:
            # As the kernels take them: the native engine shows the scalars of a call in f32.
            rounded = {s.name: float(np.float32(scalars[s.name])) for s in SPECS[op].scalars}
            return Node(site, op, position, inputs, rounded, outputs)

        observer(site, op, make)

    return tap

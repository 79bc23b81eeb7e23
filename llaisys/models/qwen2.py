"""`Qwen2`: a checkpoint on the native engine or on the numpy operators."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from .. import _lib
from ..checkpoint import Checkpoint
from ..config import Qwen2Config
from ..dtypes import DataType, DeviceType
from ..errors import DTypeError, InvalidArgumentError, StateError, UnsupportedError
from ..reference import FLOATS
from ..sampling import Sampler, Sampling
from ..tokenizer import Tokenizer
from .generation import CachedSequence, Listener, SequencePool, end_tokens, token_budget
from .loading import Progress
from .native import NativeModel
from .nodes import Array, Kernel, Node, choose_kernels, graph, select
from .reference import ReferenceModel
from .session import Engine, Session, as_tokens

__all__ = ["Qwen2"]

BACKENDS = ("native", "reference")
_LONG_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class _Backend(Protocol):
    @property
    def tokens_computed(self) -> int: ...
    def load(self, checkpoint: Checkpoint, progress: Progress | None) -> None: ...
    def session(self) -> Engine: ...
    def close(self) -> None: ...


class Qwen2:
    """A Qwen2 model.

    Parameters:
        path: a folder in Hugging Face layout, or the embedded model "tiny" (`Checkpoint.open` says what is refused).
        device: the CPU, by its `DeviceType`.
        backend: "native", the C++ engine, or "reference", numpy. Both run the same nodes under the same names.
        dtype: "f32", "f16" or "bf16" (or the numpy, torch or llaisys type) of weights, activations and KV cache;
            weights are converted on loading. By default that of the checkpoint.
        num_threads: sets the threads of the library, as `llaisys.set_num_threads`: for the whole process, not for this
            model alone.
        kernels: which implementation computes which nodes: {"rope": "reference", "layers.3.*": function}. Keys are
            names of operators, sites, or globs over sites (the leading "model." may be left out); a site goes
            before a glob, a glob before an operator. Values are "native", "reference", or a function with the
            signature of the operator's twin. It may keep the arrays that it is given; weights are read-only. The
            native engine computes such a node too, and then takes the result of the other.
        progress: called with (bytes loaded, bytes of all weights) while weights are loaded, on this thread. What it
            raises ends the loading.

    `generate` and `logits` may be called from several threads at once. `close()`, the end of a `with`, or the end of
    the object frees the weights.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: DeviceType | int = DeviceType.CPU,
        *,
        backend: str = "native",
        dtype: Any = None,
        num_threads: int | None = None,
        kernels: Mapping[str, Kernel] | None = None,
        progress: Progress | None = None,
    ) -> None:
        if device != DeviceType.CPU:
            raise UnsupportedError(f"device: expected DeviceType.CPU, found {device!r}")
        if backend not in BACKENDS:
            raise InvalidArgumentError(f"backend: expected {' or '.join(BACKENDS)}, found {backend!r}")
        storage = None if dtype is None else _storage_dtype(dtype)
        if num_threads is not None:
            _lib.set_num_threads(num_threads)
        checkpoint = Checkpoint.open(path)
        #: What config.json and generation_config.json say.
        self.config: Qwen2Config = checkpoint.config
        #: "native" or "reference".
        self.backend = backend
        #: "f32", "f16" or "bf16".
        self.dtype: str = storage or str(checkpoint.config.dtype)
        self._folder = checkpoint.folder
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        self._closed = False
        self._sites = graph(self.config.num_hidden_layers)
        chosen = choose_kernels(kernels, self._sites)
        self._backend: _Backend
        if backend == "native":
            self._backend = NativeModel(self.config, DataType.of_name(self.dtype), chosen)
        else:
            self._backend = ReferenceModel(self.config, FLOATS[self.dtype], chosen)
        self._backend.load(checkpoint, progress)
        self._sequences = SequencePool()

    @property
    def path(self) -> Path:
        """The folder of the checkpoint."""
        return self._folder.path

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the checkpoint, read on first use. CheckpointError if the folder has none, or a bad one."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = Tokenizer.open(self._folder)
            return self._tokenizer

    @property
    def tokens_computed(self) -> int:
        """Tokens that went through the layers since the model was made, over all its sessions."""
        self._check_open()
        return self._backend.tokens_computed

    @property
    def sites(self) -> dict[str, str]:
        """Site -> operator of every node, in the order in which they run."""
        return dict(self._sites)

    def session(self) -> Session:
        """A sequence with a KV cache of its own over the weights of this model."""
        self._check_open()
        return Session(self._backend.session(), self.config, self._sites)

    def logits(self, token_ids: Sequence[int] | Array) -> Array:
        """The float32 logits [T, V] of every position of `token_ids`, computed afresh."""
        with self.session() as session:
            return session.forward(token_ids)

    def generate(
        self,
        inputs: Sequence[int] | Array,
        max_new_tokens: int | None = 128,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        *,
        do_sample: bool | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        streamer: Any = None,
    ) -> list[int]:
        """The prompt `inputs` and the tokens that follow it, as transformers' `generate` has it.

        Ends after `max_new_tokens`, after a token of `eos_token_id` (which is in the result), or when the text fills
        the max_position_embeddings of the model. What is not given comes from generation_config.json: the sampling (see
        `Sampling.resolve`; greedy unless the file or an argument asks for more) and the end tokens (an empty list:
        none). `max_new_tokens=None` takes max_new_tokens or max_length from there, else what the model has room for.

        `seed` makes a draw repeatable. `streamer` is an object with put(ids) and end(), which gets the prompt first, or
        a function that is called with each new id.

        The sequence is kept: a prompt that begins like the last one computes only the rest, with the native
        backend to the same bits.

        Raises InvalidArgumentError for an empty prompt, one longer than max_position_embeddings, and numbers out of
        range, IndexRangeError for a token outside the vocabulary.
        """
        config = self.config
        tokens: list[int] = as_tokens("inputs", inputs, config.vocab_size).tolist()
        most = config.max_position_embeddings
        if not 1 <= len(tokens) <= most:
            raise InvalidArgumentError(
                f"inputs: expected 1 to {most} tokens (max_position_embeddings), found {len(tokens)}"
            )
        settings = Sampling.resolve(
            config.generation,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        sampler = Sampler(settings, seed)
        ends = end_tokens(config, eos_token_id)
        budget = token_budget(config, len(tokens), max_new_tokens)
        listener = Listener(streamer)
        self._check_open()
        listener.prompt(tokens)
        if budget:
            with self._sequences.borrow(self.session) as sequence:
                self._continue(sequence, tokens, budget, sampler, ends, listener)
        listener.end()
        return tokens

    def _continue(
        self,
        sequence: CachedSequence,
        tokens: list[int],
        budget: int,
        sampler: Sampler,
        ends: frozenset[int],
        listener: Listener,
    ) -> None:
        """Append up to `budget` tokens to `tokens`."""
        logits = sequence.start(tokens)
        while True:
            token = sampler.next(logits, tokens)
            tokens.append(token)
            listener.token(token)
            budget -= 1
            if budget == 0 or token in ends:
                return
            logits = sequence.feed([token])

    def run_with_cache(
        self, token_ids: Sequence[int] | Array, sites: str | Sequence[str] | None = None
    ) -> tuple[Array, dict[str, list[Node]]]:
        """The logits of `logits`, and copies of the nodes of `sites` (see `Session.tap`; all by default) by site."""
        nodes: dict[str, list[Node]] = {}
        with self.session() as session:
            session.tap(lambda node: nodes.setdefault(node.site, []).append(node), sites)
            return session.forward(token_ids), nodes

    def run_with_hooks(
        self,
        token_ids: Sequence[int] | Array,
        hooks: Mapping[str, Callable[[Node], Any]] | Iterable[tuple[str, Callable[[Node], Any]]],
    ) -> Array:
        """The logits of a pass with hooks: pairs of a pattern of sites and a function of the node (`Session.hook`)."""
        with self.session() as session:
            for pattern, hook in hooks.items() if isinstance(hooks, Mapping) else hooks:
                session.hook(hook, pattern)
            return session.forward(token_ids)

    def find_sites(self, patterns: str | Sequence[str]) -> tuple[str, ...]:
        """The sites that patterns stand for, in the order in which they run; see `Session.tap`."""
        found = select("sites", [patterns] if isinstance(patterns, str) else patterns, self._sites)
        return tuple(site for site in self._sites if any(site in some for some in found.values()))

    def reset(self) -> None:
        """Free the sequence that `generate` keeps; the next call computes its whole prompt."""
        self._sequences.clear()

    def close(self) -> None:
        """Free the weights once the sessions of this model are closed too. Closing twice is no error."""
        if not self._closed:
            self._closed = True
            self._sequences.clear()
            self._backend.close()

    def __enter__(self) -> Qwen2:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a model cannot be copied, pickled or sent to another process; open the folder again there: "
            f"Qwen2({str(self.path)!r})"
        )

    def __repr__(self) -> str:
        config = self.config
        return (
            f"<Qwen2 {str(self.path)!r}: {config.num_hidden_layers} layers, {config.num_parameters / 1e6:.1f}M "
            f"parameters, {self.dtype}, {self.backend}{', closed' if self._closed else ''}>"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the model is closed")


def _storage_dtype(dtype: Any) -> str:
    """The short name of a storage type given by name or as the type of numpy, torch or llaisys."""
    found: DataType | None = None
    if isinstance(dtype, DataType):
        found = dtype
    elif isinstance(dtype, str):
        name = _LONG_NAMES.get(dtype, dtype)
        found = DataType.of_name(name) if name in FLOATS else None
    else:
        found = DataType.of_torch(dtype)
        if found is None:
            try:
                found = DataType.of_numpy(np.dtype(dtype))
            except TypeError:
                found = None
    if found is None or found.short not in FLOATS:
        raise DTypeError(f"dtype: expected {', '.join(FLOATS)}, found {dtype!r}")
    return found.short

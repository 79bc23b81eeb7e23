"""`Session`: one sequence over the weights of a model, alike for both backends, and the taps that watch it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import numpy as np

from ..config import Qwen2Config
from ..errors import DTypeError, IndexRangeError, InvalidArgumentError, ShapeError, StateError, UnsupportedError
from .nodes import Array, Node, overwrite, select

#: Shown every node that somebody watches: site, operator, and a function that makes the node, its arrays being views.
Observer = Callable[[str, str, Callable[[], Node]], None]


class Engine(Protocol):
    """What a backend offers for one sequence. `Session` has checked the arguments."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""

    def forward(self, tokens: Array, nlogits: int) -> Array:
        """Append int64 tokens [T]; the f32 logits [nlogits, V] of the last of them. On an error nothing has changed."""

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` tokens."""

    def observe(self, observer: Observer | None) -> None:
        """Show every node to `observer`, or to nobody."""

    def close(self) -> None:
        """Free the cache."""


def as_tokens(label: str, token_ids: Any, vocab_size: int) -> Array:
    """`token_ids`, a list or a one-dimensional array of integers in [0, vocab_size), as int64 [T]."""
    if type(token_ids) is list and len(token_ids) == 1 and type(token_ids[0]) is int and 0 <= token_ids[0] < vocab_size:
        return np.array(token_ids, np.int64)  # what generate asks for at every token: a third of the general way
    if isinstance(token_ids, (str, bytes)):
        raise DTypeError(f"{label}: expected token ids, found text; model.tokenizer.encode(text) gives its ids")
    try:
        array = np.asarray(token_ids)
    except ValueError as error:
        raise ShapeError(f"{label}: expected integers in one dimension, found {error}") from None
    if array.ndim != 1:
        raise ShapeError(f"{label}: expected shape [T], found {list(array.shape)}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise DTypeError(f"{label}: expected integers, found {array.dtype}")
    wrong = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(wrong):
        i = int(wrong[0])
        raise IndexRangeError(f"{label}[{i}]: expected a token from 0 to {vocab_size - 1}, found {array[i]}")
    return np.ascontiguousarray(array, np.int64)


class Tap:
    """A callback that watches nodes; ends with `remove()` or as a context manager."""

    def __init__(
        self,
        watchers: _Watchers,
        callback: Callable[[Node], Any],
        sites: frozenset[str] | None,
        copy: bool,
        replace: bool,
    ) -> None:
        self._watchers, self._callback, self.sites = watchers, callback, sites
        self._copy, self._replace = copy, replace

    def remove(self) -> None:
        """Stop watching. Removing twice is no error."""
        self._watchers.remove(self)

    def show(self, node: Node) -> None:
        """Called by the session for each node of `sites`."""
        result = self._callback(node.copy() if self._copy else node)
        if self._replace and result is not None:
            overwrite(node, result)

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *details: object) -> None:
        self.remove()


class _Watchers:
    """The taps of a session. The engine holds this and not the session, so that nothing refers to itself in a circle
    and a session is freed as soon as nobody has it.

    Taps come and go at any time, in the midst of a pass too; the engine is told before the next one only.
    """

    def __init__(self) -> None:
        self.taps: tuple[Tap, ...] = ()
        self._lock = threading.Lock()
        self._told = False

    def add(self, tap: Tap) -> Tap:
        with self._lock:
            self.taps += (tap,)
        return tap

    def remove(self, tap: Tap) -> None:
        with self._lock:
            self.taps = tuple(other for other in self.taps if other is not tap)

    def tell(self, engine: Engine) -> None:
        """Have the engine show its nodes if there is a tap, and run without one if there is none."""
        wanted = bool(self.taps)
        if wanted != self._told:
            engine.observe(self.show if wanted else None)
            self._told = wanted

    def show(self, site: str, op: str, make: Callable[[], Node]) -> None:
        wanted = [tap for tap in self.taps if tap.sites is None or site in tap.sites]
        if wanted:
            node = make()
            for tap in wanted:
                if tap in self.taps:  # the one before may have removed it
                    tap.show(node)


class Session:
    """One sequence with a KV cache of its own; made by `Qwen2.session()`.

    Sessions of one model may run in several threads at once; two calls on one session at once are a StateError. A call
    that raises leaves the session as it was. The cache is freed by `close()`, at the end of a `with`, or with the
    object; the buffers of a call belong to the model, so that sessions that wait have none.
    """

    def __init__(self, engine: Engine, config: Qwen2Config, sites: Mapping[str, str]) -> None:
        self._engine = engine
        self._config = config
        self._sites = sites
        self._watchers = _Watchers()
        self._busy = threading.Lock()
        self._closed = False

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        self._check_open()
        return self._engine.length

    def forward(self, token_ids: Sequence[int] | Array, *, last: int | None = None) -> Array:
        """Append tokens; returns the float32 logits [T, V] of each, or only of the last `last` of them.

        Raises IndexRangeError for a token outside the vocabulary and InvalidArgumentError where the sequence would be
        longer than max_position_embeddings.
        """
        config = self._config
        tokens = as_tokens("token_ids", token_ids, config.vocab_size)
        count = len(tokens) if last is None else last
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 0 <= count <= len(tokens):
            raise InvalidArgumentError(f"last: expected 0 to {len(tokens)}, the number of tokens, found {last!r}")
        self._acquire()
        try:
            length = self._engine.length
            if length + len(tokens) > config.max_position_embeddings:
                raise InvalidArgumentError(
                    f"token_ids: expected at most {config.max_position_embeddings - length} tokens after the {length} "
                    f"in the session, as max_position_embeddings is {config.max_position_embeddings}, "
                    f"found {len(tokens)}"
                )
            if not len(tokens):
                return np.empty((0, config.vocab_size), np.float32)
            self._watchers.tell(self._engine)
            return self._engine.forward(tokens, int(count))
        finally:
            self._busy.release()

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` tokens."""
        with self._exclusive():
            found = self._engine.length
            if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or not 0 <= length <= found:
                raise InvalidArgumentError(
                    f"length: expected 0 to {found}, the length of the session, found {length!r}"
                )
            self._engine.truncate(int(length))

    def reset(self) -> None:
        """Drop all tokens."""
        self.truncate(0)

    def tap(
        self, callback: Callable[[Node], Any], sites: str | Sequence[str] | None = None, *, copy: bool = True
    ) -> Tap:
        """Call `callback(node)` after each node of the given sites (all by default), until the tap is removed.

        `sites` are names of operators, sites, or globs over sites ("layers.3.*"). With `copy=False` the arrays of the
        node are views that are valid during the call only; the outputs may then be written to, and the pass goes on
        with what was written. What the callback raises ends the pass and is raised by `forward`. What it returns is
        ignored; see `hook`. A callback may make and remove taps, its own too; that holds from the next node on.
        """
        return self._watch(callback, sites, copy, replace=False)

    def hook(self, hook: Callable[[Node], Any], sites: str | Sequence[str] | None = None) -> Tap:
        """Like `tap`, but what the callback returns, unless it is None, takes the place of the node's output.

        For several outputs, return a tuple in the order of the SPEC, or a dict with some of them by name.
        """
        return self._watch(hook, sites, copy=True, replace=True)

    def close(self) -> None:
        """Free the cache. Closing twice is no error; any other use afterwards is a StateError."""
        self._closed = True
        self._engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a session cannot be copied, pickled or sent to another process; make one with model.session() and give it "
            "the same tokens"
        )

    def __repr__(self) -> str:
        return "<Session, closed>" if self._closed else f"<Session of {self._engine.length} tokens>"

    def _watch(
        self, callback: Callable[[Node], Any], sites: str | Sequence[str] | None, copy: bool, replace: bool
    ) -> Tap:
        if not callable(callback):
            raise InvalidArgumentError(f"callback: expected a function of one node, found {callback!r}")
        patterns = [sites] if isinstance(sites, str) else sites
        chosen: frozenset[str] | None = None  # whatever the engine shows
        if patterns is not None:
            chosen = frozenset(site for some in select("sites", patterns, self._sites).values() for site in some)
        self._check_open()
        return self._watchers.add(Tap(self._watchers, callback, chosen, copy, replace))

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the session is closed")

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._acquire()
        try:
            yield
        finally:
            self._busy.release()

    def _acquire(self) -> None:
        self._check_open()
        if not self._busy.acquire(blocking=False):
            raise StateError("the session is in use by another call; give each thread a session of its own")

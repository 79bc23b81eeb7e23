"""What `Qwen2.generate` is made of: the sequence kept for the next prompt, when to stop, and who is told."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..config import Qwen2Config
from ..errors import InvalidArgumentError
from .nodes import Array
from .session import Session


class CachedSequence:
    """A session and the tokens in it; a prompt that shares a prefix with them computes only the rest.

    The tokens noted here are a prefix of those in the session at any moment, whatever ends a call, so that the next
    call can trust them.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tokens: list[int] = []

    def start(self, prompt: list[int]) -> Array:
        """Make `prompt` the sequence; the logits [V] of its last token."""
        # The last token is computed in any case: its logits were not kept.
        most = min(len(self.tokens), len(prompt) - 1)
        shared = next((i for i in range(most) if self.tokens[i] != prompt[i]), most)
        del self.tokens[shared:]
        self.session.truncate(shared)
        return self.feed(prompt[shared:])

    def feed(self, tokens: list[int]) -> Array:
        """Append tokens; the logits [V] of the last one."""
        logits: Array = self.session.forward(tokens, last=1)[0]
        self.tokens += tokens
        return logits


class SequencePool:
    """The one sequence that a model keeps between calls; a call that comes while it is in use gets a fresh one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: CachedSequence | None = None

    @contextmanager
    def borrow(self, make_session: Callable[[], Session]) -> Iterator[CachedSequence]:
        """A sequence that nobody else uses meanwhile."""
        if self._lock.acquire(blocking=False):
            try:
                if self._kept is None:
                    self._kept = CachedSequence(make_session())
                yield self._kept
            finally:
                self._lock.release()
        else:
            with make_session() as session:
                yield CachedSequence(session)

    def clear(self) -> None:
        """Free the sequence; waits for the call that uses it."""
        with self._lock:
            if self._kept is not None:
                self._kept.session.close()
            self._kept = None


def end_tokens(config: Qwen2Config, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """The tokens that end a text: those given (an empty list for none), else those of the model."""
    if eos_token_id is None:
        return frozenset(config.eos_token_ids)
    given: Any = eos_token_id if isinstance(eos_token_id, (list, tuple, set, frozenset, np.ndarray)) else [eos_token_id]
    try:
        return frozenset(operator.index(token) for token in given)
    except TypeError:
        raise InvalidArgumentError(
            f"eos_token_id: expected an integer or a list of integers, found {eos_token_id!r}"
        ) from None


def token_budget(config: Qwen2Config, prompt: int, max_new_tokens: int | None) -> int:
    """How many tokens may follow a prompt of that length.

    The model sees max_position_embeddings tokens at most, and need not see the last token of a text.
    """
    room = config.max_position_embeddings - prompt + 1
    if max_new_tokens is None:
        defaults = config.generation
        if defaults.max_new_tokens is not None:
            return min(room, defaults.max_new_tokens)
        return room if defaults.max_length is None else max(0, min(room, defaults.max_length - prompt))
    try:
        number = -1 if isinstance(max_new_tokens, bool) else operator.index(max_new_tokens)
    except TypeError:
        number = -1
    if number < 0:
        raise InvalidArgumentError(f"max_new_tokens: expected an integer of at least 0, found {max_new_tokens!r}")
    return min(room, number)


class Listener:
    """Passes tokens on to a streamer: put(ids) and end() as transformers' have them, or a function of each new id."""

    def __init__(self, streamer: Any) -> None:
        self._put = getattr(streamer, "put", None)
        self._end = getattr(streamer, "end", None)
        self._each = streamer if self._put is None else None
        if streamer is not None and not (callable(self._put) and callable(self._end)) and not callable(self._each):
            raise InvalidArgumentError(
                f"streamer: expected an object with put(ids) and end(), or a function of one id, found {streamer!r}"
            )

    def prompt(self, tokens: list[int]) -> None:
        """The prompt, before it is computed."""
        if self._put is not None:
            self._put(np.array(tokens, np.int64))

    def token(self, token: int) -> None:
        """A new token."""
        if self._put is not None:
            self._put(np.array([token], np.int64))
        elif self._each is not None:
            self._each(token)

    def end(self) -> None:
        """No token follows."""
        if self._put is not None and self._end is not None:
            self._end()

"""Choosing the next token from logits: greedy, or drawn after temperature, top-k, top-p and repetition penalty.

The steps, their order and their rounding are those of transformers' logits processors, in f32:

1. repetition penalty p: the score s of a token that the text has already becomes s / p, or s p if it is negative
2. temperature t: s / t
3. top-k: scores below the k-th largest are dropped, so that ties with it stay
4. top-p: the least likely tokens are dropped as long as their probabilities together are at most 1 - p

A greedy choice takes step 1 only, then the lowest index of the largest score. A draw inverts the cumulated
probabilities at a uniform number from Philox: a seed gives the same tokens on every backend that has equal logits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import GenerationDefaults
from .errors import DTypeError, InvalidArgumentError, ShapeError

__all__ = ["Sampler", "Sampling"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `top_k` 0 and `top_p` 1 drop nothing. InvalidArgumentError for numbers out of range."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, (bool, np.bool_)):
            raise InvalidArgumentError(f"do_sample: expected true or false, found {self.do_sample!r}")
        zero_too = not self.do_sample  # a temperature of 0 is the usual way to ask for greedy tokens
        _check_number("temperature", self.temperature, 0.0, math.inf, zero_too=zero_too)
        _check_number("top_p", self.top_p, 0.0, 1.0, zero_too=True)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, zero_too=False)
        if _as_int(self.top_k) is None or self.top_k < 0:
            raise InvalidArgumentError(f"top_k: expected an integer of at least 0 (no limit), found {self.top_k!r}")

    @classmethod
    def resolve(
        cls,
        defaults: GenerationDefaults,
        *,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> Sampling:
        """What a call asks for; what it leaves open (None) comes from generation_config.json.

        Unless `do_sample` says so, tokens are drawn if the call gives a temperature, top_k or top_p, or if
        generation_config.json asks for it. `top_k=1` and `temperature=0` are greedy.
        """
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
        values: dict[str, Any] = {
            name: getattr(defaults, name) if value is None else value for name, value in given.items()
        }
        if do_sample is None:
            asked = any(given[name] is not None for name in ("temperature", "top_k", "top_p"))
            do_sample = (asked or defaults.do_sample) and values["temperature"] != 0
        settings = cls(do_sample=do_sample, **values)
        return replace(settings, do_sample=False) if settings.top_k == 1 else settings

    def scores(self, logits: Array, token_ids: Sequence[int] | Array) -> Array:
        """The f32 scores [V] after all steps, dropped tokens at -inf; `token_ids` is the text with its prompt."""
        scores = np.array(logits, np.float32)
        if scores.ndim != 1 or not len(scores):
            raise ShapeError(f"logits: expected shape [V], found {list(scores.shape)}")
        if self.repetition_penalty != 1:
            seen = np.unique(np.asarray(token_ids, np.int64))
            with np.errstate(over="ignore", invalid="ignore"):
                penalty = np.float32(self.repetition_penalty)
                scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        if not self.do_sample:
            return scores
        if self.temperature != 1:
            with np.errstate(over="ignore"):
                scores /= np.float32(self.temperature)
        if 0 < self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -np.inf
        if self.top_p < 1:
            order = np.argsort(scores, kind="stable")
            drop = np.cumsum(_softmax(scores[order]), dtype=np.float32) <= np.float32(1 - self.top_p)
            drop[-1] = False
            scores[order[drop]] = -np.inf
        return scores


class Sampler:
    """Chooses one token after the other; `seed` None draws another text each time."""

    def __init__(self, settings: Sampling, seed: int | None = None) -> None:
        if seed is not None:
            number = _as_int(seed)
            if number is None or not 0 <= number < 1 << 128:
                raise InvalidArgumentError(f"seed: expected an integer from 0 to 2^128 - 1, or None, found {seed!r}")
            seed = number
        self.settings = settings
        # Without a draw, none: to make one takes 8 us, of 1400 that a short prompt takes in the embedded model.
        self._random = np.random.Generator(np.random.Philox(seed)) if settings.do_sample else None

    def next(self, logits: Array, token_ids: Sequence[int] | Array) -> int:
        """The next token. InvalidArgumentError for NaN, and in a draw also for infinite logits."""
        settings = self.settings
        if not settings.do_sample and settings.repetition_penalty == 1:
            logits = np.asarray(logits, np.float32)
            if logits.ndim == 1 and len(logits):
                return _largest(logits)  # no step changes a score
        scores = settings.scores(logits, token_ids)
        if self._random is None:
            return _largest(scores)
        top = scores.max()
        if not np.isfinite(top):
            raise InvalidArgumentError(f"logits: expected finite numbers to draw from, found {top}")
        cumulated = np.cumsum(_softmax(scores), dtype=np.float64)
        # The first token whose cumulated probability exceeds the number; never one of probability 0.
        index = np.searchsorted(cumulated, self._random.random() * cumulated[-1], side="right")
        return int(min(index, np.searchsorted(cumulated, cumulated[-1])))


def _largest(scores: Array) -> int:
    index = int(scores.argmax())  # that of a NaN, if there is one
    if math.isnan(scores[index]):
        raise InvalidArgumentError(f"logits: expected numbers to choose from, found nan at {index}")
    return index


def _softmax(scores: Array) -> Array:
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max())
        return np.asarray(weights / weights.sum())


def _as_int(value: Any) -> int | None:
    try:
        return None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        return None


def _check_number(name: str, value: Any, low: float, high: float, *, zero_too: bool) -> None:
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError):
        raise DTypeError(f"{name}: expected a number, found {value!r}") from None
    if not low <= number <= high or math.isinf(number) or (number == 0 and not zero_too):
        limits = f"at least {low:g}" if zero_too else f"above {low:g}"
        limits += f" and at most {high:g}" if math.isfinite(high) else ""
        raise InvalidArgumentError(f"{name}: expected a finite number {limits}, found {value!r}")

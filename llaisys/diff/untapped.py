"""REPEAT without taps: where nobody watches, the engine gives the logits of the run, bit for bit.

Beside a tap the engine computes each linear by itself, so that every node can be shown before the next one runs.
Without one, as users run it, layers of the same input go through one call. That call has no nodes to certify; but order
invariance promises equal bits, so its logits are held against those of the certified run, and a difference is a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import _lib
from ..errors import LlaisysError
from ..models import Qwen2
from ..models.nodes import Node
from ..models.session import Session
from .bits import as_bits, digests
from .ledger import UNTAPPED, Array, Ledger

#: A pass: how many tokens to keep, those that follow, and how many rows of logits of them are asked for.
Pass = tuple[int, Sequence[int], int]


class LogitBits:
    """Of the logits of each position of the run, a digest."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def keep(self, position: int, logits: Array) -> None:
        """Take the rows of the run, the first of them at `position`."""
        self._known.update(enumerate(_digests(logits), position))

    def parted(self, position: int, logits: Array) -> int | None:
        """The first position at which the logits are not those of the run, None if there is none."""
        found = enumerate(_digests(logits), position)
        return next((p for p, digest in found if self._known.get(p, digest) != digest), None)


@dataclass(frozen=True)
class Way:
    """One sequence without taps."""

    how: str
    threads: int
    passes: Sequence[Pass]


def certify_untapped(
    model: Qwen2,
    ledger: Ledger,
    known: LogitBits,
    ways: Sequence[Way],
    progress: Callable[[str, int, str], None],
) -> bool:
    """Whether the engine gives the logits of the run in each of these ways. The first that does not is noted."""
    before = _lib.num_threads()
    try:
        for way in ways:
            progress(UNTAPPED, 0, "")
            _lib.set_num_threads(way.threads)
            if not _certify(model, ledger, known, way):
                return False
        return True
    finally:
        _lib.set_num_threads(before)


def _certify(model: Qwen2, ledger: Ledger, known: LogitBits, way: Way) -> bool:
    how = f"without taps, {way.how}, {way.threads} thread{'s' if way.threads > 1 else ''}"
    position, count = 0, 0
    try:
        with model.session() as session:
            for count, (keep, tokens, last) in enumerate(way.passes, 1):
                session.truncate(keep)
                position = keep + len(tokens) - last
                logits = session.forward(tokens, last=last)
                wrong = known.parted(position, logits)
                if wrong is None:
                    continue
                text, hypothesis = _explain(model, way.passes[:count], wrong - position)
                ledger.fault(
                    UNTAPPED,
                    "REPEAT",
                    f"{how}: the logits of position {wrong}: expected the bits of the run with taps, found {text}",
                    position=wrong,
                    hypothesis=hypothesis,
                    scene=UNTAPPED,
                )
                return False
    except LlaisysError as error:
        ledger.fault(UNTAPPED, "REPEAT", f"{how}: failed: {error}", position=position, scene=UNTAPPED)
        return False
    return True


# ------------------------------------------------------------------ what is told of a difference


def _explain(model: Qwen2, passes: Sequence[Pass], row: int) -> tuple[str, str | None]:
    """By how much one row of logits of the last pass is off, and what that comes from: both from the passes once more,
    with taps and without."""
    with model.session() as plain, model.session() as watched:
        with watched.tap(lambda node: None, copy=False):
            a, b = (_run(session, passes)[row] for session in (plain, watched))
        wrong = as_bits(a) != as_bits(b)
        if not wrong.any():
            return "others, but not once more", "not the same bits each time: a race, or memory that was not written"
        with np.errstate(all="ignore"):
            worst = float(np.abs(a - b)[wrong].max())
        text = f"others in {np.count_nonzero(wrong)} of {wrong.size}, by up to {worst:.3g}"
        return text, _origin(*(_caches(session, model) for session in (plain, watched)))


def _run(session: Session, passes: Sequence[Pass]) -> Array:
    for keep, tokens, last in passes:
        session.truncate(keep)
        logits = session.forward(tokens, last=last)
    return logits


def _caches(session: Session, model: Qwen2) -> list[dict[str, Array]]:
    """Of each layer, digests of the keys and values that a session holds. One more token brings them to light."""
    if session.length == model.config.max_position_embeddings:
        session.truncate(session.length - 1)
    length = session.length
    found: list[dict[str, Array]] = []

    def tap(node: Node) -> None:
        found.append({name: digests(node.inputs[name][:length]) for name in ("k", "v")})  # type: ignore[index]

    if "rope_self_attention" in model.sites.values():
        with session.tap(tap, "rope_self_attention", copy=False):
            session.forward([0], last=0)
    return found


_ATTENTION, _MLP = "q_proj, k_proj and v_proj", "gate_proj and up_proj"


def _origin(plain: list[dict[str, Array]], watched: list[dict[str, Array]]) -> str | None:
    """Which layers in one call it may be, by the first keys and values that are not those of the run with taps."""
    if not plain:
        return None
    calls = "layers of one input in one call, which a tap takes apart"
    for layer, (a, b) in enumerate(zip(plain, watched, strict=True)):
        wrong = [name for name in a if (a[name] != b[name]).any()]
        if not wrong:
            continue
        seen = " and ".join({"k": "keys", "v": "values"}[name] for name in wrong)
        own = f"{_ATTENTION} of layer {layer}"
        if layer and len(wrong) == 2:  # then what they are made of may be wrong
            own = f"{_MLP} or q_proj of layer {layer - 1}, or {own}"
        return f"{calls}: {own} (the {seen} of layer {layer} are the first that differ)"
    last = f"{_MLP} or q_proj of layer {len(plain) - 1}, or the logits on their way out"
    return f"{calls}: {last} (all keys and values are right)"


def _digests(logits: Array) -> list[int]:
    """Digests in which any two NaN agree."""
    return digests(np.where(np.isnan(logits), np.float32(np.nan), logits)).tolist() if len(logits) else []


def pieces(tokens: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    """Tokens in pieces of these sizes, then the rest."""
    found, begin = [], 0
    for size in (*sizes, len(tokens)):
        if begin < len(tokens):
            found.append(tokens[begin : begin + size])
            begin += size
    return found

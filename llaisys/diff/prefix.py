"""STATE of llaisysQwen2ModelInfer: its reuse of prefixes, which no tap sees, by its tokens and what it computed."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

from .._lib import check_call, library
from ..errors import LlaisysError
from ..models import Qwen2
from .ledger import Ledger

#: What the messages of these faults begin with.
INFER = "llaisysQwen2ModelInfer"
#: Tokens that are tried in place of one of the prompt, until one leads the text elsewhere.
_CANDIDATES = 8


class Infer:
    """The sequence that the C API keeps for a model."""

    def __init__(self, model: Qwen2) -> None:
        self._model = model
        self._handle: Any = model._backend._handle  # type: ignore[attr-defined]

    def reset(self) -> None:
        """Forget the sequence."""
        check_call(library().llaisysQwen2ModelReset(self._handle))

    def __call__(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The next token, and how many tokens were computed for it."""
        before = self._model.tokens_computed
        array = (ctypes.c_int64 * len(tokens))(*tokens)
        token = check_call(library().llaisysQwen2ModelInfer(self._handle, array, len(tokens)))
        return int(token), self._model.tokens_computed - before


def certify_infer(model: Qwen2, ledger: Ledger, prompt: list[int], following: list[int], attention: str) -> int:
    """Compare the tokens of Infer, whatever it had to reuse, with those of the run; returns how many were compared."""
    infer = Infer(model)
    calls: list[tuple[str, list[int], int | None, int]] = []  # how, tokens, expected token, tokens known before

    def compare(how: str, tokens: list[int], expected: int, kept: int) -> bool:
        calls.append((how, tokens, expected, kept))
        token, computed = infer(tokens)
        position = len(tokens) - 1
        wanted = len(tokens) - kept
        if computed < wanted:
            text = f"expected {wanted} tokens to be computed, as {kept} are those of the call before, found {computed}"
            ledger.fault(attention, "STATE", f"{INFER} {how}: {text}", position=position, scene=INFER)
            return False
        if token != expected:
            text = f"{INFER} {how}: expected token {expected} as in the run, found {token}"
            # A fresh pass computes what the run did, so what is wrong then is how the token is chosen.
            site, certificate = (attention, "STATE") if kept or how != "afresh" else ("argmax", "LOCAL")
            ledger.fault(site, certificate, text, position=position, scene=INFER)
            return False
        return True

    try:
        infer.reset()
        if not compare("afresh", prompt, following[0], 0):
            return len(calls)
        sequence = list(prompt)
        for token, after in itertools.pairwise(following):
            sequence.append(token)
            if not compare("one token further", list(sequence), after, len(sequence) - 1):
                return len(calls)
        if len(prompt) >= 2:
            other = _elsewhere(model, prompt, following[0])
            infer([*prompt[:-2], other, prompt[-1]])
            # Reusing one token too many would answer for the other token.
            if not compare("after a prompt with one other token", prompt, following[0], len(prompt) - 2):
                return len(calls)
            infer([*prompt[:-1], other, other])
            compare("after a longer prompt", prompt, following[0], len(prompt) - 1)
        infer.reset()
        compare("after a reset", prompt, following[0], 0)
    except LlaisysError as error:
        ledger.fault(attention, "STATE", f"{INFER} failed: {error}", position=0, scene=INFER)
    return len(calls)


def _elsewhere(model: Qwen2, prompt: list[int], token: int) -> int:
    """A token that in place of the last but one of the prompt makes the model go on otherwise, if there is one."""
    size = model.config.vocab_size
    choice = (prompt[-2] + 1) % size
    with model.session() as session:
        if prompt[:-2]:
            session.forward(prompt[:-2], last=0)
        for i in range(_CANDIDATES):
            candidate = (prompt[-2] + 1 + i * max(1, size // _CANDIDATES)) % size
            if candidate == prompt[-2]:
                continue
            session.truncate(len(prompt) - 2)
            if int(session.forward([candidate, prompt[-1]], last=1)[0].argmax()) != token:
                return candidate
    return choice

"""The keys and values that a sequence should have in its cache: a second one, kept from what the producers put out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .bits import as_rows
from .ledger import Array
from .origins import explain_state
from .wiring import Wiring


class Shadow:
    """For each site that fills a cache, its output rows by position."""

    def __init__(self, wirings: Mapping[str, Wiring], dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._rows: dict[str, Array] = {
            site: np.empty((0, 0), dtype) for wiring in wirings.values() for site in wiring.state.values()
        }
        self._known: dict[str, int] = dict.fromkeys(self._rows, 0)
        self._before: dict[str, Array] = {}  # what was there before the last cut

    def write(self, site: str, position: int, outputs: Mapping[str, Array]) -> None:
        """Keep what a site put out from `position` on, if it fills a cache; what was there behind is void."""
        if site not in self._rows:
            return
        new = as_rows(outputs["out"])
        rows, end = self._rows[site], position + len(new)
        if end > len(rows):
            grown = np.empty((max(end, 2 * len(rows)), new.shape[1]), self._dtype)
            if position:
                grown[:position] = rows[:position]
            self._rows[site] = rows = grown
        rows[position:end] = new
        self._known[site] = end

    def read(self, site: str, length: int) -> Array | None:
        """The rows of the first `length` positions, None if they were not all seen."""
        return self._rows[site][:length] if self._known[site] >= length else None

    def cut(self, length: int) -> None:
        """The sequence is cut to `length` tokens. What was there stays known, as it may come up again."""
        for site, known in self._known.items():
            if known > length:
                self._before[site] = self._rows[site][:known]
                self._rows[site] = self._rows[site][:length].copy()
                self._known[site] = length

    def explain(self, site: str, found: Array) -> str | None:
        """Whose rows [S, K, D] they are that an attention saw in place of those of `site`."""
        others = {}
        for other, rows in self._rows.items():
            if other != site and self._known[other] and other.rpartition(".")[2] == site.rpartition(".")[2]:
                others[other] = rows[: self._known[other]].reshape(-1, *found.shape[1:])
        if site in self._before:
            others["the sequence before"] = self._before[site].reshape(-1, *found.shape[1:])
        return explain_state(self._rows[site][: len(found)].reshape(found.shape), found, others)

"""The keys and values that a sequence should have in its cache: a second one, kept from what the producers put out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .bits import as_bits, as_rows
from .ledger import Array
from .wiring import Wiring


class Shadow:
    """For each site that fills a cache, its output rows by position."""

    def __init__(self, wirings: Mapping[str, Wiring], dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._rows: dict[str, Array] = {
            site: np.empty((0, 0), dtype) for wiring in wirings.values() for site in wiring.state.values()
        }
        self._known: dict[str, int] = dict.fromkeys(self._rows, 0)

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

    def explain(self, site: str, found: Array, wrong: Array) -> str | None:
        """Whose rows they are that stand where those of `site` should."""
        row = as_bits(found[wrong[0]])
        if not row.any():
            return "the cache is empty there: the rows are zero"
        for other, rows in self._rows.items():
            known = rows[: self._known[other]]
            if known.shape[1:] != row.shape:
                continue
            same = np.flatnonzero((as_bits(known) == row).all(axis=1))
            if len(same):
                where = int(same[np.argmin(np.abs(same - wrong[0]))])
                if other != site and where == wrong[0]:
                    return f"the row is that of {other}"
                if other == site:
                    return f"the row is that of position {where}, not {wrong[0]}"
        return "the row is of none of this sequence's positions, as of one that was there before"

"""Which node must come next in a pass, and for which rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..models.nodes import Node
from .ledger import Array

Problem = tuple[str, str]


@dataclass
class Pass:
    """One call of `forward`: its tokens, the position of the first, and how many rows of logits it is to return."""

    tokens: Array
    begin: int
    wanted: int
    step: int


class Order:
    """Follows a pass through the graph. Prompts come in chunks and logits in parts, as long as the engine likes."""

    def __init__(self, sites: list[str]) -> None:
        self._sites = sites
        self._index = {site: i for i, site in enumerate(sites)}
        self._norm = self._index["model.norm"]
        self.begin(Pass(np.empty(0, np.int64), 0, 0, 0))

    def begin(self, current: Pass) -> None:
        """A pass begins."""
        self.current = current
        self._next = 0
        self._chunk = (current.begin, 0)  # position and rows
        self._covered = self._part = 0  # rows of logits of this chunk that were shown, and that came before this node

    @property
    def expected(self) -> str:
        """The site that should run next."""
        return self._sites[min(self._next, len(self._sites) - 1)]

    def next(self, node: Node) -> list[Problem]:
        """A node ran: what is wrong with its name and its place."""
        index = self._index.get(node.site)
        if index is None:
            expected = self.expected
            self._next = min(self._next + 1, len(self._sites))
            return [(expected, f"expected {expected} to run here, found {node.site!r}, which the graph does not have")]
        problems: list[Problem] = []
        if index == 0:
            if self._next:
                problems += self._missing(self._end())
            done = self._chunk[0] + self._chunk[1]
            # How the prompt is cut is for the engine to say; PARAM checks that the parts follow each other.
            self._chunk, self._covered = (done, len(next(iter(node.outputs.values())))), 0
            self._next = 1
        elif index == len(self._sites) - 1 and self._next == len(self._sites) and self._covered < self._wanted():
            pass  # another part of the logits
        elif index < self._next:
            problems.append((node.site, f"expected {self.expected} to run here, found {node.site} once more"))
        else:
            problems += self._missing(index)
            self._next = index + 1
        if index == len(self._sites) - 1:
            self._part = self._covered
            self._covered += len(next(iter(node.outputs.values())))
        return problems

    def end(self) -> list[Problem]:
        """The pass is over: what did not run."""
        problems = self._missing(self._end())
        shown = self._chunk[0] + self._chunk[1] - self.current.begin
        if not problems and shown != len(self.current.tokens):
            problems.append((self._sites[0], f"expected {len(self.current.tokens)} tokens to run, found {shown}"))
        if not problems and self._wanted() != self._covered:
            problems.append((self._sites[-1], f"expected {self._wanted()} rows of logits, found {self._covered}"))
        return problems

    def rows(self, site: str) -> int:
        """Rows that the node has, at most for lm_head."""
        if self._index[site] < self._norm:
            return self._chunk[1]
        return self._wanted() if site == "model.norm" else self._wanted() - self._part

    def position(self, site: str) -> int:
        """Position of its first row."""
        begin, rows = self._chunk
        if self._index[site] < self._norm:
            return begin
        return begin + rows - self._wanted() + (0 if site == "model.norm" else self._part)

    def tokens(self, position: int, rows: int) -> Array | None:
        """The tokens of some rows, None where the pass has none."""
        first = position - self.current.begin
        return self.current.tokens[first : first + rows] if 0 <= first <= len(self.current.tokens) - rows else None

    def _wanted(self) -> int:
        """Rows of this chunk whose logits are wanted."""
        begin, rows = self._chunk
        first = self.current.begin + len(self.current.tokens) - self.current.wanted
        return max(0, min(rows, begin + rows - first))

    def _end(self) -> int:
        return len(self._sites) if self._wanted() else self._norm

    def _missing(self, index: int) -> list[Problem]:
        return [(site, "expected the node to run, found none") for site in self._sites[self._next : index]]

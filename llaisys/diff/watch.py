"""Watches every node of one session, and certifies EDGE, PARAM and STATE of it on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import LlaisysError
from ..models.nodes import Node
from ..models.session import Session
from .bits import as_rows, first_difference
from .ledger import MAIN, Array, Entry, Ledger
from .order import Order, Pass
from .shadow import Shadow
from .weights import WeightBits
from .wiring import Wiring, consumers

#: Takes an entry whose EDGE, PARAM and STATE are known.
Visitor = Callable[[Entry], None]


class Watch:
    """A session whose nodes are certified as they run. It is used like the session: `forward`, `truncate`, `reset`.

    `tokens` are those of the sequence, kept here and not asked of the engine. The session has one Watch and belongs to
    it.
    """

    def __init__(
        self,
        session: Session,
        ledger: Ledger,
        weights: WeightBits,
        dtype: np.dtype[Any],
        *,
        scene: str,
        visit: Visitor,
        progress: Callable[[str, int, str], None],
        hooks: Mapping[str, Callable[[Node], Any]] | None = None,
    ) -> None:
        self.session, self.scene, self.visit = session, scene, visit
        self.tokens: list[int] = []
        self.recording = True
        self._ledger, self._weights, self._dtype, self._progress = ledger, weights, dtype, progress
        self._wirings = ledger.wirings
        self._readers = consumers(self._wirings)
        self._shadow = Shadow(self._wirings, dtype)
        self._live: dict[tuple[str, str], tuple[int, Array]] = {}
        self._order = Order(list(self._wirings))
        self._heads: list[Array] = []
        for site, hook in (hooks or {}).items():
            session.hook(hook, site)
        session.tap(self._node, copy=False)

    # ------------------------------------------------------------- session

    @property
    def length(self) -> int:
        """Tokens that the sequence should have."""
        return len(self.tokens)

    def forward(self, token_ids: Sequence[int] | Array, *, last: int | None = None) -> Array:
        """`Session.forward`. An error of the engine is a fault of the node that it came from; `Broken` is raised."""
        tokens = [int(token) for token in token_ids]
        wanted = len(tokens) if last is None else last
        begin = len(self.tokens)
        step = self._ledger.step_of(begin + len(tokens) - 1)
        current = Pass(np.array(tokens, np.int64), begin, wanted, step)
        self._order.begin(current)
        self._live, self._heads = {}, []
        try:
            logits = self.session.forward(tokens, last=last)
        except LlaisysError as error:
            site = self._order.expected
            message = f"the engine ended the pass: {error}"
            self._ledger.fault(site, "PARAM", message, position=current.begin, step=step, scene=self.scene)
            raise Broken(site) from error
        for site, text in self._order.end():
            self._ledger.fault(site, "PARAM", text, position=current.begin, step=step, scene=self.scene)
        self.tokens += tokens
        self._check_logits(logits, current)
        return logits

    def truncate(self, length: int) -> None:
        """`Session.truncate`; a session that then has another length is a fault of STATE."""
        self._shadow.cut(length)
        self.session.truncate(length)
        del self.tokens[length:]
        self.check_length(f"truncate({length})")

    def reset(self) -> None:
        """`truncate(0)`."""
        self._shadow.cut(0)
        self.session.reset()
        self.tokens.clear()
        self.check_length("reset()")

    def check_length(self, after: str) -> None:
        """The session has as many tokens as the sequence."""
        found = self.session.length
        if found != len(self.tokens):
            message = f"after {after}: expected a cache of {len(self.tokens)} tokens, found {found}"
            self._ledger.fault(self._first_attention(), "STATE", message, position=len(self.tokens), scene=self.scene)
            raise Broken(self._first_attention())

    def _first_attention(self) -> str:
        return next((site for site, wiring in self._wirings.items() if wiring.state), "lm_head")

    def close(self) -> None:
        """Close the session."""
        self.session.close()

    # --------------------------------------------------------------- nodes

    def _node(self, node: Node) -> None:
        for site, text in self._order.next(node):
            self._ledger.fault(
                site, "PARAM", text, position=node.position, step=self._order.current.step, scene=self.scene
            )
        wiring = self._wirings.get(node.site)
        if wiring is None:
            return
        current = self._order.current
        if node.op != wiring.op:
            text = f"expected the operator {wiring.op}, found {node.op}"
            self._ledger.fault(node.site, "PARAM", text, position=node.position, step=current.step, scene=self.scene)
            return
        entry = Entry(wiring, current.step, node.position, 0, dict(node.scalars), {}, {}, scene=self.scene)
        if wiring.tokens is not None:
            self._live.clear()
        wrong = self._param(entry, node)
        if not wrong:
            entry.rows = len(next(iter(node.outputs.values())))
            self._edge(entry, node)
            self._state(entry, node)
        entry.outputs = {name: x.copy() for name, x in node.outputs.items()}
        for name, x in entry.outputs.items():
            self._live[node.site, name] = (node.position, as_rows(x))
        if node.site == "lm_head":
            self._heads.append(entry.outputs["out"])
        if not wrong:
            self._shadow.write(node.site, node.position, entry.outputs)
            self.visit(entry)
        self._drop(wiring)
        self._progress(self.scene, current.step, node.site)

    def _drop(self, wiring: Wiring) -> None:
        """Let the outputs go whose last reader this was."""
        if wiring.site == "lm_head":  # may come in several parts
            return
        for source in wiring.edges.values():
            if self._readers[source.site][-1] == wiring.site:
                for key in [key for key in self._live if key[0] == source.site]:
                    del self._live[key]

    def _param(self, entry: Entry, node: Node) -> bool:
        """PARAM; True if the shapes are wrong, so that nothing else can be said. The length of a cache is a matter of
        STATE."""
        wiring, messages, row = entry.wiring, [], 0
        misshapen, cached = _misshapen(wiring, node, self._order.rows(node.site), self._dtype)
        if cached:
            entry.outcomes["STATE"] = "fault"
            self._fault(entry, "STATE", misshapen, node.position)
        elif misshapen:
            messages.append(misshapen)
        if node.position != self._order.position(node.site):
            messages.append(f"position: expected {self._order.position(node.site)}, found {node.position}")
        for name, expected in wiring.scalars.items():
            found = node.scalars.get(name)
            if found != expected:
                messages.append(f"{name}: expected {expected!r}, found {found!r}")
        for name, weight in wiring.weights.items():
            array = entry.inputs[name] = node.inputs.get(name)
            if (array is None) != (weight is None):
                messages.append(f"{name}: expected {weight or 'none'}, found {'none' if array is None else 'one'}")
            elif array is not None and weight is not None:
                text = self._weights.check(weight, name, array)
                messages += [text] if text else []
        if wiring.positions is not None and not misshapen:
            positions = node.inputs[wiring.positions]
            assert positions is not None
            begin = self._order.position(node.site)
            expected_positions = np.arange(begin, begin + len(positions), dtype=np.int64)
            entry.inputs[wiring.positions] = positions.copy()
            difference = first_difference(expected_positions, positions)
            if difference:
                row = difference.index[0] if not messages else 0
                messages.append(f"{wiring.positions}: expected {begin} and on, {difference}")
        entry.outcomes["PARAM"] = "fault" if messages else "pass"
        if messages:
            self._fault(entry, "PARAM", "; ".join(messages), node.position + row)
        return bool(misshapen)

    def _edge(self, entry: Entry, node: Node) -> None:
        wiring, messages, row = entry.wiring, [], 0
        compared = 0
        if wiring.tokens is not None:
            index = node.inputs[wiring.tokens]
            assert index is not None
            entry.inputs[wiring.tokens] = index.copy()
            tokens = self._order.tokens(node.position, len(index))
            difference = None if tokens is None else first_difference(tokens, index)
            if difference:
                messages.append(f"{wiring.tokens}: expected the tokens of the sequence, {difference}")
                row = difference.index[0]
            compared += 1
        for name, source in wiring.edges.items():
            found = node.inputs[name]
            assert found is not None
            expected = self._made(source.site, source.output, node.position, len(found))
            if expected is None:
                entry.inputs[name] = found.copy()
                continue
            compared += 1
            difference = first_difference(expected, as_rows(found))
            if difference is None:
                entry.inputs[name] = expected.reshape(found.shape)
                continue
            entry.inputs[name] = found.copy()
            row = difference.index[0]
            made = f"{source.site}.{source.output}" if source.output != "out" else source.site
            text = f"{name}: expected what {made} put out, found other bits in {difference.elements} of {found.size}"
            messages.append(f"{text} elements, {difference}")
        entry.outcomes["EDGE"] = "fault" if messages else "pass" if compared else "skipped"
        if messages:
            self._fault(entry, "EDGE", "; ".join(messages), node.position + row)

    def _made(self, site: str, output: str, position: int, rows: int) -> Array | None:
        """The rows of an output of this pass from `position` on, None if they were not seen."""
        begin, made = self._live.get((site, output), (0, None))
        if made is None or position < begin or position + rows > begin + len(made):
            return None
        return made[position - begin : position - begin + rows]

    def _state(self, entry: Entry, node: Node) -> None:
        if not entry.wiring.state:
            return
        messages, first = [], node.position
        hypothesis = None
        for name, site in entry.wiring.state.items():
            found = node.inputs[name]
            assert found is not None
            expected = self._shadow.read(site, len(found))
            difference = None if expected is None else first_difference(expected, as_rows(found))
            if difference is None:
                entry.inputs[name] = found.copy() if expected is None else expected.reshape(found.shape)
                continue
            entry.inputs[name] = found.copy()
            rows = difference.wrong_rows
            first = int(rows[0])
            which = f"position {first}" if len(rows) == 1 else f"{len(rows)} positions from {first} to {rows[-1]}"
            messages.append(f"{name}: expected what {site} put out for this sequence, found other bits at {which}")
            hypothesis = hypothesis or self._shadow.explain(site, found)
        entry.outcomes["STATE"] = "fault" if messages else "pass"
        if messages:
            self._fault(entry, "STATE", "; ".join(messages), first, hypothesis)

    def _fault(
        self, entry: Entry, certificate: str, message: str, position: int, hypothesis: str | None = None
    ) -> None:
        scene = f"{self.scene}: " if self.scene != MAIN else ""
        self._ledger.fault(
            entry.site,
            certificate,
            scene + message,
            position=position,
            step=entry.step,
            hypothesis=hypothesis,
            scene=self.scene,
        )

    def _check_logits(self, logits: Array, current: Pass) -> None:
        """EDGE of what `forward` returned: the logits are what lm_head put out, widened."""
        if sum(map(len, self._heads)) != len(logits):
            return  # said by PARAM
        row = 0
        for head in self._heads:
            difference = first_difference(head.astype(np.float32), logits[row : row + len(head)], nan=True)
            if difference is not None:
                position = current.begin + len(current.tokens) - len(logits) + row + difference.index[0]
                text = (
                    f"the logits that forward returned: expected what lm_head put out, found other bits, {difference}"
                )
                self._ledger.fault("lm_head", "EDGE", text, position=position, step=current.step, scene=self.scene)
                return
            row += len(head)


class Broken(Exception):
    """The session can not go on; the fault is in the ledger."""


def _misshapen(wiring: Wiring, node: Node, rows: int, dtype: np.dtype[Any]) -> tuple[str, bool]:
    """What is wrong with the shapes and dtypes of a node, "" if nothing is; and whether it is the length of a cache."""
    arrays: Mapping[str, Array | None] = {**node.inputs, **node.outputs}
    most = rows
    if wiring.site == "lm_head":  # in parts
        rows = len(node.outputs["out"])
        if not 1 <= rows <= most:
            return f"out: expected 1 to {most} rows, found {rows}", False
    for name, row in wiring.row.items():
        array = arrays.get(name)
        count = node.position + rows if name in wiring.state else rows
        wanted = np.dtype(np.int64) if name in (wiring.positions, wiring.tokens) else dtype
        if array is None:
            return f"{name}: expected a tensor, found none", False
        if array.shape != (count, *row):
            cached = name in wiring.state and array.shape[1:] == tuple(row)
            return f"{name}: expected shape {[count, *row]}, found {list(array.shape)}", cached
        if array.dtype != wanted:
            return f"{name}: expected {wanted}, found {array.dtype}", False
    return "", False

"""One captured call of an operator, cut to what an explanation needs, and what a changed operator would give for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..reference import Spec
from ..reference.bounds import Oracle
from ..reference.compare import ratios

Array = npt.NDArray[Any]
#: What an operator would give: an oracle per output by name, or values to be reproduced bit for bit.
Results = dict[str, Oracle | Array]

#: Rows that are looked at, and features of a linear; more would tell no more.
ROWS, FEATURES = 32, 512


@dataclass
class Call:
    """One captured call, cut to the rows and features that are looked at."""

    spec: Spec
    inputs: dict[str, Any]
    scalars: dict[str, float]
    outputs: dict[str, Array]
    whole: Mapping[str, Any]  # the inputs before they were cut
    wrong: dict[str, Array] = field(default_factory=dict)  # which elements of the outputs are out of bound, if known

    def __getitem__(self, name: str) -> Any:
        return self.inputs[name] if name in self.inputs else self.scalars[name]

    def take(self, inputs: Mapping[str, Any], cut: Callable[[Array], Array]) -> Call:
        """The call with some inputs replaced, and `cut` applied to all outputs."""
        outputs = {name: cut(x) for name, x in self.outputs.items()}
        wrong = {name: cut(x) for name, x in self.wrong.items()}
        return Call(self.spec, {**self.inputs, **inputs}, self.scalars, outputs, self.whole, wrong)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The storage dtype."""
        return next(iter(self.outputs.values())).dtype if self.spec.name != "argmax" else self["x"].dtype

    def oracle(self, **changed: Any) -> Results:
        """What the operator gives with some arguments replaced."""
        values = {**self.inputs, **self.scalars, **changed}
        names = [a.name for a in self.spec.inputs_args] + [s.name for s in self.spec.scalars]
        results = self.spec.oracle(*(values[name] for name in names))
        return {arg.name: result for arg, result in zip(self.spec.outputs, results, strict=True)}

    def right(self) -> dict[str, Oracle]:
        """What the operator must give."""
        return self.oracle()  # type: ignore[return-value]


@dataclass(frozen=True)
class Mutation:
    """One thing that may be wrong. `make` gives what the call would then return, or None where that is no different.

    `likely` ones are judged by the size of the errors only, and asked last.
    """

    text: str
    make: Callable[[Call], Results | None]
    likely: bool = False


def explains(call: Call, results: Mapping[str, Oracle | Array]) -> bool:
    """Whether all outputs are as `results` has them; at least one element must be claimed."""
    claimed = False
    for name, result in results.items():
        found = call.outputs[name]
        if not isinstance(result, Oracle):
            result = Oracle(result, exact=True)
        if found.shape != result.y.shape or not (ratios(found, result) <= 1).all():
            return False
        claimed = claimed or (bool(found.size) and not np.isinf(np.asarray(result.a)).all())
    return claimed


def cut(call: Call) -> Call | None:
    """At most ROWS rows and FEATURES features, some of the wrong ones among them; None if nothing is there."""
    name, inputs, outputs = call.spec.name, call.inputs, call.outputs
    first = next(iter(outputs.values()))
    if not first.size or any(x.shape != first.shape for x in outputs.values() if name != "argmax"):
        return None
    if name in ("self_attention", "rope_self_attention"):
        tokens, length = len(first), len(inputs["k"])
        rows = max(2, min(ROWS, (1 << 22) // max(1, length * first[0].size)))
        if tokens > rows:
            # Query t sees what it saw in the whole call if the keys after it go. Of some windows the first wrong one.
            ends = sorted({rows, *np.linspace(rows, tokens, 4).astype(int).tolist()})
            windows = [_window(call, end - rows, end, length - tokens + end) for end in ends]
            return next((w for w in windows if not explains(w, w.right())), windows[-1])
        return call
    if name in ("embedding", "rope"):
        return _rows(call, [x for x in ("index", "x", "pos_ids") if x in inputs], len(first))
    if name == "linear":
        return _flat(_features(call), ["x"])
    if name in ("rms_norm", "add_rms_norm", "argmax"):
        return _flat(call, [x for x in ("x", "a", "b") if x in inputs])
    return _flat(call, list(inputs)) if first.ndim > 1 else call


def _window(call: Call, begin: int, end: int, keys: int) -> Call:
    inputs = {x: v[begin:end] if x in ("q", "pos_ids") else v[:keys] for x, v in call.inputs.items()}
    return call.take(inputs, lambda x: x[begin:end])


def _rows(call: Call, names: list[str], count: int) -> Call:
    """The same rows of the named inputs and of all outputs: spread evenly, and some of those that are wrong."""
    if count <= ROWS:
        return call
    marked = [np.flatnonzero(x.reshape(count, -1).any(axis=1))[: ROWS // 2] for x in call.wrong.values()]
    chosen = np.unique(np.concatenate([np.linspace(0, count - 1, ROWS // 2).astype(int), *marked]))
    return call.take({x: call[x][chosen] for x in names}, lambda x: x[chosen])


def _flat(call: Call, names: list[str]) -> Call:
    """All leading axes as one, then `_rows`."""
    index = call.spec.name == "argmax"
    first = next(iter(call.outputs.values()))
    count = first.size if index else math.prod(first.shape[:-1])
    inputs = {x: call[x].reshape(count, call[x].shape[-1]) for x in names}
    return _rows(call.take(inputs, lambda x: x.reshape(count) if index else x.reshape(count, -1)), names, count)


def _features(call: Call) -> Call:
    """Features of a linear: the last ones, where tails are, others spread evenly, and some of those that are wrong."""
    count = len(call["weight"])
    if count <= FEATURES:
        return call
    marked = [np.flatnonzero(x.reshape(-1, count).any(axis=0))[:128] for x in call.wrong.values()]
    spread = np.linspace(0, count - 65, FEATURES - 64).astype(int)
    chosen = np.unique(np.concatenate([spread, np.arange(count - 64, count), *marked]))
    inputs = {x: None if call[x] is None else call[x][chosen] for x in ("weight", "bias")}
    return call.take(inputs, lambda x: x[..., chosen])

"""How others look for a wrong layer: they compare activations with a reference's, each run on its own data.

Every rule sees the same outputs of the same nodes, native beside the reference backend, fed with the same tokens. It
names the first node, in the order in which they ran, that it takes for wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..models import Qwen2
from ..models.nodes import Array, Node

#: Step and site of a node's output, and its f64 values, in the order in which the nodes ran.
Outputs = list[tuple[int, str, Array]]


@dataclass(frozen=True)
class Deviation:
    """How far one native output is from the reference's, in the measures of the rules."""

    step: int
    site: str
    largest: float  # max |a - b| / max |b|
    outside: bool  # not np.allclose(a, b, rtol=1e-2, atol=1e-2)
    nmse: float  # sum (a - b)^2 / sum b^2
    cosine: float  # 1 - a . b / (|a| |b|)


#: The rules with a fixed limit, by name. That of "first divergence" is the largest deviation of the clean runs.
RULES: dict[str, Callable[[Deviation], bool]] = {
    "allclose, 1e-2": lambda d: d.outside,
    "NMSE > 5e-4": lambda d: not d.nmse <= 5e-4,
    "1 - cosine > 1e-3": lambda d: not d.cosine <= 1e-3,
}


def outputs_of(model: Qwen2, tokens: Sequence[int], decode: int) -> Outputs:
    """The outputs of all nodes of a prefill with all but the last `decode` of `tokens`, and of `decode` steps."""
    found: Outputs = []
    step = 0

    def collect(node: Node) -> None:
        found.extend((step, node.site, value.astype(np.float64)) for value in node.outputs.values())

    prompt = len(tokens) - decode
    with model.session() as session:
        session.tap(collect, copy=False)
        session.forward(tokens[:prompt], last=1)
        for step in range(1, decode + 1):
            session.forward(tokens[prompt + step - 1 : prompt + step])
    return found


def deviations(native: Outputs, reference: Outputs) -> list[Deviation]:
    """One deviation a node output; a NaN or infinity anywhere gives inf."""
    return [_deviation(step, site, a, b) for (step, site, a), (_, _, b) in zip(native, reference, strict=True)]


def _deviation(step: int, site: str, a: Array, b: Array) -> Deviation:
    with np.errstate(all="ignore"):
        error, size = a - b, max(float(np.abs(b).max(initial=0.0)), 1e-30)
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        measures: list[Any] = [
            np.abs(error).max(initial=0.0) / size,
            np.square(error).sum() / max(float(np.square(b).sum()), 1e-60),
            1 - float(np.sum(a * b)) / norms if norms else 0.0,
        ]
        largest, nmse, cosine = (float(x) if np.isfinite(x) else float("inf") for x in measures)
        return Deviation(step, site, largest, not np.allclose(a, b, rtol=1e-2, atol=1e-2), nmse, cosine)


def first(found: Sequence[Deviation], wrong: Callable[[Deviation], bool]) -> str | None:
    """The site that a rule names, None if it is content."""
    return next((d.site for d in found if wrong(d)), None)

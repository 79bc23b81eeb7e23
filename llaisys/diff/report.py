"""What a run of the differ found: plain data, of which the terminal text, the JSON and the HTML page are made."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

#: The certificates, in the order in which a fault is blamed: a node whose inputs are not what their producers made is
#: no evidence against its own kernel.
CERTIFICATES = ("EDGE", "PARAM", "STATE", "LOCAL", "REPEAT")
#: What a certificate says of one node. "suspect": neither admissible for certain nor proven wrong.
Outcome = Literal["pass", "fault", "suspect", "skipped"]
#: Exit codes of `llaisys diff`.
CERTIFIED, FAULT, INCONCLUSIVE = 0, 1, 2


@dataclass(frozen=True)
class NodeResult:
    """All that was certified of one node in one step: step 0 is the prefill, step n the n-th decode step.

    Steps with few rows are certified together, and then share `ratio` and `bias`.
    """

    site: str
    op: str
    step: int
    position: int  # of the first row
    rows: int
    outcomes: Mapping[str, Outcome]  # certificate -> outcome
    ratio: float = 0.0  # largest |y - y64| / tolerance of LOCAL; inf where a NaN or infinity does not coincide
    bias: float = 0.0  # mean error of the magnitude in ulps of the storage type; truncation shows as -0.5
    checked: int = 0  # elements that LOCAL certified
    size: int = 0  # elements of the outputs

    @property
    def outcome(self) -> Outcome:
        """The worst of the outcomes."""
        found = set(self.outcomes.values())
        return next((o for o in ("fault", "suspect", "pass") if o in found), "skipped")


@dataclass(frozen=True)
class Fault:
    """One node that is wrong."""

    site: str
    op: str
    step: int
    position: int  # of the first wrong row, as a position in the sequence
    certificate: str
    message: str  # what was expected and what was found, in one line
    ratio: float = 0.0
    shape: tuple[str, ...] = ()  # of the error: rows, heads, dims, tail lanes, causal edge
    hypothesis: str | None = None  # a known mutation that reproduces the native bits: "position offset +1"
    upstream: tuple[str, ...] = ()  # sites that feed this one and are certified
    downstream: tuple[str, ...] = ()  # sites that it feeds, and that are certified on what they were given
    reproducer: str | None = None  # file for `llaisys replay`
    swap: str | None = None  # what swapping this operator for the reference, and back, did


@dataclass(frozen=True)
class Flip:
    """A position at which the native run and the reference would go on with different tokens."""

    step: int
    position: int
    native: int
    reference: int
    margin: float  # the reference's own logit of its token less that of the native one
    noise: float  # by how much rounding alone may move that difference; a margin below it is no fault
    native_text: str = ""
    reference_text: str = ""
    before: str = ""  # the last of the text that both go on from


@dataclass(frozen=True)
class Drift:
    """Propagated error of one site in one step: context, never a verdict. Each a relative error in the 2-norm."""

    site: str
    step: int
    reference: float | None = None  # native against the reference backend
    transformers: float | None = None  # native against transformers


@dataclass(repr=False)
class Report:
    """The outcome of `llaisys.diff.run`. A prompt shows it in one line, a notebook as its page."""

    model: str
    dtype: str
    isa: str
    threads: int
    layers: int
    prompt: list[int]
    tokens: list[int]  # prompt and the tokens that followed it
    decode: int
    text: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    swaps: dict[str, str] = field(default_factory=dict)  # what --swap asked for
    nodes: list[NodeResult] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)  # the first one is the one to blame
    flips: list[Flip] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was sampled, left out, or not to be had
    nonfinite: str = ""  # where NaN or infinities come from, if any were seen: no fault, but no result either
    prompt_text: str = ""  # a text that has the tokens of the prompt, if there is one
    seconds: float = 0.0
    peak_bytes: int = 0

    def __repr__(self) -> str:
        from .text import verdict

        return f"<Report of {self.model} in {self.dtype}: {verdict(self).plain}>"

    def _repr_html_(self) -> str:
        from .html import to_html

        return f'<iframe srcdoc="{html.escape(to_html(self))}" width="100%" height="700"></iframe>'

    @property
    def exit_code(self) -> int:
        """0 certified, 1 a fault is named, 2 inconclusive: a suspect is left, or nothing was checked."""
        if self.faults:
            return FAULT
        certified = any(node.checked for node in self.nodes)
        suspect = any(node.outcome == "suspect" for node in self.nodes)
        return CERTIFIED if certified and not suspect else INCONCLUSIVE

    @property
    def worst(self) -> NodeResult | None:
        """The node with the largest LOCAL ratio."""
        return max(self.nodes, key=lambda node: node.ratio, default=None)

    def to_json(self) -> str:
        """The report as JSON; NaN and infinities are written as texts."""
        return json.dumps({"exit_code": self.exit_code, **_plain(asdict(self))}, allow_nan=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """A report that `to_json` wrote. ValueError or KeyError for anything else."""
        data = {name: value for name, value in json.loads(text).items() if name != "exit_code"}
        kinds: dict[str, Any] = {"nodes": NodeResult, "faults": Fault, "flips": Flip, "drift": Drift}
        for name, kind in kinds.items():
            data[name] = [kind(**{key: _read(value) for key, value in item.items()}) for item in data[name]]
        return cls(**data)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if value in ("nan", "inf", "-inf") else value

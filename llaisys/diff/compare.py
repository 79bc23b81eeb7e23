"""`llaisys trace-diff`: where two saved runs of one model part."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..certify import certify
from ..checkpoint import Checkpoint
from ..commands.common import printable
from ..errors import CheckpointError
from ..models.nodes import graph
from ..reference import SPECS
from .bits import as_bits
from .context import relative
from .ledger import Array
from .report import CERTIFIED, FAULT, INCONCLUSIVE
from .text import WIDTH
from .trace import Trace, TracedNode
from .traced_weights import compare_weights

#: Weights that are listed, beyond which they are counted.
_LISTED = 12
#: What of the headers is compared and named, and how it is called.
_FIELDS = {"dtype": "storage type", "isa": "tier", "threads": "threads", "machine": "machine", "cpu": "processor"}


@dataclass(frozen=True)
class SiteDifference:
    """One site in both traces: the largest over all steps. `equal`: no bit differs. `a`, `b`: LOCAL of each on its own
    inputs, with the ratio to the bound; "skipped" where no bit differs or the weights are not to be had."""

    site: str
    op: str
    rows: int
    equal: bool
    error: float  # relative, in the 2-norm
    a: str = "skipped"
    b: str = "skipped"
    ratio_a: float = 0.0
    ratio_b: float = 0.0


@dataclass
class Comparison:
    """The outcome of `compare_traces`."""

    a: str
    b: str
    named: list[str] = field(default_factory=list)  # differences of model, prompt, tier, machine
    sites: list[SiteDifference] = field(default_factory=list)
    first_bits: str = ""  # the first node whose bits differ
    parts: str = ""  # the first node of which one or the other is wrong on its own inputs
    which: str = ""  # which trace that is: "A", "B", "A and B"
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)  # weights that differ, and how, where that is to be had
    uncompared: list[str] = field(default_factory=list)  # weights of which it can not be said

    @property
    def exit_code(self) -> int:
        """0 all differences are rounding, 1 a site is named, 2 neither can be said."""
        if self.parts or self.weights:
            return FAULT
        rows = sum(site.rows for site in self.sites)
        open_sites = any(not s.equal and "pass" not in (s.a, s.b) for s in self.sites)
        suspect = any("suspect" in (s.a, s.b) or ("skipped" in (s.a, s.b) and not s.equal) for s in self.sites)
        return INCONCLUSIVE if not rows or open_sites or suspect or self.uncompared else CERTIFIED

    def to_json(self) -> str:
        """All of it as JSON."""
        fields = {"exit_code": self.exit_code, **asdict(self)}
        for site in fields["sites"]:
            for name in ("error", "ratio_a", "ratio_b"):
                if not math.isfinite(site[name]):
                    site[name] = str(site[name])
        return json.dumps(fields, allow_nan=False, indent=1)


def compare_traces(
    a: str | os.PathLike[str], b: str | os.PathLike[str], model: str | os.PathLike[str] | None = None
) -> Comparison:
    """Compare two traces, node by node.

    Each node whose bits differ is certified in either run on its own inputs, with the weights of `model` (by default
    what the traces name) where these are those of the run; else the certificate that was saved with it counts.
    CaseError for a file that is no trace, CheckpointError for a `model` that is none.
    """
    result = Comparison(str(a), str(b))
    with Trace(a) as left, Trace(b) as right:
        layers = left.header["config"].get("num_hidden_layers")
        _name_differences(result, left, right)
        if left.header["config"] != right.header["config"] or type(layers) is not int:
            result.notes.append("these are runs of different models, which are not compared")
            return result
        shared = _shared(left.header["tokens"], right.header["tokens"])
        checkpoints = [_checkpoint(result, trace, model) for trace in (left, right)]
        result.weights, result.uncompared = compare_weights(left, right, *checkpoints)
        order = list(graph(min(layers, 1 << 16)))
        rank = {site: i for i, site in enumerate(order)}
        others = right.by_site()
        found: dict[str, SiteDifference] = {}
        bits: list[tuple[int, int, int, str]] = []
        wrong: list[tuple[int, int, int, str, str, str]] = []
        for node in left:
            if node.site not in rank or node.op != graph(layers)[node.site]:
                continue
            for other, rows_a, rows_b in _overlaps(node, others.get(node.site, []), shared):
                step = _compare(node, other, rows_a, rows_b, checkpoints)
                found[node.site] = _worse(found.get(node.site), step)
                place = node.step, rank[node.site], node.position
                if not step.equal:
                    bits.append((*place, node.site))
                which = " and ".join(n for n, outcome in (("A", step.a), ("B", step.b)) if outcome == "fault")
                if which:
                    ratio = max(step.ratio_a, step.ratio_b)
                    wrong.append((*place, node.site, which, f"ratio {ratio:.3g} of the bound, on its own inputs"))
        result.sites = [found[site] for site in order if site in found]
        if bits:
            result.first_bits = _place(*min(bits))
        if wrong:
            number, index, position, site, result.which, result.reason = min(wrong)
            result.parts = _place(number, index, position, site)
        if not result.sites:
            result.notes.append("there is no row that both runs have, so that nothing was compared")
    return result


def _place(step: int, rank: int, position: int, site: str) -> str:
    return f"{site}, {'the prompt' if step == 0 else f'decode step {step}'}, position {position}"


def _name_differences(result: Comparison, left: Trace, right: Trace) -> None:
    one, two = left.header, right.header
    for name in sorted({*one["config"], *two["config"]}):
        x, y = one["config"].get(name), two["config"].get(name)
        if x != y:
            result.named.append(f"config.{name}: {x!r} and {y!r}")
    for name, label in _FIELDS.items():
        if one.get(name) != two.get(name):
            result.named.append(f"{label}: {one.get(name)} and {two.get(name)}")
    builds = [str(header.get("versions", {}).get("build")) for header in (one, two)]
    if builds[0] != builds[1]:
        result.named.append(f"library build: {builds[0]} and {builds[1]}")
    if one["prompt"] != two["prompt"]:
        result.named.append(
            f"prompt: {len(one['prompt'])} and {len(two['prompt'])} tokens, of which the first "
            f"{_shared(one['prompt'], two['prompt'])} are the same"
        )
    elif one["tokens"] != two["tokens"]:
        same = _shared(one["tokens"], two["tokens"])
        result.named.append(f"tokens: the texts part at position {same}")


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _checkpoint(result: Comparison, trace: Trace, model: str | os.PathLike[str] | None) -> Checkpoint | None:
    try:
        return Checkpoint.open(model if model is not None else trace.header["model"])
    except CheckpointError:
        if model is not None:
            raise
        note = (
            f"the weights of {trace.header['model']!r} are not here (--model says where); saved certificates are used"
        )
        if note not in result.notes:
            result.notes.append(note)
        return None


def _overlaps(node: TracedNode, others: list[TracedNode], shared: int) -> Iterator[tuple[TracedNode, slice, slice]]:
    """The nodes of the other trace that have rows of the same positions, and these rows in each."""
    for other in others:
        begin = max(node.position, other.position)
        end = min(node.position + node.rows(), other.position + other.rows(), shared)
        if begin < end:
            yield (
                other,
                slice(begin - node.position, end - node.position),
                slice(begin - other.position, end - other.position),
            )


def _compare(
    node: TracedNode, other: TracedNode, rows_a: slice, rows_b: slice, checkpoints: list[Checkpoint | None]
) -> SiteDifference:
    one, two = node.outputs(), other.outputs()
    equal, error = True, 0.0
    for name in one:
        x, y = one[name][rows_a], two[name][rows_b]
        if x.shape != y.shape:
            equal, error = False, math.inf
            continue
        equal = equal and x.dtype == y.dtype and np.array_equal(as_bits(x), as_bits(y))
        error = max(error, relative(x, y))
    rows = rows_a.stop - rows_a.start
    if equal:
        return SiteDifference(node.site, node.op, rows, True, error)
    (a, ratio_a), (b, ratio_b) = (
        _certified(n, outputs, checkpoint)
        for n, outputs, checkpoint in zip((node, other), (one, two), checkpoints, strict=True)
    )
    return SiteDifference(node.site, node.op, rows, False, error, a, b, ratio_a, ratio_b)


def _certified(node: TracedNode, outputs: Mapping[str, Array], checkpoint: Checkpoint | None) -> tuple[str, float]:
    """LOCAL of a node: of what is in the trace, or what the run said where its inputs are not to be had."""
    inputs = node.inputs(checkpoint)
    if inputs is None or node.outcome == "fault":
        return node.outcome, node.ratio
    found = certify(SPECS[node.op], inputs, node.scalars, outputs)
    if found.outcome == "suspect":  # the run could repeat it, and did
        return node.outcome, found.ratio
    return found.outcome, found.ratio


def _worse(before: SiteDifference | None, step: SiteDifference) -> SiteDifference:
    if before is None:
        return step
    severity = ("pass", "skipped", "suspect", "fault")

    def worst(x: str, y: str, equal: bool) -> str:
        return x if equal else y if x == "skipped" and before.equal else max(x, y, key=severity.index)

    return SiteDifference(
        step.site,
        step.op,
        before.rows + step.rows,
        before.equal and step.equal,
        max(before.error, step.error),
        worst(before.a, step.a, step.equal),
        worst(before.b, step.b, step.equal),
        max(before.ratio_a, step.ratio_a),
        max(before.ratio_b, step.ratio_b),
    )


# ------------------------------------------------------------------ output


def print_comparison(result: Comparison, console: Console | None = None) -> None:
    """Print it for a person."""
    if console is None:
        console = Console(highlight=False)
        console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    if result.parts:
        console.print(Text(f"PART: {result.parts}: {result.which} is wrong", style="bold red"))
        console.print(Text(f"      {result.reason}"))
    elif result.weights:
        count = f"{len(result.weights)} weight{'s differ' if len(result.weights) > 1 else ' differs'}"
        console.print(Text(f"PART: {count}, the first {next(iter(result.weights))}", style="bold red"))
    elif result.exit_code == CERTIFIED:
        same = all(site.equal for site in result.sites)
        text = "the same bits throughout" if same else "all differences are rounding, each run on its own inputs"
        console.print(Text(text, style="bold green"))
    else:
        console.print(Text("inconclusive", style="bold yellow"))
    console.print(Text(f"A  {printable(result.a)}\nB  {printable(result.b)}", style="dim"))
    for text in result.named:
        console.print(Text(f"differ in {printable(text)}"))
    for name, text in itertools.islice(result.weights.items(), _LISTED):
        console.print(Text(printable(f"differ in {name}" + (f": B has {text}" if text else ""))))
    if len(result.weights) > _LISTED:
        console.print(Text(f"differ in {len(result.weights) - _LISTED} more weights"))
    if result.first_bits:
        console.print(Text(f"first bits that differ: {result.first_bits}"))
    console.print()
    if any(not site.equal for site in result.sites):
        _table(console, result)
    if result.uncompared:
        text = f"{len(result.uncompared)} weights could not be compared, the first {result.uncompared[0]}"
        why = "their storage types differ, and a trace has digests only (--model says where the weights are)"
        console.print(Text(printable(f"note  {text}: {why}"), style="yellow"))
    for note in result.notes:
        console.print(Text(f"note  {printable(note)}", style="yellow"))


_COLUMNS = {
    "input_layernorm": "norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.rope_k": "rope_k",
    "self_attn.attn": "attn",
    "self_attn.o_proj": "o",
    "post_attention_layernorm": "norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.act": "act",
    "mlp.down_proj": "down",
}


def _table(console: Console, result: Comparison) -> None:
    """Relative errors, a line for each layer."""
    by_layer: dict[str, dict[str, SiteDifference]] = {}
    single: list[SiteDifference] = []
    for site in result.sites:
        parts = site.site.split(".", 3)
        if site.site.startswith("model.layers.") and len(parts) == 4:
            by_layer.setdefault(parts[2], {})[parts[3]] = site
        else:
            single.append(site)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim", title_justify="left")
    table.add_column("layer", justify="right")
    for label in _COLUMNS.values():
        table.add_column(label, justify="right", no_wrap=True)
    for layer, sites in by_layer.items():
        table.add_row(layer, *(_cell(sites.get(name)) for name in _COLUMNS))
    console.print(Text("relative error, A against B", style="dim"))
    console.print(table)
    for site in single:
        console.print(Text(f"{site.site}  "), _cell(site), sep="")
    console.print()


def _cell(site: SiteDifference | None) -> Text:
    if site is None:
        return Text("-", style="dim")
    if site.equal:
        return Text("0", style="dim")
    wrong = "fault" in (site.a, site.b)
    return Text(f"{site.error:.0e}" + ("×" if wrong else ""), style="bold red" if wrong else "")

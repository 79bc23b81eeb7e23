"""What is told of the first faults beyond their place: shape, hypothesis, neighbours, swap, reproducer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._lib import isa
from ..case import Case, save_case, versions
from ..certify import certify
from ..errors import LlaisysError
from ..models.nodes import Node, as_outputs, kernel_function
from ..reference import Spec, ratios
from .bits import as_bits
from .hypotheses import find_hypothesis
from .ledger import Array, Entry, Ledger
from .local import Certifier, row_bytes, rows_of
from .prefix import INFER
from .repeat import ANEW, Again, Digests
from .report import Fault, Report
from .shape import describe_error
from .watch import Broken, Watch
from .wiring import consumers, producers

if TYPE_CHECKING:
    from .run import Runner

#: Faults that are described, counted from the one to blame; the others are of the same kind more often than not.
_DESCRIBED = 3
#: Tokens of the text before a flip that are shown.
_BEFORE = 16


def finish(runner: Runner, report: Report, folder: str | None) -> None:
    """Complete the faults and the flips of a report."""
    for i, fault in enumerate(report.faults):
        entry = runner.ledger.evidence.get((fault.site, fault.certificate))
        if entry is not None and entry.outputs and i < _DESCRIBED:
            runner.say("describing", fault.step, fault.site)
            fault = _described(runner, fault, entry, report)
            if folder is not None:
                fault = replace(fault, reproducer=_reproducer(runner, fault, entry, folder))
        fault = _placed(runner, report, fault)
        if i == 0:
            runner.say("swapping", fault.step, fault.site)
            fault = replace(fault, swap=_swapped(runner, fault))
        report.faults[i] = fault
    report.text = report.text or _text(runner, report.tokens)
    text = _text(runner, report.prompt)
    if text and runner.engine.tokenizer.encode(text) == report.prompt:
        report.prompt_text = text
    report.flips = [
        replace(
            flip,
            native_text=_text(runner, [flip.native]),
            reference_text=_text(runner, [flip.reference]),
            before=_text(runner, report.tokens[: flip.position + 1][-_BEFORE:]),
        )
        for flip in report.flips
    ]


def _text(runner: Runner, tokens: list[int]) -> str:
    try:
        return runner.engine.tokenizer.decode(tokens)
    except LlaisysError:  # a folder without a tokenizer
        return ""


# ------------------------------------------------------------------ the error itself


def _described(runner: Runner, fault: Fault, entry: Entry, report: Report) -> Fault:
    """First wrong position, shape, and a hypothesis."""
    spec = entry.spec
    limit = max(1, runner.budget // max(1, row_bytes(entry)))
    begin = max(0, min(fault.position - entry.position, entry.rows - 1)) // limit * limit
    end = min(entry.rows, begin + limit)
    inputs = {
        arg.name: rows_of(spec, arg.name, entry.inputs[arg.name], begin, end, entry.rows) for arg in spec.inputs_args
    }
    outputs = {name: x[begin:end] for name, x in entry.outputs.items()}
    oracles = spec.call(spec.oracle, {**inputs, **entry.scalars})
    shape: tuple[str, ...] = ()
    rows: list[int] = []
    masks: dict[str, Array] = {}
    for arg, oracle in zip(spec.outputs, oracles, strict=True):
        ratio = ratios(outputs[arg.name], oracle)
        masks[arg.name] = ~(ratio <= 1)
        rows += np.flatnonzero(masks[arg.name].reshape(end - begin, -1).any(axis=1))[:1].tolist()
        if not shape:
            shape = describe_error(spec, inputs, entry.scalars, arg.name, outputs[arg.name], oracle.y, ratio)
    if fault.certificate == "LOCAL" and rows:
        fault = replace(fault, position=entry.position + begin + min(rows))
    function = _kernel(runner, entry.site, spec)

    def rerun(values: dict[str, Any], scalars: dict[str, float]) -> Mapping[str, Array]:
        return as_outputs(spec, spec.call(function, {**values, **scalars}))

    hypothesis = fault.hypothesis
    repeat = runner.ledger.faults.get((fault.site, "REPEAT"))
    unsteady = repeat is not None and ANEW in repeat.message
    if hypothesis is None and unsteady and _changes(entry, rerun):
        hypothesis = "not the same bits each time on the same inputs: a race, or memory that was not written"
    if hypothesis is None and fault.certificate == "LOCAL":
        hypothesis = find_hypothesis(spec, inputs, entry.scalars, outputs, wrong=masks, rerun=rerun)
    if fault.certificate == "LOCAL" and repeat is not None and not unsteady:
        hypothesis = _of_rows(hypothesis, entry, report)
    return replace(fault, shape=shape or fault.shape, hypothesis=hypothesis)


def _of_rows(hypothesis: str | None, entry: Entry, report: Report) -> str | None:
    """The hypothesis, with the number of rows of the calls that it is about: where a call of the same site that has
    more is right, and the same inputs give other bits."""
    more = (node for node in report.nodes if node.site == entry.site and node.rows > entry.rows)
    if not any(node.outcomes["LOCAL"] == "pass" for node in more):
        return hypothesis
    calls = "in calls of one row" if entry.rows == 1 else f"in calls of {entry.rows} rows"
    return f"{hypothesis}, {calls}" if hypothesis else f"wrong {calls}, right in a call of more"


def _changes(entry: Entry, rerun: Any) -> bool:
    """Whether the operator by itself gives different bits from one time to another."""
    first: Mapping[str, Array] | None = None
    for _ in range(8):
        found = rerun(dict(entry.inputs), dict(entry.scalars))
        if first is not None and any(
            as_bits(found[name]).tobytes() != as_bits(first[name]).tobytes() for name in found
        ):
            return True
        first = found
    return False


def _kernel(runner: Runner, site: str, spec: Spec) -> Any:
    return kernel_function(runner.kernels.get(site, "native"), spec.name)


def _reproducer(runner: Runner, fault: Fault, entry: Entry, folder: str) -> str | None:
    """The file of the node, for `llaisys replay`; None if it cannot be written."""
    path = Path(folder) / f"{fault.site}-step{fault.step}-{fault.certificate.lower()}.npz"
    inputs = {arg.name: entry.inputs[arg.name] for arg in entry.spec.inputs_args}
    case = Case(
        fault.op,
        inputs,
        entry.scalars,
        entry.outputs,
        site=fault.site,
        step=fault.step,
        position=entry.position,
        isa=isa(),
        threads=runner.threads,
        versions=versions(),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_case(path, case)
    except OSError as error:
        runner.notes.append(f"no reproducer: {error}")
        return None
    return str(path)


def _placed(runner: Runner, report: Report, fault: Fault) -> Fault:
    """Which neighbours are certified."""
    wiring = runner.wirings.get(fault.site)
    if wiring is None:
        return fault
    found: dict[str, set[str]] = {}
    for node in report.nodes:
        if node.step == fault.step:
            found.setdefault(node.site, set()).add(node.outcome)
    certified = {site for site, outcomes in found.items() if outcomes == {"pass"}}
    readers = consumers(runner.wirings)[fault.site]
    return replace(
        fault,
        upstream=tuple(site for site in producers(wiring) if site in certified),
        downstream=tuple(site for site in readers if site in certified),
    )


# ------------------------------------------------------------------ swaps


def _swapped(runner: Runner, fault: Fault) -> str | None:
    """What becomes of a fault if the operator is the reference's, and if the native one is put into the reference."""
    wiring = runner.wirings.get(fault.site)
    if wiring is None or fault.message.startswith(INFER):
        return None
    parts = []
    try:
        if fault.certificate in ("LOCAL", "REPEAT"):
            stays = _native_with_reference(runner, fault)
            parts.append(f"with the reference's {wiring.op} at this site the fault {'stays' if stays else 'is gone'}")
        back = _reference_with_native(runner, fault)
        if back is not None:
            parts.append(back)
    except (Broken, LlaisysError) as error:
        parts.append(f"the run with it ended early: {error}")
    return "; ".join(parts)


def _passes(runner: Runner, fault: Fault) -> list[list[int]]:
    """The calls of the main run up to the step of a fault; where only a repetition has it, the call of that, behind all
    tokens before it."""
    entry = runner.ledger.evidence.get((fault.site, fault.certificate))
    if entry is not None and not runner.ledger.in_run(fault):
        begin, end = entry.position, entry.position + entry.rows
        return [tokens for tokens in (runner.tokens[:begin], runner.tokens[begin:end]) if tokens]
    return [runner.prompt, *([token] for token in runner.tokens[len(runner.prompt) :][: fault.step])]


def _native_with_reference(runner: Runner, fault: Fault) -> bool:
    """Whether the fault stays in a native run in which the reference computes the site."""
    wiring = runner.wirings[fault.site]
    ledger = Ledger(runner.wirings, len(runner.prompt), runner.decode)

    def hook(node: Node) -> Any:
        return node.spec.call(node.spec.twin, {**node.inputs, **node.scalars})

    digests = Digests()
    certifier = Certifier(ledger, runner.budget, {**runner.kernels, fault.site: "reference"}, lambda entry: None)
    again = Again(ledger, digests, {}, "a repetition", lambda entry: None)
    try:
        for visit in (digests.keep, again.visit) if fault.certificate == "REPEAT" else (certifier.submit,):

            def only(entry: Entry, visit: Any = visit) -> None:
                if entry.site == fault.site:
                    visit(entry)

            watch = Watch(
                runner.engine.session(),
                ledger,
                runner.weights,
                runner.dtype,
                scene="swapped",
                visit=only,
                progress=runner.say,
                hooks={wiring.site: hook},
            )
            for tokens in _passes(runner, fault):
                watch.forward(tokens, last=min(len(tokens), 4))
            watch.close()
        certifier.drain()
    finally:
        certifier.close()
    return (fault.site, fault.certificate) in ledger.faults


def _reference_with_native(runner: Runner, fault: Fault) -> str | None:
    """What the native operator does at the site in a run of the reference."""
    if runner.context is None:
        return None
    model, site = runner.context.model, fault.site
    spec = runner.wirings[site].op
    worst: list[float] = []
    wrong: list[bool] = []

    def hook(node: Node) -> Any:
        function = _kernel(runner, site, node.spec)
        results = as_outputs(node.spec, node.spec.call(function, {**node.inputs, **node.scalars}))
        found = certify(node.spec, node.inputs, node.scalars, results)
        worst.append(found.ratio)
        wrong.append(found.outcome == "fault")
        return results

    with model.session() as session:
        session.hook(hook, site)
        for tokens in _passes(runner, fault):
            session.forward(tokens, last=min(len(tokens), 4))
    if any(wrong):
        return f"the native {spec} in the reference run brings it back (ratio {max(worst):.3g})"
    if fault.certificate in ("LOCAL", "REPEAT"):
        return f"the native {spec} in the reference run does not bring it back: it takes the engine, or its data"
    return f"the native {spec} is right in the reference run: it is what the engine gives it that is wrong"


def describe_groups(faults: Sequence[Fault], layers: int) -> list[str]:
    """ "rope_k in 4 of 4 layers" for faults of one operator that several layers have."""
    groups: dict[tuple[str, str], set[str]] = {}
    for fault in faults:
        head, _, name = fault.site.rpartition(".")
        if ".layers." in fault.site:
            groups.setdefault((name, fault.certificate), set()).add(head)
    return [
        f"{name} in {len(found)} of {layers} layers ({certificate})"
        for (name, certificate), found in groups.items()
        if len(found) > 1
    ]

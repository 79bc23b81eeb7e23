"""The figures of a self-test: how much each rule finds, names and imagines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .rules import RULES
from .run import Case

DIFFER = "llaisys diff"
FIRST = "first divergence"


@dataclass(frozen=True)
class Row:
    """One rule. Counts of runs; `certificates` is None for rules that have none."""

    rule: str
    faults: int
    detected: int
    named: int
    certificates: int | None
    controls: int
    alarms: int


def limits(cases: Sequence[Case]) -> dict[str, float]:
    """By dtype, the largest deviation of the clean runs: the best that "first divergence" can be calibrated to."""
    found: dict[str, float] = defaultdict(float)
    for case in cases:
        if case.mutant is None and "largest" in case.answer:
            largest = max((value for _, _, value in case.answer["largest"]), default=0.0)
            found[case.job["dtype"]] = max(found[case.job["dtype"]], largest)
    return dict(found)


def blamed(case: Case, rule: str, limit: dict[str, float]) -> str | None:
    """The site that a rule names in this run, None if it is content. A run that broke off is noticed by all rules."""
    if "error" in case.answer:
        return "?"
    if rule == DIFFER:
        return case.site
    if rule == FIRST:
        most = limit.get(case.job["dtype"], 0.0)
        return next((site for _, site, value in case.answer["largest"] if value > most), None)
    site: str | None = case.answer["rules"][rule]
    return site


def summarise(cases: Sequence[Case]) -> list[Row]:
    """A row for the differ and for each rule that others use."""
    limit = limits(cases)
    rows = []
    for rule in (DIFFER, FIRST, *RULES):
        faults = [(case, blamed(case, rule, limit)) for case in cases if case.mutant is not None]
        controls = [blamed(case, rule, limit) for case in cases if case.mutant is None]
        rows.append(
            Row(
                rule,
                len(faults),
                sum(site is not None for _, site in faults),
                sum(case.named(site) for case, site in faults),
                sum(case.certified_rightly for case, _ in faults) if rule == DIFFER else None,
                len(controls),
                sum(site is not None for site in controls),
            )
        )
    return rows


def misses(cases: Sequence[Case]) -> list[Case]:
    """Faults that the differ did not find, or did not name rightly, and alarms about clean runs."""
    return [case for case in cases if case.alarmed if case.mutant is None or not case.named(case.site)] + [
        case for case in cases if case.mutant is not None and not case.alarmed
    ]


def as_dict(case: Case) -> dict[str, Any]:
    """A case for the JSON file."""
    answer = {name: value for name, value in case.answer.items() if name not in ("largest", "prompt", *case.job)}
    return {"fault": case.mutant.name if case.mutant else None, "library": case.library, **case.job, **answer}

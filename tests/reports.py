"""Made-up reports of the differ, for what is made of a report."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from llaisys.diff import Drift, Fault, Flip, NodeResult, Report
from llaisys.models.nodes import graph

CERTIFICATES = ("EDGE", "PARAM", "STATE", "LOCAL", "REPEAT")
HOSTILE = "\"><script>alert(1)</script>&amp;'{{ 7 * 7 }}\u202e\x00\ud800</details>"


def clean_report(layers: int = 5, steps: int = 9, prompt: int = 32, wide: bool = False) -> Report:
    """All nodes of a run, certified; ratios as of bf16 or, if `wide`, of f32."""
    rng = np.random.default_rng(layers)
    report = Report(
        model="tiny", dtype="f32" if wide else "bf16", isa="avx512", threads=2, layers=layers,
        prompt=list(range(prompt)), tokens=list(range(prompt + steps)), decode=steps - 1,
        text="def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
        versions={"llaisys": "0.2.0", "numpy": "2.3.5", "transformers": "5.1.0"}, seconds=6.42, peak_bytes=412 << 20,
        notes=["transformers was run in bf16 on the same tokens"],
    )  # fmt: skip
    for step in range(steps):
        drift = 1e-3
        for site, op in graph(layers).items():
            rows, position = (prompt, 0) if step == 0 else (1, prompt + step - 1)
            exact = op in ("embedding", "add")
            ratio = 0.0 if exact else float(10 ** rng.uniform(-2, -0.3) if wide else rng.uniform(0.82, 0.995))
            outcomes = dict.fromkeys(CERTIFICATES, "pass") | ({} if "attn" in site else {"STATE": "skipped"})
            node = NodeResult(
                site, op, step, position, rows, outcomes, ratio, rng.normal(0, 0.01), rows * 224, rows * 224
            )
            report.nodes.append(node)
            drift *= 1 + rng.uniform(-0.02, 0.09)
            report.drift.append(Drift(site, step, 0.0 if exact else drift, 0.0 if exact else drift * 1.4))
    return report


def faulty_report(layers: int = 5, steps: int = 9) -> Report:
    """A rope that is one position off in layer 2."""
    report = clean_report(layers, steps)
    site = "model.layers.2.self_attn.rope_k"
    for i, node in enumerate(report.nodes):
        if node.site == site:
            report.nodes[i] = replace(node, ratio=341.7, outcomes={**node.outcomes, "LOCAL": "fault"})
    report.drift = [
        replace(d, reference=d.reference and d.reference * 40, transformers=d.transformers and d.transformers * 30)
        if d.site > "model.layers.2" or not d.site.startswith("model.layers") else d for d in report.drift
    ]  # fmt: skip
    sites = list(graph(layers))
    at = sites.index(site)
    for step in (0, 1):
        report.faults.append(
            Fault(
                site, "rope", step, 0 if step == 0 else 32, "LOCAL",
                "out: 3041 of 3072 elements out of bound, worst at (1, 0, 0): expected -1.4375, found 0.8125",
                341.7, ("every position but 0", "31 of 32 rows"), "position offset +1", tuple(sites[:at]),
                tuple(sites[at + 1 :]), "fault-1.npz",
                "reference rope in the native run: certified; native rope in the reference: fault at the same site",
            )
        )  # fmt: skip
    report.flips.append(
        Flip(1, 33, 412, 287, 0.83, 0.061, " return", "\n", "def fibonacci(n):\n    if n < 2:\n       ")
    )
    report.flips.append(Flip(4, 36, 12, 13, 0.0031, 0.06, " n", " m", "    return"))
    return report


def suspect_report() -> Report:
    """Nodes that are neither admissible for certain nor proven wrong."""
    report = clean_report(steps=3, wide=True)
    for i in (7, 90, 150):
        node = report.nodes[i]
        report.nodes[i] = replace(node, ratio=1.7, bias=-0.4, outcomes={**node.outcomes, "LOCAL": "suspect"})
    return report


def nan_report() -> Report:
    """Results that are no numbers, and drift that is none either."""
    report = clean_report(steps=2)
    for i in (20, 21):
        node = report.nodes[i]
        ratio = math.nan if i == 20 else math.inf
        report.nodes[i] = replace(node, ratio=ratio, bias=math.nan, outcomes={**node.outcomes, "LOCAL": "fault"})
        report.faults.append(Fault(node.site, node.op, 0, 3, "LOCAL", "found NaN", ratio, ("all of them NaN",)))
        report.drift[i] = Drift(node.site, 0, math.nan, math.inf)
    return report


def hostile_report() -> Report:
    """Names and texts that would be markup, templates or control characters if they were not escaped."""
    report = faulty_report(steps=2)
    report.model = report.text = HOSTILE
    report.notes.append(HOSTILE)
    report.versions[HOSTILE] = report.swaps[HOSTILE] = HOSTILE
    report.nodes.append(NodeResult(HOSTILE, HOSTILE, 1, 0, 1, {"LOCAL": "suspect"}, 2.0, 0.0, 1, 1))
    report.faults.append(
        Fault(
            HOSTILE, HOSTILE, 1, 0, HOSTILE, HOSTILE, 1.0, (HOSTILE,), HOSTILE, (HOSTILE,), (HOSTILE,), HOSTILE, HOSTILE
        )
    )
    report.flips.append(Flip(1, 3, 1, 2, 0.1, 0.2, HOSTILE, HOSTILE, HOSTILE))
    return report


REPORTS = {
    "clean": clean_report,
    "faulty": faulty_report,
    "deep": lambda: faulty_report(28, 9),
    "suspect": suspect_report,
    "nan": nan_report,
    "hostile": hostile_report,
    "empty": lambda: Report("tiny", "f32", "scalar", 1, 5, [], [], 0),
}

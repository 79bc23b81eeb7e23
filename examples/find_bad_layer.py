"""Which layer did my kernel break? A port of rope that is wrong in one layer, and three ways to look for it.

    python examples/find_bad_layer.py [MODEL]

Put your own functions into `KERNELS`: keys are operators, sites, or patterns over sites.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import llaisys
import llaisys.diff
from llaisys.certify import certify
from llaisys.reference import rope


def my_rope(x: Any, pos_ids: Any, theta: float) -> Any:
    """Counts positions from 1: a mistake that one sees in no single number."""
    return rope(x, pos_ids + 1, theta)


KERNELS = {"layers.2.self_attn.rope_k": my_rope}


def main(model: str = "tiny", prompt: str = "def fibonacci(n):\n    if n < 2:") -> int:
    """Prints what each way finds; returns the exit status of the last."""
    mine = llaisys.Qwen2(model, kernels=KERNELS)
    reference = llaisys.Qwen2(model, backend="reference")
    tokens = mine.tokenizer.encode(prompt)
    _, nodes = mine.run_with_cache(tokens)
    _, expected = reference.run_with_cache(tokens)

    # 1. Compare outputs, as everybody does: rounding grows along the way, so where is the bug, and what is "large"?
    print("relative difference to the reference backend, where it grows tenfold:")
    last = 1e-6
    for site, (node, *_) in nodes.items():
        x, y = (next(iter(n.outputs.values())).astype(np.float64) for n in (node, expected[site][0]))
        difference = float(np.linalg.norm(x - y) / np.linalg.norm(y))
        if difference > 10 * last:
            print(f"    {site:36} {difference:.1e}")
            last = difference

    # 2. Ask of each node whether its output is right for the inputs that it really had. Rounding upstream is no matter.
    print("nodes whose output is not what their operator makes of their inputs:")
    for site, calls in nodes.items():
        for node in calls:
            local = certify(node.spec, node.inputs, node.scalars, node.outputs)
            if local.outcome == "fault":
                print(f"    {site:36} {local.ratio:.3g} of its bound")

    # 3. The differ: all five certificates, decode steps too, and an explanation.
    report = llaisys.diff.run(model, prompt, decode=2, swap=KERNELS)
    print("the differ:")
    if not report.faults:
        print("    certified" if report.exit_code == 0 else "    inconclusive")
        return report.exit_code
    first = report.faults[0]
    print(f"    {first.site}, {first.certificate}: {first.message}")
    for name, text in (("shape", "; ".join(first.shape)), ("hypothesis", first.hypothesis), ("swap", first.swap)):
        if text:
            print(f"    {name}: {text}")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

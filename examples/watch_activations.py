"""What goes on inside: size of the residual stream, its outliers, and what each layer would say next (a logit lens).

    python examples/watch_activations.py [MODEL [PROMPT]]

A tap sees every node while the engine runs, with its inputs and outputs. The arrays are copies here; a large model is
better watched with `copy=False`, taking from each node what is wanted and no more.
"""

from __future__ import annotations

import sys

import numpy as np

import llaisys
from llaisys.models.nodes import Node


def main(model: str = "tiny", prompt: str = "def fibonacci(n):\n    if n < 2:\n        return") -> None:
    """Prints a line per layer."""
    engine = llaisys.Qwen2(model, dtype="f32")
    tokens = engine.tokenizer.encode(prompt)

    # The residual stream is what a layer's norm adds up: the second output of add_rms_norm, [T, E].
    streams: dict[str, Node] = {}
    with engine.session() as session:
        session.tap(lambda node: streams.update({node.site: node}), ["layers.*layernorm", "norm", "lm_head"])
        logits = session.forward(tokens)

    # The last norm and the head, which the lens applies too early on purpose, are inputs of their nodes.
    norm, head = streams["model.norm"], streams["lm_head"].inputs["weight"]
    print("after                                   rms    largest  dim   would say next")
    for site, node in streams.items():
        if "sum" not in node.outputs:
            continue
        stream = node.outputs["sum"][-1:]  # of the last token
        largest = int(np.argmax(np.abs(stream)))
        normed = llaisys.ops.rms_norm(stream, norm.inputs["weight"], norm.scalars["eps"])
        best = np.argsort(-llaisys.ops.linear(normed, head)[0])[:4]
        says = " ".join(repr(engine.tokenizer.decode([int(token)])) for token in best)
        rms = float(np.sqrt(np.mean(stream**2)))
        print(f"{before(site):36} {rms:8.3f} {stream[0, largest]:10.3f} {largest:4}   {says}")
    assert best[0] == np.argmax(logits[-1])  # after the last layer the lens is the model


def before(site: str) -> str:
    """The block whose output a norm adds: the attention of the layer, or the MLP of the one before."""
    if site == "model.norm":
        return "the last mlp"
    layer = int(site.split(".")[2])
    return f"layer {layer} attention" if "post_attention" in site else f"layer {layer - 1} mlp"


if __name__ == "__main__":
    main(*sys.argv[1:])

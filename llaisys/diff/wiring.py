"""What every input of every node must be: the graph of Qwen2, wired.

The differ takes nothing of this from the engine under test. Sites and operators are those of
`llaisys.models.nodes.graph`; here stands who makes the inputs of each site, which weight belongs to it, and with which
scalars and shapes it is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..config import Qwen2Config
from ..errors import InternalError
from ..models.nodes import graph

#: Sites whose outputs are the keys and the values that attention sees, within a layer.
KEYS, VALUES = "self_attn.rope_k", "self_attn.v_proj"


@dataclass(frozen=True)
class Source:
    """An output of an earlier node."""

    site: str
    output: str = "out"


@dataclass(frozen=True)
class Wiring:
    """The call that a site stands for.

    `edges`: input -> the output that it is, row for row. `state`: input -> the site whose outputs of all positions so
    far it holds. `weights`: input -> name in the checkpoint, None where there must be none. `row`: argument -> shape
    without its first axis, which is that of the tokens (or of the sequence, for `state`).
    """

    site: str
    op: str
    index: int  # in the order of the graph
    layer: int | None
    edges: Mapping[str, Source] = field(default_factory=dict)
    state: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str | None] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    row: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    positions: str | None = None  # the input that holds the positions of the rows
    tokens: str | None = None  # the input that holds the tokens of the rows


def wire(config: Qwen2Config) -> dict[str, Wiring]:
    """Site -> wiring, in the order of the graph."""
    layers = config.num_hidden_layers
    return {site: _wiring(config, site, op, index, layers) for index, (site, op) in enumerate(graph(layers).items())}


def consumers(wirings: Mapping[str, Wiring]) -> dict[str, tuple[str, ...]]:
    """Site -> the sites that read one of its outputs, in order."""
    found: dict[str, list[str]] = {site: [] for site in wirings}
    for site, wiring in wirings.items():
        for name in dict.fromkeys([*(s.site for s in wiring.edges.values()), *wiring.state.values()]):
            found[name].append(site)
    return {site: tuple(readers) for site, readers in found.items()}


def producers(wiring: Wiring) -> tuple[str, ...]:
    """The sites that make the inputs of one, each once."""
    return tuple(dict.fromkeys([*(source.site for source in wiring.edges.values()), *wiring.state.values()]))


def _wiring(config: Qwen2Config, site: str, op: str, index: int, layers: int) -> Wiring:
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    eps, theta = float(np.float32(config.rms_norm_eps)), float(np.float32(config.rope_theta))
    scale = float(np.float32(1 / math.sqrt(dim)))

    if site == "model.embed_tokens":
        row: dict[str, tuple[int, ...]] = {"index": (), "out": (hidden,)}
        return Wiring(site, op, index, None, weights={"weight": f"{site}.weight"}, row=row, tokens="index")
    if site == "lm_head":
        head = "model.embed_tokens" if config.tie_word_embeddings else site
        edges = {"x": Source("model.norm")}
        weights = {"weight": f"{head}.weight", "bias": None}
        return Wiring(site, op, index, None, edges, {}, weights, {}, {"x": (hidden,), "out": (config.vocab_size,)})

    layer = layers if site == "model.norm" else int(site.split(".")[2])
    within = f"model.layers.{layer}."
    name = site.removeprefix(within)
    own = None if site == "model.norm" else layer
    if name in ("input_layernorm", "post_attention_layernorm", "model.norm"):
        if op == "rms_norm":  # nothing to add yet
            edges, row = {"x": Source("model.embed_tokens")}, {"x": (hidden,), "out": (hidden,)}
        else:
            if name == "post_attention_layernorm":
                first = layer == 0
                stream = Source("model.embed_tokens") if first else Source(within + "input_layernorm", "sum")
                branch = Source(within + "self_attn.o_proj")
            else:
                before = f"model.layers.{layer - 1}."
                stream = Source(before + "post_attention_layernorm", "sum")
                branch = Source(before + "mlp.down_proj")
            edges = {"a": stream, "b": branch}
            row = dict.fromkeys(("a", "b", "out", "sum"), (hidden,))
        return Wiring(site, op, index, own, edges, {}, {"weight": f"{site}.weight"}, {"eps": eps}, row)

    if op == "linear":
        source = {"self_attn.o_proj": "self_attn.attn", "mlp.down_proj": "mlp.act"}.get(name)
        source = source or ("post_attention_layernorm" if name.startswith("mlp.") else "input_layernorm")
        short = name.rpartition(".")[2]
        bias = f"{site}.bias" if config.attention_bias and short in ("q_proj", "k_proj", "v_proj") else None
        columns = {"q_proj": heads * dim, "k_proj": groups * dim, "v_proj": groups * dim, "o_proj": hidden}
        out = columns.get(short, hidden if short == "down_proj" else inner)
        into = {"o_proj": heads * dim, "down_proj": inner}.get(short, hidden)
        weights = {"weight": f"{site}.weight", "bias": bias}
        edges = {"x": Source(within + source)}
        return Wiring(site, op, index, own, edges, {}, weights, {}, {"x": (into,), "out": (out,)})
    if op == "rope":
        row = {"x": (groups, dim), "pos_ids": (), "out": (groups, dim)}
        edges = {"x": Source(within + "self_attn.k_proj")}
        return Wiring(site, op, index, own, edges, {}, {}, {"theta": theta}, row, "pos_ids")
    if op == "rope_self_attention":
        row = {"q": (heads, dim), "pos_ids": (), "k": (groups, dim), "v": (groups, dim), "out": (heads, dim)}
        edges = {"q": Source(within + "self_attn.q_proj")}
        state = {"k": within + KEYS, "v": within + VALUES}
        return Wiring(site, op, index, own, edges, state, {}, {"theta": theta, "scale": scale}, row, "pos_ids")
    if op == "swiglu":
        edges = {"gate": Source(within + "mlp.gate_proj"), "up": Source(within + "mlp.up_proj")}
        return Wiring(site, op, index, own, edges, {}, {}, {}, dict.fromkeys(("gate", "up", "out"), (inner,)))
    raise InternalError(f"{site}: the differ does not know what feeds {op}")

"""Qwen2 (Yang et al. 2024, arXiv:2407.10671) in numpy, to be read like the paper.

Every step is a call of one operator at a named site, so that any of them can be swapped or watched. Shapes: T new
tokens, S cached and new tokens, H query heads, K key/value heads, D head dim, E hidden, F intermediate, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..bounds import Array
from ..ops import SPECS

#: A function with the signature of an operator's twin.
Op = Callable[..., Any]
#: Called after each node with (site, op, inputs, scalars, outputs, position); it may write to the outputs.
Tap = Callable[[str, str, dict[str, Any], dict[str, float], dict[str, Array], int], None]


class Config(Protocol):
    """What the model must know; named as in a checkpoint's config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    attention_bias: bool


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, as in a checkpoint."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    rows = {"q": config.num_attention_heads * dim, "k": config.num_key_value_heads * dim}
    rows["v"] = rows["k"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        for name, size in rows.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (size, hidden)
            if config.attention_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (size,)
        shapes[layer + "self_attn.o_proj.weight"] = (hidden, rows["q"])
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        shapes[layer + "mlp.gate_proj.weight"] = (inner, hidden)
        shapes[layer + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


class Qwen2:
    """Weights and operators; `session()` runs them.

    `weights` maps checkpoint names to arrays of one dtype (f32, f16 or bf16), which is that of the activations and the
    KV cache too. `op(site, name)` gives the function to call for operator `name` at `site`; a mapping gives functions
    by operator name; what is not given is the numpy twin. Raises KeyError or ValueError for a weight that is missing or
    has another shape.
    """

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, Array],
        op: Callable[[str, str], Op] | Mapping[str, Op] | None = None,
    ) -> None:
        shapes = weight_shapes(config)
        for name, shape in shapes.items():
            if name not in weights:
                raise KeyError(f"{name}: expected a weight of shape {shape}, found none")
            if weights[name].shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, found {weights[name].shape}")
        self.config = config
        self.weights = {name: weights[name] for name in shapes}
        self.dtype: np.dtype[Any] = weights["model.embed_tokens.weight"].dtype
        self.scale = float(np.float32(1 / math.sqrt(config.head_dim)))
        self.op = op if callable(op) else lambda site, name: (op or {}).get(name, SPECS[name].twin)

    def session(self, tap: Tap | None = None) -> Session:
        """A KV cache of its own over these weights."""
        return Session(self, tap)


class Cache:
    """Keys or values of one layer, [S, K, D], in a buffer that doubles when it is full."""

    def __init__(self, heads: int, dim: int, dtype: np.dtype[Any]) -> None:
        self.buffer = np.empty((0, heads, dim), dtype)

    def append(self, rows: Array, position: int) -> Array:
        """Write `rows` from `position` on; returns all rows up to their end."""
        end = position + len(rows)
        if end > len(self.buffer):
            grown = np.empty((max(end, 2 * len(self.buffer)), *self.buffer.shape[1:]), self.buffer.dtype)
            grown[:position] = self.buffer[:position]
            self.buffer = grown
        self.buffer[position:end] = rows.reshape(-1, *self.buffer.shape[1:])
        return self.buffer[:end]


class Session:
    """One sequence: `forward` appends tokens to it. If `forward` raises, the sequence is as it was before."""

    def __init__(self, model: Qwen2, tap: Tap | None = None) -> None:
        self.model = model
        self.tap = tap
        self.reset()

    def reset(self) -> None:
        """Forget the sequence and free its cache."""
        config = self.model.config
        self.length = 0
        self.keys, self.values = (
            [
                Cache(config.num_key_value_heads, config.head_dim, self.model.dtype)
                for _ in range(config.num_hidden_layers)
            ]
            for _ in range(2)
        )

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"truncate: length: expected 0 to {self.length}, found {length}")
        self.length = length

    def forward(self, token_ids: Sequence[int] | Array, nlogits: int | None = None) -> Array:
        """Append tokens; returns the f32 logits [n, V] of the last `nlogits` of them (all by default)."""
        tokens = np.asarray(token_ids, dtype=np.int64)
        if tokens.ndim != 1:
            raise ValueError(f"forward: token_ids: expected shape [T], found {list(tokens.shape)}")
        count = len(tokens) if nlogits is None else nlogits
        if not 0 <= count <= len(tokens):
            raise ValueError(f"forward: nlogits: expected 0 to {len(tokens)}, found {nlogits}")
        config = self.model.config
        positions = np.arange(self.length, self.length + len(tokens), dtype=np.int64)  # [T]

        h = self.node("model.embed_tokens", "embedding", tokens, self.weight("model.embed_tokens"))  # [T, E]
        branch = None  # output of the block that is still to be added to the residual stream h
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}."
            x, h = self.norm(layer + "input_layernorm", h, branch)
            branch = self.attention(layer + "self_attn.", i, x, positions)
            x, h = self.norm(layer + "post_attention_layernorm", h, branch)
            branch = self.mlp(layer + "mlp.", x)
        first = len(tokens) - count  # only the rows whose logits are wanted go on
        x, h = self.norm("model.norm", h[first:], None if branch is None else branch[first:], first)
        head = self.weight("model.embed_tokens" if config.tie_word_embeddings else "lm_head")
        logits = self.node("lm_head", "linear", x, head, None, first=first)  # [n, V]
        self.length += len(tokens)
        return np.asarray(logits).astype(np.float32)

    def norm(self, site: str, h: Array, branch: Array | None, first: int = 0) -> tuple[Array, Array]:
        """Add the output of the last block to the residual stream and normalise; returns both, [T, E]."""
        weight, eps = self.weight(site), self.model.config.rms_norm_eps
        if branch is None:
            return self.node(site, "rms_norm", h, weight, eps, first=first), h
        x, h = self.node(site, "add_rms_norm", h, branch, weight, eps, first=first)
        return x, h

    def attention(self, site: str, layer: int, x: Array, positions: Array) -> Array:
        """Queries of the new tokens over the keys and values of all; [T, E] to [T, E]."""
        config = self.model.config
        theta, dim = config.rope_theta, config.head_dim
        q = self.linear(site + "q_proj", x).reshape(-1, config.num_attention_heads, dim)  # [T, H, D]
        k = self.linear(site + "k_proj", x).reshape(-1, config.num_key_value_heads, dim)  # [T, K, D]
        v = self.linear(site + "v_proj", x)  # [T, K D]
        k = self.node(site + "rope_k", "rope", k, positions, theta)
        keys = self.keys[layer].append(k, self.length)  # [S, K, D]
        values = self.values[layer].append(v, self.length)
        scale = self.model.scale
        out = self.node(site + "attn", "rope_self_attention", q, positions, keys, values, theta, scale)  # [T, H, D]
        return self.linear(site + "o_proj", out.reshape(-1, config.num_attention_heads * dim))

    def mlp(self, site: str, x: Array) -> Array:
        """Gated MLP, [T, E] to [T, E]."""
        gate, up = self.linear(site + "gate_proj", x), self.linear(site + "up_proj", x)  # [T, F]
        return self.linear(site + "down_proj", self.node(site + "act", "swiglu", gate, up))

    def linear(self, site: str, x: Array) -> Array:
        """x W^T + b with the weight and, if there is one, the bias of `site`."""
        result: Array = self.node(site, "linear", x, self.weight(site), self.model.weights.get(site + ".bias"))
        return result

    def weight(self, site: str) -> Array:
        """The weight that belongs to `site`."""
        return self.model.weights[site + ".weight"]

    def node(self, site: str, op: str, *args: Any, first: int = 0) -> Any:
        """Call operator `op` on its inputs and scalars, in the order of its SPEC, and show the tap what happened.

        `first` is the new token that the first row belongs to.
        """
        result = self.model.op(site, op)(*args)
        if self.tap is not None:
            spec = SPECS[op]
            tensors, scalars = args[: len(spec.inputs_args)], args[len(spec.inputs_args) :]
            self.tap(
                site,
                op,
                {a.name: x for a, x in zip(spec.inputs_args, tensors, strict=True)},
                {s.name: x for s, x in zip(spec.scalars, scalars, strict=True)},
                {
                    a.name: x
                    for a, x in zip(spec.outputs, result if isinstance(result, tuple) else (result,), strict=True)
                },
                self.length + first,
            )
        return result

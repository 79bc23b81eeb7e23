"""Qwen2 in f64 by another hand: what the logits would be if nothing were rounded but the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def exact_logits(weights: Mapping[str, Any], config: Any, tokens: Sequence[int]) -> Array:
    """The logits [T, V] in f64. `weights` are torch tensors by checkpoint name, `config` is transformers'."""

    def weight(name: str) -> Array:
        return np.asarray(weights[name].detach().double().numpy())

    def norm(x: Array, name: str) -> Array:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + config.rms_norm_eps) * weight(name + ".weight")

    count = len(tokens)
    groups = config.num_key_value_heads
    dim = weights["model.layers.0.self_attn.q_proj.weight"].shape[0] // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    turn = np.exp(1j * np.arange(count)[:, None, None] * theta ** -(np.arange(dim // 2) * 2 / dim))  # [T, 1, D/2]
    hidden_future = np.triu(np.full((count, count), -np.inf), 1)

    def heads(x: Array, layer: str, name: str, rotate: bool) -> Array:
        y = x @ weight(f"{layer}self_attn.{name}_proj.weight").T + weight(f"{layer}self_attn.{name}_proj.bias")
        y = y.reshape(count, -1, dim)
        if rotate:
            z = (y[..., : dim // 2] + 1j * y[..., dim // 2 :]) * turn
            y = np.concatenate([z.real, z.imag], -1)
        return y

    table = weight("model.embed_tokens.weight")
    h = table[np.asarray(tokens)]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        x = norm(h, layer + "input_layernorm")
        q, k, v = (heads(x, layer, name, name != "v") for name in "qkv")
        q = q.reshape(count, groups, -1, dim)
        scores = np.einsum("tgrd,sgd->grts", q, k) / np.sqrt(dim) + hidden_future
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        mixed = np.einsum("grts,sgd->tgrd", p, v).reshape(count, -1)
        h = h + mixed @ weight(layer + "self_attn.o_proj.weight").T
        x = norm(h, layer + "post_attention_layernorm")
        gate, up = x @ weight(layer + "mlp.gate_proj.weight").T, x @ weight(layer + "mlp.up_proj.weight").T
        h = h + (gate / (1 + np.exp(-gate)) * up) @ weight(layer + "mlp.down_proj.weight").T
    x = norm(h, "model.norm")
    head = weight("lm_head.weight") if "lm_head.weight" in weights and not config.tie_word_embeddings else table
    return np.asarray(x @ head.T)


def rms(x: Array) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


#: How far the error of a backend may exceed that of transformers; see `inadmissible`.
RMS_FACTOR, MAX_FACTOR = 2.0, 3.0


def inadmissible(logits: Array, theirs: Array, truth: Array) -> str:
    """Why `logits` are worse than rounding explains, "" if they are not.

    A whole model has no useful bound in closed form: the bounds of its nodes, multiplied through the layers, exceed the
    logits. But transformers' own distance from `truth` (the same stored weights, everything else in f64) is a sample of
    what this model's rounding does to its logits, and a correct implementation with the same rounding points (the
    operator tests certify each of them) is another sample of the same thing. Their root mean squares then agree but for
    the order of the f32 sums, over which the standard deviation of an error varies between sqrt(log n) for pairwise and
    sqrt(n) for running sums of n terms: with lanes and blocks of some tens of terms in between on both sides,
    a factor of 2. The largest of N such errors is sqrt(2 log N) of their rms, 3.5 to 5 for N from 10^3 to 10^6, and
    scatters by a quarter around that, by a half where only the T hidden states are independent: 2 times 1.5 is 3.
    """
    ours, noise = np.abs(logits - truth), np.abs(theirs - truth)
    if not np.isfinite(ours).all():
        return "there are NaN or infinite logits"
    if rms(ours) > RMS_FACTOR * rms(noise):
        return f"rms error {rms(ours):.2e}, {rms(ours) / rms(noise):.2f} times that of transformers"
    if ours.max() > MAX_FACTOR * noise.max():
        return f"largest error {ours.max():.2e}, {ours.max() / noise.max():.2f} times that of transformers"
    return ""

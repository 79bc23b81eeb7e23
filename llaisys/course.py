"""`Ops`: the operators under the names and in the argument order of the LLAISYS course, output first."""

from __future__ import annotations

from . import ops
from .errors import InvalidArgumentError
from .tensor import Tensor

__all__ = ["Ops"]


def _given(out: Tensor) -> Tensor:
    """An output, which `llaisys.ops` would make itself if it were None."""
    if out is None:
        raise InvalidArgumentError("Ops: expected a tensor for the output, found None")
    return out


class Ops:
    """The operators of the course over `Tensor`, each a call of `llaisys.ops` that writes to its first argument."""

    @staticmethod
    def add(c: Tensor, a: Tensor, b: Tensor) -> None:
        """c = a + b"""
        ops.add(a, b, out=_given(c))

    @staticmethod
    def argmax(max_idx: Tensor, max_val: Tensor, vals: Tensor) -> None:
        """max_idx (I64) and max_val: place and value of the largest of `vals` along its last axis."""
        ops.argmax(vals, out=(_given(max_idx), _given(max_val)))

    @staticmethod
    def embedding(out: Tensor, index: Tensor, weight: Tensor) -> None:
        """out = weight[index]"""
        ops.embedding(index, weight, out=_given(out))

    @staticmethod
    def linear(out: Tensor, inp: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """out = inp weight^T + bias"""
        ops.linear(inp, weight, bias, out=_given(out))

    @staticmethod
    def rearrange(out: Tensor, inp: Tensor) -> None:
        """out = inp, whatever the strides of both"""
        ops.rearrange(inp, out=_given(out))

    @staticmethod
    def rms_norm(out: Tensor, inp: Tensor, weight: Tensor, eps: float) -> None:
        """out = inp / sqrt(mean(inp^2) + eps) * weight, along the last axis"""
        ops.rms_norm(inp, weight, eps, out=_given(out))

    @staticmethod
    def rope(out: Tensor, inp: Tensor, pos_ids: Tensor, theta: float) -> None:
        """out = inp, rotated by its positions"""
        ops.rope(inp, pos_ids, theta, out=_given(out))

    @staticmethod
    def self_attention(attn_val: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        """attn_val = softmax(scale q k^T + causal mask) v"""
        ops.self_attention(q, k, v, scale, out=_given(attn_val))

    @staticmethod
    def swiglu(out: Tensor, gate: Tensor, up: Tensor) -> None:
        """out = silu(gate) * up"""
        ops.swiglu(gate, up, out=_given(out))

"""The same operators in torch, as somebody who knows torch would write them.

Each function takes the inputs and scalars of the operator as torch tensors, and `out`, tensors for the results: it
writes to them where torch lets it, and returns the results. An operator without an entry is measured without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Outputs = tuple[Tensor, ...]


def tensor(array: Any) -> Any:
    """`array` as a torch tensor that shares its memory if it may be written to; what is no array as it is."""
    if not isinstance(array, np.ndarray):
        return array
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array(result: Tensor) -> Any:
    """The numpy array of the dtypes that the operators use, sharing the memory of `result`."""
    if result.dtype == torch.bfloat16:
        import ml_dtypes

        return result.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return result.numpy()


def add(a: Tensor, b: Tensor, *, out: Outputs) -> Tensor:
    return torch.add(a, b, out=out[0])


def argmax(x: Tensor, *, out: Outputs) -> Outputs:
    value, index = torch.max(x, -1)
    return index, value


def embedding(index: Tensor, weight: Tensor, *, out: Outputs) -> Tensor:
    return torch.index_select(weight, 0, index, out=out[0])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Outputs) -> Tensor:
    return F.linear(x, weight, bias)


def rearrange(x: Tensor, *, out: Outputs) -> Tensor:
    return out[0].copy_(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Outputs) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(a: Tensor, b: Tensor, weight: Tensor, eps: float, *, out: Outputs) -> Outputs:
    total = torch.add(a, b, out=out[1])
    return F.rms_norm(total, weight.shape, weight, eps), total


@cache
def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    return theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)


def rope(x: Tensor, pos_ids: Tensor, theta: float, *, out: Outputs | None = None) -> Tensor:
    """As in transformers: cos and sin for each call, then x cos + rotate_half(x) sin."""
    angle = pos_ids[:, None].float() * inverse_frequencies(x.shape[-1], theta)
    angle = torch.cat((angle, angle), dim=-1)
    cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def self_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, out: Outputs | None = None) -> Tensor:
    """The causal mask of torch is aligned top-left: right for a whole prompt and, without one, for a single token."""
    if len(q) not in (1, len(k)):
        raise ValueError(f"q: expected 1 or {len(k)} tokens, found {len(q)}")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    result = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=True)
    return result[0].transpose(0, 1)


def rope_self_attention(
    q: Tensor, pos_ids: Tensor, k: Tensor, v: Tensor, theta: float, scale: float, *, out: Outputs
) -> Tensor:
    return self_attention(rope(q, pos_ids, theta), k, v, scale)


def swiglu(gate: Tensor, up: Tensor, *, out: Outputs) -> Tensor:
    return torch.mul(F.silu(gate), up, out=out[0])


PEERS: dict[str, Callable[..., Tensor | Outputs]] = {
    "add": add,
    "add_rms_norm": add_rms_norm,
    "argmax": argmax,
    "embedding": embedding,
    "linear": linear,
    "rearrange": rearrange,
    "rms_norm": rms_norm,
    "rope": rope,
    "rope_self_attention": rope_self_attention,
    "self_attention": self_attention,
    "swiglu": swiglu,
}

#: Where torch leaves out an inner rounding point that the contract has: it is then held to a wider bound.
ROUNDS_LESS = {"add_rms_norm", "rms_norm"}

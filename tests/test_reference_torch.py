"""The numpy twins and their bounds against torch and transformers' Qwen2."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from llaisys.reference import FLOATS, SPECS, Oracle, check
from llaisys.reference.bounds import unit
from llaisys.reference.numerics import cast
from llaisys.reference.ops.self_attention import attend
from llaisys.reference.spec import calls

BF16 = FLOATS["bf16"]


def to_torch(x: Any) -> torch.Tensor:
    x = np.array(x, order="C", copy=True)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == BF16 else torch.from_numpy(x)


def to_numpy(x: torch.Tensor) -> Any:
    x = x.detach().clone(memory_format=torch.contiguous_format)
    return x.view(torch.int16).numpy().view(BF16) if x.dtype == torch.bfloat16 else x.numpy()


def argmax(x: Any) -> Any:
    found = torch.max(to_torch(x), dim=-1)
    return to_numpy(found.indices), to_numpy(found.values)


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    module = qwen2.Qwen2RMSNorm(len(weight), eps)
    module.weight.data = to_torch(weight)
    return to_numpy(module(to_torch(x)))


def rope(x: Any, pos_ids: Any, theta: float) -> Any:
    dim = x.shape[-1]
    parameters = {"rope_type": "default", "rope_theta": theta}
    sizes: dict[str, Any] = {"hidden_size": dim, "num_attention_heads": 1, "head_dim": dim}
    config = Qwen2Config(**sizes, rope_parameters=parameters)
    heads = to_torch(x).transpose(0, 1)[None]
    cos, sin = qwen2.Qwen2RotaryEmbedding(config)(heads, to_torch(pos_ids)[None])
    return to_numpy(qwen2.apply_rotary_pos_emb(heads, heads, cos, sin)[0][0].transpose(0, 1))


def visible(tokens: int, length: int) -> torch.Tensor:
    return torch.arange(length) <= torch.arange(tokens)[:, None] + length - tokens


def sdpa(q: Any, k: Any, v: Any, scale: float) -> Any:
    tq, tk, tv = (to_torch(x).transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(tq, tk, tv, attn_mask=visible(len(q), len(k)), scale=scale, enable_gqa=True)
    return to_numpy(out[0].transpose(0, 1))


def eager(q: Any, k: Any, v: Any, scale: float) -> Any:
    tq, tk, tv = (to_torch(x).transpose(0, 1)[None] for x in (q, k, v))
    module: Any = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    mask = torch.zeros(len(q), len(k), dtype=tq.dtype)
    mask = mask.masked_fill(~visible(len(q), len(k)), torch.finfo(tq.dtype).min)
    return to_numpy(qwen2.eager_attention_forward(module, tq, tk, tv, mask[None, None], scale)[0][0])


def eager_oracle(q: Any, k: Any, v: Any, scale: float) -> tuple[Oracle, ...]:
    """In 16 bits the eager path rounds q k^T, and its product with the scale: 2 units of each score, which is at most
    what 2 units of each element of q do. (The contract keeps scores in f32, as sdpa does.)"""
    wide = q.astype(np.float64)
    return (attend(wide, 2 * unit(q.dtype) * np.abs(wide), k, v, scale),)


def linear(x: Any, weight: Any, bias: Any) -> Any:
    return to_numpy(F.linear(to_torch(x), to_torch(weight), None if bias is None else to_torch(bias)))


def rope_self_attention(q: Any, pos_ids: Any, k: Any, v: Any, theta: float, scale: float) -> Any:
    return sdpa(rope(q, pos_ids, theta), k, v, scale)


def add_rms_norm(a: Any, b: Any, weight: Any, eps: float) -> Any:
    total = to_numpy(to_torch(a) + to_torch(b))
    return rms_norm(total, weight, eps), total


EXACT: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: to_numpy(to_torch(a) + to_torch(b)),
    "argmax": argmax,
    "embedding": lambda index, weight: to_numpy(F.embedding(to_torch(index), to_torch(weight))),
    "rearrange": lambda x: to_numpy(to_torch(x)),
}
BOUNDED: dict[str, tuple[str, Callable[..., Any]]] = {
    "linear": ("linear", linear),
    "rms_norm": ("rms_norm", rms_norm),
    "add_rms_norm": ("add_rms_norm", add_rms_norm),
    "rope": ("rope", rope),
    "sdpa": ("self_attention", sdpa),
    "eager": ("self_attention", eager),
    "rope_sdpa": ("rope_self_attention", rope_self_attention),
    "swiglu": ("swiglu", lambda gate, up: to_numpy(F.silu(to_torch(gate)) * to_torch(up))),
}
# torch multiplies a masked probability of 0 with what the future holds, so NaN and infinities there reach the result.
TORCH_SEES = ("NaN-in-the-future", "infinities-in-the-future", "NaN-key-in-the-past")


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in EXACT for dtype in SPECS[name].dtypes])
def test_bit_for_bit(name: str, dtype: str) -> None:
    spec = SPECS[name]
    for label, _, values in calls(spec, dtype):
        for got, twin in zip(spec.call(EXACT[name], values), spec.call(spec.twin, values), strict=True):
            assert got.dtype == twin.dtype and got.shape == twin.shape, label
            if name == "add":  # a computed NaN may be any NaN
                nan = np.isnan(twin.astype(np.float32))
                assert (np.isnan(got.astype(np.float32)) == nan).all(), label
                assert got[~nan].tobytes() == twin[~nan].tobytes(), label
            else:
                assert got.tobytes() == twin.tobytes(), label


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BOUNDED)
def test_torch_is_within_the_bound(name: str, dtype: str) -> None:
    op, function = BOUNDED[name]
    spec = SPECS[op]
    oracle = eager_oracle if name == "eager" and dtype != "f32" else spec.oracle
    for label, dims, values in calls(spec, dtype):
        if label in TORCH_SEES or dims.get("K") == 0:
            continue
        for got, want in zip(spec.call(function, values), spec.call(oracle, values), strict=True):
            verdict = check(got, want, FLOATS[dtype])
            assert verdict, f"{label}: {verdict.reason}"
            assert verdict.checked == verdict.size


def without_inner_rounding(name: str, values: dict[str, Any]) -> Any:
    """The operator computed in f32 throughout, and rounded once at the end."""
    wide = {
        key: x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype != np.int64 else x
        for key, x in values.items()
    }
    (result,) = SPECS[name].call(SPECS[name].twin, wide)
    dtype = next(x.dtype for x in values.values() if isinstance(x, np.ndarray) and x.dtype != np.int64)
    return cast(result, dtype)


def rope_of_quotients(x: Any, pos_ids: Any, theta: float) -> Any:
    """transformers' rotation by the contract's angle, pos / theta^(2i/D). Its own, pos * (1 / theta^(2i/D)), is another
    f32 in one case in four, and at position 4000 that moves cos and sin by half an ulp of f16."""
    exponent = torch.arange(0, x.shape[-1], 2, dtype=torch.float32) / max(x.shape[-1], 1)
    angle = to_torch(pos_ids).float()[:, None] / torch.tensor(theta, dtype=torch.float32) ** exponent
    angle = torch.cat((angle, angle), dim=-1)[None]
    heads = to_torch(x).transpose(0, 1)[None]
    cos, sin = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    return to_numpy(qwen2.apply_rotary_pos_emb(heads, heads, cos, sin)[0][0].transpose(0, 1))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["rms_norm", "rope", "swiglu"])
def test_rounding_points_are_those_of_torch(name: str, dtype: str) -> None:
    """In 16 bits the twin has torch's very bits, but for the few elements where the last bit of an f32 exp, cos or sum
    decides a rounding; leaving out the inner rounding points changes far more."""
    spec, peer = SPECS[name], rope_of_quotients if name == "rope" else BOUNDED[name][1]
    differ = unrounded = total = 0
    for _, _, values in calls(spec, dtype):
        (torch_bits,), (twin,) = spec.call(peer, values), spec.call(spec.twin, values)
        finite = np.isfinite(twin.astype(np.float32))
        differ += int((torch_bits != twin)[finite].sum())
        unrounded += int((torch_bits != without_inner_rounding(name, values))[finite].sum())
        total += int(finite.sum())
    assert differ <= total / 1000, f"{differ} of {total}"
    assert unrounded > total / 10, f"{unrounded} of {total}"

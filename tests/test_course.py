"""What the scripts of the LLAISYS course do: the same calls, at its sizes and tolerances, against the same formulas in
torch. Tensors are filled and read through `RuntimeAPI.memcpy_sync`, as there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llaisys

TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64}
LLAISYS = {
    "f32": llaisys.DataType.F32,
    "f16": llaisys.DataType.F16,
    "bf16": llaisys.DataType.BF16,
    "i64": llaisys.DataType.I64,
}
#: dtype, atol and rtol of the course's scripts.
PRECISE = [("f32", 1e-5), ("f16", 1e-3), ("bf16", 1e-2)]
Pair = tuple[torch.Tensor, llaisys.Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def copy(values: torch.Tensor, dtype: str) -> Pair:
    """`values` in torch and in llaisys."""
    values = values.to(TORCH[dtype]).contiguous()
    tensor = llaisys.Tensor(values.shape, dtype=LLAISYS[dtype], device=llaisys.DeviceType.CPU, device_id=0)
    api = llaisys.RuntimeAPI(llaisys.DeviceType.CPU)
    size = values.numel() * values.element_size()
    api.memcpy_sync(tensor.data_ptr(), values.data_ptr(), size, llaisys.MemcpyKind.D2D)
    return values, tensor


def rand(shape: tuple[int, ...], dtype: str, scale: float = 1.0, bias: float = 0.0) -> Pair:
    return copy(torch.rand(shape) * scale + bias, dtype)


def empty(shape: tuple[int, ...], dtype: str) -> llaisys.Tensor:
    return copy(torch.full(shape, 77), dtype)[1]


def check_equal(result: llaisys.Tensor, answer: torch.Tensor, tolerance: float = 0.0) -> None:
    shape, strides = result.shape(), result.strides()
    assert shape == answer.shape
    assert result.dtype() == LLAISYS[next(name for name, dtype in TORCH.items() if dtype == answer.dtype)]
    reach = sum(stride * (size - 1) for size, stride in zip(shape, strides, strict=True)) + 1
    buffer = torch.zeros(reach, dtype=answer.dtype)
    llaisys.RuntimeAPI(result.device_type()).memcpy_sync(
        buffer.data_ptr(), result.data_ptr(), reach * buffer.element_size(), llaisys.MemcpyKind.D2D
    )
    found = torch.as_strided(buffer, shape, strides)
    if tolerance == 0.0:
        assert torch.equal(found, answer)
    else:
        torch.testing.assert_close(found, answer, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(2, 3), (512, 4096)])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE)
def test_add(shape: tuple[int, ...], dtype: str, tolerance: float) -> None:
    (a, a_), (b, b_) = rand(shape, dtype), rand(shape, dtype)
    c_ = empty(shape, dtype)
    llaisys.Ops.add(c_, a_, b_)
    check_equal(c_, a + b)  # more than the course asks: bit for bit


@pytest.mark.parametrize("shape", [(4,), (4096,)])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_argmax(shape: tuple[int, ...], dtype: str) -> None:
    vals, vals_ = rand(shape, dtype)
    max_idx_, max_val_ = empty((1,), "i64"), empty((1,), dtype)
    llaisys.Ops.argmax(max_idx_, max_val_, vals_)
    max_val, _ = torch.max(vals, keepdim=True, dim=-1)
    check_equal(max_val_, max_val)
    first = (vals == max_val).nonzero()[0]  # torch may name any of several equal ones
    check_equal(max_idx_, first)


@pytest.mark.parametrize(("indices", "table"), [((1,), (2, 3)), ((50,), (512, 4096))])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_embedding(indices: tuple[int, ...], table: tuple[int, int], dtype: str) -> None:
    index, index_ = copy(torch.randint(0, table[0], indices), "i64")
    weight, weight_ = rand(table, dtype)
    out_ = empty((indices[0], table[1]), dtype)
    llaisys.Ops.embedding(out_, index_, weight_)
    check_equal(out_, torch.nn.functional.embedding(index, weight))


@pytest.mark.parametrize("sizes", [(2, 4, 3), (512, 4096, 4096)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE)
def test_linear(sizes: tuple[int, int, int], with_bias: bool, dtype: str, tolerance: float) -> None:
    rows, columns, features = sizes
    x, x_ = rand((rows, columns), dtype, scale=0.1)
    w, w_ = rand((features, columns), dtype, scale=0.01)
    bias, bias_ = rand((features,), dtype) if with_bias else (None, None)
    out_ = empty((rows, features), dtype)
    llaisys.Ops.linear(out_, x_, w_, bias_)
    # In f32, since torch takes seconds for 16-bit products where the processor has none, and rounds them no better.
    answer = torch.nn.functional.linear(x.float(), w.float(), None if bias is None else bias.float())
    check_equal(out_, answer.to(TORCH[dtype]), tolerance)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i64"])
def test_rearrange(dtype: str) -> None:
    x, x_ = copy(torch.randint(-99, 99, (64, 96, 5)), dtype)
    out_ = empty((5, 64, 96), dtype)
    llaisys.Ops.rearrange(out_, x_.permute(2, 0, 1))
    check_equal(out_, x.permute(2, 0, 1).contiguous())


@pytest.mark.parametrize("shape", [(1, 4), (512, 4096)])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE)
def test_rms_norm(shape: tuple[int, int], dtype: str, tolerance: float) -> None:
    (x, x_), (w, w_) = rand(shape, dtype), rand((shape[1],), dtype)
    c_ = empty(shape, dtype)
    llaisys.Ops.rms_norm(c_, x_, w_, 1e-5)
    wide = x.float()
    answer = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * w.float()
    check_equal(c_, answer.to(TORCH[dtype]), tolerance)


@pytest.mark.parametrize(("shape", "positions"), [((2, 1, 4), (0, 2)), ((512, 4, 4096), (512, 1024))])
@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-4), ("f16", 1e-3), ("bf16", 1e-2)])
def test_rope(shape: tuple[int, int, int], positions: tuple[int, int], dtype: str, tolerance: float) -> None:
    x, x_ = rand(shape, dtype)
    pos, pos_ = copy(torch.arange(*positions), "i64")
    y_ = empty(shape, dtype)
    llaisys.Ops.rope(y_, x_, pos_, 10000.0)
    half = shape[2] // 2
    angles = pos.float()[:, None] / 10000.0 ** (2 * torch.arange(half, dtype=torch.float32) / shape[2])
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.float().split(half, dim=-1)
    answer = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    check_equal(y_, answer.to(TORCH[dtype]), tolerance)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 1, 4), (5, 11, 4, 2, 8), (512, 512, 4, 2, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE)
def test_self_attention(sizes: tuple[int, int, int, int, int], dtype: str, tolerance: float) -> None:
    tokens, keys, heads, kv_heads, dim = sizes
    q, q_ = rand((tokens, heads, dim), dtype)
    k, k_ = rand((keys, kv_heads, dim), dtype)
    v, v_ = rand((keys, kv_heads, dim), dtype)
    out_ = empty((tokens, heads, dim), dtype)
    scale = dim**-0.5
    llaisys.Ops.self_attention(out_, q_, k_, v_, scale)
    mask = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    wide: list[Any] = [x.float().transpose(0, 1) for x in (q, k, v)]
    answer = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale, enable_gqa=True)
    check_equal(out_, answer.transpose(0, 1).contiguous().to(TORCH[dtype]), tolerance)


@pytest.mark.parametrize("shape", [(2, 3), (512, 4096)])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE)
def test_swiglu(shape: tuple[int, int], dtype: str, tolerance: float) -> None:
    (gate, gate_), (up, up_) = rand(shape, dtype), rand(shape, dtype)
    out_ = empty(shape, dtype)
    llaisys.Ops.swiglu(out_, gate_, up_)
    answer = up.float() * gate.float() / (1 + torch.exp(-gate.float()))
    check_equal(out_, answer.to(TORCH[dtype]), tolerance)


def test_an_output_must_be_given() -> None:
    a: Any = empty((2, 3), "f32")
    with pytest.raises(llaisys.errors.InvalidArgumentError, match="output"):
        llaisys.Ops.add(None, a, a)


def test_tensor() -> None:
    """The course's test of loading, slicing, viewing and permuting a tensor."""
    values = torch.arange(60, dtype=torch.int64).reshape(3, 4, 5)
    tensor = llaisys.Tensor((3, 4, 5), dtype=llaisys.DataType.I64, device=llaisys.DeviceType.CPU)
    tensor.load(values.data_ptr())
    assert tensor.is_contiguous()
    check_equal(tensor, values)
    for ours, theirs in [
        (tensor.view(6, 10), values.view(6, 10)),
        (tensor.permute(2, 0, 1), values.permute(2, 0, 1)),
        (tensor.slice(2, 1, 4), values[:, :, 1:4]),
    ]:
        assert ours.shape() == theirs.shape and ours.strides() == theirs.stride()
        assert ours.is_contiguous() == theirs.is_contiguous()
        check_equal(ours, theirs)
        ours.debug()


def test_runtime() -> None:
    """The course's test of the runtime: memory on host and device, and copies between them."""
    assert llaisys.RuntimeAPI(llaisys.DeviceType.NVIDIA).get_device_count() == 0
    api = llaisys.RuntimeAPI(llaisys.DeviceType.CPU)
    assert api.get_device_count() >= 1
    a, b = torch.arange(1024, dtype=torch.float32), torch.zeros(1024)
    size = a.numel() * a.element_size()
    first, second = api.malloc_device(size), api.malloc_device(size)
    api.memcpy_sync(first, a.data_ptr(), size, llaisys.MemcpyKind.H2D)
    api.memcpy_sync(second, first, size, llaisys.MemcpyKind.D2D)
    api.memcpy_sync(b.data_ptr(), second, size, llaisys.MemcpyKind.D2H)
    api.free_device(first)
    api.free_device(second)
    assert torch.equal(a, b)


@pytest.mark.parametrize("top_k", [1, 5])
def test_infer(top_k: int) -> None:
    """The course's test of inference, with the embedded model for the folder: the signature and what comes back."""
    model = llaisys.models.Qwen2("tiny", llaisys.DeviceType.CPU)
    prompt = model.tokenizer.encode("import os")
    tokens = model.generate(prompt, max_new_tokens=8, top_k=top_k, top_p=0.8, temperature=0.8)
    assert tokens[: len(prompt)] == prompt and len(tokens) <= len(prompt) + 8
    assert all(type(token) is int for token in tokens)
    if top_k == 1:
        assert tokens == model.generate(prompt, 8, 1, 0.8, 0.8) == model.generate(prompt, 8, top_k=1)

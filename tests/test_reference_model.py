"""The numpy Qwen2 against transformers, and its sessions, taps and op table."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from llaisys.reference import FLOATS, SPECS, check
from llaisys.reference.models.qwen2 import Qwen2, weight_shapes

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 0, 96, 9, 3, 2, 3]
CONFIGS: dict[str, dict[str, Any]] = {
    "untied": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "tied-gqa": {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "head-dim": {"hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": False},
}
HEAD_DIM = {"untied": 12, "tied-gqa": 8, "head-dim": 32}


def build(name: str, dtype: str) -> tuple[SimpleNamespace, dict[str, Any], Qwen2ForCausalLM]:
    """A config, weights as numpy arrays of `dtype`, and transformers' model of these."""
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "intermediate_size": 72, "vocab_size": 97, "rms_norm_eps": 1e-5}
    config = SimpleNamespace(**sizes, **CONFIGS[name], head_dim=HEAD_DIM[name], attention_bias=True, rope_theta=1e4)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    settings: dict[str, Any] = {**sizes, **CONFIGS[name], "head_dim": HEAD_DIM[name], "rope_parameters": rope}
    torch_config = Qwen2Config(**settings)
    rng = np.random.default_rng(len(name))
    weights = {}
    for key, shape in weight_shapes(config).items():
        value: Any = rng.standard_normal(shape, dtype=np.float32)
        value = (
            np.float32(1) + value / 8
            if "norm" in key
            else value / math.sqrt(shape[-1])
            if len(shape) == 2
            else value / 4
        )
        weights[key] = value.astype(FLOATS[dtype])
    model: Any = Qwen2ForCausalLM(torch_config)
    model.train(False)
    state = {key: torch.from_numpy(value.astype(np.float32)) for key, value in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return config, weights, model.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype])


def torch_logits(model: Qwen2ForCausalLM, tokens: list[int]) -> Any:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


# In f32 each of the ~20 nodes in the chain adds a few u32 times the square root of the row length; 2^-24 * 20 * 10 is
# 1.2e-5 of the logits' size. In 16 bits each rounding of the residual stream adds half a unit, over ~20 of them.
CLOSE = {"f32": 2e-5, "f16": 2e-2, "bf16": 1e-1}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, dtype: str) -> None:
    config, weights, model = build(name, dtype)
    expected = torch_logits(model, TOKENS)
    logits = Qwen2(config, weights).session().forward(TOKENS)
    assert logits.dtype == np.float32 and logits.shape == (len(TOKENS), config.vocab_size)
    bound = CLOSE[dtype] * np.abs(expected).max()
    assert np.abs(logits - expected).max() < bound
    if dtype == "f32":  # the tolerance is able to fail: a position that is off, an eps that is off
        config.rope_theta = 1.1e4
        assert np.abs(Qwen2(config, weights).session().forward(TOKENS) - expected).max() > bound
        config.rope_theta, config.rms_norm_eps = 1e4, 1e-3
        assert np.abs(Qwen2(config, weights).session().forward(TOKENS) - expected).max() > bound


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_the_prefill(name: str) -> None:
    """Token by token, in pieces, after truncate and after reset: the logits of one prefill, up to the order of sums."""
    config, weights, _ = build(name, "f32")
    model = Qwen2(config, weights)
    whole = model.session().forward(TOKENS)
    session = model.session()
    steps = np.concatenate([session.forward([token]) for token in TOKENS])
    assert session.length == len(TOKENS)
    np.testing.assert_allclose(steps, whole, rtol=0, atol=1e-4)
    session.truncate(5)
    np.testing.assert_allclose(session.forward(TOKENS[5:]), whole[5:], rtol=0, atol=1e-4)
    session.reset()
    assert session.length == 0
    assert session.forward(TOKENS, nlogits=0).shape == (0, config.vocab_size)
    assert session.forward([]).shape == (0, config.vocab_size)
    session.truncate(9)
    np.testing.assert_allclose(session.forward(TOKENS[9:], nlogits=2), whole[-2:], rtol=0, atol=1e-4)


def test_cache_grows_by_doubling() -> None:
    config, weights, _ = build("tied-gqa", "f32")
    session = Qwen2(config, weights).session()
    sizes = []
    for token in range(40):
        session.forward([token])
        sizes.append(session.keys[0].buffer.shape)
    assert list(dict.fromkeys(sizes)) == [(n, 1, 8) for n in (1, 2, 4, 8, 16, 32, 64)]


def sites(layers: int) -> list[tuple[str, str]]:
    nodes = [("model.embed_tokens", "embedding")]
    for i in range(layers):
        layer = f"model.layers.{i}."
        nodes.append((layer + "input_layernorm", "add_rms_norm" if i else "rms_norm"))
        nodes += [(f"{layer}self_attn.{x}_proj", "linear") for x in "qkv"]
        nodes += [(layer + "self_attn.rope_k", "rope"), (layer + "self_attn.attn", "rope_self_attention")]
        nodes += [(layer + "self_attn.o_proj", "linear"), (layer + "post_attention_layernorm", "add_rms_norm")]
        nodes += [(f"{layer}mlp.{x}_proj", "linear") for x in ("gate", "up")]
        nodes += [(layer + "mlp.act", "swiglu"), (layer + "mlp.down_proj", "linear")]
    return [*nodes, ("model.norm", "add_rms_norm" if layers else "rms_norm"), ("lm_head", "linear")]


@pytest.mark.parametrize("dtype", FLOATS)
def test_tap_sees_every_node(dtype: str) -> None:
    """Sites and operators in order; each node holds within its own bound, on what it was given."""
    config, weights, _ = build("head-dim", dtype)
    seen: list[tuple[str, str]] = []
    at: list[int] = []

    def tap(site: str, op: str, inputs: Any, scalars: Any, outputs: Any, position: int) -> None:
        spec = SPECS[op]
        seen.append((site, op))
        at.append(position)
        assert list(outputs) == [a.name for a in spec.outputs] and list(scalars) == [s.name for s in spec.scalars]
        oracles = spec.call(spec.oracle, {**inputs, **scalars})
        for output, oracle in zip(outputs.values(), oracles, strict=True):
            assert check(output, oracle), site

    session = Qwen2(config, weights).session(tap)
    session.forward(TOKENS[:7])
    session.forward(TOKENS[7:])
    assert seen == 2 * sites(3) and at == [0] * len(sites(3)) + [7] * len(sites(3))


def test_tap_may_write_to_outputs() -> None:
    config, weights, _ = build("untied", "f32")
    plain = Qwen2(config, weights).session().forward(TOKENS)

    def tap(site: str, op: str, inputs: Any, scalars: Any, outputs: Any, position: int) -> None:
        if site == "model.layers.1.self_attn.v_proj":
            outputs["out"][:] = 0

    assert np.abs(Qwen2(config, weights).session(tap).forward(TOKENS) - plain).max() > 0.1


def test_operators_can_be_swapped() -> None:
    config, weights, _ = build("untied", "f32")
    plain = Qwen2(config, weights).session().forward(TOKENS)
    calls: list[Any] = []

    def rope(*args: Any) -> Any:
        calls.append(args)
        return SPECS["rope"].twin(*args)

    assert (Qwen2(config, weights, {"rope": rope}).session().forward(TOKENS) == plain).all() and len(calls) == 3

    def lookup(site: str, name: str) -> Any:
        return rope if site == "model.layers.2.self_attn.rope_k" else SPECS[name].twin

    assert (Qwen2(config, weights, lookup).session().forward(TOKENS) == plain).all() and len(calls) == 4


def test_refused_tokens_leave_the_session_alone() -> None:
    config, weights, _ = build("untied", "f32")
    session = Qwen2(config, weights).session()
    session.forward(TOKENS[:4])
    refused: list[tuple[Any, type[Exception]]] = [([1, 97], IndexError), ([-1], IndexError), ([[1, 2]], ValueError)]
    for bad, error in refused:
        with pytest.raises(error):
            session.forward(bad)
        assert session.length == 4
    with pytest.raises(ValueError, match="nlogits: expected 0 to 2, found 3"):
        session.forward([1, 2], nlogits=3)
    with pytest.raises(ValueError, match="length: expected 0 to 4, found 5"):
        session.truncate(5)
    expected = Qwen2(config, weights).session().forward(TOKENS)[4:]
    np.testing.assert_allclose(session.forward(TOKENS[4:]), expected, rtol=0, atol=1e-4)


def test_weights_are_checked() -> None:
    config, weights, _ = build("untied", "f32")
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(KeyError, match=name):
        Qwen2(config, {key: value for key, value in weights.items() if key != name})
    with pytest.raises(ValueError, match=r"expected shape \(72, 48\), found \(48, 72\)"):
        Qwen2(config, {**weights, name: weights[name].T})


def test_without_attention_bias_and_without_layers() -> None:
    config, weights, model = build("untied", "f32")
    config.attention_bias = False
    for key, value in model.state_dict().items():
        if key.endswith("bias"):
            value.zero_()
    expected = torch_logits(model, TOKENS)
    logits = Qwen2(config, weights).session().forward(TOKENS)
    assert np.abs(logits - expected).max() < CLOSE["f32"] * np.abs(expected).max()
    config.num_hidden_layers = 0
    seen: list[tuple[str, str]] = []
    Qwen2(config, weights).session(lambda site, op, *_: seen.append((site, op))).forward(TOKENS)
    assert seen == sites(0)

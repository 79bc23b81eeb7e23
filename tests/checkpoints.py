"""Small checkpoints for tests: `make_checkpoint` through transformers, `write_plain` by hand, for files gone wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

#: A Qwen2 of 13 000 parameters in the form of transformers 4, every size different from every other.
SMALL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 3,
}


def make_checkpoint(
    folder: str | Path,
    *,
    dtype: str = "f32",
    shards: int | None = None,
    seed: int = 0,
    generation: Mapping[str, Any] | None = None,
    **config: Any,
) -> Any:
    """Write a random Qwen2ForCausalLM with transformers' save_pretrained and return the torch model.

    `config` overrides `SMALL`, by the names of transformers' Qwen2Config; `dtype` is "f32", "f16" or "bf16"; `shards`
    asks for that many files with an index (one file without an index if None); `generation` is put into
    generation_config.json. Weights have a scale that keeps activations near 1 through all layers; biases are not zero
    and norm weights are not one, so that forgetting either shows.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    values = {**SMALL, **config}
    for key in ("architectures", "model_type", "torch_dtype"):
        values.pop(key)
    if "rope_parameters" in config:
        values.pop("rope_theta")
    if "hidden_size" in config and "head_dim" not in config:
        values.pop("head_dim")
    torch_dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    model = Qwen2ForCausalLM(Qwen2Config(**values)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.25 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise * (1.5 if "embed" in name or "lm_head" in name else 1.0) * weight.shape[1] ** -0.5)
    model = model.to(torch_dtype)
    if generation is not None:
        model.generation_config = GenerationConfig(**generation)
    state = model.state_dict()
    if values["tie_word_embeddings"]:
        state.pop("lm_head.weight")
    size = total = sum(weight.numel() * weight.element_size() for weight in state.values())
    if shards is not None:
        for size in range(total // shards, total, max(1, total // 200)):
            if len(split_torch_state_dict_into_shards(state, max_shard_size=size).filename_to_tensors) == shards:
                break
        else:
            raise ValueError(f"no shard size gives {shards} shards")
    model.save_pretrained(folder, max_shard_size=size if shards is not None else total + 1)
    return model


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a config like `SMALL`, written down independently of the package."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.q_proj.bias": (query,),
            "self_attn.k_proj.weight": (key, hidden),
            "self_attn.k_proj.bias": (key,),
            "self_attn.v_proj.weight": (key, hidden),
            "self_attn.v_proj.bias": (key,),
            "self_attn.o_proj.weight": (hidden, query),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    return shapes


def plain_weights(config: Mapping[str, Any] = SMALL, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random float32 weights for `config`."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes_of(config).items()}


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON; a text is written as it is."""
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def safetensors_bytes(weights: Mapping[str, np.ndarray[Any, Any]], header: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file, byte by byte, with `header` laid over the entries of the header that belongs to `weights`."""
    entries: dict[str, Any] = {}
    end = 0
    for name, array in weights.items():
        dtype = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}[array.dtype.name]
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    data = b"".join(array.tobytes() for array in weights.values())
    return with_header(json.dumps({**entries, **(header or {})}).encode(), data)


def with_header(header: bytes, data: bytes) -> bytes:
    """The length of the header, the header, the data."""
    return struct.pack("<Q", len(header)) + header + data


def write_plain(
    folder: Path, config: Mapping[str, Any] = SMALL, weights: Mapping[str, np.ndarray[Any, Any]] | None = None
) -> Path:
    """A folder with config.json and model.safetensors, written without torch."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dict(config))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(plain_weights() if weights is None else weights))
    return folder

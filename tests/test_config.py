"""Qwen2Config: what transformers saves is read as transformers reads it; all else is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llaisys.config import MAX_POSITIONS, GenerationDefaults, Qwen2Config
from llaisys.errors import CheckpointError
from llaisys.folder import parse_json, show

from .checkpoints import SMALL, write_json


def parse(generation: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **changes: Any) -> Qwen2Config:
    config = {key: value for key, value in {**SMALL, **changes}.items() if key not in drop}
    return Qwen2Config.parse(config, generation)


def refused(field: str, **changes: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        parse(**changes)
    error = caught.value
    assert error.field == field, str(error)
    for part in (error.file, error.field, str(error.expected), str(error.found)):
        assert part and part in str(error)
    return error


def test_small() -> None:
    config = parse()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (67, 24, 40)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 6, 2)
    assert (config.head_dim, config.rms_norm_eps, config.rope_theta) == (8, 1e-6, 10000.0)
    assert (config.max_position_embeddings, config.dtype, config.eos_token_ids) == (128, "f32", (3,))
    assert (config.tie_word_embeddings, config.attention_bias, config.ignored_keys) == (False, True, ())
    assert config.generation == GenerationDefaults()


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
    ],
)
def test_no_default_is_guessed(key: str) -> None:
    error = refused(key, drop=(key,))
    assert "missing" in str(error)


def test_documented_defaults() -> None:
    drop = ("architectures", "hidden_act", "tie_word_embeddings", "torch_dtype", "eos_token_id")
    config = parse(drop=drop)
    assert (config.tie_word_embeddings, config.dtype, config.eos_token_ids) == (False, None, ())
    assert parse(num_key_value_heads=None).num_key_value_heads == 6
    assert parse(drop=("head_dim",)).head_dim == 4
    assert parse(head_dim=None).head_dim == 4


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [0, -1, True, 8.0, "8", [8], {}, 1 << 31, 10**30])
def test_integers_are_integers_within_bounds(key: str, value: Any) -> None:
    refused(key, **{key: value})


@pytest.mark.parametrize("value", [0, 0.0, -1e-6, 2.0, 1e-300, "1e-6", True, None, [], math.nan, math.inf])
def test_eps(value: Any) -> None:
    refused("rms_norm_eps", rms_norm_eps=value)


@pytest.mark.parametrize("value", [0, -10000.0, 0.5, 1e300, "10000", True, math.nan, math.inf])
def test_theta(value: Any) -> None:
    refused("rope_theta", rope_theta=value)
    refused("rope_parameters.rope_theta", drop=("rope_theta",), rope_parameters={"rope_theta": value})


def test_heads_that_do_not_fit() -> None:
    refused("num_key_value_heads", num_key_value_heads=4)
    refused("num_key_value_heads", num_key_value_heads=12)
    refused("head_dim", head_dim=7)
    refused("hidden_size", hidden_size=25, head_dim=None)
    refused("head_dim", hidden_size=30, head_dim=None)  # 5
    assert parse(hidden_size=25).head_dim == 8


def test_products_are_bounded() -> None:
    huge = {"hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_hidden_layers": 1024}
    assert "parameters" in str(refused("vocab_size, hidden_size, ...", **huge))


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "use_sliding_window", "do_sample"])
@pytest.mark.parametrize("value", [0, 1, "true", [], 1.0])
def test_booleans_are_booleans(key: str, value: Any) -> None:
    if key == "do_sample":
        refused(key, generation={key: value})
    else:
        refused(key, **{key: value})


@pytest.mark.parametrize("value", ["llama", "qwen2_moe", "Qwen2", None, 2])
def test_model_type(value: Any) -> None:
    refused("model_type", model_type=value)


@pytest.mark.parametrize("value", ["Qwen2ForCausalLM", [], ["Qwen2Model"], ["Qwen2ForCausalLM", "X"], [None]])
def test_architectures(value: Any) -> None:
    refused("architectures", architectures=value)


def test_activation() -> None:
    refused("hidden_act", hidden_act="gelu")


def test_rope_theta_wherever_it_stands() -> None:
    v5 = {"rope_theta": 5e5, "rope_type": "default"}
    assert parse(drop=("rope_theta",), rope_parameters=v5).rope_theta == 5e5
    assert parse(drop=("rope_theta",), rope_scaling=v5).rope_theta == 5e5
    assert parse(rope_theta=500000, rope_parameters=v5, rope_scaling=None).rope_theta == 5e5
    assert parse(rope_parameters={"type": "default"}).rope_theta == 10000.0
    refused("rope_parameters.rope_theta", rope_parameters=v5)
    refused("rope_scaling.rope_theta", drop=("rope_theta",), rope_parameters=v5, rope_scaling={"rope_theta": 1e6})


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "llama3", "mrope", "", 1])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_other_ropes(name: str, kind: Any, key: str) -> None:
    error = refused(f"{name}.{key}", **{name: {key: kind, "factor": 4.0}})
    assert repr(kind) in str(error)


def test_rope_that_is_not_plain() -> None:
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    refused("rope_parameters.full_attention", rope_parameters=nested)
    refused("rope_parameters.factor", rope_parameters={"rope_type": "default", "factor": 2.0})
    refused("rope_parameters.mrope_section", rope_parameters={"mrope_section": [1, 1, 2]})
    refused("rope_parameters.partial_rotary_factor", rope_parameters={"partial_rotary_factor": 0.5})
    refused("partial_rotary_factor", partial_rotary_factor=0.5)
    refused("rope_parameters", rope_parameters=[1])
    assert parse(partial_rotary_factor=1.0).head_dim == 8


def test_sliding_window() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    refused("use_sliding_window", **windows)
    refused("use_sliding_window", **{**windows, "layer_types": ["full_attention"] * 2})  # a contradiction
    refused("use_sliding_window", use_sliding_window=True, sliding_window=64)
    refused("sliding_window", use_sliding_window=True)
    refused("sliding_window", sliding_window=0)
    refused("max_window_layers", max_window_layers=-1)
    for harmless in (
        {"use_sliding_window": False},
        {"sliding_window": 128},
        {"sliding_window": None},
        {"max_window_layers": 2},
        {"sliding_window": 128, "layer_types": ["full_attention", "sliding_attention"]},
    ):
        parse(**{**windows, **harmless})
    parse(sliding_window=64)


def test_layer_types() -> None:
    parse(layer_types=["full_attention"] * 2)
    refused("layer_types[1]", layer_types=["full_attention", "sliding_attention"])
    refused("layer_types[0]", layer_types=["linear_attention", "full_attention"])
    refused("layer_types[0]", layer_types=[[], {}])
    refused("layer_types", layer_types=["full_attention"])
    refused("layer_types", layer_types="full_attention")


def test_dtype() -> None:
    assert parse(torch_dtype="bfloat16").dtype == "bf16"
    assert parse(drop=("torch_dtype",), dtype="float16").dtype == "f16"
    assert parse(dtype="float32").dtype == "f32"
    refused("torch_dtype", dtype="float16")
    refused("torch_dtype", torch_dtype="float64")
    refused("dtype", dtype="auto")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq"}),
        ("auto_map", {"AutoModelForCausalLM": "modeling_evil.Model"}),
        ("per_layer_config", {"0": {"hidden_size": 8}}),
        ("is_causal", False),
        ("logit_scale", 0.5),
        ("final_logit_softcapping", 30.0),
        ("embedding_multiplier", 12),
        ("residual_multiplier", 0.2),
        ("attention_multiplier", 0.1),
        ("use_qk_norm", True),
        ("qk_norm", 1),
        ("mlp_bias", True),
        ("dual_chunk_attention_config", {"chunk_size": 8}),
        ("num_experts", 4),
        ("pruned_heads", {"0": [1]}),
    ],
)
def test_what_changes_numbers_is_refused(key: str, value: Any) -> None:
    refused(key, **{key: value})
    assert parse(**{key: None}).ignored_keys == ()


def test_what_does_not_is_listed() -> None:
    config = parse(transformers_version="4.40", use_cache=True, initializer_range=0.02, something={"new": [1]})
    assert config.ignored_keys == ("initializer_range", "something", "transformers_version", "use_cache")


def test_eos() -> None:
    assert parse(eos_token_id=[5, 4, 5]).eos_token_ids == (5, 4)
    assert parse(eos_token_id=10**6).eos_token_ids == (10**6,)
    assert parse(generation={"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert parse(generation={"eos_token_id": None}).eos_token_ids == (3,)
    for bad in (-1, True, 1.0, "3", [3, None], [[3]], list(range(2000)), 1 << 40, {}):
        refused("eos_token_id", eos_token_id=bad)
        refused("eos_token_id", generation={"eos_token_id": bad})
    assert parse(pad_token_id=-1).pad_token_id is None
    refused("pad_token_id", pad_token_id=-2)


def test_generation() -> None:
    values = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    result = parse(generation={**values, "max_new_tokens": 9, "chat_format": "chatml"}).generation
    assert {key: getattr(result, key) for key in values} == values
    assert (result.max_new_tokens, result.ignored_keys) == (9, ("chat_format",))
    assert parse(generation=dict.fromkeys(values)).generation == GenerationDefaults()
    for key, value in {
        "temperature": -1,
        "top_k": 1.5,
        "top_p": 1.5,
        "repetition_penalty": 0,
        "num_beams": 4,
        "min_p": 0.1,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [1],
        "guidance_scale": 2.0,
        "cache_implementation": "quantized",
    }.items():
        refused(key, generation={key: value})
    refused("temperature", generation={"do_sample": True, "temperature": 0.0})
    parse(generation={"num_beams": 1, "min_p": 0.0, "temperature": 0.0})


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"a": 1, "a": 1}', "'a'"),
        ('{"x": {"a": 1, "b": 2, "a": 3}}', "'a'"),
        ('{"a": NaN}', "JSON"),
        ('{"a": -Infinity}', "JSON"),
        ('{"a": 1e400}', "JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "JSON"),
        ("[" * 100_000, "JSON"),
        ('{"a":' * 33 + "1" + "}" * 33, "JSON"),
        ("[]", "JSON"),
        ("3", "JSON"),
        ("", "JSON"),
        ("{'a': 1}", "JSON"),
        ('{"a": 1} x', "JSON"),
        ("\ufeff{}", "JSON"),
        ('"' * 300_000, "JSON"),
        ('"\\' * 300_000, "JSON"),
    ],
)
def test_json(text: str, field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_json(text.encode(), "config.json")
    assert caught.value.field == field
    assert len(str(caught.value)) < 500


def test_json_that_is_fine() -> None:
    assert parse_json(b'{"a": ["[[[[", {"b": 1e3}], "\\"": -0.0}', "x") == {"a": ["[[[[", {"b": 1e3}], '"': 0.0}
    with pytest.raises(CheckpointError, match="UTF-8"):
        parse_json(b'{"a": "\xff"}', "x")


def test_messages_carry_no_control_characters() -> None:
    error = refused("model_type", model_type="\x1b[2J" + "x" * 10_000)
    assert "\x1b" not in str(error) and len(str(error)) < 400
    assert len(show(["x" * 1000] * 1000)) < 120


def test_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: file: expected a regular file, found no such file"):
        Qwen2Config.from_folder(tmp_path)
    write_json(tmp_path / "config.json", SMALL)
    assert Qwen2Config.from_folder(tmp_path) == parse()
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 9})
    assert Qwen2Config.from_folder(str(tmp_path)).eos_token_ids == (9,)
    write_json(tmp_path / "generation_config.json", '{"eos_token_id": 9, "eos_token_id": 8}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*duplicate"):
        Qwen2Config.from_folder(tmp_path)
    write_json(tmp_path / "config.json", json.dumps(SMALL) + " " * (1 << 20))
    with pytest.raises(CheckpointError, match="size: expected at most 1048576 bytes"):
        Qwen2Config.from_folder(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "rope_theta": 1e6},
        {"num_key_value_heads": None},
        {"eos_token_id": [1, 2], "pad_token_id": 0, "dtype": "bfloat16"},
        {"use_sliding_window": True, "sliding_window": 4096, "max_position_embeddings": 4096},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 40},
    ],
)
def test_what_transformers_saves_loads(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import Qwen2Config as Theirs

    theirs = Theirs(**changes)
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    ours = Qwen2Config.parse(saved)
    theta = saved.pop("rope_parameters")["rope_theta"]
    for form in ({"rope_theta": theta}, {"rope_theta": theta, "rope_scaling": None}):  # of transformers 4
        assert Qwen2Config.parse({**saved, **form}).rope_theta == ours.rope_theta
    for key in ("vocab_size", "hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == changes.get("rope_theta", 10000.0)
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == ([] if eos is None else eos if isinstance(eos, list) else [eos])


def test_sliding_window_of_transformers_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen2Config as Theirs

    Theirs(use_sliding_window=True, sliding_window=16, max_window_layers=4).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        Qwen2Config.from_folder(tmp_path)


def test_number_of_parameters() -> None:
    from transformers import Qwen2Config as Theirs
    from transformers import Qwen2ForCausalLM

    for tied in (False, True):
        values = {key: value for key, value in SMALL.items() if key not in ("architectures", "model_type")}
        values["tie_word_embeddings"] = tied
        theirs = Qwen2ForCausalLM(Theirs(**values))
        assert parse(tie_word_embeddings=tied).num_parameters == theirs.num_parameters()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([1, 2, 4, MAX_POSITIONS, "default", "full_attention", "float16", "silu", "qwen2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    [
        *SMALL,
        "rope_parameters",
        "rope_scaling",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "attention_bias",
        "dtype",
        "quantization_config",
        "attention_dropout",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(keys, json_values, max_size=4), st.dictionaries(keys | st.text(max_size=5), json_values, max_size=3)
)
def test_fuzz_values(changes: dict[str, Any], generation: dict[str, Any]) -> None:
    try:
        config = Qwen2Config.parse({**SMALL, **changes}, generation)
    except CheckpointError as error:
        assert error.field and len(str(error)) < 1000
    else:
        assert config.head_dim % 2 == 0 and config.num_attention_heads % config.num_key_value_heads == 0


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 60))
def test_fuzz_bytes(noise: bytes, position: int, cut: int) -> None:
    raw = json.dumps(SMALL).encode()
    raw = raw[:position] + noise + raw[position + cut :]
    try:
        Qwen2Config.parse(parse_json(raw, "config.json"))
    except CheckpointError as error:
        assert len(str(error)) < 1000

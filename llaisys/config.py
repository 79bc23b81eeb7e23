"""What a Qwen2 checkpoint says about itself: config.json and generation_config.json.

Everything in them is honoured or refused by name, and no number that changes the results is guessed:

==========================  ========================================================================================
key of config.json          absent, null, or unusual
==========================  ========================================================================================
model_type                  required, "qwen2"
architectures               may be absent; else Qwen2ForCausalLM
vocab_size, hidden_size,    required. transformers has defaults for them, those of the 7B model, but always writes
intermediate_size,          them, so a file without them was not written by it
num_hidden_layers,
num_attention_heads,
max_position_embeddings,
rms_norm_eps
num_key_value_heads         required; null means as many as query heads, as in transformers
head_dim                    absent or null: hidden_size / num_attention_heads, which must divide
hidden_act                  absent: silu, the default of transformers; nothing else is known here
rope_theta                  required, at top level (transformers 4) or inside rope_parameters or rope_scaling
                            (transformers 5); where it stands twice the values must agree
rope_type, type             "default" only; one dict per layer type is refused, as transformers' Qwen2 does not take it
tie_word_embeddings         absent: false, the default of transformers; a checkpoint without lm_head.weight is then
                            refused, so the default can not be wrong silently
attention_bias              absent or true: q, k and v have biases, as in every Qwen2; false: they must not be there
use_sliding_window          absent: false, the default of transformers, which then ignores sliding_window. true is
                            refused unless sliding_window is null or covers max_position_embeddings, or
                            max_window_layers covers num_hidden_layers
layer_types                 "full_attention" only, unless the window covers max_position_embeddings
torch_dtype, dtype          absent or null: None, and `Checkpoint` takes the dtype of the weights; both must agree
quantization_config and     refused unless they say "nothing": keys of other architectures and of model surgery that
others in `_NEUTRAL`        change numbers, with the values for which they do not
anything else               accepted, and listed in `ignored_keys`
==========================  ========================================================================================

`save_pretrained` of transformers writes only what differs from the defaults of its base class, which has none of the
required keys: what it saves always loads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .folder import ModelFolder, show

__all__ = ["GenerationDefaults", "Qwen2Config"]

MAX_CONFIG_BYTES = 1 << 20

# Far above any model, and low enough that no size in bytes of a tensor, of all weights or of a full KV cache leaves
# 63 bits. Positions reach the engine's rope as f32, which is exact up to 2^24.
MAX_VOCAB = 1 << 22
MAX_HIDDEN = 1 << 17
MAX_INTERMEDIATE = 1 << 20
MAX_LAYERS = 1024
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12
MAX_POSITIONS = 1 << 24
MAX_PARAMETERS = 1 << 40
MAX_TOKEN_ID = (1 << 31) - 1
MAX_EOS = 1024

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

# Keys that change the numbers of a model, each with the values for which they do not. Any other value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # weights that are not plain numbers, code, or another graph
    "quantization_config": (),
    "compression_config": (),
    "sparsity_config": (),
    "auto_map": ({},),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "vision_config": (),
    "audio_config": (),
    "text_config": (),
    "thinker_config": (),
    # experts
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "num_experts_per_tok": (0,),
    "moe_intermediate_size": (0,),
    "shared_expert_intermediate_size": (0,),
    # rope
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_ratio": (1,),
    "mrope_section": ([],),
    "use_mrope": (False,),
    "use_dynamic_ntk": (False,),
    "rope_local_base_freq": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "position_embedding_type": ("absolute", "rope"),  # "absolute" stood in the base class of old versions
    # attention
    "qkv_bias": (True,),
    "attention_out_bias": (False,),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "use_logn_attn": (False,),
    "attn_logit_softcapping": (0,),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "attention_chunk_size": (0,),
    "attention_sink_size": (0,),
    "dual_chunk_attention_config": ({},),
    "sparse_attention_config": ({},),
    # the rest of the graph
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "use_bias": (False,),
    "bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "final_logit_softcapping": (0,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "normalize_embedding": (False,),
}

# The same for generation_config.json: what would change the tokens and is not implemented.
_NEUTRAL_GENERATION: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "diversity_penalty": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "stop_strings": ([],),
    "max_time": (),
    "dola_layers": (),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json says; without the file or the key, what transformers' GenerationConfig says."""

    do_sample: bool = False
    temperature: float = 1.0
    #: 0: no limit.
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_length: int | None = None
    max_new_tokens: int | None = None
    #: Empty if the file names none; `Qwen2Config.eos_token_ids` is the list to use.
    eos_token_ids: tuple[int, ...] = ()
    ignored_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Qwen2Config:
    """A Qwen2 model in numbers, all of them checked; see the head of the module."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    #: Whether q, k and v have biases.
    attention_bias: bool = True
    #: "f32", "f16" or "bf16"; None if the file does not say (never None in `Checkpoint.config`).
    dtype: str | None = None
    #: Tokens that end a text: those of generation_config.json, else of config.json.
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    #: Keys of config.json that were not looked at.
    ignored_keys: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Numbers in the weights, a tied head counted once."""
        e, q = self.hidden_size, self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        attention = 2 * e * q + 2 * e * kv + (q + 2 * kv if self.attention_bias else 0)
        layer = attention + 3 * e * self.intermediate_size + 2 * e
        head = 0 if self.tie_word_embeddings else self.vocab_size * e
        return self.vocab_size * e + self.num_hidden_layers * layer + e + head

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str] | ModelFolder) -> Qwen2Config:
        """The configuration in a folder (or "tiny"): config.json, and generation_config.json if it is there.

        Raises `CheckpointError`, also for a file above 1 MiB and what `parse_json` and `ModelFolder` refuse.
        """
        folder = path if isinstance(path, ModelFolder) else ModelFolder.locate(path)
        config = folder.read_json("config.json", MAX_CONFIG_BYTES)
        generation = None
        if folder.has("generation_config.json"):
            generation = folder.read_json("generation_config.json", MAX_CONFIG_BYTES)
        return cls.parse(config, generation, folder=folder.path)

    @classmethod
    def parse(
        cls,
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        *,
        folder: str | os.PathLike[str] = "",
    ) -> Qwen2Config:
        """The configuration in two JSON objects; `folder` is for error messages only. Raises `CheckpointError`."""
        keys = _Keys(config, Path(folder) / "config.json")
        keys.choice("model_type", ("qwen2",), required=True)
        architectures = keys.get("architectures")
        if architectures is not None and architectures != ["Qwen2ForCausalLM"]:
            raise keys.error("architectures", "['Qwen2ForCausalLM']", architectures)
        keys.choice("hidden_act", ("silu",))
        for name, neutral in _NEUTRAL.items():
            keys.neutral(name, neutral)

        hidden = keys.integer("hidden_size", 1, MAX_HIDDEN)
        layers = keys.integer("num_hidden_layers", 1, MAX_LAYERS)
        heads = keys.integer("num_attention_heads", 1, MAX_HEADS)
        kv_heads = heads
        if keys.present("num_key_value_heads") is not None:
            kv_heads = keys.integer("num_key_value_heads", 1, MAX_HEADS)
        if heads % kv_heads:
            raise keys.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}", kv_heads)
        head_dim = keys.optional_integer("head_dim", 1, MAX_HEAD_DIM)
        if head_dim is None:
            if hidden % heads:
                raise keys.error("hidden_size", f"a multiple of num_attention_heads, {heads}, without head_dim", hidden)
            head_dim = hidden // heads
        if head_dim % 2 or head_dim > MAX_HEAD_DIM:
            raise keys.error("head_dim", f"an even number of at most {MAX_HEAD_DIM}, as rope rotates halves", head_dim)
        positions = keys.integer("max_position_embeddings", 1, MAX_POSITIONS)
        _check_sliding_window(keys, positions, layers)
        keys.number("attention_dropout", 0.0, 1.0, default=0.0)

        defaults = GenerationDefaults()
        if generation is not None:
            defaults = _parse_generation(_Keys(generation, Path(folder) / "generation_config.json"))
        eos = keys.token_ids("eos_token_id")
        result = cls(
            vocab_size=keys.integer("vocab_size", 1, MAX_VOCAB),
            hidden_size=hidden,
            intermediate_size=keys.integer("intermediate_size", 1, MAX_INTERMEDIATE),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            # Below, eps would vanish in f32; transformers then divides zero rows by zero.
            rms_norm_eps=keys.number("rms_norm_eps", 1e-37, 1.0),
            rope_theta=_rope_theta(keys),
            max_position_embeddings=positions,
            tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
            attention_bias=keys.boolean("attention_bias", True),
            dtype=_dtype(keys),
            eos_token_ids=defaults.eos_token_ids or eos,
            bos_token_id=keys.token_id("bos_token_id"),
            pad_token_id=keys.token_id("pad_token_id"),
            generation=defaults,
            ignored_keys=keys.ignored(),
        )
        if result.num_parameters > MAX_PARAMETERS:
            raise keys.error(
                "vocab_size, hidden_size, ...", f"at most {MAX_PARAMETERS} parameters", result.num_parameters
            )
        return result


class _Keys:
    """A JSON object of which every key is looked at, with typed access; errors name file and key."""

    def __init__(self, values: Mapping[str, Any], file: Path, prefix: str = "") -> None:
        self.values, self.file, self.prefix = values, file, prefix
        self.seen: set[str] = set()

    def error(self, key: str, expected: str, found: Any) -> CheckpointError:
        found = found if isinstance(found, _Absent) else show(found)
        return CheckpointError(file=self.file, field=self.prefix + key, expected=expected, found=found)

    def get(self, key: str) -> Any:
        """The value, None if it is absent."""
        self.seen.add(key)
        return self.values.get(key)

    def present(self, key: str) -> Any:
        """The value, which may be null, of a key that must be there."""
        if key not in self.values:
            raise self.error(key, "a value, as it changes the results", _Absent())
        return self.get(key)

    def ignored(self) -> tuple[str, ...]:
        return tuple(sorted(key for key in self.values if key not in self.seen))

    def neutral(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Refuses any value but null and those of `allowed`."""
        value = self.get(key)
        # True == 1 in Python, not in JSON.
        if value is not None and not any(
            value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed
        ):
            expected = " or ".join(["nothing", *map(show, allowed)]) + ", as it changes the results"
            raise self.error(key, expected, value)

    def choice(self, key: str, allowed: tuple[str, ...], required: bool = False) -> str | None:
        value = self.present(key) if required else self.get(key)
        if value is None and not required:
            return None
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, " or ".join(map(show, allowed)), value)
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.present(key)
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}", value)
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        return None if self.get(key) is None else self.integer(key, low, high)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.present(key) if default is None else self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:  # NaN fails the comparison
            raise self.error(key, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(key, "true or false", value)
        return value

    def token_id(self, key: str) -> int | None:
        """An id that is only handed on; -1 stands for none in some published configs."""
        value = self.optional_integer(key, -1, MAX_TOKEN_ID)
        return None if value == -1 else value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of ids, each once; null for none. Ids beyond the vocabulary can just never be met."""
        value = self.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if len(ids) > MAX_EOS or any(type(i) is not int or not 0 <= i <= MAX_TOKEN_ID for i in ids):
            raise self.error(key, f"an integer from 0 to {MAX_TOKEN_ID}, or at most {MAX_EOS} of them", value)
        return tuple(dict.fromkeys(ids))


class _Absent:
    def __str__(self) -> str:
        return "nothing (the key is missing)"


def _dtype(keys: _Keys) -> str | None:
    names = tuple(_DTYPES)
    new, old = keys.choice("dtype", names), keys.choice("torch_dtype", names)
    if new and old and new != old:
        raise keys.error("torch_dtype", f"the same as dtype, {show(new)}", old)
    name = new or old
    return _DTYPES[name] if name else None


def _rope_theta(keys: _Keys) -> float:
    """rope_theta from wherever transformers 4 and 5 write it, and refusal of every other kind of rope."""
    found: dict[str, float] = {}
    if keys.get("rope_theta") is not None:
        found["rope_theta"] = keys.number("rope_theta", 1.0, 1e12)
    for name in ("rope_parameters", "rope_scaling"):
        value = keys.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise keys.error(name, "an object", value)
        inner = _Keys(value, keys.file, f"{name}.")
        for kind in ("rope_type", "type"):
            inner.choice(kind, ("default",))
        inner.neutral("partial_rotary_factor", (1,))
        if inner.get("rope_theta") is not None:
            found[f"{name}.rope_theta"] = inner.number("rope_theta", 1.0, 1e12)
        for key in inner.ignored():
            if value[key] is not None:
                raise inner.error(show(key).strip("'"), "no such key beside rope_type default", value[key])
    if not found:
        raise keys.error("rope_theta", "a value here or in rope_parameters, as it changes the results", _Absent())
    first, *others = found
    for name in others:
        if found[name] != found[first]:
            raise keys.error(name, f"the same as {first}, {found[first]:g}", found[name])
    return found[first]


def _check_sliding_window(keys: _Keys, positions: int, layers: int) -> None:
    """Refuses sliding window attention unless every query sees all keys all the same."""
    used = keys.boolean("use_sliding_window", False)
    window = keys.optional_integer("sliding_window", 1, MAX_TOKEN_ID)
    first = keys.optional_integer("max_window_layers", 0, MAX_TOKEN_ID)
    if used and "sliding_window" not in keys.values:
        raise keys.error("sliding_window", "a value, as use_sliding_window is true", _Absent())
    covers = window is None or window >= positions
    if used and not covers and (first is None or first < layers):
        expected = (
            f"false, or a sliding_window of at least max_position_embeddings, {positions}, "
            f"or max_window_layers of at least num_hidden_layers, {layers}"
        )
        raise keys.error("use_sliding_window", expected, f"true, {window}, {first}")
    types = keys.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list) or len(types) != layers:
        raise keys.error("layer_types", f"a list of {layers} names", types)
    allowed = ["full_attention"]
    if used and window is not None and covers:
        allowed.append("sliding_attention")
    for index, name in enumerate(types):
        if name not in allowed:
            raise keys.error(f"layer_types[{index}]", " or ".join(allowed), name)


def _parse_generation(keys: _Keys) -> GenerationDefaults:
    for name, neutral in _NEUTRAL_GENERATION.items():
        keys.neutral(name, neutral)
    cache = keys.get("cache_implementation")
    if cache == "quantized":
        raise keys.error("cache_implementation", "a cache that is not quantized", cache)
    base = GenerationDefaults()
    do_sample = keys.boolean("do_sample", base.do_sample)
    temperature = keys.number("temperature", 0.0, 1e4, default=base.temperature)
    if do_sample and temperature == 0:
        raise keys.error("temperature", "a number above 0, as do_sample is true", temperature)
    top_k = keys.optional_integer("top_k", 0, MAX_TOKEN_ID)
    for name in ("bos_token_id", "pad_token_id"):
        keys.token_id(name)
    return GenerationDefaults(
        do_sample=do_sample,
        temperature=temperature,
        top_k=base.top_k if top_k is None else top_k,
        top_p=keys.number("top_p", 0.0, 1.0, default=base.top_p),
        repetition_penalty=keys.number("repetition_penalty", 1e-3, 1e3, default=base.repetition_penalty),
        max_length=keys.optional_integer("max_length", 1, MAX_TOKEN_ID),
        max_new_tokens=keys.optional_integer("max_new_tokens", 1, MAX_TOKEN_ID),
        eos_token_ids=keys.token_ids("eos_token_id"),
        ignored_keys=keys.ignored(),
    )

"""The engines that `llaisys bench model` compares: how each loads a checkpoint and generates from it.

llama.cpp and OpenVINO read formats of their own: a checkpoint is converted once, to the folder of the user's cache in
which the checkpoints of shapes are too. Each engine is set as its documentation says for speed: prompts in batches of
512, the KV cache in 16 bits, no quantisation.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..config import Qwen2Config
from ..errors import InvalidArgumentError
from ..reference import FLOATS
from .measure import installed

#: Generates `count` tokens after a prompt, greedily, and calls `put` of the streamer with the prompt and each token.
Generate = Callable[[list[int], int, Any], None]
_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
#: Room for tokens in an engine that wants to know it before.
CONTEXT = 2560


@dataclass(frozen=True)
class Engine:
    """An engine: the modules that must be installed, and what to install for them; what loads a checkpoint and returns
    `Generate` and the seconds that loading took; what writes the form that it reads, if it is another one; and which
    models it takes."""

    modules: tuple[str, ...]
    packages: str
    load: Callable[[Path, str, int], tuple[Generate, float]]
    convert: Callable[[Path, str, Path], None] | None = None
    suffix: str = ""
    takes: Callable[[Qwen2Config], bool] = lambda config: True

    @property
    def installed(self) -> bool:
        """Whether all modules can be imported, without importing them."""
        return all(installed(module) for module in self.modules)


def cache_folder() -> Path:
    """Where checkpoints and conversions are kept: llaisys/bench in the user's cache, which XDG_CACHE_HOME names."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llaisys" / "bench"


def chosen(names: list[str]) -> tuple[str, ...]:
    """The names of the engines to compare: the native one, then those named, each once. InvalidArgumentError if one is
    unknown or not installed."""
    for name in names:
        if name not in ENGINES:
            raise InvalidArgumentError(f"engine: expected one of {', '.join(ENGINES)}, found {name!r}")
        if not ENGINES[name].installed:
            missing = ENGINES[name].packages
            raise InvalidArgumentError(f"engine: {name} is not installed; run pip install {missing}")
    return tuple(dict.fromkeys(["native", *names]))


def converted(name: str, folder: Path, dtype: str) -> Path:
    """What the engine reads in place of a checkpoint, written if it is not there or older: the checkpoint itself, a
    file or a folder."""
    engine = ENGINES[name]
    if engine.convert is None:
        return folder
    target = cache_folder() / f"{folder.name}.{dtype}{engine.suffix}"
    if target.exists() and target.stat().st_mtime >= (folder / "config.json").stat().st_mtime:
        return target
    partial = target.with_name(f"{target.name}.partial")
    for path in (partial, target):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    engine.convert(folder, dtype, partial)
    partial.rename(target)
    return target


# ----------------------------------------------------- that read checkpoints


def _load_native(folder: Path, dtype: str, threads: int) -> tuple[Generate, float]:
    from ..models import Qwen2

    begin = time.perf_counter()
    model = Qwen2(folder, dtype=dtype, num_threads=threads)
    seconds = time.perf_counter() - begin

    def generate(prompt: list[int], count: int, streamer: Any) -> None:
        model.reset()  # nothing of the last prompt is used again
        model.generate(prompt, count, do_sample=False, eos_token_id=[], streamer=streamer)

    return generate, seconds


def _generate_as_transformers(model: Any) -> Generate:
    import torch

    model.generation_config.eos_token_id = None

    def generate(prompt: list[int], count: int, streamer: Any) -> None:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
                streamer=streamer,
            )  # fmt: skip

    return generate


def _load_transformers(folder: Path, dtype: str, threads: int) -> tuple[Generate, float]:
    import torch
    from transformers import Qwen2ForCausalLM

    torch.set_num_threads(threads)
    begin = time.perf_counter()
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, _TORCH[dtype])).eval()
    return _generate_as_transformers(model), time.perf_counter() - begin


# ------------------------------------------------------------------ OpenVINO


def _to_openvino(folder: Path, dtype: str, target: Path) -> None:
    """By way of optimum-intel. It would compress the weights of large models to 8 bits if nobody forbade it."""
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(
        folder, export=True, compile=False, load_in_8bit=False, torch_dtype=_TORCH[dtype]
    )
    model.save_pretrained(target)


def _load_openvino(path: Path, dtype: str, threads: int) -> tuple[Generate, float]:
    from optimum.intel import OVModelForCausalLM

    settings = {
        "INFERENCE_PRECISION_HINT": dtype,
        "KV_CACHE_PRECISION": dtype,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_NUM_THREADS": str(threads),
        "PERFORMANCE_HINT": "LATENCY",
        "CACHE_DIR": "",
    }
    begin = time.perf_counter()
    model = OVModelForCausalLM.from_pretrained(path, ov_config=settings)
    return _generate_as_transformers(model), time.perf_counter() - begin


# ----------------------------------------------------------------- llama.cpp


def _to_gguf(folder: Path, dtype: str, target: Path) -> None:
    """As convert_hf_to_gguf.py of llama.cpp does: matrices in `dtype`, vectors in f32. No tokenizer."""
    import gguf
    import numpy as np

    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in checkpoint.tensors():
        key = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if tensor.ndim == 1:
            writer.add_tensor(key, tensor.astype(np.float32))
        elif dtype == "bf16":  # which numpy has no name for that gguf would know
            data = tensor.astype(FLOATS[dtype]).view(np.uint8)
            writer.add_tensor(key, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(key, tensor.astype(FLOATS[dtype]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _load_llama_cpp(path: Path, dtype: str, threads: int) -> tuple[Generate, float]:
    """With flash attention, and keys and values in f16 for weights in bf16 too. On Zen 5 a prompt of 512 tokens of the
    shape 0.5B in bf16 took it 594 tokens per second so, 530 without flash attention, 445 with both in bf16."""
    import llama_cpp

    begin = time.perf_counter()
    model = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512,
        flash_attn=True, verbose=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begin

    def generate(prompt: list[int], count: int, streamer: Any) -> None:
        model.reset()
        streamer.put(prompt)
        tokens = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        for _ in range(count):
            streamer.put(next(tokens))

    return generate, seconds


def _heads_fill_hidden(config: Qwen2Config) -> bool:
    """llama.cpp refuses other models of this kind, the embedded one among them."""
    return config.num_attention_heads * config.head_dim == config.hidden_size


ENGINES = {
    "native": Engine((), "llaisys", _load_native),
    "transformers": Engine(("torch", "transformers"), "torch transformers", _load_transformers),
    "openvino": Engine(("openvino", "optimum"), "openvino optimum-intel", _load_openvino, _to_openvino, ".openvino"),
    "llama.cpp": Engine(
        ("llama_cpp", "gguf"), "llama-cpp-python gguf", _load_llama_cpp, _to_gguf, ".gguf", _heads_fill_hidden
    ),
}

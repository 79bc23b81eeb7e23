"""The engines that `llaisys bench model` compares: how each loads a checkpoint and generates from it.

llama.cpp and OpenVINO read formats of their own: a checkpoint is converted once, to the folder of the user's cache in
which the checkpoints of shapes are too. Nothing is quantised, and each engine is set as suits it best.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..config import Qwen2Config
from ..errors import InvalidArgumentError
from ..reference import FLOATS
from .measure import installed

#: Generates `count` tokens after a prompt, greedily, and calls `put` of the streamer with the prompt and each token.
Generate = Callable[[list[int], int, Any], None]
#: Loads for a dtype, so many threads and sequences of so many tokens; also the seconds that it took.
Load = Callable[[Path, str, int, int], tuple[Generate, float]]
_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def _nothing(config: Qwen2Config, dtype: str) -> str:
    return ""


@dataclass(frozen=True)
class Engine:
    """An engine: the modules that must be installed, and what to install for them; what loads a checkpoint; what writes
    the form that it reads, if that is another one, by which distribution, with which suffix; and why it does not take
    a model in a dtype ("" if it does)."""

    modules: tuple[str, ...]
    packages: str
    load: Load
    convert: Callable[[Path, str, Path], None] | None = None
    converter: str = ""
    suffix: str = ""
    refuses: Callable[[Qwen2Config, str], str] = _nothing

    @property
    def installed(self) -> bool:
        """Whether all modules can be imported, without importing them."""
        return all(installed(module) for module in self.modules)


def cache_folder() -> Path:
    """Where checkpoints and conversions are kept: llaisys/bench in the user's cache, which XDG_CACHE_HOME names."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llaisys" / "bench"


def chosen(names: list[str]) -> tuple[str, ...]:
    """The names of the engines to compare: the native one, transformers if it is installed, and those named, each once.
    InvalidArgumentError if one of these is unknown or not installed."""
    for name in names:
        if name not in ENGINES:
            raise InvalidArgumentError(f"engine: expected one of {', '.join(ENGINES)}, found {name!r}")
        if not ENGINES[name].installed:
            missing = ENGINES[name].packages
            raise InvalidArgumentError(f"engine: {name} is not installed; run pip install {missing}")
    default = [name for name in COMPARED if ENGINES[name].installed]
    return tuple(dict.fromkeys([*default, *names]))


def readable(name: str, folder: Path, dtype: str) -> Path:
    """What the engine reads in place of a checkpoint: the checkpoint itself, or a file or folder that `convert` writes.
    It is another one for each version of the converter."""
    engine = ENGINES[name]
    if engine.convert is None:
        return folder
    version = importlib.metadata.version(engine.converter)
    return cache_folder() / f"{folder.name}.{dtype}.{engine.converter}-{version}{engine.suffix}"


def convert(name: str, folder: Path, dtype: str) -> Path:
    """`readable`, written if it is not there or older than the checkpoint."""
    engine, target = ENGINES[name], readable(name, folder, dtype)
    if engine.convert is None:
        return target
    if target.exists() and target.stat().st_mtime >= (folder / "config.json").stat().st_mtime:
        return target
    cache_folder().mkdir(parents=True, exist_ok=True)
    # A folder of this process alone: others may convert the same, and what ends halfway must not be taken for whole.
    with tempfile.TemporaryDirectory(prefix="partial-", dir=cache_folder()) as own:
        partial = Path(own) / target.name
        engine.convert(folder, dtype, partial)
        if target.is_dir():
            shutil.rmtree(target)
        try:
            partial.replace(target)
        except OSError:  # another process has put its folder there meanwhile
            if not target.is_dir():
                raise
    return target


# ----------------------------------------------------- that read checkpoints


def _load_native(folder: Path, dtype: str, threads: int, room: int) -> tuple[Generate, float]:
    from ..models import Qwen2

    begin = time.perf_counter()
    model = Qwen2(folder, dtype=dtype, num_threads=threads)
    seconds = time.perf_counter() - begin

    def generate(prompt: list[int], count: int, streamer: Any) -> None:
        # No reset: random prompts share no beginning worth using again, and the other engines keep their memory too.
        model.generate(prompt, count, do_sample=False, eos_token_id=[], streamer=streamer)

    return generate, seconds


def _load_transformers(folder: Path, dtype: str, threads: int, room: int) -> tuple[Generate, float]:
    import torch
    from transformers import Qwen2ForCausalLM

    torch.set_num_threads(threads)
    begin = time.perf_counter()
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, _TORCH[dtype])).eval()
    seconds = time.perf_counter() - begin
    model.generation_config.eos_token_id = None

    def generate(prompt: list[int], count: int, streamer: Any) -> None:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
                streamer=streamer,
            )  # fmt: skip

    return generate, seconds


# ------------------------------------------------------------------ OpenVINO


def _to_openvino(folder: Path, dtype: str, target: Path) -> None:
    """By way of optimum-intel. It would compress the weights of large models to 8 bits if nobody forbade it."""
    from optimum.intel import OVModelForCausalLM

    tempfile.tempdir = str(target.parent)  # where it puts all of the model first
    model = OVModelForCausalLM.from_pretrained(
        folder, export=True, compile=False, load_in_8bit=False, torch_dtype=_TORCH[dtype]
    )
    model.save_pretrained(target)


def _no_such_arithmetic(config: Qwen2Config, dtype: str) -> str:
    """OpenVINO takes another type, and does not say so, where the processor lacks what it is asked for."""
    import openvino

    name = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}[dtype]
    found = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "" if name in found else f"expected {name} among what it computes with on this processor, found {found}"


def _load_openvino(path: Path, dtype: str, threads: int, room: int) -> tuple[Generate, float]:
    """Without optimum-intel, whose `generate` takes 1 ms a token by itself, and with logits of the last position only,
    as its own pipelines have them and the other engines too. Of 0.5B, 512 tokens then took 0.9 s of processor time in
    place of 1.4."""
    import openvino
    from openvino import opset13

    settings = {
        "INFERENCE_PRECISION_HINT": dtype,
        "KV_CACHE_PRECISION": dtype,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_NUM_THREADS": str(threads),
        "PERFORMANCE_HINT": "LATENCY",
    }
    begin = time.perf_counter()
    core = openvino.Core()
    model = core.read_model(path / "openvino_model.xml")
    head = model.get_results()[0].input_value(0).get_node()
    first, last, one = (opset13.constant([number], np.int64) for number in (-1, np.iinfo(np.int64).max, 1))
    hidden = opset13.slice(head.input_value(0), first, last, one, one)
    head.input(0).replace_source_output(hidden.output(0))
    model.validate_nodes_and_infer_types()
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    seconds = time.perf_counter() - begin

    def generate(prompt: list[int], count: int, streamer: Any) -> None:
        request.reset_state()
        streamer.put(prompt)
        tokens, length = np.array([prompt], np.int64), 0
        for _ in range(count):
            places = np.arange(length, length + tokens.shape[1])[None]
            length += tokens.shape[1]
            inputs = {"input_ids": tokens, "position_ids": places, "attention_mask": np.ones((1, length), np.int64)}
            request.infer({**inputs, "beam_idx": np.zeros(1, np.int32)})
            tokens = request.get_output_tensor(0).data[:, -1].argmax(-1)[:, None]
            streamer.put(tokens)

    return generate, seconds


# ----------------------------------------------------------------- llama.cpp


def _to_gguf(folder: Path, dtype: str, target: Path) -> None:
    """As convert_hf_to_gguf.py of llama.cpp does: matrices in `dtype`, vectors in f32. No tokenizer."""
    import gguf

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
    keys = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    raw = gguf.GGMLQuantizationType.BF16  # a type that numpy has no name for

    def stored(shape: tuple[int, ...]) -> np.dtype[Any]:
        return np.dtype(np.float32) if len(shape) == 1 else FLOATS[dtype]

    # First what there is, then one tensor at a time, so that the model is not in memory as a whole.
    for name in checkpoint.names():
        key = keys.get_name(name, try_suffixes=(".weight", ".bias"))
        shape = checkpoint.shape_of(name)
        kind, nbytes = stored(shape), stored(shape).itemsize * int(np.prod(shape))
        bf16 = kind == FLOATS["bf16"]
        writer.add_tensor_info(key, shape, np.dtype(np.float16) if bf16 else kind, nbytes, raw if bf16 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        writer.write_tensor_data(tensor.astype(stored(tensor.shape)).view(np.uint8))
    writer.close()


def _load_llama_cpp(path: Path, dtype: str, threads: int, room: int) -> tuple[Generate, float]:
    """With flash attention, and keys and values in f16 for weights in bf16 too. On Zen 5 it took 512 tokens of 0.5B in
    bf16 at 594 tokens per second so, at 530 without flash attention, at 445 with keys and values in bf16."""
    import llama_cpp

    kv = llama_cpp.GGML_TYPE_F32 if dtype == "f32" else llama_cpp.GGML_TYPE_F16

    begin = time.perf_counter()
    model = llama_cpp.Llama(
        str(path), n_ctx=room, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512,
        flash_attn=True, type_k=kv, type_v=kv, verbose=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begin

    def generate(prompt: list[int], count: int, streamer: Any) -> None:
        model.reset()
        streamer.put(prompt)
        tokens = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        for _ in range(count):
            streamer.put(next(tokens))

    return generate, seconds


def _heads_beside_hidden(config: Qwen2Config, dtype: str) -> str:
    """The embedded model is such a one."""
    wide = config.num_attention_heads * config.head_dim
    return (
        ""
        if wide == config.hidden_size
        else f"expected heads as wide as hidden_size {config.hidden_size}, found {wide}"
    )


ENGINES = {
    "native": Engine((), "llaisys", _load_native),
    "transformers": Engine(("torch", "transformers"), "torch transformers", _load_transformers),
    "openvino": Engine(
        ("openvino", "optimum.intel"),
        "openvino optimum-intel",
        _load_openvino,
        _to_openvino,
        "optimum-intel",
        ".openvino",
        _no_such_arithmetic,
    ),
    "llama.cpp": Engine(
        ("llama_cpp", "gguf"),
        "llama-cpp-python gguf",
        _load_llama_cpp,
        _to_gguf,
        "gguf",
        ".gguf",
        _heads_beside_hidden,
    ),
}
#: What is compared unless others are named.
COMPARED = ("native", "transformers")

"""Whole models beside transformers and other engines: prefill, decode, loading and memory.

The checkpoints have the shapes of Qwen2 and random weights; they are made once, in a folder of the user's cache. Each
engine runs in processes of its own, which take turns, so that all meet the same state of the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .. import _lib
from .._processes import start_worker
from ..checkpoint import Checkpoint
from ..config import Qwen2Config
from ..errors import InternalError
from ..reference import FLOATS
from ..reference.ops.self_attention import visible_pairs
from ..reference.spec import QWEN2_SIZES
from .cases import Repeating
from .engines import COMPARED, ENGINES, cache_folder, readable
from .measure import last_level_cache
from .roof import Roofs

PREFILL = (128, 512, 2048)
DECODE = (128, 2048)
#: Tokens that are decoded after each of DECODE.
NEW_TOKENS = 24
SIZES = ("tiny", *QWEN2_SIZES)
_LAYERS = {"0.5B": 24, "1.5B": 28}
_TIED = {"0.5B": True, "1.5B": False}
_SHARD_LAYERS = 6


def say_nothing(text: str) -> None:
    """What is told of the progress if nobody wants to know."""


# ------------------------------------------------------------- checkpoints


def config_of(size: str) -> dict[str, Any]:
    """config.json of a shape."""
    sizes = QWEN2_SIZES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": sizes["V"],
        "hidden_size": sizes["E"],
        "intermediate_size": sizes["F"],
        "num_hidden_layers": _LAYERS[size],
        "num_attention_heads": sizes["H"],
        "num_key_value_heads": sizes["K"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": _TIED[size],
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def make_checkpoint(size: str, say: Callable[[str], None] = say_nothing) -> Path:
    """The folder of a shape with random bf16 weights, written if it is not there, or "tiny", which is."""
    if size == "tiny":
        return Checkpoint.open("tiny").path
    folder = cache_folder() / f"qwen2-{size}-bf16"
    if (folder / "config.json").is_file():
        return folder
    say(f"writing random weights of the shape {size} to {folder}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_weights(partial, config_of(size))
    (partial / "config.json").write_text(json.dumps(config_of(size), indent=1))
    partial.rename(folder)
    return folder


def _write_weights(folder: Path, config: dict[str, Any]) -> None:
    """Shards of a few layers each, so that the memory this takes is bounded, and their index."""
    from safetensors.numpy import save_file

    rng = Repeating(np.random.PCG64(0))
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    cached = hidden // config["num_attention_heads"] * config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> np.ndarray[Any, Any]:
        # Scaled so that activations stay near 1 through all layers.
        weight = rng.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)
        return weight.astype(FLOATS["bf16"])

    def vector(size: int, mean: float) -> np.ndarray[Any, Any]:
        return (mean + rng.standard_normal(size, np.float32) / 4).astype(FLOATS["bf16"])

    def layer(i: int) -> dict[str, np.ndarray[Any, Any]]:
        name = f"model.layers.{i}."
        heads = {"q_proj": hidden, "k_proj": cached, "v_proj": cached}
        return {
            f"{name}input_layernorm.weight": vector(hidden, 1),
            f"{name}post_attention_layernorm.weight": vector(hidden, 1),
            **{f"{name}self_attn.{head}.weight": matrix(rows, hidden) for head, rows in heads.items()},
            **{f"{name}self_attn.{head}.bias": vector(rows, 0) for head, rows in heads.items()},
            f"{name}self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{name}mlp.gate_proj.weight": matrix(inner, hidden),
            f"{name}mlp.up_proj.weight": matrix(inner, hidden),
            f"{name}mlp.down_proj.weight": matrix(hidden, inner),
        }

    parts: list[Callable[[], dict[str, np.ndarray[Any, Any]]]] = [
        lambda: {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": vector(hidden, 1)}
    ]
    if not config["tie_word_embeddings"]:
        parts.append(lambda: {"lm_head.weight": matrix(vocab, hidden)})
    layers = range(config["num_hidden_layers"])
    for first in layers[::_SHARD_LAYERS]:
        some = layers[first : first + _SHARD_LAYERS]
        parts.append(lambda some=some: {k: x for i in some for k, x in layer(i).items()})  # type: ignore[misc]
    where: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts):
        tensors = part()
        file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


# --------------------------------------------------------------- measuring


@dataclass(frozen=True)
class ModelRuns:
    """What the processes of each engine said, by engine (see `llaisys.bench.worker`), and the roof of memory reads, the
    median of measurements between them."""

    size: str
    dtype: str
    config: Qwen2Config
    processes: dict[str, list[dict[str, Any]]]
    read_roof: float

    def times(self, engine: str, case: str) -> list[float]:
        """All times of a case in seconds: of a prompt, of one token, or of loading."""
        return [seconds for process in self.processes[engine] for seconds in process["seconds"][case]]

    def row(self, engine: str, case: str, roofs: Roofs) -> dict[str, Any]:
        """The figures of one engine in one case, for JSON and tables."""
        seconds = median(self.times(engine, case))
        row: dict[str, Any] = {
            "op": "model",
            "model": self.size,
            "case": case,
            "dtype": self.dtype,
            "implementation": engine,
            "threads": roofs.threads,
            "isa": _lib.isa(),
        }
        what, _, count = case.partition(" ")
        if what == "load":
            rss = max(process["peak_rss_bytes"] for process in self.processes[engine])
            weights = self.config.num_parameters * FLOATS[self.dtype].itemsize
            limit = 1.05 * weights + self._kv(max(*PREFILL, *DECODE) + NEW_TOKENS) + (150 << 20)
            row |= {
                "load_seconds": seconds,
                "peak_rss_gib": rss / 2**30,
                "weights_gib": weights / 2**30,
                "rss_limit_percent": 100 * rss / limit,
            }
        else:
            tokens = int(count)
            row |= {"phase": what, "tokens_per_second": (tokens if what == "prefill" else 1) / seconds}
            row |= self._shares(what, tokens, seconds, roofs)
        for other in self.processes if engine == "native" else ():
            if other != engine:
                row[f"speed_relative_to_{other}"] = median(self.times(other, case)) / seconds
        return row

    def _kv(self, tokens: int) -> int:
        """Bytes of the KV cache of so many tokens, of which there are no more than the model has room for."""
        c = self.config
        tokens = min(tokens, c.max_position_embeddings)
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * tokens * FLOATS[self.dtype].itemsize

    def _shares(self, what: str, tokens: int, seconds: float, roofs: Roofs) -> dict[str, Any]:
        """Bytes and operations that one token after `tokens`, or a prompt of them, needs; and their shares."""
        c, itemsize = self.config, FLOATS[self.dtype].itemsize
        embedding = c.vocab_size * c.hidden_size
        matrices = c.num_parameters - (embedding if c.tie_word_embeddings else 2 * embedding)
        rows = 1 if what == "decode" else tokens
        pairs = visible_pairs({"T": rows, "S": tokens})
        attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
        flops = 2 * (rows * matrices + embedding) + attention
        nbytes = (matrices + embedding) * itemsize + self._kv(tokens)
        unit, most = roofs.unit(_lib.isa(), self.dtype)
        read, compute = nbytes / self.read_roof / seconds, flops / most / seconds
        return {
            "flops": flops,
            "bytes": nbytes,
            "read_roof_gbytes_per_second": self.read_roof / 1e9,
            "gbytes_per_second": nbytes / seconds / 1e9,
            "gflops": flops / seconds / 1e9,
            "roof": unit if compute > read else "read" if nbytes > last_level_cache() else "cache",
            "roof_percent": 100 * max(read, compute),
        }


def cases_of(config: Qwen2Config) -> list[str]:
    """What is measured of a model: all that it has room for."""
    most = config.max_position_embeddings
    cases = [f"prefill {n}" for n in PREFILL if n <= most]
    return [*cases, *(f"decode {n}" for n in DECODE if n + NEW_TOKENS <= most), "load"]


def refusals(
    size: str, dtype: str, engines: tuple[str, ...], say: Callable[[str], None] = say_nothing
) -> dict[str, str]:
    """Which of the engines that are installed do not take a model in a dtype, and why."""
    config = Checkpoint.open(make_checkpoint(size, say)).config
    reasons = {name: ENGINES[name].refuses(config, dtype) for name in engines if ENGINES[name].installed}
    return {name: reason for name, reason in reasons.items() if reason}


@cache
def run_model(
    size: str,
    dtype: str,
    threads: int,
    rounds: int = 3,
    say: Callable[[str], None] = say_nothing,
    engines: tuple[str, ...] = COMPARED,
) -> ModelRuns:
    """Run the processes of the engines in turns, `rounds` of each; those that are not installed are left out. All must
    take such a model (see `refusals`)."""
    folder = make_checkpoint(size, say)
    config = Checkpoint.open(folder).config
    engines = tuple(name for name in engines if ENGINES[name].installed)
    for engine in engines:
        if ENGINES[engine].convert is not None:
            say(f"model {size} {dtype}: converting it for {engine}")
            _process(engine, folder, dtype, threads, [])
    for engine in engines:  # once from the disk, so that all find it in the page cache
        source = readable(engine, folder, dtype)
        for path in filter(Path.is_file, source.iterdir()) if source.is_dir() else [source]:
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass
    processes: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    read: list[float] = []
    for number in range(rounds):
        read.append(_lib.measure_roof("read", 0.1))
        for engine in engines:
            say(f"model {size} {dtype}: {engine}, process {number + 1} of {rounds}")
            _take_memory(config.num_parameters * FLOATS[dtype].itemsize)
            processes[engine].append(_process(engine, folder, dtype, threads, cases_of(config)))
    return ModelRuns(size, dtype, config, processes, median(read))


def _take_memory(nbytes: int) -> None:
    """Use so much memory and give it back. A virtual machine hands free memory back to its host, and to take it again
    costs more than to load a model: 3.8 s in place of 0.35 for the shape 1.5B after 20 s of nothing."""
    np.empty(nbytes, np.uint8)[::4096] = 0


def _process(engine: str, folder: Path, dtype: str, threads: int, cases: list[str]) -> dict[str, Any]:
    arguments = (engine, str(folder), dtype, str(threads), *cases)
    pipes: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    lives, kept = os.pipe()  # nothing is written: its end tells the worker that this process has ended
    try:
        environment = {"LLAISYS_ISA": _lib.isa()}
        worker = start_worker(
            f"{__package__}.worker", *arguments, environment=environment, stdin=lives, text=True, **pipes
        )
        output, errors = worker.communicate()
    finally:
        os.close(lives)
        os.close(kept)
    if worker.returncode:
        said = (errors.strip() or "nothing").splitlines()[-1]
        expected = "figures" if cases else f"a conversion to {readable(engine, folder, dtype)}"
        raise InternalError(
            f"model {folder.name}: {engine}: expected {expected}, found exit status {worker.returncode}: {said}"
        )
    return dict(json.loads(output.splitlines()[-1])) if cases else {}


def measure_model(
    size: str,
    dtype: str,
    roofs: Roofs,
    rounds: int,
    say: Callable[[str], None] = say_nothing,
    engines: tuple[str, ...] = COMPARED,
) -> list[dict[str, Any]]:
    """The rows of a model in a dtype: every case, with every engine."""
    runs = run_model(size, dtype, roofs.threads, rounds, say, engines)
    return [runs.row(engine, case, roofs) for case in cases_of(runs.config) for engine in runs.processes]

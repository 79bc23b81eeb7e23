"""Engines that `llaisys bench model` compares with: conversions, and how each is asked to generate.

llama.cpp and OpenVINO take minutes to install: modules of their names stand in for them here, which note what they are
asked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import make_checkpoint
from llaisys.bench import engines, models, report
from llaisys.checkpoint import Checkpoint
from llaisys.errors import InternalError, InvalidArgumentError
from llaisys.reference import FLOATS
from test_bench import hiding
from test_cli import run

LLAMA_CPP = """
class Llama:
    def __init__(self, path, **settings):
        assert path.endswith(".gguf") and open(path, "rb").read(4) == b"GGUF"
        assert settings["n_threads"] == settings["n_threads_batch"] == 1 and settings["n_ctx"] > 2048
    def reset(self):
        pass
    def generate(self, tokens, temp, repeat_penalty):
        assert temp == 0 and repeat_penalty == 1
        while True:
            yield len(tokens)
"""
OPTIMUM = """
import pathlib
from types import SimpleNamespace
class OVModelForCausalLM:
    generation_config = SimpleNamespace(eos_token_id=1)
    @classmethod
    def from_pretrained(cls, path, **how):
        model = cls()
        if how.get("export"):
            assert how["load_in_8bit"] is False and how["torch_dtype"] == "float16"
        else:
            assert (path / "openvino_model.bin").is_file()
            assert how["ov_config"]["INFERENCE_PRECISION_HINT"] == "f16"
            assert how["ov_config"]["INFERENCE_NUM_THREADS"] == "1"
        return model
    def save_pretrained(self, path):
        path.mkdir()
        (path / "openvino_model.bin").write_bytes(b"")
    def generate(self, ids, attention_mask, max_new_tokens, do_sample, pad_token_id, streamer):
        assert self.generation_config.eos_token_id is None and not do_sample
        for _ in range(1 + max_new_tokens):
            streamer.put(ids)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, and stand-ins for the engines in the processes that are started."""
    for name, text in {"llama_cpp": LLAMA_CPP, "openvino": "", "optimum": "", "optimum/intel": OPTIMUM}.items():
        folder = tmp_path / "modules" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = os.pathsep.join([str(tmp_path / "modules"), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return engines.cache_folder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint that llama.cpp takes."""
    path = tmp_path_factory.mktemp("model") / "small"
    make_checkpoint(path, dtype="bf16", hidden_size=48, head_dim=8)
    return path


@pytest.mark.parametrize("dtype", FLOATS)
def test_gguf(dtype: str, folder: Path, tmp_path: Path) -> None:
    """Every weight is there, under llama.cpp's name; matrices in the dtype asked for, vectors in f32."""
    gguf = pytest.importorskip("gguf")
    engines._to_gguf(folder, dtype, tmp_path / "small.gguf")
    file = gguf.GGUFReader(tmp_path / "small.gguf")
    checkpoint = Checkpoint.open(folder)
    found = {tensor.name: tensor for tensor in file.tensors}
    assert len(found) == len(checkpoint.names())
    ours = {
        "blk.1.attn_k.bias": "model.layers.1.self_attn.k_proj.bias",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
    }
    for theirs, name in ours.items():
        want = checkpoint.tensor(name)
        want = want.astype(FLOATS[dtype] if want.ndim == 2 else np.float32)
        tensor = found[theirs]
        assert tuple(tensor.shape) == want.shape[::-1]  # the fastest axis first
        assert tensor.tensor_type.name.lower() == (dtype if want.ndim == 2 else "f32")
        assert tensor.data.tobytes() == want.tobytes()
    config = checkpoint.config
    sizes = {"block_count": config.num_hidden_layers, "attention.head_count_kv": config.num_key_value_heads}
    for key, value in {**sizes, "rope.freq_base": config.rope_theta, "vocab_size": config.vocab_size}.items():
        assert file.fields[f"qwen2.{key}"].contents() == pytest.approx(value)


def test_a_conversion_is_made_once(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again for a checkpoint that is younger; one that fails leaves nothing that would be taken for it."""
    made: list[Path] = []

    def convert(source: Path, dtype: str, target: Path) -> None:
        made.append(target)
        target.write_text(dtype)
        if len(made) == 2:
            raise OSError("no space left")

    monkeypatch.setitem(engines.ENGINES, "other", engines.Engine((), "", engines._load_native, convert, ".other"))
    path = engines.converted("other", folder, "f16")
    assert path == cache / "small.f16.other" and path.read_text() == "f16"
    assert engines.converted("other", folder, "f16") == path and len(made) == 1
    os.utime(path, (0, 0))
    with pytest.raises(OSError, match="no space left"):
        engines.converted("other", folder, "f16")
    assert not path.exists()
    assert engines.converted("other", folder, "f16") == path and len(made) == 3 and list(cache.iterdir()) == [path]


@pytest.mark.parametrize(("engine", "dtype"), [("llama.cpp", "bf16"), ("openvino", "f16"), ("transformers", "f32")])
def test_a_process(engine: str, dtype: str, cache: Path, folder: Path) -> None:
    """A process of each engine converts, another one measures."""
    if engine == "llama.cpp":
        pytest.importorskip("gguf")
    assert models._process(engine, folder, dtype, 1, []) == {}
    assert len(list(cache.glob("small.*"))) == (engine != "transformers")
    found = models._process(engine, folder, dtype, 1, ["prefill 16", "decode 8"])
    assert set(found["seconds"]) == {"load", "prefill 16", "decode 8"}
    # The prompt and the first token do not count, and between the others there is a time less than tokens.
    assert len(found["seconds"]["decode 8"]) % (models.NEW_TOKENS - 2) == 0 and found["seconds"]["prefill 16"]


def test_an_engine_that_fails(cache: Path, folder: Path, tmp_path: Path) -> None:
    """The error names the engine and says what it said."""
    (tmp_path / "modules" / "llama_cpp" / "__init__.py").write_text("raise RuntimeError('no such processor')")
    pytest.importorskip("gguf")
    with pytest.raises(InternalError, match="model small: llama.cpp: .*no such processor"):
        models._process("llama.cpp", folder, "bf16", 1, ["prefill 16"])


def test_which_engines(cache: Path) -> None:
    assert engines.chosen(["openvino", "native", "openvino"]) == ("native", "openvino")
    with pytest.raises(InvalidArgumentError, match="expected one of native, transformers, openvino, .* found 'vllm'"):
        engines.chosen(["vllm"])
    tiny, large = Checkpoint.open("tiny").config, models.config_of("1.5B")
    assert not engines.ENGINES["llama.cpp"].takes(tiny) and engines.ENGINES["openvino"].takes(tiny)
    assert large["hidden_size"] == large["num_attention_heads"] * 128


def test_engines_of_the_command_line(tmp_path: Path) -> None:
    for args, status, text in (
        (["model", "--engine", "vllm"], 1, "engine: expected one of native"),
        (["add", "--engine", "transformers"], 2, "expected model among the names"),
    ):
        done = run("bench", *args, env={"COLUMNS": "200"})
        assert done.returncode == status and text in done.stderr.decode() and b"Traceback" not in done.stderr
    command = [sys.executable, "-m", "llaisys", "bench", "model", "--engine", "openvino"]
    hidden = hiding(tmp_path, "openvino")
    done_without = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)
    assert done_without.returncode == 1
    assert "openvino is not installed; run pip install openvino optimum-intel" in done_without.stderr


def test_a_table_of_several_engines() -> None:
    """Side by side, and how many times as fast as the fastest of the others the native one is."""

    def row(engine: str, rate: float, **more: Any) -> dict[str, Any]:
        same = {"op": "model", "model": "0.5B", "case": "decode 128", "dtype": "bf16", "phase": "decode"}
        return {**same, "implementation": engine, "tokens_per_second": rate, "roof": "read", "roof_percent": 90, **more}

    ratios = {"speed_relative_to_transformers": 4.0, "speed_relative_to_llama.cpp": 2.0}
    rows = [row("native", 40.0, **ratios), row("transformers", 10.0), row("llama.cpp", 20.0)]
    data = {"llaisys": "0", "machine": {"roofs": {"read": 1.0}, "threads": 2}, "rows": rows}
    table = report.figures(data)[-1]
    assert table.columns == ["", "dtype", "native", "transformers", "llama.cpp", "x", "of the roof"]
    assert table.lines == [["0.5B decode 128, tok/s", "bf16", "40.0", "10.0", "20.0", "2.00", "90% read"]]

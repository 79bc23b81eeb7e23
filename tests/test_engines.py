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
GGML_TYPE_F32, GGML_TYPE_F16 = "f32", "f16"
class Llama:
    def __init__(self, path, **settings):
        assert open(path, "rb").read(4) == b"GGUF"
        assert settings == dict(
            n_ctx=40, n_threads=1, n_threads_batch=1, n_batch=512, n_ubatch=512, flash_attn=True, verbose=False,
            type_k="f32" if ".f32." in path else "f16", type_v="f32" if ".f32." in path else "f16",
        )
        self.fresh = False
    def reset(self):
        self.fresh = True
    def generate(self, tokens, temp, repeat_penalty):
        assert self.fresh and temp == 0 and repeat_penalty == 1
        self.fresh = False
        while True:
            yield len(tokens)
"""
# Logits of all positions, of which the last one's are asked for: the largest is at the position of the last token.
OPENVINO = """
import numpy
from types import SimpleNamespace as Of
class Node:
    def __init__(self, inputs): self.inputs = inputs
    def input_value(self, i): return Of(get_node=lambda: self.inputs[i], node=self.inputs[i])
    def input(self, i): return Of(replace_source_output=lambda output: self.inputs.__setitem__(i, output))
    def output(self, i): return self
class Model:
    def __init__(self): self.head = Node([Node([])])
    def get_results(self): return [Node([self.head])]
    def validate_nodes_and_infer_types(self): assert self.head.inputs[0].inputs[1:] == [[-1], [2**63 - 1], [1], [1]]
class Request:
    def reset_state(self): self.length = 0
    def infer(self, inputs):
        rows, tokens = inputs["input_ids"].shape
        assert rows == 1 and inputs["position_ids"].tolist() == [list(range(self.length, self.length + tokens))]
        self.length += tokens
        assert inputs["attention_mask"].tolist() == [[1] * self.length] and inputs["beam_idx"].tolist() == [0]
    def get_output_tensor(self, i): return Of(data=numpy.arange(67)[None, None] == self.length)
class Core:
    def get_property(self, device, name): return ["FP32", "BF16"]
    def read_model(self, path):
        assert path.is_file()
        return Model()
    def compile_model(self, model, device, settings):
        model.validate_nodes_and_infer_types()
        assert settings == {
            "INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "INFERENCE_NUM_THREADS": "1", "PERFORMANCE_HINT": "LATENCY",
        }
        return Of(create_infer_request=Request)
opset13 = Of(constant=lambda value, dtype: value, slice=lambda *inputs: Node(list(inputs)))
"""
OPTIMUM = """
class OVModelForCausalLM:
    @classmethod
    def from_pretrained(cls, path, **how):
        assert how == dict(export=True, compile=False, load_in_8bit=False, torch_dtype="bfloat16")
        return cls()
    def save_pretrained(self, path):
        path.mkdir()
        (path / "openvino_model.xml").write_bytes(b"")
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, and stand-ins for the engines in the processes that are started."""
    modules = {"llama_cpp": LLAMA_CPP, "openvino": OPENVINO, "optimum": "", "optimum/intel": OPTIMUM}
    for name, text in modules.items():
        folder = tmp_path / "modules" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text)
    about = tmp_path / "modules" / "optimum_intel-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: optimum-intel\nVersion: 0.1\n")
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
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    assert {f"qwen2.{key}" for key in fields} == {key for key in file.fields if key.startswith("qwen2.")}
    for key, value in fields.items():
        assert file.fields[f"qwen2.{key}"].contents() == pytest.approx(value)


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_conversion_is_made_once(
    whole_folder: bool, cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again for a checkpoint that is younger; one that fails leaves nothing, and not the disk full."""
    made: list[Path] = []

    def write(source: Path, dtype: str, target: Path) -> None:
        made.append(target)
        if whole_folder:
            target.mkdir()
            target = target / f"file {len(made)}"
        target.write_text(dtype)
        if len(made) == 2:
            raise OSError("no space left")

    other = engines.Engine((), "", engines._load_native, write, "numpy", ".other")
    monkeypatch.setitem(engines.ENGINES, "other", other)
    path = engines.convert("other", folder, "f16")
    assert path == cache / f"small.f16.numpy-{np.__version__}.other" == engines.readable("other", folder, "f16")
    assert engines.convert("other", folder, "f16") == path and len(made) == 1
    os.utime(path, (0, 0))
    with pytest.raises(OSError, match="no space left"):
        engines.convert("other", folder, "f16")
    assert list(cache.iterdir()) == [path]
    assert engines.convert("other", folder, "f16") == path and len(made) == 3 and list(cache.iterdir()) == [path]
    assert [x.name for x in path.iterdir()] == ["file 3"] if whole_folder else path.read_text() == "f16"


def test_conversions_at_the_same_time(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another one has put there meanwhile stays, and nobody sees what is half-written."""

    def write(source: Path, dtype: str, target: Path) -> None:
        theirs = engines.readable("other", folder, "f16")
        assert not theirs.exists() and target.parent != theirs.parent
        theirs.mkdir()
        (theirs / "theirs").write_text("")
        target.mkdir()
        monkeypatch.setattr(Path, "is_dir", lambda path: next(there))

    there = iter([False, True])  # not when this one looks, but when it puts its own there
    monkeypatch.setitem(
        engines.ENGINES, "other", engines.Engine((), "", engines._load_native, write, "numpy", ".other")
    )
    assert (engines.convert("other", folder, "f16") / "theirs").exists()


@pytest.mark.parametrize(
    ("engine", "dtype"), [("llama.cpp", "bf16"), ("llama.cpp", "f32"), ("openvino", "bf16"), ("transformers", "f32")]
)
def test_a_process(engine: str, dtype: str, cache: Path, folder: Path) -> None:
    """A process of each engine converts, another one measures."""
    if engine == "llama.cpp":
        pytest.importorskip("gguf")
    assert models._process(engine, folder, dtype, 1, []) == {}
    assert len(list(cache.glob("*"))) == (engine != "transformers")
    found = models._process(engine, folder, dtype, 1, ["prefill 16", "decode 8"])
    assert set(found["seconds"]) == {"load", "prefill 16", "decode 8"}
    # The prompt and the first token do not count, and between the others there is a time less than tokens.
    times = len(found["seconds"]["decode 8"])
    assert times and times % (models.NEW_TOKENS - 2) == 0 and found["seconds"]["prefill 16"]


def test_an_engine_that_fails(cache: Path, folder: Path, tmp_path: Path) -> None:
    """The error names the engine and says what it said."""
    pytest.importorskip("gguf")
    for name in ("llama_cpp", "gguf"):
        module = tmp_path / "modules" / name / "__init__.py"
        module.parent.mkdir(exist_ok=True)
        module.write_text("raise RuntimeError('no such processor')")
    for cases, expected in (([], "a conversion to .*gguf"), (["prefill 16"], "figures")):
        with pytest.raises(InternalError, match=f"model small: llama.cpp: expected {expected}, .*no such processor"):
            models._process("llama.cpp", folder, "bf16", 1, cases)


def test_which_engines(cache: Path) -> None:
    default = tuple(name for name in engines.COMPARED if engines.ENGINES[name].installed)
    assert engines.chosen([]) == default and default[0] == "native"
    assert engines.chosen(["openvino", "native", "openvino"]) == (*default, "openvino")
    with pytest.raises(InvalidArgumentError, match="expected one of native, transformers, openvino, .* found 'vllm'"):
        engines.chosen(["vllm"])


def test_what_an_engine_does_not_take(cache: Path) -> None:
    """llaisys takes heads that are not as wide as the hidden size, llama.cpp does not; f16 needs arithmetic in f16."""
    tiny = Checkpoint.open("tiny").config
    assert models.refusals("tiny", "f16", ("native", "openvino")) == {
        "openvino": "expected FP16 among what it computes with on this processor, found ['FP32', 'BF16']"
    }
    assert engines.ENGINES["openvino"].refuses(tiny, "bf16") == ""
    assert engines.ENGINES["llama.cpp"].refuses(tiny, "bf16") == "expected heads as wide as hidden_size 224, found 288"


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

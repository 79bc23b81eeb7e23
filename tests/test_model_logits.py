"""Logits of both backends against transformers, each measured against the same model in f64."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llaisys
from checkpoints import make_checkpoint
from exact_qwen2 import exact_logits, inadmissible, rms
from llaisys.models import Qwen2

torch = pytest.importorskip("torch")

T = 40


def config(
    hidden: int, heads: int, kv: int, dim: int, inner: int, layers: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        **more,
    }


#: title -> config; kv heads 1, 2, some and all, head dim 32, 64, 80, 128 (equal to hidden / heads or not).
CONFIGS = {
    "mqa-d32-tied": config(64, 2, 1, 32, 96, 1, 257, tie_word_embeddings=True),
    "gqa2-d32": config(128, 4, 2, 32, 200, 3, 301),
    "mha-d64-tied": config(256, 4, 4, 64, 300, 2, 512, tie_word_embeddings=True, rope_theta=1e6),
    "gqa2-d80": config(192, 6, 2, 80, 500, 4, 1000),
    "mqa-d128-tied": config(256, 2, 1, 128, 640, 2, 777, tie_word_embeddings=True),
    "mha-d128": config(96, 3, 3, 128, 131, 2, 64),
    "gqa7-d64-tied": config(896, 14, 2, 64, 1216, 1, 2048, tie_word_embeddings=True, rope_theta=1e6),
    "gqa3-d80-tied": config(100, 6, 3, 80, 77, 5, 99, tie_word_embeddings=True),
    "one-head-d64": config(64, 1, 1, 64, 65, 2, 33),
    "deep-d32": config(96, 3, 1, 32, 128, 12, 128),
    "theta-v5-d32": config(64, 2, 2, 32, 96, 2, 111, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
}
#: Every config in bf16, the first four in the others too, with shards here and there.
CASES = [(name, dtype) for i, name in enumerate(CONFIGS) for dtype in (("bf16", "f32", "f16") if i < 5 else ("bf16",))]
SHARDS = {"gqa2-d80": 3, "mha-d64-tied": 2}


@pytest.fixture(autouse=True)
def few_threads() -> None:
    llaisys.set_num_threads(1)  # what is tested does not depend on it, and a busy machine makes threads wait
    torch.set_num_threads(1)


def theirs(model: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        result: np.ndarray[Any, Any] = model(torch.tensor([tokens])).logits[0].float().numpy()
    return result


def some_tokens(vocab: int, count: int = T) -> list[int]:
    return np.random.default_rng(vocab).integers(0, vocab, count).tolist()


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=["-".join(case) for case in CASES])
def test_logits(name: str, dtype: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, dtype=dtype, shards=SHARDS.get(name), **CONFIGS[name])
    assert len(list(tmp_path.glob("*.safetensors"))) == SHARDS.get(name, 1)
    tokens = some_tokens(CONFIGS[name]["vocab_size"])
    truth = exact_logits(model.state_dict(), model.config, tokens)
    expected = theirs(model, tokens)
    for backend in ("native", "reference"):
        logits = Qwen2(tmp_path, backend=backend).logits(tokens)
        assert logits.dtype == np.float32 and logits.shape == truth.shape
        assert not inadmissible(logits, expected, truth), backend


@pytest.mark.parametrize("stored", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("wanted", ["f32", "bf16", "f16"])
def test_dtype_conversion_on_loading(stored: str, wanted: str, tmp_path: Path) -> None:
    sizes = config(64, 2, 1, 32, 96, 2, 101)
    model = make_checkpoint(tmp_path, dtype=stored, **sizes)
    model = model.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[wanted])
    tokens = some_tokens(101)
    truth = exact_logits(model.state_dict(), model.config, tokens)
    results = {}
    for backend in ("native", "reference"):
        ours = Qwen2(tmp_path, backend=backend, dtype=wanted)
        assert ours.dtype == wanted
        weights = {
            node.site: node.inputs["weight"]
            for nodes in ours.run_with_cache(tokens[:1], "*proj")[1].values()
            for node in nodes
        }
        for site, weight in weights.items():
            expected = model.state_dict()[f"{site}.weight"].float().numpy()
            assert weight is not None and np.array_equal(weight.astype(np.float32), expected), site
        results[backend] = ours.logits(tokens)
        assert not inadmissible(results[backend], theirs(model, tokens), truth), backend


# ----------------------------------------------- the bound is able to fail


def change_weight(model: Any) -> None:
    weight = model.state_dict()["model.layers.0.mlp.down_proj.weight"]
    weight[3] *= -1


def change_bias(model: Any) -> None:
    model.state_dict()["model.layers.1.self_attn.q_proj.bias"].zero_()


def change_norm(model: Any) -> None:
    model.state_dict()["model.layers.1.post_attention_layernorm.weight"][5] += 1


def change_nothing(model: Any) -> None:
    pass


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("change", [change_weight, change_bias, change_norm, change_nothing])
def test_the_bound_sees_changed_weights(dtype: str, change: Any, tmp_path: Path) -> None:
    sizes = CONFIGS["gqa2-d32"]
    model = make_checkpoint(tmp_path / "right", dtype=dtype, **sizes)
    tokens = some_tokens(sizes["vocab_size"])
    truth, expected = exact_logits(model.state_dict(), model.config, tokens), theirs(model, tokens)
    with torch.no_grad():
        change(model)
    model.save_pretrained(tmp_path / "wrong")
    logits = Qwen2(tmp_path / "wrong").logits(tokens)
    assert bool(inadmissible(logits, expected, truth)) == (change is not change_nothing)


@pytest.mark.parametrize(
    ("dtype", "key", "value"),
    [
        ("f32", "rope_theta", 10001.0),
        ("f32", "rms_norm_eps", 1.1e-6),
        ("bf16", "rope_theta", 20000.0),
        ("bf16", "rms_norm_eps", 1e-2),
        ("bf16", "rope_theta", 10000.0),  # as it was
    ],
)
def test_the_bound_sees_changed_config(dtype: str, key: str, value: float, tmp_path: Path) -> None:
    sizes = CONFIGS["gqa2-d32"]
    model = make_checkpoint(tmp_path, dtype=dtype, **sizes)
    tokens = some_tokens(sizes["vocab_size"])
    truth, expected = exact_logits(model.state_dict(), model.config, tokens), theirs(model, tokens)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    inner = values["rope_parameters"] if key == "rope_theta" else values
    same = inner[key] == value
    inner[key] = value
    file.write_text(json.dumps(values))
    logits = Qwen2(tmp_path).logits(tokens)
    assert bool(inadmissible(logits, expected, truth)) == (not same)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_bound_sees_one_wrong_element_and_nan(dtype: str, tmp_path: Path) -> None:
    sizes = CONFIGS["mqa-d32-tied"]
    model = make_checkpoint(tmp_path, dtype=dtype, **sizes)
    tokens = some_tokens(sizes["vocab_size"])
    truth, expected = exact_logits(model.state_dict(), model.config, tokens), theirs(model, tokens)
    logits = Qwen2(tmp_path).logits(tokens)
    for wrong in (logits[7, 11] + 20 * rms(expected - truth), np.nan, np.inf):
        changed = logits.copy()
        changed[7, 11] = wrong
        assert inadmissible(changed, expected, truth)


# ------------------------------------------------------ the shape of 0.5B


def large_model() -> Any:
    """A random model in the shape of Qwen2-0.5B. Its 494 million weights come from a pool of 5 million numbers: drawing
    all of them, and what the constructor would draw before, would take most of the time of the test."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    }
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes)).to(torch.bfloat16)
    # A prime length, so that no two rows of a matrix are the same.
    pool = torch.randn(5_000_011, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    state = {}
    for i, (name, weight) in enumerate(model.named_parameters()):
        noise = pool.roll(1000 * i).repeat(-(-weight.numel() // len(pool)))[: weight.numel()].view(weight.shape)
        if name.endswith("norm.weight"):
            state[name] = 1 + 0.25 * noise
        else:
            state[name] = noise * (0.5 if name.endswith("bias") else weight.shape[-1] ** -0.5)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("cpu"):
        # Buffers are computed, not stored; only a model that was not made on "meta" has them.
        small = Qwen2ForCausalLM(Qwen2Config(**{**sizes, "num_hidden_layers": 1, "vocab_size": 8}))
    model.model.rotary_emb = small.model.rotary_emb
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval()


_MEASURE = """
import json, sys
import numpy as np
from llaisys.models import Qwen2
model = Qwen2(sys.argv[1])
tokens = json.loads(sys.argv[2])
logits = model.logits(tokens)
np.save(sys.argv[3], logits)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak * 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders with one file and with three shards; tokens, transformers' logits, f64 logits."""
    folder = tmp_path_factory.mktemp("large")
    model = large_model()
    model.save_pretrained(folder / "single", max_shard_size="2GB")
    model.save_pretrained(folder / "shards", max_shard_size="400MB")
    tokens = some_tokens(151936, 6)
    expected = theirs(model, tokens)
    truth = exact_logits(model.state_dict(), model.config, tokens)
    del model
    gc.collect()
    yield folder, tokens, expected, truth
    for file in folder.glob("*/*.safetensors"):
        file.unlink()  # pytest keeps the last folders, and these have 2 GB


def test_large_checkpoint(large: Any, tmp_path: Path) -> None:
    """Logits from one file within the bound, from shards to the same bits, and the peak of memory (DESIGN 10)."""
    folder, tokens, expected, truth = large
    assert len(list((folder / "single").glob("*.safetensors"))) == 1
    assert len(list((folder / "shards").glob("*.safetensors"))) == 3
    assert (folder / "shards" / "model.safetensors.index.json").exists()
    results = {}
    for name in ("single", "shards"):
        out = tmp_path / f"{name}.npy"
        command = [sys.executable, "-c", _MEASURE, str(folder / name), json.dumps(tokens), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout)
        weights = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        cache = 2 * 24 * 2 * 64 * 2 * len(tokens)
        assert peak <= 1.05 * weights + cache + 150 * 2**20, f"{name}: {peak / 2**20:.0f} MiB"
        results[name] = np.load(out)
    assert not inadmissible(results["single"], expected, truth)
    assert results["single"].tobytes() == results["shards"].tobytes()

"""The Qwen2 engine as a C program sees it: the functions of llaisys.h called one by one, and the C example."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llaisys
from checkpoints import SMALL, plain_weights, write_plain
from llaisys import Qwen2, _lib
from llaisys.checkpoint import Checkpoint
from llaisys.dtypes import DataType
from llaisys.export import export
from llaisys.models.native import NativeModel

EXAMPLE = Path(__file__).parent.parent / "examples" / "generate.c"
CONFIG = Checkpoint.open("tiny").config
INVALID, SHAPE, DTYPE, INDEX, HANDLE, STATE, OUT_OF_MEMORY = -1, -2, -3, -6, -7, -8, -9


class Model:
    """A model made and used through the C functions only."""

    def __init__(self, **changes: Any) -> None:
        self.lib = _lib.library()
        fields = {
            "dtype": DataType.BF16,
            "nlayer": CONFIG.num_hidden_layers,
            "hs": CONFIG.hidden_size,
            "nh": CONFIG.num_attention_heads,
            "nkvh": CONFIG.num_key_value_heads,
            "dh": CONFIG.head_dim,
            "di": CONFIG.intermediate_size,
            "maxseq": CONFIG.max_position_embeddings,
            "voc": CONFIG.vocab_size,
            "epsilon": CONFIG.rms_norm_eps,
            "theta": CONFIG.rope_theta,
            "end_token": -1,
        }
        meta = _lib.LlaisysQwen2Meta(**{**fields, **changes})
        self.handle = self.lib.llaisysQwen2ModelCreate(ctypes.byref(meta), 0, None, 0)

    def load(self, name: str, array: np.ndarray[Any, Any], dtype: DataType | None = None) -> int:
        array = np.ascontiguousarray(array)
        shape = (ctypes.c_size_t * array.ndim)(*array.shape)
        code = DataType.of_numpy(array.dtype) if dtype is None else dtype
        status: int = self.lib.llaisysQwen2ModelLoadTensor(
            self.handle, name.encode(), array.ctypes.data, shape, array.ndim, code
        )
        return status

    def load_all(self, but: str = "") -> None:
        for name, array in Checkpoint.open("tiny").tensors():
            if name != but:
                assert self.load(name, array) == 1, name

    def infer(self, tokens: list[int]) -> int:
        array = (ctypes.c_int64 * max(len(tokens), 1))(*tokens)
        token: int = self.lib.llaisysQwen2ModelInfer(self.handle, array, len(tokens))
        return token

    @property
    def computed(self) -> int:
        count: int = self.lib.llaisysQwen2ModelTokensComputed(self.handle)
        return count

    def destroy(self) -> int:
        status: int = self.lib.llaisysQwen2ModelDestroy(self.handle)
        return status


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model()
    yield model
    model.destroy()


def fresh_answer(tokens: list[int]) -> int:
    model = Model()
    model.load_all()
    token = model.infer(tokens)
    assert model.destroy() == 0
    return token


def test_infer_computes_only_what_is_new(model: Model) -> None:
    """Growing, repeated, shortened and unrelated sequences give the tokens of a fresh model."""
    model.load_all()
    tokens = [315, 285, 690, 265, 1294]
    computed = 0
    for _ in range(4):  # growing: the prompt once, then one token at a time
        token = model.infer(tokens)
        assert token == fresh_answer(tokens)
        assert model.computed - computed == (len(tokens) if computed == 0 else 1)
        computed = model.computed
        tokens.append(token)
    cases = {
        "as it was": (tokens[:-1], 1),  # the last token's logits were not kept
        "repeated": (tokens[:-1], 1),
        "shortened": (tokens[:3], 1),
        "another end": ([*tokens[:3], 99, 98], 2),
        "unrelated": ([7, 8, 9], 3),
        "one token": ([7], 1),
    }
    for title, (sequence, expected) in cases.items():
        assert model.infer(sequence) == fresh_answer(sequence), title
        assert model.computed - computed == expected, title
        computed = model.computed
    assert model.lib.llaisysQwen2ModelReset(model.handle) == 0
    assert model.infer([7, 8, 9]) == fresh_answer([7, 8, 9])
    assert model.computed - computed == 3


def test_infer_is_the_greedy_generate_of_python(model: Model) -> None:
    model.load_all()
    tokens = [315, 285, 690]
    expected = Qwen2("tiny").generate(tokens, max_new_tokens=20, top_k=1, eos_token_id=[])
    while len(tokens) < len(expected):
        tokens.append(model.infer(tokens))
    assert tokens == expected


def test_infer_from_its_own_interrupt_callback() -> None:
    """Refused where it would wait for itself; another model answers."""
    model, other = Model(), Model()
    for each in (model, other):
        each.load_all()
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, CONFIG.vocab_size, 2000)]
    expected, simple = model.infer(tokens), other.infer([1, 2, 3])
    answers: list[tuple[int, str, int, int]] = []

    def callback(_: int | None) -> int:
        refused = model.infer([1, 2, 3])
        said = _lib.last_error()
        answers.append((refused, said, int(model.lib.llaisysQwen2ModelReset(model.handle)), other.infer([1, 2, 3])))
        return 0

    kept = _lib.InterruptCallback(callback)
    before = llaisys.isa()
    model.lib.llaisysSetInterrupt(kept, None)
    try:
        llaisys.set_isa("scalar")
        slow = model.infer(tokens[1:])
        llaisys.set_isa(before)
        assert model.infer(tokens) == expected
    finally:
        llaisys.set_isa(before)
        _lib.register_interrupt()
    assert slow >= 0 and answers
    for refused, said, reset, found in answers:
        assert (refused, reset) == (STATE, STATE) and "in use" in said
        assert found >= 0
    assert other.infer([1, 2, 3]) == simple
    model.destroy()
    other.destroy()


def test_infer_refuses(model: Model) -> None:
    missing = "model.layers.1.mlp.up_proj.weight"
    model.load_all(but=missing)
    assert model.infer([1]) == STATE and missing in _lib.last_error()
    for name, array in Checkpoint.open("tiny").tensors():
        if name == missing:
            assert model.load(name, array) == 1
    good = model.infer([1, 2, 3])
    assert model.infer([]) == INVALID
    for many in (2**31 + 1, 2**63, 2**64 - 1):
        assert model.lib.llaisysQwen2ModelInfer(model.handle, (ctypes.c_int64 * 1)(1), many) == INVALID
        assert str(many) in _lib.last_error()
    assert model.lib.llaisysQwen2ModelInfer(model.handle, None, 1) == INVALID
    assert model.infer([1, CONFIG.vocab_size]) == INDEX and str(CONFIG.vocab_size) in _lib.last_error()
    assert model.infer([1, -1]) == INDEX
    assert model.infer([1] * (CONFIG.max_position_embeddings + 1)) == INVALID
    assert model.infer([1, 2, 3]) == good, "an error must leave nothing behind"


def test_load_refuses(model: Model) -> None:
    hidden = CONFIG.hidden_size
    norm = np.ones(hidden, np.float32)
    assert model.load("model.rotary.weight", norm) == 0
    assert model.load("model.norm.weight", norm[:-1]) == SHAPE and "model.norm.weight" in _lib.last_error()
    assert model.load("model.norm.weight", norm[None]) == SHAPE
    for dtype in (DataType.F64, DataType.I64, 0, 20, -1, 2**31 - 1):
        assert model.load("model.norm.weight", norm, dtype) == DTYPE  # type: ignore[arg-type]
    load, one = model.lib.llaisysQwen2ModelLoadTensor, (ctypes.c_size_t * 1)(hidden)
    for ndim in (0, 2, 9, 2**64 - 1):  # the array of sizes is not looked at
        assert load(model.handle, b"model.norm.weight", norm.ctypes.data, one, ndim, DataType.F32) == SHAPE
    assert load(model.handle, b"model.norm.weight", norm.ctypes.data, (ctypes.c_size_t * 1)(2**64 - 1), 1, 13) == SHAPE
    for missing in ((None, norm.ctypes.data, one), (b"model.norm.weight", None, one), (b"model.norm.weight", 1, None)):
        assert load(model.handle, *missing, 1, DataType.F32) == INVALID
    assert model.load("model.norm.weight", norm) == 1
    assert model.load("model.norm.weight", norm) == STATE, "doubles are refused"
    assert model.lib.llaisysQwen2ModelSetAttentionBias(model.handle, 0) == STATE, "too late"


def test_load_in_parts(model: Model) -> None:
    """The rows of a weight in any order; nothing is there before all of them are, and none may come twice."""
    name = "model.embed_tokens.weight"
    model.load_all(but=name)
    weight = Checkpoint.open("tiny").tensor(name)

    def load(begin: int, end: int) -> int:
        shape = (ctypes.c_size_t * 2)(*weight.shape)
        part = weight[begin:end]
        status: int = model.lib.llaisysQwen2ModelLoadRows(
            model.handle, name.encode(), part.ctypes.data, shape, 2, DataType.BF16, begin, end
        )
        return status

    rows = len(weight)
    assert load(100, rows) == 1 and load(0, 40) == 1 and load(50, 50) == 1
    for begin, end in ((0, 1), (39, 41), (99, 101), (0, rows), (rows - 1, rows)):
        assert load(begin, end) == STATE and name in _lib.last_error(), (begin, end)
    assert load(rows, rows + 1) == INVALID and load(41, 40) == INVALID and str(rows) in _lib.last_error()
    assert model.infer([1]) == STATE and name in _lib.last_error(), "60 rows are missing"
    assert load(40, 100) == 1
    assert model.load(name, weight) == STATE
    assert model.infer([1, 2, 3]) == fresh_answer([1, 2, 3])
    assert load(0, 1) == STATE, "the model has run"


def test_a_model_beyond_the_address_space_is_refused() -> None:
    model = Model(nlayer=1 << 12, hs=1 << 20, di=1 << 24)
    assert model.handle
    assert model.load("model.norm.weight", np.ones(1 << 20, np.float32)) == OUT_OF_MEMORY
    assert model.destroy() == 0


def test_create_refuses() -> None:
    for changes, field in [
        ({"dtype": DataType.F64}, "dtype"),
        ({"nkvh": 4}, "nkvh"),
        ({"dh": 47}, "dh"),
        ({"hs": 0}, "hs"),
        ({"voc": 1 << 60}, "voc"),
        ({"nlayer": 1 << 40}, "nlayer"),
        ({"theta": 0.0}, "theta"),
        ({"theta": float("inf")}, "theta"),
        ({"epsilon": float("nan")}, "epsilon"),
    ]:
        model = Model(**changes)
        assert not model.handle, field
        assert field in _lib.last_error()


def test_a_huge_model_costs_nothing_before_it_is_loaded() -> None:
    """Infer says what is missing before it makes room for 2^31 logits."""
    import resource

    model = Model(voc=1 << 31, maxseq=1 << 31, nlayer=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert model.infer([1]) == STATE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert model.destroy() == 0


def test_handles_are_validated(model: Model) -> None:
    lib = model.lib
    other = Model()
    session = lib.llaisysQwen2SessionCreate(other.handle)
    assert session
    for kind in (model.handle, other.handle):  # slot and generation of one of them are the session's
        assert lib.llaisysQwen2SessionLength(kind) == HANDLE, "a handle of another kind"
    assert lib.llaisysQwen2ModelReset(session) == HANDLE
    assert other.destroy() == 0
    assert other.destroy() == HANDLE, "freed twice"
    assert lib.llaisysQwen2ModelReset(other.handle) == HANDLE
    assert lib.llaisysQwen2SessionLength(session) == 0, "a session outlives the model's handle"
    assert lib.llaisysQwen2SessionDestroy(session) == 0
    assert lib.llaisysQwen2SessionLength(session) == HANDLE
    for foreign in (None, 1, 2, 0xDEADBEEF, ctypes.addressof(ctypes.c_int64())):
        assert lib.llaisysQwen2ModelReset(foreign) == HANDLE
        assert lib.llaisysQwen2SessionDestroy(foreign) == HANDLE
    assert lib.llaisysQwen2ModelReset(model.handle) == 0


def test_biases_can_be_left_out() -> None:
    """Without biases the engine computes what biases of zero give."""
    model, zeros = Model(), Model()
    assert model.lib.llaisysQwen2ModelSetAttentionBias(model.handle, 0) == 0
    for name, array in Checkpoint.open("tiny").tensors():
        if name.endswith("_proj.bias"):
            assert model.load(name, array) == STATE
            assert zeros.load(name, np.zeros_like(array)) == 1
        else:
            assert model.load(name, array) == 1 and zeros.load(name, array) == 1
    assert model.infer([1, 2, 3]) == zeros.infer([1, 2, 3]) >= 0
    assert model.destroy() == zeros.destroy() == 0


def test_the_python_backend_goes_through_this_api() -> None:
    with Qwen2("tiny") as model:
        assert isinstance(model._backend, NativeModel)
        before = model.tokens_computed
        model.generate([1, 2, 3], max_new_tokens=2, eos_token_id=[])
        assert model.tokens_computed - before == 4


# ------------------------------------------------------------- the C example


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled example with the embedded model's weights beside it."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    folder = tmp_path_factory.mktemp("example")
    export("tiny", folder / "tiny.bin")
    flags = subprocess.run(
        [sys.executable, "-m", "llaisys", "--cflags", "--libs"], capture_output=True, text=True, check=True
    ).stdout.split()
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-g"]
    subprocess.run([compiler, *strict, str(EXAMPLE), *flags, "-o", str(folder / "generate")], check=True)
    return folder


def run_example(folder: Path, *args: str, prefix: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, str(folder / "generate"), *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **env})


def test_the_example_prints_the_tokens_of_python(example: Path) -> None:
    prompt = Qwen2("tiny").tokenizer.encode("def fibonacci(n):")
    ends = next(iter(CONFIG.eos_token_ids), -1)
    expected = Qwen2("tiny").generate(prompt, max_new_tokens=48, top_k=1, eos_token_id=[ends] if ends >= 0 else [])
    done = run_example(example, "tiny.bin", "48", *map(str, prompt))
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == expected[len(prompt) :]


def test_the_example_on_a_model_without_biases(example: Path, tmp_path: Path) -> None:
    weights = {name: x for name, x in plain_weights().items() if not name.endswith("bias")}
    folder = write_plain(tmp_path, {**SMALL, "attention_bias": False, "eos_token_id": 66}, weights)
    export(folder, example / "plain.bin")
    expected = Qwen2(folder).generate([1, 2, 5], max_new_tokens=6, top_k=1)
    done = run_example(example, "plain.bin", "6", "1", "2", "5")
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == expected[3:]
    # As many as fit are no more than the model has room for.
    done = run_example(example, "plain.bin", str(2**62), "1", "2", "5")
    assert done.returncode == 0 and 6 <= len(done.stdout.split()) <= SMALL["max_position_embeddings"] - 3


def test_the_example_under_valgrind(example: Path) -> None:
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("no valgrind on this machine")
    options = ("--error-exitcode=99", "--leak-check=full", "--errors-for-leak-kinds=definite", "-q")
    before = llaisys.isa()
    tier = "avx2" if llaisys.has_isa("avx2") else "scalar"  # valgrind knows no AVX-512
    try:
        llaisys.set_isa(tier)
        expected = Qwen2("tiny").generate([315, 285, 690], max_new_tokens=6, top_k=1, eos_token_id=[])
    finally:
        llaisys.set_isa(before)
    done = run_example(example, "tiny.bin", "6", "315", "285", "690", prefix=(valgrind, *options), LLAISYS_ISA=tier)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [int(token) for token in done.stdout.split()] == expected[3:]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("tiny.bin", "4", "99999999"), "token_ids"),
        (("cut.bin", "4", "1"), "truncated"),
        (("short.bin", "4", "1"), "truncated"),
        (("other.bin", "4", "1"), "not a file of llaisys.export"),
        (("none.bin", "4", "1"), "can not open"),
        (("tiny.bin",), "usage"),
        (("tiny.bin", "x", "1"), "NEW_TOKENS: expected a whole number of at least 0"),
        (("tiny.bin", "4x", "1"), "NEW_TOKENS"),
        (("tiny.bin", "-1", "1"), "NEW_TOKENS"),
        (("tiny.bin", "9" * 30, "1"), "NEW_TOKENS"),
        (("tiny.bin", "4", "1", "two"), "TOKEN: expected whole numbers"),
    ],
)
def test_the_example_says_what_is_wrong(example: Path, args: tuple[str, ...], text: str) -> None:
    whole = (example / "tiny.bin").read_bytes()
    (example / "cut.bin").write_bytes(whole[: len(whole) // 2])
    (example / "other.bin").write_bytes(b"GGUF" + bytes(200))
    nbytes = struct.pack("<Q", CONFIG.vocab_size * CONFIG.hidden_size * 2)  # of the embedding, which comes first
    assert whole.count(nbytes) == 1
    (example / "short.bin").write_bytes(whole.replace(nbytes, struct.pack("<Q", 64)))
    done = run_example(example, *args)
    assert done.returncode == 1 and text in done.stderr

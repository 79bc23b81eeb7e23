"""Sessions: order invariance, truncation, errors that change nothing, threads, lifetimes, Ctrl-C."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llaisys
from checkpoints import SMALL, plain_weights, write_plain
from llaisys.errors import (
    CheckpointError,
    DTypeError,
    IndexRangeError,
    InvalidArgumentError,
    LlaisysError,
    ShapeError,
    StateError,
    UnsupportedError,
)
from llaisys.models import Qwen2, Session

BACKENDS = ("native", "reference")
VOCAB = SMALL["vocab_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("small"), weights=plain_weights(seed=3))


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Qwen2]:
    return {backend: Qwen2(folder, backend=backend) for backend in BACKENDS}


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest, models: dict[str, Qwen2]) -> Qwen2:
    return models[request.param]


@pytest.fixture(scope="module")
def tiny() -> Qwen2:
    return Qwen2("tiny")


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    threads, isa = llaisys.num_threads(), llaisys.isa()
    llaisys.set_num_threads(1)  # what is tested does not depend on it, and a busy machine makes threads wait
    yield
    llaisys.set_num_threads(threads)
    llaisys.set_isa(isa)


def some(count: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def same_bits(a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# -------------------------------------------------------- order invariance


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.sets(st.integers(1, 47), max_size=12), back=st.integers(0, 47), dtype=st.sampled_from(["f32", "bf16"]))
def test_any_split_gives_the_same_bits(cuts: set[int], back: int, dtype: str, folder: Path) -> None:
    """Also after a wrong turn: other tokens, dropped again."""
    model = Qwen2(folder, dtype=dtype)
    tokens = some(48)
    whole = model.logits(tokens)
    edges = [0, *sorted(cuts), 48]
    with model.session() as session:
        session.forward(tokens[:back] + some(20, 1))
        session.truncate(back)
        kept = max(edge for edge in edges if edge <= back)
        session.truncate(kept)
        parts = [session.forward(tokens[a:b]) for a, b in itertools.pairwise(edges) if a >= kept]
        assert session.length == 48
    assert same_bits(np.concatenate(parts), whole[kept:])


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_prefill_and_decode_give_the_same_bits(dtype: str) -> None:
    """Across the 512 tokens that the engine takes at once, on a model with 5 layers, one token at a time at the end."""
    model = Qwen2("tiny", dtype=dtype)
    tokens = some(560, vocab=model.config.vocab_size)
    with model.session() as session:
        whole = session.forward(tokens, last=80)
    with model.session() as session:
        session.forward(tokens[:7], last=0)
        session.forward(tokens[7:520], last=0)
        steps = np.concatenate([session.forward([token]) for token in tokens[520:]])
    assert same_bits(steps, whole[40:])


def test_threads_do_not_change_a_bit(tiny: Qwen2) -> None:
    tokens = some(70, vocab=tiny.config.vocab_size)
    results = []
    for threads in (1, 2, 3, 4, 8):
        llaisys.set_num_threads(threads)
        with tiny.session() as session:
            results.append(np.concatenate([session.forward(tokens), session.forward(tokens[:1])]))
    assert all(same_bits(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_tiers_agree(dtype: str) -> None:
    """All tiers round at the same points, so that they differ by rounding only: as much as the numpy twin does."""
    tokens = some(40, vocab=4000)
    expected = Qwen2("tiny", dtype=dtype, backend="reference").logits(tokens)
    model = Qwen2("tiny", dtype=dtype)
    results = {}
    for tier in llaisys.isas():
        llaisys.set_isa(tier)
        results[tier] = model.logits(tokens)
    noise = {"f32": 2e-5, "f16": 2e-2, "bf16": 2e-1}[dtype] * np.abs(expected).max()
    for tier, logits in results.items():
        assert np.abs(logits - expected).max() < noise, tier
        top = np.sort(expected)[:, -2:]
        flipped = logits.argmax(1) != expected.argmax(1)
        assert np.all((top[:, 1] - top[:, 0])[flipped] < noise), tier


def test_last_rows(model: Qwen2) -> None:
    tokens = some(9)
    whole = model.logits(tokens)
    for last in (0, 1, 4, 9):
        with model.session() as session:
            rows = session.forward(tokens, last=last)
        assert rows.shape == (last, VOCAB)
        assert np.allclose(rows, whole[9 - last :], rtol=1e-4, atol=1e-4)
        if model.backend == "native":
            assert same_bits(rows, whole[9 - last :])


# ----------------------------------------------------------------- session


def test_length_truncate_reset(model: Qwen2) -> None:
    tokens = some(10)
    with model.session() as session:
        assert session.length == 0
        assert session.forward([]).shape == (0, VOCAB)
        first = session.forward(tokens)
        assert session.length == 10
        session.truncate(4)
        again = session.forward(tokens[4:])
        assert np.allclose(again, first[4:], rtol=1e-4, atol=1e-4)
        session.reset()
        assert session.length == 0
        assert same_bits(session.forward(tokens), first)
        assert repr(session) == "<Session of 10 tokens>"
    for use in (lambda: session.length, lambda: session.forward([1]), session.reset):
        with pytest.raises(StateError, match="closed"):
            use()
    session.close()


@pytest.mark.parametrize(
    ("tokens", "error", "text"),
    [
        ([1, VOCAB], IndexRangeError, rf"token_ids\[1\]: expected a token from 0 to {VOCAB - 1}, found {VOCAB}"),
        ([-1], IndexRangeError, "found -1"),
        ("text", DTypeError, "found text"),
        ([1.5], DTypeError, "float64"),
        ([True], DTypeError, "bool"),
        ([2**70], DTypeError, "object"),
        ([[1, 2]], ShapeError, r"\[1, 2\]"),
        ([[1, 2], [3]], ShapeError, "one dimension"),
        (5, ShapeError, r"found \[\]"),
        ([1] * 200, InvalidArgumentError, "max_position_embeddings is 128, found 200"),
        ([1] * 126, InvalidArgumentError, "at most 125 tokens after the 3"),
    ],
)
def test_errors_leave_the_session_as_it_was(model: Qwen2, tokens: Any, error: Any, text: str) -> None:
    with model.session() as session:
        first = session.forward([5, 6, 7])
        with pytest.raises(error, match=text):
            session.forward(tokens)
        for last in (-1, 2, 1.0, True):
            with pytest.raises(InvalidArgumentError, match="last"):
                session.forward([1], last=last)  # type: ignore[arg-type]
        for length in (-1, 4, 1.0):
            with pytest.raises(InvalidArgumentError, match="length: expected 0 to 3"):
                session.truncate(length)  # type: ignore[arg-type]
        assert session.length == 3
        rest = session.forward([8])
    assert np.allclose(np.concatenate([first, rest]), model.logits([5, 6, 7, 8]), rtol=1e-4, atol=1e-4)


def test_the_whole_context_can_be_used(model: Qwen2) -> None:
    with model.session() as session:
        session.forward(some(127), last=0)
        session.forward([1])
        with pytest.raises(InvalidArgumentError, match="at most 0 tokens"):
            session.forward([1])
        assert session.length == 128


def test_kinds_of_token_ids(model: Qwen2) -> None:
    expected = model.logits([3, 4, 5])
    for kind in (tuple, np.array, lambda x: np.array(x, np.int32), lambda x: np.array([x, x]).T[:, 0], np.uint8):
        assert same_bits(model.logits(kind([3, 4, 5])), expected)


# ----------------------------------------------------------------- threads


def test_sessions_in_threads_give_what_they_give_alone(model: Qwen2) -> None:
    texts = [some(60, seed) for seed in range(3)]
    alone = [model.logits(text) for text in texts]
    found: dict[int, list[Any]] = {}

    def run(i: int) -> None:
        found[i] = []
        for _ in range(4):
            with model.session() as session:
                found[i].append(np.concatenate([session.forward(texts[i][:33]), session.forward(texts[i][33:])]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert len(found[i]) == 4
        for logits in found[i]:
            assert same_bits(logits, found[i][0])
            assert np.allclose(logits, alone[i], rtol=1e-4, atol=1e-4)
            assert model.backend == "reference" or same_bits(logits, alone[i])


def test_one_session_in_two_calls_is_refused(model: Qwen2) -> None:
    with model.session() as session:
        errors = []

        def tap(node: Any) -> None:
            with pytest.raises(StateError, match="in use"):
                session.forward([1])
            errors.append(node.site)

        with session.tap(tap, "lm_head"):
            session.forward([1, 2])
        assert errors == ["lm_head"] and session.length == 2


# --------------------------------------------------------------- lifetimes


def test_freed_with_the_last_reference(folder: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            model = Qwen2(folder)
            session = model.session()
            session.tap(lambda node: None)
            session.forward([1])
            handles = session._engine._finalizer, model._backend._finalizer  # type: ignore[attr-defined]
            del model
            assert session.forward([2]).shape == (1, VOCAB)  # it keeps the weights alive
            del session
            assert not any(handle.alive for handle in handles)
    finally:
        gc.enable()


def test_a_model_is_freed_with_its_last_reference(model: Qwen2, folder: Path) -> None:
    """Also the sequence that generate keeps, and a kernel of the caller."""
    gc.collect()
    gc.disable()
    try:

        def kernel(gate: Any, up: Any) -> Any:
            return gate * up

        other = Qwen2(folder, backend=model.backend, kernels={"layers.0.mlp.act": kernel})
        other.generate([1, 2], 2, eos_token_id=[])
        other.run_with_cache([1, 2])
        gone = [weakref.ref(other), weakref.ref(other._backend), weakref.ref(kernel)]
        del other, kernel
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(model: Qwen2, copied: Any) -> None:
    """Two objects would share one handle."""
    with pytest.raises(UnsupportedError, match=r"a model cannot be copied, .* open the folder again there: Qwen2\('/"):
        copied(model)
    with model.session() as session, pytest.raises(UnsupportedError, match="a session cannot be copied"):
        copied(session)


def test_close(model: Qwen2, folder: Path) -> None:
    with Qwen2(folder, backend=model.backend) as other:
        session = other.session()
        other.generate([1], 2)
    other.close()
    for use in (other.session, lambda: other.logits([1]), lambda: other.generate([1]), lambda: other.tokens_computed):
        with pytest.raises(StateError, match="the model is closed"):
            use()
    assert session.forward([1]).shape == (1, VOCAB)
    assert "closed" in repr(other)


def resident() -> int:
    """Bytes; counted page by page, where other files of /proc may be some pages behind."""
    gc.collect()
    found = re.search(r"^Rss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def bytes_of_a_token(model: Qwen2) -> int:
    """In one of the caches, of which each layer has two."""
    return model.config.num_key_value_heads * model.config.head_dim * 2


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_sessions_share_what_only_a_call_needs(tiny: Qwen2) -> None:
    tokens = some(500)
    with contextlib.ExitStack() as sessions:
        sessions.enter_context(tiny.session()).forward(tokens, last=1)
        before = resident()
        for _ in range(20):
            sessions.enter_context(tiny.session()).forward(tokens, last=1)
        grown = resident() - before
    caches = 2 * tiny.config.num_hidden_layers * 500 * bytes_of_a_token(tiny)
    assert 20 * caches * 0.9 < grown < 20 * caches * 1.5


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_truncate_gives_memory_back(tiny: Qwen2) -> None:
    caches, kept = 2 * tiny.config.num_hidden_layers, 256 << 10  # of each, for the tokens that come next
    with tiny.session() as session:
        session.forward(some(2040), last=0)
        before = resident()
        session.truncate(100)
        freed = before - resident()
    expected = caches * (1940 * bytes_of_a_token(tiny) - kept)
    assert 0.9 * expected < freed < 1.1 * expected


def test_tokens_computed(model: Qwen2) -> None:
    before = model.tokens_computed
    model.logits([1, 2, 3])
    with model.session() as session:
        session.forward([1, 2], last=0)
    assert model.tokens_computed == before + 5


def test_arguments_of_the_model(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="device"):
        Qwen2(folder, llaisys.DeviceType.NVIDIA)
    with pytest.raises(InvalidArgumentError, match="backend: expected native or reference, found 'torch'"):
        Qwen2(folder, backend="torch")
    for dtype in ("f64", "int8", np.int64, llaisys.DataType.F64, 3, object()):
        with pytest.raises(DTypeError, match="dtype: expected f32, f16, bf16"):
            Qwen2(folder, dtype=dtype)
    for good in ("f16", "float16", np.float16, np.dtype("f2"), llaisys.DataType.F16):
        assert Qwen2(folder, dtype=good).dtype == "f16"
    with pytest.raises(CheckpointError, match=r"nowhere: path: .* found no such folder"):
        Qwen2(folder / "nowhere")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        _ = Qwen2(folder).tokenizer
    with pytest.raises(InvalidArgumentError, match="count"):
        Qwen2(folder, num_threads=0)
    Qwen2(folder, num_threads=3)
    assert llaisys.num_threads() == 3
    seen: list[tuple[int, int]] = []
    Qwen2(folder, progress=lambda done, total: seen.append((done, total)))
    sizes = [done for done, _ in seen]
    assert sizes == sorted(sizes) and seen[-1][0] == seen[-1][1] == sum(x.nbytes for x in plain_weights().values())
    assert issubclass(CheckpointError, LlaisysError) and isinstance(Qwen2(folder).session(), Session)


# ------------------------------------------------------------------ Ctrl-C

_INTERRUPTED = """
import sys, time
import numpy as np
from llaisys.models import Qwen2

model = Qwen2("tiny", dtype="f32")
tokens = np.random.default_rng(0).integers(0, 4000, 2000).tolist()
session = model.session()
first = session.forward(tokens[:5])
if sys.argv[1] == "tap":
    session.tap(lambda node: None, "swiglu", copy=False)
    session.tap(lambda node: None, "layers.*", copy=False)
try:
    print("ready", flush=True)
    while True:
        session.forward(tokens[5:], last=1)
        session.truncate(5)
except KeyboardInterrupt:
    print("interrupted", time.time(), flush=True)
session.truncate(min(session.length, 5))
rest = session.forward(tokens[5:9])
again = model.logits(tokens[:9])
print(session.length, np.concatenate([first, rest]).tobytes() == again.tobytes())
"""


@pytest.mark.parametrize("mode", ["plain", "tap"])
def test_ctrl_c_ends_a_long_prefill(mode: str) -> None:
    waits = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", _INTERRUPTED, mode], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        sent = time.time()
        child.send_signal(signal.SIGINT)
        word, at = child.stdout.readline().split()
        assert word == "interrupted"
        waits.append(float(at) - sent)
        assert child.stdout.readline() == "9 True\n"
        assert child.wait() == 0
        child.stdout.close()
    # The best of three: a machine that is busy otherwise must not fail this.
    assert min(waits) < 0.2, waits

"""generate(): the tokens of transformers, prefix reuse, when it stops, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llaisys
from checkpoints import SMALL, make_checkpoint, plain_weights, write_json, write_plain
from exact_qwen2 import exact_logits, rms
from llaisys.errors import DTypeError, IndexRangeError, InvalidArgumentError, ShapeError
from llaisys.models import Qwen2

STEPS = 128
PROMPTS = ["def fibonacci(n):", "import os\nimport sys\n\n\nclass Path"]
VOCAB = SMALL["vocab_size"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = llaisys.num_threads()
    llaisys.set_num_threads(1)
    yield
    llaisys.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("small"), weights=plain_weights(seed=3))


@pytest.fixture(params=["native", "reference"])
def model(request: pytest.FixtureRequest, folder: Path) -> Qwen2:
    return Qwen2(folder, backend=request.param)


# ------------------------------------------------ tokens of transformers


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], np.ndarray[Any, Any]]:
    """128 tokens of transformers, without an end, and the logits of each."""
    import torch

    tokens, rows = list(prompt), []
    with torch.no_grad():
        step = model(torch.tensor([prompt]), use_cache=True)
        for _ in range(STEPS):
            rows.append(step.logits[0, -1].float().numpy())
            tokens.append(int(np.argmax(rows[-1])))
            step = model(torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True)
    return tokens, np.array(rows)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_greedy_tokens_are_those_of_transformers(dtype: str) -> None:
    """Token for token, on every tier of the machine and on the reference backend.

    If we take token j where transformers takes i, then with the exact logits t and the errors e of ours and f of
    theirs, t_j + e_j >= t_i + e_i, so their margin t_i + f_i - t_j - f_j is at most (e_j - e_i) + (f_i - f_j). These
    are four errors of rms s (ours) and u (theirs), both measured on this very text against the model in f64; taken as
    independent their sum has a standard deviation of sqrt(2 s^2 + 2 u^2), and it stays below four of those: the
    rounding noise. A token that differs where their margin is below that counts as equal, and the text goes on with
    theirs.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    ours = {"native": Qwen2("tiny", dtype=dtype), "reference": Qwen2("tiny", dtype=dtype, backend="reference")}
    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(ours["native"].path, dtype=kind).eval()
    prompts = [ours["native"].tokenizer.encode(text) for text in PROMPTS]
    tiers = llaisys.isas()
    before = llaisys.isa()
    excused = compared = 0
    try:
        for prompt in prompts:
            tokens, rows = greedy(theirs, prompt)
            start = len(prompt)
            truth = exact_logits(theirs.state_dict(), theirs.config, tokens[:-1])[start - 1 :]
            top = np.sort(rows, axis=1)[:, -2:]
            runs = [("native", tier) for tier in tiers]
            if prompt is prompts[0]:  # numpy takes its time
                runs.append(("reference", before))
            for backend, tier in runs:
                llaisys.set_isa(tier)
                model = ours[backend]
                s, u = rms(model.logits(tokens[:-1])[start - 1 :] - truth), rms(rows - truth)
                noise = 4 * np.sqrt(2 * s**2 + 2 * u**2)
                done = start
                while done < len(tokens):
                    found = model.generate(tokens[:done], len(tokens) - done, eos_token_id=[])
                    differ = [i for i in range(done, len(tokens)) if found[i] != tokens[i]]
                    if not differ:
                        break
                    step = differ[0] - start
                    margin = top[step, 1] - top[step, 0]
                    assert margin < noise, f"{backend} {tier}: step {step}: margin {margin}, noise {noise}"
                    excused += 1
                    done = differ[0] + 1
                compared += STEPS
    finally:
        llaisys.set_isa(before)
    # Otherwise the comparison would say nothing.
    assert excused <= compared // 20, f"{excused} of {compared} tokens differ"


def test_an_end_token_ends_as_in_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    theirs = make_checkpoint(tmp_path, generation={"eos_token_id": [5, 61], "pad_token_id": 5, "do_sample": False})
    ours = Qwen2(tmp_path)
    ended = 0
    torch.set_num_threads(1)
    for first in range(0, VOCAB, 3):
        prompt = [first, (first * 7 + 1) % VOCAB, 12]
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30)[0].tolist()
        assert ours.generate(prompt, 30) == expected
        ended += expected[-1] in (5, 61) and len(expected) < 33
    assert ended > 3


def test_repetition_penalty_as_in_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    theirs = make_checkpoint(tmp_path, generation={"repetition_penalty": 1.5, "eos_token_id": 5, "pad_token_id": 5})
    ours = Qwen2(tmp_path)
    torch.set_num_threads(1)
    for first in range(0, VOCAB, 11):
        for penalty in ({}, {"repetition_penalty": 1.2}, {"repetition_penalty": 1.0}):
            expected = theirs.generate(torch.tensor([[first, 12]]), max_new_tokens=20, **penalty)[0].tolist()
            assert ours.generate([first, 12], 20, **penalty) == expected


# ------------------------------------------------------------ prefix reuse


def test_prefix_reuse(folder: Path) -> None:
    """Growing, repeated, shortened, unrelated prompts: the tokens of a fresh model, and only what is new computed."""
    model = Qwen2(folder)
    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCAB, 60).tolist()
    calls = [
        (text[:20], 5),
        (text[:20], 5),
        (text[:40], 1),
        (text[:10], 3),
        (rng.integers(0, VOCAB, 30).tolist(), 4),
        (text, 8),
        ([*text[:59], (text[59] + 1) % VOCAB], 8),
    ]
    cached: list[int] = []
    for prompt, count in calls:
        before = model.tokens_computed
        found = model.generate(prompt, count, eos_token_id=[])
        assert found == Qwen2(folder).generate(prompt, count, eos_token_id=[])
        shared = 0
        while shared < min(len(cached), len(prompt) - 1) and cached[shared] == prompt[shared]:
            shared += 1
        # The last new token does not go through the layers.
        assert model.tokens_computed - before == len(prompt) - shared + count - 1
        cached = found[:-1]
    # A text that goes on where the last ended.
    before = model.tokens_computed
    model.generate(found, 1)
    assert model.tokens_computed - before == 1
    model.reset()
    model.generate(found, 1)
    assert model.tokens_computed - before == 1 + len(found)


def test_prefix_reuse_gives_the_same_bits(folder: Path) -> None:
    model = Qwen2(folder, dtype="bf16")
    tokens = np.random.default_rng(1).integers(0, VOCAB, 50).tolist()
    fresh = model.logits(tokens)[-1]
    with model._sequences.borrow(model.session) as sequence:
        for known in (0, 1, 17, 49, 50):
            sequence.start([*tokens[:known], 3, 4])
            assert sequence.start(tokens).tobytes() == fresh.tobytes()


def test_an_error_on_the_way_leaves_a_usable_model(model: Qwen2) -> None:
    prompt = [1, 2, 3, 4]
    expected = model.generate(prompt, 6, eos_token_id=[])

    def streamer(token: int) -> None:
        raise KeyError(token)

    for again in (prompt, [9, 9], prompt):
        with pytest.raises(KeyError):
            model.generate(again, 6, streamer=streamer)
    assert model.generate(prompt, 6, eos_token_id=[]) == expected


def test_calls_at_once(model: Qwen2) -> None:
    prompts = [[i, i + 1, 2 * i] for i in range(6)]
    expected = [model.generate(prompt, 12, eos_token_id=[]) for prompt in prompts]
    found: dict[int, list[int]] = {}

    def run(i: int) -> None:
        for _ in range(3):
            found[i] = model.generate(prompts[i], 12, eos_token_id=[])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(6)] == expected


# ------------------------------------------------------------- when it stops


def test_budget_and_context(folder: Path, tmp_path: Path) -> None:
    model = Qwen2(folder)
    assert model.generate([1, 2], 0) == [1, 2]
    assert len(model.generate([1, 2], 5, eos_token_id=[])) == 7
    assert len(model.generate([1, 2], eos_token_id=[])) == 129  # 128 of 128 positions, and a token that needs none
    assert len(model.generate([1] * 128, 5, eos_token_id=[])) == 129
    assert len(model.generate([1] * 100, None, eos_token_id=[])) == 129
    for defaults, length in (
        ({"max_length": 9}, 9),
        ({"max_new_tokens": 4, "max_length": 9}, 6),
        ({"max_length": 1}, 2),
    ):
        other = write_plain(tmp_path / str(length), weights=plain_weights(seed=3))
        write_json(other / "generation_config.json", defaults)
        assert len(Qwen2(other).generate([1, 2], None, eos_token_id=[])) == length


def test_end_tokens(model: Qwen2) -> None:
    endless = model.generate([1, 2], 20, eos_token_id=[])
    assert len(endless) == 22
    third = endless[4]
    first = endless.index(third, 2)
    assert model.generate([1, 2], 20, eos_token_id=third) == endless[: first + 1]
    assert model.generate([1, 2], 20, eos_token_id=[VOCAB + 7, third]) == endless[: first + 1]


def test_course_style(model: Qwen2) -> None:
    plain = model.generate([5, 6, 7], 10)
    assert model.generate([5, 6, 7], 10, 1, 0.8, 0.8) == plain
    assert model.generate(inputs=[5, 6, 7], max_new_tokens=10, top_k=1, top_p=0.8, temperature=0.8) == plain
    assert isinstance(plain, list) and all(type(token) is int for token in plain)


def test_sampling(model: Qwen2) -> None:
    options: dict[str, Any] = {"temperature": 5.0, "eos_token_id": []}
    one = model.generate([1], 30, seed=1, **options)
    assert one == model.generate([1], 30, seed=1, **options) != model.generate([1], 30, seed=2, **options)
    assert model.generate([1], 30, **options) != model.generate([1], 30, **options)
    assert model.generate([1], 30, do_sample=False, **options) == model.generate([1], 30, eos_token_id=[])


def test_a_model_that_asks_for_sampling(tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "m", weights=plain_weights(seed=3))
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 9.0, "top_k": 0})
    model = Qwen2(folder)
    assert len({tuple(model.generate([1], 20)) for _ in range(3)}) == 3
    assert model.generate([1], 20, top_k=1) == model.generate([1], 20, do_sample=False)


# ---------------------------------------------------------------- streamers


def test_streamers(model: Qwen2) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[list[int]] = []
            self.ended = 0

        def put(self, ids: Any) -> None:
            assert ids.dtype == np.int64 and ids.ndim == 1
            self.got.append(ids.tolist())

        def end(self) -> None:
            self.ended += 1

    streamer, each = Streamer(), list[int]()
    tokens = model.generate([1, 2], 5, streamer=streamer, eos_token_id=[])
    assert streamer.got == [[1, 2], *([token] for token in tokens[2:])] and streamer.ended == 1
    model.generate([1, 2], 5, streamer=each.append, eos_token_id=[])
    assert each == tokens[2:]


def test_a_streamer_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    model = Qwen2("tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path)
    tokens = model.generate(tokenizer.encode("import os"), 8, streamer=transformers.TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(tokens) + "\n"
    assert model.tokenizer.decode(tokens) == tokenizer.decode(tokens)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("inputs", "options", "error", "text"),
    [
        ([], {}, InvalidArgumentError, r"inputs: expected 1 to 128 tokens \(max_position_embeddings\), found 0"),
        ([1] * 129, {}, InvalidArgumentError, "found 129"),
        ([1, VOCAB], {}, IndexRangeError, rf"inputs\[1\]: .* found {VOCAB}"),
        ("text", {}, DTypeError, r"found text; model\.tokenizer\.encode"),
        ([[1]], {}, ShapeError, "inputs"),
        ([1], {"max_new_tokens": -1}, InvalidArgumentError, "max_new_tokens"),
        ([1], {"max_new_tokens": 1.5}, InvalidArgumentError, "max_new_tokens"),
        ([1], {"top_k": -1}, InvalidArgumentError, "top_k"),
        ([1], {"top_p": 2}, InvalidArgumentError, "top_p"),
        ([1], {"temperature": 0, "do_sample": True}, InvalidArgumentError, "temperature"),
        ([1], {"repetition_penalty": -1}, InvalidArgumentError, "repetition_penalty"),
        ([1], {"seed": -1}, InvalidArgumentError, "seed"),
        ([1], {"eos_token_id": "x"}, InvalidArgumentError, "eos_token_id"),
        ([1], {"streamer": 5}, InvalidArgumentError, "streamer"),
    ],
)
def test_errors(model: Qwen2, inputs: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        model.generate(inputs, **options)
    assert model.tokens_computed == 0

"""Choosing tokens: against transformers' logits processors, and by statistics."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

from llaisys.config import GenerationDefaults
from llaisys.errors import DTypeError, InvalidArgumentError, ShapeError
from llaisys.sampling import Sampler, Sampling

V = 503


def random_logits(seed: int, scale: float = 4.0) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(seed).standard_normal(V) * scale).astype(np.float32)


SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 20},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 0.0},
    {"top_p": 0.999, "top_k": 50, "temperature": 0.3},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "temperature": 2.0, "top_k": 7, "top_p": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_scores_are_those_of_transformers(settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    processors: list[Any] = []
    if "repetition_penalty" in settings:
        processors.append(theirs.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if "temperature" in settings:
        processors.append(theirs.TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        processors.append(theirs.TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        processors.append(theirs.TopPLogitsWarper(settings["top_p"]))
    for seed in range(20):
        logits = random_logits(seed)
        logits[10:20] = logits[30]  # ties
        text = np.random.default_rng(seed).integers(0, V, 30)
        expected = torch.from_numpy(logits.copy())[None]
        for processor in processors:
            expected = processor(torch.from_numpy(text)[None], expected)
        found = Sampling(do_sample=True, **settings).scores(logits, text)
        want = expected[0].numpy()
        differ = np.flatnonzero(found != want)
        # Which of several equal scores falls to top-p is a matter of the sort, and so is one token at the very edge.
        if "top_p" in settings:
            assert len(differ) <= 10 and abs(np.isfinite(found).sum() - np.isfinite(want).sum()) <= 1
            kept = np.isfinite(found) & np.isfinite(want)
            assert np.array_equal(found[kept], want[kept])
            assert {float(x) for x in logits[differ]} <= {float(logits[30])} or len(differ) <= 1
        else:
            assert not len(differ)


def test_greedy_is_the_lowest_index_of_the_largest() -> None:
    logits = random_logits(0)
    logits[[40, 400]] = 99
    assert Sampler(Sampling()).next(logits, []) == 40
    assert Sampler(Sampling(repetition_penalty=2.0)).next(logits, [40]) == 400
    logits[7] = np.nan
    for settings in (Sampling(), Sampling(repetition_penalty=2.0)):
        with pytest.raises(InvalidArgumentError, match="logits: expected numbers to choose from, found nan at 7"):
            Sampler(settings).next(logits, [40])


def test_repetition_penalty_works_on_both_signs() -> None:
    logits = np.array([2.0, -2.0, 1.0], np.float32)
    scores = Sampling(repetition_penalty=2.0).scores(logits, [0, 0, 1])
    assert scores.tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Sampling(repetition_penalty=1e300).scores(logits, [0, 1]).tolist() == [0.0, -math.inf, 1.0]


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))
    sampler = Sampler(Sampling(do_sample=True), seed=1)
    count = 20_000
    found = np.bincount([sampler.next(logits, []) for _ in range(count)], minlength=5) / count
    p = np.exp(logits)
    assert np.all(np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / count))


def test_a_seed_repeats_and_dropped_tokens_never_come() -> None:
    settings = Sampling(do_sample=True, top_k=5, temperature=3.0)
    draws = [[Sampler(settings, seed).next(random_logits(i), []) for i in range(50)] for seed in (7, 7, 8)]
    assert draws[0] == draws[1] != draws[2]
    for i, token in enumerate(draws[0]):
        assert token in np.argsort(random_logits(i))[-5:]
    only = np.full(V, -np.inf, np.float32)
    only[[3, V - 1]] = 0
    sampler = Sampler(Sampling(do_sample=True), 0)
    assert {sampler.next(only, []) for _ in range(50)} == {3, V - 1}


def test_a_draw_refuses_what_is_no_probability() -> None:
    for bad in (np.nan, np.inf):
        logits = random_logits(0)
        logits[5] = bad
        with pytest.raises(InvalidArgumentError, match="logits"):
            Sampler(Sampling(do_sample=True)).next(logits, [])
    with pytest.raises(ShapeError, match="logits"):
        Sampler(Sampling()).next(np.zeros((2, 3), np.float32), [])


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"temperature": -1.0}, InvalidArgumentError),
        ({"temperature": 0.0, "do_sample": True}, InvalidArgumentError),
        ({"temperature": math.nan}, InvalidArgumentError),
        ({"temperature": math.inf}, InvalidArgumentError),
        ({"temperature": "warm"}, InvalidArgumentError),
        ({"temperature": [1]}, DTypeError),
        ({"top_k": -1}, InvalidArgumentError),
        ({"top_k": 1.5}, InvalidArgumentError),
        ({"top_k": True}, InvalidArgumentError),
        ({"top_p": 1.01}, InvalidArgumentError),
        ({"top_p": -0.01}, InvalidArgumentError),
        ({"repetition_penalty": 0}, InvalidArgumentError),
        ({"do_sample": "yes"}, InvalidArgumentError),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(values: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(values))):
        Sampling(**values)


@pytest.mark.parametrize("seed", [-1, 1.5, "x", True, 1 << 128])
def test_seeds_are_checked(seed: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="seed"):
        Sampler(Sampling(), seed)


def test_what_a_call_leaves_open_comes_from_the_model() -> None:
    plain, drawn = GenerationDefaults(), GenerationDefaults(do_sample=True, temperature=0.6, top_k=20, top_p=0.9)
    assert not Sampling.resolve(plain).do_sample
    assert Sampling.resolve(plain, top_k=50).do_sample
    assert Sampling.resolve(plain, temperature=0.5).temperature == 0.5
    assert not Sampling.resolve(plain, top_k=50, do_sample=False).do_sample
    assert Sampling.resolve(drawn) == Sampling(True, 0.6, 20, 0.9)
    assert Sampling.resolve(drawn, top_p=0.5) == Sampling(True, 0.6, 20, 0.5)
    assert not Sampling.resolve(drawn, do_sample=False).do_sample
    # The ways to ask for greedy tokens, the course's among them.
    assert not Sampling.resolve(plain, top_k=1, top_p=0.8, temperature=0.8).do_sample
    assert not Sampling.resolve(drawn, temperature=0).do_sample
    with pytest.raises(InvalidArgumentError, match="temperature"):
        Sampling.resolve(plain, do_sample=True, temperature=0)

"""`llaisys.diff.run`: clean runs are certified, and faults are found, named, and blamed on the right certificate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llaisys
from checkpoints import SMALL, plain_weights, shapes_of, write_plain
from llaisys import diff, ops, reference
from llaisys.errors import InvalidArgumentError, StateError
from llaisys.models import Node, Qwen2
from llaisys.models.nodes import graph

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9]
LAYER = "model.layers.1."


@pytest.fixture(autouse=True)
def settings() -> Any:
    """Tier and threads as they were."""
    before = llaisys.isa(), llaisys.num_threads()
    yield
    llaisys.set_isa(before[0])
    llaisys.set_num_threads(before[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = plain_weights(seed=5)
    scaled = {name: x if x.ndim == 1 else x * x.shape[1] ** -0.5 for name, x in weights.items()}
    return write_plain(tmp_path_factory.mktemp("small"), weights=scaled)


def run(folder: Path | str, decode: int = 3, **options: Any) -> diff.Report:
    options.setdefault("tokens", TOKENS)
    return diff.run(folder, decode=decode, **options)


def certified(report: diff.Report) -> None:
    assert report.exit_code == 0, [report.faults[:3], [n for n in report.nodes if n.outcome == "suspect"][:3]]
    assert not report.faults and report.nodes
    assert all(node.checked == node.size > 0 for node in report.nodes)


# ------------------------------------------------------------------ clean runs


def test_every_node_of_every_step_is_certified(folder: Path) -> None:
    report = run(folder)
    certified(report)
    sites = graph(2)
    for step in range(4):
        assert [node.site for node in report.nodes if node.step == step] == list(sites)
    for node in report.nodes:
        expected = {"EDGE", "PARAM", "LOCAL", "REPEAT"} | ({"STATE"} if node.op == "rope_self_attention" else set())
        assert {c for c, outcome in node.outcomes.items() if outcome == "pass"} == expected, node
        assert node.position == (0 if node.step == 0 else len(TOKENS) + node.step - 1)
    assert len(report.tokens) == len(TOKENS) + 3
    with Qwen2(folder) as model:
        assert model.generate(TOKENS, max_new_tokens=3, eos_token_id=[]) == report.tokens


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("count", [1, 2, 31, 33, 127])
def test_no_false_alarms_at_odd_lengths(folder: Path, dtype: str, count: int) -> None:
    tokens = np.random.default_rng(count).integers(0, SMALL["vocab_size"], min(count, 120)).tolist()
    certified(run(folder, decode=2, tokens=tokens, dtype=dtype))


@pytest.mark.parametrize("isa", llaisys.isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_no_false_alarms_on_any_tier(isa: str, threads: int) -> None:
    report = run("tiny", decode=1, prompt="def f(x):\n    return", tokens=None, isa=isa, threads=threads)
    certified(report)
    assert (report.isa, report.threads) == (isa, threads)


def test_a_prompt_of_several_chunks() -> None:
    tokens = np.random.default_rng(0).integers(0, 4096, 513).tolist()
    report = run("tiny", decode=1, tokens=tokens)
    certified(report)
    sizes = [node.rows for node in report.nodes if node.site == "model.layers.0.mlp.act"]
    assert sizes == [512, 1, 1]
    assert any("the last" in note for note in report.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"num_hidden_layers": 1},
        {"tie_word_embeddings": True},
        {"hidden_size": 17, "intermediate_size": 33, "head_dim": 2},
        {"rms_norm_eps": 1.0, "rope_theta": 3.0},
    ],
    ids=str,
)
def test_other_configurations(tmp_path: Path, change: dict[str, Any]) -> None:
    config = {**SMALL, **change}
    rng = np.random.default_rng(3)
    weights = {
        name: rng.standard_normal(shape, np.float32) * (1 if len(shape) == 1 else shape[1] ** -0.5)
        for name, shape in shapes_of(config).items()
    }
    certified(run(write_plain(tmp_path / "model", config, weights), dtype="bf16"))


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_constant_weights(tmp_path: Path, value: float) -> None:
    weights = {name: np.full(shape, value, np.float32) for name, shape in shapes_of(SMALL).items()}
    report = run(write_plain(tmp_path / "model", SMALL, weights))
    assert not report.faults, report.faults[:2]
    assert report.exit_code == 0


def test_taps_do_not_change_the_logits(folder: Path) -> None:
    with Qwen2(folder) as model:
        plain = model.logits(TOKENS)
        with model.session() as session, session.tap(lambda node: None, copy=False):
            assert session.forward(TOKENS).tobytes() == plain.tobytes()


# ---------------------------------------------------------------------- faults


def offset(x: Any, pos_ids: Any, theta: float) -> Any:
    return ops.rope(x, pos_ids + 1, theta)


def without_bias(x: Any, weight: Any, bias: Any = None) -> Any:
    return ops.linear(x, weight)


def last_column(a: Any, b: Any, weight: Any, eps: float) -> Any:
    out, total = reference.add_rms_norm(a, b, weight, eps)
    out[..., -1] = 0
    return out, total


def truncated(gate: Any, up: Any) -> Any:
    bits = reference.swiglu(gate.astype(np.float32), up.astype(np.float32)).view(np.uint32) & 0xFFFF0000
    return bits.view(np.float32).astype(gate.dtype)


@pytest.mark.parametrize(
    ("site", "kernel", "dtype"),
    [
        (LAYER + "self_attn.rope_k", offset, "f32"),
        (LAYER + "self_attn.rope_k", offset, "bf16"),
        ("model.layers.0.self_attn.q_proj", without_bias, "f16"),
        (LAYER + "post_attention_layernorm", last_column, "f32"),
        ("model.norm", last_column, "bf16"),
        (LAYER + "mlp.act", truncated, "bf16"),
    ],
)
def test_local(folder: Path, tmp_path: Path, site: str, kernel: Callable[..., Any], dtype: str) -> None:
    report = run(folder, dtype=dtype, swap={site: kernel}, reproducers=tmp_path / "faults")
    assert report.exit_code == 1
    assert {(fault.site, fault.certificate) for fault in report.faults} == {(site, "LOCAL")}
    (fault,) = report.faults
    assert fault.step == 0
    assert fault.swap is not None and "is gone" in fault.swap and "brings it back" in fault.swap
    assert fault.reproducer is not None and Path(fault.reproducer).is_file()
    assert fault.upstream and fault.downstream
    others = [node for node in report.nodes if node.site != site]
    assert all(node.outcome == "pass" for node in others)


def test_a_hypothesis_names_the_mutation(folder: Path) -> None:
    report = run(folder, swap={"rope": offset})
    assert [fault.site for fault in report.faults] == [f"model.layers.{i}.self_attn.rope_k" for i in (0, 1)]
    assert report.faults[0].hypothesis == "position offset +1"


def test_a_fault_in_decode_only(folder: Path) -> None:
    def act(gate: Any, up: Any) -> Any:
        out = ops.swiglu(gate, up)
        return out * np.float32(1.5) if len(gate) == 1 else out

    report = run(folder, swap={LAYER + "mlp.act": act})
    first = report.faults[0]
    assert (first.site, first.certificate, first.step) == (LAYER + "mlp.act", "LOCAL", 1)
    assert first.hypothesis is not None and first.hypothesis.endswith("in calls of one row, right in a call of more")
    assert first.swap is not None and "brings it back" in first.swap
    (prefill,) = [node for node in report.nodes if node.site == first.site and node.step == 0]
    assert prefill.outcomes["LOCAL"] == "pass" and prefill.ratio <= 1


def test_faults_in_decode_only_are_blamed_in_order(folder: Path) -> None:
    """A repetition comes upon each of them too, in another place; what the run itself has is not displaced by that."""

    def down(x: Any, weight: Any, bias: Any = None) -> Any:
        return ops.linear(x, weight) * np.float32(1.5 if len(x) == 1 else 1)

    report = run(folder, swap={"layers.0.mlp.down_proj": down, "layers.1.self_attn.o_proj": down})
    local = [fault for fault in report.faults if fault.certificate == "LOCAL"]
    assert [fault.site for fault in local] == ["model.layers.0.mlp.down_proj", LAYER + "self_attn.o_proj"]
    assert report.faults[0] == local[0] and [fault.step for fault in local] == [1, 1]
    assert local[0].position == len(TOKENS)


def test_a_fault_that_only_a_repetition_has(folder: Path) -> None:
    def ahead(x: Any, pos_ids: Any, theta: float) -> Any:
        return ops.rope(x, pos_ids + (len(x) == 1), theta)

    report = run(folder, decode=0, swap={LAYER + "self_attn.rope_k": ahead})
    first = report.faults[0]
    assert (first.site, first.certificate) == (LAYER + "self_attn.rope_k", "LOCAL")
    assert "then cut, in a call of 1 row: out: " in first.message
    assert first.hypothesis == "position offset +1, in calls of one row"
    assert first.swap is not None and "brings it back" in first.swap
    (prefill,) = [node for node in report.nodes if node.site == first.site]
    assert (prefill.outcomes["LOCAL"], prefill.outcomes["REPEAT"]) == ("pass", "fault")


# ---------------------------------------------------------------- without taps


def untapped(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Any], None]) -> None:
    """Let `change(tokens, logits)` see to what the engine gives where nobody watches."""
    import importlib

    native = importlib.import_module("llaisys.models.native")
    true = native.NativeSession.forward

    def forward(self: Any, tokens: Any, nlogits: int) -> Any:
        logits = true(self, tokens, nlogits)
        if self._tap is None:
            change(tokens, logits)
        return logits

    monkeypatch.setattr(native.NativeSession, "forward", forward)


@pytest.mark.parametrize(
    ("wrong", "step", "how"),
    [
        (lambda tokens: True, 0, "as in the run"),
        (lambda tokens: len(tokens) == 1, 1, "as in the run"),
        (lambda tokens: len(tokens) == len(TOKENS) + 3, 3, "all tokens in one prefill"),
        (lambda tokens: len(tokens) == 2, 0, "cut back, and the rest in pieces"),
    ],
    ids=["always", "decode", "whole", "pieces"],
)
def test_the_engine_without_taps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any], bool], step: int, how: str
) -> None:
    """One bit of the logits is another where no tap is set, which leaves every token as it is."""

    def change(tokens: Any, logits: Any) -> None:
        if wrong(tokens):
            logits[-1:].view(np.uint32)[:, 7] ^= 1

    untapped(monkeypatch, change)
    report = run(folder)
    (fault,) = report.faults
    assert (fault.site, fault.op, fault.certificate) == ("the engine without taps", "forward", "REPEAT")
    assert fault.step == step and f"without taps, {how}, " in fault.message and "others in 1 of 67" in fault.message
    assert all(node.outcome == "pass" for node in report.nodes)
    assert any("llaisysQwen2ModelInfer was not tried" in note for note in report.notes)


def test_without_taps_an_error_and_a_race(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]

    def change(tokens: Any, logits: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            logits[-1, 7] += 1

    with monkeypatch.context() as patch:
        untapped(patch, change)
        (fault,) = run(folder).faults
        assert "others, but not once more" in fault.message and "not the same bits each time" in str(fault.hypothesis)

    def fail(tokens: Any, logits: Any) -> None:
        raise StateError("out of order")

    untapped(monkeypatch, fail)
    (fault,) = run(folder).faults
    assert fault.site == "the engine without taps" and fault.message.endswith("failed: out of order")


def test_which_layers_in_one_call_are_wrong() -> None:
    from llaisys.diff.untapped import _origin

    right = [{"k": np.array([1, 2]), "v": np.array([3, 4])} for _ in range(3)]

    def with_wrong(layer: int, *names: str) -> Any:
        return [{n: x + (i >= layer and n in names) for n, x in both.items()} for i, both in enumerate(right)]

    for found, text in (
        (right, "gate_proj and up_proj or q_proj of layer 2, or the logits on their way out (all keys"),
        (with_wrong(0, "k", "v"), ": q_proj, k_proj and v_proj of layer 0 (the keys and values of layer 0 are"),
        (with_wrong(1, "v"), ": q_proj, k_proj and v_proj of layer 1 (the values of layer 1 are the first"),
        (
            with_wrong(1, "k", "v"),
            ": gate_proj and up_proj or q_proj of layer 0, or q_proj, k_proj and v_proj of",
        ),
    ):
        assert text in str(_origin(found, right))
    assert _origin([], []) is None


def test_repeat_finds_what_depends_on_the_rows(folder: Path) -> None:
    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        """Right within its bound, but of other bits if there are more rows."""
        if len(x) > len(TOKENS):
            wide = x.astype(np.float64) @ weight.astype(np.float64).T
            return (wide if bias is None else wide + bias).astype(x.dtype)
        return ops.linear(x, weight, bias)

    report = run(folder, swap={LAYER + "mlp.up_proj": linear})
    assert {(fault.site, fault.certificate) for fault in report.faults} == {(LAYER + "mlp.up_proj", "REPEAT")}


def test_repeat_finds_a_race(folder: Path) -> None:
    calls = [0]

    def rope(x: Any, pos_ids: Any, theta: float) -> Any:
        calls[0] += 1
        out = ops.rope(x, pos_ids, theta)
        if calls[0] % 7 == 0:
            out.view(np.uint32)[-1, -1, -1] ^= 1  # within the bound
        return out

    report = run(folder, swap={LAYER + "self_attn.rope_k": rope})
    assert {fault.site for fault in report.faults} == {LAYER + "self_attn.rope_k"}
    assert "REPEAT" in {fault.certificate for fault in report.faults}


class Tampering(Qwen2):
    """A model whose sessions show or compute something else than they should: `tamper(node)` writes to the views."""

    tamper: Callable[[Node], None]

    def session(self) -> Any:
        session = super().session()
        session.tap(type(self).tamper, copy=False)
        return session


def tampered(monkeypatch: pytest.MonkeyPatch, tamper: Callable[[Node], None]) -> None:
    """Let the runs that follow use a model with a node changed after it ran, before the differ sees it."""
    import importlib

    model = type("Model", (Tampering,), {"tamper": staticmethod(tamper)})
    monkeypatch.setattr(importlib.import_module("llaisys.diff.run"), "Qwen2", model)


def test_edge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of gate_proj is changed behind the back of the differ, when up_proj has run."""
    outputs: dict[str, Any] = {}

    def tamper(node: Node) -> None:
        if node.site == LAYER + "mlp.gate_proj":
            outputs["gate"] = node.outputs["out"]
        elif node.site == LAYER + "mlp.up_proj" and "gate" in outputs:
            outputs["gate"][-1, 3] += 1

    tampered(monkeypatch, tamper)
    report = run(folder)
    first = report.faults[0]
    assert (first.site, first.certificate) == (LAYER + "mlp.act", "EDGE")
    assert "gate: expected what model.layers.1.mlp.gate_proj put out" in first.message
    assert first.position == len(TOKENS) - 1
    assert not [fault for fault in report.faults if fault.certificate == "LOCAL"]


def test_param(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tamper(node: Node) -> None:
        if node.site == LAYER + "self_attn.attn":
            node.scalars["scale"] *= 2
        if node.site == LAYER + "self_attn.rope_k":
            node.scalars["theta"] = 1.0

    tampered(monkeypatch, tamper)
    # What the node says of itself is wrong, so LOCAL fails too; PARAM comes first.
    report = run(folder)
    first = report.faults[0]
    assert (first.site, first.certificate) == (LAYER + "self_attn.rope_k", "PARAM")
    assert any("scale: expected" in fault.message for fault in report.faults)


def test_positions_that_are_wrong_from_some_row_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tamper(node: Node) -> None:
        if node.site == LAYER + "self_attn.rope_k" and node.position == 0:
            positions = node.inputs["pos_ids"]
            assert positions is not None
            node.inputs["pos_ids"] = positions + (positions >= 5)

    tampered(monkeypatch, tamper)
    first = run(folder).faults[0]
    assert (first.site, first.certificate, first.position) == (LAYER + "self_attn.rope_k", "PARAM", 5)
    assert "pos_ids: expected 0 and on, first at [5]: expected 5, found 6" in first.message


def test_weights_are_those_of_the_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    native = importlib.import_module("llaisys.models.native")
    true = native.NativeModel._put
    name = LAYER + "mlp.up_proj.weight"

    def put(self: Any, key: str, shape: Any, first: int, rows: Any) -> None:
        if key == name and first == 0:
            rows = rows.copy()
            rows[5:7] = rows[:2]
        true(self, key, shape, first, rows)

    monkeypatch.setattr(native.NativeModel, "_put", put)
    report = run(folder)
    first = report.faults[0]
    assert (first.site, first.certificate) == (LAYER + "mlp.up_proj", "PARAM")
    assert f"expected {name} of the checkpoint, found other bits in 2 of 40 rows, first at [5, 0]" in first.message


def test_a_weight_that_is_overwritten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [0]

    def tamper(node: Node) -> None:
        if node.site == LAYER + "mlp.up_proj":
            seen[0] += 1
            if seen[0] == 4:
                weight = node.inputs["weight"]
                assert weight is not None
                np.frombuffer(weight.base, np.float32)[7] += 1  # the engine's memory

    tampered(monkeypatch, tamper)
    report = run(folder)
    assert (LAYER + "mlp.up_proj", "PARAM") in {(fault.site, fault.certificate) for fault in report.faults}


def test_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the cache is changed between two steps."""
    keys: dict[str, Any] = {}

    def tamper(node: Node) -> None:
        if node.site == LAYER + "self_attn.attn":
            keys["k"] = node.inputs["k"]
        if node.site == LAYER + "input_layernorm" and "k" in keys and node.position == len(TOKENS) + 1:
            view = np.frombuffer(keys["k"].base, np.float32).reshape(keys["k"].shape)
            view[4] = view[3]

    tampered(monkeypatch, tamper)
    report = run(folder)
    first = report.faults[0]
    assert (first.site, first.certificate, first.step) == (LAYER + "self_attn.attn", "STATE", 2)
    assert first.position == 4
    assert first.hypothesis is not None and "row" in first.hypothesis


def test_nodes_that_are_missing_or_renamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    session = importlib.import_module("llaisys.models.session")
    true = session._Watchers.show

    def show(self: Any, site: str, op: str, make: Any) -> None:
        if site == LAYER + "mlp.up_proj":
            return
        true(self, site.replace("1.mlp.act", "1.mlp.activation"), op, make)

    monkeypatch.setattr(session._Watchers, "show", show)
    report = run(folder)
    named = {(fault.site, fault.certificate) for fault in report.faults}
    assert (LAYER + "mlp.up_proj", "PARAM") in named


def test_the_logits_that_forward_returns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    native = importlib.import_module("llaisys.models.native")
    true = native.NativeSession.forward

    def forward(self: Any, tokens: Any, nlogits: int) -> Any:
        logits = true(self, tokens, nlogits)
        logits[-1:, 5] += 1
        return logits

    monkeypatch.setattr(native.NativeSession, "forward", forward)
    first = run(folder).faults[0]
    assert (first.site, first.certificate) == ("lm_head", "EDGE")


def test_a_cache_that_is_not_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    native = importlib.import_module("llaisys.models.native")
    true = native.NativeSession.truncate
    monkeypatch.setattr(native.NativeSession, "truncate", lambda self, n: true(self, min(n + 1, self.length)))
    first = run(folder).faults[0]
    assert (first.site, first.certificate) == ("model.layers.0.self_attn.attn", "STATE")
    assert "expected a cache of 0 tokens, found 1" in first.message


def test_infer_and_its_prefixes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    prefix = importlib.import_module("llaisys.diff.prefix")
    true = prefix.Infer.__call__
    known: list[int] = []

    def call(self: Any, tokens: Any) -> Any:
        """Answers for the text before if only the last but one token is another."""
        if len(known) == len(tokens) and known[:-2] == list(tokens)[:-2]:
            tokens = list(known)
        known[:] = list(tokens)
        return true(self, tokens)

    monkeypatch.setattr(prefix.Infer, "__call__", call)
    first = run(folder).faults[0]
    assert (first.site, first.certificate) == ("model.layers.0.self_attn.attn", "STATE")
    assert "llaisysQwen2ModelInfer after a prompt with one other token" in first.message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_told(tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides agree on NaN, which certifies it; that the result is worth nothing is said beside."""
    from llaisys.diff.html import to_html
    from llaisys.diff.text import print_report

    name = LAYER + "mlp.down_proj.weight"
    weights = {key: x if x.ndim == 1 else x * x.shape[1] ** -0.5 for key, x in plain_weights(seed=5).items()}
    weights[name][5, 3] = value
    report = run(write_plain(tmp_path / "model", weights=weights))
    assert report.exit_code == 0
    print_report(report)
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith(f"NOT FINITE: {name} of the checkpoint is {value} at [5, 3]; ")
    for text in (
        f"in out is {LAYER}mlp.down_proj, the prompt, position 0",
        "the logits of 15 positions are not finite",
    ):
        assert text in report.nonfinite and text in to_html(report)
    assert "in the logits" not in out.partition("context")[2]
    assert diff.Report.from_json(report.to_json()) == report


def test_finite_runs_say_nothing_of_it(folder: Path) -> None:
    assert run(folder, decode=1).nonfinite == ""


# --------------------------------------------------------------------- context


def test_drift_and_flips(folder: Path) -> None:
    report = run(folder, dtype="bf16", swap={LAYER + "self_attn.o_proj": without_bias, "model.norm": last_column})
    sites = {drift.site for drift in report.drift}
    assert sites == set(graph(2))
    early = [d.reference for d in report.drift if d.site == "model.layers.0.mlp.act" and d.reference is not None]
    late = [d.reference for d in report.drift if d.site == "lm_head" and d.reference is not None]
    assert max(early) < 0.02 < max(late)
    for flip in report.flips:
        assert flip.native != flip.reference and flip.margin >= 0 and flip.noise > 0


def test_transformers_as_context(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        report = run("tiny", decode=1, tokens=None, prompt="def f(x):", oracle="hf")
    certified(report)
    found = {d.site: d.transformers for d in report.drift if d.transformers is not None}
    assert set(found) == set(graph(5))
    assert max(found.values()) < 0.05
    assert capfd.readouterr() == ("", "")


def test_without_context(folder: Path) -> None:
    report = run(folder, context=False)
    certified(report)
    assert not report.drift and not report.flips


def test_swapping_for_the_reference_is_reported(folder: Path) -> None:
    report = run(folder, swap={"rope": "reference", "layers.0.*": "reference"})
    certified(report)
    assert report.swaps == {"rope": "reference", "layers.0.*": "reference"}


def test_memory_is_that_of_a_few_nodes() -> None:
    """What a run keeps does not grow with its length: arrays of nodes are let go."""
    import tracemalloc

    peaks = []
    for decode in (4, 24):
        tracemalloc.start()
        certified(run("tiny", decode=decode, tokens=TOKENS, context=False))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (8 << 20)


def test_a_small_budget_gives_the_same_verdict(folder: Path) -> None:
    report = run(folder, max_memory=1)
    assert not report.faults and all(node.outcome == "pass" for node in report.nodes)
    assert any("max_memory" in note for note in report.notes)
    report = run(folder, max_memory=1, swap={LAYER + "mlp.up_proj": without_bias, LAYER + "mlp.act": truncated})
    assert [fault.site for fault in report.faults] == [LAYER + "mlp.act"]


def test_a_report_survives_json(folder: Path) -> None:
    report = run(folder, swap={LAYER + "self_attn.rope_k": offset})
    assert diff.Report.from_json(report.to_json()) == report


def test_arguments_are_checked(folder: Path) -> None:
    for options, text in (
        ({"tokens": None}, "expected one of them, found none"),
        ({"prompt": "x"}, "found both"),
        ({"oracle": "torch"}, 'oracle: expected "hf"'),
        ({"decode": -1}, "decode: expected an integer"),
        ({"tokens": []}, "tokens: expected 1 to 125"),
        ({"decode": 1000}, "tokens: expected 1 to"),
        ({"swap": {"nothing": "reference"}}, "matches nothing"),
    ):
        with pytest.raises(InvalidArgumentError, match=text):
            run(folder, **options)  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    import shutil

    from llaisys.checkpoint import Checkpoint
    from llaisys.errors import IndexRangeError

    folder = write_plain(tmp_path / "model")
    for path in Checkpoint.open("tiny").path.glob("tokenizer*"):
        shutil.copy(path, folder)
    with pytest.raises(IndexRangeError, match="prompt: the tokenizer gives .*, the model has 67 tokens"):
        run(folder, tokens=None, prompt="def fibonacci(n):")

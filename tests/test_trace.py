"""Traces: written and read back alike, compared, and refused where they are not what they say."""

from __future__ import annotations

import importlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llaisys
from checkpoints import plain_weights, write_plain
from llaisys import diff, ops
from llaisys.checkpoint import Checkpoint
from llaisys.diff.compare import compare_traces, print_comparison
from llaisys.diff.trace import Trace
from llaisys.errors import CaseError, CheckpointError
from llaisys.models import Qwen2

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = {name: x if x.ndim == 1 else x * x.shape[1] ** -0.5 for name, x in plain_weights(seed=5).items()}
    return write_plain(tmp_path_factory.mktemp("small"), weights=weights)


def save(folder: Path, path: Path, **options: Any) -> diff.Report:
    options.setdefault("tokens", TOKENS)
    return diff.run(folder, decode=3, save=path, context=False, **options)


@pytest.fixture(scope="module")
def trace(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "a.trace"
    assert save(folder, path).exit_code == 0
    return path


def test_a_trace_has_the_nodes_of_the_run(folder: Path, trace: Path) -> None:
    with Trace(trace) as found, Qwen2(folder) as model, model.session() as session:
        nodes: list[Any] = []
        session.tap(nodes.append)
        session.forward(TOKENS)
        for token in found.header["tokens"][len(TOKENS) :]:
            session.forward([token])
        assert len(found.nodes) == len(nodes)
        checkpoint = Checkpoint.open(folder)
        for traced, node in zip(found, nodes, strict=True):
            assert (traced.site, traced.op, traced.position) == (node.site, node.op, node.position)
            assert traced.scalars == node.scalars and traced.outcome == "pass"
            inputs = traced.inputs(checkpoint)
            assert inputs is not None
            for name, x in {**inputs, **traced.outputs()}.items():
                want = {**node.inputs, **node.outputs}[name]
                assert (x is None) == (want is None)
                if x is not None:
                    assert x.dtype == want.dtype and x.tobytes() == want.tobytes(), (traced.site, name)
        assert found.nodes[0].inputs(None) is None  # no weights
    assert trace.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_blocks_are_shared(folder: Path, trace: Path) -> None:
    """What one node puts out and another reads is there once: the file is not much more than the outputs."""
    with Trace(trace) as found:
        outputs = sum(x.nbytes for node in found for x in node.outputs().values())
    with zipfile.ZipFile(trace) as archive:
        blocks = sum(info.file_size for info in archive.infolist() if info.filename != "trace.json")
    assert blocks < 1.05 * outputs


def test_some_sites_only(folder: Path, tmp_path: Path) -> None:
    save(folder, tmp_path / "some.trace", save_sites=["rope", "layers.0.mlp.*"])
    with Trace(tmp_path / "some.trace") as found:
        assert {node.op for node in found} == {"rope", "linear", "swiglu"}
        assert {node.site for node in found if node.op == "linear"} == {
            f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
        }


def test_nothing_is_left_of_a_run_that_fails(folder: Path, tmp_path: Path) -> None:
    def fails(*args: Any) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError):
        save(folder, tmp_path / "none.trace", swap={"layers.1.mlp.act": fails})
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------- comparing


def test_the_same_run_twice(folder: Path, trace: Path, tmp_path: Path) -> None:
    save(folder, tmp_path / "b.trace", threads=3)
    llaisys.set_num_threads(2)
    result = compare_traces(trace, tmp_path / "b.trace")
    assert result.exit_code == 0 and all(site.equal for site in result.sites) and len(result.sites) == 27
    assert any(text.startswith("threads") for text in result.named)
    assert not result.first_bits


@pytest.mark.parametrize("isa", llaisys.isas()[:-1])
def test_tiers_differ_by_rounding(folder: Path, trace: Path, tmp_path: Path, isa: str) -> None:
    best = llaisys.isas()[-1]
    try:
        save(folder, tmp_path / "b.trace", isa=isa)
    finally:
        llaisys.set_isa(best)
    result = compare_traces(trace, tmp_path / "b.trace")
    assert result.exit_code == 0
    assert any("tier" in text for text in result.named)


def test_storage_types(folder: Path, trace: Path, tmp_path: Path, capsys: Any) -> None:
    save(folder, tmp_path / "b.trace", dtype="bf16")
    result = compare_traces(trace, tmp_path / "b.trace")
    assert result.exit_code == 0, result.parts
    assert result.first_bits.startswith("model.embed_tokens")
    assert all(0 < site.error < 0.2 for site in result.sites if "embed" not in site.site)
    print_comparison(result)
    out = capsys.readouterr().out
    assert "all differences are rounding" in out and max(map(len, out.splitlines())) <= 100
    json.loads(result.to_json())


def test_a_fault_is_where_they_part(folder: Path, trace: Path, tmp_path: Path, capsys: Any) -> None:
    def late(x: Any, pos_ids: Any, theta: float) -> Any:
        return ops.rope(x, pos_ids + 1, theta)

    save(folder, tmp_path / "b.trace", swap={"layers.1.self_attn.rope_k": late})
    result = compare_traces(trace, tmp_path / "b.trace")
    assert result.exit_code == 1
    assert result.parts.startswith("model.layers.1.self_attn.rope_k, the prompt, position 0")
    assert result.which == "B"
    assert result.first_bits == result.parts
    print_comparison(result)
    assert "PART: model.layers.1.self_attn.rope_k" in capsys.readouterr().out
    assert compare_traces(tmp_path / "b.trace", trace).which == "A"


def test_other_weights(folder: Path, trace: Path, tmp_path: Path) -> None:
    weights = {name: x if x.ndim == 1 else x * x.shape[1] ** -0.5 for name, x in plain_weights(seed=5).items()}
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] += 1
    other = write_plain(tmp_path / "other", weights=weights)
    save(other, tmp_path / "b.trace")
    result = compare_traces(trace, tmp_path / "b.trace")
    assert result.exit_code == 1 and list(result.weights) == ["model.layers.0.mlp.up_proj.weight"]
    assert "other bits in 1 of 40 rows, first at [3, 3]" in result.weights["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("dtypes", [("f32", "bf16"), ("bf16", "f32"), ("f16", "bf16"), ("f32", "f32")])
def test_other_weights_in_another_storage_type(
    folder: Path, tmp_path: Path, dtypes: tuple[str, str], capsys: Any
) -> None:
    """A row with the other sign and a weight of another layer are no rounding."""
    weights = {name: x if x.ndim == 1 else x * x.shape[1] ** -0.5 for name, x in plain_weights(seed=5).items()}
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    weights[up][17] *= -1
    weights[down] = weights["model.layers.0.mlp.down_proj.weight"].copy()
    other = write_plain(tmp_path / "other", weights=weights)
    a, b, c = (tmp_path / f"{name}.trace" for name in "abc")
    save(folder, a, dtype=dtypes[0])
    save(other, b, dtype=dtypes[1])
    save(folder, c, dtype=dtypes[1])
    assert compare_traces(a, c).exit_code == 0
    result = compare_traces(a, b)
    assert result.exit_code == 1 and list(result.weights) == [up, down] and not result.uncompared
    assert "has the bits of model.layers.0.mlp.down_proj.weight" in result.weights[down]
    print_comparison(result)
    out = capsys.readouterr().out
    assert "2 weights differ" in out and "rounding" not in out and f"differ in {down}: B has other bits" in out
    # Of the other checkpoint there is no more than what the trace says.
    gone = tmp_path / "gone.trace"
    rewrite(b, gone, lambda header: header.update(model=str(tmp_path / "gone")))
    result = compare_traces(a, gone)
    print_comparison(result)
    assert "rounding" not in capsys.readouterr().out.partition("differ in")[0]
    if "f32" in dtypes[:1]:
        assert result.exit_code == 1 and set(result.weights) == {up, down}
    else:
        assert result.exit_code == 2 and set(result.uncompared) == {up, down}


def test_weights_that_can_not_be_compared(trace: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    a, b = tmp_path / "a.trace", tmp_path / "b.trace"
    save(folder, tmp_path / "c.trace", dtype="bf16")
    for source, target in ((trace, a), (tmp_path / "c.trace", b)):
        rewrite(source, target, lambda header: header.update(model=str(tmp_path / "gone")))
    result = compare_traces(a, b)
    assert result.exit_code == 2 and len(result.uncompared) == len(Checkpoint.open(folder).names())
    print_comparison(result)
    out = capsys.readouterr().out
    assert (
        out.startswith("inconclusive") and "weights could not be compared, the first model.embed_tokens.weight" in out
    )
    assert compare_traces(a, b, folder).exit_code == 0


def test_other_prompts(folder: Path, trace: Path, tmp_path: Path) -> None:
    save(folder, tmp_path / "b.trace", tokens=[*TOKENS[:5], 60, 61])
    result = compare_traces(trace, tmp_path / "b.trace")
    assert result.exit_code == 0  # what both have is the same
    assert any("the first 5 are the same" in text for text in result.named)
    save(folder, tmp_path / "c.trace", tokens=[60, 61])
    result = compare_traces(trace, tmp_path / "c.trace")
    assert result.exit_code == 2 and any("nothing was compared" in note for note in result.notes)


def test_without_the_weights_the_saved_certificates_count(folder: Path, trace: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.trace"
    rewrite(trace, moved, lambda header: header.update(model=str(tmp_path / "gone")))
    save(folder, tmp_path / "b.trace", dtype="bf16")
    result = compare_traces(moved, tmp_path / "b.trace")
    assert result.exit_code == 0 and any("saved certificates" in note for note in result.notes)
    with pytest.raises(CheckpointError):
        compare_traces(moved, tmp_path / "b.trace", tmp_path / "nowhere")


# ---------------------------------------------------------------------- hostile


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[Any], Any] = lambda header: None,
    blocks: Callable[[str, bytes], bytes] = lambda name, data: data,
) -> None:
    """The trace with another header, or other blocks."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename == "trace.json":
                header = json.loads(data)
                replaced = change(header)
                data = json.dumps(header if replaced is None else replaced).encode()
            else:
                data = blocks(info.filename, data)
            new.writestr(info.filename, data)


def _node(**fields: Any) -> Callable[[Any], None]:
    return lambda header: header["nodes"][3].update(fields)


def _array(name: str, **fields: Any) -> Callable[[Any], None]:
    return lambda header: header["nodes"][3]["outputs"][name].update(fields)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h: [1], "expected an object"),
        (lambda h: h.update(format="other"), "format: expected 'llaisys trace'"),
        (lambda h: h.update(version=2), "version: expected 1"),
        (lambda h: h.update(tokens=["a"]), "tokens: expected a list of integers"),
        (lambda h: h.update(prompt=[-1]), "prompt: expected a list of integers"),
        (lambda h: h.update(model=3), "model: expected a text"),
        (lambda h: h.update(config=None), "config: expected an object"),
        (lambda h: h.update(weights={"a": "../b"}), "weights: expected digests"),
        (lambda h: h.update(nodes={}), "nodes: expected a list"),
        (_node(op="system"), "expected a site and an operator"),
        (_node(site=7), "expected a site and an operator"),
        (_node(scalars={"eps": 1}), "scalars: expected"),
        (_node(position=-4), "integers from 0"),
        (_node(step="x"), "integers from 0"),
        (_node(ratio=[]), "ratio: expected a number"),
        (_node(inputs={"x": None}), "expected arrays"),
        (_array("out", dtype="O"), "dtype and shape"),
        (_array("out", shape=[1 << 40, 1 << 40]), "bytes in blocks of the file"),
        (_array("out", shape=[True]), "dtype and shape"),
        (_array("out", blocks=["trace.json"]), "blocks"),
        (_array("out", blocks=["0" * 32]), "bytes in blocks of the file"),
        (_array("out", shape=[1]), "bytes in blocks of the file"),
    ],
)
def test_headers_that_lie(trace: Path, tmp_path: Path, change: Callable[[Any], Any], text: str) -> None:
    rewrite(trace, tmp_path / "bad.trace", change)
    with pytest.raises(CaseError, match=text):
        Trace(tmp_path / "bad.trace")


def test_blocks_that_lie(trace: Path, tmp_path: Path) -> None:
    rewrite(trace, tmp_path / "bad.trace", blocks=lambda name, data: bytes(len(data)))
    with Trace(tmp_path / "bad.trace") as found, pytest.raises(CaseError, match="other content"):
        found.nodes[0].outputs()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 100, b"PK\x05\x06" + bytes(18)])
def test_files_that_are_no_trace(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.trace"
    path.write_bytes(content)
    with pytest.raises(CaseError):
        Trace(path)


def test_a_truncated_file(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.trace").write_bytes(trace.read_bytes()[:-200])
    with pytest.raises(CaseError):
        Trace(tmp_path / "bad.trace")


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CaseError, match="a regular file"):
        Trace(tmp_path / "pipe")
    with pytest.raises(CaseError, match="a regular file"):
        Trace(tmp_path)


def test_a_header_that_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("llaisys.diff.trace"), "MAX_HEADER", 1 << 16)
    with zipfile.ZipFile(tmp_path / "bomb.trace", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("trace.json", b"[" * (1 << 20))
    with pytest.raises(CaseError, match="at most 65536 bytes"):
        Trace(tmp_path / "bomb.trace")
    with zipfile.ZipFile(tmp_path / "deep.trace", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("trace.json", b"[" * 60000)
    with pytest.raises(CaseError):
        Trace(tmp_path / "deep.trace")


def test_values_of_all_types(folder: Path, trace: Path) -> None:
    with Trace(trace) as found:
        kinds = {x.dtype for node in found for x in node.outputs().values()}
    assert kinds == {np.dtype(np.float32)}

"""Case files: what is written is read back bit for bit, and nothing else is read; `llaisys replay`."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llaisys
from kernel_harness import run as run_kernel
from kernel_harness import same_bits
from llaisys.case import MAX_HEADER, Case, decode, encode, load_case, save_case, versions
from llaisys.errors import CaseError
from llaisys.reference import SPECS
from llaisys.reference.spec import calls
from llaisys.replay import replay
from test_cli import run


def case_of(name: str, dtype: str, index: int = -1) -> Case:
    spec = SPECS[name]
    _, _, values = list(calls(spec, dtype))[index]
    outputs = run_kernel(spec, values, name)
    return Case(
        op=name,
        inputs={a.name: values[a.name] for a in spec.inputs_args},
        scalars={s.name: values[s.name] for s in spec.scalars},
        outputs=dict(zip([a.name for a in spec.outputs], outputs, strict=True)),
        site="model.layers.3.self_attn.q_proj",
        step=2,
        position=17,
        isa=llaisys.isa(),
        threads=2,
        versions=versions(),
    )


@pytest.mark.parametrize("name", SPECS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """Every case of the SPEC: NaN payloads, empty and 0-d arrays, strides, absent inputs."""
    for dtype in SPECS[name].dtypes:
        for index in range(len(list(calls(SPECS[name], dtype)))):
            case = case_of(name, dtype, index)
            save_case(tmp_path / "case.npz", case)
            found = load_case(tmp_path / "case.npz")
            for kind in ("inputs", "outputs"):
                mine, theirs = getattr(case, kind), getattr(found, kind)
                assert list(mine) == list(theirs)
                for key, x in mine.items():
                    assert (x is None) == (theirs[key] is None)
                    assert x is None or same_bits(np.ascontiguousarray(x).reshape(x.shape), theirs[key]), (
                        dtype,
                        index,
                        key,
                    )
            plain = ("op", "scalars", "site", "step", "position", "isa", "threads", "versions")
            assert all(getattr(case, field) == getattr(found, field) for field in plain)


def test_replay_says_what_changed() -> None:
    for name in ("linear", "argmax", "rope_self_attention"):
        case = case_of(name, "bf16", 9)
        result = replay(case)
        assert result.same_bits and result.native and result.twin and result.captured
        first = next(iter(case.outputs))
        wrong = {**case.outputs, first: case.outputs[first].copy()}
        wrong[first].flat[0] += 1
        result = replay(Case(name, case.inputs, case.scalars, wrong))
        assert result.changed == 1 and result.native and result.captured.outcome == "fault"


# ----------------------------------------------------------------- refusals


def member(array: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


def write(path: Path, members: dict[str, bytes], **header: Any) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def parts(case: Case) -> dict[str, bytes]:
    header, arrays = encode(case)
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    return {f"{name}.npy": member(x) for name, x in {"header": text, **arrays}.items()}


Header = dict[str, Any]
CHANGES: list[tuple[str, Callable[[Header], Any], str]] = [
    ("another format", lambda h: h | {"format": "other"}, "format: expected 'llaisys case'"),
    ("a later version", lambda h: h | {"version": 2}, "version: expected 1, found 2"),
    ("an unknown operator", lambda h: h | {"op": "no_such_op"}, "op: expected one of add"),
    ("an operator that is no text", lambda h: h | {"op": ["add"]}, "op: expected one of add"),
    ("no scalars", lambda h: h | {"scalars": {}}, "scalars: expected"),
    ("a scalar that is a text", lambda h: h | {"scalars": {"theta": "1"}}, "scalars.theta: expected a number"),
    ("a scalar out of range", lambda h: h | {"scalars": {"theta": -1.0}}, "theta: expected a valid call"),
    ("an unknown dtype", lambda h: h | {"arrays": h["arrays"] | {"input.x": "f8"}}, "arrays.input.x: expected one of"),
    (
        "another dtype",
        lambda h: h | {"arrays": h["arrays"] | {"input.x": "f32"}},
        "arrays.input.x: expected elements",
    ),
    ("bf16 as u16", lambda h: h | {"arrays": h["arrays"] | {"input.x": "u16"}}, "x: expected a valid call"),
    ("an absent input", lambda h: h | {"arrays": h["arrays"] | {"input.x": None}}, "arrays: expected"),
    ("other arrays", lambda h: h | {"arrays": {"input.x": "bf16"}}, "arrays: expected"),
    ("a site that is no text", lambda h: h | {"site": 5}, "site: expected a text"),
    ("a negative step", lambda h: h | {"step": -1}, "step: expected an integer"),
    ("a step that is true", lambda h: h | {"step": True}, "step: expected an integer"),
    ("versions that are none", lambda h: h | {"versions": [1]}, "versions: expected texts"),
    ("a list", lambda h: [h], "header: expected an object"),
]


@pytest.mark.parametrize(("title", "change", "text"), CHANGES, ids=[c[0].replace(" ", "-") for c in CHANGES])
def test_headers_are_refused(title: str, change: Callable[[Header], Any], text: str) -> None:
    header, arrays = encode(case_of("rope", "bf16"))
    assert decode(header, arrays, "file").op == "rope"
    with pytest.raises(CaseError, match="^file: ") as caught:
        decode(change(json.loads(json.dumps(header))), arrays, "file")
    assert text in str(caught.value)
    assert isinstance(caught.value, ValueError) and caught.value.file == "file"


def test_shapes_are_refused() -> None:
    header, arrays = encode(case_of("linear", "f32", 8))
    for name in arrays:
        with pytest.raises(CaseError, match="expected a valid call, found linear: "):
            decode(header, {**arrays, name: np.concatenate([arrays[name]] * 2, axis=-1)}, "file")


def test_files_are_refused(tmp_path: Path) -> None:
    """Objects, claims of more than is there, broken archives, what is no file: typed, and before memory is taken."""
    good, path = parts(case_of("rope", "bf16")), tmp_path / "case.npz"
    write(path, good)
    assert load_case(path).op == "rope"
    objects = io.BytesIO()
    np.lib.format.write_array(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    huge = member(np.zeros(4, np.uint16)).replace(b"(4,)", b"(1099511627776,)".ljust(4))
    for title, changed in {
        "objects": {"input.x.npy": objects.getvalue()},
        "a claim": {"input.x.npy": huge},
        "too short": {"input.x.npy": good["input.x.npy"][:-2]},
        "too long": {"input.x.npy": good["input.x.npy"] + b"xx"},
        "no array": {"input.x.npy": b"x" * 300},
        "another version": {"input.x.npy": b"\x93NUMPY\x09" + good["input.x.npy"][7:]},
        "no JSON": {"header.npy": member(np.frombuffer(b"{", np.uint8))},
        "not UTF-8": {"header.npy": member(np.frombuffer(b"\xff\xfe", np.uint8))},
        "deep JSON": {"header.npy": member(np.frombuffer(b"[" * 100_000, np.uint8))},
        "a long header": {"header.npy": member(np.zeros(MAX_HEADER + 1, np.uint8))},
        "a header of floats": {"header.npy": member(np.zeros(3))},
        "one array too many": {"more.npy": member(np.zeros(3))},
    }.items():
        write(path, {**good, **changed})
        with pytest.raises(CaseError) as caught:
            load_case(path)
        assert str(path) in str(caught.value), title
    write(path, {f"{i}.npy": b"" for i in range(100)})
    with pytest.raises(CaseError, match="size: expected at most"):
        load_case(path)
    write(path, {name: data for name, data in good.items() if name != "header.npy"})
    with pytest.raises(CaseError, match="header: expected JSON in bytes, found none"):
        load_case(path)
    for data in (b"", b"PK\x03\x04" + b"x" * 50, pickle.dumps({"a": 1})):
        path.write_bytes(data)
        with pytest.raises(CaseError, match="file: expected an .npz of plain arrays"):
            load_case(path)
    whole = tmp_path / "whole.npz"
    write(whole, good)
    for cut in range(0, whole.stat().st_size, 37):
        path.write_bytes(whole.read_bytes()[:cut])
        with pytest.raises(CaseError):
            load_case(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CaseError, match="expected a regular file"):
        load_case(path)
    with pytest.raises(CaseError, match="expected a regular file"):
        load_case(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_case(tmp_path / "none.npz")


# ------------------------------------------------------------------ command


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    case = case_of("swiglu", "bf16", 10)
    save_case(path, case)
    done = run("replay", str(path), "--isa", "scalar", "--threads", "1")
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert "swiglu model.layers.3.self_attn.q_proj, step 2, position 17" in text
    assert "✓ captured" in text and "✓ kernel" in text and "✓ twin" in text and "worst at out[" in text
    assert "runs now on scalar, 1 threads" in text

    wrong = case.outputs["out"].copy()
    wrong.flat[3] *= 2
    save_case(path, Case(case.op, case.inputs, case.scalars, {"out": wrong}))
    done = run("replay", str(path))
    text = done.stdout.decode()
    assert done.returncode == 0 and "other bits than captured in 1 of" in text and "✗ captured" in text
    done = run("check", "--from", str(path))
    assert done.returncode == 1 and "✗ 1 of 1" in done.stdout.decode()

    empty = case_of("swiglu", "bf16", 1)
    assert not empty.outputs["out"].size
    save_case(path, empty)
    assert run("replay", str(path)).returncode == 2
    assert run("check", "--from", str(path)).returncode == 2
    assert run("check", "argmax", "--from", str(path)).returncode == 2
    path.write_text("nothing")
    done = run("replay", str(path))
    assert done.returncode == 2 and b"llaisys: error: " in done.stderr and b"expected an .npz" in done.stderr
    assert run("replay", str(tmp_path / "none.npz")).returncode == 2

"""Checkpoint: weights arrive bit for bit, and nothing else in a folder does."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llaisys.checkpoint import Checkpoint, expected_tensors
from llaisys.config import Qwen2Config
from llaisys.errors import CheckpointError

from .checkpoints import (
    SMALL,
    make_checkpoint,
    plain_weights,
    safetensors_bytes,
    shapes_of,
    with_header,
    write_json,
    write_plain,
)

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_plain(tmp_path / "model")


def refused(path: Path, *parts: str) -> CheckpointError:
    """Opening is refused, and the message names each of `parts` and the four attributes."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    error = caught.value
    for part in (*parts, error.file, error.field, str(error.expected), str(error.found)):
        assert part in str(error), f"{part!r} is not in: {error}"
    return error


def rewrite(folder: Path, weights: dict[str, np.ndarray[Any, Any]], **header: Any) -> Path:
    (folder / "model.safetensors").write_bytes(safetensors_bytes(weights, header))
    return folder


def shard(folder: Path, count: int = 3, index: bool = True) -> Path:
    """Split model.safetensors of a plain folder into `count` files."""
    weights = plain_weights()
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(count):
        name = f"model-{part + 1:05}-of-{count:05}.safetensors"
        names = list(weights)[part::count]
        (folder / name).write_bytes(safetensors_bytes({key: weights[key] for key in names}))
        weight_map |= dict.fromkeys(names, name)
    if index:
        write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return folder


def edit_index(folder: Path, **changes: Any) -> Path:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    write_json(folder / INDEX, index)
    return folder


def check_equal(checkpoint: Checkpoint, weights: dict[str, np.ndarray[Any, Any]]) -> None:
    arrays = dict(checkpoint.tensors())
    assert set(arrays) == set(weights) == set(checkpoint.names())
    for name, array in arrays.items():
        assert array.dtype == weights[name].dtype and array.tobytes() == weights[name].tobytes(), name
        assert array.flags.owndata and array.flags.writeable and array.flags.c_contiguous
        assert checkpoint.shape_of(name) == array.shape


# --------------------------------------------------------------------------------------------------------- what is read


def test_single_file(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    check_equal(checkpoint, plain_weights())
    assert checkpoint.path == folder and checkpoint.config == Qwen2Config.from_folder(folder)
    assert checkpoint.names() == tuple(expected_tensors(checkpoint.config))
    assert checkpoint.nbytes == 4 * checkpoint.config.num_parameters
    sizes = [array.nbytes for _, array in checkpoint.tensors()]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("index", [True, False])
def test_shards(folder: Path, index: bool) -> None:
    check_equal(Checkpoint.open(str(shard(folder, 3, index))), plain_weights())


def test_any_name_without_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights of mine.safetensors")
    check_equal(Checkpoint.open(folder), plain_weights())


def test_rows(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    whole = checkpoint.tensor("lm_head.weight")
    for start, stop in ((0, 67), (0, 1), (13, 40), (66, 67), (5, 5), (67, 67)):
        assert np.array_equal(checkpoint.rows("lm_head.weight", start, stop), whole[start:stop])
    assert np.array_equal(checkpoint.rows(NORM, 3, 7), checkpoint.tensor(NORM)[3:7])
    for start, stop in ((-1, 2), (3, 2), (0, 68)):
        with pytest.raises(IndexError):
            checkpoint.rows("lm_head.weight", start, stop)
    with pytest.raises(KeyError):
        checkpoint.tensor("no")


def test_mixed_dtypes(folder: Path) -> None:
    types = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
    weights = {name: w.astype(types[i % 3]) for i, (name, w) in enumerate(plain_weights().items())}
    checkpoint = Checkpoint.open(rewrite(folder, weights))
    check_equal(checkpoint, weights)
    assert {checkpoint.dtype_of(name) for name in checkpoint.names()} == {"f32", "f16", "bf16"}
    config = {key: value for key, value in SMALL.items() if key != "torch_dtype"}
    write_json(folder / "config.json", config)
    refused(folder, "dtype", "BF16, F16, F32", "missing")


def test_dtype_of_the_weights_where_config_has_none(folder: Path) -> None:
    write_json(folder / "config.json", {key: value for key, value in SMALL.items() if key != "torch_dtype"})
    rewrite(folder, {name: w.astype(ml_dtypes.bfloat16) for name, w in plain_weights().items()})
    assert Qwen2Config.from_folder(folder).dtype is None
    assert Checkpoint.open(folder).config.dtype == "bf16"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("shards", "tied"), [(None, True), (3, False), (2, True)])
def test_what_transformers_saves(tmp_path: Path, dtype: str, shards: int | None, tied: bool) -> None:
    import torch

    model = make_checkpoint(
        tmp_path, dtype=dtype, shards=shards, tie_word_embeddings=tied, generation={"eos_token_id": [4, 5]}
    )
    assert len(list(tmp_path.glob("*.safetensors"))) == (shards or 1)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.dtype == dtype and checkpoint.config.eos_token_ids == (4, 5)
    state = model.state_dict()
    assert ("lm_head.weight" in checkpoint.names()) is not tied
    assert set(state) - set(checkpoint.names()) == ({"lm_head.weight"} if tied else set())
    raw = torch.int32 if dtype == "f32" else torch.int16
    for name, array in checkpoint.tensors():
        assert checkpoint.dtype_of(name) == dtype
        assert np.array_equal(array.view(f"i{array.itemsize}"), state[name].view(raw).numpy()), name


def test_embedded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint.open("tiny")
    assert checkpoint.config.num_attention_heads == 6 and checkpoint.config.dtype == "bf16"
    write_plain(tmp_path / "tiny")
    assert Checkpoint.open("tiny").config == checkpoint.config
    assert Checkpoint.open("./tiny").config.vocab_size == SMALL["vocab_size"]
    assert Checkpoint.open(Path("tiny")).config.vocab_size == SMALL["vocab_size"]


def test_tensors_that_are_tolerated(folder: Path) -> None:
    weights = plain_weights()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float64)}
    check_equal(Checkpoint.open(rewrite(folder, {**extra, **weights})), weights)
    write_json(folder / "config.json", {**SMALL, "tie_word_embeddings": True})
    tied = dict(weights)
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    rewrite(folder, tied)
    tied.pop("lm_head.weight")
    check_equal(Checkpoint.open(folder), tied)
    rewrite(folder, tied)
    check_equal(Checkpoint.open(folder), tied)


def test_tied_head_that_differs(folder: Path) -> None:
    write_json(folder / "config.json", {**SMALL, "tie_word_embeddings": True})
    refused(folder, "lm_head.weight", "tie_word_embeddings")
    weights = plain_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].astype(np.float16)
    refused(rewrite(folder, weights), "lm_head.weight")


def test_no_attention_bias(folder: Path) -> None:
    write_json(folder / "config.json", {**SMALL, "attention_bias": False})
    refused(folder, "self_attn.q_proj.bias", "attention_bias is false")
    weights = {name: weight for name, weight in plain_weights().items() if not name.endswith("bias")}
    check_equal(Checkpoint.open(rewrite(folder, weights)), weights)
    write_json(folder / "config.json", SMALL)
    refused(folder, "q_proj.bias", "and 5 more are missing")


# ------------------------------------------------------------------------------------------- tensors against the config


@pytest.mark.parametrize("name", list(shapes_of(SMALL)))
def test_each_tensor_is_needed_in_its_shape(folder: Path, name: str) -> None:
    weights = plain_weights()
    array = weights.pop(name)
    refused(rewrite(folder, weights), name, str(list(array.shape)), "none")
    for wrong in (array[1:], array[None], array.reshape(-1)[: array.size // 2], np.concatenate([array, array])):
        error = refused(rewrite(folder, {**weights, name: wrong}), "model.safetensors", str(list(wrong.shape)))
        assert error.field == f"{name}: shape" and error.expected == list(array.shape)
    error = refused(rewrite(folder, {**weights, name: array.astype(np.float64)}), "F32 or F16 or BF16", "F64")
    assert error.field == f"{name}: dtype"


@pytest.mark.parametrize(
    "name", ["model.layers.2.input_layernorm.weight", "embed_tokens.weight", "a", "", "\x1b[2J", "x" * 5000, "é"]
)
def test_unknown_tensor(folder: Path, name: str) -> None:
    error = refused(rewrite(folder, {**plain_weights(), name: np.ones(3, np.float32)}), "no such tensor", "F32 [3]")
    assert "\x1b" not in str(error) and len(str(error)) < 1000


def test_nothing_is_allocated_before_the_check(folder: Path) -> None:
    """A sparse file of a terabyte whose tensor does not fit the config, and a config that does not fit the file."""
    size = 1 << 40
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(with_header(header, b""))
        try:
            file.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
    refused(folder, "missing")
    write_plain(folder, {**SMALL, "vocab_size": 1 << 22, "hidden_size": 1 << 16})
    refused(folder, "[4194304, 65536]", "[67, 24]")


# ----------------------------------------------------------------------------------------------------------- the header


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [24], "data_offsets": [0, 96], **changes}


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "header",
    [
        {NORM: entry()},  # overlaps another
        {NORM: entry(data_offsets=[96, 0])},
        {NORM: entry(data_offsets=[-96, 0])},
        {NORM: entry(data_offsets=[0, 1 << 62])},
        {NORM: entry(data_offsets=[0.0, 96.0])},
        {NORM: entry(data_offsets=[0])},
        {NORM: entry(shape=[-24])},
        {NORM: entry(shape=[1 << 63, 1 << 63])},
        {NORM: entry(shape="24")},
        {NORM: entry(dtype="F99")},
        {NORM: entry(dtype=None)},
        {NORM: 3},
        {NORM: None},
        {NORM: {}},
        {"__metadata__": {"format": 3}},
        {"__metadata__": [1]},
    ],
)
def test_bad_header_entries(folder: Path, header: dict[str, Any]) -> None:
    refused(rewrite(folder, plain_weights(), **header), "model.safetensors")


def test_metadata_is_fine(folder: Path) -> None:
    check_equal(Checkpoint.open(rewrite(folder, plain_weights(), __metadata__={"format": "pt"})), plain_weights())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        struct.pack("<Q", 1 << 63),
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        with_header(b"{}", b""),
        with_header(b"{}", b"x"),
        with_header(b"[]", b""),
        with_header(b"\xff\xfe", b""),
        with_header(b"[" * 100_000, b""),
        with_header(b'{"a":' * 5000 + b"1" + b"}" * 5000, b""),
        with_header(b" " * (9 << 20), b""),
        b"PK\x03\x04" + b"\0" * 100,
        pickle.dumps({"model.norm.weight": [1.0]}),
    ],
)
def test_bad_files(folder: Path, raw: bytes) -> None:
    (folder / "model.safetensors").write_bytes(raw)
    refused(folder)


def test_truncated_and_padded(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    for cut in (1, 96, len(raw) // 2, len(raw) - 9, len(raw) - 8, len(raw) - 1):
        (folder / "model.safetensors").write_bytes(raw[:-cut])
        refused(folder, "model.safetensors")
    (folder / "model.safetensors").write_bytes(raw + b"\0")
    refused(folder, "model.safetensors")


def test_duplicate_name_in_one_header(folder: Path) -> None:
    """The library takes the last one: the same bytes, read as something else."""
    raw = safetensors_bytes(plain_weights())
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + length], raw[8 + length :]
    first = json.dumps({NORM: json.loads(header)[NORM]}).encode()
    (folder / "model.safetensors").write_bytes(with_header(first[:-1] + b"," + header[1:], data))
    refused(folder, NORM, "duplicate key")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fuzz_header(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever the bytes: a typed refusal, or weights of the right shapes."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        write_plain(folder)
    raw = bytearray(safetensors_bytes(plain_weights()))
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end))
        new = data.draw(st.binary(max_size=6) | st.sampled_from([b"}", b'"', b"0", b"9", b",", b"]", b"-", b"1e9"]))
        raw[at : at + data.draw(st.integers(0, 6))] = new
    (folder / "model.safetensors").write_bytes(raw)
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError as error:
        assert len(str(error)) < 2000
    else:
        assert {name: array.shape for name, array in checkpoint.tensors()} == shapes_of(SMALL)


# ------------------------------------------------------------------------------------------------------------ the index


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "..",
        ".",
        "",
        "pytorch_model.bin",
        "evil.py",
        "model\0.safetensors",
        "model\n.safetensors",
        "\ud800.safetensors",
        "x" * 5000 + ".safetensors",
        None,
        3,
        ["model.safetensors"],
    ],
)
def test_names_in_the_index(folder: Path, name: Any) -> None:
    write_plain(folder.parent)
    refused(edit_index(shard(folder), **{NORM: name}))


def test_index_that_lies(folder: Path) -> None:
    shard(folder)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    good = (folder / INDEX).read_text()
    there = json.loads(good)["weight_map"][NORM]
    other = next(name for name in names if name != there)
    refused(edit_index(folder, **{NORM: other}), NORM, INDEX)
    (folder / INDEX).write_text(good)
    refused(edit_index(folder, **{"model.layers.9.x": there}), "model.layers.9.x", there)
    (folder / INDEX).write_text(good)
    refused(edit_index(folder, **{NORM: "none.safetensors"}), "none.safetensors", "no such file")
    index = json.loads(good)
    del index["weight_map"][NORM]
    write_json(folder / INDEX, index)
    refused(folder, NORM, "does not put it here")
    for bad in ({}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, "[]", "{", '{"weight_map": NaN}'):
        write_json(folder / INDEX, bad)
        refused(folder, INDEX)
    write_json(folder / INDEX, good[:-2] + f', "{NORM}": "{there}"' + good[-2:])
    refused(folder, "duplicate key")
    write_json(folder / INDEX, {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(1001)}})
    refused(folder, "at most 1000 files")


def test_two_sets_of_weights(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(plain_weights()))
    refused(folder, INDEX, "both")


def test_duplicate_across_shards(folder: Path) -> None:
    shard(folder, 2, index=False)
    (folder / "more.safetensors").write_bytes(safetensors_bytes({NORM: plain_weights()[NORM]}))
    refused(folder, "more.safetensors", NORM, "duplicate")


# ----------------------------------------------------------------------------------------------------------- the folder


def test_no_weights(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", SMALL)
    refused(tmp_path, "*.safetensors", "none")
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps({}))
        assert "pickle" in str(refused(tmp_path).found)
        (tmp_path / name).unlink()


def test_adapter(folder: Path) -> None:
    write_json(folder / "adapter_config.json", {})
    refused(folder, "adapter")


def test_code_in_the_folder_is_not_run(folder: Path) -> None:
    mark = folder / "ran"
    for name in ("__init__.py", "modeling_qwen2.py", "jinja2.py", "safetensors.py", "conftest.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')\n")
    (folder / "libllaisys.so").write_bytes(b"\x7fELF")
    Checkpoint.open(folder)
    assert not mark.exists()


@pytest.mark.parametrize("path", ["/nowhere/at/all", "a\0b", "", "/dev/null", __file__])
def test_no_folder(path: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path) if path else Checkpoint.open("./\x1b")
    assert caught.value.field == "path"


FILES = ["config.json", "generation_config.json", "model.safetensors", INDEX]


def put(folder: Path, name: str, kind: str) -> None:
    """Put something that is no regular file where `name` should be."""
    path = folder / name
    target = folder.parent / f"target of {name}"
    if path.exists():
        path.replace(target)
    else:
        write_json(target, {})
    if kind == "link outside":
        path.symlink_to(target)
    elif kind == "relative link outside":
        path.symlink_to(Path("..") / target.name)
    elif kind == "chain of links":
        (folder / "step").symlink_to(target)
        path.symlink_to("step")
    elif kind == "broken link":
        path.symlink_to("nothing")
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "directory":
        path.mkdir()
    elif kind == "link to directory":
        path.symlink_to(".")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to("pipe")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = Path.cwd()
            os.chdir(folder)  # the name of a socket must be short
            try:
                server.bind(name)
            finally:
                os.chdir(here)
    else:
        raise AssertionError(kind)


KINDS = [
    "link outside",
    "relative link outside",
    "chain of links",
    "broken link",
    "loop",
    "directory",
    "link to directory",
    "pipe",
    "link to pipe",
    "device",
    "socket",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_no_regular_file(folder: Path, name: str, kind: str) -> None:
    put(folder, name, kind)
    error = refused(folder, name)
    assert error.field in ("file", "link")


@pytest.mark.parametrize("kind", KINDS)
def test_shard_that_is_no_regular_file(folder: Path, kind: str) -> None:
    put(shard(folder), "model-00002-of-00003.safetensors", kind)
    refused(folder, "model-00002-of-00003.safetensors")


def test_links_inside_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "model.safetensors").rename(folder / "deep" / "er" / "w")
    (folder / "model.safetensors").symlink_to("deep/er/w")
    (folder / "config.json").rename(folder / "c")
    (folder / "config.json").symlink_to(folder / "c")
    check_equal(Checkpoint.open(folder), plain_weights())
    (tmp_path / "alias").symlink_to(folder)  # the folder itself is the user's choice
    check_equal(Checkpoint.open(tmp_path / "alias"), plain_weights())


def hub_cache(root: Path) -> Path:
    """The layout of the hub cache; returns the snapshot."""
    plain = write_plain(root / "plain")
    cache = root / "models--org--name"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(cache / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_hub_cache(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    check_equal(Checkpoint.open(snapshot), plain_weights())
    (tmp_path / "alias").symlink_to(snapshot)
    check_equal(Checkpoint.open(tmp_path / "alias"), plain_weights())


@pytest.mark.parametrize(
    "trick", ["blob is a link", "blobs is a link", "other cache", "no snapshots", "below blobs", "refs"]
)
def test_hub_cache_that_leads_elsewhere(tmp_path: Path, trick: str) -> None:
    snapshot = hub_cache(tmp_path)
    cache = snapshot.parent.parent
    blobs = cache / "blobs"
    link = snapshot / "config.json"
    blob = link.resolve()
    if trick == "blob is a link":
        blob.rename(tmp_path / "secret")
        blob.symlink_to(tmp_path / "secret")
    elif trick == "blobs is a link":
        blobs.rename(tmp_path / "elsewhere")
        blobs.symlink_to(tmp_path / "elsewhere")
    elif trick == "no snapshots":
        snapshot.parent.rename(cache / "snapshot")
        snapshot = cache / "snapshot" / snapshot.name
    else:
        target = {
            "other cache": tmp_path / "models--org--other" / "blobs" / "c",
            "below blobs": blobs / "sub" / "c",
            "refs": cache / "refs" / "c",
        }[trick]
        target.parent.mkdir(parents=True)
        blob.rename(target)
        link.unlink()
        link.symlink_to(target)
    error = refused(snapshot, "config.json", "hub cache")
    assert error.field == "link"


def test_unreadable(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / "config.json").chmod(0)
    refused(folder, "config.json")


# ------------------------------------------------------------------------------------------ files that change meanwhile


@pytest.mark.parametrize("how", ["replaced", "truncated", "rewritten", "removed", "link"])
def test_file_that_changes_after_open(folder: Path, how: str) -> None:
    path = folder / "model.safetensors"
    checkpoint = Checkpoint.open(folder)
    raw = path.read_bytes()
    if how == "replaced":
        (folder / "new").write_bytes(raw)
        (folder / "new").replace(path)
    elif how == "truncated":
        os.truncate(path, len(raw) - 8)
    elif how == "rewritten":
        os.utime(path, ns=(1, 1))
    else:
        path.rename(folder.parent / "moved")
        if how == "link":
            path.symlink_to("../moved")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.tensor(NORM)
    assert "model.safetensors" in caught.value.file


def test_no_file_stays_open(folder: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    checkpoint = Checkpoint.open(folder)
    next(checkpoint.tensors())
    put(folder, "generation_config.json", "pipe")
    refused(folder)
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) == before


# --------------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
import numpy as np
from llaisys.checkpoint import Checkpoint
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10
start = peak()
checkpoint = Checkpoint.open(sys.argv[1])
copies = {name: array.copy() for name, array in checkpoint.tensors()}  # as the engine copies them
print(peak() - start, checkpoint.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """Copies of all weights cost their size and little more: 72 MB here, in the proportions of a real model."""
    config = {**SMALL, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 2000, "num_hidden_layers": 5}
    rng = np.random.default_rng(0)
    weights = {name: rng.random(shape, np.float32) for name, shape in shapes_of(config).items()}
    write_plain(tmp_path, config, weights)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, nbytes = map(int, done.stdout.split())
    assert nbytes > 64 << 20
    assert peak <= 1.05 * nbytes + (16 << 20), (peak, nbytes)

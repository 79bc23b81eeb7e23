"""Reading the weights of a Qwen2 checkpoint: a folder in Hugging Face layout, or the embedded model "tiny".

Weights are one model.safetensors, or shards with model.safetensors.index.json, or any *.safetensors without an index.
Nothing is believed: `Checkpoint.open` checks the name, shape and dtype of every tensor in every shard against what
config.json implies, before any memory for weights is taken. Pickles (pytorch_model.bin and the like), Python and shared
libraries in the folder are never opened.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from .config import Qwen2Config
from .errors import CheckpointError, OutOfMemoryError
from .folder import ModelFolder, OpenFile, foreign, parse_json, show

__all__ = ["Checkpoint", "expected_tensors"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# A tensor costs about 120 bytes of header and 90 of index; the largest config that is accepted has 12 000 of them.
MAX_HEADER_BYTES = 8 << 20
MAX_INDEX_BYTES = 8 << 20
MAX_SHARDS = 1000

_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "F32": ("f32", np.dtype(np.float32)),
    "F16": ("f16", np.dtype(np.float16)),
    "BF16": ("bf16", np.dtype(ml_dtypes.bfloat16)),
}
# Written by old versions of transformers, and computed from rope_theta by every version.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies: `offset` bytes into `file`, whose identity was `identity` when its header was read."""

    file: str
    identity: tuple[int, int, int, int]
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def expected_tensors(config: Qwen2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the model, in the order of the forward pass.

    Matrices are [out, in]. E hidden, F intermediate, V vocabulary, H query heads, K key/value heads, D head dim:
    q_proj [H*D, E] with bias [H*D], k_proj and v_proj [K*D, E] with bias [K*D], o_proj [E, H*D], gate_proj and up_proj
    [F, E], down_proj [E, F], norms [E], embed_tokens and lm_head [V, E] (no lm_head where the embeddings are tied).
    """
    e, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, e)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (e,)
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            shapes[f"{prefix}self_attn.{name}.weight"] = (rows, e)
            if config.attention_bias:
                shapes[f"{prefix}self_attn.{name}.bias"] = (rows,)
        shapes[prefix + "self_attn.o_proj.weight"] = (e, q)
        shapes[prefix + "post_attention_layernorm.weight"] = (e,)
        shapes[prefix + "mlp.gate_proj.weight"] = (f, e)
        shapes[prefix + "mlp.up_proj.weight"] = (f, e)
        shapes[prefix + "mlp.down_proj.weight"] = (e, f)
    shapes["model.norm.weight"] = (e,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, e)
    return shapes


class Checkpoint:
    """Config and weights of a checked folder. No file stays open; a file that changes after `open` is refused."""

    def __init__(self, folder: ModelFolder, config: Qwen2Config, tensors: dict[str, _Tensor]) -> None:
        """For `open`."""
        self.folder = folder
        self.config = config
        self._tensors = tensors

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Check the folder `path`, or the embedded model for the string "tiny" ("./tiny" is a folder).

        Raises `CheckpointError`, which names file, field, expected and found, for anything that is not a sound Qwen2
        checkpoint by the rules of `ModelFolder`, `Qwen2Config` and this module.
        """
        folder = ModelFolder.locate(path)
        config = Qwen2Config.from_folder(folder)
        shards = _shards(folder)
        tensors = _gather(folder, shards)
        tensors = _match(folder, config, tensors)
        if config.tie_word_embeddings and "lm_head.weight" in tensors:
            head = tensors.pop("lm_head.weight")
            _check_tied(folder, tensors["model.embed_tokens.weight"], head)
        if config.dtype is None:
            config = replace(config, dtype=_common_dtype(folder, tensors))
        return cls(folder, config, tensors)

    @property
    def path(self) -> Path:
        """The folder, as it was given."""
        return self.folder.path

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, as they are in the files."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def names(self) -> tuple[str, ...]:
        """The names of all weights, in the order of the forward pass; no lm_head.weight if it is tied."""
        return tuple(self._tensors)

    def dtype_of(self, name: str) -> str:
        """ "f32", "f16" or "bf16": the type in the file, which may differ from `config.dtype`. KeyError if unknown."""
        return _DTYPES[self._tensors[name].dtype][0]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a weight. KeyError if there is no such name."""
        return self._tensors[name].shape

    def numpy_dtype_of(self, name: str) -> np.dtype[Any]:
        """float32, float16 or ml_dtypes.bfloat16. KeyError if there is no such name."""
        return _DTYPES[self._tensors[name].dtype][1]

    def row_bytes_of(self, name: str) -> int:
        """Bytes of one row of the first axis. KeyError if there is no such name."""
        return self._tensors[name].nbytes // self._tensors[name].shape[0]

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """One weight as a new array of float32, float16 or ml_dtypes.bfloat16. KeyError if there is no such name."""
        return self.rows(name, 0, self.shape_of(name)[0])

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """The rows [start, stop) of a weight, 0 <= start <= stop <= shape[0]: a tensor that is large by itself can be
        taken in parts, so that it is never there twice. IndexError for other rows."""
        tensor = self._tensors[name]
        if not 0 <= start <= stop <= tensor.shape[0]:
            raise IndexError(f"{name}: expected rows within [0, {tensor.shape[0]}], found [{start}, {stop})")
        try:
            array = np.empty((stop - start, *tensor.shape[1:]), self.numpy_dtype_of(name))
        except MemoryError:
            nbytes = (stop - start) * self.row_bytes_of(name)
            raise OutOfMemoryError(f"{name}: expected {nbytes} bytes of memory, found less") from None
        with self.reader(name) as read:
            read(start, array)
        return array

    @contextmanager
    def reader(self, name: str) -> Iterator[Callable[[int, npt.NDArray[Any]], None]]:
        """A function that fills a contiguous array with the rows of a weight from the given one on.

        For one thread at a time; others have a reader of their own.
        """
        tensor, row = self._tensors[name], self.row_bytes_of(name)
        with _reopen(self.folder, tensor) as file:

            def read(start: int, array: npt.NDArray[Any]) -> None:
                file.read_at(tensor.offset + start * row, array.reshape(-1).view(np.uint8).data)

            yield read

    def tensors(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """(name, array) of every weight, one at a time and the largest first.

        The arrays are read, not mapped, and not kept. Largest first, so that the array in flight comes on top of little
        when it is large: the peak is the copies that the caller has made, plus the array that it holds, plus the next.
        """
        for name in sorted(self._tensors, key=lambda key: -self._tensors[key].nbytes):
            yield name, self.tensor(name)


class _reopen:
    """A tensor's file, once more, and only if it is still the file whose header was checked."""

    def __init__(self, folder: ModelFolder, tensor: _Tensor) -> None:
        self.context = folder.open(tensor.file)
        self.tensor = tensor

    def __enter__(self) -> OpenFile:
        file = self.context.__enter__()
        if file.identity != self.tensor.identity:
            self.context.__exit__(None, None, None)
            raise CheckpointError(
                file=file.path, field="file", expected="the file as it was opened", found="another or a changed one"
            )
        return file

    def __exit__(self, *details: Any) -> None:
        self.context.__exit__(*details)


def _label(name: str) -> str:
    """A tensor name for an error message."""
    return name if name.isprintable() and len(name) <= 200 else show(name, 200)


def _shards(folder: ModelFolder) -> dict[str, set[str] | None]:
    """The files with the weights, each with the names that the index puts there (None without an index)."""
    names = folder.names()
    if "adapter_config.json" in names:
        raise CheckpointError(
            file=folder.path / "adapter_config.json",
            field="file",
            expected="a whole model",
            found="an adapter, which changes the weights of another model",
        )
    weights = [name for name in names if name.endswith(".safetensors")]
    if INDEX in names:
        shards = _read_index(folder)
        if SINGLE in names and SINGLE not in shards:
            raise CheckpointError(
                file=folder.path / INDEX, field="weight_map", expected=f"{SINGLE} or no such file", found="both"
            )
        return shards
    if SINGLE in names:
        return {SINGLE: None}
    if not weights:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        found = f"only {_label(pickles[0])}, a pickle, which is never read" if pickles else "none"
        raise CheckpointError(file=folder.path, field="weights", expected="*.safetensors", found=found)
    if len(weights) > MAX_SHARDS:
        raise CheckpointError(
            file=folder.path, field="weights", expected=f"at most {MAX_SHARDS} files", found=len(weights)
        )
    return dict.fromkeys(weights)


def _read_index(folder: ModelFolder) -> dict[str, set[str] | None]:
    file = folder.path / INDEX
    weight_map = folder.read_json(INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            file=file, field="weight_map", expected="an object of tensor and file names", found=show(weight_map)
        )
    shards: dict[str, set[str] | None] = {}
    for tensor, name in weight_map.items():
        # What a plain file name is, and that it leads to a regular file of the folder, is for ModelFolder to say; here
        # it is checked so that the message names the tensor.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.safetensors", name) or not name.isprintable():
            raise CheckpointError(
                file=file,
                field=f"weight_map.{_label(tensor)}",
                expected="the plain name of a .safetensors file in the folder",
                found=show(name),
            )
        members = shards.setdefault(name, set())
        assert members is not None
        members.add(tensor)
        if len(shards) > MAX_SHARDS:
            raise CheckpointError(file=file, field="weight_map", expected=f"at most {MAX_SHARDS} files", found="more")
    return shards


def _gather(folder: ModelFolder, shards: dict[str, set[str] | None]) -> dict[str, _Tensor]:
    """All tensors of all shards, which must be where the index says, each once."""
    tensors: dict[str, _Tensor] = {}
    for shard, promised in shards.items():
        with folder.open(shard) as file:
            header = _read_header(shard, file)
            for name, tensor in header.items():
                if promised is not None and name not in promised:
                    raise CheckpointError(
                        file=file.path,
                        field=_label(name),
                        expected=f"no such tensor, as weight_map of {INDEX} does not put it here",
                        found="one",
                    )
                if name in tensors:
                    raise CheckpointError(
                        file=file.path,
                        field=_label(name),
                        expected=f"the tensor once, it is in {tensors[name].file} too",
                        found="a duplicate",
                    )
                tensors[name] = tensor
            for name in promised or ():
                if name not in header:
                    raise CheckpointError(
                        file=file.path,
                        field=_label(name),
                        expected=f"the tensor, as weight_map of {INDEX} puts it here",
                        found="none",
                    )
    return tensors


def _read_header(shard: str, file: OpenFile) -> dict[str, _Tensor]:
    """The tensors of a safetensors file: the library parses and validates it; what it does not tell is read here.

    The library takes the last of two tensors of one name without a word, and tells no offsets. So the header is read a
    second time by strict JSON rules, and both readings must agree.
    """
    start = bytearray(8)
    if file.size < 8:
        raise CheckpointError(file=file.path, field="size", expected="at least 8 bytes", found=file.size)
    file.read_at(0, memoryview(start))
    (length,) = struct.unpack("<Q", start)
    if length > min(MAX_HEADER_BYTES, file.size - 8):
        limit = f"at most {MAX_HEADER_BYTES} bytes and no more than the file has, {file.size}"
        raise CheckpointError(file=file.path, field="header size", expected=limit, found=length)
    raw = bytearray(length)
    file.read_at(8, memoryview(raw))
    header = parse_json(bytes(raw), file.path)
    header.pop("__metadata__", None)

    parsed = _library_header(file)
    if set(parsed) != set(header):
        raise CheckpointError(
            file=file.path, field="header", expected=f"{len(parsed)} tensors", found=f"{len(header)}, or other names"
        )
    data = 8 + length
    tensors: dict[str, _Tensor] = {}
    for name, entry in header.items():
        dtype, shape = parsed[name]
        span = _span(entry, file.size - data)
        if span is None or entry.get("dtype") != dtype or entry.get("shape") != list(shape):
            raise CheckpointError(
                file=file.path, field=_label(name), expected=f"{dtype} {list(shape)} in the file", found=show(entry)
            )
        tensors[name] = _Tensor(shard, file.identity, dtype, shape, data + span[0], span[1] - span[0])
    return tensors


def _span(entry: Any, size: int) -> tuple[int, int] | None:
    """The data_offsets of a header entry if they lie within `size` bytes."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(item) is not int for item in offsets):
        return None
    return (offsets[0], offsets[1]) if 0 <= offsets[0] <= offsets[1] <= size else None


def _library_header(file: OpenFile) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor, as the safetensors library reads and validates the file.

    It checks sizes, overlaps, holes and the end of the file. It takes names only, so it is given that of the open
    descriptor: the file that was checked, not whatever has its name by now.
    """
    descriptor = Path(f"/proc/self/fd/{file.stream.fileno()}")
    result = {}
    name = str(descriptor if descriptor.exists() else file.path)
    with foreign(file.path, "header", "a valid safetensors file"), safe_open(name, framework="np") as tensors:
        for key in tensors.keys():  # noqa: SIM118, it is no mapping
            part = tensors.get_slice(key)
            result[key] = (str(part.get_dtype()), tuple(part.get_shape()))
    return result


def _match(folder: ModelFolder, config: Qwen2Config, tensors: dict[str, _Tensor]) -> dict[str, _Tensor]:
    """The tensors in the order of the forward pass, each of the name, shape and dtype that `config` asks for.

    A copy of a tied head stays in the result.
    """
    expected = expected_tensors(config)
    head = "lm_head.weight"
    if config.tie_word_embeddings and head in tensors:
        expected[head] = (config.vocab_size, config.hidden_size)
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise CheckpointError(
            file=folder.path,
            field=missing[0],
            expected=f"a tensor of shape {list(expected[missing[0]])}",
            found=f"none{more}",
        )
    for name, tensor in tensors.items():
        file = folder.path / tensor.file
        if name not in expected:
            if _IGNORED.fullmatch(name):
                continue
            reason = ", as attention_bias is false" if not config.attention_bias and name.endswith("_proj.bias") else ""
            raise CheckpointError(
                file=file,
                field=_label(name),
                expected=f"no such tensor in a Qwen2ForCausalLM of {config.num_hidden_layers} layers{reason}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )
        if tensor.shape != expected[name]:
            raise CheckpointError(
                file=file, field=f"{name}: shape", expected=list(expected[name]), found=show(list(tensor.shape))
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(file=file, field=f"{name}: dtype", expected=" or ".join(_DTYPES), found=tensor.dtype)
        nbytes = math.prod(tensor.shape) * _DTYPES[tensor.dtype][1].itemsize
        if tensor.nbytes != nbytes:
            raise CheckpointError(file=file, field=f"{name}: bytes", expected=nbytes, found=tensor.nbytes)
    return {name: tensors[name] for name in expected}


def _common_dtype(folder: ModelFolder, tensors: dict[str, _Tensor]) -> str:
    found = sorted({tensor.dtype for tensor in tensors.values()})
    if len(found) > 1:
        raise CheckpointError(
            file=folder.path / "config.json",
            field="dtype",
            expected=f"a value, as the weights are of several types, {', '.join(found)}",
            found="nothing (the key is missing)",
        )
    return _DTYPES[found[0]][0]


def _check_tied(folder: ModelFolder, embedding: _Tensor, head: _Tensor) -> None:
    """Refuse a head that config.json calls tied and that is not the embedding; transformers would use it untied."""
    same = embedding.dtype == head.dtype
    step = 4 << 20
    with _reopen(folder, embedding) as left, _reopen(folder, head) as right:
        for done in range(0, embedding.nbytes if same else 0, step):
            size = min(step, embedding.nbytes - done)
            parts: Sequence[bytearray] = (bytearray(size), bytearray(size))
            left.read_at(embedding.offset + done, memoryview(parts[0]))
            right.read_at(head.offset + done, memoryview(parts[1]))
            if parts[0] != parts[1]:
                same = False
                break
    if not same:
        raise CheckpointError(
            file=folder.path / head.file,
            field="lm_head.weight",
            expected="the same as model.embed_tokens.weight, as tie_word_embeddings is true",
            found="another matrix",
        )

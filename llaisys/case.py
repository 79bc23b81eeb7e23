"""Case files: one captured operator call in an .npz, for `llaisys replay`.

The file holds plain arrays and one JSON header, in the member "header": operator, scalars, the dtype of every array by
its name in `DTYPES`, and where and how the call was made. bf16, which numpy has no name for, is stored as its bits in
uint16. A file may come from a stranger: nothing in it is executed or unpickled, sizes are bounded before memory is
taken, and what does not fit the operator's SPEC is refused.

`encode` and `decode` turn a case into header and arrays and back, for files that hold many.
"""

from __future__ import annotations

import json
import math
import os
import platform
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ._lib import MAX_DIMS, library_info
from .errors import CaseError
from .files import new_file, open_regular
from .reference import DTYPES, SPECS, Spec
from .reference.binding import Problem, bind, describe

__all__ = ["Case", "decode", "encode", "load_case", "read_arrays", "save_case", "versions"]

Array = npt.NDArray[Any]

FORMAT, VERSION = "llaisys case", 1
#: Most bytes of the arrays of a file, and of its header.
MAX_BYTES, MAX_HEADER = 8 << 30, 1 << 20
MAX_MEMBERS = 64
_BF16 = np.dtype(ml_dtypes.bfloat16)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TEXTS = ("site", "isa")
_NUMBERS = ("step", "position", "threads")


@dataclass(frozen=True, eq=False)
class Case:
    """One operator call: what went in, and what the native kernel made of it.

    `inputs` and `outputs` are named as in the SPEC, an absent optional input is None. `site`, `step` and `position`
    say where in a model the call was, `isa`, `threads` and `versions` what made the outputs.
    """

    op: str
    inputs: Mapping[str, Array | None]
    scalars: Mapping[str, float]
    outputs: Mapping[str, Array]
    site: str = ""
    step: int = 0
    position: int = 0
    isa: str = ""
    threads: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> Spec:
        """The SPEC of the operator."""
        return SPECS[self.op]

    @property
    def dtype(self) -> str:
        """The storage dtype, by its name."""
        storage = (self.inputs[a.name] for a in self.spec.inputs_args if a.dtype in ("T", "any"))
        return next(_NAMES[x.dtype] for x in storage if x is not None)


def versions() -> dict[str, str]:
    """What made a case, for its header: this package, the library's build, numpy, and the kind of machine."""
    info = library_info()
    return {
        "llaisys": info.version,
        "build": info.build_hash,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


def save_case(path: str | os.PathLike[str], case: Case) -> None:
    """Write one case. FileError if the file cannot be written."""
    header, arrays = encode(case)
    text = np.frombuffer(json.dumps(header, indent=1).encode(), np.uint8)
    with new_file(path) as file:
        np.savez(file, allow_pickle=False, **{"header": text, **arrays})


def load_case(path: str | os.PathLike[str]) -> Case:
    """The case of a file that `save_case` wrote. CaseError for anything else, OSError if it cannot be read."""
    arrays = read_arrays(path)
    header = arrays.pop("header", None)
    if header is None or header.dtype != np.uint8 or header.ndim != 1 or header.size > MAX_HEADER:
        raise CaseError(file=path, field="header", expected="JSON in bytes", found=_describe(header))
    try:
        fields = json.loads(header.tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise CaseError(file=path, field="header", expected="JSON", found=str(error)) from None
    return decode(fields, arrays, path)


def encode(case: Case) -> tuple[dict[str, Any], dict[str, Array]]:
    """Header (plain JSON) and arrays ("input.NAME", "output.NAME") of a case."""
    arrays: dict[str, Array] = {}
    dtypes: dict[str, str | None] = {}
    for kind, values in (("input", case.inputs), ("output", case.outputs)):
        for name, x in values.items():
            dtypes[f"{kind}.{name}"] = None if x is None else _NAMES[x.dtype]
            if x is not None:
                arrays[f"{kind}.{name}"] = (
                    np.ascontiguousarray(x).view(np.uint16).reshape(x.shape) if x.dtype == _BF16 else x
                )
    header = {
        "format": FORMAT,
        "version": VERSION,
        "op": case.op,
        "scalars": {name: float(x) if isinstance(x, float) else int(x) for name, x in case.scalars.items()},
        "arrays": dtypes,
        **{name: getattr(case, name) for name in (*_TEXTS, *_NUMBERS)},
        "versions": dict(case.versions),
    }
    return header, arrays


def decode(header: Any, arrays: Mapping[str, Array], file: str | os.PathLike[str]) -> Case:
    """The case of a header and arrays as `encode` makes them; `file` is for messages. CaseError for all others."""

    def refuse(field: str, expected: Any, found: Any) -> CaseError:
        return CaseError(file=file, field=field, expected=expected, found=repr(found)[:200])

    if not isinstance(header, dict):
        raise refuse("header", "an object", header)
    for name, wanted in {"format": FORMAT, "version": VERSION}.items():
        if header.get(name) != wanted:
            raise refuse(name, repr(wanted), header.get(name))
    op = header.get("op")
    if not isinstance(op, str) or op not in SPECS:
        raise refuse("op", f"one of {', '.join(SPECS)}", op)
    spec, scalars, names = SPECS[op], header.get("scalars"), header.get("arrays")
    if not isinstance(scalars, dict) or list(scalars) != [s.name for s in spec.scalars]:
        raise refuse("scalars", [s.name for s in spec.scalars], scalars)
    for name, x in scalars.items():
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise refuse(f"scalars.{name}", "a number", x)
    wanted_names = [f"input.{a.name}" for a in spec.inputs_args] + [f"output.{a.name}" for a in spec.outputs]
    if not isinstance(names, dict) or list(names) != wanted_names:
        raise refuse("arrays", wanted_names, names)
    there = {key for key, dtype in names.items() if dtype is not None}
    if set(arrays) != there:
        raise refuse("arrays", sorted(there), sorted(arrays))
    values = {key: None if dtype is None else _typed(arrays[key], dtype, key, refuse) for key, dtype in names.items()}
    inputs = {a.name: values[f"input.{a.name}"] for a in spec.inputs_args}
    outputs = {a.name: x for a in spec.outputs if (x := values[f"output.{a.name}"]) is not None}
    if len(outputs) < len(spec.outputs):
        raise refuse("arrays", "all outputs", names)
    bound = bind(spec, {k: None if x is None else describe(x) for k, x in (inputs | outputs).items()}, scalars)
    if isinstance(bound, Problem):
        raise CaseError(file=file, field=bound.argument, expected="a valid call", found=bound.message)
    for name in _TEXTS:
        if not isinstance(header.get(name, ""), str):
            raise refuse(name, "a text", header[name])
    for name in _NUMBERS:
        if type(header.get(name, 0)) is not int or not 0 <= header.get(name, 0) < 2**63:
            raise refuse(name, "an integer from 0", header[name])
    made_by = header.get("versions", {})
    if not isinstance(made_by, dict) or not all(isinstance(x, str) for x in made_by.values()):
        raise refuse("versions", "texts", made_by)
    where = {name: header[name] for name in (*_TEXTS, *_NUMBERS) if name in header}
    return Case(op, inputs, scalars, outputs, versions=made_by, **where)


def _typed(x: Array, name: Any, key: str, refuse: Any) -> Array:
    """`x` as the dtype that the header says, which must be the one that it is stored as."""
    if not isinstance(name, str) or name not in DTYPES:
        raise refuse(f"arrays.{key}", f"one of {', '.join(DTYPES)}", name)
    stored = np.dtype(np.uint16) if DTYPES[name] == _BF16 else DTYPES[name]
    if x.dtype != stored:
        raise refuse(f"arrays.{key}", f"elements of {stored} for {name}", str(x.dtype))
    return x.view(DTYPES[name]) if x.dtype != DTYPES[name] else x


def read_arrays(path: str | os.PathLike[str], members: int = MAX_MEMBERS) -> dict[str, Array]:
    """The arrays of an .npz, each in row-major order. CaseError for anything that is none, holds objects or more than
    `members` arrays, or is larger than it says."""

    def refuse(field: str, expected: str, found: str) -> CaseError:
        return CaseError(file=path, field=field, expected=expected, found=found)

    file = open_regular(path)
    if file is None:
        raise refuse("file", "a regular file", "another")
    with file:
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                total = sum(info.file_size for info in infos)
                if len(infos) > members or total > MAX_BYTES:
                    limit = f"at most {members} members of {MAX_BYTES} bytes in all"
                    raise refuse("size", limit, f"{len(infos)} of {total}")
                return {info.filename.removesuffix(".npy"): _member(archive, info) for info in infos}
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
            if isinstance(error, CaseError):
                raise
            raise refuse("file", "an .npz of plain arrays", str(error)) from None


_READERS: dict[Any, Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    # Not np.load: it takes the memory that the header of the array asks for before it reads it.
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _READERS:
            raise ValueError(f"{info.filename}: version {version} of the array format")
        shape, columns_first, dtype = _READERS[version](stream)
        size, left = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
        if dtype.hasobject or len(shape) > MAX_DIMS or size != left:
            raise ValueError(f"{info.filename}: {dtype} {list(shape)} in {left} bytes")
        x = np.frombuffer(_bytes(stream, size), dtype)
    return np.ascontiguousarray(x.reshape(shape[::-1]).T) if columns_first else x.reshape(shape)


def _bytes(stream: IO[bytes], size: int) -> bytearray:
    """Exactly `size` bytes, in memory that grows with what is really there."""
    data = bytearray()
    while len(data) < size:
        part = stream.read(min(size - len(data), 1 << 24))
        if not part:
            raise EOFError(f"expected {size} bytes, found {len(data)}")
        data += part
    return data


def _describe(x: Array | None) -> str:
    return "none" if x is None else f"{x.dtype} {list(x.shape)}"

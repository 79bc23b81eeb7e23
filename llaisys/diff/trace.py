"""Traces: the nodes of a run in one file, for `llaisys trace-diff`.

A trace is a zip file with a JSON header, "trace.json", and the arrays as plain bytes, each block named by the digest
of its content, so that what one node puts out and others read is there once. Keys and values are cut where the passes
of the run were, and so share their blocks with the outputs they are made of. Weights are not in it: of each there is a
digest, and whoever needs them takes them from the checkpoint. A file may come from a stranger: nothing in it is
executed or unpickled, sizes are bounded before memory is taken, and every block must have the content that its name
says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..errors import CaseError
from ..files import NewFile, open_regular
from ..reference import DTYPES, FLOATS, SPECS
from ..reference.binding import Problem, bind
from ..reference.numerics import cast
from .ledger import Array, Entry

FORMAT, VERSION = "llaisys trace", 1
#: Most bytes of the header, and of one array.
MAX_HEADER, MAX_ARRAY = 256 << 20, 8 << 30
MAX_NODES = 1 << 22
#: The member with everything but the arrays.
HEADER = "trace.json"
_DIGEST = re.compile(r"[0-9a-f]{32}")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TEXTS = ("model", "dtype", "isa", "machine", "cpu")


def digest_of(data: Any) -> str:
    """The name of a block."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# ------------------------------------------------------------------ writing


class TraceWriter:
    """Writes the nodes of a run as they come. The file is there, whole, only after `close`."""

    def __init__(self, path: str | os.PathLike[str], sites: Collection[str]) -> None:
        self.path = Path(path)
        self._sites = frozenset(sites)
        self._file = NewFile(path)
        self._zip = zipfile.ZipFile(self._file.stream, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._blocks: set[str] = set()
        self._nodes: list[tuple[dict[str, Any], Entry]] = []
        self._weights: dict[tuple[str, int], str] = {}
        self._digests: dict[str, str] = {}
        self._cuts: list[int] = [0]

    def visit(self, entry: Entry) -> None:
        """Write a node, if its site was asked for."""
        if entry.wiring.tokens is not None:
            self._cuts.append(entry.position + entry.rows)  # where passes begin and end
        if entry.site not in self._sites:
            return
        inputs: dict[str, Any] = {}
        for name, x in entry.inputs.items():
            weight = entry.wiring.weights.get(name)
            if x is None:
                inputs[name] = None
            elif weight is not None:
                inputs[name] = {"weight": weight, "digest": self._weight(weight, x)}
            else:
                inputs[name] = self._array(x, name in entry.wiring.state)
        record = {
            "site": entry.site,
            "op": entry.wiring.op,
            "step": entry.step,
            "position": entry.position,
            "scalars": dict(entry.scalars),
            "inputs": {arg.name: inputs[arg.name] for arg in entry.spec.inputs_args},
            "outputs": {name: self._array(x, False) for name, x in entry.outputs.items()},
        }
        self._nodes.append((record, entry))

    def close(self, header: Mapping[str, Any]) -> None:
        """Put the header to it and the file in its place."""
        nodes = []
        for record, entry in self._nodes:
            ratio = entry.ratio if math.isfinite(entry.ratio) else str(entry.ratio)
            nodes.append({**record, "outcome": entry.outcomes["LOCAL"], "ratio": ratio})
        fields = {"format": FORMAT, "version": VERSION, **header, "weights": self._digests, "nodes": nodes}
        with self._file.errors():
            self._zip.writestr(HEADER, json.dumps(fields))
            self._zip.close()
        self._file.keep()

    def abort(self) -> None:
        """Leave nothing behind. After `close` this does nothing."""
        if not self._file.stream.closed:
            with contextlib.suppress(OSError):  # of a full disk
                self._zip.close()
            self._file.discard()

    def _array(self, x: Array, state: bool) -> dict[str, Any]:
        x = np.ascontiguousarray(x)
        cuts = [c for c in self._cuts if c < len(x)] if state else [0]
        blocks = [self._block(x[a:b]) for a, b in zip(cuts, [*cuts[1:], len(x)], strict=True)]
        return {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "blocks": blocks}

    def _block(self, x: Array) -> str:
        data = x.reshape(-1).view(np.uint8).data
        name = digest_of(data)
        if name not in self._blocks:
            self._blocks.add(name)
            with self._file.errors():
                self._zip.writestr(name, bytes(data))
        return name

    def _weight(self, name: str, x: Array) -> str:
        key = name, x.ctypes.data
        if key not in self._weights:
            self._weights[key] = digest_of(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
            self._digests.setdefault(name, self._weights[key])
        return self._weights[key]


# ------------------------------------------------------------------ reading


@dataclass(frozen=True)
class TracedNode:
    """A node of a trace; its arrays are read on demand."""

    trace: Trace
    site: str
    op: str
    step: int
    position: int
    scalars: dict[str, float]
    outcome: str  # LOCAL of the run that was saved
    ratio: float
    fields: Mapping[str, Any]

    def outputs(self) -> dict[str, Array]:
        """The outputs by name."""
        return {name: self.trace.array(field) for name, field in self.fields["outputs"].items()}

    def inputs(self, checkpoint: Checkpoint | None) -> dict[str, Array | None] | None:
        """The inputs by name, weights from the checkpoint; None if they are not to be had there, bit for bit."""
        found: dict[str, Array | None] = {}
        for name, field in self.fields["inputs"].items():
            if field is None:
                found[name] = None
            elif "weight" in field:
                weight = self.trace.weight(checkpoint, field["weight"], field["digest"])
                if weight is None:
                    return None
                found[name] = weight
            else:
                found[name] = self.trace.array(field)
        return found

    def rows(self) -> int:
        """Rows of the first output."""
        return int(next(iter(self.fields["outputs"].values()))["shape"][0])


class Trace:
    """A trace file, open for reading. CaseError for whatever is none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        file = open_regular(path)
        if file is None:
            raise self._refuse("file", "a regular file", "another")
        self._file = file
        try:
            try:
                self._zip = zipfile.ZipFile(self._file)
            except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
                raise self._refuse("file", "a trace that llaisys diff --save wrote", str(error)) from None
            self._infos = {info.filename: info for info in self._zip.infolist()}
            if len(self._infos) != len(self._zip.infolist()):
                raise self._refuse("file", "each member once", "a name that comes twice")
            self._read_header()
        except BaseException:
            self._file.close()
            raise
        self._weight: tuple[Any, Array | None] = (None, None)

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
        self._file.close()

    def _refuse(self, field: str, expected: Any, found: Any) -> CaseError:
        return CaseError(file=self.path, field=field, expected=expected, found=str(found)[:200])

    def _member(self, name: str, most: int) -> bytes:
        info = self._infos.get(name)
        if info is None or info.file_size > most:
            found = "none" if info is None else f"{info.file_size} bytes"
            raise self._refuse(name, f"a member of at most {most} bytes", found)
        data = bytearray()
        try:
            with self._zip.open(info) as stream:
                while part := stream.read(min(1 << 24, info.file_size + 1 - len(data))):
                    data += part
                    if len(data) > info.file_size:
                        break
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
            ValueError,
            OSError,
        ) as error:
            raise self._refuse(name, "a readable member", error) from None
        if len(data) != info.file_size:
            raise self._refuse(name, f"{info.file_size} bytes", len(data))
        return bytes(data)

    def _read_header(self) -> None:
        try:
            header = json.loads(self._member(HEADER, MAX_HEADER))
        except (ValueError, RecursionError) as error:
            if isinstance(error, CaseError):
                raise
            raise self._refuse(HEADER, "JSON", error) from None
        if not isinstance(header, dict):
            raise self._refuse(HEADER, "an object", type(header).__name__)
        for name, wanted in (("format", FORMAT), ("version", VERSION)):
            if header.get(name) != wanted:
                raise self._refuse(name, repr(wanted), repr(header.get(name)))
        for name in _TEXTS:
            if not isinstance(header.get(name), str):
                raise self._refuse(name, "a text", header.get(name))
        if header["dtype"] not in FLOATS:
            raise self._refuse("dtype", list(FLOATS), header["dtype"])
        for name in ("prompt", "tokens"):
            if not _integers(header.get(name)):
                raise self._refuse(name, "a list of integers from 0", header.get(name))
        if not isinstance(header.get("config"), dict):
            raise self._refuse("config", "an object", header.get("config"))
        weights = header.get("weights")
        if not isinstance(weights, dict) or not all(_is_digest(x) for x in weights.values()):
            raise self._refuse("weights", "digests", weights)
        nodes = header.get("nodes")
        if not isinstance(nodes, list) or len(nodes) > MAX_NODES:
            raise self._refuse("nodes", f"a list of at most {MAX_NODES}", type(nodes).__name__)
        #: What the header says, without the nodes.
        self.header: dict[str, Any] = {name: value for name, value in header.items() if name != "nodes"}
        #: The nodes, in the order in which they ran.
        self.nodes: list[TracedNode] = [self._node(f"nodes[{i}]", fields) for i, fields in enumerate(nodes)]

    def _node(self, label: str, fields: Any) -> TracedNode:
        if not isinstance(fields, dict) or fields.get("op") not in SPECS or not isinstance(fields.get("site"), str):
            raise self._refuse(label, "a site and an operator", fields)
        spec = SPECS[fields["op"]]
        scalars, inputs, outputs = (fields.get(name) for name in ("scalars", "inputs", "outputs"))
        if not isinstance(scalars, dict) or list(scalars) != [s.name for s in spec.scalars]:
            raise self._refuse(f"{label}.scalars", [s.name for s in spec.scalars], scalars)
        if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in scalars.values()):
            raise self._refuse(f"{label}.scalars", "numbers", scalars)
        if not _integers([fields.get("step"), fields.get("position")]):
            raise self._refuse(f"{label}.position", "integers from 0", fields.get("position"))
        wanted = [[a.name for a in spec.inputs_args], [a.name for a in spec.outputs]]
        if not isinstance(inputs, dict) or not isinstance(outputs, dict) or [list(inputs), list(outputs)] != wanted:
            raise self._refuse(label, f"arrays {wanted}", [inputs, outputs])
        metas: dict[str, Any] = {}
        for name, field in {**inputs, **outputs}.items():
            if field is None and name in inputs:
                continue
            if isinstance(field, dict) and name in inputs and isinstance(field.get("weight"), str):
                if not _is_digest(field.get("digest")):
                    raise self._refuse(f"{label}.{name}", "a digest", field)
                continue
            self._check_array(f"{label}.{name}", field)
            metas[name] = tuple(field["shape"]), field["dtype"]
        if all(name in metas for name in (*inputs, *outputs) if inputs.get(name, True) is not None):
            bound = bind(spec, metas, scalars)
            if isinstance(bound, Problem):
                raise self._refuse(f"{label}.{bound.argument}", "a valid call", bound.message)
        ratio = fields.get("ratio", 0.0)
        try:
            number = float(ratio)
        except (TypeError, ValueError):
            raise self._refuse(f"{label}.ratio", "a number", ratio) from None
        outcome = str(fields.get("outcome", "skipped"))
        values = {name: float(x) for name, x in scalars.items()}
        return TracedNode(
            self, fields["site"], fields["op"], fields["step"], fields["position"], values, outcome, number, fields
        )

    def _check_array(self, label: str, field: Any) -> None:
        if not isinstance(field, dict) or field.get("dtype") not in DTYPES or not _integers(field.get("shape")):
            raise self._refuse(label, "dtype and shape", field)
        blocks, shape = field.get("blocks"), field["shape"]
        if len(shape) > 8 or not isinstance(blocks, list) or not all(_is_digest(block) for block in blocks):
            raise self._refuse(label, "blocks", field)
        size = math.prod(shape) * DTYPES[field["dtype"]].itemsize
        held = sum(self._infos[block].file_size if block in self._infos else -MAX_ARRAY for block in blocks)
        if size > MAX_ARRAY or size != held:
            raise self._refuse(label, f"{size} bytes in blocks of the file, at most {MAX_ARRAY}", held)

    def array(self, field: Mapping[str, Any]) -> Array:
        """An array of the header."""
        data = bytearray()
        for block in field["blocks"]:
            part = self._member(block, MAX_ARRAY)
            if digest_of(part) != block:
                raise self._refuse(block, "the content that its name is the digest of", "other content")
            data += part
        return np.frombuffer(data, DTYPES[field["dtype"]]).reshape(field["shape"])

    def weight(self, checkpoint: Checkpoint | None, name: str, digest: str) -> Array | None:
        """A weight of the checkpoint in the dtype of the run, if its bits are those of the run."""
        if checkpoint is None or name not in checkpoint.names():
            return None
        if self._weight[0] != (checkpoint, name, digest):
            dtype = DTYPES[self.header["dtype"]]
            found = checkpoint.tensor(name)
            found = found if found.dtype == dtype else cast(found, dtype)
            same = digest_of(found.reshape(-1).view(np.uint8).data) == digest
            self._weight = ((checkpoint, name, digest), found if same else None)
        return self._weight[1]

    def by_site(self) -> dict[str, list[TracedNode]]:
        """The nodes of each site."""
        found: dict[str, list[TracedNode]] = {}
        for node in self.nodes:
            found.setdefault(node.site, []).append(node)
        return found

    def __iter__(self) -> Iterator[TracedNode]:
        return iter(self.nodes)


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**62 for x in value)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None

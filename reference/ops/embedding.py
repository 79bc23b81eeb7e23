"""Rows of the embedding matrix, picked by token."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..bounds import Array, Oracle
from ..spec import Arg, Dims, ErrorCase, Spec, qwen2_bench


def embedding(index: Array, weight: Array) -> Array:
    """weight[index[T], :] for weight [V, E]; IndexError if an index is outside [0, V)."""
    if np.any((index < 0) | (index >= len(weight))):
        bad = index[(index < 0) | (index >= len(weight))][0]
        raise IndexError(f"embedding: index: expected 0 <= index < {len(weight)}, found {bad}")
    return weight[index]


def oracle(index: Array, weight: Array) -> tuple[Oracle, ...]:
    """Row by row; the dtype is kept, so that results are compared byte for byte."""
    y = np.empty((len(index), weight.shape[1]), weight.dtype)
    for row, token in zip(y, index.tolist(), strict=True):
        row[:] = weight[token, :]
    return (Oracle(y, exact=True),)


def make_inputs(spec: Spec, rng: np.random.Generator, dims: Dims, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Realistic values; see `Spec.inputs`."""
    index = rng.integers(0, max(dims["V"], 1), dims["T"])
    index[:2] = (dims["V"] - 1, 0)[: dims["T"]]
    weight = rng.standard_normal((dims["V"], dims["E"]), dtype=np.float32)
    return {"index": index.astype(np.int64), "weight": weight.astype(dtype)}


def with_index(values: dict[str, Any], bad: int) -> dict[str, Any]:
    """The last index replaced."""
    index = values["index"].copy()
    index[-1] = bad
    return {"index": index}


SPEC = Spec(
    name="embedding",
    summary="Rows of a matrix, picked by index.",
    formula="out[t, :] = weight[index[t], :]",
    source="torch.nn.functional.embedding",
    args=(
        Arg("out", "T E", role="out", doc="the rows"),
        Arg("index", "T", dtype="i64", doc="tokens, each in [0, V)"),
        Arg("weight", "V E", doc="the matrix"),
    ),
    twin=embedding,
    oracle=oracle,
    inputs=make_inputs,
    cases=tuple(
        {"T": t, "V": v, "E": e}
        for t, v, e in [
            *[(0, 5, 8), (0, 0, 8), (3, 5, 0), (1, 1, 1), (3, 2, 7), (8, 31, 8), (5, 31, 9), (2, 11, 15), (7, 11, 16)],
            *[(9, 64, 17), (17, 97, 33), (4, 13, 127), (33, 7, 896)],
        ]
    ),
    shared={"T": 300, "V": 97, "E": 515},
    large=({"T": 521, "V": 1009, "E": 523}, {"T": 33, "V": 151_939, "E": 5}),
    errors=(
        ErrorCase("index V", "INDEX", lambda v: with_index(v, len(v["weight"])), ("embedding", "index")),
        ErrorCase("index -1", "INDEX", lambda v: with_index(v, -1), ("embedding", "index")),
        ErrorCase("index of 2^32", "INDEX", lambda v: with_index(v, 1 << 32), ("embedding", "index")),
        ErrorCase("no rows to pick from", "INDEX", lambda v: {"weight": v["weight"][:0]}, ("embedding", "index")),
    ),
    bench=qwen2_bench(lambda m: {"tokens": {"T": m["T"], "V": m["V"], "E": m["E"]}}),
    bytes=lambda d, itemsize: d["T"] * (8 + 2 * d["E"] * itemsize),
    raises=("IndexRangeError: an index outside [0, V)", "ShapeError: sizes that do not match"),
)

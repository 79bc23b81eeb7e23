"""Write a checkpoint as one plain file that a C program can read: `python -m llaisys.export MODEL FILE`.

All numbers are little-endian and 64 bits wide:

    8 bytes   "LLAISYS2"
    10 int64  dtype (of llaisys.h), nlayer, hs, nh, nkvh, dh, di, maxseq, voc, attention_bias (0 or 1)
    2 double  epsilon, theta
    int64     end_token (-1: none)
    uint64    number of tensors; then for each of them
      uint64 n and n bytes of name, uint64 dtype, uint64 ndim, ndim uint64 sizes, uint64 m and m bytes of data

`examples/generate.c` reads it.
"""

from __future__ import annotations

import os
import struct
import sys

import numpy as np

from .checkpoint import Checkpoint
from .dtypes import DataType
from .errors import LlaisysError
from .files import new_file

MAGIC = b"LLAISYS2"


def export(model: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Write the checkpoint `model` (a folder, or "tiny") to `file`, which appears only when it is whole.

    Raises CheckpointError if the checkpoint is not what it should be, FileError if the file cannot be written.
    """
    checkpoint = Checkpoint.open(model)
    c = checkpoint.config
    names = checkpoint.names()
    end_token = next(iter(c.eos_token_ids), -1)
    numbers = (
        DataType.of_name(str(c.dtype)),
        c.num_hidden_layers,
        c.hidden_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        c.intermediate_size,
        c.max_position_embeddings,
        c.vocab_size,
        c.attention_bias,
    )
    with new_file(file) as out:
        out.write(MAGIC + struct.pack("<10q2dqQ", *numbers, c.rms_norm_eps, c.rope_theta, end_token, len(names)))
        for name, array in checkpoint.tensors():
            encoded = name.encode()
            dtype = DataType.of_numpy(array.dtype)
            out.write(struct.pack("<Q", len(encoded)) + encoded)
            out.write(struct.pack(f"<QQ{array.ndim}QQ", dtype, array.ndim, *array.shape, array.nbytes))
            out.write(np.ascontiguousarray(array).view(np.uint8).data)


def main() -> None:
    """The command line: MODEL and FILE."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m llaisys.export MODEL FILE")
    try:
        export(sys.argv[1], sys.argv[2])
    except LlaisysError as error:
        sys.exit(f"llaisys.export: {error}")


if __name__ == "__main__":
    main()

"""What a fault is: a patch of a few lines to a copy of the kernels, and what the differ should say of it.

`MUTANT` is the gate of `build.GATE`. A fault in an operator shows wherever the engine uses it in the chosen layers; the
site to blame is then the first of these.
"""

from __future__ import annotations

from dataclasses import dataclass

from .build import Patch


@dataclass(frozen=True)
class Mutant:
    """One fault.

    `sites`: the names, within a layer or whole, of the sites of which any is right to blame, in the wrong layer or,
    with a leading "+", in the one after it. `certificates`: those of which any is right. `layered`: it can be put into
    single layers. `dtypes`: where it is a fault at all. `op`: the operator that is wrong, which `llaisys check` should
    name; none if the engine is.
    """

    name: str
    title: str
    sites: tuple[str, ...]
    certificates: tuple[str, ...]
    patches: tuple[Patch, ...]
    layered: bool = True
    dtypes: tuple[str, ...] = ("f32", "bf16", "f16")
    op: str = ""

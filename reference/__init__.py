"""The numpy twins of the kernels, and whole models built from them.

`llaisys.reference.<operator>(*inputs, *scalars)` is the twin of `llaisys.ops.<operator>`: the same results within the
bounds of its oracle, written to be read. `SPECS` holds the declaration of each operator, `check` compares a result with
an oracle. The twins take numpy arrays (bf16 through ml_dtypes) and trust their arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .bounds import Oracle, tolerance, worst_case
from .compare import Verdict, check, ratios
from .ops import SPECS
from .spec import DTYPES, FLOATS, Spec

__all__ = ["DTYPES", "FLOATS", "SPECS", "Oracle", "Spec", "Verdict", "check", "ratios", "tolerance", "worst_case"]
__all__ += list(SPECS)


def __getattr__(name: str) -> Callable[..., Any]:
    if name in SPECS:
        return SPECS[name].twin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

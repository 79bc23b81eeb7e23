"""The roofs of the machine, measured by the library, and which of them binds a piece of work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from .. import _lib
from ..errors import UnsupportedError

#: Names of llaisysMeasureRoof, and what they are.
ROOFS = {
    "read": "memory read",
    "scalar_f32": "f32 without FMA, SSE2 at most",
    "avx2_f32": "f32 FMA, AVX2",
    "avx512_f32": "f32 FMA, AVX-512",
    "avx512_bf16": "bf16 pairs, AVX-512 (vdpbf16ps)",
    "amx_bf16": "bf16 tiles, AMX",
}
#: Units that a tier may compute a dtype with, and how many of their operations one needs. On tiles f16 is two bf16
#: parts, all four products of which count, and f32 would be three parts and six products.
_UNITS: dict[str, dict[str, tuple[tuple[str, int], ...]]] = {
    "scalar": dict.fromkeys(("f32", "f16", "bf16"), (("scalar_f32", 1),)),
    "avx2": dict.fromkeys(("f32", "f16", "bf16"), (("avx2_f32", 1),)),
    "avx512": {
        **dict.fromkeys(("f32", "f16"), (("avx512_f32", 1),)),
        "bf16": (("avx512_f32", 1), ("avx512_bf16", 1)),
    },
    "amx": {
        "f32": (("avx512_f32", 1), ("amx_bf16", 6)),
        "f16": (("avx512_f32", 1), ("amx_bf16", 4)),
        "bf16": (("amx_bf16", 1),),
    },
}


@dataclass(frozen=True)
class Roofs:
    """What `threads` threads do per second at best: bytes read from memory, and operations by the name of the unit."""

    threads: int
    read: float
    compute: dict[str, float]

    def unit(self, isa: str, dtype: str) -> tuple[str, float]:
        """The fastest unit that the tier may compute `dtype` with: its name, and operations of `dtype` per second."""
        units = ((name, self.compute[name] / cost) for name, cost in _UNITS[isa][dtype] if name in self.compute)
        return max(units, key=lambda unit: unit[1])

    def as_dict(self) -> dict[str, float]:
        """In units of 1e9 per second, by the names of `ROOFS`: for JSON."""
        return {name: value / 1e9 for name, value in {"read": self.read, **self.compute}.items()}


def measure_roofs(seconds: float = 0.4, progress: Callable[[str], None] | None = None) -> Roofs:
    """Measure all roofs that the machine has, each in about `seconds`, on the threads in use.

    `progress` is called with each name of `ROOFS` before it is measured.
    """
    found: dict[str, float] = {}
    for name in ROOFS:
        if progress is not None:
            progress(name)
        try:
            found[name] = _lib.measure_roof(name, seconds)
        except UnsupportedError:
            continue
    return Roofs(_lib.num_threads(), found.pop("read"), found)


@cache
def known_roofs(threads: int) -> Roofs:
    """The roofs of the threads in use, which are `threads`; measured once."""
    return measure_roofs()

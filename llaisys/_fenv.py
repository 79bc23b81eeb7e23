"""The floating-point state of the calling thread: how it rounds, what it makes of subnormal numbers, what it traps.

A kernel that leaves it changed makes the results of all that runs behind it on this thread others, the oracle's too. So
does a library that was linked with -ffast-math, as soon as it is loaded.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

#: Bytes that hold the fenv_t of any libc.
SIZE = 256
#: The control bits in a fenv_t, by machine: offset of a 32-bit word, then masks with what a change of them means.
_FLUSHED, _ROUNDS, _TRAPS = "subnormal numbers become 0", "it rounds another way", "it traps other exceptions"
CONTROL: dict[str, dict[int, dict[int, str]]] = {
    "x86_64": {
        28: {0x8040: _FLUSHED, 0x6000: _ROUNDS, 0x1F80: _TRAPS},  # MXCSR
        0: {0x0C00: _ROUNDS, 0x0300: "x87 has another precision", 0x003F: _TRAPS},
    },
    "aarch64": {0: {0x01080000: _FLUSHED, 0x00C00000: _ROUNDS, 0x00009F00: _TRAPS}},  # FPCR
}


@cache
def _libm() -> Any:
    everything = ctypes.CDLL(None)
    return everything if hasattr(everything, "fegetenv") else ctypes.CDLL("libm.so.6")


class FloatState:
    """The state as it is now, to be looked at again, and restored, on the same thread."""

    def __init__(self) -> None:
        self._saved = ctypes.create_string_buffer(SIZE)
        _libm().fegetenv(self._saved)
        self._rounding = _libm().fegetround()

    def restore(self) -> str:
        """Make it what it was. What had become of it, "" if nothing had."""
        now = ctypes.create_string_buffer(SIZE)
        _libm().fegetenv(now)
        found = [_ROUNDS] if _libm().fegetround() != self._rounding else []
        for offset, masks in CONTROL.get(platform.machine(), {}).items():
            before, after = (int.from_bytes(x.raw[offset : offset + 4], "little") for x in (self._saved, now))
            found += [text for mask, text in masks.items() if (before ^ after) & mask]
        if found:
            _libm().fesetenv(self._saved)
        return ", ".join(dict.fromkeys(found))

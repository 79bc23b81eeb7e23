"""llaisys: CPU kernels for LLM inference, each beside its numpy twin, and a Qwen2 that can be assembled from either.

Nothing is loaded before it is used, so `import llaisys` is quick, and the shared library may be missing or broken.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors, models, ops, reference
    from ._build import VERSION as __version__
    from ._lib import has_isa, isa, isas, num_threads, set_isa, set_num_threads
    from .course import Ops
    from .dtypes import DataType, DeviceType, MemcpyKind
    from .errors import LlaisysError
    from .models import Qwen2
    from .runtime import RuntimeAPI, Stream
    from .tensor import Tensor

__all__ = [
    "DataType",
    "DeviceType",
    "LlaisysError",
    "MemcpyKind",
    "Ops",
    "Qwen2",
    "RuntimeAPI",
    "Stream",
    "Tensor",
    "__version__",
    "errors",
    "has_isa",
    "isa",
    "isas",
    "models",
    "num_threads",
    "ops",
    "reference",
    "set_isa",
    "set_num_threads",
]

_MODULES = ("errors", "models", "ops", "reference")
#: Module and name of every other export.
_NAMES = {
    "__version__": ("_build", "VERSION"),
    "LlaisysError": ("errors", "LlaisysError"),
    "Ops": ("course", "Ops"),
    "Qwen2": ("models", "Qwen2"),
    "Tensor": ("tensor", "Tensor"),
    **dict.fromkeys(("RuntimeAPI", "Stream"), ("runtime", "")),
    **dict.fromkeys(("DataType", "DeviceType", "MemcpyKind"), ("dtypes", "")),
    **dict.fromkeys(("has_isa", "isa", "isas", "num_threads", "set_isa", "set_num_threads"), ("_lib", "")),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _NAMES[name]
    value = getattr(import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

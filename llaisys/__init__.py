"""llaisys: CPU kernels for LLM inference, each beside its numpy twin, and a Qwen2 that can be assembled from either.

Nothing is loaded before it is used, so `import llaisys` is quick, and the shared library may be missing or broken.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
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


def _give_way() -> None:
    """Put the installed package in the place of this one, which is that of a source tree.

    Python finds it first where the tree is the current folder, but neither the library nor `reference` is in it. An
    editable installation knows where they are.
    """
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    tree = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec(__name__, [path for path in sys.path if Path(path or ".").resolve() != tree])
    if spec is None or spec.loader is None:
        raise ImportError(
            f"llaisys: expected an installed package, found only its sources in {tree}, without the library: run "
            f'"{sys.executable} -m pip install ." there'
        )
    module = sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(module)


if find_spec(f"{__name__}._build") is None:
    _give_way()

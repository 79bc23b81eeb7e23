"""The operators: every module here holds one twin and its SPEC, and is found by being here."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..spec import Spec

#: The SPEC of each operator, by its name, which is the name of its module.
SPECS: dict[str, Spec] = {}

for _name in sorted(module.name for module in iter_modules(__path__)):
    _spec = import_module(f"{__name__}.{_name}").SPEC
    if _spec.name != _name:
        raise ImportError(f"reference/ops/{_name}.py: SPEC.name: expected {_name!r}, found {_spec.name!r}")
    SPECS[_name] = _spec

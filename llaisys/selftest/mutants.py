"""All faults, and the changes that are none."""

from __future__ import annotations

from .engine_faults import ENGINE
from .operator_faults import LEGAL, OPERATORS

MUTANTS = (*OPERATORS, *ENGINE)

__all__ = ["LEGAL", "MUTANTS"]

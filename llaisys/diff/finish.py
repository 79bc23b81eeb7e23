"""What is told of the first faults beyond their place: shape, hypothesis, neighbours, swap, reproducer."""

from __future__ import annotations

from typing import Any

from .report import Report


def finish(runner: Any, report: Report, folder: str | None) -> None:
    """Complete the faults of a report."""

"""Certifies every node of a native run on the run's own data (`llaisys diff`)."""

from __future__ import annotations

from .isolated import run_isolated
from .report import Drift, Fault, Flip, NodeResult, Report
from .run import run

__all__ = ["Drift", "Fault", "Flip", "NodeResult", "Report", "run", "run_isolated"]

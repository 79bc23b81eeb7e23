"""Whole models: `Qwen2`, on the native engine or on the numpy operators."""

from .nodes import Node
from .qwen2 import Qwen2
from .session import Session, Tap

__all__ = ["Node", "Qwen2", "Session", "Tap"]

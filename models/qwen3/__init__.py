"""Qwen3, the dense models from 0.6B to 32B."""

from .config import Qwen3Config
from .modules import Qwen3

__all__ = ["Qwen3", "Qwen3Config"]

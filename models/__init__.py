"""Flax NNX models. One folder a model: config, modules, sharding table, checkpoint mapping."""

from .qwen3 import Qwen3, Qwen3Config

__all__ = ["Qwen3", "Qwen3Config"]

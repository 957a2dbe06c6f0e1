"""What models are built from: the numerics (invariant, plain) and the context of a `shard_map` body."""

from .base import Numerics, Parallel, VocabStatistics
from .invariant import InvariantNumerics
from .plain import PlainNumerics

__all__ = ["InvariantNumerics", "Numerics", "Parallel", "PlainNumerics", "VocabStatistics"]

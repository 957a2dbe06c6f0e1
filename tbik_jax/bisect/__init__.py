"""Finds where two runs part: taps after every op, compared bit by bit (`docs/bisect.md`)."""

from .api import Side, bisect
from .compare import Bisection, OpDifference, compare
from .function import Call, trace_call
from .model import Configuration, Keep, trace_model
from .plot import plot
from .trace import Op, Trace, load_trace

__all__ = [
    "Bisection",
    "Call",
    "Configuration",
    "Keep",
    "Op",
    "OpDifference",
    "Side",
    "Trace",
    "bisect",
    "compare",
    "load_trace",
    "plot",
    "trace_call",
    "trace_model",
]

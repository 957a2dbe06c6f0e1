"""`bisect`: two runs with taps, compared."""

from collections.abc import Sequence
from pathlib import Path

from ..generation import TokenIds
from ..models.qwen3 import Qwen3
from .compare import Bisection, compare
from .function import Call, trace_call
from .model import Configuration, Keep, trace_model
from .trace import Trace, load_trace

Side = Configuration | Call | Trace | str | Path


def bisect(
    left: Side,
    right: Side,
    *,
    model: Qwen3 | None = None,
    sequences: Sequence[TokenIds] | None = None,
    keep: Keep = "all",
    check: bool = True,
) -> Bisection:
    """Runs both sides with taps after every op and names the first op whose bits differ.

    Args:
        left: a `Configuration` of the model, a `Call` of a function, a `Trace`, or the file of one.
        right: likewise, of the same model or function.
        model: for configurations.
        sequences: token ids for configurations, at least two tokens each; the same sequence is compared with itself,
            wherever it stands in a batch.
        keep: what to keep whole of a model's ops, see `trace_model`.
        check: whether each side also runs without taps, to see that these change no bit.

    Returns:
        Every op's difference, the first one among them.

    Raises:
        ValueError: the sides cannot be run or have nothing to compare.
    """
    traces = [_traced(side, model, sequences, keep, check) for side in (left, right)]
    return compare(*traces)


def _traced(
    side: Side, model: Qwen3 | None, sequences: Sequence[TokenIds] | None, keep: Keep, check: bool
) -> Trace:
    if isinstance(side, Trace):
        return side
    if isinstance(side, str | Path):
        return load_trace(side)
    if isinstance(side, Call):
        return trace_call(side, check=check)
    if not isinstance(side, Configuration):
        raise ValueError(f"{side!r} is no Configuration, Call, Trace or file of one")
    if model is None or sequences is None:
        raise ValueError(
            "a Configuration needs the model and the sequences to run: bisect(..., model=, sequences=)"
        )
    return trace_model(model, sequences, side, keep=keep, check=check)

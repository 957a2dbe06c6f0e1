"""Device time of several functions beside each other, by CUPTI as in `jax.experimental.mosaic.gpu.profiler`.

A call's time is the sum of what its kernels took. The functions alternate in rounds, each call with the next of several
input sets that do not fit in the L2 cache together, so that no call finds its weights there and no function gets a
quieter moment than another.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

ROTATED_BYTES = 160_000_000  # of all input sets together; the L2 cache of an H200 has 50 to 60 MB
MOST_SETS = 160
_WARM_SECONDS = 0.025  # an idle GPU lowers its clock
_ROUNDS = 6
_SCREENED = 3

Inputs = tuple[Any, ...]
Functions = dict[str, Callable[..., Any]]
Recorded = list[tuple[str, float]]  # kernels by name, in ms, in the order they ran


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Device time of one function, in microseconds.

    Attributes:
        us: Median of all calls.
        p10: Tenth percentile.
        p90: Ninetieth percentile.
        calls: Number of calls.
        kernels: Kernels that a call launches.
    """

    us: float
    p10: float
    p90: float
    calls: int
    kernels: int


def count_sets(set_bytes: int) -> int:
    """Input sets to rotate through."""
    return min(MOST_SETS, max(1, -(-ROTATED_BYTES // set_bytes)))


def calls_a_round(us: float) -> int:
    """Calls of a function that takes `us`: 24 in all for a short one, 6 for one of more than a millisecond."""
    return 4 if us <= 250 else 2 if us <= 1000 else 1


class Cupti:
    """Collects the kernels that ran between `start` and `stop`."""

    def __init__(self) -> None:
        from jax.experimental.mosaic.gpu import profiler  # needs the CUDA plugin

        # `profiler.measure` itself warms and synchronises for each function, and times one alone.
        self._extension = profiler.mosaic_gpu_lib._mosaic_gpu_ext

    def start(self) -> None:
        self._extension._cupti_init()

    def stop(self) -> Recorded:
        return list(self._extension._cupti_get_timings(False))  # False: stay attached, attaching is slow

    def call(self, name: str, function: Callable[..., Any], inputs: Inputs) -> Any:
        return function(*inputs)


class WallClock:
    """Stands in for `Cupti` where there is no GPU: each call is one kernel, timed by the host."""

    def __init__(self) -> None:
        self._recorded: Recorded = []

    def start(self) -> None:
        self._recorded = []

    def stop(self) -> Recorded:
        return self._recorded

    def call(self, name: str, function: Callable[..., Any], inputs: Inputs) -> Any:
        start = time.perf_counter()
        out = jax.block_until_ready(function(*inputs))
        self._recorded.append((name, 1000 * (time.perf_counter() - start)))
        return out


def compare(functions: Functions, sets: Sequence[Inputs], clock: Cupti | WallClock) -> dict[str, Timing]:
    """Times `functions`, which are compiled, on `sets`, interleaved.

    Raises:
        RuntimeError: The recorded kernels are not those that the calls launch.
    """
    source = itertools.cycle(sets)
    _warm(functions, source)
    kernels = {name: _record(clock, {name: function}, [name], source) for name, function in functions.items()}
    for name, launched in kernels.items():
        if not launched:
            raise RuntimeError(f"CUPTI recorded no kernel of {name}")
    longest = max(1000 * sum(ms for _, ms in launched) for launched in kernels.values())
    order = _order(list(functions), calls_a_round(longest))
    return _split(order, kernels, _record(clock, functions, order, source))


def screen(
    functions: Functions, sets: Sequence[Inputs], clock: Cupti | WallClock, before: Callable[[str], None]
) -> dict[str, float]:
    """Median device time in microseconds of three calls of each function, one function after the other.

    Good enough to tell which are worth `compare`. `before` is called with a function's name before its first call.
    """
    source = itertools.cycle(sets)
    us = {}
    for name, function in functions.items():
        before(name)
        jax.block_until_ready(function(*next(source)))
        recorded = _record(clock, functions, [name] * _SCREENED, source)
        kernels = len(recorded) // _SCREENED
        if not kernels or len(recorded) % _SCREENED:
            raise RuntimeError(f"CUPTI recorded {len(recorded)} kernels in {_SCREENED} calls of {name}")
        calls = [recorded[i * kernels : (i + 1) * kernels] for i in range(_SCREENED)]
        us[name] = round(1000 * statistics.median(sum(ms for _, ms in call) for call in calls), 3)
    return us


def _warm(functions: Functions, source: Iterator[Inputs]) -> None:
    end = time.perf_counter() + _WARM_SECONDS
    while True:
        for function in functions.values():
            jax.block_until_ready(function(*next(source)))
        if time.perf_counter() > end:
            return


def _order(names: list[str], calls: int) -> list[str]:
    """Which function each call is of: rounds of `calls` calls each, every round begun by another function."""
    order: list[str] = []
    for turn in range(_ROUNDS):
        first = turn % len(names)
        order += [name for name in names[first:] + names[:first] for _ in range(calls)]
    return order


def _record(
    clock: Cupti | WallClock, functions: Functions, order: list[str], source: Iterator[Inputs]
) -> Recorded:
    clock.start()
    try:
        for name, calls in itertools.groupby(order):
            out = None
            for _ in calls:  # their outputs may all be in memory at a time, hence the wait for each few
                out = clock.call(name, functions[name], next(source))
            jax.block_until_ready(out)
    finally:
        recorded = clock.stop()
    return recorded


def _split(order: list[str], kernels: dict[str, Recorded], recorded: Recorded) -> dict[str, Timing]:
    """Deals the recorded kernels out to the calls."""
    expected = sum(len(kernels[name]) for name in order)
    if len(recorded) != expected:
        raise RuntimeError(f"CUPTI recorded {len(recorded)} kernels where {expected} were launched")
    times: dict[str, list[float]] = {name: [] for name in kernels}
    position = 0
    for name in order:
        mine = recorded[position : position + len(kernels[name])]
        if [kernel for kernel, _ in mine] != [kernel for kernel, _ in kernels[name]]:
            raise RuntimeError(f"CUPTI recorded {mine} where {name} launches {kernels[name]}")
        times[name].append(1000 * sum(ms for _, ms in mine))
        position += len(mine)
    return {name: _timing(us, len(kernels[name])) for name, us in times.items()}


def _timing(us: list[float], kernels: int) -> Timing:
    p10, median, p90 = (round(float(v), 3) for v in np.percentile(us, (10, 50, 90)))
    return Timing(us=median, p10=p10, p90=p90, calls=len(us), kernels=kernels)

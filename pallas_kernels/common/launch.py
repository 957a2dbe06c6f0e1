"""Whether a kernel may begin before the one ahead of it has ended (programmatic dependent launch, Hopper).

Small kernels that follow one another cost more in starting and draining than in work. A kernel that is launched early
starts where multiprocessors become free, sets itself up, and waits in `griddepcontrol.wait` until the kernel ahead has
ended and its results are visible; so neither results nor their order change.

It is a property of a whole program, not of an op: `overlapping` is meant for programs that are traced and compiled by
this package. The wait also covers what the kernel ahead waited for. But a kernel of XLA's that waits by itself, behind
one of these, may have loads hoisted above its wait; the program must be compiled with `LAUNCH_OPTIONS`.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

#: How a program with overlapping kernels is compiled. XLA's own kernels are launched in the ordinary way, and kernels
#: are launched one by one: inside of a CUDA graph as XLA builds it each waits for the end of the last.
LAUNCH_OPTIONS = {"xla_gpu_enable_pdl": False, "xla_gpu_graph_min_graph_size": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Launch:
    """How kernels of a program follow one another.

    Attributes:
        early: a kernel starts before the one ahead has ended.
        weights_ready: a matmul's right operand was there before the program began, so that the kernel may read it
            before the one ahead has ended.
    """

    early: bool = False
    weights_ready: bool = False


_current: contextvars.ContextVar[Launch] = contextvars.ContextVar("launch", default=Launch())  # noqa: B039, frozen


@contextlib.contextmanager
def overlapping(launch: Launch) -> Iterator[None]:
    """Kernels traced inside are launched so."""
    token = _current.set(launch)
    try:
        yield
    finally:
        _current.reset(token)


def current_launch() -> Launch:
    """Of the kernels traced here."""
    return _current.get()


def wait_first(body: Callable[..., None], launch: Launch) -> Callable[..., None]:
    """A kernel's body that lets the next kernel start, and begins when the one ahead has ended."""
    if not launch.early:
        return body

    @functools.wraps(body)
    def waiting(*args: Any, **kwargs: Any) -> None:
        release_next(launch)
        wait_for_last(launch)
        body(*args, **kwargs)

    return waiting


def release_next(launch: Launch) -> None:
    """Lets the next kernel start as soon as every CTA of this one has come here, or has ended."""
    if launch.early:
        plgpu.griddepcontrol_launch_dependents()


def wait_for_last(launch: Launch) -> None:
    """Waits until the kernel ahead, and all before it, have ended and their results are visible."""
    if launch.early:
        plgpu.griddepcontrol_wait()

"""Matrix products into wgmma's accumulators, and the interpreter's stand-ins for these, in shared memory."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

_Ref = Any


class Runs(Protocol):
    """What a kernel is made for."""

    @property
    def interpret(self) -> bool:
        """Whether the interpreter runs it, which can neither store to an accumulator nor multiply registers."""
        ...


def multiply_into(problem: Runs, acc: _Ref, a: Any, b: _Ref, *, first: bool = False) -> None:
    """acc += a @ b, in the background; a in shared memory or in registers. acc is zero if this is its `first`."""
    if not problem.interpret:
        plgpu.wgmma(acc, a, b)
        return
    left = a if isinstance(a, jax.Array) else a[...]
    product = jnp.dot(left.astype(jnp.float32), b[...].astype(jnp.float32))
    acc[...] = product if first else acc[...] + product  # this memory is not zero at first


def read_accumulator(problem: Runs, acc: _Ref, running: int) -> jax.Array:
    """The accumulator, once all but `running` products are done."""
    return acc[...] if problem.interpret else plgpu.wgmma_accumulator_load(acc, wait_n=running)

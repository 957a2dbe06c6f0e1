"""Micro-batches: passes whose results are added up as a balanced tree, with one pass in memory at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def tree_scan(one: Callable[[Any], tuple[Any, Any]], batches: Any, count: int) -> tuple[Any, Any]:
    """Adds up over the leading dimension what one(batch) returns first, in a tree; stacks the second.

    A binary counter: a sum of 2**n passes waits at level n for the next one like it.

    Args:
        one: of a pass: values to be added, and values to be kept.
        batches: a pytree of arrays with `count` leading entries.
        count: of passes, a power of two.
    """
    levels = count.bit_length() - 1
    shapes, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], batches))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def step(waiting: list[Any], item: tuple[jax.Array, Any]) -> tuple[list[Any], Any]:
        index, batch = item
        (value, kept), climbing, levels_now = one(batch), jnp.bool_(True), list(waiting)
        for level in range(levels + 1):
            here = climbing & ((index >> level) & 1 == 0)
            if level == levels:
                here = climbing
            levels_now[level] = _choose(here, value, waiting[level])
            joined = jax.tree.map(jnp.add, waiting[level], value)
            value, climbing = _choose(climbing & ~here, joined, value), climbing & ~here
        return levels_now, kept

    waiting, kept = lax.scan(step, [zero] * (levels + 1), (jnp.arange(count), batches))
    return waiting[levels], kept


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)

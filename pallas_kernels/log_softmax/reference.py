"""The order of the adds of log-softmax, in plain JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..common.rounding import exp, mul
from ..common.tree import tree_join, tree_sum


class LeafStatistics(NamedTuple):
    """What there is to know of each leaf of a row of logits.

    Attributes:
        maximum: float32 [..., leaves]; NaN where the leaf holds one.
        total: float32 [..., leaves], the sum of exp(x - maximum); NaN where the maximum is NaN or infinity.
        best: int32 [..., leaves], the lowest index within the leaf whose value is the maximum (the last index where
            the maximum is NaN).
        finite: bool [..., leaves], whether the leaf holds neither NaN nor infinity.
    """

    maximum: jax.Array
    total: jax.Array
    best: jax.Array
    finite: jax.Array


def leaf_statistics_reference(x: jax.Array, *, leaves: int) -> LeafStatistics:
    """The statistics of `leaves` equal slices of the last axis; a total is `tree_sum` over the leaf.

    A leaf of nothing but -inf has a total of 0: the difference is taken from 0 there.
    """
    parts = x.reshape(*x.shape[:-1], leaves, x.shape[-1] // leaves)
    size = parts.shape[-1]
    maximum = jnp.max(parts, axis=-1)  # exact in any order
    origin = jnp.where(maximum == -np.inf, 0, maximum)
    total = tree_sum(exp(parts - origin[..., None]))
    best = jnp.min(jnp.where(parts == maximum[..., None], jnp.arange(size), size - 1), axis=-1)
    finite = (maximum < np.inf) & (jnp.min(parts, axis=-1) > -np.inf)
    return LeafStatistics(maximum, total, best.astype(jnp.int32), finite)


def join_totals(maximum: jax.Array, total: jax.Array, row_max: jax.Array) -> jax.Array:
    """Sum of exp(x - row_max) over the leaves: `total * exp(maximum - row_max)`, rounded, leaves by `tree_join`.

    Args:
        maximum: float32 [..., leaves], of each leaf.
        total: float32 [..., leaves], relative to the leaf's maximum.
        row_max: float32 [...], of the whole row.

    Returns:
        float32 [...].
    """
    scaled = mul(total, exp(maximum - row_max[..., None]))
    return tree_join([scaled[..., i] for i in range(total.shape[-1])])

"""The order of the adds of log-softmax, in plain JAX."""

import jax

from ..common.rounding import exp
from ..common.tree import tree_join, tree_sum


def exp_sum_reference(x: jax.Array, row_max: jax.Array, *, leaves: int) -> jax.Array:
    """Sum of exp(x - row_max) over the last axis: `tree_sum` in each leaf, leaves by `tree_join`.

    Args:
        x: float32 [..., V].
        row_max: float32 [...].
        leaves: equal slices of V.

    Returns:
        float32 [...].
    """
    terms = exp(x - row_max[..., None])
    sums = tree_sum(terms.reshape(*x.shape[:-1], leaves, x.shape[-1] // leaves))
    return tree_join([sums[..., i] for i in range(leaves)])

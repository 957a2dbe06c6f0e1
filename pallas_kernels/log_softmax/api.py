"""`log_softmax` of one device's rows, and `exp_sum`, the part that a sharded vocabulary adds up by tree."""

import jax
import jax.numpy as jnp

from ..common.gradient import inference_only
from ..common.rounding import log
from .reference import exp_sum_reference


def exp_sum(x: jax.Array, row_max: jax.Array, *, leaves: int) -> jax.Array:
    """Sum of exp(x - row_max) over `leaves` equal leaves of the last axis, joined in a binary tree.

    A rank that holds V/t of the vocabulary calls it with 8 / t leaves and adds the ranks with `tree_psum`.

    Args:
        x: float32 [..., V].
        row_max: float32 [...], the maximum over the whole vocabulary.
        leaves: 1, 2, 4 or 8.

    Returns:
        float32 [...].

    Raises:
        ValueError: V does not cut into the leaves, or x is not float32.
    """
    if leaves not in (1, 2, 4, 8) or x.shape[-1] % leaves:
        raise ValueError(
            f"a vocabulary of {x.shape[-1]} cannot be cut into {leaves} equal leaves; use 1, 2, 4 or 8"
        )
    if x.dtype != jnp.float32 or row_max.shape != x.shape[:-1]:
        raise ValueError(
            f"exp_sum takes float32 x [..., V] and row_max [...], not {x.dtype} {x.shape}, {row_max.shape}"
        )
    return inference_only(exp_sum_reference(x, row_max, leaves=leaves), "exp_sum")


def log_softmax(x: jax.Array, *, leaves: int = 8) -> jax.Array:
    """Log-softmax over the last axis: `(x - max) - log(exp_sum)`.

    Args:
        x: float32 [..., V], V a multiple of `leaves`.
        leaves: 1, 2, 4 or 8.

    Returns:
        float32 [..., V].

    Raises:
        ValueError: as `exp_sum`.
    """
    row_max = jnp.max(x, axis=-1)  # exact in any order
    total = exp_sum(x, row_max, leaves=leaves)
    return (x - row_max[..., None]) - log(total)[..., None]

"""The order of the adds of `rms_norm`, in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np

from ..common.rounding import mul, reciprocal_sqrt, round_to
from ..common.tree import tree_sum
from ..join_subtrees.reference import join_subtrees_reference
from ..residual_add.reference import residual_add_reference


def rms_norm_reference(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """x [..., D] * rsqrt(mean(x**2) + eps) * scale [D], in fp32, rounded to x's dtype once.

    Each square is rounded to fp32; the squares are summed by `tree_sum`; the mean is that sum times fp32(1/D); the
    inverse root is a square root and a division; `(x * inverse) * scale` are two rounded products.
    """
    d = x.shape[-1]
    wide = x.astype(jnp.float32)
    mean = mul(tree_sum(mul(wide, wide)), np.float32(1 / d))
    inverse = reciprocal_sqrt(mean + np.float32(eps))
    return round_to(mul(mul(wide, inverse[..., None]), scale.astype(jnp.float32)), x.dtype)


def add_rms_norm_reference(
    x: jax.Array, y: jax.Array, scale: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """`residual_add_reference`, and `rms_norm_reference` of its rounded sum; y may be subtrees, see `join_subtrees`."""
    if y.ndim > x.ndim:
        y = join_subtrees_reference(y, x.dtype)
    total = residual_add_reference(x, y)
    return total, rms_norm_reference(total, scale, eps=eps)

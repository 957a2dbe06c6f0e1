"""The ops for few rows as the ops that they fuse, one after the other."""

import jax
import jax.numpy as jnp

from ..gated_matmul.reference import gated_matmul_reference
from ..rms_norm.reference import add_rms_norm_reference, rms_norm_reference
from ..tree_matmul.reference import tree_matmul_reference


def norm_matmul_reference(
    x: jax.Array, y: jax.Array | None, scale: jax.Array, w: jax.Array, *, eps: float, gated: bool
) -> tuple[jax.Array, jax.Array]:
    """The residual stream x [M, D] with y added, and the product of its norm and w [N, D]."""
    if y is None:
        normalised = rms_norm_reference(x, scale, eps=eps)
    else:
        x, normalised = add_rms_norm_reference(x, y, scale, eps=eps)
    if gated:
        return x, gated_matmul_reference(normalised, w)
    return x, tree_matmul_reference(normalised, w, leaves=1, out_dtype=x.dtype, transpose_rhs=True)


def matmul_subtrees_reference(x: jax.Array, w: jax.Array, *, leaves: int, parts: int) -> jax.Array:
    """`tree_matmul_reference` of each of `parts` equal slices of K, with its leaves, in fp32: [parts, M, N]."""
    size = w.shape[0] // parts
    slices = [slice(i * size, (i + 1) * size) for i in range(parts)]
    return jnp.stack(
        [
            tree_matmul_reference(x[:, at], w[at], leaves=leaves // parts, out_dtype=jnp.float32)
            for at in slices
        ]
    )

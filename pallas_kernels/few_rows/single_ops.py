"""The ops for few rows as the ops that they fuse, one after the other: what runs where the kernels take no such sizes.

With the backend that these ops choose themselves, so that a row's bits do not depend on how many rows there are.
"""

import jax
import jax.numpy as jnp

from ..gated_matmul.api import gated_matmul
from ..rms_norm.api import add_rms_norm, rms_norm
from ..tree_matmul.api import tree_matmul


def norm_matmul_by_single_ops(
    x: jax.Array,
    y: jax.Array | None,
    scale: jax.Array,
    w: jax.Array,
    *,
    eps: float,
    gated: bool,
    backend: str | None,
) -> tuple[jax.Array, jax.Array]:
    """The residual stream x [M, D] with y added, and the product of its norm and w [N, D]."""
    if y is None:
        normalised = rms_norm(x, scale, eps=eps, backend=backend)
    else:
        x, normalised = add_rms_norm(x, y, scale, eps=eps, backend=backend)
    if gated:
        return x, gated_matmul(normalised, w, backend=backend)
    return x, tree_matmul(normalised, w, 1, transpose_rhs=True, backend=backend)


def matmul_subtrees_by_single_ops(
    x: jax.Array, w: jax.Array, *, leaves: int, parts: int, backend: str | None
) -> jax.Array:
    """`tree_matmul` of each of `parts` equal slices of K, with its leaves, in fp32: [parts, M, N]."""
    size = w.shape[0] // parts
    slices = [slice(i * size, (i + 1) * size) for i in range(parts)]
    return jnp.stack(
        [
            tree_matmul(x[:, at], w[at], leaves // parts, out_dtype=jnp.float32, backend=backend)
            for at in slices
        ]
    )

"""The two orders in which fp32 values meet: the tree of leaves, and the halving sum along a row."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def tree_join(parts: Sequence[jax.Array]) -> jax.Array:
    """Adds a power-of-two number of fp32 arrays in a balanced binary tree, neighbours first.

    `((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7))`; the lower index is always the left operand.

    Args:
        parts: 1, 2, 4, 8, ... arrays of one shape.

    Raises:
        ValueError: the number of parts is no power of two.
    """
    count = len(parts)
    if count < 1 or count & (count - 1):
        raise ValueError(f"{count} partial sums do not form a balanced binary tree; use 1, 2, 4 or 8 leaves")
    parts = list(parts)
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def tree_sum(x: jax.Array) -> jax.Array:
    """Sums fp32 `x` [..., n] over its last axis in one order per row length.

    The row is padded with +0.0 to the next power of two p; then element i meets element i + p/2, and so on with halved
    p. Rows of one length always take the same order, whatever stands beside them.

    Returns:
        float32 [...].
    """
    n = x.shape[-1]
    width = 1 << (n - 1).bit_length()
    if width != n:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - n)])
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]

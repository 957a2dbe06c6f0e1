"""Sums over tokens, cut into leaves: the order in which the gradient of a parameter adds up.

The tokens of a training step are cut into equal runs, the *token leaves*. The data and fsdp axes give each rank a
number of whole leaves, so a leaf's sum needs no other rank, and the leaves meet in `tree_join` whoever holds them.
"""

import jax
import jax.numpy as jnp

TOKEN_LEAVES = (1, 2, 4, 8)  # in one call


def check_token_leaves(op: str, tokens: int, leaves: int, *, multiple: int = 1) -> int:
    """The number of tokens in a leaf.

    Args:
        op: its name, for the message.
        tokens: in this call.
        leaves: that the tokens are cut into.
        multiple: of which a leaf's length must be one.

    Raises:
        ValueError: the tokens do not cut into `leaves` equal leaves of such a length.
    """
    if leaves not in TOKEN_LEAVES:
        raise ValueError(f"{op}: leaves={leaves} is not supported; use 1, 2, 4 or 8")
    step = leaves * multiple
    if tokens < 1 or tokens % step:
        raise ValueError(
            f"{op}: {tokens} tokens cannot be cut into {leaves} equal token leaves of a multiple of {multiple}; pad "
            f"them with zero cotangents to a multiple of {step} (the next is {max(1, -(-tokens // step)) * step})"
        )
    return tokens // leaves


def token_leaf_sums(x: jax.Array, leaves: int) -> jax.Array:
    """Sums fp32 `x` [tokens, ...] over the tokens of each leaf.

    Inside a leaf the order is `tree_sum`'s along the tokens: of n tokens, padded with +0.0 to the next power of two p,
    token i meets token i + p/2, and so on with halved p. It depends on n alone, and the leaves share no add.

    Returns:
        float32 [leaves, ...].
    """
    size = x.shape[0] // leaves
    x = x.reshape(leaves, size, *x.shape[1:])
    width = 1 << (size - 1).bit_length()
    if width != size:
        x = jnp.pad(x, [(0, width - size) if axis == 1 else (0, 0) for axis in range(x.ndim)])
    while width > 1:
        width //= 2
        x = x[:, :width] + x[:, width:]
    return x[:, 0]

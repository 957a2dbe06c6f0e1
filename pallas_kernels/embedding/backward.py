"""The gradient of an embedding table: its specification, and the same sum as a tree matmul, for GPUs.

No scatter-add: on a GPU XLA adds duplicate indices with atomics, in whatever order they arrive.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..common.backend import resolve_backend
from ..common.dtypes import check_floats
from ..common.gradient import inference_only
from ..common.token_leaves import check_token_leaves
from ..common.tree import tree_join
from ..tree_matmul.api import tree_matmul


def embedding_backward(
    ids: jax.Array,
    dy: jax.Array,
    *,
    rows: int,
    offset: jax.Array | int,
    leaves: int,
    backend: str | None = None,
) -> jax.Array:
    """The gradient of rows offset .. offset + rows - 1 of an embedding table.

    A row's gradient is the sum of dy over the tokens with its id: inside a token leaf one fp32 accumulation from +0.0
    in ascending token order; leaves meet in `tree_join`. A leaf without the id counts +0.0, and a sum of zero is +0.0,
    so the bits do not depend on how the leaves are spread over calls.

    Args:
        ids: integer [...]; ids outside of these rows are left out.
        dy: [..., D], the cotangent of the embedded tokens; bfloat16, float16 or float32.
        rows: that are returned.
        offset: id of the first of them.
        leaves: 1, 2, 4 or 8 equal runs, each a multiple of 16 long, that the tokens (row-major) are cut into.
        backend: "reference", or the backend of `tree_matmul` that sums (16-bit dy, D a multiple of 16, and dy must be
            finite: an infinite number makes its column NaN); None chooses by device and dtype.

    Returns:
        float32 [rows, D], the leaves of this call joined.

    Raises:
        ValueError: shapes or dtypes that do not fit, tokens that do not cut into the leaves, or a backend that cannot
            run here.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer) or dy.ndim < 1 or dy.shape[:-1] != ids.shape:
        raise ValueError(
            f"embedding_backward takes integer ids [...] and dy [..., D], not {ids.dtype} {ids.shape} and {dy.shape}"
        )
    check_floats("embedding_backward", dy=dy)
    if rows < 1:
        raise ValueError(f"embedding_backward: rows={rows} must be at least 1")
    check_token_leaves("embedding_backward", math.prod(ids.shape), leaves, multiple=16)
    backend = resolve_backend(backend, dy.dtype)
    ids, dy = ids.reshape(-1).astype(jnp.int32), dy.reshape(-1, dy.shape[-1])
    first = first_occurrence(ids)
    if backend == "reference":
        sums = slot_sums_reference(first, dy, leaves=leaves)
    else:
        sums = slot_sums_matmul(first, dy, leaves=leaves, backend=backend)
    sums = jnp.where(sums == 0, np.float32(0), sums)  # a tensor core may leave -0.0
    return inference_only(place_rows(ids, first, sums, rows=rows, offset=offset), "embedding_backward")


def first_occurrence(ids: jax.Array) -> jax.Array:
    """For each of ids [N] the index of the first equal one: the slot in which its sum is made."""
    return jnp.argmax(ids[:, None] == ids[None, :], axis=1).astype(jnp.int32)


def slot_sums_reference(slots: jax.Array, dy: jax.Array, *, leaves: int) -> jax.Array:
    """Sum of dy [N, D] over the tokens of each slot, float32 [N, D]; the order is in `embedding_backward`.

    The leaves advance together, which changes nothing: they share no add.
    """
    tokens, d = dy.shape
    size = tokens // leaves
    leaf = jnp.arange(leaves)
    slots, dy = slots.reshape(leaves, size), dy.reshape(leaves, size, d)

    def step(i: jax.Array, acc: jax.Array) -> jax.Array:
        slot = lax.dynamic_index_in_dim(slots, i, axis=1, keepdims=False)
        new = lax.dynamic_index_in_dim(dy, i, axis=1, keepdims=False).astype(jnp.float32)
        # one slot a leaf: indices are unique, and a set is exact
        return acc.at[leaf, slot].set(acc[leaf, slot] + new, unique_indices=True)

    # Behind a barrier: XLA would drop an add to a known zero, and with it the sign of a zero sum.
    zero = lax.optimization_barrier(jnp.zeros((leaves, tokens, d), jnp.float32))
    return tree_join(list(lax.fori_loop(0, size, step, zero)))


def slot_sums_matmul(slots: jax.Array, dy: jax.Array, *, leaves: int, backend: str | None) -> jax.Array:
    """`slot_sums_reference` as a `tree_matmul` over the tokens of a one-hot matrix [N, N] of dy's dtype with dy.

    Its products are dy itself and zeros, which leave a sum as it is.
    """
    tokens = jnp.arange(slots.shape[0], dtype=jnp.int32)
    hot = (slots[None, :] == tokens[:, None]).astype(dy.dtype)
    return tree_matmul(hot, dy, leaves, out_dtype=jnp.float32, backend=backend)


def place_rows(
    ids: jax.Array, slots: jax.Array, sums: jax.Array, *, rows: int, offset: jax.Array | int
) -> jax.Array:
    """Rows offset .. offset + rows - 1, float32 [rows, D]: the sums of their slots, +0.0 for ids that do not occur."""
    tokens = jnp.arange(ids.shape[0], dtype=jnp.int32)
    local = ids - offset
    used = (slots == tokens) & (local >= 0) & (local < rows)
    # each unused slot has an index of its own behind the last row, where it is dropped
    index = jnp.where(used, local, rows + tokens)
    table = jnp.zeros((rows, sums.shape[-1]), jnp.float32)
    return table.at[index].set(sums, mode="drop", unique_indices=True)

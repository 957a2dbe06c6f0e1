"""`embedding`: checks its operands and calls the reference."""

import jax
import jax.numpy as jnp

from ..common.gradient import inference_only
from .reference import embedding_reference


def embedding(ids: jax.Array, table: jax.Array, *, offset: jax.Array | int = 0) -> jax.Array:
    """Rows of an embedding table, or of the part of it that starts at row `offset`.

    Args:
        ids: integer [...].
        table: [V, D], the rows offset .. offset + V - 1 of the whole table.
        offset: first row of this part.

    Returns:
        [..., D] in table's dtype; zeros where the id is outside this part.

    Raises:
        ValueError: ids are no integers or table is no matrix.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer) or table.ndim != 2:
        raise ValueError(
            f"embedding takes integer ids and a table [V, D], not {ids.dtype} and shape {table.shape}"
        )
    return inference_only(embedding_reference(ids, table, offset=offset), "embedding")

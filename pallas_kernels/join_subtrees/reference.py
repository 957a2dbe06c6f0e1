"""`join_subtrees` in plain JAX."""

import jax

from ..common.rounding import round_to
from ..common.tree import tree_join


def join_subtrees_reference(subtrees: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """fp32 [P, ...] added up by `tree_join` and rounded to `dtype` once: [...]."""
    return round_to(tree_join(list(subtrees)), dtype)

"""`gated_matmul` as its two ops, one after the other."""

import jax

from ..swiglu.reference import swiglu_reference
from ..tree_matmul.reference import tree_matmul_reference


def gated_matmul_reference(x: jax.Array, w: jax.Array) -> jax.Array:
    """SwiGLU of x [M, K] @ w.T, w [2F, K]: gates and values are rounded to x's dtype before, the result after."""
    product = tree_matmul_reference(x, w, leaves=1, out_dtype=x.dtype, transpose_rhs=True)
    f = w.shape[0] // 2
    return swiglu_reference(product[:, :f], product[:, f:])

"""The order of the adds of `tree_matmul`, in plain JAX: the specification, and the CPU implementation."""

import jax
import jax.numpy as jnp
from jax import lax

from ..common.rounding import pin, round_to
from ..common.tree import tree_join

#: k's a loop iteration takes; a multiple of the contract's 16 would change nothing but speed.
_STEP = 16


def tree_matmul_reference(
    x: jax.Array, w: jax.Array, *, leaves: int, out_dtype: jax.typing.DTypeLike, transpose_rhs: bool = False
) -> jax.Array:
    """x [M, K] @ w [K, N] (w [N, K] with `transpose_rhs`) -> [M, N] in `out_dtype`.

    Leaf j starts from +0.0 and adds `x[:, k] * w[k, :]` for its k's in ascending order in fp32, each product rounded to
    fp32 first (products of bfloat16 or float16 values are exact). The leaves meet in `tree_join`, and the sum is
    rounded to `out_dtype` once. All leaves advance together, which changes nothing: they share no add.

    The rank-1 updates are written out because `lax.dot_general` on the CPU changes its order with M and N.
    """
    m, k = x.shape
    n = w.shape[0] if transpose_rhs else w.shape[1]
    size = k // leaves
    exact_products = x.dtype != jnp.float32
    rows = jnp.moveaxis(x.reshape(m, leaves, size), 1, 0)  # [leaf, m, k]
    columns = (w.T if transpose_rhs else w).reshape(leaves, size, n)  # [leaf, k, n]

    def step(i: jax.Array, acc: jax.Array) -> jax.Array:
        xs = lax.dynamic_slice_in_dim(rows, i * _STEP, _STEP, axis=2).astype(jnp.float32)
        ws = lax.dynamic_slice_in_dim(columns, i * _STEP, _STEP, axis=1).astype(jnp.float32)
        for j in range(_STEP):
            product = xs[:, :, j, None] * ws[:, j, None, :]
            acc = acc + (product if exact_products else pin(product))
        return acc

    # Behind a barrier: in a loop of one iteration XLA would drop the add of zero, and with it the sign of a zero sum.
    zero = lax.optimization_barrier(jnp.zeros((leaves, m, n), jnp.float32))
    acc = lax.fori_loop(0, size // _STEP, step, zero)
    return round_to(tree_join(list(acc)), out_dtype)

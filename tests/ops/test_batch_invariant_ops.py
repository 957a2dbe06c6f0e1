"""The test of batch_invariant_ops for each of its ops: B=2048, D=4096, linspace(-100, 100), difference 0 for a row."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbik_jax
from tests.helpers import assert_same_bits, bits

B, D, N = 2048, 4096, 16

Op = Callable[[jax.Array], jax.Array]


def weight(dtype: str) -> jax.Array:
    return jnp.linspace(-100, 100, D * N).reshape(D, N).astype(dtype)


def ops(dtype: str) -> dict[str, tuple[Op, Op]]:
    """Ours and plain JAX's. N is 16 of the columns: an element has its own row and column alone."""
    w, bias = weight(dtype), jnp.linspace(-100, 100, N).astype(dtype)
    return {
        "mm": (lambda a: tbik_jax.matmul(a, w), lambda a: jnp.matmul(a, w)),
        "addmm": (lambda a: tbik_jax.matmul(a, w, bias), lambda a: jnp.matmul(a, w) + bias),
        "log_softmax": (tbik_jax.log_softmax, jax.nn.log_softmax),
        "mean": (lambda a: tbik_jax.mean(a, axis=-1), lambda a: jnp.mean(a, axis=-1)),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mm", "addmm", "log_softmax", "mean"])
def test_a_row_alone_and_in_the_batch(name: str, dtype: str) -> None:
    a = jnp.linspace(-100, 100, B * D).reshape(B, D).astype(dtype)
    op = jax.jit(ops(dtype)[name][0])
    whole = np.asarray(op(a))
    for row in (0, B - 1):
        alone = np.asarray(op(a[row : row + 1]))
        assert np.abs(alone.astype(np.float32) - whole[row : row + 1].astype(np.float32)).max() == 0
        assert_same_bits(alone, whole[row : row + 1])


def test_plain_products_of_the_same_numbers_differ() -> None:
    """The twin: `jnp.matmul` of a row alone has other bits than in the batch."""
    a = jnp.linspace(-100, 100, B * D).reshape(B, D)
    found = 0
    for name in ("mm", "addmm"):
        op = jax.jit(ops("float32")[name][1])
        found += int((bits(op(a[:1])) != bits(op(a)[:1])).sum())
    assert found > 0


def test_one_row_of_a_bfloat16_product_in_eight() -> None:
    """K=4096, 1 row against 8: what JAX's users reported of `lax.dot_general`; equal rows give equal sums too."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, D)), jnp.bfloat16).at[5].set(0.5).at[2].set(0.5)
    w = jnp.asarray(rng.standard_normal((D, 64)), jnp.bfloat16)
    dims = (((1,), (0,)), ((), ()))
    whole = jax.jit(lambda x: tbik_jax.dot_general(x, w, dims))(x)
    for row in range(8):
        assert_same_bits(tbik_jax.dot_general(x[row : row + 1], w, dims), whole[row : row + 1])
    assert_same_bits(whole[2], whole[5])

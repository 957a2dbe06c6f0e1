"""The fused op on the CPU: the bits of its two parts, in any batch, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels import gated_matmul, swiglu, tree_matmul
from tests.helpers import DTYPES, assert_same_bits, differing, normal


def operands(dtype, m=33, k=64, f=24):
    rng = np.random.default_rng(0)
    return jnp.asarray(normal(rng, (m, k), dtype)), jnp.asarray(normal(rng, (2 * f, k), dtype))


@pytest.mark.parametrize("name", DTYPES)
def test_it_has_the_bits_of_its_parts(name):
    x, w = operands(DTYPES[name])
    product = tree_matmul(x, w, 1, transpose_rhs=True)
    gates, values = jnp.split(product, 2, axis=-1)
    assert_same_bits(gated_matmul(x, w), swiglu(gates, values))
    assert differing(swiglu(values, gates), gated_matmul(x, w)) > 0  # twin


def test_rows_do_not_depend_on_the_batch():
    x, w = operands(jnp.float32)
    whole = gated_matmul(x, w)
    for rows in ([0], [32], [5, 4, 3]):
        assert_same_bits(gated_matmul(x[jnp.asarray(rows)], w), whole[jnp.asarray(rows)])
    assert_same_bits(gated_matmul(x.reshape(3, 11, -1), w), whole.reshape(3, 11, -1))
    assert gated_matmul(x[:0], w).shape == (0, 24)


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        ((2, 64), (47, 64), r"x \[..., K\] and w \[2F, K\], not shapes \(2, 64\) and \(47, 64\)"),
        ((2, 32), (48, 64), "not shapes"),
        ((2, 40), (48, 40), "k=40 cannot be cut into 1 leaves of a multiple of 16"),
    ],
)
def test_shapes_that_do_not_fit(x, w, message):
    with pytest.raises(ValueError, match=message):
        gated_matmul(jnp.zeros(x), jnp.zeros(w))


def test_dtypes_that_differ_and_gradients():
    x, w = operands(jnp.float32)
    with pytest.raises(ValueError, match="x is bfloat16 and w is float32"):
        gated_matmul(x.astype(jnp.bfloat16), w)
    with pytest.raises(ValueError, match="gated_matmul has no gradient"):
        jax.grad(lambda x: gated_matmul(x, w).sum())(x)

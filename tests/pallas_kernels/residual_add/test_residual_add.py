"""residual_add: one add, one rounding; the Hopper kernel in the interpreter."""

import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.pallas_kernels import residual_add
from tbik_jax.pallas_kernels.residual_add.mosaic_gpu import residual_add_mosaic_gpu
from tests.helpers import DTYPES, assert_same_bits, differing, mixed, normal


def operands(n, dtype, rows=3):
    rng = np.random.default_rng(n)
    return mixed(rng, (rows, n), dtype), normal(rng, (rows, n), dtype)


@pytest.mark.parametrize("name", DTYPES)
def test_it_rounds_once(name):
    x, y = operands(40, DTYPES[name])
    expected = (x.astype(np.float32) + y.astype(np.float32)).astype(x.dtype)
    assert_same_bits(residual_add(jnp.asarray(x), jnp.asarray(y)), expected)


@pytest.mark.parametrize(("d", "chunks"), [(16, None), (208, 1), (400, 2), (1216, 2)])
def test_the_kernel_has_the_same_bits(d, chunks):
    x, y = map(jnp.asarray, operands(d, DTYPES["bfloat16"]))
    out = residual_add_mosaic_gpu(x, y, chunks=chunks, interpret=True)
    assert_same_bits(out, residual_add(x, y))
    assert differing(out, residual_add(x, -y))  # twin


@pytest.mark.parametrize(
    ("shape", "backend", "message"),
    [
        ((2, 24), "mosaic_gpu", "multiple of 16"),
        ((), "mosaic_gpu", "multiple of 16"),
        ((2, 16), "cuda", "unknown"),
    ],
)
def test_it_refuses(shape, backend, message):
    with pytest.raises(ValueError, match=message):
        residual_add(jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16), backend=backend)


def test_it_refuses_unlike_terms():
    with pytest.raises(ValueError, match="must be alike"):
        residual_add(jnp.zeros((2, 16)), jnp.zeros((2, 16), jnp.bfloat16))

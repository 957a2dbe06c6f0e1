"""Drop-in ops and `invariant` on a GPU: a row's bits alone and in a batch, forward and backward, and their accuracy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from jax import lax

import tbik_jax
from tests.helpers import DTYPES, assert_same_bits, differing, mixed, normal

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
F32 = np.float32
ELEMENTARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "log1p": np.log1p,
    "log2": np.log2,
    "expm1": np.expm1,
    "asinh": np.arcsinh,
    "atanh": np.arctanh,
    "erf": scipy.special.erf,
    "erfc": scipy.special.erfc,
}


def assert_rows_alone(function: Callable[[jax.Array], jax.Array], x: np.ndarray) -> None:
    """Each of a few rows has the bits of the batch, also in batches of another size and layout."""
    run = jax.jit(tbik_jax.invariant(function))
    whole = run(x)
    for rows in (slice(3, 4), slice(1, 6), slice(0, len(x) - 1)):
        assert_same_bits(run(x[rows]), whole[rows])


@pytest.mark.parametrize("name", ELEMENTARY)
def test_elementary_functions(name: str) -> None:
    x = np.random.default_rng(0).uniform(-0.99, 0.99, (33, 129)).astype(F32)
    x = np.abs(x) if name == "log2" else x
    for after in (lambda y: y, jax.nn.sigmoid, lambda y: y * F32(1.1) + 1):
        assert_rows_alone(lambda x, after=after: after(getattr(lax, name)(x)), x)
    out = jax.jit(tbik_jax.invariant(getattr(lax, name)))(x)
    np.testing.assert_allclose(out, ELEMENTARY[name](x.astype(np.float64)), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("reduce", [jnp.max, jnp.min])
def test_maxima_keep_one_zero(reduce: Callable[..., Any]) -> None:
    x = np.copysign(0.0, np.random.default_rng(1).standard_normal((33, 129))).astype(F32)
    assert_rows_alone(lambda x: reduce(x, -1), x)
    assert np.signbit(tbik_jax.invariant(lambda x: reduce(x, -1))(x)).all() == (reduce is jnp.min)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_products(dtype: str) -> None:
    """`dot_general` with batch dimensions: each of them, and each row in them, by itself."""
    rng = np.random.default_rng(2)
    x, w = mixed(rng, (5, 24, 256), DTYPES[dtype]), normal(rng, (5, 256, 40), DTYPES[dtype])
    run = jax.jit(tbik_jax.invariant(lambda x, w: jnp.einsum("btd,bdf->btf", x, w)))
    whole = run(x, w)
    assert_same_bits(run(x[2:3], w[2:3]), whole[2:3])
    assert_same_bits(run(x[:, 7:8], w), whole[:, 7:8])
    alone = jax.jit(tbik_jax.invariant(lambda x, w: x @ w))
    assert_same_bits(alone(x[4], w[4]), whole[4])
    exact = np.einsum("btd,bdf->btf", x.astype(np.float64), w.astype(np.float64))
    size = np.einsum("btd,bdf->btf", np.abs(x.astype(np.float64)), np.abs(w.astype(np.float64)))
    assert np.max(np.abs(np.asarray(whole, np.float64) - exact) / (size + 1e-30)) < {"float32": 1e-5}.get(
        dtype, 0.01
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_layers(dtype: str) -> None:
    """Through Linear, gelu and LayerNorm; the ordinary gradient's rows differ."""
    rngs = nnx.Rngs(0)
    numbers = {"rngs": rngs, "dtype": DTYPES[dtype], "param_dtype": F32}
    model = nnx.Sequential(
        nnx.Linear(256, 512, **numbers),
        jax.nn.gelu,
        nnx.LayerNorm(512, **numbers),
        nnx.Linear(512, 128, **numbers),
    )
    x = normal(np.random.default_rng(3), (64, 256))

    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.square(model(x).astype(F32)).sum())(x)

    assert_rows_alone(gradient, x)
    plain = jax.jit(gradient)
    rows = np.concatenate([plain(x[i : i + 1]) for i in range(8)])
    assert differing(rows, plain(x)[:8]) > 0

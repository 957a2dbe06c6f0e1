"""Maxima and minima: the values of JAX, and one sign of zeros whatever the batch, the window or the ranks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import tbik_jax
from tests.helpers import DTYPES, assert_same_bits, differing

F32 = np.float32


def zeros_of_both_signs(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = F32) -> np.ndarray:
    """Half of the rows hold nothing that is larger than a zero, the other half nothing smaller."""
    x = np.abs(rng.standard_normal(shape))
    x[::2] *= -1
    return np.where(rng.random(shape) < 0.5, np.copysign(0.0, rng.standard_normal(shape)), x).astype(dtype)


def largest(x: np.ndarray, sign: int = 1) -> np.ndarray:
    """Along the last axis, with -0.0 below +0.0; the smallest for sign = -1."""
    keys = np.lexsort((-sign * np.signbit(x).astype(int), sign * x.astype(np.float64)), axis=-1)
    return np.take_along_axis(x, keys[..., -1:], -1)[..., 0]


REDUCTIONS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "max": (lambda x: jnp.max(x, -1), 1),
    "min": (lambda x: jnp.min(x, -1), -1),
    "max_pool": (lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, x.shape[1]), (1, 1), "VALID")[:, 0], 1),
    "min_pool": (lambda x: lax.reduce_window(x, np.inf, lax.min, (1, x.shape[1]), (1, 1), "VALID")[:, 0], -1),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in REDUCTIONS for dtype in DTYPES] + [("max", "float64"), ("min", "float64")],
)
def test_a_zero_has_one_sign_in_every_batch(name: str, dtype: str) -> None:
    function, sign = REDUCTIONS[name]
    x = zeros_of_both_signs(np.random.default_rng(0), (64, 64), DTYPES.get(dtype, np.float64))
    with jax.enable_x64(dtype == "float64"):
        run = jax.jit(tbik_jax.invariant(function))
        expected = largest(x, sign)
        assert_same_bits(run(x), expected)
        for rows in (1, 3, 8):
            assert_same_bits(
                np.concatenate([run(x[i : i + rows]) for i in range(0, 24, rows)]), expected[:24]
            )


def test_twin_the_ordinary_maximum_keeps_any_zero() -> None:
    x = zeros_of_both_signs(np.random.default_rng(0), (64, 64))
    run = jax.jit(REDUCTIONS["max"][0])
    assert differing(run(x), largest(x)) > 0


def test_nan_and_infinities_are_those_of_jax() -> None:
    x = np.asarray([[1, np.nan, 2], [-np.inf, 3, np.inf], [-np.inf] * 3, [-np.nan, np.inf, -np.inf]], F32)
    for function in (jnp.max, jnp.min):
        mine = jax.jit(tbik_jax.invariant(lambda x, f=function: f(x, -1)))(x)
        np.testing.assert_array_equal(mine, function(x, -1))
    none = jnp.zeros((2, 0), F32)
    assert_same_bits(
        tbik_jax.invariant(lambda x: jnp.max(x, -1, initial=-np.inf))(none), np.full(2, -np.inf, F32)
    )
    assert_same_bits(tbik_jax.invariant(lambda x: jnp.min(x, -1, initial=5.0))(none), np.full(2, 5, F32))


def test_what_is_no_float_stays() -> None:
    x = np.random.default_rng(1).integers(-9, 9, (5, 7)).astype(np.int32)
    assert_same_bits(tbik_jax.invariant(lambda x: jnp.max(x, 0))(x), x.max(0))
    assert_same_bits(tbik_jax.invariant(lambda x: jnp.min(x.astype(bool), 0))(x), x.astype(bool).min(0))


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_pools_have_the_values_and_gradients_of_jax(padding: str) -> None:
    x = np.random.default_rng(2).standard_normal((2, 9, 9, 3)).astype(F32)

    def loss(x: jax.Array) -> jax.Array:
        pooled = lax.reduce_window(x, -np.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
        return (pooled**2).sum() + (x.max((1, 2)) * x.min((1, 2))).sum()

    mine, plain = (jax.jit(f)(x) for f in (tbik_jax.invariant(jax.grad(loss)), jax.grad(loss)))
    np.testing.assert_allclose(mine, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduce", [lax.pmax, lax.pmin])
def test_ranks_agree_on_the_sign(reduce: Callable[..., Any]) -> None:
    """Whichever rank has which zero; and as one device would, so that a mesh changes nothing."""
    rng = np.random.default_rng(3)
    x = np.copysign(0.0, rng.standard_normal((8, 33))).astype(F32)
    expected = largest(x.T, 1 if reduce is lax.pmax else -1)
    for ranks in (1, 2, 4, 8):
        mesh = Mesh(np.asarray(jax.devices()[:ranks]), ("a",))

        def over_ranks(x: jax.Array) -> jax.Array:
            return reduce((jnp.max if reduce is lax.pmax else jnp.min)(x, 0), "a")

        mapped = jax.shard_map(
            tbik_jax.invariant(over_ranks),
            mesh=mesh,
            in_specs=PartitionSpec("a"),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        assert_same_bits(jax.jit(mapped)(x), expected)


def test_groups_of_ranks_need_no_tree() -> None:
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("a",))
    groups = [[0, 1], [2, 3]]
    mapped = jax.shard_map(
        tbik_jax.invariant(lambda x: lax.pmax(x, "a", axis_index_groups=groups)),
        mesh=mesh,
        in_specs=PartitionSpec("a"),
        out_specs=PartitionSpec("a"),
        check_vma=False,
    )
    assert_same_bits(jax.jit(mapped)(np.arange(4, dtype=F32)), np.asarray([1, 1, 3, 3], F32))

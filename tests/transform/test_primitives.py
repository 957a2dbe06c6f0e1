"""Cumulative sums, scatters that collide, windows: the values of JAX, one stated order, and plain twins that differ."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tbik_jax
from tests import orders
from tests.helpers import DTYPES, assert_same_bits, differing, mixed, normal

F32 = np.float32
#: Places of eight updates: three at 3, two at 1, one out of range.
PLACES = np.asarray([3, 1, 3, 0, 3, -1, 99, 1])


def embedding_gradient(table: jax.Array) -> jax.Array:
    return jax.grad(lambda table: jnp.square(table[PLACES]).sum())(table)


def slices_gradient(x: jax.Array) -> jax.Array:
    """Slices that overlap, so their gradients meet element by element."""
    starts = jnp.asarray([0, 1, 2, 9])

    def loss(x: jax.Array) -> jax.Array:
        return jnp.square(jax.vmap(lambda s: lax.dynamic_slice(x, (s, 0), (3, 4)))(starts)).sum()

    return jax.grad(loss)(x)


def mapped_gradient(x: jax.Array) -> jax.Array:
    """Indices and operand that both have the batch."""
    where = jnp.asarray([[0, 0, 1], [2, 2, 2]])
    return jax.grad(lambda x: jnp.square(jax.vmap(lambda x, i: x[i])(x, where)).sum())(x)


def conv(**options: Any) -> Callable[..., Any]:
    """A convolution and both its gradients."""

    def run(x: jax.Array, kernel: jax.Array) -> Any:
        names = ("NHWC", "HWIO", "NHWC")
        out, pull = jax.vjp(
            lambda *a: lax.conv_general_dilated(*a, dimension_numbers=names, **options), x, kernel
        )
        return out, *pull(out)

    return run


def pooled_gradient(pool: Callable[..., jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return jax.grad(lambda x: jnp.square(pool(x, (3, 3), (2, 2), "SAME")).sum())


def random(*shape: int) -> np.ndarray:
    return normal(np.random.default_rng(sum(shape)), shape)


DILATED: dict[str, Any] = {
    "window_strides": (2, 1),
    "padding": ((2, 1), (-1, 3)),
    "lhs_dilation": (2, 3),
    "rhs_dilation": (1, 2),
}
CASES: dict[str, tuple[Callable[..., Any], tuple[np.ndarray, ...]]] = {
    "cumsum": (lambda x: jnp.cumsum(x, axis=1), (random(5, 33),)),
    "cumsum, reverse": (lambda x: lax.cumsum(x, axis=0, reverse=True), (random(33, 5),)),
    "cumprod": (lambda x: jnp.cumprod(x, axis=1), (random(5, 33),)),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, axis=1), (random(5, 33),)),
    "cumlogsumexp, infinite": (
        lambda x: lax.cumlogsumexp(x, axis=1),
        (np.asarray([[-np.inf, -np.inf, 2, 1], [1, np.inf, 0, -np.inf], [3, np.nan, 1, 2]], F32),),
    ),
    "prod": (lambda x: jnp.prod(x, axis=1), (random(5, 33),)),
    "scatter-add": (lambda u: jnp.ones((5, 4)).at[PLACES].add(u), (random(8, 4),)),
    "scatter-add, clip": (lambda u: jnp.ones((5, 4)).at[PLACES].add(u, mode="clip"), (random(8, 4),)),
    "scatter": (lambda u: jnp.ones((5, 4)).at[PLACES, :2].set(u), (random(8, 2),)),
    "scatter-mul": (lambda u: jnp.ones((5, 4)).at[PLACES].mul(u), (random(8, 4),)),
    "scatter-sub": (lambda u: jnp.ones((5, 4)).at[PLACES].subtract(u), (random(8, 4),)),
    "scatter-max": (lambda u: jax.ops.segment_max(u, PLACES, 5), (random(8, 4),)),
    "embedding": (embedding_gradient, (random(5, 4),)),
    "overlapping slices": (slices_gradient, (random(6, 4),)),
    "batched scatter": (mapped_gradient, (random(2, 4, 3),)),
    "convolution": (conv(**DILATED), (random(4, 9, 8, 6), random(3, 2, 6, 4))),
    "grouped convolution": (
        conv(window_strides=(1, 1), padding="VALID", feature_group_count=2),
        (random(4, 9, 8, 6), random(3, 2, 3, 4)),
    ),
    "average pooling": (pooled_gradient(nn.avg_pool), (random(2, 9, 9, 3),)),
    "max pooling": (pooled_gradient(nn.max_pool), (random(2, 9, 9, 3),)),
    "top_k": (lambda x: lax.top_k(x, 3), (random(3, 9),)),
    "debug print": (lambda x: (jax.debug.print("{}", x[0, 0]), x + x)[1], (random(2, 2),)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_jax_computes(name: str) -> None:
    function, args = CASES[name]
    mine, plain = jax.jit(tbik_jax.invariant(function))(*args), jax.jit(function)(*args)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(plain), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def spread(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Numbers of many sizes, so that sums of bfloat16 ones depend on their order in fp32, too."""
    return (rng.standard_normal(shape) * 2.0 ** rng.uniform(-16, 16, shape)).astype(dtype)


def doubled(x: np.ndarray) -> np.ndarray:
    """The stated order of prefixes of [n, w]: element i meets what stands at i - 1, then i - 2, i - 4, ..."""
    x, distance = x.copy(), 1
    while distance < len(x):
        x[distance:] = x[:-distance] + x[distance:]
        distance *= 2
    return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cumulative_sum_has_one_order_a_place(dtype: str) -> None:
    x = spread(np.random.default_rng(0), (46, 5), DTYPES[dtype])
    run = jax.jit(tbik_jax.invariant(lambda x: jnp.cumsum(x, axis=0)))
    whole = run(x)
    expected = doubled(x.astype(F32))
    assert_same_bits(whole, orders.round_to(expected, x.dtype))
    assert_same_bits(run(x[:19]), whole[:19])  # what follows does not enter
    assert_same_bits(run(x[:, 2:3]), whole[:, 2:3])
    assert differing(np.add.accumulate(x.astype(F32), axis=0), expected) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_meets_at_a_place_is_added_in_the_order_of_the_updates(dtype: str) -> None:
    """The bits of a place depend on its own updates: not on the number of others, nor on where those go."""
    rng = np.random.default_rng(1)
    updates = spread(rng, (40, 6), DTYPES[dtype])
    places = rng.integers(0, 3, 40)

    def scatter(u: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.zeros((3, 6), u.dtype).at[at].add(u)

    run = jax.jit(tbik_jax.invariant(scatter))
    whole = run(updates, places)
    order = np.argsort(places, kind="stable")  # others stand elsewhere
    assert_same_bits(run(updates[order], places[order]), whole)
    differ = 0
    for place in range(3):
        mine = updates[places == place]
        expected = doubled(mine.astype(F32))[-1]
        assert_same_bits(whole[place], orders.round_to(expected + F32(0), updates.dtype))
        assert_same_bits(run(mine, np.full(len(mine), place))[place], whole[place])
        differ += differing(np.add.accumulate(mine.astype(F32))[-1], expected)
    assert differ > 0
    batch = np.stack([updates, updates[::-1]]), np.stack([places, places[::-1]])
    assert_same_bits(jax.vmap(run)(*batch)[0], whole)
    last = tbik_jax.invariant(lambda u, at: jnp.zeros((3, 6), u.dtype).at[at].set(u))(updates, places)
    assert_same_bits(last, np.stack([updates[places == place][-1] for place in range(3)]))


def test_a_convolution_is_a_contraction_over_its_windows() -> None:
    rng = np.random.default_rng(2)
    x, kernel = mixed(rng, (7, 9, 9, 64)), normal(rng, (3, 3, 64, 24))

    def plain(x: jax.Array) -> jax.Array:
        return nn.activation.relu(
            lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )

    mine = jax.jit(tbik_jax.invariant(plain))
    whole = mine(x)
    cut = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))  # [b, h, w, c, kh, kw]
    rows = np.moveaxis(cut, 3, -1).reshape(7, 7, 7, 576)
    padded = np.pad(rows[1, :2].reshape(14, 576), ((0, 0), (0, 64)))
    expected = orders.matmul(padded, np.pad(kernel.reshape(576, 24), ((0, 64), (0, 0))), 8)
    assert_same_bits(whole[1, :2].reshape(14, 24), np.maximum(expected, 0))
    assert_same_bits(mine(x[2:3]), whole[2:3])
    as_product = jax.jit(lambda rows: rows @ kernel.reshape(576, 24))
    assert differing(as_product(rows[2].reshape(49, 576)), as_product(rows.reshape(-1, 576))[98:147]) > 0


def test_sorting_keeps_equal_keys_in_order() -> None:
    keys, values = np.asarray([1, 0, 1, 0, 1, 0], F32), np.arange(6, dtype=np.int32)
    by_key = jax.jit(tbik_jax.invariant(lambda k, v: lax.sort((k, v), num_keys=1, is_stable=False)))
    assert_same_bits(by_key(keys, values)[1], np.asarray([1, 3, 5, 0, 2, 4], np.int32))
    text = str(jax.make_jaxpr(by_key)(keys, values))
    assert "is_stable=True" in text and "is_stable=False" not in text

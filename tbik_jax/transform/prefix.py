"""Cumulative sums, products and log-sum-exps: one order for each place, whatever follows it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..pallas_kernels.common import rounding

_NEG_INF = np.float32(-np.inf)
State = tuple[jax.Array, ...]


def cumulative(eqn: Any, x: jax.Array) -> jax.Array:
    """`cumsum`, `cumprod` or `cumlogsumexp` of `x` along an axis, in fp32, rounded once.

    By doubling distances d = 1, 2, 4, ...: element i takes in what stands at i - d, the earlier part on the left. What
    element i meets, and in which order, follows from i alone: the length of the axis does not enter.
    """
    start, join, finish = _KINDS[eqn.primitive.name]
    axis, reverse = eqn.params["axis"], eqn.params["reverse"]
    wide = jnp.moveaxis(x.astype(jnp.float32), axis, 0)
    state = doubled(start(jnp.flip(wide, 0) if reverse else wide), join)
    total = finish(state)
    return rounding.round_to(jnp.moveaxis(jnp.flip(total, 0) if reverse else total, 0, axis), x.dtype)


def doubled(state: State, join: Callable[[State, State], State]) -> State:
    """The prefixes of arrays [n, ...] along their first axis, by doubling distances."""
    n = state[0].shape[0]
    distance = 1
    while distance < n:
        joined = join(tuple(s[:-distance] for s in state), tuple(s[distance:] for s in state))
        # Behind a barrier: else XLA computes all the levels again for each element of the last one.
        state = lax.optimization_barrier(
            tuple(jnp.concatenate([s[:distance], j], axis=0) for s, j in zip(state, joined, strict=True))
        )
        distance *= 2
    return state


def _add(left: State, right: State) -> State:
    return (left[0] + right[0],)


def _multiply(left: State, right: State) -> State:
    return (rounding.mul(left[0], right[0]),)


def _join_exponentials(left: State, right: State) -> State:
    """Pairs (maximum m, sum of exp(x - m)) of two neighbours."""
    top = jnp.maximum(left[0], right[0])
    about = jnp.where(jnp.isfinite(top), top, np.float32(0))
    return top, _rescaled(left, about) + _rescaled(right, about)


def _rescaled(state: State, about: jax.Array) -> jax.Array:
    return rounding.mul(state[1], rounding.exp(state[0] - about))


def _exponentials(x: jax.Array) -> State:
    """A number as its own maximum and one exponential, exp(0); one that is not finite stays where it is."""
    return jnp.where(jnp.isfinite(x), x, np.float32(0)), jnp.where(
        jnp.isfinite(x), np.float32(1), _infinite(x)
    )


def _infinite(x: jax.Array) -> jax.Array:
    return jnp.where(x == _NEG_INF, np.float32(0), x)


def _log_of(state: State) -> jax.Array:
    return state[0] + rounding.log(state[1])


_KINDS: dict[
    str, tuple[Callable[[jax.Array], State], Callable[[State, State], State], Callable[[State], jax.Array]]
]
_KINDS = {
    "cumsum": (lambda x: (x,), _add, lambda state: state[0]),
    "cumprod": (lambda x: (x,), _multiply, lambda state: state[0]),
    "cumlogsumexp": (_exponentials, _join_exponentials, _log_of),
}


def product(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The product of fp32 `x` over `axes`, by halving as `tree_sum`: padded with 1, element i meets element i + p/2."""
    kept = [i for i in range(x.ndim) if i not in axes]
    rows = jnp.transpose(x, (*kept, *axes)).reshape(*(x.shape[i] for i in kept), -1)
    n = rows.shape[-1]
    width = 1 << max(0, (n - 1).bit_length())
    rows = jnp.pad(rows, [(0, 0)] * len(kept) + [(0, width - n)], constant_values=1)
    while width > 1:
        width //= 2
        rows = rounding.mul(rows[..., :width], rows[..., width:])
    return rows[..., 0]

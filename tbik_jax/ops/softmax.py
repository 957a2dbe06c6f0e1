"""`logsumexp`, `log_softmax` and `softmax`: the leaves of `pallas_kernels/log_softmax`, any axes, with gradients."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..pallas_kernels.common.tree import tree_join
from . import steps
from .reductions import Axis, check_float

_NEG_INF = np.float32(-np.inf)


def log_softmax(x: jax.Array, axis: Axis = -1, where: jax.Array | None = None) -> jax.Array:
    """`jax.nn.log_softmax`: `(x - max) - log(sum of exp(x - max))` in fp32, rounded once.

    The reduced axes are one row in row-major order. A row of a multiple of 128 elements is cut into eight leaves, any
    other one is a single leaf. A leaf's sum is taken by `tree_sum` about the leaf's own maximum and rescaled to the
    row's; leaves meet by the tree. For float32 rows of a multiple of 128 these are the bits of
    `pallas_kernels.log_softmax`'s reference, and so of the log-probabilities of `generate` and `score` on the CPU.

    Args:
        x: bfloat16, float16 or float32.
        axis: one, several, or None for all.
        where: bool, broadcast to x's shape; elements where it is False do not count, and give -inf.

    Returns:
        Like x.

    Raises:
        ValueError: a dtype or an axis that the contract does not cover.
    """
    return _by_rows("log_softmax", x, axis, where, _log_probabilities, _NEG_INF)


def softmax(x: jax.Array, axis: Axis = -1, where: jax.Array | None = None) -> jax.Array:
    """`jax.nn.softmax`: `exp(x - max) / sum of exp(x - max)` in fp32, rounded once; sums as in `log_softmax`.

    Args:
        x: bfloat16, float16 or float32.
        axis: one, several, or None for all.
        where: bool, broadcast to x's shape; elements where it is False do not count, and give 0.

    Returns:
        Like x.

    Raises:
        ValueError: a dtype or an axis that the contract does not cover.
    """
    return _by_rows("softmax", x, axis, where, probabilities, np.float32(0))


def logsumexp(
    a: jax.Array,
    axis: Axis = None,
    b: None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: jax.Array | None = None,
) -> jax.Array:
    """`jax.scipy.special.logsumexp`: `max + log(sum of exp(a - max))` in fp32, rounded once; sums as in `log_softmax`.

    Args:
        a: bfloat16, float16 or float32.
        axis: one, several, or None for all.
        b: None; weights are not covered.
        keepdims: leave reduced axes with length 1.
        return_sign: False.
        where: bool, broadcast to a's shape; elements where it is False do not count.

    Returns:
        -inf for a row of -inf or of nothing, inf for one that holds inf, NaN for one that holds NaN.

    Raises:
        ValueError: a dtype, axis or argument that the contract does not cover.
    """
    if b is not None or return_sign:
        raise ValueError("logsumexp: b= and return_sign=True are not supported; add log(b) to a instead")
    rows = _Rows.of("logsumexp", a, axis, where)
    if not rows.values.shape[-1]:
        out = jnp.full(rows.values.shape[:-1], _NEG_INF)
    else:
        top = lax.stop_gradient(jnp.max(rows.values, axis=-1))
        origin = jnp.where(jnp.isfinite(top), top, np.float32(0))
        out = origin + steps.log(_totals(rows.values, origin))
        out = jnp.where(top == np.float32(np.inf), top, out)
    return steps.narrow(jnp.expand_dims(out, rows.axes) if keepdims else out, jnp.asarray(a).dtype.name)


@jax.jit  # in one compiled program where it is called outside of jit
def probabilities(x: jax.Array) -> jax.Array:
    """Softmax of fp32 x over its last axis, in fp32."""
    top = lax.stop_gradient(jnp.max(x, axis=-1))
    weights = steps.exp(x - _along(top, x))
    return steps.div(weights, _along(_totals(x, top), x))


@jax.jit
def _log_probabilities(x: jax.Array) -> jax.Array:
    top = lax.stop_gradient(jnp.max(x, axis=-1))
    return (x - _along(top, x)) - _along(steps.log(_totals(x, top)), x)


@jax.jit
def _totals(x: jax.Array, origin: jax.Array) -> jax.Array:
    """The sum of exp(x - origin) over the last axis, in the order of `leaf_statistics` and `join_totals`."""
    length = x.shape[-1]
    leaves = 8 if length % 128 == 0 else 1
    parts = x.reshape(*x.shape[:-1], leaves, length // leaves)
    top = lax.stop_gradient(jnp.max(parts, axis=-1))
    about = jnp.where(top == _NEG_INF, np.float32(0), top)
    sums = steps.total(steps.exp(parts - _along(about, parts)), (parts.ndim - 1,))
    scaled = steps.mul(sums, steps.exp(top - jnp.expand_dims(origin, -1)))
    return tree_join([scaled[..., i] for i in range(leaves)])


def _along(row: jax.Array, x: jax.Array) -> jax.Array:
    return steps.spread(row, x.shape, (x.ndim - 1,))


class _Rows(NamedTuple):
    """The reduced axes as one last axis, in fp32."""

    values: jax.Array
    axes: tuple[int, ...]
    kept: tuple[int, ...]

    @classmethod
    def of(cls, op: str, x: jax.Array, axis: Axis, where: jax.Array | None) -> "_Rows":
        x = jnp.asarray(x)
        check_float(op, x)
        axes = steps.reduced_axes(op, axis, x.ndim)
        kept = tuple(i for i in range(x.ndim) if i not in axes)
        values = steps.widen(x)
        if where is not None:
            values = jnp.where(where, values, _NEG_INF)
        length = math.prod(x.shape[i] for i in axes)
        shape = *(x.shape[i] for i in kept), length
        return cls(jnp.transpose(values, (*kept, *axes)).reshape(shape), axes, kept)

    def back(self, values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        order = (*self.kept, *self.axes)
        moved = values.reshape([shape[i] for i in order])
        return jnp.transpose(moved, [order.index(i) for i in range(len(shape))])


def _by_rows(
    op: str,
    x: jax.Array,
    axis: Axis,
    where: jax.Array | None,
    function: Callable[[jax.Array], jax.Array],
    masked: np.float32,
) -> jax.Array:
    x = jnp.asarray(x)
    rows = _Rows.of(op, x, axis, where)
    if not x.size:
        return x
    out = rows.back(function(rows.values), x.shape)
    return steps.narrow(out if where is None else jnp.where(where, out, masked), x.dtype.name)

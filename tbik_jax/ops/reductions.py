"""Sums, means and variances whose order is a function of what is reduced, and of nothing beside it."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..pallas_kernels.common.dtypes import FLOATS
from . import steps

Axis = int | Sequence[int] | None


def sum(
    a: jax.Array,
    axis: Axis = None,
    dtype: jax.typing.DTypeLike | None = None,
    out: None = None,
    keepdims: bool = False,
    initial: Any = None,
    where: jax.Array | None = None,
) -> jax.Array:
    """`jnp.sum` in one order: the reduced axes are one row in row-major order, summed by `tree_sum` in fp32.

    The order depends on the lengths of the reduced axes alone. A row whose length is no power of two is padded with
    +0.0, so its sum is never -0.0.

    Args:
        a: bfloat16, float16, float32; integers and bools are summed by `jnp.sum`, which is exact in any order.
        axis: one, several, or None for all.
        dtype: of the result; a's by default. The only rounding is to it.
        out: None.
        keepdims: leave reduced axes with length 1.
        initial: a number, added last.
        where: bool, broadcast to a's shape; elements where it is False count as +0.0.

    Returns:
        The sums.

    Raises:
        ValueError: a dtype, axis or argument that the contract does not cover.
    """
    _refuse_out("sum", out)
    a = jnp.asarray(a)
    exact = jnp.issubdtype(a.dtype, jnp.integer) or a.dtype == jnp.bool_
    if exact and (dtype is None or not jnp.issubdtype(dtype, jnp.floating)):
        return jnp.sum(a, axis, dtype, keepdims=keepdims, initial=initial, where=where)
    x, axes, result = _prepared("sum", a, axis, dtype)
    sums = _sums(_masked(x, where), axes)
    if initial is not None:
        sums = sums + jnp.float32(initial)
    return _finished(sums, axes, keepdims, result)


def mean(
    a: jax.Array,
    axis: Axis = None,
    dtype: jax.typing.DTypeLike | None = None,
    out: None = None,
    keepdims: bool = False,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """`jnp.mean` in one order: the fp32 sum of `sum`, divided by the number of elements, rounded once.

    Args:
        a: bfloat16, float16 or float32.
        axis: one, several, or None for all.
        dtype: of the result; a's by default.
        out: None.
        keepdims: leave reduced axes with length 1.
        where: bool, broadcast to a's shape; the others are not counted.

    Returns:
        The means.

    Raises:
        ValueError: as `sum`; integers too, which a mean would have to round.
    """
    _refuse_out("mean", out)
    x, axes, result = _prepared("mean", jnp.asarray(a), axis, dtype)
    return _finished(_means(_masked(x, where), axes, _counts(x, axes, where)), axes, keepdims, result)


def var(
    a: jax.Array,
    axis: Axis = None,
    dtype: jax.typing.DTypeLike | None = None,
    out: None = None,
    ddof: float = 0,
    keepdims: bool = False,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """`jnp.var` in one order: in fp32 the mean, then the sum of squared differences over `count - ddof`, rounded once.

    Args:
        a: bfloat16, float16 or float32.
        axis: one, several, or None for all.
        dtype: of the result; a's by default.
        out: None.
        ddof: taken off the number of elements.
        keepdims: leave reduced axes with length 1.
        where: bool, broadcast to a's shape; the others are not counted.

    Returns:
        The variances.

    Raises:
        ValueError: as `mean`.
    """
    _refuse_out("var", out)
    x, axes, result = _prepared("var", jnp.asarray(a), axis, dtype)
    counts = _counts(x, axes, where)
    return _finished(_variances(x, counts, where, axes, float(ddof)), axes, keepdims, result)


@functools.partial(jax.jit, static_argnums=(1,))  # in one compiled program where it is called outside of jit
def _sums(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return steps.total(x, axes)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _variances(
    x: jax.Array, counts: jax.Array, where: jax.Array | None, axes: tuple[int, ...], ddof: float
) -> jax.Array:
    centred = x - steps.spread(_means(_masked(x, where), axes, counts), x.shape, axes)
    centred = _masked(centred, where)
    squares = steps.total(steps.mul(centred, centred), axes)
    return steps.div(squares, counts - np.float32(ddof))


@functools.partial(jax.jit, static_argnums=(1,))
def _means(x: jax.Array, axes: tuple[int, ...], counts: jax.Array) -> jax.Array:
    return steps.div(steps.total(x, axes), counts)


def _counts(x: jax.Array, axes: tuple[int, ...], where: jax.Array | None) -> jax.Array:
    """fp32 number of elements behind each sum."""
    kept = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    if where is None:
        return jnp.full(kept, math.prod(x.shape[i] for i in axes), jnp.float32)
    every = jnp.broadcast_to(where, x.shape)
    return jnp.sum(every, axes, dtype=jnp.int32).astype(jnp.float32)  # integers: exact in any order


def _masked(x: jax.Array, where: jax.Array | None) -> jax.Array:
    return x if where is None else jnp.where(where, x, np.float32(0))


def _prepared(
    op: str, a: jax.Array, axis: Axis, dtype: jax.typing.DTypeLike | None
) -> tuple[jax.Array, tuple[int, ...], str]:
    """a in fp32, the reduced axes, and the dtype of the result."""
    check_float(op, a)
    result = jnp.dtype(a.dtype if dtype is None else dtype)
    if result.name not in FLOATS:
        raise ValueError(f"{op}: dtype={result} is not supported; use one of {', '.join(FLOATS)}")
    return steps.widen(a), steps.reduced_axes(op, axis, a.ndim), result.name


def _finished(x: jax.Array, axes: tuple[int, ...], keepdims: bool, dtype: str) -> jax.Array:
    return steps.narrow(jnp.expand_dims(x, axes) if keepdims else x, dtype)


def check_float(op: str, a: jax.Array) -> None:
    """Raises `ValueError` for a dtype that is not bfloat16, float16 or float32."""
    if a.dtype.name not in FLOATS:
        raise ValueError(f"{op} takes {', '.join(FLOATS)}, not {a.dtype}; cast to float32 first")


def _refuse_out(op: str, out: None) -> None:
    if out is not None:
        raise ValueError(f"{op}: out= is not supported, as in jax.numpy; use the result")

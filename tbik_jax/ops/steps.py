"""fp32 steps that stay single operations, and whose derivatives are steps of the same kind.

JAX differentiates an op that is built from them step by step, to any order in reverse mode: every product, quotient and
sum of the backward pass is one of these steps again, so that no compiler contracts it and no reduction of unspecified
order appears. What a value is used for twice adds its cotangents in the order of the program.

Forward-mode differentiation (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) raises `TypeError`, as for any `custom_vjp`.
"""

import functools
import math
import operator
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..pallas_kernels.common import rounding
from ..pallas_kernels.common.tree import tree_sum


@jax.custom_vjp
def mul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a * b of one shape, rounded by itself."""
    return rounding.mul(a, b)


mul.defvjp(lambda a, b: (mul(a, b), (a, b)), lambda saved, ct: (mul(ct, saved[1]), mul(ct, saved[0])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale(x: jax.Array, factor: float) -> jax.Array:
    """x times fp32(factor), rounded by itself."""
    return rounding.mul(x, np.float32(factor))


scale.defvjp(lambda x, factor: (scale(x, factor), None), lambda factor, _, ct: (scale(ct, factor),))


@jax.custom_vjp
def div(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b of one shape, rounded once."""
    return rounding.div(a, b)


def _div_fwd(a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    quotient = div(a, b)
    return quotient, (quotient, b)


def _div_bwd(saved: tuple[jax.Array, jax.Array], ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    quotient, b = saved
    da = div(ct, b)
    return da, neg(mul(da, quotient))


div.defvjp(_div_fwd, _div_bwd)


@jax.custom_vjp
def neg(x: jax.Array) -> jax.Array:
    """-x, -0.0 of +0.0."""
    return rounding.neg(x)


neg.defvjp(lambda x: (neg(x), None), lambda _, ct: (neg(ct),))


@jax.custom_vjp
def exp(x: jax.Array) -> jax.Array:
    """e**x by the polynomial of `common/rounding.py`."""
    return rounding.exp(x)


def _exp_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = exp(x)
    return y, y


exp.defvjp(_exp_fwd, lambda y, ct: (mul(ct, y),))


@jax.custom_vjp
def log(x: jax.Array) -> jax.Array:
    """Natural logarithm by the polynomial of `common/rounding.py`."""
    return rounding.log(x)


log.defvjp(lambda x: (log(x), x), lambda x, ct: (div(ct, x),))


@jax.custom_vjp
def reciprocal_sqrt(x: jax.Array) -> jax.Array:
    """1 / sqrt(x) in two rounded steps."""
    return rounding.reciprocal_sqrt(x)


def _reciprocal_sqrt_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = reciprocal_sqrt(x)
    return y, y


reciprocal_sqrt.defvjp(_reciprocal_sqrt_fwd, lambda y, ct: (mul(mul(ct, scale(y, -0.5)), mul(y, y)),))


def widen(x: jax.Array) -> jax.Array:
    """x as fp32, which is exact; its cotangent is rounded to x's dtype once."""
    return _widen(x, x.dtype.name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _widen(x: jax.Array, dtype: str) -> jax.Array:
    return x.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def narrow(x: jax.Array, dtype: str) -> jax.Array:
    """fp32 x rounded to `dtype` once; the rounding counts as the identity in the derivative."""
    return rounding.round_to(x, dtype)


_widen.defvjp(lambda x, dtype: (_widen(x, dtype), None), lambda dtype, _, ct: (narrow(ct, dtype),))
narrow.defvjp(lambda x, dtype: (narrow(x, dtype), None), lambda dtype, _, ct: (widen(ct),))


def total(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The sum over `axes` (ascending) of fp32 x, as one row in row-major order, by `tree_sum`; the axes go away."""
    return _total(x, x.shape, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _total(x: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    kept = [i for i in range(len(shape)) if i not in axes]
    rest = [shape[i] for i in kept]
    length = math.prod(shape[i] for i in axes)
    if length == 0:
        return jnp.zeros(rest, jnp.float32)
    return tree_sum(jnp.transpose(x, (*kept, *axes)).reshape(*rest, length))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def spread(x: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """fp32 x repeated along new `axes` (ascending, places in the result) of `shape`: the transpose of `total`."""
    return jnp.broadcast_to(jnp.expand_dims(x, axes), shape)


_total.defvjp(
    lambda x, shape, axes: (_total(x, shape, axes), None),
    lambda shape, axes, _, ct: (spread(ct, shape, axes),),
)
spread.defvjp(
    lambda x, shape, axes: (spread(x, shape, axes), None),
    lambda shape, axes, _, ct: (total(ct, axes),),
)


def expand(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """fp32 x broadcast to `shape` by numpy's rules; its cotangent is summed by `total`."""
    new = tuple(range(len(shape) - x.ndim))
    old = x.shape
    wide = tuple(i for i in range(len(old)) if old[i] == 1 and shape[len(new) + i] != 1)
    axes = new + tuple(len(new) + i for i in wide)
    if not axes:
        return x
    return spread(x.reshape(tuple(n for i, n in enumerate(old) if i not in wide)), shape, axes)


def reduced_axes(op: str, axis: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """`axis` as ascending non-negative axes; `ValueError` if one is out of range or named twice."""
    if axis is None:
        axes = list(range(ndim))
    elif isinstance(axis, Iterable):
        axes = [operator.index(a) for a in axis]
    else:
        axes = [operator.index(axis)]
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"{op}: axis {a} is out of range for an array of {ndim} dimensions")
    found = sorted(a % ndim for a in axes)
    if len(set(found)) < len(found):
        raise ValueError(f"{op}: axis={axis} names an axis twice; name each once")
    return tuple(found)

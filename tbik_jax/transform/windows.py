"""Convolutions as contractions of windows, and the sums of pooling: windows are gathered, which moves bits alone."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..ops import steps
from ..ops.contraction import contract
from ..pallas_kernels.common import rounding
from . import scatters


def windows(
    x: jax.Array,
    sizes: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
    fill: Any,
) -> jax.Array:
    """The windows of `x` as [o0, k0, o1, k1, ...]: place and offset in each dimension, padded with `fill`."""
    config = [(low, high, d - 1) for (low, high), d in zip(padding, base_dilation, strict=True)]
    x = lax.pad(x, jnp.asarray(fill, x.dtype), config)
    for d, (k, stride, dilation) in enumerate(zip(sizes, strides, window_dilation, strict=True)):
        at = 2 * d
        count = max(0, (x.shape[at] - dilation * (k - 1) - 1) // stride + 1)
        if k == 1 and stride == 1:
            x = jnp.expand_dims(x, at + 1)
        else:
            places = stride * np.arange(count)[:, None] + dilation * np.arange(k)
            x = jnp.take(x, jnp.asarray(places, jnp.int32), axis=at, mode="clip")  # never out of range
    return x


def convolution(eqn: Any, lhs: jax.Array, rhs: jax.Array, *, leaves: int) -> jax.Array:
    """`conv_general_dilated` as one contraction over (window offsets in order of the dimensions, input features).

    Groups are batch dimensions of it. The windows stand in memory, so it takes as many times the input's memory as a
    window has places.
    """
    p = eqn.params
    of_lhs, of_rhs, of_out = p["dimension_numbers"]
    groups, batches = p["feature_group_count"], p["batch_group_count"]
    lhs, rhs = jnp.transpose(lhs, of_lhs), jnp.transpose(rhs, of_rhs)  # [B, C, ...], [O, I, ...]
    space = lhs.ndim - 2
    every = range(space)
    cut = windows(
        lhs,
        (1, 1, *rhs.shape[2:]),
        (1, 1, *p["window_strides"]),
        ((0, 0), (0, 0), *p["padding"]),
        (1, 1, *p["lhs_dilation"]),
        (1, 1, *p["rhs_dilation"]),
        0,
    )
    sizes = cut.shape[4::2]
    cut = cut.reshape(cut.shape[0], cut.shape[2], *cut.shape[4:])  # [B, C, o0, k0, o1, k1, ...]
    count = groups * batches  # one of them is 1
    if batches > 1:
        cut = cut.reshape(count, cut.shape[0] // count, *cut.shape[1:])
    else:
        cut = jnp.moveaxis(cut.reshape(cut.shape[0], count, cut.shape[1] // count, *cut.shape[2:]), 1, 0)
    kernel = rhs.reshape(count, rhs.shape[0] // count, *rhs.shape[1:])  # [G, O / G, I, k0, k1, ...]
    contracted = (*(4 + 2 * i for i in every), 2), (*(3 + i for i in every), 2)
    out_dtype = eqn.outvars[0].aval.dtype
    dims = contracted, ((0,), (0,))
    out = contract(cut, kernel, dims, p["precision"], out_dtype, leaves=leaves)  # [G, B, o0, o1, ..., O / G]
    out = jnp.moveaxis(out, (0, out.ndim - 1), (1, 2))  # [B, G, O / G, o0, o1, ...]
    out = out.reshape(out.shape[0], rhs.shape[0], *sizes)
    return jnp.transpose(out, [of_out.index(i) for i in range(out.ndim)])


def window_sum(eqn: Any, x: jax.Array) -> jax.Array:
    """`reduce_window_sum`: each window is a row in row-major order, summed by `tree_sum` in fp32, rounded once."""
    p = eqn.params
    cut = windows(
        x.astype(jnp.float32),
        p["window_dimensions"],
        p["window_strides"],
        p["padding"],
        p["base_dilation"],
        p["window_dilation"],
        0,
    )
    return rounding.round_to(steps.total(cut, tuple(range(1, cut.ndim, 2))), x.dtype)


def select_and_scatter_add(eqn: Any, source: jax.Array, operand: jax.Array) -> jax.Array:
    """The gradient of max or min pooling: what windows send to one place is added in their order."""
    p = eqn.params
    ones = (1,) * operand.ndim
    largest = p["select_prim"].name == "ge"
    limit = -np.inf if largest else np.inf
    options = p["window_dimensions"], p["window_strides"], p["padding"], ones, ones
    values = _last(windows(operand, *options, limit))
    ids = lax.iota(jnp.int32, operand.size).reshape(operand.shape)
    ids = _last(windows(ids, *options, -1))
    chosen = (jnp.argmax if largest else jnp.argmin)(values, axis=-1, keepdims=True)
    places = jnp.take_along_axis(ids, chosen, axis=-1)
    zero = jnp.zeros(operand.shape, source.dtype)
    return scatters.place("add", zero, places.reshape(-1), source.reshape(-1, 1))


def _last(x: jax.Array) -> jax.Array:
    """[o0, k0, o1, k1, ...] to [o0, o1, ..., k0 * k1 * ...]."""
    moved = jnp.transpose(x, (*range(0, x.ndim, 2), *range(1, x.ndim, 2)))
    return moved.reshape(*moved.shape[: x.ndim // 2], math.prod(moved.shape[x.ndim // 2 :]))

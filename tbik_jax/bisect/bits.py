"""Bits of arrays: integer views, distances in ulps, and a fingerprint of a row that no mesh changes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_SEEDS = (0x9E3779B9, 0x7F4A7C15)  # one a half of the fingerprint
_ROWS = 1 << 22  # elements that are hashed at a time


def bits_of(x: np.ndarray) -> np.ndarray:
    """The bits of an array as unsigned integers of the same width."""
    return np.ascontiguousarray(x).view(_UNSIGNED[x.dtype.itemsize]).reshape(x.shape)


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype is a floating-point one, those of ml_dtypes among them."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def largest_ulp(a: np.ndarray, b: np.ndarray) -> int | None:
    """Largest distance of a pair, in steps from a number to the next of its dtype (of integers: their difference).

    -0.0 and +0.0 are one step apart. Pairs with a NaN have no distance.

    Args:
        a: any shape; floating-point, integer or boolean.
        b: of the same shape and dtype.

    Returns:
        The distance; None if every pair has a NaN.
    """
    kept = np.ones(a.shape, bool)
    if is_float(a.dtype):
        kept = (a == a) & (b == b)
    if not kept.any():
        return None
    left, right = (_steps(x[kept]) for x in (a, b))
    # unsigned, for two int64s may be further apart than an int64 holds
    apart = np.where(
        left > right,
        left.view(np.uint64) - right.view(np.uint64),
        right.view(np.uint64) - left.view(np.uint64),
    )
    return int(apart.max())


def _steps(x: np.ndarray) -> np.ndarray:
    """Integers, int64, that count the numbers of the dtype upwards."""
    if not is_float(x.dtype):
        return x.astype(np.int64)
    size = x.dtype.itemsize
    signed = np.ascontiguousarray(x).view(_SIGNED[size]).astype(np.int64)
    largest = np.int64((1 << (8 * size - 1)) - 1)
    return np.where(signed < 0, -(signed & largest) - 1, signed)


def row_fingerprints(x: np.ndarray) -> np.ndarray:
    """64 bits of each row that are equal where all bits of the row are, and hardly ever otherwise.

    Two wrapping sums over the row of a hash of (element's place, element's bits): sums of integers, which have no
    order. `partial_fingerprints` makes the same on a device.

    Args:
        x: [rows, ...], elements of at most 32 bits.

    Returns:
        uint32 [rows, 2].
    """
    flat = bits_of(x).reshape(len(x), -1)
    out = np.zeros((len(x), 2), np.uint32)
    places = np.arange(flat.shape[1], dtype=np.uint32)
    step = max(1, _ROWS // max(1, flat.shape[1]))
    with np.errstate(over="ignore"):
        for start in range(0, len(flat), step):
            words = flat[start : start + step].astype(np.uint32)
            for half, seed in enumerate(_SEEDS):
                hashed = _mixed(words ^ _mixed(places * np.uint32(2654435761) + np.uint32(seed)))
                out[start : start + step, half] = hashed.sum(axis=1, dtype=np.uint32)
    return out


def partial_fingerprints(x: jax.Array, offset: jax.Array | int, rows: int = 2) -> jax.Array:
    """`row_fingerprints` of the part of each row that is here; the parts of a row add up, wrapping.

    Args:
        x: [..., places], of which the first `rows` dimensions count rows; elements of at most 32 bits.
        offset: of the first element here in the whole row.
        rows: dimensions.

    Returns:
        uint32 [..., 2].
    """
    flat = x.reshape(*x.shape[:rows], -1)
    if flat.dtype == jnp.bool_:
        words = flat.astype(jnp.uint32)
    else:
        unsigned = _UNSIGNED[flat.dtype.itemsize]
        words = lax.bitcast_convert_type(flat, unsigned).astype(jnp.uint32)
    places = (jnp.arange(flat.shape[-1], dtype=jnp.uint32) + jnp.uint32(offset)) * jnp.uint32(2654435761)
    halves = [
        jnp.sum(_mixed(words ^ _mixed(places + jnp.uint32(seed))), axis=-1, dtype=jnp.uint32)
        for seed in _SEEDS
    ]
    return jnp.stack(halves, axis=-1)


def _mixed(x):  # type: ignore[no-untyped-def]  # of numpy or JAX
    """The last steps of MurmurHash3: every bit of a word changes every other one with probability 1/2."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))

"""Whether two matmuls give the same bits: inputs that would show it, and the configuration to compare with."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import MosaicConfig

F32 = jnp.float32
#: Kinds of input. Every one but the first is there because some wrong order or rounding shows only in it.
KINDS = ("normal", "wide", "cancel", "subnormal", "special")


def reference_config(k: int, leaves: int) -> MosaicConfig:
    """The configuration whose bits all others must have: one small tile at a time, two stages, no cluster."""
    tile = next(t for t in (64, 32, 16) if k // leaves % t == 0)
    return MosaicConfig(consumers=1, tile_n=tile, tile_k=tile, stages=2)


def make_inputs(
    kind: str, m: int, k: int, n: int, dtype: Any, seed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """x [m, k] and w [k, n].

    Args:
        kind: "normal"; "wide": the columns of x spread over 24 powers of two; "cancel": the sums nearly vanish, the
            partners anywhere in k; "subnormal": much of x and an eighth of w are subnormal; "special": infinities,
            NaNs, -0.0 and the largest number here and there in both.
        m: Rows.
        k: Length of the contraction.
        n: Columns.
        dtype: bfloat16 or float16.
        seed: An integer.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 12))
    x = jax.random.normal(next(keys), (m, k), F32)
    w = jax.random.normal(next(keys), (k, n), F32) / k**0.5
    if kind == "wide":
        x = x * jnp.exp2(jax.random.uniform(next(keys), (k,), F32, -12, 12))
    if kind == "cancel":  # columns in pairs a, -a against rows that differ in their last bits
        odd = jnp.arange(k) % 2 == 1
        order = jax.random.permutation(next(keys), k)
        nudge = jnp.where(odd, 1 + float(jnp.finfo(dtype).eps), 1.0)[:, None]
        x = (jnp.repeat(x[:, ::2], 2, axis=1) * jnp.where(odd, -1.0, 1.0))[:, order]
        w = (jnp.repeat(w[::2], 2, axis=0).astype(dtype).astype(F32) * nudge)[order]
    x, w = x.astype(dtype), w.astype(dtype)
    if kind == "subnormal":
        x = jnp.where(jax.random.bernoulli(next(keys), 0.5, x.shape), _subnormals(next(keys), x), x)
        w = jnp.where(jax.random.bernoulli(next(keys), 0.125, w.shape), _subnormals(next(keys), w), w)
        small = jnp.arange(m)[:, None] % 2 == 1  # in every other row nothing larger hides them
        x = jnp.where(small, _subnormals(next(keys), x), x)
    if kind == "special":
        x = _sprinkle(next(keys), x, 2 / k)
        w = _sprinkle(next(keys), w, 0.02 / k)
    return x, w


def _subnormals(key: jax.Array, like: jax.Array) -> jax.Array:
    """Random subnormal numbers, from their bits, because arithmetic might flush them to zero."""
    raw = jax.random.bits(key, like.shape, jnp.uint16)
    exponent = ((1 << (15 - jnp.finfo(like.dtype).nmant)) - 1) << jnp.finfo(like.dtype).nmant
    return lax.bitcast_convert_type(raw & jnp.uint16(0xFFFF ^ exponent), like.dtype)


def _sprinkle(key: jax.Array, a: jax.Array, share: float) -> jax.Array:
    """`a` with a few entries that are not ordinary."""
    where, which = jax.random.split(key)
    values = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, -0.0, float(jnp.finfo(a.dtype).max)], a.dtype)
    chosen = values[jax.random.randint(which, a.shape, 0, len(values))]
    return jnp.where(jax.random.bernoulli(where, share, a.shape), chosen, a)


def count_differences(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Elements that differ as integers, and how many of them are not NaN in both."""
    kind = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
    unequal = lax.bitcast_convert_type(a, kind) != lax.bitcast_convert_type(b, kind)
    real = unequal & ~(jnp.isnan(a) & jnp.isnan(b))
    return unequal.sum(dtype=jnp.int32), real.sum(dtype=jnp.int32)


def poison(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array of a NaN that no matmul gives.

    Freed just before a product it is likely the memory that the product goes to. What a kernel forgets to write is then
    not the result of the one before.
    """
    kind = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    return lax.bitcast_convert_type(jnp.full(shape, jnp.iinfo(kind).max - 0x2A, kind), dtype)

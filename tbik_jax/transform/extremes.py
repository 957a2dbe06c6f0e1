"""Maxima and minima whose zeros have one sign: of -0.0 and +0.0 XLA's keep whichever their order meets first.

Floats are compared as integers in the order of their values, with -0.0 below +0.0. A NaN makes the result NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}
_MAXIMA = ("reduce_max", "reduce_window_max", "pmax")
_MINIMA = ("reduce_min", "reduce_window_min", "pmin")
EXTREMES = (*_MAXIMA, *_MINIMA)


def extreme(eqn: Any, *args: jax.Array) -> jax.Array | list[jax.Array]:
    """What one of `EXTREMES` gives, for each operand its own."""
    largest = eqn.primitive.name in _MAXIMA
    ordered = [_ordered(x, largest) for x in args]
    out = eqn.primitive.bind(*ordered, **eqn.params)
    if not eqn.primitive.multiple_results:
        return _floats(out, args[0].dtype, largest)
    return [_floats(keys, x.dtype, largest) for keys, x in zip(out, args, strict=True)]


def _ordered(x: jax.Array, largest: bool) -> jax.Array:
    """Integers in the order of the floats, NaN beyond all others; what is no float as it is."""
    if not _is_ordered(x.dtype):
        return x
    integers = _INTEGERS[x.dtype.itemsize]
    keys = _mirrored(lax.bitcast_convert_type(x, integers))
    limits = jnp.iinfo(integers)
    return jnp.where(x != x, jnp.asarray(limits.max if largest else limits.min, integers), keys)


def _floats(keys: jax.Array, dtype: Any, largest: bool) -> jax.Array:
    """The floats of such integers; of nothing at all the infinity that it begins with."""
    if not _is_ordered(dtype):
        return keys
    integers = _INTEGERS[dtype.itemsize]
    infinity = _mirrored(
        lax.bitcast_convert_type(jnp.asarray(-np.inf if largest else np.inf, dtype), integers)
    )
    keys = jnp.maximum(keys, infinity) if largest else jnp.minimum(keys, infinity)
    out = lax.bitcast_convert_type(_mirrored(keys), dtype)
    return jnp.where(out != out, jnp.asarray(np.nan, dtype), out)


def _mirrored(x: jax.Array) -> jax.Array:
    """The bits of negative floats without their sign turned over, and back."""
    return jnp.where(x < 0, x ^ jnp.iinfo(x.dtype).max, x)


def _is_ordered(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize in _INTEGERS

"""`residual_add` in plain JAX: one fp32 add and one rounding an element."""

import jax
import jax.numpy as jnp

from ..common.rounding import round_to


def residual_add_reference(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y in fp32, rounded to x's dtype once."""
    return round_to(x.astype(jnp.float32) + y.astype(jnp.float32), x.dtype)

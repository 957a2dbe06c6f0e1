"""`swiglu` in plain JAX: elementwise, every step rounded alone."""

import jax
import jax.numpy as jnp
import numpy as np

from ..common.rounding import exp, mul, round_to


def swiglu_reference(gate: jax.Array, up: jax.Array) -> jax.Array:
    """(gate / (1 + exp(-gate))) * up in fp32, rounded to gate's dtype once."""
    wide = gate.astype(jnp.float32)
    silu = wide / (np.float32(1) + exp(-wide))
    return round_to(mul(silu, up.astype(jnp.float32)), gate.dtype)

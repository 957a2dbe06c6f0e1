"""Activations inside the GPU kernels: one function each, so that a fused kernel has the bits of a separate one."""

import jax
import jax.numpy as jnp
import numpy as np


def silu(x: jax.Array) -> jax.Array:
    """x / (1 + exp(-x)) of fp32 `x` with the kernel's own `exp` and division: the same bits wherever it stands."""
    return x / (np.float32(1) + jnp.exp(-x))

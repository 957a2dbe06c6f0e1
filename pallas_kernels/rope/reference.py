"""`rope` in plain JAX: two rounded products and one add an element."""

import jax
import jax.numpy as jnp

from ..common.rounding import mul, round_to


def rope_reference(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [..., heads, H] by cos, sin [..., H/2] (fp32); halves [first, second] as in Hugging Face's Qwen3.

    `first * cos - second * sin` and `second * cos + first * sin` in fp32, each product rounded, the sum rounded once.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = [mul(first, cos) - mul(second, sin), mul(second, cos) + mul(first, sin)]
    return round_to(jnp.concatenate(rotated, axis=-1), x.dtype)

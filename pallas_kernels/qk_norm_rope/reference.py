"""`qk_norm_rope` in plain JAX: `rms_norm`, `rope` and a copy into the cache, one after the other."""

import jax
import jax.numpy as jnp
from jax import lax

from ..rms_norm.reference import rms_norm_reference
from ..rope.reference import rope_reference


def qk_norm_rope_reference(
    qkv: jax.Array,
    q_scale: jax.Array,
    k_scale: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The op's arguments and results are in `api.py`. Queries and keys are rounded after the norm and after RoPE."""
    b, t, kv_heads, group, h = qkv.shape
    q, k, v = qkv[..., :-2, :].reshape(b, t, kv_heads * (group - 2), h), qkv[..., -2, :], qkv[..., -1, :]
    cos, sin = cos[positions], sin[positions]
    q = rope_reference(rms_norm_reference(q, q_scale, eps=eps), cos, sin)
    k = rope_reference(rms_norm_reference(k, k_scale, eps=eps), cos, sin)
    return (
        q,
        write_cache_reference(k_cache, k, positions, lengths),
        write_cache_reference(v_cache, v, positions, lengths),
    )


def write_cache_reference(
    cache: jax.Array, new: jax.Array, positions: jax.Array, lengths: jax.Array
) -> jax.Array:
    """`cache` [B, S, K, H] with `new` [B, T, K, H] at `positions` [B, T]; zeros from a row's length on."""
    live = positions < lengths[:, None]
    new = jnp.where(live[..., None, None], new, jnp.zeros((), new.dtype))
    return jax.vmap(lambda row, part, start: lax.dynamic_update_slice(row, part, (start, 0, 0)))(
        cache, new, positions[:, 0]
    )

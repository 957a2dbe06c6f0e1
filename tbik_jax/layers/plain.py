"""The plain numerics: the same model with `jnp.dot`, `lax.psum` and ordinary softmax, the baseline to compare with."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas_kernels.qk_norm_rope.reference import write_cache_reference
from .base import TP


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainNumerics:
    """See `Numerics`. XLA chooses the order of every sum."""

    def column_parallel(
        self,
        x: jax.Array,
        w: jax.Array,
        *,
        out_dtype: jax.typing.DTypeLike | None = None,
    ) -> jax.Array:
        dims = (((x.ndim - 1,), (1,)), ((), ()))
        out = lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)
        return out.astype(x.dtype if out_dtype is None else out_dtype)

    def row_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.psum(jnp.dot(x, w, preferred_element_type=jnp.float32), TP).astype(x.dtype)

    def rms_norm(self, x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
        return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)

    def add_rms_norm(
        self, x: jax.Array, y: jax.Array, scale: jax.Array, *, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        total = self.add(x, y)
        return total, self.rms_norm(total, scale, eps=eps)

    def rope(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = cos[..., None, :], sin[..., None, :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(
            x.dtype
        )

    def qk_norm_rope_cache(
        self,
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
        b, t, kv_heads, group, h = qkv.shape
        q, k, v = qkv[..., :-2, :].reshape(b, t, kv_heads * (group - 2), h), qkv[..., -2, :], qkv[..., -1, :]
        cos, sin = cos[positions], sin[positions]
        q = self.rope(self.rms_norm(q, q_scale, eps=eps), cos, sin)
        k = self.rope(self.rms_norm(k, k_scale, eps=eps), cos, sin)
        return (
            q,
            write_cache_reference(k_cache, k, positions, lengths),
            write_cache_reference(v_cache, v, positions, lengths),
        )

    def swiglu(self, gate_up: jax.Array) -> jax.Array:
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return jax.nn.silu(gate) * up

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        visible = jnp.arange(k.shape[1]) <= positions[..., None]  # [B, T, S]
        return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + y

    def log_normaliser(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        row_max = lax.pmax(jnp.max(logits, axis=-1), TP)
        return row_max, jnp.log(lax.psum(jnp.sum(jnp.exp(logits - row_max[..., None]), axis=-1), TP))

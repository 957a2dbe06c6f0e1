"""The plain numerics: the same model with `jnp.dot`, `lax.psum` and ordinary softmax, the baseline to compare with."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas_kernels.qk_norm_rope.reference import write_cache_reference
from .base import TP, VocabStatistics, draw_over_tp, gather_over_tp, vocab_embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainNumerics:
    """See `Numerics`. XLA, cuBLAS and cuDNN choose the order of every sum.

    Attributes:
        cudnn: whether attention in bfloat16 and float16 is cuDNN's: the best that JAX has on a GPU.
    """

    cudnn: bool = False

    def embedding(self, ids: jax.Array, table: jax.Array) -> jax.Array:
        return vocab_embedding(ids, table)

    def column_parallel(
        self,
        x: jax.Array,
        w: jax.Array,
        *,
        out_dtype: jax.typing.DTypeLike | None = None,
    ) -> jax.Array:
        dims = (((x.ndim - 1,), (1,)), ((), ()))
        return lax.dot_general(x, w, dims, preferred_element_type=x.dtype if out_dtype is None else out_dtype)

    def row_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.psum(jnp.dot(x, w, preferred_element_type=x.dtype), TP)

    def rms_norm(self, x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
        return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)

    def keep_rms_norm(self, x: jax.Array, scale: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
        return x, self.rms_norm(x, scale, eps=eps)

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

    def gated_column_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        gate, up = jnp.split(self.column_parallel(x, w), 2, axis=-1)
        return jax.nn.silu(gate) * up

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        if not self.cudnn or q.dtype == jnp.float32:
            return _masked(q, k, v, positions, "xla")
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        if q.shape[1] == 1:
            return attend(q, k, v, key_value_seq_lengths=positions[:, 0] + 1)
        width = q.shape[1]  # a first chunk needs no mask in memory
        return lax.cond(
            jnp.all(positions[:, 0] == 0),
            lambda: attend(q, k[:, :width], v[:, :width], is_causal=True),
            lambda: _masked(q, k, v, positions, "cudnn"),
        )

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + y

    def vocab_statistics(self, logits: jax.Array) -> VocabStatistics:
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32) + lax.axis_index(TP) * logits.shape[-1]
        maxima, ids = gather_over_tp(jnp.max(logits, axis=-1), best)
        row_max, rank = jnp.max(maxima, axis=0), jnp.argmax(maxima, axis=0)
        best = jnp.take_along_axis(ids, rank[None], axis=0)[0]
        total = lax.psum(jnp.sum(jnp.exp(logits - row_max[..., None]), axis=-1), TP)
        finite = lax.psum(jnp.any(~(jnp.abs(logits) < jnp.inf), axis=-1).astype(jnp.int32), TP) == 0
        return VocabStatistics(row_max, jnp.log(total), best, finite)

    def draw(
        self,
        logits: jax.Array,
        row_max: jax.Array,
        temperature: jax.Array,
        key: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        return draw_over_tp(logits, row_max, temperature, key, positions, backend="reference")


def _masked(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, implementation: Literal["xla", "cudnn"]
) -> jax.Array:
    visible = jnp.arange(k.shape[1]) <= positions[..., None]  # [B, T, S]
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation=implementation)

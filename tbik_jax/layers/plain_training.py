"""The plain numerics with gradients, as Megatron-LM has them: JAX differentiates, XLA orders every sum.

A value that every tp rank holds has a cotangent that every rank holds too, so each collective gets the VJP that this
asks for (`_sum`, `_share`); JAX's own would sum once more.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from .base import DATA, FSDP, TP
from .plain import PlainNumerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainTraining(PlainNumerics):
    """`PlainNumerics` that can be differentiated, for whole sequences without a cache.

    Attributes:
        dtype: of the activations, by name.
    """

    dtype: str = "bfloat16"

    def weight(self, value: jax.Array, fsdp_dim: int | None) -> jax.Array:
        return _weight(self.dtype, fsdp_dim, value)

    def embedding(self, ids: jax.Array, table: jax.Array) -> jax.Array:
        local = ids - lax.axis_index(TP) * table.shape[0]
        inside = (local >= 0) & (local < table.shape[0])
        rows = jnp.take(table.astype(self.dtype), jnp.where(inside, local, 0), axis=0)
        return _sum(jnp.where(inside[..., None], rows, 0))

    def column_parallel(
        self, x: jax.Array, w: jax.Array, *, out_dtype: jax.typing.DTypeLike | None = None
    ) -> jax.Array:
        return super().column_parallel(_share(x), w.astype(x.dtype), out_dtype=out_dtype)

    def row_parallel(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return _sum(jnp.dot(x, w.astype(x.dtype), preferred_element_type=x.dtype))

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
        q = self.rope(self.rms_norm(q, _share(q_scale), eps=eps), cos, sin)
        return q, self.rope(self.rms_norm(k, _share(k_scale), eps=eps), cos, sin), v

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        if self.cudnn and q.dtype != jnp.float32:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")

    def token_logprobs(self, hidden: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
        """Log-probabilities float32 [B, T] of targets [B, T], from hidden [B, T, D] and this rank's w [V/tp, D]."""
        logits = _logits(_share(hidden), w)
        row_max = lax.pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), TP)
        total = _sum(jnp.sum(jnp.exp(logits - row_max[..., None]), axis=-1))
        local = targets - lax.axis_index(TP) * logits.shape[-1]
        inside = (local >= 0) & (local < logits.shape[-1])
        chosen = jnp.take_along_axis(logits, jnp.where(inside, local, 0)[..., None], axis=-1)[..., 0]
        return (_sum(jnp.where(inside, chosen, 0)) - row_max) - jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weight(dtype: str, dim: int | None, value: jax.Array) -> jax.Array:
    rounded = value.astype(dtype)
    if dim is not None:
        rounded = lax.all_gather(rounded, FSDP, axis=dim, tiled=True)
    return rounded.astype(jnp.float32)


def _weight_bwd(dtype: str, dim: int | None, _: None, ct: jax.Array) -> tuple[jax.Array]:
    if dim is None:
        return (lax.psum(ct, (DATA, FSDP)),)
    return (lax.psum(lax.psum_scatter(ct, FSDP, scatter_dimension=dim, tiled=True), DATA),)


_weight.defvjp(lambda dtype, dim, value: (_weight(dtype, dim, value), None), _weight_bwd)


@jax.custom_vjp
def _logits(hidden: jax.Array, w: jax.Array) -> jax.Array:
    """Float32 logits [..., V/tp] of hidden [..., D] and w [V/tp, D], whose cotangent is rounded to hidden's dtype.

    JAX's own VJP would multiply in float32, at half of the tensor cores' speed.
    """
    return jnp.dot(hidden, w.astype(hidden.dtype).T, preferred_element_type=jnp.float32)


def _logits_bwd(saved: tuple[jax.Array, jax.Array], ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden, w = saved
    rounded = ct.astype(hidden.dtype)
    dx = jnp.dot(rounded, w.astype(hidden.dtype), preferred_element_type=hidden.dtype)
    rows, tokens = rounded.reshape(-1, w.shape[0]), hidden.reshape(-1, w.shape[1])
    dw = lax.dot_general(rows, tokens, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return dx, dw


_logits.defvjp(lambda hidden, w: (_logits(hidden, w), (hidden, w)), _logits_bwd)


@jax.custom_vjp
def _sum(x: jax.Array) -> jax.Array:
    """The sum over tp, which every rank holds; its cotangent reaches every rank whole."""
    return lax.psum(x, TP)


_sum.defvjp(lambda x: (_sum(x), None), lambda _, ct: (ct,))


@jax.custom_vjp
def _share(x: jax.Array) -> jax.Array:
    """x as every tp rank holds it; the ranks' cotangents are added."""
    return x


_share.defvjp(lambda x: (x, None), lambda _, ct: (lax.psum(ct, TP),))
